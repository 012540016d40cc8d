"""Reinforcement learning with a verifier: sample groups, score them, raise what did better.

    torchrun rl.py --init runs/sft                     a run directory: its recommended checkpoint
    torchrun rl.py --init runs/sft/checkpoints/step_000400 --algo grpo --out runs/grpo

One step, as main() below reads:
    collect       sample G responses per prompt and score them with the reward; with dynamic
                  sampling (DAPO) until enough prompts got both right and wrong answers
    make_batches  advantage = reward - mean of its group; the weight of each token in the mean
    update        one optimizer step per --update-prompts groups: ratio, clip, loss, backward
The equations are in losses.py. --algo NAME is methods/NAME.py, --algo my/idea.py your own file.

Such a step is also called a round. Choices: 1) No critic, no reward model, and no KL unless asked
for. 2) old_logp is computed by the trainer at the start of the round, never taken from the sampler.
The first update of a round uses its own log-probs as old_logp: the ratio is 1 and no clip acts.
3) Surplus and uninformative groups are discarded: every trained row is from the current policy.
4) After each evaluation ceiling.py fits the curve so far. Why is the loss near 0, or negative? It
is a surrogate: its value says nothing. Watch reward, signal, entropy and length instead.

Shapes: B rows, T tokens, R response tokens, G responses per prompt. Log-probs in nats.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import core.start  # before torch

import torch
import torch.nn.functional as F

import data
import evaluate
import losses
import methods
import model as model_file
import tasks
from core import cli, console, flops, launch, optim, page, ranks, shared
from core.errors import UserError
from core.run import Run, whole_groups
from core.wide import wide
from losses import Batch, Row
from tasks import scoring


@dataclass
class Config:
    init: str = "runs/sft"  # model folder, checkpoint, run directory or hub name
    data: str = ""  # problems: columns prompt, answer (some methods: response); empty = built-in
    val: str = ""  # problems for evaluation; empty = 200 (at most 10%) held out of --data
    reward: str = "math"  # math, text, a task, or FILE.py:FUNCTION with reward(response, row)
    reward_workers: int = 0  # processes that call the reward while sampling goes on; 0 = none
    reward_timeout: float = 30.0  # seconds per call in such a process; over it the reward is 0
    out: str = "runs/rl"  # run directory
    overwrite: bool = False  # delete an earlier run in --out
    resume: bool = False  # go on from the newest checkpoint in --out
    dry_run: bool = False  # show model, data and plan, then stop
    algo: str = "dapo"  # a file of methods/, or FILE.py
    steps: int = 500  # rounds: collect, then update
    prompts: int | None = None  # prompts trained on per round
    update_prompts: int | None = None  # prompts per optimizer step
    group: int = 8  # responses per prompt; some methods put a demonstration in place of one
    gen_prompts: int | None = None  # prompts per draw of dynamic sampling; none = 2 x prompts
    max_rounds: int = 10  # draws of dynamic sampling, at most; then train on the groups found
    temperature: float | None = None  # of sampling and of the trained log-probs
    max_new: int = 8192  # tokens per response, at most
    max_prompt: int = 1024  # tokens per prompt; longer ones are dropped and counted
    rows: int = 512  # responses in flight at once
    micro_tokens: int = 16384  # tokens per micro-batch, padding included
    lr: float | None = None  # learning rate, constant after the warm-up
    warmup: float = 0.0  # share of the steps with a rising learning rate
    weight_decay: float = 0.01  # decoupled, as AdamW
    clip: float = 1.0  # largest gradient norm
    overlong: int = 0  # DAPO's penalty begins this many tokens before --max-new; 0 = none
    seed: int = 0  # order of the prompts and every sampled token
    save_every: int = 0  # steps between extra checkpoints (evaluated steps are saved too); 0 = none
    eval_every: int = 20  # steps between evaluations; each is saved
    eval_n: int = 4  # samples per problem at an evaluation
    eval_temperature: float = 0.7  # of evaluation
    max_flops: float = 0.0  # stop after so much compute (the paper's count); 0 = never
    until_share: float = 0.0  # stop when 95% sure that this share of the gain is reached; 0 = never
    log_to: Literal["", "tensorboard", "wandb"] = ""  # send metrics there too
    keep: int = 0  # checkpoints to keep; 0 = all; the newest and the best always stay
    bf16: bool = False  # sample and compute in bfloat16; weights and optimizer stay fp32
    recompute: bool = True  # keep no activations inside a block: less memory, 4/3 of the work
    compile: bool = False  # torch.compile each block: slow to start, then faster updates
    offload: bool = False  # several GPUs: weights and optimizer state wait in the CPU's memory
    gpus: int = 0  # --dry-run: memory plan for so many GPUs; 0 = the running processes
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
        cli.require_positive(self, "clip", "eval_every", "eval_n", "reward_timeout")
        cli.require_not_negative(self, "steps", "overlong", "save_every", "keep", "gpus")
        cli.require_not_negative(self, "weight_decay", "max_flops", "reward_workers")
        cli.require_not_negative(self, "eval_temperature")
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
    demonstrations = settings.pop("demonstrations", "")  # problems with a column response
    if demonstrations and methods.load(given.get("algo", Config.algo)).demonstrations:
        settings["data"] = demonstrations
    return settings


# ---- sample and score ----------------------------------------------------------------------------
class Round(NamedTuple):
    """What one step trains on, what it sampled, and numbers of all that it sampled."""

    groups: list[list[Row]]
    sampled: list[list[Row]]
    records: list[dict]  # of all sampled responses, for samples.jsonl
    stats: dict


def collect(cfg: Config, method, policy, pool: list, run: Run) -> Round:
    """Sample and score groups of responses until there are enough to train on."""
    dynamic = method.dynamic_sampling
    n_prompts = cfg.gen_prompts if dynamic else cfg.prompts
    began = time.monotonic()
    score_s_before = policy.score_s
    sampled = []
    records = []
    chosen = []
    n_draws = 0
    while len(chosen) < cfg.prompts and n_draws < cfg.max_rounds:  # one pass unless dynamic
        problems = [pool[i] for i in data.plan(len(pool), cfg.seed, run.position, n_prompts)]
        groups = {}  # rows by number of the prompt, in the order of the problems
        for request, response, record in sample(cfg, method, policy, problems, run):
            row = score(cfg, request, response, record)
            groups.setdefault(row.group, []).append(row)
            records.append({**record, "reward": row.reward, "group": row.group})
        for problem, rows in zip(problems, groups.values()):
            sampled.append(rows)
            # Before penalties: a right answer that is too long still counts as right
            rewards = [row.correct for row in rows]
            if not dynamic or method.carries_signal(rewards, problem.expert):
                chosen.append((problem, rows))
        run.position += n_prompts
        n_draws += 1
    chosen = chosen[: cfg.prompts]
    experts = {}
    if method.demonstrations == "rows":
        experts = expert_rows(cfg, policy, {rows[0].group: problem for problem, rows in chosen})
    complete = [method.complete(rows, experts.get(rows[0].group)) for _, rows in chosen]
    stats = losses.describe_groups(sampled) | {"rounds": n_draws}
    stats["discarded"] = len(sampled) - len(chosen)
    unparsed = sum(record["answer"] is None for record in records)
    stats["unparsed"] = unparsed / (len(records) / 100)
    stats["unscored"] = scoring.unscored(records)
    stats["score_s"] = round(policy.score_s - score_s_before, 4)
    stats["sample_s"] = round(time.monotonic() - began - stats["score_s"], 4)
    return Round(complete, sampled, records, stats)


def sample(cfg: Config, method, policy, problems: list, run: Run) -> list:
    """[(request, response, record)] of the responses that the method asks for to each problem."""
    done = run.done_share(cfg.max_flops)
    requests = []
    for number, problem in enumerate(problems, run.position):
        u = torch.rand((), generator=ranks.generator(cfg.seed, "prefix", number)).item()
        for prefix, count in method.requests(problem.expert, cfg.group, done, u):
            requests.append(scoring.Request(problem, prefix, count, number))
    seed = ranks.seed_of(cfg.seed, "rollout", run.step, run.position)
    return policy.respond(requests, policy.sampling(cfg.temperature, seed))


def score(cfg: Config, request: scoring.Request, response, record: dict) -> Row:
    """A row from a response and its judged record. A cut response earns at most 0."""
    correct = record["reward"] if response.finished else min(record["reward"], 0.0)
    reward = correct
    if cfg.overlong:
        reward += losses.overlong_penalty(len(response.ids), cfg.max_new, cfg.overlong)
    return Row(
        prompt=request.problem.prompt,
        response=response.ids,
        logp=response.logp,
        correct=correct,
        reward=reward,
        group=request.number,
        n_prefix=len(request.prefix),
        finished=response.finished,
    )


def expert_rows(cfg: Config, policy, problems: dict) -> dict[int, Row]:
    """{number of the group: its demonstration as a row}, for the problems that have one. The same
    reward judges it, and may give 0; there is no penalty for its length."""
    numbers = [number for number, problem in problems.items() if problem.expert]
    shown = [(problems[n], scoring.demonstration(problems[n])) for n in numbers]
    rows = {}
    for number, (problem, response), record in zip(numbers, shown, policy.judge(shown)):
        row = score(cfg, scoring.Request(problem, [], 1, number), response, record)
        rows[number] = row._replace(reward=row.correct, is_expert=True)
    return rows


# ---- batches -------------------------------------------------------------------------------------
class Update(NamedTuple):
    """One optimizer step: rows, and their tensors in the same order."""

    rows: list[Row]
    batch: Batch


def make_batches(cfg: Config, method, net, reference, groups: list) -> list[Update]:
    """The round's optimizer steps, all made before the first of them changes the weights."""
    updates = []
    for first in range(0, len(groups), cfg.update_prompts):
        rows = [row for group in groups[first : first + cfg.update_prompts] for row in group]
        batch = losses.make_batch(rows, net.head.device, method.mask_truncated)
        R = batch.mask.shape[1]
        if method.needs_entropy:
            old_logp, entropy = logp_now(cfg, net, rows, R, with_entropy=True)
            batch = batch._replace(old_logp=old_logp, entropy=entropy)
        batch = losses.weigh(method, batch)

        teaching = method.teaches(batch)
        if not teaching.any():
            continue
        if not (method.entropy_coef or method.kl_coef):  # the other rows have no gradient
            index = teaching.nonzero()[:, 0]
            batch = losses.take(batch, index)
            rows = [rows[i] for i in index.tolist()]

        if not updates:
            batch = batch._replace(old_logp=None)  # first update: its own log-probs, r = 1
        elif batch.old_logp is None:
            batch = batch._replace(old_logp=logp_now(cfg, net, rows, R)[0])
        if reference is not None:
            batch = batch._replace(ref_logp=logp_now(cfg, reference, rows, R)[0])
        updates.append(Update(rows, batch))
    return updates


