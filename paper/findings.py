"""What a finished study says of the paper's claims: effects with intervals, and a verdict by rules fixed beforehand.

The rules, fixed on 2026-11-23 before any result of the study was seen:
 1) holds: the whole 90% interval lies above 0. does not hold: all of it lies below 1 point (0.5 for a correlation).
    cannot tell: anything else. 1 point because the smallest advantage that the paper builds on is 1.2 (78.1 - 76.9).
 2) An effect is a difference of two arms, paired over problems. For the problems, its interval comes from 2,000
    bootstrap draws of them.
 3) Seeds: three of them bootstrap badly, so their standard deviation is pooled over SFT alone and RL from Stable at the
    three scales, and added to every arm, those with one seed too, as Student's t. With none: 2.0 points (docs/LOG.md).
    Runs from the base vary less, so their intervals are rather too wide.
 4) Every arm counts with its checkpoint that is best on dev, and is measured on other problems. "The best mixed
    method" is chosen on dev as well, so the choice cannot flatter it.
 5) A ceiling is a posterior (ceiling.py), and its draws enter the effect; one that is not identified has wide draws,
    which leads to "cannot tell" by itself. A collapsed run or one with too few points has none, and is left out and
    counted.
 6) Added once the first arms were seen to solve none of the harder problems: where neither arm reaches 1 point, neither
    can lie 1 point above the other: cannot tell, whatever the seeds' noise says.
Performance in points (0..100), compute in FLOPs from the start of the stage. P problems. Needs numpy."""

from __future__ import annotations

import json
import math
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

import ceiling
import phases
from core.errors import UserError

SETS = ("small", "easy", "middle", "hard", "large")
STARTS = ("adaptive", "stable", "late")
MIXED = ("luffy", "upt", "srft", "prefix_rft")
MARGIN, MARGIN_R = 1.0, 0.5  # rule 1
SEED_SD = 2.0  # rule 3: three seeds of RL in docs/LOG.md ended at 36.5, 32.5, 34.1
DRAWS = 2000


# -------------------------------------------------------------------------------------------------------------- reading
def read_run(run_dir, kind: str) -> list[dict]:
    """The lines of one kind (train, val, eval) of a run's metrics.jsonl."""
    rows = map(json.loads, (Path(run_dir) / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == kind]


def start_step(run_dir, which: str, most_flops: float = math.inf) -> int:
    """The step of a run that is meant by stable, adaptive, late (an SFT run) or best (on dev, within most_flops)."""
    if which == "best":
        rows = [row for row in read_run(run_dir, "eval") if row["flops"] <= most_flops]
        return max(rows, key=lambda row: row["pass1"])["step"]
    curve = phases.read_run(run_dir)
    found = phases.diagnose(curve.steps, curve.losses, curve.flops, curve.saved)
    if which == "stable":
        return found.recommended_step
    if which == "late":
        return found.steps[-1]
    first = next(step for step, regime in zip(found.steps, found.regimes) if regime == "stable")
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
                    f"{self.out}: no {name}; give the --out of a study.py that has finished"
                )
        self.about = json.loads((self.out / "study.json").read_text())
        self.counts = json.loads((self.out / "sets" / "counts.json").read_text())
        self.sft = {
            f.name: phases.diagnose(*phases.read_run(f)[:4]) for f in sorted(self.out.glob("sft-*"))
        }
        runs = [f for kind in ("rl", "base", "then") for f in sorted(self.out.glob(f"{kind}-*"))]
        self.points = {f.name: ceiling.read_run(f) for f in runs}
        self.exams = {f.stem: self._exam(f) for f in sorted((self.out / "exams").glob("*.jsonl"))}

    def _exam(self, path) -> dict[str, np.ndarray]:
        """{"test", "ood": (P,) share of right samples a problem, in points}."""
        right = np.array(
            [json.loads(line)["correct"] for line in path.read_text().splitlines()], float
        )
        n_test, n_ood, n = self.counts["test"], self.counts["ood"], self.about["exam_n"]
        if len(right) != (n_test + n_ood) * n:
            raise UserError(
                f"{path}: {len(right)} samples, not {n_test + n_ood} problems x {n}; those that are too "
                "long are left out: raise --max-prompt in --exam, or shorten the files, and start anew"
            )
        rates = 100 * right.reshape(n_test + n_ood, n).mean(1)
        return {"test": rates[:n_test], "ood": rates[n_test:]}

    @cached_property
    def fits(self) -> dict[str, ceiling.CeilingFit]:
        return {name: ceiling.fit_points(points) for name, points in self.points.items()}

    @cached_property
    def starts(self) -> list[Start]:
        """The RL runs from SFT checkpoints, by set, start and seed."""
        rows = []
        for name in (n for n in self.points if n.startswith("rl-")):
            _, which, start, seed = name.split("-")
            found = self.sft[f"sft-{which}-{seed}"]
            at = found.steps.index(start_step(self.out / f"sft-{which}-{seed}", start))
            rows.append(
                Start(
                    name,
                    which,
                    start,
                    int(seed),
                    found.steps[at],
                    found.flops[at],
                    found.regimes[at],
                    self.fits[name],
                    float(self.points[name].performance.max()),
                )
            )
        return sorted(rows, key=lambda r: (SETS.index(r.set), STARTS.index(r.start), r.seed))

    def seeds(self, pattern: str) -> list[str]:
        """Names of the final evaluations of an arm, one a seed."""
        return [name for name in self.exams if name.rpartition("-")[0] == pattern]

    @cached_property
    def arms(self) -> dict[str, list[str]]:
        """The paradigms at equal compute from the base: {name: final evaluations}."""
        arms = {
            "SFT": self.seeds("pure-middle"),
            "SFT-then-RL": self.seeds("rl-middle-stable"),
            "RL": self.seeds("base-dapo"),
            **{algo: self.seeds(f"base-{algo}") for algo in MIXED},
        }
        return {name: names for name, names in arms.items() if names}

    @cached_property
    def seed_noise(self) -> tuple[float, int]:
        """(standard deviation between seeds in points, degrees of freedom or 0 = assumed): rule 3."""
        arms = [
            self.seeds(name) for name in ("pure-middle", *(f"rl-{scale}-stable" for scale in SETS))
        ]
        means = [[self.exams[name]["test"].mean() for name in arm] for arm in arms if len(arm) > 1]
        df = sum(len(arm) - 1 for arm in means)
        return (
            (math.sqrt(sum(np.var(arm) * len(arm) for arm in means) / df), df)
            if df
            else (SEED_SD, 0)
        )

    def rates(self, names, part: str = "test") -> np.ndarray:
        """(P,) share of right samples of each problem in points, mean over the seeds of an arm."""
        return np.mean([self.exams[name][part] for name in names], 0)

    def level(self, names) -> tuple[float, float, float]:
        """Mean of an arm on the test problems and its 90% interval, over problems and seeds."""
        rates, rng = self.rates(names), np.random.default_rng(0)
        draws = rates[rng.integers(len(rates), size=(DRAWS, len(rates)))].mean(1) + noise(
            self, [(names, [])], rng
        )
        return float(rates.mean()), *interval(draws)

    def draws(self, name: str, gain: bool = False) -> np.ndarray | None:
        """DRAWS draws of a run's A_post, or of its plasticity alone, in an order of its own (fits share a seed); None
        without a posterior."""
        post = self.fits[name].posterior
        if post is None:
            return None
        rng = np.random.default_rng(list(name.encode()))
        return rng.choice(post.eps + post.gain + (0 if gain else post.p_sft), DRAWS)


