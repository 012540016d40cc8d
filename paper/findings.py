"""What a finished study says of the paper's claims: effects with intervals, and verdicts by rule.

The rules, fixed on 2026-11-26 (the exact tasks' seeds on 2026-11-27) before a result was seen:
 1) The 90% interval of an effect lies above 0: the claim holds. All of it below 0: opposite. All
    of it below 1 point (0.5 for a correlation), but on both sides of 0: no effect of 1 point shown.
    Else it cannot be told. The smallest advantage that the paper builds on is 1.2 (78.1 - 76.9).
 2) An effect is a difference of two arms, paired over problems; its interval comes from bootstrap
    draws of the problems.
 3) Few seeds bootstrap badly: their standard deviation is pooled over all arms with several, and
    added to every arm as Student's t; the exact tasks pool their own. Without seeds: 2.0 points.
 4) Every arm counts with its checkpoint that is best on dev, and is measured on other problems.
    Learning rates and "the best mixed method" are chosen on dev as well.
 5) A ceiling is a posterior (ceiling.py), whose draws enter the effect; one that is not identified
    has wide draws. A run that collapsed or has too few points is left out and counted.
 6) Where neither arm reaches 1 point it cannot be told. Two arms that are the same run differ by 0.
 7) p is one-sided, in the direction of the effect; Holm's correction is over all claims.
 8) A correlation over sets has the sets as its sample: Fisher's z with n - 3.
Performance in points (0..100), compute in FLOPs from the start of the stage. P problems."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from core.estimates import correlation
from paper.results import DRAWS, EXACT, SCALES, START_RULES, Study, is_exact

MARGIN = 1.0  # rule 1, points
MARGIN_R = 0.5  # rule 1, of a correlation
PREDICTORS = ("signal", "pass_at", "accuracy", "entropy", "val_loss")
OUTCOMES = ("gained", "ended")


# ------------------------------------------------------------------------------------ the verdict
class Finding(NamedTuple):
    """A claim put to the test. effect, low, high in points, or a correlation."""

    claim: str
    test: str
    effect: float
    low: float
    high: float
    p: float = 1.0  # one-sided, in the direction of the effect
    margin: float = MARGIN
    known: bool = True  # False: nothing could be measured (rules 5 and 6)
    paper: str = "not in the paper"
    figure: str = ""  # where it is drawn

    @property
    def verdict(self) -> str:
        if not self.known:
            return "cannot tell"
        if self.low > 0:
            return "holds"
        if self.high < 0:
            return "opposite"
        if self.high < self.margin:
            return f"no effect of {self.margin:g} shown"
        return "cannot tell"


def holm(found: list[Finding]) -> list[float]:
    """Each claim's p after Holm's correction over all of them; 1 where nothing was measured."""
    order = sorted(range(len(found)), key=lambda i: found[i].p)
    adjusted = [1.0] * len(found)
    worst = 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(found) - rank) * found[i].p))
        adjusted[i] = worst
    return adjusted


def bootstrap(values, rng) -> np.ndarray:
    """(DRAWS,) means of values (P,) drawn with replacement."""
    counts = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=DRAWS)
    return counts @ values / len(values)


def is_same(study: Study, pair) -> bool:
    """Whether both arms of a pair are the same runs."""
    a, b = pair
    return sorted(map(study.real, a)) == sorted(map(study.real, b))


def seed_draws(study: Study, pairs, rng) -> np.ndarray:
    """(DRAWS,) draws of what other seeds would change in the mean over pairs of (arm, arm)."""
    sd, df = study.seed_noise[is_exact(pairs[0][0][0])]
    unit = rng.standard_t(df, DRAWS) if df else rng.normal(size=DRAWS)
    arms = []
    for pair in pairs:
        if not is_same(study, pair):
            arms += [arm for arm in pair if arm]
    return sd * math.sqrt(sum(1 / len(arm) for arm in arms)) / len(pairs) * unit


def interval(draws) -> tuple[float, float]:
    low, high = np.quantile(draws, (0.05, 0.95))
    return float(low), float(high)


def level(study: Study, names, part: str = "test") -> tuple[float, float, float]:
    """Mean of an arm and its 90% interval, over problems and seeds."""
    rates = study.rates(names, part)
    rng = np.random.default_rng(0)
    draws = bootstrap(rates, rng) + seed_draws(study, [(names, [])], rng)
    return float(rates.mean()), *interval(draws)


def p_of(draws, effect: float) -> float:
    """One-sided p: the share of draws on the other side of 0, never below 1 / (draws + 1)."""
    other = (draws <= 0).sum() if effect > 0 else (draws >= 0).sum()
    return float((1 + other) / (1 + len(draws)))


def unknown(claim: str, test: str, **more) -> Finding:
    return Finding(claim, test, math.nan, math.nan, math.nan, known=False, **more)


def by_exam(study: Study, claim: str, test: str, pairs, part="test", **more) -> Finding | None:
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
        return unknown(claim, f"{test} (all arms below {MARGIN:g} point)", **more)
    effect = float(gap.mean())
    return Finding(claim, test, effect, *interval(draws), p_of(draws, effect), **more)


def by_draws(study: Study, claim: str, test: str, pairs, value, **more) -> Finding | None:
    """Mean difference of a posterior quantity over pairs of arms; value(run) -> draws or None."""
    pairs = [(a, b) for a, b in pairs if a and b]
    if not pairs:
        return None

    def fitted(arm):
        return [name for name in arm if value(name) is not None]

    lost = 0
    known = []
    for a, b in pairs:
        pair = (fitted(a), fitted(b))
        lost += len(a) + len(b) - len(pair[0]) - len(pair[1])
        if all(pair):
            known.append(pair)
    if lost:
        test += f" ({lost} runs without a fit left out)"
    if not known:
        return unknown(claim, test, **more)

    def mean(arm):
        return np.mean([value(name) for name in arm], 0)

    gap = np.mean([mean(a) - mean(b) for a, b in known], 0)
    draws = gap + seed_draws(study, known, np.random.default_rng(1))
    effect = float(np.mean(gap))
    return Finding(claim, test, effect, *interval(draws), p_of(draws, effect), **more)


# ------------------------------------------------------------------------------------- the claims
def all_of(study: Study) -> list[Finding]:
    """Every claim that the study can speak to: the handoff's, and the built-in study's others."""
    found = paradigms(study) + starting_points(study)
    if not study.own:
        found += data_sets(study)
        found.append(loss_and_ceiling(study)[1])
        found += exact_tasks(study)
    return [finding for finding in found if finding]


def paradigms(study: Study) -> list[Finding | None]:
    """SFT-then-RL against every other way to spend the same compute."""
    arms = study.arms
    ours = arms.get("SFT-then-RL")
    rivals = {"SFT alone": ("SFT", "76.9"), "RL alone": ("RL", "74.3")}
    if not study.own:
        mixed = study.mixed.get("base", "none")
        rivals[f"the best mixed method ({mixed})"] = ("mixed", "LUFFY 72.7")
    found = []
    test = "equal compute from the base"
    for part, where, figure in (("test", "", "paradigms"), ("ood", ", unseen kinds", "transfer")):
        for rival, (arm, number) in rivals.items():
            claim = f"SFT-then-RL ends above {rival}{where}"
            more = {"figure": figure}
            if part == "test":
                more["paper"] = f"78.1 over {number}"
            found.append(by_exam(study, claim, test, [(ours, arms.get(arm))], part, **more))
    pair = (study.seeds(f"rl-{study.main}-stable"), study.seeds(f"sft-{study.main}"))
    claim = "RL's gain carries over to unseen kinds"
    test = "after RL minus before"
    found.append(by_exam(study, claim, test, [pair], "ood", figure="transfer"))
    after = arms.get("SFT-then-mixed")
    if after:
        name = study.mixed.get("then", "none")
        claim = f"After SFT, plain RL ends above the best mixed method ({name})"
        test = "equal compute from Stable"
        found.append(by_exam(study, claim, test, [(ours, after)], figure="paradigms"))
    return found


def transfer(study: Study) -> tuple[float, float, float] | None:
    """RL's gain on unseen kinds as a share of that on test, with its interval over problems."""
    after = study.seeds(f"rl-{study.main}-stable")
    before = study.seeds(f"sft-{study.main}")
    if not after or not before or not len(study.exams[after[0]]["ood"]):
        return None
    rng = np.random.default_rng(3)
    gains = {}
    for part in ("test", "ood"):
        gains[part] = study.rates(after, part) - study.rates(before, part)
    if gains["test"].mean() <= 0:
        return None
    draws = bootstrap(gains["ood"], rng) / np.maximum(bootstrap(gains["test"], rng), 1e-9)
    return float(gains["ood"].mean() / gains["test"].mean()), *interval(draws)


