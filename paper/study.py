"""The paper in miniature: base -> SFT -> RL over scales, difficulties, starting points and methods, and what it shows.

    python study.py --quick                 every arm, one seed, too short to tell much: 13 minutes on two idle cores
    python study.py                         the same with three seeds where it matters: about 80 minutes
    python study.py --dry-run               the plan: every command, its minutes and FLOPs; nothing runs
    python study.py --init Qwen/Qwen2.5-7B --data sft.jsonl --val val.jsonl --problems rl.jsonl --dev dev.jsonl \\
        --test test.jsonl --ood aime.jsonl --nproc 8            the same on a real model; every checkpoint of SFT is
                                            kept with its trainer state, as starting points are chosen among them

It only writes down which commands to run and in which order; every arm is one call of sft.py, rl.py, evaluate.py or
curate.py that you can type yourself. Kill it at any time and call it again: finished jobs are skipped, started ones go
on from their newest checkpoint, and the numbers come out the same.

    OUT/sets/       small c middle c large, easy, hard (trajectories); problems, dev, exam (test and, behind it, ood)
    OUT/sft-SET-SEED                SET = small middle large easy hard
    OUT/rl-SET-START-SEED           RL (dapo) from it; START = adaptive stable late
    OUT/base-METHOD-SEED            from the base model, as much compute as sft-middle to stable + rl-middle-stable
    OUT/then-METHOD-SEED            from sft-middle-SEED's stable checkpoint, as much compute as rl-middle-stable
    OUT/exams/, done/, logs/        samples of the final evaluations (pure-middle-SEED: SFT alone, at equal compute);
                                    a mark a finished job, with its CPU time; what the commands printed
    OUT/report.md, *.png            made by report.py from the above
Choices: 1) Starting points: adaptive = the saved step nearest to half of the first Stable one, stable = minimum
validation loss (phases.py), late = the last. 2) Difficulty as in the paper: wins in 4 attempts of a weak model, here
the middle scale after RL; the middle scale itself is Uniform. 3) Final evaluations take the checkpoint that is best on
dev, for every arm alike, and sample other problems than dev. 4) A seed moves the order of the data and every sample,
not the data nor the base model. 5) Children use one thread: two busy OpenMP threads on shared cores are 10-20 times
slower."""

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

import data
from core import cli, files
from core.errors import UserError
from paper import curate, findings, report
from paper.findings import MIXED
from tasks import countdown

ROOT = Path(__file__).resolve().parents[1]
BASE = "runs/base"  # where sft.py puts the built-in base model
HELD_OUT = {
    False: (400, 500, 250),
    True: (120, 200, 100),
}  # --quick: problems of dev, test and ood, built in
TASK = "--max-new 128"  # the built-in task's longest answer


@dataclass
class Config:
    init: str = ""  # base model: folder or hub name; empty = the built-in base and task
    data: str = (
        ""  # trajectories with prompt, response and answer (the pool that all sets are drawn from)
    )
    val: str = ""  # validation trajectories
    problems: str = ""  # problems for RL
    dev: str = ""  # problems to follow a run with and to choose checkpoints by
    test: str = ""  # problems of the final evaluation
    ood: str = ""  # harder or other problems of the final evaluation; empty = none
    out: str = "runs/study"  # everything goes here
    quick: bool = False  # the built-in study with short runs and one seed
    dry_run: bool = False  # print the plan, then stop
    seeds: int = 3  # of the two main contrasts, data scale and paradigm; the other arms have one
    workers: int = 2  # jobs at once
    nproc: int = 1  # processes a job (torchrun)
    sizes: str = "1000,102000,0"  # rows of small, middle (and easy, hard) and large; 0 = all
    sft: str = ""  # flags of every sft.py
    sft_small: str = (
        "--batch 16 --epochs 5 --weight-decay 1e-4 --warmup .05 --eval-every 62"  # flags of small
    )
    sft_middle: str = "--epochs 9"  # of middle, easy and hard (the paper's 102K sets)
    sft_large: str = ""  # of large (sft.py's own defaults are those of the paper's 889K)
    rl: str = "--keep 1"  # flags of every rl.py
    rl_flops: float = (
        0.0  # compute of an RL run; 0 = its --steps. Runs from the base match it with SFT's added
    )
    exam: str = ""  # flags of every evaluate.py
    exam_n: int = 4  # samples a problem in the final evaluation
    near: float = (
        0.8  # curate.py's --near for trajectories and problems against val, dev, test and ood
    )

    def __post_init__(self):
        if self.seeds < 1 or self.workers < 1 or self.nproc < 1:
            raise UserError(
                f"--seeds {self.seeds} --workers {self.workers} --nproc {self.nproc}: each at least 1"
            )
        if self.quick and self.init:
            raise UserError(
                "--quick shortens the built-in study; with --init give smaller --sizes and steps"
            )
        needed = ("data", "val", "problems", "dev", "test")
        missing = [f"--{name}" for name in needed if self.init and not getattr(self, name)]
        if missing or (not self.init and any(getattr(self, name) for name in needed)):
            raise UserError(
                f"a real model needs --init and all of --data --val --problems --dev --test, the built-in "
                f"study none of them (missing: {', '.join(missing) or '--init'})"
            )
        try:
            sizes = [int(word) or math.inf for word in self.sizes.split(",")]
        except ValueError:
            sizes = []
        if len(sizes) != 3 or sorted(sizes) != sizes:
            raise UserError(
                f"--sizes {self.sizes}: three rising numbers of rows, as 1000,3000,9000 (0 = all)"
            )


