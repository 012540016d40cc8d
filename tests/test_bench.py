"""The benchmark: its workload is fixed by the configuration, its last line is JSON, its mistakes are one line."""
import json
import re
import sys
from pathlib import Path

import pytest

import bench

ROOT = Path(bench.__file__).parent


def test_workload_depends_on_the_configuration_alone_and_its_lengths_are_geometric():
    cfg = bench.Rollout(prompts=500, group=8)
    prompts, lengths = bench.workload(cfg, 32000)
    assert (prompts, lengths) == bench.workload(cfg, 32000)
    assert len(prompts) == 500 and len(lengths) == 4000 and {len(p) for p in prompts} == {64}
    assert min(lengths) == 1 and max(lengths) == 256
    expected = 96 * (1 - (1 - 1 / 96) ** 256)                                      # the mean of min(length, 256)
    assert abs(sum(lengths) / 4000 - expected) < 4                                 # 3 standard errors


def test_a_run_ends_in_json_with_what_it_measured(tmp_path, capsys):
    bench.make_folder(bench.Rollout(model="tiny"), tmp_path)
    cfg = bench.Rollout(model=str(tmp_path), batches="4", repeats=1, prompts=2, group=4, mean_new=6, max_new=12)
    bench.bench_rollout(cfg)
    *_, line, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert "tokens/s" in line and "MBU" in line
    assert found["tokens_per_s"] > 0 and found["peak_mb"] > found["weights_mb"] > 0
    assert 1 <= found["rows_per_token"] <= 1.15 and 0 < found["slot_use"] <= 1
    assert found["tokens"] == sum(bench.workload(cfg, 160)[1])


@pytest.mark.parametrize("arguments, message", [
    (["sampler"], "error: sampler to measure; give one of: rollout"),
    (["rollout", "--batches", "8,x"], "error: --batches 8,x: give numbers"),
    (["rollout", "--model", "nowhere"], "error: --model nowhere: neither a shape"),
    (["rollout", "--peer", "--model", "tiny", "--peer-python", "/nowhere/python"], "--peer-python /nowhere/python")])
def test_mistakes_are_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    with pytest.raises(SystemExit) as end:
        bench.start()
    assert end.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_the_peer_script_imports_nothing_of_ours():
    ours = "|".join(path.stem for path in ROOT.glob("*.py"))
    assert not re.findall(rf"^\s*(?:import|from) (?:{ours})\b", (ROOT / "peers" / "generate_hf.py").read_text(), re.M)
