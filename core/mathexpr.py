r"""Mathematical text -> tree -> number: the reading half of verify.py. Standard library only.

    Parser(tokenize(r"\frac{1}{2}x^2")).parse() -> ("*", ("/", ("num", 1), ("num", 2)), ("^", ("sym", "x"), ("num", 2)))
    evaluate(tree, point, meter) -> Fraction, or Approx where a root, a function or i is in the way

A tree is a tuple, head and children. Heads with a value: num sym text i e pi base + * / neg ^ root fn call ! ° binom |
\lfloor \lceil at; structures, which verify.py compares: list set tuple matrix ratio rel unit ±.
1) Values are exact fractions as long as the operations allow, then complex decimals in the current precision; odd roots
   of negative numbers are real, all else is the principal value; \log has base 10 unless the meter says natural.
2) 1/2x is (1/2)x; \sin 5x/2 is (\sin 5x)/2; a number before a proper fraction is a mixed number (2\frac13, 2 1/3).
3) A letter is a variable, except e and i; a run of up to three is a product, a longer one or \text{} is a word; f(x),
   g(2), I(0) are values of an unknown function. Anything else raises Unread, and verify.py compares text.
4) Work is bounded before it is done: characters, tokens, depth, digits, bits; and every value is paid for (meter.pay).
"""

from __future__ import annotations

import math
import re
from decimal import Decimal, getcontext
from fractions import Fraction
from functools import lru_cache, reduce
from operator import add, mul, neg, truediv
from typing import NamedTuple
from zlib import crc32

MAX_CHARS, MAX_TOKENS, MAX_DEPTH = 2500, 1000, 40  # 40 levels are about 160 Python frames
MAX_DIGITS, MAX_BITS = 2500, 8192  # of a number as written; of an exact value (2^4950 fits)


class Unread(ArithmeticError):
    """The text has no value that this file can compute within its bounds."""


# ----------------------------------------------------------------------------------------------------------- spelling
def table(text: str) -> dict[str, str]:
    """'value alias alias; value alias' -> {alias: value}, the value being its own alias too."""
    return {alias: group.split()[0] for group in text.split(";") for alias in group.split()}