# ------------------------------------------------------------------------------------------------------------- findings
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
        if not self.known:
            return "cannot tell"
        return (
            "holds"
            if self.low > 0
            else "does not hold"
            if self.high < self.margin
            else "cannot tell"
        )


def noise(study: Study, pairs, rng) -> np.ndarray:
    """(DRAWS,) draws of what other seeds would change in the mean over pairs of (arm, arm), each a list of runs."""
    sd, df = study.seed_noise
    unit = rng.standard_t(df, DRAWS) if df else rng.normal(size=DRAWS)
    return (
        sd
        * math.sqrt(sum(1 / len(arm) for pair in pairs for arm in pair if arm))
        / len(pairs)
        * unit
    )


def interval(draws) -> tuple[float, float]:
    return tuple(float(v) for v in np.quantile(draws, (0.05, 0.95)))


def by_exam(study: Study, claim: str, test: str, pairs, part: str = "test") -> Finding | None:
    """Mean difference of the final evaluations over pairs of (arm, arm); None where runs or problems are missing."""
    pairs = [(a, b) for a, b in pairs if a and b]
    if not pairs or not len(study.exams[pairs[0][0][0]][part]):
        return None
    rng = np.random.default_rng(0)
    gap = np.mean(
        [study.rates(a, part) - study.rates(b, part) for a, b in pairs], 0
    )  # (P,) paired over problems
    draws = gap[rng.integers(len(gap), size=(DRAWS, len(gap)))].mean(1) + noise(study, pairs, rng)
    floor = max(study.rates(arm, part).mean() for pair in pairs for arm in pair) < MARGIN
    test += f" (all arms below {MARGIN:g} point)" if floor else ""
    return Finding(claim, test, float(gap.mean()), *interval(draws), known=not floor)


def by_draws(study: Study, claim: str, test: str, pairs, value) -> Finding | None:
    """Mean difference of a posterior quantity over pairs of (runs, runs); value(run) -> draws or None."""
    pairs = [(a, b) for a, b in pairs if a and b]
    lost = sum(value(name) is None for pair in pairs for arm in pair for name in arm)
    test += f" ({lost} runs without a fit left out)" if lost else ""
    fitted = [
        tuple([name for name in arm if value(name) is not None] for arm in pair) for pair in pairs
    ]
    known = [pair for pair in fitted if all(pair)]
    if not known:
        return Finding(claim, test, math.nan, math.nan, math.nan, known=False) if pairs else None
    gap = np.mean(
        [np.mean([value(n) for n in a], 0) - np.mean([value(n) for n in b], 0) for a, b in known], 0
    )
    draws = gap + noise(study, known, np.random.default_rng(1))
    return Finding(claim, test, float(np.mean(gap)), *interval(draws))


