"""Reinforcement learning with a verifier: GRPO, DAPO and the methods that mix expert trajectories into the loop.

    torchrun rl.py --init runs/sft                              a run directory: its recommended checkpoint is taken
    torchrun rl.py --init runs/sft/checkpoints/step_000400 --algo luffy --data mixed.jsonl --out runs/luffy

One step, four verbs:
    collect    sample G responses to each prompt; with dynamic sampling, until enough prompts got right and wrong ones
    score      verify: reward 1 for a right answer that ends by itself (EOS), else 0
    weigh      advantage = reward - mean of its group; the weight of each token from all lengths of the update
    update     `prompts / update-prompts` optimizer steps, each over micro-batches of like length

Choices: 1) No critic, no KL, no reward model unless asked for. 2) old_logp is the trainer's forward with the weights at
the start of the round, never the sampler's number; in the round's first update it is the forward itself, so the ratio
there is 1 and no clip acts. 3) Surplus and uninformative groups are discarded: every trained row is from the current
policy. 4) Expert rows are the demonstration's ids, tokenized once; a prompt without one gets plain rollouts.
5) After each evaluation ceiling.py fits the curve so far: reached, ceiling, share of the gain.
Why is the loss near 0, or negative? It is a surrogate: with advantages of mean 0 its value says nothing. Watch reward,
signal, entropy and length instead.
Shapes: B rows, R response tokens, G responses a prompt. Log-probs in nats; pass@1 and shares in points (0..100).
"""

import math
import time
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

import ceiling
import data
import evaluate
import losses
import model as model_file
import rollout
from core import cli, optim, ranks, run
from core.errors import UserError

# Where the command line is silent: the paper's settings for comparing methods (6.1) and for RL after SFT (C.2.2)
COMPARISON = dict(prompts=128, update_prompts=64, lr=1e-6, temperature=1.0)
SETTINGS = {name: COMPARISON for name in ("grpo", "dapo_d", "luffy", "srft", "prefix_rft")}
SETTINGS["upt"] = {**COMPARISON, "lr": 5e-6}
SETTINGS["dapo"] = SETTINGS["dapo_dc"] = {**COMPARISON, "prompts": 64, "temperature": 0.7}


