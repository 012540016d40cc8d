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
    entropy_se: float | None = None

    def as_json(self) -> dict:
        """{"entropy", "entropy_se", "accuracy", "accuracy_se", "signal", ...}."""
        row = {"entropy": self.entropy, "entropy_se": self.entropy_se}
        for name in ("accuracy", "signal", "pass_at"):
            estimate = getattr(self, name)
            row[name] = None if estimate is None else estimate.value
            row[f"{name}_se"] = None if estimate is None else estimate.se
        return row

    @staticmethod
    def head(group: int) -> str:
        names = ("pass@1", f"signal G={group}", f"pass@{group}", "entropy")
        return "".join(f" {name:>13}" for name in names)

    def text(self) -> str:
        """Columns of a table, with standard errors in brackets."""
        cells = []
        for estimate in (self.accuracy, self.signal, self.pass_at):
            cells.append("-" if estimate is None else f"{estimate.value:.1f} ({estimate.se:.1f})")
        cells.append(self._entropy())
        return "".join(f" {cell:>13}" for cell in cells)

    def line(self, group: int) -> str:
        """For a validation's line: the signal of a group of G, pass@G, entropy."""
        signal = f"signal {self.signal.value:.0f}% (se {self.signal.se:.0f})"
        pass_at = f"pass@{group} {self.pass_at.value:.0f} (se {self.pass_at.se:.0f})"
        return f"{signal}  {pass_at}  entropy {self._entropy()}"

    def _entropy(self) -> str:
        if self.entropy is None:
            return "-"
        known = "" if self.entropy_se is None else f" ({self.entropy_se:.3f})"
        return f"{self.entropy:.3f}{known}"


def group_line(right, nats, tokens, n: int) -> dict:
    """Keys of an eval line from n samples per problem: right_counts, signal, pass_at_n, entropy.

    right, nats, tokens (P,): of a problem's samples, how many are right, and the sums of their
    tokens' entropies and of their tokens. entropy: nats per token, a mean over tokens."""
    nats = np.asarray(nats, float)
    tokens = np.asarray(tokens, float)
    signal = expected_signal(right, n, n)
    found = pass_at(right, n, n)
    entropy = nats.sum() / tokens.sum()
    P = len(nats)
    around = nats - entropy * tokens  # (P,) of mean 0: the error of a ratio of sums
    se = math.sqrt(P / max(P - 1, 1) * (around**2).sum()) / tokens.sum()
    return {
        "right_counts": np.bincount(right, minlength=n + 1).tolist(),
        "signal": signal.value,
        "signal_se": signal.se,
        f"pass_at_{n}": found.value,
        f"pass_at_{n}_se": found.se,
        "entropy": float(entropy),
        "entropy_se": se,
    }


def readiness_of(row: dict, group: int) -> Readiness:
    """Readiness from an eval line: pass1, pass1_se and, where logged, right_counts and entropy.

    right_counts[c] is the number of problems with c right samples; signal and pass@G need at least
    G samples per problem."""
    accuracy = Estimate(row["pass1"], row.get("pass1_se", math.nan))
    counts = row.get("right_counts") or []
    n = len(counts) - 1
    entropy = (row.get("entropy"), row.get("entropy_se"))
    if n < group:
        return Readiness(accuracy, None, None, *entropy)
    right = np.repeat(np.arange(n + 1), counts)  # (P,)
    signal = expected_signal(right, n, group)
    return Readiness(accuracy, signal, pass_at(right, n, group), *entropy)


def correlation(a, b) -> float | None:
    """Pearson's r of two (N,) arrays; None for fewer than two points or where one has no spread."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0 or not np.isfinite([a, b]).all():
        return None
    return float(np.corrcoef(a, b)[0, 1])


def ranks(values) -> np.ndarray:
    """(N,) ranks for Spearman; ties share their mean rank."""
    return np.array([(values < v).sum() + (values == v).sum() / 2 for v in values])
