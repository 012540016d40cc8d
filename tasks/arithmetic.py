r"""Exact arithmetic as models write it: + - * / and parentheses, in plain text or LaTeX.

    read(r"(9 - 8) \times \frac{8}{4} = 2") -> Expression(numbers=[9, 8, 8, 4], values=[2, 2])

Python's parser reads the expression; only numbers and the four operations are let through.
"""

import ast
import re
from fractions import Fraction
from typing import NamedTuple

MAX_CHARS = 500  # longer texts are no expressions; it also bounds the depth for Python's parser
FRACTION = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
MIXED = re.compile(r"\d(?:\s*\\frac\s*\{\s*|\s+)(\d+)\s*(?:\}\s*\{|/)\s*(\d+)")  # 2 1/2
PLAIN = (
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\\(?:cdot|times)(?![a-zA-Z])|[×·⋅]"), "*"),
    (re.compile(r"\\div(?![a-zA-Z])|÷"), "/"),
    (re.compile(r"[−–]"), "-"),
    (re.compile(r"\\(?:left|right|quad|[()\[\],;:! ])|[$~]"), " "),
    (re.compile(r"[\s.,:]+$"), ""),
    (re.compile(r"\b0+(?=\d)"), ""),  # Python refuses 08
    (re.compile(r"\["), "("),
    (re.compile(r"\]"), ")"),
)
TIMES = re.compile(r"(?<=[\d)])\s*(?=\()|(?<=\))\s*(?=\d)")  # 2(3 + 4)
ALPHABET = re.compile(r"(?:[0-9+\-*/()= ]|\.(?=[0-9]))*")
NODES = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.Constant, ast.unaryop)
OPERATIONS = (ast.Add, ast.Sub, ast.Mult, ast.Div)


class Expression(NamedTuple):
    """numbers: those of the first side, as written. values: of each side, None where undefined."""

    numbers: list[int | float]
    values: list[Fraction | None]


def read(text: str) -> Expression | None:
    """An expression, perhaps with "= ..." behind it; None where the text is none."""
    if len(text) > MAX_CHARS:
        return None
    for spelling, plain in PLAIN:
        text = spelling.sub(plain, text)
    mixed = MIXED.search(text)
    if mixed and int(mixed[1]) < int(mixed[2]):
        return Expression([], [None])  # a mixed number: none of the integers in it is a number
    found = 1
    while found:  # fractions from the inside out
        text, found = FRACTION.subn(r"((\1\2)/(\3\4))", text)
    text = TIMES.sub("*", text.replace("{", "(").replace("}", ")"))
    if not ALPHABET.fullmatch(text):
        return None
    try:
        sides = [ast.parse(side.strip(), mode="eval") for side in text.split("=")]
    except (SyntaxError, RecursionError, MemoryError):  # the latter two: nested too deeply
        return None
    for side in sides:
        if not all(isinstance(node, (*NODES, *OPERATIONS)) for node in ast.walk(side)):
            return None
    numbers = [node.value for node in ast.walk(sides[0]) if isinstance(node, ast.Constant)]
    return Expression(numbers, [value(side.body) for side in sides])


def value(node: ast.expr) -> Fraction | None:
    """The exact value of a parsed expression; None for a division by zero."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp):
        operand = value(node.operand)
        negative = isinstance(node.op, ast.USub) and operand is not None
        return -operand if negative else operand
    left = value(node.left)
    right = value(node.right)
    if left is None or right is None:
        return None
    if isinstance(node.op, ast.Add):
        return left + right
    if isinstance(node.op, ast.Sub):
        return left - right
    if isinstance(node.op, ast.Mult):
        return left * right
    return left / right if right else None
