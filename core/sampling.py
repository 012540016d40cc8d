"""Where two expressions are tried: what occurs in them, and values for their variables.

Smooth expressions are tried at few points. Kinked ones, where |.|, floors, ceilings, even
roots of more than a monomial, factorials, binomials, max, min, mod or (-1)^n occur, at many: all
combinations of signs in turn, sizes from 0.0005 to 4700, near the constants written and near their
multiples, near the other variables, and counts (n!, binomials, (-1)^n; n, m, k in a floor) at
1, 2, 3, ... Every value is seeded by name and number of the point: a verdict never changes.
"""

from __future__ import annotations

from fractions import Fraction
from zlib import crc32

from core.mathvalue import fraction

COUNTS = set("nmkNMK")  # names of whole numbers


# ----------------------------------------------------------------------- what a tree holds
class Survey:
    """What occurs in the trees of one comparison."""

    def __init__(self, *trees: tuple):
        self.names: set[str] = set()  # variables
        self.heads: set[str] = set()
        self.digits = 0  # of the longest number
        self.kinked = False  # are three points too few?
        self.counts: set[str] = set()  # variables that are small whole numbers
        self.constants: set[Fraction] = set()
        for tree in trees:
            self.visit(tree)
        self.landmarks = sorted(self.constants)[:16] or [Fraction(1)]
        self.tame = bool(self.heads & {"fn", "e"})  # no large values: exponentials

    def visit(self, node: tuple) -> None:
        head = node[0]
        if head == "num":
            value = node[1]
            digits = (value.numerator.bit_length() + value.denominator.bit_length()) // 3
            self.digits = max(self.digits, digits)
            self.constants.add(value)
            return
        if head in ("sym", "text"):
            self.names.add(node[1])
            return
        self.heads.add("log" if node[1:2] == ("log",) else head)
        if head in KINKS:
            self.kinked = True
            self.find_counts(node)
        elif head in ("^", "root"):
            self.visit_power(*(node[1:] if head == "^" else (node[2], ("/", ONE, node[1]))))
        for child in node[1:]:
            if isinstance(child, tuple):
                self.visit(child)

    def visit_power(self, base: tuple, exponent: tuple) -> None:
        """Even roots of sums, powers and products are kinked, and so is (-1)^n."""
        if base[0] == "neg" and base[1][0] == "num":
            names = names_of(exponent)
            if names:
                self.kinked = True
                self.counts |= names
        degree = fraction(exponent)
        even_root = degree.denominator % 2 == 0 if degree else exponent[0] == "/"
        if even_root and base[0] not in ("num", "sym") and names_of(base):
            factors = base[1:] if base[0] == "*" else (base,)
            powers = [factor for factor in factors if factor[0] not in ("num", "sym")]
            self.kinked = self.kinked or bool(powers) or len(factors) > 2

    def find_counts(self, node: tuple) -> None:
        names = names_of(node)
        if node[0] in ("!", "binom", "gcd", "lcm"):
            self.counts |= names
        elif node[0] in ("\\lfloor", "\\lceil", "mod"):
            self.counts |= names & COUNTS


KINKS = {"|", "!", "binom", "mod", "max", "min", "gcd", "lcm", "\\lfloor", "\\lceil"}
ONE = ("num", Fraction(1))


def names_of(tree: tuple) -> set[str]:
    """The variables of a tree."""
    if tree[0] in ("sym", "text"):
        return {tree[1]}
    found: set[str] = set()
    for child in tree:  # of a relation, the sides are a tuple without a head
        if isinstance(child, tuple):
            found |= names_of(child)
    return found


# ---------------------------------------------------------------------------------- points
def smooth_value(name: str, point: int) -> Fraction:
    """By point below 1, above 1, negative, an integer, a larger integer."""
    seed = crc32(f"{name} {point}".encode("utf-8", "replace"))
    kinds = (
        (1 + seed % 28, 29),
        (30 + seed % 97, 29),
        (-1 - seed % 97, 31),
        (2 + seed % 9, 1),
        (5 + seed % 40, 1),
    )
    return Fraction(*kinds[point % 5])


def count_value(name: str, point: int, alone: bool, landmarks: list[Fraction]) -> Fraction:
    """A positive integer: the only count of an expression runs through 1, 2, 3 ..., several are
    drawn, mostly small; one in four is large or near a landmark."""
    seed = crc32(f"{name} {point}".encode("utf-8", "replace"))
    draw = seed // 8
    if seed % 8 == 0:
        return Fraction(1 + draw % 1500)
    if seed % 8 == 1:
        landmark = int(abs(landmarks[draw % len(landmarks)]))
        return Fraction(max(1, landmark * (1 + draw // 32 % 3) + draw // 256 % 5 - 2))
    if alone:
        return Fraction(1 + point * 3 // 4)
    return Fraction(1 + draw % (5, 9, 14, 60)[seed % 4])


def mixed_value(name: str, point: int, landmarks: list[Fraction]) -> Fraction:
    """Positive: small, medium, large, whole, or near a landmark or a multiple of it."""
    seed = crc32(f"{name} {point}".encode("utf-8", "replace"))
    kind = seed % 8
    draw = seed // 8
    if kind < 3:
        landmark = abs(landmarks[draw % len(landmarks)])
        step = Fraction(draw // 256 % 41 - 20, (170, 17, 6)[kind])
        if kind == 2:
            landmark *= (2, 3, 5, 8, 1 + draw % 20, landmark)[draw // 32 % 6]
        return abs(landmark + step)
    if kind == 3:
        return Fraction(1 + draw % 160, 29)
    if kind == 4:
        return Fraction(1 + draw % 30)
    if kind == 5:
        return Fraction(1 + draw % 900, 7)
    size = (Fraction(1, 100), Fraction(1, 8), 40, 1000)[draw // 89 % 4]
    return size * Fraction(1 + draw % 89, 19)


def values_at(survey: Survey, point: int) -> dict[str, Fraction]:
    """A value for each variable, no two the same."""
    values: dict[str, Fraction] = {}
    alone = len(survey.counts) == 1
    for n, name in enumerate(sorted(survey.names)):
        if not survey.kinked:
            value = smooth_value(name, point)
        elif name in survey.counts:
            value = count_value(name, point, alone, survey.landmarks)
        else:
            value = mixed_value(name, point, [*values.values(), *survey.landmarks])
            value = value % 9 if survey.tame else value
            if point >> n % 6 & 1:
                value = -value
        while value in values.values() and name not in survey.counts:
            value += Fraction(1, 3)
        values[name] = value
    return values
