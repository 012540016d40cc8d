"""SRFT (arXiv 2506.19767): imitation and RL in one loss, weighed by the policy's entropy.

Rows and advantages as LUFFY's. With H the mean token entropy of the row, held constant [14-16]:
    expert token            -0.5 exp(-H) logp  -  A p / (p + 0.1)
    token of a right row    -0.1 exp(+H) logp
    token of a wrong row    +logp               weight 1, unbounded below: watch the entropy

Choices: 1) H is each row's own; equation 16 prints one H for all. 2) Expert tokens with A > 0
become more likely; the sign as printed would make them less likely. 3) No ratio and no clip act.
"""

import math
from dataclasses import dataclass

import torch

from losses import imitation_loss, mean_entropy
from methods.luffy import Method as LUFFY


@dataclass(frozen=True)
class Method(LUFFY):
    imitation: float = 0.5  # expert tokens: weight of -logp, times exp(-H)
    trust_alpha: float = 0.0  # and times p / max(p, this), see losses.imitation_loss
    success_coef: float = 0.1  # right rollouts: weight of -logp, times exp(+H)

    def token_loss(self, logp, entropy, batch):
        H = mean_entropy(entropy, batch.mask)[:, None]  # (B, 1)
        shaped = torch.sigmoid(logp - math.log(self.shaping_gamma))
        imitation = self.imitation * torch.exp(-H) * imitation_loss(logp, self.trust_alpha)
        expert = imitation - batch.advantages * shaped
        right = -self.success_coef * torch.exp(H) * logp
        rollout = torch.where(batch.is_success[:, None], right, logp)
        return torch.where(batch.is_expert[:, None], expert, rollout)

    def teaches(self, batch):
        return batch.mask.any(1)  # rows without an advantage learn too
