r"""Do two trees say the same? Structures item by item, values exactly or at points.

    Comparison().same(tree, tree)  ->  bool

1) Lists and sets in any order, tuples and matrices in order. Equations up to a factor, inequalities
   up to a positive one, but a solved one (x = 5, x > 4) only to a solved one. x > 4 is the
   interval; x = 5 and 2 + 3 = 5 are 5.
2) Units of one kind are converted, of different kinds refused, left out on one side forgiven. A
   base may not be left out.
3) Fractions are compared exactly. Other values are computed with P and with P + 40 digits, and are
   equal when they differ at P + 40 digits by no more than the rounding error there: 10^-35 times
   what P digits drifted by, or 10^3 units in the last place of the largest value on the way.
   P >= 60 grows with the digits of the numbers written and with the size, large or small, of the
   values on the way; above MAX_PRECISION nothing is decided and the answer is no.
4) With variables, values must agree at 3 seeded points (core/sampling.py); kinked functions (|.|,
   floors, even roots, (-1)^n ...) at 160, or at what ENOUGH_WORK allows and at least 12. Two
   expressions that differ on a share s of such points are taken for equal with a chance of
   (1 - s)^(number of points).
5) Points where a root or a logarithm leaves the real numbers say nothing, unless i is written.
All work is counted, series before they are computed: what needs more than MAX_WORK is not equal.
"""

from __future__ import annotations

from decimal import (
    Context,
    Decimal,
    DivisionByZero,
    InvalidOperation,
    Overflow,
    getcontext,
    localcontext,
)
from fractions import Fraction
from functools import lru_cache

from core import regions
from core.mathexpr import EMPTY
from core.mathtext import Unread
from core.mathunits import measure
from core.mathvalue import MAX_BITS, Approx, evaluate, fraction, lift
from core.sampling import Survey, names_of, values_at
from core.screening import suspects

MAX_ITEMS = 24  # of a list that is matched in any order, which is quadratic; longer ones are sorted
MAX_PRECISION = 240  # digits of an approximate value
EXTRA = 40  # digits of the second evaluation beyond the first
MAX_WORK = 20_000  # units that one comparison may spend, each 0.2 to 0.4 us
# points tried, points that are enough, points that are at least needed
SMOOTH_POINTS = (12, 3, 2)
KINKED_POINTS = (240, 160, 6)
SCREENED_POINTS = 32  # that are enough behind the float points of core/screening.py
FLOATS = 6  # values computed as floats for one unit of work
THOROUGH = 3  # points at which two evaluations are compared; one is enough for the others
FEW = 12  # agreeing points that are enough when ENOUGH_WORK is spent
ENOUGH_WORK = 14_000

ZERO = Decimal("1e-20")
HOPELESS = 30  # points without a value
POINT_COST = 60  # of a value of a variable
EVENTS = ("rel", "both", "union", "tuple", "set")  # what a probability is of


@lru_cache(64)
def context(digits: int) -> Context:
    traps = [Overflow, InvalidOperation, DivisionByZero]
    return Context(prec=digits, Emax=20_000, Emin=-20_000, traps=traps)


# ------------------------------------------------------------------------------ structures
def members(node: tuple) -> list[tuple]:
    """The items of a list, a set or a union; anything else is its own only item. A set in a list
    stays one item."""
    if node == EMPTY:
        return []
    if node[0] not in ("list", "set", "union"):
        return [node]
    found = []
    for item in node[1:]:
        flat = item[0] in ("list", "union") or (node[0] == "union" and item[0] == "set")
        found += members(item) if flat else [item]
    return found


def unit_of(node: tuple) -> tuple[str, tuple]:
    """(unit as written, value); "" where there is none."""
    if node[0] == "neg":
        unit, value = unit_of(node[1])
        return unit, ("neg", value)
    if node[0] == "°":
        return "deg", node[1]
    if node[0] != "unit":
        return "", node
    inner, value = unit_of(node[2])
    return f"{inner} {node[1]}".strip(), value


def base_of(node: tuple) -> str:
    return node[1] if node[0] == "base" and node[1] != "10" else ""


def named(side: tuple) -> bool:
    """Can an answer be assigned to this: x, AB, |AB|, f(x), area, (x, y)?"""
    if side[0] == "*" and side[1][0] == "sym" and side[-1][0] in EVENTS:  # P(X > 3)
        return True
    if side[0] in ("tuple", "*", "|"):
        parts = [part for part in side[1:] if isinstance(part, tuple)]
        letters = side[0] != "|" or all(part[0] == "*" for part in parts)
        return letters and all(named(part) for part in parts)
    return side[0] in ("sym", "text", "call")


