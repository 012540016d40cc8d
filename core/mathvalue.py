r"""Tree -> number: the third step of reading an answer.

    evaluate(tree, {"x": Fraction(3)}, meter)  ->  Fraction, or Approx where exactness ends

Values are exact fractions as long as the operations allow, then complex decimals in the precision
of the current decimal context. Odd roots of negative numbers are real, all else is the principal
value; \log has base 10 unless the meter says natural. Every value is paid for, the constants too,
series before they are computed; no exact value exceeds MAX_BITS.
"""

from __future__ import annotations

import math
from decimal import Decimal, getcontext
from fractions import Fraction
from functools import lru_cache, reduce
from operator import add, mul, neg, truediv
from typing import NamedTuple
from zlib import crc32

from core.mathtext import Unread

MAX_BITS = 24_576  # of an exact value; 2023^2023 fits
MAX_FACTORIAL = 700
HALF = Fraction(1, 2)


class Approx(NamedTuple):
    """A complex number in the precision of the current decimal context; mixes with Fraction."""

    re: Decimal
    im: Decimal = Decimal(0)

    def __neg__(self):
        return Approx(-self.re, -self.im)

    def __add__(self, other):
        other = lift(other)
        return Approx(self.re + other.re, self.im + other.im)

    def __mul__(self, other):
        other = lift(other)
        if not self.im and not other.im:
            return Approx(self.re * other.re)
        real = self.re * other.re - self.im * other.im
        return Approx(real, self.re * other.im + self.im * other.re)

    def __truediv__(self, other):
        other = lift(other)
        if not self.im and not other.im:
            return Approx(self.re / other.re)
        square = other.re * other.re + other.im * other.im
        return self * Approx(other.re / square, -other.im / square)

    def __abs__(self):
        return Approx((self.re * self.re + self.im * self.im).sqrt() if self.im else abs(self.re))

    def __sub__(self, other):
        return self + -lift(other)

    def __rsub__(self, other):
        return lift(other) + -self

    def __rtruediv__(self, other):
        return lift(other) / self

    __radd__ = __add__
    __rmul__ = __mul__


def lift(value) -> Approx:
    if isinstance(value, Approx):
        return value
    return Approx(Decimal(value.numerator) / Decimal(value.denominator))


I = Approx(Decimal(0), Decimal(1))  # noqa: E741


# ---------------------------------------------------------------------------------- series
def cos_sin(x: Decimal) -> tuple[Decimal, Decimal]:
    """Taylor series, for a small x."""
    sums = [Decimal(0), Decimal(0)]
    term = Decimal(1)
    n = 0
    least = Decimal(10) ** -(getcontext().prec + 3)
    while abs(term) > least:
        sums[n % 2] += term if n % 4 < 2 else -term
        n += 1
        term = term * x / n
    return sums[0], sums[1]


@lru_cache(64)
def pi_at(precision: int) -> Decimal:
    x = Decimal(math.pi)
    right = 15
    while right < precision:  # x + sin x triples the right digits
        x += cos_sin(x)[1]
        right *= 3
    return x


@lru_cache(64)
def e_at(precision: int) -> Decimal:
    return Decimal(1).exp()


def exp(z) -> Approx:
    z = lift(z)
    size = z.re.exp()
    if not z.im:
        return Approx(size)
    cos, sin = cos_sin(z.im % (2 * pi_at(getcontext().prec)))
    return Approx(size * cos, size * sin)


def angle(x: Decimal, y: Decimal) -> Decimal:
    """The argument of x + iy, by Newton's method from the machine's value."""
    size = (x * x + y * y).sqrt()
    x /= size
    y /= size
    found = Decimal(math.atan2(y, x))
    right = 15
    while right < getcontext().prec:  # each step triples the right digits
        cos, sin = cos_sin(found)
        found += y * cos - x * sin
        right *= 3
    return found


def ln(z) -> Approx:
    z = lift(z)
    if not z.im and z.re > 0:
        return Approx(z.re.ln())
    return Approx(abs(z).re.ln(), angle(z.re, z.im))


