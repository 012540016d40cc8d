"""What surrounds a training loop: the command line, the run directory, metrics, checkpoints, seeds, optimizers.

One dataclass per script is its command line: `cfg = run.parse(Config)`. A field's trailing comment is its --help text,
so a flag is written once. Nothing here knows a loss or a token.

    runs/sft/run.json         every field as used, argv, world size, versions
    runs/sft/metrics.jsonl    one object a line: step kind tokens flops seconds ...; kind = train | val | eval
    runs/sft/samples.jsonl    what the model wrote, and how it was judged
    runs/sft/checkpoints/step_000400/
        config.json model.safetensors tokenizer.json ...     a Hugging Face model folder
        trainer/state.safetensors                            fp32 weights and optimizer state, by parameter name
        trainer.json                                         step, counters, every file's size: a cut one is seen

Choices: 1) a checkpoint is written beside its place, flushed to disk, then renamed: a folder without .tmp is whole.
2) No random state is stored. Every draw has a generator seeded from (seed, use, step, row), so a resumed run, or one on
   another number of processes, draws the same. 3) No pickle anywhere: safetensors and JSON.
"""
import argparse
import dataclasses
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import traceback
import types
import typing
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent


# --------------------------------------------------------------------------------------------------------- command line
def parse(Config, argv: list[str] | None = None, preset=None, options=None):
    """A dataclass as command line: `save_every: int = 0  # text` becomes `--save-every INT  text`; bool: --x, --no-x.

    preset(given: dict) -> dict of values that replace defaults (never what the user typed); used for the built-in task.
    options: a second dataclass whose fields are flags too; those that were typed go into Config.options as a dict.
    """
    parser = argparse.ArgumentParser(description=inspect.getdoc(sys.modules[Config.__module__]), allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_flags(parser, Config)
    if options:
        _add_flags(parser.add_argument_group("options of the objective (losses.py; the default is --algo's)"), options)
    given = vars(parser.parse_args(argv))
    extra = {f.name: given.pop(f.name) for f in dataclasses.fields(options) if f.name in given} if options else {}
    values = preset(given) if preset else {}  # may take a flag out of `given` that it has understood
    values |= given
    return Config(**values, options=extra) if options else Config(**values)


def _add_flags(parser, Config) -> None:
    comments = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", inspect.getsource(Config), re.M))
    hints = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        kind, options = hints[field.name], {}
        if kind is dict:
            continue
        if isinstance(kind, types.UnionType):  # X | None
            inner = next(k for k in kind.__args__ if k is not type(None))
            kind = _or_none(inner)
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is typing.Literal:
            options["choices"] = list(kind.__args__)
        else:
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        text = f"{comments.get(field.name, '')} (default: {field.default!r})".replace("%", "%%")
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **options)


def _or_none(kind):
    """A converter that also takes the word none."""
    def convert(text):
        return None if text.lower() == "none" else kind(text)
    convert.__name__ = kind.__name__
    return convert


