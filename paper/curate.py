r"""Which trajectories to train on: no prompt twice, none of an evaluation set; Easy, Uniform, Hard.

    python -m paper.curate --in train.jsonl --against test.jsonl val.jsonl --out clean.jsonl
    python evaluate.py --init WEAK --data clean.jsonl --n 4 --out attempts.jsonl
    python -m paper.curate --in clean.jsonl --attempts attempts.jsonl --out data/

The last one writes easy.jsonl, uniform.jsonl and hard.jsonl. A training row is dropped for the
first reason that holds, and each reason is counted:
    duplicate   its prompt, case and spacing aside, stood in an earlier row
    overlap     it shares an n-gram of words with an evaluation prompt, or is a shorter one
    near        with numbers and names made alike, it shares most 3-grams with an evaluation prompt
Choices: 1) The paper compares embeddings (cosine above 0.8); n-grams need no model and show what
was found. 2) An n-gram that stands in many evaluation prompts ("put your final answer within") is
an instruction and is ignored. 3) A name is a word with a capital inside a sentence that never
stands without one. 4) `near` finds problems whose numbers or people were changed. Where all prompts
have one form, as in Countdown, that is every row: use --near 0. 5) Difficulty as in the paper: the
share w of N attempts that a weak model wins; Easy w = 1, Hard w <= 0.25, Uniform drawn from all, of
equal sizes. Where a class has too few rows its edge moves by one attempt at a time."""

import argparse
import json
import math
import random
import re
import sys
from collections import Counter
from pathlib import Path

import core.start  # before torch

import data
from core import files
from core.errors import UserError

SHINGLE = 3  # words; a short problem of 12 words still has ten of them
COMMON = 0.05  # share of the evaluation prompts that makes an n-gram an instruction ...
COMMON_LEAST = 5  # ... and the fewest prompts that do
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
COUNTING = set(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety "
    "hundred thousand million half twice double triple third quarter".split()
)


# ------------------------------------------------------------------------------------------ texts
def words_of(text: str) -> list[str]:
    """Words, numbers and operators of a text, in lower case."""
    return re.findall(r"\\?[^\W\d_]+|\d+(?:[.,]\d+)*|[-+*/^=<>]", text.lower())


def names_in(texts) -> set[str]:
    """Words (lower case) with a capital inside a sentence and nowhere here without one."""
    inside = set()
    small = set()
    for text in texts:
        before = ""  # the last character before the word that is not a space
        for space, word, mark in re.findall(r"(\s+)|([^\W\d_]+)|(.)", text):
            if word and word[0].islower():
                small.add(word.lower())
            elif word and before and before not in ".?!:":
                inside.add(word.lower())
            if not space:
                before = (word or mark)[-1]
    return inside - small


def template_of(text: str, names: set[str]) -> list[str]:
    """words_of with every number as 0 and every name as @: what two versions of a problem share."""

    def symbol(word):
        if word in names:
            return "@"
        return "0" if word in COUNTING or NUMBER.fullmatch(word) else word

    return [symbol(word) for word in words_of(text)]


def grams(words: list[str], n: int) -> set[tuple]:
    """All runs of n words; the whole where there are fewer."""
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


# ------------------------------------------------------------------------------- decontamination
class Overlap:
    """The n-grams of evaluation prompts, to ask whether a training prompt holds one of them."""

    def __init__(self, prompts: list[str], n: int):
        self.n = n
        counts = Counter()
        for prompt in prompts:
            counts.update(grams(words_of(prompt), n))
        most = max(COMMON_LEAST, COMMON * len(prompts))
        # A prompt of fewer than n words counts as a whole only: as a part, "what is 2 + 2" would
        # empty any training set.
        self.known = {gram for gram, count in counts.items() if count <= most or len(gram) < n}

    def __call__(self, prompt: str) -> bool:
        return not self.known.isdisjoint(grams(words_of(prompt), self.n))


class Near:
    """Evaluation prompts as sets of template 3-grams, to ask for one of similarity >= least.

    The similarity is Jaccard's. Exact and fast by the prefix filter: two sets that share k of a's
    members share one of any |a| - k + 1 of them, so only a's rarest are looked up."""

    def __init__(self, prompts: list[str], least: float, names: set[str]):
        self.least = least
        self.names = names
        self.sets = list({frozenset(self.grams_of(prompt)) for prompt in prompts})
        self.holders = {}
        for i, members in enumerate(self.sets):
            for gram in members:
                self.holders.setdefault(gram, []).append(i)

    def grams_of(self, prompt: str) -> set[tuple]:
        return grams(template_of(prompt, self.names), SHINGLE)

    def __call__(self, prompt: str) -> bool:
        mine = self.grams_of(prompt)
        rarest = sorted(mine, key=lambda gram: len(self.holders.get(gram, ())))
        rarest = rarest[: len(mine) - math.ceil(self.least * len(mine)) + 1]
        candidates = set()
        for gram in rarest:
            candidates.update(self.holders.get(gram, ()))
        others = [self.sets[i] for i in candidates]
        return any(len(mine & other) >= self.least * len(mine | other) for other in others)


def clean(
    rows: list[dict], against: list[str], ngram: int = 13, near: float = 0.8
) -> tuple[list[dict], dict]:
    """(rows that stay, counts) of training rows and evaluation prompts; ngram or near 0 = off."""
    prompts = [prompt_of(row, f"training row {n}") for n, row in enumerate(rows, 1)]
    overlaps = Overlap(against, ngram) if ngram and against else None
    is_near = Near(against, near, names_in(prompts + against)) if near and against else None
    counts = {"rows": len(rows), "duplicate": 0, "overlap": 0, "near": 0, "kept": 0}
    seen = set()
    kept = []
    for row, prompt in zip(rows, prompts):
        key = " ".join(prompt.lower().split())
        if key in seen:
            reason = "duplicate"
        elif overlaps and overlaps(prompt):
            reason = "overlap"
        elif is_near and is_near(prompt):
            reason = "near"
        else:
            reason = "kept"
            kept.append(row)
        counts[reason] += 1
        seen.add(key)
    return kept, counts