def assignments(node: tuple) -> tuple | None:
    """x = 1, y = 2 in any order -> (1, 2)"""
    found = {}
    for item in node[1:]:
        if item[0] != "rel" or item[1] != ("=",) or item[2][0][0] != "sym":
            return None
        found[item[2][0][1]] = item[2][1]
    if node[0] != "list" or len(found) != len(node) - 1:
        return None
    return ("tuple", "()", *(found[name] for name in sorted(found)))


def solved(sides: tuple) -> bool:
    """x = 5: a variable alone on one side, none on the other?"""
    for one, other in (sides, sides[::-1]):
        if one[0] == "sym" and not names_of(other):
            return True
    return False


def without_degrees(node: tuple) -> tuple:
    """90° - x -> 90 - x: the sign taken off the terms of a sum."""
    if node[0] in ("+", "neg"):
        return (node[0], *map(without_degrees, node[1:]))
    return node[1] if node[0] == "°" else node


# ------------------------------------------------------------------------------ comparison
class Comparison:
    """One comparison, exactly or to one part in `parts`: what it decides, whether it needed that,
    and what it spent."""

    def __init__(self, parts: int = 0):
        self.parts = parts
        self.tolerated = False
        self.work = 0
        self.peak = Decimal(0)  # largest approximate value on the way
        self.extent = 0  # digits before or after the point of a fraction on the way
        self.natural = False  # is \log the natural logarithm?
        self.left_reals = False

    def spend(self, series: int) -> None:
        """Pay for series before they are computed."""
        self.work += series * 4 * getcontext().prec
        if self.work > MAX_WORK:
            raise Unread("too much work")

    def pay(self, value, from_real: bool = False):
        """Count the cost of a value. from_real: it was computed from real numbers."""
        if isinstance(value, Fraction):
            above = value.numerator.bit_length()
            below = value.denominator.bit_length()
            bits = max(above, below)
            if bits > MAX_BITS:
                raise Unread("too large")
            self.work += 15 + bits // 64 + (bits // 512) ** 2
            self.extent = max(self.extent, abs(below - above) // 3)
        else:
            self.work += 15 + getcontext().prec // 8
            self.peak = max(self.peak, abs(value.re), abs(value.im))
            if value.im and from_real:
                self.left_reals = True
        if self.work > MAX_WORK:
            raise Unread("too much work")
        return value

    def same(self, a: tuple, b: tuple) -> bool:
        """Do two answers say the same?"""
        if a == b:
            return True
        heads = {a[0], b[0]}
        if heads & {"both", "minus"}:
            a, b = self.as_regions(a), self.as_regions(b)
            return a is not None and b is not None and self.same(a, b)
        if "rel" in heads:
            if len(heads) == 1:
                return self.same_relation(a, b)
            a = self.assigned(a)
            b = self.assigned(b)
            return a is not None and b is not None and self.same(a, b)
        if heads == {"list", "tuple"}:  # x = 1, y = 2 and (1, 2)
            a = (assignments(a) if a[0] == "list" else a) or a
            b = (assignments(b) if b[0] == "list" else b) or b
            if a[0] == b[0]:
                return self.same(a, b)
        if {a[0], b[0]} & {"list", "set", "union"}:
            return self.same_items(members(a), members(b))
        return self.same_value(a, b)

    def same_value(self, a: tuple, b: tuple) -> bool:
        """Units, then tuples, matrices and ratios side by side, then values."""
        unit_a, a = unit_of(a)
        unit_b, b = unit_of(b)
        if base_of(a) != base_of(b):
            return False
        if unit_a != unit_b and unit_a and unit_b:
            size_a = measure(unit_a)
            size_b = measure(unit_b)
            if size_a and size_b and size_a[1] != size_b[1]:
                return False
            if size_a and size_b and size_a[0] != size_b[0]:
                a = ("*", a, ("num", size_a[0] / size_b[0]))
        heads = {a[0], b[0]}
        if heads & {"tuple", "matrix", "ratio"}:
            if len(heads) > 1 or len(a) != len(b):
                return False
            return all(map(self.same_part, a[1:], b[1:]))
        if self.equal(a, b):
            return True
        plain_a = without_degrees(a)
        plain_b = without_degrees(b)
        one_sided = (plain_a == a) != (plain_b == b)  # 90° - x and 90 - x
        return one_sided and self.equal(plain_a, plain_b)

    def same_part(self, a, b) -> bool:
        """Items of a tuple, or its brackets."""
        return self.same(a, b) if isinstance(a, tuple) and isinstance(b, tuple) else a == b

    def same_items(self, a: list[tuple], b: list[tuple]) -> bool:
        """The same items equally often, in any order."""
        if len(a) != len(b):
            return False
        if len(a) > MAX_ITEMS:
            return all(map(self.same, sorted(a, key=repr), sorted(b, key=repr)))
        rest = list(b)
        for item in a:
            at = next((n for n, other in enumerate(rest) if self.same(item, other)), None)
            if at is None:
                return False
            rest.pop(at)
        return True

    def as_regions(self, node: tuple) -> tuple | None:
        if node[0] not in ("both", "minus"):
            return node
        try:
            return regions.as_tree(regions.pieces(node, self))
        except ArithmeticError:
            return None

    def same_relation(self, a: tuple, b: tuple) -> bool:
        """Equations up to a factor, inequalities up to a positive one, chains side by side,
        others by their values."""
        ops, left = regions.upward(*a[1:])
        ops_b, right = regions.upward(*b[1:])
        if ops != ops_b:
            x = self.assigned(a)
            y = self.assigned(b)
            return x is not None and y is not None and self.same(x, y)
        if all(map(self.same, left, right)):
            return True
        if ops == ("=",) and self.same(left[0], right[1]) and self.same(left[1], right[0]):
            return True
        if len(ops) > 1 or ops[0] in ("in", "≈") or solved(left) or solved(right):
            return False
        return self.proportional(ops[0], left, right)

    def proportional(self, op: str, left: tuple, right: tuple) -> bool:
        f = ("+", left[0], ("neg", left[1]))
        g = ("+", right[0], ("neg", right[1]))
        survey = Survey(f, g)
        if "\\infty" in survey.names:
            return False
        values = values_at(survey, 0)
        try:
            ratio = evaluate(f, values, self) / evaluate(g, values, self)
        except ArithmeticError:
            return False
        if abs(lift(ratio)).re < ZERO:  # 2 + 3 = 5 is a multiple of any equation
            return False
        positive = (ratio if isinstance(ratio, Fraction) else ratio.re) > 0
        if not positive and op not in ("=", "!="):
            return False
        return self.equal(("*", f, ("at", values, g)), ("*", g, ("at", values, f)))

    def assigned(self, node: tuple) -> tuple | None:
        """x = 5, 2 + 3 = 5 -> 5; x in S -> S; 2/3 ~ 0.67 -> 2/3; x > 4 -> (4, oo). None where
        there is no value."""
        if node[0] != "rel":
            return node
        ops, sides = node[1:]
        if ops == ("in",):
            return sides[1]
        if ops == ("≈",):
            return sides[0] if Comparison(100).same(*sides) else None
        if set(ops) == {"="}:
            return self.last_side(sides)
        try:
            return regions.as_tree(regions.pieces(node, self))
        except ArithmeticError:
            return None

    def last_side(self, sides: tuple) -> tuple | None:
        """The value of an assignment or of a chain of equal values."""
        if named(sides[0]):
            name, *rest = sides
        elif named(sides[-1]):
            *rest, name = sides
        else:
            name, rest = None, list(sides)
        if not all(self.same(rest[0], other) for other in rest[1:]):
            return None
        value = rest[0]
        variables = name is not None and name[0] == value[0] == "tuple" and len(name) == len(value)
        if variables and all(part[0] == "sym" for part in name[2:]):  # (y, x) = (2, 1)
            pairs = sorted(zip(name[2:], value[2:]), key=lambda pair: pair[0])
            return (*value[:2], *(part for _, part in pairs))
        return value

    # ------------------------------------------------------------------------------ values
    def equal(self, a: tuple, b: tuple) -> bool:
        """Do two trees have the same value wherever both are defined?"""
        x = fraction(a)
        y = fraction(b)
        if x is not None and y is not None:
            return self.near(x, y)
        survey = Survey(a, b)
        if "\\infty" in survey.names:  # only the sign of an infinity counts; oo - oo is nothing
            return infinite(a) == infinite(b) != 0
        for self.natural in (False, True)[: 1 + ("log" in survey.heads)]:
            if self.agree_at_points(a, b, survey):
                return True
        return False

    def agree_at_points(self, a: tuple, b: tuple, survey: Survey) -> bool:
        tried, enough, at_least = KINKED_POINTS if survey.kinked else SMOOTH_POINTS
        if not survey.names and "call" not in survey.heads:
            tried = enough = at_least = 1
        digits = 60 + 2 * survey.digits
        seen: set[tuple] = set()
        for point in range(tried):
            values = values_at(survey, point)
            self.work += POINT_COST * len(values)
            verdict = self.agree(a, b, values, digits, closely=len(seen) < THOROUGH)
            if verdict is None and self.left_reals and "i" in survey.heads:
                verdict = False
            if verdict is False:
                return False
            if verdict:
                seen.add(tuple(values.values()))
            if self.work > MAX_WORK or (point > HOPELESS and not seen):
                break
            if verdict and survey.kinked and len(seen) == THOROUGH:
                screened = self.agree_in_floats(a, b, survey, digits)
                if screened is False:
                    return False
                if screened:
                    enough = SCREENED_POINTS
            if len(seen) == enough or (len(seen) >= FEW and self.work > ENOUGH_WORK):
                return True
        return len(seen) >= at_least

    def agree_in_floats(self, a: tuple, b: tuple, survey: Survey, digits: int) -> bool | None:
        """False where a difference that floats point to is one; None where they cannot tell."""
        try:
            points, n_values = suspects(a, b, survey, self.natural)
        except Unread:
            return None
        self.work += n_values // FLOATS
        for values in points:
            if self.agree(a, b, values, digits, closely=False) is False:
                return False
        return True

    def agree(self, a: tuple, b: tuple, values: dict, digits: int, closely: bool) -> bool | None:
        """Are two values equal at a point? None where undefined, not decided, or where they differ
        and the real numbers are left (left_reals says so).

        closely: with a second evaluation, which tells 10^-60 from nothing.
        """
        self.peak = Decimal(0)
        self.extent = 0
        self.left_reals = False
        decided = digits <= MAX_PRECISION  # else only exact values can be
        try:
            with localcontext(context(digits if decided else 60)):
                x = evaluate(a, values, self)
                y = evaluate(b, values, self)
                exact = isinstance(x, Fraction) and isinstance(y, Fraction)
                if not exact and not decided:
                    return None
                if exact:
                    same = self.near(x, y)
                else:
                    early = (self.pay(lift(x)), self.pay(lift(y)))
                    same = not self.apart(*early, slack=self.peak.scaleb(-digits // 2))
            if not same:
                return None if self.left_reals else False
            if exact:
                return True
            needed = digits + max(2 * self.peak.adjusted(), self.extent)
            if closely and digits < needed:  # 10^50 + x needs 50 digits more
                return self.agree_closely(a, b, values, needed)
            return self.agree_closely(a, b, values, digits, early) if closely else True
        except ArithmeticError:
            return None

    def agree_closely(
        self, a: tuple, b: tuple, values: dict, digits: int, early=None
    ) -> bool | None:
        """Evaluates with `digits` (early, if that is done) and with EXTRA digits more."""
        if digits > MAX_PRECISION:
            return None
        if early is None:
            early = self.pair(a, b, values, digits)
        late = self.pair(a, b, values, digits + EXTRA)
        with localcontext(context(digits + EXTRA)):
            drift = sum(abs(after - before).re for before, after in zip(early, late))
            if drift > Decimal("1e-25"):
                return None
            error = max(drift.scaleb(5 - EXTRA), self.peak.scaleb(3 - digits - EXTRA))
            return not self.apart(*late, slack=error)

    def pair(self, a: tuple, b: tuple, values: dict, digits: int) -> tuple[Approx, Approx]:
        with localcontext(context(digits)):
            x = self.pay(lift(evaluate(a, values, self)))
            y = self.pay(lift(evaluate(b, values, self)))
        return x, y

    def apart(self, x: Approx, y: Approx, slack: Decimal) -> bool:
        gap = abs(x - y).re
        return gap > slack and not self.tolerates(gap, max(abs(x).re, abs(y).re))

    def near(self, x: Fraction, y: Fraction) -> bool:
        p = x.numerator * y.denominator
        q = y.numerator * x.denominator
        if p == q:
            return True
        integers = x.denominator == y.denominator == 1  # have no tolerance
        return not integers and self.tolerates(abs(p - q), max(abs(p), abs(q)))

    def tolerates(self, gap, size) -> bool:
        near = self.parts > 0 and gap * self.parts <= size
        self.tolerated |= near
        return near


def infinite(tree: tuple) -> int:
    """1 for oo, -1 for -oo, 0 for anything else."""
    if tree == regions.INFINITY:
        return 1
    return -infinite(tree[1]) if tree[0] == "neg" else 0
