"""A checkpoint: a Hugging Face model folder, and beside it what the trainer needs to go on.

    step_000400/
        config.json model.safetensors tokenizer.json ...     loads in transformers and vLLM
        trainer/state-00000-of-00001.safetensors             fp32 weights, optimizer state; per rank
        trainer.json                                         step, counters, the size of every file

It is written as step_000400.tmp, flushed to disk and renamed: a folder without .tmp is whole.
The trainer state is one safetensors file per rank whose header says which rows it holds, so any
number of ranks can load it. (The metadata of torch.distributed.checkpoint would be a pickle.)
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from core import ranks
from core.errors import UserError
from core.files import write_json

UMASK = os.umask(0o022)  # the only way to read it is to set it
os.umask(UMASK)


# ---- folders -------------------------------------------------------------------------------------
def folder_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of this step is."""
    return checkpoints / f"step_{step:06d}"


def steps_in(checkpoints: Path) -> dict[int, Path]:
    """{step: folder} of the checkpoints there, oldest first. Anything else is left alone."""
    found = {}
    for path in checkpoints.glob("step_*"):
        name = re.fullmatch(r"step_(\d{6,})", path.name)
        if name and path.is_dir() and not path.is_symlink():
            found[int(name[1])] = path
    return dict(sorted(found.items()))


def damaged(folder: Path) -> str:
    """What is wrong with a checkpoint ("" = nothing): files that differ from trainer.json."""
    if not (folder / "trainer.json").is_file():
        return "no trainer.json"
    try:
        about = json.loads((folder / "trainer.json").read_text())
        step = about["step"]
        files = dict(about["files"])
    except (ValueError, KeyError, TypeError):
        return "trainer.json is cut short"
    if folder.name != folder_of(folder.parent, step).name:
        return f"its trainer.json is of step {step}"
    for name, size in files.items():
        found = (folder / name).stat().st_size if (folder / name).exists() else None
        if found != size:
            return f"{name} has {found} bytes, not {size}"
    return ""


def newest_whole(checkpoints: Path) -> dict | None:
    """trainer.json of the newest whole checkpoint, or None. Damaged ones are named."""
    for folder in reversed(steps_in(checkpoints).values()):
        damage = damaged(folder)
        if not damage:
            return json.loads((folder / "trainer.json").read_text())
        print(f"{folder} is damaged or edited ({damage}): left alone, passed over", flush=True)
    return None


# ---- write ---------------------------------------------------------------------------------------
def save(final: Path, model, optimizers, write_model: Callable, about: dict) -> None:
    """Write a checkpoint; all ranks call it. write_model(folder) writes the Hugging Face folder.
    about: counters for trainer.json. A whole one that is there already stays as it is."""
    aside = final.with_suffix(".tmp")
    ranks.reshard(model)
    state = sum(ranks.local(value).nbytes for _, value in named_state(model, optimizers))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    n_bytes = ranks.total(state) + weights  # the model folder is at most as large as the weights
    if not ranks.from_first(lambda: _prepare(final, aside, n_bytes)):
        return
    failure = ""
    for write in (write_model, lambda to: save_state(to / "trainer", model, optimizers)):
        try:
            write(aside)
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk its own way
            failure = failure or str(error)
    failures = [text for text in ranks.gather(failure) if text]  # and all files are written now
    ranks.from_first(lambda: _seal(final, aside, failures, about))


def _prepare(final: Path, aside: Path, n_bytes: float) -> bool:
    """Make the folder `aside`; False if this checkpoint is there and whole already."""
    if final.exists() and not final.is_symlink() and not damaged(final):
        return False
    shutil.rmtree(aside, ignore_errors=True)
    for path in (final, aside):  # damaged, edited or of other origin: it is kept beside
        if path.exists() or path.is_symlink():
            path.rename(path.with_name(f"{path.name}.damaged-{time.time_ns()}"))
    free = shutil.disk_usage(final.parent).free
    if free < n_bytes:
        raise OSError(
            f"could not save {final}: it needs {n_bytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are "
            "free. Earlier checkpoints are whole; free some space, or --resume --keep 1"
        )
    (aside / "trainer").mkdir(parents=True)
    return True


