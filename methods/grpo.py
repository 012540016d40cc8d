"""GRPO (arXiv 2402.03300), as losses.py defines it: reward minus group mean, clipped ratio."""

from losses import GRPO


class Method(GRPO):
    """Nothing differs."""
