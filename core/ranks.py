"""Several processes as one: who I am, sums over all ranks, seeds, and FSDP2 sharding.

    device = ranks.start()                 # under torchrun: joins the group; alone: only a device
    net = ranks.compute(model, bf16)       # runs forward and backward; gradients arrive in `model`
    total = ranks.add_up(total)            # summed over all ranks

With one process every function returns its own value, so the training loops need no special case.
  1) A rank reads and keeps only its rows of each parameter: rows_of(n) is FSDP2's cut of dimension
     0. The model is built on the meta device, so no rank ever holds it whole.
  2) Gradients are summed, not averaged: a loss is divided by the tokens of the whole step already.
  3) bf16: weights, optimizer and gradients stay fp32; forward and backward run in bfloat16. FSDP2
     casts when it gathers; one process has a bfloat16 copy that hands its gradients over.
  4) What one rank decides (a stop, a file that exists) reaches the others as numbers or JSON.
  5) No random state is kept. Each draw has a generator seeded from (seed, use, step, row), never
     from the rank, so a resumed run, or one on another number of ranks, draws the same.
"""

import hashlib
import json
import os
import socket
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F

from core.errors import UserError

# Timeout of a collective: one rank may decode long after the others are done. A rank that dies is
# noticed at once all the same, because its connections close.
PATIENCE = timedelta(hours=12)
LOST = 30  # seconds without a sign of life from another machine, see watch_connections


