"""What both training loops share: the run directory, metrics, checkpoints, signals, the ETA.

    run = Run(cfg, steps, start, ...)            checks cfg.out: new run, resumed run or error
    run.attach(model, optimizers, write_model)   loads the checkpoint to resume; opens the directory
    for step in run.steps():                     step: the number of steps done so far
        run.checkpoint(step)                     saves when an evaluation, a signal or a flag asks
        if run.due(step, "eval"): ...            evaluate, then run.log(step, eval=numbers)
        if run.over(step): break
        ...                                      one step, then run.log(step + 1, train=numbers)

    runs/sft/run.json         every field as used, argv, number of ranks, versions
    runs/sft/metrics.jsonl    one object per line: step kind tokens flops seconds ...
    runs/sft/samples.jsonl    what the model wrote, and how it was judged
    runs/sft/checkpoints/     see checkpoint.py
    runs/sft/cache/           tokenized rows (SFT), see cache.py

Rank 0 writes the directory and prints; all ranks know its contents and decide alike. On several
nodes it has to lie on a file system that all of them see.
"""

import dataclasses
import fcntl
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from core import checkpoint, ranks, trackers
from core.errors import UserError
from core.files import write_aside, write_json

LOCK = ".lock"  # held by the process that writes in the directory
CACHE = "cache"  # the folder of tokenized rows, which may be there before the run begins
FIXED = ("init", "data", "val", "reward", "algo")  # settings that a resumed run cannot change
PER_CALL = ("resume", "overwrite", "dry_run", "out")  # settings that belong to one call
KEPT_GROUPS = 4  # groups per step in samples.jsonl
KEPT_TEXT = 50_000  # characters of their responses, unless one group alone has more
ALLOWED_SKIPS = 4  # updates in a row with a NaN or infinite gradient; one more ends the run


