"""Speed and memory of the parts that cost time, beside the machine's own limits and beside other software.

    python bench.py rollout                                               the sampler on a 39M model with random weights
    python bench.py rollout --model FOLDER --dtype bf16 --batches 64      any model folder
    python bench.py rollout --peer --peer-python /path/to/python          beside transformers, installed for that python

Choices: 1) Every run is a process of its own, so peak memory is one run's; with --peer ours and theirs alternate, round
after round, on the same prompts, lengths, weights and number of threads. 2) Each side counts at its best batch size.
3) Lengths are drawn beforehand and forced, so no sampler is lucky. Useful tokens are those asked for: what a finished
row computes on is not counted. 4) CPU-seconds stand beside wall time: on a shared machine they are the steadier figure.
MBU = bytes that decoding has to read (all weights once a step, keys and values of the live rows) per second, over the
bandwidth measured just after. The last line printed is JSON.
"""
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

import model as model_file
import rollout
import run

QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_position_embeddings": 4096,
         "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu", "tie_word_embeddings": True}
SHAPES = {  # hidden, layers, query heads, key heads, inner, vocabulary
    "tiny": (128, 3, 4, 2, 384, 160), "small": (512, 8, 8, 2, 1408, 32000),
    "0.5b": (896, 24, 14, 2, 4864, 151936), "1.5b": (1536, 28, 12, 2, 8960, 151936)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PEERS = Path(__file__).resolve().parent / "peers"


@dataclass
class Rollout:
    model: str = "small"        # tiny, small (39M), 0.5b, 1.5b: random weights of that shape; or a model folder
    dtype: Literal["fp32", "bf16"] = "fp32"  # of weights and cache
    prompts: int = 8            # different prompts
    group: int = 8              # responses to each
    prompt_tokens: int = 64     # tokens a prompt
    mean_new: int = 96          # tokens a response in the mean: lengths are geometric
    max_new: int = 256          # longer ones are cut here
    batches: str = "8,16,64"    # numbers of rows to try; the best counts
    repeats: int = 3            # rounds; the median counts
    threads: int = 1            # of each process; two busy ones on shared cores slow each other down
    seed: int = 0               # of prompts, lengths, weights and draws
    peer: bool = False          # also run transformers, static and continuous batching
    peer_python: str = sys.executable  # the interpreter that has transformers
    json: bool = False          # print the last line only

    def __post_init__(self):
        if not all(b.isdigit() and int(b) for b in self.batches.split(",")):
            raise ValueError(f"--batches {self.batches}: give numbers of rows, such as 8,16,64")
        if self.peer and shutil.which(self.peer_python) is None:
            raise ValueError(f"--peer-python {self.peer_python}: no such program; name a python with transformers 5")
        if self.model not in SHAPES and not (Path(self.model) / "config.json").exists():
            raise ValueError(f"--model {self.model}: neither a shape ({', '.join(SHAPES)}) nor a folder with "
                             "config.json")


def workload(cfg: Rollout, vocab: int) -> tuple[list[list[int]], list[int]]:
    """(prompts, length of each response): a function of the configuration alone."""
    g = run.generator(cfg.seed, "bench", "rollout")
    prompts = torch.randint(3, min(vocab, 4000), (cfg.prompts, cfg.prompt_tokens), generator=g)
    lengths = torch.empty(cfg.prompts * cfg.group, dtype=torch.float64).geometric_(1 / cfg.mean_new, generator=g)
    return prompts.tolist(), lengths.clamp_(1, cfg.max_new).long().tolist()


def make_folder(cfg: Rollout, folder: Path) -> None:
    """A model folder with random weights of a named shape, in fp32."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
             "vocab_size")
    folder.mkdir(parents=True, exist_ok=True)
    config = {**QWEN2, **dict(zip(names, SHAPES[cfg.model])), "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    model_file.save_model(model_file.init_model(model_file.read_config(folder), cfg.seed), folder)


def bandwidth(device: torch.device) -> float:
    """Bytes a second that this process can read: the best of 8 passes over 256 MiB (CUDA: 2 GiB)."""
    x = torch.ones(2**26 if device.type == "cpu" else 2**29, device=device)
    best = 0.0
    for _ in range(8):
        started = time.perf_counter()
        float(x.sum())
        best = max(best, x.nbytes / (time.perf_counter() - started))
    return best


def resident_mb() -> float:
    """Memory of this process now (Linux: /proc; elsewhere its peak so far)."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20   # bytes on macOS


def measure(cfg: Rollout, rows: int) -> dict:
    """Sample the workload once in this process, with so many rows, and count what the model computed on the way."""
    torch.set_num_threads(cfg.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model_file.load_model(cfg.model, DTYPES[cfg.dtype], device)
    prompts, lengths = workload(cfg, model.config.vocab_size)
    rollout.generate(model, prompts[:1], 2, 3, seed=cfg.seed)   # warm-up
    forwards: list[tuple[str, int]] = []
    before, usage, started = resident_mb(), resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    groups = rollout.generate(model, prompts, cfg.group, lengths, seed=cfg.seed, rows=rows,
                              on_forward=lambda what, n, cache: forwards.append((what, n)))
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    tokens = sum(len(r.ids) for group in groups for r in group)
    assert tokens == sum(lengths), "the sampler did not return the lengths asked for"
    steps = [n for what, n in forwards if what == "step"]
    c, size = model.config, model.head.element_size()
    slot = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * size
    weights = sum(p.numel() for p in model.parameters()) * size
    unread = 0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size * size   # a step looks up n rows of it
    read = len(steps) * (weights - unread) + slot * sum(n * len(p) + n * (n + 1) // 2 for p, n in zip(
        (p for p in prompts for _ in range(cfg.group)), lengths))
    peak = after.ru_maxrss / (1024 if sys.platform == "linux" else 2**20)
    if device.type == "cuda":
        before, peak = 0.0, torch.cuda.max_memory_allocated() / 2**20
    limit = bandwidth(device)   # only now: its buffer is not the sampler's memory
    return {"rows": rows, "tokens": tokens, "seconds": wall, "steps": len(steps),
            "cpu_seconds": after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime,
            "ms_per_step": 1e3 * wall / len(steps), "slot_use": tokens / (len(steps) * rows),
            "rows_per_token": sum(steps) / tokens, "mbu": read / wall / limit, "bandwidth_gb_s": limit / 1e9,
            "peak_mb": peak, "grown_mb": peak - before, "weights_mb": weights / 2**20,
            "cache_mb": slot * min(rows, len(lengths)) * (cfg.prompt_tokens + max(lengths) - 1) / 2**20}


def run_once(cfg: Rollout, side: str, batch: int, work: Path) -> dict:
    """One run in a process of its own: side is ours, static or continuous."""
    if side == "ours":
        flags = {**asdict(cfg), "batches": batch, "repeats": 1}
        command = [sys.executable, __file__, "rollout", "--json"]
        for name in ("model", "dtype", "prompts", "group", "prompt_tokens", "mean_new", "max_new", "batches", "repeats",
                     "threads", "seed"):
            command += ["--" + name.replace("_", "-"), str(flags[name])]
    else:
        command = [cfg.peer_python, str(PEERS / "generate_hf.py"), "--model", cfg.model, "--work", str(work), "--mode",
                   side, "--batch", str(batch), "--dtype", cfg.dtype, "--threads", str(cfg.threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(cfg.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"{side}, batch {batch}: {reason[:200]}; --peer-python names a python with transformers 5")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(cfg: Rollout, say) -> dict:
    """All sides at all batch sizes, interleaved; medians over rounds, each side at its best batch."""
    sides = ["ours", "static", "continuous"] if cfg.peer else ["ours"]
    batches, runs = [int(b) for b in cfg.batches.split(",")], {}
    with tempfile.TemporaryDirectory() as folder:
        if cfg.model in SHAPES:
            make_folder(cfg, Path(folder) / "model")
            cfg = replace(cfg, model=str(Path(folder) / "model"))
        prompts, lengths = workload(cfg, model_file.read_config(cfg.model).vocab_size)
        work = Path(folder) / "work.json"
        work.write_text(json.dumps({"prompts": [p for p in prompts for _ in range(cfg.group)], "lengths": lengths}))
        for n in range(cfg.repeats):
            for batch in batches:
                for side in sides:
                    result = run_once(cfg, side, batch, work)
                    runs.setdefault((side, batch), []).append(result)
                    rates = [result["tokens"] / result[cost] for cost in ("seconds", "cpu_seconds")]
                    say(f"round {n + 1}  batch {batch:3d}  {side:10s} {rates[0]:8.1f} tokens/s  {rates[1]:8.1f} "
                        f"tokens/CPU-s  {result['peak_mb']:6.0f} MB")
    best = {}
    for (side, batch), results in runs.items():
        middle = {key: statistics.median(r[key] for r in results) for key in results[0]}
        for rate, cost in (("tokens_per_s", "seconds"), ("tokens_per_cpu_s", "cpu_seconds")):
            middle[rate] = middle["tokens"] / middle[cost]
        if side not in best or middle["tokens_per_s"] > best[side]["tokens_per_s"]:
            best[side] = {**middle, "rows": batch}
    ours = best["ours"]
    for side in sides[1:]:
        ours[f"ratio_{side}"] = ours["tokens_per_s"] / best[side]["tokens_per_s"]
        ours[f"ratio_{side}_cpu"] = ours["tokens_per_cpu_s"] / best[side]["tokens_per_cpu_s"]
        ours |= {f"{side}_{key}": best[side][key] for key in ("rows", "tokens_per_s", "tokens_per_cpu_s", "peak_mb")}
    return ours


def bench_rollout(cfg: Rollout) -> None:
    def say(line):
        if not cfg.json:
            print(line, flush=True)

    alone = not cfg.peer and cfg.repeats == 1 and cfg.batches.isdigit() and cfg.model not in SHAPES
    if alone:
        result = measure(cfg, int(cfg.batches))
        result |= {"tokens_per_s": result["tokens"] / result["seconds"],
                   "tokens_per_cpu_s": result["tokens"] / result["cpu_seconds"]}
    else:
        result = compare(cfg, say)
    say("{rows} rows: {tokens_per_s:.1f} tokens/s, {ms_per_step:.1f} ms a step, slot use {slot_use:.2f}, rows computed "
        "per token {rows_per_token:.3f}, MBU {mbu:.0%} of {bandwidth_gb_s:.1f} GB/s, peak {peak_mb:.0f} MB"
        .format(**result))
    for side in ("static", "continuous") if cfg.peer else ():
        say(f"{result[f'ratio_{side}']:.2f}x transformers, {side} ({result[f'ratio_{side}_cpu']:.2f}x in CPU time)")
    print(json.dumps({"bench": "rollout", "model": cfg.model, "dtype": cfg.dtype, "threads": cfg.threads,
                      **{k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}}))


COMMANDS = {"rollout": (bench_rollout, Rollout)}


def start() -> None:
    """The first word picks what is measured; the flags are its own."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        print(__doc__)
        if name not in ("-h", "--help"):
            print(f"error: {name or 'nothing'} to measure; give one of: {', '.join(COMMANDS)}", file=sys.stderr)
            sys.exit(2)
        return
    del sys.argv[1]
    run.cli(*COMMANDS[name])


if __name__ == "__main__":
    start()