def starting_pairs(study: Study, start: str, other: str) -> list[tuple]:
    """[([run], [run])] of two starting points, one pair per set and seed."""
    pairs = []
    for name in study.exams:
        words = name.split("-")
        if words[0] == "rl" and words[2] == start and words[1] not in EXACT:
            rival = f"rl-{words[1]}-{other}-{words[3]}"
            if rival in study.exams:
                pairs.append(([name], [rival]))
    return pairs


def starting_points(study: Study) -> list[Finding | None]:
    """Where along SFT to start RL, at equal total compute."""
    found = []
    words = {"adaptive": "from Adaptive", "late": "from the end of SFT"}
    numbers = {"adaptive": "14B: 79.8 over 78.8", "late": "Stable or Mild is best"}
    total = "equal total compute, mean over sets and seeds"
    more = {"figure": "starts"}
    for other, text in words.items():
        pairs = starting_pairs(study, "stable", other)
        more["paper"] = numbers[other]
        claim = f"RL from Stable has a higher ceiling than {text}"
        found.append(by_draws(study, claim, "A_post", pairs, study.draws, **more))
        claim = f"RL from Stable ends higher than {text}"
        found.append(by_exam(study, claim, total, pairs, **more))
    claim = "Plasticity shrinks as SFT goes on"
    pairs = starting_pairs(study, "adaptive", "late")
    more["paper"] = "Uniform102K: 4.8 to 3.8"
    found.append(by_draws(study, claim, "PL_rl, Adaptive - end", pairs, study.plasticity, **more))
    for rule in START_RULES:
        claim = f"RL started by {rule} ends higher than by loss"
        pairs = starting_pairs(study, rule, "stable")
        found.append(by_exam(study, claim, total, pairs, figure="starts"))
    return found


