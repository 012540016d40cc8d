"""Estimates from per-problem counts of right answers, without bias and with standard errors.

A problem with n samples, c of them right, has an unknown rate p. The chance that G further samples
are all right is p^G, estimated without bias by C(c, G) / C(n, G) (Chen et al. 2021, eq. 1, of the
opposite event); no unbiased estimate exists for n < G. Standard errors are over problems.
Shapes: P problems. Units: points, 0..100. numpy only."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from core.errors import UserError

NORMAL_90 = 1.6449  # 90% of a normal distribution lie within so many standard deviations


class Estimate(NamedTuple):
    """A mean over problems and its standard error, in points."""

    value: float
    se: float


def all_right(right, n: int, group: int) -> np.ndarray:
    """(P,) unbiased chance that `group` samples are all right: right (P,) counts out of n."""
    if not 1 <= group <= n:
        raise UserError(f"a group of {group} needs at least as many samples per problem, not {n}")
    chances = np.array([math.comb(c, group) / math.comb(n, group) for c in range(n + 1)])
    return chances[np.asarray(right, int)]


def expected_signal(right, n: int, group: int) -> Estimate:
    """Share of groups of G samples that RL would learn from, 1 - E[p^G + (1 - p)^G].

    A group whose samples are all right or all wrong has advantages of zero."""
    right = np.asarray(right, int)
    return _mean(1 - all_right(right, n, group) - all_right(n - right, n, group))


def pass_at(right, n: int, k: int) -> Estimate:
    """pass@k, 1 - E[(1 - p)^k]."""
    return _mean(1 - all_right(n - np.asarray(right, int), n, k))


def paired_difference(first, second) -> dict:
    """Mean of second - first, shares (P,) of the same problems, with a 90% interval, in points.

    One problem has no interval: None."""
    mean, se = _mean(np.asarray(second) - np.asarray(first))
    if math.isnan(se):
        return {"difference": mean, "low": None, "high": None}
    half = NORMAL_90 * se
    return {"difference": mean, "low": mean - half, "high": mean + half}


def _mean(values) -> Estimate:
    """Mean and standard error of values (P,) in 0..1, as points."""
    se = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(100 * float(values.mean()), 100 * float(se))


class Readiness(NamedTuple):
    """What a checkpoint's own samples say of RL from it. None where a run did not log it."""

    accuracy: Estimate  # pass@1
    signal: Estimate | None  # share of groups of G with right and wrong samples
    pass_at: Estimate | None  # pass@G
    entropy: float | None  # nats per token

    def as_json(self) -> dict:
        """{"entropy", "accuracy", "accuracy_se", "signal", ...}."""
        row = {"entropy": self.entropy}
        for name in ("accuracy", "signal", "pass_at"):
            estimate = getattr(self, name)
            row[name] = None if estimate is None else estimate.value
            row[f"{name}_se"] = None if estimate is None else estimate.se
        return row

    @staticmethod
    def head(group: int) -> str:
        return f" {'pass@1':>12} {f'signal G={group}':>12} {f'pass@{group}':>12} entropy"

    def text(self) -> str:
        """Columns of a table, with standard errors in brackets."""
        cells = []
        for estimate in (self.accuracy, self.signal, self.pass_at):
            cells.append("-" if estimate is None else f"{estimate.value:.1f} ({estimate.se:.1f})")
        entropy = "-" if self.entropy is None else f"{self.entropy:.3f}"
        return "".join(f" {cell:>12}" for cell in cells) + f" {entropy:>7}"


def readiness_of(row: dict, group: int) -> Readiness:
    """Readiness from an eval line: pass1, pass1_se and, where logged, right_counts and entropy.

    right_counts[c] is the number of problems with c right samples; signal and pass@G need at least
    G samples per problem."""
    accuracy = Estimate(row["pass1"], row.get("pass1_se", math.nan))
    counts = row.get("right_counts") or []
    n = len(counts) - 1
    if n < group:
        return Readiness(accuracy, None, None, row.get("entropy"))
    right = np.repeat(np.arange(n + 1), counts)  # (P,)
    signal = expected_signal(right, n, group)
    return Readiness(accuracy, signal, pass_at(right, n, group), row.get("entropy"))


def correlation(a, b) -> float | None:
    """Pearson's r of two (N,) arrays; None for fewer than two points or where one has no spread."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0 or not np.isfinite([a, b]).all():
        return None
    return float(np.corrcoef(a, b)[0, 1])


def ranks(values) -> np.ndarray:
    """(N,) ranks for Spearman; ties share their mean rank."""
    return np.array([(values < v).sum() + (values == v).sum() / 2 for v in values])
