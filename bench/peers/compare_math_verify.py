"""verify.py beside Math-Verify on the same labelled cases, in one process: verdicts and CPU time.

    python -m venv venv-mv && venv-mv/bin/pip install math-verify     (it pins sympy and antlr4)
    venv-mv/bin/python bench/peers/compare_math_verify.py cases.jsonl [--every 4]

Rows: {"gold", "response", "expected": true or false}. Math-Verify gets \\boxed{gold} and the text
after </think>, which is what verify.py looks at, so it is not charged for answers inside <think>.
They take turns by blocks of 250 rows: a trainer runs one verifier, not one that starts with the
caches full of the other's work. Time is process CPU time of one whole call (extraction, reading,
comparing), each row once; verify.py keeps its cache of gold answers, as it does in training, and
computes its lenient verdict too. Without math-verify: says so and exits 0.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core.errors import UserError  # noqa: E402  after the project's folder is on the path
from core.files import read_jsonl  # noqa: E402
from verify import verify  # noqa: E402

BLOCK = 250  # rows
COLUMNS = (
    "right | wrongly accepted | of negatives | missed | median | mean | p99 | p99.9 | max CPU ms"
)


class Result(NamedTuple):
    expected: bool
    verdict: bool
    ms: float  # of CPU


def ours(response: str, gold: str) -> bool:
    return verify(response, gold).correct


def theirs(response: str, gold: str) -> bool:
    from math_verify import parse
    from math_verify import verify as math_verify

    answer = response.rpartition("</think>")[2]
    return bool(math_verify(parse(f"\\boxed{{{gold}}}"), parse(answer)))


def measure(rows: list[dict]) -> dict[str, list[Result]]:
    """Rows -> name -> what was found for every row."""
    judges = {"verify.py": ours, "Math-Verify": theirs}
    found: dict[str, list[Result]] = {name: [] for name in judges}
    for judge in judges.values():  # imports and first-call tables are nobody's p99
        judge("so \\boxed{\\frac{1}{2}}", "0.5")
    for first in range(0, len(rows), BLOCK):
        for name, judge in judges.items():
            gc.collect()  # each pays for its own garbage
            for row in rows[first : first + BLOCK]:
                start = time.process_time_ns()
                verdict = judge(row["response"], row["gold"])
                ms = (time.process_time_ns() - start) / 1e6
                found[name].append(Result(row["expected"], verdict, ms))
        print(f"  {min(first + BLOCK, len(rows)):,} of {len(rows):,} rows", file=sys.stderr)
    return found


def report(found: dict[str, list[Result]]) -> str:
    """A table in Markdown, a line per verifier."""
    lines = [f"| | {COLUMNS} |", "| --- " * 10 + "|"]
    medians = []
    for name, results in found.items():
        n = len(results)
        accepted = sum(result.verdict and not result.expected for result in results)
        missed = sum(result.expected and not result.verdict for result in results)
        negatives = sum(not result.expected for result in results)
        times = sorted(result.ms for result in results)
        medians.append(times[n // 2])
        spread = [times[n // 2], sum(times) / n, times[int(n * 0.99)], times[int(n * 0.999)]]
        spread.append(times[-1])
        share = accepted / max(negatives, 1)
        verdicts = f"{1 - (accepted + missed) / n:.2%} | {accepted} | {share:.2%} | {missed}"
        lines.append(f"| {name} | {verdicts} | " + " | ".join(f"{ms:.3g}" for ms in spread) + " |")
    lines.append(f"{n:,} rows; Math-Verify's median is {medians[1] / medians[0]:.0f} times ours")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="verify.py beside Math-Verify")
    parser.add_argument("cases", help='JSONL rows {"gold", "response", "expected"}')
    parser.add_argument("--every", type=int, default=1, help="take every n-th row")
    args = parser.parse_args(argv)
    try:
        import math_verify  # noqa: F401
    except ImportError:
        print("math-verify is not installed here: nothing to compare (see the top of this file)")
        return 0
    try:
        rows = list(read_jsonl(Path(args.cases)))[:: args.every]
    except (OSError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(measure(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
