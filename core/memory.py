"""How much memory a training step takes, from shapes alone: known before a machine is rented or a weight is read.

    parts = memory.table(config, world=8, micro_tokens=16384, bf16=True, checkpointing=True)
    print(memory.report(parts, capacity=80e9))

Counted, for each of `world` processes, as the engine works:
  1) fp32 master weights, gradients and optimizer state, cut into `world` shards (AdamW: two numbers a weight; Muon: one
     for the blocks' matrices). One process holds all of them.
  2) Several processes: the root's parameters (embedding, head, last norm) are gathered for the whole step, the blocks'
     one by one, and the next while one computes; their gradients stand whole until they are reduced. summed=True:
     gradients are reduced once after several micro-batches, so each process keeps a whole fp32 copy of them: fewer
     messages, 4 bytes a weight. One process in bf16: a copy of the weights, 2 bytes each, all the time.
  3) Activations: what autograd keeps of each operation of model.Block, listed in block_bytes(), times tokens and
     layers; with checkpointing each block's input, and one block's operations.
  4) The head: token_logp's chunk of logits, and the head's gradient in fp32 until it is added to the others.
  5) RL: weights gathered for the rollout and its key-value cache. Both are freed before gradients and activations
     exist, so the peak is the larger of the two phases. A frozen reference model stays throughout, in shards, in what
     it computes in.
Not counted: the CUDA context and kernels' libraries (about 0.5 GB; on a CPU Python and torch, 0.3 GB), communication
buffers, and what the allocator loses between blocks (5 to 10%). Attention is the fused kernel, which keeps no scores.
Shapes: D hidden width, H query heads, Hkv key heads, K head width, L layers, V vocabulary. All sizes in bytes.
"""

from typing import NamedTuple

from core.folder import ModelConfig

CHUNK_LOGITS = 2**25  # logits at once: model.CHUNK_LOGITS, a test compares


class Part(NamedTuple):
    """A line of the table. phase: "always", "update" (forward, backward, optimizer) or "rollout"."""

    name: str
    bytes: float
    phase: str = "always"


def weights_of(config: ModelConfig) -> tuple[int, int, int]:
    """(parameters of one block, those of its matrices, parameters outside the blocks)."""
    c, D = config, config.hidden_size
    q, kv, inner = (
        c.num_attention_heads * c.head_dim,
        c.num_key_value_heads * c.head_dim,
        c.intermediate_size,
    )
    matrices = 2 * D * q + 2 * D * kv + 3 * D * inner
    biases = c.attention_bias * (q + 2 * kv) + c.output_bias * D + c.mlp_bias * (2 * inner + D)
    norms = 2 * D + c.qk_norm * 2 * c.head_dim
    return (
        matrices + biases + norms,
        matrices,
        c.vocab_size * D * (1 if c.tie_word_embeddings else 2) + D,
    )


def block_bytes(config: ModelConfig, size: int, fused_norm: bool = True) -> int:
    """Bytes a token that autograd keeps of one block, in numbers of `size` bytes. fused_norm: False on the CPU, where
    rms_norm is several operations and keeps its normalised values too, in fp32."""
    c, D, H = config, config.hidden_size, config.num_attention_heads
    q, kv = H * c.head_dim, c.num_key_value_heads * c.head_dim
    norms, rows = 2 * D + c.qk_norm * (q + kv), 2 + c.qk_norm * (H + c.num_key_value_heads)
    norm = (
        norms * (size if fused_norm else 8) + 4 * rows
    )  # their inputs, 1 / rms, (normalised values)
    attention = size * (D + q + 2 * kv + q) + 4 * H  # normed input, q, k, v, output, log-sum-exp
    mlp = size * (D + 2 * c.intermediate_size)  # normed input, gate, up; their product is remade
    return norm + attention + mlp


def activations(
    config: ModelConfig, micro_tokens: int, size: int, checkpointing: bool, fused_norm: bool = True
) -> tuple[float, float]:
    """(kept from forward to backward, working room of one block's backward) of a micro-batch."""
    c, D, block = config, config.hidden_size, block_bytes(config, size, fused_norm)
    ends = D * ((size if fused_norm else 8) + size)  # the last norm, and what the head keeps
    layers = c.num_hidden_layers * (size * D if checkpointing else block)
    room = size * (
        4 * c.intermediate_size + 2 * D
    )  # product and gradients inside the MLP, the ends'
    return micro_tokens * (layers + ends), micro_tokens * (room + (block if checkpointing else 0))


def cache_bytes(config: ModelConfig, rows: int, slots: int, size: int) -> float:
    """Keys and values of the rows in flight, slots tokens each: prompt and response."""
    return (
        2.0
        * config.num_hidden_layers
        * config.num_key_value_heads
        * config.head_dim
        * rows
        * slots
        * size
    )


