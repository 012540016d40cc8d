"""Mathematical text -> tree -> value: the reading half of verify.py. Standard library only.

    read(text) -> Reading(plain, tree)          LaTeX or plain text; tree is None where the text is not understood
    equal(a, b, meter) -> bool                  do two trees have the same value at every point?

A tree is a tuple (head, child, ...):
    num sym text i e pi base | + * / neg ^ root fn call ! ° binom floor ceil abs | list set tuple matrix ratio rel unit ±
1) Values are fractions.Fraction as long as the operations allow, else `Approx`: complex decimals at P and at 2P digits.
2) Two approximate values are equal when they differ by less than err = 10 x (their drift from P to 2P digits) + 10^(3-P) x (largest
   intermediate), and err < 1e-25. P = 60 + 2 x (digits written in both): a decimal of n digits comes within 10^-2n of no surd it is not.
3) Trees with variables are evaluated at seeded points (fractions, integers, negatives) until 4 points are defined on both sides.
4) Work is bounded before it is done: characters, tokens, depth, digits, the bits of a power, and a meter every operation pays into.
"""
from __future__ import annotations

import math
import re
from decimal import Context, Decimal, DivisionByZero, InvalidOperation, Overflow, getcontext, localcontext
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple
from zlib import crc32

MAX_CHARS, MAX_TOKENS, MAX_DEPTH = 2000, 600, 40  # an answer beyond these is compared as text
MAX_DIGITS, MAX_BITS, MAX_ITEMS = 1000, 8192, 24  # of one number; of an exact value (2^4950 fits); of a list that is matched in any order
MAX_WORK = 60_000  # meter units (about 0.3 us each) that one comparison may spend
MAX_PRECISION, POINTS = 1000, 12  # digits of an approximate value; seeded points tried for variables


class Unread(ArithmeticError):
    """The text has no value that this file can compute (or may compute within its bounds)."""


# --------------------------------------------------------------------------------------------------------------------- spelling
def table(text: str) -> dict[str, str]:
    """'value alias alias; value alias' -> {alias: value}, the value being its own alias too."""
    return {alias: group.split()[0] for group in text.split(";") for alias in group.split()}


FUNCTIONS = set("sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan exp ln log".split())
GREEK = set("alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu nu xi rho sigma tau upsilon phi varphi chi psi "
            "omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega hbar ell infty emptyset".split())
UNITS = table("% percent; $ dollar dollars usd bucks; cent cents; euro euros; deg degree degrees; rad radian radians; mm; cm centimeter centimeters;"
              "m meter meters metre metres; km kilometer kilometers; in inch inches; ft foot feet; yd yard yards; mi mile miles; mph; g gm gram grams;"
              "kg kilogram kilograms; lb lbs pound pounds; oz ounce ounces; s sec second seconds; min minute minutes; h hr hrs hour hours; day days;"
              "week weeks; month months; year years; l liter liters; ml; gal gallon gallons; acre acres; 2 square sq; 3 cubic; / per")
NUMERALS = dict(zip("zero one two three four five six seven eight nine ten eleven twelve".split(), range(13)))
SCALES = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# words that would change the value in front of them: such text has no value here
NOT_UNITS = {"plus", "minus", "times", "over", "squared", "cubed", "factorial", "half", "halves", "third", "thirds", "quarter", "not", "mod", "negative"}
SPELLING = {alias: "" for alias in r"$ ~ \( \) \[ \] \, \; \: \! \left \right \big \Big \bigl \bigr \Bigl \Bigr \displaystyle \quad \qquad".split()}
SPELLING |= table(r"""\frac \dfrac \tfrac \cfrac; * \cdot \times \ast; / \div; <= \le \leq \leqslant; >= \ge \geq \geqslant; < \lt; > \gt;
    != \ne \neq; in \in; ~ \approx \simeq; ± \pm; ∓ \mp; ∪ \cup; | \vert \lvert \rvert; ( \langle \lparen; ) \rangle \rparen; : \colon;
    \{ \lbrace; \} \rbrace; \binom \dbinom \tbinom; \arcsin \asin; \arccos \acos; \arctan \atan; \emptyset \varnothing""")
