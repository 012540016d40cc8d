r"""The reward: is the answer in a response equal to the gold answer? Exact and bounded.

    verify(response, gold, prompt=None) -> Verdict(correct, lenient, extracted, reason)
    python verify.py GOLD RESPONSE
    python verify.py --in scored.jsonl --out verdicts.jsonl
                                     rows {"response" or "prediction", "gold"[, "prompt"]}

1) Only the text after the last </think> counts, and of it the last closed \boxed{} or \fbox{};
   without a box, what follows "answer is", <answer> or ####. A <think> left open earns nothing.
2) An answer is read into a tree (core/mathtext.py, core/mathexpr.py). What cannot be read (sums,
   integrals, ellipses, sentences) is compared as text, token by token; of "P(X > 3) = 1/2" only
   the right side needs to be read.
3) Trees are compared by core/equality.py: fractions exactly, other values to 60 digits or more,
   expressions at points.
4) Letters: three letters or more, or a short English word, and nothing else, are a word. It equals
   only the same letters in the same order: dog is not god (core/mathtext.py, item_words). Where the
   other side has these letters as variables, it is their product: abcd is a * b * c * d
   (core/reading.py, spread).
5) An answer is an answer: not a formula of the prompt where the gold answer is another text
   ("restates the question"), and a short closed form where it is a number ("not evaluated").
6) strict (`correct`), the training reward, has no tolerance and no string similarity. lenient, for
   evaluation only, allows 1e-4 relative error where a side is no integer, any capitals, and an
   answer anywhere (the last number, inside <think>).
No eval, signal, thread or sympy; safe in threads and forked workers. See docs/verifier.md.
Unlike this, the paper's released reward accepts any answer whose text is 60% similar to the gold.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from core.boxes import MAX_BOXES, boxed
from core.equality import Comparison
from core.errors import UserError
from core.files import read_jsonl
from core.mathunits import MONTHS
from core.mathvalue import fraction
from core.reading import Reading, read, spread, unbraced
from core.sampling import names_of

PLAIN_TAIL = 4000  # characters searched for "answer is"
LENIENT = 10_000  # lenient equality is to one part in this many
CLOSED_FORM = 8  # numbers in a closed form; more are allowed where the gold answer has more


class Verdict(NamedTuple):
    """correct: the training reward. lenient: for evaluation. extracted: the answer as written.
    reason: fixed words."""

    correct: bool
    lenient: bool
    extracted: str | None
    reason: str


# ---- extraction ----------------------------------------------------------------------------------
PHRASE = re.compile(
    r"(?:answer\W{0,6}?(?:is|:|=)|answer\*\*|####(?=\s*[-$\\\d])|<answer>)[\s:*_`]*", re.IGNORECASE
)
COMMENT = re.compile(r"(?:right|correct|wrong|incorrect|verified|consistent)\b", re.IGNORECASE)
MATHS = re.compile(
    r"(?:\$(?:\\.|[^$\\])+\$(?:\s*,?\s*(?:and\s)?\s*)?)+|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL
)
DISPLAY = re.compile(r"\$\$((?:\\.|[^$\\])+)\$\$")
SENTENCE_END = re.compile(r"\.(?:\s|$)|\n|</answer>|\*\*|`")
# what makes a formula one of several: "$5$ or $6$" is not the answer $5$
HEDGE = re.compile(
    r"[ \t]*[,;]?[ \t]*(?:(?:or(?! equivalently)|maybe|perhaps|possibly|vs)(?![a-z])"
    r"|[-+*/|<>=^]|(?:and )?(?:\$|\\[(\[]))"
)
LAST = re.compile(r"(?<!\\)\$(?:\\.|[^$\\])+\$|-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def phrased(text: str) -> str | None:
    """The answer after the last "answer is", <answer> or ####, to the end of its sentence.

    "I am sure that this answer is right" is a comment on an answer.
    """
    tail = text[-PLAIN_TAIL:]
    ends = [found.end() for found in PHRASE.finditer(tail)]
    ends = [end for end in ends[-MAX_BOXES:] if not COMMENT.match(tail, end)]
    if not ends:
        return None
    tail = tail[ends[-1] :]
    maths = DISPLAY.match(tail) or MATHS.match(tail)
    if maths and not HEDGE.match(tail, maths.end()):
        return maths[maths.lastindex or 0].strip()
    return SENTENCE_END.split(tail, maxsplit=1)[0].strip() or None


def extract_answer(response: str) -> tuple[str | None, str]:
    """Response -> (the answer as written, or None; the reason if that is none or empty): what the
    reward sees."""
    text = response.rpartition("</think>")[2]
    if "<think>" in text:
        return None, "unfinished thinking"
    answer = boxed(text)
    if answer is None:
        answer = phrased(text)
    return answer, "no boxed answer" if answer is None else "empty answer"


def extract_anywhere(response: str) -> str | None:
    """For the lenient verdict: any box or phrase, inside <think> too, else the last formula or
    number."""
    last = LAST.findall(response[-PLAIN_TAIL:])
    return boxed(response) or phrased(response) or (last[-1] if last else None)


# ---- judgement -----------------------------------------------------------------------------------
CHOICE_LETTER = re.compile(r"(?<![A-Za-z\\])[A-J](?![A-Za-z])")
ONE_CHOICE = re.compile(r"\(?([A-J])\)?\.?")
# A) 5   (A) 5   C: a longer option   Option B
LONG_CHOICE = re.compile(
    r"(?:option|choice)?\s*(?:\(([A-J])\)|([A-J])[).:]|(?<=[a-z] )([A-J])$)", re.I
)
OTHER_CHOICE = re.compile(
    r"\([A-J]\)|\b[A-J]\)|\b(?:or|and)\s+[A-J]\b|[,;/|.]\s*[A-J]\s*[.:]|\\ldots|\.\.\."
)
WRAPPER = re.compile(r"\\(?:text\w*|math\w+)\s*\{|[{}$]|\\[,;:! ]|\*\*")


def chosen(text: str) -> tuple[str | None, bool]:
    """(the letter of a multiple-choice answer; does it stand alone?)"""
    text = WRAPPER.sub("", text).strip()
    if alone := ONE_CHOICE.fullmatch(text):
        return alone[1], True
    long = LONG_CHOICE.match(text)
    if not long or OTHER_CHOICE.search(text, long.end()):
        return None, False
    return long[1] or long[2] or long[3], False


def same_choice(gold: str, answer: str) -> bool:
    """Whether both name one choice and at least one of them is its letter alone: A and "A) 5"."""
    letter, alone = chosen(gold)
    other, other_alone = chosen(answer)
    return letter is not None and letter == other and (alone or other_alone)


def judge(gold: str, answer: str, parts: int = 0) -> tuple[bool, bool]:
    """(equal, exactly equal): the first to one part in `parts` (0: exactly), the second without
    that tolerance."""
    if gold == answer:
        return True, True
    comparison = Comparison(parts)
    for thousands in (True, False):
        a = read(gold, thousands)
        b = read(answer, thousands)
        if a.plain == b.plain:
            return True, True
        if a.tree is None or b.tree is None:
            return same_as_text(gold, answer, a, b)
        if same_trees(a, b, comparison):
            return True, not comparison.tolerated
        # 120,240 is a number or a list: where one side can only be a list, both are read as lists
        lists = {a.tree[0], b.tree[0]} & {"list", "set"}
        if not lists or not re.search(r"\d,\d{3}", f"{gold} {answer}"):
            break
    return same_as_text(gold, answer, a, b)


def same_trees(a: Reading, b: Reading, comparison: Comparison) -> bool:
    tree_a = a.tree
    tree_b = b.tree
    try:
        if a.has_words:
            tree_a = spread(tree_a, names_of(tree_b))
        if b.has_words:
            tree_b = spread(tree_b, names_of(tree_a))
        return comparison.same(tree_a, tree_b)
    except ArithmeticError:  # too much work
        return False


def is_number(reading: Reading) -> bool:
    return reading.tree is not None and fraction(reading.tree) is not None


def same_as_text(gold: str, answer: str, a: Reading, b: Reading) -> tuple[bool, bool]:
    """judge() where trees are missing or differ: by tokens, the letter of a choice, a date."""
    if is_number(a) and is_number(b):
        return False, False
    readable = bool(a.tokens and b.tokens)  # else only the same text is the same
    same = readable and unbraced(a.plain) == unbraced(b.plain)
    if CHOICE_LETTER.search(gold):
        same = same or same_choice(gold, answer)
    if a.has_words and any(month in gold.lower() for month in MONTHS):
        same = sorted(map(str.lower, a.tokens)) == sorted(map(str.lower, b.tokens))
    return same, same


def is_equivalent(gold: str, answer: str) -> bool:
    """Are two answers exactly equal? Symmetric."""
    return judge(gold, answer)[0]


# ---- is it an answer at all? ---------------------------------------------------------------------
FORMULA = re.compile(r"(?<!\\)\$\$?((?:\\.|[^$\\])+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
SIDES = re.compile(r"=|<|>|\\[lg]eq?\b|[,;]|\\text\s*\{[^{}]*\}")
DECORATION = re.compile(
    r"\\text\s*\{[^{}]*\}|\\(?:left|right|displaystyle)(?![a-z])"
    r"|\\[$%,;:!]|\^\s*\{?\\circ\}?|[\s{}$().]"
)
OPERATOR = re.compile(r"[-+*/^=]")
TRIVIAL = re.compile(r"-?\d*|-?[A-Za-z]|-?\\[a-z]+")


def compact(text: str) -> str:
    """A formula without spaces, brackets and units, to find it in the prompt."""
    text = DECORATION.sub("", text)
    return text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")


@lru_cache(64)
def formulas(prompt: str) -> dict[str, str]:
    """The formulas of a prompt and their sides: without decoration -> as written."""
    found = {}
    for match in FORMULA.finditer(prompt):
        formula = match[1] or match[2] or match[3]
        for part in (formula, *SIDES.split(formula)):
            found[compact(part)] = part
    return {text: part for text, part in found.items() if not TRIVIAL.fullmatch(text)}


def restates(answer: str, gold: str, prompt: str) -> bool:
    """Is the answer a formula of the prompt, where the gold answer is spelled otherwise?

    Also with something around it (S = ..., ... + 0) where the formula alone is right.
    """
    text = compact(answer)
    if text == compact(gold) or TRIVIAL.fullmatch(text):
        return False
    known = formulas(prompt)
    if not known and OPERATOR.search(text):  # a prompt without LaTeX
        return text in compact(prompt)
    inside = [part for formula, part in known.items() if formula in text][:4]
    return text in known or any(is_equivalent(gold, part) for part in inside)


def numbers_in(tree: tuple) -> int:
    """How many numbers and constants a value is written with; of a chain a = b = c the shortest
    side counts."""
    if tree[0] == "rel":
        return min(numbers_in(side) for side in tree[2])
    inner = [numbers_in(child) for child in tree[1:] if isinstance(child, tuple)]
    return sum(inner) if inner else 1


def evaluated(answer: str, gold: str) -> bool:
    """Where the gold answer is a number: is the answer a closed form that is not much longer?"""
    if answer == gold:
        return True
    b = read(answer).tree
    if b is None or b[0] in ("num", "list", "tuple", "matrix"):
        return True
    n_numbers = numbers_in(b)
    if n_numbers <= CLOSED_FORM:
        return True
    a = read(gold).tree
    if a is None or names_of(a):
        return True
    return n_numbers <= CLOSED_FORM + 2 * (numbers_in(a) - 1)


# ---- verdicts ------------------------------------------------------------------------------------
def verify(response: str, gold: str, prompt: str | None = None) -> Verdict:
    """Score one response against its gold answer. prompt: the question; to repeat it earns nothing.

    reason is one of: correct, wrong answer, answer not understood, no boxed answer, empty answer,
    unfinished thinking, restates the question, not evaluated.
    """
    gold = str(gold)
    answer, reason = extract_answer(response)
    if not answer:
        loose = extract_anywhere(response)
        near = bool(loose) and judge(gold, loose, LENIENT)[0]
        return Verdict(False, near, answer, reason)
    near, exact = judge(gold, answer, LENIENT)
    if near and (exact or is_equivalent(gold, answer)):
        if prompt and restates(answer, gold, prompt):
            return Verdict(False, False, answer, "restates the question")
        if not evaluated(answer, gold):
            return Verdict(False, True, answer, "not evaluated")
        return Verdict(True, True, answer, "correct")
    reason = "answer not understood" if read(answer).tree is None else "wrong answer"
    near = near or read(gold).plain.casefold() == read(answer).plain.casefold()
    return Verdict(False, near, answer, reason)


def verify_row(row: dict) -> dict:
    """A row {"response" or "prediction", "gold"[, "prompt"]} -> the row with the fields of its
    verdict."""
    response = row.get("response", row.get("prediction"))
    prompt = row.get("prompt")
    known = prompt if isinstance(prompt, str) else None
    verdict = verify(str(response or ""), row["gold"], known)
    return {**row, **verdict._asdict()}


# ---- command line --------------------------------------------------------------------------------
def read_rows(path: str) -> list[dict]:
    rows = []
    for n, row in enumerate(read_jsonl(Path(path)), 1):
        if (
            not isinstance(row, dict)
            or "gold" not in row
            or not {"response", "prediction"} & set(row)
        ):
            raise UserError(f"{path}:{n}: a row needs gold and response (or prediction)")
        rows.append(row)
    return rows


def verify_rows(rows: list[dict], workers: int) -> Iterator[dict]:
    """verify_row over many rows, in order; a pool of processes where it pays (0.1 ms per row).

    Not multiprocessing.Pool: it ends its workers by SIGTERM, which a trainer catches, and waits
    for ever.
    """
    if workers < 2 or len(rows) < 5000:
        yield from map(verify_row, rows)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(verify_row, rows, chunksize=250)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Is the answer in a response equal to the gold answer?"
    )
    rows_help = 'JSONL rows {"response" or "prediction", "gold"[, "prompt"]}'
    out_help = "JSONL: the same rows with correct, lenient, extracted, reason"
    workers_help = "processes, for 5000 rows or more"
    parser.add_argument("gold", nargs="?", help="the gold answer, as \\frac{1}{2}")
    parser.add_argument("response", nargs="?", help="a response with its answer in \\boxed{}")
    parser.add_argument("--in", dest="source", help=rows_help)
    parser.add_argument("--out", help=out_help)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help=workers_help)
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
    except (OSError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(rows)} rows, {right} correct -> {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
