"""evaluate.py: pass@1 and pass@k, which checkpoint is meant, what a Ctrl-C keeps."""

import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from small_runs import ENV, ROOT, policy_of, rl_config, write_jsonl

import data
import evaluate
import rollout
from core.errors import UserError


# ---- numbers -------------------------------------------------------------------------------------
@pytest.mark.parametrize("n, k, right", [(8, 2, 3), (5, 4, 1), (6, 1, 2), (4, 4, 0)])
def test_the_best_of_k_is_estimated_without_bias(n, k, right):
    samples = [1] * right + [0] * (n - right)
    picks = list(itertools.combinations(samples, k))
    share = sum(any(pick) for pick in picks) / len(picks)
    assert evaluate.pass_at_k(n, right, k) == pytest.approx(share)


def record(correct: bool, **changes) -> dict:
    plain = dict(correct=correct, lenient=correct, reward=float(correct), length=4, truncated=False)
    plain["reason"] = "scored"
    return {**plain, **changes}


def test_the_standard_error_is_over_problems():
    records = [record(True), record(True), record(True), record(False)]
    summary = evaluate.summarise(records, 2)
    assert summary["pass1"] == 75
    # Problems have 100 and 50: their standard deviation over the root of 2
    assert summary["pass1_se"] == pytest.approx(35.355339 / 2**0.5)
    assert (summary["n"], summary["problems"]) == (4, 2)
    assert summary["pass_at_2"] == 100
    assert "pass_at_4" not in summary
    assert evaluate.summarise(records[:2], 2)["pass1_se"] == 0


def test_lenient_and_cut_responses_are_counted_beside_the_strict_verdict():
    records = [record(True, truncated=True), record(False, lenient=True, length=8)]
    summary = evaluate.summarise(records, 1)
    assert summary["pass1"] == 50
    assert summary["lenient"] == 100
    assert summary["truncated"] == 50
    assert summary["length"] == 6


def test_evaluation_samples_each_problem_n_times(small_task):
    policy = policy_of(small_task)
    problems, _ = data.problems(f"{small_task}/eval.jsonl", policy.tokenizer, 64)
    sampling = rollout.Sampling(max_new=16, eos_ids=(0,))
    summary, records = evaluate.evaluate(policy, problems, 2, sampling)
    assert summary["problems"] == 20
    assert summary["n"] == 40 == len(records)
    assert 0 <= summary["pass1"] <= 100
    fields = {"problem", "response", "gold", "answer", "reason", "finished", "truncated"}
    assert fields <= set(records[0])
    assert [r["problem"] for r in records[::2]] == [problem.text for problem in problems]


def test_the_likeliest_token_alone_is_greedy(small_task):
    policy = policy_of(small_task)
    problems, _ = data.problems(f"{small_task}/test.jsonl", policy.tokenizer, 256)
    texts = []
    for temperature, top_k in ((1.0, 1), (0.0, 0)):
        sampling = rollout.Sampling(12, temperature, eos_ids=(0,), rows=8, top_k=top_k)
        _, records = evaluate.evaluate(policy, problems[:4], 1, sampling)
        texts.append([r["response"] for r in records])
    assert texts[0] == texts[1]


# ---- which model ---------------------------------------------------------------------------------
def run_of(folder, *steps, kinds=("train",)):
    """A run directory with whole checkpoints at these steps."""
    for step in steps:
        path = folder / "checkpoints" / f"step_{step:06d}"
        path.mkdir(parents=True)
        (path / "trainer.json").write_text(json.dumps({"step": step, "files": {}}))
    folder.mkdir(exist_ok=True)
    rows = []
    for step, loss in zip(steps, (3.0, 1.0, 2.0, 2.5)):
        for kind in kinds:
            rows.append({"step": step, "kind": kind, "val_loss": loss, "flops": float(step)})
    write_jsonl(folder / "metrics.jsonl", rows)
    return folder


def test_a_folder_is_the_model_itself(small_task):
    assert evaluate.find(str(small_task)) == small_task


def test_an_sft_run_means_the_checkpoint_of_its_lowest_validation_loss(tmp_path, capsys):
    folder = run_of(tmp_path / "r", 0, 10, 20, 30, kinds=("train", "val"))
    assert evaluate.find(str(folder)).name == "step_000010"
    assert "taking step_000010, minimum validation loss" in capsys.readouterr().out


def test_another_run_means_its_newest_whole_checkpoint(tmp_path, capsys):
    folder = run_of(tmp_path / "r", 0, 10, 20)
    (folder / "checkpoints" / "step_000020" / "trainer.json").unlink()
    (folder / "checkpoints" / "step_000030.tmp").mkdir()
    assert evaluate.find(str(folder)).name == "step_000010"
    assert "taking step_000010, its newest checkpoint" in capsys.readouterr().out


