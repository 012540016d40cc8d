"""The ceiling of an RL run and how sure it is, from the run's (compute, performance) points.

Eq. (2)-(4) of arXiv 2512.11470, with P in points (0..100) and x in FLOPs since the start of RL:
    P(x) = base + (A_post - base) / (1 + (x / C_mid)^-B),    base = P_sft + eps
    plasticity PL_rl = A_post - P_sft

    python ceiling.py runs/rl [runs/rl2 ...] [--json]
    python ceiling.py --csv points.csv --fit-fraction 0.71

A run is read from the eval lines of its metrics.jsonl, a CSV file from its columns run, flops,
performance[, p_sft, n, fit].

The default estimator is a posterior on a grid of (B, C_mid), summarised by 1,500 draws. Its choices
against the paper's least squares:
 1) P_sft is one noisy evaluation like the others, so its noise is in every interval.
 2) Evaluations repeat the same problems, so a change is less noisy than a level. The noise of a
    change is learned from the points; that of a level is level_se, and is in no interval.
 3) Runs always drift slowly around any sigmoid; size and length of that drift are learned. The
    interval of the ceiling allows for a drift there, too.
 4) The ceiling is "not identified" where its 90% interval is wider than the gain, or where less
    than 55% of the gain may have been reached. The values are then null; the intervals stay.
 5) The ceiling of a run that collapses or oscillates is its best performance before the last fall.
 6) A second ceiling, beside the first: the entropy law R = b - a exp(H) of arXiv 2505.22617, read
    at entropy H = 0. A line says where the two disagree.
How it was chosen and what it covers: docs/ceiling.md.
--paper fits as the paper's Table 4 does: bounded least squares, outlier rejection, trimming.
The arithmetic of both fits is in core/curvefit.py. Intervals are 90%.
Shapes: N points, M draws of the posterior, X values of compute."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from core import tables
from core.curvefit import (
    TOP,
    UNKNOWNS,
    Posterior,
    curve,
    entropy_law,
    least_squares_fit,
    point_noise,
    predict,
    sample,
)
from core.errors import UserError

LEAST_SHARE = 0.55  # of the gain, surely reached, for a ceiling to be identified


@dataclass
class CeilingFit:
    """The result for one run, in points and FLOPs; the names are those of --json.

    None: not identified (the ends of its interval stay), unknown without P_sft, not asked for."""

    run: str = ""
    p_sft: float | None = None
    a_post: float | None = None
    a_post_low: float | None = None
    a_post_high: float | None = None
    plasticity: float | None = None
    plasticity_low: float | None = None
    plasticity_high: float | None = None
    c_mid: float | None = None
    c_mid_low: float | None = None
    c_mid_high: float | None = None
    b: float | None = None
    epsilon: float | None = None
    identified: bool = False
    status: str = "ok"  # ok | collapse | oscillation | too few points
    n_fit: int = 0  # points fitted, without outliers
    rmse: float | None = None  # of the fitted points around the fitted curve
    share: float | None = None  # of A_post - P_sft, reached by the curve at the last point
    share_low: float | None = None
    share_high: float | None = None
    reached: float | None = None  # the curve at the last point, free of that point's noise
    forecast: list = field(default_factory=list)  # [{flops, mean, low, high}]
    level_se: float | None = None  # of any level here, were it measured on other problems
    entropy_ceiling: float | None = None  # by the entropy law; None where entropy hardly falls
    entropy_ceiling_low: float | None = None
    entropy_ceiling_high: float | None = None
    posterior: Posterior | None = None

    def as_json(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "posterior"}

    def text(self, name: str, form: str) -> str:
        """A value and its interval for a table: "78.6 [76.3, 81.3]"."""
        value = getattr(self, name)
        low = getattr(self, f"{name}_low")
        shown = "not identified" if value is None else format(value, form)
        if low is None:
            return shown
        return f"{shown} [{low:{form}}, {getattr(self, f'{name}_high'):{form}}]"


def fit(flops, performance, p_sft=None, n=None, forecast_at=(), paper=None) -> CeilingFit:
    """Ceiling, plasticity and their intervals from the evaluations of one RL run.

    | flops       | (N,)     | FLOPs since the start of RL, any order; 0 is the SFT checkpoint    |
    | performance | (N,)     | points, 0..100; NaN points are left out                            |
    | p_sft       | number   | points; without it and a point at 0, plasticity and share are null |
    | n           | (N,), () | responses behind each point, for their weights and level_se        |
    | forecast_at | (X,)     | FLOPs at which to forecast, besides 2x and 10x the last x          |
    | paper       | dict     | settings of least_squares_fit ({}: its defaults): no posterior     |
    """
    held_back = paper is not None and 0.0 in forecast_at
    x, y, n, p_sft = _points(flops, performance, p_sft, n, held_back)
    last = float(x.max(initial=0))
    at = [float(v) for v in forecast_at] + [2 * last, 10 * last]
    result = CeilingFit(p_sft=p_sft, n_fit=len(x))
    if n is not None and len(x):
        rate = np.clip(y[-1] / TOP, 1 / n[-1], 1 - 1 / n[-1])
        result.level_se = float(TOP * math.sqrt(rate * (1 - rate) / n[-1]))
    mean = low = high = [None] * len(at)
    status, fall = falls(y)
    if len(x) < UNKNOWNS or last <= 0:
        result.status = "too few points"
    elif status != "ok":
        result.status = status
        result.a_post = float(y[:fall].max())
        result.plasticity = None if p_sft is None else result.a_post - p_sft
    elif paper is not None:
        mean = _summarize_paper(result, x, y, at, paper)
    else:
        keep = np.ones(len(x), bool)
        if len(x) >= 8:  # fewer points cannot outvote an outlier
            keep = least_squares_fit(x, y - y[0], tau=3.5, free_epsilon=True).keep | (x == 0)
        posterior = sample(x[keep], y[keep], None if n is None else n[keep])
        _summarize(result, posterior)
        mean, low, high = (v.tolist() for v in predict(posterior, at))
    names = ("flops", "mean", "low", "high")
    result.forecast = [dict(zip(names, row)) for row in zip(at, mean, low, high)]
    return result


def _points(flops, performance, p_sft, n, held_back: bool):
    """Finite points sorted by compute and P_sft as observed: x (N,), y (N,), n (N,) or None, P_sft.

    A known P_sft becomes a first point at 0 where there is none, unless that point is held back."""
    x = np.asarray(flops, float)
    y = np.asarray(performance, float)
    if x.shape != y.shape or x.ndim != 1:
        raise UserError(f"flops {x.shape} and performance {y.shape}: give two lists of one length")
    if (x < 0).any() or not np.isfinite(x).all():
        raise UserError("flops: needs finite numbers from 0 on, counted from the start of RL")
    n = None if n is None else np.broadcast_to(np.asarray(n, float), x.shape)
    if n is not None and not (n > 0).all():
        raise UserError("n: needs the number of responses behind each point, above 0")
    order = np.argsort(x, kind="stable")
    order = order[np.isfinite(y[order])]
    x = x[order]
    y = y[order]
    n = None if n is None else n[order]
    if p_sft is None or not math.isfinite(p_sft):
        p_sft = float(y[x == 0].mean()) if (x == 0).any() else None
    elif not held_back and not (x == 0).any():
        x = np.r_[0.0, x]
        y = np.r_[p_sft, y]
        n = None if n is None else np.r_[n[:1], n]
    return x, y, n, None if p_sft is None else float(p_sft)


def falls(y) -> tuple[str, int]:
    """("ok" | "collapse" | "oscillation", index of the last fall or N) of performances y (N,).

    A point is down when it lies below the best so far by all of 7 sigma, half of the gain and 2
    points. Three points down at the end are a collapse, two falls or more an oscillation; one bad
    point is neither."""
    if len(y) < UNKNOWNS:
        return "ok", len(y)
    best = np.maximum.accumulate(y)
    down = best - y > np.maximum(max(7 * point_noise(y), 2.0), (best - y[0]) / 2)
    starts = np.flatnonzero(down & ~np.r_[False, down[:-1]])
    if len(y) >= 6 and down[-3:].all():
        return "collapse", int(starts[-1])
    if len(starts) >= 2:
        return "oscillation", int(starts[-1])
    return "ok", len(y)


def ceiling_draws(posterior: Posterior, seed: int = 0) -> np.ndarray:
    """(M,) draws of A_post, the level that evaluations end at: the curve's limit and a drift."""
    drift = posterior.tau * np.random.default_rng(seed).normal(size=len(posterior.tau))
    limit = posterior.p_sft + posterior.eps + posterior.gain
    return np.clip(limit + drift, 0, TOP)


