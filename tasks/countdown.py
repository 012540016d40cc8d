r"""Countdown, the built-in task: problems, an expert that gives up too soon, and the reward.

    Make 35 from 9 8 9 9 ->     reach 35 with + - *, every number once: \boxed{ 8 + 9 + 9 + 9 }

1) A problem has k = 3 or 4 numbers of 1..10 (k = 5 only in test_k5.jsonl, never trained on) and a
   target of 1..60. It is solvable by "value so far, operation, next number" within 0..60. Targets
   start at 1 because k = 3 has too few problems otherwise (1,360 from 10..50, 2,146 from 1..60).
2) A hash of (sorted numbers, target) decides the split of a problem: no order of its numbers leaks
   into another split. Within a split it may return in another order; no two rows of a file agree.
3) The expert's weakness is planted: depth-first search in random order with each check written
   out, but after a failed try it gives up with probability `hazard` and boxes its closest try.
   `nearest` tries values near the target first, in a fixed order; `verified` drops wrong traces.
4) Base text teaches arithmetic, comparing and the formats, not the search.
5) A flag changes only the files it names: eval, test and test_k5 are the same for every seed, base
   and rl depend on seed and size, and a longer train.jsonl begins with the shorter one.

python -m tasks.countdown --out data/countdown --trajectories 8000 --hazard 0 --verified
    base.jsonl {"text"}; train.jsonl val.jsonl {"prompt", "answer", "numbers", "response"};
    rl.jsonl eval.jsonl test.jsonl test_k5.jsonl {"prompt", "answer", "numbers"};
    tokenizer.json tokenizer_config.json; countdown.json (the settings; rows per file)
python -m tasks.countdown --compare sft.jsonl rl.jsonl     how two models searched, from the files
    that evaluate.py --out wrote
"""

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
from fractions import Fraction
from functools import cache
from itertools import combinations_with_replacement, permutations
from pathlib import Path

from core.errors import UserError
from tasks import arithmetic
from tasks.countdown_expert import LARGEST, LIMIT, apply, compare_searches, expert, fact
from verify import Verdict, boxed

SIZES = (3, 4)  # k, half of every file each
# Percent of all problems, by hash. eval and test each need 250 different k = 3 problems of 2,146.
SPLITS = {"train": 38, "rl": 30, "val": 6, "eval": 13, "test": 13}
SPECIAL = ("<eos>", "<pad>", "<unk>")
# Numbers above LIMIT have tokens too, so that a fork can raise LIMIT.
WORDS = "Make from -> <think> </think> \\boxed{ } ( ) + - * = , no yes".split()
WORDS += [str(n) for n in range(141)]
TURNS = 200  # rounds over a split's problems before a file counts as impossible to fill

