"""Command line, run directory, checkpoints: what a newcomer types wrongly, and what a crash leaves behind."""

import json
import math
import shutil
from dataclasses import dataclass
from typing import Literal

import pytest
import torch

from core import cli, files, optim, ranks, run


@dataclass
class Config:
    out: str = "runs/x"  # where it goes
    lr: float = 1e-5  # learning rate, a share of 100%
    limit: int | None = None  # most rows; none = all
    shape: Literal["a", "b"] = "a"  # which
    overwrite: bool = False  # delete first


def test_flags_come_from_the_dataclass_and_presets_never_beat_what_was_typed():
    cfg = cli.parse(
        Config,
        ["--lr", "3", "--limit", "4", "--overwrite"],
        preset=lambda given: {"lr": 7.0, "shape": "b"},
    )
    assert cfg == Config(lr=3.0, limit=4, shape="b", overwrite=True)
    assert cli.parse(Config, ["--limit", "none", "--no-overwrite"]) == Config()


def test_help_shows_each_comment_and_default(capsys):
    with pytest.raises(SystemExit):
        cli.parse(Config, ["--help"])
    text = capsys.readouterr().out
    assert "learning rate, a share of 100%" in " ".join(text.split()) and "'runs/x'" in text


@pytest.mark.parametrize("argv", [["--nope"], ["--lr", "fast"], ["--shape", "c"], ["--ou", "x"]])
def test_a_wrong_flag_is_one_line_and_code_2(argv, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", *argv])
    with pytest.raises(SystemExit) as end:
        cli.cli(lambda cfg: None, Config)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and line.startswith("error: ") and argv[0] in line


def test_a_users_mistake_is_one_line_and_code_2_but_a_bug_keeps_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x"])

    def mistake(cfg):
        list(files.read_jsonl("no such file"))

    def bug(cfg):
        int("x")

    with pytest.raises(SystemExit) as end:
        cli.cli(mistake, Config)
    assert end.value.code == 2 and "no such file" in capsys.readouterr().err
    with pytest.raises(ValueError):
        cli.cli(bug, Config)


def test_seeds_depend_on_every_part_of_their_key_only():
    assert ranks.seed_of(0, "a", 1) == ranks.seed_of(0, "a", 1)
    assert (
        len({ranks.seed_of(s, u, t) for s in range(5) for u in ("a", "b") for t in range(5)}) == 50
    )
    assert torch.rand(1, generator=ranks.generator(0, "x")) == torch.rand(
        1, generator=ranks.generator(0, "x")
    )


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))


def trained(steps, model, optimizers, start=0):
    for step in range(start, steps):
        x = torch.randn(16, 4, generator=ranks.generator(0, "x", step))
        (model(x) ** 2).mean().backward()
        optim.update(model, optimizers, 1e-2, 1.0)


def book_of(tmp_path, **options):
    return run.Run(Config(out=str(tmp_path / "r")), **options)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, name):
    whole = small_model()
    trained(6, whole, optim.make_optimizers(whole, name, 1e-2))
    first = small_model()
    optimizers = optim.make_optimizers(first, name, 1e-2)
    trained(3, first, optimizers)
    book_of(tmp_path).save(3, lambda folder: None, first, optimizers, tokens=12)
    second = small_model()
    optimizers = optim.make_optimizers(second, name, 1e-2)
    book = book_of(tmp_path, resume=True)
    assert book.load(second, optimizers)["tokens"] == 12
    trained(6, second, optimizers, start=3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters()))


def test_a_used_directory_is_refused_and_both_remedies_are_named(tmp_path):
    book_of(tmp_path)
    with pytest.raises(ValueError, match="--resume.*--overwrite"):
        book_of(tmp_path)
    book_of(tmp_path, overwrite=True)


def test_overwrite_never_deletes_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not a run directory"):
        book_of(tmp_path, overwrite=True)
    assert (tmp_path / "r" / "thesis.txt").exists()