def _summarize(result: CeilingFit, posterior: Posterior) -> None:
    """Write medians and 90% intervals of the draws into result, and whether they are identified."""
    last = posterior.x.max()
    gain = posterior.eps + posterior.gain
    a_post = ceiling_draws(posterior)
    plasticity = a_post - posterior.p_sft
    trend = curve(posterior, [last])[:, 0]
    share = (trend - posterior.p_sft) / np.maximum(gain, 1e-9)
    low, high = np.quantile(a_post, (0.05, 0.95))
    narrow = high - low <= np.median(gain)
    result.identified = bool(narrow and np.quantile(share, 0.05) >= LEAST_SHARE)
    known = {"a_post": a_post, "c_mid": posterior.c, "b": posterior.b}
    if result.p_sft is not None:
        known["plasticity"] = plasticity
        known["share"] = share
        known["epsilon"] = posterior.eps
    for name, draws in known.items():
        low, median, high = (float(v) for v in np.quantile(draws, (0.05, 0.5, 0.95)))
        setattr(result, name, median if result.identified else None)
        if name not in ("b", "epsilon"):
            setattr(result, f"{name}_low", low)
            setattr(result, f"{name}_high", high)
    residual = posterior.y - curve(posterior, posterior.x).mean(0)
    result.posterior = posterior
    result.n_fit = len(posterior.x)
    result.reached = float(np.median(trend))
    result.rmse = float(np.sqrt(np.mean(residual**2)))


