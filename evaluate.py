"""Evaluate a checkpoint on problems: pass@1 with its standard error, unbiased pass@k, samples.

    python evaluate.py --init runs/rl                              the built-in test problems
    python evaluate.py --init DIR --data test.jsonl --n 4 --temperature 0.7 --out eval.jsonl
    python evaluate.py --init runs/base runs/sft runs/rl@best      a table, paired differences
    torchrun --nproc_per_node=8 -- evaluate.py --init DIR --n 4    several GPUs; mind the --

Choices: 1) pass@1 = the mean over problems of the share of right answers among n samples; its
standard error is over problems. 2) pass@k is the unbiased estimate 1 - C(n-c, k) / C(n, k) for c
right of n (Chen et al. 2021). 3) The strict verdict counts; the lenient one is printed beside it.
4) A response that --max-new cut is judged like any other, as a user would read it; `truncated` says
how many there were. In training it earns nothing. 5) Ctrl-C: the responses that have ended are
judged and written to --out. They are no fair sample: short ones end first.
"""

import itertools
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import core.start  # before torch

import numpy as np
import torch

import ceiling
import data
import model as model_file
import phases
import tasks
from core import checkpoint, cli, console, estimates, hub, launch, optim, ranks
from core.errors import UserError
from core.files import read_jsonl
from core.run import Run, recorded
from tasks.scoring import Policy, Request, open_policy, unscored


@dataclass
class Config:
    init: tuple[str, ...] = ("runs/rl",)  # model folders, checkpoints, runs, hub names: compared
    data: str = ""  # problems: .jsonl, .parquet or a task's folder; empty = the built-in test
    reward: str = "math"  # math, text, a task, or FILE.py:FUNCTION
    out: str = ""  # one JSON line per sample of each model goes here; empty = nowhere
    n: int = 4  # samples per problem
    temperature: float = 0.7  # 0 = greedy
    top_p: float = 1.0  # share of the probability that is sampled from
    top_k: int = 0  # draw from the likeliest so many tokens only; 0 = from all
    max_new: int = 8192  # tokens per response, at most
    max_prompt: int = 1024  # tokens per prompt; longer ones are dropped and counted
    limit: int = 0  # evaluate the first so many problems only; 0 = all
    rows: int = 512  # responses in flight at once
    reward_workers: int = 0  # processes that call the reward while sampling goes on; 0 = none
    reward_timeout: float = 30.0  # seconds per call in such a process; over it the reward is 0
    seed: int = 0  # seed of the samples
    bf16: bool = False  # load the weights in bfloat16

    def __post_init__(self):
        cli.require_positive(self, "n", "rows", "max_new", "max_prompt", "top_p", "reward_timeout")
        cli.require_not_negative(self, "temperature", "top_k", "limit", "reward_workers")
        cli.require_share(self, "top_p")
        if self.n > 1 and self.temperature == 0:
            raise UserError(
                f"--temperature 0 is greedy: {self.n} samples would be the same; use --n 1"
            )


def preset(given: dict) -> dict:
    """Settings of the built-in test set; UserError where an --init has another tokenizer."""
    for init in given.get("init", ("",)):
        settings = tasks.preset("evaluate", {**given, "init": init})
    if settings:
        given.pop("data", None)  # the settings name the file in that folder
    return settings


# ---- which model ---------------------------------------------------------------------------------
def find(init: str, weights: bool = True) -> Path:
    """The model folder that --init means: itself, a checkpoint of a run (RUN, RUN@best, RUN@last,
    RUN@400), or the local copy of a hub model (without its weights, where only shape and tokenizer
    are needed)."""
    name, _, which = init.partition("@")
    folder = Path(init)
    if (Path(name) / "metrics.jsonl").exists():
        # rank 0 picks: the run may still be written to
        picked, why = ranks.from_first(lambda: pick_checkpoint(Path(name), which))
        folder = Path(picked)
        print(f"{init} is a run: taking {folder.name}, {why}")
    elif not folder.exists():
        if folder.parts[:1] == ("runs",):
            raise UserError(
                f"{init}: there is no such run; `python sft.py` makes runs/sft, "
                "`python rl.py --init runs/sft` makes runs/rl"
            )
        folder = hub.model_folder(init, weights)
    return folder


