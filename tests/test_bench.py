"""The benchmark: a workload fixed by the configuration, JSON at the end, mistakes in one line."""

import ast
import contextlib
import importlib.util
import io
import json
import sys
from dataclasses import replace

import pytest

import data
from bench import __main__ as bench
from bench import gpu, measure, parity, rl, rollout, sft, training


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_workload_depends_on_the_configuration_alone_and_its_lengths_are_geometric():
    cfg = rollout.Config(prompts=500, group=8)
    prompts, lengths = rollout.workload(cfg, 32000)
    assert (prompts, lengths) == rollout.workload(cfg, 32000)
    assert len(prompts) == 500
    assert len(lengths) == 4000
    assert {len(p) for p in prompts} == {64}
    assert min(lengths) == 1
    assert max(lengths) == 256
    expected = 96 * (1 - (1 - 1 / 96) ** 256)  # the mean of min(length, 256)
    assert abs(sum(lengths) / 4000 - expected) < 4  # 3 standard errors


def test_a_run_ends_in_json_with_what_it_measured(tmp_path, capsys):
    measure.make_model(measure.Common(model="tiny"), tmp_path)
    cfg = rollout.Config(
        model=str(tmp_path), batches="4", repeats=2, prompts=2, group=4, mean_new=6, max_new=12
    )
    rollout.main(cfg)
    *_, line, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert "tokens/s" in line
    assert "MBU" in line
    assert found["tokens_per_s"] > 0
    assert found["peak_mb"] > found["weights_mb"] > 0
    assert 1 <= found["rows_per_token"] <= 1.15
    assert 0 < found["slot_use"] <= 1
    assert found["tokens"] == sum(rollout.workload(cfg, 160)[1])


def test_each_side_counts_at_its_best_and_the_ratios_are_ours_over_theirs():
    ours = {"tokens_per_s": 30.0, "tokens_per_cpu_s": 20.0, "peak_mb": 100}
    theirs = {
        "static 8": {"tokens_per_s": 10.0, "tokens_per_cpu_s": 9.0, "peak_mb": 50},
        "static 16": {"tokens_per_s": 15.0, "tokens_per_cpu_s": 8.0, "peak_mb": 60},
    }
    found = measure.compare(ours, "static", theirs)
    assert found["ratio_static"] == 2
    assert found["ratio_static_cpu"] == 2.5
    assert found["static_mode"] == "static 16"
    assert found["static_peak_mb"] == 60


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["sampler"], "error: sampler to measure; give one of: rollout, sft, rl, parity, gpu"),
        (["rollout", "--batches", "8,x"], "error: --batches 8,x: give numbers"),
        (["rollout", "--group", "0"], "error: --group is 0; it must be above 0"),
        (
            ["sft", "--model", "tiny", "--repeats", "1", "--flags=--nonsense"],
            "error: --nonsense: no such flag",
        ),
        (["gpu", "--part", "x"], "error: --part x: give one of: checks, machine, sft"),
        (["rollout", "--model", "nowhere"], "error: --model nowhere: neither a shape"),
        (
            ["rollout", "--peer", "--model", "tiny", "--peer-python", "/nowhere/python"],
            "--peer-python /nowhere/python",
        ),
    ],
)
def test_mistakes_are_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as end:
        bench.start()
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_our_script_trains_on_exactly_the_rows_that_the_peers_get(tmp_path):
    cfg = sft.Config(model="tiny", rows=16)
    vocab = training.make_folder(cfg, tmp_path / "model")
    sft.write_work(cfg, tmp_path, sft.make_rows(cfg, vocab))
    examples, n_long = data.sft_examples(
        tmp_path / "rows.jsonl", data.Tokenizer(tmp_path / "model"), cfg.longest
    )
    theirs = json.loads((tmp_path / "work.json").read_text())["rows"]
    assert [[*row.prompt, *row.response] for row in examples] == theirs
    assert n_long == 0
    assert len(theirs) == 48
    assert max(map(len, theirs)) <= 256
    assert min(map(len, theirs)) >= 32
    assert {len(row) for row in sft.make_rows(sft.Config(fixed=True), vocab)} == {256}


