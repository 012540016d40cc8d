"""DAPO_d of the paper (section 6.1): GRPO, and prompts whose rewards all agree are replaced."""

from dataclasses import dataclass

from losses import GRPO


@dataclass(frozen=True)
class Method(GRPO):
    dynamic_sampling: bool = True