class Run:
    """One run directory and the loop that fills it."""

    def __init__(self, cfg, last: int, start: Path, **facts):
        """Read the directory, if there is one; nothing is written before attach().

        cfg: out, resume, overwrite, eval_every, save_every, keep ... last: the step it ends at.
        start: the model folder that the run begins from. facts: more entries of run.json, which
        must be the same when the run is resumed.
        """
        self.cfg = cfg
        self.last = last
        self.start = start
        self.dir = Path(cfg.out)
        self.checkpoints = self.dir / "checkpoints"
        self.totals = {"tokens": 0, "flops": 0.0, "flops_hw": 0.0}  # logged and saved
        self.step = 0  # steps done
        self.position = 0  # rows (SFT) or prompts (RL) taken from the data so far
        self.facts = facts
        self._log_to = getattr(cfg, "log_to", "")
        trackers.check(self._log_to)
        self.resumed = ranks.from_first(self._examine)
        self.first = self.resumed["step"] if self.resumed else 0
        if self.first > last:
            raise UserError(
                f"{self.dir} is at step {self.first} already, beyond the {last} asked for; "
                "give more --steps"
            )
        self.metrics = []
        self.interrupted = False
        self.ended = ""  # why it ends before its last step
        self._protected = set()
        self._skipped = 0
        self._signals = catch_signals()

    # ---- the directory ---------------------------------------------------------------------------
    def _examine(self) -> dict | None:
        """trainer.json of the checkpoint to go on from, or None; on rank 0. Changes nothing."""
        if is_new(self.cfg, self.start):
            return None
        self._compare(recorded(self.dir))
        resumed = checkpoint.newest_whole(self.checkpoints)
        log = self.dir / "metrics.jsonl"
        if not resumed and log.exists() and log.stat().st_size:
            raise UserError(
                f"{self.dir} has metrics but no whole checkpoint to go on from; put one back, "
                "or start anew with --overwrite"
            )
        return resumed

    def _compare(self, before: dict) -> None:
        """Refuse to go on with other data or another model; print the settings that changed."""
        for name, fact in self.facts.items():
            if before.get(name, fact) != fact:
                raise UserError(
                    f"{self.dir}: {name} is {fact} and was {before[name]} when the run began: give "
                    "back the same files and flags, or start anew in another --out"
                )
        changed = []
        now = dataclasses.asdict(self.cfg)
        for name, value in before.get("config", {}).items():
            if name in PER_CALL or now.get(name, value) == value:
                continue
            flag = "--" + name.replace("_", "-")
            if name in FIXED:
                raise UserError(
                    f"{flag} {now[name]}: {self.dir} was begun with {value or 'none'}; leave the "
                    "flag out to go on, or start anew in another --out"
                )
            changed.append(f"{flag} {value} -> {now[name]}")
        if changed:
            print(f"resuming with other settings than before: {', '.join(changed)}", flush=True)

    def _begin(self) -> list[dict]:
        """Make the directory ready, on rank 0; returns the metrics up to the step we go on from."""
        self.dir.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.dir)
        if self.cfg.overwrite:
            for folder in checkpoint.steps_in(self.checkpoints).values():
                shutil.rmtree(folder)
            for name in ("run.json", "metrics.jsonl", "samples.jsonl"):  # and nothing else
                (self.dir / name).unlink(missing_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        last = self.first if self.resumed else -1
        metrics = self._cut("metrics.jsonl", last)
        self._cut("samples.jsonl", last)
        about = {
            "config": dataclasses.asdict(self.cfg),
            "start": str(self.start),
            **self.facts,
            "argv": sys.argv,
            "world_size": ranks.world(),
            "torch": torch.__version__,
            "python": sys.version.split()[0],
        }
        write_json(self.dir / "run.json", about)
        return metrics

    def _cut(self, name: str, last: int) -> list[dict]:
        """Keep the lines up to step `last` (a killed run may have written more); return them."""
        path = self.dir / name
        kept = []
        n_odd = 0  # lines that are no rows
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
                if row["step"] <= last:
                    kept.append(row)
            except (ValueError, TypeError, KeyError):
                n_odd += 1
        if n_odd:
            print(f"{path}: {n_odd} lines are no rows of a run (cut short?) and left out")
        write_aside(path, "".join(json.dumps(row) + "\n" for row in kept))
        return kept

    # ---- the loop --------------------------------------------------------------------------------
    def attach(self, model, optimizers: list, write_model) -> None:
        """Load weights, optimizer state and counters of a resumed run, then prepare the directory.
        write_model(folder) writes the Hugging Face folder."""
        self.model = model
        self._optimizers = optimizers
        self._write_model = write_model
        if self.resumed:
            folder = self.folder(self.first)
            checkpoint.load_state(folder / "trainer", model, optimizers)
            self.totals = {name: self.resumed[name] for name in self.totals}
            self.position = self.resumed["position"]
        self.metrics = ranks.from_first(self._begin)
        tracker = "" if ranks.rank() else self._log_to
        after = self.first if self.resumed else -1
        settings = dataclasses.asdict(self.cfg)
        self._tracker = trackers.Tracker(tracker, self.dir, after, settings)
        if self.resumed:
            print(f"resuming {self.dir} after step {self.first}", flush=True)
        self._opened = time.monotonic()
        self._seconds_before = self.metrics[-1].get("seconds", 0.0) if self.metrics else 0.0
        self._clock = self._opened  # when time was last charged
        self._spent = {"steps": 0.0, "evaluations": 0.0}  # seconds of this process

    def steps(self) -> Iterator[int]:
        """The number of steps done when the body begins: from where the run stands to the last."""
        self._clock = time.monotonic()
        for step in range(self.first, self.last + 1):
            self.step = step
            yield step

    def done_share(self, max_flops: float = 0.0) -> float:
        """Share of the run that is done, 0..1: of its steps or, if that is more, of its compute."""
        by_compute = self.totals["flops"] / max_flops if max_flops else 0.0
        return max(self.step / self.last, by_compute)

    def due(self, step: int, kind: str) -> bool:
        """Whether to validate ("val") or evaluate ("eval") now: every eval_every steps and at the
        end, unless the run did so before it was killed."""
        if step % self.cfg.eval_every and step != self.last:
            return False
        return not any(row["step"] == step for row in self.of_kind(kind))

    def checkpoint(self, step: int) -> None:
        """Save where an evaluation follows, where --save-every asks, and on a signal."""
        self.interrupted = ranks.any_of(self._signals)
        on_schedule = self.cfg.save_every and step % self.cfg.save_every == 0
        evaluated = step % self.cfg.eval_every == 0 or step == self.last
        if evaluated or on_schedule or self.interrupted:
            self.save(step)

    def over(self, step: int) -> bool:
        """Whether the run ends here: its last step, end(), or a signal."""
        self._charge_time("evaluations")
        return step == self.last or self.interrupted

    def end(self, reason: str) -> None:
        """Make the current step the run's last one."""
        self.ended = reason
        self.last = self.step
        print(f"step {self.step} is the last one: {reason}", flush=True)

    def watch(self, norm: float, step: int) -> None:
        """Name a skipped update (gradient norm NaN or infinite); five in a row stop the run."""
        if math.isfinite(norm):
            self._skipped = 0
            return
        self._skipped += 1
        print(
            f"step {step}: gradient norm is {norm}, update skipped ({self._skipped} in a row)",
            flush=True,
        )
        if self._skipped > ALLOWED_SKIPS:
            raise UserError(
                f"{self._skipped} updates in a row had NaN or infinite gradients, up to step "
                f"{step}; lower --lr, then --resume from the last checkpoint in {self.checkpoints}"
            )

    def eta(self, step: int, last: int | None = None) -> str:
        """Time left at this process's pace, as "ETA 1m20s": steps, and evaluations still due."""
        last = last or self.last
        every = self.cfg.eval_every
        pace = self._spent["steps"] / max(1, step - self.first)
        n_evaluated = step // every - (self.first - 1) // every  # by this process
        evaluation = self._spent["evaluations"] / max(1, n_evaluated)
        left = pace * (last - step) + evaluation * (last // every - step // every)
        return f"ETA {int(left // 60)}m{int(left % 60):02d}s"

    def _charge_time(self, use: str) -> None:
        """Add the time since the last call to "steps" or to "evaluations" (saving included)."""
        now = time.monotonic()
        self._spent[use] += now - self._clock
        self._clock = now

    # ---- metrics ---------------------------------------------------------------------------------
    def count(self, tokens: int, flops: float, flops_hw: float) -> None:
        """Add to the run's totals. flops: the paper's count; flops_hw: what was computed."""
        self.totals = {
            "tokens": self.totals["tokens"] + tokens,
            "flops": self.totals["flops"] + flops,
            "flops_hw": self.totals["flops_hw"] + flops_hw,
        }

    @property
    def seconds(self) -> float:
        """Wall time of the run so far, its earlier parts included."""
        return self._seconds_before + time.monotonic() - self._opened

    def of_kind(self, kind: str) -> list[dict]:
        return [row for row in self.metrics if row["kind"] == kind]

    def log(self, step: int, **kinds: dict) -> None:
        """Append lines to metrics.jsonl: run.log(40, val={"val_loss": 1.2}, eval={"pass1": 30.0}).

        One write, so a kill leaves all of them or none. Infinite and NaN become null, as JSON has
        neither. A train line adds the time since the last one to the time spent on steps.
        """
        if "train" in kinds:
            self._charge_time("steps")
        rows = []
        for kind, numbers in kinds.items():
            row = {"step": step, "kind": kind, **self.totals, **numbers}
            if kind == "train" and torch.cuda.is_available():
                row["peak_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
            for name, value in row.items():
                if isinstance(value, float) and not math.isfinite(value):
                    row[name] = None
            rows.append({**row, "seconds": round(self.seconds, 4)})
        self._append("metrics.jsonl", rows)
        self.metrics += rows
        for row in rows:
            self._tracker.log(row)

    def log_samples(self, step: int, rows: list[dict]) -> None:
        self._append("samples.jsonl", [{"step": step, **row} for row in rows])

    def _append(self, name: str, rows: list[dict]) -> None:
        if ranks.rank() == 0:
            with open(self.dir / name, "a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))

    def hint(self, key: str, text: str) -> None:
        """Print once per run what is odd but not wrong, with the flag that helps, and log it as a
        line of kind "hint" with the step whose numbers show it."""
        if all(row["key"] != key for row in self.of_kind("hint")):
            print(f"hint: {text}", flush=True)
            self.log(self.step + 1, hint={"key": key, "text": text})

    # ---- checkpoints -----------------------------------------------------------------------------
    def folder(self, step: int) -> Path:
        return checkpoint.folder_of(self.checkpoints, step)

    def saved(self) -> set[int]:
        """Steps that have a checkpoint."""
        return set(checkpoint.steps_in(self.checkpoints))

    def save(self, step: int) -> None:
        if self._skipped:  # the weights may be what made the gradients NaN
            print(f"step {step}: not saved, as the last update was skipped", flush=True)
            return
        about = {"step": step, **self.totals, "position": self.position, "seed": self.cfg.seed}
        checkpoint.save(self.folder(step), self.model, self._optimizers, self._write_model, about)
        self.prune(self._protected)

    def prune(self, protected: set) -> None:
        """Delete the oldest checkpoints so that --keep stay (0 = all), now and after each save. The
        newest, `protected` steps, the run's start and incomplete folders are never deleted."""
        self._protected = protected
        if not self.cfg.keep or ranks.rank():
            return
        folders = checkpoint.steps_in(self.checkpoints)
        whole = [step for step, folder in folders.items() if not checkpoint.damaged(folder)]
        start = self.start.resolve()
        spare = []
        for step in whole[:-1]:
            if step not in protected and folders[step].resolve() != start:
                spare.append(step)
        for step in spare[: max(0, len(whole) - self.cfg.keep)]:
            shutil.rmtree(folders[step])


def is_new(cfg, start: Path) -> bool:
    """Whether cfg.out is for a new run, rather than one to resume. A UserError where it may be
    neither; changes nothing."""
    folder = Path(cfg.out)
    if not folder.exists() or {path.name for path in folder.iterdir()} <= {LOCK, CACHE}:
        return True
    if not cfg.overwrite and not cfg.resume:
        raise UserError(
            f"{folder} exists already: --resume goes on with it, --overwrite starts anew, "
            "--out names another"
        )
    if cfg.overwrite:
        _check_overwrite(cfg, folder, start)
    return cfg.overwrite


def _check_overwrite(cfg, folder: Path, start: Path) -> None:
    """Refuse to empty a folder that is not a run directory, or that this run reads from."""
    if not (folder / "run.json").exists():
        raise UserError(
            f"{folder} is not a run directory (no run.json): --overwrite leaves it alone; "
            "pick another --out"
        )
    read = [str(start)]
    for name in ("data", "val", "problems", "reward"):
        read.append(getattr(cfg, name, "").partition(".py:")[0])
    for path in filter(None, read):
        for place in (Path(path).absolute(), Path(path).resolve()):
            if place.is_relative_to(folder.resolve()):
                raise UserError(
                    f"--overwrite would delete {path}, which this run starts from; "
                    "pick another --out"
                )


def whole_groups(records: list[dict], trained: set[int]) -> list[dict]:
    """The samples of an RL step for samples.jsonl: whole groups, the trained ones first; at most
    KEPT_GROUPS of them and, beyond the first, about KEPT_TEXT characters of responses.

    records: of all samples, each with the number of its group. trained: numbers of the groups that
    an update trained on."""
    groups = {}
    for record in records:
        kept = {**record, "kind": "train", "trained": record["group"] in trained}
        groups.setdefault(record["group"], []).append(kept)
    rows = []
    for group in sorted(groups.values(), key=lambda group: not group[0]["trained"])[:KEPT_GROUPS]:
        if rows and sum(len(row["response"]) for row in rows + group) > KEPT_TEXT:
            break
        rows += group
    return rows


def recorded(out: str | Path) -> dict:
    """run.json of a run directory, or {}."""
    path = Path(out) / "run.json"
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise UserError(
            f"{path}: not the settings of a run; restore it, or start anew in another --out"
        ) from None


def lock(folder: Path):
    """An open file that keeps other processes out of a run directory until this one ends."""
    file = open(folder / LOCK, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        owner = file.read().strip()
        if owner != str(os.getpid()):
            raise UserError(
                f"{folder}: process {owner} is writing in it; wait for it, or pick another --out"
            ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def catch_signals() -> list:
    """A list that fills on Ctrl-C or SIGTERM: the loop ends its step, saves, says how to go on."""
    caught = []
    first = 0.0

    def remember(number, frame):
        nonlocal first
        if caught:
            # torchrun passes the terminal's Ctrl-C on: two at once are one
            if time.monotonic() - first > 3:
                raise KeyboardInterrupt
            return
        first = time.monotonic()
        caught.append(signal.Signals(number).name)
        print(
            f"\n{caught[0]}: finishing this step, then saving (again after 3 s: stop at once)",
            flush=True,
        )

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, remember)
    return caught
