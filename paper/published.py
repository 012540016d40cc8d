"""The paper's own numbers (arXiv 2512.11470, Qwen2.5-7B unless said), for the report's margins."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

from core import tables

# its Figure 2: peak or ceiling; the best mixed method is LUFFY
PARADIGMS = {"SFT": 76.9, "RL": 74.3, "mixed": 72.7, "SFT-then-RL": 78.1}
# by data scale: trajectories, minimum validation loss, highest A_post; Pearson -0.94
SCALES = {
    "S1K": (1_000, 0.51, 77.3),
    "102K": (102_000, 0.42, 79.7),
    "220K": (220_000, 0.41, 82.6),
    "440K": (440_000, 0.39, 82.8),
    "889K": (889_000, 0.37, 84.0),
}
# its set that each of ours stands for, in Table 4
STANDS_FOR = {"small": "S1K", "middle": "Uniform102K", "large": "SFT889K", "fixed": "Uniform102K"}


class Published(NamedTuple):
    """A row of the paper's Table 4."""

    step: int  # of SFT
    p_sft: float
    pl_rl: float
    at_bound: bool  # its A_post is the bound of the fit: the data do not determine it

    def text(self) -> str:
        total = f"{self.p_sft} + {self.pl_rl} = {self.p_sft + self.pl_rl:.1f}"
        return f"{self.step}: {total}" + ("*" if self.at_bound else "")


@cache
def table4() -> dict[str, list[Published]]:
    """Its Table 4 by data set, in order of SFT compute."""
    path = Path(__file__).with_name("table4.csv")
    sets = {}
    for row in tables.read_table(path, ("dataset", "sft_step", "p_sft", "pl_rl", "at_bound")):
        step, p_sft, pl_rl = int(row["sft_step"]), float(row["p_sft"]), float(row["pl_rl"])
        sets.setdefault(row["dataset"], []).append(
            Published(step, p_sft, pl_rl, row["at_bound"] == "1")
        )
    return sets


def beside(set_name: str, start: str) -> str:
    """The row of Table 4 that stands beside one of our starting points, or -."""
    rows = table4().get(STANDS_FOR.get(set_name, ""), [])
    chosen = {
        "adaptive": lambda: rows[0],
        "stable": lambda: max(rows, key=lambda row: row.p_sft),
        "late": lambda: rows[-1],
    }
    return chosen[start]().text() if rows and start in chosen else "-"
