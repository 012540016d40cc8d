"""core/run.py: the run directory, when it saves and ends, and what a crash leaves behind."""

import json
import math
import os
import shutil
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from test_checkpoint import small_model, state_file

from core import run
from core.errors import UserError
from core.run import Run


@dataclass
class Config:
    out: str
    lr: float = 1e-5
    overwrite: bool = False
    resume: bool = False
    eval_every: int = 2
    save_every: int = 0
    keep: int = 0
    seed: int = 0


@pytest.fixture()
def cfg(tmp_path):
    return Config(out=str(tmp_path / "r"))


def opened(cfg: Config, last: int = 10, start: Path = Path("model"), **facts) -> Run:
    """A run that saves a small model."""
    found = Run(cfg, last, start, **facts)
    found.attach(small_model(), [], lambda folder: None)
    return found


# ---- the directory -------------------------------------------------------------------------------
def test_a_run_writes_down_what_it_was_started_with(cfg):
    found = opened(cfg, val_set="abc")
    about = json.loads((found.dir / "run.json").read_text())
    assert about["config"]["lr"] == 1e-5
    assert about["val_set"] == "abc"
    assert about["world_size"] == 1
    assert about["argv"]


def test_a_used_directory_is_refused_and_both_remedies_are_named(cfg):
    opened(cfg)
    with pytest.raises(UserError, match="--resume.*--overwrite"):
        opened(cfg)
    opened(replace(cfg, overwrite=True))


def test_overwrite_deletes_the_earlier_run(cfg):
    found = opened(cfg)
    found.save(1)
    found.log(1, "train", loss=1.0)
    again = opened(replace(cfg, overwrite=True))
    assert again.first == 0
    assert again.metrics == []
    assert again.saved() == set()