def test_resume_passes_over_a_truncated_checkpoint_and_says_so(tmp_path, capsys):
    model = small_model()
    book = book_of(tmp_path)
    for step in (1, 2):
        book.save(step, lambda folder: None, model, [])
        book.log(step, "train", loss=1.0)
    file = book.path(2) / "trainer" / "state-00000-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    again = book_of(tmp_path, resume=True)
    assert again.resumed["step"] == 1 and "damaged" in capsys.readouterr().out
    assert [row["step"] for row in again.metrics] == [1]  # what the lost step wrote is gone


def test_resume_never_throws_metrics_away_and_names_changed_settings(tmp_path, capsys):
    book = book_of(tmp_path)
    book.save(1, lambda folder: None, small_model(), [])
    book.log(1, "train", loss=1.0)
    assert "other settings" not in capsys.readouterr().out
    run.Run(Config(out=str(tmp_path / "r"), lr=7.0), resume=True)
    assert "resuming with other settings than before: --lr 1e-05 -> 7.0" in capsys.readouterr().out
    shutil.rmtree(book.path(1))
    with pytest.raises(ValueError, match="no whole checkpoint"):
        book_of(tmp_path, resume=True)
    assert (book.dir / "metrics.jsonl").read_text()


def test_a_half_written_checkpoint_and_a_half_written_line_are_passed_over(tmp_path):
    book = book_of(tmp_path)
    book.save(1, lambda folder: None, small_model(), [])
    (book.checkpoints / "step_000002.tmp").mkdir()
    book.log(1, "train", loss=1.0)
    with open(book.dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "ki')
    assert book_of(tmp_path, resume=True).resumed["step"] == 1


def test_a_failed_save_leaves_the_earlier_checkpoint_and_names_the_remedy(tmp_path):
    book, model = book_of(tmp_path), small_model()
    book.save(1, lambda folder: None, model, [])

    def full_disk(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="free some space, then --resume"):
        book.save(2, full_disk, model, [])
    assert sorted(f.name for f in book.checkpoints.iterdir()) == ["step_000001"]


def test_a_disk_without_room_is_named_before_anything_is_written(tmp_path):
    book = run.Run(Config(out=str(tmp_path / "r")))
    with pytest.raises(OSError, match="needs 1000000000.0 GB and .* free.*--keep"):
        book._make_room(book.path(1), book.path(1).with_suffix(".tmp"), 1e18)
    assert not list(book.checkpoints.iterdir())


def test_prune_keeps_the_newest_and_the_protected(tmp_path):
    book = book_of(tmp_path)
    for step in range(1, 7):
        book.save(step, lambda folder: None, small_model(), [])
    book.prune(2, {2})
    assert sorted(int(f.name[5:]) for f in book.checkpoints.iterdir()) == [2, 6]
    book.prune(0, set())
    assert len(list(book.checkpoints.iterdir())) == 2


def test_a_nan_gradient_touches_nothing_and_five_in_a_row_stop_the_run(tmp_path):
    model = small_model()
    optimizers = optim.make_optimizers(model, "adamw", 1e-2)
    before = [p.clone() for p in model.parameters()]
    (model(torch.ones(2, 4)).sum() * math.nan).backward()
    norm = optim.update(model, optimizers, 1e-2, 1.0)
    assert math.isnan(norm) and all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert not any(optimizer.state for optimizer in optimizers)
    book = book_of(tmp_path)
    for step in range(4):
        book.watch(norm, step)
    book.watch(1.0, 4)  # a good step starts the count anew
    for step in range(4):
        book.watch(norm, step)
    with pytest.raises(ValueError, match="5 updates in a row"):
        book.watch(norm, 5)


def test_metrics_hold_no_nan(tmp_path):
    book = book_of(tmp_path)
    book.log(1, "val", val_loss=math.nan)
    assert json.loads((book.dir / "metrics.jsonl").read_text())["val_loss"] is None


def test_learning_rate_warms_up_then_falls_to_zero_or_stays():
    cosine = [optim.lr_at(s, 100, 1.0, "cosine", 0.1) for s in range(101)]
    assert (
        cosine[0] == pytest.approx(0.1)
        and cosine[9] == 1.0
        and cosine[55] == pytest.approx(0.5)
        and cosine[100] == pytest.approx(0)
    )
    assert [optim.lr_at(s, 100, 1.0, "constant", 0.0) for s in (0, 50, 99)] == [1.0] * 3