def preset(given: dict) -> dict:
    """The built-in study, full or quick: lengths that let every set pass through all regimes (docs/LOG.md)."""
    if given.get("init"):
        # two jobs would share the GPUs; SFT's evaluations allow as long answers as RL's
        return {
            "workers": 1,
            "sft": "--bf16 --max-new 8192",
            "rl": "--bf16 --keep 1",
            "exam": "--bf16 --max-prompt 16384",
        }
    common = {
        "sft": "--batch 32 --micro-tokens 4096 --max-len 256 --optimizer muon --lr 2e-3 --schedule constant "
        f"--warmup 0 --log-every 100 --no-recompute {TASK}",
        "exam": TASK,
        "near": 0.0,
    }  # its prompts differ in nothing but their numbers, so all are near
    rl = (
        "--temperature 1 --max-prompt 64 --micro-tokens 4096 --lr 1e-4 --steps 1000 --eval-n 2 --keep 1 "
        f"--no-recompute {TASK}"
    )
    if given.get("quick"):
        return {
            **common,
            "seeds": 1,
            "sizes": "300,900,2700",
            "rl_flops": 5e11,
            "rl": f"{rl} --prompts 32 --update-prompts 16 --gen-prompts 32 --eval-every 1",
            "sft_small": "--steps 90 --eval-every 10",
            "sft_middle": "--steps 225 --eval-every 25",
            "sft_large": "--steps 400 --eval-every 50",
            "exam_n": 2,
        }
    return {
        **common,
        "sizes": "1000,3000,9000",
        "rl_flops": 4e12,
        "rl": f"{rl} --prompts 64 --update-prompts 32 --gen-prompts 64 --eval-every 2",
        "sft_small": "--steps 300 --eval-every 25",
        "sft_middle": "--steps 1000 --eval-every 50",
        "sft_large": "--steps 2000 --eval-every 100",
    }


class Job(NamedTuple):
    """One command. Words with @ are filled in when it starts: @RUN:START a checkpoint, @budget:SEED FLOPs."""

    name: str
    command: list[str]
    needs: tuple[str, ...] = ()
    minutes: float = 0.0  # of one core, estimated
    flops: float = 0.0  # estimated


# ----------------------------------------------------------------------------------------------------------------- plan
# CPU seconds and FLOPs of the built-in task on one thread of a 2026 server core, measured 2026-11-23 (docs/LOG.md)
START, SFT_STEP, SFT_FLOPS, VALIDATE, RL_SECOND, SAMPLE = 4.0, 0.17, 8.4e9, 2.8, 4.2e10, 0.0028


def flag(words: str, name: str, default: float) -> float:
    """The number after --name in a line of flags."""
    words = shlex.split(words)
    return float(words[words.index(name) + 1]) if name in words else default


