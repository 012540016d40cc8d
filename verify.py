r"""The reward: is the answer in a response equal to the gold answer? Exact where possible, bounded for any input.

    verify(response, gold, numbers=None) -> Verdict(correct, lenient, extracted, reason)
    python verify.py GOLD RESPONSE
    python verify.py --in scored.jsonl --out verdicts.jsonl     rows {"response" or "prediction", "gold"[, "numbers"]}

1) Only the text after the last </think> counts, and of it the last closed \boxed{} or \fbox{}; without a box, what
   follows "answer is", <answer> or ####. A <think> still open after that earns nothing.
2) mathexpr.py reads an answer into a tree; what it cannot read (sums, integrals, ellipses, set builders, sentences) is
   compared as text, token by token.
3) A comma, "and", "or", \{ \}, \cup and \pm make a list in any order; ( ) and [ ] keep order and brackets.
4) Fractions are compared exactly. Other values are computed with P and with P + 40 digits, P = 60 + 2 x (digits of the
   longest number written), and are equal when they differ by at most err = 10 x (drift from P to P + 40) + 10^(3-P) x
   (largest intermediate value) < 1e-25: a decimal of n digits comes no nearer to a square root than about 10^-2n.
5) With variables, trees must agree so at 3 seeded points (fractions, negatives, integers); equations and inequalities
   may differ by a constant factor, positive for inequalities; x > 4 is the interval, x = 5 and 2 + 3 = 5 are 5.
6) Units may be left out, not exchanged; a percent sign is a unit (50% is 50, not 0.5); a base may not be left out.
7) strict (`correct`), the training reward, has no tolerance, no string similarity; lenient, for evaluation only, adds
   1e-4 relative error where a side is no integer, any capitals, an answer anywhere (last number, inside <think>).
8) Countdown (numbers given): the box holds + - * / and each given number exactly once, and equals gold.
No eval, signal, thread or sympy; safe in threads and forked workers.
# differs: the paper's released reward accepts any answer that is 60% similar to the gold one as a string.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
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
from functools import cached_property, lru_cache
from typing import NamedTuple

from core.errors import UserError
from core.mathexpr import MAX_BITS, UNITS, Approx, Parser, Unread, evaluate, lift, tokenize

MAX_BOXES, MAX_BRACES, PLAIN_TAIL = (
    8,
    10_000,
    4000,
)  # boxes tried; braces in one; characters searched for "answer is"
MAX_ITEMS = (
    24  # longer lists are sorted by their spelling first: matching in any order is quadratic
)
POINTS, ENOUGH, MAX_PRECISION = (
    12,
    3,
    200,
)  # points tried, points that must agree; digits of an approximate value
EXTRA = 40  # digits of the second evaluation beyond the first
MAX_WORK = 70_000  # units that one comparison may spend, each about 0.2 us
LENIENT = 10_000  # lenient equality is to one part in this many


class Verdict(NamedTuple):
    """correct: the training reward. lenient: for evaluation. extracted: the answer as written. reason: fixed words."""

    correct: bool
    lenient: bool
    extracted: str | None
    reason: str


# --------------------------------------------------------------------------------------------------------- extraction
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
TEX_TOKEN = re.compile(r"\s+(\w+)")  # \boxed 5
FINAL = re.compile(
    r"(?:answer\W{0,4}?(?:is|:|=)|####(?=\s*[-$\\\d])|<answer>)[\s:*]*", re.IGNORECASE
)
MATHS = re.compile(
    r"(?:\$(?:\\.|[^$\\])+\$(?:\s*,?\s*(?:and\s)?\s*)?)+|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL
)
LAST = re.compile(r"\$(?:\\.|[^$\\])+\$|-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def boxed(text: str) -> str | None:
    """The content of the last box that is closed."""
    end = len(text)
    for _ in range(MAX_BOXES):
        start = max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))
        if start < 0:
            return None
        first, depth = start + (6 if text[start + 1] == "b" else 5), 0
        if token := TEX_TOKEN.match(text, first):
            return token[1]
        for seen, brace in enumerate(BRACE.finditer(text, first)):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth <= 0 or seen > MAX_BRACES:
                if brace[0] == "}" and depth == 0:
                    return text[text.index("{", first) + 1 : brace.start()].strip()
                break
        end = start
    return None


def phrased(text: str) -> str | None:
    """The answer after the last "answer is", <answer> or ####, up to the end of its formula or sentence."""
    tail = text[-PLAIN_TAIL:]
    ends = [found.end() for found in FINAL.finditer(tail)]
    if not ends:
        return None
    tail = tail[ends[-1] :]
    maths = MATHS.match(tail)
    answer = (
        maths[1] or maths[2] or maths[0] if maths else re.split(r"\.(?:\s|$)|\n|</answer>", tail)[0]
    )
    return answer.strip() or None


