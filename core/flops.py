"""FLOPs of a forward, counted from shapes: as the paper counts them, and as the machine does them.

work = flops(config, lengths=[412, 87], n_head=310)     # an SFT step: 310 tokens are trained
paper = 3 * work.paper                                  # a backward is two forwards
machine = 3 * (work.blocks + work.head)                 # recompute: + 1 x work.blocks

prompts = hardware_flops(config, [100, 60], n_head=2)   # each prompt read once per group
rows = hardware_flops(config, lengths, n_head=sum(drawn), cached=prompt_lengths)
"""

from collections.abc import Iterable
from typing import NamedTuple

from core.folder import ModelConfig


class Flops(NamedTuple):
    """FLOPs of a forward; a backward is twice as much, and recompute one more forward of blocks."""

    paper: float  # the paper's count: head and embedding for every token
    blocks: float  # what the machine computes in the blocks
    head: float  # and in the head, for n_head tokens


def flops(
    config: ModelConfig,
    lengths: Iterable[int],
    n_head: int | None = None,
    cached: Iterable[int] | None = None,
) -> Flops:
    """FLOPs of one forward over rows of these lengths.

    n_head: tokens of all rows whose logits are computed; None = all. cached: tokens of each row
    that the machine finds in the key-value cache; None = 0.

    Equations 20 and 21 of the paper: the sum of S F_fwd(S) over rows of S tokens, with F_fwd(S) =
    2 [L (P_mlp + P_attn) + P_vocab] + 4 S L D_q. Causal, the machine does half of the last term.
    """
    lengths = list(lengths)
    cached = [0] * len(lengths) if cached is None else list(cached)
    D = config.hidden_size
    L = config.num_hidden_layers
    D_q = config.num_attention_heads * config.head_dim  # D except in Qwen3
    D_kv = config.num_key_value_heads * config.head_dim
    p_block = 3 * D * config.intermediate_size + 2 * D * (D_q + D_kv)
    p_head = config.vocab_size * D
    S = sum(lengths)
    S_squared = sum(n * n for n in lengths)
    paper = S * 2 * (L * p_block + 2 * p_head) + 4 * S_squared * L * D_q
    computed = S - sum(cached)
    pairs = S_squared - sum(n * n for n in cached)  # twice the number of query-key pairs
    blocks = L * (2 * computed * p_block + 2 * pairs * D_q)
    head = 2 * p_head * (S if n_head is None else n_head)
    return Flops(float(paper), float(blocks), float(head))


def forward_flops(config: ModelConfig, lengths: Iterable[int]) -> float:
    """FLOPs of one forward, as the paper counts them."""
    return flops(config, lengths).paper


def hardware_flops(
    config: ModelConfig,
    lengths: Iterable[int],
    n_head: int | None = None,
    cached: Iterable[int] | None = None,
) -> float:
    """FLOPs of one forward that the machine computes."""
    work = flops(config, lengths, n_head, cached)
    return work.blocks + work.head


def of_round(cfg, method, config: ModelConfig, collected, updates: list) -> tuple:
    """(tokens, FLOPs as the paper counts them, FLOPs of the machine) of one round of rl.py.

    Equations 24 to 29 of the paper: a forward per sampled row, three per trained row and, for some
    methods, one more per expert row (26). The machine reads a prompt once per group.
    """
    sampled = [row for group in collected.sampled for row in group]
    trained = [row for group in collected.groups for row in group]
    experts = [row.length for row in trained if row.is_expert and method.expert_forward]
    drawn = sum(len(row.response) - row.n_prefix for row in sampled)
    work = _read_once(config, sampled, drawn)
    paper = work.paper + 3 * flops(config, [row.length for row in trained]).paper
    paper += flops(config, experts).paper
    machine = work.blocks + work.head
    if method.needs_entropy:  # the forward that gives old_logp too
        work = _read_once(config, trained)
        machine += work.blocks + work.head
    for n, update in enumerate(updates):
        work = _read_once(config, update.rows)
        passes = 3  # a backward is two forwards
        if n > 0 and not method.needs_entropy:
            passes += 1  # old_logp
        if method.kl_coef:
            passes += 1  # ref_logp
        machine += passes * (work.blocks + work.head) + cfg.recompute * work.blocks
    return sum(row.length for row in sampled), paper, machine


def _read_once(config: ModelConfig, rows: list, n_head: int | None = None) -> Flops:
    """A forward that reads a prompt once per group; rows of a group must follow one another.

    n_head: as in flops(); None = the tokens of all responses.
    """
    if n_head is None:
        n_head = sum(len(row.response) for row in rows)
    cached = []
    for before, row in zip([None, *rows], rows):
        is_cached = before is not None and before.group == row.group
        cached.append(len(row.prompt) if is_cached else 0)
    return flops(config, [row.length for row in rows], n_head, cached)
