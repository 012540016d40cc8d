"""Reinforcement learning with a verifier: sample groups, score them, raise what did better.

    torchrun rl.py --init runs/sft                     a run directory: its recommended checkpoint
    torchrun rl.py --init runs/sft/checkpoints/step_000400 --algo grpo --out runs/grpo

One step, as main() below reads:
    collect       sample G responses per prompt and score them with the reward; with dynamic sampling
                  (DAPO) until enough prompts got both right and wrong answers
    make_batches  advantage = reward - mean of its group; the weight of each token in the mean
    update        one optimizer step per --update-prompts groups: ratio, clip, loss, backward
The equations are losses.py's. --algo NAME is methods/NAME.py, --algo my/idea.py anybody's file.

Choices: 1) No critic, no KL and no reward model unless asked for. 2) old_logp is the trainer's
forward at the start of the round, never the sampler's number; in the round's first update it is the
forward itself, so the ratio is 1 and no clip acts. 3) Surplus and uninformative groups are
discarded: every trained row is from the current policy. 4) After each evaluation ceiling.py fits the
curve so far. Why is the loss near 0, or negative? It is a surrogate: with advantages of mean 0 its
value says nothing. Watch reward, signal, entropy and length instead.

Shapes: B rows, T tokens, R response tokens, G responses per prompt. Log-probs in nats.
"""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import ceiling
import data
import evaluate
import losses
import methods
import model as model_file
import rollout
import tasks
from core import cli, launch, optim, ranks
from core.errors import UserError
from core.run import Run
from losses import Batch, Row


@dataclass
class Config:
    init: str = "runs/sft"  # model folder, checkpoint, run directory or hub name
    data: str = ""  # problems: prompt, answer, for some methods response; empty = built-in
    val: str = ""  # problems for evaluation; empty = 200 (at most 10%) held out of --data
    reward: str = "math"  # math, text, a task, or FILE.py:FUNCTION with reward(response, row)
    out: str = "runs/rl"  # run directory
    overwrite: bool = False  # delete an earlier run in --out
    resume: bool = False  # go on from the newest checkpoint in --out
    dry_run: bool = False  # show model, data and plan, then stop
    algo: str = "dapo"  # a file of methods/, or FILE.py
    steps: int = 500  # rounds of collecting and updating
    prompts: int | None = None  # prompts trained on per round
    update_prompts: int | None = None  # prompts per optimizer step
    group: int = 8  # responses per prompt; some methods put a demonstration in place of one
    gen_prompts: int | None = (
        None  # prompts that dynamic sampling draws at once; none = 2 x prompts
    )
    max_rounds: int = 10  # dynamic sampling trains on what there is after so many draws
    temperature: float | None = None  # of sampling and of the trained log-probs
    max_new: int = 8192  # tokens per response, at most
    max_prompt: int = 1024  # tokens per prompt; longer ones are dropped and counted
    rows: int = 512  # responses in flight at once
    micro_tokens: int = 16384  # tokens per micro-batch, padding included
    lr: float | None = None  # learning rate, constant after the warm-up
    warmup: float = 0.0  # share of the steps with a rising learning rate
    weight_decay: float = 0.01  # decoupled, as AdamW
    clip: float = 1.0  # largest gradient norm
    overlong: int = 0  # penalty over the last so many tokens before --max-new (DAPO); 0 = none
    seed: int = 0  # order of the prompts and every sampled token
    save_every: int = 0  # steps between checkpoints besides the evaluated ones; 0 = none
    eval_every: int = 20  # steps between evaluations; each is saved
    eval_n: int = 4  # samples per problem at an evaluation
    eval_temperature: float = 0.7  # of evaluation
    max_flops: float = 0.0  # stop after so much compute (the paper's count); 0 = never
    until_share: float = 0.0  # stop when this share of the gain is surely reached; 0 = never
    keep: int = 0  # checkpoints to keep; 0 = all; the newest and the best always stay
    bf16: bool = False  # sample and compute in bfloat16; weights and optimizer stay fp32
    recompute: bool = True  # keep no activations inside a block: less memory, 4/3 of the work
    compile: bool = False  # torch.compile each block: slow to start, then faster updates
    offload: bool = False  # several GPUs: weights and optimizer state wait in the CPU's memory
    gpus: int = 0  # of --dry-run: show the memory for so many; 0 = the processes there are
    options: dict = field(default_factory=dict)  # of the method, as typed

    optimizer = "adamw"
    betas = (0.9, 0.999)
    from_scratch = False
    refused = dict.fromkeys(
        ("--top-p", "--top-k"),
        "the trainer's log-probs are those of the full distribution, so training has to sample "
        "from it; evaluate.py has this flag",
    )

    def __post_init__(self):
        for name, value in methods.load(self.algo).settings.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.gen_prompts = self.gen_prompts or 2 * self.prompts
        cli.require_positive(self, "prompts", "update_prompts", "gen_prompts", "max_rounds", "lr")
        cli.require_positive(self, "temperature", "max_new", "max_prompt", "rows", "micro_tokens")
        cli.require_positive(self, "clip", "eval_every", "eval_n")
        cli.require_not_negative(self, "steps", "overlong", "save_every", "keep", "gpus")
        cli.require_not_negative(self, "weight_decay", "max_flops", "eval_temperature")
        cli.require_share(self, "warmup", "until_share")
        if self.prompts % self.update_prompts:
            fits = [d for d in range(1, self.prompts + 1) if self.prompts % d == 0]
            near = sorted(fits, key=lambda d: abs(d - self.update_prompts))[:2]
            raise UserError(
                f"--prompts {self.prompts} does not divide into updates of {self.update_prompts}; "
                f"use --update-prompts {near[0]} or {near[-1]}"
            )
        if self.group < 2:
            raise UserError(f"--group {self.group}: needs at least 2, or every advantage is 0")
        if self.eval_n > 1 and self.eval_temperature == 0:
            raise UserError(
                f"--eval-temperature 0 is greedy: {self.eval_n} samples would be the same; "
                "use --eval-n 1"
            )


