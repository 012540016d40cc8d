r"""Countdown, the built-in task: problems, an expert that searches and gives up too soon, text for a base, a tokenizer.

    Make 35 from 9 8 9 9 ->      reach 35 with + - *, every number exactly once; an answer is \boxed{ 8 + 9 + 9 + 9 }

1) Problems have k = 3 or 4 numbers of 1..10 (k = 5 only in test_k5.jsonl, which nothing is trained on) and a target of
   1..60, and are solvable by "value so far, operation, next number" with all values within 0..60. Targets reach down to
   1 because k = 3 has too few problems otherwise (1,360 with targets 10..50, 2,146 with 1..60).
2) A hash of (sorted numbers, target) decides the one split a problem can appear in: no order of its numbers leaks into
   another split, no seed or flag moves it. Within a split it may return in another order; no two rows of a file agree.
3) The expert's weakness is planted and graded: depth-first search in random order, each check written out, but after a
   failed try it gives up with probability `hazard` and boxes its closest try. hazard 0 leaves only the limit on lines;
   `verified` drops the wrong traces.
4) Base text teaches arithmetic, comparing and the formats, not the search: a model pretrained on it guesses.
5) A flag changes only the files it names: eval, test and test_k5 are the same for every seed, base and rl depend on the
   seed and their size, and a longer train.jsonl begins with the shorter one.

python countdown.py --out data/countdown --trajectories 8000 --hazard 0 --verified
    base.jsonl {"text"}; train.jsonl val.jsonl {"prompt", "answer", "numbers", "response"};
    rl.jsonl eval.jsonl test.jsonl test_k5.jsonl {"prompt", "answer", "numbers"};
    tokenizer.json tokenizer_config.json; countdown.json (the settings, and the number of rows in each file)
python countdown.py --compare sft.jsonl rl.jsonl         how two models searched, from what evaluate.py --out wrote"""

import argparse
import hashlib
import inspect
import json
import os
import random
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass, fields
from functools import cache
from itertools import combinations_with_replacement, permutations
from pathlib import Path

from core.errors import UserError

LIMIT = 60  # targets are 1..LIMIT, intermediate values 0..LIMIT: a table of arithmetic that a tiny model can know
LARGEST = 10  # the numbers given are 1..LARGEST
SIZES = (3, 4)  # k, half of every file each
# Percent of all problems, by hash. eval and test each need 250 different k = 3 problems of 2,146: 13% leaves a margin.
SPLITS = {"train": 38, "rl": 30, "val": 6, "eval": 13, "test": 13}
SPECIAL = ("<eos>", "<pad>", "<unk>")
# Numbers above LIMIT have a token too, so that a fork can raise LIMIT and a prompt from outside is not all <unk>.
WORDS = ("Make from -> <think> </think> \\boxed{ } ( ) + - * = , no yes").split() + [
    str(n) for n in range(141)
]
TURNS = 200  # rounds over a split's problems before a file counts as impossible to fill


@dataclass(frozen=True)
class Config:
    trajectories: int = 4000  # expert trajectories in train.jsonl, all different
    difficulty: str = "uniform"  # of train.jsonl: uniform | easy | hard (half with most | fewest hits) | 3 | 4 (one k)
    hazard: float = 0.15  # probability that the expert gives up after a failed try; 0 = patient
    lines: int = 17  # most arithmetic steps that the expert writes
    verified: bool = False  # keep only trajectories whose boxed answer is right
    val: int = 1000  # trajectories in val.jsonl: uniform difficulty, the same expert
    rl: int = 6000  # problems in rl.jsonl
    test: int = 500  # problems in each of eval.jsonl, test.jsonl and test_k5.jsonl
    base: int = 22528  # documents in base.jsonl (704 steps of 32)
    seed: int = 0  # of base, train, val and rl; eval, test and test_k5 do not depend on it

    def __post_init__(self):
        if self.difficulty not in ("uniform", "easy", "hard", "3", "4"):
            raise UserError(
                f"difficulty {self.difficulty!r} is unknown; choose uniform, easy, hard, 3 or 4"
            )
        if not 0 <= self.hazard <= 1:
            raise UserError(
                f"hazard is {self.hazard}; it is a probability, choose 0 (patient) to 1 (one try)"
            )
        if self.lines < max(SIZES) - 1:
            raise UserError(
                f"lines is {self.lines}; one try takes up to {max(SIZES) - 1}, choose at least that many"
            )
        for name in ("trajectories", "val", "rl", "test", "base"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"{name} is {getattr(self, name)}; it is a number of rows, choose 0 or more"
                )


def apply(value: int, op: str, number: int) -> int | None:
    """value op number, or None where the result leaves 0..LIMIT."""
    result = value + number if op == "+" else value - number if op == "-" else value * number
    return result if 0 <= result <= LIMIT else None


