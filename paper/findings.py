"""What a finished study says of the paper's claims: effects with intervals, and verdicts by rule.

The rules, fixed on 2026-11-23 before any result of the study was seen:
 1) A claim holds if its whole 90% interval lies above 0, does not hold if all of it lies below 1
    point (0.5 for a correlation), and else cannot be told. 1 point, as the smallest advantage that
    the paper builds on is 1.2 (78.1 - 76.9).
 2) An effect is a difference of two arms, paired over problems; its interval comes from 2,000
    bootstrap draws of the problems.
 3) Three seeds bootstrap badly, so their standard deviation is pooled over SFT alone and RL from
    Stable at the three scales, and added to every arm as Student's t. Without seeds: 2.0 points.
 4) Every arm counts with its checkpoint that is best on dev, and is measured on other problems.
    "The best mixed method" is chosen on dev as well, so the choice cannot flatter it.
 5) A ceiling is a posterior (ceiling.py), whose draws enter the effect; one that is not identified
    has wide draws. A run that collapsed or has too few points is left out and counted.
 6) Added once the first arms were seen to solve none of the harder problems: where neither arm
    reaches 1 point, neither can lie 1 point above the other, so the claim cannot be told.
Performance in points (0..100), compute in FLOPs from the start of the stage. P problems."""

from __future__ import annotations

import json
import math
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

import ceiling
import phases
from core import files
from core.errors import UserError
from core.tables import read_metrics

SETS = ("small", "easy", "middle", "hard", "large")
STARTS = ("adaptive", "stable", "late")
MIXED = ("luffy", "upt", "srft", "prefix_rft")
MARGIN = 1.0  # rule 1, points
MARGIN_R = 0.5  # rule 1, of a correlation
SEED_SD = 2.0  # rule 3: three seeds of RL in docs/LOG.md ended at 36.5, 32.5, 34.1
DRAWS = 2000


# ---------------------------------------------------------------------------------------- reading
def start_step(run_dir, which: str, most_flops: float = math.inf) -> int:
    """The step meant by stable, adaptive, late (of SFT) or best (on dev, within most_flops)."""
    if which == "best":
        rows = [row for row in read_metrics(run_dir, "eval") if row["flops"] <= most_flops]
        return max(rows, key=lambda row: row["pass1"])["step"]
    curve = phases.read_run(run_dir)
    found = phases.diagnose(curve.steps, curve.losses, curve.flops, curve.saved)
    if which == "stable":
        return found.recommended_step
    if which == "late":
        return found.steps[-1]
    first = found.steps[found.regimes.index("stable")]
    saved = [step for step in found.steps if step and (curve.saved is None or step in curve.saved)]
    return min(saved, key=lambda step: abs(step - first / 2))


class Start(NamedTuple):
    """One RL run after SFT: where it began, and what it came to."""

    name: str
    set: str
    start: str
    seed: int
    step: int
    flops: float  # of SFT up to the start
    regime: str
    fit: ceiling.CeilingFit
    best: float  # the highest evaluation on dev


