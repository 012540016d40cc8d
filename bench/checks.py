"""The first part of `bench gpu`: is this device right?

Its log-probs and gradients against the CPU's, the decode step against the forward, CUDA graphs
against none, a resumed run against a whole one. Each check returns its difference and the allowed
one. The models are tiny: a wrong kernel, mask or position shows at any size.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

import model as model_file
import rollout as sampler
from bench import measure, sft, training
from bench.measure import DEVICE
from core import decode, files, ranks


def check(difference: float, allowed: float) -> dict:
    return {"difference": difference, "allowed": allowed, "ok": difference <= allowed}


def tiny_model(dtype: torch.dtype, device: torch.device) -> model_file.Model:
    """The tiny shape with large weights: its logits differ, so a wrong position or mask shows."""
    model = model_file.init_model(measure.shape("tiny"), 0)
    for p in model.parameters():
        if p.ndim == 2:
            p.data.mul_(5)
    return model.to(device, dtype)


def batch(rows: int, tokens: int, n_read: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask (rows, tokens): all tokens but each row's first n_read are trained."""
    g = ranks.generator(0, "bench", "gpu")
    ids = torch.randint(10, 160, (rows, tokens), generator=g)
    mask = (torch.arange(tokens) >= n_read).expand(rows, tokens)
    return ids, mask


def logp_and_gradient(dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    model = tiny_model(dtype, device)
    ids, mask = batch(4, 48)
    logp, entropy, _ = model_file.response_logp(model, ids.to(device), mask, entropy=True)
    (logp.mean() + entropy.mean()).backward()
    found = {"logp": logp, "entropy": entropy, "gradient": model.head.grad}
    return {name: x.detach().float().cpu() for name, x in found.items()}


def against_cpu(what: str, dtype: torch.dtype, allowed: float) -> dict:
    """This device in dtype against the CPU in fp32: the largest difference, over the largest."""
    here = logp_and_gradient(dtype, DEVICE)[what]
    there = logp_and_gradient(torch.float32, torch.device("cpu"))[what]
    return check(((here - there).abs().max() / there.abs().max()).item(), allowed)


def sampled(model) -> list[sampler.Response]:
    """8 responses of 40 tokens: long enough for a graph to be recorded and replayed."""
    prompts, _ = batch(8, 12)
    settings = sampler.Sampling(max_new=40, rows=8)
    return [group[0] for group in sampler.generate(model, prompts.tolist(), 1, settings)]


def gap(dtype: torch.dtype, allowed: float) -> dict:
    """Mean difference between the sampler's log-probs and the trainer's, of the same tokens."""
    model = tiny_model(dtype, DEVICE)
    responses = sampled(model)
    prompts, _ = batch(8, 12)
    _, mask = batch(8, 12 + 40, 12)
    ids = torch.cat((prompts, torch.tensor([r.ids for r in responses])), 1)
    with torch.no_grad():
        logp, _, _ = model_file.response_logp(model, ids.to(DEVICE), mask)
    theirs = torch.tensor([r.logp for r in responses])
    return check((logp.cpu() - theirs).abs().mean().item(), allowed)


@contextmanager
def without_graphs() -> Iterator[None]:
    """Every kernel of a decode step is launched by itself."""
    run = decode.Graphs.run
    decode.Graphs.run = lambda self, key, function: function()
    try:
        yield
    finally:
        decode.Graphs.run = run


def graphs_change_nothing() -> dict:
    """Share of the responses that differ with and without CUDA graphs."""
    model = tiny_model(torch.float32, DEVICE)
    recorded = sampled(model)
    with without_graphs():
        launched = sampled(model)
    differ = sum(a.ids != b.ids for a, b in zip(recorded, launched, strict=True))
    return check(differ / len(launched), 0.0)


def resume() -> dict:
    """sft.py over 4 steps against 2 steps and --resume: the largest difference of a loss."""
    cfg = sft.Config(model="tiny", rows=4, steps=3, longest=64)
    flags = {"batch": cfg.rows, "max-len": cfg.longest, "eval-every": 2}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocab = training.make_folder(cfg, folder / "model")
        sft.write_work(cfg, folder, sft.make_rows(cfg, vocab))
        command = training.command_of("sft.py", cfg, flags, folder)
        whole = losses_of(command, folder)
        shutil.rmtree(folder / "out" / "checkpoints" / "step_000004")
        resumed = losses_of([*command, "--resume"], folder)
    largest = max(abs(a - b) for a, b in zip(whole, resumed, strict=True))
    return check(largest, 0.0 if DEVICE.type == "cpu" else 1e-3)


def losses_of(command: list[str], folder: Path) -> list[float]:
    done = subprocess.run(command, capture_output=True, text=True, env=measure.environment(1))
    if done.returncode:
        raise RuntimeError(measure.last_line(done.stderr))
    rows = files.read_jsonl(folder / "out" / "metrics.jsonl")
    return [row["loss"] for row in rows if row["kind"] == "train"]


def cases() -> dict[str, Callable[[], dict]]:
    fp32 = torch.float32
    bf16 = torch.bfloat16
    return {
        "log-probs, fp32 = CPU": partial(against_cpu, "logp", fp32, 1e-3),
        "entropies, fp32 = CPU": partial(against_cpu, "entropy", fp32, 1e-3),
        "gradient, fp32 = CPU": partial(against_cpu, "gradient", fp32, 1e-3),
        "log-probs, bf16 = CPU in fp32": partial(against_cpu, "logp", bf16, 0.1),
        "decode = forward (gap), fp32": partial(gap, fp32, 1e-4),
        "decode = forward (gap), bf16": partial(gap, bf16, 0.1),
        "graphs = no graphs": graphs_change_nothing,
        "resumed = whole": resume,
    }
