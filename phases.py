"""SFT regimes of a run, from its validation loss alone, and the checkpoint to start RL from. Needs numpy only.

Eq. (5)-(9) of arXiv 2512.11470, with L_min the lowest validation loss of the run:
    adaptive  before the first point within 2% of L_min     stable  from there to the last point within 2%
    mild      after that, below 1.1 L_min                   severe  after that, 1.1 L_min or more
Choices where the paper leaves something open:
 1) A point above the band but between two points inside it has no regime in the paper. Here it is stable: a spike, or a
    hump between two equal minima, does not end Stable. So every checkpoint has one regime, and they come in order.
 2) A loss that is not a number counts as infinitely high. A run that ends so, or at more than twice the loss it had
    before a jump, is named diverged.
 3) Noise. sigma, of one validation, is estimated from the curve itself. Where 2 sigma exceeds the 2% band, single
    values cannot be sorted into it: both edges are then raised by 2 sigma, and the reason says so. Otherwise they
    stand as printed.
 4) saturated = false ("still improving") when the lowest point is the last one, or when the last point is within noise
    of it and the second half of the curve still falls by more than its noise.
 5) RL starts from the saved checkpoint of lowest validation loss, as in the paper's Table 1; the first saved Mild
    checkpoint is named as the alternative.
 6) Rows may come in any order. If a step occurs twice, the later row is used.
All of it works on the prefix of a run: sft.py calls diagnose() after each validation and stops by reached().

    python phases.py runs/sft [--json]                          metrics.jsonl, lines of kind val; checkpoints/step_N
    python phases.py --csv curve.csv                            columns val_loss and step or flops (or both)
    python phases.py --compare runs/a runs/b [--ceilings 77.3 79.7]     or --ceilings FILE.csv, columns run and a_post
Shapes: N evaluations of one run. Losses in nats a token, compute in FLOPs since the start of SFT."""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core.errors import UserError

DELTA, DELTA2 = 0.02, 0.1  # eq. (5): the upper edges of Stable and of Mild, relative to L_min
PATIENCE = (
    3  # validations in a row before a stop; with 2, noise stops 2 to 3 times as many flat runs
)
REGIMES = ("adaptive", "stable", "mild", "severe")


class Curve(NamedTuple):
    """One run's validations, as read: lists of one length, and what else a run directory knows."""

    steps: list
    losses: list
    flops: list  # None where not recorded
    saved: list | None = (
        None  # steps that have a checkpoint; None: unknown (a CSV), so every step counts
    )
    val_set: str | None = None  # hash of the validation rows


@dataclass(frozen=True)
class Diagnosis:
    """What a validation curve says. Lists are sorted by step, one entry a step."""

    steps: list
    losses: list
    flops: list
    regimes: list  # one of REGIMES for each step
    noise: float  # sigma of one validation loss, nats; 0 where the curve shows none
    saturated: bool
    diverged_step: int | None  # first step of a divergence that the run did not come back from
    recommended_step: int | None  # None when no step is both saved and finite
    alternative_step: int | None  # first saved checkpoint in Mild
    reason: str

    def as_json(self) -> dict:
        """The documented JSON; a loss that is not finite is null, for which JSON has no other word."""
        rows = [
            {"step": s, "flops": f, "val_loss": v if math.isfinite(v) else None, "regime": r}
            for s, f, v, r in zip(self.steps, self.flops, self.losses, self.regimes)
        ]
        return {
            "regimes": rows,
            "saturated": self.saturated,
            "recommended_step": self.recommended_step,
            "reason": self.reason,
            "alternative_step": self.alternative_step,
            "diverged_step": self.diverged_step,
            "noise": self.noise,
        }