def _summarize_paper(result: CeilingFit, x, y, at, settings: dict) -> list:
    """Write the least-squares fit into result; returns its forecast at `at` (X,)."""
    if result.p_sft is None:
        raise UserError("--paper fits gains over P_sft: give column p_sft or a point at flops 0")
    found = least_squares_fit(x, y - result.p_sft, **settings)
    value = result.p_sft + found(np.r_[x, at])
    result.n_fit = int(found.keep.sum())
    result.reached = float(value[len(x) - 1])
    result.rmse = float(np.sqrt(np.mean((y - value[: len(x)])[found.keep] ** 2)))
    result.identified = not found.at_bound
    if result.identified:
        result.a_post = result.p_sft + found.top
        result.plasticity = found.top
        result.c_mid = found.c
        result.b = found.b
        result.epsilon = found.eps
        result.share = (result.reached - result.p_sft) / max(found.top, 1e-9)
    return value[len(x) :].tolist()


# ---- files, command line -------------------------------------------------------------------------
class Points(NamedTuple):
    """One run as read: arrays of one length, None where the file has no such column."""

    run: str
    flops: np.ndarray
    performance: np.ndarray
    p_sft: float | None = None
    n: np.ndarray | None = None
    fit: np.ndarray | None = None  # 1: fit this point, 0: forecast it
    settings: dict = {}  # of least_squares_fit, for --paper
    se: np.ndarray | None = None  # of a level, over problems
    entropy: np.ndarray | None = None  # of the policy, nats per token


def read_run(run_dir) -> Points:
    """The evaluations of an RL run: eval lines of metrics.jsonl, with flops, pass1 and n.

    Entropy comes from its train lines: the one of step s + 1 sampled from the policy of step s."""
    rows = tables.read_metrics(run_dir, "eval", ("flops", "pass1"), "rl.py")

    def column(name):
        return np.array([row.get(name) or 0 for row in rows], float)

    n = column("n")
    se = column("pass1_se")
    train = tables.read_metrics(run_dir, "train")
    known = {row.get("step"): row.get("entropy") for row in train}
    entropy = []
    for row in rows:
        step = row.get("step", 0)
        entropy.append(known.get(step + 1) or known.get(step))
    return Points(
        str(run_dir),
        column("flops"),
        column("pass1"),
        n=n if n.all() else None,
        se=se if se.all() else None,
        entropy=np.array(entropy, float),
    )


def read_csv(path) -> list[Points]:
    """Any trainer's points: columns run, flops, performance and, where known, p_sft, n, fit (1, 0).

    For --paper a run's first row may set outlier_tau, use_lts, lts_alpha and free_epsilon."""
    runs = {}
    rows = tables.read_table(path, ("run", "flops", "performance"), "[, p_sft, n, fit]")
    for number, row in enumerate(rows, 2):
        runs.setdefault(row["run"], []).append((f"{path}:{number}", row))
    return [_points_of(run, members) for run, members in runs.items()]


def _points_of(run: str, rows) -> Points:
    """One run's rows, [(where, row)], as Points."""

    def column(name, default=math.nan):
        return np.array([tables.read_number(at, row.get(name), default) for at, row in rows])

    def whole(name):
        values = column(name)
        return None if np.isnan(values).any() else values

    first = rows[0][1]
    settings = {
        "tau": column("outlier_tau", 2.5)[0],
        "lts_alpha": column("lts_alpha", 0.75)[0] if first.get("use_lts") == "True" else None,
        "free_epsilon": first.get("free_epsilon") == "True",
    }
    p_sft = column("p_sft")[0]
    known = None if np.isnan(p_sft) else p_sft
    performance = column("performance")
    return Points(run, column("flops"), performance, known, whole("n"), whole("fit"), settings)


