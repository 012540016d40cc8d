"""The paper in miniature: base -> SFT -> RL over scales, difficulties, starting points and methods.

    python -m paper.study --quick       every arm, one seed, too short to tell much: 13 minutes
    python -m paper.study               three seeds where it matters: 80 minutes on two idle cores
    python -m paper.study --dry-run     the plan: every command, its minutes and FLOPs
    python -m paper.study --init Qwen/Qwen2.5-7B --data sft.jsonl --val val.jsonl --nproc 8 \\
        --problems rl.jsonl --dev dev.jsonl --test test.jsonl --ood aime.jsonl

The study decides which commands to run and in which order. Every job is one call of sft.py, rl.py,
evaluate.py or paper.curate that you can type yourself. A study that was killed goes on when called
again: finished jobs are skipped, started ones resume, and the numbers come out the same.

    OUT/sets/                 small, middle, large (nested), easy, hard; problems, dev, exam
    OUT/sft-SET-SEED          SFT on a set
    OUT/rl-SET-START-SEED     RL (dapo) from it; START = adaptive stable late
    OUT/base-METHOD-SEED      RL from the base model, at the compute of SFT to Stable and its RL
    OUT/then-METHOD-SEED      RL from sft-middle's stable checkpoint, at the compute of its RL
    OUT/exams/                samples of the final evaluations; pure-middle-SEED is SFT alone
    OUT/done/, OUT/logs/      CPU time of each finished job; what the commands printed
    OUT/report.md, *.png      made by paper.report
Choices: 1) Starting points: adaptive = the saved step nearest to half of the first Stable one,
stable = minimum validation loss, late = the last. 2) Difficulty: wins in 4 attempts of a weak
model, here the middle scale after RL; the middle scale itself is the paper's Uniform. 3) Final
evaluations take the checkpoint that is best on dev and sample other problems. 4) A seed changes
the order of the data and every sample, not the data nor the base model. 5) Jobs use one thread."""

import ctypes
import fcntl
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import core.start  # before torch

import data
from core import cli, files, tables
from core.errors import UserError
from paper import curate, findings, report
from paper.findings import MIXED
from tasks import countdown

ROOT = Path(__file__).resolve().parents[1]
BASE = "runs/base"  # where sft.py puts the built-in base model
FULL_HELD_OUT = (400, 500, 250)  # built-in problems of dev, test and ood
QUICK_HELD_OUT = (120, 200, 100)
S1K = "--batch 16 --epochs 5 --weight-decay 1e-4 --warmup .05 --eval-every 62"
TASK = "--max-new 128"  # the built-in task's longest answer
OWN_FILES = ("data", "val", "problems", "dev", "test")  # that a model of your own needs


