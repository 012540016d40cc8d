"""The ceiling of an RL run and how sure that is, from its (compute, performance) points. Needs numpy only.

Eq. (2)-(4) of arXiv 2512.11470, with P in points (0..100) and x the FLOPs since the start of RL:
    P(x) = base + (A_post - base) / (1 + (x / C_mid)^-B),   base = P_sft + eps,   plasticity PL_rl = A_post - P_sft
The default estimator is a posterior on a grid, summed up by 1,500 draws. Choices against the paper's least squares:
 1) For each cell (B, C_mid) of a log grid, P_sft, eps and the gain enter linearly: a closed form (variable projection).
    The grid zooms to the mass. Draws that break eps >= 0, gain >= 0 or A_post <= 100 are dropped.
 2) P_sft is one noisy evaluation like the others, not a constant, so its noise is in every interval.
 3) Noise: at least binomial, point by point, where n (responses) is known; else its level is learned. Real runs also
    wander slowly around any sigmoid (over 0.3 of the run): learned too, at even prior odds. It widens the intervals
    and pulls a forecast towards the last level.
 4) Weak priors: log B ~ N(0.2, 0.6^2); log(C_mid / last x) ~ -1 + 0.5 t_3 (runs are mostly trained to two thirds of
    their gain); gain ~ N(0, 20^2) points; eps ~ |N(0, 0.3^2)|.
 5) Outliers of the least-squares curve (modified z above 3.5) are dropped first, as in the paper's Appendix F.
 6) Not identified: the 90% interval of A_post is wider than the gain, or C_mid may lie beyond the data. The values
    are then null; the ends of the intervals stay, since they say what is excluded.
 7) A run that falls for good is a collapse, one that falls and recovers repeatedly an oscillation: as in the paper the
    ceiling is then the best performance before the last fall. No interval, no forecast.
--paper fits as Table 4 does: bounded least squares, MAD rejection, C-steps (LTS); a fit at its bound: not identified.

    python ceiling.py runs/rl [runs/rl2 ...] [--json]           metrics.jsonl, lines of kind eval: flops, pass1, n
    python ceiling.py --csv points.csv --fit-fraction 0.71      columns run, flops, performance[, p_sft, n, fit]
Shapes: N points, H noise settings, K grid cells, M draws, X compute values to predict at. Intervals are 90%."""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core.errors import UserError

B_RANGE, C_RANGE = (0.3, 10.0), (0.005, 20.0)  # grid of B, and of C_mid over the last x
WANDER = 0.3  # correlation length of the slow deviations, over the last x
TOP = 100.0  # the metric's maximum, points
N_DRAWS = 1500  # an end of a 90% interval to about 3% of its width
FEWEST = 5  # points, P_sft among them: there are five unknowns


class Posterior(NamedTuple):
    """M draws of eq. (2), and the points behind them to carry the last deviation on. Performance in points."""

    p_sft: np.ndarray  # (M,)
    eps: np.ndarray  # (M,)
    gain: np.ndarray  # (M,) A_post - base
    b: np.ndarray  # (M,)
    c: np.ndarray  # (M,) C_mid, FLOPs
    sigma: np.ndarray  # (M,) noise of one evaluation
    tau: np.ndarray  # (M,) size of the slow deviation, 0 for none
    x: np.ndarray  # (N,) fitted points
    y: np.ndarray  # (N,)
    relative: np.ndarray  # (N,) noise variance of a point over the mean one's


@dataclass
class CeilingFit:
    """What ceiling.py says of one run, under the documented JSON names, in points and FLOPs. None: not identified (then
    the ends of the interval stay), not known without P_sft, or not asked for."""

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
    n_fit: int = 0  # points fitted, outliers left out
    rmse: float | None = None  # of the fitted points around the fitted curve
    share: float | None = None  # of A_post - P_sft, reached by the curve at the last point
    share_low: float | None = None
    share_high: float | None = None
    reached: float | None = None  # the curve at the last point: its noise is averaged out
    forecast: list = field(default_factory=list)
    posterior: Posterior | None = None

    def as_json(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "posterior"}

    def text(self, name: str, form: str) -> str:
        """A value and its interval for a table: "78.6 [76.3, 81.3]"."""
        value, low = getattr(self, name), getattr(self, f"{name}_low")
        ends = "" if low is None else f" [{low:{form}}, {getattr(self, f'{name}_high'):{form}}]"
        return ("not identified" if value is None else format(value, form)) + ends


