"""Rotary frequencies: how far each pair of a head turns per position."""

import math

import torch
from torch import Tensor

from core.folder import ModelConfig


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each rotated pair, (K/2,) fp32 on the CPU.

    "linear" divides all frequencies by the factor. "llama3" divides those that turn less than
    low_freq_factor times within the original context, keeps those that turn more than
    high_freq_factor times, and interpolates between the two (Llama 3.1).
    """
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu")
    kept = 1.0 / config.rope_theta ** (pairs.float() / config.head_dim)
    rope = config.rope_scaling
    if rope is None:
        return kept
    slowed = kept / rope["factor"]
    if rope["rope_type"] == "linear":
        return slowed
    turns = rope["original_max_position_embeddings"] * kept / (2 * math.pi)
    low = rope["low_freq_factor"]
    high = rope["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)
    # Exact where the share is 0 or 1, so far positions do not drift from those of transformers.
    return (1 - share) * slowed + share * kept
