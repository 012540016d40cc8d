"""The memory of a training step, computed from shapes before any weight is read.

    plan = memory.Plan(config=config, world=8, micro_tokens=16384, recompute=True)
    print(plan.report(capacity=80e9))

Counted for each of `world` ranks:
1) fp32 weights, gradients and optimizer state, cut into `world` shards (AdamW: two numbers per
   weight; Muon: one per weight of the blocks' matrices).
2) One rank in bf16: a copy of the weights. Several ranks: the gathered parameters of the root
   (embedding, head, last norm) for the whole step, those of two blocks, and their gradients until
   they are reduced; with `summed`, a whole fp32 copy of all gradients instead.
3) Activations: what autograd keeps of the operations of model.Block (block_bytes), times tokens and
   layers; with recompute the input of each block, and the operations of one.
4) The head: a chunk of logits, and the head's gradient in fp32.
5) RL: weights gathered for the rollout, and its key-value cache. Both are freed before the update,
   so the peak is the larger of the two phases. A reference model stays all the time.
Not counted: the CUDA context and libraries (0.5 GB; on a CPU Python and torch, 0.3 GB), buffers of
communication, fragmentation (5 to 10%). Attention is the fused kernel, which keeps no scores.

Shapes: D hidden width, H query heads, K head width, L layers, V vocabulary. Sizes in bytes.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from core.folder import ModelConfig

CHUNK_LOGITS = 2**25  # of core/softmax.py; a test compares


class Part(NamedTuple):
    """A line of the table. phase: "always", "update" (forward, backward, step) or "rollout"."""

    name: str
    bytes: float
    phase: str = "always"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the memory of one rank depends on."""

    config: ModelConfig
    world: int = 1  # ranks
    micro_tokens: int = 16384  # tokens of a micro-batch, padding included
    bf16: bool = True  # compute in bfloat16; weights and optimizer stay fp32
    recompute: bool = False  # activation checkpointing of the blocks
    optimizer: str = "adamw"  # or muon
    offload: bool = False  # weights, gradients and optimizer state wait in the CPU's memory
    summed: bool = False  # gradients of several micro-batches are summed before they are reduced
    rows: int = 0  # RL, which computes entropies too: responses in flight at once; 0 = SFT
    slots: int = 0  # RL: tokens of a prompt and its response
    reference: bool = False  # RL: a frozen copy of the model, for the KL term
    cuda: bool = True

    @property
    def size(self) -> int:
        """Bytes of a number that the model computes with."""
        return 2 if self.bf16 else 4

    def table(self) -> list[Part]:
        """The parts of the memory of a rank in a training step."""
        L = self.config.num_hidden_layers
        block, matrices, root = weights_of(self.config)
        total = L * block + root
        share = 0 if self.offload else 1 / self.world
        state = 8 * total
        if self.optimizer == "muon":
            state -= 4 * L * matrices
        parts = [
            Part("weights, fp32", 4 * total * share),
            Part(f"optimizer state, {self.optimizer}", state * share),
        ]
        if self.world == 1 and self.bf16:
            parts.append(Part("their copy in bf16", 2 * total))
        if self.reference:
            size = self.size if self.world == 1 else 4
            parts.append(Part("reference model", size * total / self.world))
        parts.append(Part("gradients, fp32", 4 * total * share, "update"))
        if self.world > 1:
            gathered = self.size * (root + 2 * block)
            unreduced = (self.size + 4) * 2 * block + self.size * root
            if self.summed:
                unreduced = 4 * total
            parts.append(Part("gathered weights", gathered, "update"))
            parts.append(Part("gradients before the sum", unreduced, "update"))
        parts += self._update()
        if self.rows:
            if self.world > 1:
                parts.append(Part("weights gathered for the rollout", self.size * total, "rollout"))
            cache = cache_bytes(self.config, self.rows, self.slots, self.size)
            parts.append(Part(f"key-value cache, {self.rows} x {self.slots}", cache, "rollout"))
        return parts

    def with_rollout(self, rows: int, slots: int, capacity: float) -> "Plan":
        """The plan of an RL step with at most `rows` responses in flight: fewer where their cache
        would take the rollout above 80% of the capacity, as the sampler does."""
        one = replace(self, rows=1, slots=slots)
        *rest, cache = [part.bytes for part in one.table() if part.phase != "update"]
        fitting = int((0.8 * capacity - sum(rest)) / cache)
        return replace(one, rows=max(1, min(rows, fitting)))

    def _update(self) -> list[Part]:
        """Activations, and the head."""
        V = self.config.vocab_size
        head = 4 * V * self.config.hidden_size
        kept, working = activations(
            self.config, self.micro_tokens, self.size, self.recompute, fused_norm=self.cuda
        )
        n_logits = min(CHUNK_LOGITS * (8 if self.cuda else 1), self.micro_tokens * V)
        cast = self.size if self.bf16 else 0  # gradients of the logits for the matrix products
        logits = n_logits * (4 + cast)
        if self.cuda:
            # The whole chunk is worked on at once. Forward: log_softmax beside the logits, for the
            # entropy p and p log p. Backward: p, and the chunk's part of the head's gradient.
            forward = n_logits * (12 if self.rows else 8)
            backward = n_logits * ((8 if self.rows else 4) + cast) + (head if self.bf16 else 0)
            logits = max(forward, backward)
        # The chunk is freed before the backward of the blocks begins: the larger of the two counts.
        temporary = "logits of a chunk" if logits >= working else "work in a block's backward"
        return [
            Part("activations" + (", recomputed" if self.recompute else ""), kept, "update"),
            Part("gradient of the head, fp32", head, "update"),
            Part(temporary, max(logits, working), "update"),
        ]

    def peak(self) -> float:
        """Bytes at the worst moment: what is there always, and the larger of the two phases."""
        sums = {"always": 0, "update": 0, "rollout": 0}
        for part in self.table():
            sums[part.phase] += part.bytes
        return sums["always"] + max(sums["update"], sums["rollout"])

    def report(self, capacity: float) -> str:
        """The table as text, with the peak and whether it fits a device of this many bytes: 10% are
        left for what is not counted."""
        parts = self.table()
        width = max(len(part.name) for part in parts) + 2
        lines = []
        for part in parts:
            phase = "" if part.phase == "always" else f"  {part.phase}"
            lines.append(f"  {part.name:{width}}{text(part.bytes):>12}{phase}")
        peak = self.peak()
        verdict = "DOES NOT FIT in"
        if peak <= 0.9 * capacity:
            verdict = "fits in"
        elif peak <= capacity:
            verdict = "hardly fits in"
        last = f"  {'peak of a process':{width}}{text(peak):>12}  {verdict} {capacity / 1e9:.0f} GB"
        return "\n".join([*lines, last])