def test_a_training_run_counts_the_tokens_after_its_first_step(capsys):
    cfg = sft.Config(model="tiny", rows=4, steps=1, repeats=1, longest=64)
    sft.main(cfg)
    found = last_json(capsys)
    lengths = [len(row) for row in sft.make_rows(cfg, 160)]
    assert found["tokens"] == sum(lengths[i] for i in data.plan(8, cfg.seed, 4, 4))
    assert 0 < found["mfu"] < 1
    assert found["peak_mb"] > 100
    assert found["seconds"] >= found["train_s"] + found["update_s"] > 0


def test_the_flops_of_mfu_are_those_of_the_log_without_what_was_recomputed(tmp_path):
    cfg = sft.Config(model="tiny", rows=4, steps=1, longest=64)
    rows = sft.make_rows(cfg, training.make_folder(cfg, tmp_path / "model"))
    sft.write_work(cfg, tmp_path, rows)
    logged = sft.run_ours(cfg, tmp_path)["flops"]
    needed = sft.needed_flops(cfg, rows, measure.shape("tiny"))
    assert needed == pytest.approx(logged)
    recomputed = sft.run_ours(replace(cfg, recompute=True), tmp_path)["flops"]
    assert logged < recomputed < 4 / 3 * logged


def test_a_step_of_rl_is_split_into_its_parts(capsys):
    cfg = rl.Config(
        model="tiny", prompts=2, group=64, steps=1, repeats=1, prompt_tokens=8, max_new=6
    )  # scoring a few responses takes less than seconds are rounded to
    rl.main(cfg)
    found = last_json(capsys)
    assert found["tokens"] <= 2 * 64 * 6
    assert min(found["sample_s"], found["score_s"], found["update_s"]) > 0
    assert found["seconds"] >= sum(found[part] for part in rl.PARTS)


@pytest.mark.parametrize("part", ["checks", "machine", "sft", "sampler", "rl"])
def test_every_part_of_the_gpu_run_measures_on_a_cpu_too(part, capsys):
    gpu.run_part(part)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["case"] for row in rows] == list(gpu.PARTS[part]())
    for row in rows:
        assert "error" not in row
        assert row["part"] == part
        assert row.get("ok", True)


def test_a_part_that_takes_too_long_or_a_case_that_fails_is_a_row_and_the_rest_goes_on(
    monkeypatch, capsys
):
    def fails():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(gpu.PARTS, "machine", lambda: {"bad": fails, "good": lambda: {"x": 1.0}})
    gpu.run_part("machine")
    bad, good = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert bad["error"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert good["x"] == 1.0
    gpu.main(gpu.Config(minutes=0.02))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["part"] for row in found["rows"]] == list(gpu.PARTS)
    assert found["failed"] == len(found["rows"])
    assert all(row["error"].startswith("stopped after") for row in found["rows"])


@pytest.mark.parametrize("script", sorted(measure.PEERS.glob("*.py")), ids=lambda p: p.name)
def test_a_peers_script_imports_nothing_of_ours(script):
    if script.name == "compare_math_verify.py":
        pytest.skip("it compares verdicts side by side, in one process")
    ours = {path.stem for path in measure.ROOT.glob("*.py")}
    ours |= {path.parent.name for path in measure.ROOT.glob("*/__init__.py")}
    imported = set()
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert not imported & ours


@pytest.fixture(scope="module")
def parity_rows():
    if importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        parity.main(parity.Config(json=True))
    return json.loads(out.getvalue().splitlines()[-1])["rows"]


@pytest.mark.parametrize("name", [name for name in parity.CASES if name != "BNPO"])
def test_losses_and_gradients_are_those_of_trl_but_for_a_constant_beside_the_deviation(
    name, parity_rows
):
    rows = [row for row in parity_rows if row["case"] == name]
    assert len(rows) == (1 if "trainer" in parity.CASES[name].theirs else 2)
    for row in rows:
        assert row["like_theirs"] < 1e-5
        assert row["difference"] < (1e-3 if parity.CASES[name].why else 1e-5)
        assert row["loss"] == pytest.approx(row["their_loss"], rel=1e-3, abs=1e-6)
        if name != "CISPO":  # its bound, a ratio of 5, is far away
            assert (row["clipped"] > 0) == (row["step"] == 2)
