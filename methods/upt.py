"""UPT, also HPT (arXiv 2509.04419): a prompt is imitated or reinforced, never both.

    mean reward of the G rollouts <= gate_gamma   the demonstration alone: -sft_coef logp     [17]
    else                                          the rollouts alone: GRPO, clipped

Choices: 1) The gate is 0 (imitate what was never solved); the paper's Llama runs use 0.25.
2) Rollouts are clipped, as J_GRPO in equation 17; the official code removes the clip.
3) One denominator for both kinds of token (official: one each, by micro-batch).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from losses import GRPO


@dataclass(frozen=True)
class Method(GRPO):
    sft_coef: float = 1.0  # expert tokens: weight of -logp
    gate_gamma: float = 0.0  # imitate where the rollouts' mean reward is at most this

    settings: ClassVar[dict] = {**GRPO.settings, "lr": 5e-6}
    demonstrations: ClassVar[str] = "rows"

    def complete(self, rollouts, expert):
        success = sum(row.correct for row in rollouts) / len(rollouts)
        # 1e-9: 2 of 8 meets a gate of 0.25 whatever the rounding
        if expert and success <= self.gate_gamma + 1e-9:
            return [expert]  # alone in its group: its advantage is 0
        return rollouts

    def token_loss(self, logp, entropy, batch):
        rollout = super().token_loss(logp, entropy, batch)
        return torch.where(batch.is_expert[:, None], -self.sft_coef * logp, rollout)

    def idle(self, batch):
        return super().idle(batch) & ~batch.is_expert
