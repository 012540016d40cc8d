"""Problems that one model solves and another does not, with a response of each, as Markdown.

    python evaluate.py --init runs/gsm8k runs/gsm8k-rl --data test.jsonl --out both.jsonl
    python examples/gsm8k/rollouts.py both.jsonl --count 5

For each model: how many problems are right in all samples and in at least one, and how many of its
responses hold true calculations only. Then, of the first and the last model in the file, the
problems where the number of right responses rose the most, and those where it fell the most.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's root

from core.files import read_jsonl
from verify import is_equivalent


def by_problem(records: list[dict], init: str) -> dict[str, list[dict]]:
    """{problem: its responses} of one model."""
    found = {}
    for record in records:
        if record["init"] == init:
            found.setdefault(record["problem"], []).append(record)
    return found


def n_right(responses: list[dict]) -> int:
    return sum(response["correct"] for response in responses)


def calculates(response: str) -> bool:
    """Whether each line before the answer is a calculation whose two sides are equal."""
    *lines, _ = response.strip().split("\n")
    for line in lines:
        formula, _, result = line.rpartition("=")
        if not is_equivalent(result, formula):
            return False
    return bool(lines)


def summary(init: str, problems: dict[str, list[dict]]) -> str:
    counts = [n_right(responses) / len(responses) for responses in problems.values()]
    records = [record for responses in problems.values() for record in responses]
    n_true = sum(calculates(record["response"]) for record in records)
    return (
        f"{init}: of {len(problems)} problems {counts.count(1)} right in all samples, "
        f"{len(problems) - counts.count(0)} in at least one; calculations true in "
        f"{100 * n_true / len(records):.0f}% of the responses"
    )


def one_response(responses: list[dict], correct: bool) -> str:
    """The first response with that verdict, as an indented block that ends in the verdict."""
    response = next(response for response in responses if response["correct"] == correct)
    verdict = "right" if correct else response["reason"]
    return "\n".join(f"    {line}" for line in [*response["response"].split("\n"), f"-- {verdict}"])


def show(title: str, problems: list[str], before: dict, after: dict, rose: bool) -> None:
    print(f"## {title}\n")
    for problem in problems:
        old = before[problem]
        new = after[problem]
        print(f"**{problem.strip()}** (gold {old[0]['gold']})\n")
        for name, responses, correct in (("before", old, not rose), ("after", new, rose)):
            print(f"{name}, {n_right(responses)} of {len(responses)} right:\n")
            print(f"{one_response(responses, correct)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("samples", help="what evaluate.py wrote to --out, of two models or more")
    parser.add_argument("--count", type=int, default=5, help="problems of each kind, at most")
    args = parser.parse_args()
    records = list(read_jsonl(args.samples))
    inits = dict.fromkeys(record["init"] for record in records)
    models = {init: by_problem(records, init) for init in inits}
    for init, problems in models.items():
        print(f"- {summary(init, problems)}")
    before = models[records[0]["init"]]
    after = models[records[-1]["init"]]

    def gain(problem: str) -> int:
        return n_right(after[problem]) - n_right(before[problem])

    won = sorted((p for p in before if gain(p) > 0), key=gain, reverse=True)
    lost = sorted((p for p in before if gain(p) < 0), key=gain)
    print(f"\n{len(won)} problems with more right responses after, {len(lost)} with fewer.\n")
    show("Won", won[: args.count], before, after, rose=True)
    show("Lost", lost[: args.count], before, after, rose=False)


if __name__ == "__main__":
    main()