def extract_answer(response: str, only_boxed: bool = False) -> tuple[str | None, str]:
    """Response -> (the answer as written, or None; the reason if that is none or empty): what the reward sees."""
    text = response.rpartition("</think>")[2]
    if "<think>" in text:
        return None, "unfinished thinking"
    answer = boxed(text)
    if answer is None and not only_boxed:
        answer = phrased(text)
    return answer, "no boxed answer" if answer is None else "empty answer"


def extract_anywhere(response: str) -> str | None:
    """For the lenient verdict: any box or phrase, inside <think> too, else the last formula or number."""
    last = LAST.findall(response[-PLAIN_TAIL:])
    return boxed(response) or phrased(response) or (last[-1] if last else None)


# ----------------------------------------------------------------------------------------------------------- readings
def fraction(tree: tuple) -> Fraction | None:
    """The value of an integer, a decimal or a fraction, which is all that most answers need."""
    if tree[0] == "neg":
        return None if (value := fraction(tree[1])) is None else -value
    if tree[0] == "/" and tree[1][0] == tree[2][0] == "num" and tree[2][1]:
        return tree[1][1] / tree[2][1]
    return tree[1] if tree[0] == "num" else None


def signed(node, up: bool):
    """A tree with its ± and ∓ decided."""
    if not isinstance(node, tuple):
        return node
    if node[0] in ("±", "∓"):
        right = signed(node[2], up)
        return ("+", signed(node[1], up), right if (node[0] == "±") == up else ("neg", right))
    return tuple(signed(child, up) for child in node)


class Reading:
    """An answer as tokens. plain: these joined, to compare texts. tree: made when needed, None where not understood."""

    def __init__(self, text: str, thousands: bool):
        try:
            self.tokens = tokenize(text, thousands)
        except Unread:
            self.tokens = []
        self.plain = " ".join(self.tokens) or text.strip()
        if (
            '"' in self.plain
        ):  # words letter by letter, so that \text{VW} is VW; capitals matter in short words only
            folded = (t.casefold() if len(t) > 5 else t for t in self.tokens)
            self.plain = " ".join(" ".join(t[1:-1]) if t[0] == '"' else t for t in folded)

    @cached_property
    def tree(self) -> tuple | None:
        try:
            tree = Parser(self.tokens).parse()
        except (ArithmeticError, ValueError):
            return None
        if "±" not in self.tokens and "∓" not in self.tokens:
            return tree
        return (
            "set",
            *(
                v
                for item in members(tree)
                for v in dict.fromkeys((signed(item, True), signed(item, False)))
            ),
        )


read_short = lru_cache(1024)(
    Reading
)  # a gold answer is read once for its whole group; long texts are not kept


def read(text: str, thousands: bool = True) -> Reading:
    """thousands=False reads the commas of 1,234 as those of a list."""
    return (read_short if len(text) <= 120 else Reading)(text, thousands)


# ----------------------------------------------------------------------------------------------------------- equality
def survey(node: tuple, names: set[str]) -> int:
    """Collects the variables of a tree, "i" and "log"; returns the digits of its longest number."""
    head = node[0]
    if head == "num":
        return (node[1].numerator.bit_length() + node[1].denominator.bit_length()) // 3
    if head in ("sym", "text", "i", "call", "fn"):
        names.add(node[1] if head in ("sym", "text") or node[1:2] == ("log",) else head)
    return max([survey(child, names) for child in node[1:] if isinstance(child, tuple)], default=0)