def find_start(cfg) -> Path:
    """The model folder that a training run begins from: what --init means or, when it goes on with
    --resume, what it meant when the run began."""
    before = recorded(cfg.out).get("start") if cfg.resume else None
    if before and not Path(before).exists():
        raise UserError(f"{cfg.out} was begun from {before}, which is gone; put it back")
    return Path(before) if before else find(cfg.init, weights=not cfg.dry_run)


def pick_checkpoint(run_dir: Path, which: str) -> tuple[str, str]:
    """(checkpoint, why) of a run. which: "" = an SFT run's recommended one (phases.py), an RL run's
    best one; or "best", "last", or a step."""
    steps = {}
    for step, folder in checkpoint.steps_in(run_dir / "checkpoints").items():
        if not checkpoint.damaged(folder):
            steps[step] = folder
    if not steps:
        raise UserError(f"{run_dir}: no whole checkpoint in it yet; let the run reach its first")
    last = max(steps)
    if which == "last":
        return str(steps[last]), "its newest checkpoint"
    if which.isdigit():
        if int(which) not in steps:
            there = ", ".join(str(step) for step in steps)
            raise UserError(f"{run_dir}@{which}: no checkpoint of that step; there are {there}")
        return str(steps[int(which)]), "as asked"
    if which not in ("", "best"):
        raise UserError(f"{run_dir}@{which}: write @best, @last or @ and a step")
    metrics = list(read_jsonl(run_dir / "metrics.jsonl", broken_tail=True))
    if any(row["kind"] == "val" for row in metrics):
        curve = phases.read_run(run_dir)
        found = phases.diagnose(curve.steps, curve.losses, curve.flops, steps)
        if found.recommended_step is not None:
            return str(steps[found.recommended_step]), found.reason
    best, why = best_step([row for row in metrics if row["kind"] == "eval"], steps)
    if best is None:
        return str(steps[last]), "its newest checkpoint"
    return str(steps[best]), why


def best_step(points: list[dict], steps) -> tuple[int | None, str]:
    """(step, why) of the best evaluated checkpoint among `steps`: the highest point of the curve
    that ceiling.py fits, which is less of a lucky draw than the highest pass@1."""
    points = [point for point in points if point["step"] in steps]
    if not points:
        return None, ""
    values = [point["pass1"] for point in points]
    flops = [point["flops"] for point in points]
    fit = ceiling.fit(flops, values, n=[point["n"] for point in points], forecast_at=flops)
    fitted = [point["mean"] for point in fit.forecast[: len(points)]]
    if None in fitted:  # too few points for a curve
        fitted = values
    best = max(range(len(points)), key=lambda i: (fitted[i], points[i]["step"]))
    where = "the best of its evaluations" if fitted is values else "the best point of its curve"
    return points[best]["step"], f"{where}, pass@1 {values[best]:.1f}"


def open_tokenizer(folder: Path) -> data.Tokenizer:
    """The folder's tokenizer, whose ids the folder's model must have."""
    tokenizer = data.Tokenizer(folder)
    size = model_file.read_config(folder).vocab_size
    if tokenizer.vocab_size > size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model {size}; "
            "they are not of one model: copy the tokenizer that the model was trained with"
        )
    return tokenizer


def open_training(cfg, folder: Path, tokenizer, device, run: Run) -> tuple:
    """(model, net, optimizers) of a training script, with the state of a resumed run in place.

    `model` holds the fp32 weights, sharded where several processes train; `net` computes with them,
    see ranks.compute. cfg: optimizer, lr, betas, weight_decay, bf16 ...; cfg.from_scratch: random
    weights, only the shape is the folder's.
    """
    config = model_file.read_config(folder)
    place, shard = launch.placement(cfg, config, device)
    if cfg.from_scratch:
        model = model_file.init_model(config, cfg.seed, place, shard)
    else:
        model = model_file.load_model(folder, torch.float32, place, shard)
    net = ranks.compute(model, cfg.bf16, cfg.recompute, cfg.compile)
    optimizers = optim.make_optimizers(model, cfg.optimizer, cfg.lr, cfg.betas, cfg.weight_decay)

    def write_model(to: Path) -> None:  # all ranks call it
        model_file.save_model(model, to, torch.bfloat16 if cfg.bf16 else torch.float32)
        if ranks.rank() == 0:
            tokenizer.save(to)

    run.attach(model, optimizers, write_model)
    ranks.refresh(net, model)
    return model, net, optimizers