# ---- the group -----------------------------------------------------------------------------------
def world() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them; rank 0 writes the files and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def start() -> torch.device:
    """Join the processes that torchrun started, if several. Returns this one's device."""
    cuda = torch.cuda.is_available()
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    apple = torch.backends.mps.is_available() and not several
    device = torch.device("mps" if apple else "cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        there = torch.cuda.device_count()
        if device.index >= there:
            raise UserError(
                f"process {device.index} of this node has no GPU: it has {there}; "
                "use --nproc_per_node of that number at most"
            )
        torch.cuda.set_device(device)
        # cuDNN attention would plan, up to a second, for each new (rows, tokens)
        torch.backends.cuda.enable_cudnn_sdp(False)
    if several and not dist.is_initialized():
        choose_interface()
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
        watch_connections()
        if rank():
            sys.stdout = open(os.devnull, "w")  # rank 0 prints for all
    return device


def choose_interface() -> None:
    """Several machines: gloo listens where the first one is reached, unless the user says where.

    It would take the address of this machine's own name, which Debian gives as 127.0.1.1.
    """
    if os.environ.get("LOCAL_WORLD_SIZE") in (None, os.environ["WORLD_SIZE"]):
        return
    name = interface_to(os.environ["MASTER_ADDR"])
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface_to(host: str) -> str:
    """The network interface of the longest IPv4 route to this host; "" where none is known."""
    try:
        address = socket.inet_aton(socket.gethostbyname(host))
        with open("/proc/net/route") as table:
            routes = [line.split() for line in table][1:]
    except OSError:
        return ""
    target = int.from_bytes(address, sys.byteorder)
    found = [(0, "")]
    for name, network, _, _, _, _, _, mask, *_ in routes:
        if target & int(mask, 16) == int(network, 16):
            found.append((int(mask, 16).bit_count(), name))
    return max(found)[1]


def watch_connections() -> None:
    """The connections of this process fail after LOST seconds in which nothing comes from the other
    machine, not even its kernel's answers. Without this, a cable pulled is never noticed."""
    if sys.platform != "linux":
        return
    for number in os.listdir("/proc/self/fd"):
        try:
            connection = socket.socket(fileno=int(number))
        except OSError:  # it is no socket
            continue
        if connection.type == socket.SOCK_STREAM and connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, LOST // 3)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, LOST // 3)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * LOST)
        connection.detach()  # gloo goes on with it


def stop() -> None:
    """Leave the group, if there is one, and end this process at once.

    While the interpreter is taken down, torch's threads reach for it and abort about 1 in 80
    processes that had finished.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def add_up(x: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks, in place."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def total(number: float) -> float:
    """A number summed over all ranks."""
    if world() == 1:
        return number
    return add_up(torch.tensor(number, dtype=torch.float64)).item()


def any_of(flag) -> bool:
    """True everywhere if it is true anywhere."""
    if world() == 1:
        return bool(flag)
    return total(float(bool(flag))) > 0


def gather(value) -> list:
    """The JSON values of all ranks, in their order, known to each."""
    if world() == 1:
        return [value]
    return [json.loads(part) for part in gather_bytes(json.dumps(value).encode())]


def gather_bytes(mine: bytes) -> list[bytes]:
    """The bytes (at least one) of all ranks, in their order, known to each."""
    sizes = torch.zeros(world(), dtype=torch.long)
    sizes[rank()] = len(mine)
    width = int(add_up(sizes).max())
    parts = [torch.empty(width, dtype=torch.uint8) for _ in range(world())]
    padded = F.pad(torch.frombuffer(bytearray(mine), dtype=torch.uint8), (0, width - len(mine)))
    dist.all_gather(parts, padded)
    return [part[:n].numpy().tobytes() for part, n in zip(parts, sizes.tolist())]


def from_first(make: Callable):
    """What make() returns on rank 0 (a JSON value), known to all ranks.

    Its UserError or OSError is raised on all of them, so that no rank waits for one that gave up.
    """
    if world() == 1:
        return make()
    value = None
    failure = None
    if rank() == 0:
        try:
            value = make()
        except (UserError, OSError) as error:
            failure = error
    value, message = gather([value, failure and str(failure)])[0]
    if message:
        raise failure or UserError(message)
    return value


# ---- seeds ---------------------------------------------------------------------------------------
def seed_of(*key) -> int:
    """A 63-bit seed from any printable key, the same on every machine and rank."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key) -> torch.Generator:
    """A CPU generator for one draw: generator(cfg.seed, "epoch", 3)."""
    return torch.Generator().manual_seed(seed_of(*key))


# ---- sharding ------------------------------------------------------------------------------------
def rows_of(n: int, sharded: bool = True) -> tuple[int, int]:
    """First and last + 1 of the n rows of a parameter that this rank keeps, as FSDP2 cuts them."""
    if not sharded:
        return 0, n
    each = -(-n // world())
    return min(rank() * each, n), min((rank() + 1) * each, n)


def shard(model, bf16: bool, offload: bool = False, sums_first: bool = True) -> None:
    """FSDP2 over all ranks, in place: each block is a group; embedding, last norm and head another.

    model: on the meta device. offload: parameters, gradients and optimizer state wait in the CPU's
    memory. sums_first: a rank keeps whole gradients until the step's last micro-batch, which sends
    less and holds 4 more bytes per parameter.
    """
    # Imported here: a second that one process need not wait
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    policy = {
        "mesh": init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world(),)),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32
        ),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    for block in model.model.layers:
        fully_shard(block, **policy)
    fully_shard(model, **policy, reshard_after_forward=False)  # the head is used after the forward
    model.sums_first = sums_first
    for module in shard_groups(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def shard_groups(model) -> list:
    """The modules that shard() made groups of: the root first, then the blocks."""
    return [module for module in model.modules() if hasattr(module, "unshard")]


def reshard(model) -> None:
    """Let go of parameters that a forward without a backward has gathered."""
    for module in shard_groups(model):
        module.reshard()


def is_sharded(p: torch.Tensor) -> bool:
    """Whether p is a DTensor, of which this rank keeps some rows."""
    return hasattr(p, "to_local")


def local(p: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a parameter, its gradient or its optimizer state."""
    return p.to_local() if is_sharded(p) else p


def whole(p: torch.Tensor) -> torch.Tensor:
    """All rows, on every rank. Sharded: a collective, so all ranks must ask for the same one."""
    p = p.detach()
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def add_rows(p: torch.Tensor, rows: torch.Tensor, alpha: float) -> None:
    """p += alpha * rows, of which each rank takes those that it keeps."""
    if hasattr(p, "to_local"):
        first, end = rows_of(len(rows))
        p.to_local().add_(rows[first:end], alpha=alpha)
    else:
        p.add_(rows, alpha=alpha)


def shard_like(p: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`rows` as the local part of a tensor that is cut as p is."""
    if not is_sharded(p):
        return rows
    made = torch.empty_like(p.detach(), dtype=rows.dtype)  # from_local would move the rows
    made.to_local().copy_(rows)
    return made


def reduce_now(net, last: bool) -> None:
    """Sum gradients over the ranks in the step's last backward only, where shard() was told so."""
    if world() > 1:
        for module in shard_groups(net)[:1]:
            module.set_requires_gradient_sync(last or not net.sums_first)  # the blocks follow


# ---- what runs -----------------------------------------------------------------------------------
def compute(model, bf16: bool, recompute: bool = False, compiled: bool = False):
    """The module that runs: the model itself in fp32 or when sharded, else a bfloat16 copy of it.

    recompute: blocks run once more in the backward instead of keeping their activations.
    compiled: torch.compile on each block.
    """
    net = _copy_in_bf16(model) if bf16 and not shard_groups(model) else model
    for block in net.model.layers:
        block.recompute = recompute
        block.compiled = torch.compile(block._run, dynamic=True) if compiled else None
    return net


def _copy_in_bf16(model):
    """A copy whose gradients are added to the model's own in fp32 as soon as they are made, so that
    micro-batches add up without rounding."""
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
    """After an update: the copy that compute() made, if it made one, takes the model's weights."""
    if net is not model:
        torch._foreach_copy_(list(net.parameters()), list(model.parameters()))
