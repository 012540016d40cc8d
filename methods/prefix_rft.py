"""Prefix-RFT (arXiv 2507.01679): one rollout of the group begins with part of the demonstration.

A group has G - 1 plain rollouts and one hybrid: the first L tokens of the demonstration, continued
by the policy. L is a uniform share of the demonstration between low(done) and 0.95, where low falls
along a cosine from 0.95 to 0.05 over the run.
    advantages   reward minus the mean over all G rows, hybrid included                    [18, 19]
    prefix       the 80% of the step's prefix tokens with the lowest entropy get advantage 0
    token loss   GRPO's, prefix tokens included: they count as sampled by the policy

Choices: 1) Entropies are ranked over all rows of the optimizer step (official code: per
micro-batch), taken from the forward that gave old_logp. 2) Tokens without an advantage stay in the
denominator.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from losses import GRPO


def prefix_window(done: float, low_init=0.95, low_target=0.05, high=0.95) -> tuple[float, float]:
    """(low, high) share of the demonstration to copy, at the share `done` of the run."""
    fall = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return low_target + fall * (low_init - low_target), high


def prefix_length(u: float, window: tuple[float, float], demo_len: int) -> int:
    """Tokens to copy, u uniform in [0, 1): at least 1, and at least 1 is left to write.
    Returns 0, a plain rollout, if the demonstration is too short for that."""
    low, high = window
    wanted = int((low + (high - low) * u) * demo_len)
    return max(0, min(max(wanted, 1), demo_len - 1))


def most_uncertain(entropy: Tensor, among: Tensor, drop_ratio: float) -> Tensor:
    """Bool like `among`: its n tokens but for the int(drop_ratio * n) with the lowest entropy.

    Of equal entropies the earlier one is dropped. Call it once, on all rows of the step.
    """
    rank = entropy.detach()[among].argsort(stable=True).argsort()  # (n,) 0 = surest
    return torch.zeros_like(among).masked_scatter(among, rank >= int(drop_ratio * len(rank)))


@dataclass(frozen=True)
class Method(GRPO):
    drop_ratio: float = 0.8  # share of prefix tokens, the surest, that lose their advantage

    demonstrations: ClassVar[str] = "prefixes"
    needs_entropy: ClassVar[bool] = True

    def requests(self, expert, group, done, u):
        prefix = []
        if expert:
            prefix = expert[: prefix_length(u, prefix_window(done), len(expert))]
        if not prefix:
            return [([], group)]
        return [([], group - 1), (prefix, 1)]

    def advantages(self, batch):
        own = super().advantages(batch)[:, None]  # (B, 1)
        prefix = batch.is_prefix & batch.mask
        dropped = prefix & ~most_uncertain(batch.entropy, prefix, self.drop_ratio)
        return torch.where(dropped, 0.0, own)
