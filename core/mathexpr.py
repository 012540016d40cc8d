r"""Tokens -> tree: the second step of reading an answer.

    parse(tokenize(r"\frac{1}{2}x"))  ->  ("*", ("/", ("num", 1), ("num", 2)), ("sym", "x"))

A tree is a tuple: a head and its children.
values:     num sym text i e pi base + * / neg ^ root fn call ! ° binom mod max min gcd lcm |
            \lfloor \lceil
structures: list (any order)  set  union  both (intersection)  minus (of sets)  tuple  matrix
            ratio  rel  unit  ± ∓
1) 1/2x is (1/2)x; \sin 5x/2 is (\sin 5x)/2; a number before a proper fraction is a mixed number
   (2\frac13, 2 1/3).
2) A letter is a variable, except e and i; f(x), g(2), f^{-1}(x), f'(x) are values of an unknown
   function.
3) A word after a value is its unit, or a factor (5 million, 3 fifths). All else raises Unread.
4) Brackets nest to MAX_DEPTH, trees are no higher than MAX_HEIGHT: 1/1/1/... is refused.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

from core.mathtext import FUNCTIONS, LETTERS, Unread
from core.mathunits import MONTHS, NOT_UNITS, NUMERALS, POWERS, measure, scale

MAX_DEPTH = 40  # brackets in brackets; each takes about 4 Python frames
MAX_HEIGHT = 60  # of a tree
MAX_DIGITS = 2500  # of a number as written
MAX_EXPONENT = 2048  # of 1e2048

# how tightly an operator binds its sides
BINDING = {"\\over": 0.5, "\\choose": 0.5, ",": 1, "&&": 1, "∪": 3, "∩": 3, "\\setminus": 3, ":": 3}
BINDING |= dict.fromkeys(["<", ">", "<=", ">=", "=", "!=", "in", "≈"], 2)
BINDING |= {'"': 4, "\\mod": 4, "+": 5, "-": 5, "±": 5, "∓": 5, "*": 6, "/": 6}
CURRENCIES = ("$$", "€", "£", "₹", "¥", "££")
BINDING |= dict.fromkeys(CURRENCIES, 10)  # 60 €
BINDING |= {"^": 9, "!": 10, "°": 10, "'": 10}
RELATION = BINDING["="]
SIGN = 5.5  # -2x is -(2x)
ARGUMENT = 6.2  # sin 5x/2 stops at the slash
JOINED = 6.5  # 2x is a product of 2 and x
CLOSERS = {"(": ")]", "[": ")]", "\\{": ["\\}"], "{": "}", "|": "|"}
CLOSERS |= {"\\lfloor": ["\\rfloor"], "\\lceil": ["\\rceil"]}
ENDS = {"\\}", "\\\\", "\\end", "\\rfloor", "\\rceil"}
HEADS = {",": "list", "&&": "list", "∪": "union", "∩": "both", ":": "ratio"}
OF_SEVERAL = ("max", "min", "gcd", "lcm")
INEQUALITIES = {"<", "<=", ">", ">=", "!="}
STRUCTURES = ("text", "unit", "list", "set", "rel", "tuple", "matrix", "union", "both", "minus")
INVERSE = (["^", "{", "-", "1", "}", "("], ["^", "-", "1", "("])  # f^{-1}(x)
SYMBOLIC_FUNCTIONS = "fghFG"
EMPTY = ("sym", "\\emptyset")


@lru_cache(1024)
def number(token: str) -> tuple:
    r"""A number token -> ("num", its exact value): 1,234.5 with separators, 1.5e-3,
    0.8\overline{3}."""
    if len(token) > MAX_DIGITS:
        raise Unread("too large")
    if "\\o" in token or "\\b" in token or "\\d" in token:
        return ("num", repeating(token))
    mantissa, _, exponent = token.lower().partition("e")
    if len(exponent) > 5 or abs(int(exponent or 0)) > MAX_EXPONENT:
        raise Unread("too large")
    whole, _, decimals = re.sub(r"[^\d.]", "", mantissa).partition(".")
    value = Fraction(int(whole + decimals), 10 ** len(decimals))
    return ("num", value * Fraction(10) ** int(exponent) if exponent else value)


def repeating(token: str) -> Fraction:
    r"""0.8\overline{3} -> 5/6"""
    fixed, _, repeated = token.partition("\\")
    whole, _, decimals = fixed.partition(".")
    period = re.sub(r"\D", "", repeated)
    start = Fraction(int((whole + decimals) or "0"), 10 ** len(decimals))
    return start + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(decimals))


def parse(tokens: list[str]) -> tuple:
    """All tokens -> one tree, or Unread."""
    parser = Parser(tokens)
    tree = parser.expression()
    if parser.next:
        raise Unread("text left over")
    if len(tokens) <= MAX_HEIGHT:  # each level of a tree takes a token
        return tree
    level = [tree]
    for _ in range(MAX_HEIGHT):
        below: list[tuple] = []
        for node in level:
            below += [child for child in node if isinstance(child, tuple)]
        if not below:
            return tree
        level = below
    raise Unread("too high a tree")


def proper_fraction(tree: tuple) -> Fraction | None:
    """The value of a fraction of two numbers that is between 0 and 1."""
    if tree[0] != "/" or not tree[1][0] == tree[2][0] == "num" or not 0 < tree[1][1] < tree[2][1]:
        return None
    return tree[1][1] / tree[2][1]


def is_inequality(tree: tuple) -> bool:
    return tree[0] == "both" or (tree[0] == "rel" and INEQUALITIES.issuperset(tree[1]))


class Parser:
    """Operator precedence: `prefix` reads what starts an expression, `infix` what continues one."""

    def __init__(self, tokens: list[str]):
        self.tokens = [*tokens, "", "", ""]
        self.at = 0
        self.depth = 0
        self.bars = False  # does the next bar close an absolute value?

    @property
    def next(self) -> str:
        return self.tokens[self.at]

    def take(self, *expected: str) -> str:
        token = self.tokens[self.at]
        if not token or (expected and token not in expected):
            raise Unread("unexpected token")
        self.at += 1
        return token

    def expression(self, floor: float = 0, argument: bool = False) -> tuple:
        """The longest expression whose operators bind tighter than floor. argument: stops before
        the next function."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unread("too deep")
        left = self.prefix(self.take())
        while token := self.tokens[self.at]:
            binding = BINDING.get(token if token[0] != '"' else '"')
            if binding is None:
                starts = token[0].isalnum() or token[0] in "([{."
                starts = starts or (token[0] == "\\" and token not in ENDS)
                starts = starts or (token == "|" and not self.bars)
                next_function = argument and token[1:] in FUNCTIONS
                binding = JOINED if starts and not next_function else 0
            if binding <= floor:
                break
            if binding == JOINED:
                left = self.joined(left)
            else:
                left = self.infix(left, self.take(), binding)
        self.depth -= 1
        return left

    def infix(self, left: tuple, token: str, binding: float) -> tuple:
        if token in ("!", "°"):
            return (token, left)
        if token == "'" or token in CURRENCIES:
            return ("unit", token[0], left)  # feet or minutes of arc
        if token[0] == '"':
            return self.unit(left, token[1:-1].strip().rstrip("."))
        if token == "^":
            sign = self.take() if self.next in ("-", "+") else "+"
            exponent = self.expression(binding - 1)
            return ("^", left, ("neg", exponent) if sign == "-" else exponent)
        if token == "," and self.next in (",", "&&"):  # a, and b
            self.take()
        right = self.expression(JOINED if binding == BINDING["*"] else binding)
        if binding == RELATION:
            ops, sides = left[1:] if left[0] == "rel" else ((), (left,))
            return ("rel", (*ops, token), (*sides, right))
        if token == "&&" and is_inequality(left) and is_inequality(right):
            return ("both", left, right)
        if token == "\\setminus" or (token == "-" and right[0] == "set"):
            return ("minus", left, right)
        if token in ("/", "±", "∓"):
            return (token, left, right)
        if token in ("\\over", "\\choose", "\\mod"):
            return ({"\\over": "/", "\\choose": "binom", "\\mod": "mod"}[token], left, right)
        if token == "-":
            token = "+"
            right = ("neg", right)
        head = HEADS.get(token, token)
        before = left[1:] if left[0] == head else (left,)
        return (head, *before, right)

    def joined(self, left: tuple) -> tuple:
        """Side by side: a mixed number or a product. Two numbers, or words and mathematics, have
        no value."""
        before = self.tokens[self.at - 1]
        token = self.next
        if token in ("\\sec", "\\min") and before.isdigit() and not self.tokens[self.at + 1]:
            return self.unit(left, self.take()[1:])
        if left[0] in STRUCTURES:
            raise Unread("words beside mathematics")
        bare = left[0] == "num" and before.isdigit()
        if before[-1].isdigit() and token[0] in "0123456789.":
            slash, below = self.tokens[self.at + 1 : self.at + 3]
            if not (bare and slash == "/" and below.isdigit()):
                raise Unread("two numbers side by side")
            self.at += 3
            right = ("/", number(token), number(below))
        else:
            right = self.expression(JOINED, argument=True)
        part = proper_fraction(right) if bare and token[0] != "(" else None
        if part is not None:
            return ("num", left[1] + part)
        before_right = left[1:] if left[0] == "*" else (left,)
        return ("*", *before_right, right)

    def unit(self, left: tuple, word: str) -> tuple:
        """A word after a value: a factor (million), a power (squared) or its unit."""
        lower = word.lower()
        name, value = (left[1], left[2]) if left[0] == "unit" else ("", left)
        factor = scale(lower)
        if factor is not None and value[0] in ("num", "neg", "/", "*"):
            value = ("*", value, ("num", factor))
            return ("unit", name, value) if name else value
        if lower in POWERS and not name and value[0] == "num":
            return ("^", value, ("num", Fraction(POWERS[lower])))
        if left[0] in ("text", "list", "rel") or set(lower.split()) & (NOT_UNITS | {"and"}):
            raise Unread("words beside mathematics")
        if self.next == "/" and measure(self.tokens[self.at + 1].strip('"')):  # km/h
            self.take()
            word += "/" + self.take().strip('"')
        if self.next == "^":  # cm^2, cm^{2}
            self.take()
            braced = self.next == "{"
            digits = [self.take("{", "2", "3", "}") for _ in range(3 if braced else 1)]
            word += " " + "".join(digits).strip("{}")
        return ("unit", f"{name} {word}".strip(), value)

    def prefix(self, token: str) -> tuple:
        kind = token[0]
        name = token[1:]
        if "_" in name:
            return self.based(token)
        if kind.isdigit() or (kind == "." and name):
            return number(token)
        if token in CLOSERS:
            return self.bracket(token)
        if token in ("\\frac", "\\binom"):
            return ("/" if name == "frac" else name, self.argument(), self.argument())
        if kind.isalpha() or name in LETTERS:
            return self.symbol(token)
        if kind == '"':
            return self.text(name[:-1].strip())
        if name in FUNCTIONS:
            return self.function(name)
        if token in ("-", "+", "±", "∓", "≈"):
            return self.signed(token)
        if token in CURRENCIES:
            return ("unit", token[0], self.expression(SIGN))
        if token == "\\sqrt":
            index = self.bracket("[") if self.next == "[" and self.take() else ("num", Fraction(2))
            return ("root", index, self.prefix(self.take()))
        if token == "\\begin":
            return self.matrix()
        raise Unread("unknown token")

    def signed(self, token: str) -> tuple:
        right = self.expression(SIGN)
        if token == "-":
            return ("neg", right)
        return right if token in "+≈" else (token, ("num", Fraction(0)), right)

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
        while self.next == "'":
            name += self.take()
        if name in ("e", "i", "\\pi"):
            return (name.lstrip("\\"),)
        function = name[0] in SYMBOLIC_FUNCTIONS
        if function and self.next == "^" and self.inverse():
            name += "^-1"
        after, closer = self.tokens[self.at + 1 : self.at + 3]
        at_number = name[0].isalpha() and after[:1].isdigit() and closer == ")"  # g(2)
        if self.next == "(" and (function or at_number):
            return ("call", name, self.prefix(self.take()))
        return ("sym", name.replace("{", "").replace("}", ""))

    def inverse(self) -> bool:
        """Takes the exponent of f^{-1}(x), if that is what comes."""
        for tokens in INVERSE:
            if self.tokens[self.at : self.at + len(tokens)] == tokens:
                self.at += len(tokens) - 1
                return True
        return False

    def function(self, name: str) -> tuple:
        """sin x, sin(x), sin^2 x, sin^{-1} x, log_2 8, max(a, b)."""
        if name in OF_SEVERAL:
            inner = self.prefix(self.take("(", "\\{"))
            items = {"tuple": inner[2:], "set": inner[1:]}.get(inner[0])
            if not items:
                raise Unread("not a list of values")
            return (name, *items)
        base = exponent = None
        while self.next in ("^", "_"):
            if self.take() == "_":
                base = self.argument()
            elif self.next == "-":
                exponent = self.expression(BINDING["^"] - 1)
            else:
                exponent = self.prefix(self.take())
        if self.next in ("(", "{", "["):
            inner = self.prefix(self.take())
        else:
            inner = self.expression(ARGUMENT, argument=True)
        if exponent == ("neg", ("num", Fraction(1))):
            name = "arc" + name
            exponent = None
        if name not in FUNCTIONS:
            raise Unread("unknown function")
        value = ("fn", name, inner)
        if base is not None:
            value = ("/", ("fn", "ln", inner), ("fn", "ln", base))
        return ("^", value, exponent) if exponent else value

    def bracket(self, opener: str) -> tuple:
        if opener == "\\{":
            return self.braces()
        bars = self.bars
        self.bars = opener == "|"
        inner = self.expression()
        closer = self.take(*CLOSERS[opener])
        self.bars = bars
        if opener in "([" and inner[0] == "list":
            return ("tuple", opener + closer, *inner[1:])
        if opener in "([" and opener + closer not in ("()", "[]"):
            raise Unread("brackets do not match")
        return inner if opener in "([{" else (opener, inner)

    def braces(self) -> tuple:
        r"""\{1, 2\}, \{\}, and \{x : 1 < x < 5\}, which is its condition."""
        if self.next == "\\}":
            self.take()
            return EMPTY
        bars = self.bars
        self.bars = True
        such_that = self.tokens[self.at + 1] in (":", "|") and self.next.isalpha()
        if such_that:
            self.at += 2
        inner = self.expression()
        if inner[0] == "rel" and inner[1] == ("in",) and self.next in (":", "|"):  # x in R | x > 2
            self.take()
            inner = ("both", inner, self.expression())
            such_that = True
        self.take("\\}")
        self.bars = bars
        if such_that:
            if inner[0] not in ("rel", "both", "list"):
                raise Unread("not a condition")
            return inner
        return ("set", *(inner[1:] if inner[0] == "list" else (inner,)))

    def matrix(self) -> tuple:
        rows: list[list] = [[]]
        while True:
            rows[-1].append(self.expression(BINDING[","]))
            token = self.take("&", "\\\\", "\\end")
            if token == "\\\\" and self.next != "\\end":
                rows.append([])
            elif token != "&":
                self.at += token == "\\\\"
                shape = " ".join(str(len(row)) for row in rows)
                return ("matrix", shape, *sum(rows, []))

    def text(self, name: str) -> tuple:
        if len(name) == 1:
            return ("sym", name)
        if name.lower() in NUMERALS:
            return ("num", Fraction(NUMERALS[name.lower()]))
        while self.next[:1] == '"':
            name += " " + self.take()[1:-1].strip()
        if name.lower() in MONTHS and self.next:
            raise Unread("a date")
        return ("text", name.casefold().replace(" ", "").rstrip("."))

    def based(self, token: str) -> tuple:
        digits, base = (re.sub(r"[(){}\s]", "", part) for part in token.split("_"))
        radix = int(base)
        if not 2 <= radix <= 36 or any(int(digit, 36) >= radix for digit in digits):
            raise Unread("not a number in that base")
        return ("base", base, Fraction(int(digits, radix)))