# ------------------------------------------------------------------------------------- difficulty
def win_rates(attempts: list[dict]) -> tuple[dict[str, float], int]:
    """({prompt: share of right attempts}, attempts per prompt), from evaluate.py --out."""
    wins = {}
    for n, record in enumerate(attempts, 1):
        if not {"problem", "correct"} <= set(record):
            raise UserError(
                f"attempts, record {n}: needs problem and correct, as evaluate.py --out writes "
                f"them (found: {sorted(record)})"
            )
        wins.setdefault(record["problem"], []).append(bool(record["correct"]))
    fewest = min(map(len, wins.values()))
    most = max(map(len, wins.values()))
    if fewest != most:
        raise UserError(
            f"attempts: {fewest} to {most} a prompt; dedup the prompts first, so that each is "
            "tried alike"
        )
    return {prompt: sum(tries) / len(tries) for prompt, tries in wins.items()}, most


def by_difficulty(
    rows: list[dict], attempts: list[dict], size: int = 0, seed: int = 0
) -> tuple[dict, dict]:
    """({"easy", "uniform", "hard": rows}, {"easy", "hard": edge of the win rate}), of one size.

    size 0 = as many as the smaller of Easy and Hard has at the paper's edges, w = 1 and 0.25."""
    rates, n = win_rates(attempts)
    prompts = [prompt_of(row, "a row") for row in rows]
    known = [row for row, prompt in zip(rows, prompts) if prompt in rates]
    wins = [round(rates[prompt] * n) for prompt in prompts if prompt in rates]
    if size > len(known):
        raise UserError(
            f"--size {size}: only {len(known)} rows have attempts; ask for fewer, or make more "
            "attempts"
        )
    lowest = n  # attempts won by an easy row, at least
    highest = n // 4  # and by a hard row, at most
    size = size or min(sum(w >= lowest for w in wins), sum(w <= highest for w in wins))
    if not size:
        raise UserError(
            f"of {len(known)} rows none is won in all {n} attempts, or none in a quarter of them "
            "or fewer; give --size N, and the edges move to where there are N"
        )
    while sum(w >= lowest for w in wins) < size:
        lowest -= 1
    while sum(w <= highest for w in wins) < size:
        highest += 1
    classes = {
        "easy": [row for w, row in zip(wins, known) if w >= lowest],
        "uniform": known,
        "hard": [row for w, row in zip(wins, known) if w <= highest],
    }
    chosen = {}
    for name, members in classes.items():
        chosen[name] = random.Random(f"{seed} {name}").sample(members, size)
    return chosen, {"easy": lowest / n, "hard": highest / n}


# ----------------------------------------------------------------------------------- command line
def prompt_of(row: dict, where: str) -> str:
    """The problem of a row in any accepted spelling (data.py), as text."""
    text = data.prompt_text(row)
    if text is None:
        raise UserError(
            f"{where}: no prompt; a row needs messages or prompt (found: {sorted(row)})"
        )
    return text


def write_rows(path: Path, rows: list[dict]) -> None:
    files.write_aside(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def select(args) -> str:
    """--attempts: write easy, uniform and hard; returns the line to print."""
    out = Path(args.out)
    rows = data.read_rows(args.source)
    chosen, edges = by_difficulty(rows, data.read_rows(args.attempts), args.size, args.seed)
    out.mkdir(parents=True, exist_ok=True)
    for name, members in chosen.items():
        write_rows(out / f"{name}.jsonl", members)
    return (
        f"{out}: {len(chosen['easy'])} rows each; easy: win rate {edges['easy']:g} or more, "
        f"hard: {edges['hard']:g} or less, uniform: any"
    )


def decontaminate(args) -> str:
    """--against: write the rows that stay; returns the line to print."""
    out = Path(args.out)
    rows = data.read_rows(args.source)
    against = []
    for path in args.against:
        for n, row in enumerate(data.read_rows(path), 1):
            against.append(prompt_of(row, f"{path}:{n}"))
    kept, counts = clean(rows, against, args.ngram, args.near)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_rows(out, kept)
    counted = ", ".join(f"{count} {name}" for name, count in counts.items())
    return f"{out}: {counted}; against {len(against)} evaluation prompts"


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = flags.add_argument
    add("--in", dest="source", required=True, help="training rows, .jsonl or .parquet")
    add("--out", required=True, help="file for the clean rows; with --attempts a folder for three")
    add("--against", nargs="+", default=[], metavar="FILE", help="evaluation sets to keep out")
    add("--ngram", type=int, default=13, help="words of an n-gram; 0 = off (default 13)")
    add("--near", type=float, default=0.8, help="least Jaccard similarity; 0 = off (default 0.8)")
    add("--attempts", help="records of evaluate.py --out on --in: select by win rate")
    add("--size", type=int, default=0, help="rows in each of easy, uniform, hard; 0 = all that fit")
    add("--seed", type=int, default=0, help="of the draws of --attempts (default 0)")
    return flags


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    try:
        if args.ngram < 0 or not 0 <= args.near <= 1 or args.size < 0:
            raise UserError("--ngram and --size are counts, --near a similarity from 0 (off) to 1")
        if args.attempts and args.against:
            raise UserError(
                "--against cleans and --attempts selects: clean first, then select from that file"
            )
        print(select(args) if args.attempts else decontaminate(args))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
