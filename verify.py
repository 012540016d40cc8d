"""The reward: is the answer of a response equal to the gold answer? Exact where mathematics allows, and bounded for any input.

    verify(response, gold, numbers=None) -> Verdict(correct, lenient, extracted, reason)
    python verify.py GOLD RESPONSE
    python verify.py --in scored.jsonl --out verdicts.jsonl      rows {"response" or "prediction", "gold"[, "numbers"]}

1) Only the text after the last </think> counts, and of it the last closed \\boxed{} or \\fbox{}; without a box "answer is ...",
   <answer> and "#### 42". A <think> still open after that earns nothing.
2) mathexpr.py reads an answer into a tree; what it does not understand (sums, integrals, ellipses, set builders, sentences) is compared
   as text, token by token.
3) A comma, "and", "or", \\{ \\}, \\cup and \\pm make a list in any order; ( ) and [ ] keep order and brackets; rows make a matrix.
4) Values are equal exactly, or to more digits than were written (mathexpr.py states the bound); equations and inequalities up to a factor.
5) Units may be left out, never exchanged; a percent sign is a unit (50% is 50, not 0.5); a base may not be left out; x = 5 is 5.
6) strict (`correct`) is the training reward: no tolerance, no similarity of strings. lenient also accepts 1e-4 relative error where a side
   is not an integer, upper for lower case, and an answer found anywhere (last number, inside <think>): for evaluation only.
7) Countdown (numbers given): the box holds + - * / over the given numbers, each used exactly once, equal to the gold target.

No eval, no signal, no thread, no sympy; safe in threads and forked workers. Differs from the paper's reward, which accepts 60% similarity.
"""
from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

from mathexpr import UNITS, Meter, equal, evaluate, read

MAX_ITEMS = 24  # a longer list must keep its order: matching in any order is quadratic
MAX_BOXES, MAX_BRACES, PLAIN_TAIL = 8, 10_000, 4000  # boxes tried from the end; braces in one; characters searched for "answer is"
LENIENT = 1e-4  # relative tolerance of the lenient verdict


class Verdict(NamedTuple):
    """correct: strict, the training reward. lenient: for evaluation. extracted: the answer as written. reason: a short fixed phrase."""
    correct: bool
    lenient: bool
    extracted: str | None
    reason: str


# ------------------------------------------------------------------------------------------------------------------- extraction
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
FINAL = re.compile(r"(?:answer\W{0,4}?(?:is|:|=)|####|<answer>)[\s:*]*", re.IGNORECASE)
MATHS = re.compile(r"(?:\$(?:\\.|[^$\\])+\$(?:\s*,?\s*(?:and\s)?\s*)?)+|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
LAST = re.compile(r"\$((?:\\.|[^$\\])+)\$|(-?\d[\d,]*(?:\.\d+)?(?:/\d+)?)")


def boxed(text: str) -> str | None:
    """The content of the last box that is closed."""
    end = len(text)
    for _ in range(MAX_BOXES):
        start = max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))
        if start < 0:
            return None
        first = start + (6 if text.startswith("\\boxed", start) else 5)
        if token := re.compile(r"\s+(\w+)").match(text, first):  # TeX: \boxed 5
            return token[1]
        depth, seen = 0, 0
        for brace in BRACE.finditer(text, first):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            seen += 1
            if depth <= 0 or seen > MAX_BRACES:
                break
        if seen and depth == 0 and brace[0] == "}":
            return text[text.index("{", first) + 1:brace.start()].strip()
        end = start
    return None


def phrased(text: str) -> str | None:
    """The answer after the last "answer is", <answer> or ####, to the end of its formula or sentence."""
    tail = text[-PLAIN_TAIL:]
    starts = [found.end() for found in FINAL.finditer(tail)]
    if not starts:
        return None
    tail = tail[starts[-1]:]
    maths = MATHS.match(tail)
    return (maths[1] or maths[2] or maths[0] if maths else re.split(r"\.(?:\s|$)|\n|</answer>", tail)[0]).strip() or None


def extract_answer(response: str, strict: bool = True) -> tuple[str | None, str]:
    """Response -> (answer as written or None, reason when None). strict=False also looks inside <think> and takes the last number."""
    text = response.rpartition("</think>")[2]
    if "<think>" in text:
        if strict:
            return None, "unfinished thinking"
    for find in (boxed, phrased):
        if (answer := find(text)) is not None:
            return answer, "ok" if answer else "empty answer"
    if not strict:
        last = None
        for last in LAST.finditer(response[-PLAIN_TAIL:]):
            pass
        return (boxed(response) or last and (last[1] or last[2])), "no answer"
    return None, "no answer"