def test_overwrite_never_deletes_a_folder_that_is_no_run(cfg, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not a run directory"):
        opened(replace(cfg, overwrite=True))
    assert (tmp_path / "r" / "thesis.txt").exists()


# ---- resume --------------------------------------------------------------------------------------
def test_a_resumed_run_has_its_counters_and_its_position_back(cfg):
    found = opened(cfg)
    found.count(tokens=12, flops=3.0, flops_hw=4.0)
    found.count(tokens=1, flops=1.0, flops_hw=1.0)
    found.position = 48
    found.save(3)
    again = opened(replace(cfg, resume=True))
    assert again.first == 3
    assert again.totals == {"tokens": 13, "flops": 4.0, "flops_hw": 5.0}
    assert again.position == 48
    assert list(again.steps())[0] == 3


def test_resume_of_a_run_that_has_not_begun_begins(cfg):
    opened(cfg)
    again = opened(replace(cfg, resume=True))
    assert again.first == 0
    assert again.resumed is None


def test_resume_passes_over_a_truncated_checkpoint_and_says_so(cfg, capsys):
    found = opened(cfg)
    for step in (1, 2):
        found.save(step)
        found.log(step, "train", loss=1.0)
        found.log_samples(step, [{"response": "x"}])
    file = state_file(found.folder(2))
    file.write_bytes(file.read_bytes()[:-9])
    again = opened(replace(cfg, resume=True))
    assert again.first == 1
    assert "damaged" in capsys.readouterr().out
    # What the lost step wrote is gone
    assert [row["step"] for row in again.metrics] == [1]
    assert len((again.dir / "metrics.jsonl").read_text().splitlines()) == 1
    assert len((again.dir / "samples.jsonl").read_text().splitlines()) == 1


def test_resume_names_the_settings_that_changed(cfg, capsys):
    opened(cfg).save(1)
    opened(replace(cfg, resume=True))
    assert "other settings" not in capsys.readouterr().out
    opened(replace(cfg, resume=True, lr=7.0))
    assert "other settings than before: --lr 1e-05 -> 7.0" in capsys.readouterr().out


def test_resume_never_throws_metrics_away(cfg):
    found = opened(cfg)
    found.save(1)
    found.log(1, "train", loss=1.0)
    shutil.rmtree(found.folder(1))
    with pytest.raises(UserError, match="no whole checkpoint"):
        opened(replace(cfg, resume=True))
    assert (found.dir / "metrics.jsonl").read_text()


def test_a_half_written_checkpoint_and_a_half_written_line_are_passed_over(cfg):
    found = opened(cfg)
    found.save(1)
    found.log(1, "train", loss=1.0)
    (found.checkpoints / "step_000002.tmp").mkdir()
    with open(found.dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "ki')
    again = opened(replace(cfg, resume=True))
    assert again.first == 1
    assert len(again.metrics) == 1


def test_a_run_that_is_further_than_the_steps_asked_for_is_named(cfg):
    opened(cfg).save(5)
    with pytest.raises(UserError, match="at step 5 already, beyond the 4 asked for.*--steps"):
        opened(replace(cfg, resume=True), last=4)
    assert opened(replace(cfg, resume=True), last=5).first == 5


# ---- the loop ------------------------------------------------------------------------------------
def run_loop(found: Run, until: int | None = None) -> list[tuple]:
    """[(step, what happened)] of a loop as the scripts have it."""
    events = []
    for step in found.steps():
        saved = found.saved()
        found.checkpoint(step)
        if found.saved() != saved:
            events.append((step, "save"))
        if found.due(step, "eval"):
            found.log(step, "eval", pass1=1.0)
            events.append((step, "eval"))
        if step == until:
            found.end("enough")
        if found.over(step):
            break
        found.log(step + 1, "train", loss=1.0)
    return events


def test_a_run_saves_and_evaluates_every_so_many_steps_and_at_its_end(cfg):
    events = run_loop(opened(cfg, last=5))
    steps = [0, 2, 4, 5]
    assert events == [(step, what) for step in steps for what in ("save", "eval")]


def test_save_every_adds_checkpoints_without_an_evaluation(cfg):
    events = run_loop(opened(replace(cfg, save_every=3, eval_every=4), last=6))
    assert [step for step, what in events if what == "save"] == [0, 3, 4, 6]
    assert [step for step, what in events if what == "eval"] == [0, 4, 6]


def test_a_resumed_run_makes_no_evaluation_twice_and_no_step_twice(cfg):
    found = opened(cfg, last=2)
    run_loop(found)
    again = opened(replace(cfg, resume=True), last=4)
    assert run_loop(again) == [(4, "save"), (4, "eval")]
    steps = [row["step"] for row in again.of_kind("train")]
    assert steps == [1, 2, 3, 4]
    assert [row["step"] for row in again.of_kind("eval")] == [0, 2, 4]


def test_end_makes_the_present_step_the_last(cfg):
    found = opened(replace(cfg, eval_every=100), last=10)
    assert run_loop(found, until=3) == [(0, "save"), (0, "eval")]
    assert found.step == 3
    assert found.ended == "enough"


def test_the_share_that_is_done_follows_steps_or_compute_whichever_is_further(cfg):
    found = opened(cfg, last=10)
    found.step = 4
    found.count(tokens=0, flops=30.0, flops_hw=0.0)
    assert found.done_share() == 0.4
    assert found.done_share(max_flops=100.0) == 0.4
    assert found.done_share(max_flops=40.0) == 0.75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_the_run_after_its_step(cfg, capsys, number):
    found = opened(replace(cfg, eval_every=100))
    seen = []
    for step in found.steps():
        seen.append(step)
        found.checkpoint(step)
        if found.over(step):
            break
        if step == 2:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # two at once are one: torchrun passes Ctrl-C on
    assert seen == [0, 1, 2, 3]
    assert found.interrupted
    assert found.saved() == {0, 3}
    assert "finishing this step" in capsys.readouterr().out


def test_a_second_ctrl_c_a_while_later_stops_at_once(monkeypatch):
    caught = run.catch_signals()
    os.kill(os.getpid(), signal.SIGINT)
    assert caught == ["SIGINT"]
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 4)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_the_time_left_counts_steps_and_evaluations_at_their_own_pace(cfg, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    found = opened(cfg, last=10)
    for step in found.steps():
        if found.due(step, "eval"):
            now[0] += 5
            found.log(step, "eval")
        found.over(step)
        now[0] += 1
        found.log(step + 1, "train")
        if step == 2:
            break
    # 7 steps of 1 s, and evaluations of 5 s at 4, 6, 8 and 10
    assert found.eta(3) == "ETA 0m27s"
    assert found.eta(3, last=4) == "ETA 0m06s"


# ---- metrics -------------------------------------------------------------------------------------
def test_a_line_has_step_kind_totals_and_the_time_of_the_whole_run(cfg):
    found = opened(cfg)
    found.count(tokens=7, flops=2.0, flops_hw=3.0)
    found.log(1, "train", loss=0.5)
    (row,) = [json.loads(line) for line in (found.dir / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "kind", "tokens", "flops", "flops_hw", "seconds", "loss"} <= set(row)
    assert (row["step"], row["kind"], row["tokens"]) == (1, "train", 7)
    found.save(1)
    found.log(1, "val", val_loss=1.0)
    again = opened(replace(cfg, resume=True))
    assert again.seconds >= row["seconds"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_metrics_hold_no_number_that_json_lacks(cfg, value):
    found = opened(cfg)
    found.log(1, "val", val_loss=value)
    assert json.loads((found.dir / "metrics.jsonl").read_text())["val_loss"] is None


def test_lines_that_belong_together_are_written_at_once(cfg):
    found = opened(cfg)
    found.log_together(2, {"val": {"val_loss": 1.0}, "eval": {"pass1": 50.0}})
    assert [row["kind"] for row in found.metrics] == ["val", "eval"]
    assert found.of_kind("eval")[0]["pass1"] == 50.0
    assert len((found.dir / "metrics.jsonl").read_text().splitlines()) == 2


# ---- checkpoints ---------------------------------------------------------------------------------
def test_prune_keeps_the_newest_and_the_protected(cfg):
    found = opened(replace(cfg, keep=2))
    for step in (1, 2):
        found.save(step)
    found.prune({2})
    for step in range(3, 7):  # also between two evaluations --keep holds
        found.save(step)
        assert len(found.saved()) <= 3
    assert found.saved() == {2, 6}


def test_nothing_is_pruned_where_all_are_kept(cfg):
    found = opened(cfg)
    for step in range(1, 4):
        found.save(step)
    found.prune(set())
    assert found.saved() == {1, 2, 3}


def test_prune_leaves_what_it_did_not_write(cfg, tmp_path):
    found = opened(replace(cfg, keep=1))
    for step in (1, 2, 3):
        found.save(step)
    (found.checkpoints / "step_000001_mine").mkdir()
    (found.checkpoints / "step_000000").symlink_to(tmp_path)
    (found.folder(3) / "trainer.json").write_text("edited")
    for step in (4, 5):
        found.save(step)
    names = sorted(path.name for path in found.checkpoints.iterdir())
    assert names == ["step_000000", "step_000001_mine", "step_000003", "step_000005"]


def test_five_skipped_updates_in_a_row_stop_the_run(cfg, capsys):
    found = opened(cfg)
    for step in range(4):
        found.watch(math.nan, step)
    found.watch(1.0, 4)  # a good step starts the count anew
    for step in range(4):
        found.watch(math.inf, step)
    assert "gradient norm is inf, update skipped (4 in a row)" in capsys.readouterr().out
    with pytest.raises(UserError, match="5 updates in a row.*lower --lr"):
        found.watch(math.nan, 5)


def test_weights_after_a_skipped_update_are_not_saved(cfg, capsys):
    found = opened(cfg)
    found.save(1)
    found.watch(math.nan, 2)
    found.save(2)
    assert found.saved() == {1}
    assert "step 2: not saved" in capsys.readouterr().out
    found.watch(0.5, 3)
    found.save(3)
    assert found.saved() == {1, 3}
