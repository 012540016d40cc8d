"""What `bench sft` and `bench rl` share: the real scripts, run on made-up texts of exact lengths.

What a run took is read from its metrics.jsonl and from the system's counters of that process, from
the end of the first step to the end of the last.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch

import model as model_file
from bench import measure
from core import files
from core.errors import UserError


@dataclass
class Training(measure.Common):
    steps: int = 2  # optimizer steps counted, after one that is not
    micro_tokens: int = 1024  # tokens per micro-batch of ours, padding included
    peer_rows: int = 4  # rows per forward of the peers
    recompute: bool = False  # activation checkpointing, on all sides
    flags: str = ""  # further flags for our script


# ---- the files
def words(ids: list[int]) -> str:
    """The text whose tokens these are."""
    return " ".join(f"w{i}" for i in ids)


def write_tokenizer(folder: Path, vocab: int) -> None:
    """A tokenizer in which token i is the word "w<i>" and token 0 is EOS: lengths are exact."""
    table = {"<eos>": 0} | {f"w{i}": i for i in range(1, vocab)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token="<eos>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def make_folder(cfg: Training, folder: Path) -> int:
    """The model to train, with that tokenizer; a given folder's weights are linked. Returns V."""
    if cfg.model in measure.SHAPES:
        measure.make_model(cfg, folder)
    else:
        folder.mkdir()
        for path in [*Path(cfg.model).glob("*.safetensors*"), Path(cfg.model) / "config.json"]:
            (folder / path.name).symlink_to(path.resolve())
    vocab = model_file.read_config(folder).vocab_size
    write_tokenizer(folder, vocab)
    return vocab


def write_work(folder: Path, rows: list[dict], val: list[dict], work: dict) -> None:
    """Rows for our script, and the same as the peers read them."""
    for name, lines in (("rows", rows), ("val", val)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "work.json").write_text(json.dumps(work))


# ---- the runs
def counters(pid: int) -> tuple[float, float]:
    """(CPU seconds, peak MB) of a process so far, from /proc; zeros where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0, 0.0
    seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds, int(status.partition("VmHWM:")[2].split()[0]) / 1024


def follow(process, metrics: Path, n_lines: int) -> tuple[list[dict], list[tuple[float, float]]]:
    """(train lines, the counters at each), until there are n_lines or the process ends."""
    lines: list[dict] = []
    marks: list[tuple[float, float]] = []
    reset = Path(f"/proc/{process.pid}/clear_refs")
    while process.poll() is None and len(lines) < n_lines:
        time.sleep(0.02)
        if metrics.exists():
            rows = files.read_jsonl(metrics, broken_tail=True)
            lines = [row for row in rows if row["kind"] == "train"]
        while len(marks) < len(lines):
            marks.append(counters(process.pid))
            if len(marks) == 1 and reset.exists():
                reset.write_text("5")  # the peak is counted anew from here
    return lines, marks


def command_of(script: str, cfg: Training, flags: dict, folder: Path) -> list[str]:
    """The script on the files in the folder, without evaluations."""
    given = {
        "init": folder / "model",
        "data": folder / "rows.jsonl",
        "val": folder / "val.jsonl",
        "out": folder / "out",
        "steps": cfg.steps + 1,
        "micro-tokens": cfg.micro_tokens,
        "eval-every": 10**6,
        "lr": 1e-4,
        "seed": cfg.seed,
    }
    command = [sys.executable, str(measure.ROOT / script), *cfg.flags.split()]
    command.append("--recompute" if cfg.recompute else "--no-recompute")
    command.append("--bf16" if cfg.dtype == "bf16" else "--no-bf16")
    for flag, value in {**given, **flags}.items():
        command += [f"--{flag}", str(value)]
    return command


def run_ours(script: str, cfg: Training, flags: dict, folder: Path, means: tuple[str, ...]) -> dict:
    """Run sft.py or rl.py; what it took, and the means of these numbers of its log.

    It is ended after the last step: what follows is its final checkpoint.
    """
    errors = folder / "stderr"
    with open(errors, "w") as log:
        process = subprocess.Popen(
            command_of(script, cfg, flags, folder),
            stdout=subprocess.DEVNULL,
            stderr=log,
            env=measure.environment(cfg.threads),
        )
    try:
        lines, marks = follow(process, folder / "out" / "metrics.jsonl", cfg.steps + 1)
    finally:
        process.kill()
        process.wait()
    if len(lines) < cfg.steps + 1:
        raise UserError(f"{script}: {measure.last_line(errors.read_text())}; see --flags")
    shutil.rmtree(folder / "out")  # checkpoints of several hundred MB
    first, *rest = lines
    found = {
        "seconds": rest[-1]["seconds"] - first["seconds"],
        "cpu_seconds": marks[-1][0] - marks[0][0],
        "tokens": rest[-1]["tokens"] - first["tokens"],
        "peak_mb": rest[-1].get("peak_mb", marks[-1][1]),  # CUDA: the script knows
        "flops": rest[-1]["flops_hw"] - first["flops_hw"],
    }
    for name in means:
        found[name] = statistics.mean(line[name] for line in rest)
    return found


def run_peer(script: str, cfg: Training, flags: list, folder: Path) -> dict:
    """A peer's script on the same rows."""
    flags = [*flags, "--micro", cfg.peer_rows, *["--checkpointing"] * cfg.recompute]
    return measure.run_peer(script, cfg, folder / "model", folder / "work.json", *flags)


def add_mfu(cfg: Training, result: dict) -> None:
    """MFU in place of the FLOPs: their share of the best matrix product of the same type here."""
    torch.set_num_threads(cfg.threads)
    peak = measure.matmul_peak(measure.DTYPES[cfg.dtype], measure.DEVICE)
    result["mfu"] = result.pop("flops") / result["seconds"] / peak
    result["matmul_gflops"] = peak / 1e9


def summary(parts: tuple[str, ...]) -> str:
    """A line with the speed and the split of a step, to be formatted with the result."""
    split = "  ".join(f"{part.removesuffix('_s')} {{{part}:.2f}} s" for part in parts)
    return (
        "{tokens_per_s:.1f} tokens/s, MFU {mfu:.0%} of {matmul_gflops:.0f} GFLOP/s, "
        "peak {peak_mb:.0f} MB; a step: " + split
    )
