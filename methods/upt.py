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

from losses import GRPO, imitation_loss


@dataclass(frozen=True)
class Method(GRPO):
    sft_coef: float = 1.0  # expert tokens: weight of -logp
    trust_alpha: float = 0.0  # expert tokens: weight p / max(p, this), see losses.imitation_loss
    gate_gamma: float = 0.0  # imitate where the rollouts' mean reward is at most this

    settings: ClassVar[dict] = {**GRPO.settings, "lr": 5e-6}
    demonstrations: ClassVar[str] = "rows"

    def imitates(self, rewards: list[float]) -> bool:
        # 1e-9: 2 of 8 meets a gate of 0.25 whatever the rounding
        return sum(rewards) / len(rewards) <= self.gate_gamma + 1e-9

    def carries_signal(self, rewards, expert):
        return super().carries_signal(rewards, expert) or (bool(expert) and self.imitates(rewards))

    def complete(self, rollouts, expert):
        if expert and self.imitates([row.correct for row in rollouts]):
            return [expert]  # alone in its group: its advantage is 0
        return rollouts

    def token_loss(self, logp, entropy, batch):
        rollout = super().token_loss(logp, entropy, batch)
        expert = self.sft_coef * imitation_loss(logp, self.trust_alpha)
        return torch.where(batch.is_expert[:, None], expert, rollout)

    def teaches(self, batch):
        return super().teaches(batch) | batch.is_expert
