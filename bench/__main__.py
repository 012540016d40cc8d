"""Speed and memory of the parts that cost time, beside the machine's own limits and beside other software.

    python bench.py rollout                                               the sampler on a 39M model with random weights
    python bench.py rollout --model FOLDER --dtype bf16 --batches 64      any model folder
    python bench.py rollout --peer --peer-python /path/to/python          beside transformers, installed for that python
    python bench.py sft                                                   a training step, through sft.py itself
    python bench.py sft --peer --peer-python ...                          beside TRL and a plain transformers loop
    python bench.py rl --peer --peer-python ...                           a whole step of rl.py, beside TRL's GRPO

Choices: 1) Every run is a process of its own, so peak memory is one run's; with --peer ours and theirs alternate, round
after round, on the same prompts, lengths, weights and number of threads. 2) Each side counts at its best batch size.
3) Lengths are drawn beforehand and forced, so no sampler is lucky. Useful tokens are those asked for: what a finished
row computes on is not counted. 4) CPU-seconds stand beside wall time: on a shared machine they are the steadier figure.
5) sft and rl run the real scripts on made-up rows of exact lengths (a tokenizer in which word "w7" is token 7) and read
metrics.jsonl and the system's counters of that process, from the end of the first step on. TRL is given the same rows
and counts at the better of packing on and off.
MFU = FLOPs that the model needs (rl --recompute: the recomputed too) per second, over the best matrix product of the
same type here.
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

import data
import model as model_file
import rollout
from core import cli, files, ranks
from core.errors import UserError

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
SHAPES = {  # hidden, layers, query heads, key heads, inner, vocabulary
    "tiny": (128, 3, 4, 2, 384, 160),
    "small": (512, 8, 8, 2, 1408, 32000),
    "0.5b": (896, 24, 14, 2, 4864, 151936),
    "1.5b": (1536, 28, 12, 2, 8960, 151936),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PEERS = Path(__file__).resolve().parent / "peers"


@dataclass
class Rollout:
    model: str = (
        "small"  # tiny, small (39M), 0.5b, 1.5b: random weights of that shape; or a model folder
    )
    dtype: Literal["fp32", "bf16"] = "fp32"  # of weights and cache
    prompts: int = 8  # different prompts
    group: int = 8  # responses to each
    prompt_tokens: int = 64  # tokens a prompt
    mean_new: int = 96  # tokens a response in the mean: lengths are geometric
    max_new: int = 256  # longer ones are cut here
    batches: str = "8,16,64"  # numbers of rows to try; the best counts
    repeats: int = 3  # rounds; the median counts
    threads: int = 1  # of each process; two busy ones on shared cores slow each other down
    seed: int = 0  # of prompts, lengths, weights and draws
    peer: bool = False  # also run transformers, static and continuous batching
    peer_python: str = sys.executable  # the interpreter that has transformers
    json: bool = False  # print the last line only

    def __post_init__(self):
        if not all(b.isdigit() and int(b) for b in self.batches.split(",")):
            raise UserError(f"--batches {self.batches}: give numbers of rows, such as 8,16,64")
        check(self)


def check(cfg) -> None:
    """Refuse a model or an interpreter that is not there."""
    if cfg.peer and shutil.which(cfg.peer_python) is None:
        raise UserError(
            f"--peer-python {cfg.peer_python}: no such program; name a python with transformers 5"
        )
    if cfg.model not in SHAPES and not (Path(cfg.model) / "config.json").exists():
        raise UserError(
            f"--model {cfg.model}: neither a shape ({', '.join(SHAPES)}) nor a folder with "
            "config.json"
        )


def workload(cfg: Rollout, vocab: int) -> tuple[list[list[int]], list[int]]:
    """(prompts, length of each response): a function of the configuration alone."""
    g = ranks.generator(cfg.seed, "bench", "rollout")
    prompts = torch.randint(3, min(vocab, 4000), (cfg.prompts, cfg.prompt_tokens), generator=g)
    lengths = torch.empty(cfg.prompts * cfg.group, dtype=torch.float64).geometric_(
        1 / cfg.mean_new, generator=g
    )
    return prompts.tolist(), lengths.clamp_(1, cfg.max_new).long().tolist()


def make_folder(cfg: Rollout, folder: Path) -> None:
    """A model folder with random weights of a named shape, in fp32."""
    names = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
    )
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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


def measure(cfg: Rollout, rows: int) -> dict:
    """Sample the workload once in this process, with so many rows, and count what the model computed on the way."""
    torch.set_num_threads(cfg.threads)
    device = ranks.start()
    model = model_file.load_model(cfg.model, DTYPES[cfg.dtype], device)
    prompts, lengths = workload(cfg, model.config.vocab_size)
    rollout.generate(model, prompts[:1], 2, rollout.Sampling(3, seed=cfg.seed))  # warm-up
    forwards: list[tuple[str, int]] = []
    before, usage, started = (
        resident_mb(),
        resource.getrusage(resource.RUSAGE_SELF),
        time.perf_counter(),
    )
    groups = rollout.generate(
        model,
        prompts,
        cfg.group,
        rollout.Sampling(lengths, seed=cfg.seed, rows=rows),
        rollout.Hooks(on_forward=lambda what, n, cache: forwards.append((what, n))),
    )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    tokens = sum(len(r.ids) for group in groups for r in group)
    assert tokens == sum(lengths), "the sampler did not return the lengths asked for"
    steps = [n for what, n in forwards if what == "step"]
    c, size = model.config, model.head.element_size()
    slot = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * size
    weights = sum(p.numel() for p in model.parameters()) * size
    unread = (
        0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size * size
    )  # a step looks up n rows of it
    read = len(steps) * (weights - unread) + slot * sum(
        n * len(p) + n * (n + 1) // 2
        for p, n in zip((p for p in prompts for _ in range(cfg.group)), lengths)
    )
    peak = after.ru_maxrss / (1024 if sys.platform == "linux" else 2**20)
    if device.type == "cuda":
        before, peak = 0.0, torch.cuda.max_memory_allocated() / 2**20
    limit = bandwidth(device)  # only now: its buffer is not the sampler's memory
    return {
        "rows": rows,
        "tokens": tokens,
        "seconds": wall,
        "steps": len(steps),
        "cpu_seconds": after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime,
        "ms_per_step": 1e3 * wall / len(steps),
        "slot_use": tokens / (len(steps) * rows),
        "rows_per_token": sum(steps) / tokens,
        "mbu": read / wall / limit,
        "bandwidth_gb_s": limit / 1e9,
        "peak_mb": peak,
        "grown_mb": peak - before,
        "weights_mb": weights / 2**20,
        "cache_mb": slot * min(rows, len(lengths)) * (cfg.prompt_tokens + max(lengths) - 1) / 2**20,
    }


def run_once(cfg: Rollout, side: str, batch: int, work: Path) -> dict:
    """One run in a process of its own: side is ours, static or continuous."""
    if side == "ours":
        flags = {**asdict(cfg), "batches": batch, "repeats": 1}
        command = [sys.executable, __file__, "rollout", "--json"]
        for name in (
            "model",
            "dtype",
            "prompts",
            "group",
            "prompt_tokens",
            "mean_new",
            "max_new",
            "batches",
            "repeats",
            "threads",
            "seed",
        ):
            command += ["--" + name.replace("_", "-"), str(flags[name])]
    else:
        command = [
            cfg.peer_python,
            str(PEERS / "generate_hf.py"),
            "--model",
            cfg.model,
            "--work",
            str(work),
            "--mode",
            side,
            "--batch",
            str(batch),
            "--dtype",
            cfg.dtype,
            "--threads",
            str(cfg.threads),
        ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment_of(cfg))
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"{side}, batch {batch}: {reason[:200]}; --peer-python names a python with transformers 5"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def middle_of(results: list[dict]) -> dict:
    """The median of each number over rounds; what is no number is the same in all."""
    return {
        key: statistics.median(r[key] for r in results)
        if isinstance(value, (int, float))
        else value
        for key, value in results[0].items()
    }


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
        work.write_text(
            json.dumps(
                {"prompts": [p for p in prompts for _ in range(cfg.group)], "lengths": lengths}
            )
        )
        for n in range(cfg.repeats):
            for batch in batches:
                for side in sides:
                    result = run_once(cfg, side, batch, work)
                    runs.setdefault((side, batch), []).append(result)
                    rates = [result["tokens"] / result[cost] for cost in ("seconds", "cpu_seconds")]
                    say(
                        f"round {n + 1}  batch {batch:3d}  {side:10s} {rates[0]:8.1f} tokens/s  {rates[1]:8.1f} "
                        f"tokens/CPU-s  {result['peak_mb']:6.0f} MB"
                    )
    best = {}
    for (side, batch), results in runs.items():
        middle = middle_of(results)
        for rate, cost in (("tokens_per_s", "seconds"), ("tokens_per_cpu_s", "cpu_seconds")):
            middle[rate] = middle["tokens"] / middle[cost]
        if side not in best or middle["tokens_per_s"] > best[side]["tokens_per_s"]:
            best[side] = {**middle, "rows": batch}
    ours = best["ours"]
    for side in sides[1:]:
        ours[f"ratio_{side}"] = ours["tokens_per_s"] / best[side]["tokens_per_s"]
        ours[f"ratio_{side}_cpu"] = ours["tokens_per_cpu_s"] / best[side]["tokens_per_cpu_s"]
        ours |= {
            f"{side}_{key}": best[side][key]
            for key in ("rows", "tokens_per_s", "tokens_per_cpu_s", "peak_mb")
        }
    return ours


def bench_rollout(cfg: Rollout) -> None:
    def say(line):
        if not cfg.json:
            print(line, flush=True)

    alone = not cfg.peer and cfg.repeats == 1 and cfg.batches.isdigit() and cfg.model not in SHAPES
    if alone:
        result = measure(cfg, int(cfg.batches))
        result |= {
            "tokens_per_s": result["tokens"] / result["seconds"],
            "tokens_per_cpu_s": result["tokens"] / result["cpu_seconds"],
        }
    else:
        result = compare(cfg, say)
    say(
        "{rows} rows: {tokens_per_s:.1f} tokens/s, {ms_per_step:.1f} ms a step, slot use {slot_use:.2f}, rows computed "
        "per token {rows_per_token:.3f}, MBU {mbu:.0%} of {bandwidth_gb_s:.1f} GB/s, peak {peak_mb:.0f} MB".format(
            **result
        )
    )
    for side in ("static", "continuous") if cfg.peer else ():
        say(
            f"{result[f'ratio_{side}']:.2f}x transformers, {side} ({result[f'ratio_{side}_cpu']:.2f}x in CPU time)"
        )
    print(
        json.dumps(
            {
                "bench": "rollout",
                "model": cfg.model,
                "dtype": cfg.dtype,
                "threads": cfg.threads,
                **{k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()},
            }
        )
    )


# ------------------------------------------------------------------------------------------------------------- training
@dataclass
class Training:
    model: str = (
        "small"  # tiny, small (39M), 0.5b, 1.5b: random weights of that shape; or a model folder
    )
    dtype: Literal["fp32", "bf16"] = "fp32"  # to compute in; weights and optimizer stay fp32
    steps: int = 2  # optimizer steps counted, after one that is not
    micro_tokens: int = 1024  # tokens a micro-batch of ours, padding included
    peer_rows: int = 4  # rows a forward of the peers
    recompute: bool = False  # activation checkpointing, on all sides
    flags: str = ""  # further flags for our script
    repeats: int = 3  # rounds; the median counts
    threads: int = 1  # of each process; two busy ones on shared cores slow each other down
    seed: int = 0  # of rows and weights
    peer: bool = False  # also run the peers
    peer_python: str = (
        sys.executable
    )  # the interpreter that has transformers, trl, datasets and accelerate
    json: bool = False  # print the last line only

    def __post_init__(self):
        check(self)


@dataclass
class Sft(Training):
    rows: int = 24  # rows an optimizer step
    micro_tokens: int = 512  # tokens a micro-batch of ours, padding included
    longest: int = (
        256  # tokens of the longest row; lengths are 32 + geometric of mean longest / 4, cut there
    )
    fixed: bool = False  # all rows have the longest's length


@dataclass
class Rl(Training):
    prompts: int = 8  # prompts a step
    group: int = 8  # responses to each
    prompt_tokens: int = 64  # tokens a prompt
    max_new: int = 128  # tokens a response: all of them, but for a rare EOS


def sft_rows(cfg: Sft, vocab: int) -> list[list[int]]:
    """Token ids of all rows of all steps; each ends with EOS, which is token 0."""
    g, n = ranks.generator(cfg.seed, "bench", "sft"), cfg.rows * (cfg.steps + 1)
    lengths = (
        torch.empty(n, dtype=torch.float64).exponential_(4 / cfg.longest, generator=g).long() + 32
    )
    lengths = lengths.clamp(max=cfg.longest) if not cfg.fixed else torch.full((n,), cfg.longest)
    return [
        [*torch.randint(10, min(vocab, 4000), (n - 1,), generator=g).tolist(), 0]
        for n in lengths.tolist()
    ]


def words(ids: list[int]) -> str:
    """The text whose tokens are these, for word_tokenizer()."""
    return " ".join(f"w{i}" for i in ids)


def word_tokenizer(folder: Path, vocab: int) -> None:
    """tokenizer.json in which token i is the word "w<i>" and token 0 is EOS, so that texts have exact lengths."""
    eos = {
        "id": 0,
        "content": "<eos>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    table = {"<eos>": 0, **{f"w{i}": i for i in range(1, vocab)}}
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [eos],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": table, "unk_token": "<eos>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "pad_token": "<eos>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def training_folder(cfg: Training, folder: Path) -> int:
    """The model to train with the word tokenizer; a given folder's weights are linked, not copied. Returns V."""
    if cfg.model in SHAPES:
        make_folder(cfg, folder)
    else:
        folder.mkdir()
        for path in [*Path(cfg.model).glob("*.safetensors*"), Path(cfg.model) / "config.json"]:
            (folder / path.name).symlink_to(path.resolve())
    vocab = model_file.read_config(folder).vocab_size
    word_tokenizer(folder, vocab)
    return vocab


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOPs a second of the best of 5 square matrix products."""
    n = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(6):
        started = time.perf_counter()
        float((a @ b)[0, 0])
        best = max(best, 2 * n**3 / (time.perf_counter() - started))
    return best


def counters(pid: int) -> tuple[float, float]:
    """(CPU seconds, MB of the largest memory so far) of another process, from /proc; 0 where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0, 0.0
    seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds, int(status.partition("VmHWM:")[2].split()[0]) / 1024


