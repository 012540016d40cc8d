"""The regimes of an SFT run, from its validation losses alone, and the checkpoint to start RL from.

Eq. (5)-(9) of arXiv 2512.11470, with L_min the lowest validation loss of the run:
    adaptive  before the first point within 2% of L_min
    stable    from there to the last point within 2%
    mild      after that, below 1.1 L_min
    severe    after that, 1.1 L_min or more

    python phases.py runs/sft [--json] [--recommend loss|signal|accuracy] [--group 8]
    python phases.py --csv curve.csv        columns val_loss and step or flops (or both)
    python phases.py --compare runs/a runs/b [--ceilings 77.3 79.7 | --ceilings FILE.csv]

Choices where the paper leaves something open:
 1) A point above the band but between two points inside it is stable: neither a spike nor a hump
    between two equal minima ends Stable. So every checkpoint has one regime, in order.
 2) Not a number counts as infinite. A run that ends so, or jumps to twice its loss, has diverged.
 3) sigma, the noise of one validation, is estimated from the curve. Where 2 sigma exceeds the 2%
    band, both edges are raised by 2 sigma, and the reason says so.
 4) RL starts from the saved checkpoint of lowest validation loss, as in the paper's Table 1; where
    the curve is noisy, of the lowest mean of three. --recommend signal|accuracy: where most groups
    of G would carry a signal, or pass@1 is highest, by the samples of the run's validations.
It works on the prefix of a run, too: sft.py calls diagnose() after each validation.
Shapes: N validations of one run. Losses in nats per token, compute in FLOPs since the start."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core import tables
from core.errors import UserError
from core.estimates import Readiness, correlation, ranks, readiness_of

DELTA = 0.02  # eq. (5): the upper edge of Stable, relative to L_min
DELTA2 = 0.1  # and that of Mild
PATIENCE = 3  # validations before a stop; with 2, noise stops two to three times as many flat runs
PATIENCE_NOISY = 5  # for --until stable where the curve shows noise
GROUP = 8  # samples per problem in RL, for the expected signal
REGIMES = ("adaptive", "stable", "mild", "severe")


class Curve(NamedTuple):
    """One run's validations as read: lists of one length, and what else its directory knows."""

    steps: list
    losses: list
    flops: list  # None where not recorded
    saved: list | None = None  # steps with a checkpoint; None: unknown, so every step counts
    val_set: str | None = None  # hash of the validation rows
    readiness: dict = {}  # step -> Readiness, where a validation sampled


@dataclass(frozen=True)
class Diagnosis:
    """What a validation curve says. Lists are sorted by step, with one entry per step."""

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
        """The documented JSON; a loss that is not finite is null."""
        rows = []
        for step, flops, loss, regime in zip(self.steps, self.flops, self.losses, self.regimes):
            known = loss if math.isfinite(loss) else None
            rows.append({"step": step, "flops": flops, "val_loss": known, "regime": regime})
        names = ("saturated", "recommended_step", "reason", "alternative_step", "diverged_step")
        return {"regimes": rows} | {name: getattr(self, name) for name in (*names, "noise")}


# ------------------------------------------------------------------------------------ the regimes
def regimes(steps, losses, delta=DELTA, delta2=DELTA2, margin: float = 0.0) -> list[str]:
    """Eq. (5)-(9), made total: one of REGIMES for each (step, loss), in the order given.

    steps, losses (N,) nats; margin: nats by which both edges are raised for noise (0 = as printed).
    """
    if len(steps) != len(losses):
        raise UserError(f"regimes: {len(steps)} steps, {len(losses)} losses; needs one per step")
    x = np.asarray(steps, float)
    loss = _infinite_if_bad(losses)
    low = loss.min(initial=np.inf)
    if not np.isfinite(low):
        return ["severe"] * len(loss)  # never finite: there is no minimum to be near
    stable = loss <= low + delta * abs(low) + margin  # abs: a loss may lie below zero
    mild = loss < low + delta2 * abs(low) + margin
    first = x[stable].min()
    last = x[stable].max()
    after = np.where(mild, "mild", "severe")
    within = np.where(x <= last, "stable", after)
    return np.where(x < first, "adaptive", within).tolist()