@dataclass
class Config:
    init: str = ""  # base model: folder or hub name; empty = the built-in base and task
    data: str = ""  # trajectories with prompt, response and answer: the pool of all sets
    val: str = ""  # validation trajectories
    problems: str = ""  # problems for RL
    reward: str = "math"  # judges every answer: math, text, a task, or FILE.py:FUNCTION
    dev: str = ""  # problems to follow a run with and to choose checkpoints by
    test: str = ""  # problems of the final evaluation
    ood: str = ""  # harder or other problems of the final evaluation; empty = none
    out: str = "runs/study"  # everything goes here
    quick: bool = False  # the built-in study with short runs and one seed
    dry_run: bool = False  # print the plan, then stop
    seeds: int = 3  # of the contrasts of data scale and paradigm; the other arms have one
    workers: int = 2  # jobs at once
    nproc: int = 1  # processes per job (torchrun)
    sizes: str = "1000,102000,0"  # rows of small, middle (and easy, hard) and large; 0 = all
    sft: str = ""  # flags of every sft.py
    sft_small: str = S1K  # flags of sft.py on small
    sft_middle: str = "--epochs 9"  # on middle, easy and hard (the paper's 102K sets)
    sft_large: str = ""  # on large
    rl: str = "--keep 1"  # flags of every rl.py
    rl_flops: float = 0.0  # compute of an RL run (from the base: plus SFT's); 0 = its --steps
    exam: str = ""  # flags of every evaluate.py
    exam_n: int = 4  # samples per problem in the final evaluation
    near: float = 0.8  # curate's --near, for data and problems against val, dev, test and ood

    def __post_init__(self):
        counts = (self.seeds, self.workers, self.nproc)
        if min(counts) < 1:
            raise UserError("--seeds {} --workers {} --nproc {}: each at least 1".format(*counts))
        if self.quick and self.init:
            raise UserError(
                "--quick shortens the built-in study; with --init give smaller --sizes and steps"
            )
        given = [name for name in OWN_FILES if getattr(self, name)]
        if given and not self.init or self.init and len(given) < len(OWN_FILES):
            missing = [f"--{name}" for name in OWN_FILES if self.init and name not in given]
            raise UserError(
                "a model of your own needs --init and all of --data --val --problems --dev --test, "
                f"the built-in study none of them (missing: {', '.join(missing) or '--init'})"
            )
        if sorted(self.rows()) != self.rows() or len(self.rows()) != 3:
            raise UserError(
                f"--sizes {self.sizes}: three rising numbers of rows, as 1000,3000,9000 (0 = all)"
            )

    def rows(self) -> list[float]:
        """Rows of small, middle and large; infinite for all, empty where --sizes is no numbers."""
        try:
            return [int(word) or math.inf for word in self.sizes.split(",")]
        except ValueError:
            return []


def preset(given: dict) -> dict:
    """The built-in study, full or quick: every set passes through all regimes (docs/LOG.md)."""
    if given.get("init"):
        # two jobs would share the GPUs; SFT's evaluations allow as long answers as RL's
        return {
            "workers": 1,
            "sft": "--bf16 --max-new 8192",
            "rl": "--bf16 --keep 1",
            "exam": "--bf16 --max-prompt 16384",
        }
    rl = (
        "--temperature 1 --max-prompt 64 --micro-tokens 4096 --lr 1e-4 --steps 1000 --eval-n 2"
        f" --keep 1 --no-recompute {TASK}"
    )
    common = {
        "reward": "countdown",
        "sft": "--batch 32 --micro-tokens 4096 --max-len 256 --optimizer muon --lr 2e-3"
        f" --schedule constant --warmup 0 --log-every 100 --no-recompute {TASK}",
        "exam": TASK,
        "near": 0.0,  # the prompts differ in nothing but their numbers, so all are near
    }
    if given.get("quick"):
        return common | {
            "seeds": 1,
            "sizes": "300,900,2700",
            "rl_flops": 5e11,
            "rl": f"{rl} --prompts 32 --update-prompts 16 --gen-prompts 32 --eval-every 1",
            "sft_small": "--steps 90 --eval-every 10",
            "sft_middle": "--steps 225 --eval-every 25",
            "sft_large": "--steps 400 --eval-every 50",
            "exam_n": 2,
        }
    return common | {
        "sizes": "1000,3000,9000",
        "rl_flops": 4e12,
        "rl": f"{rl} --prompts 64 --update-prompts 32 --gen-prompts 64 --eval-every 2",
        "sft_small": "--steps 300 --eval-every 25",
        "sft_middle": "--steps 1000 --eval-every 50",
        "sft_large": "--steps 2000 --eval-every 100",
    }


# ------------------------------------------------------------------------------------------- plan
class Job(NamedTuple):
    """One command, as typed after `python`.

    Words with @ are filled in when it starts: @RUN:START a checkpoint, @budget:SEED FLOPs."""

    name: str
    command: list[str]
    needs: tuple[str, ...] = ()
    minutes: float = 0.0  # of one core, estimated
    flops: float = 0.0  # estimated
    distributed: bool = False  # a script that torchrun may run