def data_sets(study: Study) -> list[Finding | None]:
    """What more trajectories, another loss and harder trajectories change."""
    found = []
    papers = {"small": "77.3 to 79.7", "middle": "79.7 to 84.0"}
    for more, less in (("middle", "small"), ("large", "middle")):
        pair = [(study.seeds(f"rl-{more}-stable"), study.seeds(f"rl-{less}-stable"))]
        claim = f"More data raise the ceiling: {more} over {less}"
        about = {"paper": papers[less], "figure": "scale"}
        found.append(by_draws(study, claim, "A_post from Stable", pair, study.draws, **about))
    pair = [(study.seeds("rl-dft-accuracy"), study.seeds("rl-middle-accuracy"))]
    claim = "SFT by DFT's loss ends higher after RL than by NLL"
    found.append(
        by_exam(
            study,
            claim,
            "middle set, equal total compute, each from its highest accuracy",
            pair,
            figure="scale",
        )
    )
    for more, less in (("hard", "uniform"), ("uniform", "easy")):
        pair = [(study.seeds(f"rl-{more}-stable"), study.seeds(f"rl-{less}-stable"))]
        claim = f"Harder verified data end higher: {more} over {less}"
        about = {"paper": "82.9, 79.6, 78.8", "figure": "scale"}
        found.append(by_exam(study, claim, "from Stable", pair, **about))
    return found


def loss_and_ceiling(study: Study) -> tuple[dict, Finding]:
    """({scale: (minimum validation loss, ceiling, low, high)}, the finding on their correlation).

    The sign is turned: the effect is minus Pearson's r."""
    rows = {}
    columns = []
    for name in SCALES:
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
    test = f"minus Pearson's r over {len(rows)} scales"
    more = {"margin": MARGIN_R, "paper": "r = -0.94 over five scales", "figure": "losses"}
    if len(rows) < 4:
        return rows, unknown(claim, f"{test} (too few with a fit)", **more)
    losses = [row[0] for row in rows.values()]
    r = np.array([-np.corrcoef(losses, ceilings)[0, 1] for ceilings in np.array(columns).T])
    z = np.arctanh(np.clip(r, -0.999, 0.999))
    z = z + np.random.default_rng(4).normal(size=len(z)) / math.sqrt(len(rows) - 3)  # rule 8
    effect = float(np.median(r))
    return rows, Finding(claim, test, effect, *interval(np.tanh(z)), p_of(z, effect), **more)


