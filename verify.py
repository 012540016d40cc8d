"""The reward: a response and a gold answer -> a verdict. (First cut: exact rationals, text and Countdown.)
    verify(response, gold, numbers=None) -> Verdict(correct, lenient, extracted, reason)
1) Only the part after the last </think> counts; a <think> that never closes earns nothing.  2) The last box wins.
3) Strict is exact: no string similarity, no tolerance. Lenient adds 1e-6 relative tolerance, for evaluation only.
    python verify.py GOLD RESPONSE
    python verify.py --in scored.jsonl --out verdicts.jsonl
"""
from __future__ import annotations

import argparse
import json
import re
import sys
from fractions import Fraction
from typing import NamedTuple

MAX_TEXT = 2000  # characters of an answer that are looked at: longer ones are compared as text
TOKEN = re.compile(r"\s*(?:(\d{1,30})|(\S))")
SPELLINGS = {r"\times": "*", r"\cdot": "*", r"\div": "/", "×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", r"\left": "", r"\right": "",
             r"\,": "", "{": "(", "}": ")"}


class Verdict(NamedTuple):
    """correct: strict, the training reward. lenient: for evaluation. extracted: the answer seen. reason: a short fixed phrase."""
    correct: bool
    lenient: bool
    extracted: str | None
    reason: str


def extract_answer(response: str) -> tuple[str | None, str]:
    """The last balanced box after the thinking part, and why there is none."""
    head, closed, tail = response.rpartition("</think>")
    if "<think>" in tail:
        return None, "unfinished thinking"
    end = len(tail)
    while (start := max(tail.rfind("\\boxed{", 0, end), tail.rfind("\\fbox{", 0, end))) >= 0:
        depth, first = 0, tail.index("{", start)
        for at in range(first, min(len(tail), first + MAX_TEXT)):
            depth += (tail[at] == "{") - (tail[at] == "}")
            if depth == 0:
                return tail[first + 1:at].strip(), "ok"
        end = start
    return None, "no boxed answer"


def tokens_of(text: str) -> list[str] | None:
    for spelling, plain in SPELLINGS.items():
        text = text.replace(spelling, plain)
    text = re.sub(r"\\[dt]?frac\((\d+)\)\((\d+)\)", r"((\1)/(\2))", text)
    tokens = [a or b for a, b in TOKEN.findall(text)]
    return tokens if all(t.isdigit() or t in "+-*/()" for t in tokens) and len(tokens) < 200 else None


def arithmetic(tokens: list[str]) -> Fraction | None:
    """Value by two stacks (shunting yard); None when the expression is malformed or divides by zero."""
    values, ops, order = [], [], {"+": 1, "-": 1, "*": 2, "/": 2, "(": 0}

    def apply() -> bool:
        op = ops.pop()
        if op == "(" or len(values) < 2:
            return False
        b, a = values.pop(), values.pop()
        if op == "/" and b == 0:
            return False
        values.append({"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b}[op]())
        return True

    expect_value = True
    for t in tokens:
        if t.isdigit() and expect_value:
            values.append(Fraction(t))
            expect_value = False
        elif t == "(" and expect_value:
            ops.append(t)
        elif t == "-" and expect_value and (not ops or ops[-1] == "("):
            values.append(Fraction(0))
            ops.append(t)
        elif t in "+-*/" and not expect_value:
            while ops and order[ops[-1]] >= order[t]:
                if not apply():
                    return None
            ops.append(t)
            expect_value = True
        elif t == ")" and not expect_value:
            while ops and ops[-1] != "(":
                if not apply():
                    return None
            if not ops:
                return None
            ops.pop()
        else:
            return None
    while ops:
        if not apply():
            return None
    return values[0] if len(values) == 1 and not expect_value else None


def number(text: str) -> Fraction | None:
    text = text.strip().strip("$").replace(",", "").replace("\\$", "").replace("\\!", "")
    if re.fullmatch(r"[-+]?(\d{1,200}(\.\d{0,200})?|\.\d{1,200})", text):
        return Fraction(text)
    tokens = tokens_of(text)
    return arithmetic(tokens) if tokens else None


def is_equivalent(gold: str, answer: str) -> bool:
    """Strict equality of two answers, exact for rationals, else as text without spaces."""
    a, b = number(gold), number(answer)
    if a is not None and b is not None:
        return a == b
    plain = lambda s: re.sub(r"\\text|[\s{}$]", "", s)
    return plain(gold) != "" and plain(gold) == plain(answer)


def countdown(answer: str, gold: str, numbers: list[int]) -> tuple[bool, str]:
    tokens = tokens_of(answer.partition("=")[0])
    value = arithmetic(tokens) if tokens else None
    if value is None:
        return False, "not an expression"
    if sorted(int(t) for t in tokens if t.isdigit()) != sorted(numbers):
        return False, "wrong numbers"
    return (True, "correct") if value == Fraction(gold) else (False, "wrong value")


def verify(response: str, gold: str, numbers: list[int] | None = None) -> Verdict:
    """Score one response. numbers: a Countdown row, whose boxed expression must use each exactly once and reach gold."""
    answer, reason = extract_answer(response)
    if answer is None:
        return Verdict(False, False, None, reason)
    if answer == "":
        return Verdict(False, False, "", "empty answer")
    if numbers is not None:
        right, reason = countdown(answer, gold, numbers)
        return Verdict(right, right, answer, reason)
    right = is_equivalent(gold, answer)
    a, b = number(gold), number(answer)
    close = a is not None and b is not None and abs(a - b) <= abs(a) / 10**6
    return Verdict(right, right or close, answer, "correct" if right else "wrong answer")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="response + gold answer -> verdict")
    parser.add_argument("gold", nargs="?")
    parser.add_argument("response", nargs="?")
    parser.add_argument("--in", dest="source", help="JSONL rows with response or prediction, gold[, numbers]")
    parser.add_argument("--out", help="JSONL rows + correct, lenient, extracted, reason")
    args = parser.parse_args(argv)
    if args.source and args.out:
        with open(args.source) as rows, open(args.out, "w") as out:
            for row in map(json.loads, rows):
                verdict = verify(row.get("response", row.get("prediction")), row["gold"], row.get("numbers"))
                out.write(json.dumps({**row, **verdict._asdict()}) + "\n")
    elif args.gold is not None and args.response is not None:
        print(json.dumps(verify(args.response, args.gold)._asdict()))
    else:
        parser.error("give GOLD RESPONSE, or --in and --out")


if __name__ == "__main__":
    main(sys.argv[1:])
