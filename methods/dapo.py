"""DAPO (arXiv 2503.14476) as the paper runs it after SFT (DAPO_dc, section C.2.2).

GRPO with dynamic sampling, clip-higher, and advantages divided by the group's standard deviation.
With one update per round (the paper's setting) the ratio is 1 and clip-higher never acts.
"""

from dataclasses import dataclass
from typing import ClassVar

from losses import GRPO


@dataclass(frozen=True)
class Method(GRPO):
    dynamic_sampling: bool = True
    clip_high: float | None = 0.28
    normalize_std: bool = True

    settings: ClassVar[dict] = {**GRPO.settings, "prompts": 64, "temperature": 0.7}
