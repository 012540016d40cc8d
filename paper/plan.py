"""The plan of a study: every job in order, what it needs, costs, and how its @words are filled in.

    sft-SET-SEED           SFT on a set; dft = `middle` with --loss dft
    rl-SET-START-SEED      dapo from one of its checkpoints: adaptive stable late signal accuracy
    base-METHOD-SEED       RL from the base model: dapo, and `mixed`, the best mixed method
    then-mixed-SEED        the best mixed method from sft-middle's stable checkpoint
    screen-KIND-METHOD-N   short runs at each learning rate; KIND = sft, base or then
    exam-NAME              samples of a run's best checkpoint, in OUT/exams/NAME.jsonl
    exam-half-*, exam-pure-*, exam-late-*   RL's best within half of its compute; SFT alone at the
                           compute of half-*; SFT's last checkpoint
Compute: SFT to its stable checkpoint and rl_flops of RL are one budget, for every starting point:
what SFT takes beyond, RL does without. RL never gets less than a quarter of rl_flops. Arms from the
base have the compute of SFT to Stable and of half of rl_flops."""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from core import tables
from paper import results
from paper.results import EXACT, START_RULES, STARTS

BASE = "base"  # the built-in study's own base model, in OUT
MIXED = ("luffy", "upt", "prefix_rft")
TASK = "--max-new 128"  # the built-in task's longest answer


@dataclass(frozen=True)
class Size:
    """What the built-in study runs."""

    rows: dict  # nested scales: {set: trajectories}
    fixed: int  # trajectories of the expert with a fixed order, for training and validation
    fixed_val: int
    exact: dict  # rows of the exact tasks by part: "" = training
    steps: dict  # {set: (SFT steps, steps between validations)}
    seeds: dict  # {arm: seeds}
    starts: dict  # {set: seeds of all five starting points}
    sft_rates: tuple  # learning rates that are tried
    rl_rates: tuple
    mixed: tuple
    screen_steps: int  # of SFT at each rate
    screen_base: float  # FLOPs of RL at each rate, from the base and after SFT
    screen_then: float
    rl_flops: float
    rl_shares: dict  # of rl_flops, for the sets that get less
    val: int  # validation trajectories at most
    dev: int  # problems
    exam: tuple  # problems of the test set, of each set out of distribution
    samples: int  # problems of which a validation of SFT samples groups
    prompts: int  # of an RL round
    base_steps: int


FULL = Size(
    rows={"tiny": 500, "small": 1000, "middle": 3000, "wide": 5500, "large": 9000},
    fixed=1000,
    fixed_val=400,
    exact={"": 300, "val": 300, "problems": 3000, "dev": 300, "exam": 500},
    steps={
        "tiny": (200, 20),
        "small": (300, 25),
        "middle": (1200, 60),
        "wide": (1600, 100),
        "large": (2000, 125),
        "fixed": (800, 40),
        "dft": (1200, 60),
        "chain": (600, 30),
        "sort": (600, 30),
    },
    seeds={
        "tiny": 1,
        "small": 2,
        "middle": 3,
        "wide": 1,
        "large": 1,
        "fixed": 2,
        "dft": 1,
        "chain": 2,
        "sort": 2,
        "base-dapo": 2,
        "base-mixed": 1,
        "then-mixed": 3,
    },
    starts={"fixed": 2, "middle": 1},
    sft_rates=(1e-3, 2e-3, 4e-3),
    rl_rates=(1e-4, 3e-4, 1e-3),
    mixed=MIXED,
    screen_steps=400,
    screen_base=2e12,
    screen_then=1.2e12,
    rl_flops=8e12,
    rl_shares={"tiny": 0.5, "small": 0.5, "chain": 0.25, "sort": 0.25},
    val=1000,
    dev=400,
    exam=(500, 300),
    samples=64,
    prompts=64,
    base_steps=704,
)
QUICK = Size(
    rows={"tiny": 40, "small": 60, "middle": 90, "wide": 120, "large": 160},
    fixed=40,
    fixed_val=24,
    exact={"": 40, "val": 24, "problems": 100, "dev": 16, "exam": 24},
    steps=dict.fromkeys(FULL.steps, (12, 4)),
    seeds=dict.fromkeys(FULL.seeds, 1),
    starts={"fixed": 1, "middle": 1},
    sft_rates=(1e-3, 4e-3),
    rl_rates=(3e-4, 1e-3),
    mixed=("upt",),
    screen_steps=4,
    screen_base=2e9,
    screen_then=2e9,
    rl_flops=1e10,
    rl_shares={"chain": 0.25, "sort": 0.25},
    val=24,
    dev=16,
    exam=(24, 12),
    samples=8,
    prompts=8,
    base_steps=40,
)
DIFFICULTY = ("easy", "uniform", "hard")  # with --difficulty, from verified experts