class Plan:
    """The jobs of a study in order, and how each kind of command is written. Costs are those of the built-in task."""

    def __init__(self, cfg: Config):
        self.cfg, self.jobs, self.out, self.sets = cfg, [], Path(cfg.out), Path(cfg.out) / "sets"
        self.base, self.before = (cfg.init, ()) if cfg.init else (BASE, ("base",))
        self.n_dev, *exam = HELD_OUT[cfg.quick]
        self.n_exam = sum(exam)

    def add(self, name, script, flags, *words, needs=(), seconds=START, flops=0.0):
        known = not self.cfg.init
        self.jobs.append(
            Job(
                name,
                [script, *shlex.split(flags), *words],
                tuple(needs),
                known * seconds / 60,
                known * flops,
            )
        )

    def exam(self, name, init, needs):
        """A final evaluation."""
        self.add(
            f"exam-{name}",
            "evaluate.py",
            self.cfg.exam,
            "--n",
            str(self.cfg.exam_n),
            "--init",
            init,
            "--data",
            f"{self.sets}/exam.jsonl",
            "--out",
            f"{self.out}/exams/{name}.jsonl",
            needs=needs,
            seconds=START + SAMPLE * self.n_exam * self.cfg.exam_n,
        )

    def sft(self, name, seed):
        """SFT of one set from the base model, then the final evaluation of its Stable checkpoint."""
        cfg, extra = self.cfg, getattr(self.cfg, f"sft_{name}", self.cfg.sft_middle)
        steps, every = flag(extra, "--steps", 0), flag(extra, "--eval-every", 360)
        self.add(
            f"sft-{name}-{seed}",
            "sft.py",
            f"{cfg.sft} {extra}",
            "--init",
            self.base,
            "--data",
            f"{self.sets}/{name}.jsonl",
            "--val",
            cfg.val or f"{self.out}/data/val.jsonl",
            "--problems",
            f"{self.sets}/dev.jsonl",
            "--seed",
            str(seed),
            flops=steps * SFT_FLOPS,
            needs=self.before if name not in ("easy", "hard") else ("difficulty",),
            seconds=START
            + steps * SFT_STEP
            + (steps / every + 1) * (VALIDATE - 1.5 + SAMPLE * self.n_dev),
        )
        self.exam(f"sft-{name}-{seed}", f"@sft-{name}-{seed}:stable", (f"sft-{name}-{seed}",))

    def rl(self, name, start, algo, seed, budget, needs):
        """RL of one method from a checkpoint, then the final evaluation of the checkpoint that is best on dev."""
        cfg, plain, from_base = self.cfg, algo == "dapo", name.startswith("base")
        to_stable = 0.7 * flag(cfg.sft_middle, "--steps", 0) * SFT_FLOPS
        flops = cfg.rl_flops + (to_stable if from_base else 0.0)
        limit = ["--max-flops", budget] if budget else []
        every = flag(cfg.rl, "--eval-every", 20)
        # FLOPs of a round: without SFT answers are short, and a run of the same compute has three times the rounds
        a_round = (
            (8e10 if from_base else 1.9e11 if algo in MIXED else 2.7e11)
            * flag(cfg.rl, "--prompts", 64)
            / 64
        )
        rounds = flops / a_round
        if from_base:
            every, limit = 3 * every, [*limit, "--eval-every", f"{3 * every:g}"]
        if budget and cfg.init:
            limit += ["--steps", "1000000"]  # compute ends the run
        self.add(
            name,
            "rl.py",
            cfg.rl,
            "--init",
            start,
            "--algo",
            algo,
            "--seed",
            str(seed),
            "--data",
            f"{self.sets}/{'problems' if plain else 'middle'}.jsonl",
            "--val",
            f"{self.sets}/dev.jsonl",
            *limit,
            needs=needs,
            flops=flops,
            seconds=START + flops / RL_SECOND + (rounds / every + 2) * 2 * SAMPLE * self.n_dev,
        )
        self.exam(name, f"@{name}:best", (name,))

    def from_sft(self, name, start, seed):
        """Plain RL from one starting point of an SFT run."""
        self.rl(
            f"rl-{name}-{start}-{seed}",
            f"@sft-{name}-{seed}:{start}",
            "dapo",
            seed,
            f"{self.cfg.rl_flops:g}" if self.cfg.rl_flops else "",
            (f"sft-{name}-{seed}",),
        )