def fit(
    flops, performance, p_sft=None, n=None, forecast_at=(), paper: dict | None = None
) -> CeilingFit:
    """Ceiling, plasticity and their intervals from the evaluations of one RL run.

    | name        | shape    | unit   | meaning                                                                    |
    | flops       | (N,)     | FLOPs  | since the start of RL, any order; a point at 0 is the SFT checkpoint       |
    | performance | (N,)     | points | 0..100, not shares; NaN points are left out                                |
    | p_sft       | number   | points | needed where no point is at 0; without both, plasticity and share are null |
    | n           | (N,), () |        | responses behind each point, for their binomial noise                      |
    | forecast_at | (X,)     | FLOPs  | where to forecast besides 2x and 10x the compute so far                    |
    | paper       | dict     |        | settings of least_squares_fit, {} for its defaults: no posterior           |"""
    at = [float(v) for v in forecast_at]
    x, y, n, p_sft = _points(
        flops, performance, p_sft, n, held_back=paper is not None and 0.0 in at
    )
    at += [k * float(x.max(initial=0)) for k in (2, 10)]
    result = CeilingFit(p_sft=p_sft, n_fit=len(x))
    mean = low = high = [None] * len(at)
    if len(x) < FEWEST or x.max() <= 0:
        result.status = "too few points"
    elif (fall := falls(y))[0] != "ok":
        result.status, result.a_post = fall[0], float(y[: fall[1]].max())
        result.plasticity = None if p_sft is None else result.a_post - p_sft
    elif paper is not None:
        mean = _summarize_paper(result, x, y, at, paper)
    else:
        keep = np.ones(len(x), bool)
        if len(x) >= 8:  # fewer points cannot outvote an outlier
            keep = least_squares_fit(x, y - y[0], tau=3.5, free_epsilon=True).keep | (x == 0)
        post = sample(x[keep], y[keep], None if n is None else n[keep])
        _summarize(result, post)
        mean, low, high = (v.tolist() for v in predict(post, at))
    result.forecast = [
        dict(zip(("flops", "mean", "low", "high"), row)) for row in zip(at, mean, low, high)
    ]
    return result


def _points(flops, performance, p_sft, n, held_back: bool):
    """Finite points by compute, (0, p_sft) first where no point is at 0 (unless held back), and P_sft as observed."""
    x, y = np.asarray(flops, float), np.asarray(performance, float)
    if x.shape != y.shape or x.ndim != 1:
        raise UserError(f"flops {x.shape} and performance {y.shape}: give two lists of one length")
    if (x < 0).any() or not np.isfinite(x).all():
        raise UserError("flops: needs finite numbers from 0 on, counted from the start of RL")
    n = None if n is None else np.broadcast_to(np.asarray(n, float), x.shape)
    if n is not None and not (n > 0).all():
        raise UserError("n: needs the number of responses behind each point, above 0")
    order = np.argsort(x, kind="stable")
    order = order[np.isfinite(y[order])]
    x, y, n = x[order], y[order], None if n is None else n[order]
    if p_sft is None or not math.isfinite(p_sft):
        p_sft = float(y[x == 0].mean()) if (x == 0).any() else None
    elif not held_back and not (x == 0).any():
        x, y, n = np.r_[0.0, x], np.r_[p_sft, y], None if n is None else np.r_[n[:1], n]
    return x, y, n, None if p_sft is None else float(p_sft)


def falls(y) -> tuple[str, int]:
    """("ok" | "collapse" | "oscillation", index of the last fall or N) of performances y (N,) in order of compute.

    Down: below the best so far by 7 sigma, half the gain and 2 points, whichever is most. Three points down at the end
    are a collapse; two spells or more that the run came back from an oscillation; one bad point is neither."""
    best = np.maximum.accumulate(y)
    down = best - y > np.maximum(max(7 * _noise(y), 2.0), (best - y[0]) / 2)
    starts = np.flatnonzero(down & ~np.r_[False, down[:-1]])
    if len(y) >= 6 and down[-3:].all():
        return "collapse", int(starts[-1])
    return ("oscillation", int(starts[-1])) if len(starts) >= 2 else ("ok", len(y))


