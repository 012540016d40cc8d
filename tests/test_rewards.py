"""tasks/__init__.py: rewards by name or from a user's file, and what becomes of their numbers."""

import pytest
from small_runs import lines_of, policy_of, rl_config, write_jsonl

import data
import evaluate
import rl
import rollout
import tasks
from core.errors import UserError
from tasks import countdown
from verify import Verdict

PARTIAL = """
def near(response, row):
    return row["share"]

other = 3
"""


@pytest.fixture()
def own_file(tmp_path):
    """A file of the user's with a reward that reads a column of the row."""
    (tmp_path / "own.py").write_text(PARTIAL)
    return tmp_path / "own.py"


# ---- by name -------------------------------------------------------------------------------------
def test_the_rewards_of_the_project_are_there_by_name():
    assert tasks.names() == ["countdown", "math", "text"]
    assert tasks.load_reward("countdown") is countdown.reward
    for name in tasks.names():
        assert callable(tasks.load_reward(name))


def test_a_reward_in_a_file_of_the_users_is_loaded_by_path_and_function(own_file):
    reward = tasks.load_reward(f"{own_file}:near")
    assert reward("anything", {"share": 0.25}) == 0.25


@pytest.mark.parametrize(
    "name, message",
    [
        ("maths", "choose countdown, math, text, or give FILE.py:FUNCTION"),
        ("nowhere.py:f", "no file nowhere.py"),
        ("OWN:far", r"has no function far\(response, row\)"),
        ("OWN:other", "has no function other"),
        ("OWN", "has no function reward"),
        ("math:near", "has no function near"),
    ],
)
def test_a_reward_that_is_not_there_is_refused(own_file, name, message):
    with pytest.raises(UserError, match=f"--reward .*{message}"):
        tasks.load_reward(name.replace("OWN", str(own_file)))


# ---- math, text, Countdown -----------------------------------------------------------------------
def test_the_math_reward_compares_the_box_with_the_gold_answer_of_the_row():
    reward = tasks.load_reward("math")
    assert reward("so \\boxed{1/2}", {"answer": "0.5"}).correct
    assert reward("so \\boxed{1/2}", {"reward_model": {"ground_truth": "\\frac12"}}).correct
    assert not reward("so \\boxed{1/3}", {"answer": "0.5"}).correct


def test_the_text_reward_compares_trimmed_text_behind_the_thinking():
    reward = tasks.load_reward("text")
    assert reward("<think>no</think> yes ", {"answer": " yes"}).correct
    assert not reward("Yes", {"answer": "yes"}).correct
    unfinished = reward("<think> yes", {"answer": "yes"})
    assert not unfinished.correct
    assert unfinished.reason == "unfinished thinking"


def test_the_countdown_reward_needs_the_columns_of_its_rows():
    reward = tasks.load_reward("countdown")
    row = {"numbers": [1, 2], "answer": "3"}
    assert reward("<think> x </think> \\boxed{ 1 + 2 }", row).correct
    assert not reward("<think> x </think> \\boxed{ 1 + 1 }", row).correct
    with pytest.raises(UserError, match="columns numbers and answer"):
        reward("\\boxed{ 1 + 2 }", {"answer": "3"})


# ---- judged --------------------------------------------------------------------------------------
def judged(small_task, reward, finished=True) -> dict:
    policy = policy_of(small_task)
    policy.reward = reward
    problem = data.problems(f"{small_task}/eval.jsonl", policy.tokenizer, 64)[0][0]
    ids = [5, 6, 0]
    response = rollout.Response(ids, [0.0] * 3, [0.0] * 3, finished)
    (record,) = policy.judge([(problem._replace(opened="<think>"), response)])
    return record


@pytest.mark.parametrize(
    "value, reward, correct",
    [
        (0.25, 0.25, False),
        (0.75, 0.75, True),
        (0.5, 0.5, False),
        (True, 1.0, True),
        (-1, -1, False),
    ],
)
def test_a_number_is_kept_and_is_right_above_one_half(small_task, value, reward, correct):
    record = judged(small_task, lambda text, row: value)
    assert record["reward"] == reward
    assert record["correct"] is record["lenient"] is correct
    assert record["answer"] == ""  # None would count the response as unparsed
    assert record["reason"] == "scored"


def test_a_verdict_is_one_or_zero_with_its_answer_and_reason(small_task):
    lenient = judged(small_task, lambda text, row: Verdict(False, True, "7", "no box"))
    assert lenient["reward"] == 0.0
    assert (lenient["correct"], lenient["lenient"]) == (False, True)
    assert (lenient["answer"], lenient["reason"]) == ("7", "no box")
    assert judged(small_task, lambda text, row: Verdict(True, True, "7", "correct"))["reward"] == 1


def test_a_reward_gets_the_response_from_its_start_and_the_row_as_read(small_task):
    seen = []

    def reward(text, row):
        seen.append((text, row))
        return 1.0

    record = judged(small_task, reward)
    ((text, row),) = seen
    assert text == "<think>" + record["response"]  # what the prompt had opened is part of it
    assert row == data.read_rows(small_task / "eval.jsonl")[0]


def test_a_record_says_whether_the_response_was_cut_and_how_long_it_is(small_task):
    whole = judged(small_task, lambda text, row: 1.0)
    cut = judged(small_task, lambda text, row: 1.0, finished=False)
    assert (whole["finished"], whole["truncated"], whole["length"]) == (True, False, 3)
    assert (cut["finished"], cut["truncated"]) == (False, True)
    assert {"problem", "response", "gold"} <= set(whole)


# ---- in the scripts ------------------------------------------------------------------------------
def test_evaluation_reports_the_mean_reward_beside_the_share_of_right_responses(small_task):
    policy = policy_of(small_task)
    values = iter([0.2, 0.4, 0.6, 1.0])
    policy.reward = lambda text, row: next(values)
    problems, _ = data.problems(f"{small_task}/eval.jsonl", policy.tokenizer, 64)
    sampling = rollout.Sampling(max_new=2, eos_ids=(0,))
    summary, records = evaluate.evaluate(policy, problems[:2], 2, sampling)
    assert summary["reward"] == pytest.approx(55)
    assert summary["pass1"] == 50
    assert [record["reward"] for record in records] == [0.2, 0.4, 0.6, 1.0]


def test_rl_trains_on_partial_credit_from_a_users_file(small_task, tmp_path):
    # No response is ever right; shorter ones earn more. A cut response earns nothing
    source = "def reward(response, row):\n    return 0.4 / (1 + len(response))\n"
    (tmp_path / "short.py").write_text(source)
    cfg = rl_config(small_task, tmp_path / "r", reward=f"{tmp_path}/short.py:reward", steps=1)
    rl.main(cfg)
    (row,) = lines_of(tmp_path / "r", "train")
    assert row["right"] == 0
    assert row["grad_norm"] > 0
    evaluations = lines_of(tmp_path / "r", "eval")
    assert all(row["pass1"] == 0 < row["reward"] < 40 for row in evaluations)


def test_the_built_in_task_brings_its_reward_and_a_users_file_does_not(small_task, tmp_path):
    given = {"data": str(small_task)}
    assert tasks.preset("rl", given)["reward"] == "countdown"
    assert given == {}  # the folder became the files in it
    path = write_jsonl(tmp_path / "p.jsonl", data.read_rows(small_task / "test.jsonl"))
    assert tasks.preset("rl", {"data": path}) == {}
    assert tasks.preset("evaluate", {})["reward"] == "countdown"
