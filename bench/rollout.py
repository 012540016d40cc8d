"""The sampler: tokens per second, and the share of the memory's bandwidth that it uses.

    python -m bench rollout                                              39M random parameters
    python -m bench rollout --model FOLDER --dtype bf16 --batches 64     any model folder
    python -m bench rollout --peer --peer-python /path/to/python         beside transformers

Lengths are drawn beforehand and forced, so no side is lucky. Tokens are those asked for: what a
finished row computes on is not counted. Each side counts at its best number of rows.
MBU: bytes that decoding has to read (all weights once per step, keys and values of the live rows)
per second, over the bandwidth that is measured right after.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

import model as model_file
import rollout as sampler
from bench import measure
from core import ranks
from core.errors import UserError

PEER_SIDES = ("static", "continuous")
WORKLOAD = ("model", "dtype", "prompts", "group", "prompt_tokens", "mean_new", "max_new", "seed")


@dataclass
class Config(measure.Common):
    prompts: int = 8  # different prompts
    group: int = 8  # responses per prompt
    prompt_tokens: int = 64  # tokens per prompt
    mean_new: int = 96  # mean tokens per response; lengths are geometric
    max_new: int = 256  # longer responses are cut here
    batches: str = "8,16,64"  # numbers of rows to try; the best counts

    def __post_init__(self):
        if not all(rows.isdigit() and int(rows) for rows in self.batches.split(",")):
            raise UserError(f"--batches {self.batches}: give numbers of rows, such as 8,16,64")
        super().__post_init__()


def workload(cfg: Config, vocab: int) -> tuple[list[list[int]], list[int]]:
    """(prompts, length of each response): a function of the configuration alone."""
    g = ranks.generator(cfg.seed, "bench", "rollout")
    prompts = torch.randint(3, min(vocab, 4000), (cfg.prompts, cfg.prompt_tokens), generator=g)
    lengths = torch.empty(cfg.prompts * cfg.group, dtype=torch.float64)
    lengths.geometric_(1 / cfg.mean_new, generator=g)
    return prompts.tolist(), lengths.clamp_(1, cfg.max_new).long().tolist()


def bytes_to_read(model, cfg: Config, lengths: list[int], n_steps: int) -> float:
    """The weights once per step, and per token the keys and values of all tokens before it."""
    c = model.config
    size = model.head.element_size()
    weights = sum(p.numel() for p in model.parameters())
    if not c.tie_word_embeddings:  # a step looks up a row per token of the input embedding
        weights -= c.vocab_size * c.hidden_size
    slot = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    slots = sum(n * cfg.prompt_tokens + n * (n + 1) // 2 for n in lengths)
    return size * (n_steps * weights + slots * slot)


def sample(model, cfg: Config, rows: int) -> dict:
    """Sample the workload once, with so many rows, and count what the model computed for it."""
    device = model.head.device
    prompts, lengths = workload(cfg, model.config.vocab_size)
    steps: list[int] = []  # rows computed in each

    def count(kind, n_rows, cache):
        if kind == "step":
            steps.append(n_rows)

    settings = sampler.Sampling(max_new=lengths, seed=cfg.seed, rows=rows)
    hooks = sampler.Hooks(on_forward=count)
    sampler.generate(model, prompts[:1], 2, replace(settings, max_new=3))  # warm-up
    wall, cpu = measure.spent()
    groups = sampler.generate(model, prompts, cfg.group, settings, hooks)
    wall_end, cpu_end = measure.spent()
    seconds = wall_end - wall
    peak = measure.peak_mb(device)
    tokens = 0
    for group in groups:
        tokens += sum(len(response.ids) for response in group)
    assert tokens == sum(lengths), "the sampler did not return the lengths asked for"
    limit = measure.bandwidth(device)  # only now: its buffer is not the sampler's memory
    return {
        "rows": rows,
        "tokens": tokens,
        "seconds": seconds,
        "cpu_seconds": cpu_end - cpu,
        "steps": len(steps),
        "ms_per_step": 1e3 * seconds / len(steps),
        "slot_use": tokens / (len(steps) * rows),
        "rows_per_token": sum(steps) / tokens,
        "mbu": bytes_to_read(model, cfg, lengths, len(steps)) / seconds / limit,
        "bandwidth_gb_s": limit / 1e9,
        "peak_mb": peak,
        "weights_mb": sum(p.nbytes for p in model.parameters()) / 2**20,
    }


def run_ours(cfg: Config, rows: int) -> dict:
    """One run in a process of its own: this command again, with one number of rows."""
    command = [sys.executable, "-m", "bench", "rollout", "--json"]
    command += ["--batches", str(rows), "--repeats", "1", "--threads", str(cfg.threads)]
    for name in WORKLOAD:
        command += ["--" + name.replace("_", "-"), str(getattr(cfg, name))]
    found = measure.run_json(command, cfg, f"ours, {rows} rows")
    return {key: value for key, value in found.items() if not isinstance(value, str)}


def run_all(cfg: Config) -> dict:
    """All sides at all numbers of rows, in turn; each side counts at its best number."""
    sides = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if cfg.model in measure.SHAPES:
            measure.make_model(cfg, folder / "model")
            cfg = replace(cfg, model=str(folder / "model"))
        prompts, lengths = workload(cfg, model_file.read_config(cfg.model).vocab_size)
        requests = [prompt for prompt in prompts for _ in range(cfg.group)]
        work = folder / "work.json"
        work.write_text(json.dumps({"prompts": requests, "lengths": lengths}))
        peer = partial(measure.run_peer, "generate_hf.py", cfg, cfg.model, work)
        for rows in map(int, cfg.batches.split(",")):
            sides[f"ours {rows}"] = partial(run_ours, cfg, rows)
            for side in PEER_SIDES if cfg.peer else ():
                sides[f"{side} {rows}"] = partial(peer, "--mode", side, "--batch", rows)
        found = measure.take_turns(cfg, sides)
    ours = {name: numbers for name, numbers in found.items() if name.startswith("ours")}
    result = ours[measure.best_of(ours)]
    for side in PEER_SIDES if cfg.peer else ():
        theirs = {name: numbers for name, numbers in found.items() if name.startswith(side)}
        result = measure.compare(result, side, theirs)
    return result


def main(cfg: Config) -> None:
    one_run = cfg.repeats == 1 and cfg.batches.isdigit() and not cfg.peer
    if one_run and cfg.model not in measure.SHAPES:
        torch.set_num_threads(cfg.threads)
        model = model_file.load_model(cfg.model, measure.DTYPES[cfg.dtype], ranks.start())
        result = measure.with_rates(sample(model, cfg, int(cfg.batches)))
    else:
        result = run_all(cfg)
    summary = (
        "{rows} rows: {tokens_per_s:.1f} tokens/s, {ms_per_step:.1f} ms per step, "
        "slot use {slot_use:.2f}, rows computed per token {rows_per_token:.3f}, "
        "MBU {mbu:.0%} of {bandwidth_gb_s:.1f} GB/s, peak {peak_mb:.0f} MB"
    )
    measure.report("rollout", cfg, result, summary)
