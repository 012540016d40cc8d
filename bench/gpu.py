"""What to ask a GPU first, in one call: is it right, how fast is it, what memory does it take.

    python -m bench gpu                     a table, then one line of JSON; about 8 minutes
    python -m bench gpu --part sampler      one part alone

Every part is a process of its own and every case of it is guarded: what fails or takes too long is
a row of the table, and the next one runs. Compiling comes last, as it takes longest. Without CUDA
the same command runs tiny shapes in fp32. docs/gpu.md says what each row shows.
"""

import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

import model as model_file
import rollout as sampler
from bench import checks, measure, rollout
from bench.measure import DEVICE
from core import cli, flops, memory, optim, ranks
from core.errors import UserError

PEERS = ("transformers", "trl", "datasets", "accelerate")
Cases = dict[str, Callable[[], dict]]


@dataclass
class Config:
    minutes: float = 8.0  # for all parts together; what does not fit is named
    part: str = ""  # only this part, in this process; empty = all, each in its own
    json: bool = False  # print the last line only

    def __post_init__(self):
        cli.require_positive(self, "minutes")
        if self.part and self.part not in PARTS:
            raise UserError(f"--part {self.part}: give one of: {', '.join(PARTS)}")


class Size(NamedTuple):
    """What is measured."""

    shapes: tuple[str, ...]  # to train; the first one also samples
    dtype: str  # to compute in
    tokens: int  # per training row
    rows: int  # per training step
    sampler_rows: tuple[int, ...]  # responses in flight
    prompt_tokens: int
    new_tokens: int  # per response
    rl_prompts: int  # per RL step, with 8 responses each


LARGE = Size(("0.5b", "1.5b"), "bf16", 2048, 8, (64, 256), 256, 256, 16)
SMALL = Size(("tiny",), "fp32", 32, 2, (8,), 8, 8, 2)
ON_CUDA = DEVICE.type == "cuda"
SIZE = LARGE if ON_CUDA else SMALL


# ---- how fast, and the memory
def random_model(shape: str, dtype: torch.dtype) -> model_file.Model:
    """Drawn on the device: on a CPU 1.5 billion normal numbers would take half a minute."""
    with torch.device(DEVICE):
        model = model_file.Model(measure.shape(shape))
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.02)
    return model.to(dtype)


def seconds_of(run: Callable[[], object]) -> float:
    """Wall time, with the work of the device done."""
    if ON_CUDA:
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if ON_CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def planned_mb(shape: str, micro_tokens: int, **settings) -> float:
    """The peak that core/memory.py expects."""
    plan = memory.Plan(
        config=measure.shape(shape),
        micro_tokens=micro_tokens,
        bf16=SIZE.dtype == "bf16",
        cuda=ON_CUDA,
        **settings,
    )
    return plan.peak() / 2**20


def machine() -> dict:
    return {
        "matmul_tflops": measure.matmul_peak(measure.DTYPES[SIZE.dtype], DEVICE) / 1e12,
        "bandwidth_gb_s": measure.bandwidth(DEVICE) / 1e9,
    }


def training_step(shape: str, recompute: bool, compiled: bool) -> dict:
    """A step of SFT on rows of one length: speed, MFU, and the peak beside the plan's."""
    model = random_model(shape, torch.float32)
    net = ranks.compute(model, SIZE.dtype == "bf16", recompute, compiled)
    optimizers = optim.make_optimizers(model, "adamw", 1e-5)
    ids, mask = checks.batch(SIZE.rows, SIZE.tokens)
    ids = ids.to(DEVICE)

    def step() -> None:
        loss = -model_file.response_logp_sum(net, ids, mask) / ids.numel()
        loss.backward()
        optim.update(model, optimizers, 1e-5, 1.0)
        ranks.refresh(net, model)

    first = seconds_of(step)
    step()
    times = sorted(seconds_of(step) for _ in range(5))
    seconds = times[2]  # the median
    peak = measure.peak_mb(DEVICE)
    limit = measure.matmul_peak(measure.DTYPES[SIZE.dtype], DEVICE)
    work = 3 * flops.hardware_flops(model.config, [SIZE.tokens] * SIZE.rows)
    return {
        "tokens_per_s": ids.numel() / seconds,
        "mfu": work / seconds / limit,
        "ms_per_step": 1e3 * seconds,
        "first_step_s": first,
        "peak_mb": peak,
        "planned_mb": planned_mb(shape, ids.numel(), recompute=recompute),
    }


def sft_cases(compiled: bool) -> Cases:
    cases = {}
    for shape in SIZE.shapes:
        for recompute in (False, True):
            name = f"{shape}, {'recompute' if recompute else 'activations kept'}"
            cases[name] = partial(training_step, shape, recompute, compiled)
    return cases


def sampling(rows: int, graphs: bool) -> dict:
    """The sampler's speed and MBU, and on CUDA the share of the time in which no kernel runs."""
    model = random_model(SIZE.shapes[0], measure.DTYPES[SIZE.dtype])
    cfg = rollout.Config(
        model=SIZE.shapes[0],
        prompts=rows // 8,
        prompt_tokens=SIZE.prompt_tokens,
        mean_new=10**6,  # all are cut at max_new: every row is live all the time
        max_new=SIZE.new_tokens,
    )
    with nullcontext() if graphs else checks.without_graphs():
        found = measure.with_rates(rollout.sample(model, cfg, rows))
        keys = ("tokens_per_s", "ms_per_step", "mbu", "slot_use", "peak_mb")
        numbers = {key: found[key] for key in keys}
        if ON_CUDA:
            numbers["idle_share"] = idle_share(model, cfg, rows)
    return numbers