# ------------------------------------------------------------------------------ operations
def exact_root(a: Fraction) -> Fraction | None:
    """The square root of a square."""
    if a < 0 or max(a.numerator, a.denominator).bit_length() > 256:
        return None
    above = math.isqrt(a.numerator)
    below = math.isqrt(a.denominator)
    if above * above == a.numerator and below * below == a.denominator:
        return Fraction(above, below)
    return None


def power(a, b):
    """a^b: exact for a rational to an integer, the real root for an odd degree, else the
    principal value."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        if b.denominator == 1:
            bits = max(a.numerator.bit_length(), a.denominator.bit_length())
            if abs(a) not in (0, 1) and abs(b) * (bits - 1) > MAX_BITS:
                raise Unread("power too large")
            return a ** int(b)
        if b == HALF and (root := exact_root(a)) is not None:
            return root
    a = lift(a)
    if not (a.re or a.im):
        return Fraction(0) ** (1 if lift(b).re > 0 else -1)
    if isinstance(b, Fraction):
        if b.denominator == 1 and 0 < abs(b) <= 64:
            product = reduce(mul, [a] * abs(int(b)))
            return product if b > 0 else 1 / product
        if b == HALF and not a.im:
            return Approx(a.re.sqrt()) if a.re > 0 else Approx(Decimal(0), (-a.re).sqrt())
        if b.denominator % 2 and not a.im and a.re < 0:
            return power(-a, b) * (-1) ** (b.numerator % 2)
    return exp(b * ln(a))


def function(name: str, z):
    """A function of one number."""
    z = lift(z)
    if name == "exp":
        return exp(z)
    if name == "ln":
        return ln(z)
    if name == "log":
        return ln(z) / ln(Fraction(10))
    if name in ("sinh", "cosh", "tanh"):
        up = exp(z)
        sinh = (up - 1 / up) / 2
        cosh = (up + 1 / up) / 2
        return {"sinh": sinh, "cosh": cosh}.get(name) or sinh / cosh
    return inverse_trigonometric(name, z) if name[:3] == "arc" else trigonometric(name, z)


def trigonometric(name: str, z: Approx) -> Approx:
    """Through the exponential where z is complex."""
    if z.im:
        up = exp(I * z)
        cos = (up + 1 / up) / 2
        sin = (up - 1 / up) / (2 * I)
    else:
        cos, sin = map(Approx, cos_sin(z.re % (2 * pi_at(getcontext().prec))))
    above, below = {
        "sin": (sin, 1),
        "cos": (cos, 1),
        "tan": (sin, cos),
        "cot": (cos, sin),
        "sec": (1, cos),
        "csc": (1, sin),
    }[name]
    return above if below == 1 else above / below


def inverse_trigonometric(name: str, z: Approx) -> Approx:
    """Through the logarithm where z is complex, or where the value is."""
    if name == "arctan":
        if not z.im:
            return Approx(angle(Decimal(1), z.re))
        return (ln(1 - I * z) - ln(1 + I * z)) * I / 2
    if not z.im and abs(z.re) <= 1:
        arcsin = Approx(angle((1 - z.re * z.re).sqrt(), z.re))
    else:
        arcsin = -I * ln(I * z + power(1 - z * z, HALF))
    return arcsin if name == "arcsin" else degrees(Fraction(90)) - arcsin


def series_of(name: str, argument) -> int:
    """How many series a function takes, to be paid before it is computed."""
    several = {"log": 2, "arcsin": 2, "arccos": 2, "arctan": 2, "ln": 1}.get(name, 1)
    return several * (3 if getattr(argument, "im", 0) else 1)


def series_of_power(a, b) -> int:
    """None for a rational to an integer and for a real square root, a logarithm and an
    exponential else."""
    exact = (
        isinstance(b, Fraction) and b.denominator == 1 and (isinstance(a, Fraction) or abs(b) <= 64)
    )
    if exact or b == HALF and not getattr(a, "im", 0):
        return 0
    return 6 if getattr(a, "im", 0) or getattr(b, "im", 0) else 2


def degrees(a):
    return a * Approx(pi_at(getcontext().prec)) / 180


def small(value) -> int:
    """A whole number that a factorial may be taken of."""
    if not isinstance(value, Fraction) or value.denominator > 1 or not 0 <= value <= MAX_FACTORIAL:
        raise Unread("not a small integer")
    return int(value)


def whole(value) -> int:
    if not isinstance(value, Fraction) or value.denominator > 1:
        raise Unread("not an integer")
    return int(value)


def real(value):
    """A real number that can be put in order."""
    if isinstance(value, Fraction):
        return value
    if value.im:
        raise Unread("not a real number")
    return value.re


def floor(value) -> Fraction:
    """An approximate value that is an integer but for its last digits is that integer."""
    value = real(value)
    if isinstance(value, Decimal):
        nearest = value.to_integral_value()
        if abs(value - nearest) < Decimal(10) ** -(getcontext().prec // 2):
            value = nearest
    return Fraction(math.floor(value))


def modulo(a, b):
    return a - b * floor(a / b)


def greatest(*values):
    return max(values, key=real)


def least(*values):
    return min(values, key=real)


OPERATIONS = {
    "/": truediv,
    "neg": neg,
    "^": power,
    "root": lambda n, a: power(a, 1 / n),
    "|": abs,
    "°": degrees,
    "!": lambda n: Fraction(math.factorial(small(n))),
    "binom": lambda n, k: Fraction(math.comb(small(n), small(k)) if whole(k) >= 0 else 0),
    "mod": modulo,
    "max": greatest,
    "min": least,
    "gcd": lambda *values: Fraction(math.gcd(*map(whole, values))),
    "lcm": lambda *values: Fraction(math.lcm(*map(whole, values))),
    "\\lfloor": floor,
    "\\lceil": lambda a: -floor(-a),
}


def fraction(tree: tuple) -> Fraction | None:
    """The value of an integer, a decimal or a fraction, which is all that most answers need."""
    if tree[0] == "num":
        return tree[1]
    if tree[0] == "neg":
        value = fraction(tree[1])
        return None if value is None else -value
    if tree[0] == "/" and tree[1][0] == tree[2][0] == "num" and tree[2][1]:
        return tree[1][1] / tree[2][1]
    return None


def evaluate(node: tuple, values: dict[str, Fraction], meter):
    """Tree -> Fraction or Approx where the variables have these values, or ArithmeticError.

    meter: the Comparison that counts the work and hears of values that leave the real numbers.
    """
    head = node[0]
    if head in ("num", "base"):
        return node[-1]
    if head in ("sym", "text"):
        return values[node[1]]
    if head in ("+", "*"):
        join = add if head == "+" else mul
        total = evaluate(node[1], values, meter)
        for child in node[2:]:
            total = meter.pay(join(total, evaluate(child, values, meter)))
        return total
    if head in ("e", "pi"):
        precision = getcontext().prec
        return meter.pay(Approx(e_at(precision) if head == "e" else pi_at(precision)))
    if head == "i":
        return I
    if head == "at":  # a subtree with its own values
        return evaluate(node[2], node[1], meter)
    if head == "call":
        value = evaluate(node[2], values, meter)
        known = value if isinstance(value, Fraction) else round(value.re, 20)
        seed = crc32(f"{node[1]} {known}".encode("utf-8", "replace"))
        return Fraction(1 + seed % 100_003, 997)
    if head == "fn":
        argument = evaluate(node[2], values, meter)
        name = "ln" if meter.natural and node[1] == "log" else node[1]
        meter.spend(series_of(name, argument))
        value = function(name, argument)
        return meter.pay(value, from_real=not getattr(argument, "im", 0))
    if head not in OPERATIONS:
        raise Unread("no number")
    children = [evaluate(child, values, meter) for child in node[1:]]
    if head == "^":
        meter.spend(series_of_power(*children))
    elif head == "root":
        meter.spend(series_of_power(children[1], 1 / children[0]))
    value = OPERATIONS[head](*children)
    from_real = not any(getattr(child, "im", 0) for child in children)
    return meter.pay(value, from_real)
