r"""The box around an answer, as in \boxed{42}, and texts that are no answer."""

import re

MAX_BOXES = 8  # boxes tried, from the last one
MAX_BRACES = 10_000  # in one box
# gold answers that are none; data.py drops them
NOT_ANSWERS = {"", "proof", "none", "null", "nan", "n/a", "notfound", "not found", "no answer"}

BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
BOX = re.compile(r"\s*(?=\{)")
PLAIN_BOX = re.compile(r"\{[^{}\\]*\}")
# \boxed 5, \boxed 3.5, \boxed x, \boxed\frac12; not "\boxed as asked"
TEX_BOX = re.compile(
    r"\s*(-?\d+(?:[.,]\d+)*(?:/\d+)?|[A-Za-z](?=\s*(?:$|[.$,;)]))|\\[a-z]+[^$\n.]*)"
)


def closing_brace(text: str, first: int) -> int | None:
    """Where the brace that opens at `first` is closed."""
    if plain := PLAIN_BOX.match(text, first):
        return plain.end() - 1
    depth = 0
    for seen, brace in enumerate(BRACE.finditer(text, first)):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return brace.start()
        if depth <= 0 or seen > MAX_BRACES:
            return None
    return None


def boxed(text: str) -> str | None:
    r"""The content of the last box that is closed. A mention of \boxed in a sentence is no box."""
    end = len(text)
    for _ in range(MAX_BOXES):
        start = max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))
        if start < 0:
            return None
        first = start + (6 if text[start + 1] == "b" else 5)
        if opening := BOX.match(text, first):
            close = closing_brace(text, opening.end())
            if close is not None:
                return text[opening.end() + 1 : close].strip().strip("*")
        elif token := TEX_BOX.match(text, first):
            return token[1].strip()
        end = start
    return None


def is_answer(gold: str) -> bool:
    """Can this gold answer be earned? Empty ones, "proof" and "none" cannot."""
    return gold.strip().strip("$.").casefold() not in NOT_ANSWERS
