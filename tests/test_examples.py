"""examples/: a task of one's own from its rows to RL, and a reward with partial credit."""

import pytest
from small_runs import ROOT, lines_of, rl_config, sft_config

import data
import rl
import sft
import tasks
from examples import reverse


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