def micro_batches(cfg: Config, rows: list[Row]) -> Iterator:
    """(indices of rows, these rows as a shared.Line) of each micro-batch of this rank."""
    return shared.micro_batches(rows, cfg.micro_tokens, ranks.rank(), ranks.world())


def forward(cfg: Config, net, line: shared.Line, R: int, with_entropy: bool = True) -> tuple:
    """Log-probs and entropies (zeros if not wanted) at the sampling temperature, both (b, R)."""
    logp, entropy = model_file.grouped_logp(net, line, cfg.temperature, with_entropy)
    entropy = torch.zeros_like(logp) if entropy is None else entropy
    missing = R - logp.shape[1]
    return F.pad(logp, (0, missing)), F.pad(entropy, (0, missing))


@torch.no_grad()
def logp_now(cfg: Config, net, rows: list[Row], R: int, with_entropy: bool = False) -> tuple:
    """Log-probs and entropies (B, R) of all rows under the weights as they are."""
    logp = torch.zeros(len(rows), R, device=net.head.device)
    entropy = torch.zeros_like(logp)
    for part, line in micro_batches(cfg, rows):
        part_logp, part_entropy = forward(cfg, net, line, R, with_entropy)
        logp[part] = part_logp[: len(part)]  # without a row the line holds a stand-in
        entropy[part] = part_entropy[: len(part)]
    return ranks.add_up(logp), ranks.add_up(entropy)


