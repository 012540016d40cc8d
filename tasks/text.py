"""The reward for answers that are text: is the response the gold answer, character by character?"""

from core import golds
from verify import Verdict


def reward(response: str, row: dict) -> Verdict:
    """Right where response and gold agree after trimming. Thinking before </think> is left out."""
    answer = response.rpartition("</think>")[2].strip()
    if "<think>" in answer:
        return Verdict(False, False, None, "unfinished thinking")
    right = answer in golds.golds_of(row)
    return Verdict(right, right, answer, "correct" if right else "wrong answer")