class Study:
    """Everything that a study's directory holds, read once."""

    def __init__(self, out):
        self.out = Path(out)
        for name in ("study.json", "sets/counts.json"):
            if not (self.out / name).exists():
                raise UserError(
                    f"{self.out}: no {name}; give the --out of a paper.study that has finished"
                )
        self.about = json.loads((self.out / "study.json").read_text())
        self.counts = json.loads((self.out / "sets" / "counts.json").read_text())
        self.sft = {}
        for path in sorted(self.out.glob("sft-*")):
            curve = phases.read_run(path)
            found = phases.diagnose(curve.steps, curve.losses, curve.flops, curve.saved)
            self.sft[path.name] = found
        self.points = {}
        for kind in ("rl", "base", "then"):
            for path in sorted(self.out.glob(f"{kind}-*")):
                self.points[path.name] = ceiling.read_run(path)
        paths = sorted((self.out / "exams").glob("*.jsonl"))
        self.exams = {path.stem: self._exam(path) for path in paths}

    def _exam(self, path) -> dict[str, np.ndarray]:
        """{"test", "ood": (P,) share of right samples per problem, in points}."""
        right = np.array([row["correct"] for row in files.read_jsonl(path)], float)
        n_test = self.counts["test"]
        n_problems = n_test + self.counts["ood"]
        n = self.about["exam_n"]
        if len(right) != n_problems * n:
            raise UserError(
                f"{path}: {len(right)} samples, not {n_problems} problems x {n}; those that are "
                "too long are left out: raise --max-prompt in --exam, or shorten the files"
            )
        rates = 100 * right.reshape(n_problems, n).mean(1)
        return {"test": rates[:n_test], "ood": rates[n_test:]}

    @cached_property
    def fits(self) -> dict[str, ceiling.CeilingFit]:
        return {name: ceiling.fit_points(points) for name, points in self.points.items()}

    @cached_property
    def starts(self) -> list[Start]:
        """The RL runs from SFT checkpoints, by set, start and seed."""
        rows = []
        for name, points in self.points.items():
            if not name.startswith("rl-"):
                continue
            _, set_name, start, seed = name.split("-")
            sft = f"sft-{set_name}-{seed}"
            found = self.sft[sft]
            at = found.steps.index(start_step(self.out / sft, start))
            row = Start(
                name=name,
                set=set_name,
                start=start,
                seed=int(seed),
                step=found.steps[at],
                flops=found.flops[at],
                regime=found.regimes[at],
                fit=self.fits[name],
                best=float(points.performance.max()),
            )
            rows.append(row)
        return sorted(rows, key=lambda r: (SETS.index(r.set), STARTS.index(r.start), r.seed))

    def seeds(self, arm: str) -> list[str]:
        """Names of the final evaluations of an arm, one per seed."""
        return [name for name in self.exams if name.rpartition("-")[0] == arm]

    @cached_property
    def arms(self) -> dict[str, list[str]]:
        """The paradigms at equal compute from the base: {name: final evaluations}."""
        arms = {
            "SFT": self.seeds("pure-middle"),
            "SFT-then-RL": self.seeds("rl-middle-stable"),
            "RL": self.seeds("base-dapo"),
        }
        arms |= {algo: self.seeds(f"base-{algo}") for algo in MIXED}
        return {name: names for name, names in arms.items() if names}

    @cached_property
    def seed_noise(self) -> tuple[float, int]:
        """Standard deviation between seeds in points, degrees of freedom or 0 (assumed): rule 3."""
        squares = 0.0
        df = 0
        for arm in ("pure-middle", *(f"rl-{scale}-stable" for scale in SETS)):
            means = [self.exams[name]["test"].mean() for name in self.seeds(arm)]
            if len(means) > 1:
                squares += np.var(means) * len(means)
                df += len(means) - 1
        return (math.sqrt(squares / df), df) if df else (SEED_SD, 0)

    def rates(self, names, part: str = "test") -> np.ndarray:
        """(P,) share of right samples per problem in points, mean over the seeds of an arm."""
        return np.mean([self.exams[name][part] for name in names], 0)

    def level(self, names) -> tuple[float, float, float]:
        """Mean of an arm on the test problems and its 90% interval, over problems and seeds."""
        rates = self.rates(names)
        rng = np.random.default_rng(0)
        draws = bootstrap(rates, rng) + seed_draws(self, [(names, [])], rng)
        return float(rates.mean()), *interval(draws)

    def draws(self, name: str, gain: bool = False) -> np.ndarray | None:
        """DRAWS draws of a run's A_post, or of its plasticity; None without a posterior.

        Each run's are in an order of its own, as the fits share a seed."""
        post = self.fits[name].posterior
        if post is None:
            return None
        rng = np.random.default_rng(list(name.encode()))
        return rng.choice(ceiling.ceiling_draws(post) - (post.p_sft if gain else 0), DRAWS)

    def plasticity(self, name: str) -> np.ndarray | None:
        return self.draws(name, gain=True)


# ------------------------------------------------------------------------------------ the verdict
class Finding(NamedTuple):
    """A claim of the paper, put to the test. effect, low, high in points, or a correlation."""

    claim: str
    test: str
    effect: float
    low: float
    high: float
    margin: float = MARGIN
    known: bool = True  # False: nothing could be measured (rules 5 and 6)

    @property
    def verdict(self) -> str:
        if self.known and self.low > 0:
            return "holds"
        if self.known and self.high < self.margin:
            return "does not hold"
        return "cannot tell"