# Costs of the built-in task on one thread of a 2026 server core, measured 2026-11-23 (docs/LOG.md)
START = 4.0  # CPU seconds to start a job
SFT_STEP = 0.17  # CPU seconds of a step of SFT
SFT_FLOPS = 8.4e9  # FLOPs of a step of SFT
VALIDATE = 1.3  # CPU seconds of a validation of SFT, without its samples
SAMPLE = 0.0028  # CPU seconds of a response in an evaluation
RL_SPEED = 4.2e10  # FLOPs of RL per CPU second
# FLOPs of a round of 64 prompts; without SFT answers are short, so a run has three times the rounds
RL_ROUND = 2.7e11
MIXED_ROUND = 1.9e11
BASE_ROUND = 8e10


def flags(**values) -> list[str]:
    """flags(n=4, out="x") -> ["--n", "4", "--out", "x"]."""
    words = []
    for name, value in values.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def number_after(line: str, flag: str, default: float) -> float:
    """The number after a flag in a line of flags."""
    words = shlex.split(line)
    return float(words[words.index(flag) + 1]) if flag in words else default


class Plan:
    """The jobs of a study in order, and how each kind of command is written."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.jobs: list[Job] = []
        self.out = Path(cfg.out)
        self.sets = self.out / "sets"
        self.base = cfg.init or BASE
        self.before = () if cfg.init else ("base",)
        n_dev, n_test, n_ood = QUICK_HELD_OUT if cfg.quick else FULL_HELD_OUT
        self.n_dev = n_dev
        self.n_exam = n_test + n_ood

    def add(self, name, command, needs=(), seconds=START, flops=0.0):
        """A job; its costs are known for the built-in task only."""
        if self.cfg.init:
            seconds = flops = 0.0
        distributed = command[0] != "-m" and name != "base"
        self.jobs.append(Job(name, command, tuple(needs), seconds / 60, flops, distributed))

    def evaluation(self, name, init, rows, out, needs):
        """A job that samples from a checkpoint: rows = (file, number of problems, samples each)."""
        file, n_problems, n = rows
        words = flags(n=n, init=init, data=f"{self.sets}/{file}.jsonl", out=f"{self.out}/{out}")
        words += flags(reward=self.cfg.reward)
        command = ["evaluate.py", *shlex.split(self.cfg.exam), *words]
        self.add(name, command, needs, START + SAMPLE * n_problems * n)

    def exam(self, name, init, needs):
        """A final evaluation."""
        rows = ("exam", self.n_exam, self.cfg.exam_n)
        self.evaluation(f"exam-{name}", init, rows, f"exams/{name}.jsonl", needs)

    def sft(self, set_name, seed):
        """SFT on one set from the base model, then the evaluation of its Stable checkpoint."""
        cfg = self.cfg
        name = f"sft-{set_name}-{seed}"
        extra = getattr(cfg, f"sft_{set_name}", cfg.sft_middle)
        steps = number_after(extra, "--steps", 0)
        n_validations = steps / number_after(extra, "--eval-every", 360) + 1
        words = flags(
            init=self.base,
            data=f"{self.sets}/{set_name}.jsonl",
            val=cfg.val or f"{self.out}/data/val.jsonl",
            problems=f"{self.sets}/dev.jsonl",
            reward=cfg.reward,
            seed=seed,
        )
        self.add(
            name,
            ["sft.py", *shlex.split(f"{cfg.sft} {extra}"), *words, *self.resumed(name)],
            self.before if set_name not in ("easy", "hard") else ("difficulty",),
            START + steps * SFT_STEP + n_validations * (VALIDATE + SAMPLE * self.n_dev),
            steps * SFT_FLOPS,
        )
        self.exam(name, f"@{name}:stable", [name])

    def rl(self, name, start, algo, budget, needs):
        """RL of one method from a checkpoint, then the final evaluation of its best on dev."""
        cfg = self.cfg
        from_base = name.startswith("base")
        seed = name.rpartition("-")[2]
        problems = "problems" if algo == "dapo" else "middle"
        words = flags(
            init=start,
            algo=algo,
            seed=seed,
            data=f"{self.sets}/{problems}.jsonl",
            val=f"{self.sets}/dev.jsonl",
            reward=cfg.reward,
        )
        flops = cfg.rl_flops
        a_round = MIXED_ROUND if algo in MIXED else RL_ROUND
        every = number_after(cfg.rl, "--eval-every", 20)
        if budget:
            words += flags(max_flops=budget)
        if from_base:
            flops += 0.7 * number_after(cfg.sft_middle, "--steps", 0) * SFT_FLOPS  # SFT to Stable
            a_round = BASE_ROUND
            every = 3 * every
            words += flags(eval_every=f"{every:g}")
        if budget and cfg.init:
            words += flags(steps=1000000)  # compute ends the run
        rounds = flops / (a_round * number_after(cfg.rl, "--prompts", 64) / 64)
        self.add(
            name,
            ["rl.py", *shlex.split(cfg.rl), *words, *self.resumed(name)],
            needs,
            START + flops / RL_SPEED + (rounds / every + 2) * 2 * SAMPLE * self.n_dev,
            flops,
        )
        self.exam(name, f"@{name}:best", [name])

    def resumed(self, name) -> list[str]:
        """Where a training run goes; --resume also begins a run that is not there yet."""
        return [*flags(out=self.out / name), "--resume"]

    def rl_from_sft(self, set_name, start, seed):
        """Plain RL from one starting point of an SFT run."""
        sft = f"sft-{set_name}-{seed}"
        budget = f"{self.cfg.rl_flops:g}" if self.cfg.rl_flops else ""
        self.rl(f"rl-{set_name}-{start}-{seed}", f"@{sft}:{start}", "dapo", budget, [sft])

    def sft_and_rl(self, set_name, seed):
        self.sft(set_name, seed)
        self.rl_from_sft(set_name, "stable", seed)

    def difficulty(self):
        """Easy and hard, by the attempts of a weak model: the middle scale after RL."""
        _, size, n_large = self.cfg.sizes.split(",")
        weak = "rl-middle-stable-0"
        rows = ("large", int(n_large), 4)
        self.evaluation("attempts", f"@{weak}:best", rows, "attempts.jsonl", [weak])
        words = {"in": f"{self.sets}/large.jsonl", "attempts": f"{self.out}/attempts.jsonl"}
        command = ["-m", "paper.curate", *flags(**words, out=self.sets, size=size)]
        self.add("difficulty", command, ["attempts"])


def plan(cfg: Config) -> list[Job]:
    """Every job of the study; of those that are ready, the first in the list starts first."""
    p = Plan(cfg)
    if not cfg.init:
        p.add("base", ["-c", "import sft; sft.make_built_in(sft.Config())"], seconds=140)
    p.exam("base", p.base, p.before)
    # first what most waits for: the weak model, its attempts, and the sets they define
    p.sft_and_rl("middle", 0)
    p.difficulty()
    for seed in range(cfg.seeds):
        for name in ("large", "middle", "small"):
            if (name, seed) != ("middle", 0):
                p.sft_and_rl(name, seed)
    for name in ("easy", "hard"):
        p.sft_and_rl(name, 0)
    for seed in range(cfg.seeds):
        matched = [f"sft-middle-{seed}", f"rl-middle-stable-{seed}"]
        p.exam(f"pure-middle-{seed}", f"@sft-middle-{seed}:matched", matched)
        for algo in ("dapo", *MIXED) if seed == 0 else ("dapo", "luffy"):
            p.rl(f"base-{algo}-{seed}", p.base, algo, f"@budget:{seed}", matched)
    for algo in MIXED:
        stable = "@sft-middle-0:stable"
        p.rl(f"then-{algo}-0", stable, algo, "@spent:0", ["rl-middle-stable-0"])
    for name in ("small", "middle", "large", "easy", "hard"):
        for start in ("adaptive", "late"):
            p.rl_from_sft(name, start, 0)
    return p.jobs


def show_plan(cfg: Config, jobs: list[Job], done: set[str]) -> None:
    """The jobs by kind with their time and compute; with --dry-run every command."""
    kinds = {}
    for job in jobs:
        kinds.setdefault(job.name.split("-")[0], []).append(job)
    kinds["all"] = jobs
    print(f"{'':12}{'jobs':>6}{'done':>6}{'core min':>10}{'FLOPs':>10}")
    for kind, members in kinds.items():
        n_done = sum(job.name in done for job in members)
        minutes = sum(job.minutes for job in members)
        flops = sum(job.flops for job in members)
        print(f"{kind:12}{len(members):6}{n_done:6}{minutes:10.1f}{flops:10.1e}")
    if cfg.init:
        print("time and FLOPs of your model: see `python sft.py --dry-run` and the first logs")
    else:
        left = sum(job.minutes for job in jobs if job.name not in done) / cfg.workers
        print(f"about {left:.0f} minutes left with {cfg.workers} jobs at once on idle cores")
    for job in jobs if cfg.dry_run else ():
        after = ", ".join(job.needs) or "nothing"
        print(f"\n{job.name}  ({job.minutes:.1f} min; after {after})")
        print(f"    python {shlex.join(job.command)}")
    print(flush=True)


# ------------------------------------------------------------------------------------------- sets
def make_sets(cfg: Config) -> None:
    """Write OUT/sets once: the pool without duplicates and evaluation prompts, in nested scales."""
    sets = Path(cfg.out) / "sets"
    if (sets / "counts.json").exists():
        return
    sets.mkdir(parents=True, exist_ok=True)
    sizes = [int(word) for word in cfg.sizes.split(",")]
    rows = source_rows(cfg, sizes)
    against = []
    for name in ("val", "dev", "test", "ood"):
        against += [data.prompt_text(row) or "" for row in rows[name]]
    pool, counts = curate.clean(rows["data"], against, near=cfg.near)
    problems, counts_problems = curate.clean(rows["problems"], against, near=cfg.near)
    if max(sizes) > len(pool):
        raise UserError(
            f"--sizes {cfg.sizes}: only {len(pool)} of the trajectories are left after dedup and "
            "decontamination; ask for fewer"
        )
    test = rows["test"]
    ood = rows["ood"]
    dev = rows["dev"]
    if not cfg.init:
        n_dev, n_test, n_ood = QUICK_HELD_OUT if cfg.quick else FULL_HELD_OUT
        dev = dev[:n_dev]
        test = test[:n_test]
        ood = ood[:n_ood]
    for name, size in zip(("small", "middle", "large"), sizes):
        curate.write_rows(sets / f"{name}.jsonl", pool[: size or None])
    curate.write_rows(sets / "problems.jsonl", problems)
    curate.write_rows(sets / "dev.jsonl", dev)
    curate.write_rows(sets / "exam.jsonl", test + ood)
    about = {
        "curated": {"data": counts, "problems": counts_problems},
        "test": len(test),
        "sizes": [size or len(pool) for size in sizes],
        "ood": len(ood),
    }
    files.write_json(sets / "counts.json", about)


def source_rows(cfg: Config, sizes: list[int]) -> dict[str, list[dict]]:
    """The rows of data, problems, val, dev, test and ood: the user's, or the built-in task's."""
    if cfg.init:
        paths = {name: getattr(cfg, name) for name in (*OWN_FILES, "ood")}
        return {name: data.read_rows(path) if path else [] for name, path in paths.items()}
    folder = Path(cfg.out) / "data"
    # a third more than asked for: prompts come back with other trajectories, and duplicates go
    countdown.write(folder, countdown.Config(trajectories=sizes[2] * 4 // 3))
    names = {"data": "train", "problems": "rl", "dev": "eval", "ood": "test_k5"}
    every = (*OWN_FILES, "ood")
    return {name: data.read_rows(folder / f"{names.get(name, name)}.jsonl") for name in every}


# ------------------------------------------------------------------------------------------- work
def fill(word: str, out: Path) -> str:
    """A word of a command with its @ filled in from runs that are finished."""
    if not word.startswith("@"):
        return word
    name, which = word[1:].split(":")
    if name == "spent":
        return f"{rl_compute(out, which):.6g}"
    if name == "budget":
        return f"{rl_compute(out, which) + sft_compute(out, which):.6g}"
    limit = math.inf
    if which == "matched":  # the best SFT checkpoint within the compute of SFT-then-RL
        which = "best"
        limit = float(fill(f"@budget:{name.rpartition('-')[2]}", out))
    step = findings.start_step(out / name, which, limit)
    return str(out / name / "checkpoints" / f"step_{step:06d}")


def rl_compute(out: Path, seed: str) -> float:
    """FLOPs of plain RL from the middle scale's Stable checkpoint."""
    return tables.read_metrics(out / f"rl-middle-stable-{seed}", "eval")[-1]["flops"]