# ---- update --------------------------------------------------------------------------------------
def train_on(cfg: Config, method, net, update: Update) -> dict:
    """Forward and backward of one optimizer step; the gradient stays in the model. Returns
    {name: sum over the step}, for the names in losses.SUMS."""
    rows, batch = update
    R = batch.mask.shape[1]
    sums = wide(torch.zeros(len(losses.SUMS), device=batch.mask.device))
    parts = list(micro_batches(cfg, rows))
    for n, (part, line) in enumerate(parts, 1):
        ranks.reduce_now(net, n == len(parts))
        logp, entropy = forward(cfg, net, line, R)  # (b, R)
        if not part:  # no rows for this rank: only the collectives that others wait for
            (logp.sum() * 0).backward()
            continue
        mine = losses.take(batch, part)
        loss = losses.update_loss(method, logp, entropy, mine)
        loss.backward()
        sums += torch.stack([wide(loss.detach()), *losses.token_sums(method, logp, entropy, mine)])
    return dict(zip(losses.SUMS, ranks.add_up(sums).tolist()))


# ---- the script ----------------------------------------------------------------------------------
def load_problems(cfg: Config, method, tokenizer) -> tuple[list, list]:
    """(problems to train on, problems to evaluate on)."""
    columns = tasks.columns(cfg.reward)
    pool, n_long = data.problems(cfg.data, tokenizer, cfg.max_prompt, **columns)
    if cfg.val:
        val, _ = data.problems(cfg.val, tokenizer, cfg.max_prompt, **columns)
    else:
        pool, val = data.hold_out(pool, 200)
        print(f"no --val: {len(val)} problems of {cfg.data} held out for evaluation")
    pool, n_cut = data.drop_long_experts(pool, cfg.max_new)
    if n_cut:
        print(f"{n_cut} demonstrations over --max-new {cfg.max_new} tokens dropped")
    experts = sum(problem.expert is not None for problem in pool)
    print(
        f"{len(pool)} problems ({experts} with a demonstration; {n_long} prompts over "
        f"{cfg.max_prompt} tokens dropped), {len(val)} for evaluation",
        flush=True,
    )
    if method.demonstrations and not experts:
        why = "no row has a response; add a column response, or use --algo dapo"
        if n_cut:
            why = f"all {n_cut} are over --max-new {cfg.max_new} tokens; raise it"
        raise UserError(f"{cfg.data}: --algo {cfg.algo} needs demonstrations, and {why}")
    return pool, val