def open_frozen(cfg, folder: Path, device):
    """The folder's model for forwards only, in the type that it computes in."""
    place, shard = launch.placement(cfg, model_file.read_config(folder), device)
    dtype = torch.bfloat16 if cfg.bf16 and not shard else torch.float32
    return model_file.load_model(folder, dtype, place, shard).requires_grad_(False)


# ---- evaluation ----------------------------------------------------------------------------------
def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that any of k samples is right, without bias from `right` of n (Chen 2021, eq. 1)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def summarise(records: list[dict], n: int) -> dict:
    """Numbers over the records of P problems x n samples, problem by problem. Shares in 0..100."""
    P = len(records) // n
    right = torch.tensor([r["correct"] for r in records], dtype=torch.float64).view(P, n)
    spread = right.mean(1).std().item() if P > 1 else 0.0

    def percent(name):
        return 100 * sum(r[name] for r in records) / len(records)

    summary = {
        "pass1": 100 * right.mean().item(),
        "pass1_se": 100 * spread / math.sqrt(P),
        "n": len(records),
        "problems": P,
        "reward": percent("reward"),
        "lenient": percent("lenient"),
        "length": sum(r["length"] for r in records) / len(records),
        "truncated": percent("truncated"),
        "unscored": unscored(records),
    }
    k = 2
    while k <= n:
        chances = [pass_at_k(n, int(count), k) for count in right.sum(1).tolist()]
        summary[f"pass_at_{k}"] = 100 * sum(chances) / P
        k *= 2
    return summary


def evaluate(policy, problems: list, n: int, sampling, progress=None) -> tuple[dict, list[dict]]:
    """Sample, judge, summarise: (summary, one record per response).

    policy: a Policy. sampling, progress: see rollout.py, Sampling and Hooks.
    """
    requests = [Request(problem, [], n) for problem in problems]
    records = [record for _, _, record in policy.respond(requests, sampling, progress)]
    return summarise(records, n), records


def readiness(policy, problems: list, n: int, sampling) -> dict:
    """What RL in groups of n would find at this checkpoint, as keys of an eval line.

    sampling: at RL's temperature. As in RL's reward, a cut answer is not right.
    """
    requests = [Request(problem, [], n) for problem in problems]
    answers = policy.respond(requests, sampling)
    right = [record["correct"] and record["finished"] for _, _, record in answers]
    nats = [sum(response.entropy) for _, response, _ in answers]
    tokens = [len(response.ids) for _, response, _ in answers]
    shape = (len(problems), n)
    sums = [np.reshape(values, shape).sum(1) for values in (right, nats, tokens)]  # (P,) each
    return estimates.group_line(*sums, n)


def during_rl(cfg, run: Run, step: int, policy: Policy, problems: list) -> None:
    """Evaluate on the validation problems of rl.py: log, print pass@1 and the ceiling, prune."""
    sampling = policy.sampling(cfg.eval_temperature, ranks.seed_of(cfg.seed, "eval"))
    summary, records = evaluate(policy, problems, cfg.eval_n, sampling)
    run.log(step, eval=summary)
    run.log_samples(step, [{**record, "kind": "eval"} for record in records[: 4 * cfg.eval_n]])
    fit = fit_so_far(run)
    print(
        f"step {step:4d}  pass@1 {summary['pass1']:.1f} (se {summary['pass1_se']:.1f})  "
        f"length {summary['length']:.0f}  cut {summary['truncated']:.1f}%  {ceiling.line(fit)}",
        flush=True,
    )
    run.prune({best_step(run.of_kind("eval"), run.saved())[0]})


def end_if_reached(cfg, run: Run) -> None:
    """--until-share: end the run where its evaluations say so, also those made before a resume."""
    if cfg.until_share and ranks.any_of((fit_so_far(run).share_low or 0.0) >= cfg.until_share):
        run.end(f"--until-share {cfg.until_share} is surely reached")