def weights_of(config: ModelConfig) -> tuple[int, int, int]:
    """(parameters of one block, those of its matrices, parameters outside the blocks)."""
    D = config.hidden_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    inner = config.intermediate_size
    matrices = 2 * D * q + 2 * D * kv + 3 * D * inner
    biases = config.attention_bias * (q + 2 * kv)
    biases += config.output_bias * D + config.mlp_bias * (2 * inner + D)
    qk_norms = q + kv if config.joint_qk_norm else 2 * config.head_dim
    norms = 2 * D + config.qk_norm * qk_norms
    embeddings = config.vocab_size * D * (1 if config.tie_word_embeddings else 2)
    return matrices + biases + norms, matrices, embeddings + D


def block_bytes(config: ModelConfig, size: int, fused_norm: bool = True) -> int:
    """Bytes per token that autograd keeps of one block, in numbers of `size` bytes.

    fused_norm: False on the CPU, where rms_norm is several operations and keeps its normalised
    values too, in fp32.
    """
    D = config.hidden_size
    H = config.num_attention_heads
    q = H * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    normed = 2 * D + config.qk_norm * (q + kv)
    n_qk_norms = 2 if config.joint_qk_norm else H + config.num_key_value_heads
    n_norms = 2 + config.qk_norm * n_qk_norms
    norm = normed * (size if fused_norm else 8) + 4 * n_norms  # their inputs, and 1 / rms
    attention = size * (D + q + 2 * kv + q) + 4 * H  # input, q, k, v, output, log-sum-exp
    mlp = size * (D + 2 * config.intermediate_size)  # input, gate, up
    return norm + attention + mlp


def activations(
    config: ModelConfig, micro_tokens: int, size: int, recompute: bool, fused_norm: bool = True
) -> tuple[float, float]:
    """(kept from forward to backward, temporary in the backward of one block) of a micro-batch."""
    D = config.hidden_size
    block = block_bytes(config, size, fused_norm)
    ends = D * ((size if fused_norm else 8) + size)  # of the last norm, and the input of the head
    kept = config.num_hidden_layers * (size * D if recompute else block) + ends
    # silu(gate) * up and gradients inside the MLP, gradients of its input and output
    working = size * (4 * config.intermediate_size + 2 * D)
    if recompute:
        working += block
    return micro_tokens * kept, micro_tokens * working


def cache_bytes(config: ModelConfig, rows: int, slots: int, size: int) -> float:
    """Keys and values of the rows in flight, each with `slots` tokens of prompt and response."""
    per_token = 2.0 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return per_token * rows * slots * size


def checkpoint_bytes(config: ModelConfig, bf16: bool, optimizer: str) -> float:
    """A checkpoint on disk: the model folder, and the fp32 weights and state of the trainer."""
    block, matrices, root = weights_of(config)
    total = config.num_hidden_layers * block + root
    spared = 4 * config.num_hidden_layers * matrices if optimizer == "muon" else 0
    return total * (14 if bf16 else 16) - spared


def sums_first(config: ModelConfig, capacity: float) -> bool:
    """Whether whole fp32 gradients take at most a tenth of the device.

    Each rank then sums the gradients of all micro-batches before they are reduced, which saves
    messages. Otherwise they are reduced after every micro-batch.
    """
    block, _, root = weights_of(config)
    return 4 * (config.num_hidden_layers * block + root) <= 0.1 * capacity


def text(n: float) -> str:
    """A number of bytes for people."""
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"
