"""Several processes as one: who I am, sums over all, FSDP2 sharding, and a trainer state that any number can load.

    device = ranks.start()                 # under torchrun: joins the group; alone: nothing but a device
    net = ranks.compute(model, bf16)       # what runs forward and backward; gradients arrive in `model`, in fp32
    total, = ranks.totals(n_tokens)        # summed over all processes

With one process each function is a no-op or returns its own value, so the training loops need no special case.
  1) A process reads and keeps only its rows of each parameter: rows_of(n) is FSDP2's cut of dimension 0. The model is
     built on the meta device, so nobody ever holds it whole.
  2) Gradients are summed, not averaged: losses are already divided by the tokens of the whole step, on all processes.
  3) bf16: weights, optimizer and gradients stay fp32; each forward and backward runs in bfloat16. Sharded, FSDP2 casts
     when it gathers; alone, a bfloat16 copy of the model does the same and hands its gradients over.
  4) What one process decides (a stop, a file that is there) reaches the others as numbers or JSON. No pickle.
  5) The trainer state is one safetensors file a process, with the rows it holds in the header. # differs from
     torch.distributed.checkpoint, whose metadata file is a pickle.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from core.errors import UserError

PATIENCE = timedelta(
    hours=12
)  # a wait in a collective; one process may decode long after the others are through.
# A process that dies is noticed at once all the same: its connections close


# ---------------------------------------------------------------------------------------------------------------- group
def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them; 0 writes the files and speaks."""
    return dist.get_rank() if dist.is_initialized() else 0


def start() -> torch.device:
    """Join the processes that torchrun started, if it started several. Returns this one's device."""
    cuda = torch.cuda.is_available()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    )
    if cuda:
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"process {device.index} of this node has no GPU: it has {torch.cuda.device_count()}; "
                "use --nproc_per_node of that number at most"
            )
        torch.cuda.set_device(device)
        # on recent GPUs it would be the first choice, and it plans, up to a second, for each new (rows, tokens)
        torch.backends.cuda.enable_cudnn_sdp(False)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
        if rank():
            sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    return device


def stop() -> None:
    """Leave the group, if there is one, and with it this process, at once: while the interpreter is taken down, torch's
    threads reach for it and abort a process that has finished (about 1 in 80)."""
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)


def totals(*numbers: float) -> list[float]:
    """Each number summed over all processes."""
    if world() == 1:
        return list(numbers)
    return add_up(torch.tensor(numbers, dtype=torch.float64)).tolist()


