"""What surrounds a training loop: the command line, the run directory, metrics, checkpoints, seeds, optimizers.

One dataclass per script is its command line: `cfg = cli.parse(Config)`. A field's trailing comment is its --help text,
so a flag is written once. Nothing here knows a loss or a token.

    runs/sft/run.json         every field as used, argv, world size, versions
    runs/sft/metrics.jsonl    one object a line: step kind tokens flops seconds ...; kind = train | val | eval
    runs/sft/samples.jsonl    what the model wrote, and how it was judged
    runs/sft/checkpoints/step_000400/
        config.json model.safetensors tokenizer.json ...     a Hugging Face model folder
        trainer/state-00000-of-00001.safetensors             fp32 weights and optimizer state, a file a process
        trainer.json                                         step, counters, every file's size: a cut one is seen

Choices: 1) a checkpoint is written beside its place, flushed to disk, then renamed: a folder without .tmp is whole.
2) No random state is stored. Every draw has a generator seeded from (seed, use, step, row), so a resumed run, or one on
   another number of processes, draws the same. 3) No pickle anywhere: safetensors and JSON. 4) Of several processes the
first one writes the run directory and speaks; all of them know its contents and decide alike. On several nodes it has
to lie on a file system that all of them see.
"""

import dataclasses
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors import SafetensorError

from core import ranks
from core.errors import UserError
from core.files import read_jsonl, write_aside, write_json

UMASK = os.umask(0o022)  # the only way to read it is to set it
os.umask(UMASK)


# seeds
def catch_signals() -> list:
    """A list that fills on Ctrl-C or SIGTERM, so that the loop ends its step, saves and says how to go on."""
    caught, first = [], 0.0

    def remember(number, frame):
        nonlocal first
        if (
            caught and time.monotonic() - first > 3
        ):  # torchrun passes the terminal's Ctrl-C on: two at once are one
            raise KeyboardInterrupt
        if not caught:
            first = time.monotonic()
            caught.append(signal.Signals(number).name)
            print(
                f"\n{caught[0]}: finishing this step, then saving (again after 3 s: stop at once)",
                flush=True,
            )

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, remember)
    return caught


def again() -> str:
    """The command that goes on with this run."""
    given = [word for word in sys.argv if word not in ("--resume", "--overwrite")]
    start = (
        f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', 1)}"
        if ranks.world() > 1
        else "python"
    )
    return shlex.join([*start.split(), *given, "--resume"])


def peak_memory(device) -> dict:
    """{"peak_mb": the most that tensors have taken on this GPU so far}; nothing on the CPU, where the system knows."""
    return (
        {"peak_mb": round(torch.cuda.max_memory_allocated(device) / 2**20)}
        if device.type == "cuda"
        else {}
    )