SPELLING |= {"\\ ": "", ";": ",", "\\%": '"%"', "%": '"%"', "\\$": "$$", "~": "", r"\approx": "≈", r"\simeq": "≈", "\\n": ""}
UNICODE = {ord(c): f" {t} " if t.startswith("\\") else t for c, t in {
    "π": r"\pi", "√": r"\sqrt", "∞": r"\infty", "×": "*", "·": "*", "⋅": "*", "÷": "/", "−": "-", "–": "-", "≤": "<=", "≥": ">=", "≠": "!=", "∈": r"\in",
    "θ": r"\theta", "α": r"\alpha", "β": r"\beta", "²": "^2", "³": "^3", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "\u00a0": " ", "\u2009": r"\,",
    "％": "%", "，": ",", "（": "(", "）": ")", "€": '"euro"', "£": '"pound"', "…": "...", "∅": r"\emptyset"}.items()}
TEXT = re.compile(r"\\(text|textbf|textit|textrm|textnormal|texttt|mbox|hbox|mathrm|mathbf|mathit|mathsf|operatorname|boldsymbol|bm)\s*\{([^{}]*)\}")
HIDDEN = re.compile(r"\\[hv]?phantom\s*(?:\{[^{}]*\}|.)")
NUMBER = r"(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?"
LATEX_GROUPS = r"(?<![\d.])\d{1,3}(?:(?:\{,\}|,\s*\\!\s*|\\[,;: !]|~%s)\d{3})+(?!\d)(?:\.\d+)?"  # 1{,}000  1,\!000  1\,000
TOKENS = [re.compile("|".join((
    r"\\begin\s*\{[pbB]?(?:small)?matrix\*?\}", r"\\begin\s*\{array\}\s*(?:\{[^{}]*\})?", r"\\end\s*\{\w+\*?\}", r"\\\\(?:\[\w+\])?",
    r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°",
    r"(?:\(\s*\d+\s*\)|\d+)\s*_\s*(?:\{\s*\d+\s*\}|\d+)", r"\(?\d[0-9A-F]*\)?\s*_\s*\{?1[1-6]\}?", r"[A-F]+\d[0-9A-F]*\s*_\s*\{?1[1-6]\}?",
    r"\d*\.\d*\\overline\s*\{\d+\}", LATEX_GROUPS % comma, NUMBER, r'"[^"]*"', r"\\mathbb\s*\{?[A-Z]\}?", r"\\[A-Za-z]+", r"\\.", r"\s*[A-Za-z]+",
    r"[<>!]=", r"!+", r"\.+", r"\S"))) for comma in ("", r"|,|\s")]  # [0] inside brackets 1,234 is two items; [1] elsewhere one number


def words(match: re.Match) -> str:
    r"""\text{...} -> its words in quotes, "and" and "or" as commas; text with digits or of one letter is read as mathematics."""
    kind, body = match.groups()
    if any(c.isdigit() or c in "\\^_+=<>" for c in body):
        return f" {body} "
    out = []
    for word in re.findall(r"[A-Za-z][A-Za-z./'-]*[A-Za-z/]|\S", body):
        if word.lower() in ("and", "or"):
            out.append(",")
        elif word in FUNCTIONS:
            out.append("\\" + word)
        elif not word[0].isalpha() or len(word) == 1 and (kind.startswith("math") or word not in UNITS):
            out.append(word)
        else:
            out.append(f'"{word}"')
    return " " + " ".join(out) + " "


def letters(run: str, before: str) -> list[str]:
    """A run of bare letters -> function, constant, word or a product of variables: sin, pi, apples, xy."""
    word = run.strip()
    apart = run[0].isspace() or before[-1:] not in set(")}]0123456789")
    if word.lower() in ("and", "or"):
        return [","]
    if word in FUNCTIONS or word in GREEK or word in ("pi", "sqrt"):
        return ["\\" + word]
    if word in ("inf", "infinity"):
        return ["\\infty"]
    if len(word) > 1 and apart and (word.lower() in UNITS or word.lower() in NUMERALS or len(word) > 3) or word in ("cm", "mm", "km", "kg"):
        return [f'"{word}"']
    return list(word)