def diagnose(steps, losses, flops=None, saved=None, delta=DELTA, delta2=DELTA2) -> Diagnosis:
    """Regimes, saturation and the checkpoint to start RL from, of a run or of its prefix.

    steps, losses (N,) in any order, nats; where a step occurs twice the later row counts.
    flops (N,) or None; saved: steps that have a checkpoint, None = all."""
    flops = [None] * len(steps) if flops is None else flops
    if not len(steps) or len(steps) != len(losses) or len(steps) != len(flops):
        sizes = f"{len(steps)} steps, {len(losses)} losses, {len(flops)} flops"
        raise UserError(f"diagnose: {sizes}; needs at least one validation and equal lengths")
    rows = {}
    for step, loss, compute in zip(np.asarray(steps).tolist(), losses, flops):
        rows[step] = (float("nan") if loss is None else float(loss), compute)
    order = sorted(rows)
    loss = _infinite_if_bad([rows[step][0] for step in order])  # (N,)
    finite = np.isfinite(loss)
    x = np.array(order, float)[finite]
    y = loss[finite]
    sigma = noise_of(x, y)
    margin = 2 * sigma if 2 * sigma > delta * y.min(initial=np.inf) else 0.0
    names = regimes(order, loss, delta, delta2, margin)
    improving, state = still_improving(x, y, sigma)
    diverged = _diverged_from(order, loss)
    if diverged is not None:
        state = f"diverged at step {diverged}"
    usable = [i for i, step in enumerate(order) if finite[i] and (saved is None or step in saved)]
    smooth = loss.copy()
    if sigma:
        smooth[finite] = _running_mean(y)
    best = min(usable, key=lambda i: smooth[i], default=None)
    reason = _reason(order, smooth, names, best, state)
    if sigma:
        reason += "; losses are means of three validations"
    if margin:
        reason += f"; noisy by {sigma:.2g}: the edges of Stable and Mild are raised by {margin:.2g}"
    return Diagnosis(
        steps=order,
        losses=[rows[step][0] for step in order],
        flops=[rows[step][1] for step in order],
        regimes=names,
        noise=sigma,
        saturated=not improving,
        diverged_step=diverged,
        recommended_step=None if best is None else order[best],
        alternative_step=next((order[i] for i in usable if names[i] == "mild"), None),
        reason=reason,
    )


def reached(diagnosis: Diagnosis, regime: str) -> bool:
    """Whether a run in training has reached `regime` for good: sft.py --until stable|mild|severe.

    One bad validation may be a spike, so several in a row are asked for; of mild and severe their
    mean has to lie above Stable by twice its standard error. A diverged run has reached all."""
    if regime not in REGIMES[1:]:
        raise UserError(f"until = {regime!r}: use one of {', '.join(REGIMES[1:])}")
    loss = _infinite_if_bad(diagnosis.losses)
    if diagnosis.diverged_step is not None:
        return True
    if regime == "stable":
        patience = PATIENCE_NOISY if diagnosis.noise else PATIENCE
        return diagnosis.saturated and len(loss) - 1 - int(np.argmin(loss)) >= patience
    beyond = [name in REGIMES[REGIMES.index(regime) :] for name in diagnosis.regimes]
    tail = beyond[::-1].index(False) if False in beyond else len(loss)
    settled = loss[[name == "stable" for name in diagnosis.regimes]]
    if tail < PATIENCE or not len(settled):
        return False
    excess = loss[-tail:].mean() - (1 + DELTA) * np.median(settled)
    return bool(excess > 2 * diagnosis.noise * math.sqrt(1 / tail + 1 / len(settled)))