def sft_compute(out: Path, seed: str) -> float:
    """FLOPs of the middle scale's SFT up to its Stable checkpoint."""
    run = out / f"sft-middle-{seed}"
    step = findings.start_step(run, "stable")
    return next(row["flops"] for row in tables.read_metrics(run, "val") if row["step"] == step)


def start(cfg: Config, job: Job) -> subprocess.Popen:
    """Start a job's process: one thread, its output to a log, its end with ours."""
    out = Path(cfg.out)
    words = [fill(word, out) for word in job.command]
    if words[0] not in ("-m", "-c"):
        words[0] = str(ROOT / words[0])
    if cfg.nproc > 1 and job.distributed:
        # torchrun would read a script's --n as a short form of its own flags; not so after --
        torchrun = ["-m", "torch.distributed.run", "--standalone"]
        words = [*torchrun, f"--nproc_per_node={cfg.nproc}", "--", *words]
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # for -m, from any folder
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
    (out / "logs").mkdir(exist_ok=True)
    (out / "exams").mkdir(exist_ok=True)
    with open(out / "logs" / f"{job.name}.txt", "a") as log:
        return subprocess.Popen(
            [sys.executable, *words],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            preexec_fn=end_with_parent,
            close_fds=False,  # the lock of claim() stays open in the job
            start_new_session=True,  # Ctrl-C reaches us, and we tell the jobs once
            env={**os.environ, **environment},
        )