# What the scripts use for this task where the command line is silent. Files are in FOLDER.
FOLDER = Path("runs/countdown")
BASE_MODEL = {  # config.json of the tiny base model; vocab_size is the tokenizer's
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
SFT = {
    "data": "train.jsonl",
    "val": "val.jsonl",
    "problems": "eval.jsonl",
    "steps": 1000,
    "batch": 32,
    "micro_tokens": 4096,
    "max_len": 256,
    "max_new": 128,
    "optimizer": "muon",
    "lr": 2e-3,
    "schedule": "constant",
    "warmup": 0.0,
    "eval_every": 100,
    "log_every": 25,
    "recompute": False,
}
BASE = {  # the run of sft.py that makes the base model: plain text, random start
    "data": "base.jsonl",
    "val": "",
    "problems": "",
    "from_scratch": True,
    "steps": 704,
    "lr": 3e-3,
    "eval_every": 352,
    "keep": 1,
}
RL = {
    "data": "rl.jsonl",
    "val": "eval.jsonl",
    "steps": 50,
    "prompts": 64,
    "update_prompts": 32,
    "gen_prompts": 64,
    "temperature": 1.0,
    "max_new": 128,
    "max_prompt": 64,
    "micro_tokens": 4096,
    "lr": 1e-4,
    "eval_every": 5,
    "eval_n": 2,
    "recompute": False,
}
SETTINGS = {
    "base": SFT | BASE,
    "sft": SFT,
    "rl": RL,
    "evaluate": {"data": "test.jsonl", "max_new": 128},
}
DEMONSTRATIONS = "train.jsonl"  # instead of rl.jsonl for RL methods that use the expert


@dataclass(frozen=True)
class Config:
    trajectories: int = 4000  # expert trajectories in train.jsonl, all different
    difficulty: str = "uniform"  # of train.jsonl: uniform, easy, hard (by ease), 3, 4 (one k)
    hazard: float = 0.15  # probability that the expert gives up after a failed try; 0 = patient
    lines: int = 17  # most arithmetic steps that the expert writes
    nearest: bool = False  # the expert tries values near the target first, not in random order
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
        least = max(SIZES) - 1
        if self.lines < least:
            raise UserError(
                f"lines is {self.lines}; one try takes up to {least}, choose at least that many"
            )
        for name in ("trajectories", "val", "rl", "test", "base"):
            count = getattr(self, name)
            if count < 0:
                raise UserError(f"{name} is {count}; it is a number of rows, choose 0 or more")


# ----------------------------------------------------------------------------------------- reward
COLUMNS = ("numbers", "answer", "nums", "target")  # what the reward reads of a row
NEEDS_GOLD = False  # the target may be in nums and target alone, as TinyZero publishes it


def reward(response: str, row: dict) -> Verdict:
    """Right where the box behind the thinking reaches the target with each number used once.

    row: {"numbers", "answer"} or {"nums", "target"}. The box holds + - * / and may go on with
    "= target". Reasons: correct, wrong value, wrong numbers, not an expression, empty answer,
    no boxed answer, unfinished thinking. Raises UserError for a row without numbers and target.
    """
    numbers = row.get("numbers") or row.get("nums")
    target = row.get("answer") if row.get("target") is None else row["target"]
    if not numbers or not re.fullmatch(r"-?\d+(?:/\d+)?", str(target)):
        raise UserError(
            "the Countdown reward needs columns numbers and answer, or nums and target "
            f"(found: {sorted(row)})"
        )
    text = response.rpartition("</think>")[2]
    if "<think>" in text:
        return Verdict(False, False, None, "unfinished thinking")
    answer = boxed(text)
    expression = arithmetic.read(answer or "")
    if answer is None:
        reason = "no boxed answer"
    elif not answer:
        reason = "empty answer"
    elif expression is None:
        reason = "not an expression"
    elif Counter(expression.numbers) != Counter(numbers):
        reason = "wrong numbers"
    elif all(value == Fraction(str(target)) for value in expression.values):
        reason = "correct"
    else:
        reason = "wrong value"
    return Verdict(reason == "correct", reason == "correct", answer, reason)


# --------------------------------------------------------------------------------------- problems
Problem = tuple[tuple[int, ...], int]  # (sorted numbers, target)


@cache
def all_problems(k: int) -> dict[Problem, float]:
    """{problem: ease} of all solvable problems of size k; ease = share of whole tries that hit."""
    ease = {}
    for numbers, reached in _reachable(k).items():
        for target, ways in reached.items():
            if 1 <= target <= LIMIT:
                ease[numbers, target] = ways / reached.total()
    return ease


@cache
def _reachable(k: int) -> dict[tuple[int, ...], Counter]:
    """{sorted numbers: {value: ways to it}}, built from the sets that are one number smaller."""
    if k == 1:
        return {(n,): Counter({n: 1}) for n in range(1, LARGEST + 1)}
    table = {}
    for numbers in combinations_with_replacement(range(1, LARGEST + 1), k):
        table[numbers] = Counter()
        for last in set(numbers):
            i = numbers.index(last)
            before = _reachable(k - 1)[numbers[:i] + numbers[i + 1 :]]
            for value, ways in before.items():
                for op in "+-*":
                    result = apply(value, op, last)
                    if result is not None:
                        table[numbers][result] += ways
    return table


def split_of(numbers, target: int) -> str:
    """The split of a problem, whatever the order of its numbers (hash() is salted per process)."""
    key = " ".join(map(str, [*sorted(numbers), target]))
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    percent = int.from_bytes(digest, "big") % 100
    for split, share in SPLITS.items():
        if percent < share:
            return split
        percent -= share
    raise AssertionError("SPLITS must sum to 100")


@cache
def pool(split: str, k: int, difficulty: str = "uniform") -> list[Problem]:
    """Sorted problems of one split and size; easy and hard cut them at the median ease."""
    ease = {}
    for problem, share in all_problems(k).items():
        if split_of(*problem) == split:
            ease[problem] = share
    if difficulty not in ("easy", "hard"):
        return sorted(ease)
    by_ease = sorted(ease, key=lambda problem: (-ease[problem], problem))
    half = len(by_ease) // 2
    return sorted(by_ease[:half] if difficulty == "easy" else by_ease[half:])


def prompt_of(numbers, target: int) -> str:
    """The text a model sees; tokens are separated by spaces everywhere in this task."""
    return f"Make {target} from {' '.join(map(str, numbers))} ->"


# ------------------------------------------------------------------------------------------ files
def base_text(rng: random.Random) -> str:
    """One document for a base model, on problems of the training split.

    40% facts, 30% facts compared with a goal, 15% direct answers, 15% sloppy chains.
    """
    kind = rng.random()
    if kind < 0.4:
        return " , ".join(fact(rng)[0] for _ in range(12))
    if kind < 0.7:
        target = rng.randint(1, LIMIT)
        words = []
        for _ in range(10):
            line, result = fact(rng, target if rng.random() < 0.4 else None)
            noise = rng.random() < 0.1  # left for SFT and RL to unlearn
            words.append(f"{line} {'yes' if (result == target) != noise else 'no'}")
        return f"Make {target} -> {' '.join(words)}"
    numbers, target = rng.choice(pool("train", rng.choice(SIZES)))
    numbers = rng.sample(numbers, len(numbers))
    prompt = prompt_of(numbers, target)
    n_steps = len(numbers) - 1
    if kind < 0.85:  # one random try without its working: right as often as chance has it
        response, _ = expert(numbers, target, 1, n_steps, rng)
        return f"{prompt} {response.split('</think> ')[1]}"
    # Sloppy: one try, numbers drawn with replacement, and 10% of the results are replaced.
    response, _ = expert(rng.choices(numbers, k=len(numbers)), target, 1, n_steps, rng)
    words = response.split()
    for i, word in enumerate(words):
        if word == "=" and rng.random() < 0.1:
            words[i + 1] = str(rng.randint(0, LIMIT))
    return f"{prompt} {' '.join(words)}"


def _draw(name: str, problems: list[Problem], wanted: int, seed, make) -> list[dict]:
    """`wanted` different rows of make(numbers, target, rng) (None: dropped) on these problems.

    The problems are gone through in one shuffled order, again and again, each round with another
    order of a problem's numbers. A row depends on (seed, file, problem, round) and not on `wanted`.
    """
    rows = []
    seen = set()
    k = len(problems[0][0])
    order = random.Random(f"{seed} {name} {k}").sample(problems, len(problems))
    for turn in range(TURNS):
        for numbers, target in order:
            if len(rows) == wanted:
                return rows
            key = f"{seed} {name} {numbers} {target}"
            orders = sorted(set(permutations(numbers)))
            random.Random(key).shuffle(orders)
            row = make(orders[turn % len(orders)], target, random.Random(f"{key} {turn}"))
            text = json.dumps(row)
            if row is not None and text not in seen:
                seen.add(text)
                rows.append(row)
    if len(rows) < wanted:
        raise UserError(
            f"{name}.jsonl: {wanted} rows of {k} numbers asked for, only {len(rows)} different "
            "ones found; ask for fewer"
        )
    return rows


def _draw_in_turn(name: str, pools: list[list[Problem]], n: int, seed, make) -> list[dict]:
    """n rows, the pools in turn, so that a longer file begins with the shorter one."""
    each = -(-n // len(pools))
    columns = [_draw(name, problems, each, seed, make) for problems in pools]
    rows = []
    for row_of_each in zip(*columns):
        rows += row_of_each
    return rows[:n]


def problem(numbers, target: int) -> dict:
    """A problem as a row."""
    return {"prompt": prompt_of(numbers, target), "answer": str(target), "numbers": list(numbers)}


def problem_rows(name: str, n: int, seed="fixed", sizes=SIZES) -> list[dict]:
    """n problems {"prompt", "answer", "numbers"} of split `name`; test_k5 shares test's hashes."""
    split = "test" if name == "test_k5" else name
    pools = [pool(split, k) for k in sizes]
    return _draw_in_turn(name, pools, n, seed, lambda numbers, target, _: problem(numbers, target))


def trajectory_rows(name: str, n: int, config: Config, difficulty: str = "uniform") -> list[dict]:
    """n trajectories {"prompt", "answer", "numbers", "response"} of the expert on split `name`."""

    def make(numbers, target, rng):
        response, right = expert(numbers, target, config.hazard, config.lines, rng, config.nearest)
        if config.verified and not right:
            return None
        return {**problem(numbers, target), "response": response}

    sizes = (int(difficulty),) if difficulty in ("3", "4") else SIZES
    return _draw_in_turn(name, [pool(name, k, difficulty) for k in sizes], n, config.seed, make)


def tokenizer_files() -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json as text: one token per word; no chat template."""
    # Imported here: the problems need no package.
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    vocab = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    added = [AddedToken(word, special=True, normalized=False) for word in SPECIAL]
    tokenizer.add_special_tokens(added)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,  # or transformers would decode " ," as ","
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }


def write(folder, config: Config = Config()) -> dict[str, int]:
    """Write every file (see the top of this file) into a folder; {file: rows}.

    Each is written aside, then renamed. countdown.json is removed first and written last, so a
    folder that has it is whole.
    """
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
    texts = {}
    for name, lines in rows.items():
        texts[name] = "".join(json.dumps(row) + "\n" for row in lines)
    texts |= tokenizer_files()
    settings = {"config": asdict(config), "rows": counts}
    texts["countdown.json"] = json.dumps(settings, indent=2) + "\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "countdown.json").unlink(missing_ok=True)
    for name, text in texts.items():
        aside = folder / f"{name}.{os.getpid()}.tmp"
        aside.write_text(text)
        os.replace(aside, folder / name)
    return counts


def main(argv: list[str] | None = None) -> int:
    """The command line: one flag per Config field, its help the comment beside it."""
    parser = argparse.ArgumentParser(
        description="Write the built-in Countdown problems, trajectories and tokenizer."
    )
    parser.add_argument("--out", default="data/countdown", help="folder to write to")
    parser.add_argument(
        "--compare", nargs=2, metavar="SAMPLES", help="two files that evaluate.py --out wrote"
    )
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Config), re.M))
    for field in fields(Config):
        told = f"{comments[field.name]} (default: {field.default})"
        if field.type is bool:
            parser.add_argument(f"--{field.name}", action="store_true", help=told)
        else:
            parser.add_argument(
                f"--{field.name}", type=field.type, default=field.default, metavar="X", help=told
            )
    given = vars(parser.parse_args(argv))
    samples = given.pop("compare")
    out = given.pop("out")
    try:
        if samples:
            compare_searches(*samples)
            return 0
        counts = write(out, Config(**given))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{out}: " + ", ".join(f"{n} {name}" for name, n in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