def _noise(y) -> float:
    """Standard deviation of one point by second differences, which a smooth curve has none of; 0.5 under 6 points."""
    return (
        0.5
        if len(y) < 6
        else max(1.4826 * float(np.median(np.abs(np.diff(y, 2)))) / math.sqrt(6), 0.05)
    )


def sigmoid(x, b, c) -> np.ndarray:
    """Share of the gain, 1 / (1 + (x / c)^-b), 0 at x = 0: x (X,), b and c (K,) -> (K, X)."""
    x = np.asarray(x, float)
    z = np.asarray(b)[:, None] * np.log(np.maximum(x, 1e-300) / np.asarray(c)[:, None])
    return (x > 0) / (1 + np.exp(-np.clip(z, -700, 700)))


def sample(x, y, n=None, seed: int = 0) -> Posterior:
    """M draws from the posterior of eq. (2) given points x (N,) sorted, y (N,) and their responses n (N,) or None.

    y = p_sft + eps [x > 0] + gain sigmoid(x; B, C) + wander(x) + noise: noise ~ N(0, sigma^2 relative), wander an
    Ornstein-Uhlenbeck process of size tau. H settings of (sigma, tau), K cells of (B, C)."""
    rng = np.random.default_rng(seed)
    binomial = None
    if n is not None:  # variance in points; +1 and +2 keep it above 0 at 0 and 100
        right = (np.clip(y, 0, TOP) * n / TOP + 1) / (n + 2)
        binomial = TOP**2 * right * (1 - right) / n
    relative = np.ones(len(x)) if n is None else binomial / binomial.mean()
    sigma, tau, log_noise = _noise_settings(y, binomial)
    scale, last, level = 1 / np.sqrt(relative), x.max(), y.mean()
    values, vectors = np.linalg.eigh(scale[:, None] * _kernel(x, x, last) * scale)
    rotate = scale[:, None] * vectors  # (N, N) makes noise and wander independent, at every setting
    weight = 1 / (sigma[:, None] ** 2 + tau[:, None] ** 2 * np.maximum(values, 0))  # (H, N)
    target = (
        y - level
    ) @ rotate  # p_sft is then about 0, by a prior of 100 points: as good as flat
    log_noise = log_noise + 0.5 * np.log(weight).sum(1) - 0.5 * weight @ target**2  # (H,)
    box = np.log([B_RANGE, (C_RANGE[0] * last, C_RANGE[1] * last)])
    for _ in range(4):  # 20 x 20 cells, then again on the part that holds the mass
        edges = np.linspace(box[:, 0], box[:, 1], 21)
        half = (edges[1] - edges[0]) / 2
        log_b, log_c = (
            g.ravel() for g in np.meshgrid(*(edges[:-1] + half).T, indexing="ij")
        )  # (K,)
        design = (
            np.stack(np.broadcast_arrays(1.0, x > 0, sigmoid(x, np.exp(log_b), np.exp(log_c))))
            @ rotate
        )
        mean, covariance, log_fit = _linear_posterior(weight, design, target)
        z = (log_c - np.log(last) + 1) / 0.5
        log_post = (
            log_fit + log_noise[:, None] - 0.5 * ((log_b - 0.2) / 0.6) ** 2 - 2 * np.log1p(z**2 / 3)
        )
        mass = np.exp(log_post - log_post.max())  # (H, K)
        near = mass.max(0) > 1e-4
        inner = np.array(
            [[v[near].min() - h, v[near].max() + h] for v, h in zip((log_b, log_c), half)]
        )
        if np.prod(np.ptp(inner, 1)) > 0.3 * np.prod(np.ptp(box, 1)):
            break
        box = inner
    h, k = np.divmod(rng.choice(mass.size, 4 * N_DRAWS, p=mass.ravel() / mass.sum()), len(log_b))
    linear = mean[h, k] + np.einsum(
        "mij,mj->mi", np.linalg.cholesky(covariance[h, k]), rng.normal(size=(len(h), 3))
    )
    linear[:, 0] += level
    allowed = (linear[:, 1:] >= 0).all(1) & (linear.sum(1) <= TOP)
    if (
        allowed.sum() < N_DRAWS // 5
    ):  # the data pull against a bound (a falling run): put draws on it
        linear[:, 1:] = np.maximum(linear[:, 1:], 0)
        linear[:, 2] = np.clip(TOP - linear[:, 0] - linear[:, 1], 0, linear[:, 2])
        allowed[:] = True
    h, k, linear = (v[allowed][:N_DRAWS] for v in (h, k, linear))
    b, c = np.exp(
        np.stack([log_b[k], log_c[k]]) + half[:, None] * rng.uniform(-1, 1, (2, len(k)))
    )  # within cells
    return Posterior(*linear.T, b, c, sigma[h], tau[h], x, y, relative)


