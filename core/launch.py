"""Before the first step: place the model on the devices, and say what the run will take."""

import math
import os
import shutil
from pathlib import Path

import torch

from core import memory, ranks
from core.errors import UserError
from core.folder import ModelConfig


def placement(cfg, config: ModelConfig, device) -> tuple:
    """(where the trained weights are, how to shard them) for model.load_model and init_model.

    cfg: bf16 and offload. The second is None for one process.
    """
    several = ranks.world() > 1
    if cfg.offload and not (several and device.type == "cuda"):
        raise UserError(
            "--offload works with several processes on GPUs; leave it out, "
            "or start with torchrun --nproc_per_node=2 or more"
        )
    if not several:
        return device, None
    sums_first = memory.sums_first(config, capacity(device))

    def shard(model):
        ranks.shard(model, cfg.bf16, cfg.offload, sums_first)

    return "cpu" if cfg.offload else device, shard


def capacity(device) -> float:
    """Bytes of memory that a process has: its GPU's, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def show_memory(cfg, config: ModelConfig, device, slots: int = 0, reference: bool = False) -> None:
    """What a process will need: one line at the start of a run, a table under --dry-run. With
    --gpus devices have 80 GB. RL: slots (longest prompt and response), reference (a KL term)."""
    n_bytes = 80e9 if cfg.gpus else capacity(device)
    plan = memory.Plan(
        config=config,
        world=cfg.gpus or ranks.world(),
        micro_tokens=cfg.micro_tokens,
        bf16=cfg.bf16,
        recompute=cfg.recompute,
        optimizer=cfg.optimizer,
        offload=cfg.offload,
        summed=memory.sums_first(config, n_bytes),
        reference=reference,
        cuda=bool(cfg.gpus) or device.type == "cuda",
    )
    if slots:  # the sampler takes fewer rows at once where memory is short
        rows = min(cfg.rows, -(-cfg.gen_prompts // plan.world) * cfg.group)
        plan = plan.with_rollout(rows, slots, n_bytes)
    if cfg.dry_run:
        print(f"memory of each of {plan.world} processes:\n{plan.report(n_bytes)}")
        return
    largest = sorted(plan.table(), key=lambda part: -part.bytes)[:3]
    named = ", ".join(f"{part.name} {memory.text(part.bytes)}" for part in largest)
    print(
        f"memory of a process, estimated: at most {memory.text(plan.peak())} of "
        f"{memory.text(n_bytes)}; {named} ...",
        flush=True,
    )


def show_disk(cfg, config: ModelConfig, steps: int, optimizer: str) -> None:
    """What the checkpoints of a run will take, beside what is free."""
    every = math.gcd(cfg.eval_every, cfg.save_every) if cfg.save_every else cfg.eval_every
    count = -(-steps // every) + 1
    if cfg.keep:
        count = min(count, cfg.keep + 2)  # the newest and the best one stay in any case
    size = memory.checkpoint_bytes(config, cfg.bf16, optimizer)
    out = Path(cfg.out)
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    hint = "; --keep N keeps fewer" if count * size > free else ""
    print(
        f"checkpoints: at most {count} x {memory.text(size)} = {memory.text(count * size)} on "
        f"disk, {memory.text(free)} free{hint}",
        flush=True,
    )