def preset(given: dict) -> dict:
    """What the built-in task uses instead of the defaults for real models."""
    settings = tasks.preset("rl", given)
    demonstrations = settings.pop("demonstrations", "")
    if demonstrations and methods.load(given.get("algo", Config.algo)).demonstrations:
        settings["data"] = demonstrations
    return settings


# ---- sample and score ----------------------------------------------------------------------------
class Group(NamedTuple):
    """The responses to one prompt, with a record for samples.jsonl per response."""

    number: int  # of the prompt in the endless stream
    problem: data.Problem
    rows: list[Row]
    records: list[dict]


class Round(NamedTuple):
    """What one step trains on, and the numbers of all that it sampled."""

    groups: list[list[Row]]
    records: list[dict]
    generated: list[int]  # tokens of each sampled row
    stats: dict


def collect(cfg: Config, method, policy, pool: list, run: Run) -> Round:
    """Sample and score groups of responses until there are enough to train on."""
    dynamic = method.dynamic_sampling
    n_prompts = cfg.gen_prompts if dynamic else cfg.prompts
    began = time.monotonic()
    score_s = 0.0
    sampled = []
    chosen = []
    n_rounds = 0
    while len(chosen) < cfg.prompts and n_rounds < cfg.max_rounds:
        numbers = range(run.position, run.position + n_prompts)
        problems = [pool[i] for i in data.plan(len(pool), cfg.seed, run.position, n_prompts)]
        run.position += n_prompts
        n_rounds += 1
        drawn = sample(cfg, method, policy, problems, numbers, run)
        scoring = time.monotonic()
        for number, problem, responses in drawn:
            group = score(cfg, policy, problem, number, responses)
            sampled.append(group)
            # The reward before penalties: partial credit counts, a long right answer is right
            if not dynamic or method.carries_signal([row.correct for row in group.rows]):
                chosen.append(group)
        score_s += time.monotonic() - scoring
    discarded = len(sampled) - min(len(chosen), cfg.prompts)

    groups = []
    for group in chosen[: cfg.prompts]:
        expert = None
        if method.demonstrations == "rows" and group.problem.expert:
            expert = expert_row(policy, group)
        groups.append(method.complete(group.rows, expert))
    stats = describe_round(sampled) | {"rounds": n_rounds, "discarded": discarded}
    stats["score_s"] = round(score_s, 4)
    stats["sample_s"] = round(time.monotonic() - began - score_s, 4)
    records = [record for group in sampled for record in group.records]
    generated = [row.length for group in sampled for row in group.rows]
    return Round(groups, records, generated, stats)


