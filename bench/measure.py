"""What the benchmarks share: model shapes, the limits of this machine, runs in turn, the report.

What a run found is a dict with at least seconds, cpu_seconds, tokens and peak_mb.
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch

import model as model_file
from core import cli
from core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "bench" / "peers"
PACKAGES = "transformers 5 (and trl, datasets, accelerate)"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = {  # D, layers, query heads, key heads, inner width, V
    "tiny": (128, 3, 4, 2, 384, 160),
    "small": (512, 8, 8, 2, 1408, 32000),
    "0.5b": (896, 24, 14, 2, 4864, 151936),
    "1.5b": (1536, 28, 12, 2, 8960, 151936),
}


@dataclass
class Common:
    """The flags of every benchmark."""

    model: str = "small"  # tiny, small (39M), 0.5b or 1.5b with random weights; or a model folder
    dtype: Literal["fp32", "bf16"] = "fp32"  # to compute in
    repeats: int = 3  # rounds; the median counts
    threads: int = 1  # per process
    seed: int = 0  # of the workload, the weights and the draws
    peer: bool = False  # also run the peers
    peer_python: str = sys.executable  # the interpreter that has the peers' packages
    json: bool = False  # print the last line only

    def __post_init__(self):
        numbers = [f.name for f in fields(self) if f.type is int and f.name != "seed"]
        cli.require_positive(self, *numbers)
        if self.peer:
            require_program(self.peer_python)
        if self.model not in SHAPES and not (Path(self.model) / "config.json").exists():
            raise UserError(
                f"--model {self.model}: neither a shape ({', '.join(SHAPES)}) nor a model folder"
            )


def require_program(peer_python: str) -> None:
    if shutil.which(peer_python) is None:
        raise UserError(f"--peer-python {peer_python}: no such program; name one with {PACKAGES}")


def shape(name: str) -> model_file.ModelConfig:
    """A named shape: Qwen2's layers with a tied head."""
    width, layers, heads, key_heads, inner, vocab = SHAPES[name]
    return model_file.ModelConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        intermediate_size=inner,
        vocab_size=vocab,
        max_position_embeddings=4096,
        rope_theta=1e6,
    )


def make_model(cfg: Common, folder: Path) -> None:
    """A model folder of the named shape with random weights, in fp32."""
    model_file.save_model(model_file.init_model(shape(cfg.model), cfg.seed), folder)


# ---- the machine
def bandwidth(device: torch.device) -> float:
    """Bytes per second that can be read: the best of 8 passes over 256 MiB (CUDA: 2 GiB)."""
    x = torch.ones(2**26 if device.type == "cpu" else 2**29, device=device)
    best = 0.0
    for _ in range(8):
        started = time.perf_counter()
        float(x.sum())
        best = max(best, x.nbytes / (time.perf_counter() - started))
    return best


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOPs per second of the best of 6 square matrix products."""
    n = 2048 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.randn(n, n, device=device).to(dtype)
    best = 0.0
    for _ in range(6):
        started = time.perf_counter()
        float((a @ b)[0, 0])
        best = max(best, 2 * n**3 / (time.perf_counter() - started))
    return best


def spent() -> tuple[float, float]:
    """(wall, CPU) seconds of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), usage.ru_utime + usage.ru_stime


def peak_mb(device: torch.device) -> float:
    """The most memory of this process so far; on CUDA the most that its tensors took there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1024 if sys.platform == "linux" else 2**20  # KB on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# ---- runs
def environment(threads: int) -> dict[str, str]:
    """Of a run: its number of threads, and this project on Python's path."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}


def last_line(text: str) -> str:
    """The last line of what a program wrote, cut to 200 characters."""
    return (text.strip().splitlines() or ["no message"])[-1][:200]


def run_json(command: list[str], cfg: Common, what: str) -> dict:
    """Run a program whose last line is JSON. A failure is a UserError with its last line."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment(cfg.threads))
    if done.returncode:
        remedy = f"--peer-python names a python with {PACKAGES}"
        raise UserError(f"{what}: {last_line(done.stderr)}; {remedy}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_peer(script: str, cfg: Common, model, work: Path, *flags) -> dict:
    """A script of bench/peers on a model folder and the work that it is to do."""
    command = [cfg.peer_python, PEERS / script, "--model", model, "--work", work]
    command += ["--dtype", cfg.dtype, "--threads", cfg.threads, *flags]
    return run_json(list(map(str, command)), cfg, " ".join(map(str, [script, *flags])))


def with_rates(found: dict) -> dict:
    """The same with tokens per second and tokens per CPU-second."""
    return found | {
        "tokens_per_s": found["tokens"] / found["seconds"],
        "tokens_per_cpu_s": found["tokens"] / max(1e-9, found["cpu_seconds"]),
    }


def take_turns(cfg: Common, sides: dict[str, Callable[[], dict]]) -> dict[str, dict]:
    """Run all sides one after another, cfg.repeats times. Returns the medians of each."""
    runs: dict[str, list[dict]] = {side: [] for side in sides}
    for n in range(cfg.repeats):
        for side, run in sides.items():
            found = with_rates(run())
            runs[side].append(found)
            if not cfg.json:
                print(
                    f"round {n + 1}  {side:13s} {found['tokens_per_s']:8.1f} tokens/s  "
                    f"{found['tokens_per_cpu_s']:8.1f} tokens/CPU-s  {found['peak_mb']:6.0f} MB",
                    flush=True,
                )
    return {side: medians(results) for side, results in runs.items()}


def medians(results: list[dict]) -> dict:
    """The median of each number over the rounds."""
    middle = {}
    for key in results[0]:
        middle[key] = statistics.median(result[key] for result in results)
    return middle


def best_of(found: dict[str, dict]) -> str:
    """The side with the most tokens per second."""
    return max(found, key=lambda side: found[side]["tokens_per_s"])


def compare(ours: dict, rival: str, theirs: dict[str, dict]) -> dict:
    """Ours beside a rival at the best of its modes. A ratio above 1: we are faster."""
    mode = best_of(theirs)
    best = theirs[mode]
    ours[f"{rival}_mode"] = mode
    ours[f"ratio_{rival}"] = ours["tokens_per_s"] / best["tokens_per_s"]
    ours[f"ratio_{rival}_cpu"] = ours["tokens_per_cpu_s"] / best["tokens_per_cpu_s"]
    for key in ("tokens_per_s", "tokens_per_cpu_s", "peak_mb"):
        ours[f"{rival}_{key}"] = best[key]
    return ours


def report(bench: str, cfg: Common, result: dict, summary: str) -> None:
    """The summary and a line per rival, unless --json; then the JSON line."""
    if not cfg.json:
        print(summary.format(**result))
        for key in [key for key in result if key.endswith("_mode")]:
            rival = key.removesuffix("_mode")
            share = result["peak_mb"] / result[f"{rival}_peak_mb"]
            print(
                f"{result[f'ratio_{rival}']:.2f}x {rival} ({result[key]}; "
                f"{result[f'ratio_{rival}_cpu']:.2f}x in CPU time) in {share:.2f} of its memory"
            )
    about = {"bench": bench, "model": cfg.model, "dtype": cfg.dtype, "threads": cfg.threads}
    print_json(about | result)


def as_table(rows: list[dict]) -> str:
    """A Markdown table; the keys of the first row are its head."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    for row in rows:
        lines.append([as_text(value) for value in row.values()])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def as_text(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_json(numbers: dict) -> None:
    """One line; fractions with 4 digits behind the point."""
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in numbers.items()}
    print(json.dumps(rounded), flush=True)
