"""The benchmark: its workload is fixed by the configuration, its last line is JSON, its mistakes are one line."""

import json
import re
import sys
from pathlib import Path

import pytest

import data
from bench import __main__ as bench

ROOT = Path(bench.__file__).parent


def test_workload_depends_on_the_configuration_alone_and_its_lengths_are_geometric():
    cfg = bench.Rollout(prompts=500, group=8)
    prompts, lengths = bench.workload(cfg, 32000)
    assert (prompts, lengths) == bench.workload(cfg, 32000)
    assert len(prompts) == 500 and len(lengths) == 4000 and {len(p) for p in prompts} == {64}
    assert min(lengths) == 1 and max(lengths) == 256
    expected = 96 * (1 - (1 - 1 / 96) ** 256)  # the mean of min(length, 256)
    assert abs(sum(lengths) / 4000 - expected) < 4  # 3 standard errors


def test_a_run_ends_in_json_with_what_it_measured(tmp_path, capsys):
    bench.make_folder(bench.Rollout(model="tiny"), tmp_path)
    cfg = bench.Rollout(
        model=str(tmp_path), batches="4", repeats=2, prompts=2, group=4, mean_new=6, max_new=12
    )
    bench.bench_rollout(cfg)
    *_, line, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert "tokens/s" in line and "MBU" in line
    assert found["tokens_per_s"] > 0 and found["peak_mb"] > found["weights_mb"] > 0
    assert 1 <= found["rows_per_token"] <= 1.15 and 0 < found["slot_use"] <= 1
    assert found["tokens"] == sum(bench.workload(cfg, 160)[1])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["sampler"], "error: sampler to measure; give one of: rollout, sft, rl"),
        (["rollout", "--batches", "8,x"], "error: --batches 8,x: give numbers"),
        (
            ["sft", "--model", "tiny", "--repeats", "1", "--flags=--nonsense"],
            "error: --nonsense: no such flag",
        ),
        (["rollout", "--model", "nowhere"], "error: --model nowhere: neither a shape"),
        (
            ["rollout", "--peer", "--model", "tiny", "--peer-python", "/nowhere/python"],
            "--peer-python /nowhere/python",
        ),
    ],
)
def test_mistakes_are_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    with pytest.raises(SystemExit) as end:
        bench.start()
    assert end.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_our_script_trains_on_exactly_the_rows_that_the_peers_get(tmp_path):
    cfg = bench.Sft(model="tiny", rows=16)
    vocab = bench.training_folder(cfg, tmp_path / "model")
    bench.write_work(cfg, tmp_path, vocab)
    examples, n_long = data.sft_examples(
        tmp_path / "rows.jsonl", data.Tokenizer(tmp_path / "model"), cfg.longest
    )
    theirs = json.loads((tmp_path / "work.json").read_text())["rows"]
    assert [[*row.prompt, *row.response] for row in examples] == theirs and n_long == 0
    assert len(theirs) == 48 and max(map(len, theirs)) <= 256 and min(map(len, theirs)) >= 32
    assert {len(row) for row in bench.sft_rows(bench.Sft(fixed=True), vocab)} == {256}


def test_a_training_run_counts_the_tokens_after_its_first_step(capsys):
    cfg = bench.Sft(model="tiny", rows=4, steps=1, repeats=1, longest=64)
    bench.bench_training(cfg)
    found, lengths = (
        json.loads(capsys.readouterr().out.splitlines()[-1]),
        [len(row) for row in bench.sft_rows(cfg, 160)],
    )
    assert found["tokens"] == sum(lengths[i] for i in data.plan(8, cfg.seed, 4, 4))
    assert 0 < found["mfu"] < 1 and found["peak_mb"] > 100 and 0 <= found["padding"] < 20
    assert found["seconds"] >= found["train_s"] + found["update_s"] > 0


def test_a_step_of_rl_is_split_into_its_parts(capsys):
    bench.bench_training(
        bench.Rl(model="tiny", prompts=2, group=2, steps=1, repeats=1, prompt_tokens=8, max_new=6)
    )
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["tokens"] <= 24 and min(found["sample_s"], found["score_s"], found["update_s"]) > 0
    assert (
        found["seconds"]
        >= found["sample_s"] + found["score_s"] + found["logp_s"] + found["update_s"]
    )


@pytest.mark.parametrize(
    "script", sorted((ROOT / "peers").glob("*.py")), ids=lambda path: path.name
)
def test_a_peers_script_imports_nothing_of_ours(script):
    if script.name == "compare_math_verify.py":
        pytest.skip("it compares verdicts side by side, in one process")
    ours = "|".join(path.stem for path in ROOT.glob("*.py"))
    assert not re.findall(rf"^\s*(?:import|from) (?:{ours})\b", script.read_text(), re.M)