def tokenize(text: str, thousands: bool) -> list[str]:
    """LaTeX or plain text -> tokens in one spelling. thousands: 1,234 outside brackets is one number. Raises Unread beyond the caps."""
    text = text.strip().rstrip(".,;: \n")
    if len(text) > MAX_CHARS:
        raise Unread("too long")
    if not text.isascii():
        text = text.translate(UNICODE)
    if "\\" in text:
        for _ in range(4):  # nested \text{\textbf{}} a few levels deep
            text, found = TEXT.subn(words, text)
            if not found:
                break
        text = HIDDEN.sub("", text)
    tokens = []
    for raw in TOKENS[thousands and not any(c in text for c in "([")].findall(text):
        token = SPELLING.get(raw, raw)
        if token[-1:].isalpha() and token[0] not in '\\"' and token.strip().isalpha() and token != "in":
            tokens += letters(token, tokens[-1] if tokens else "")
        elif "\\circ" in token or token in ("°", "\\degree"):
            tokens.append("°")
        elif token.startswith("\\mathbb"):
            tokens += ["(", "-", "\\infty", ",", "\\infty", ")"] if "R" in token else ["\\" + token[-2:].strip("}{ ")]
        elif token.startswith(("\\begin", "\\end", "\\\\")):
            tokens.append("\\begin" if "begin" in token else "\\end" if "end" in token else "\\\\")
        elif token:
            tokens.append(token)
    while tokens and tokens[-1] in (".", ","):
        tokens.pop()
    if len(tokens) > MAX_TOKENS:
        raise Unread("too many tokens")
    return tokens


# ----------------------------------------------------------------------------------------------------------------------- parser
POWERS = {",": 1, "<": 2, ">": 2, "<=": 2, ">=": 2, "=": 2, "!=": 2, "in": 2, "≈": 2, ":": 3, "∪": 3, '"': 4, "+": 5, "-": 5, "±": 5, "∓": 5, "*": 6, "/": 6,
          "^": 9, "!": 10, "°": 10}
JOINED, ARGUMENT = 6.5, 6.2  # 2x binds as 2*x; sin 5x takes 5x, not 5x/2
CLOSERS = {"(": ")]", "[": ")]", "\\{": ["\\}"], "{": "}"}


def number(token: str) -> Fraction:
    """A number token (digits, separators, exponent, \\overline) -> its exact value."""
    if len(token) > MAX_DIGITS:
        raise Unread("too many digits")
    if "overline" in token:
        head, cycle = token.split("\\overline")
        cycle = cycle.strip("{ }")
        shift = 10 ** len(head.partition(".")[2])
        return Fraction(head + "0") + Fraction(int(cycle), (10 ** len(cycle) - 1) * shift)
    mantissa, _, exponent = token.lower().partition("e")
    if abs(int(exponent or 0)) > MAX_BITS // 4:
        raise Unread("too large")
    return Fraction(re.sub(r"[^\d.]", "", mantissa)) * Fraction(10) ** int(exponent or 0)