def plan(cfg: Config) -> list[Job]:
    """Every job of the study; of those that are ready, the first in the list starts first."""
    p, sizes = Plan(cfg), cfg.sizes.split(",")
    if not cfg.init:
        p.add("base", "sft.py", "--dry-run", "--out", f"{p.out}/none", seconds=140)
    p.exam("base", p.base, p.before)
    # first what most waits for: the weak model, its attempts, and the sets they define
    p.sft("middle", 0)
    p.from_sft("middle", "stable", 0)
    p.add(
        "attempts",
        "evaluate.py",
        cfg.exam,
        "--n",
        "4",
        "--init",
        "@rl-middle-stable-0:best",
        "--data",
        f"{p.sets}/large.jsonl",
        "--out",
        f"{p.out}/attempts.jsonl",
        needs=["rl-middle-stable-0"],
        seconds=START + 4 * SAMPLE * int(sizes[2]),
    )
    p.add(
        "difficulty",
        "paper.curate",
        f"--in {p.sets}/large.jsonl --attempts {p.out}/attempts.jsonl --out {p.sets} "
        f"--size {sizes[1]}",
        needs=["attempts"],
    )
    for seed in range(cfg.seeds):
        for name in ("large", "middle", "small"):
            if (name, seed) != ("middle", 0):
                p.sft(name, seed)
                p.from_sft(name, "stable", seed)
    for name in ("easy", "hard"):
        p.sft(name, 0)
        p.from_sft(name, "stable", 0)
    for seed in range(cfg.seeds):
        matched = (f"sft-middle-{seed}", f"rl-middle-stable-{seed}")
        p.exam(
            f"pure-middle-{seed}", f"@sft-middle-{seed}:matched", matched
        )  # SFT alone, within the same compute
        for algo in ("dapo", *MIXED) if seed == 0 else ("dapo", "luffy"):
            p.rl(f"base-{algo}-{seed}", p.base, algo, seed, f"@budget:{seed}", matched)
    for algo in MIXED:
        p.rl(f"then-{algo}-0", "@sft-middle-0:stable", algo, 0, "@spent:0", ("rl-middle-stable-0",))
    for name in ("small", "middle", "large", "easy", "hard"):
        for start in ("adaptive", "late"):
            p.from_sft(name, start, 0)
    return p.jobs


def show_plan(cfg: Config, jobs: list[Job], done: set[str]) -> None:
    """The jobs by kind with their share of time and compute; with --dry-run every command."""
    kinds = {}
    for job in jobs:
        kinds.setdefault(job.name.split("-")[0], []).append(job)
    print(f"{'':12}{'jobs':>6}{'done':>6}{'core min':>10}{'FLOPs':>10}")
    for kind, members in [*kinds.items(), ("all", jobs)]:
        minutes, flops = (sum(getattr(job, key) for job in members) for key in ("minutes", "flops"))
        print(
            f"{kind:12}{len(members):6}{sum(job.name in done for job in members):6}{minutes:10.1f}{flops:10.1e}"
        )
    left = sum(job.minutes for job in jobs if job.name not in done) / cfg.workers
    print(
        f"about {left:.0f} minutes left with {cfg.workers} jobs at once on as many idle cores"
        if not cfg.init
        else "time and FLOPs of a model of yours: see `python sft.py --dry-run` and the first jobs' logs"
    )
    for job in jobs if cfg.dry_run else ():
        print(
            f"\n{job.name}  ({job.minutes:.1f} min; after {', '.join(job.needs) or 'nothing'})\n    python "
            f"{shlex.join(job.command)}"
        )
    print(flush=True)