class Job(NamedTuple):
    """One command, as typed after `python`; words with @ are filled in when it starts."""

    name: str
    command: list[str]
    needs: tuple[str, ...] = ()
    minutes: float = 0.0  # of one core, estimated
    flops: float = 0.0  # estimated
    distributed: bool = False  # a script that torchrun may run


class Method(NamedTuple):
    """An RL method at a learning rate; both may be @words."""

    algo: str
    rate: str


class Compute(NamedTuple):
    """Where an RL run stops."""

    flops: float  # estimated
    limit: str = ""  # the @word that is meant; empty = these flops


# Costs of the built-in task on one thread of a 2026 server core, measured 2026-11-26 (docs/LOG.md)
START = 3.0  # CPU seconds to start a job
SFT_STEP = 0.17  # CPU seconds of a step of SFT
EXACT_STEP = 0.06
SFT_FLOPS = 8.4e9  # FLOPs of a step of SFT
VALIDATE = 1.3  # CPU seconds of a validation of SFT, without its samples
SAMPLE = 0.0028  # CPU seconds of a response in an evaluation
RL_SPEED = 4.2e10  # FLOPs of RL per CPU second
RL_ROUND = 2.7e11  # FLOPs of a round of 64 prompts
BASE_ROUND = 8e10  # without SFT answers are short
STABLE_AT = 0.5  # share of SFT's steps at which its stable checkpoint is expected


def flags(**values) -> list[str]:
    """flags(n=4, out="x") -> ["--n", "4", "--out", "x"]."""
    words = []
    for name, value in values.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