class Parser:
    """Tokens -> tree of tuples (head, ...), by operator precedence: one method per position of an operator."""

    def __init__(self, tokens: list[str]):
        self.tokens, self.at, self.depth = [*tokens, ""], 0, 0

    def take(self, *expected: str) -> str:
        token = self.tokens[self.at]
        if token == "" or expected and token not in expected:
            raise Unread("unexpected token")
        self.at += 1
        return token

    def parse(self, floor: float = 0, function: bool = False) -> tuple:
        """The longest expression whose operators bind tighter than floor. function: stop before the next function name."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unread("too deep")
        left = self.prefix()
        while (token := self.tokens[self.at]) != "":
            power = POWERS.get(token[0] if token[0] == '"' else token)
            if power is None:
                starts = token[0].isalnum() or token[0] in "([{." or token[0] == "\\" and token not in ("\\}", "\\\\", "\\end", "\\rfloor", "\\rceil")
                power = JOINED if starts and not (function and token[1:] in FUNCTIONS) else 0
            if power <= floor:
                break
            left = self.infix(left, token, power)
        self.depth -= 1
        return left

    def infix(self, left: tuple, token: str, power: float) -> tuple:
        if power == JOINED:
            return self.joined(left)
        self.at += 1
        if token in ("!", "°"):
            return (token, left)
        if token[0] == '"':
            return self.unit(left, token[1:-1])
        if token == "^":
            sign = self.take() if self.tokens[self.at] in ("-", "+") else "+"
            exponent = self.parse(power - 1)
            return ("^", left, ("neg", exponent) if sign == "-" else exponent)
        if token == "," and self.tokens[self.at] == ",":  # a, and b
            self.at += 1
        right = self.parse(power)
        if power == 2:
            ops, sides = left[1:] if left[0] == "rel" else ((), (left,))
            return ("rel", ops + (token,), sides + (right,))
        if token == "-":
            token, right = "+", ("neg", right)
        if token in ("/", "±", "∓"):
            return (token, left, right)
        head = {",": "list", "∪": "set", ":": "ratio"}.get(token, token)
        return (head, *(left[1:] if left[0] == head else (left,)), right)

    def joined(self, left: tuple) -> tuple:
        """Side by side: 2\\frac{1}{3} and 2 1/3 are mixed numbers, two numbers are nothing, all else is a product."""
        before, token = self.tokens[self.at - 1], self.tokens[self.at]
        if left[0] in ("text", "unit", "list", "set", "rel", "tuple", "matrix"):
            raise Unread("words beside mathematics")
        bare = left[0] == "num" and before.isdigit()
        if before[-1:].isdigit() and token[0] in "0123456789.":
            if not (bare and self.tokens[self.at + 1] == "/" and self.tokens[self.at + 2].isdigit()):
                raise Unread("two numbers side by side")
            right = ("/", ("num", number(self.take())), ("num", number(self.tokens[self.at + 1])))
            self.at += 2
        else:
            right = self.parse(JOINED, function=True) if token != "\\frac" else self.prefix()
        if bare and right[0] == "/" and (token == "\\frac" or token.isdigit()) and right[1][0] == right[2][0] == "num" and 0 < right[1][1] < right[2][1]:
            return ("num", left[1] + right[1][1] / right[2][1])
        if token == "\\frac" and POWERS.get(self.tokens[self.at], 0) > 6:
            right = self.infix(right, self.tokens[self.at], POWERS[self.tokens[self.at]])
        return ("*", *(left[1:] if left[0] == "*" else (left,)), right)

    def unit(self, left: tuple, word: str) -> tuple:
        """A word after a value: its scale (million), its unit, or nothing that can be read."""
        word = word.lower().rstrip(".")
        if left[0] in ("text", "list", "rel") or word in NOT_UNITS or word in NUMERALS or len(word) < 3 and word not in UNITS:
            raise Unread("words beside mathematics")
        if word in SCALES:
            return ("*", left, ("num", Fraction(SCALES[word])))
        if self.tokens[self.at] == "^":  # cm^2, cm^{2}
            self.at += 1
            word += " " + "".join(self.take("{", "2", "3", "}") for _ in range(3 if self.tokens[self.at] == "{" else 1)).strip("{}")
        name, value = (left[1] + " ", left[2]) if left[0] == "unit" else ("", left)
        return ("unit", name + word, value)

    def prefix(self) -> tuple:
        token = self.take()
        kind = token[0]
        if kind.isdigit() or kind == "." and len(token) > 1 or "_" in token[1:]:
            return self.based(token) if "_" in token else ("num", number(token))
        if kind.isalpha() or token[1:] in GREEK:
            return self.symbol(token)
        if token[1:] in FUNCTIONS:
            return self.function(token[1:])
        if token in CLOSERS:
            return self.bracket(token)
        if token in ("-", "+", "±", "∓", "≈"):
            right = self.parse(5.5)
            return {"-": ("neg", right), "+": right, "≈": right}.get(token) or (token, ("num", Fraction(0)), right)
        if token == "$$":
            return ("unit", "$", self.parse(5.5))
        if kind == '"':
            return self.text(token)
        if token == "\\pi":
            return ("pi",)
        if token in ("\\frac", "\\binom"):
            return ("/" if token == "\\frac" else "binom", self.argument(), self.argument())
        if token == "\\sqrt":
            index = ("num", Fraction(2))
            if self.tokens[self.at] == "[":
                self.at += 1
                index = self.parse()
                self.take("]")
            return ("root", index, self.prefix())
        if token in ("|", "\\lfloor", "\\lceil"):
            inner = self.parse(1)
            self.take({"|": "|", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}[token])
            return (token, inner)
        if token == "\\begin":
            return self.matrix()
        raise Unread("unknown token")

    def argument(self) -> tuple:
        """One argument of \\frac: a group, or as in TeX a single digit (\\frac12)."""
        token = self.tokens[self.at]
        if token.isdigit() and len(token) > 1:
            self.tokens[self.at] = token[1:]
            return ("num", Fraction(int(token[0])))
        return self.prefix()

    def symbol(self, name: str) -> tuple:
        if self.tokens[self.at] == "_":
            self.at += 1
            name += "_" + self.take()
            while name.count("{") > name.count("}"):
                name += self.take()
        if name in ("e", "i"):
            return (name,)
        if self.tokens[self.at] == "(" and name[0].isalpha():
            after = self.tokens[self.at + 1:self.at + 3]
            if name in ("f", "g", "h", "F", "G") or after[0][:1].isdigit() and after[1] == ")":  # f(4 - x), I(0): a function's value, no product
                return ("call", name, self.prefix())
        return ("sym", name.replace("{", "").replace("}", ""))

    def function(self, name: str) -> tuple:
        """sin x, sin(x), sin^2 x, sin^{-1} x, log_2 8."""
        base = exponent = None
        while self.tokens[self.at] in ("^", "_"):
            if self.take() == "^":
                exponent = self.prefix() if self.tokens[self.at] != "-" else self.parse(8)
            else:
                base = self.argument()
        inner = self.prefix() if self.tokens[self.at] in ("(", "{", "[") else self.parse(ARGUMENT, function=True)
        if exponent == ("neg", ("num", Fraction(1))):
            name, exponent = "arc" + name, None
        value = ("fn", name, inner) if base is None else ("/", ("fn", "ln", inner), ("fn", "ln", base))
        return ("^", value, exponent) if exponent else value

    def bracket(self, opener: str) -> tuple:
        inner = self.parse()
        closer = self.take(*CLOSERS[opener])
        if inner[0] == "list" and opener in "([":
            return ("tuple", opener, closer, *inner[1:])
        if opener in "([" and (opener == "[") != (closer == "]"):
            raise Unread("brackets do not match")
        return ("set", *(inner[1:] if inner[0] == "list" else (inner,))) if opener == "\\{" else inner

    def matrix(self) -> tuple:
        rows = [[]]
        while True:
            rows[-1].append(self.parse(1))
            token = self.take("&", "\\\\", "\\end")
            if token == "\\\\" and self.tokens[self.at] != "\\end":
                rows.append([])
            elif token != "&":
                self.at += token == "\\\\"
                return ("matrix", tuple(len(row) for row in rows), *(cell for row in rows for cell in row))

    def text(self, token: str) -> tuple:
        name = token[1:-1]
        if len(name) == 1:
            return ("sym", name)
        if name.lower() in NUMERALS:
            return ("num", Fraction(NUMERALS[name.lower()]))
        while self.tokens[self.at][:1] == '"':
            name += " " + self.take()[1:-1]
        return ("text", name.casefold())

    def based(self, token: str) -> tuple:
        digits, base = (re.sub(r"[(){}\s]", "", part) for part in token.split("_"))
        if not 2 <= int(base) <= 36 or len(digits) > MAX_DIGITS or any(int(d, 36) >= int(base) for d in digits):
            raise Unread("not a number in that base")
        return ("base", base, Fraction(int(digits, int(base))))


class Reading(NamedTuple):
    """plain: the tokens, joined, words in lower case: what texts are compared by. tree: None where the text is not understood."""
    plain: str
    tree: tuple | None


def signed(node, up: bool):
    """A tree with its ± and ∓ decided."""
    if not isinstance(node, tuple):
        return node
    if node[0] in ("±", "∓"):
        right = signed(node[2], up)
        return ("+", signed(node[1], up), right if (node[0] == "±") == up else ("neg", right))
    return tuple(signed(child, up) for child in node)


def read_now(text: str, thousands: bool) -> Reading:
    try:
        tokens = tokenize(text, thousands)
    except Unread:
        return Reading(text.strip(), None)
    plain = " ".join(" ".join(t[1:-1].casefold() if len(t) > 5 else t[1:-1]) if t[0] == '"' else t for t in tokens)
    try:
        parser = Parser(tokens)
        tree = parser.parse()
        if parser.tokens[parser.at] != "":
            raise Unread("text left over")
    except (ArithmeticError, ValueError):
        return Reading(plain, None)
    if "±" in tokens or "∓" in tokens:
        items = tree[1:] if tree[0] in ("list", "set") else (tree,)
        tree = ("set", *(v for item in items for v in dict.fromkeys((signed(item, True), signed(item, False)))))
    return Reading(plain, tree)


read_short = lru_cache(2048)(read_now)  # a gold answer is read once for its whole group; long texts are not kept


def read(text: str, thousands: bool = True) -> Reading:
    """Answer text -> Reading. thousands=False reads the commas of 1,234 as a list's."""
    return (read_short if len(text) <= 120 else read_now)(text, thousands)


