"""Speed and memory of what costs time, beside the machine's limits and beside other software.

    python -m bench rollout     the sampler
    python -m bench sft         a training step, through sft.py itself
    python -m bench rl          a whole step of RL, through rl.py itself
    python -m bench parity      our losses and gradients beside TRL's own code
    python -m bench gpu         all of it on a GPU, in 8 minutes: right, fast, within memory
    ... --peer --peer-python /path/to/python     beside transformers and TRL in that python
    ... --help                                   all flags

Every run is a process of its own, so peak memory is one run's. With --peer ours and theirs take
turns, on the same prompts, lengths, weights and number of threads. CPU-seconds stand beside wall
time: on a shared machine they are the steadier figure. The last line printed is JSON.
"""

import importlib
import sys

import core.start  # before torch

from core import cli

COMMANDS = ("rollout", "sft", "rl", "parity", "gpu")


def start() -> None:
    """The first word picks what is measured; the flags are its own."""
    name = sys.argv[1] if len(sys.argv) > 1 else "nothing"
    if name in ("-h", "--help"):
        print(__doc__)
        return
    if name not in COMMANDS:
        print(__doc__)
        known = ", ".join(COMMANDS)
        print(f"error: {name} to measure; give one of: {known}", file=sys.stderr)
        sys.exit(2)
    del sys.argv[1]
    module = importlib.import_module(f"bench.{name}")
    cli.run(module.main, module.Config)


if __name__ == "__main__":
    start()