def sample(cfg: Config, method, policy, problems: list, numbers: range, run: Run) -> list:
    """[(number, problem, responses)]: the responses that the method asks for to each problem."""
    done = run.done_share(cfg.max_flops)
    prompts = []
    counts = []
    owners = []  # (index of the problem, first tokens that were given)
    for i, (number, problem) in enumerate(zip(numbers, problems)):
        u = torch.rand((), generator=ranks.generator(cfg.seed, "prefix", number)).item()
        for prefix, count in method.requests(problem.expert, cfg.group, done, u):
            prompts.append(problem.prompt + prefix)
            counts.append(count)
            owners.append((i, prefix))
    sampling = rollout.Sampling(
        max_new=cfg.max_new,
        temperature=cfg.temperature,
        eos_ids=policy.tokenizer.eos_ids,
        seed=ranks.seed_of(cfg.seed, "rollout", run.step, numbers[0]),
        rows=cfg.rows,
    )
    responses = [[] for _ in problems]  # per problem, (response, tokens given) each
    for (i, prefix), group in zip(owners, rollout.generate(policy.net, prompts, counts, sampling)):
        for response in group:
            ids = prefix + response.ids
            logp = [0.0] * len(prefix) + response.logp
            responses[i].append((response._replace(ids=ids, logp=logp), len(prefix)))
    return list(zip(numbers, problems, responses))


def score(cfg: Config, policy, problem, number: int, responses: list) -> Group:
    """The responses to one prompt, judged by the reward. A cut response earns nothing."""
    rows = []
    records = []
    for response, n_prefix in responses:
        record = policy.judge(problem, response)
        correct = record["reward"]
        if not response.finished:
            correct = min(correct, 0.0)
        reward = correct
        if cfg.overlong:
            reward += losses.overlong_penalty(len(response.ids), cfg.max_new, cfg.overlong)
        rows.append(
            Row(
                prompt=problem.prompt,
                response=response.ids,
                logp=response.logp,
                correct=correct,
                reward=reward,
                group=number,
                n_prefix=n_prefix,
                finished=response.finished,
            )
        )
        records.append({**record, "reward": reward})
    return Group(number, problem, rows, records)


def expert_row(policy, group: Group) -> Row:
    """The demonstration as a row of the group; the same reward judges it, and may give it 0."""
    ids = group.problem.expert
    unsampled = [0.0] * len(ids)
    judged = policy.judge(group.problem, rollout.Response(ids, unsampled, [], True))
    value = judged["reward"]
    prompt = group.problem.prompt
    return Row(prompt, ids, unsampled, value, value, group.number, is_expert=True)


def describe_round(groups: list[Group]) -> dict:
    """Numbers of all sampled responses for the log; shares in 0..100, lengths in tokens."""
    rows = [row for group in groups for row in group.rows]
    records = [record for group in groups for record in group.records]
    n = len(rows) / 100
    agree = 0
    for group in groups:
        agree += len({row.correct for row in group.rows}) == 1
    return {
        "reward": sum(row.correct for row in rows) / n,
        "right": sum(row.correct > 0.5 for row in rows) / n,
        "signal": 100 * (1 - agree / len(groups)),
        "length": sum(len(row.response) for row in rows) / len(rows),
        "truncated": sum(not row.finished for row in rows) / n,
        "unparsed": sum(record["answer"] is None for record in records) / n,
    }