def add_up(x: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all processes, in place."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def any_of(flag) -> bool:
    """True everywhere if it is true anywhere."""
    return totals(float(bool(flag)))[0] > 0


def gather(value) -> list:
    """The JSON values of all processes, in their order, known to each."""
    if world() == 1:
        return [value]
    return [json.loads(part) for part in gather_bytes(json.dumps(value).encode())]


def gather_bytes(mine: bytes) -> list[bytes]:
    """The bytes (at least one) of all processes, in their order, known to each."""
    sizes = torch.zeros(world(), dtype=torch.long)
    sizes[rank()] = len(mine)
    width = int(add_up(sizes).max())
    parts = [torch.empty(width, dtype=torch.uint8) for _ in range(world())]
    dist.all_gather(
        parts, F.pad(torch.frombuffer(bytearray(mine), dtype=torch.uint8), (0, width - len(mine)))
    )
    return [part[:n].numpy().tobytes() for part, n in zip(parts, sizes.tolist())]


def from_first(make: Callable):
    """What make() returns on the first process (a JSON value), known to all; its ValueError or OSError is raised on
    all of them, so that nobody waits for a process that has given up."""
    if world() == 1:
        return make()
    value, failure = None, None
    if rank() == 0:
        try:
            value = make()
        except (ValueError, OSError) as error:
            failure = error
    value, message = gather([value, failure and str(failure)])[0]
    if message:
        raise failure or ValueError(message)
    return value


# ---- seeds
def seed_of(*key) -> int:
    """A 63-bit seed from any printable key, the same on every machine: seed_of(cfg.seed, "rollout", step)."""
    return (
        int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1
    )


def generator(*key) -> torch.Generator:
    """A CPU generator of its own for one draw."""
    return torch.Generator().manual_seed(seed_of(*key))


# ---- sharding
def rows_of(n: int, sharded: bool = True) -> tuple[int, int]:
    """First and last + 1 of the n rows of a parameter that this process keeps, as FSDP2 cuts them (torch.chunk)."""
    if not sharded:
        return 0, n
    each = -(-n // world())
    return min(rank() * each, n), min((rank() + 1) * each, n)


def shard(model, bf16: bool, offload: bool = False, sums_first: bool = True) -> None:
    """FSDP2 over all processes, in place: each block a group of its own, the embedding, last norm and head another.

    model: on the meta device. offload: parameters, gradients and optimizer state wait in the CPU's memory. sums_first:
    a process keeps whole gradients until a step's last micro-batch; less to send, 4 bytes a parameter more to hold.
    """
    from torch.distributed.device_mesh import (
        init_device_mesh,  # here: a second that one process need not wait
    )
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    device = "cuda" if torch.cuda.is_available() else "cpu"
    how = {
        "mesh": init_device_mesh(device, (world(),)),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32
        ),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    for block in model.model.layers:
        fully_shard(block, **how)
    fully_shard(model, **how, reshard_after_forward=False)  # the head is used after the forward
    model.sums_first = sums_first
    for module in _groups(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def _groups(model) -> list:
    """What shard() made of the model's modules: its root first, then the blocks."""
    return [module for module in model.modules() if hasattr(module, "unshard")]


def settle(model) -> None:
    """Let go of what a forward without a backward has gathered: parameters() gives the rows of this process again."""
    for module in _groups(model):
        module.reshard()


def is_sharded(p: torch.Tensor) -> bool:
    """Whether it is a DTensor, of which this process keeps some rows."""
    return hasattr(p, "to_local")


def local(p: torch.Tensor) -> torch.Tensor:
    """This process's rows of a parameter, its gradient or its optimizer state; all of them where it is not sharded."""
    return p.to_local() if is_sharded(p) else p


def whole(p: torch.Tensor) -> torch.Tensor:
    """All rows, on every process. Sharded: a collective, so all processes must ask for the same parameter."""
    return p.detach().full_tensor() if is_sharded(p) else p.detach()


def like(p: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`rows` as the local part of a tensor that is cut as p is."""
    if not is_sharded(p):
        return rows
    made = torch.empty_like(
        p.detach(), dtype=rows.dtype
    )  # from_local would move the rows to the mesh's device
    made.to_local().copy_(rows)
    return made


def reduce_now(net, last: bool) -> None:
    """Sum gradients over the processes in the step's last backward only, where shard() was told so; those before it
    add up where they are."""
    for module in _groups(net)[:1]:
        module.set_requires_gradient_sync(last or not net.sums_first)  # recurses into the blocks


def compute(model, bf16: bool, recompute: bool = False, compiled: bool = False):
    """The model that runs: itself in fp32 or when sharded; else a bfloat16 copy, whose gradients are added to the
    model's own in fp32 as soon as they are made, so that micro-batches add up without rounding. recompute: blocks run
    once more in the backward instead of keeping their activations. compiled: torch.compile on each block."""
    net = model if not bf16 or _groups(model) else _copy_in_bf16(model)
    for block in net.model.layers:
        block.recompute = recompute
        block.compiled = torch.compile(block._run, dynamic=True) if compiled else None
    return net


def _copy_in_bf16(model):
    with torch.device("meta"):
        net = type(model)(model.config).bfloat16()
    net.to_empty(device=model.head.device)

    def hand_over(master):
        def hook(p):
            if master.grad is None:
                master.grad = p.grad.float()
            else:
                master.grad += p.grad
            p.grad = None

        return hook

    for p, master in zip(net.parameters(), model.parameters()):
        p.register_post_accumulate_grad_hook(hand_over(master))
    refresh(net, model)
    return net


@torch.no_grad()
def refresh(net, model) -> None:
    """After an update: the weights of compute()'s copy, if there is one, are the model's again."""
    if net is not model:
        torch._foreach_copy_(list(net.parameters()), list(model.parameters()))


# -------------------------------------------------------------------------------------------------------- trainer state
def state_file(folder: Path, rank: int, world: int) -> Path:
    return folder / f"state-{rank:05d}-of-{world:05d}.safetensors"


def named_state(model, optimizers) -> Iterator[tuple[str, torch.Tensor]]:
    """("model/NAME", weight) and ("optimizer/NAME/KEY", entry) of all parameters."""
    names = {id(p): n for n, p in model.named_parameters()}
    yield from ((f"model/{n}", p.detach()) for n, p in model.named_parameters())
    for optimizer in optimizers:
        for p, entry in optimizer.state.items():
            yield from ((f"optimizer/{names[id(p)]}/{key}", value) for key, value in entry.items())


def save_state(folder: Path, model, optimizers) -> None:
    """Each process writes its rows of weights and optimizer state; the header says which rows of how many."""
    rows, parts = {}, {}
    for key, value in named_state(model, optimizers):
        parts[key] = local(value).contiguous()
        if value.ndim:
            first, end = rows_of(value.shape[0], is_sharded(value))
            rows[key] = [first, end, value.shape[0]]
    save_file(parts, state_file(folder, rank(), world()), metadata={"rows": json.dumps(rows)})


def load_state(folder: Path, model, optimizers) -> None:
    """The reverse of save_state, whatever the number of processes was then. Raises ValueError, naming file or
    parameter, for a damaged file and for a state that is not this model's."""
    files = sorted(folder.glob("state-*.safetensors"))
    try:
        opened = [safe_open(file, framework="pt") for file in files]
        places = [json.loads(file.metadata()["rows"]) for file in opened]
        keys = dict.fromkeys(key for file in opened for key in file.keys())
        params, owner = dict(model.named_parameters()), _owners(optimizers)
        for key in keys:
            use, name, *entry = key.split("/")
            if name not in params:
                raise UserError(
                    f"{folder}: {name} is not a parameter of this model; "
                    "--resume needs the --init that the run began with"
                )
            p = params[name]
            if (
                key not in places[0]
            ):  # a scalar, the same in each file; a fused optimizer counts steps on the device
                fused = owner[p].defaults.get("fused")
                owner[p].state[p][entry[0]] = (
                    opened[0].get_tensor(key).to(local(p).device if fused else "cpu")
                )
                continue
            mine = rows_of(p.shape[0], is_sharded(p))
            value = _read_rows(key, mine, opened, places).to(local(p).device)
            if use == "model":
                local(p).detach().copy_(value)
            else:
                owner[p].state[p][entry[0]] = like(p, value)
    except (SafetensorError, OSError, IndexError) as error:
        raise UserError(
            f"{folder}: not a whole trainer state ({error}); delete this checkpoint, "
            "then --resume goes on from the one before"
        ) from None
    missing = [n for n in params if f"model/{n}" not in keys]
    if missing:
        raise UserError(
            f"{folder}: no {missing[0]} (and {len(missing) - 1} more); the checkpoint is of another model"
        )


def _owners(optimizers) -> dict:
    return {
        p: optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }


def _read_rows(key: str, mine: tuple[int, int], files: list, places: list[dict]) -> torch.Tensor:
    """Rows mine[0] .. mine[1] of a tensor, from the files that hold some of them."""
    parts = []
    for file, place in zip(files, places):
        first, end, _ = place[key]
        low, high = max(first, mine[0]), min(end, mine[1])
        if (
            low < high or not parts
        ):  # an empty first part keeps the shape where this process has no rows
            parts.append(file.get_slice(key)[max(0, low - first) : max(0, high - first)])
    return torch.cat([part for part in parts if len(part)] or parts[:1])
