"""The expert of Countdown, who searches and gives up too soon; and how a trained model searches.

    expert((9, 8, 9, 9), 35, hazard=0.15, lines=17, rng) -> (response, right)
    search_rates(records) -> {k: share right, tries, success per try, chance to quit}

The expert's weakness is planted: depth-first search in random order with each check written out,
but after a failed try it gives up with probability `hazard` and boxes its closest try.
"""

import json
import random
from typing import NamedTuple

LIMIT = 60  # targets are 1..LIMIT, intermediate values 0..LIMIT: a tiny model can learn the table
LARGEST = 10  # the numbers given are 1..LARGEST


def apply(value: int, op: str, number: int) -> int | None:
    """value op number, or None where the result leaves 0..LIMIT."""
    if op == "+":
        result = value + number
    elif op == "-":
        result = value - number
    else:
        result = value * number
    return result if 0 <= result <= LIMIT else None


def fact(rng: random.Random, target: int | None = None) -> tuple[str, int]:
    """A true line and its result, the target if one is given.

    The operation is drawn first, as products are fewest.
    """
    while True:
        op = rng.choice("+-*")
        n = rng.randint(1, LARGEST)
        if target is None:
            value = rng.randint(0, LIMIT // n if op == "*" else LIMIT)
        elif op == "+":
            value = target - n
        elif op == "-":
            value = target + n
        else:
            value = target // n
        result = apply(value, op, n)
        if 0 <= value <= LIMIT and result is not None and target in (None, result):
            return f"{value} {op} {n} = {result}", result


class Step(NamedTuple):
    """One step of the search: the line as written, and where it leads."""

    line: str
    value: int
    expression: str
    op: str
    rest: tuple[int, ...]  # numbers left


def _next_steps(before: Step, rng: random.Random, nearest: int | None = None) -> list[Step]:
    """Every step after `before`, shuffled, or with the value nearest to `nearest` last, which is
    tried first. Its op is "" where nothing has been chosen yet.

    Two steps to the same value with the same numbers left are one: a + b and b + a.
    """
    starts = [before]
    if not before.op:
        starts = []
        for i, n in enumerate(before.rest):
            starts.append(Step("", n, str(n), "", before.rest[:i] + before.rest[i + 1 :]))
    steps = []
    for start in starts:
        for i, n in enumerate(start.rest):
            for op in "+-*":
                result = apply(start.value, op, n)
                if result is None:
                    continue
                # The value so far is on the left: only a sum or difference under * is bracketed.
                bracketed = op == "*" and start.op in ("+", "-")
                left = f"( {start.expression} )" if bracketed else start.expression
                line = f"{start.value} {op} {n} = {result}"
                rest = start.rest[:i] + start.rest[i + 1 :]
                steps.append(Step(line, result, f"{left} {op} {n}", op, rest))
    if nearest is None:
        rng.shuffle(steps)
    else:
        steps.sort(key=lambda step: (-abs(step.value - nearest), step.line))
    different = {}
    for step in steps:
        different[step.value, tuple(sorted(step.rest))] = step
    return list(different.values())


def expert(
    numbers, target: int, hazard: float, lines: int, rng: random.Random, nearest: bool = False
) -> tuple[str, bool]:
    """Search for the target: (response, right). At most `lines` (>= len(numbers) - 1) steps.

    nearest: steps to values near the target first instead of a random order; with hazard 0 the
    response is then fixed by the problem.

    `8 + 9 = 17 , 17 + 9 = 26 , 26 - 9 = 17 no 26 + 9 = 35 yes`: a comma leads one step deeper;
    after `no` the next line starts from the deepest value with an untried step. The closest try
    (the earliest of equals) is boxed.
    """
    trace = []
    closest = None
    n_lines = 0
    order_by = target if nearest else None
    stack = _next_steps(Step("", 0, "", "", tuple(numbers)), rng, order_by)
    # The last try is whole: a step is taken where the lines suffice to use all numbers after it.
    while stack and n_lines + 1 + len(stack[-1].rest) <= lines:
        step = stack.pop()
        trace.append(step.line)
        n_lines += 1
        if step.rest:
            trace.append(",")
            stack += _next_steps(step, rng, order_by)
            continue
        trace.append("yes" if step.value == target else "no")
        if closest is None or abs(step.value - target) < abs(closest.value - target):
            closest = step
        if step.value == target or rng.random() < hazard:
            break
    response = f"<think> {' '.join(trace)} </think> \\boxed{{ {closest.expression} }}"
    return response, closest.value == target


def search_rates(records: list[dict]) -> dict[int, dict[str, float]]:
    """How a model searched, by k, from the records that evaluate.py --out writes.

    right, gave_up    share of the responses that are right; that stopped without a "yes"
    tries             checks written per response
    success, quit     share of the tries that end in "yes"; of the failed tries that were the last
    """
    groups = {}
    for record in records:
        k = len(record["problem"].split()) - 4
        groups.setdefault(k, []).append(record)
    rates = {}
    for k, group in sorted(groups.items()):
        n_tries = 0
        n_failed = 0
        n_quit = 0
        for record in group:
            words = record["response"].split(" </think>")[0].split()
            checks = [word for word in words if word in ("yes", "no")]
            n_tries += len(checks)
            n_failed += checks.count("no")
            n_quit += checks[-1:] == ["no"] and "</think>" in record["response"]
        rates[k] = {
            "right": sum(record["correct"] for record in group) / len(group),
            "gave_up": n_quit / len(group),
            "tries": n_tries / len(group),
            "success": (n_tries - n_failed) / max(1, n_tries),
            "quit": n_quit / max(1, n_failed),
        }
    return rates


def found(success: float, quit_: float, most: int = 14) -> float:
    """Chance that a search of at most `most` tries, each with these chances, ends in "yes"."""
    return success * sum(((1 - success) * (1 - quit_)) ** n for n in range(most))


def compare_searches(before: str, after: str) -> None:
    """Print both models' search_rates, and the share of the gain that is searching on."""
    rates = []
    for path in (before, after):
        with open(path, encoding="utf-8") as file:
            rates.append(search_rates([json.loads(line) for line in file]))
    for k, old in rates[0].items():
        new = rates[1][k]
        for name, rate in ((before, old), (after, new)):
            shown = "  ".join(f"{key} {number:.3f}" for key, number in rate.items())
            print(f"k = {k}  {shown}  {name}")
        start = found(old["success"], old["quit"])
        patient = found(old["success"], new["quit"])
        end = found(new["success"], new["quit"])
        told = "no gain"
        if end > start:
            told = f"{100 * (patient - start) / (end - start):.0f}% of the gain is patience"
        print(
            f"        found {start:.3f} -> {end:.3f}, "
            f"{patient:.3f} with the old tries and the new patience: {told}"
        )
