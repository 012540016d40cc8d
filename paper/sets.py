"""The problems and trajectories of a study: OUT/data as written or given, OUT/sets as trained on.

Built-in: no training file, the base model's text included, holds a problem with two different
numbers of {3, 7, 9} or a target of 25..34. Problems with one of both are the two exams out of
distribution. Base text still compares numbers with such targets, as arithmetic is no problem.

    tiny small middle wide large    nested: trajectories of the expert who gives up at random
    fixed                           a patient expert with a fixed order: the prompt fixes the answer
    chain, sort                     two tasks where one wrong token makes the answer wrong
    hard_pool                       patient, verified trajectories; with --difficulty only
Of your own: `own`, the trajectories without duplicates and evaluation prompts."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import data
from core import files
from core.errors import UserError
from paper import curate
from paper.results import EXACT
from tasks import countdown

PAIR = {3, 7, 9}  # no two different of these in one training problem
BAND = range(25, 35)  # no such target in a training problem

BASE_DOCUMENTS = 22528  # 704 steps of 32
ROWS_PER_TRAJECTORY = 2.2  # written for each one wanted: 70% are of the training kind, some repeat


def kind_of(numbers, target: int) -> str:
    """seen (may be trained on), pair or band (out of distribution), or both."""
    pair = len(PAIR & set(numbers)) > 1
    band = target in BAND
    if pair and band:
        return "both"
    return "pair" if pair else "band" if band else "seen"


def is_seen(row: dict) -> bool:
    return kind_of(row["numbers"], int(row["answer"])) == "seen"


def base_is_seen(row: dict) -> bool:
    """Whether a document of the base model's text holds no unseen problem."""
    head, arrow, _ = row["text"].partition(" ->")
    words = head.split()
    if not arrow or "from" not in words:
        return True
    return kind_of([int(word) for word in words[3:]], int(words[1])) == "seen"