def noise_of(x, loss) -> float:
    """Standard deviation of one validation, nats; 0 where the curve shows no noise.

    x, loss (N,) finite, sorted by x; used from 1.5 L_min on. A gap is a point's distance from the
    line between its neighbours, in units of the noise. The curve has to turn 3 times (a valley:
    once) and gaps to change sign 4 times and at half of the points (noise: at 3 in 4)."""
    start = int(np.argmax(loss <= 1.5 * loss.min(initial=np.inf))) if len(loss) else 0
    x = x[start:]
    loss = loss[start:]
    if len(loss) < 7:  # 4 changes of sign need 5 distances
        return 0.0
    w = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])  # where a point lies between its neighbours
    gap = (loss[1:-1] - (1 - w) * loss[:-2] - w * loss[2:]) / np.sqrt(1 + w**2 + (1 - w) ** 2)
    if _sign_changes(np.diff(loss)) < 3 or _sign_changes(gap) < max(4, (len(gap) - 1) / 2):
        return 0.0
    return float(1.4826 * np.median(np.abs(gap)))  # of a Gaussian, sigma; the median skips spikes


def _running_mean(loss) -> np.ndarray:
    """(N,) means of each loss and its two neighbours; an end stands in for the one it lacks."""
    padded = np.concatenate([loss[:1], loss, loss[-1:]])
    return (padded[:-2] + padded[1:-1] + padded[2:]) / 3


def _sign_changes(values) -> int:
    return int((values[1:] * values[:-1] < 0).sum())