def evaluated_run(folder, *shares):
    """A run with an evaluation of 1,000 responses at each tenth step."""
    steps = [10 * i for i in range(len(shares))]
    run_of(folder, *steps)
    rows = []
    for step, share in zip(steps, shares):
        rows.append({"step": step, "kind": "eval", "pass1": share, "n": 1000, "flops": step * 1e9})
    write_jsonl(folder / "metrics.jsonl", rows)
    return folder


@pytest.mark.parametrize(
    "which, name, why",
    [
        ("", "step_000090", "the best point of its curve"),
        ("@best", "step_000090", "the best point of its curve"),
        ("@last", "step_000090", "its newest checkpoint"),
        ("@40", "step_000040", "as asked"),
    ],
)
def test_a_checkpoint_of_an_rl_run_is_named_by_its_place(tmp_path, capsys, which, name, why):
    # Step 30 was lucky: the curve that is fitted to all points rises to its end
    shares = (10, 18, 25, 47, 36, 40, 43, 45, 46, 46.5)
    folder = evaluated_run(tmp_path / "r", *shares)
    assert evaluate.find(f"{folder}{which}").name == name
    assert why in capsys.readouterr().out


@pytest.mark.parametrize(
    "which, message", [("7", "no checkpoint of that step; there are 0, 10"), ("x", "write @best")]
)
def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(tmp_path, which, message):
    folder = evaluated_run(tmp_path / "r", 10, 20)
    with pytest.raises(UserError, match=message):
        evaluate.find(f"{folder}@{which}")


def test_a_resumed_run_has_the_start_that_it_was_begun_from(tmp_path):
    """The run that --init names has trained on since: another checkpoint is its best now."""
    start = run_of(tmp_path / "sft", 0, 10, kinds=("train", "val"))
    cfg = rl_config(start, tmp_path / "rl", resume=True)
    first = evaluate.find_start(cfg)
    (tmp_path / "rl").mkdir()
    (tmp_path / "rl" / "run.json").write_text(json.dumps({"start": str(first)}))
    shutil.rmtree(start)
    run_of(start, 0, 10, 20, 30)
    assert evaluate.find_start(cfg) == first != evaluate.find(str(start))
    shutil.rmtree(start)
    with pytest.raises(UserError, match="was begun from .*step_000010, which is gone"):
        evaluate.find_start(cfg)


def test_a_run_that_has_no_checkpoint_yet_says_so(tmp_path):
    with pytest.raises(UserError, match="no whole checkpoint in it yet"):
        evaluate.find(str(run_of(tmp_path / "r")))


def test_a_tokenizer_of_another_model_is_refused(small_task, tmp_path):
    config = json.loads((small_task / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((small_task / name).read_text())
    with pytest.raises(UserError, match="the tokenizer has .* ids, the model 100"):
        evaluate.open_tokenizer(tmp_path)


# ---- the command ---------------------------------------------------------------------------------
def command(*words) -> list[str]:
    return [str(word) for word in (sys.executable, ROOT / "evaluate.py", *words)]


def test_the_command_prints_a_summary_as_json_and_writes_a_line_per_sample(small_task, tmp_path):
    out = tmp_path / "new" / "eval.jsonl"
    words = ["--init", small_task, "--data", small_task, "--n", "2", "--limit", "3"]
    words += ["--max-new", "8", "--out", out]
    done = subprocess.run(command(*words), env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert {"init", "data", "pass1", "pass1_se", "n", "problems", "pass_at_2"} <= set(summary)
    assert summary["n"] == 6
    assert len(out.read_text().splitlines()) == 6


def test_samples_go_behind_what_is_printed_where_out_is_a_standard_output_that_is_a_file(capfd):
    print("before")
    evaluate.write_samples("/dev/stdout", [{"a": 1}])
    print("behind")
    assert capfd.readouterr().out == 'before\n{"a": 1}\nbehind\n'


def test_ctrl_c_writes_the_finished_responses_and_counts_them(small_task, tmp_path):
    out = tmp_path / "eval.jsonl"
    words = ["--init", small_task, "--data", small_task, "--n", "200", "--rows", "2"]
    process = subprocess.Popen(
        command(*words, "--temperature", "1", "--out", out),
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert "the built-in task, with --data" in process.stdout.readline()
        assert "20 problems" in process.stdout.readline()
        time.sleep(3)  # 4,000 responses take minutes
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    kept = int(re.search(r"stopped with (\d+) of 4000 responses; they are in", errors)[1])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert 0 < kept == len(rows) < 4000
    assert {"problem", "response", "correct", "length"} <= set(rows[0])