# ----------------------------------------------------------------------------------------------------------------------- values
class Meter:
    """What one comparison has spent, and the largest approximate value it met (for the error bound)."""

    def __init__(self):
        self.work, self.peak = 0, Decimal(0)

    def spend(self, units: int) -> None:
        self.work += units
        if self.work > MAX_WORK:
            raise Unread("too much work")


class Approx(NamedTuple):
    """A complex number in the precision of the current decimal context."""
    re: Decimal
    im: Decimal = Decimal(0)

    def __neg__(self):
        return Approx(-self.re, -self.im)

    def __add__(self, other):
        other = lift(other)
        return Approx(self.re + other.re, self.im + other.im)

    def __sub__(self, other):
        return self + -lift(other)

    def __rsub__(self, other):
        return lift(other) - self

    def __mul__(self, other):
        other = lift(other)
        return Approx(self.re * other.re - self.im * other.im, self.re * other.im + self.im * other.re)

    def __truediv__(self, other):
        other = lift(other)
        size = other.re * other.re + other.im * other.im
        return self * Approx(other.re / size, -other.im / size)

    def __rtruediv__(self, other):
        return lift(other) / self

    __radd__, __rmul__ = __add__, __mul__


def lift(value) -> Approx:
    return value if isinstance(value, Approx) else Approx(Decimal(value.numerator) / Decimal(value.denominator))