def cli(main, Config, preset=None, options=None) -> None:
    """Run a script: parse, then main(cfg). A user's mistake is one line and exit code 2; a bug keeps its traceback.

    A ValueError or OSError counts as the user's when the line that raised it is in one of our files (or a file system
    call made there): our files raise those only with what, where and how to fix.
    """
    try:
        main(parse(Config, preset=preset, options=options))
    except KeyboardInterrupt:
        print("\nstopped at once; checkpoints on disk are whole: --resume goes on from the newest", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        ours = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve().parent == HERE
        if not ours and not isinstance(error, OSError):
            raise
        sys.stdout.flush()
        print(f"\nerror: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------- seeds
def seed_of(*key) -> int:
    """A 63-bit seed from any printable key, the same on every machine: seed_of(cfg.seed, "rollout", step)."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def generator(*key) -> torch.Generator:
    """A CPU generator of its own for one draw."""
    return torch.Generator().manual_seed(seed_of(*key))


# ------------------------------------------------------------------------------------------------------------ processes
def start_process() -> torch.device:
    """The device of this process, the only one there may be so far."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        raise ValueError(f"{world} processes: this version trains in one; use --nproc_per_node=1 or plain python")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def catch_signals() -> list:
    """A list that fills on Ctrl-C or SIGTERM, so that the loop ends its step, saves and says how to go on."""
    caught = []

    def remember(number, frame):
        if caught:  # the second Ctrl-C means now
            raise KeyboardInterrupt
        caught.append(signal.Signals(number).name)
        print(f"\n{caught[0]}: finishing this step, then saving (once more to stop at once)", flush=True)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, remember)
    return caught


# -------------------------------------------------------------------------------------------------------- run directory
class Run:
    """One run directory: metrics, samples, checkpoints. `resumed`: trainer.json of the one to go on from, or None."""

    def __init__(self, cfg, resume: bool = False, overwrite: bool = False, **facts):
        self.dir, self.resumed = Path(cfg.out), None
        self.checkpoints = self.dir / "checkpoints"
        if self.dir.exists() and any(self.dir.iterdir()):
            if overwrite:
                if not (self.dir / "run.json").exists():
                    raise ValueError(f"{self.dir} is not a run directory (no run.json): --overwrite leaves it alone; "
                                     "pick another --out")
                shutil.rmtree(self.dir)
            elif resume:
                self.resumed = self._newest_whole()
            else:
                raise ValueError(f"{self.dir} exists already: --resume goes on with it, --overwrite starts anew, "
                                 "--out names another")
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.metrics = self._cut("metrics.jsonl")
        self._cut("samples.jsonl")
        self.skipped, self._opened, self._first = 0, time.monotonic(), self.resumed["step"] if self.resumed else 0
        self._started = self._opened - (self.metrics[-1]["seconds"] if self.metrics else 0.0)
        about = {"config": dataclasses.asdict(cfg), "argv": sys.argv,
                 "world_size": int(os.environ.get("WORLD_SIZE", 1)),
                 "torch": torch.__version__, "python": sys.version.split()[0], **facts}
        write_json(self.dir / "run.json", about)

    def _newest_whole(self) -> dict | None:
        """trainer.json of the newest whole checkpoint (files as long as written down); damaged ones are named."""
        for folder in sorted(self.checkpoints.glob("step_*[0-9]"), reverse=True):
            damage = damaged(folder)
            if not damage:
                return json.loads((folder / "trainer.json").read_text())
            print(f"{folder} is damaged ({damage}): going on from the one before", flush=True)
        return None

    def _cut(self, name: str) -> list[dict]:
        """Keep the lines up to the resumed step (a killed run may have written more), and return them."""
        path, last = self.dir / name, self.resumed["step"] if self.resumed else -1
        kept = [row for row in read_jsonl(path, broken_tail=True) if row["step"] <= last] if path.exists() else []
        aside = path.with_suffix(".tmp")
        aside.write_text("".join(json.dumps(row) + "\n" for row in kept))
        aside.rename(path)
        return kept

    @property
    def seconds(self) -> float:
        """Wall time of the run so far, its earlier parts included."""
        return time.monotonic() - self._started

    def log(self, step: int, kind: str, **numbers) -> dict:
        """Append one line to metrics.jsonl. Infinite and NaN become null, which every JSON reader accepts."""
        return self.log_together(step, {kind: numbers})[0]

    def log_together(self, step: int, kinds: dict[str, dict]) -> list[dict]:
        """Append a line of each kind in one write: a kill leaves all of them or none."""
        seconds = round(self.seconds, 2)
        rows = [{"step": step, "kind": kind, **numbers, "seconds": seconds} for kind, numbers in kinds.items()]
        for row in rows:
            row |= {k: None for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
        with open(self.dir / "metrics.jsonl", "a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        self.metrics += rows
        return rows

    def log_samples(self, step: int, rows: list[dict]) -> None:
        with open(self.dir / "samples.jsonl", "a") as file:
            file.writelines(json.dumps({"step": step, **row}) + "\n" for row in rows)

    def watch(self, norm: float, step: int) -> None:
        """Name a skipped update (gradient norm NaN or infinite); five in a row stop the run, its checkpoints kept."""
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if self.skipped:
            print(f"step {step}: gradient norm is {norm}, update skipped ({self.skipped} in a row)", flush=True)
        if self.skipped == 5:
            raise ValueError(f"5 updates in a row had NaN or infinite gradients, up to step {step}; lower --lr, then "
                             f"--resume from the last checkpoint in {self.checkpoints}")

    def eta(self, step: int, steps: int) -> str:
        """Time left at the mean pace of this process, as "ETA 1m20s"."""
        left = (time.monotonic() - self._opened) / max(1, step - self._first) * (steps - step)
        return f"ETA {int(left // 60)}m{int(left % 60):02d}s"

    def of_kind(self, kind: str) -> list[dict]:
        return [row for row in self.metrics if row["kind"] == kind]

    def path(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:06d}"

    def save(self, step: int, save_model, model, optimizers, **counters) -> Path:
        """Write a checkpoint aside, flush it, rename it. save_model(folder) writes weights, config and tokenizer."""
        final = self.path(step)
        if final.exists() and not damaged(final):
            return final
        aside = final.with_suffix(".tmp")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)  # only ever a damaged one, passed over above
        (aside / "trainer").mkdir(parents=True)
        try:
            save_model(aside)
            save_file(trainer_state(model, optimizers), aside / "trainer" / "state.safetensors")
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk its own way
            shutil.rmtree(aside, ignore_errors=True)
            raise OSError(f"could not save {final}: {error}. Earlier checkpoints are whole; "
                          "free some space, then --resume") from None
        files = [f for f in sorted(aside.rglob("*")) if f.is_file()]
        sizes = {str(f.relative_to(aside)): f.stat().st_size for f in files}
        write_json(aside / "trainer.json", {"step": step, **counters, "files": sizes})
        for file in files:
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        aside.rename(final)
        return final

    def load(self, model, optimizers) -> dict:
        """Put the resumed checkpoint's weights and optimizer state in place; returns its trainer.json."""
        load_trainer_state(self.path(self.resumed["step"]) / "trainer" / "state.safetensors", model, optimizers)
        return self.resumed

    def prune(self, keep: int, protected: set[int]) -> None:
        """Delete the oldest checkpoints so that `keep` stay (0 = all); never the newest or the `protected` steps."""
        if not keep:
            return
        folders = sorted(self.checkpoints.glob("step_*[0-9]"))
        spare = [f for f in folders[:-1] if int(f.name[5:]) not in protected]
        for folder in spare[:max(0, len(folders) - keep)]:
            shutil.rmtree(folder)


def damaged(folder: Path) -> str:
    """What is wrong with a checkpoint ('' = nothing): no trainer.json, or a file without the size written there."""
    if not (folder / "trainer.json").exists():
        return "no trainer.json"
    for name, size in json.loads((folder / "trainer.json").read_text())["files"].items():
        found = (folder / name).stat().st_size if (folder / name).exists() else None
        if found != size:
            return f"{name} has {found} bytes, not {size}"
    return ""


def write_json(path: Path, value) -> None:
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(value, indent=2, default=str) + "\n")
    aside.rename(path)


def read_jsonl(path: Path, broken_tail: bool = False) -> list[dict]:
    """Rows of a JSONL file. broken_tail: a last line cut short by a kill is passed over instead of refused."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # not splitlines(): U+2028 may stand in a string
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    rows, last = [], max((n for n, line in enumerate(lines, 1) if line.strip()), default=0)
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if broken_tail and n == last:
                break
            raise ValueError(f"{path}:{n}: not JSON ({error.msg} at column {error.colno}); "
                             "each line must be one JSON object") from None
    return rows


# ---------------------------------------------------------------------------------------------- optimizers and schedule
def make_optimizers(model, name: str, lr: float, betas=(0.9, 0.95),
                    weight_decay: float = 0.01) -> list[torch.optim.Optimizer]:
    """adamw: AdamW on all, as the paper. muon: Muon on the blocks' matrices, AdamW on embeddings, norms and biases.

    With Muon `lr` is Muon's own (about 2e-3); embeddings and norms then take AdamW at the same rate.
    """
    named = list(model.named_parameters())
    inner = [p for n, p in named if p.ndim == 2 and "embed" not in n and "lm_head" not in n] if name == "muon" else []
    inner_ids = {id(p) for p in inner}
    rest = [p for _, p in named if id(p) not in inner_ids]
    optimizers = [torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=weight_decay, foreach=True)]
    if inner:
        muon = torch.optim.Muon(inner, lr=lr, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    return optimizers


def lr_at(step: int, steps: int, lr: float, schedule: str, warmup: float) -> float:
    """Learning rate of the update after `step`: linear warm-up over warmup * steps, then constant or cosine to 0."""
    n_warm = int(warmup * steps)
    if step < n_warm:
        return lr * (step + 1) / n_warm
    if schedule == "constant":
        return lr
    return lr * 0.5 * (1 + math.cos(math.pi * (step - n_warm) / max(1, steps - n_warm)))


def update(model, optimizers, lr: float, clip: float) -> float:
    """Clip, step, clear. Returns the gradient norm before clipping; a NaN or infinite one skips the step."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item()
    if math.isfinite(norm):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return norm


def trainer_state(model, optimizers) -> dict[str, torch.Tensor]:
    """Weights and optimizer state as one flat dict, "model/NAME" and "optimizer/NAME/KEY", in the parameters' fp32."""
    names = {id(p): n for n, p in model.named_parameters()}
    state = {f"model/{n}": p.detach().contiguous() for n, p in model.named_parameters()}
    for optimizer in optimizers:
        for p, entry in optimizer.state.items():
            state |= {f"optimizer/{names[id(p)]}/{key}": value.contiguous() for key, value in entry.items()}
    return state


def load_trainer_state(path: Path, model, optimizers) -> None:
    """The reverse of trainer_state. Every parameter must be there, optimizer entries only where there were any."""
    state, params = load_file(path), dict(model.named_parameters())
    owner = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for key, value in state.items():
        use, name, *entry = key.split("/")
        if name not in params:
            raise ValueError(f"{path}: {name} is not a parameter of this model; "
                             "--resume needs the --init that the run began with")
        p = params[name]
        if use == "model":
            p.data.copy_(value)
        else:
            owner[id(p)].state[p][entry[0]] = value.to(p.device) if value.ndim else value
    missing = [n for n in params if f"model/{n}" not in state]
    if missing:
        raise ValueError(f"{path}: no {missing[0]} (and {len(missing) - 1} more); the checkpoint is of another model")