@dataclass
class Config:
    init: str = "runs/sft"  # model folder, checkpoint, run directory or hub name
    data: str = (
        ""  # problems: prompt, answer and, for the mixed methods, response; empty = built-in
    )
    val: str = ""  # problems for evaluation; empty = 200 (10% if under 2,000) held out of --data
    out: str = "runs/rl"  # run directory
    overwrite: bool = False  # delete an earlier run in --out
    resume: bool = False  # go on from the newest checkpoint in --out
    dry_run: bool = False  # show model, data and plan, then stop
    algo: Literal["grpo", "dapo_d", "dapo_dc", "dapo", "luffy", "srft", "upt", "prefix_rft"] = (
        "dapo"  # dapo = dapo_dc
    )
    steps: int = 500  # rounds of collect, score, weigh, update
    prompts: int | None = None  # prompts trained on a round; none = the method's
    update_prompts: int | None = None  # prompts an optimizer step; none = the method's
    group: int = 8  # rows a prompt, the expert's included (upt: besides it)
    gen_prompts: int | None = (
        None  # prompts that dynamic sampling draws at once; none = 2 x prompts
    )
    max_rounds: int = 10  # dynamic sampling trains on what there is after so many
    temperature: float | None = (
        None  # of sampling and of the trained log-probs; none = the method's
    )
    max_new: int = 8192  # tokens a response, at most
    max_prompt: int = 1024  # tokens a prompt; longer ones are dropped and counted
    rows: int = 512  # responses in flight at once
    micro_tokens: int = 16384  # tokens a micro-batch, padding included
    lr: float | None = None  # learning rate, constant after the warm-up; none = the method's
    warmup: float = 0.0  # share of the steps with a rising learning rate
    weight_decay: float = 0.01  # decoupled, as AdamW
    clip: float = 1.0  # largest gradient norm
    overlong: int = (
        0  # soft punishment over the last so many tokens before max-new (DAPO); 0 = none
    )
    seed: int = 0  # order of the prompts and every sampled token
    save_every: int = 0  # steps between checkpoints besides the evaluated ones; 0 = none
    eval_every: int = 20  # steps between evaluations; each is saved
    eval_n: int = 4  # samples a problem at an evaluation
    eval_temperature: float = 0.7  # of evaluation
    max_flops: float = (
        0.0  # stop once the run has used so much compute (the paper's count); 0 = never
    )
    until_share: float = (
        0.0  # stop once this share of the gain is surely reached (lower end of 90%); 0 = never
    )
    keep: int = 0  # checkpoints to keep; 0 = all. The newest and the best one always stay
    bf16: bool = False  # sample and compute in bfloat16; weights, gradients and optimizer stay fp32
    recompute: bool = (
        True  # keep no activations inside a block for the backward: less memory, 4/3 of the work
    )
    compile: bool = False  # torch.compile each block: a minute or two at first, then faster updates
    offload: bool = False  # several GPUs: weights and optimizer state wait in the CPU's memory
    gpus: int = 0  # of --dry-run: show the memory for so many; 0 = the processes there are
    options: dict = field(default_factory=dict)
    refused = dict.fromkeys(
        ("--top-p", "--top-k"),
        "the trainer's log-probs are those of the full distribution, so "
        "training has to sample from it; evaluate.py has this flag",
    )

    def __post_init__(self):
        for name, value in SETTINGS[self.algo].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.gen_prompts = self.gen_prompts or 2 * self.prompts
        cli.require_positive(
            self,
            "prompts",
            "update_prompts",
            "gen_prompts",
            "max_rounds",
            "temperature",
            "max_new",
            "max_prompt",
            "rows",
            "micro_tokens",
            "lr",
            "clip",
            "eval_every",
            "eval_n",
        )
        if self.steps < 0:
            raise UserError(
                f"--steps is {self.steps}; give a number of steps, or 0 to evaluate --init only"
            )
        if self.prompts % self.update_prompts:
            fits = [d for d in range(1, self.prompts + 1) if self.prompts % d == 0]
            near = sorted(fits, key=lambda d: abs(d - self.update_prompts))[:2]
            raise UserError(
                f"--prompts {self.prompts} does not divide into updates of {self.update_prompts}; "
                f"use --update-prompts {near[0]} or {near[-1]}"
            )
        if self.group < 2:
            raise UserError(f"--group {self.group}: needs at least 2 rows, or every advantage is 0")


def preset(given: dict) -> dict:
    """What the built-in task uses instead of the defaults for real models."""
    folder, algo = evaluate.built_in(given), given.get("algo", "dapo")
    if folder is None:
        return {}
    plain = losses.OBJECTIVES[algo].demo == "none"  # the others need demonstrations
    return {
        "data": f"{folder}/{'rl' if plain else 'train'}.jsonl",
        "val": f"{folder}/eval.jsonl",
        "steps": 50,
        "prompts": 64,
        "update_prompts": 32,
        "gen_prompts": 64,
        "temperature": 1.0,
        "max_new": 128,
        "max_prompt": 64,
        "micro_tokens": 4096,
        "lr": 1e-4,
        "eval_every": 5,
        "eval_n": 2,
        "recompute": False,
    }


class Row(NamedTuple):
    """One sequence of a group. response ends with EOS if finished; logp: the sampler's, 0 on expert tokens."""

    prompt: list[int]
    response: list[int]
    logp: list[float]
    correct: float  # 1 if right and finished: what dynamic sampling and gates look at
    reward: float  # correct plus penalties: what advantages are made of
    group: int  # number of the prompt in the endless stream
    is_expert: bool = False
    n_prefix: int = 0  # leading response tokens copied from the demonstration
    finished: bool = True

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.response)


