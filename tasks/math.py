"""The reward for mathematics: is the answer in the response equal to the row's gold answer?"""

import data
import verify


def reward(response: str, row: dict) -> verify.Verdict:
    """The best of verify.py's verdicts against the row's gold answers (of a list any counts).

    Raises UserError for a gold answer that is not text, and for a row without one.
    """
    verdicts = []
    for gold in data.golds_of(row):
        verdicts.append(verify.verify(response, gold))  # prompt=data.prompt_text(row)
    return max(verdicts, key=lambda verdict: (verdict.correct, verdict.lenient))
