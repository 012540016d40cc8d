"""Your own reward, with partial credit for the built-in task: how near the answer comes.

    python rl.py --reward examples/closeness.py:reward --out runs/closeness

At most 0.5 for a wrong answer, so that only right ones count as right in pass@1 (above one half).
"""

from tasks import arithmetic, countdown


def reward(response: str, row: dict) -> float:
    """1 for a right answer. A wrong value made of the right numbers earns 0.5 / (1 + distance).

    row: the data row, with its columns numbers and answer.
    """
    verdict = countdown.reward(response, row)
    if verdict.reason != "wrong value":
        return float(verdict.correct)  # without the right numbers its value says nothing
    value = arithmetic.read(verdict.extracted).values[0]
    if value is None:  # divided by zero
        return 0.0
    return 0.5 / (1 + abs(float(value) - float(row["answer"])))