# ----------------------------------------------------------------------------------------------------------- collect
def sample_round(
    cfg, objective, net, tokenizer, pool, numbers, step: int, done: float
) -> tuple[list, list, float]:
    """Groups of rollouts for these prompts (numbers in the endless stream), the records of all responses, and the
    seconds that judging them took.

    A method with a demonstration row leaves it a place; Prefix-RFT's hybrid rollout starts with some of its tokens, the
    fewer the more of the run is done (0..1).
    """
    problems = [pool[i] for i in data.plan(len(pool), cfg.seed, numbers[0], len(numbers))]
    window = losses.prefix_window(done, 1.0)
    requests, counts, prefixes, owners = [], [], [], []
    for owner, (number, problem) in enumerate(zip(numbers, problems)):
        prefix = []
        if objective.demo == "prefix" and problem.expert:
            u = torch.rand((), generator=ranks.generator(cfg.seed, "prefix", number)).item()
            prefix = problem.expert[: losses.prefix_length(u, window, len(problem.expert))]
        has_demo = bool(prefix) or objective.demo == "row" and bool(problem.expert)
        for head, count in [([], cfg.group - has_demo)] + [(prefix, 1)] * bool(prefix):
            (
                requests.append(problem.prompt + head),
                counts.append(count),
                prefixes.append(head),
                owners.append(owner),
            )
    sampled = rollout.generate(
        net,
        requests,
        counts,
        cfg.max_new,
        cfg.temperature,
        tokenizer.eos_ids,
        ranks.seed_of(cfg.seed, "rollout", step, numbers[0]),
        cfg.rows,
    )
    began, groups, records = time.monotonic(), [[] for _ in problems], []
    for owner, prefix, responses in zip(owners, prefixes, sampled):
        for r in responses:
            r = r._replace(ids=prefix + r.ids, logp=[0.0] * len(prefix) + r.logp)
            record = evaluate.judge(problems[owner], r, tokenizer)
            correct = float(record["correct"] and r.finished)
            penalty = (
                losses.overlong_penalty(len(r.ids), cfg.max_new, cfg.overlong)
                if cfg.overlong
                else 0.0
            )
            groups[owner].append(
                Row(
                    problems[owner].prompt,
                    r.ids,
                    r.logp,
                    correct,
                    correct + penalty,
                    numbers[owner],
                    n_prefix=len(prefix),
                    finished=r.finished,
                )
            )
            records.append({**record, "reward": correct + penalty})
    return groups, records, time.monotonic() - began


def expert_row(problem, tokenizer, number: int) -> Row:
    """The demonstration as a row of the group; the same verifier judges it, so its reward may be 0."""
    response = rollout.Response(problem.expert, [0.0] * len(problem.expert), [], True)
    correct = float(evaluate.judge(problem, response, tokenizer)["correct"])
    return Row(
        problem.prompt, problem.expert, response.logp, correct, correct, number, is_expert=True
    )


def collect(cfg, objective, net, tokenizer, pool, cursor: int, step: int, done: float) -> tuple:
    """(groups to train on, new prompt cursor, numbers for the log, records and lengths of all responses)."""
    records, generated, seconds, dynamic = [], [], [], objective.dynamic_sampling
    n_prompts = cfg.gen_prompts if dynamic else cfg.prompts

    def rounds():
        while True:
            first = cursor + len(generated)
            numbers = range(first, first + n_prompts)
            groups, judged, took = sample_round(
                cfg, objective, net, tokenizer, pool, numbers, step, done
            )
            generated.extend(groups), records.extend(judged), seconds.append(took)
            yield [(group, [row.correct for row in group]) for group in groups]

    if dynamic:
        groups, dropped, surplus, n_rounds, _ = losses.collect_informative(
            rounds(), cfg.prompts, cfg.max_rounds
        )
    else:
        groups, dropped, surplus, n_rounds = [group for group, _ in next(rounds())], [], [], 1
    rows = [row for group in generated for row in group]
    n = len(rows) / 100
    agree = sum(len({row.correct for row in group}) == 1 for group in generated)
    stats = {
        "reward": sum(row.correct for row in rows) / n,
        "signal": 100 * (1 - agree / len(generated)),
        "rounds": n_rounds,
        "discarded": len(dropped) + len(surplus),
        "length": sum(len(row.response) for row in rows) / len(rows),
        "truncated": sum(not row.finished for row in rows) / n,
        "unparsed": sum(record["answer"] is None for record in records) / n,
        "score_s": round(sum(seconds), 4),
    }
    if objective.demo in ("row", "gate"):
        for group in groups:
            problem = pool[data.plan(len(pool), cfg.seed, group[0].group, 1)[0]]
            if problem.expert:
                group.append(expert_row(problem, tokenizer, group[0].group))
    return groups, cursor + len(generated), stats, records, [row.length for row in rows]


