"""evaluate.py: pass@1 and pass@k, which checkpoint is meant, what a Ctrl-C keeps."""

import itertools
import json
import math
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch
from small_runs import ENV, ROOT, policy_of, write_jsonl

import data
import evaluate
import model as model_file
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


def test_models_are_compared_on_the_same_problems_and_the_same_random_numbers(small_task, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(small_task, other)
    net = model_file.load_model(small_task)
    with torch.no_grad():
        net.head.mul_(0.5)
    model_file.save_model(net, other)
    same = tmp_path / "same"
    shutil.copytree(small_task, same)
    out = tmp_path / "eval.jsonl"
    words = ["--init", small_task, other, same, "--data", small_task, "--limit", "5", "--n", "2"]
    words += ["--max-new", "8", "--reward", coin_reward(tmp_path), "--out", out]
    done = subprocess.run(command(*words), env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    names = [str(small_task), str(other), str(same)]
    assert [row["init"] for row in found["models"]] == names
    samples = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["init"] for row in samples] == [name for name in names for _ in range(10)]
    one = [row["response"] for row in samples if row["init"] == names[0]]
    assert one == [row["response"] for row in samples if row["init"] == names[2]]
    assert one != [row["response"] for row in samples if row["init"] == names[1]]

    there, zero, back = found["differences"]
    assert (there["from"], there["to"]) == (names[0], names[1])
    assert (zero["difference"], zero["low"], zero["high"]) == (0, 0, 0)
    assert back["difference"] == -there["difference"]
    shares = []
    for name in names[:2]:
        right = [row["correct"] for row in samples if row["init"] == name]
        shares.append([(right[i] + right[i + 1]) / 2 for i in range(0, 10, 2)])
    gains = [100 * (b - a) for a, b in zip(*shares)]
    half = 1.6449 * statistics.stdev(gains) / math.sqrt(5)
    assert half > 0
    assert there["difference"] == pytest.approx(statistics.mean(gains))
    assert there["low"] == pytest.approx(statistics.mean(gains) - half)
    assert there["high"] == pytest.approx(statistics.mean(gains) + half)
    shown = f"{there['difference']:+.1f} [{there['low']:+.1f}, {there['high']:+.1f}]"
    assert f"{small_task} -> {other}  {shown}" in done.stdout


def coin_reward(folder) -> str:
    """A reward that calls about half of all random responses right."""
    code = "def reward(response, row):\n    return sum(map(ord, response)) % 2\n"
    (folder / "coin.py").write_text(code)
    return f"{folder}/coin.py:reward"


def test_models_that_were_given_other_problems_are_not_compared():
    records = [{"problem": text, "correct": True} for text in "abac"]
    with pytest.raises(UserError, match="not given the same problems"):
        evaluate.compare(["x", "y"], records, 1)


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
