"""core/checkpoint.py: what is written is whole or not there, and loads to the same bits."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from core import checkpoint, optim, ranks
from core.errors import UserError


def small_model(width: int = 8):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Linear(width, 2))


def train(model, optimizers, steps) -> None:
    for step in steps:
        x = torch.randn(16, 4, generator=ranks.generator(0, "x", step))
        (model(x) ** 2).mean().backward()
        optim.update(model, optimizers, 1e-2, 1.0)


def save(folder, step: int, model=None, optimizers=(), write_model=lambda to: None, **about):
    """The path of a checkpoint with this step."""
    path = checkpoint.folder_of(folder, step)
    checkpoint.save(path, model or small_model(), optimizers, write_model, {"step": step, **about})
    return path


def state_file(path):
    return path / "trainer" / "state-00000-of-00001.safetensors"


# ---- folders -------------------------------------------------------------------------------------
def test_a_checkpoint_is_found_by_its_step_oldest_first(tmp_path):
    for step in (12, 3, 1_000_000):
        save(tmp_path, step)
    found = checkpoint.steps_in(tmp_path)
    assert list(found) == [3, 12, 1_000_000]
    assert found[3] == tmp_path / "step_000003"


def test_other_names_half_written_folders_files_and_symlinks_are_no_checkpoints(tmp_path):
    whole = save(tmp_path, 3)
    (tmp_path / "step_000004.tmp").mkdir()
    (tmp_path / "step_best").mkdir()
    (tmp_path / "step_7").mkdir()
    (tmp_path / "step_000005").write_text("a file")
    (tmp_path / "step_000006").symlink_to(whole)
    assert list(checkpoint.steps_in(tmp_path)) == [3]


def test_a_whole_checkpoint_has_its_counters_and_the_sizes_of_its_files(tmp_path):
    def write_model(to):
        (to / "config.json").write_text("{}")

    path = save(tmp_path, 3, write_model=write_model, tokens=12)
    about = json.loads((path / "trainer.json").read_text())
    assert about["step"] == 3
    assert about["tokens"] == 12
    assert about["files"]["config.json"] == 2
    assert about["files"]["trainer/" + state_file(path).name] == state_file(path).stat().st_size
    assert checkpoint.damaged(path) == ""
    assert checkpoint.newest_whole(tmp_path) == about


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: (path / "trainer.json").unlink(), "no trainer.json"),
        (lambda path: (path / "trainer.json").write_text('{"step": 2, "fi'), "cut short"),
        (lambda path: (path / "trainer.json").write_text("[]"), "cut short"),
        (lambda path: state_file(path).unlink(), "has None bytes"),
        (
            lambda path: state_file(path).write_bytes(state_file(path).read_bytes()[:-9]),
            "bytes, not",
        ),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    tmp_path, capsys, damage, message
):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    damage(path)
    assert message in checkpoint.damaged(path)
    assert checkpoint.newest_whole(tmp_path)["step"] == 1
    printed = capsys.readouterr().out
    assert f"{path} is damaged" in printed
    assert message in printed


def test_where_there_is_no_whole_checkpoint_there_is_none(tmp_path):
    assert checkpoint.newest_whole(tmp_path) is None
    (save(tmp_path, 1) / "trainer.json").unlink()
    assert checkpoint.newest_whole(tmp_path) is None


# ---- write ---------------------------------------------------------------------------------------
def test_a_failed_save_leaves_the_earlier_checkpoint_and_names_the_remedy(tmp_path):
    save(tmp_path, 1)

    def full_disk(to):
        (to / "half").write_text("written")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="step_000002: .*No space left.*free some space.*--resume"):
        save(tmp_path, 2, write_model=full_disk)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    assert checkpoint.damaged(tmp_path / "step_000001") == ""


def test_a_bug_in_writing_is_no_full_disk(tmp_path):
    def bug(to):
        raise KeyError("planted")

    with pytest.raises(KeyError, match="planted"):
        save(tmp_path, 1, write_model=bug)
    assert checkpoint.steps_in(tmp_path) == {}


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(tmp_path):
    path = checkpoint.folder_of(tmp_path, 1)
    with pytest.raises(OSError, match="needs 1000000000.0 GB and .* free.*--keep"):
        checkpoint._prepare(path, path.with_suffix(".tmp"), 1e18)
    assert not list(tmp_path.iterdir())


def test_a_whole_checkpoint_is_left_as_it_is_and_a_damaged_one_is_written_anew(tmp_path):
    path = save(tmp_path, 1, note="first")
    save(tmp_path, 1, note="second")
    assert checkpoint.newest_whole(tmp_path)["note"] == "first"
    state_file(path).unlink()
    save(tmp_path, 1, note="third")
    assert checkpoint.newest_whole(tmp_path)["note"] == "third"
    assert checkpoint.damaged(path) == ""


def test_what_an_interrupted_save_left_is_replaced(tmp_path):
    left = tmp_path / "step_000001.tmp"
    left.mkdir()
    (left / "junk").write_text("x")
    path = save(tmp_path, 1)
    assert not left.exists()
    assert not (path / "junk").exists()


# ---- trainer state -------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_run_that_loads_its_state_ends_with_the_same_bits(tmp_path, name):
    whole = small_model()
    train(whole, optim.make_optimizers(whole, name, 1e-2), range(6))
    first = small_model()
    optimizers = optim.make_optimizers(first, name, 1e-2)
    train(first, optimizers, range(3))
    path = save(tmp_path, 3, first, optimizers)
    second = small_model()
    optimizers = optim.make_optimizers(second, name, 1e-2)
    checkpoint.load_state(path / "trainer", second, optimizers)
    train(second, optimizers, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters()))


def test_the_state_is_a_safetensors_file_with_the_rows_of_each_tensor(tmp_path):
    model = small_model()
    optimizers = optim.make_optimizers(model, "adamw", 1e-2)
    train(model, optimizers, range(1))
    path = state_file(save(tmp_path, 1, model, optimizers))
    tensors = load_file(path)
    assert torch.equal(tensors["model/0.weight"], model[0].weight)
    assert "optimizer/0.weight/exp_avg" in tensors
    assert "optimizer/1.bias/step" in tensors


def test_the_state_of_another_model_is_refused_with_the_parameter(tmp_path):
    path = save(tmp_path, 1)
    more = torch.nn.Sequential(*small_model(), torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"no 2.weight \(and 1 more\).*another model"):
        checkpoint.load_state(path / "trainer", more, [])
    with pytest.raises(UserError, match=r"1\.\w+ is not a parameter.*--init"):
        checkpoint.load_state(path / "trainer", small_model()[:1], [])


def test_a_damaged_state_is_refused_with_what_to_do(tmp_path):
    path = save(tmp_path, 1)
    state_file(path).write_bytes(state_file(path).read_bytes()[:20])
    with pytest.raises(UserError, match="not a whole trainer state.*delete this checkpoint"):
        checkpoint.load_state(path / "trainer", small_model(), [])
    shutil.rmtree(path / "trainer")
    with pytest.raises(UserError):
        checkpoint.load_state(path / "trainer", small_model(), [])