def regimes(
    steps, losses, delta: float = DELTA, delta2: float = DELTA2, margin: float = 0.0
) -> list[str]:
    """Eq. (5)-(9), made total: one of REGIMES for each (step, loss), in the order given.

    steps, losses (N,) nats; margin: nats by which both edges are raised for noise (0 = as printed)."""
    if len(steps) != len(losses):
        raise UserError(
            f"regimes: {len(steps)} steps but {len(losses)} losses; give one loss a step"
        )
    x, loss = np.asarray(steps, float), _infinite_if_bad(losses)
    low = loss.min(initial=np.inf)
    if not np.isfinite(low):
        return ["severe"] * len(loss)  # never finite: there is no minimum to be near
    stable = loss <= low + delta * abs(low) + margin  # abs: below zero the band would turn round
    first, last = x[stable].min(), x[stable].max()
    after = np.where(loss >= low + delta2 * abs(low) + margin, "severe", "mild")
    return [
        "adaptive" if s < first else "stable" if s <= last else str(name)
        for s, name in zip(x, after)
    ]


def diagnose(
    steps, losses, flops=None, saved=None, delta: float = DELTA, delta2: float = DELTA2
) -> Diagnosis:
    """Regimes, saturation and the checkpoint to start RL from, of a run or of the prefix of one.

    steps, losses (N,) in any order, nats; flops (N,) or None; saved: steps that have a checkpoint, None = all."""
    flops = [None] * len(steps) if flops is None else flops
    if not len(steps) or len(steps) != len(losses) or len(steps) != len(flops):
        raise UserError(
            f"diagnose: {len(steps)} steps, {len(losses)} losses, {len(flops)} flops; "
            "needs at least one validation and equal lengths"
        )
    steps = np.asarray(steps).tolist()  # plain numbers, for JSON
    rows = {
        s: (float("nan") if v is None else float(v), f) for s, v, f in zip(steps, losses, flops)
    }
    order = sorted(rows)
    loss = _infinite_if_bad([rows[s][0] for s in order])  # (N,)
    finite = np.isfinite(loss)
    x, y = np.array(order, float)[finite], loss[finite]
    sigma = noise_of(x, y)
    margin = 2 * sigma if 2 * sigma > delta * y.min(initial=np.inf) else 0.0
    names = regimes(order, loss, delta, delta2, margin)
    improving, state = still_improving(x, y, sigma)
    diverged = _diverged_from(order, loss)
    usable = [i for i, s in enumerate(order) if finite[i] and (saved is None or s in saved)]
    best = min(usable, key=lambda i: loss[i], default=None)
    mild = next((order[i] for i in usable if names[i] == "mild"), None)
    if diverged is not None:
        state = f"diverged at step {diverged}"
    reason = _reason(order, loss, names, best, state)
    if margin:
        reason += f"; a validation is noisy by {sigma:.2g}, so the edges of Stable and Mild are raised by {margin:.2g}"
    return Diagnosis(
        order,
        [rows[s][0] for s in order],
        [rows[s][1] for s in order],
        names,
        sigma,
        not improving,
        diverged,
        None if best is None else order[best],
        mild,
        reason,
    )


def reached(diagnosis: Diagnosis, regime: str) -> bool:
    """Whether a run in training has reached `regime` for good: sft.py --until stable|mild|severe.

    One bad validation may be a spike, so PATIENCE in a row are asked for, and for mild and severe a mean excess over
    the Stable band of twice its standard error. A run that diverged has reached everything."""
    if regime not in REGIMES[1:]:
        raise UserError(f"until = {regime!r}: use one of {', '.join(REGIMES[1:])}")
    loss = _infinite_if_bad(diagnosis.losses)
    if diagnosis.diverged_step is not None:
        return True
    if regime == "stable":
        return diagnosis.saturated and len(loss) - 1 - int(np.argmin(loss)) >= PATIENCE
    beyond = REGIMES[REGIMES.index(regime) :]
    tail = next(
        (i for i, name in enumerate(reversed(diagnosis.regimes)) if name not in beyond), len(loss)
    )
    settled = loss[[name == "stable" for name in diagnosis.regimes]]
    if tail < PATIENCE or not len(settled):
        return False
    excess = loss[-tail:].mean() - (1 + DELTA) * np.median(settled)
    return bool(excess > 2 * diagnosis.noise * math.sqrt(1 / tail + 1 / len(settled)))