# --------------------------------------------------------------------------------------------------- weigh and update
def micro_batches(cfg, rows: list[Row]):
    """(indices of the rows, ids (b, T), mask (b, T)) of each micro-batch of this process. Every process gets as many;
    one that is short of rows takes part with no index and a row that trains nothing."""
    for part in data.deal(
        [row.length for row in rows], cfg.micro_tokens, ranks.rank(), ranks.world()
    ):
        yield part, *data.collate([data.Example(rows[i].prompt, rows[i].response) for i in part])


def forward(
    cfg, net, ids, mask, width: int, device, entropy: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies (0 if not asked for) of the responses at the sampling temperature, both (b, width)."""
    logp, entropies, _ = model_file.response_logp(
        net, ids.to(device), mask, cfg.temperature, entropy
    )
    entropies = torch.zeros_like(logp) if entropies is None else entropies
    return tuple(F.pad(x, (0, width - x.shape[1])) for x in (logp, entropies))


@torch.no_grad()
def forward_rows(
    cfg, net, rows: list[Row], device, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies (B, R) of all rows under the weights as they are; R = the longest response."""
    R = max(len(row.response) for row in rows)
    values = torch.zeros(2, len(rows), R, device=device)
    for part, ids, mask in micro_batches(cfg, rows):
        values[:, part] = torch.stack(forward(cfg, net, ids, mask, R, device, entropy))[
            :, : len(part)
        ]
    return tuple(ranks.add_up(values))


def weigh(
    objective, rows: list[Row], entropy, device
) -> tuple[torch.Tensor, losses.Rows, torch.Tensor]:
    """(indices of rows that stay, what their losses need, weights (4, B)), made from all rows of one optimizer step.

    entropy (B, R): of the policy before the update; Prefix-RFT ranks all demonstration tokens of the update by it.
    """

    def column(values, dtype=torch.float32):
        return torch.tensor(list(values), dtype=dtype, device=device)

    rewards, correct = column(r.reward for r in rows), column(r.correct for r in rows)
    groups, lengths = (
        column(v, torch.long) for v in ((r.group for r in rows), (len(r.response) for r in rows))
    )
    is_expert, finished = (
        column(v, torch.bool) for v in ((r.is_expert for r in rows), (r.finished for r in rows))
    )
    R = int(lengths.max())
    mask = torch.arange(R, device=device) < lengths[:, None]  # (B, R)
    logp = column(r.logp + [0.0] * (R - len(r.logp)) for r in rows)  # (B, R) the sampler's
    is_prefix = losses.prefix_tokens(mask, column((r.n_prefix for r in rows), torch.long))
    if objective.mask_truncated:
        mask = (
            mask & finished[:, None]
        )  # first: what trains nothing takes no place in the ranking below either
    stays, how = (
        torch.ones_like(is_expert),
        dict(normalize_std=objective.normalize_std, singleton=objective.singleton),
    )
    if objective.demo == "prefix":
        keep = losses.most_uncertain(entropy, is_prefix & mask, objective.drop_ratio)
        split = objective.prefix_adv == "split"
        advantages = losses.prefix_advantages(rewards, groups, is_prefix, keep, split, **how)
    elif objective.demo == "gate":  # the expert has no say in the rollouts' baseline
        stays = losses.gate_rows(correct, groups, is_expert, objective.gate_gamma)
        advantages = losses.group_advantages(
            rewards, torch.where(is_expert, -1 - groups, groups), **how
        )
    else:
        advantages = losses.group_advantages(rewards, groups, **how)
    index = stays.nonzero()[:, 0]
    batch = losses.take(
        losses.Rows(
            mask,
            advantages,
            rollout_logp=logp,
            is_expert=is_expert,
            is_prefix=is_prefix,
            is_success=correct > 0.5,
        ),
        index,
    )
    return (
        index,
        batch,
        losses.batch_weights(objective, batch.mask.sum(1), groups[index], is_expert[index]),
    )


def without_idle(objective, index, batch: losses.Rows, weights) -> tuple:
    """weigh()'s answer without the rows that move nothing: advantage 0 (a group that agrees) and no other term in the
    loss. The weights were made with them, so the gradient is the same for less work. Where all rows are idle they
    stay: an optimizer with momentum moves on without a gradient."""
    moves = batch.advantages.reshape(len(batch.mask), -1).ne(0).any(1)
    if objective.demo != "none" or objective.entropy_coef or objective.kl_coef or not moves.any():
        return index, batch, weights
    keep = moves.nonzero()[:, 0]
    return index[keep], losses.take(batch, keep), weights[:, keep]


def plan_updates(
    cfg, objective, net, reference, groups, device
) -> tuple[list, list[int], list[int]]:
    """The round's optimizer steps as (rows, batch, weights), all made before the first; the lengths of extra forwards;
    the lengths of all rows that the method trains on."""
    plans, extra, trained, over_batch = [], [], [], objective.entropy_weights == "batch"

    def look(with_model, rows, width, entropy=False):
        extra.extend(row.length for row in rows)
        return tuple(
            F.pad(x, (0, width - x.shape[1]))
            for x in forward_rows(cfg, with_model, rows, device, entropy)
        )

    for first in range(0, len(groups), cfg.update_prompts):
        rows = [row for group in groups[first : first + cfg.update_prompts] for row in group]
        width, old, entropy = max(len(row.response) for row in rows), None, None
        if objective.demo == "prefix" or over_batch:
            old, entropy = look(net, rows, width, True)
        index, batch, weights = weigh(objective, rows, entropy, device)
        trained += [rows[i].length for i in index.tolist()]
        index, batch, weights = without_idle(objective, index, batch, weights)
        rows = [rows[i] for i in index.tolist()]
        if first > 0:
            batch = batch._replace(
                old_logp=look(net, rows, width)[0] if old is None else old[index]
            )
        if over_batch:
            batch = batch._replace(
                mean_entropy=losses.mean_entropy(entropy[index], batch.mask, "batch")
            )
        if reference is not None:
            batch = batch._replace(ref_logp=look(reference, rows, width)[0])
        plans.append((rows, batch, weights))
    return plans, extra, trained


def train_on(cfg, objective, net, rows: list[Row], batch: losses.Rows, weights, device) -> dict:
    """Forward and backward of one optimizer step; the gradient stays in the model. Returns sums over its tokens."""
    names = ("loss", "n", "entropy", "clipped", "kl", "gap")
    sums = torch.zeros(len(names), dtype=torch.float64, device=device)
    low, high = 1 - (objective.clip_low or 1), 1 + (objective.clip_high or math.inf)
    parts = list(micro_batches(cfg, rows))
    for n, (part, ids, mask) in enumerate(parts, 1):
        ranks.reduce_now(net, n == len(parts))
        logp, entropy = forward(cfg, net, ids, mask, batch.mask.shape[1], device, True)  # (b, R)
        if not part:  # only the collectives of the others
            (logp.sum() * 0).backward()
            continue
        mine = losses.take(batch, torch.tensor(part, device=device))
        loss = losses.update_loss(objective, logp, entropy, mine, weights[:, part])
        loss.backward()
        own = mine.mask & ~mine.is_expert[:, None] & ~mine.is_prefix  # sampled by the policy
        logp, entropy = logp.detach(), entropy.detach()
        log_ratio = losses.log_ratio(
            objective, logp, logp if mine.old_logp is None else mine.old_logp, own
        )
        ratio = log_ratio.exp()
        clipped, gap = (ratio > high) | (ratio < low), (logp - mine.rollout_logp).abs()
        numbers = [
            (x * own).sum().double() for x in (own, entropy, clipped, ratio - 1 - log_ratio, gap)
        ]
        sums += torch.stack([loss.detach().double(), *numbers])
    return dict(zip(names, ranks.add_up(sums).tolist()))


def update(cfg, objective, net, model, optimizers, plans, book, step, device) -> dict:
    """Take the round's optimizer steps; numbers for the log."""
    done, norms = [], []
    for rows, batch, weights in plans:
        done.append(train_on(cfg, objective, net, rows, batch, weights, device))
        lr = optim.lr_at(step, cfg.steps, cfg.lr, "constant", cfg.warmup)
        norms.append(optim.update(model, optimizers, lr, cfg.clip))
        ranks.refresh(net, model)
        book.watch(norms[-1], step + 1)
    n = max(1, sum(d["n"] for d in done))
    means = {name: sum(d[name] for d in done) / n for name in ("entropy", "clipped", "kl")}
    gap = done[0]["gap"] / max(1, done[0]["n"])  # later the weights have moved
    return {
        "loss": sum(d["loss"] for d in done) / len(done),
        "grad_norm": sum(norms) / len(norms),
        "lr": lr,
        "updates": len(done),
        **means,
        "clipped": 100 * means["clipped"],
        "gap": gap,
    }


def flops_of(config, generated: list[int], trained: list[int], experts: list[int]) -> float:
    """The paper's compute of a round (24)-(29) from real lengths, prompt included: one forward for each generated row,
    three for each trained one, and for LUFFY and SRFT one more for the expert's rows (26)."""
    count = model_file.forward_flops
    return count(config, generated) + 3 * count(config, trained) + count(config, experts)


# --------------------------------------------------------------------------------------------------------------- main
def fit_so_far(book) -> ceiling.CeilingFit:
    points = book.of_kind("eval")
    return ceiling.fit(
        [p["flops"] for p in points], [p["pass1"] for p in points], n=[p["n"] for p in points]
    )


def evaluate_now(cfg, book, step, net, tokenizer, problems, totals) -> None:
    """pass@1 on the validation problems, and the ceiling as it looks now."""
    seed = ranks.seed_of(cfg.seed, "eval")
    summary, records = evaluate.evaluate(
        net, tokenizer, problems, cfg.eval_n, cfg.eval_temperature, cfg.max_new, seed, cfg.rows
    )
    book.log(step, "eval", **totals, **summary)
    book.log_samples(step, [{**record, "kind": "eval"} for record in records[:8]])
    print(
        f"step {step:4d}  pass@1 {summary['pass1']:.1f} (se {summary['pass1_se']:.1f})  length "
        f"{summary['length']:.0f}  cut {summary['truncated']:.1f}%  {describe(fit_so_far(book))}",
        flush=True,
    )


def describe(fit: ceiling.CeilingFit) -> str:
    """The run so far against its ceiling in a few words; brackets are 90% intervals."""
    if fit.status == "too few points":
        return "ceiling: too few points yet"
    if fit.status != "ok":
        return f"{fit.status}: ceiling {fit.a_post:.1f}, the best before it"
    return f"reached {fit.reached:.1f} / ceiling {fit.text('a_post', '.1f')} / share {fit.text('share', '.0%')}"


def load_problems(cfg, objective, tokenizer) -> tuple[list, list]:
    """(problems to train on, problems to evaluate on)."""
    pool, n_long = data.problems(cfg.data, tokenizer, cfg.max_prompt, reads=("numbers",))
    if cfg.val:
        val, _ = data.problems(cfg.val, tokenizer, cfg.max_prompt, reads=("numbers",))
    else:
        n_val = min(200, max(1, len(pool) // 10))
        held_out = set(
            data.plan(len(pool), ranks.seed_of("held out"), 0, n_val)
        )  # the same problems whatever --seed is
        val = [pool[i] for i in sorted(held_out)]
        pool = [problem for i, problem in enumerate(pool) if i not in held_out] or pool
        print(f"no --val: {n_val} problems of {cfg.data} held out for evaluation")
    experts = sum(problem.expert is not None for problem in pool)
    print(
        f"{len(pool)} problems ({experts} with a demonstration; {n_long} prompts over {cfg.max_prompt} tokens "
        f"dropped), {len(val)} for evaluation",
        flush=True,
    )
    if objective.demo != "none" and not experts:
        raise UserError(
            f"{cfg.data}: --algo {cfg.algo} needs demonstrations, and no row has a response; "
            "add a column response, or use --algo dapo"
        )
    return pool, val


def main(cfg: Config) -> None:
    device = ranks.start()
    folder = evaluate.find(cfg.init, not cfg.dry_run)
    tokenizer = evaluate.open_tokenizer(folder)
    objective = replace(losses.OBJECTIVES[cfg.algo], **cfg.options)
    pool, val = load_problems(cfg, objective, tokenizer)
    differs = {k: v for k, v in vars(objective).items() if v != vars(losses.OBJECTIVES["grpo"])[k]}
    print(
        f"{cfg.algo} on {ranks.world()} x {device}: {cfg.steps} steps x {cfg.prompts} prompts x {cfg.group} "
        f"responses, {cfg.prompts // cfg.update_prompts} updates a step, temperature {cfg.temperature}, "
        f"lr {cfg.lr:g}; GRPO with {', '.join(f'{k}={v}' for k, v in differs.items()) or 'its defaults'}",
        flush=True,
    )
    longest = max(len(problem.prompt) for problem in pool) + cfg.max_new
    evaluate.show_memory(cfg, folder, device, "adamw", 2, longest, bool(objective.kl_coef))
    evaluate.show_disk(cfg, folder, cfg.steps, "adamw")
    if cfg.dry_run:
        print(f"first prompt: {tokenizer.decode(pool[0].prompt)}\nits answer: {pool[0].gold}")
        return
    model = evaluate.open_trained(folder, device, cfg)
    net = ranks.compute(model, cfg.bf16, cfg.recompute, cfg.compile)
    reference = evaluate.open_frozen(folder, device, cfg) if objective.kl_coef else None
    optimizers = optim.make_optimizers(model, "adamw", cfg.lr, (0.9, 0.999), cfg.weight_decay)
    book = run.Run(cfg, cfg.resume, cfg.overwrite, start=str(folder))
    totals, start, cursor, stop = (
        {"tokens": 0, "flops": 0.0, "flops_hw": 0.0},
        0,
        0,
        run.catch_signals(),
    )
    if book.resumed:
        state = book.load(model, optimizers)
        ranks.refresh(net, model)
        start, cursor, totals = state["step"], state["cursor"], {k: state[k] for k in totals}
        print(f"resuming {cfg.out} after step {start}, at prompt {cursor}", flush=True)
        if start > cfg.steps:
            raise UserError(
                f"{cfg.out} is at step {start} already, beyond --steps {cfg.steps}; give more"
            )
    dtype, enough = torch.bfloat16 if cfg.bf16 else torch.float32, False
    for step in range(start, cfg.steps + 1):
        last = step == cfg.steps or 0 < cfg.max_flops <= totals["flops"]
        due, stopping = step % cfg.eval_every == 0 or last, ranks.any_of(stop)
        if due or stopping or (cfg.save_every and step % cfg.save_every == 0):
            book.save(
                step,
                lambda to: evaluate.save_model(model, tokenizer, to, dtype),
                model,
                optimizers,
                **totals,
                cursor=cursor,
                seed=cfg.seed,
            )
        if due:
            if not any(row["step"] == step for row in book.of_kind("eval")):
                evaluate_now(cfg, book, step, net, tokenizer, val, totals)
                book.prune(
                    cfg.keep, {max(book.of_kind("eval"), key=lambda row: row["pass1"])["step"]}
                )
            enough = cfg.until_share and (fit_so_far(book).share_low or 0.0) >= cfg.until_share
            if enough:
                print(f"--until-share {cfg.until_share}: surely reached at step {step}")
        if last or stopping or ranks.any_of(enough):
            break
        began = time.monotonic()
        done = max(step / cfg.steps, totals["flops"] / cfg.max_flops if cfg.max_flops else 0.0)
        groups, cursor, stats, records, generated = collect(
            cfg, objective, net, tokenizer, pool, cursor, step, done
        )
        sampled = time.monotonic()
        if step == start and groups:
            show_first(groups[0][0], tokenizer)
        book.log_samples(step + 1, [{**record, "kind": "train"} for record in records[:8]])
        plans, extra, trained = plan_updates(cfg, objective, net, reference, groups, device)
        planned = time.monotonic()
        result = (
            update(cfg, objective, net, model, optimizers, plans, book, step, device)
            if plans
            else {"updates": 0}
        )
        rows = [row for rows, _, _ in plans for row in rows]
        experts = [row.length for row in rows if row.is_expert and objective.demo == "row"]
        passes = (4 if cfg.recompute else 3) * [
            row.length for row in rows
        ]  # a backward is two forwards
        hw = model_file.hardware_flops(model.config, generated + extra + passes)
        totals = {
            "tokens": totals["tokens"] + sum(generated),
            "flops_hw": totals["flops_hw"] + hw,
            "flops": totals["flops"] + flops_of(model.config, generated, trained, experts),
        }
        line = {
            **totals,
            **stats,
            **result,
            "sample_s": round(sampled - began - stats["score_s"], 4),
            "logp_s": round(planned - sampled, 4),
            "update_s": round(time.monotonic() - planned, 4),
            **run.peak_memory(device),
        }
        book.log(step + 1, "train", **line)
        print_step(cfg, step + 1, line, book)
    finish(cfg, book, stopping)


def show_first(row: Row, tokenizer) -> None:
    """The first rollout as text, the trained part between >> and <<."""
    end = "<eos>" if row.finished else " [cut]"
    print(
        f"first rollout, the trained part between >> and <<:\n  {tokenizer.decode(row.prompt)}>>"
        f"{tokenizer.decode(row.response)}{end}<<  reward {row.reward:g}\n",
        flush=True,
    )


def print_step(cfg, step: int, row: dict, book) -> None:
    by_flops = math.ceil(step * cfg.max_flops / row["flops"]) if cfg.max_flops else cfg.steps
    steps = min(cfg.steps, max(step, by_flops))  # that the run is likely to have
    head = f"step {step:4d}/{steps}  reward {row['reward']:5.1f}  signal {row['signal']:3.0f}%  "
    if not row["updates"]:
        print(
            f"{head}no prompt had both right and wrong answers in {row['rounds']} rounds: no update",
            flush=True,
        )
        return
    print(
        f"{head}rounds {row['rounds']}  length {row['length']:4.0f}  cut {row['truncated']:4.1f}%  unparsed "
        f"{row['unparsed']:4.1f}%  entropy {row['entropy']:.3f}  grad {row['grad_norm']:.2f}  "
        f"{row['sample_s']:.1f}+{row['logp_s'] + row['update_s']:.1f} s  {book.eta(step, steps)}",
        flush=True,
    )


def finish(cfg, book, stopped: bool) -> None:
    """Where the run stands and the next command to type."""
    if stopped:
        print(f"stopped and saved. Go on with: {run.again()}")
        return
    points = book.of_kind("eval")
    best = max(points, key=lambda row: row["pass1"])
    print(
        f"done: pass@1 {points[0]['pass1']:.1f} -> {points[-1]['pass1']:.1f}, best {best['pass1']:.1f} at step "
        f"{best['step']}; checkpoint {book.path(points[-1]['step'])}\nnext: python evaluate.py --init {cfg.out}"
    )


if __name__ == "__main__":
    cli.cli(main, Config, preset, losses.Objective)