def idle_share(model, cfg: rollout.Config, rows: int) -> float:
    """1 - kernels' time under a profiler / wall time without one, over 32 tokens per response."""
    prompts, _ = rollout.workload(cfg, model.config.vocab_size)
    settings = sampler.Sampling(max_new=32, rows=rows)
    run = partial(sampler.generate, model, prompts, cfg.group, settings)
    run()
    wall = seconds_of(run)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        seconds_of(run)
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(kernel.self_device_time_total for kernel in kernels) / 1e6
    return 1 - busy / wall


def sampler_cases() -> Cases:
    cases = {}
    for rows in SIZE.sampler_rows:
        cases[f"{rows} rows, graphs"] = partial(sampling, rows, True)
        cases[f"{rows} rows, no graphs"] = partial(sampling, rows, False)
    return cases


# ---- the other benchmarks, as commands
def run_bench(name: str, flags: dict, peers: tuple[str, ...] = ()) -> dict:
    """The numbers of `python -m bench NAME`, once; beside these peers, if any."""
    missing = [package for package in peers if importlib.util.find_spec(package) is None]
    if missing:
        return {"error": f"not installed: {', '.join(missing)}"}
    command = [sys.executable, "-m", "bench", name, "--json", "--repeats", "1"]
    command += ["--model", SIZE.shapes[0], "--dtype", SIZE.dtype, *["--peer"] * bool(peers)]
    for flag, value in flags.items():
        command += [f"--{flag}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, env=measure.environment(1))
    if done.returncode:
        return {"error": measure.last_line(done.stderr)}
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return {key: value for key, value in found.items() if isinstance(value, float)}


MICRO_TOKENS = SIZE.rows * SIZE.tokens
RL_FLAGS = {
    "prompts": SIZE.rl_prompts,
    "prompt-tokens": SIZE.prompt_tokens,
    "max-new": SIZE.new_tokens,
    "micro-tokens": MICRO_TOKENS,
    "peer-rows": 16,
}
SFT_FLAGS = {
    "rows": 4 * SIZE.rows,
    "longest": SIZE.tokens,
    "micro-tokens": MICRO_TOKENS,
    "peer-rows": SIZE.rows,
}
ROLLOUT_FLAGS = {
    "batches": ",".join(map(str, SIZE.sampler_rows)),
    "prompts": max(SIZE.sampler_rows) // 8,
    "prompt-tokens": SIZE.prompt_tokens,
    "mean-new": SIZE.new_tokens,
    "max-new": SIZE.new_tokens,
}


def rl_step() -> dict:
    slots = SIZE.prompt_tokens + SIZE.new_tokens
    plan = planned_mb(SIZE.shapes[0], MICRO_TOKENS, rows=8 * SIZE.rl_prompts, slots=slots)
    return run_bench("rl", RL_FLAGS) | {"planned_mb": plan}


PARTS: dict[str, Callable[[], Cases]] = {
    "checks": checks.cases,
    "machine": lambda: {"matrix product and memory": machine},
    "sft": partial(sft_cases, False),
    "sampler": sampler_cases,
    "rl": lambda: {"a whole step": rl_step},
    "peers": lambda: {
        "rollout beside transformers": partial(run_bench, "rollout", ROLLOUT_FLAGS, PEERS[:1]),
        "sft beside TRL and a plain loop": partial(run_bench, "sft", SFT_FLAGS, PEERS),
        "rl beside TRL": partial(run_bench, "rl", RL_FLAGS, PEERS),
    },
    "compiled sft": partial(sft_cases, True),
}


# ---- running them
def run_part(part: str) -> None:
    """Every case in turn, each one line of JSON as soon as it is known."""
    ranks.start()
    for name, run in PARTS[part]().items():
        started = time.perf_counter()
        try:
            numbers = run()
        except Exception as error:  # whatever it is, it is a row, and the next case may work
            numbers = {"error": measure.last_line(f"{type(error).__name__}: {error}")}
        took = time.perf_counter() - started
        measure.print_json({"part": part, "case": name, **numbers, "took_s": took})
        gc.collect()
        if ON_CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def run_apart(part: str, limit: float) -> list[dict]:
    """run_part() in a process of its own, ended with all that it started after `limit` seconds."""
    command = [sys.executable, "-m", "bench", "gpu", "--part", part]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=out, stderr=errors, env=measure.environment(1), start_new_session=True
        )
        failure = ""
        try:
            if process.wait(timeout=limit):
                errors.seek(0)
                failure = measure.last_line(errors.read())
        except subprocess.TimeoutExpired:
            failure = f"stopped after {limit:.0f} s; see --minutes"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        out.seek(0)
        rows = [json.loads(line) for line in out if line.startswith("{")]
    if failure:
        rows.append({"part": part, "case": "the rest", "error": failure})
    return rows


def as_table(rows: list[dict]) -> str:
    """A Markdown table: part, case, what was found."""
    lines = []
    for row in rows:
        found = [f"{k} {measure.as_text(v)}" for k, v in row.items() if k not in ("part", "case")]
        lines.append({"part": row["part"], "case": row["case"], "found": ", ".join(found)})
    return measure.as_table(lines)


def main(cfg: Config) -> None:
    if cfg.part:
        run_part(cfg.part)
        return
    end = time.monotonic() + 60 * cfg.minutes
    rows: list[dict] = []
    for part in PARTS:
        found = run_apart(part, max(0.1, end - time.monotonic()))
        rows += found
        if not cfg.json:
            print(f"{part}: {len(found)} rows, {end - time.monotonic():.0f} s left", flush=True)
    if not cfg.json:
        print(as_table(rows))
    about = {
        "device": torch.cuda.get_device_name() if ON_CUDA else f"CPU, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
    }
    failed = sum("error" in row or row.get("ok") is False for row in rows)
    print(json.dumps({"bench": "gpu", **about, "failed": failed, "rows": rows}))