def run_script(
    command: list[str], out: Path, n_lines: int, environment: dict
) -> tuple[list[dict], float, float]:
    """(train lines of a training script's metrics, CPU seconds between the first and the last, peak MB meanwhile).
    The process is ended after the last: what follows is its final checkpoint."""
    errors, marks, lines = out.parent / "stderr", [], []
    with open(errors, "w") as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env=environment)
    while process.poll() is None and len(lines) < n_lines:
        time.sleep(0.02)
        path = out / "metrics.jsonl"
        rows = files.read_jsonl(path, broken_tail=True) if path.exists() else []
        lines = [row for row in rows if row["kind"] == "train"]
        while len(marks) < len(lines):
            marks.append(counters(process.pid))
            if len(marks) == 1 and Path(f"/proc/{process.pid}/clear_refs").exists():
                Path(f"/proc/{process.pid}/clear_refs").write_text(
                    "5"
                )  # the peak is counted anew from here
    process.kill()
    process.wait()
    if len(lines) < n_lines:
        reason = (errors.read_text().strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{' '.join(command[1:4])} ...: {reason[:200]}; see --flags")
    return lines, marks[-1][0] - marks[0][0], lines[-1].get("peak_mb", marks[-1][1])


def run_ours(cfg: Training, folder: Path, round: int) -> dict:
    """Our script on the files in the folder: what it took from the end of its first step to the end of its last."""
    name, out = type(cfg).__name__.lower(), folder / f"ours{round}"
    flags = {
        "init": folder / "model",
        "data": folder / "rows.jsonl",
        "val": folder / "val.jsonl",
        "out": out / "run",
        "steps": cfg.steps + 1,
        "micro-tokens": cfg.micro_tokens,
        "eval-every": 10**6,
        "lr": 1e-4,
        "seed": cfg.seed,
    }
    if name == "sft":
        flags |= {"batch": cfg.rows, "max-len": cfg.longest, "schedule": "constant", "warmup": 0.0}
    else:
        flags |= {
            "algo": "grpo",
            "prompts": cfg.prompts,
            "update-prompts": cfg.prompts,
            "group": cfg.group,
            "temperature": 1.0,
            "max-new": cfg.max_new,
            "rows": cfg.prompts * cfg.group,
            "eval-n": 1,
        }
    command = [
        sys.executable,
        str(Path(__file__).with_name(f"{name}.py")),
        *cfg.flags.split(),
        "--recompute" if cfg.recompute else "--no-recompute",
    ] + ["--bf16"] * (cfg.dtype == "bf16")
    command += [str(word) for flag, value in flags.items() for word in ("--" + flag, value)]
    out.mkdir()
    lines, cpu, peak = run_script(command, out / "run", cfg.steps + 1, environment_of(cfg))
    first, *rest = lines
    tokens = rest[-1]["tokens"] - first["tokens"]
    if name == "rl":
        tokens = sum(line["length"] for line in rest) * cfg.prompts * cfg.group  # of responses
    found = {
        "seconds": rest[-1]["seconds"] - first["seconds"],
        "cpu_seconds": cpu,
        "tokens": tokens,
        "peak_mb": peak,
        "flops": (rest[-1]["flops_hw"] - first["flops_hw"])
        * (0.75 if cfg.recompute and name == "sft" else 1),
    }
    parts = (
        ("data_s", "train_s", "update_s")
        if name == "sft"
        else ("sample_s", "score_s", "logp_s", "update_s")
    )
    shutil.rmtree(out)  # checkpoints of several hundred MB
    return found | {part: statistics.mean(line[part] for line in rest) for part in parts}


def environment_of(cfg) -> dict:
    return {**os.environ, "OMP_NUM_THREADS": str(cfg.threads)}


def run_peer(cfg: Training, folder: Path, side: str) -> dict:
    """A peer's script on the same rows: side is pack, nopack or loop (SFT), trl (RL)."""
    script = "sft_trl.py" if isinstance(cfg, Sft) else "grpo_trl.py"
    command = [
        cfg.peer_python,
        str(PEERS / script),
        "--model",
        str(folder / "model"),
        "--work",
        str(folder / "work.json"),
        "--micro",
        str(cfg.peer_rows),
        "--dtype",
        cfg.dtype,
        "--threads",
        str(cfg.threads),
        *["--checkpointing"] * cfg.recompute,
    ]
    command += (
        ["--mode", side]
        if isinstance(cfg, Sft)
        else ["--group", str(cfg.group), "--max-new", str(cfg.max_new)]
    )
    done = subprocess.run(command, capture_output=True, text=True, env=environment_of(cfg))
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"{script}, {side}: {reason[:200]}; --peer-python names a python with transformers 5, trl, "
            "datasets and accelerate"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def write_work(cfg: Training, folder: Path, vocab: int) -> None:
    """Rows or prompts as text for our script and as the peers read them."""
    if isinstance(cfg, Sft):
        rows = sft_rows(cfg, vocab)
        ours, val = [{"text": words(row[:-1])} for row in rows], [{"text": "w11 w12 w13"}]
        work = {"rows": rows, "per_step": cfg.rows, "seq": cfg.longest}
    else:
        g, n = ranks.generator(cfg.seed, "bench", "rl"), cfg.prompts * (cfg.steps + 1)
        prompts = torch.randint(10, min(vocab, 4000), (n, cfg.prompt_tokens), generator=g).tolist()
        ours = [{"prompt": words(prompt), "answer": "1"} for prompt in prompts]
        val, work = ours[:1], {"prompts": [row["prompt"] for row in ours], "per_step": cfg.prompts}
    (folder / "work.json").write_text(json.dumps(work))
    for name, lines in (("rows", ours), ("val", val)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def bench_training(cfg: Training) -> None:
    """All sides in turn, round after round; medians, and TRL at the better of its modes."""
    name, runs = type(cfg).__name__.lower(), {}
    sides = ["ours"] + (
        (["pack", "nopack", "loop"] if name == "sft" else ["trl"]) if cfg.peer else []
    )
    torch.set_num_threads(cfg.threads)
    peak = matmul_peak(
        DTYPES[cfg.dtype], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        vocab = training_folder(cfg, folder / "model")
        write_work(cfg, folder, vocab)
        for n in range(cfg.repeats):
            for side in sides:
                found = run_ours(cfg, folder, n) if side == "ours" else run_peer(cfg, folder, side)
                found |= {
                    rate: found["tokens"] / max(1e-9, found[cost])
                    for rate, cost in (
                        ("tokens_per_s", "seconds"),
                        ("tokens_per_cpu_s", "cpu_seconds"),
                    )
                }
                runs.setdefault(side, []).append(found)
                if not cfg.json:
                    print(
                        f"round {n + 1}  {side:7s} {found['tokens_per_s']:8.1f} tokens/s  "
                        f"{found['tokens_per_cpu_s']:8.1f} tokens/CPU-s  {found['peak_mb']:6.0f} MB",
                        flush=True,
                    )
    middle = {side: middle_of(results) for side, results in runs.items()}
    result = middle.pop("ours")
    result |= {"mfu": result.pop("flops") / result["seconds"] / peak, "matmul_gflops": peak / 1e9}
    if name == "sft":
        lengths = [len(row) for row in sft_rows(cfg, vocab)]
        steps = [
            data.plan(len(lengths), cfg.seed, first, cfg.rows)
            for first in range(0, len(lengths), cfg.rows)
        ]
        result["padding"] = statistics.mean(
            data.padding([lengths[i] for i in step], cfg.micro_tokens) for step in steps
        )  # %
    for rival, modes in (("trl", middle.keys() - {"loop"}), ("loop", middle.keys() & {"loop"})):
        if modes:
            best = max(modes, key=lambda side: middle[side]["tokens_per_s"])
            result |= {
                f"ratio_{rival}{end}": result[rate] / middle[best][rate]
                for rate, end in (("tokens_per_s", ""), ("tokens_per_cpu_s", "_cpu"))
            }
            result |= {
                f"{rival}_{key}": middle[best][key]
                for key in ("tokens_per_s", "tokens_per_cpu_s", "peak_mb")
            }
            result[f"{rival}_mode"] = best
    tell(cfg, name, result)


def tell(cfg: Training, name: str, result: dict) -> None:
    """The result in a line or two, then as JSON."""
    if not cfg.json:
        split = "  ".join(
            f"{key[:-2]} {value:.2f} s"
            for key, value in result.items()
            if key.endswith("_s") and key.count("_") == 1 and "tokens" not in key
        )
        print(
            "{tokens_per_s:.1f} tokens/s, MFU {mfu:.0%} of {matmul_gflops:.0f} GFLOP/s, peak {peak_mb:.0f} MB".format(
                **result
            )
            + f"; a step: {split}"
        )
        for rival, title in (("trl", "TRL"), ("loop", "the plain loop")):
            if f"ratio_{rival}" in result:
                share = result["peak_mb"] / result[f"{rival}_peak_mb"]
                print(
                    f"{result[f'ratio_{rival}']:.2f}x {title} ({result[f'{rival}_mode']}; "
                    f"{result[f'ratio_{rival}_cpu']:.2f}x in CPU time) in {share:.2f} of its memory"
                )
    print(
        json.dumps(
            {
                "bench": name,
                "model": cfg.model,
                "dtype": cfg.dtype,
                "threads": cfg.threads,
                **{k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()},
            }
        )
    )


COMMANDS = {
    "rollout": (bench_rollout, Rollout),
    "sft": (bench_training, Sft),
    "rl": (bench_training, Rl),
}


def start() -> None:
    """The first word picks what is measured; the flags are its own."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        print(__doc__)
        if name not in ("-h", "--help"):
            print(
                f"error: {name or 'nothing'} to measure; give one of: {', '.join(COMMANDS)}",
                file=sys.stderr,
            )
            sys.exit(2)
        return
    del sys.argv[1]
    cli.cli(*COMMANDS[name])


if __name__ == "__main__":
    start()