FUNCTIONS = set("sin cos tan cot sec csc arcsin arccos arctan exp ln log".split())
LETTERS = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi varphi "
    "chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega hbar ell pi infty emptyset".split()
)
UNITS = table(
    "% percent; $ dollar dollars usd; cent cents; euro euros; deg degree degrees; rad radian radians; am a.m; pm p.m; "
    "mm; cm centimeter centimeters; m meter meters; km kilometer kilometers; in inch inches; ft foot feet; / per; mi "
    "mile miles; g gm gram grams; kg kilogram kilograms; lb lbs pound pounds; oz ounce ounces; l liter liters; s sec "
    "second seconds; min minute minutes; h hour hours; day days; week weeks; month months; year years; 2 square; 3 cubic"
)
NUMERALS = dict(
    zip("zero one two three four five six seven eight nine ten eleven twelve".split(), range(13))
)
NOT_UNITS = {
    *NUMERALS,
    *"hundred thousand million billion trillion dozen half halves third thirds quarter quarters "
    "plus minus times over squared cubed factorial not mod negative".split(),
}  # they change the value before
SPELLING = (
    dict.fromkeys(
        r"$ ~ \( \) \[ \] \, \; \: \! \left \right \big \Big \bigl \bigr \quad \qquad".split(), ""
    )
    | {"\\ ": "", "\\%": '"%"', "%": '"%"', "\\$": "$$", ";": ","}
    | table(
        r"\frac \dfrac \tfrac \cfrac; \binom \dbinom \tbinom; * \cdot \times; / \div; <= \le \leq \leqslant; < \lt; > \gt; "
        r">= \ge \geq \geqslant; != \ne \neq; in \in; ≈ \approx; ± \pm; ∓ \mp; ∪ \cup; | \vert \lvert \rvert; ( \langle; "
        r") \rangle; : \colon; \{ \lbrace; \} \rbrace; ° \degree; \emptyset \varnothing; \arcsin \asin; \arccos \acos; "
        r"\arctan \atan"
    )
)
UNICODE = {
    ord(c): f" {t} " if t[0] == "\\" else t
    for c, t in zip(
        "π√∞∈θαβ½¼∅×·⋅÷−–≤≥≠²³％，（）…\u2009",
        (
            r"\pi \sqrt \infty \in \theta \alpha \beta \frac{1}{2} \frac{1}{4} \emptyset "
            r"* * * / - - <= >= != ^2 ^3 % , ( ) ... \,"
        ).split(),
    )
}
TEXT = re.compile(
    r"\\(text(?:bf|it|rm|tt|normal)?|[mh]box|math(?:rm|bf|it|sf)|operatorname|boldsymbol)\s*\{([^{}]*)\}"
)
REWRITES = (
    (r"\\begin\s*\{[pbB]?(?:small)?matrix\*?\}|\\begin\s*\{array\}\s*(?:\{[^{}]*\})?", r" \begin "),
    (r"\\end\s*\{(?:[pbB]?(?:small)?matrix\*?|array)\}", r" \end "),
    (r"\\\\\[\w+\]", r" \\ "),
    (r"\^\s*\{?\s*\\circ\s*\}?", "°"),
    (r"\\[hv]?phantom\s*(?:\{[^{}]*\}|.)", ""),
    (r"\\mathbb\s*\{?R\}?", r"(-\infty,\infty)"),
    (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", "*"),
)  # 4.5 x 10^3
REWRITE = re.compile(r"(?=[\\^xX ])(?:(%s))" % ")|(".join(pattern for pattern, _ in REWRITES))
# 52_8, (52)_{8}, 152A_{11}
BASE = (
    r"(?:\(\s*\d+\s*\)|\d+)\s*_\s*(?:\{\s*\d+\s*\}|\d+)|\(?[A-F]*\d[0-9A-F]*\)?\s*_\s*\{?1[1-6]\}?"
)
GROUPS = r"(?<![\d.])\d{1,3}(?:(?:\{,\}|,\s*\\!\s*|\\[,;: !]|~%s)\d{3})+(?!\d)(?:\.\d+)?"  # 1{,}000  1,\!000  1\,000
# the first pattern is for text with brackets, where 1,234 is two items; in the second it is one number
TOKENS = [
    re.compile(
        "|".join(
            (
                BASE,
                GROUPS % comma,
                r"(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?",
                r'"[^"]*"',
                r"\\[A-Za-z]+|\\.",
                r"\s*[A-Za-z]+",
                r"[<>!]=|!+|\.+|\S",
            )
        )
    )
    for comma in ("", r"|,|\s")
]


def words(match: re.Match) -> str:
    r"""\text{...} -> its words in quotes, "and" and "or" as commas; text that holds mathematics stays as it is."""
    kind, body = match.groups()
    if any(c.isdigit() or c in "\\^_+=<>" for c in body):
        return f" {body} "
    out = []
    for word in re.findall(r"[A-Za-z][A-Za-z./'-]*[A-Za-z/]|[^\s.]", body):
        if word.lower() in ("and", "or"):
            out.append(",")
        elif (
            word in FUNCTIONS - {"sec"}
            or word in LETTERS
            or kind == "operatorname"
            and "\\" + word in SPELLING
        ):
            out.append("\\" + word)
        elif (
            not word[0].isalpha()
            or len(word) == 1
            and (kind.startswith("math") or word not in UNITS)
        ):
            out.append(word)  # \mathrm{e} is a number, \text{m} after one a unit
        else:
            out.append(f'"{word}"')
    return f" {' '.join(out)} "


def letters(run: str, before: str) -> list[str]:
    """A run of bare letters -> function, constant, word, or a product of variables: sin, pi, apples, xy."""
    word = run.strip()
    lower, apart = word.lower(), run[0].isspace() or before[-1:] not in set(")}]0123456789")
    if lower in ("and", "or"):
        return [","]
    if (
        word in FUNCTIONS
        or word in LETTERS
        and word not in ("xi", "nu", "mu")
        or word in ("sqrt", "infinity", "inf")
    ):
        return ["\\infty" if word[:3] == "inf" else "\\" + word]
    known = len(word) > 3 or len(word) > 1 and (lower in UNITS or lower in NUMERALS)
    if apart and known or word in ("cm", "mm", "km", "kg"):
        return [f'"{word}"']
    return list(word)


def tokenize(text: str, thousands: bool = True) -> list[str]:
    """LaTeX or plain text -> tokens in one spelling. thousands: 1,234 outside brackets is one number."""
    if len(text) > MAX_CHARS:
        raise Unread("too long")
    text = " ".join(
        (text if text.isascii() else text.translate(UNICODE)).split()
    )  # long gaps would slow the patterns
    if "\\" in text:
        for _ in range(4):  # \text{\textbf{}} a few levels deep
            text, found = TEXT.subn(words, text)
            if not found:
                break
    text = REWRITE.sub(lambda match: REWRITES[match.lastindex - 1][1], text)
    tokens: list[str] = []
    for raw in TOKENS[
        thousands and "(" not in text and "[" not in text and "\\{" not in text
    ].findall(text):
        token = SPELLING.get(raw, raw)
        if token[-1:].isalpha() and token[0] != "\\" and raw != "\\in":
            tokens += letters(token, tokens[-1] if tokens else "")
        elif token:
            tokens.append(token)
    while tokens and tokens[-1] in (".", ",", ":"):
        tokens.pop()
    if len(tokens) > MAX_TOKENS:
        raise Unread("too many tokens")
    return tokens


# ------------------------------------------------------------------------------------------------------------- parser
POWERS = {
    ",": 1,
    "<": 2,
    ">": 2,
    "<=": 2,
    ">=": 2,
    "=": 2,
    "!=": 2,
    "in": 2,
    "≈": 2,
    ":": 3,
    "∪": 3,
    '"': 4,
    "+": 5,
    "-": 5,
    "±": 5,
    "∓": 5,
    "*": 6,
    "/": 6,
    "^": 9,
    "!": 10,
    "°": 10,
}
SIGN, ARGUMENT, JOINED = (
    5.5,
    6.2,
    6.5,
)  # -2x is -(2x); sin 5x/2 stops at the slash; 2x is a product of 2 and x
CLOSERS = {
    "(": ")]",
    "[": ")]",
    "\\{": ["\\}"],
    "{": "}",
    "|": "|",
    "\\lfloor": ["\\rfloor"],
    "\\lceil": ["\\rceil"],
}
ENDS = {"\\}", "\\\\", "\\end", "\\rfloor", "\\rceil"}


@lru_cache(1024)
def number(token: str) -> tuple:
    """A number token (digits, separators, exponent) -> ("num", its exact value)."""
    mantissa, _, exponent = token.lower().partition("e")
    if len(token) > MAX_DIGITS or len(exponent) > 5 or abs(int(exponent or 0)) > MAX_BITS // 4:
        raise Unread("too large")
    whole, _, decimals = re.sub(r"[^\d.]", "", mantissa).partition(".")
    value = Fraction(int(whole + decimals), 10 ** len(decimals))
    return ("num", value * Fraction(10) ** int(exponent) if exponent else value)


class Parser:
    """Operator precedence: `prefix` reads what starts an expression, `infix` what continues one."""

    def __init__(self, tokens: list[str]):
        self.tokens, self.at, self.depth = [*tokens, "", "", ""], 0, 0

    @property
    def next(self) -> str:
        return self.tokens[self.at]

    def take(self, *expected: str) -> str:
        token = self.tokens[self.at]
        if not token or expected and token not in expected:
            raise Unread("unexpected token")
        self.at += 1
        return token

    def parse(self, floor: float = 0, argument: bool = False) -> tuple:
        """The longest expression whose operators bind tighter than floor. argument: stops before the next function."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unread("too deep")
        left = self.prefix(self.take())
        while token := self.tokens[self.at]:
            power = POWERS.get(token if token[0] != '"' else '"')
            if power is None:
                starts = (
                    token[0].isalnum()
                    or token[0] in "([{."
                    or token[0] == "\\"
                    and token not in ENDS
                )
                power = JOINED if starts and not (argument and token[1:] in FUNCTIONS) else 0
            if power <= floor:
                break
            left = self.joined(left) if power == JOINED else self.infix(left, self.take(), power)
        self.depth -= 1
        if self.depth == 0 and token:
            raise Unread("text left over")
        return left

    def infix(self, left: tuple, token: str, power: float) -> tuple:
        if token in ("!", "°"):
            return (token, left)
        if token[0] == '"':
            return self.unit(left, token[1:-1].lower().rstrip("."))
        if token == "^":
            sign = self.take() if self.next in ("-", "+") else "+"
            exponent = self.parse(power - 1)
            return ("^", left, ("neg", exponent) if sign == "-" else exponent)
        if token == "," and self.next == ",":  # a, and b
            self.take()
        right = self.parse(JOINED if power == POWERS["*"] else power)
        if power == POWERS["="]:
            ops, sides = left[1:] if left[0] == "rel" else ((), (left,))
            return ("rel", (*ops, token), (*sides, right))
        if token in ("/", "±", "∓"):
            return (token, left, right)
        if token == "-":
            token, right = "+", ("neg", right)
        head = {",": "list", "∪": "set", ":": "ratio"}.get(token, token)
        return (head, *(left[1:] if left[0] == head else (left,)), right)

    def joined(self, left: tuple) -> tuple:
        """Side by side: a mixed number or a product. Two numbers, or words and mathematics, have no value."""
        if left[0] in ("text", "unit", "list", "set", "rel", "tuple", "matrix"):
            raise Unread("words beside mathematics")
        before, token = self.tokens[self.at - 1], self.next
        bare = left[0] == "num" and before.isdigit()
        if before[-1].isdigit() and token[0] in "0123456789.":
            slash, below = self.tokens[self.at + 1 : self.at + 3]
            if not (bare and slash == "/" and below.isdigit()):
                raise Unread("two numbers side by side")
            self.at += 3
            right = ("/", number(token), number(below))
        else:
            right = self.parse(JOINED, argument=True)
        if bare and right[0] == "/" and token[0] != "(" and right[1][0] == right[2][0] == "num":
            if 0 < right[1][1] < right[2][1]:
                return ("num", left[1] + right[1][1] / right[2][1])
        return ("*", *(left[1:] if left[0] == "*" else (left,)), right)

    def unit(self, left: tuple, word: str) -> tuple:
        """A word after a value is its unit, unless it would change the value."""
        if left[0] in ("text", "list", "rel") or word in NOT_UNITS:
            raise Unread("words beside mathematics")
        if self.next == "^":  # cm^2, cm^{2}
            self.take()
            digits = [self.take("{", "2", "3", "}") for _ in range(3 if self.next == "{" else 1)]
            word += " " + "".join(digits).strip("{}")
        name, value = (left[1] + " ", left[2]) if left[0] == "unit" else ("", left)
        return ("unit", name + word, value)

    def prefix(self, token: str) -> tuple:
        kind, name = token[0], token[1:]
        if "_" in name:
            return self.based(token)
        if kind.isdigit() or kind == "." and name:
            return number(token)
        if token in CLOSERS:
            return self.bracket(token)
        if token in ("\\frac", "\\binom"):
            return ("/" if name == "frac" else name, self.argument(), self.argument())
        if kind.isalpha() or name in LETTERS:
            return self.symbol(token)
        if kind == '"':
            return self.text(token[1:-1])
        if name in FUNCTIONS:
            return self.function(name)
        if token in ("-", "+", "±", "∓", "≈"):
            right = self.parse(SIGN)
            return (
                right
                if token in "+≈"
                else ("neg", right)
                if token == "-"
                else (token, ("num", Fraction(0)), right)
            )
        if token == "$$":
            return ("unit", "$", self.parse(SIGN))
        if token == "\\sqrt":
            index = self.bracket("[") if self.next == "[" and self.take() else ("num", Fraction(2))
            return ("root", index, self.prefix(self.take()))
        if token == "\\begin":
            return self.matrix()
        raise Unread("unknown token")

    def argument(self) -> tuple:
        r"""One argument of \frac: a group, or as in TeX a single digit (\frac12)."""
        token = self.next
        if token.isdigit() and len(token) > 1:
            self.tokens[self.at] = token[1:]
            return number(token[0])
        return self.prefix(self.take())

    def symbol(self, name: str) -> tuple:
        if self.next == "_":
            name += self.take() + self.take()
            while name.count("{") > name.count("}"):
                name += self.take()
        if name in ("e", "i", "\\pi"):
            return (name.lstrip("\\"),)
        after, closer = self.tokens[self.at + 1 : self.at + 3]
        if (
            self.next == "("
            and name[0].isalpha()
            and (name in "fghFG" or after[:1].isdigit() and closer == ")")
        ):
            return ("call", name, self.prefix(self.take()))
        return ("sym", name.replace("{", "").replace("}", ""))

    def function(self, name: str) -> tuple:
        """sin x, sin(x), sin^2 x, sin^{-1} x, log_2 8."""
        base = exponent = None
        while self.next in ("^", "_"):
            if self.take() == "^":
                exponent = (
                    self.parse(POWERS["^"] - 1) if self.next == "-" else self.prefix(self.take())
                )
            else:
                base = self.argument()
        inner = (
            self.prefix(self.take())
            if self.next in ("(", "{", "[")
            else self.parse(ARGUMENT, argument=True)
        )
        if exponent == ("neg", ("num", Fraction(1))):
            name, exponent = "arc" + name, None
        if name not in FUNCTIONS:
            raise Unread("unknown function")
        value = (
            ("fn", name, inner) if base is None else ("/", ("fn", "ln", inner), ("fn", "ln", base))
        )
        return ("^", value, exponent) if exponent else value

    def bracket(self, opener: str) -> tuple:
        inner = self.parse()
        closer = self.take(*CLOSERS[opener])
        if opener == "\\{":
            return ("set", *(inner[1:] if inner[0] == "list" else (inner,)))
        if opener in "([" and inner[0] == "list":
            return ("tuple", opener + closer, *inner[1:])
        if opener in "([" and opener + closer not in ("()", "[]"):
            raise Unread("brackets do not match")
        return inner if opener in "([{" else (opener, inner)

    def matrix(self) -> tuple:
        rows: list[list] = [[]]
        while True:
            rows[-1].append(self.parse(POWERS[","]))
            token = self.take("&", "\\\\", "\\end")
            if token == "\\\\" and self.next != "\\end":
                rows.append([])
            elif token != "&":
                self.at += token == "\\\\"
                return (
                    "matrix",
                    " ".join(str(len(row)) for row in rows),
                    *(cell for row in rows for cell in row),
                )

    def text(self, name: str) -> tuple:
        if len(name) == 1:
            return ("sym", name)
        if name.lower() in NUMERALS:
            return ("num", Fraction(NUMERALS[name.lower()]))
        while self.next[:1] == '"':
            name += " " + self.take()[1:-1]
        return ("text", name.casefold())

    def based(self, token: str) -> tuple:
        digits, base = (re.sub(r"[(){}\s]", "", part) for part in token.split("_"))
        if (
            len(token) > MAX_DIGITS
            or not 2 <= int(base) <= 36
            or any(int(d, 36) >= int(base) for d in digits)
        ):
            raise Unread("not a number in that base")
        return ("base", base, Fraction(int(digits, int(base))))


# ------------------------------------------------------------------------------------------------------------- values
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
        return Approx(
            self.re * other.re - self.im * other.im, self.re * other.im + self.im * other.re
        )

    def __truediv__(self, other):
        other = lift(other)
        square = other.re * other.re + other.im * other.im
        return self * Approx(other.re / square, -other.im / square)

    def __abs__(self):
        return Approx((self.re * self.re + self.im * self.im).sqrt() if self.im else abs(self.re))

    __radd__, __rmul__ = __add__, __mul__
    __sub__ = lambda self, other: self + -lift(other)
    __rsub__ = lambda self, other: lift(other) + -self
    __rtruediv__ = lambda self, other: lift(other) / self


def lift(value) -> Approx:
    return (
        value
        if isinstance(value, Approx)
        else Approx(Decimal(value.numerator) / Decimal(value.denominator))
    )


I, HALF = Approx(Decimal(0), Decimal(1)), Fraction(1, 2)


def cos_sin(x: Decimal) -> tuple[Decimal, Decimal]:
    """Taylor series, for a small x."""
    sums, term, n = [Decimal(0), Decimal(0)], Decimal(1), 0
    least = Decimal(10) ** -(getcontext().prec + 3)
    while abs(term) > least:
        sums[n % 2] += term if n % 4 < 2 else -term
        n += 1
        term = term * x / n
    return sums[0], sums[1]


@lru_cache(64)
def pi_at(precision: int) -> Decimal:
    x, right = Decimal(math.pi), 15
    while right < precision:  # x + sin x triples the right digits
        x, right = x + cos_sin(x)[1], 3 * right
    return x


def exp(z) -> Approx:
    z = lift(z)
    cos, sin = cos_sin(z.im % (2 * pi_at(getcontext().prec))) if z.im else (Decimal(1), Decimal(0))
    size = z.re.exp()
    return Approx(size * cos, size * sin)


def ln(z) -> Approx:
    z = lift(z)
    if not z.im and z.re > 0:
        return Approx(z.re.ln())
    size = abs(z).re
    angle, right = Decimal(math.atan2(z.im / size, z.re / size)), 15
    while right < getcontext().prec:  # and so does Newton's step for the angle
        cos, sin = cos_sin(angle)
        angle, right = angle + (z.im * cos - z.re * sin) / size, 3 * right
    return Approx(size.ln(), angle)


def power(a, b):
    """a^b: exact for a rational to an integer, the real root for an odd degree, else the principal value."""
    if isinstance(a, Fraction) and isinstance(b, Fraction) and b.denominator == 1:
        if (
            abs(a) not in (0, 1)
            and abs(b) * (max(a.numerator.bit_length(), a.denominator.bit_length()) - 1) > MAX_BITS
        ):
            raise Unread("power too large")
        return a ** int(b)
    a = lift(a)
    if not (a.re or a.im):
        return Fraction(0) ** (1 if lift(b).re > 0 else -1)
    if isinstance(b, Fraction):
        if b.denominator == 1 and 0 < abs(b) <= 64:
            return reduce(mul, [a] * int(b)) if b > 0 else 1 / power(a, -b)
        if b == HALF and not a.im:
            return Approx(a.re.sqrt()) if a.re > 0 else Approx(Decimal(0), (-a.re).sqrt())
        if b.denominator % 2 and not a.im and a.re < 0:
            return power(-a, b) * (-1) ** (b.numerator % 2)
    return exp(b * ln(a))


def function(name: str, z):
    """A function of one number, the trigonometric ones through the exponential."""
    z = lift(z)
    if name in ("exp", "ln", "log"):
        return exp(z) if name == "exp" else ln(z) / (ln(Fraction(10)) if name == "log" else 1)
    if name == "arctan":
        return (ln(1 - I * z) - ln(1 + I * z)) * I / 2
    if name in ("arcsin", "arccos"):
        angle = -I * ln(I * z + power(1 - z * z, HALF))
        return angle if name == "arcsin" else OPERATIONS["°"](Fraction(90)) - angle
    up = exp(I * z)
    cos, sin = (up + 1 / up) / 2, (up - 1 / up) / (2 * I)
    if not z.im:  # exactly real
        cos, sin = Approx(cos.re), Approx(sin.re)
    return {
        "sin": lambda: sin,
        "cos": lambda: cos,
        "tan": lambda: sin / cos,
        "cot": lambda: cos / sin,
        "sec": lambda: 1 / cos,
        "csc": lambda: 1 / sin,
    }[name]()


def integer(value) -> int:
    if not isinstance(value, Fraction) or value.denominator > 1 or not 0 <= value <= 700:
        raise Unread("not a small integer")
    return int(value)


OPERATIONS = {
    "/": truediv,
    "neg": neg,
    "^": power,
    "root": lambda n, a: power(a, 1 / n),
    "|": abs,
    "°": lambda a: a * Approx(pi_at(getcontext().prec)) / 180,
    "!": lambda n: Fraction(math.factorial(integer(n))),
    "binom": lambda n, k: Fraction(math.comb(integer(n), integer(k))),
    "\\lfloor": lambda a: Fraction(math.floor(getattr(a, "re", a))),
    "\\lceil": lambda a: Fraction(math.ceil(getattr(a, "re", a))),
}


def sample(name: str, point: int) -> Fraction:
    """The seeded value of a variable: by point below 1, above 1, negative, an integer, a larger integer."""
    seed = crc32(f"{name} {point}".encode("utf-8", "replace"))
    kinds = (
        (1 + seed % 28, 29),
        (30 + seed % 97, 29),
        (-1 - seed % 97, 31),
        (2 + seed % 9, 1),
        (5 + seed % 40, 1),
    )
    return Fraction(*kinds[point % 5])


def evaluate(node: tuple, point: int, meter):
    """Tree -> Fraction or Approx at a seeded point, or ArithmeticError. meter: the Comparison that counts the work."""
    head = node[0]
    if head in ("num", "base"):
        return node[-1]
    if head in ("sym", "text"):
        return sample(node[1], point)
    if head in ("i", "e", "pi"):
        return (
            I
            if head == "i"
            else Approx(Decimal(1).exp() if head == "e" else pi_at(getcontext().prec))
        )
    if head == "at":  # a subtree at a fixed point, whatever the point
        return evaluate(node[2], node[1], meter)
    if head in ("+", "*"):
        join, values = (
            add if head == "+" else mul,
            (evaluate(child, point, meter) for child in node[1:]),
        )
        return reduce(lambda total, value: meter.pay(join(total, value)), values)
    if head in ("fn", "call"):
        value = evaluate(node[2], point, meter)
        if head == "fn":
            name = "ln" if meter.natural and node[1] == "log" else node[1]
            return meter.pay(function(name, value), series=3 if name[:3] == "arc" else 1)
        return sample(
            f"{node[1]} {value if isinstance(value, Fraction) else round(value.re, 20)}", point
        )
    if head not in OPERATIONS:
        raise Unread("no number")
    value = OPERATIONS[head](*[evaluate(child, point, meter) for child in node[1:]])
    return meter.pay(value, series=head in ("^", "root"))
