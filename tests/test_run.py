"""core/run.py: the run directory, when it saves and ends, and what a crash leaves behind."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from small_runs import ROOT, lines_of, rl_config, sft_config
from test_checkpoint import small_model, state_file

import rl
import sft
from core import checkpoint, cli, run
from core.errors import UserError
from core.run import Run


@dataclass
class Config:
    out: str
    init: str = "model"
    data: str = "train.jsonl"
    val: str = ""
    reward: str = "math"
    algo: str = "dapo"
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
    found.log(1, train={"loss": 1.0})
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


@pytest.mark.parametrize(
    "name, target",
    [
        ("r/checkpoints/step_000002", ""),
        ("link", "r/checkpoints/step_000002"),
        ("r/link", "elsewhere"),
        ("r/base", ""),
    ],
)
def test_overwrite_of_what_the_run_starts_from_is_refused_with_nothing_deleted(
    cfg, tmp_path, name, target
):
    opened(cfg).save(2)
    start = tmp_path / name
    (tmp_path / "elsewhere").mkdir()
    if target:
        start.symlink_to(tmp_path / target)
    else:
        start.mkdir(exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="--overwrite would delete"):
        opened(replace(cfg, overwrite=True), start=start)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("field, name", [("data", "samples.jsonl"), ("val", "v"), ("data", "a/b")])
def test_overwrite_of_what_the_run_reads_is_refused(cfg, field, name):
    found = opened(cfg)
    with pytest.raises(UserError, match=f"--overwrite would delete .*{name}"):
        opened(replace(cfg, overwrite=True, **{field: str(found.dir / name)}))


def test_overwrite_deletes_only_what_runs_write(cfg, tmp_path):
    found = opened(cfg)
    found.save(1)
    (found.dir / "notes.txt").write_text("mine")
    (found.checkpoints / "best").symlink_to(tmp_path)
    (found.checkpoints / "step_000001_copy").mkdir()
    opened(replace(cfg, overwrite=True))
    names = {path.name for path in found.dir.rglob("*")}
    assert {"notes.txt", "best", "step_000001_copy"} <= names
    assert "step_000001" not in names


def test_nothing_is_written_before_everything_has_loaded(cfg, tmp_path):
    Run(cfg, 10, Path("model"))
    assert not list(tmp_path.iterdir())
    opened(cfg)
    before = (tmp_path / "r" / "run.json").read_text()
    Run(replace(cfg, resume=True, lr=7.0), 10, Path("model"))
    assert (tmp_path / "r" / "run.json").read_text() == before


HOLD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from core.run import lock
held = lock(Path(sys.argv[2]))
print("locked", flush=True)
time.sleep(60)
"""


def written(found: Run) -> dict:
    """When each file was written, without the lock."""
    files = [path for path in found.dir.rglob("*") if path.name != run.LOCK]
    return {path: path.stat().st_mtime_ns for path in files}


def test_a_directory_in_which_another_process_writes_is_refused_and_stays_as_it_is(cfg):
    found = opened(cfg)
    found.save(1)
    found.log(1, train={"loss": 1.0})
    found._lock.close()
    before = written(found)
    words = [sys.executable, "-c", HOLD, str(ROOT), cfg.out]
    holder = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        for flag in ("resume", "overwrite"):
            with pytest.raises(UserError, match=f"process {holder.pid} is writing in it"):
                opened(replace(cfg, **{flag: True}))
    finally:
        holder.kill()
        holder.wait()
    assert written(found) == before
    assert opened(replace(cfg, resume=True)).first == 1  # a killed process holds no lock


def test_a_directory_that_was_locked_and_never_begun_is_free(cfg):
    Path(cfg.out).mkdir()
    run.lock(Path(cfg.out)).close()
    assert opened(cfg).first == 0


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
        found.log(step, train={"loss": 1.0})
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


@pytest.mark.parametrize("name", ["init", "data", "val", "reward", "algo"])
def test_resume_with_other_data_or_another_model_is_refused_by_name(cfg, name):
    opened(cfg).save(1)
    with pytest.raises(UserError, match=f"--{name} other: .* begun with .*; leave the flag out"):
        opened(replace(cfg, resume=True, **{name: "other"}))