# ---- batches -------------------------------------------------------------------------------------
class Update(NamedTuple):
    """One optimizer step: rows, and their tensors in the same order."""

    rows: list[Row]
    batch: Batch
    looked: list[int]  # tokens of each row of forwards that were made for it


def make_batches(cfg: Config, method, net, reference, groups: list) -> list[Update]:
    """The round's optimizer steps, all made before the first of them changes the weights."""
    updates = []
    for first in range(0, len(groups), cfg.update_prompts):
        rows = [row for group in groups[first : first + cfg.update_prompts] for row in group]
        lengths = [row.length for row in rows]
        looked = []
        batch = losses.make_batch(rows, net.head.device, method.mask_truncated)
        old_logp = None
        if method.needs_entropy:
            old_logp, entropy = look(cfg, net, rows, entropy=True)
            batch = batch._replace(entropy=entropy)
            looked += lengths
        if first > 0 and old_logp is None:  # in the first update it is the forward itself
            old_logp, _ = look(cfg, net, rows)
            looked += lengths
        if first > 0:
            batch = batch._replace(old_logp=old_logp)
        if reference is not None:
            ref_logp, _ = look(cfg, reference, rows)
            batch = batch._replace(ref_logp=ref_logp)
            looked += lengths
        batch = losses.weigh(method, batch)
        moving = ~method.idle(batch)
        if moving.any():  # where all are idle they stay: momentum moves on without a gradient
            index = moving.nonzero()[:, 0]
            batch = losses.take(batch, index)
            rows = [rows[i] for i in index.tolist()]
        updates.append(Update(rows, batch, looked))
    return updates


def micro_batches(cfg: Config, rows: list[Row]):
    """(indices of rows, ids (b, T), mask (b, T)) of each micro-batch of this rank. Every rank gets
    as many; one that is short of rows takes part with no index and a row that trains nothing."""
    lengths = [row.length for row in rows]
    for part in data.deal(lengths, cfg.micro_tokens, ranks.rank(), ranks.world()):
        examples = [data.Example(rows[i].prompt, rows[i].response) for i in part]
        yield part, *data.collate(examples)


def forward(cfg: Config, net, ids, mask, width: int, entropy: bool = True) -> tuple:
    """Log-probs and entropies of the responses at the sampling temperature, both (b, width)."""
    ids = ids.to(net.head.device)
    logp, spread, _ = model_file.response_logp(net, ids, mask, cfg.temperature, entropy)
    spread = torch.zeros_like(logp) if spread is None else spread
    missing = width - logp.shape[1]
    return F.pad(logp, (0, missing)), F.pad(spread, (0, missing))


@torch.no_grad()
def look(cfg: Config, net, rows: list[Row], entropy: bool = False) -> tuple:
    """Log-probs and entropies (B, R) of all rows under the weights as they are."""
    R = max(len(row.response) for row in rows)
    logp = torch.zeros(len(rows), R, device=net.head.device)
    spread = torch.zeros_like(logp)
    for part, ids, mask in micro_batches(cfg, rows):
        values = forward(cfg, net, ids, mask, R, entropy)
        logp[part] = values[0][: len(part)]
        spread[part] = values[1][: len(part)]
    return ranks.add_up(logp), ranks.add_up(spread)


# ---- update --------------------------------------------------------------------------------------
SUMS = ("loss", "tokens", "entropy", "clipped", "kl", "gap")


def train_on(cfg: Config, method, net, update: Update) -> dict:
    """Forward and backward of one optimizer step; the gradient stays in the model.

    Returns sums over its sampled tokens, named SUMS.
    """
    rows, batch, _ = update
    R = batch.mask.shape[1]
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=batch.mask.device)
    parts = list(micro_batches(cfg, rows))
    for n, (part, ids, mask) in enumerate(parts, 1):
        ranks.reduce_now(net, n == len(parts))
        logp, entropy = forward(cfg, net, ids, mask, R)  # (b, R)
        if not part:  # only the collectives that the other ranks wait for
            (logp.sum() * 0).backward()
            continue
        mine = losses.take(batch, part)
        loss = losses.update_loss(method, logp, entropy, mine)
        loss.backward()
        sums += torch.stack([loss.detach().double(), *token_sums(method, logp, entropy, mine)])
    return dict(zip(SUMS, ranks.add_up(sums).tolist()))


