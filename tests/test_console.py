"""What a run says of itself in its first minute: the cause, and the flag that helps."""

from types import SimpleNamespace

import pytest

from core import console


class Said(list):
    """Stands where core/run.py's Run is: keeps what it is told."""

    dir = "runs/x"

    def hint(self, key, text):
        self.append((key, text))

    steps = ()

    def of_kind(self, kind):
        return list(self.steps)


def record(answer="3", gold="4", reason="wrong answer", correct=False, response="so \\boxed{3}"):
    return dict(answer=answer, gold=gold, reason=reason, correct=correct, response=response)


def hints(numbers, records, steps=()):
    said = Said()
    said.steps = steps
    row = dict.fromkeys(("truncated", "unparsed", "unscored"), 0.0)
    row |= {"signal": 50.0, "right": 50.0, "updates": 0, **numbers}
    cfg = SimpleNamespace(max_new=16, reward="math", reward_timeout=30.0)
    console.print_hints(cfg, said, row, records)
    return said


@pytest.mark.parametrize(
    "numbers, records, key, told",
    [
        ({"truncated": 44.0}, [record()], "cut", "cut at --max-new 16"),
        (
            {"unparsed": 90.0},
            [record(), record(answer=None, reason="no boxed answer", response="It is 3.")],
            "unparsed",
            "(the first ends 'It is 3.': no boxed answer)",
        ),
        (
            {"right": 0.0, "signal": 0.0},
            [record()] * 3,
            "wrong",
            "0 of 3 responses are right by --reward math (3 wrong answer)",
        ),
        ({"right": 1.6}, [record(correct=True), record()], "wrong", "answer '3', gold '4'"),
        (
            {"right": 0.0},
            [record(answer="", reason="scored", response="three")],
            "wrong",
            "(1 scored one half or less): there is little to learn from. A wrong one: answer 'th",
        ),
        (
            {"unscored": 1.6},
            [record(correct=True), record(reason="reward timed out", answer="")],
            "unscored",
            "1.6% of the rewards earn 0 because a call took over --reward-timeout 30 s",
        ),
        ({"signal": 0.0, "right": 80.0}, [record()], "signal", "80% are right: raise --group"),
    ],
)
def test_the_cause_and_the_flag_are_named(numbers, records, key, told):
    ((found, text),) = hints(numbers, records)
    assert found == key and told in text


@pytest.mark.parametrize("n_steps, told", [(0, 0), (9, 0), (10, 1), (30, 1)])
def test_updates_that_do_not_help_for_ten_steps_are_commented(n_steps, told):
    lucky = {"right": 1.6, "updates": 1}
    said = hints(lucky, [record()], [{"right": 2.0, "entropy": None}] * n_steps)
    assert [key for key, _ in said] == ["wrong"] * told


def test_a_healthy_step_is_not_commented():
    assert hints({"truncated": 5.0, "unparsed": 10.0}, [record()]) == []
