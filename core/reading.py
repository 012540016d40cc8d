"""An answer as written -> its tree, and the text it is compared by where there is none.

    read("P(X > 3) = 1/2").tree  ->  ("rel", ("=",), (("text", "P ( X > 3 )"), ("/", ...)))

Plus-minus signs are written out here: all combinations, or two values where a ∓ ties the signs.
"""

from __future__ import annotations

import re
from functools import cached_property, lru_cache

from core.equality import members
from core.mathexpr import parse
from core.mathtext import MAX_CHARS, SHORT_WORDS, Unread, tokenize

MAX_SIGNS = 3  # plus-minus signs in one item

SINGLE_BRACES = re.compile(r"\{ (\S+) \}")
CASES_COMMA = re.compile(r", (?=&|\\\\)")


def unbraced(plain: str) -> str:
    r"""\pmod{7} -> \pmod 7, and the rows of cases without their commas."""
    if "{" not in plain and "&" not in plain:
        return plain
    return CASES_COMMA.sub("", SINGLE_BRACES.sub(r"\1", plain))


def letter_by_letter(token: str) -> str:
    r"""A word in quotes -> its letters, so that \text{VW} is VW; capitals matter in one or two
    letters."""
    if token[0] != '"':
        return token
    word = token[1:-1].replace(" ", "").rstrip(".")
    return " ".join(word.casefold() if len(word) > 2 or word.lower() in SHORT_WORDS else word)


def with_signs(node, signs: list[bool]):
    """A tree with its plus-minus signs decided, from the last of `signs` to the first."""
    if not isinstance(node, tuple):
        return node
    if node[0] not in ("±", "∓"):
        return tuple([with_signs(child, signs) for child in node])
    left = with_signs(node[1], signs)
    plus = signs.pop() == (node[0] == "±")
    right = with_signs(node[2], signs)
    return ("+", left, right if plus else ("neg", right))


def both_signs(tree: tuple, n_signs: int, tied: bool) -> tuple:
    """A tree with plus-minus signs -> the list of its values. tied: all signs together, as where
    a ∓ is written."""
    if n_signs > MAX_SIGNS and not tied:
        raise Unread("too many signs")
    found: dict[tuple, None] = {}
    for choice in range(2 if tied else 2**n_signs):
        bits = [bool(choice >> n & 1) for n in range(n_signs)]
        signs = [bool(choice)] * n_signs if tied else bits
        found[with_signs(tree, signs)] = None
    return ("list", *found)


def count_signs(node: tuple) -> int:
    inner = sum(count_signs(child) for child in node if isinstance(child, tuple))
    return inner + (node[0] in ("±", "∓"))


def read_tree(tokens: list[str]) -> tuple:
    """Tokens -> tree, its plus-minus signs written out."""
    tree = parse(tokens)
    if "±" not in tokens and "∓" not in tokens:
        return tree
    items = []
    for item in members(tree):
        n_signs = count_signs(item)
        items.append(both_signs(item, n_signs, "∓" in tokens) if n_signs else item)
    return ("list", *items)


def read_right_side(tokens: list[str]) -> tuple:
    """P(X > 3) = 1/2: the left side, which is not understood, is a name for the right one."""
    depth = 0
    for at, token in enumerate(tokens):
        depth += (token in ("(", "[", "{", "\\{")) - (token in (")", "]", "}", "\\}"))
        if token in (",", "&&") and depth == 0:
            break
        if token == "=" and depth == 0 and at > 0:
            right = read_tree(tokens[at + 1 :])
            name = ("text", " ".join(tokens[:at]))
            if right[0] == "rel":
                return ("rel", ("=", *right[1]), (name, *right[2]))
            return ("rel", ("=",), (name, right))
    raise Unread("no right side")


class Reading:
    """An answer as tokens. plain: these joined, to compare texts. tree: made when needed, None
    where not understood."""

    def __init__(self, text: str, thousands: bool):
        try:
            self.tokens = tokenize(text, thousands)
        except Unread:
            self.tokens = []
        self.plain = " ".join(self.tokens) or text.strip()
        self.has_words = '"' in self.plain
        if self.has_words:
            self.plain = " ".join(map(letter_by_letter, self.tokens))

    @cached_property
    def tree(self) -> tuple | None:
        for reader in (read_tree, read_right_side):
            try:
                return reader(self.tokens)
            except (ArithmeticError, ValueError):
                continue
        return None


read_short = lru_cache(1024)(Reading)  # a gold answer is read once for its whole group
read_long = lru_cache(4)(Reading)


def read(text: str, thousands: bool = True) -> Reading:
    """thousands=False reads the commas of 1,234 as those of a list."""
    if len(text) <= 120:
        return read_short(text, thousands)
    return read_long(text, thousands) if len(text) <= MAX_CHARS else Reading(text, thousands)


def spread(node, names: set[str]):
    """Words and units made of the variables of the other side are their product: km is k * m
    beside k and m."""
    if not isinstance(node, tuple):
        return node
    node = tuple([spread(child, names) for child in node])
    if node[0] in ("text", "unit") and len(node[1]) > 1 and names.issuperset(node[1]):
        factors = [("sym", letter) for letter in node[1]]
        return ("*", *node[2:], *factors)
    return node
