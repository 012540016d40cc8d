"""What a study left: its runs, fits and final evaluations, read once.

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

DESIGN = "2026-11-27"
SCALES = ("tiny", "small", "middle", "wide", "large")
EXACT = ("chain", "sort")
STARTS = ("adaptive", "stable", "late", "signal", "accuracy")
START_RULES = ("signal", "accuracy")
SEED_SD = 2.0  # rule 3
DRAWS = 4000


def start_step(run_dir, which: str, most_flops: float = math.inf) -> int:
    """The step meant by one of STARTS (of SFT) or best (on dev, saved, within most_flops)."""
    if which == "best":
        saved = {int(path.name[5:]) for path in Path(run_dir, "checkpoints").glob("step_??????")}
        rows = [row for row in read_metrics(run_dir, "eval") if row["step"] in saved]
        rows = [row for row in rows if row["flops"] <= most_flops] or rows[:1]
        return max(rows, key=lambda row: row["pass1"])["step"]
    curve = phases.read_run(run_dir)
    found = phases.diagnose(curve.steps, curve.losses, curve.flops, curve.saved)
    if which == "stable":
        return found.recommended_step
    if which == "late":
        return found.steps[-1]
    if which in START_RULES:
        step = phases.recommendations(found, curve)[which]
        if step is None:
            raise UserError(f"{run_dir}: no samples to start by {which}; see sft.py --samples")
        return step
    first = found.steps[found.regimes.index("stable")]
    saved = [step for step in found.steps if step and (curve.saved is None or step in curve.saved)]
    return min(saved, key=lambda step: abs(step - first / 2))


def is_exact(name: str) -> bool:
    """Whether a run, an arm or a final evaluation is of a task whose answer must be exact."""
    return bool(set(EXACT) & set(name.split("-")))


class Screen(NamedTuple):
    """A short run at one learning rate."""

    algo: str  # sft, or a method of RL
    lr: float
    score: float  # pass@1 on dev, mean of the last two evaluations


def screens(out: Path, kind: str) -> list[Screen]:
    """The short runs of a kind: sft, base or then."""
    found = []
    for path in sorted(out.glob(f"screen-{kind}-*")):
        config = json.loads((path / "run.json").read_text())["config"]
        rates = [row["pass1"] for row in read_metrics(path, "eval")][-2:]
        found.append(Screen(config.get("algo", "sft"), config["lr"], float(np.mean(rates))))
    return found


def best_screen(out: Path, kind: str, group: str = "mixed") -> Screen:
    """The best of dapo, of sft, or of all other methods (mixed)."""
    rows = screens(out, kind)
    if group != "sft":
        rows = [row for row in rows if (row.algo == "dapo") == (group == "dapo")]
    return max(rows, key=lambda row: row.score)


class Start(NamedTuple):
    """One RL run after SFT: where it began, and what it came to."""

    name: str
    set: str
    start: str
    seed: int
    step: int
    flops: float  # of SFT up to the start
    regime: str
    loss: float  # of validation
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
        if self.about.get("design") != DESIGN:
            raise UserError(
                f"{self.out} is a study of an earlier design, which this code does not read: its "
                "report.md stands as written; python -m paper.study --out NEW makes a new one"
            )
        self.own = bool(self.about["init"])
        self.main = "own" if self.own else "middle"
        self.counts = json.loads((self.out / "sets" / "counts.json").read_text())
        self.curves = {}
        self.sft = {}
        for path in sorted(self.out.glob("sft-*")):
            curve = phases.read_run(path)
            self.curves[path.name] = curve
            found = phases.diagnose(curve.steps, curve.losses, curve.flops, curve.saved)
            self.sft[path.name] = found
        self.points = {}
        for kind in ("rl", "base", "then"):
            for path in sorted(self.out.glob(f"{kind}-*")):
                self.points[path.name] = ceiling.read_run(path)
        paths = sorted((self.out / "exams").glob("*.jsonl"))
        self.exams = {path.stem: self._exam(path) for path in paths}
        missing = [name for name in self.points if name not in self.exams]
        if missing:
            raise UserError(
                f"{self.out}: no final evaluation of {missing[0]}, so the study is not finished; "
                "its command goes on"
            )

    def _exam(self, path) -> dict[str, np.ndarray]:
        """{part: (P,) share of right samples per problem, in points}; ood = all unseen parts."""
        right = np.array([row["correct"] for row in files.read_jsonl(path)], float)
        exact = [name for name in EXACT if name in path.stem.split("-")]
        parts = self.counts[exact[0] if exact else "exam"]
        n_problems = sum(parts.values())
        n = self.about["exam_n"]
        if len(right) != n_problems * n:
            raise UserError(
                f"{path}: {len(right)} samples, not {n_problems} problems x {n}; those that are "
                "too long are left out: raise --max-prompt in --exam, or shorten the files"
            )
        rates = 100 * right.reshape(n_problems, n).mean(1)
        found = {}
        at = 0
        for part, size in parts.items():
            found[part] = rates[at : at + size]
            at += size
        found.setdefault("ood", rates[parts["test"] :])
        return found

    def real(self, name: str) -> str:
        """The run, or the final evaluation, that this one is a link to."""
        exam = self.out / "exams" / f"{name}.jsonl"
        return exam.resolve().stem if exam.exists() else (self.out / name).resolve().name

    @cached_property
    def fits(self) -> dict[str, ceiling.CeilingFit]:
        found = {}
        for name, points in self.points.items():
            real = self.real(name)
            found[name] = found.get(real) or ceiling.fit_points(points)
        return found

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
                loss=found.losses[at],
                fit=self.fits[name],
                best=float(points.performance.max()),
            )
            rows.append(row)
        return sorted(rows, key=lambda r: (r.set, r.seed, r.flops, STARTS.index(r.start)))

    def seeds(self, arm: str) -> list[str]:
        """Names of the final evaluations of an arm, one per seed."""
        return [name for name in self.exams if name.rpartition("-")[0] == arm]

    @cached_property
    def arms(self) -> dict[str, list[str]]:
        """The paradigms at equal compute from the base: {name: final evaluations}."""
        arms = {
            "SFT": self.seeds(f"pure-{self.main}"),
            "SFT-then-RL": self.seeds(f"half-{self.main}"),
            "RL": self.seeds("base-dapo"),
            "mixed": self.seeds("base-mixed"),
            "SFT-then-mixed": self.seeds("then-mixed"),
        }
        return {name: names for name, names in arms.items() if names}

    @cached_property
    def mixed(self) -> dict[str, str]:
        """The mixed method that was best on dev: {"base", "then": its name}."""
        found = {}
        for kind in ("base", "then"):
            if screens(self.out, kind):
                found[kind] = best_screen(self.out, kind).algo
        return found

    @cached_property
    def seed_noise(self) -> dict[bool, tuple[float, int]]:
        """{of the exact tasks: (standard deviation between seeds in points, degrees of freedom or
        0 where it is assumed)}: rule 3."""
        squares = {True: 0.0, False: 0.0}
        df = {True: 0, False: 0}
        for arm in sorted({name.rpartition("-")[0] for name in self.exams}):
            names = {self.real(name) for name in self.seeds(arm)}
            means = [self.exams[name]["test"].mean() for name in names if name in self.exams]
            if len(means) > 1:
                squares[is_exact(arm)] += np.var(means) * len(means)
                df[is_exact(arm)] += len(means) - 1
        return {
            key: (math.sqrt(squares[key] / df[key]), df[key]) if df[key] else (SEED_SD, 0)
            for key in df
        }

    def rates(self, names, part: str = "test") -> np.ndarray:
        """(P,) share of right samples per problem in points, mean over the seeds of an arm."""
        return np.mean([self.exams[name][part] for name in names], 0)

    def draws(self, name: str, gain: bool = False) -> np.ndarray | None:
        """DRAWS draws of a run's A_post, or of its plasticity; None without a posterior.

        Each run's are in an order of its own, as the fits share a seed."""
        post = self.fits[name].posterior
        if post is None:
            return None
        rng = np.random.default_rng(list(self.real(name).encode()))
        return rng.choice(ceiling.ceiling_draws(post) - (post.p_sft if gain else 0), DRAWS)

    def plasticity(self, name: str) -> np.ndarray | None:
        return self.draws(name, gain=True)
