"""From prompts to scored responses: the sampler and the reward, in turn or at the same time.

    policy = Policy(net, tokenizer, tasks.load_reward("math"), max_new=512)
    policy.respond([Request(problem, [], 8)], policy.sampling(1.0, seed=0))

Without a pool the reward is called here when all responses are sampled. With one (--reward-workers)
its processes score a response when it ends, while others are still sampled, and each call has
--reward-timeout seconds. Scores are sorted by the number of the response, so neither the workers
nor their pace change them. Each training process scores the responses that it has sampled, then all
processes get all scores.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch

import data
import rollout
import tasks
from core import ranks
from core.errors import UserError
from core.pool import LOST, Lost, Pool
from verify import Verdict


class Request(NamedTuple):
    """Responses that are asked for to one prompt."""

    problem: data.Problem
    prefix: list[int]  # first tokens of each response
    count: int
    number: int = 0  # of the prompt in RL's endless stream of prompts


class Asked(NamedTuple):
    """A response whose score was asked for."""

    problem: data.Problem
    response: rollout.Response
    text: str
    score: Callable  # waits for (reward, verdict)

    def wait(self) -> tuple[str, float, Verdict]:
        """(text, reward, verdict). A call over --reward-timeout earns 0, as in verl, and so does
        one that ended its worker. An exception of the reward names the row."""
        try:
            return self.text, *self.score()
        except Lost as lost:
            return self.text, 0.0, Verdict(False, False, "", str(lost))
        except Exception as error:
            error.add_note(f"in --reward, for the row {self.problem.row}")
            raise

    def record(self) -> dict:
        return record_of(self.problem, self.response, self.wait())


@dataclass
class Policy:
    """A model that responds to prompts, and the reward that scores its responses."""

    net: torch.nn.Module
    tokenizer: data.Tokenizer
    reward: Callable  # reward(response, row) -> float | Verdict, see tasks/__init__.py
    max_new: int  # tokens per response, at most
    rows: int = 512  # responses in flight at once
    pool: Pool | None = None  # processes that call the reward; None = this one does
    score_s: float = 0.0  # seconds spent on judging so far; with a pool, on waiting for it
    asked: dict = field(default_factory=dict)  # number of the response -> Asked, of the last call

    def sampling(self, temperature: float, seed: int, **more) -> rollout.Sampling:
        return rollout.Sampling(
            max_new=self.max_new,
            temperature=temperature,
            eos_ids=self.tokenizer.eos_ids,
            seed=seed,
            rows=self.rows,
            **more,
        )

    def respond(self, requests: list, sampling, progress=None) -> list:
        """[(request, response, record)] of all responses to these requests, in their order.

        A request has problem, prefix (first tokens of the response) and count. A pool begins to
        score a response when it ends, while others are still sampled.
        """
        self.asked = {}

        def ask(one: rollout.Request, response: rollout.Response) -> None:
            request = requests[one.prompt]
            self.ask(one.number, request.problem, whole(request, response))

        prompts = [request.problem.prompt + request.prefix for request in requests]
        counts = [request.count for request in requests]
        hooks = rollout.Hooks(progress, on_response=ask)
        groups = rollout.generate(self.net, prompts, counts, sampling, hooks)
        scores = self.wait()
        answers = []
        for request, group in zip(requests, groups):
            for response in group:
                response = whole(request, response)
                record = record_of(request.problem, response, scores[len(answers)])
                answers.append((request, response, record))
        return answers

    def judge(self, pairs: list) -> list[dict]:
        """Records of (problem, response) pairs, as samples.jsonl keeps them."""
        self.asked = {}
        for number in range(ranks.rank(), len(pairs), ranks.world()):
            self.ask(number, *pairs[number])
        scores = self.wait()
        return [record_of(*pair, scores[number]) for number, pair in enumerate(pairs)]

    def ask(self, number: int, problem: data.Problem, response: rollout.Response) -> None:
        """Begin to score a response; without a pool, the reward is called when it is waited for."""
        text = self.tokenizer.decode(response.ids)
        call = (problem.opened + text, problem.row)
        if self.pool:
            score = self.pool.submit(*call).result
        else:
            score = partial(tasks.score, self.reward, *call)
        self.asked[number] = Asked(problem, response, text, score)

    def wait(self) -> dict[int, tuple]:
        """{number: Asked.wait()} of all that was asked for, by this process and the others."""
        began = time.monotonic()
        own = [(number, asked.wait()) for number, asked in sorted(self.asked.items())]
        scores = dict(itertools.chain(*ranks.gather(own)))
        self.score_s += time.monotonic() - began
        return scores

    def close(self) -> None:
        if self.pool:
            self.pool.close()


def whole(request: Request, response: rollout.Response) -> rollout.Response:
    """The response with the prefix that it was given."""
    logp = [0.0] * len(request.prefix) + response.logp
    return response._replace(ids=request.prefix + response.ids, logp=logp)


def open_policy(cfg, tokenizer) -> Policy:
    """The policy of a script by its flags (--reward, --max-new ...). Its net is set later."""
    pool = None
    if cfg.reward_workers:
        pool = Pool(tasks.scorer, cfg.reward, cfg.reward_workers, cfg.reward_timeout)
    return Policy(None, tokenizer, tasks.load_reward(cfg.reward), cfg.max_new, cfg.rows, pool)


def demonstration(problem: data.Problem) -> rollout.Response:
    """The problem's demonstration as a response."""
    ids = problem.expert
    return rollout.Response(ids, [0.0] * len(ids), [], True)


def record_of(problem: data.Problem, response: rollout.Response, score: tuple) -> dict:
    """One response as samples.jsonl keeps it. score: what Asked.wait() returned.

    reward: the number that the function returned; a Verdict counts 1 or 0. correct: the Verdict's
    own, or whether the number is above one half.
    """
    text, reward, verdict = score
    correct, lenient, answer, reason = verdict
    return {
        "problem": problem.text,
        "response": text,
        "gold": problem.gold,
        "answer": answer,
        "reason": reason,
        "reward": reward,
        "correct": correct,
        "lenient": lenient,
        "finished": response.finished,
        "truncated": not response.finished,
        "length": len(response.ids),
    }


def unscored(records: list[dict]) -> float:
    """% of the records whose reward did not answer: over --reward-timeout, or its worker died."""
    return 100 * sum(record["reason"] in LOST for record in records) / len(records)


def check_demonstrations(problems: list, policy: Policy, limit: int = 1000) -> str:
    """A sentence: how many of the first `limit` demonstrations the reward calls right. A wrong gold
    column shows here, before training."""
    policy.asked = {}
    shown = [problem for problem in problems if problem.expert][:limit]
    for number, problem in enumerate(shown):
        policy.ask(number, problem, demonstration(problem))
    verdicts = []
    wrong = None
    for asked in policy.asked.values():
        try:
            record = asked.record()
        except UserError:  # a row without a gold answer
            continue
        verdicts.append(record["correct"])
        if not record["correct"] and wrong is None:
            wrong = record
    if not verdicts:
        return "no demonstrations with a gold answer to score by the reward"
    share = 100 * sum(verdicts) / len(verdicts)
    text = f"{share:.0f}% of the first {len(verdicts)} demonstrations are right by the reward"
    if wrong:
        text += (
            f"; the first that is not: answer {wrong['answer']!r}, gold {wrong['gold']!r} "
            f"({wrong['reason']})"
        )
    if share < 50:
        text += ". Is the gold answer in another column, or another --reward meant?"
    return text
