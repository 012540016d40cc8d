"""Talk to a model: each response as it ends, with its log-prob, its entropy and the verdict.

    python rollout.py --init runs/rl "Make 35 from 9 8 9 9 ->" "Make 9 from 7 2 5 ->"
    python rollout.py --init runs/rl --file questions.jsonl     rows, as evaluate.py reads them
    python rollout.py --init runs/rl                            asks for prompts; Ctrl-D ends

Several prompts are sampled together, so their responses arrive mixed: the shortest come first.
Log-probs and entropies are in nats, under the distribution that was sampled from.
"""

import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

import data
import evaluate
import model as model_file
import rollout
import tasks
from core import cli, ranks
from core.errors import UserError


@dataclass
class Config:
    prompts: tuple[str, ...] = ()  # what to answer; none = ask for it
    init: str = "runs/rl"  # model folder, checkpoint, run directory or hub name
    file: str = ""  # more prompts: rows as of evaluate.py --data, or .txt: one prompt per line
    answer: str = ""  # the gold answer of every prompt, or columns of its row as a JSON object
    reward: str = "math"  # judges where there is an answer: math, text, a task or FILE.py:FUNCTION
    n: int = 4  # responses per prompt
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0  # share of the probability that is sampled from
    top_k: int = 0  # draw from the likeliest so many tokens only; 0 = from all
    max_new: int = 1024  # tokens per response, at most
    seed: int = 0  # of the samples
    bf16: bool = False  # load the weights in bfloat16

    positional: ClassVar[str] = "prompts"

    def __post_init__(self):
        cli.require_positive(self, "n", "max_new", "top_p")
        cli.require_not_negative(self, "temperature", "top_k")
        cli.require_share(self, "top_p")


def rows_of(cfg: Config) -> list[dict]:
    """The rows that the command line gives; none if it asks at the terminal."""
    rows = [{"prompt": prompt} for prompt in cfg.prompts]
    if cfg.file.endswith(".txt"):
        for line in Path(cfg.file).read_text().splitlines():
            rows.append({"prompt": line})
    elif cfg.file:
        rows += data.read_rows(cfg.file)
    return rows


def turns_of(cfg: Config) -> Iterator[list[dict]]:
    """The rows of the command line, all at once; without any, each line that is typed."""
    rows = rows_of(cfg)
    if rows:
        yield rows
        return
    while True:
        try:
            line = input("prompt> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield [{"prompt": line}]


def columns_of(answer: str) -> dict:
    """The columns of a row that --answer gives."""
    if not answer.startswith("{"):
        return {"answer": answer} if answer else {}
    try:
        return json.loads(answer)
    except ValueError:
        raise UserError(f'--answer {answer}: not JSON; write {{"answer": "35"}}, or 35') from None


class Printer:
    """Prints the responses to some problems, called with each one as it ends."""

    def __init__(self, policy: evaluate.Policy, problems: list[data.Problem]):
        self.policy = policy
        self.problems = problems
        self.counts = Counter()  # responses so far, by number of the problem

    def __call__(self, request: rollout.Request, response: rollout.Response) -> None:
        number = request.prompt
        problem = self.problems[number]
        self.counts[number] += 1
        n_tokens = len(response.ids)
        logp = math.fsum(response.logp)
        about = [
            f"{n_tokens} tokens" + ("" if response.finished else ", cut by --max-new"),
            f"log-prob {logp:.2f} ({logp / n_tokens:.3f} per token)",
            f"entropy {math.fsum(response.entropy) / n_tokens:.3f} per token",
        ]
        if problem.gold:
            (record,) = self.policy.judge([(problem, response)])
            verdict = "right" if record["correct"] else "wrong"
            about.append(f"{verdict} ({record['reason']}), reward {record['reward']:g}")
        if len(self.problems) > 1 and self.counts[number] == 1:
            print(f"[{number + 1}] {problem.text}")
        place = f"[{number + 1}.{self.counts[number]}]"
        text = self.policy.tokenizer.decode(response.ids)
        print(f"{place} {problem.opened}{text}\n    {'  '.join(about)}", flush=True)


def main(cfg: Config) -> None:
    device = ranks.start()
    folder = evaluate.find(cfg.init)
    tokenizer = evaluate.open_tokenizer(folder)
    columns = columns_of(cfg.answer)
    net = model_file.load_model(folder, torch.bfloat16 if cfg.bf16 else torch.float32, device)
    policy = evaluate.Policy(net, tokenizer, tasks.load_reward(cfg.reward), cfg.max_new)
    for turn, rows in enumerate(turns_of(cfg)):
        problems = [data.problem({**row, **columns}, tokenizer) for row in rows]
        requests = [problem.prompt for problem in problems]
        seed = ranks.seed_of(cfg.seed, "talk", turn)
        sampling = policy.sampling(cfg.temperature, seed, top_p=cfg.top_p, top_k=cfg.top_k)
        n = cfg.n if cfg.temperature else 1  # greedy responses are all the same
        hooks = rollout.Hooks(on_response=Printer(policy, problems))
        rollout.generate(net, requests, n, sampling, hooks)


def start() -> None:
    """The command `python rollout.py`."""
    cli.run(main, Config)


if __name__ == "__main__":
    start()
