r"""Sets of real numbers as unions of intervals: x != 2, R \ {2}, "x >= 2 and x <= 5".

A region is a list of pieces (left bracket, low, high, right bracket); low and high are trees.
Endpoints are ordered by their values to 30 digits.
"""

from __future__ import annotations

from decimal import Context, Decimal, localcontext

from core.mathexpr import EMPTY
from core.mathtext import Unread
from core.mathvalue import evaluate, lift
from core.sampling import names_of

INFINITY = ("sym", "\\infty")
MINUS_INFINITY = ("neg", INFINITY)
EVERYTHING = ("(", MINUS_INFINITY, INFINITY, ")")
TURNED = {">": "<", ">=": "<="}
MAX_PIECES = 12
SAME_POINT = Decimal("1e-25")


def upward(ops: tuple, sides: tuple) -> tuple[tuple, tuple]:
    """b > a -> a < b."""
    if set(ops) <= set(TURNED):
        return tuple(TURNED[op] for op in ops[::-1]), sides[::-1]
    return ops, sides


def solved(sides: tuple) -> bool:
    """x = 5: a variable alone on one side, none on the other?"""
    for one, other in (sides, sides[::-1]):
        if one[0] == "sym" and not names_of(other):
            return True
    return False


def infinite(tree: tuple) -> int:
    """1 for oo, -1 for -oo, 0 for anything else."""
    if tree == INFINITY:
        return 1
    return -infinite(tree[1]) if tree[0] == "neg" else 0


def place(tree: tuple, meter) -> Decimal:
    """Where an endpoint lies on the real line."""
    if tree in (INFINITY, MINUS_INFINITY):
        return Decimal("Infinity") if tree == INFINITY else Decimal("-Infinity")
    with localcontext(Context(prec=30)):
        try:
            value = lift(evaluate(tree, {}, meter))
        except KeyError:
            raise Unread("an endpoint with variables") from None
    if value.im:
        raise Unread("not a real number")
    return value.re


def between(ops: tuple, sides: tuple) -> tuple | None:
    """a < x <= b -> its piece; x < b and a < x are rays. None where that is no condition on one
    variable."""
    ops, sides = upward(ops, sides)
    if not set(ops) <= {"<", "<="} or len(ops) > 2:
        return None
    if len(ops) == 1 and sides[1][0] == "sym" and sides[1] != INFINITY:  # 4 < x
        ops = (*ops, "<")
        sides = (*sides, INFINITY)
    elif len(ops) == 1:
        ops = ("<", *ops)
        sides = (MINUS_INFINITY, *sides)
    if sides[1][0] != "sym":
        return None
    left = "[" if ops[0] == "<=" else "("
    right = "]" if ops[1] == "<=" else ")"
    return (left, sides[0], sides[2], right)


def pieces(node: tuple, meter) -> list[tuple]:
    """A tree that stands for a set of real numbers -> its pieces; Unread where it does not."""
    head = node[0]
    if node == EMPTY:
        return []
    if head == "rel":
        ops, sides = node[1:]
        if ops == ("in",):
            return pieces(sides[1], meter)
        if ops == ("!=",) and sides[0][0] == "sym":
            return [*outside([("[", sides[1], sides[1], "]")], meter)]
        piece = between(ops, sides)
        if piece is None:
            raise Unread("not a condition on one variable")
        return [piece]
    if head == "tuple" and len(node) == 4:
        return [(node[1][0], node[2], node[3], node[1][1])]
    if head in ("list", "union"):
        found = []
        for item in node[1:]:
            found += pieces(item, meter)
        return found
    if head == "set":
        return [("[", item, item, "]") for item in node[1:]]
    if head == "both":
        found = [EVERYTHING]
        for item in node[1:]:
            found = common(found, pieces(item, meter), meter)
        return found
    if head == "minus":
        return common(pieces(node[1], meter), outside(pieces(node[2], meter), meter), meter)
    raise Unread("not a set of real numbers")


def common(a: list[tuple], b: list[tuple], meter) -> list[tuple]:
    """The intersection of two regions."""
    if len(a) * len(b) > MAX_PIECES**2:
        raise Unread("too many pieces")
    found = []
    for x in a:
        for y in b:
            piece = overlap(x, y, meter)
            if piece:
                found.append(piece)
    return found


def overlap(x: tuple, y: tuple, meter) -> tuple | None:
    """The piece that two pieces share."""
    left, low = later_start(x, y, meter)
    right, high = earlier_end(x, y, meter)
    length = place(high, meter) - place(low, meter)
    if length > SAME_POINT:
        return (left, low, high, right)
    at_a_point = abs(length) <= SAME_POINT and left == "[" and right == "]"
    return (left, low, low, right) if at_a_point else None


def later_start(x: tuple, y: tuple, meter) -> tuple[str, tuple]:
    gap = compare(x[1], y[1], meter)
    if gap == 0:
        return ("(" if "(" in (x[0], y[0]) else "["), x[1]
    return x[:2] if gap > 0 else y[:2]


def earlier_end(x: tuple, y: tuple, meter) -> tuple[str, tuple]:
    gap = compare(x[2], y[2], meter)
    if gap == 0:
        return (")" if ")" in (x[3], y[3]) else "]"), x[2]
    return (x[3], x[2]) if gap < 0 else (y[3], y[2])


def compare(a: tuple, b: tuple, meter) -> int:
    """-1, 0 or 1: where a lies from b."""
    if a == b:
        return 0
    gap = place(a, meter) - place(b, meter)
    return 0 if abs(gap) <= SAME_POINT else (1 if gap > 0 else -1)


def outside(region: list[tuple], meter) -> list[tuple]:
    """The complement of a region."""
    found = [EVERYTHING]
    for left, low, high, right in region:
        gaps = []
        if low != MINUS_INFINITY:
            gaps.append(("(", MINUS_INFINITY, low, ")" if left == "[" else "]"))
        if high != INFINITY:
            gaps.append(("(" if right == "]" else "[", high, INFINITY, ")"))
        found = common(found, gaps, meter)
    return found


def as_tree(region: list[tuple]) -> tuple:
    """Pieces -> a list of intervals and points, or the only one."""
    items = []
    for left, low, high, right in region:
        items.append(low if low == high else ("tuple", left + right, low, high))
    if len(items) == 1:
        return items[0]
    return ("list", *items) if items else EMPTY
