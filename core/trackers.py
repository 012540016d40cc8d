"""The numbers of metrics.jsonl in TensorBoard or Weights & Biases too: --log-to NAME.

Each number goes by its kind and its own name: train/loss, val/val_loss, eval/pass1. A null is not
sent. No run fails because of a tracker: its first failure is printed, and the run goes on without.
"""

import importlib.util
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from core.errors import UserError


def check(name: str) -> None:
    """Raise UserError where the package of a tracker is not installed."""
    if name and importlib.util.find_spec(name) is None:
        raise UserError(
            f"--log-to {name}: the package is not installed; pip install {name}, or leave the flag "
            "out: metrics.jsonl has the same numbers"
        )


def numbers_of(row: dict) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl under the names that a tracker shows."""
    found = {}
    for name, value in row.items():
        if name != "step" and isinstance(value, (int, float)):
            found[f"{row['kind']}/{name}"] = value
    return found


class Tracker:
    """Takes each line of metrics.jsonl; does nothing without a name, or once it has failed."""

    def __init__(self, name: str, folder: Path, after: int, settings: dict):
        """folder: the run directory. after: what it was told of later steps is to be forgotten; -1
        for a new run."""
        self.name = name
        self._write: Callable[[dict], None] | None = None
        if name == "tensorboard":
            self._guard(self._open_tensorboard, folder, after)
        elif name == "wandb":
            self._guard(self._open_wandb, folder, settings)

    def log(self, row: dict) -> None:
        if self._write:
            self._guard(self._write, row)

    def _guard(self, function: Callable, *arguments) -> None:
        try:
            function(*arguments)
        except Exception as error:  # a tracker may raise anything, and none of it is worth a run
            self._write = None
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            print(
                f"--log-to {self.name} failed, so it is off now: {reason}; metrics.jsonl goes on",
                flush=True,
            )

    def _open_tensorboard(self, folder: Path, after: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder / "tensorboard", purge_step=after + 1)

        def write(row: dict) -> None:
            for name, value in numbers_of(row).items():
                writer.add_scalar(name, value, row["step"])
            writer.flush()

        self._write = write

    def _open_wandb(self, folder: Path, settings: dict) -> None:
        import wandb

        path = folder / "wandb_id"  # a resumed run goes on in the same curves
        if not path.exists():
            path.write_text(secrets.token_hex(4))
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "sft-then-rl"),
            name=folder.name,
            id=path.read_text(),
            resume="allow",
            dir=str(folder),
            config=settings,
        )
        run.define_metric(
            "*", step_metric="step"
        )  # steps may come twice: a killed run's, and again
        self._write = lambda row: run.log({"step": row["step"], **numbers_of(row)})