def fit_so_far(run: Run) -> ceiling.CeilingFit:
    points = run.of_kind("eval")
    flops = [point["flops"] for point in points]
    return ceiling.fit(flops, [p["pass1"] for p in points], n=[p["n"] for p in points])


# ---- the script ----------------------------------------------------------------------------------
def write_samples(path: str, records: list[dict]) -> None:
    """One JSON line per response, where a path was given; on rank 0 only."""
    if path and ranks.rank() == 0:
        text = "".join(json.dumps(record) + "\n" for record in records)
        if os.path.samestat(os.stat(path), os.fstat(1)):  # /dev/stdout: after what was printed
            print(text, end="", flush=True)
        else:
            Path(path).write_text(text)


def main(cfg: Config) -> None:
    device = ranks.start()
    if cfg.out and ranks.rank() == 0:  # a place that cannot be written to is found now
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
        open(cfg.out, "a").close()
    policy = open_policy(cfg, tokenizer=None)
    summaries = []
    records = []  # of all models, for --out
    for init in cfg.init:
        summary, own = measure(cfg, init, device, policy, records)
        if len(cfg.init) > 1:
            own = [{"init": init, **record} for record in own]
        summaries.append(summary)
        records += own
    policy.close()
    write_samples(cfg.out, records)
    if len(cfg.init) == 1:
        print(json.dumps(summaries[0]))
    else:
        report = compare(cfg.init, records, cfg.n)
        console.print_comparison(cfg.init, summaries, report)
        print(json.dumps({"models": summaries, "differences": report}))


def measure(cfg: Config, init: str, device, policy, before: list) -> tuple[dict, list[dict]]:
    """Load a model into the policy and evaluate it: (numbers, one record per response). before: the
    records of the models before it, which are written too after Ctrl-C."""
    folder = find(init)
    tokenizer = policy.tokenizer = open_tokenizer(folder)
    dtype = torch.bfloat16 if cfg.bf16 else torch.float32
    policy.net = None  # frees the model before
    policy.net = model_file.load_model(folder, dtype, device)
    columns = tasks.columns(cfg.reward)
    problems, n_long = data.problems(cfg.data, tokenizer, cfg.max_prompt, **columns)
    problems = problems[: cfg.limit or None]
    left_out = f"; {n_long} prompts over {cfg.max_prompt} tokens left out" if n_long else ""
    print(
        f"{folder}: {len(problems)} problems of {cfg.data} x {cfg.n} samples at temperature "
        f"{cfg.temperature}{left_out}",
        flush=True,
    )
    started = time.monotonic()
    seed = ranks.seed_of(cfg.seed, "evaluate")
    sampling = policy.sampling(cfg.temperature, seed, top_p=cfg.top_p, top_k=cfg.top_k)
    progress = console.show_progress("sampling")
    try:
        summary, records = evaluate(policy, problems, cfg.n, sampling, progress)
    except KeyboardInterrupt:
        records = [asked.record() for _, asked in sorted(policy.asked.items())]
        write_samples(cfg.out, before + records)
        kept = f"they are in {cfg.out}" if cfg.out else "--out FILE would have kept them"
        wanted = len(problems) * cfg.n
        print(f"\nstopped with {len(records)} of {wanted} responses; {kept}", file=sys.stderr)
        sys.exit(130)
    console.print_summary(summary, time.monotonic() - started)
    return {"init": str(folder), "data": cfg.data, **summary}, records


def compare(names: list[str], records: list[dict], n: int) -> list[dict]:
    """Differences in pass@1 of each two models, paired by problem: every model was given the same
    problems and the same random numbers."""
    size = len(records) // len(names)  # records of a model
    problems = [record["problem"] for record in records]
    if any(problems[i] != problems[i % size] for i in range(len(problems))):
        raise UserError(
            "the models were not given the same problems, as their tokenizers left out other "
            "prompts; raise --max-prompt"
        )
    right = np.array([record["correct"] for record in records], float)
    shares = right.reshape(len(names), -1, n).mean(2)  # (models, problems)
    found = []
    for i, j in itertools.combinations(range(len(names)), 2):
        numbers = estimates.paired_difference(shares[i], shares[j])
        found.append({"from": names[i], "to": names[j], **numbers})
    return found


if __name__ == "__main__":
    cli.run(main, Config, preset)