@lru_cache(64)
def context(digits: int) -> Context:
    return Context(
        prec=digits, Emax=20_000, Emin=-20_000, traps=[Overflow, InvalidOperation, DivisionByZero]
    )


def members(node: tuple) -> list[tuple]:
    """The items of a list or set, flat; anything else is its own only item."""
    return [m for item in node[1:] for m in members(item)] if node[0] in ("list", "set") else [node]


def unit_of(node: tuple) -> tuple[str, tuple]:
    """(unit in one spelling, value); "" where there is no unit or not a known one."""
    if node[0] == "neg":
        unit, value = unit_of(node[1])
        return unit, ("neg", value)
    if node[0] == "°":
        return "deg", node[1]
    if node[0] != "unit":
        return "base " + node[1] if node[0] == "base" and node[1] != "10" else "", node
    names = [UNITS.get(word.rstrip("."), "") for word in node[1].split()]
    inner, value = unit_of(node[2])
    return " ".join(sorted({*names, *inner.split()})) if all(names) else inner, value


def named(side: tuple) -> bool:
    """Can an answer be assigned to this: x, AB, f(x), area, (x, y)?"""
    if side[0] in ("tuple", "*"):
        return all(named(part) for part in side[1:] if isinstance(part, tuple))
    return side[0] in ("sym", "text", "call")


def assignments(node: tuple) -> tuple | None:
    """x = 1, y = 2 -> (1, 2)"""
    equations = node[0] == "list" and all(
        item[:2] == ("rel", ("=",)) and item[2][0][0] == "sym" for item in node[1:]
    )
    return ("tuple", "()", *(item[2][1] for item in node[1:])) if equations else None


def upward(ops: tuple, sides: tuple) -> tuple[tuple, tuple]:
    """b > a -> a < b."""
    turned = {">": "<", ">=": "<="}
    return (
        (tuple(turned[op] for op in ops[::-1]), sides[::-1])
        if set(ops) <= set(turned)
        else (ops, sides)
    )