def show_plan(cfg: Config, method, pool: list, policy, folder: Path, device) -> None:
    """The run in one line, and what it will take."""
    config = model_file.read_config(folder)
    plain = vars(losses.GRPO())
    differs = [f"{name}={own}" for name, own in vars(method).items() if plain.get(name) != own]
    print(
        f"{cfg.algo} on {ranks.world()} x {device}: {cfg.steps} steps x {cfg.prompts} prompts x "
        f"{cfg.group} responses, {cfg.prompts // cfg.update_prompts} updates per step, temperature "
        f"{cfg.temperature}, lr {cfg.lr:g}; GRPO with {', '.join(differs) or 'its defaults'}",
        flush=True,
    )
    longest = max(len(problem.prompt) for problem in pool) + cfg.max_new
    if longest > config.max_position_embeddings:
        print(
            f"hint: a prompt and --max-new {cfg.max_new} take up to {longest} positions, and the "
            f"model was trained for {config.max_position_embeddings}: lower --max-new"
        )
    launch.show_memory(cfg, config, device, slots=longest, reference=bool(method.kl_coef))
    launch.show_disk(cfg, config, cfg.steps, "adamw")
    if cfg.dry_run:
        prompt = policy.tokenizer.decode(pool[0].prompt)
        print(f"first prompt: {prompt}\nits answer: {pool[0].gold}")
    if cfg.dry_run or any(problem.expert for problem in pool):
        limit = 1000 if cfg.dry_run else 32
        print(scoring.check_demonstrations(pool, policy, limit), flush=True)


