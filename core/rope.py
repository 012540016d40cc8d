"""Rotary embeddings: how far each pair of numbers of a head turns per position.

rope_type, with the numbers of ModelConfig.rope_scaling; C is original_max_position_embeddings:
| linear  | all frequencies are divided by the factor                                             |
| llama3  | divided for pairs that turn less than low_freq_factor times in C positions, kept for  |
|         | those that turn more than high_freq_factor times, interpolated in between (Llama 3.1) |
| yarn    | the same with a ramp over the index of the pair (arXiv 2309.00071)                    |
| dynamic | the base grows with the largest position, beyond max_position_embeddings              |
"""

import math

import torch
from torch import Tensor

from core.folder import ModelConfig


def rope_frequencies(config: ModelConfig, base: float | Tensor | None = None) -> Tensor:
    """Radians per position of each pair, (K/2,) fp32. base: instead of rope_theta."""
    base = config.rope_theta if base is None else base
    device = base.device if isinstance(base, Tensor) else "cpu"
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=device)
    periods = base ** (pairs.float() / config.head_dim)  # positions per radian
    kept = 1.0 / periods
    rope = config.rope_scaling or {"rope_type": "default"}
    if rope["rope_type"] in ("default", "dynamic"):
        return kept
    if rope["rope_type"] == "linear":
        return kept / rope["factor"]
    if rope["rope_type"] == "llama3":
        slowed = kept / rope["factor"]
        share = _llama3_share(rope, kept)
    else:
        slowed = 1.0 / (rope["factor"] * periods)
        share = _yarn_share(config, rope)
    # Exact where the share is 0 or 1, so far positions do not drift from those of transformers.
    return (1 - share) * slowed + share * kept


def dynamic_frequencies(config: ModelConfig, positions: Tensor) -> Tensor:
    """Frequencies that hold up to the largest of the positions, as transformers computes them.

    Beyond max_position_embeddings they depend on the longest row of the batch.
    """
    factor = config.rope_scaling["factor"]
    length = (positions.max() + 1).clamp(min=config.max_position_embeddings)
    stretch = factor * length / config.max_position_embeddings - (factor - 1)
    K = config.head_dim
    return rope_frequencies(config, config.rope_theta * stretch ** (K / (K - 2)))


def rope_magnitude(config: ModelConfig) -> float:
    """The factor of cos and sin: 1, but for yarn."""
    rope = config.rope_scaling
    if not rope or rope["rope_type"] != "yarn":
        return 1.0
    if "attention_factor" in rope:
        return rope["attention_factor"]
    growth = 0.1 * math.log(max(1.0, rope["factor"]))
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return (rope["mscale"] * growth + 1) / (rope["mscale_all_dim"] * growth + 1)
    return growth + 1


def _llama3_share(rope: dict, kept: Tensor) -> Tensor:
    """The share (K/2,) of the unchanged frequency in each pair."""
    turns = rope["original_max_position_embeddings"] * kept / (2 * math.pi)
    low = rope["low_freq_factor"]
    high = rope["high_freq_factor"]
    return ((turns - low) / (high - low)).clamp(0, 1)


def _yarn_share(config: ModelConfig, rope: dict) -> Tensor:
    """The share (K/2,) of the unchanged frequency in each pair."""
    K = config.head_dim

    def pair_that_turns(times: float) -> float:
        period = rope["original_max_position_embeddings"] / (times * 2 * math.pi)
        return K * math.log(period) / (2 * math.log(config.rope_theta))

    first = pair_that_turns(rope.get("beta_fast", 32))
    last = pair_that_turns(rope.get("beta_slow", 1))
    if rope.get("truncate", True):
        first = math.floor(first)
        last = math.ceil(last)
    first = max(first, 0)
    last = min(last, K - 1)
    if first == last:
        last += 0.001
    slow = (torch.arange(K // 2, dtype=torch.float32, device="cpu") - first) / (last - first)
    return 1 - slow.clamp(0, 1)