@torch.no_grad()
def token_sums(method, logp, entropy, batch: Batch) -> list:
    """Sums over the tokens that the policy sampled: their number, entropy, clipped ratios, KL to
    the old policy (k3), distance of the trainer's log-prob from the sampler's."""
    own = batch.is_sampled
    log_ratio = losses.log_ratio(logp, batch.old_logp, own, method.surrogate == "sequence")
    ratio = log_ratio.exp()
    low, high = method.clip_range
    clipped = (ratio > high) | (ratio < low)
    gap = (logp - batch.rollout_logp).abs()
    values = (own, entropy, clipped, ratio - 1 - log_ratio, gap)
    return [(value * own).sum().double() for value in values]


def describe_updates(done: list[dict], norms: list[float]) -> dict:
    """Numbers of a round's optimizer steps for the log; None where no token was sampled."""
    if not done:
        return {"updates": 0}
    n = sum(sums["tokens"] for sums in done)

    def mean(name):
        return sum(sums[name] for sums in done) / n if n else None

    n_first = done[0]["tokens"]
    return {
        "loss": sum(sums["loss"] for sums in done) / len(done),
        "grad_norm": sum(norms) / len(norms),
        "updates": len(done),
        "entropy": mean("entropy"),
        "kl": mean("kl"),
        "clipped": 100 * mean("clipped") if n else None,
        "gap": done[0]["gap"] / n_first if n_first else None,  # later the weights have moved
    }


# ---- evaluation ----------------------------------------------------------------------------------
def fit_so_far(run: Run) -> ceiling.CeilingFit:
    points = run.of_kind("eval")
    flops = [point["flops"] for point in points]
    return ceiling.fit(flops, [p["pass1"] for p in points], n=[p["n"] for p in points])


def evaluate_now(cfg: Config, run: Run, step: int, policy, problems: list) -> None:
    """pass@1 on the validation problems, and the ceiling as it looks now."""
    sampling = rollout.Sampling(
        max_new=cfg.max_new,
        temperature=cfg.eval_temperature,
        eos_ids=policy.tokenizer.eos_ids,
        seed=ranks.seed_of(cfg.seed, "eval"),
        rows=cfg.rows,
    )
    summary, records = evaluate.evaluate(policy, problems, cfg.eval_n, sampling)
    run.log(step, "eval", **summary)
    run.log_samples(step, [{**record, "kind": "eval"} for record in records[:8]])
    fit = fit_so_far(run)
    print(
        f"step {step:4d}  pass@1 {summary['pass1']:.1f} (se {summary['pass1_se']:.1f})  "
        f"length {summary['length']:.0f}  cut {summary['truncated']:.1f}%  {describe_fit(fit)}",
        flush=True,
    )
    run.prune({max(run.of_kind("eval"), key=lambda row: row["pass1"])["step"]})


def end_if_reached(cfg: Config, run: Run, step: int) -> None:
    """--until-share: end the run where an evaluation says so, one made before a resume included."""
    if not cfg.until_share or step % cfg.eval_every:
        return
    share = fit_so_far(run).share_low or 0.0
    if ranks.any_of(share >= cfg.until_share):
        print(f"--until-share {cfg.until_share}: surely reached at step {step}")
        run.end()


def describe_fit(fit: ceiling.CeilingFit) -> str:
    """The run so far against its ceiling in a few words; brackets are 90% intervals."""
    if fit.status == "too few points":
        return "ceiling: too few points yet"
    if fit.status != "ok":
        return f"{fit.status}: ceiling {fit.a_post:.1f}, the best before it"
    ceiling_text = fit.text("a_post", ".1f")
    return f"reached {fit.reached:.1f} / ceiling {ceiling_text} / share {fit.text('share', '.0%')}"


