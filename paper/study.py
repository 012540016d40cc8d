"""The paper in miniature: base -> SFT -> RL over scales, experts, starting points and methods.

    python -m paper.study --quick       every arm, one seed, far too short to tell anything
    python -m paper.study               the study: about 90 minutes on two idle cores
    python -m paper.study --dry-run     the plan: every command, its minutes and FLOPs
    python -m paper.study --init Qwen/Qwen2.5-7B --data sft.jsonl --val val.jsonl --nproc 8 \\
        --problems rl.jsonl --dev dev.jsonl --test test.jsonl --ood aime.jsonl

With a model and data of your own it asks the handoff's claims only: does SFT-then-RL end above SFT
alone and RL alone at equal compute, and from which checkpoint should RL start.

Every job is one call of sft.py, rl.py, evaluate.py or paper.curate that you can type yourself
(paper/plan.py). A study that was killed goes on when called again: finished jobs are skipped,
started ones resume, and the numbers come out the same. A job whose command, filled in, is that of a
finished one is not run again: its output is a link.

    OUT/data, OUT/sets        problems and trajectories (paper/sets.py)
    OUT/sft-*, rl-*, ...      runs; OUT/exams: samples of the final evaluations
    OUT/done/, OUT/logs/      command and CPU time of each finished job; what it printed
    OUT/report.md, *.png      made by paper.report
Choices: 1) Final evaluations take the checkpoint that is best on dev and sample other problems.
2) A seed changes the order of the data and every sample, not the data nor the base model. 3) Every
method takes the best of three learning rates, by the last two evaluations of short runs on dev.
4) Jobs use one thread."""

import ctypes
import fcntl
import json
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

from core import cli, files
from core.errors import UserError
from paper import report, results, sets
from paper.plan import FULL, QUICK, TASK, Job, fill, jobs_of

ROOT = Path(__file__).resolve().parents[1]
OWN_FILES = ("data", "val", "problems", "dev", "test")  # that a model of your own needs


@dataclass
class Config:
    init: str = ""  # base model: folder or hub name; empty = the built-in study
    data: str = ""  # trajectories with prompt, response and answer
    val: str = ""  # validation trajectories
    problems: str = ""  # problems for RL
    reward: str = "math"  # judges every answer: math, text, a task, or FILE.py:FUNCTION
    dev: str = ""  # problems to follow a run with and to choose checkpoints by
    test: str = ""  # problems of the final evaluation
    ood: str = ""  # harder or other problems of the final evaluation; empty = none
    out: str = "runs/study"  # everything goes here
    quick: bool = False  # the built-in study with tiny runs and one seed
    difficulty: bool = False  # built-in: easy and hard trajectories of a verified expert besides
    dry_run: bool = False  # print the plan, then stop
    seeds: int = 1  # of a model of your own; the built-in study has its own in paper/plan.py
    workers: int = 2  # jobs at once
    nproc: int = 1  # processes per job (torchrun)
    sft: str = ""  # flags of every sft.py
    rl: str = ""  # flags of every rl.py
    rl_flops: float = 0.0  # compute of RL from the stable checkpoint; 0 = as much as SFT to there
    exam: str = ""  # flags of every evaluate.py
    exam_n: int = 4  # samples per problem in the final evaluation
    near: float = 0.8  # curate's --near, for data and problems against val, dev, test and ood

    def __post_init__(self):
        cli.require_positive(self, "seeds", "workers", "nproc", "exam_n")
        cli.require_not_negative(self, "rl_flops")
        if (self.quick or self.difficulty) and self.init:
            raise UserError("--quick and --difficulty belong to the built-in study, without --init")
        given = [name for name in OWN_FILES if getattr(self, name)]
        if given and not self.init or self.init and len(given) < len(OWN_FILES):
            missing = [f"--{name}" for name in OWN_FILES if self.init and name not in given]
            raise UserError(
                "a model of your own needs --init and all of --data --val --problems --dev --test, "
                f"the built-in study none of them (missing: {', '.join(missing) or '--init'})"
            )


def preset(given: dict) -> dict:
    """The built-in study, full or quick; of a model of one's own what all its jobs need."""
    if given.get("init"):
        # two jobs would share the GPUs; SFT's evaluations allow as long answers as RL's
        return {
            "workers": 1,
            "sft": "--bf16 --max-new 8192",
            "rl": "--bf16 --steps 1000000",  # compute ends a run
            "exam": "--bf16 --max-prompt 16384",
        }
    return {
        "reward": "countdown",
        "sft": "--batch 32 --micro-tokens 4096 --max-len 256 --optimizer muon --schedule constant"
        f" --warmup 0 --log-every 100 --no-recompute {TASK}",
        "rl": "--temperature 1 --max-prompt 64 --micro-tokens 4096 --steps 100000 --eval-n 2"
        f" --no-recompute {TASK}",
        "rl_flops": (QUICK if given.get("quick") else FULL).rl_flops,
        "exam": TASK,
        "exam_n": 2 if given.get("quick") else 4,
    }