class Plan:
    """The jobs of a study in order, and how each kind of command is written."""

    def __init__(self, cfg, size: Size):
        self.cfg = cfg
        self.size = size
        self.own = bool(cfg.init)
        self.main = "own" if self.own else "middle"
        self.jobs: list[Job] = []
        self.out = Path(cfg.out)
        self.sets = self.out / "sets"
        self.base = cfg.init or f"@{BASE}:late"
        self.before = () if self.own else (BASE,)
        self.screens = {}  # {"then-dapo": names of its jobs}

    def add(self, name, command, needs=(), seconds=START, flops=0.0):
        """A job; its costs are known for the built-in task only."""
        if self.own:
            seconds = flops = 0.0
        distributed = command[0] != "-m" and name != BASE
        self.jobs.append(Job(name, command, tuple(needs), seconds / 60, flops, distributed))

    def resumed(self, name) -> list[str]:
        """Where a training run goes; --resume also begins a run that is not there yet."""
        return [*flags(out=self.out / name), "--resume"]

    def make_base(self):
        """The base model: the built-in recipe on text without unseen problems."""
        words = "--from-scratch --max-len 256 --batch 32 --micro-tokens 4096 --optimizer muon"
        words += " --lr 3e-3 --schedule constant --warmup 0 --no-recompute --log-every 100"
        steps = self.size.base_steps
        words += f" --steps {steps} --eval-every {steps // 2} --keep 1"
        files = flags(init=self.out / "data", data=self.sets / "base.jsonl")
        command = ["sft.py", *words.split(), *files, *self.resumed(BASE)]
        self.add(BASE, command, seconds=START + 0.19 * steps)

    def exam(self, name, init, needs, set_name=""):
        """A final evaluation."""
        exact = set_name in EXACT
        file = f"{set_name}-exam" if exact else "exam"
        n_test, n_unseen = self.size.exam
        n_problems = self.size.exact["exam"] if exact else n_test + 2 * n_unseen
        out = f"{self.out}/exams/{name}.jsonl"
        words = flags(n=self.cfg.exam_n, init=init, data=f"{self.sets}/{file}.jsonl", out=out)
        words += flags(reward="text" if exact else self.cfg.reward)
        seconds = START + SAMPLE * n_problems * self.cfg.exam_n
        command = ["evaluate.py", *shlex.split(self.cfg.exam), *words]
        self.add(f"exam-{name}", command, needs, seconds)

    # ---- SFT
    def sft_command(self, set_name, seed, name, steps, every, rate) -> list[str]:
        exact = set_name in EXACT
        folder = f"{self.sets}/{set_name}-" if exact else f"{self.sets}/"
        file = "middle" if set_name == "dft" else set_name
        val = {"fixed": "fixed-val"}.get(set_name, f"{set_name}-val" if exact else "val")
        words = flags(
            init=self.base,
            data=f"{self.sets}/{file}.jsonl",
            val=self.cfg.val or f"{self.sets}/{val}.jsonl",
            problems=f"{folder}dev.jsonl",
            reward="text" if exact else self.cfg.reward,
            seed=seed,
        )
        if not self.own:
            words += flags(steps=steps, eval_every=every, lr=rate)
            words += flags(sample_problems=self.size.samples)
        if set_name == "dft":
            words += flags(loss="dft")
        return ["sft.py", *shlex.split(self.cfg.sft), *words, *self.resumed(name)]

    def sft_seconds(self, set_name, steps, every) -> float:
        step = EXACT_STEP if set_name in EXACT else SFT_STEP
        validation = VALIDATE * self.size.val / 1000
        validation += SAMPLE * (self.size.dev + 8 * self.size.samples)
        return START + steps * step + (steps / every + 1) * validation

    def sft(self, set_name, seed, needs=()):
        """SFT on one set from the base model, then the evaluation of its stable checkpoint."""
        name = f"sft-{set_name}-{seed}"
        steps, every = self.size.steps.get(set_name, self.size.steps["middle"])
        command = self.sft_command(set_name, seed, name, steps, every, "@lr:sft")
        before = [*self.before, *self.screens.get("sft-sft", ()), *needs]
        self.add(name, command, before, self.sft_seconds(set_name, steps, every), steps * SFT_FLOPS)
        self.exam(f"sft-{set_name}-{seed}", f"@{name}:stable", [name], set_name)

    def screen_sft(self):
        steps = self.size.screen_steps
        every = max(1, steps // 4)
        for n, rate in enumerate(self.size.sft_rates):
            name = f"screen-sft-sft-{n}"
            command = self.sft_command("middle", 0, name, steps, every, f"{rate:g}")
            seconds = self.sft_seconds("middle", steps, every)
            self.add(name, command, self.before, seconds, steps * SFT_FLOPS)
            self.screens.setdefault("sft-sft", []).append(name)

    # ---- RL
    def rl(self, name, start, needs, method: Method, compute: Compute, set_name=""):
        """RL of one method from a checkpoint."""
        cfg = self.cfg
        exact = set_name in EXACT
        from_base = start == self.base
        problems = f"{set_name}-problems" if exact else "problems"
        if method.algo != "dapo":
            problems = self.main  # with its trajectories
        val = f"{set_name}-dev" if exact else "dev"
        words = flags(
            init=start,
            algo=method.algo,
            seed=name.rpartition("-")[2] if not name.startswith("screen") else 0,
            data=f"{self.sets}/{problems}.jsonl",
            val=f"{self.sets}/{val}.jsonl",
            reward="text" if exact else cfg.reward,
            max_flops=compute.limit or f"{compute.flops:g}",
        )
        every = 6 if from_base else 1 if exact else 2  # exact tasks have few rounds
        if not self.own:
            words += flags(lr=method.rate, eval_every=every, prompts=self.size.prompts)
            words += flags(gen_prompts=self.size.prompts, update_prompts=self.size.prompts // 2)
        a_round = (BASE_ROUND if from_base else RL_ROUND) * self.size.prompts / 64
        n_evaluations = compute.flops / a_round / every + 2
        seconds = START + compute.flops / RL_SPEED + n_evaluations * 2 * SAMPLE * self.size.dev
        command = ["rl.py", *shlex.split(cfg.rl), *words, *self.resumed(name)]
        self.add(name, command, needs, seconds, compute.flops)

    def screen_rl(self, kind, start, flops, needs):
        """Every method at every learning rate, from the base or after SFT."""
        for algo in ("dapo", *self.size.mixed):
            for n, rate in enumerate(self.size.rl_rates):
                name = f"screen-{kind}-{algo}-{n}"
                self.rl(name, start, needs, Method(algo, f"{rate:g}"), Compute(flops))
                group = "dapo" if algo == "dapo" else "mixed"
                self.screens.setdefault(f"{kind}-{group}", []).append(name)

    def rl_from_sft(self, set_name, start, seed):
        """Plain RL from one starting point of an SFT run, and its final evaluation."""
        sft = f"sft-{set_name}-{seed}"
        name = f"rl-{set_name}-{start}-{seed}"
        steps, _ = self.size.steps.get(set_name, self.size.steps["middle"])
        share = {"adaptive": STABLE_AT / 2, "stable": STABLE_AT}.get(start, 1.0)
        flops = self.size.rl_flops * self.size.rl_shares.get(set_name, 1)
        flops = max(flops / 4, flops - (share - STABLE_AT) * steps * SFT_FLOPS)
        needs = [sft, *self.screens.get("then-dapo", ())]
        if start in START_RULES:  # their checkpoint may be one of the others': no second run then
            earlier = {f"rl-{set_name}-{each}-{seed}" for each in STARTS[: STARTS.index(start)]}
            needs += [job.name for job in self.jobs if job.name in earlier]
        if set_name == "dft":
            needs.append(f"sft-middle-{seed}")  # whose compute it has, see rest_of
        compute = Compute(flops, f"@rest:{sft}:{start}")
        method = Method("dapo", "@lr:then-dapo")
        self.rl(name, f"@{sft}:{start}", needs, method, compute, set_name)
        self.exam(name, f"@{name}:best", [name], set_name)

    def arm(self, name, start, needs, compute: Compute):
        """RL from the base or after SFT, by dapo or the best mixed method, with its evaluation."""
        kind, group, _ = name.split("-")
        algo = "dapo" if group == "dapo" else f"@algo:{kind}"
        before = [*needs, *self.screens.get(f"{kind}-{group}", ())]
        self.rl(name, start, before, Method(algo, f"@lr:{kind}-{group}"), compute)
        self.exam(name, f"@{name}:best", [name])

    def paradigms(self, seeds):
        """SFT-then-RL, SFT alone and RL alone at one compute."""
        size = self.size
        total = STABLE_AT * size.steps["middle"][0] * SFT_FLOPS + size.rl_flops / 2
        for seed in range(seeds("middle")):
            stable = f"rl-{self.main}-stable-{seed}"
            sft = f"sft-{self.main}-{seed}"
            self.exam(f"half-{self.main}-{seed}", f"@{stable}:best:half", [stable, sft])
            self.exam(f"pure-{self.main}-{seed}", f"@{sft}:matched", [sft])
            for algo in ("dapo",) if self.own else ("dapo", "mixed"):
                if seed < seeds(f"base-{algo}"):
                    compute = Compute(total, f"@total:{sft}")
                    self.arm(f"base-{algo}-{seed}", self.base, [sft, *self.before], compute)
            if not self.own and seed < seeds("then-mixed"):
                half = Compute(size.rl_flops / 2)
                self.arm(f"then-mixed-{seed}", f"@{sft}:stable", [sft], half)

    def difficulty(self):
        """Easy, uniform and hard among verified trajectories, by the attempts of a weak model."""
        weak = "rl-middle-stable-0"
        pool = f"{self.sets}/hard_pool.jsonl"
        size = self.size.rows["middle"]
        words = flags(n=4, init=f"@{weak}:best", data=pool, out=f"{self.out}/attempts.jsonl")
        command = ["evaluate.py", *shlex.split(self.cfg.exam), *words, "--reward", "countdown"]
        self.add("attempts", command, [weak], START + SAMPLE * 4 * 3 * size)
        words = {"in": pool, "attempts": f"{self.out}/attempts.jsonl"}
        command = ["-m", "paper.curate", *flags(**words, out=self.sets, size=size)]
        self.add("difficulty", command, ["attempts"])
        for seed in range(2):
            for name in DIFFICULTY:
                self.sft(name, seed, ["difficulty"])
                self.rl_from_sft(name, "stable", seed)


def jobs_of(cfg, size: Size) -> list[Job]:
    """Every job of the study; of those that are ready, the first in the list starts first."""
    p = Plan(cfg, size)
    if p.own:
        return own_jobs(p)
    p.make_base()
    p.exam("base", p.base, p.before)
    p.screen_sft()
    p.sft("middle", 0)
    p.screen_rl("then", "@sft-middle-0:stable", size.screen_then, ["sft-middle-0"])
    p.screen_rl("base", p.base, size.screen_base, p.before)
    for set_name in ("fixed", "large", "wide", "middle", "dft", "small", "tiny", *EXACT):
        for seed in range(size.seeds[set_name]):
            if (set_name, seed) != ("middle", 0):
                p.sft(set_name, seed)
    for set_name in (*size.starts, "large", "wide", "dft", "small", "tiny", *EXACT):
        for seed in range(size.seeds[set_name]):
            if set_name == "dft":  # its minimum of NLL says little
                p.rl_from_sft(set_name, "accuracy", seed)
                continue
            p.rl_from_sft(set_name, "stable", seed)
            every = STARTS if seed < size.starts.get(set_name, 0) else ()
            for start in ("stable", "late") if set_name in EXACT else every:
                if start != "stable":
                    p.rl_from_sft(set_name, start, seed)
    p.paradigms(size.seeds.get)
    for name in EXACT:
        for seed in range(size.seeds[name]):
            sft = f"sft-{name}-{seed}"
            p.exam(f"late-{name}-{seed}", f"@{sft}:late", [sft], name)
    if cfg.difficulty:
        p.difficulty()
    return p.jobs


def own_jobs(p: Plan) -> list[Job]:
    """The handoff on a user's own task: starting points; SFT, RL and SFT-then-RL."""
    p.exam("base", p.base, ())
    for seed in range(p.cfg.seeds):
        p.sft("own", seed)
        for start in STARTS:
            p.rl_from_sft("own", start, seed)
    p.paradigms(lambda _: p.cfg.seeds)
    return p.jobs


# ------------------------------------------------------------------------------------------- words
def fill(word: str, cfg) -> str:
    """A word of a command with its @ filled in from runs that are finished."""
    if not word.startswith("@"):
        return word
    out = Path(cfg.out)
    name, *rest = word[1:].split(":")
    if name in ("lr", "algo"):
        kind, _, group = rest[0].partition("-")
        best = results.best_screen(out, kind, group)
        return f"{best.lr:g}" if name == "lr" else best.algo
    if name == "total":
        return f"{flops_at(out / rest[0], 'stable') + rl_flops(cfg, out / rest[0]) / 2:.6g}"
    if name == "rest":
        return f"{rest_of(cfg, out / rest[0], rest[1]):.6g}"
    run = (out / name).resolve()  # a run that was not made twice is a link
    which = rest[0]
    limit = math.inf
    if which == "matched":  # the best SFT checkpoint within the compute of SFT-then-RL's half
        which = "best"
        limit = float(fill(f"@total:{name}", cfg))
    if rest[1:] == ["half"]:
        _, set_name, *_, seed = name.split("-")
        limit = rl_flops(cfg, out / f"sft-{set_name}-{seed}") / 2
    step = results.start_step(run, which, limit)
    return str(run / "checkpoints" / f"step_{step:06d}")


def flops_at(run: Path, which: str) -> float:
    """FLOPs of an SFT run up to one of its starting points."""
    step = results.start_step(run, which)
    return next(row["flops"] for row in tables.read_metrics(run, "val") if row["step"] == step)


def rl_flops(cfg, sft_run: Path) -> float:
    """Compute of RL from the stable checkpoint; of one's own task 0 = as much as SFT to there."""
    size = QUICK if cfg.quick else FULL
    share = size.rl_shares.get(sft_run.name.split("-")[1], 1)
    return cfg.rl_flops * share or flops_at(sft_run, "stable")


def rest_of(cfg, sft_run: Path, start: str) -> float:
    """Compute of RL from a starting point, so that all of them have the same in total; dft has that
    of middle."""
    flops = rl_flops(cfg, sft_run)
    late = flops_at(sft_run, "late") + flops / 4
    usual = sft_run.with_name(sft_run.name.replace("-dft-", "-middle-"))
    total = max(flops_at(usual, "stable") + flops, late)
    return total - flops_at(sft_run, start)
