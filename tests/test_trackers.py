"""core/trackers.py: what a tracker is sent, that a run goes on in it, and on without it."""

import json
import sys

import pytest
from small_runs import lines_of, lose_checkpoint, sft_config

import sft
from core import trackers
from core.errors import UserError

# As much of wandb as is called here: each call is a line of calls.jsonl.
WANDB = """
import json
class Run:
    def define_metric(self, *names, **more): pass
    def log(self, numbers):
        if {fails}: raise RuntimeError("no network\\nat all")
        note("log", numbers)
def note(what, given):
    with open({calls!r}, "a") as file:
        file.write(json.dumps([what, given]) + chr(10))
def init(**given):
    note("init", given)
    return Run()
"""


@pytest.fixture()
def wandb(tmp_path, monkeypatch):
    """Lays a package wandb; install(fails) -> the file that its calls are written to."""

    def install(fails: bool = False):
        calls = tmp_path / "calls.jsonl"
        (tmp_path / "wandb.py").write_text(WANDB.format(fails=fails, calls=str(calls)))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "wandb", raising=False)
        return calls

    yield install
    sys.modules.pop("wandb", None)


def expected_of(out, first: int = 0) -> list[dict]:
    """Each line of metrics.jsonl as a tracker should have got it."""
    found = []
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        kind = row.pop("kind")
        step = row.pop("step")
        numbers = {f"{kind}/{name}": value for name, value in row.items() if value is not None}
        if step >= first:
            found.append({"step": step, **numbers})
    return found


def test_every_number_is_sent_and_a_resumed_run_goes_on_under_its_id(small_task, tmp_path, wandb):
    calls = wandb()
    out = tmp_path / "r"
    sft.main(sft_config(small_task, out, log_to="wandb"))
    (_, begun), *sent = [json.loads(line) for line in calls.read_text().splitlines()]
    assert [numbers for _, numbers in sent] == expected_of(out)
    assert {"train/loss", "train/grad_norm", "train/flops"} <= set(sent[1][1])
    assert begun["resume"] == "allow"
    assert begun["config"]["log_to"] == "wandb"

    calls.unlink()
    lose_checkpoint(out, 6)
    sft.main(sft_config(small_task, out, log_to="wandb", resume=True))
    (_, again), *sent = [json.loads(line) for line in calls.read_text().splitlines()]
    assert again["id"] == begun["id"]
    later = sent[0][1]["step"]
    assert 0 < later <= 6
    assert [numbers for _, numbers in sent] == expected_of(out, first=later)


def test_a_tracker_that_fails_is_named_once_and_the_run_goes_on(
    small_task, tmp_path, wandb, capsys
):
    wandb(fails=True)
    assert sft.main(sft_config(small_task, tmp_path / "a", log_to="wandb"))
    printed = capsys.readouterr().out
    assert printed.count("--log-to wandb failed, so it is off now: RuntimeError: no network;") == 1
    sft.main(sft_config(small_task, tmp_path / "b"))
    assert lines_of(tmp_path / "a") == lines_of(tmp_path / "b")


def test_a_tracker_that_is_not_installed_is_named_before_training(
    small_task, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "path", [])  # nowhere to find it
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match="not installed; pip install wandb"):
        trackers.check("wandb")
    trackers.check("")


def test_what_is_null_or_no_number_is_not_sent():
    row = {"step": 3, "kind": "train", "loss": 0.5, "gap": None, "status": "ok", "updates": 0}
    assert trackers.numbers_of(row) == {"train/loss": 0.5, "train/updates": 0}


def test_tensorboard_shows_the_numbers_and_forgets_what_a_killed_run_wrote(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = trackers.Tracker("tensorboard", tmp_path, -1, {})
    for step in (1, 2, 3):
        first.log({"step": step, "kind": "train", "loss": float(step)})
    again = trackers.Tracker("tensorboard", tmp_path, 2, {})
    again.log({"step": 3, "kind": "train", "loss": 7.0})
    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    assert [(x.step, x.value) for x in shown.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 7)]