class Comparison:
    """One comparison, to one part in `parts`: whether that was needed, the work done, the largest approximate value."""

    def __init__(self, parts: int = 0):
        self.parts, self.tolerated, self.work, self.peak, self.natural = (
            parts,
            False,
            0,
            Decimal(0),
            False,
        )

    def pay(self, value: Fraction | Approx, series: int = 0) -> Fraction | Approx:
        """Count the cost of a value. series: how many it took; one costs about the square of the precision."""
        if isinstance(value, Fraction):
            bits = max(value.numerator.bit_length(), value.denominator.bit_length())
            self.work += 1 + bits // 64 if bits <= MAX_BITS else MAX_WORK
        else:
            digits = getcontext().prec
            self.work += 2 + digits // 16 + series * digits**2 // (2 if value.im else 8)
            self.peak = max(self.peak, abs(value.re), abs(value.im))
        if self.work > MAX_WORK:
            raise Unread("too much work")
        return value

    def same(self, a: tuple, b: tuple) -> bool:
        """Do two answers say the same?"""
        if a == b:
            return True
        heads = {a[0], b[0]}
        if "rel" in heads:
            if len(heads) == 1:
                return self.same_relation(a, b)
            a, b = (self.assigned(*upward(*x[1:])) if x[0] == "rel" else x for x in (a, b))
            return a is not None and b is not None and self.same(a, b)
        if heads == {"list", "tuple"}:  # x = 1, y = 2 and (1, 2)
            a, b = (assignments(x) or x for x in (a, b))
            if a[0] == b[0]:
                return self.same(a, b)
        if heads & {"list", "set"}:
            return self.same_items(members(a), members(b))
        (unit_a, a), (unit_b, b) = unit_of(a), unit_of(b)
        if unit_a != unit_b and (
            unit_a and unit_b and ("/" in unit_a) == ("/" in unit_b) or "base" in unit_a + unit_b
        ):
            return False
        heads = {a[0], b[0]}
        if heads & {"tuple", "matrix", "ratio"}:
            return (
                len(heads) == 1
                and len(a) == len(b)
                and all(
                    self.same(x, y) if isinstance(x, tuple) else x == y
                    for x, y in zip(a[1:], b[1:])
                )
            )
        return self.equal(a, b)

    def same_items(self, a: list[tuple], b: list[tuple]) -> bool:
        """The same items equally often, in any order."""
        if len(a) != len(b) or len(a) > MAX_ITEMS:
            return len(a) == len(b) and all(
                map(self.same, sorted(a, key=repr), sorted(b, key=repr))
            )
        rest = list(b)
        for item in a:
            at = next((n for n, other in enumerate(rest) if self.same(item, other)), None)
            if at is None:
                return False
            rest.pop(at)
        return True

    def same_relation(self, a: tuple, b: tuple) -> bool:
        """Equations up to a factor, inequalities up to a positive one, chains side by side, others by their values."""
        (ops, left), (ops_b, right) = upward(*a[1:]), upward(*b[1:])
        if ops != ops_b:
            x, y = self.assigned(ops, left), self.assigned(ops_b, right)
            return x is not None and y is not None and self.same(x, y)
        if all(map(self.same, left, right)):
            return True
        if len(ops) > 1 or ops[0] in ("in", "≈"):
            return False
        f, g = (("+", sides[0], ("neg", sides[1])) for sides in (left, right))
        try:
            ratio = evaluate(("at", 0, f), 0, self) / evaluate(("at", 0, g), 0, self)
        except ArithmeticError:
            return False
        positive = (ratio if isinstance(ratio, Fraction) else ratio.re) > 0
        return (positive or ops[0] in ("=", "!=")) and self.equal(
            ("*", f, ("at", 0, g)), ("*", g, ("at", 0, f))
        )

    def assigned(self, ops: tuple, sides: tuple) -> tuple | None:
        """x = 5, 2 + 3 = 5 -> 5; x in S -> S; 2/3 ~ 0.67 -> 2/3; x > 4 -> (4, oo). None where there is no value."""
        if ops == ("in",):
            return sides[1]
        if ops == ("≈",):
            return sides[0] if Comparison(100).same(*sides) else None
        if set(ops) == {"="}:
            rest = sides[1:] if named(sides[0]) else sides[:-1] if named(sides[-1]) else sides
            return rest[0] if all(self.same(rest[0], other) for other in rest[1:]) else None
        infinity = ("sym", "\\infty")
        if ops == ("!=",) and sides[0][0] == "sym":
            return (
                "set",
                ("tuple", "()", ("neg", infinity), sides[1]),
                ("tuple", "()", sides[1], infinity),
            )
        if not set(ops) <= {"<", "<="}:
            return None
        if len(ops) == 1:
            ray = sides[1][0] == "sym"  # 4 < x, else x < 4
            ops, sides = (
                ((*ops, "<"), (*sides, infinity))
                if ray
                else (("<", *ops), (("neg", infinity), *sides))
            )
        brackets = "(["[ops[0] == "<="] + ")]"[ops[1] == "<="]
        return (
            ("tuple", brackets, sides[0], sides[2])
            if len(sides) == 3 and sides[1][0] == "sym"
            else None
        )

    def equal(self, a: tuple, b: tuple) -> bool:
        """Do two trees have the same value wherever both are defined?"""
        if (x := fraction(a)) is not None and (y := fraction(b)) is not None:
            return self.near(x, y)
        names: set[str] = set()
        digits = 60 + 2 * max(survey(a, names), survey(b, names))
        variables = names - {"i", "fn", "log"}
        for self.natural in (False, True)[: 1 + ("log" in names)]:
            seen = 0
            for point in range(POINTS if variables else 1):
                verdict = self.agree(a, b, point, digits, "i" in names)
                seen += verdict is True
                if verdict is False or seen == ENOUGH:
                    break
            if verdict is not False and seen >= (2 if variables else 1):
                return True
        return False

    def agree(self, a: tuple, b: tuple, point: int, digits: int, complex_too: bool) -> bool | None:
        """Are two values equal at a point? None where undefined, unequal but not real, or the error bound is missed."""
        passes: list[tuple[Approx, Approx]] = []
        self.peak = Decimal(0)
        try:
            decided = digits <= MAX_PRECISION  # else only exact values can be
            for precision in (digits, digits + EXTRA) if decided else (60,):
                with localcontext(context(precision)):
                    x, y = evaluate(a, point, self), evaluate(b, point, self)
                    if isinstance(x, Fraction) and isinstance(y, Fraction):
                        return self.near(x, y)
                    if not decided:
                        return None
                    x, y = self.pay(lift(x)), self.pay(lift(y))
                    passes.append((x, y))
                    gap, size, slack = (
                        abs(x - y).re,
                        max(abs(x).re, abs(y).re),
                        self.peak.scaleb(-digits // 2),
                    )
                    if gap > slack and not self.tolerates(
                        gap, size
                    ):  # 30 digits cannot have been lost
                        return False if complex_too or max(abs(x.im), abs(y.im)) <= slack else None
            with localcontext(context(digits + EXTRA)):
                err = 10 * sum(
                    abs(late - early).re for early, late in zip(*passes)
                ) + self.peak.scaleb(3 - digits)
                if err <= Decimal("1e-25"):
                    return gap <= err or self.tolerates(gap, size)
            more = digits + self.peak.adjusted()  # 10^50 + x needs 50 digits more
            return (
                self.agree(a, b, point, more, complex_too)
                if digits < more <= MAX_PRECISION
                else None
            )
        except ArithmeticError:
            return None

    def near(self, x: Fraction, y: Fraction) -> bool:
        p, q = x.numerator * y.denominator, y.numerator * x.denominator
        integers = x.denominator == y.denominator == 1  # have no tolerance
        return p == q or not integers and self.tolerates(abs(p - q), max(abs(p), abs(q)))

    def tolerates(self, gap: int | Decimal, size: int | Decimal) -> bool:
        near = self.parts > 0 and gap * self.parts <= size
        self.tolerated |= near
        return near


def judge(gold: str, answer: str, parts: int = 0) -> tuple[bool, bool]:
    """(are two answers equal to one part in `parts`, or exactly if that is 0?; and did they not need the tolerance?)"""
    if gold == answer:
        return True, True
    comparison = Comparison(parts)
    for thousands in (True, False):
        a, b = read(gold, thousands), read(answer, thousands)
        if a.plain == b.plain:
            return True, True
        if a.tree is None or b.tree is None:
            return False, False
        if comparison.same(a.tree, b.tree):
            return True, not comparison.tolerated
        # 120,240 is a number or a list: where one side can only be a list, both are read as lists
        if not {a.tree[0], b.tree[0]} & {"list", "set"} or not re.search(
            r"\d,\d{3}", f"{gold} {answer}"
        ):
            break
    return False, False


def is_equivalent(gold: str, answer: str) -> bool:
    """Are two answers exactly equal? Symmetric."""
    return judge(gold, answer)[0]


# ----------------------------------------------------------------------------------------------------------- verdicts
def numbers_used(tree: tuple) -> list[Fraction]:
    """The numbers in a Countdown expression; Unread where it holds anything but + - * / and parentheses."""
    if tree[0] == "num":
        return [tree[1]]
    if tree[0] not in ("+", "*", "/", "neg"):
        raise Unread("not an expression")
    return [used for child in tree[1:] for used in numbers_used(child)]


def countdown(answer: str, gold: str, numbers: list[int]) -> str:
    """The reason for a Countdown answer, which may go on with "= target"."""
    tree = read(answer, thousands=False).tree or ("text",)
    sides = tree[2] if tree[0] == "rel" and set(tree[1]) == {"="} else (tree,)
    try:
        if Counter(numbers_used(sides[0])) != Counter(map(Fraction, numbers)):
            return "wrong numbers"
    except (Unread, ValueError, TypeError):  # the latter two: numbers that are none
        return "not an expression"
    try:
        return (
            "correct"
            if all(evaluate(side, 0, Comparison()) == Fraction(gold) for side in sides)
            else "wrong value"
        )
    except (ArithmeticError, ValueError):  # a gold answer that is no number
        return "wrong value"


def verify(response: str, gold: str, numbers: list[int] | None = None) -> Verdict:
    """Score one response against its gold answer. numbers: those of a Countdown row, whose answer must stand in a box.

    reason is one of: correct, wrong answer, answer not understood, no boxed answer, empty answer, unfinished thinking;
    for Countdown also: wrong numbers, wrong value, not an expression.
    """
    gold = str(gold)
    answer, reason = extract_answer(response, only_boxed=numbers is not None)
    if numbers is not None:
        reason = countdown(answer, gold, numbers) if answer else reason
        return Verdict(reason == "correct", reason == "correct", answer, reason)
    near = exact = False
    if answer or answer == gold:
        near, exact = judge(gold, answer, LENIENT)
        if near and (exact or is_equivalent(gold, answer)):
            return Verdict(True, True, answer, "correct")
        reason = "answer not understood" if read(answer).tree is None else "wrong answer"
    elif loose := extract_anywhere(response):
        near = judge(gold, loose, LENIENT)[0]
    near = near or bool(answer) and read(gold).plain.casefold() == read(answer).plain.casefold()
    return Verdict(False, near, answer, reason)


def verify_row(row: dict) -> dict:
    """A row {"response" or "prediction", "gold"[, "numbers"]} -> the row with the fields of its verdict."""
    response = row.get("response", row.get("prediction"))
    return {**row, **verify(str(response or ""), row["gold"], row.get("numbers"))._asdict()}


# ------------------------------------------------------------------------------------------------------- command line
def read_rows(path: str) -> list[dict]:
    rows = []
    with open(path, encoding="utf-8") as lines:
        for n, line in ((n, line) for n, line in enumerate(lines, 1) if line.strip()):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}:{n}: not JSON ({error.msg}); each line is one object"
                ) from None
            if (
                not isinstance(row, dict)
                or "gold" not in row
                or not {"response", "prediction"} & set(row)
            ):
                raise UserError(f"{path}:{n}: a row needs gold and response (or prediction)")
            rows.append(row)
    return rows