def held_out(splits, kind: str, n: int) -> list[dict]:
    """n different problems of one kind, half of them of three numbers where there are so many."""
    pools = []
    for k in countdown.SIZES:
        problems = [p for split in splits for p in countdown.pool(split, k) if kind_of(*p) == kind]
        pools.append(random.Random(f"{kind} {k} {n}").sample(problems, len(problems)))
    three = pools[0][: n // 2]
    rng = random.Random(f"{kind} {n}")
    rows = []
    for numbers, target in three + pools[1][: n - len(three)]:
        rows.append(countdown.problem(rng.sample(numbers, len(numbers)), target))
    return rows


# ----------------------------------------------------------------- answers that must be exact
def chain(rng: random.Random) -> dict:
    """Five numbers, worked from left to right: the working and its result are fixed."""
    value = rng.randint(1, 10)
    words = [str(value)]
    lines = []
    for _ in range(4):
        op = rng.choice("+-*")
        number = rng.randint(1, 10)
        result = countdown.apply(value, op, number)
        if result is None:
            op = "-" if value >= number else "+"
            result = countdown.apply(value, op, number)
        if result is None:
            return chain(rng)
        lines.append(f"{value} {op} {number} = {result}")
        words += [op, str(number)]
        value = result
    response = f"<think> {' , '.join(lines)} </think> {value}"
    return {"prompt": f"Make {' '.join(words)} ->", "response": response, "answer": str(value)}


def sort(rng: random.Random) -> dict:
    """Three numbers in order."""
    numbers = [rng.randint(0, 30) for _ in range(3)]
    answer = " ".join(map(str, sorted(numbers)))
    prompt = f"Make from {' '.join(map(str, numbers))} ->"
    return {"prompt": prompt, "response": answer, "answer": answer}


def write_exact(out: Path, name: str, make: Callable, sizes: dict) -> None:
    """NAME.jsonl to train on, NAME-val, -problems, -dev and -exam: different prompts."""
    rng = random.Random(name)
    rows = {}
    while len(rows) < sum(sizes.values()):
        row = make(rng)
        rows[row["prompt"]] = row
    left = list(rows.values())
    for part, n in sizes.items():
        file = f"{name}-{part}" if part else name
        curate.write_rows(out / "sets" / f"{file}.jsonl", left[:n])
        left = left[n:]


# ---------------------------------------------------------------------------------------- writing
def write(out: Path, cfg, size) -> None:
    """OUT/sets, once: the built-in study's, of a plan.Size, or of the user's own files."""
    if (out / "sets" / "counts.json").exists():
        return
    (out / "sets").mkdir(parents=True, exist_ok=True)
    about = write_own(out, cfg) if cfg.init else write_built_in(out, cfg, size)
    files.write_json(out / "sets" / "counts.json", about)


def write_own(out: Path, cfg) -> dict:
    names = ("data", "val", "problems", "dev", "test", "ood")
    rows = {}
    for name in names:
        path = getattr(cfg, name)
        rows[name] = data.read_rows(path) if path else []
    against = []
    for name in ("val", "dev", "test", "ood"):
        against += [data.prompt_text(row) or "" for row in rows[name]]
    counts = {}
    for name, file in (("data", "own"), ("problems", "problems")):
        kept, counts[name] = curate.clean(rows[name], against, near=cfg.near)
        curate.write_rows(out / "sets" / f"{file}.jsonl", kept)
    curate.write_rows(out / "sets" / "dev.jsonl", rows["dev"])
    curate.write_rows(out / "sets" / "exam.jsonl", rows["test"] + rows["ood"])
    parts = {"test": len(rows["test"]), "ood": len(rows["ood"])}
    return {"curated": counts, "exam": parts}


def write_built_in(out: Path, cfg, size) -> dict:
    folder = out / "data"
    largest = max(size.rows.values())
    wanted = countdown.Config(trajectories=int(largest * ROWS_PER_TRAJECTORY), base=30000)
    countdown.write(folder, wanted)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    shape = {**countdown.BASE_MODEL, "vocab_size": len(vocabulary)}
    files.write_json(folder / "config.json", shape)

    def read(name):
        return data.read_rows(folder / f"{name}.jsonl")

    def keep(name, rows):
        curate.write_rows(out / "sets" / f"{name}.jsonl", rows)

    keep("base", [row for row in read("base") if base_is_seen(row)][:BASE_DOCUMENTS])
    keep("val", [row for row in read("val") if is_seen(row)][: size.val])
    keep("problems", [row for row in read("rl") if is_seen(row)])
    keep("dev", held_out(["eval"], "seen", size.dev))
    n_test, n_unseen = size.exam
    everywhere = list(countdown.SPLITS)
    parts = {
        "test": held_out(["test"], "seen", n_test),
        "pair": held_out(everywhere, "pair", n_unseen),
        "band": held_out(everywhere, "band", n_unseen),
    }
    keep("exam", [row for rows in parts.values() for row in rows])
    pool, counts = curate.clean([row for row in read("train") if is_seen(row)], [], near=0)
    random.Random(0).shuffle(pool)  # the same mixture of three and four numbers at every scale
    if largest > len(pool):
        raise UserError(f"only {len(pool)} different trajectories for {largest}")
    for name, n in size.rows.items():
        keep(name, pool[:n])
    fixed = countdown.Config(hazard=0, nearest=True, verified=True)
    for name, split, n in (("fixed", "train", size.fixed), ("fixed-val", "val", size.fixed_val)):
        rows = countdown.trajectory_rows(split, 2 * n, fixed)
        kept, _ = curate.clean([row for row in rows if is_seen(row)], [], near=0)
        keep(name, kept[:n])
    for name, make in (("chain", chain), ("sort", sort)):
        write_exact(out, name, make, size.exact)
    if cfg.difficulty:
        patient = countdown.Config(hazard=0, verified=True)
        rows = countdown.trajectory_rows("train", 4 * size.rows["middle"], patient)
        keep("hard_pool", curate.clean([row for row in rows if is_seen(row)], [], near=0)[0])
    exact = {name: {"test": size.exact["exam"]} for name in EXACT}
    return {"curated": {"data": counts}, "exam": {n: len(r) for n, r in parts.items()}, **exact}
