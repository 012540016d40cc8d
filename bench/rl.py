"""A whole step of rl.py (sampling, scoring, update): response tokens per second, MFU and memory.

    python -m bench rl                                          39M random parameters
    python -m bench rl --peer --peer-python /path/to/python     beside TRL's GRPO

MFU: FLOPs that were computed (recomputed ones too) over the best matrix product's.
"""

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bench import measure, training
from core import ranks

PARTS = ("sample_s", "score_s", "logp_s", "update_s")


@dataclass
class Config(training.Training):
    prompts: int = 8  # prompts per step
    group: int = 8  # responses per prompt
    prompt_tokens: int = 64  # tokens per prompt
    max_new: int = 128  # tokens per response: all of them, but for a rare EOS


def write_work(cfg: Config, folder: Path, vocab: int) -> None:
    g = ranks.generator(cfg.seed, "bench", "rl")
    shape = (cfg.prompts * (cfg.steps + 1), cfg.prompt_tokens)
    tokens = torch.randint(10, min(vocab, 4000), shape, generator=g)
    prompts = [training.words(ids) for ids in tokens.tolist()]
    rows = [{"prompt": prompt, "answer": "1"} for prompt in prompts]
    training.write_work(folder, rows, rows[:1], {"prompts": prompts, "per_step": cfg.prompts})


def run_ours(cfg: Config, folder: Path) -> dict:
    flags = {
        "algo": "grpo",
        "reward": measure.ROOT / "bench" / "reward.py",  # without a signal there is no update
        "prompts": cfg.prompts,
        "update-prompts": cfg.prompts,
        "group": cfg.group,
        "temperature": 1.0,
        "max-new": cfg.max_new,
        "rows": cfg.prompts * cfg.group,
        "eval-n": 1,
    }
    found = training.run_ours("rl.py", cfg, flags, folder, (*PARTS, "length", "gap"))
    responses = cfg.steps * cfg.prompts * cfg.group
    return found | {"tokens": found["length"] * responses}  # prompts are not counted


def main(cfg: Config) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_work(cfg, folder, training.make_folder(cfg, folder / "model"))
        sides = {"ours": partial(run_ours, cfg, folder)}
        if cfg.peer:
            flags = ["--group", cfg.group, "--max-new", cfg.max_new]
            sides["trl"] = partial(training.run_peer, "grpo_trl.py", cfg, flags, folder)
        found = measure.take_turns(cfg, sides)
    result = found.pop("ours")
    training.add_mfu(cfg, result)
    if cfg.peer:
        measure.compare(result, "trl", found)
    measure.report("rl", cfg, result, training.summary(PARTS))