def _noise_settings(y, binomial):
    """The H settings (sigma, tau) in points and their log prior; known binomial noise is the least sigma can be."""
    centre = _noise(y) if binomial is None else math.sqrt(binomial.mean())
    factors = np.array([0.5, 0.7, 1.0, 1.4, 2.0] if binomial is None else [1.0, 1.2, 1.5, 2.0, 3.0])
    sizes = np.array([0.0, 0.5, 1.0, 2.0])
    odds = np.exp(-0.5 * sizes**2) * (sizes > 0)
    odds = odds / odds.sum() + (sizes == 0)  # even odds: no wander against all sizes of it
    factor, size = (g.ravel() for g in np.meshgrid(factors, sizes, indexing="ij"))
    return (
        centre * factor,
        size,
        np.tile(np.log(odds), len(factors)) - 0.5 * (np.log(factor) / 0.5) ** 2,
    )


def _kernel(a, b, last) -> np.ndarray:
    """Correlation of the slow deviation at compute a (A,) and b (B,) -> (A, B); none at 0, which is before RL."""
    return np.exp(-np.abs(a[:, None] - b) / (WANDER * last)) * (a[:, None] > 0) * (b > 0)


def _linear_posterior(weight, design, target):
    """Closed-form posterior of (p_sft, eps, gain): weight (H, N), design (3, K, N), target (N,) in the rotated frame ->
    mean (H, K, 3), covariance (H, K, 3, 3), log marginal likelihood (H, K) up to what no cell changes."""
    pairs = np.einsum("ikn,jkn->nkij", design, design).reshape(len(target), -1)
    prior = np.diag([1 / 100.0**2, 1 / 0.3**2, 1 / 20.0**2])
    precision = (weight @ pairs).reshape(len(weight), -1, 3, 3) + prior
    moment = ((weight * target) @ design.transpose(0, 2, 1)).transpose(1, 2, 0)
    covariance = np.linalg.inv(precision)
    mean = np.einsum("hkij,hkj->hki", covariance, moment)
    return mean, covariance, 0.5 * (moment * mean).sum(-1) - 0.5 * np.linalg.slogdet(precision)[1]


def curve(post: Posterior, x) -> np.ndarray:
    """Eq. (2) for each draw: x (X,) FLOPs -> (M, X) points."""
    x = np.asarray(x, float)
    return (
        post.p_sft[:, None]
        + post.eps[:, None] * (x > 0)
        + post.gain[:, None] * sigmoid(x, post.b, post.c)
    )


def predict(post: Posterior, x, seed: int = 0):
    """Forecast of an evaluation at x (X,) FLOPs: mean, low, high (X,) points; its own noise is in the interval."""
    x, last = np.asarray(x, float), post.x.max()
    value, variance = curve(post, x), np.repeat(post.sigma[:, None] ** 2, len(x), 1)
    residual = post.y - curve(post, post.x)  # (M, N)
    near, far = _kernel(post.x, post.x, last), _kernel(x, post.x, last)
    for sigma, tau in sorted({(s, t) for s, t in zip(post.sigma, post.tau) if t > 0}):
        at = (post.sigma == sigma) & (post.tau == tau)
        gain = np.linalg.solve(
            sigma**2 * np.diag(post.relative) + tau**2 * near, tau**2 * far.T
        )  # (N, X)
        value[at] += (
            residual[at] @ gain
        )  # the last deviation carried on, fading over WANDER of the run
        variance[at] += np.maximum(tau**2 * ((x > 0) - (far.T * gain).sum(0)), 0)
    draw = value + np.sqrt(variance) * np.random.default_rng(seed).normal(size=value.shape)
    low, high = np.quantile(np.clip(draw, 0, TOP), (0.05, 0.95), axis=0)
    return np.clip(value.mean(0), 0, TOP), low, high


