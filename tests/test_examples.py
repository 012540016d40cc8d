"""examples/: a task of one's own from its rows to RL, and a reward with partial credit."""

import sys

import pytest
from small_runs import ROOT, lines_of, rl_config, sft_config, write_jsonl

import data
import rl
import sft
import tasks
import verify
from core.files import read_jsonl
from examples import reverse
from examples.gsm8k import prepare, rollouts


def test_the_page_names_every_example():
    page = (ROOT / "examples" / "README.md").read_text()
    for path in (ROOT / "examples").glob("*.py"):
        assert path.name in page


# ---- reverse.py ----------------------------------------------------------------------------------
@pytest.fixture()
def words(tmp_path, monkeypatch):
    """The folder that examples/reverse.py writes."""
    monkeypatch.chdir(tmp_path)
    reverse.main()
    return reverse.FOLDER


def test_a_demonstration_of_every_row_is_right(words):
    tokenizer = data.Tokenizer(words)
    for name, n_rows in reverse.ROWS.items():
        problems, n_long = data.problems(f"{words}/{name}.jsonl", tokenizer, 64)
        assert (len(problems), n_long) == (n_rows, 0)
        for problem in problems[:50]:
            response = tokenizer.decode(problem.expert)
            assert reverse.reward(response, problem.row) == 1.0
            assert reverse.reward(response + " a", problem.row) == 0.0


def test_a_task_of_ones_own_goes_from_rows_to_rl(words):
    reward = f"{ROOT}/examples/reverse.py:reward"
    common = {"val": f"{words}/val.jsonl", "reward": reward, "max_new": 4, "eval_every": 2}
    trained = {"data": f"{words}/train.jsonl", "from_scratch": True, "steps": 2}
    sft.main(sft_config(words, "runs/s", **trained, **common))
    common |= {"data": f"{words}/rl.jsonl", "prompts": 2, "update_prompts": 2, "eval_n": 1}
    rl.main(rl.Config(init="runs/s", out="runs/r", steps=2, max_rounds=1, **common))
    assert [row["step"] for row in lines_of("runs/r", "eval")] == [0, 2]
    records = data.read_rows("runs/r/samples.jsonl")
    assert {record["reward"] for record in records} <= {0.0, 1.0}


# ---- closeness.py --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "answer, value",
    [
        ("8 + 9 + 9 + 9", 1.0),
        ("9 * 8 - 9 - 9", 0.5 / 20),  # 54, not 35
        ("8 + 9 + 9", 0.0),  # one number is missing
        ("9 / ( 9 - 9 ) + 8", 0.0),  # no value
        ("nine", 0.0),
    ],
)
def test_a_wrong_answer_earns_more_the_nearer_it_comes_and_never_counts_as_right(answer, value):
    reward = tasks.load_reward(f"{ROOT}/examples/closeness.py:reward")
    row = {"numbers": [8, 9, 9, 9], "answer": "35"}
    assert reward(f"\\boxed{{ {answer} }}", row) == pytest.approx(value)


def test_rl_runs_on_partial_credit(small_task, tmp_path):
    reward = f"{ROOT}/examples/closeness.py:reward"
    out = tmp_path / "r"
    rl.main(rl_config(small_task, out, reward=reward, steps=1, eval_every=1, eval_n=1))
    (numbers,) = lines_of(out, "train")
    assert 0 <= numbers["reward"] <= 100
    records = data.read_rows(out / "samples.jsonl")
    assert records and all(record["reason"] == "scored" for record in records)


# ---- gsm8k/prepare.py ----------------------------------------------------------------------------
def gsm8k_row(n: int, steps: int) -> dict:
    """A row as GSM8K has it, whose `steps` calculations end in n + steps."""
    lines = [
        f"Then there are {n + i}+1=<<{n + i}+1={n + i + 1}>>{n + i + 1}." for i in range(steps)
    ]
    return {"question": f"{n} and {steps}?", "answer": "\n".join(lines) + f"\n#### {n + steps:,}"}