# ---- the script ----------------------------------------------------------------------------------
def load_problems(cfg: Config, method, tokenizer) -> tuple[list, list]:
    """(problems to train on, problems to evaluate on)."""
    pool, n_long = data.problems(cfg.data, tokenizer, cfg.max_prompt)
    if cfg.val:
        val, _ = data.problems(cfg.val, tokenizer, cfg.max_prompt)
    else:
        n_val = min(200, max(1, len(pool) // 10))
        seed = ranks.seed_of("held out")  # the same problems whatever --seed is
        held_out = set(data.plan(len(pool), seed, 0, n_val))
        val = [pool[i] for i in sorted(held_out)]
        pool = [problem for i, problem in enumerate(pool) if i not in held_out] or pool
        print(f"no --val: {n_val} problems of {cfg.data} held out for evaluation")
    experts = sum(problem.expert is not None for problem in pool)
    print(
        f"{len(pool)} problems ({experts} with a demonstration; {n_long} prompts over "
        f"{cfg.max_prompt} tokens dropped), {len(val)} for evaluation",
        flush=True,
    )
    if method.demonstrations and not experts:
        raise UserError(
            f"{cfg.data}: --algo {cfg.algo} needs demonstrations, and no row has a response; "
            "add a column response, or use --algo dapo"
        )
    return pool, val


def show_plan(cfg: Config, method, pool: list, tokenizer, folder: Path, device) -> None:
    """The run in one line, and what it will take."""
    config = model_file.read_config(folder)
    plain = vars(losses.GRPO())
    differs = [
        f"{name}={value}" for name, value in vars(method).items() if plain.get(name) != value
    ]
    print(
        f"{cfg.algo} on {ranks.world()} x {device}: {cfg.steps} steps x {cfg.prompts} prompts x "
        f"{cfg.group} responses, {cfg.prompts // cfg.update_prompts} updates per step, temperature "
        f"{cfg.temperature}, lr {cfg.lr:g}; GRPO with {', '.join(differs) or 'its defaults'}",
        flush=True,
    )
    longest = max(len(problem.prompt) for problem in pool) + cfg.max_new
    plan = {"optimizer": "adamw", "slots": longest, "reference": bool(method.kl_coef)}
    launch.show_memory(cfg, config, device, plan)
    launch.show_disk(cfg, config, cfg.steps, "adamw")
    if cfg.dry_run:
        print(f"first prompt: {tokenizer.decode(pool[0].prompt)}\nits answer: {pool[0].gold}")


def open_reference(cfg: Config, folder: Path, device):
    """The frozen --init for the KL term, in the type that it computes in."""
    place, shard = launch.placement(cfg, model_file.read_config(folder), device)
    dtype = torch.bfloat16 if cfg.bf16 and not shard else torch.float32
    return model_file.load_model(folder, dtype, place, shard).requires_grad_(False)


def main(cfg: Config) -> None:
    device = ranks.start()
    method = methods.load(cfg.algo)(**cfg.options)
    folder = evaluate.find(cfg.init, not cfg.dry_run)
    tokenizer = evaluate.open_tokenizer(folder)
    pool, val = load_problems(cfg, method, tokenizer)
    show_plan(cfg, method, pool, tokenizer, folder, device)
    if cfg.dry_run:
        return
    run = Run(cfg, cfg.steps, start=str(folder))
    model, net, optimizers = evaluate.open_training(cfg, folder, tokenizer, device, run)
    reference = open_reference(cfg, folder, device) if method.kl_coef else None
    policy = evaluate.Policy(net, tokenizer, tasks.load_reward(cfg.reward))

    for step in run.steps():
        if 0 < cfg.max_flops <= run.totals["flops"]:
            run.end()
        run.checkpoint(step)
        if run.due(step, "eval"):
            evaluate_now(cfg, run, step, policy, val)
        end_if_reached(cfg, run, step)
        if run.over(step):
            break

        collected = collect(cfg, method, policy, pool, run)
        if step == run.first and collected.groups:
            show_first(collected.groups[0][0], tokenizer)
        began = time.monotonic()
        updates = make_batches(cfg, method, net, reference, collected.groups)
        planned = time.monotonic()
        done = []
        norms = []
        lr = optim.lr_at(step, cfg.steps, cfg.lr, "constant", cfg.warmup)
        for update in updates:
            done.append(train_on(cfg, method, net, update))
            norms.append(optim.update(model, optimizers, lr, cfg.clip))
            ranks.refresh(net, model)
            run.watch(norms[-1], step + 1)

        numbers = {**collected.stats, **describe_updates(done, norms), "lr": lr}
        numbers["logp_s"] = round(planned - began, 4)
        numbers["update_s"] = round(time.monotonic() - planned, 4)
        log_step(cfg, method, run, collected, updates, numbers)
    finish(cfg, run)


def log_step(cfg: Config, method, run: Run, collected: Round, updates: list, numbers: dict) -> None:
    """Compute spent, the step's line in metrics.jsonl, samples, and the printed line."""
    config = run.model.config
    rows = [row for group in collected.groups for row in group]
    trained = [row.length for row in rows]
    experts = [row.length for row in rows if row.is_expert and method.expert_forward]
    forwards = list(collected.generated)
    for update in updates:
        passes = 4 if cfg.recompute else 3  # a backward is two forwards
        forwards += update.looked + passes * [row.length for row in update.rows]
    count = model_file.forward_flops
    run.count(
        tokens=sum(collected.generated),
        # The paper's (24)-(29): a forward per generated row, three per trained one
        flops=count(config, collected.generated)
        + 3 * count(config, trained)
        + count(config, experts),
        flops_hw=model_file.hardware_flops(config, forwards),
    )
    step = run.step + 1
    run.log_samples(step, [{**record, "kind": "train"} for record in collected.records[:8]])
    run.log(step, "train", **numbers)
    print_step(cfg, run, step, numbers)


def show_first(row: Row, tokenizer) -> None:
    """The first rollout as text, the trained part between >> and <<."""
    end = "<eos>" if row.finished else " [cut]"
    print(
        "first rollout, the trained part between >> and <<:\n"
        f"  {tokenizer.decode(row.prompt)}>>{tokenizer.decode(row.response)}{end}<<  "
        f"reward {row.reward:g}\n",
        flush=True,
    )


def print_step(cfg: Config, run: Run, step: int, row: dict) -> None:
    """One line per step; a dash where a number was not measured."""
    last = cfg.steps
    if cfg.max_flops:
        last = min(last, math.ceil(step * cfg.max_flops / run.totals["flops"]))
    last = max(last, step)
    head = f"step {step:4d}/{last}  reward {row['reward']:5.1f}  signal {row['signal']:3.0f}%  "
    if not row["updates"]:
        reason = f"no prompt had both right and wrong answers in {row['rounds']} rounds"
        print(f"{head}{reason}: no update", flush=True)
        return
    entropy = "-" if row["entropy"] is None else f"{row['entropy']:.3f}"
    seconds = f"{row['sample_s']:.1f}+{row['logp_s'] + row['update_s']:.1f} s"
    print(
        f"{head}rounds {row['rounds']}  length {row['length']:4.0f}  cut {row['truncated']:4.1f}%  "
        f"unparsed {row['unparsed']:4.1f}%  entropy {entropy}  grad {row['grad_norm']:.2f}  "
        f"{seconds}  {run.eta(step, last)}",
        flush=True,
    )


def finish(cfg: Config, run: Run) -> None:
    """Where the run stands, and the next command to type."""
    if run.interrupted:
        print(f"stopped and saved. Go on with: {cli.again()}")
        return
    points = run.of_kind("eval")
    best = max(points, key=lambda row: row["pass1"])
    print(
        f"done: pass@1 {points[0]['pass1']:.1f} -> {points[-1]['pass1']:.1f}, "
        f"best {best['pass1']:.1f} at step {best['step']}; "
        f"checkpoint {run.folder(points[-1]['step'])}\n"
        f"next: python evaluate.py --init {cfg.out}"
    )


if __name__ == "__main__":
    cli.run(main, Config, preset, lambda argv: methods.load(cli.peek(argv, "algo", Config.algo)))