@cache
def all_problems(k: int) -> dict[tuple[tuple[int, ...], int], float]:
    """{(sorted numbers, target): ease} of all solvable problems of size k; ease = share of complete tries that hit."""
    return {
        (numbers, value): ways / sum(reached.values())
        for numbers, reached in _reachable(k).items()
        for value, ways in reached.items()
        if 1 <= value <= LIMIT
    }


@cache
def _reachable(k: int) -> dict[tuple[int, ...], Counter]:
    """{sorted numbers: {value: ways to it}}, built from the sets one number smaller, so that orders need no search."""
    if k == 1:
        return {(n,): Counter({n: 1}) for n in range(1, LARGEST + 1)}
    table = {}
    for numbers in combinations_with_replacement(range(1, LARGEST + 1), k):
        table[numbers] = Counter()
        for last in set(numbers):
            i = numbers.index(last)
            for value, ways in _reachable(k - 1)[numbers[:i] + numbers[i + 1 :]].items():
                for op in "+-*":
                    result = apply(value, op, last)
                    if result is not None:
                        table[numbers][result] += ways
    return table


def split_of(numbers, target: int) -> str:
    """The one split of a problem, whatever the order of its numbers. Not hash(): Python salts it per process."""
    key = " ".join(map(str, [*sorted(numbers), target]))
    percent = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % 100
    for split, share in SPLITS.items():
        if percent < share:
            return split
        percent -= share
    raise AssertionError("SPLITS must sum to 100")


@cache
def pool(split: str, k: int, difficulty: str = "uniform") -> list[tuple[tuple[int, ...], int]]:
    """The problems of one split and size, sorted; easy and hard cut them at the median ease of that size."""
    ease = {
        problem: share for problem, share in all_problems(k).items() if split_of(*problem) == split
    }
    if difficulty in ("easy", "hard"):
        by_ease = sorted(ease, key=lambda problem: (-ease[problem], problem))
        half = len(by_ease) // 2
        return sorted(by_ease[:half] if difficulty == "easy" else by_ease[half:])
    return sorted(ease)


def prompt_of(numbers, target: int) -> str:
    """The text a model sees; tokens are separated by spaces everywhere in this task."""
    return f"Make {target} from {' '.join(map(str, numbers))} ->"


def _next_steps(value, expression, last_op, rest, rng):
    """Every step from a value (None: nothing chosen yet) as (line, value, expression, op, rest), shuffled.

    Two steps to the same value with the same numbers left are one: a + b and b + a, or 2 + 2 and 2 * 2."""
    starts = [(value, expression, last_op, rest)]
    if value is None:
        starts = [(n, str(n), "", rest[:i] + rest[i + 1 :]) for i, n in enumerate(rest)]
    steps = []
    for start, text, op_before, left in starts:
        for i, n in enumerate(left):
            for op in "+-*":
                result = apply(start, op, n)
                if result is not None:
                    # The value so far stands at the left, so only a sum or difference under * needs parentheses.
                    inner = f"( {text} )" if op == "*" and op_before in ("+", "-") else text
                    line = f"{start} {op} {n} = {result}"
                    steps.append((line, result, f"{inner} {op} {n}", op, left[:i] + left[i + 1 :]))
    rng.shuffle(steps)
    return list({(step[1], tuple(sorted(step[4]))): step for step in steps}.values())


def expert(numbers, target: int, hazard: float, lines: int, rng: random.Random) -> tuple[str, bool]:
    """Search for the target: (response, right). At most `lines` (>= len(numbers) - 1) steps; the last try is whole.

    `8 + 9 = 17 , 17 + 9 = 26 , 26 - 9 = 17 no 26 + 9 = 35 yes`: a comma leads one step deeper; after `no` the next line
    starts from the deepest value with an untried step. The closest try (the earliest of equals) is boxed."""
    trace, closest, n = [], None, 0
    stack = _next_steps(None, "", "", tuple(numbers), rng)
    while (
        stack and n + 1 + len(stack[-1][4]) <= lines
    ):  # room to finish the try that this step begins
        line, value, expression, op, rest = stack.pop()
        trace.append(line)
        n += 1
        if rest:
            trace.append(",")
            stack += _next_steps(value, expression, op, rest, rng)
            continue
        trace.append("yes" if value == target else "no")
        if closest is None or abs(value - target) < abs(closest[0] - target):
            closest = value, expression
        if value == target or rng.random() < hazard:
            break
    return f"<think> {' '.join(trace)} </think> \\boxed{{ {closest[1]} }}", closest[0] == target