def _seal(final: Path, aside: Path, failures: list[str], about: dict) -> None:
    """Write down the sizes of the files, flush them to disk and give the folder its name."""
    if failures:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(
            f"could not save {final}: {failures[0]}. Earlier checkpoints are whole; "
            "free some space, or --resume --keep 1"
        )
    files = [path for path in sorted(aside.rglob("*")) if path.is_file()]
    sizes = {str(path.relative_to(aside)): path.stat().st_size for path in files}
    write_json(aside / "trainer.json", {**about, "files": sizes})
    for path in [*files, aside / "trainer.json", aside / "trainer", aside]:
        if path.suffix == ".safetensors":
            path.chmod(0o666 & ~UMASK)  # the library makes them private; shared disks want groups
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    aside.rename(final)


# ---- trainer state -------------------------------------------------------------------------------
def named_state(model, optimizers) -> Iterator[tuple[str, torch.Tensor]]:
    """("model/NAME", weight) and ("optimizer/NAME/KEY", entry) of all parameters."""
    names = {}
    for name, p in model.named_parameters():
        names[p] = name
        yield f"model/{name}", p.detach()
    for optimizer in optimizers:
        for p, entry in optimizer.state.items():
            for key, value in entry.items():
                yield f"optimizer/{names[p]}/{key}", value


def save_state(folder: Path, model, optimizers) -> None:
    """This rank's rows of weights and optimizer state; the header says which rows of how many."""
    rows = {}
    parts = {}
    for key, value in named_state(model, optimizers):
        parts[key] = ranks.local(value).contiguous()
        if value.ndim:
            first, end = ranks.rows_of(value.shape[0], ranks.is_sharded(value))
            rows[key] = [first, end, value.shape[0]]
    file = folder / f"state-{ranks.rank():05d}-of-{ranks.world():05d}.safetensors"
    save_file(parts, file, metadata={"rows": json.dumps(rows)})


def load_state(folder: Path, model, optimizers) -> None:
    """The reverse of save_state; the number of ranks may differ.

    Raises UserError, naming file or parameter, for a damaged file and for another model's state.
    """
    params = dict(model.named_parameters())
    try:
        files = [
            safe_open(path, framework="pt") for path in sorted(folder.glob("state-*.safetensors"))
        ]
        places = [json.loads(file.metadata()["rows"]) for file in files]
        keys = dict.fromkeys(key for file in files for key in file.keys())
        for key in keys:
            name = key.split("/")[1]
            if name not in params:
                raise UserError(
                    f"{folder}: {name} is not a parameter of this model; "
                    "--resume needs the --init that the run began with"
                )
            _load_entry(key, params[name], optimizers, files, places)
    except (SafetensorError, OSError, IndexError) as error:
        raise UserError(
            f"{folder}: not a whole trainer state ({error}); delete this checkpoint, "
            "then --resume goes on from the one before"
        ) from None
    missing = [name for name in params if f"model/{name}" not in keys]
    if missing:
        raise UserError(
            f"{folder}: no {missing[0]} (and {len(missing) - 1} more); "
            "the checkpoint is of another model"
        )


def _load_entry(key: str, p: torch.Tensor, optimizers, files: list, places: list[dict]) -> None:
    """Put one tensor of the state in place: a weight, or an entry of the optimizer that owns p."""
    use, _, *entry = key.split("/")
    place = ranks.local(p).device
    if use == "model":
        mine = ranks.rows_of(p.shape[0], ranks.is_sharded(p))
        ranks.local(p).detach().copy_(_read_rows(key, mine, files, places))
        return
    for optimizer in optimizers:
        if any(p is other for group in optimizer.param_groups for other in group["params"]):
            owner = optimizer
    if key in places[0]:
        mine = ranks.rows_of(p.shape[0], ranks.is_sharded(p))
        value = ranks.shard_like(p, _read_rows(key, mine, files, places).to(place))
    else:  # a scalar, the same in each file; a fused optimizer counts its steps on the device
        value = files[0].get_tensor(key).to(place if owner.defaults.get("fused") else "cpu")
    owner.state[p][entry[0]] = value


def _read_rows(key: str, mine: tuple[int, int], files: list, places: list[dict]) -> torch.Tensor:
    """Rows mine[0] .. mine[1] of a tensor, from the files that hold some of them."""
    parts = []
    for file, place in zip(files, places):
        first, end, _ = place[key]
        low = max(first, mine[0])
        high = min(end, mine[1])
        if low < high or not parts:  # an empty first part keeps the shape where there are no rows
            parts.append(file.get_slice(key)[max(0, low - first) : max(0, high - first)])
    filled = [part for part in parts if len(part)]
    return torch.cat(filled or parts[:1])