# ----------------------------------------------------------------------------------------------------------------- sets
def make_sets(cfg: Config) -> None:
    """Write OUT/sets once: the pool deduplicated and kept apart from every evaluation set, cut into nested scales."""
    out, sets = Path(cfg.out), Path(cfg.out) / "sets"
    if (sets / "counts.json").exists():
        return
    sizes, files = [int(word) for word in cfg.sizes.split(",")], vars(cfg)
    sets.mkdir(parents=True, exist_ok=True)
    if not cfg.init:
        folder = out / "data"
        # a third more than asked for: prompts come back with other trajectories, and duplicates are dropped
        countdown.write(folder, countdown.Config(trajectories=sizes[2] * 4 // 3))
        names = {
            "data": "train",
            "val": "val",
            "problems": "rl",
            "dev": "eval",
            "test": "test",
            "ood": "test_k5",
        }
        files = {**files, **{name: f"{folder}/{file}.jsonl" for name, file in names.items()}}
    held_out = ("val", "dev", "test", "ood")
    rows = {
        name: data.read_rows(files[name]) for name in ("data", "problems", *held_out) if files[name]
    }
    against = [data.prompt_text(row) or "" for name in held_out for row in rows.get(name, ())]
    pool, counts = curate.clean(rows["data"], against, near=cfg.near)
    problems, counts_problems = curate.clean(rows["problems"], against, near=cfg.near)
    curate.write_rows(sets / "problems.jsonl", problems)
    if max(sizes) > len(pool):
        raise UserError(
            f"--sizes {cfg.sizes}: only {len(pool)} of the trajectories are left after dedup and "
            "decontamination; ask for fewer"
        )
    for name, size in zip(("small", "middle", "large"), sizes):
        curate.write_rows(sets / f"{name}.jsonl", pool[: size or None])
    n_dev, n_test, n_ood = [None] * 3 if cfg.init else HELD_OUT[cfg.quick]
    test, ood = rows["test"][:n_test], rows.get("ood", [])[:n_ood]
    curate.write_rows(sets / "dev.jsonl", rows["dev"][:n_dev])
    curate.write_rows(sets / "exam.jsonl", test + ood)
    files.write_json(
        sets / "counts.json",
        {
            "curated": {"data": counts, "problems": counts_problems},
            "test": len(test),
            "sizes": [size or len(pool) for size in sizes],
            "ood": len(ood),
        },
    )


# ----------------------------------------------------------------------------------------------------------------- work
def fill(word: str, out: Path) -> str:
    """A word of a command with its @ filled in from runs that are finished."""
    if not word.startswith("@"):
        return word
    name, which = word[1:].split(":")
    if name in (
        "budget",
        "spent",
    ):  # FLOPs of RL after SFT, with and without those of SFT up to its start
        spent = findings.read_run(out / f"rl-middle-stable-{which}", "eval")[-1]["flops"]
        step = findings.start_step(out / f"sft-middle-{which}", "stable")
        before = next(
            r["flops"]
            for r in findings.read_run(out / f"sft-middle-{which}", "val")
            if r["step"] == step
        )
        return f"{spent + before * (name == 'budget'):.6g}"
    limit = math.inf
    if which == "matched":
        which, limit = "best", float(fill(f"@budget:{name.rpartition('-')[2]}", out))
    return str(
        out / name / "checkpoints" / f"step_{findings.start_step(out / name, which, limit):06d}"
    )


def start(cfg: Config, job: Job) -> subprocess.Popen:
    """Start a job's process: one thread, its output to a log, its end with ours."""
    out = Path(cfg.out)
    script, *words = [fill(word, out) for word in job.command]
    if (
        script in ("sft.py", "rl.py") and job.name != "base"
    ):  # --resume also begins a run that is not there yet
        words += ["--out", str(out / job.name), "--resume"]
    several = cfg.nproc > 1 and script != "paper.curate" and job.name != "base"
    # torchrun would read a script's --n as a short form of its own flags; nothing after -- is its own
    launch = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={cfg.nproc}", "--"]
        if several
        else []
    )
    (out / "logs").mkdir(exist_ok=True), (out / "exams").mkdir(exist_ok=True)
    with open(out / "logs" / f"{job.name}.txt", "a") as log:
        return subprocess.Popen(
            [sys.executable, *launch, *program(script), *words],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            preexec_fn=end_with_parent,
            close_fds=False,
            start_new_session=True,  # Ctrl-C reaches us, and we tell the children once
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )


def program(script: str) -> list[str]:
    """What Python is told to run: a script of the root, or a module of a wing."""
    return [str(ROOT / script)] if script.endswith(".py") else ["-m", script]


def end_with_parent() -> None:
    """In a child on Linux: SIGTERM when the study dies, even by kill -9; a training job then saves and stops."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 = PR_SET_PDEATHSIG


def claim(out: Path):
    """The lock that this study and its children hold, so that no two processes ever write to one run."""
    lock = open(out / "lock", "w")
    os.set_inheritable(lock.fileno(), True)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(
            f"another study, or what is left of a killed one, still works in {out}: waiting for its end",
            flush=True,
        )
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def work(cfg: Config, jobs: list[Job], done: dict[str, dict]) -> None:
    """Run the jobs, `workers` at once, each as soon as what it needs is done."""
    out, running, began = Path(cfg.out), {}, time.monotonic()
    try:
        while len(done) < len(jobs):
            busy = {job.name for job, _, _ in running.values()}
            ready = [
                j
                for j in jobs
                if j.name not in done and j.name not in busy and all(n in done for n in j.needs)
            ]
            for job in ready[: cfg.workers - len(running)]:
                child = start(cfg, job)
                running[child.pid] = (
                    job,
                    time.monotonic(),
                    child,
                )  # a dropped Popen is reaped behind our back
            pid, status, used = os.wait4(
                -1, 0
            )  # not Popen.wait: this one tells the CPU time of the child
            job, since, child = running.pop(pid)
            child.returncode = status
            said = (out / "logs" / f"{job.name}.txt").read_text().strip().splitlines() or [""]
            if status or said[-1].startswith(
                "stopped"
            ):  # a signal makes a training job save and end well
                raise UserError(
                    f"{job.name} did not finish; see {out}/logs/{job.name}.txt, which ends: {said[-1]}"
                )
            done[job.name] = {
                "cpu_s": round(used.ru_utime + used.ru_stime, 1),
                "wall_s": round(time.monotonic() - since, 1),
            }
            files.write_json(out / "done" / f"{job.name}.json", done[job.name])
            print(
                f"[{len(done)}/{len(jobs)}] {job.name:26} {done[job.name]['cpu_s'] / 60:5.1f} core min "
                f"(planned {job.minutes:.1f})  {eta(cfg, jobs, done)}",
                flush=True,
            )
    finally:
        for _, _, child in running.values():
            child.terminate()  # training jobs finish their step and save
        for _, _, child in running.values():
            child.wait()
        (out / "wall.txt").open("a").write(f"{time.monotonic() - began:.0f}\n")


def eta(cfg: Config, jobs: list[Job], done: dict[str, dict]) -> str:
    """Minutes left: what is planned, times how the plan has held so far (10 minutes of holding exactly added first)."""
    planned = sum(job.minutes for job in jobs if job.name in done)
    left = sum(job.minutes for job in jobs if job.name not in done) / cfg.workers
    held = (sum(mark["cpu_s"] for mark in done.values()) / 60 + 10) / (planned + 10)
    return "" if cfg.init else f"about {left * held:.0f} min left"


def main(cfg: Config) -> None:
    out, jobs = Path(cfg.out), plan(cfg)
    marks = {job.name: out / "done" / f"{job.name}.json" for job in jobs}

    def finished():
        return {name: json.loads(mark.read_text()) for name, mark in marks.items() if mark.exists()}

    show_plan(cfg, jobs, set(finished()))
    if cfg.dry_run:
        return
    (out / "done").mkdir(parents=True, exist_ok=True)
    lock, about = (
        claim(out),
        {name: value for name, value in vars(cfg).items() if name not in ("dry_run", "workers")},
    )
    known = json.loads((out / "study.json").read_text()) if (out / "study.json").exists() else about
    if known != about:
        differ = ", ".join(
            f"--{name.replace('_', '-')}" for name in about if known.get(name) != about[name]
        )
        raise UserError(
            f"{out} holds a study with other settings ({differ}); give those, or another --out"
        )
    files.write_json(out / "study.json", about)
    (out / "command.txt").write_text(shlex.join(["python", "study.py", *sys.argv[1:]]) + "\n")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    make_sets(cfg)
    done = (
        finished()
    )  # not before: another study may have worked here while this one waited for the lock
    try:
        work(cfg, jobs, done)
    except KeyboardInterrupt:
        print(
            f"\nstopped with {len(done)} of {len(jobs)} jobs done; the same command goes on",
            file=sys.stderr,
        )
        sys.exit(130)
    lock.close()
    print(report.write(out))


if __name__ == "__main__":
    cli.cli(main, Config, preset)