# ------------------------------------------------------------------------------------------- plan
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
        print("asked of your own task: the handoff's claims (paper/findings.py), not the others")
        print("time and FLOPs of your model: see `python sft.py --dry-run` and the first logs")
    else:
        left = sum(job.minutes for job in jobs if job.name not in done) / cfg.workers
        print(f"about {left:.0f} minutes left with {cfg.workers} jobs at once on idle cores")
    for job in jobs if cfg.dry_run else ():
        after = ", ".join(job.needs) or "nothing"
        print(f"\n{job.name}  ({job.minutes:.1f} min; after {after})")
        print(f"    python {shlex.join(job.command)}")
    print(flush=True)


# ------------------------------------------------------------------------------------------- work
def start(cfg: Config, job: Job, words: list[str]) -> subprocess.Popen:
    """Start a job's process: one thread, its output to a log, its end with ours."""
    out = Path(cfg.out)
    words = list(words)
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


def link_to_same(cfg: Config, job: Job, words: list[str], done: dict[str, dict]) -> bool:
    """Whether a finished job had the same command but for --out: then this one's output is a link
    to that one's, and it is done."""
    if "--out" not in words:
        return False
    at = words.index("--out") + 1
    key = words[:at] + words[at + 1 :]
    for name, mark in done.items():
        theirs = mark.get("command", [])
        if "same_as" in mark or len(theirs) != len(words) or theirs[at - 1] != "--out":
            continue
        if theirs[:at] + theirs[at + 1 :] == key:
            ours = Path(words[at])
            ours.unlink(missing_ok=True)
            ours.symlink_to(Path(theirs[at]).resolve())
            mark_done(cfg, job, {"cpu_s": 0.0, "wall_s": 0.0, "same_as": name}, words, done)
            return True
    return False


class Running(NamedTuple):
    job: Job
    words: list[str]  # its command, filled in
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
                words = [fill(word, cfg) for word in job.command]
                if link_to_same(cfg, job, words, done):
                    same = done[job.name]["same_as"]
                    print(f"[{len(done)}/{len(jobs)}] {job.name:26} is {same}", flush=True)
                else:
                    child = start(cfg, job, words)
                    running[child.pid] = Running(job, words, time.monotonic(), child)
            if not running:  # all that was ready is a link
                continue
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
    times = {"cpu_s": round(cpu, 1), "wall_s": round(wall, 1)}
    mark_done(cfg, ended.job, times, ended.words, done)


def mark_done(cfg: Config, job: Job, about: dict, words: list[str], done: dict) -> None:
    done[job.name] = {**about, "command": words}
    files.write_json(Path(cfg.out) / "done" / f"{job.name}.json", done[job.name])


def eta(cfg: Config, jobs: list[Job], done: dict[str, dict]) -> str:
    """Minutes left: those planned, times how the plan has held so far, 10 minutes added to both."""
    if cfg.init:
        return ""
    planned = sum(job.minutes for job in jobs if job.name in done)
    left = sum(job.minutes for job in jobs if job.name not in done) / cfg.workers
    held = (sum(mark["cpu_s"] for mark in done.values()) / 60 + 10) / (planned + 10)
    return f"about {left * held:.0f} min left"


def finished(out: Path, jobs: list[Job]) -> dict[str, dict]:
    """The marks of the jobs that are done: {name: {cpu_s, wall_s, command}}."""
    marks = {job.name: out / "done" / f"{job.name}.json" for job in jobs}
    return {name: json.loads(mark.read_text()) for name, mark in marks.items() if mark.exists()}


def check_settings(cfg: Config) -> None:
    """Write OUT/study.json, or refuse to go on with a study of other settings."""
    path = Path(cfg.out) / "study.json"
    about = {k: v for k, v in vars(cfg).items() if k not in ("dry_run", "workers")}
    about["design"] = results.DESIGN
    known = json.loads(path.read_text()) if path.exists() else about
    if known != about:
        names = [name for name in about if known.get(name) != about[name]]
        if "design" in names:
            raise UserError(f"{cfg.out} holds a study of another design; give another --out")
        differ = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        raise UserError(
            f"{cfg.out} holds a study with other settings ({differ}); give those, or another --out"
        )
    files.write_json(path, about)


def main(cfg: Config) -> None:
    out = Path(cfg.out)
    size = QUICK if cfg.quick else FULL
    jobs = jobs_of(cfg, size)
    show_plan(cfg, jobs, set(finished(out, jobs)))
    if cfg.dry_run:
        return
    (out / "done").mkdir(parents=True, exist_ok=True)
    lock = claim(out)
    check_settings(cfg)
    command = shlex.join(["python", "-m", "paper.study", *sys.argv[1:]])
    (out / "command.txt").write_text(command + "\n")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    sets.write(out, cfg, size)
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