def _summarize(result: CeilingFit, post: Posterior) -> None:
    """Medians and 90% intervals of the draws into result, and whether the data determine them."""
    plasticity, trend = post.eps + post.gain, curve(post, [post.x.max()])[:, 0]
    a_post, share = post.p_sft + plasticity, (trend - post.p_sft) / np.maximum(plasticity, 1e-9)
    width = np.subtract(*np.quantile(a_post, (0.95, 0.05)))
    result.identified = bool(
        width <= np.median(plasticity) and np.quantile(post.c, 0.95) <= post.x.max()
    )
    known = {"a_post": a_post, "c_mid": post.c, "b": post.b}
    if result.p_sft is not None:
        known |= {"plasticity": plasticity, "share": share, "epsilon": post.eps}
    for name, draws in known.items():
        low, median, high = map(float, np.quantile(draws, (0.05, 0.5, 0.95)))
        setattr(result, name, median if result.identified else None)
        if name not in ("b", "epsilon"):
            setattr(result, f"{name}_low", low), setattr(result, f"{name}_high", high)
    result.posterior, result.n_fit, result.reached = post, len(post.x), float(np.median(trend))
    result.rmse = float(np.sqrt(np.mean((post.y - curve(post, post.x).mean(0)) ** 2)))


class LeastSquares(NamedTuple):
    """A bounded least-squares fit of the gain y - P_sft."""

    b: float
    c: float
    top: float  # U = PL_rl, points
    eps: float
    keep: np.ndarray  # (N,) points that were fitted
    at_bound: bool  # U is the bound's, not the data's

    def __call__(self, x) -> np.ndarray:
        return self.eps + (self.top - self.eps) * sigmoid(x, [self.b], [self.c])[0]


def least_squares_fit(
    x, y, tau: float = 2.5, lts_alpha: float | None = None, free_epsilon=False
) -> LeastSquares:
    """Appendix F as Table 4 has it: U <= 1.5 x the largest fitted gain and B <= 20, MAD rejection, C-steps.

    x (N,) FLOPs, y (N,) gains in points; tau: modified z above which a point is dropped; lts_alpha: share of the points
    that C-steps keep, None = no C-steps."""
    keep = good = np.ones(len(x), bool)
    while good.sum() >= FEWEST:
        found, keep = _bounded(x, y, good, free_epsilon), good
        residual = y - found(x) - np.median((y - found(x))[keep])
        good = keep & (
            0.6745 * np.abs(residual) <= tau * max(np.median(np.abs(residual[keep])), 1e-9)
        )
        if (good == keep).all():
            break
    clean = np.flatnonzero(keep)
    for _ in range(50 if lts_alpha else 0):  # refit on the best ones until they stay the same
        kept = np.zeros(len(x), bool)
        kept[
            clean[
                np.argsort(np.abs(y - found(x))[clean], kind="stable")[
                    : int(lts_alpha * len(clean))
                ]
            ]
        ] = True
        if (kept == found.keep).all():
            break
        found = _bounded(x, y, kept, free_epsilon)
    return found