def still_improving(x, loss, sigma: float) -> tuple[bool, str]:
    """Whether the loss still falls at the end, and why: x, loss (N,) finite, sorted by x.

    It does when the lowest point is the last, or when the last is within noise of the lowest and
    the second half of the curve falls by more than its noise."""
    if len(loss) < 2:
        return True, "fewer than two finite validations: nothing to compare"
    if np.argmin(loss) == len(loss) - 1:
        return True, "still improving: the last validation is the lowest"
    if sigma == 0 or loss[-1] - loss.min() > 2 * sigma:
        return False, "saturated so far: the minimum has passed"
    half = max(3, len(loss) // 2)
    t = x[-half:] - x[-half:].mean()
    slope = (t @ loss[-half:]) / (t @ t)
    if slope < -2 * sigma / math.sqrt(t @ t):
        return True, f"still improving: the last {half} fall by more than their noise"
    return False, f"saturated so far: the last {half} are level within their noise"


def _diverged_from(steps, loss):
    """First step of an end that is not finite, or (two points or more) twice the loss before it."""
    before = np.inf
    for i in range(len(loss)):
        end = loss[i:]
        if not np.isfinite(end).any() or (len(end) > 1 and end.min() > 2 * before):
            return steps[i]
        before = loss[i]
    return None


def _reason(steps, loss, names, best, state) -> str:
    """One sentence for a log line: the checkpoint, why this one, and what the curve did."""
    low = int(np.argmin(loss))
    if best is None:
        finite = np.isfinite(loss[low])
        lost = "no validated step is saved" if finite else "no validation loss is finite"
        return f"no checkpoint to recommend: {lost} ({state})"
    text = (
        f"minimum validation loss {loss[best]:.4g} at step {steps[best]} ({names[best]}); {state}"
    )
    if best != low:
        text += f"; the lowest, {loss[low]:.4g} at step {steps[low]}, is not saved"
    return text


def _infinite_if_bad(losses) -> np.ndarray:
    """(N,) floats, with +inf for None, NaN and both infinities."""
    loss = np.array([np.nan if loss is None else loss for loss in losses], float)
    return np.where(np.isfinite(loss), loss, np.inf)


# ---------------------------------------------------------------------------------------- reading
def read_run(run_dir, group: int = GROUP) -> Curve:
    """The validations of a run directory, its saved steps, its validation set and its readiness."""
    rows = tables.read_metrics(run_dir, "val", ("step", "val_loss"), "sft.py")
    evaluations = tables.read_metrics(run_dir, "eval")
    saved = []
    for path in Path(run_dir, "checkpoints").glob("step_*"):
        match = re.fullmatch(r"step_(\d+)", path.name)
        if match and path.is_dir():
            saved.append(int(match[1]))
    config = Path(run_dir) / "run.json"
    known = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return Curve(
        steps=[row["step"] for row in rows],
        losses=[row["val_loss"] for row in rows],
        flops=[row.get("flops") for row in rows],
        saved=sorted(saved),
        val_set=known.get("val_set"),
        readiness={row["step"]: readiness_of(row, group) for row in evaluations},
    )


def recommendations(found: Diagnosis, curve: Curve) -> dict[str, int | None]:
    """The checkpoint that each rule would start RL from: {"loss", "signal", "accuracy": step}."""
    sampled = [step for step in found.steps if step in curve.readiness]
    usable = [step for step in sampled if curve.saved is None or step in curve.saved]
    chosen = {"loss": found.recommended_step}
    for rule in ("signal", "accuracy"):
        known = {step: getattr(curve.readiness[step], rule) for step in usable}
        rates = {step: estimate.value for step, estimate in known.items() if estimate}
        chosen[rule] = max(rates, key=rates.get, default=None)
    return chosen


def read_csv(path) -> Curve:
    """Any trainer's curve. Without a column step the rank of a row by compute stands for it."""
    rows = tables.read_table(path, ("val_loss",), " and step or flops")

    def column(name):
        return [tables.read_number(f"{path}: column {name}", row[name]) for row in rows]

    losses = column("val_loss")
    flops = column("flops") if "flops" in rows[0] else None
    if "step" in rows[0]:
        steps = column("step")
    elif flops is not None:
        steps = [sorted(set(flops)).index(compute) + 1 for compute in flops]
    else:
        raise UserError(f"{path}: no column step or flops (found: {', '.join(rows[0])})")
    if not np.isfinite(steps + (flops or [])).all():
        raise UserError(f"{path}: an empty or infinite step or flops; only val_loss may be missing")
    whole = [int(step) if step == int(step) else step for step in steps]
    return Curve(whole, losses, flops or [None] * len(rows))


# -------------------------------------------------------------------------------- comparing runs
def compare(runs, ceilings=None, delta: float = DELTA, delta2: float = DELTA2) -> dict:
    """SFT runs ranked by minimum validation loss, and its correlation with the known ceilings.

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
        row = {"run": run, "min_val_loss": float(_infinite_if_bad(found.losses).min())}
        row |= {"step": found.recommended_step, "saturated": found.saturated}
        rows.append(row | {"a_post": (ceilings or {}).get(run)})
    rows.sort(key=lambda row: row["min_val_loss"])
    known = [row for row in rows if row["a_post"] is not None]
    loss = np.array([row["min_val_loss"] for row in known])
    ceiling = np.array([row["a_post"] for row in known], float)
    return {
        "val_set": next(iter(sets.values())),
        "runs": rows,
        "n_ceilings": len(known),
        "pearson": correlation(loss, ceiling),
        "spearman": correlation(ranks(loss), ranks(ceiling)),
    }


def read_ceilings(words, runs) -> dict:
    """--ceilings: one number per run in the same order, or a CSV file with columns run, a_post."""
    if len(words) == 1 and words[0].endswith(".csv"):
        rows = tables.read_table(words[0], ("run", "a_post"))
        runs = [row["run"] for row in rows]
        words = [row["a_post"] for row in rows]
    if len(words) != len(runs):
        raise UserError(f"--ceilings: {len(words)} numbers for {len(runs)} runs; one per run")
    return {str(run): tables.read_number("--ceilings", word) for run, word in zip(runs, words)}


# ----------------------------------------------------------------------------------- command line
def _report(found: Diagnosis, curve: Curve, chosen: dict, group: int) -> str:
    """The text table: one row per validation, then the recommendation."""
    head = f"{'step':>10} {'FLOPs':>10} {'val loss':>9}  regime  "
    if curve.readiness:
        head += Readiness.head(group)
    lines = [head.rstrip()]
    for step, loss, flops, name in zip(found.steps, found.losses, found.flops, found.regimes):
        compute = "-" if flops is None else f"{flops:.3e}"
        line = f"{step:>10} {compute:>10} {loss:9.4f}  {name:8}"
        if curve.readiness:
            line += curve.readiness[step].text() if step in curve.readiness else ""
        mark = " <- start RL here" if step == found.recommended_step else ""
        lines.append(line.rstrip() + mark)
    lines.append(found.reason)
    if found.alternative_step is not None:
        lines.append(f"alternative: step {found.alternative_step}, first saved checkpoint in Mild")
    if curve.readiness:
        shown = ", ".join(f"by {rule} {step or '-'}" for rule, step in chosen.items())
        lines.append(f"RL would start {shown} (--recommend)")
    return "\n".join(lines)


def _comparison(result: dict) -> str:
    lines = [
        f"validation set {result['val_set']}",
        f"{'rank':>4} {'min val loss':>12} {'step':>8} {'A_post':>7}  run",
    ]
    for rank, row in enumerate(result["runs"], 1):
        ceiling = "-" if row["a_post"] is None else f"{row['a_post']:.1f}"
        late = "" if row["saturated"] else "  (still improving)"
        loss = f"{rank:>4} {row['min_val_loss']:12.4f} {row['step'] or '-':>8}"
        lines.append(f"{loss} {ceiling:>7}  {row['run']}{late}")
    if result["pearson"] is not None:
        lines.append(
            f"with {result['n_ceilings']} ceilings: Pearson {result['pearson']:+.2f}, "
            f"Spearman {result['spearman']:+.2f}"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = flags.add_argument
    add("run", nargs="?", help="run directory of sft.py (default runs/sft)")
    add("--csv", help="a curve instead: columns val_loss and step or flops")
    add("--compare", nargs="+", metavar="RUN", help="rank SFT runs on one validation set")
    add("--ceilings", nargs="+", metavar="A_POST", help="--compare: points per run, or FILE.csv")
    add("--delta", type=float, default=DELTA, help="upper edge of Stable over L_min (0.02)")
    add("--delta2", type=float, default=DELTA2, help="upper edge of Mild over L_min (0.1)")
    add("--recommend", choices=("loss", "signal", "accuracy"), default="loss", help="start RL by")
    add("--group", type=int, default=GROUP, help="samples per problem in RL, for the signal (8)")
    add("--json", action="store_true", help="print JSON instead of a table")
    return flags


def run(args) -> str:
    """What the command line asks for, as text or JSON."""
    if bool(args.run) + bool(args.csv) + bool(args.compare) > 1:
        raise UserError("give one of RUN, --csv FILE and --compare RUN RUN ...")
    if args.ceilings and not args.compare:
        raise UserError("--ceilings goes with --compare RUN RUN ...")
    if not 0 <= args.delta < args.delta2:
        raise UserError(f"--delta {args.delta} --delta2 {args.delta2}: needs 0 <= delta < delta2")
    if args.compare:
        ceilings = read_ceilings(args.ceilings, args.compare) if args.ceilings else None
        result = compare(args.compare, ceilings, args.delta, args.delta2)
        return json.dumps(result) if args.json else _comparison(result)
    curve = read_csv(args.csv) if args.csv else read_run(args.run or "runs/sft", args.group)
    found = diagnose(curve.steps, curve.losses, curve.flops, curve.saved, args.delta, args.delta2)
    chosen = recommendations(found, curve)
    if args.recommend != "loss":
        step = chosen[args.recommend]
        if step is None:
            raise UserError(f"--recommend {args.recommend}: no saved validation has measured it")
        reason = f"highest {args.recommend} at step {step}; by loss: {found.reason}"
        found = replace(found, recommended_step=step, reason=reason)
    if not args.json:
        return _report(found, curve, chosen, args.group)
    rows = {step: ready.as_json() for step, ready in curve.readiness.items()}
    return json.dumps(found.as_json() | {"recommended_by": chosen, "readiness": rows})


def main(argv=None) -> int:
    try:
        print(run(parser().parse_args(argv)))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