def bootstrap(values, rng) -> np.ndarray:
    """(DRAWS,) means of values (P,) drawn with replacement."""
    return values[rng.integers(len(values), size=(DRAWS, len(values)))].mean(1)


def seed_draws(study: Study, pairs, rng) -> np.ndarray:
    """(DRAWS,) draws of what other seeds would change in the mean over pairs of (arm, arm)."""
    sd, df = study.seed_noise
    unit = rng.standard_t(df, DRAWS) if df else rng.normal(size=DRAWS)
    arms = [arm for pair in pairs for arm in pair if arm]
    return sd * math.sqrt(sum(1 / len(arm) for arm in arms)) / len(pairs) * unit


def interval(draws) -> tuple[float, float]:
    low, high = np.quantile(draws, (0.05, 0.95))
    return float(low), float(high)


def by_exam(study: Study, claim: str, test: str, pairs, part: str = "test") -> Finding | None:
    """Mean difference of the final evaluations over pairs of arms; None where one is missing."""
    pairs = [(a, b) for a, b in pairs if a and b]
    if not pairs or not len(study.exams[pairs[0][0][0]][part]):
        return None
    rng = np.random.default_rng(0)
    gap = np.mean([study.rates(a, part) - study.rates(b, part) for a, b in pairs], 0)  # (P,)
    draws = bootstrap(gap, rng) + seed_draws(study, pairs, rng)
    arms = [arm for pair in pairs for arm in pair]
    floor = max(study.rates(arm, part).mean() for arm in arms) < MARGIN
    if floor:
        test += f" (all arms below {MARGIN:g} point)"
    return Finding(claim, test, float(gap.mean()), *interval(draws), known=not floor)


def by_draws(study: Study, claim: str, test: str, pairs, value) -> Finding | None:
    """Mean difference of a posterior quantity over pairs of arms; value(run) -> draws or None."""
    pairs = [(a, b) for a, b in pairs if a and b]
    if not pairs:
        return None
    lost = 0
    known = []
    for pair in pairs:
        fitted = tuple([name for name in arm if value(name) is not None] for arm in pair)
        lost += sum(map(len, pair)) - sum(map(len, fitted))
        if all(fitted):
            known.append(fitted)
    if lost:
        test += f" ({lost} runs without a fit left out)"
    if not known:
        return Finding(claim, test, math.nan, math.nan, math.nan, known=False)

    def mean(arm):
        return np.mean([value(name) for name in arm], 0)

    gap = np.mean([mean(a) - mean(b) for a, b in known], 0)
    draws = gap + seed_draws(study, known, np.random.default_rng(1))
    return Finding(claim, test, float(np.mean(gap)), *interval(draws))


# ------------------------------------------------------------------------------------- the claims
def all_of(study: Study) -> list[Finding]:
    """Every claim that the study can speak to, in the paper's order."""
    found = paradigms(study) + starting_points(study) + data_sets(study)
    found.append(loss_and_ceiling(study)[1])
    found.append(mixed_after_sft(study))
    return [finding for finding in found if finding]


def best_mixed(study: Study, arms: dict[str, list[str]]) -> str | None:
    """The mixed method whose runs come highest on dev: rule 4."""

    def on_dev(method):
        return np.mean([study.points[run].performance.max() for run in arms[method]])

    return max((method for method in MIXED if arms.get(method)), key=on_dev, default=None)


def paradigms(study: Study) -> list[Finding | None]:
    """SFT-then-RL against every other way to spend the same compute."""
    arms = study.arms
    mixed = best_mixed(study, arms)
    rivals = {"SFT alone": "SFT", "RL alone": "RL", f"the best mixed method ({mixed})": mixed}
    found = []
    for part, where in (("test", ""), ("ood", ", out of distribution")):
        for rival, arm in rivals.items():
            claim = f"SFT-then-RL ends above {rival}{where}"
            pair = (arms.get("SFT-then-RL"), arms.get(arm))
            found.append(by_exam(study, claim, "equal compute from the base", [pair], part))
    return found