def _bounded(x, y, keep, free_epsilon: bool) -> LeastSquares:
    """Least squares of eps + (U - eps) s(x) on a zooming (log B, log C) grid; U, eps in closed form, then bounded."""
    x, y = x[keep], y[keep]
    bound = 1.5 * max(float(y.max()), 0.0)
    limit = box = np.log([(0.1, 20.0), (1e-3 * x.max(), 10 * x.max())])
    for _ in range(6):  # 40 x 40 cells, then two of them to each side of the best
        axes = np.linspace(box[:, 0], box[:, 1], 40)
        log_b, log_c = (g.ravel() for g in np.meshgrid(*axes.T, indexing="ij"))
        s = sigmoid(x, np.exp(log_b), np.exp(log_c))  # (K, N)
        ss, sy = (s * s).sum(1), s @ y
        top, eps = np.clip(sy / np.maximum(ss, 1e-12), 0, bound), np.zeros(len(s))
        loss = ((y - top[:, None] * s) ** 2).sum(1)
        if free_epsilon:
            r = 1 - s
            rr, rs, ry = (r * r).sum(1), (r * s).sum(1), r @ y
            free = np.clip((sy * rr - ry * rs) / np.maximum(rr * ss - rs**2, 1e-12), 0, bound)
            offset = (ry - rs * free) / np.maximum(
                rr, 1e-12
            )  # best eps for this U: exact at the bound too
            other = ((y - free[:, None] * s - offset[:, None] * r) ** 2).sum(1)
            top, eps, loss = np.where(
                (offset > 0) & (other < loss), [free, offset, other], [top, eps, loss]
            )
        best, step = int(np.argmin(loss)), 2 * (axes[1] - axes[0])
        middle = np.array([log_b[best], log_c[best]])
        box = np.clip(np.stack([middle - step, middle + step], 1), limit[:, :1], limit[:, 1:])
    b, c, top, eps = (float(v[best]) for v in (np.exp(log_b), np.exp(log_c), top, eps))
    return LeastSquares(b, c, top, eps, keep, top >= 0.999 * bound)


def _summarize_paper(result: CeilingFit, x, y, at, settings: dict) -> list:
    """The least-squares fit into result; its forecast at `at` (X,)."""
    if result.p_sft is None:
        raise UserError(
            "--paper fits gains over P_sft: give the column p_sft or a point at flops 0"
        )
    found = least_squares_fit(x, y - result.p_sft, **settings)
    value = result.p_sft + found(np.r_[x, at])
    result.n_fit, result.reached = int(found.keep.sum()), float(value[len(x) - 1])
    result.rmse = float(np.sqrt(np.mean((y - value[: len(x)])[found.keep] ** 2)))
    result.identified = not found.at_bound
    if result.identified:
        result.a_post, result.plasticity, result.c_mid = (
            result.p_sft + found.top,
            found.top,
            found.c,
        )
        result.b, result.epsilon = found.b, found.eps
        result.share = (result.reached - result.p_sft) / max(found.top, 1e-9)
    return value[len(x) :].tolist()


class Points(NamedTuple):
    """One run as read: arrays of one length, None where the file has no such column."""

    run: str
    flops: np.ndarray
    performance: np.ndarray
    p_sft: float | None = None
    n: np.ndarray | None = None
    fit: np.ndarray | None = None  # 1: fit this point, 0: forecast it
    settings: dict = {}  # of least_squares_fit, for --paper


def read_run(run_dir) -> Points:
    """The evaluations of an RL run directory: metrics.jsonl, lines of kind eval with flops, pass1 and n."""
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: not found; give a run directory of rl.py, or --csv FILE")
    lines = path.read_text(
        encoding="utf-8"
    ).splitlines()  # a line without its end is just being written
    rows = [
        row
        for line in lines
        if line.endswith("}") and (row := json.loads(line)).get("kind") == "eval"
    ]
    if not rows or not all({"flops", "pass1"} <= set(row) for row in rows):
        raise UserError(
            f"{path}: no line of kind eval with flops and pass1; train until the first evaluation"
        )
    flops, pass1, n = (
        np.array([row.get(key) or 0 for row in rows], float) for key in ("flops", "pass1", "n")
    )
    return Points(str(run_dir), flops, pass1, n=n if n.all() else None)