def _fact(rng, target=None) -> tuple[str, int]:
    """A true line and its result, the target if one is given. The operation is drawn first: products are fewest."""
    while True:
        op, n = rng.choice("+-*"), rng.randint(1, LARGEST)
        if target is None:
            value = rng.randint(0, LIMIT // n if op == "*" else LIMIT)
        else:
            value = target - n if op == "+" else target + n if op == "-" else target // n
        result = apply(value, op, n)
        if 0 <= value <= LIMIT and result is not None and target in (None, result):
            return f"{value} {op} {n} = {result}", result


def base_text(rng: random.Random) -> str:
    """One document for a base model: facts 40%, facts compared with a goal 30%, direct answers 15%, sloppy chains 15%.

    Prompts are problems of the training split."""
    kind = rng.random()
    if kind < 0.4:
        return " , ".join(_fact(rng)[0] for _ in range(12))
    if kind < 0.7:
        target, words = rng.randint(1, LIMIT), []
        for _ in range(10):
            line, result = _fact(rng, target if rng.random() < 0.4 else None)
            right = (result == target) != (
                rng.random() < 0.1
            )  # 10% noise: left for SFT and RL to sharpen
            words.append(f"{line} {'yes' if right else 'no'}")
        return f"Make {target} -> {' '.join(words)}"
    numbers, target = rng.choice(pool("train", rng.choice(SIZES)))
    numbers = rng.sample(numbers, len(numbers))
    prompt = prompt_of(numbers, target)
    if kind < 0.85:  # one random try, its working hidden: right as often as chance has it
        return (
            f"{prompt} {expert(numbers, target, 1, len(numbers) - 1, rng)[0].split('</think> ')[1]}"
        )
    # Sloppy: one try, numbers drawn with replacement, and 10% of the results are replaced.
    words = expert(rng.choices(numbers, k=len(numbers)), target, 1, len(numbers) - 1, rng)[
        0
    ].split()
    for i, word in enumerate(words):
        if word == "=" and rng.random() < 0.1:
            words[i + 1] = str(rng.randint(0, LIMIT))
    return f"{prompt} {' '.join(words)}"


def _draw(name: str, pools, n: int, seed, make) -> list[dict]:
    """n different rows of make(numbers, target, rng) (None: dropped), the pools in turn.

    A pool is gone through in one shuffled order, again and again, each round with another order of a problem's numbers.
    A row depends on (seed, file, problem, round) and not on n, so a longer file begins with the shorter one."""
    columns = []
    for problems in pools:
        column, seen, wanted = [], set(), -(-n // len(pools))
        order = random.Random(f"{seed} {name} {len(problems[0][0])}").sample(
            problems, len(problems)
        )
        for turn, (numbers, target) in (
            (turn, problem) for turn in range(TURNS) for problem in order
        ):
            if len(column) == wanted:
                break
            orders = sorted(set(permutations(numbers)))
            random.Random(f"{seed} {name} {numbers} {target}").shuffle(orders)
            row = make(
                orders[turn % len(orders)],
                target,
                random.Random(f"{seed} {name} {numbers} {target} {turn}"),
            )
            if row is not None and (text := json.dumps(row)) not in seen:
                seen.add(text)
                column.append(row)
        if len(column) < wanted:
            raise UserError(
                f"{name}.jsonl: {wanted} rows of {len(order[0][0])} numbers asked for, only "
                f"{len(column)} different ones found; ask for fewer"
            )
        columns.append(column)
    return [column[i] for i in range(-(-n // len(pools))) for column in columns][:n]


def problem_rows(name: str, n: int, seed="fixed", sizes=SIZES) -> list[dict]:
    """n problems {"prompt", "answer", "numbers"} of split `name`; test_k5 shares the hash range of test."""
    split = "test" if name == "test_k5" else name
    return _draw(
        name,
        [pool(split, k) for k in sizes],
        n,
        seed,
        lambda numbers, target, rng: problem(numbers, target),
    )


def problem(numbers, target: int) -> dict:
    """A problem as a row."""
    return {"prompt": prompt_of(numbers, target), "answer": str(target), "numbers": list(numbers)}


def trajectory_rows(name: str, n: int, config: Config, difficulty: str = "uniform") -> list[dict]:
    """n trajectories {"prompt", "response", "answer", "numbers"} of the config's expert on split `name`."""
    sizes = (int(difficulty),) if difficulty in ("3", "4") else SIZES

    def make(numbers, target, rng):
        response, right = expert(numbers, target, config.hazard, config.lines, rng)
        return (
            {**problem(numbers, target), "response": response}
            if right or not config.verified
            else None
        )

    return _draw(name, [pool(name, k, difficulty) for k in sizes], n, config.seed, make)


def tokenizer_files() -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json as text: a token a word or number, spaces between; no chat template."""
    from tokenizers import (  # here: the problems need no package
        AddedToken,
        Tokenizer,
        models,
        pre_tokenizers,
    )

    vocab = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word in SPECIAL]
    )
    # Without clean_up false, transformers would decode " ," as ",".
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }


def write(folder, config: Config = Config()) -> dict[str, int]:
    """Write every file (see the top of this file) into a folder; {file: rows}.

    Each is written aside, then renamed. countdown.json goes first and comes last: a folder that has it is whole."""
    rng = random.Random(f"{config.seed} base")
    rows = {
        "base.jsonl": [{"text": base_text(rng)} for _ in range(config.base)],
        "train.jsonl": trajectory_rows("train", config.trajectories, config, config.difficulty),
        "val.jsonl": trajectory_rows("val", config.val, config),
        "rl.jsonl": problem_rows("rl", config.rl, config.seed),
        "eval.jsonl": problem_rows("eval", config.test),
        "test.jsonl": problem_rows("test", config.test),
        "test_k5.jsonl": problem_rows("test_k5", config.test, sizes=(5,)),
    }
    counts = {name: len(lines) for name, lines in rows.items()}
    texts = {
        name: "".join(json.dumps(row) + "\n" for row in lines) for name, lines in rows.items()
    } | tokenizer_files()
    texts["countdown.json"] = (
        json.dumps({"config": asdict(config), "rows": counts}, indent=2) + "\n"
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "countdown.json").unlink(missing_ok=True)
    for name, text in texts.items():
        aside = folder / f"{name}.{os.getpid()}.tmp"
        aside.write_text(text)
        os.replace(aside, folder / name)
    return counts


def search_rates(records) -> dict[int, dict[str, float]]:
    """How a model searched, by k, from the records that evaluate.py --out writes.

    right, gave_up    share of the responses that are right; that stopped searching without a "yes"
    tries             checks written a response
    success, quit     share of the tries that end in "yes"; chance to stop after a "no" (the expert's hazard)"""
    rates = {}
    for k in sorted({len(record["problem"].split()) - 4 for record in records}):
        mine = [r for r in records if len(r["problem"].split()) - 4 == k]
        checks = [
            [w for w in r["response"].split(" </think>")[0].split() if w in ("yes", "no")]
            for r in mine
        ]
        n_tries, n_no = sum(map(len, checks)), sum(c.count("no") for c in checks)
        quits = sum(
            bool(c) and c[-1] == "no" and "</think>" in r["response"] for c, r in zip(checks, mine)
        )
        rates[k] = {
            "right": sum(r["correct"] for r in mine) / len(mine),
            "gave_up": quits / len(mine),
            "tries": n_tries / len(mine),
            "success": (n_tries - n_no) / max(1, n_tries),
            "quit": quits / max(1, n_no),
        }
    return rates


def found(success: float, quit_: float, most: int = 14) -> float:
    """Chance that a search of at most `most` tries ends in "yes": each try may succeed, each failure may end it."""
    return success * sum(((1 - success) * (1 - quit_)) ** j for j in range(most))


def compare_searches(before: str, after: str) -> None:
    """Print both models' search_rates, and how much of the gain in found answers is searching on, not finding."""
    rates = []
    for path in (before, after):
        with open(path, encoding="utf-8") as file:
            rates.append(search_rates([json.loads(line) for line in file]))
    for k, a, b in ((k, rates[0][k], rates[1][k]) for k in rates[0]):
        for name, rate in ((before, a), (after, b)):
            print(
                f"k = {k}  "
                + "  ".join(f"{key} {value:.3f}" for key, value in rate.items())
                + f"  {name}"
            )
        start, patient, end = (found(x["success"], y["quit"]) for x, y in ((a, a), (a, b), (b, b)))
        share = (
            f"{100 * (patient - start) / (end - start):.0f}% of the gain is patience"
            if end > start
            else "no gain"
        )
        print(
            f"        found {start:.3f} -> {end:.3f}, {patient:.3f} with the old tries and the new patience: {share}"
        )


def main(argv=None) -> int:
    """The command line: one flag a Config field, its help the comment beside it."""
    parser = argparse.ArgumentParser(
        description="Write the built-in Countdown problems, trajectories and tokenizer."
    )
    parser.add_argument(
        "--out", default="data/countdown", help="folder to write to (default: data/countdown)"
    )
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Config), re.M))
    for field in fields(Config):
        kind = (
            {"action": "store_true"} if field.type is bool else {"type": field.type, "metavar": "X"}
        )
        parser.add_argument(
            f"--{field.name}",
            default=field.default,
            **kind,
            help=f"{comments[field.name]} (default: {field.default})",
        )
    parser.add_argument(
        "--compare", nargs=2, metavar="SAMPLES", help="two files that evaluate.py --out wrote"
    )
    given = vars(parser.parse_args(argv))
    try:
        samples, out = given.pop("compare"), given.pop("out")
        if samples:
            compare_searches(*samples)
            return 0
        counts = write(out, Config(**given))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{out}: " + ", ".join(f"{n} {name}" for name, n in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