def noise_of(x, loss) -> float:
    """Standard deviation of one validation (nats), by how far points lie from the line through their neighbours.

    x, loss (N,) finite, sorted by x; only from 1.5 L_min on, where the bands are. 0 unless the curve turns 3 times or
    more and these distances change sign 4 times and at every other point: a valley turns once, a spike or a second
    minimum bends few points; of noise three in four change sign."""
    start = int(np.argmax(loss <= 1.5 * loss.min(initial=np.inf))) if len(loss) else 0
    x, loss = x[start:], loss[start:]
    if len(loss) < 7:  # 4 changes of sign need 5 distances
        return 0.0
    w = (x[1:-1] - x[:-2]) / (
        x[2:] - x[:-2]
    )  # uneven steps: where between its neighbours a point lies
    gap = (loss[1:-1] - (1 - w) * loss[:-2] - w * loss[2:]) / np.sqrt(1 + w**2 + (1 - w) ** 2)
    n_turns, n_changes = (int((v[1:] * v[:-1] < 0).sum()) for v in (np.diff(loss), gap))
    if n_turns < 3 or n_changes < max(4, (len(gap) - 1) / 2):
        return 0.0
    return float(
        1.4826 * np.median(np.abs(gap))
    )  # 1.4826 makes it a Gaussian's sigma; the median passes over spikes