def end_with_parent() -> None:
    """In a job on Linux: SIGTERM when the study dies, even by kill -9; training then saves."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 = PR_SET_PDEATHSIG


def claim(out: Path):
    """The lock that a study and its jobs hold, so that no two processes ever write to one run."""
    lock = open(out / "lock", "w")
    os.set_inheritable(lock.fileno(), True)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"another study, or a job of a killed one, works in {out}: waiting", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


class Running(NamedTuple):
    job: Job
    since: float
    child: subprocess.Popen  # kept, as Python reaps a dropped one by itself


def work(cfg: Config, jobs: list[Job], done: dict[str, dict]) -> None:
    """Run the jobs, `workers` at once, each as soon as what it needs is done."""
    running: dict[int, Running] = {}  # by process id
    began = time.monotonic()
    try:
        while len(done) < len(jobs):
            begun = {*done, *(each.job.name for each in running.values())}
            waiting = [job for job in jobs if job.name not in begun]
            ready = [job for job in waiting if set(job.needs) <= set(done)]
            for job in ready[: cfg.workers - len(running)]:
                child = start(cfg, job)
                running[child.pid] = Running(job, time.monotonic(), child)
            pid, status, used = os.wait4(-1, 0)  # Popen.wait would not tell the CPU time
            ended = running.pop(pid)
            ended.child.returncode = status
            finish(cfg, ended, used, done)
            mark = done[ended.job.name]
            print(
                f"[{len(done)}/{len(jobs)}] {ended.job.name:26} {mark['cpu_s'] / 60:5.1f} core min"
                f" (planned {ended.job.minutes:.1f})  {eta(cfg, jobs, done)}",
                flush=True,
            )
    finally:
        for each in running.values():
            each.child.terminate()  # training jobs finish their step and save
        for each in running.values():
            each.child.wait()
        with open(Path(cfg.out) / "wall.txt", "a") as file:
            file.write(f"{time.monotonic() - began:.0f}\n")


def finish(cfg: Config, ended: Running, used, done: dict[str, dict]) -> None:
    """Mark a job as done, or stop the study where the job failed."""
    name = ended.job.name
    log = Path(cfg.out) / "logs" / f"{name}.txt"
    lines = log.read_text().strip().splitlines()
    last = lines[-1] if lines else ""
    # a signal makes a training job save and end well, with "stopped" as its last word
    if ended.child.returncode or last.startswith("stopped"):
        raise UserError(f"{name} did not finish; see {log}, which ends: {last}")
    wall = time.monotonic() - ended.since
    cpu = used.ru_utime + used.ru_stime
    done[name] = {"cpu_s": round(cpu, 1), "wall_s": round(wall, 1)}
    files.write_json(Path(cfg.out) / "done" / f"{name}.json", done[name])


def eta(cfg: Config, jobs: list[Job], done: dict[str, dict]) -> str:
    """Minutes left: those planned, times how the plan has held so far, 10 minutes added to both."""
    if cfg.init:
        return ""
    planned = sum(job.minutes for job in jobs if job.name in done)
    left = sum(job.minutes for job in jobs if job.name not in done) / cfg.workers
    held = (sum(mark["cpu_s"] for mark in done.values()) / 60 + 10) / (planned + 10)
    return f"about {left * held:.0f} min left"


def finished(out: Path, jobs: list[Job]) -> dict[str, dict]:
    """The marks of the jobs that are done: {name: {cpu_s, wall_s}}."""
    marks = {job.name: out / "done" / f"{job.name}.json" for job in jobs}
    return {name: json.loads(mark.read_text()) for name, mark in marks.items() if mark.exists()}


def check_settings(cfg: Config) -> None:
    """Write OUT/study.json, or refuse to go on with a study of other settings."""
    path = Path(cfg.out) / "study.json"
    about = {k: v for k, v in vars(cfg).items() if k not in ("dry_run", "workers")}
    known = json.loads(path.read_text()) if path.exists() else about
    if known != about:
        names = [name for name in about if known.get(name) != about[name]]
        differ = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        raise UserError(
            f"{cfg.out} holds a study with other settings ({differ}); give those, or another --out"
        )
    files.write_json(path, about)


def main(cfg: Config) -> None:
    out = Path(cfg.out)
    jobs = plan(cfg)
    show_plan(cfg, jobs, set(finished(out, jobs)))
    if cfg.dry_run:
        return
    (out / "done").mkdir(parents=True, exist_ok=True)
    lock = claim(out)
    check_settings(cfg)
    command = shlex.join(["python", "-m", "paper.study", *sys.argv[1:]])
    (out / "command.txt").write_text(command + "\n")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    make_sets(cfg)
    done = finished(out, jobs)  # again: another study may have worked here during the wait
    try:
        work(cfg, jobs, done)
    except KeyboardInterrupt:
        print(
            f"\nstopped: {len(done)} of {len(jobs)} jobs done; the same command goes on",
            file=sys.stderr,
        )
        sys.exit(130)
    lock.close()
    print(report.write(out))


if __name__ == "__main__":
    cli.run(main, Config, preset)