def fit_points(points: Points, fraction: float = 1.0, paper: bool = False) -> CeilingFit:
    """fit() on the points marked for it, else on the first `fraction`; forecasts for the others."""
    x = points.flops
    y = points.performance
    p_sft = points.p_sft
    chosen = np.argsort(np.argsort(x, kind="stable")) < int(fraction * len(x) + 0.5)
    if points.fit is not None:
        chosen = points.fit > 0
    if p_sft is None and (x == 0).any():
        p_sft = y[x == 0].mean()
    n = None if points.n is None else points.n[chosen]
    settings = points.settings if paper else None
    result = fit(x[chosen], y[chosen], p_sft, n, np.sort(x[~chosen]), settings)
    result.run = points.run
    if points.se is not None and chosen.any():
        result.level_se = float(points.se[chosen][-1])
    if points.entropy is not None and result.status == "ok" and not paper:
        draws = entropy_law(points.entropy[chosen], y[chosen])
        if draws is not None:
            ends = (float(v) for v in np.quantile(draws, (0.05, 0.5, 0.95)))
            low, result.entropy_ceiling, high = ends
            result.entropy_ceiling_low = low
            result.entropy_ceiling_high = high
    return result


def line(result: CeilingFit) -> str:
    """One line for the log of a run: the level reached and what twice the compute may give."""
    if result.status == "too few points":
        return f"{result.n_fit} evaluations, too few for a ceiling ({UNKNOWNS})"
    if result.status != "ok":
        return f"{result.status}; the best before it is {result.a_post:.1f}"
    return (
        f"reached {result.reached:.1f} / at 2x the compute {_forecast(result, -2)}"
        f" / ceiling {result.text('a_post', '.1f')}"
    )


def _forecast(result: CeilingFit, which: int) -> str:
    """A forecast as text, with its interval. which: -2 at twice the compute, -1 at ten times."""
    at = result.forecast[which]
    band = "" if at["low"] is None else f" [{at['low']:.1f}, {at['high']:.1f}]"
    return f"{at['mean']:.1f}{band}"


def report(result: CeilingFit) -> str:
    """A run as text: its line, its parts, a forecast at 10x, and the second ceiling."""
    lines = [f"{result.run}: {line(result)}"]
    if result.reached is None:
        return lines[0]
    p_sft = "unknown" if result.p_sft is None else f"{result.p_sft:.1f}"
    lines.append(
        f"    P_sft {p_sft}   PL_rl {result.text('plasticity', '.1f')}"
        f"   C_mid {result.text('c_mid', '.3g')} FLOPs   share {result.text('share', '.0%')}"
    )
    lines.append(
        f"    at 10x the compute {_forecast(result, -1)}"
        f"   ({result.n_fit} points, rmse {result.rmse:.2f})"
    )
    if result.level_se is not None:
        lines[-1] += f"   on other problems +- {result.level_se:.1f}"
    if result.entropy_ceiling is not None:
        low = result.entropy_ceiling_low
        high = result.entropy_ceiling_high
        lines.append(f"    by the entropy law {result.entropy_ceiling:.1f} [{low:.1f}, {high:.1f}]")
        if low > result.a_post_high or high < result.a_post_low:
            lines[-1] += ": it disagrees with the ceiling of the curve"
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("run", nargs="*", help="run directories of rl.py (default runs/rl)")
    flags.add_argument("--csv", help="columns run, flops, performance[, p_sft, n, fit]")
    flags.add_argument(
        "--fit-fraction", type=float, default=1.0, help="fit this first part, forecast the rest"
    )
    flags.add_argument("--paper", action="store_true", help="fit as the paper's Table 4 does")
    flags.add_argument("--json", action="store_true", help="print JSON instead of text")
    return flags


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    try:
        if args.csv and args.run:
            raise UserError("give run directories or --csv FILE, not both")
        if not 0 < args.fit_fraction <= 1:
            raise UserError(f"--fit-fraction {args.fit_fraction}: needs a number above 0, up to 1")
        if args.csv:
            runs = read_csv(args.csv)
        else:
            runs = [read_run(run) for run in args.run or ["runs/rl"]]
        results = [fit_points(run, args.fit_fraction, args.paper) for run in runs]
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({"runs": [result.as_json() for result in results]}))
    else:
        for result in results:
            print(report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