# --------------------------------------------------------------------------------------------------------------------- equality
def members(node: tuple) -> list[tuple]:
    """The items of a list or set, flat; anything else is its own only item."""
    return [m for item in node[1:] for m in members(item)] if node[0] in ("list", "set") else [node]


def unit_of(node: tuple) -> tuple[str, tuple]:
    """(unit, value): the unit in one spelling, "" where there is none or it is not a known one."""
    if node[0] == "neg":
        unit, value = unit_of(node[1])
        return unit, ("neg", value)
    if node[0] == "°":
        return "deg", node[1]
    if node[0] == "base" and node[1] != "10":
        return "base " + node[1], node
    if node[0] != "unit":
        return "", node
    names = [UNITS.get(word.rstrip("."), "") for word in node[1].split()]
    inner, value = unit_of(node[2])
    return (" ".join(sorted(names)) if all(names) else "") or inner, value


def named(side: tuple) -> bool:
    """Is this what an answer may be assigned to: x, AB, f(x), area, (x, y)?"""
    if side[0] in ("tuple", "*"):
        return all(named(part) for part in side[1:] if isinstance(part, tuple))
    return side[0] in ("sym", "text", "call")


def assigned(rel: tuple, same) -> tuple | None:
    """x = 5 -> 5; 2 + 3 = 5 -> 5; x in S -> S; 2/3 ~ 0.67 -> 2/3; x > 4 -> (4, oo). None where a relation has no value."""
    ops, sides = rel[1:]
    if ops == ("in",):
        return sides[1]
    if ops == ("≈",):
        return sides[0] if same(sides[0], sides[1], 0.01) else None
    if set(ops) == {"="}:
        rest = sides[1:] if named(sides[0]) else sides[:-1] if named(sides[-1]) else sides
        return rest[0] if all(same(rest[0], other) for other in rest[1:]) else None
    if ops == ("!=",) and sides[0][0] == "sym":
        return ("set", ("tuple", "(", ")", ("neg", INFINITY), sides[1]), ("tuple", "(", ")", sides[1], INFINITY))
    ops, sides = upward(ops, sides)
    if set(ops) <= {"<", "<="} and len(sides) == 3 and sides[1][0] == "sym":
        return ("tuple", "(["[ops[0] == "<="], ")]"[ops[1] == "<="], sides[0], sides[2])
    if ops in (("<",), ("<=",)) and sides[0][0] == "sym":
        return ("tuple", "(", ")]"[ops[0] == "<="], ("neg", INFINITY), sides[1])
    if ops in (("<",), ("<=",)) and sides[1][0] == "sym":
        return ("tuple", "(["[ops[0] == "<="], ")", sides[0], INFINITY)
    return None


INFINITY = ("sym", "\\infty")
TURNED = {">": "<", ">=": "<="}


def upward(ops: tuple, sides: tuple) -> tuple[tuple, tuple]:
    """b > a -> a < b."""
    return (tuple(TURNED[op] for op in ops[::-1]), sides[::-1]) if set(ops) <= set(TURNED) else (ops, sides)