def main(cfg: Config) -> None:
    device = ranks.start()
    method = methods.load(cfg.algo)(**cfg.options)
    folder = evaluate.find_start(cfg)
    tokenizer = evaluate.open_tokenizer(folder)
    pool, val = load_problems(cfg, method, tokenizer)
    policy = scoring.open_policy(cfg, tokenizer)
    show_plan(cfg, method, pool, policy, folder, device)
    if cfg.dry_run:
        return
    run = Run(cfg, cfg.steps, folder, val_set=data.digest(val))
    model, net, optimizers = evaluate.open_training(cfg, folder, tokenizer, device, run)
    reference = evaluate.open_frozen(cfg, folder, device) if method.kl_coef else None
    policy.net = net
    # --resume with a smaller --keep frees disk space before the next save
    run.prune({evaluate.best_step(run.of_kind("eval"), run.saved())[0]})

    for step in run.steps():
        if 0 < cfg.max_flops <= run.totals["flops"]:
            run.end(f"--max-flops {cfg.max_flops:g} are spent")
        run.checkpoint(step)
        if run.due(step, "eval"):
            evaluate.during_rl(cfg, run, step, policy, val)
        if step % cfg.eval_every == 0:  # also where a resumed run has its evaluation already
            evaluate.end_if_reached(cfg, run)
        if run.over(step):
            break

        collected = collect(cfg, method, policy, pool, run)
        if step == run.first and collected.groups:
            console.show_rollout(collected.groups[0][0], tokenizer)
        began = time.monotonic()
        updates = make_batches(cfg, method, net, reference, collected.groups)
        batches_ready = time.monotonic()
        sums = []
        norms = []
        lr = optim.lr_at(step, cfg.steps, cfg.lr, "constant", cfg.warmup)
        for update in updates:
            sums.append(train_on(cfg, method, net, update))
            norms.append(optim.update(model, optimizers, lr, cfg.clip))
            ranks.refresh(net, model)  # net may be a bfloat16 copy of model
            run.watch(norms[-1], step + 1)

        numbers = {**collected.stats, **losses.describe_updates(sums, norms), "lr": lr}
        numbers["logp_s"] = round(batches_ready - began, 4)
        numbers["update_s"] = round(time.monotonic() - batches_ready, 4)
        log_step(cfg, method, run, collected, updates, numbers)
    policy.close()
    finish(cfg, run)


def log_step(cfg: Config, method, run: Run, collected: Round, updates: list, numbers: dict) -> None:
    """Compute spent, samples, the step's line in metrics.jsonl, and the printed line."""
    run.count(*flops.of_round(cfg, method, run.model.config, collected, updates))
    step = run.step + 1
    trained = {row.group for update in updates for row in update.rows}
    run.log_samples(step, whole_groups(collected.records, trained))
    run.log(step, train=numbers)
    console.print_rl_step(cfg, run, step, numbers)
    console.print_hints(cfg, run, numbers, collected.records)


def finish(cfg: Config, run: Run) -> None:
    """Where the run stands, and the next command to type."""
    if run.interrupted:
        print(f"stopped and saved. Go on with: {cli.again()}")
        return
    points = run.of_kind("eval")
    best, why = evaluate.best_step(points, run.saved())
    reason = f" ({run.ended})" if run.ended else ""
    print(
        f"done{reason}: pass@1 {points[0]['pass1']:.1f} -> {points[-1]['pass1']:.1f}; "
        f"best checkpoint {run.folder(best)}, {why}\n"
        f"next: python evaluate.py --init {cfg.out}@{best}{tasks.flags_for(cfg, val='--data')}\n"
        f"the run as a page: {ranks.from_first(lambda: page.write(cfg.out))}"
    )


if __name__ == "__main__":
    cli.run(main, Config, preset, options=("algo", methods.load))