def exact_tasks(study: Study) -> list[Finding | None]:
    """Where one wrong token makes the answer wrong: does overfitting cost accuracy, or RL's end?"""
    found = []
    for name in EXACT:
        claim = f"SFT's accuracy is higher at the minimum of the loss than at the end: {name}"
        pair = (study.seeds(f"sft-{name}"), study.seeds(f"late-{name}"))
        test = "an answer that must be exact"
        found.append(by_exam(study, claim, test, [pair], figure="exact"))
    pairs = []
    for name in EXACT:
        pair = (study.seeds(f"rl-{name}-stable"), study.seeds(f"rl-{name}-late"))
        pairs.append(pair)
    claim = "RL from the minimum of the loss ends higher than from the end: exact answers"
    test = "equal total compute, mean over both tasks"
    found.append(by_exam(study, claim, test, pairs, figure="exact"))
    return found


# -------------------------------------------------------------------------------------- readiness
class Ready(NamedTuple):
    """A starting point of RL: what was known there, and what RL made of it."""

    run: str  # of RL
    sft: str
    set: str
    start: str
    signal: float
    pass_at: float
    accuracy: float
    entropy: float
    val_loss: float
    gained: float  # on dev, at the compute that all these runs have
    ended: float  # on test, after all of its compute
    comparable: bool  # its validation loss is on the main set's validation rows


def readiness(study: Study) -> list[Ready]:
    """Every different starting point whose SFT run sampled groups there."""
    runs = [s for s in study.starts if s.set not in EXACT and study.real(s.name) == s.name]
    if not runs:
        return []
    common = min(study.points[s.name].flops.max() for s in runs)
    main = next((curve.val_set for name, curve in study.curves.items() if "-middle-" in name), None)
    rows = []
    for s in runs:
        sft = f"sft-{s.set}-{s.seed}"
        found = study.curves[sft].readiness.get(s.step)
        if found is None or found.signal is None or s.name not in study.exams:
            continue
        points = study.points[s.name]
        at = float(np.interp(common, points.flops, points.performance))
        row = Ready(
            run=s.name,
            sft=sft,
            set=s.set,
            start=s.start,
            signal=found.signal.value,
            pass_at=found.pass_at.value,
            accuracy=found.accuracy.value,
            entropy=found.entropy,
            val_loss=s.loss,
            gained=at - float(points.performance[0]),
            ended=float(study.exams[s.name]["test"].mean()),
            comparable=study.own or study.curves[sft].val_set == main,
        )
        rows.append(row)
    return rows


class Predictor(NamedTuple):
    """Pearson's r of one quantity at the start with one outcome; its interval is over SFT runs."""

    name: str
    outcome: str
    r: float | None
    low: float
    high: float
    best: float  # share of the draws in which its |r| is the largest


def predictors(rows: list[Ready], outcome: str, names) -> list[Predictor]:
    """Each predictor's correlation with the outcome; drawn with replacement: SFT runs."""
    groups = {}
    for row in rows:
        groups.setdefault(row.sft, []).append(row)
    rng = np.random.default_rng(5)
    keys = list(groups)
    draws = []  # of r for each name
    for _ in range(1000 if len(keys) > 2 else 0):
        drawn = [row for i in rng.integers(len(keys), size=len(keys)) for row in groups[keys[i]]]
        values = [correlate(drawn, name, outcome) for name in names]
        if None not in values:
            draws.append(values)
    table = np.array(draws) if draws else np.full((1, len(names)), math.nan)
    strength = np.abs(np.nan_to_num(table))
    is_best = strength >= strength.max(1, keepdims=True) - 1e-9  # equal ones are best together
    found = []
    for i, name in enumerate(names):
        low, high = interval(table[:, i])
        share = float(is_best[:, i].mean())
        found.append(Predictor(name, outcome, correlate(rows, name, outcome), low, high, share))
    return found


def correlate(rows: list[Ready], name: str, outcome: str) -> float | None:
    first = np.array([getattr(row, name) for row in rows])
    second = np.array([getattr(row, outcome) for row in rows])
    return correlation(first, second)