class Comparison:
    """One comparison of two trees: its tolerance and its meter."""

    def __init__(self, rtol: float = 0):
        self.rtol, self.meter = rtol, Meter()

    def same(self, a: tuple, b: tuple, rtol: float | None = None) -> bool:
        rtol = self.rtol if rtol is None else rtol
        if a == b:
            return True
        if "rel" in (a[0], b[0]):
            if a[0] == b[0]:
                return self.same_relation(a, b)
            a, b = (assigned(x, self.same) if x[0] == "rel" else x for x in (a, b))
            return a is not None and b is not None and self.same(a, b)
        if "list" in (a[0], b[0]) or "set" in (a[0], b[0]):
            return self.same_items(members(a), members(b))
        (unit_a, a), (unit_b, b) = unit_of(a), unit_of(b)
        if unit_a != unit_b and (unit_a and unit_b or "base" in unit_a + unit_b):
            return False
        heads = {a[0], b[0]}
        if heads & {"tuple", "matrix", "ratio"}:
            return len(heads) == 1 and len(a) == len(b) and all(
                self.same(x, y) if isinstance(x, tuple) and isinstance(y, tuple) and x and isinstance(x[0], str) else x == y for x, y in zip(a[1:], b[1:]))
        return equal(a, b, self.meter, rtol)

    def same_items(self, a: list[tuple], b: list[tuple]) -> bool:
        """The same items with the same multiplicity, in any order (a long list: in this order)."""
        if len(a) != len(b):
            return False
        if len(a) > MAX_ITEMS:
            return all(self.same(x, y) for x, y in zip(a, b))
        rest = list(b)
        for x in a:
            at = next((n for n, y in enumerate(rest) if self.same(x, y)), None)
            if at is None:
                return False
            rest.pop(at)
        return True

    def same_relation(self, a: tuple, b: tuple) -> bool:
        """Equations up to a constant factor, inequalities up to a positive one, chains side by side."""
        (ops, left), (ops_b, right) = upward(*a[1:]), upward(*b[1:])
        if ops != ops_b:
            return False
        if len(ops) > 1 or ops[0] in ("in", "≈"):
            return all(self.same(x, y) for x, y in zip(left, right))
        if self.same(left[0], right[0]) and self.same(left[1], right[1]):
            return True
        f, g = (("+", sides[0], ("neg", sides[1])) for sides in (left, right))
        try:
            ratio = evaluate(("at", 0, f), 0, self.meter) / evaluate(("at", 0, g), 0, self.meter)
        except ArithmeticError:
            return False
        sign = ratio if isinstance(ratio, Fraction) else ratio.re
        return (ops[0] in ("=", "!=") or sign > 0) and equal(("*", f, ("at", 0, g)), ("*", g, ("at", 0, f)), self.meter)


def is_equivalent(gold: str, answer: str, rtol: float = 0) -> bool:
    """Are two answers equal? Symmetric in its arguments; rtol as in the module's docstring."""
    for thousands in (True, False):
        a, b = read(gold, thousands), read(answer, thousands)
        if not a.plain or not b.plain:
            return False
        if a.plain == b.plain:
            return True
        if a.tree is not None and b.tree is not None:
            try:
                if Comparison(rtol).same(a.tree, b.tree):
                    return True
            except ArithmeticError:
                return False
        # 120,240 may be a number or a list: where one side can only be a list, so is the other
        if not ("," in gold and "," in answer) or "list" not in (a.tree or ("",))[0] + (b.tree or ("",))[0]:
            return False
    return False


# --------------------------------------------------------------------------------------------------------------------- verdicts
def numbers_used(tree: tuple) -> list[Fraction]:
    """The numbers of a Countdown expression; ValueError where it is anything but + - * / and parentheses."""
    if tree[0] == "num":
        return [tree[1]]
    if tree[0] not in ("+", "-", "*", "/", "neg"):
        raise ValueError("not an expression")
    return [used for child in tree[1:] for used in numbers_used(child)]


def countdown(response: str, gold: str, numbers: list[int]) -> Verdict:
    """Score a Countdown response: the box must use each number exactly once and reach gold. "... = target" may follow."""
    _, reason = extract_answer(response)
    answer = boxed(response.rpartition("</think>")[2]) if reason != "unfinished thinking" else None
    if not answer:
        return Verdict(False, False, answer, reason if answer is None and reason != "ok" else "no answer")
    tree = read(answer, thousands=False).tree
    sides = tree[2] if tree is not None and tree[0] == "rel" and set(tree[1]) == {"="} else (tree,)
    try:
        used = Counter(numbers_used(sides[0]))
        values = {evaluate(side, 0, Meter()) for side in sides}
    except ArithmeticError:
        return Verdict(False, False, answer, "wrong value")
    except (ValueError, TypeError):
        return Verdict(False, False, answer, "not an expression")
    if used != Counter(map(Fraction, numbers)):
        return Verdict(False, False, answer, "wrong numbers")
    right = values == {Fraction(gold)}
    return Verdict(right, right, answer, "correct" if right else "wrong value")


def verify(response: str, gold: str, numbers: list[int] | None = None) -> Verdict:
    """Score one response against its gold answer. numbers: a Countdown row."""
    if numbers is not None:
        return countdown(response, str(gold), numbers)
    gold = str(gold)
    answer, reason = extract_answer(response)
    if answer and is_equivalent(gold, answer):
        return Verdict(True, True, answer, "correct")
    loose = answer or extract_answer(response, strict=False)[0]
    lenient = bool(loose) and (is_equivalent(gold, loose, LENIENT) or is_equivalent(gold.casefold(), loose.casefold()))
    if answer:
        reason = "wrong answer" if read(answer).tree is not None else "answer not understood"
    return Verdict(False, lenient, answer, reason)
