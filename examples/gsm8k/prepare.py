"""GSM8K's problems that take one or two calculations, as files for sft.py, rl.py and evaluate.py.

    python examples/gsm8k/prepare.py --out examples/gsm8k/data
    python examples/gsm8k/prepare.py --train gsm8k_train.jsonl --test gsm8k_test.jsonl --out DIR

GSM8K writes each calculation of a solution as <<3*20=60>> and ends with "#### 60". A trajectory
here is those calculations and the answer in a box, which is what the verifier reads. That is a
third of the solution's tokens, so a laptop samples three times as many rollouts per hour.

    problems.jsonl   2,379 training problems, of which RL reads only question and answer
    sft.jsonl        those of them whose last result is the answer (90%), as trajectories for SFT
    dev.jsonl        200 other problems of the training split, for every choice made on the way
    test.jsonl       422 problems of the test split, for the last table only
"""

import argparse
import json
import math
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's root

from core.files import write_aside
from core.rows import read_rows

DEV = 200


def problems(source: str) -> list[dict]:
    """Rows {"prompt", "answer", "response"} of a file, or of a split named OWNER/NAME:CONFIG/SPLIT;
    shuffled."""
    found = []
    for number, row in enumerate(read_rows(source), 1):
        working, mark, answer = row["answer"].rpartition("####")
        if not mark:
            sys.exit(
                f"{source}, row {number}: `answer` has no '#### 60' at its end, as GSM8K's has"
            )
        steps = re.findall(r"<<(.*?)>>", working)
        if len(steps) not in (1, 2):
            continue
        answer = answer.strip().replace(",", "")
        response = "\n".join([*steps, f"\\boxed{{{answer}}}"])
        found.append({"prompt": row["question"], "answer": answer, "response": response})
    random.Random(0).shuffle(found)
    return found


def ends_in_answer(row: dict) -> bool:
    """Whether the last calculation's result is the answer."""
    *_, last, _ = row["response"].split("\n")
    result = last.rpartition("=")[2]
    return math.isclose(float(result), float(row["answer"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", default="openai/gsm8k:main/train")
    parser.add_argument("--test", default="openai/gsm8k:main/test")
    parser.add_argument("--out", default="examples/gsm8k/data")
    args = parser.parse_args()
    train = problems(args.train)
    files = {
        "sft": list(filter(ends_in_answer, train[DEV:])),
        "problems": train[DEV:],
        "dev": train[:DEV],
        "test": problems(args.test),
    }
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        path = Path(args.out) / f"{name}.jsonl"
        write_aside(path, "".join(json.dumps(row) + "\n" for row in rows))
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