def starting_points(study: Study) -> list[Finding | None]:
    """Where along SFT to start RL. Adaptive and late have one seed: Stable's first is compared."""
    arms = {(s, start): study.seeds(f"rl-{s}-{start}") for s in SETS for start in STARTS}
    ends = {s.set: s.regime for s in study.starts if s.start == "late"}
    still = ", ".join(name for name, regime in ends.items() if regime == "stable")
    found = []
    for start, other in (("adaptive", "from Adaptive"), ("late", "from the end of SFT")):
        note = f" (the end of {still} is Stable still)" if still and start == "late" else ""
        pairs = [(arms[s, "stable"][:1], arms[s, start]) for s in SETS]
        claim = f"RL from Stable has a higher ceiling than {other}"
        test = f"A_post, mean over the sets{note}"
        found.append(by_draws(study, claim, test, pairs, study.draws))
        claim = f"RL from Stable ends higher than {other}"
        test = f"equal RL compute, mean over the sets{note}"
        found.append(by_exam(study, claim, test, pairs))
    turned = [(arms[s, "adaptive"], arms[s, "late"]) for s in SETS]
    claim = "Plasticity shrinks as SFT goes on"
    test = "PL_rl, Adaptive minus late, mean over the sets"
    found.append(by_draws(study, claim, test, turned, study.plasticity))
    return found


def data_sets(study: Study) -> list[Finding | None]:
    """What more and what harder trajectories change."""
    found = []
    scales = (("middle", "small"), ("large", "middle"))
    difficulties = (("hard", "middle"), ("middle", "easy"))
    for more, less in scales + difficulties:
        claim = "More data raise" if (more, less) in scales else "Harder data raise"
        pair = [(study.seeds(f"rl-{more}-stable"), study.seeds(f"rl-{less}-stable"))]
        ceilings = f"{claim} the ceiling: {more} over {less}"
        found.append(by_draws(study, ceilings, "A_post from Stable", pair, study.draws))
        ends = f"{claim} the end: {more} over {less}"
        test = "equal RL compute from Stable"
        found.append(by_exam(study, ends, test, pair))
        if (more, less) in scales:
            found.append(by_exam(study, f"{ends}, out of distribution", test, pair, "ood"))
    return found


def loss_and_ceiling(study: Study) -> tuple[dict, Finding]:
    """({set: (minimum validation loss, ceiling, low, high)}, the finding on their correlation).

    The sign is turned: the effect is minus Pearson's r."""
    rows = {}
    columns = []
    for name in SETS:
        stable = [s for s in study.starts if (s.set, s.start) == (name, "stable")]
        runs = [s for s in stable if study.draws(s.name) is not None]
        if not runs:
            continue
        losses = [min(study.sft[f"sft-{name}-{run.seed}"].losses) for run in runs]
        names = [run.name for run in runs]
        draws = np.mean([study.draws(run) for run in names], 0)
        rng = np.random.default_rng([2, len(rows)])
        draws = draws + seed_draws(study, [(names, [])], rng)
        rows[name] = (float(np.mean(losses)), float(np.median(draws)), *interval(draws))
        columns.append(draws)
    claim = "The lower the minimum validation loss, the higher the ceiling"
    test = f"minus Pearson's r over {len(rows)} sets, RL from Stable"
    if len(rows) < 3:
        test += " (too few with a fit)"
        return rows, Finding(claim, test, math.nan, math.nan, math.nan, MARGIN_R, known=False)
    losses = [row[0] for row in rows.values()]
    r = np.array([-np.corrcoef(losses, ceilings)[0, 1] for ceilings in np.array(columns).T])
    return rows, Finding(claim, test, float(np.median(r)), *interval(r), MARGIN_R)


def mixed_after_sft(study: Study) -> Finding | None:
    """Plain RL against the best mixed method, both from Stable."""
    arms = {method: study.seeds(f"then-{method}") for method in MIXED}
    best = best_mixed(study, arms)
    if not best:
        return None
    claim = f"After SFT, plain RL ends above the best mixed method ({best})"
    pair = (study.seeds("rl-middle-stable")[:1], arms[best])
    return by_exam(study, claim, "equal compute from Stable", [pair])