def table(
    config: ModelConfig,
    world: int = 1,
    micro_tokens: int = 16384,
    bf16: bool = True,
    checkpointing: bool = False,
    optimizer: str = "adamw",
    offload: bool = False,
    summed: bool = False,
    rows: int = 0,
    slots: int = 0,
    reference: bool = False,
    cuda: bool = True,
) -> list[Part]:
    """The parts of a process's memory in a training step of micro-batches of micro_tokens tokens.

    | offload     | weights, gradients and optimizer state wait in the CPU's memory                            |
    | summed      | gradients of several micro-batches are summed before they are reduced                      |
    | rows, slots | RL: responses in flight at once and tokens of each, prompt included; 0 = SFT               |
    | reference   | RL: a frozen copy of the model, for the KL term                                            |
    """
    block, matrices, root = weights_of(config)
    L, V, D, alone, size = (
        config.num_hidden_layers,
        config.vocab_size,
        config.hidden_size,
        world == 1,
        2 if bf16 else 4,
    )
    total = L * block + root
    here = 0 if offload else 1 / world  # the share of it that this process keeps
    state = 8 * total - (4 * L * matrices if optimizer == "muon" else 0)
    kept, room = activations(config, micro_tokens, size, checkpointing, fused_norm=cuda)
    parts = [
        Part("weights, fp32", 4 * total * here),
        Part(f"optimizer state, {optimizer}", state * here),
    ]
    if alone and bf16:
        parts.append(Part("their copy in bf16", 2 * total))
    if reference:
        parts.append(Part("reference model", (4 if not alone else size) * total / world))
    parts.append(Part("gradients, fp32", 4 * total * here, "update"))
    if not alone:
        parts.append(Part("gathered weights", size * (root + 2 * block), "update"))
        whole = 4 * total if summed else (size + 4) * 2 * block + size * root
        parts.append(Part("gradients before the sum", whole, "update"))
    # the chunk is gone when the blocks' backward begins: the larger of the two counts
    chunk = min(CHUNK_LOGITS * (8 if cuda else 1), micro_tokens * V) * (4 + (size if bf16 else 0))
    chunk += 4 * V * D if bf16 and cuda else 0  # a chunk's share of the head's gradient
    parts += [
        Part("activations" + (", recomputed" if checkpointing else ""), kept, "update"),
        Part("gradient of the head, fp32", 4 * V * D, "update"),
        Part(
            "logits of a chunk" if chunk >= room else "work in a block's backward",
            max(chunk, room),
            "update",
        ),
    ]
    if rows:
        if not alone:
            parts.append(Part("weights gathered for the rollout", size * total, "rollout"))
        parts.append(
            Part(
                f"key-value cache, {rows} x {slots}",
                cache_bytes(config, rows, slots, size),
                "rollout",
            )
        )
    return parts


def checkpoint_bytes(config: ModelConfig, bf16: bool, optimizer: str) -> float:
    """A checkpoint on disk: the model folder, and the trainer's fp32 weights and optimizer state."""
    block, matrices, root = weights_of(config)
    total = config.num_hidden_layers * block + root
    return total * (14 if bf16 else 16) - (
        4 * config.num_hidden_layers * matrices if optimizer == "muon" else 0
    )


def sums_first(config: ModelConfig, capacity: float) -> bool:
    """Whether whole fp32 gradients are small enough (a tenth of the device) to be summed over a step's micro-batches on
    each process before they are reduced, which saves messages. Otherwise every micro-batch is reduced."""
    block, _, root = weights_of(config)
    return 4 * (config.num_hidden_layers * block + root) <= 0.1 * capacity


def peak(parts: list[Part]) -> float:
    """Bytes at the worst moment: what always stands, and the larger phase."""
    always, update, rollout = (
        sum(part.bytes for part in parts if part.phase == phase)
        for phase in ("always", "update", "rollout")
    )
    return always + max(update, rollout)


def text(n: float) -> str:
    """A number of bytes for people."""
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def report(parts: list[Part], capacity: float | None = None) -> str:
    """The table as text, with the peak and, beside a device's capacity in bytes, whether it fits: 10% are left to what
    is not counted."""
    width = max(len(part.name) for part in parts) + 2
    lines = [
        f"  {part.name:{width}}{text(part.bytes):>12}"
        + ("" if part.phase == "always" else f"  {part.phase}")
        for part in parts
    ]
    n, last = peak(parts), f"  {'peak of a process':{width}}{text(peak(parts)):>12}"
    if capacity:
        fits = (
            "fits in"
            if n <= 0.9 * capacity
            else "hardly fits in"
            if n <= capacity
            else "DOES NOT FIT in"
        )
        last += f"  {fits} {capacity / 1e9:.0f} GB"
    return "\n".join([*lines, last])