def loss_and_ceiling(study: Study) -> tuple[dict, Finding]:
    """({set: (minimum validation loss, ceiling, low, high)}, the finding on their correlation, its sign turned)."""
    rows, columns = {}, []
    stable = [s for s in study.starts if s.start == "stable" and study.draws(s.name) is not None]
    for name in SETS:
        runs = [s.name for s in stable if s.set == name]
        if runs:
            losses = [min(study.sft[f"sft-{name}-{run.rpartition('-')[2]}"].losses) for run in runs]
            draws = np.mean([study.draws(run) for run in runs], 0)
            draws = draws + noise(study, [(runs, [])], np.random.default_rng([2, len(rows)]))
            rows[name] = (float(np.mean(losses)), float(np.median(draws)), *interval(draws))
            columns.append(draws)
    claim = "The lower the minimum validation loss, the higher the ceiling"
    test = f"minus Pearson's r over {len(rows)} sets, RL from Stable"
    if len(rows) < 3:
        return rows, Finding(
            claim, f"{test} (too few with a fit)", *3 * [math.nan], MARGIN_R, known=False
        )
    losses = np.array([row[0] for row in rows.values()])
    r = np.array([-np.corrcoef(losses, at)[0, 1] for at in np.array(columns).T])  # (DRAWS,)
    return rows, Finding(claim, test, float(np.median(r)), *interval(r), MARGIN_R)


def all_of(study: Study) -> list[Finding]:
    """Every claim that the study can speak to, in the paper's order."""
    arms, seeds, of = study.arms, study.seeds, lambda name, start: study.seeds(f"rl-{name}-{start}")
    on_dev = lambda runs: np.mean([study.points[run].performance.max() for run in runs])
    mixed = max((m for m in MIXED if m in arms), key=lambda m: on_dev(arms[m]), default=None)
    then = max(
        (m for m in MIXED if seeds(f"then-{m}")),
        key=lambda m: on_dev(seeds(f"then-{m}")),
        default=None,
    )
    ceil, found = study.draws, []

    def plasticity(name):
        return ceil(name, gain=True)

    rivals = {"SFT alone": "SFT", "RL alone": "RL", f"the best mixed method ({mixed})": mixed}
    for part, where in (("test", ""), ("ood", ", out of distribution")):
        for rival, arm in rivals.items():
            found.append(
                by_exam(
                    study,
                    f"SFT-then-RL ends above {rival}{where}",
                    "equal compute from the base",
                    [(arms.get("SFT-then-RL"), arms.get(arm))],
                    part,
                )
            )
    first = [(of(name, "stable")[:1], of(name, "adaptive")) for name in SETS]
    late = [(of(name, "stable")[:1], of(name, "late")) for name in SETS]
    ends = {s.set: s.regime for s in study.starts if s.start == "late"}
    still = ", ".join(name for name, regime in ends.items() if regime == "stable")
    at_end = f" (the end of {still} is Stable still)" if still else ""
    turned = [(of(name, "adaptive"), of(name, "late")) for name in SETS]
    for other, pairs, note in (("from Adaptive", first, ""), ("from the end of SFT", late, at_end)):
        found.append(
            by_draws(
                study,
                f"RL from Stable has a higher ceiling than {other}",
                f"A_post, mean over the sets{note}",
                pairs,
                ceil,
            )
        )
        found.append(
            by_exam(
                study,
                f"RL from Stable ends higher than {other}",
                f"equal RL compute, mean over the sets{note}",
                pairs,
            )
        )
    found.append(
        by_draws(
            study,
            "Plasticity shrinks as SFT goes on",
            "PL_rl, Adaptive minus late, mean over the sets",
            turned,
            plasticity,
        )
    )
    for more, less in (
        ("middle", "small"),
        ("large", "middle"),
        ("hard", "middle"),
        ("middle", "easy"),
    ):
        scale = more == "large" or less == "small"
        claim = "More data raise" if scale else "Harder data raise"
        pair = [(of(more, "stable"), of(less, "stable"))]
        found.append(
            by_draws(
                study, f"{claim} the ceiling: {more} over {less}", "A_post from Stable", pair, ceil
            )
        )
        found.append(
            by_exam(
                study, f"{claim} the end: {more} over {less}", "equal RL compute from Stable", pair
            )
        )
        if scale:
            found.append(
                by_exam(
                    study,
                    f"{claim} the end: {more} over {less}, out of distribution",
                    "equal RL compute from Stable",
                    pair,
                    "ood",
                )
            )
    found.append(loss_and_ceiling(study)[1])
    if then:
        found.append(
            by_exam(
                study,
                f"After SFT, plain RL ends above the best mixed method ({then})",
                "equal compute from Stable",
                [(of("middle", "stable")[:1], seeds(f"then-{then}"))],
            )
        )
    return [finding for finding in found if finding]
