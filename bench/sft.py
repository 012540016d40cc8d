"""A step of sft.py: tokens per second, MFU and memory.

    python -m bench sft                                         39M random parameters
    python -m bench sft --peer --peer-python /path/to/python    beside TRL and a plain loop

TRL is given the same rows and counts at the better of packing on and off.
MFU: FLOPs that the model needs (recomputed ones not counted) over the best matrix product's.
"""

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import data
import model as model_file
from bench import measure, training
from core import flops, ranks

PARTS = ("data_s", "train_s", "update_s")


@dataclass
class Config(training.Training):
    rows: int = 24  # rows per optimizer step
    micro_tokens: int = 512  # tokens per micro-batch of ours, padding included
    longest: int = 256  # tokens of the longest row; lengths are 32 + exponential, mean a quarter
    fixed: bool = False  # all rows are as long as the longest


def make_rows(cfg: Config, vocab: int) -> list[list[int]]:
    """Token ids of all rows of all steps; each ends with EOS, which is token 0."""
    g = ranks.generator(cfg.seed, "bench", "sft")
    n_rows = cfg.rows * (cfg.steps + 1)
    lengths = torch.empty(n_rows, dtype=torch.float64).exponential_(4 / cfg.longest, generator=g)
    lengths = (lengths.long() + 32).clamp(max=cfg.longest)
    if cfg.fixed:
        lengths = torch.full((n_rows,), cfg.longest)
    rows = []
    for n in lengths.tolist():
        tokens = torch.randint(10, min(vocab, 4000), (n - 1,), generator=g)
        rows.append([*tokens.tolist(), 0])
    return rows


def write_work(cfg: Config, folder: Path, rows: list[list[int]]) -> None:
    texts = [{"text": training.words(row[:-1])} for row in rows]
    work = {"rows": rows, "per_step": cfg.rows, "seq": cfg.longest}
    training.write_work(folder, texts, [{"text": "w11 w12 w13"}], work)


def run_ours(cfg: Config, folder: Path) -> dict:
    flags = {"batch": cfg.rows, "max-len": cfg.longest, "schedule": "constant", "warmup": 0.0}
    return training.run_ours("sft.py", cfg, flags, folder, PARTS)


def needed_flops(cfg: Config, rows: list[list[int]], config) -> float:
    """FLOPs of the counted steps, nothing recomputed; each row's first token is only read."""
    picked = data.plan(len(rows), cfg.seed, cfg.rows, cfg.rows * cfg.steps)
    lengths = [len(rows[i]) for i in picked]
    n_trained = sum(lengths) - len(lengths)
    return 3 * flops.hardware_flops(config, lengths, n_trained)  # a backward is two forwards


def main(cfg: Config) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = make_rows(cfg, training.make_folder(cfg, folder / "model"))
        write_work(cfg, folder, rows)
        sides = {"ours": partial(run_ours, cfg, folder)}
        for mode in ("pack", "nopack", "loop") if cfg.peer else ():
            flags = ["--mode", mode]
            sides[mode] = partial(training.run_peer, "sft_trl.py", cfg, flags, folder)
        found = measure.take_turns(cfg, sides)
        config = model_file.read_config(folder / "model")
    result = found.pop("ours")
    result["flops"] = needed_flops(cfg, rows, config)
    training.add_mfu(cfg, result)
    if cfg.peer:
        measure.compare(result, "loop", {"loop": found.pop("loop")})
        measure.compare(result, "trl", found)
    measure.report("sft", cfg, result, training.summary(PARTS))