class Run:
    """One run directory: metrics, samples, checkpoints. `resumed`: trainer.json of the one to go on from, or None."""

    def __init__(self, cfg, resume: bool = False, overwrite: bool = False, **facts):
        self.dir = Path(cfg.out)
        self.checkpoints = self.dir / "checkpoints"
        about = {
            "config": dataclasses.asdict(cfg),
            "argv": sys.argv,
            "world_size": ranks.world(),
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            **facts,
        }
        self.resumed, self.metrics = ranks.from_first(lambda: self._open(resume, overwrite, about))
        self.skipped, self._opened, self._first = (
            0,
            time.monotonic(),
            self.resumed["step"] if self.resumed else 0,
        )
        self._started = self._opened - (self.metrics[-1]["seconds"] if self.metrics else 0.0)

    def _open(self, resume: bool, overwrite: bool, about: dict) -> tuple[dict | None, list[dict]]:
        """(trainer.json of the checkpoint to go on from, metrics up to it), with the directory made ready."""
        resumed = None
        if self.dir.exists() and any(self.dir.iterdir()):
            if overwrite:
                if not (self.dir / "run.json").exists():
                    raise UserError(
                        f"{self.dir} is not a run directory (no run.json): --overwrite leaves it alone; "
                        "pick another --out"
                    )
                shutil.rmtree(self.dir)
            elif resume:
                resumed = self._newest_whole()
                self._compare(about["config"])
                log = self.dir / "metrics.jsonl"
                if not resumed and log.exists() and log.stat().st_size:
                    raise UserError(
                        f"{self.dir} has metrics but no whole checkpoint to go on from; put one back, "
                        "or start anew with --overwrite"
                    )
            else:
                raise UserError(
                    f"{self.dir} exists already: --resume goes on with it, --overwrite starts anew, "
                    "--out names another"
                )
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        last = resumed["step"] if resumed else -1
        metrics, _ = self._cut("metrics.jsonl", last), self._cut("samples.jsonl", last)
        write_json(self.dir / "run.json", about)
        return resumed, metrics

    def _compare(self, config: dict) -> None:
        """Say which settings of the run to go on with are now others."""
        path = self.dir / "run.json"
        before = json.loads(path.read_text())["config"] if path.exists() else {}
        changed = [
            f"--{name.replace('_', '-')} {value} -> {config[name]}"
            for name, value in before.items()
            if name in config and config[name] != value and name not in ("resume", "overwrite")
        ]
        if changed:
            print(f"resuming with other settings than before: {', '.join(changed)}", flush=True)

    def _newest_whole(self) -> dict | None:
        """trainer.json of the newest whole checkpoint (files as long as written down); damaged ones are named."""
        for folder in sorted(self.checkpoints.glob("step_*[0-9]"), reverse=True):
            damage = damaged(folder)
            if not damage:
                return json.loads((folder / "trainer.json").read_text())
            print(f"{folder} is damaged ({damage}): going on from the one before", flush=True)
        return None

    def _cut(self, name: str, last: int) -> list[dict]:
        """Keep the lines up to step `last` (a killed run may have written more), and return them."""
        path = self.dir / name
        kept = (
            [row for row in read_jsonl(path, broken_tail=True) if row["step"] <= last]
            if path.exists()
            else []
        )
        write_aside(path, "".join(json.dumps(row) + "\n" for row in kept))
        return kept

    @property
    def seconds(self) -> float:
        """Wall time of the run so far, its earlier parts included."""
        return time.monotonic() - self._started

    def log(self, step: int, kind: str, **numbers) -> None:
        """Append one line to metrics.jsonl. Infinite and NaN become null, which every JSON reader accepts."""
        self.log_together(step, {kind: numbers})

    def log_together(self, step: int, kinds: dict[str, dict]) -> None:
        """Append a line of each kind in one write: a kill leaves all of them or none."""
        seconds = round(self.seconds, 4)
        rows = [
            {"step": step, "kind": kind, **numbers, "seconds": seconds}
            for kind, numbers in kinds.items()
        ]
        for row in rows:
            row |= {
                k: None for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)
            }
        self._append("metrics.jsonl", rows)
        self.metrics += rows

    def log_samples(self, step: int, rows: list[dict]) -> None:
        self._append("samples.jsonl", [{"step": step, **row} for row in rows])

    def _append(self, name: str, rows: list[dict]) -> None:
        if ranks.rank() == 0:
            with open(self.dir / name, "a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))

    def watch(self, norm: float, step: int) -> None:
        """Name a skipped update (gradient norm NaN or infinite); five in a row stop the run, its checkpoints kept."""
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if self.skipped:
            print(
                f"step {step}: gradient norm is {norm}, update skipped ({self.skipped} in a row)",
                flush=True,
            )
        if self.skipped == 5:
            raise UserError(
                f"5 updates in a row had NaN or infinite gradients, up to step {step}; lower --lr, then "
                f"--resume from the last checkpoint in {self.checkpoints}"
            )

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
        aside = final.with_suffix(".tmp")
        if (
            self.skipped
        ):  # the weights may be what made the gradients NaN; --resume must find the ones before
            print(f"step {step}: not saved, as the last update was skipped", flush=True)
            return final
        ranks.settle(model)
        state = [value for _, value in ranks.named_state(model, optimizers)]
        (n_bytes,) = ranks.totals(sum(ranks.local(value).nbytes for value in state))
        n_bytes += sum(
            p.numel() * p.element_size() for p in model.parameters()
        )  # the model folder, at most
        if not ranks.from_first(lambda: self._make_room(final, aside, n_bytes)):
            return final
        failure = ""
        for write in (
            save_model,
            lambda folder: ranks.save_state(folder / "trainer", model, optimizers),
        ):
            try:
                write(aside)
            except (
                OSError,
                SafetensorError,
            ) as error:  # safetensors reports a full disk its own way
                failure = failure or str(error)
        failures = [
            text for text in ranks.gather(failure) if text
        ]  # also waits until every file is written
        ranks.from_first(lambda: self._seal(final, aside, failures, {"step": step, **counters}))
        return final

    def _make_room(self, final: Path, aside: Path, n_bytes: float) -> bool:
        """Prepare the folder `aside`; False if this checkpoint is there and whole already."""
        if final.exists() and not damaged(final):
            return False
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)  # only ever a damaged one, passed over above
        free = shutil.disk_usage(self.checkpoints).free
        if free < n_bytes:
            raise OSError(
                f"could not save {final}: it needs {n_bytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are free. "
                "Earlier checkpoints are whole; free some space or use --keep, then --resume"
            )
        (aside / "trainer").mkdir(parents=True)
        return True

    def _seal(self, final: Path, aside: Path, failures: list[str], about: dict) -> None:
        """Write down the files' sizes, flush them to disk and give the folder its name; or take it away again."""
        if failures:
            shutil.rmtree(aside, ignore_errors=True)
            raise OSError(
                f"could not save {final}: {failures[0]}. Earlier checkpoints are whole; "
                "free some space, then --resume"
            )
        files = [f for f in sorted(aside.rglob("*")) if f.is_file()]
        sizes = {str(f.relative_to(aside)): f.stat().st_size for f in files}
        write_json(aside / "trainer.json", {**about, "files": sizes})
        for file in [*files, aside / "trainer.json", aside / "trainer", aside]:
            if file.suffix == ".safetensors":
                file.chmod(
                    0o666 & ~UMASK
                )  # the library makes them private, which a group's shared disk does not want
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle), os.close(handle)
        aside.rename(final)

    def load(self, model, optimizers) -> dict:
        """Put the resumed checkpoint's weights and optimizer state in place; returns its trainer.json."""
        ranks.load_state(self.path(self.resumed["step"]) / "trainer", model, optimizers)
        return self.resumed

    def prune(self, keep: int, protected: set[int]) -> None:
        """Delete the oldest checkpoints so that `keep` stay (0 = all); never the newest or the `protected` steps."""
        if not keep or ranks.rank():
            return
        folders = sorted(self.checkpoints.glob("step_*[0-9]"))
        spare = [f for f in folders[:-1] if int(f.name[5:]) not in protected]
        for folder in spare[: max(0, len(folders) - keep)]:
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