I, HALF = Approx(Decimal(0), Decimal(1)), Fraction(1, 2)


def taylor(x: Decimal) -> tuple[Decimal, Decimal]:
    """cos x, sin x of a small x."""
    sums, term, n = [Decimal(0), Decimal(0)], Decimal(1), 0
    least = Decimal(10) ** -(getcontext().prec + 3)
    while abs(term) > least:
        sums[n % 2] += term if n % 4 < 2 else -term
        n += 1
        term = term * x / n
    return sums[0], sums[1]


@lru_cache(64)
def pi_at(precision: int) -> Decimal:
    x = Decimal(math.pi)
    for _ in range(5):  # x + sin x triples the right digits: 16 -> 3888
        x += taylor(x)[1]
    return x


def pi() -> Approx:
    return Approx(pi_at(getcontext().prec))


def exp(z) -> Approx:
    z = lift(z)
    size, turn = z.re.exp(), taylor(z.im % (2 * pi().re)) if z.im else (Decimal(1), Decimal(0))
    return Approx(size * turn[0], size * turn[1])


def ln(z) -> Approx:
    z = lift(z)
    if not z.im and z.re > 0:
        return Approx(z.re.ln())
    size = (z.re * z.re + z.im * z.im).sqrt()
    angle = Decimal(math.atan2(z.im / size, z.re / size))
    for _ in range(5):  # Newton on the angle, triples the right digits too
        cos, sin = taylor(angle)
        angle += (z.im * cos - z.re * sin) / size
    return Approx(size.ln(), angle)


