"""Sums of many terms are made in float64, where the device has it."""

import torch

NARROW = {"mps"}  # Apple's GPUs have no float64


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in float64; in float32 on a device without it."""
    return x.float() if x.device.type in NARROW else x.double()
