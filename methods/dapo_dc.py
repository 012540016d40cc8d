"""The paper's name for DAPO with dynamic sampling (d) and clip-higher (c)."""

from methods.dapo import Method

__all__ = ["Method"]