def test_gsm8k_becomes_files_whose_every_trajectory_is_right(tmp_path, monkeypatch):
    rows = [gsm8k_row(990 + n, 1 + n % 3) for n in range(1600)]
    wrong = gsm8k_row(5, 1) | {"answer": "It is <<2+3=5>>5, so 6 left.\n#### 6"}
    write_jsonl(tmp_path / "train.jsonl", rows + [wrong] * 30)
    write_jsonl(tmp_path / "test.jsonl", rows[:30])
    out = tmp_path / "out"
    flags = f"--train {tmp_path}/train.jsonl --test {tmp_path}/test.jsonl --out {out}"
    monkeypatch.setattr(sys, "argv", ["prepare.py", *flags.split()])
    prepare.main()
    found = {path.stem: list(read_jsonl(path)) for path in out.glob("*.jsonl")}
    n_wrong = sum(row["prompt"] == wrong["question"] for row in found["problems"])
    assert n_wrong > 15
    assert {name: len(rows) for name, rows in found.items()} == {
        "sft": 1067 + 30 - 200 - n_wrong,
        "problems": 1067 + 30 - 200,
        "dev": 200,
        "test": 20,
    }
    for row in found["sft"]:
        assert verify.verify(row["response"], row["answer"]).correct
        assert row["response"].count("\n") in (1, 2)
    assert "," not in "".join(row["answer"] for row in found["sft"])
    assert not {row["prompt"] for row in found["dev"]} & {row["prompt"] for row in found["sft"]}
    write_jsonl(tmp_path / "train.jsonl", [rows[0], {"question": "1?", "answer": "60"}])
    with pytest.raises(SystemExit, match="row 2: `answer` has no"):
        prepare.main()


# ---- gsm8k/rollouts.py ---------------------------------------------------------------------------
def test_problems_won_and_lost_are_shown_with_a_response_of_each(tmp_path, monkeypatch, capsys):
    def record(init: str, problem: str, response: str, correct: bool) -> dict:
        reason = "" if correct else "wrong answer"
        return dict(
            init=init, problem=problem, response=response, gold="7", correct=correct, reason=reason
        )

    rows = []
    for init in ("old", "between", "new"):
        for sample in range(2):
            rows.append(record(init, "won?", f"{init} {sample}", init == "new" and sample == 1))
            rows.append(record(init, "lost?", f"{init} {sample}", init == "old"))
            rows.append(record(init, "same?", f"{init} {sample}", sample == 0))
    path = write_jsonl(tmp_path / "both.jsonl", rows)
    monkeypatch.setattr(sys, "argv", ["rollouts.py", path])
    rollouts.main()
    said = capsys.readouterr().out
    told, said = said.split("\n\n", 1)
    assert told.split("\n") == [
        f"- {init}: of 3 problems {always} right in all samples, {ever} in at least one; "
        "calculations true in 0% of the responses"
        for init, always, ever in (("old", 1, 2), ("between", 0, 1), ("new", 0, 2))
    ]
    assert said.startswith("1 problems with more right responses after, 1 with fewer.")
    won, lost = said.split("## Won")[1].split("## Lost")
    assert "0 of 2 right:\n\n    old 0\n    -- wrong answer" in won
    assert "1 of 2 right:\n\n    new 1\n    -- right" in won
    assert "lost?" in lost and "2 of 2 right:\n\n    old 0\n    -- right" in lost
    assert "between" not in said and "same?" not in said


@pytest.mark.parametrize(
    "response, true",
    [
        ("20/2=10\n10+5=15\n\\boxed{15}", True),
        ("20/2=10\n10+5=16\n\\boxed{16}", False),
        ("20 halves\n\\boxed{10}", False),
        ("\\boxed{10}", False),
    ],
)
def test_a_response_calculates_where_both_sides_of_every_line_are_equal(response, true):
    assert rollouts.calculates(response) == true