def still_improving(x, loss, sigma: float) -> tuple[bool, str]:
    """Whether the loss still falls at the end of the curve, and the words for it; x, loss (N,) finite, sorted by x."""
    if len(loss) < 2:
        return True, "fewer than two finite validations: nothing to compare"
    if np.argmin(loss) == len(loss) - 1:
        return True, "still improving: the last validation is the lowest"
    if sigma == 0 or loss[-1] - loss.min() > 2 * sigma:
        return False, "saturated: the minimum has passed"
    half = max(3, len(loss) // 2)
    t = x[-half:] - x[-half:].mean()
    slope, error = (t @ loss[-half:]) / (t @ t), sigma / math.sqrt(t @ t)
    if slope < -2 * error:
        return True, f"still improving: the last {half} fall by more than their noise"
    return False, f"saturated: the last {half} are level within their noise"


def _diverged_from(steps, loss):
    """First step of a stretch at the end that is not finite, or (two points or more) above twice the loss before it."""
    for i in range(len(loss)):
        before, end = (loss[i - 1] if i else np.inf), loss[i:]
        if not np.isfinite(end).any() or (len(end) > 1 and end.min() > 2 * before):
            return steps[i]
    return None


def _reason(steps, loss, names, best, state) -> str:
    """One sentence for a log line: the checkpoint, why this one, and what the curve did."""
    low = int(np.argmin(loss))
    if best is None:
        lost = (
            "no validation loss is finite"
            if not np.isfinite(loss[low])
            else "no validated step is saved"
        )
        return f"no checkpoint to recommend: {lost} ({state})"
    text = (
        f"minimum validation loss {loss[best]:.4g} at step {steps[best]} ({names[best]}); {state}"
    )
    return (
        text
        if best == low
        else f"{text}; the lowest, {loss[low]:.4g} at step {steps[low]}, is not saved"
    )


def _infinite_if_bad(losses) -> np.ndarray:
    """(N,) floats, with +inf for None, NaN and both infinities."""
    loss = np.array([np.nan if v is None else v for v in losses], float)
    return np.where(np.isfinite(loss), loss, np.inf)


def read_run(run_dir) -> Curve:
    """The validations of a run directory (metrics.jsonl, kind val), its saved steps and its validation set."""
    path, config = Path(run_dir) / "metrics.jsonl", Path(run_dir) / "run.json"
    if not path.is_file():
        raise UserError(f"{path}: not found; give a run directory of sft.py, or --csv FILE")
    lines, rows = path.read_text(encoding="utf-8").splitlines(), []
    for n, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if n < len(lines):  # the last line may be one that the run is just writing
                raise UserError(
                    f"{path}:{n}: not JSON ({error}); every line is one object"
                ) from None
    rows = [row for row in rows if row.get("kind") == "val"]
    if not rows or not all({"step", "val_loss"} <= set(row) for row in rows):
        raise UserError(
            f"{path}: no line of kind val with step and val_loss; train until the first validation"
        )
    names = [
        re.fullmatch(r"step_(\d+)", p.name)
        for p in Path(run_dir, "checkpoints").glob("step_*")
        if p.is_dir()
    ]
    val_set = (
        json.loads(config.read_text(encoding="utf-8")).get("val_set") if config.is_file() else None
    )
    return Curve(
        [row["step"] for row in rows],
        [row["val_loss"] for row in rows],
        [row.get("flops") for row in rows],
        sorted(int(m[1]) for m in names if m),
        val_set,
    )


def read_csv(path) -> Curve:
    """Any trainer's curve. Without a column step, the rank of the row's compute (1 for the least) stands for it."""
    rows = _table(path, "val_loss", "val_loss and step or flops")
    if not {"step", "flops"} & set(rows[0]):
        raise UserError(f"{path}: no column step or flops (found: {', '.join(rows[0])})")
    columns = {}
    for name in {"step", "flops", "val_loss"} & set(rows[0]):
        try:
            columns[name] = [float(row[name] or "nan") for row in rows]
        except ValueError as error:
            raise UserError(
                f"{path}: column {name}: {error}; give numbers, empty for a missing loss"
            ) from None
    flops = columns.get("flops")
    steps = columns.get("step") or [sorted(set(flops)).index(f) + 1 for f in flops]
    if not all(map(math.isfinite, steps + (flops or []))):
        raise UserError(f"{path}: an empty or infinite step or flops; only val_loss may be missing")
    return Curve(
        [int(s) if s == int(s) else s for s in steps],
        columns["val_loss"],
        flops or [None] * len(rows),
    )


def _table(path, column: str, needed: str) -> list[dict]:
    if not Path(path).is_file():
        raise UserError(f"{path}: not found; give a CSV file with columns {needed}")
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or column not in rows[0]:
        raise UserError(
            f"{path}: needs columns {needed} (found: {', '.join(rows[0]) if rows else 'no row'})"
        )
    return rows


def compare(runs, ceilings=None, delta: float = DELTA, delta2: float = DELTA2) -> dict:
    """SFT runs ranked by minimum validation loss, with Pearson and Spearman against the ceilings that are known.

    runs: directories of sft.py runs on one validation set; ceilings {run: A_post in points}."""
    curves = {str(run): read_run(run) for run in runs}
    sets = {run: curve.val_set for run, curve in curves.items()}
    if None in sets.values() or len(set(sets.values())) > 1:
        shown = ", ".join(f"{run}: {name or 'unknown'}" for run, name in sets.items())
        raise UserError(
            f"losses on different or unknown validation sets cannot be compared ({shown}); "
            "train with the same --val, so that val_set in run.json agrees"
        )
    rows = []
    for run, curve in curves.items():
        found = diagnose(curve.steps, curve.losses, delta=delta, delta2=delta2)
        rows.append(
            {
                "run": run,
                "min_val_loss": float(_infinite_if_bad(found.losses).min()),
                "step": found.recommended_step,
                "saturated": found.saturated,
                "a_post": (ceilings or {}).get(run),
            }
        )
    rows.sort(key=lambda row: row["min_val_loss"])
    known = [(row["min_val_loss"], row["a_post"]) for row in rows if row["a_post"] is not None]
    loss, ceiling = np.array(known, float).reshape(-1, 2).T
    return {
        "val_set": next(iter(sets.values())),
        "runs": rows,
        "n_ceilings": len(known),
        "pearson": correlation(loss, ceiling),
        "spearman": correlation(_ranks(loss), _ranks(ceiling)),
    }


def correlation(a, b) -> float | None:
    """Pearson's r of two (N,) arrays; None where it does not exist (fewer than two points, or no spread)."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0 or not np.isfinite([a, b]).all():
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values) -> np.ndarray:
    """(N,) ranks for Spearman, ties sharing their mean rank."""
    return np.array([(values < v).sum() + (values == v).sum() / 2 for v in values])


def read_ceilings(words, runs) -> dict:
    """--ceilings: one number a run in the same order, or a CSV file with columns run and a_post."""
    if len(words) == 1 and words[0].endswith(".csv"):
        rows = _table(words[0], "a_post", "run and a_post")
        words, runs = [row["a_post"] for row in rows], [row.get("run") for row in rows]
    try:
        values = [float(word) for word in words]
    except ValueError as error:
        raise UserError(
            f"--ceilings: {error}; give a number a run, or FILE.csv with run and a_post"
        ) from None
    if len(values) != len(runs):
        raise UserError(
            f"--ceilings: {len(values)} numbers for {len(runs)} runs; give one a run, in the same order"
        )
    return dict(zip(map(str, runs), values))


def _report(found: Diagnosis) -> str:
    """The text table: a row a validation, then the recommendation."""
    lines = [f"{'step':>10} {'FLOPs':>10} {'val loss':>9}  regime"]
    for step, loss, flops, name in zip(found.steps, found.losses, found.flops, found.regimes):
        mark = " <- start RL here" if step == found.recommended_step else ""
        compute = "-" if flops is None else f"{flops:.3e}"
        lines.append(f"{step:>10} {compute:>10} {loss:9.4f}  {name}{mark}")
    lines.append(found.reason)
    if found.alternative_step is not None:
        lines.append(
            f"alternative: step {found.alternative_step}, the first saved checkpoint in Mild"
        )
    return "\n".join(lines)


def _comparison(result: dict) -> str:
    lines = [
        f"validation set {result['val_set']}",
        f"{'rank':>4} {'min val loss':>12} {'step':>8} {'A_post':>7}  run",
    ]
    for rank, row in enumerate(result["runs"], 1):
        ceiling = "-" if row["a_post"] is None else f"{row['a_post']:.1f}"
        late = "" if row["saturated"] else "  (still improving)"
        lines.append(
            f"{rank:>4} {row['min_val_loss']:12.4f} {row['step'] or '-':>8} {ceiling:>7}  {row['run']}{late}"
        )
    if result["pearson"] is not None:
        lines.append(
            f"with {result['n_ceilings']} ceilings: Pearson {result['pearson']:+.2f}, "
            f"Spearman {result['spearman']:+.2f}"
        )
    return "\n".join(lines)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", help="run directory of sft.py (default runs/sft)")
    parser.add_argument("--csv", help="a curve instead: columns val_loss and step or flops")
    parser.add_argument(
        "--compare", nargs="+", metavar="RUN", help="rank SFT runs on one validation set"
    )
    parser.add_argument(
        "--ceilings", nargs="+", metavar="A_POST", help="with --compare: points a run, or FILE.csv"
    )
    parser.add_argument(
        "--delta", type=float, default=DELTA, help="upper edge of Stable, over L_min (default 0.02)"
    )
    parser.add_argument(
        "--delta2", type=float, default=DELTA2, help="upper edge of Mild, over L_min (default 0.1)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    try:
        if bool(args.run) + bool(args.csv) + bool(args.compare) > 1:
            raise UserError("give one of RUN, --csv FILE and --compare RUN RUN ...")
        if args.ceilings and not args.compare:
            raise UserError("--ceilings goes with --compare RUN RUN ...")
        if not 0 <= args.delta < args.delta2:
            raise UserError(
                f"--delta {args.delta} --delta2 {args.delta2}: needs 0 <= delta < delta2"
            )
        if args.compare:
            ceilings = read_ceilings(args.ceilings, args.compare) if args.ceilings else None
            result = compare(args.compare, ceilings, args.delta, args.delta2)
            print(json.dumps(result) if args.json else _comparison(result))
            return 0
        curve = read_csv(args.csv) if args.csv else read_run(args.run or "runs/sft")
        found = diagnose(
            curve.steps, curve.losses, curve.flops, curve.saved, args.delta, args.delta2
        )
        print(json.dumps(found.as_json()) if args.json else _report(found))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
