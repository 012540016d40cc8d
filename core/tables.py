"""What ceiling.py, phases.py and paper/ read: a run's metrics, and CSV tables of other trainers."""

import csv
import math
from pathlib import Path

from core import files
from core.errors import UserError


def read_metrics(run_dir, kind: str, columns: tuple = (), script: str = "sft.py") -> list[dict]:
    """The lines of one kind in a run's metrics.jsonl; a line that is being written is left out."""
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: not found; give a run directory of {script}, or --csv FILE")
    lines = files.read_jsonl(path, broken_tail=True)
    rows = [row for row in lines if row.get("kind") == kind]
    if columns and not (rows and all(set(columns) <= set(row) for row in rows)):
        needed = " and ".join(columns)
        raise UserError(
            f"{path}: no line of kind {kind} with {needed}; train until the first of them"
        )
    return rows


def read_table(path, columns: tuple, also: str = "") -> list[dict[str, str]]:
    """The rows of a CSV file with at least these columns; also: the optional ones, for messages."""
    needed = f"columns {', '.join(columns)}{also}"
    if not Path(path).is_file():
        raise UserError(f"{path}: not found; give a CSV file with {needed}")
    with open(path, newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    if not rows or not set(columns) <= set(rows[0]):
        found = ", ".join(rows[0]) if rows else "no row"
        raise UserError(f"{path}: needs {needed} (found: {found})")
    return rows


def read_number(where: str, word: str | None, default: float = math.nan) -> float:
    """A cell of a table as a number; the default where the cell is empty or missing."""
    try:
        return float(word) if word else default
    except ValueError as error:
        raise UserError(f"{where}: {error}; give numbers, empty where unknown") from None