def test_resume_with_another_validation_set_is_refused(cfg):
    opened(cfg, val_set="abc").save(1)
    with pytest.raises(UserError, match="val_set is abd and was abc"):
        opened(replace(cfg, resume=True), val_set="abd")


def touch(name):
    return lambda found: (found.checkpoints / name).write_text("x")


def empty(name):
    return lambda found: (found.checkpoints / name).mkdir()


def link(name):
    return lambda found: (found.checkpoints / name).symlink_to(found.folder(2))


def copy(name):
    return lambda found: shutil.copytree(found.folder(2), found.checkpoints / name)


def edited(text, name="trainer.json"):
    def edit(found):
        copy("step_000004")(found)
        (found.folder(4) / name).write_text(text)

    return edit


ODD = {
    "a file": touch("step_000004"),
    "another file": touch("notes"),
    "a file of the name that is written first": touch("step_000004.tmp"),
    "an empty folder": empty("step_000004"),
    "a folder of another name": empty("step_4"),
    "a symlink": link("step_000004"),
    "a symlink of another name": link("best"),
    "a copy": copy("step_000002_copy"),
    "a copy with the name of another step": copy("step_000004"),
    "a cut trainer.json": edited('{"step": 4, "fi'),
    "a trainer.json without its keys": edited('{"files": {}}'),
    "a trainer.json of another shape": edited('{"step": 4, "files": 3}'),
    "an edited config.json": edited('{"model_type": "mine"}', "config.json"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_in_a_run_directory_neither_ends_a_run_nor_is_deleted(cfg, name):
    def write_model(folder):
        (folder / "config.json").write_text("{}")

    found = Run(cfg, 10, Path("model"))
    found.attach(small_model(), [], write_model)
    found.save(2)
    before = {path.lstat().st_ino for path in found.checkpoints.iterdir()}
    ODD[name](found)
    odd = {path.lstat().st_ino for path in found.checkpoints.iterdir()} - before
    again = Run(replace(cfg, resume=True, keep=1), 4, Path("model"))
    again.attach(small_model(), [], write_model)
    assert again.first == 2
    run_loop(again)
    assert checkpoint.damaged(again.folder(4)) == ""
    assert not again.folder(4).is_symlink()
    assert odd <= {path.lstat().st_ino for path in again.checkpoints.iterdir()}


@pytest.mark.parametrize(
    "tail", [b'{"step": 2, "ki', b"\0" * 64, b"\xff\xfe\n", b'[1]\n{"kind": "val"}\n', b'3\n"x"']
)
def test_lines_that_are_no_rows_are_named_and_left_out(cfg, tail, capsys):
    found = opened(cfg)
    found.save(1)
    found.log(1, train={"loss": 1.0})
    with open(found.dir / "metrics.jsonl", "ab") as file:
        file.write(tail)
    again = opened(replace(cfg, resume=True))
    assert [row["step"] for row in again.metrics] == [1]
    assert "metrics.jsonl:" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", "[1]", "3", '"x"', ""])
def test_a_damaged_run_json_is_named(cfg, text):
    found = opened(cfg)
    found.save(1)
    (found.dir / "run.json").write_text(text)
    with pytest.raises(UserError, match="run.json: not the settings of a run"):
        opened(replace(cfg, resume=True))


def test_resume_never_throws_metrics_away(cfg):
    found = opened(cfg)
    found.save(1)
    found.log(1, train={"loss": 1.0})
    shutil.rmtree(found.folder(1))
    with pytest.raises(UserError, match="no whole checkpoint"):
        opened(replace(cfg, resume=True))
    assert (found.dir / "metrics.jsonl").read_text()


def test_a_half_written_checkpoint_and_a_half_written_line_are_passed_over(cfg):
    found = opened(cfg)
    found.save(1)
    found.log(1, train={"loss": 1.0})
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
            found.log(step, eval={"pass1": 1.0})
            events.append((step, "eval"))
        if step == until:
            found.end("enough")
        if found.over(step):
            break
        found.log(step + 1, train={"loss": 1.0})
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
            found.log(step, eval={})
        found.over(step)
        now[0] += 1
        found.log(step + 1, train={})
        if step == 2:
            break
        if step == 0:  # the evaluation of step 0 is no part of a step's pace
            assert found.eta(1) == "ETA 0m34s"
    # 7 steps of 1 s, and evaluations of 5 s at 4, 6, 8 and 10
    assert found.eta(3) == "ETA 0m27s"
    assert found.eta(3, last=4) == "ETA 0m06s"


# ---- metrics -------------------------------------------------------------------------------------
def test_a_line_has_step_kind_totals_and_the_time_of_the_whole_run(cfg):
    found = opened(cfg)
    found.count(tokens=7, flops=2.0, flops_hw=3.0)
    found.log(1, train={"loss": 0.5})
    (row,) = [json.loads(line) for line in (found.dir / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "kind", "tokens", "flops", "flops_hw", "seconds", "loss"} <= set(row)
    assert (row["step"], row["kind"], row["tokens"]) == (1, "train", 7)
    found.save(1)
    found.log(1, val={"val_loss": 1.0})
    again = opened(replace(cfg, resume=True))
    assert again.seconds >= row["seconds"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_metrics_hold_no_number_that_json_lacks(cfg, value):
    found = opened(cfg)
    found.log(1, val={"val_loss": value})
    assert json.loads((found.dir / "metrics.jsonl").read_text())["val_loss"] is None


def test_lines_that_belong_together_are_written_at_once(cfg):
    found = opened(cfg)
    found.log(2, val={"val_loss": 1.0}, eval={"pass1": 50.0})
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


# ---- the scripts ---------------------------------------------------------------------------------
def test_a_resumed_sft_run_goes_on_behind_the_last_row_whatever_the_batch(small_task, tmp_path):
    cfg = sft_config(small_task, tmp_path / "r", steps=3)
    sft.main(cfg)
    sft.main(replace(cfg, resume=True, steps=5, batch=5))
    rows = [round(row["epoch"] * 200) for row in lines_of(tmp_path / "r", "train")]
    assert rows == [16, 32, 48, 53, 58]


@pytest.mark.parametrize("change", ["more rows", "fewer rows", "max_len"])
def test_another_held_out_set_is_refused_on_resume(small_task, tmp_path, change):
    lines = (small_task / "train.jsonl").read_text().splitlines(keepends=True)
    path = tmp_path / "train.jsonl"
    path.write_text("".join(lines[:100]))
    cfg = sft_config(small_task, tmp_path / "r", data=str(path), val="", steps=2, eval_every=2)
    sft.main(cfg)
    if change == "max_len":
        cfg = replace(cfg, max_len=60)
    else:
        path.write_text("".join(lines[: 200 if change == "more rows" else 50]))
    with pytest.raises(UserError, match="val_set is .* and was .* when the run began"):
        sft.main(replace(cfg, resume=True, steps=3))


@pytest.mark.parametrize("script", [sft, rl])
def test_the_advice_on_a_full_disk_works(small_task, coin, tmp_path, monkeypatch, script):
    """A disk of 2 MB, of which a checkpoint takes about half of one."""

    def disk_usage(path):
        used = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
        return shutil._ntuple_diskusage(2_000_000, used, 2_000_000 - used)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    make_config, folder = (sft_config, small_task) if script is sft else (rl_config, coin)
    cfg = make_config(folder, tmp_path / "r", steps=8, eval_every=4, save_every=1)
    with pytest.raises(OSError, match="could not save.*--resume --keep 1"):
        script.main(cfg)
    script.main(replace(cfg, resume=True, keep=1))
    assert 1 <= len(checkpoint.steps_in(tmp_path / "r" / "checkpoints")) <= 2
    assert lines_of(tmp_path / "r", "train")[-1]["step"] == 8


@pytest.mark.parametrize("half_made", [False, True])
def test_a_dry_run_without_a_base_model_makes_none(
    small_task, tmp_path, monkeypatch, capsys, half_made
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_task, "runs/countdown")
    if half_made:
        Path("runs/base/checkpoints").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    assert sft.main(cli.parse(sft.Config, ["--dry-run"], sft.preset)) is False
    assert "a run would make it first" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "flags, reason",
    [
        ({"max_flops": 1.0}, "done (--max-flops 1 are spent): pass@1"),
        ({"steps": 1}, "done: pass@1"),
    ],
)
def test_a_run_says_why_it_ended(coin, tmp_path, capsys, flags, reason):
    rl.main(rl_config(coin, tmp_path / "r", **flags))
    assert reason in capsys.readouterr().out
