"""The picture is drawn from the same readers as the tables, for every state a run can be in."""

import json
import sys

import numpy as np
import pytest

from paper import figures


def write_points(path):
    """Four runs: a clean rise, a flat one, a collapse and one with too few points."""
    rng, rows = np.random.default_rng(0), ["run,flops,performance"]
    x = np.linspace(0, 1, 21)
    shapes = {
        "rise": 50 + 20 * x / (x + 0.15),
        "flat": 20 + 0 * x,
        "collapse": 50 + 20 * x / (x + 0.15),
        "few": 30 + x,
    }
    shapes["collapse"][17:] -= 30
    for run, y in shapes.items():
        rows += [
            f"{run},{a * 3e15},{b + rng.normal(0, 0.4)}"
            for a, b in list(zip(x, y))[: 3 if run == "few" else 21]
        ]
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def write_sft(folder):
    folder.mkdir()
    losses = [1.0, 0.6, 0.5, 0.505, 0.53, 0.6, float("nan")]
    rows = [
        {"step": i, "kind": "val", "flops": i * 1e15, "val_loss": v} for i, v in enumerate(losses)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def test_picture_of_every_kind_of_run_is_written(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "f.png"
    argv = [
        "--sft",
        write_sft(tmp_path / "sft"),
        "--csv",
        write_points(tmp_path / "p.csv"),
        "--out",
        str(out),
    ]
    for fraction in ("1", "0.6"):
        assert figures.main([*argv, "--fit-fraction", fraction]) == 0
        assert out.read_bytes()[:4] == b"\x89PNG" and out.stat().st_size > 20_000
    assert capsys.readouterr().err == ""


def test_missing_matplotlib_and_nothing_to_draw_are_one_line(tmp_path, capsys, monkeypatch):
    assert figures.main([]) == 2
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert figures.main(["--csv", write_points(tmp_path / "p.csv")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "nothing to draw" in said[0] and "pip install matplotlib" in said[1]