def read_csv(path) -> list[Points]:
    """Any trainer's points: columns run, flops, performance and, where known, p_sft, n and fit (1 or 0).

    For --paper a run's first row may set outlier_tau, use_lts, lts_alpha, free_epsilon, as the released scripts do."""
    if not Path(path).is_file():
        raise UserError(
            f"{path}: not found; give a CSV file with columns run, flops, performance[, p_sft, n, fit]"
        )
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"run", "flops", "performance"} <= set(rows[0]):
        found = ", ".join(rows[0]) if rows else "no row"
        raise UserError(f"{path}: needs columns run, flops, performance (found: {found})")
    runs, settings = {}, {}
    for number, row in enumerate(rows, 2):
        try:
            values = [
                float(row.get(key) or "nan")
                for key in ("flops", "performance", "p_sft", "n", "fit")
            ]
            tau, alpha = float(row.get("outlier_tau") or 2.5), float(row.get("lts_alpha") or 0.75)
        except ValueError as error:
            raise UserError(
                f"{path}:{number}: {error}; give numbers, empty where unknown"
            ) from None
        runs.setdefault(row["run"], []).append(values)
        settings.setdefault(
            row["run"],
            {
                "tau": tau,
                "lts_alpha": alpha if row.get("use_lts") == "True" else None,
                "free_epsilon": row.get("free_epsilon") == "True",
            },
        )
    whole = lambda column: None if np.isnan(column).any() else column
    tables = {run: np.array(values).T for run, values in runs.items()}  # (5, N) each
    return [
        Points(
            run,
            t[0],
            t[1],
            None if np.isnan(t[2, 0]) else t[2, 0],
            whole(t[3]),
            whole(t[4]),
            settings[run],
        )
        for run, t in tables.items()
    ]


def fit_points(points: Points, fraction: float = 1.0, paper: bool = False) -> CeilingFit:
    """fit() on the points marked for it, else on the first `fraction`, with a forecast for each of the others."""
    x, y, p_sft = points.flops, points.performance, points.p_sft
    chosen = np.argsort(np.argsort(x, kind="stable")) < int(fraction * len(x) + 0.5)
    if points.fit is not None:
        chosen = points.fit > 0
    if p_sft is None and (x == 0).any():
        p_sft = y[x == 0].mean()
    n = None if points.n is None else points.n[chosen]
    result = fit(
        x[chosen], y[chosen], p_sft, n, np.sort(x[~chosen]), points.settings if paper else None
    )
    result.run = points.run
    return result


def report(result: CeilingFit) -> str:
    """A run as text: reached / ceiling / share, then its parts and how far it may come at ten times the compute."""
    if result.status == "too few points":
        return f"{result.run}: {result.n_fit} evaluations, too few for a ceiling ({FEWEST})"
    if result.status != "ok":
        return f"{result.run}: {result.status}; the best before it is {result.a_post:.1f}"
    far = result.forecast[-1]
    band = "" if far["low"] is None else f" [{far['low']:.1f}, {far['high']:.1f}]"
    return (
        f"{result.run}: reached {result.reached:.1f} / ceiling {result.text('a_post', '.1f')} / share "
        f"{result.text('share', '.0%')}\n    P_sft {'unknown' if result.p_sft is None else f'{result.p_sft:.1f}'}"
        f"   PL_rl {result.text('plasticity', '.1f')}   C_mid {result.text('c_mid', '.3g')} FLOPs"
        f"   at 10x the compute {far['mean']:.1f}{band}   ({result.n_fit} points, rmse {result.rmse:.2f})"
    )


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="*", help="run directories of rl.py (default runs/rl)")
    parser.add_argument(
        "--csv", help="points instead: columns run, flops, performance[, p_sft, n, fit]"
    )
    parser.add_argument(
        "--fit-fraction", type=float, default=1.0, help="fit this first part, forecast the rest"
    )
    parser.add_argument(
        "--paper", action="store_true", help="fit as the paper's Table 4: for comparison"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_args(argv)
    try:
        if args.csv and args.run:
            raise UserError("give run directories or --csv FILE, not both")
        if not 0 < args.fit_fraction <= 1:
            raise UserError(f"--fit-fraction {args.fit_fraction}: needs a number above 0, up to 1")
        runs = (
            read_csv(args.csv) if args.csv else [read_run(run) for run in args.run or ["runs/rl"]]
        )
        results = [fit_points(run, args.fit_fraction, args.paper) for run in runs]
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({"runs": [result.as_json() for result in results]}))
        return 0
    for result in results:
        print(report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