def exact_root(n: int, degree: int) -> int | None:
    """The integer whose power n is, if there is one."""
    if degree == 2:
        root = math.isqrt(n)
    else:
        root = 1 << -(-n.bit_length() // degree)
        while (smaller := ((degree - 1) * root + n // root ** (degree - 1)) // degree) < root:
            root = smaller
    return root if root**degree == n else None


def power(a, b):
    """a^b: exact where both are rational and the result is, the real root for odd degrees, else the principal value."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        if b.denominator == 1:
            if abs(a) > 1 or 0 < abs(a) < 1:
                if abs(b) * max(a.numerator.bit_length(), a.denominator.bit_length()) > MAX_BITS:
                    raise Unread("power too large")
            return a ** int(b)
        degree = b.denominator
        if degree <= 64 and (a >= 0 or degree % 2):
            parts = exact_root(abs(a.numerator), degree), exact_root(a.denominator, degree)
            if None not in parts:
                return power(Fraction(*parts) * (1 if a >= 0 else -1), Fraction(b.numerator))
    if not isinstance(b, Fraction):
        return exp(b * ln(a))
    if b.denominator == 1 and abs(b) <= 64:
        return math.prod([a] * int(abs(b)), start=Fraction(1)) if b >= 0 else 1 / power(a, -b)
    a = lift(a)
    if not a.im and b == HALF:
        return Approx(a.re.sqrt()) if a.re >= 0 else Approx(Decimal(0), (-a.re).sqrt())
    if not a.im and a.re < 0 and b.denominator % 2:
        return power(-a, b) * (-1) ** (b.numerator % 2)
    return exp(b * ln(a)) if a.re or a.im else Fraction(0) if b > 0 else 1 / Fraction(0)


def function(name: str, z):
    """A function of one number; trigonometric and hyperbolic ones through the exponential."""
    z = lift(z)
    if name in ("exp", "ln", "log"):
        return exp(z) if name == "exp" else ln(z) if name == "ln" else ln(z) / ln(Fraction(10))
    if name == "arctan":
        return (ln(1 - I * z) - ln(1 + I * z)) * I / 2
    if name in ("arcsin", "arccos"):
        value = -I * ln(I * z + power(1 - z * z, HALF))
        return value if name == "arcsin" else pi() / 2 - value
    turned = z if name[-1] == "h" else I * z
    up, down = exp(turned), exp(-turned)
    cos, sin = (up + down) / 2, (up - down) / 2
    sin = sin if name[-1] == "h" else sin / I
    if not z.im:
        cos, sin = Approx(cos.re), Approx(sin.re)
    pairs = {"sin": (sin, 1), "cos": (cos, 1), "tan": (sin, cos), "cot": (cos, sin), "sec": (1, cos), "csc": (1, sin)}
    if name.rstrip("h") not in pairs:
        raise Unread("unknown function")
    top, bottom = pairs[name.rstrip("h")]
    return Fraction(top) / bottom if top == 1 else top / Fraction(1) if bottom == 1 else top / bottom


def integer(value, least: int = 0, most: int = 700) -> int:
    if not isinstance(value, Fraction) or value.denominator > 1 or not least <= value <= most:
        raise Unread("not a small integer")
    return int(value)


def size(z):
    return abs(z) if isinstance(z, Fraction) else Approx((z.re * z.re + z.im * z.im).sqrt())


def rounded(z, up: bool) -> Fraction:
    return Fraction((math.ceil if up else math.floor)(z if isinstance(z, Fraction) else z.re))


OPERATIONS = {
    "/": lambda a, b: a / b, "neg": lambda a: -a, "^": power, "root": lambda n, a: power(a, 1 / n), "!": lambda n: Fraction(math.factorial(integer(n))),
    "°": lambda a: a * pi() / 180, "binom": lambda n, k: Fraction(math.comb(integer(n), integer(k))), "|": size,
    "\\lfloor": lambda a: rounded(a, False), "\\lceil": lambda a: rounded(a, True)}


def sample(name: str, point: int) -> Fraction:
    """The seeded value of a variable at a point: a fraction below 1, one above, an integer, a negative fraction, an integer."""
    seed = crc32(f"{name} {point}".encode())
    return (Fraction(1 + seed % 28, 29), Fraction(30 + seed % 97, 29), Fraction(2 + seed % 9), Fraction(-1 - seed % 97, 31), Fraction(5 + seed % 40))[point % 5]


def evaluate(node: tuple, point: int, meter: Meter):
    """Tree -> Fraction or Approx at a point. Raises ArithmeticError where there is no value within the bounds."""
    head = node[0]
    if head == "num":
        return node[1]
    if head in ("+", "*"):
        total = evaluate(node[1], point, meter)
        for child in node[2:]:
            value = evaluate(child, point, meter)
            total = checked(total + value if head == "+" else total * value, meter)
        return total
    if head in ("sym", "text"):
        return sample(node[1], point)
    if head in ("i", "e", "pi"):
        return I if head == "i" else pi() if head == "pi" else exp(Fraction(1))
    if head == "at":  # a subtree at a fixed point, whatever the point is
        return evaluate(node[2], node[1], meter)
    if head in ("fn", "call"):
        argument = evaluate(node[2], point, meter)
        meter.spend(getcontext().prec)
        if head == "fn":
            return checked(function(node[1], argument), meter)
        return sample(f"{node[1]} {argument if isinstance(argument, Fraction) else round(argument.re, 20)}", point)
    if head not in OPERATIONS:
        raise Unread("no number")
    return checked(OPERATIONS[head](*[evaluate(child, point, meter) for child in node[1:]]), meter)


def checked(value, meter: Meter):
    """Pay for a value; refuse one that is too large; remember the largest approximate one."""
    if isinstance(value, Fraction):
        bits = max(value.numerator.bit_length(), value.denominator.bit_length())
        if bits > MAX_BITS:
            raise Unread("too large")
        meter.spend(1 + bits // 64)
    else:
        meter.spend(1 + getcontext().prec // 16)
        meter.peak = max(meter.peak, abs(value.re), abs(value.im))
    return value


def survey(node: tuple, names: set[str]) -> int:
    """Collect the variables (and "i") of a tree; returns the digits written in it."""
    if node[0] == "num":
        return (node[1].numerator.bit_length() + node[1].denominator.bit_length()) // 3
    if node[0] in ("sym", "text", "i", "call"):
        names.add(node[1] if len(node) > 1 else "i")
    return sum(survey(child, names) for child in node[1:] if isinstance(child, tuple))


def agree(a: tuple, b: tuple, point: int, digits: int, meter: Meter, rtol: float) -> tuple[bool | None, bool]:
    """(equal at this point? None where undefined or undecided, are both values real?)"""
    found = []
    meter.peak = Decimal(0)
    try:
        for precision in (digits, 2 * digits):
            with localcontext(Context(prec=precision, Emax=20_000, Emin=-20_000, traps=[Overflow, InvalidOperation, DivisionByZero])):
                x, y = evaluate(a, point, meter), evaluate(b, point, meter)
                if isinstance(x, Fraction) and isinstance(y, Fraction):
                    integers = x.denominator == y.denominator == 1
                    return x == y or bool(rtol) and not integers and abs(x - y) <= Fraction(rtol) * max(abs(x), abs(y)), True
                found += [lift(x), lift(y)]
                if len(found) == 2:
                    peak = max(meter.peak, *(abs(part) for z in found for part in z))
                else:
                    drift = sum(abs(p - q) for early, late in zip(found[:2], found[2:]) for p, q in zip(early, late))
                    err = 10 * drift + peak * Decimal(10) ** (3 - digits)
                    x, y = found[2:]
                    gap = size(x - y).re
                    real = max(abs(x.im), abs(y.im)) <= err
                    if err > Decimal("1e-25"):
                        return None, real
                    return gap <= err + Decimal(rtol) * max(size(x).re, size(y).re), real
    except ArithmeticError:
        if meter.work > MAX_WORK:
            raise
    return None, True


def equal(a: tuple, b: tuple, meter: Meter, rtol: float = 0) -> bool:
    """Do two trees have the same value wherever both are defined? rtol: relative tolerance, for non-integers."""
    if a == b and a[0] == "num":
        return True
    names: set[str] = set()
    digits = 60 + 2 * (survey(a, names) + survey(b, names))
    if digits > MAX_PRECISION:
        digits = 60  # exact values need none of it; others must not pass
        if "i" in names:
            return False
    variables, seen = names - {"i"}, 0
    for point in range(POINTS if variables else 1):
        same, real = agree(a, b, point, digits, meter, rtol)
        if same is False and (real or "i" in names or not variables):
            return False
        seen += same is True
        if seen == 4:
            break
    return seen >= (2 if variables else 1)
