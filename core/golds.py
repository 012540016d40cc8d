"""The question and the right answers of a data row, for data.py and for rewards."""

from core import boxes, rows
from core.errors import UserError


def prompt_text(row: dict) -> str | None:
    """The question of a row in any accepted spelling: the last message of a conversation."""
    reading = rows.understand(row, answer_is_gold=True)
    return reading.question or None if reading else None


def golds_of(row: dict) -> list[str]:
    """The right answers of a row, of which any counts; of a worked solution its last box, or what
    follows ####. Raises UserError where there is none."""
    found = find_golds(row)
    if not found:
        raise UserError(f"no gold answer (found: {sorted(row)}); add a column answer")
    return found


def find_golds(row: dict) -> list[str]:
    """golds_of(), [] where there is none."""
    column, texts = rows.golds(row)
    found = []
    for text in texts:
        box = boxes.boxed(text)
        gold = text.split("####")[-1].strip() if box is None else box
        worked = column == "solution" and gold == text.strip() and rows.is_long(gold)
        if boxes.is_answer(gold) and not worked:
            found.append(gold)
    return found
