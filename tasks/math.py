"""The reward for mathematics: is the answer in the response equal to the row's gold answer?"""

import verify
from core import golds


def reward(response: str, row: dict) -> verify.Verdict:
    """The best of verify.py's verdicts against the row's gold answers (of a list any counts).

    Raises UserError for a gold answer that is not text, and for a row without one.
    """
    prompt = golds.prompt_text(row)  # an answer that only repeats it earns nothing
    verdicts = [verify.verify(response, gold, prompt) for gold in golds.golds_of(row)]
    return max(verdicts, key=lambda verdict: (verdict.correct, verdict.lenient))
