"""LUFFY (arXiv 2504.14945): the demonstration is one more row of its group.

A group has G - 1 rollouts and the expert's row; the baseline is the mean reward over all of them.
    rollout token   -r A               r the ratio; no clip                              [13]
    expert token    -A p / (p + 0.1)   p the policy's probability; slope A 0.1 p / (p + 0.1)^2
The shaping weighs an expert token most where p = 0.1; near 0 and 1 it has almost no gradient.

Choices: 1) Expert tokens count as sampled with probability 1: the official code; equation 13 prints
a ratio. 2) Tokens are averaged over the whole step (official: their sum over 8192).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from losses import GRPO


@dataclass(frozen=True)
class Method(GRPO):
    clip_low: float | None = None
    clip_high: float | None = None
    shaping_gamma: float = 0.1  # expert tokens: p / (p + this) times the advantage

    demonstrations: ClassVar[str] = "rows"
    expert_forward: ClassVar[bool] = True

    def requests(self, expert, group, done, u):
        return [([], group - bool(expert))]

    def carries_signal(self, rewards, expert):
        unsolved = bool(expert) and max(rewards) <= 0  # the demonstration is the only signal
        return super().carries_signal(rewards, expert) or unsolved

    def complete(self, rollouts, expert):
        return [*rollouts, expert] if expert else rollouts

    def token_loss(self, logp, entropy, batch):
        # p / (p + gamma) as a sigmoid of log-probs: nothing divides by 0
        shaped = torch.sigmoid(logp - math.log(self.shaping_gamma))
        rollout = super().token_loss(logp, entropy, batch)
        return torch.where(batch.is_expert[:, None], -batch.advantages * shaped, rollout)