def verify_rows(rows: list[dict], workers: int) -> Iterator[dict]:
    """verify_row over many rows, in order; a pool of processes where it pays (about 0.1 ms a row)."""
    if workers < 2 or len(rows) < 5000:
        yield from map(verify_row, rows)
        return
    with ProcessPoolExecutor(
        workers
    ) as pool:  # not multiprocessing.Pool: that ends its workers by SIGTERM, which a
        yield from pool.map(
            verify_row, rows, chunksize=250
        )  # trainer catches, and waits for a killed one for ever


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Is the answer in a response equal to the gold answer?"
    )
    parser.add_argument("gold", nargs="?", help="the gold answer, as \\frac{1}{2}")
    parser.add_argument("response", nargs="?", help="a response with its answer in \\boxed{}")
    parser.add_argument(
        "--in", dest="source", help='JSONL rows {"response" or "prediction", "gold"[, "numbers"]}'
    )
    parser.add_argument(
        "--out", help="JSONL: the same rows with correct, lenient, extracted, reason"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes, for 5000 rows or more"
    )
    args = parser.parse_args(argv)
    if bool(args.source) != bool(args.out) or bool(args.source) == (args.response is not None):
        parser.error("give GOLD RESPONSE, or --in FILE --out FILE")
    if not args.source:
        print(json.dumps(verify(args.response, args.gold)._asdict(), ensure_ascii=False))
        return 0
    right = 0
    try:
        rows = read_rows(args.source)
        with open(args.out, "w", encoding="utf-8") as out:
            for row in verify_rows(rows, args.workers):
                right += row["correct"]
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(rows)} rows, {right} correct -> {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
