"""A quick search for a point at which two expressions differ, in floats, many points at a time.

    suspects(a, b, survey, natural)  ->  the points at which floats tell a from b, worst first

A column is the list of the values of one subtree at all points; NaN stands where it has none.
Floats only point: the caller decides at each of these points by exact arithmetic. Coordinates are
multiples of 1/64, so that sums, products, floors and comparisons of small numbers are exact.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache, reduce
from operator import add, mul, neg

from core.mathtext import Unread
from core.sampling import Survey

POINTS = 640
MIN_POINTS = 80
MAX_VALUES = 40_000  # nodes times points
NAN = math.nan
CLOSE = 1e-9  # relative; rounding in floats stays below it but where terms cancel
CONFIRMED = 6  # suspects that are worth an exact evaluation

Column = list[float]


# ---------------------------------------------------------------------------- coordinates
@lru_cache(16)
def free_column(slot: int) -> Column:
    """Real values of both signs: sizes from 1/64 to 4,000, a third of them whole."""
    draw = random.Random(slot)
    values = []
    for _ in range(POINTS):
        kind = draw.randrange(6)
        if kind < 2:
            value = float(draw.randint(1, 30 if kind else 200))
        elif kind == 2:
            value = draw.randint(1, 128) / 64
        elif kind == 3:
            value = draw.randint(1, 256_000) / 64
        else:
            value = draw.randint(1, 1200) / 64
        values.append(draw.choice((-1, 1)) * value)
    return values


@lru_cache(16)
def steps(slot: int) -> list[tuple[int, float, float]]:
    """How a point lies beside a landmark: (kind, factor, distance)."""
    draw = random.Random(100 + slot)
    found = []
    for _ in range(POINTS):
        factor = draw.choice((1, 1, 1, 2, 3, 5, draw.randint(1, 12))) * draw.choice((-1, 1))
        distance = draw.choice((draw.randint(-3, 3), draw.randint(-64, 64) / 64))
        found.append((draw.randrange(8), factor, distance))
    return found


@lru_cache(16)
def count_column(slot: int) -> Column:
    """Positive whole numbers, mostly small."""
    draw = random.Random(200 + slot)
    tops = (4, 9, 16, 60, 60, 1500)
    return [float(draw.randint(1, draw.choice(tops))) for _ in range(POINTS)]


def coordinates(survey: Survey, n_points: int) -> dict[str, Column]:
    """Variable -> its values. Half of the real ones lie near a constant of the expressions, a
    multiple or a product of them, or near another variable."""
    landmarks = [float(value) for value in survey.landmarks if abs(value) < 1e6]
    landmarks = [round(value * 64) / 64 for value in landmarks] or [1.0]
    columns: dict[str, Column] = {}
    before: Column | None = None
    for slot, name in enumerate(sorted(survey.names)):
        if name in survey.counts:
            column = count_column(slot)[:n_points]
            if len(survey.counts) == 1:
                column[: n_points // 4] = map(float, range(1, n_points // 4 + 1))
        else:
            column = free_column(slot)[:n_points]
            for n, (kind, factor, distance) in enumerate(steps(slot)[:n_points]):
                landmark = landmarks[n % len(landmarks)]
                if kind < 3:
                    column[n] = landmark * factor + distance
                elif kind == 3:
                    other = landmarks[n // 7 % len(landmarks)]
                    column[n] = landmark * other + factor + distance
                elif kind == 4 and before:
                    column[n] = (before[n] if factor > 0 else -before[n]) + distance
            if survey.tame:
                column = [math.fmod(value, 9) for value in column]
            before = column
        columns[name] = column
    return columns


# --------------------------------------------------------------------------------- columns
def guarded(function: Callable) -> Callable:
    """A function of numbers, over columns; NaN where it has no real value."""

    def at(*arguments: float) -> float:
        try:
            value = function(*arguments)
        except (ArithmeticError, ValueError):
            return NAN
        return NAN if isinstance(value, complex) else value

    return lambda *columns: list(map(at, *columns))


def chained(join: Callable) -> Callable:
    """a + b + c + ..., over columns."""
    return lambda *columns: reduce(lambda total, column: list(map(join, total, column)), columns)


def factorial(n: float) -> float:
    if n > 170 or n % 1:
        raise Unread("no whole number, or a large one")
    return float(math.factorial(int(n)))


def binomial(n: float, k: float) -> float:
    if n > 200 or n % 1 or k % 1:
        raise Unread("no whole number, or a large one")
    return float(math.comb(int(n), int(k))) if k >= 0 else 0.0


def root(degree: float, value: float) -> float:
    if value < 0 and degree % 2 == 1:
        return -((-value) ** (1 / degree))
    return value ** (1 / degree)


def whole(*values: float) -> list[int]:
    if any(value % 1 for value in values):
        raise Unread("no whole number, or a large one")
    return list(map(int, values))


COLUMNS = {
    "+": chained(add),
    "*": chained(mul),
    "/": lambda a, b: [x / y if y else NAN for x, y in zip(a, b)],
    "neg": lambda a: list(map(neg, a)),
    "|": lambda a: list(map(abs, a)),
    "\\lfloor": lambda a: [x // 1 for x in a],
    "\\lceil": lambda a: [-(-x // 1) for x in a],
    "mod": lambda a, b: [x - y * (x / y // 1) if y else NAN for x, y in zip(a, b)],
    "max": guarded(lambda *values: max(values) + 0 * sum(values)),  # NaN stays NaN
    "min": guarded(lambda *values: min(values) + 0 * sum(values)),
    "°": lambda a: list(map(math.radians, a)),
    "^": guarded(pow),
    "root": guarded(root),
    "!": guarded(factorial),
    "binom": guarded(binomial),
    "gcd": guarded(lambda *values: float(math.gcd(*whole(*values)))),
    "lcm": guarded(lambda *values: float(math.lcm(*whole(*values)))),
}
COLUMNS |= {
    "ln": guarded(math.log),
    "log": guarded(math.log10),
    "exp": guarded(math.exp),
    "sin": guarded(math.sin),
    "cos": guarded(math.cos),
    "tan": guarded(math.tan),
}


class Floats:
    """The values of trees at the same points; a subtree that is repeated is computed once."""

    def __init__(self, at: dict[str, Column], n_points: int, natural: bool):
        self.at = at
        self.n_points = n_points
        self.natural = natural  # is \\log the natural logarithm?
        self.done: dict[tuple, Column] = {}

    def column(self, node: tuple) -> Column:
        """Unread where a tree holds what floats are not tried on."""
        if node not in self.done:
            self.done[node] = self.compute(node)
        return self.done[node]

    def compute(self, node: tuple) -> Column:
        head = node[0]
        if head in ("num", "e", "pi"):
            value = {"e": math.e, "pi": math.pi}.get(head) or node[1]
            return [float(value)] * self.n_points
        if head in ("sym", "text"):
            return self.at[node[1]]
        function = COLUMNS.get(head)
        children = node[1:]
        if head == "fn":
            name = "ln" if node[1] == "log" and self.natural else node[1]
            function = COLUMNS.get(name)
            children = node[2:]
        if function is None:
            raise Unread("not tried in floats")
        return function(*map(self.column, children))


def size(node: tuple) -> int:
    return 1 + sum(size(child) for child in node if isinstance(child, tuple))


def suspects(a: tuple, b: tuple, survey: Survey, natural: bool) -> tuple[list[dict], int]:
    """(points at which floats tell a from b, worst first; the number of values computed)."""
    if "at" in survey.heads:  # a subtree with values of its own
        raise Unread("not tried in floats")
    n_nodes = size(a) + size(b)
    n_points = max(MIN_POINTS, min(POINTS, MAX_VALUES // n_nodes))
    at = coordinates(survey, n_points)
    try:
        floats = Floats(at, n_points, natural)
        x = floats.column(a)
        y = floats.column(b)
    except OverflowError:  # a number that is no float
        raise Unread("not tried in floats") from None
    gaps = []
    for n, (p, q) in enumerate(zip(x, y)):
        gap = abs(p - q)
        if gap > CLOSE * (abs(p) + abs(q)):  # false for NaN
            gaps.append((gap / (abs(p) + abs(q)), n))
    gaps.sort(reverse=True)
    worst = [n for _, n in gaps[:CONFIRMED]]
    points = []
    for n in worst:
        points.append({name: Fraction(values[n]) for name, values in at.items()})
    return points, n_nodes * n_points
