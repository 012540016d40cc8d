"""Reinforcement learning with a verifier: GRPO, DAPO and the methods that mix expert trajectories into the loop.

    torchrun rl.py --init runs/sft                                      a run directory: its recommended checkpoint is taken
    torchrun rl.py --init runs/sft/checkpoints/step_000400 --algo luffy --data mixed.jsonl --out runs/luffy

One step, four verbs:
    collect    sample G responses to each prompt; with dynamic sampling, until enough prompts have right and wrong answers among theirs
    score      verify: reward 1 for a right answer that ends by itself (EOS), else 0
    weigh      advantage = reward - mean of its group; the weight of each token from the lengths of the whole update
    update     `prompts / update-prompts` optimizer steps, each over micro-batches of like length

Choices: 1) No critic, no KL, no reward model unless asked for. 2) old_logp is the trainer's forward with the weights at the start of the
round, never the sampler's number; in the round's first update it is the forward itself, so the ratio there is 1 and no clip acts.
3) Surplus and uninformative groups are discarded: every trained row is from the current policy. 4) Expert rows are ids of the
demonstration, tokenized once; a prompt without one gets plain rollouts.
Why is the loss near 0, or negative? It is a surrogate: with advantages of mean 0 its value says little. Watch reward, signal, entropy, length.
Shapes: B rows, T tokens, R response tokens, G responses a prompt. Log-probs in nats; pass@1 and shares in points (0..100).
"""
import math
import time
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch

import data
import evaluate
import losses
import model as model_file
import rollout
import run
import sft

# What each method takes where the command line is silent: settings of the paper's section 6.1 (comparison) and C.2.2 (RL after SFT)
SETTINGS = {"grpo": dict(prompts=128, update_prompts=64, lr=1e-6, temperature=1.0),
            "dapo_dc": dict(prompts=64, update_prompts=64, lr=1e-6, temperature=0.7),
            "upt": dict(prompts=128, update_prompts=64, lr=5e-6, temperature=1.0)}
SETTINGS |= {"dapo": SETTINGS["dapo_dc"], **{name: SETTINGS["grpo"] for name in ("dapo_d", "luffy", "srft", "prefix_rft")}}


@dataclass
class Config:
    init: str = "runs/sft"          # model folder, checkpoint, run directory or hub name
    data: str = ""                  # problems: .jsonl or .parquet with prompt, answer and, for the mixed methods, response; empty = built-in
    val: str = ""                   # problems for evaluation while training; empty = 200 (10% if fewer than 2,000) held out of --data
    out: str = "runs/rl"            # run directory
    overwrite: bool = False         # delete an earlier run in --out
    resume: bool = False            # go on from the newest checkpoint in --out
    dry_run: bool = False           # show model, data and plan, then stop
    algo: Literal["grpo", "dapo_d", "dapo_dc", "dapo", "luffy", "srft", "upt", "prefix_rft"] = "dapo"   # dapo = dapo_dc
    steps: int = 500                # rounds of collect, score, weigh, update
    prompts: int | None = None      # prompts trained on a round; none = the method's
    update_prompts: int | None = None   # prompts an optimizer step; none = the method's
    group: int = 8                  # rows a prompt, the expert's included
    gen_prompts: int | None = None  # prompts sampled at once by dynamic sampling; none = 2 x prompts
    max_rounds: int = 10            # dynamic sampling trains on what there is after so many
    temperature: float | None = None    # of sampling and of the trained log-probs; none = the method's
    max_new: int = 8192             # tokens a response, at most
    max_prompt: int = 1024          # tokens a prompt; longer ones are dropped and counted
    rows: int = 512                 # responses in flight at once
    micro_tokens: int = 16384       # tokens a micro-batch, padding included
    lr: float | None = None         # learning rate, constant; none = the method's
    warmup: float = 0.0             # share of the steps with a rising learning rate
    weight_decay: float = 0.01      # decoupled, as AdamW
    clip: float = 1.0               # largest gradient norm
    overlong: int = 0               # soft punishment over the last so many tokens before max-new (DAPO); 0 = none
    seed: int = 0                   # order of the prompts and every sampled token
    save_every: int = 0             # steps between checkpoints besides the evaluated ones; 0 = none
    eval_every: int = 20            # steps between evaluations; each is saved
    eval_n: int = 4                 # samples a problem at an evaluation
    eval_temperature: float = 0.7   # of evaluation
    keep: int = 0                   # checkpoints to keep; 0 = all. The newest and the best one always stay
    bf16: bool = False              # compute in bfloat16 under autocast; weights stay fp32
    options: dict = field(default_factory=dict)     # options of the objective, by flag

    def __post_init__(self):
        for name, value in SETTINGS[self.algo].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.gen_prompts = self.gen_prompts or 2 * self.prompts
        if self.prompts % self.update_prompts:
            fits = [d for d in range(1, self.prompts + 1) if self.prompts % d == 0]
            near = sorted(fits, key=lambda d: abs(d - self.update_prompts))[:2]
            raise ValueError(f"--prompts {self.prompts} does not divide into updates of {self.update_prompts}; use --update-prompts {near[0]} or {near[-1]}")
        if self.group < 2:
            raise ValueError(f"--group {self.group}: a group needs at least 2 rows, or every advantage is 0")


def preset(given: dict) -> dict:
    """What the built-in task uses instead of the defaults for real models, where no --data was given."""
    if "data" in given:
        return {}
    folder = evaluate.BUILT_IN
    return {"data": f"{folder}/rl.jsonl", "val": f"{folder}/eval.jsonl", "steps": 100, "prompts": 64, "update_prompts": 32, "gen_prompts": 64,
            "temperature": 1.0, "max_new": 128, "max_prompt": 64, "micro_tokens": 4096, "lr": 1e-4, "eval_every": 10}


class Row(NamedTuple):
    """One trained sequence. response ends with EOS if finished; logp: the sampler's, none for expert tokens; n_prefix: tokens copied from the expert."""
    prompt: list[int]
    response: list[int]
    logp: list[float]
    correct: float
    reward: float
    group: int
    is_expert: bool = False
    n_prefix: int = 0
    finished: bool = True


# --------------------------------------------------------------------------------------------------------------------- collect
def sample_round(cfg, objective, model, tokenizer, pool, numbers: list[int], seed: int, step: int) -> tuple[list[list[Row]], list[dict]]:
    """Rows and records of these prompts (numbers in the endless stream): rollouts, and the expert's row where the method has one."""
    chosen = [pool[i] for i in data.plan(len(pool), cfg.seed, numbers[0], len(numbers))]
    requests, counts, owners = [], [], []                                           # owner: (place among chosen, prefix length)
    window = losses.prefix_window(step, cfg.steps)
    for place, (number, problem) in enumerate(zip(numbers, chosen)):
        demo = problem.expert if objective.demo in ("row", "prefix") else None
        n_prefix = 0
        if demo and objective.demo == "prefix":
            u = torch.rand((), generator=run.generator(cfg.seed, "prefix", number)).item()
            n_prefix = losses.prefix_length(u, window, len(demo))
        replaced = bool(demo) and (objective.demo == "row" or n_prefix > 0)
        requests.append(problem.prompt), counts.append(cfg.group - replaced), owners.append((place, 0))
        if n_prefix:
            requests.append(problem.prompt + demo[:n_prefix]), counts.append(1), owners.append((place, n_prefix))
    sampled = rollout.generate(model, requests, counts, cfg.max_new, cfg.temperature, tokenizer.eos_ids, seed, cfg.rows)
    groups, records = [[] for _ in chosen], []
    for (place, n_prefix), responses in zip(owners, sampled):
        problem = chosen[place]
        prefix = problem.expert[:n_prefix] if n_prefix else []
        full = [r._replace(ids=prefix + r.ids, logp=[0.0] * n_prefix + r.logp) for r in responses]
        for response, record in zip(full, evaluate.judge([problem], [full], tokenizer)[0]):
            correct = float(record["correct"] and response.finished)
            penalty = losses.overlong_penalty(len(response.ids), cfg.max_new, cfg.overlong) if cfg.overlong else 0.0
            groups[place].append(Row(problem.prompt, response.ids, response.logp, correct, correct + penalty, numbers[place],
                                     n_prefix=n_prefix, finished=response.finished))
            records.append({**record, "reward": correct + penalty})
    return groups, records


def expert_row(problem, tokenizer, number: int) -> Row:
    """The demonstration as a row of the group; the same verifier judges it, so its reward may be 0."""
    response = rollout.Response(problem.expert, [0.0] * len(problem.expert), [], True)
    correct = float(evaluate.judge([problem], [[response]], tokenizer)[0][0]["correct"])
    return Row(problem.prompt, problem.expert, response.logp, correct, correct, number, is_expert=True)


def collect(cfg, objective, model, tokenizer, pool, cursor: int, step: int) -> tuple[list[list[Row]], int, dict, list[dict]]:
    """Groups to train on, the new prompt cursor, counts for the log, and the records of everything sampled."""
    records, generated, position = [], [], cursor

    def rounds():
        nonlocal position
        while True:
            numbers = list(range(position, position + (cfg.gen_prompts if objective.dynamic_sampling else cfg.prompts)))
            seed = run.seed_of(cfg.seed, "rollout", step, position)
            groups, judged = sample_round(cfg, objective, model, tokenizer, pool, numbers, seed, step)
            position += len(numbers)
            generated.extend(groups), records.extend(judged)
            yield [(group, [row.correct for row in group]) for group in groups]

    if objective.dynamic_sampling:
        groups, _, surplus, n_rounds, _ = losses.collect_informative(rounds(), cfg.prompts, cfg.max_rounds)
    else:
        groups, surplus, n_rounds = [group for group, _ in next(rounds())], [], 1
    if objective.demo in ("row", "gate"):
        for group in groups:
            problem = pool[data.plan(len(pool), cfg.seed, group[0].group, 1)[0]]
            if problem.expert:
                group.append(expert_row(problem, tokenizer, group[0].group))
    rows = [row for group in generated for row in group if not row.is_expert]
    n = len(rows)
    agree = sum(len({r.correct for r in g if not r.is_expert}) == 1 for g in generated)
    stats = {"reward": 100 * sum(r.correct for r in rows) / n, "signal": 100 * (1 - agree / len(generated)), "rounds": n_rounds,
             "discarded": agree + len(surplus) if objective.dynamic_sampling else 0, "length": sum(len(r.response) for r in rows) / n,
             "truncated": 100 * sum(not r.finished for r in rows) / n, "unparsed": 100 * sum(r["answer"] is None for r in records) / n,
             "_generated": [len(r.prompt) + len(r.response) for r in rows]}
    return groups, position, stats, records


# ------------------------------------------------------------------------------------------------------------- weigh and update
def padded(lists: list[list[float]], width: int, device) -> torch.Tensor:
    """(B, width) from ragged lists, zeros on the right."""
    return torch.tensor([list(values) + [0.0] * (width - len(values)) for values in lists], device=device)


def examples_of(rows: list[Row]) -> list[data.Example]:
    return [data.Example(row.prompt, row.response) for row in rows]


@torch.no_grad()
def forward_rows(cfg, model, rows: list[Row], device, entropy: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies (B, R) of all rows under the weights as they are, R = the longest response."""
    R = max(len(row.response) for row in rows)
    logp, ent = torch.zeros(len(rows), R, device=device), torch.zeros(len(rows), R, device=device)
    examples = examples_of(rows)
    for part in data.cut([len(e.prompt) + len(e.response) for e in examples], cfg.micro_tokens):
        ids, mask = data.collate([examples[i] for i in part], device)
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16):
            values, entropies, chosen = sft.response_logp(model, ids, mask, cfg.temperature, entropy)
        logp[part, :values.shape[1]] = values
        if entropy:
            ent[part, :values.shape[1]] = entropies
    return logp, ent


def weigh(objective, rows: list[Row], entropy, device) -> tuple[list[Row], losses.Rows, torch.Tensor]:
    """Rows that stay, and what their losses need: advantages from all rows of the update, token weights from all their lengths.

    entropy (B, R): of the policy before the update; only Prefix-RFT reads it, to rank demonstration tokens over the whole update.
    """
    def column(values, dtype=torch.float32):
        return torch.tensor(values, dtype=dtype, device=device)

    rewards, groups = column([r.reward for r in rows]), column([r.group for r in rows], torch.long)
    is_expert = column([r.is_expert for r in rows], torch.bool)
    lengths = column([len(r.response) for r in rows], torch.long)
    R = int(lengths.max())
    mask = torch.arange(R, device=device) < lengths[:, None]                        # (B, R)
    is_prefix, advantages, keep = None, None, torch.ones_like(is_expert)
    options = dict(normalize_std=objective.normalize_std, singleton=objective.singleton)
    if objective.demo == "prefix":
        is_prefix = losses.prefix_tokens(mask, column([r.n_prefix for r in rows], torch.long))
        kept = losses.most_uncertain(entropy, is_prefix, objective.drop_ratio)
        advantages = losses.prefix_advantages(rewards, groups, is_prefix, kept, objective.prefix_adv == "split", **options)
    elif objective.demo == "gate":                                                  # experts have no say in the rollouts' baseline
        own = torch.where(is_expert, -1 - groups, groups)
        advantages = losses.group_advantages(rewards, own, **options)
        keep = losses.gate_rows(column([r.correct for r in rows]), groups, is_expert, objective.gate_gamma)
    else:
        advantages = losses.group_advantages(rewards, groups, **options)
    if objective.mask_truncated:
        mask = mask & column([r.finished for r in rows], torch.bool)[:, None]
    index = keep.nonzero()[:, 0]
    chosen = losses.take(losses.Rows(mask=mask, advantages=advantages, rollout_logp=padded([r.logp for r in rows], R, device), is_expert=is_expert,
                                     is_prefix=is_prefix, is_success=column([r.correct for r in rows]) > 0.5), index)
    weights = losses.batch_weights(objective, chosen.mask.sum(1), groups[index], is_expert[index])
    return [rows[i] for i in index.tolist()], chosen, weights


def train_on(cfg, objective, model, rows: list[Row], batch: losses.Rows, weights, device) -> dict:
    """Forward and backward over micro-batches of one update; gradients are left in the model. Returns sums for the log."""
    R, examples = batch.mask.shape[1], examples_of(rows)
    sums = {"loss": 0.0, "tokens": 0, "entropy": 0.0, "clipped": 0.0, "kl": 0.0, "gap": 0.0}
    for part in data.cut([len(e.prompt) + len(e.response) for e in examples], cfg.micro_tokens):
        ids, mask = data.collate([examples[i] for i in part], device)
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16):
            logp, entropy, _ = sft.response_logp(model, ids, mask, cfg.temperature, entropy=True)
        logp, entropy = (torch.nn.functional.pad(x, (0, R - x.shape[1])) for x in (logp, entropy))     # (b, R)
        index = torch.tensor(part, device=device)
        mine = losses.take(batch, index)
        loss = losses.update_loss(objective, logp, entropy, mine, weights[:, index])
        loss.backward()
        with torch.no_grad():
            own = mine.mask & ~mine.is_expert[:, None] & ~(mine.is_prefix if mine.is_prefix is not None else torch.zeros_like(mine.mask))
            log_ratio = torch.where(own, logp - (logp if mine.old_logp is None else mine.old_logp), 0.0)
            outside = (log_ratio.exp() > 1 + (objective.clip_high or math.inf)) | (log_ratio.exp() < 1 - (objective.clip_low or math.inf))
            for name, value in (("loss", loss), ("tokens", own.sum()), ("entropy", entropy[own].sum()), ("clipped", outside.sum()),
                                ("kl", (log_ratio.exp() - 1 - log_ratio)[own].sum()), ("gap", (logp - mine.rollout_logp)[own].abs().sum())):
                sums[name] += value.item()
    return sums


def update(cfg, objective, model, reference, optimizers, groups, book, step, device) -> dict:
    """The round's optimizer steps. Returns numbers for the log, the lengths trained on, and the forwards really run."""
    parts = [groups[i:i + cfg.update_prompts] for i in range(0, len(groups), cfg.update_prompts)]
    plans, n_old = [], []
    for number, part in enumerate(parts):                                           # all before the first step: old_logp is of the round's start
        rows = [row for group in part for row in group]
        logp = entropy = None
        if number > 0 or objective.demo == "prefix":
            logp, entropy = forward_rows(cfg, model, rows, device, entropy=objective.demo == "prefix")
            n_old += [len(r.prompt) + len(r.response) for r in rows]
        kept, batch, weights = weigh(objective, rows, entropy, device)
        if number > 0:
            places = {id(row): i for i, row in enumerate(rows)}
            batch = batch._replace(old_logp=logp[[places[id(row)] for row in kept]])
        if reference is not None:
            ref, _ = forward_rows(cfg, reference, kept, device)
            batch = batch._replace(ref_logp=torch.nn.functional.pad(ref, (0, batch.mask.shape[1] - ref.shape[1])))
        plans.append((kept, batch, weights))
    total, norms, first_gap = {}, [], 0.0
    for number, (rows, batch, weights) in enumerate(plans):
        sums = train_on(cfg, objective, model, rows, batch, weights, device)
        norms.append(run.update(model, optimizers, run.lr_at(step, cfg.steps, cfg.lr, "constant", cfg.warmup), cfg.clip))
        book.watch(norms[-1], step + 1)
        first_gap = sums["gap"] / max(1, sums["tokens"]) if number == 0 else first_gap   # later the weights have moved
        total = {k: total.get(k, 0.0) + v for k, v in sums.items()}
    n = max(1, total.get("tokens", 0))
    return {"loss": total["loss"] / len(plans), "grad_norm": sum(norms) / len(norms), "entropy": total["entropy"] / n,
            "clipped": 100 * total["clipped"] / n, "kl": total["kl"] / n, "gap": first_gap, "updates": len(plans),
            "_trained": [len(r.prompt) + len(r.response) for rows, _, _ in plans for r in rows],
            "_experts": [len(r.prompt) + len(r.response) for rows, _, _ in plans for r in rows if r.is_expert], "_old": n_old}


# ------------------------------------------------------------------------------------------------------------------------- main
def evaluate_now(cfg, book, step, model, tokenizer, problems, totals) -> None:
    """pass@1 on the validation problems: an eval line, samples on disk, a line on the screen."""
    summary, records, _ = evaluate.evaluate(model, tokenizer, problems, cfg.eval_n, cfg.eval_temperature, cfg.max_new,
                                            run.seed_of(cfg.seed, "eval"), cfg.rows)
    book.log(step, "eval", **totals, **summary)
    book.log_samples(step, [{**r, "kind": "eval"} for r in records[:8]])
    print(f"step {step:4d}  pass@1 {summary['pass1']:.1f} (se {summary['pass1_se']:.1f})  lenient {summary['lenient']:.1f}  "
          f"length {summary['length']:.0f}  truncated {summary['truncated']:.1f}%", flush=True)


def show_first(groups, pool, tokenizer) -> None:
    row = groups[0][0]
    print("first rollout, the trained part between >> and <<:\n  " + tokenizer.decode(row.prompt) + ">>" + tokenizer.decode(row.response)
          + ("" if row.finished else " [cut]") + f"<<  reward {row.reward:g}\n", flush=True)


def main(cfg: Config) -> None:
    _, _, device = run.start_process()
    model, tokenizer, folder = evaluate.open_model(cfg.init, device)
    objective = replace(losses.OBJECTIVES[cfg.algo], **cfg.options)
    reference = model_file.load_model(folder, torch.float32, device).requires_grad_(False) if objective.kl_coef else None
    pool, n_long = data.problems(cfg.data, tokenizer, cfg.max_prompt)
    if cfg.val:
        val, _ = data.problems(cfg.val, tokenizer, cfg.max_prompt)
    else:
        held_out = set(data.plan(len(pool), run.seed_of("held out"), 0, min(200, max(1, len(pool) // 10))))
        val, pool = [pool[i] for i in sorted(held_out)], [p for i, p in enumerate(pool) if i not in held_out] or pool
        print(f"no --val: {len(val)} problems of {cfg.data} held out for evaluation")
    experts = sum(p.expert is not None for p in pool)
    print(f"{len(pool)} problems ({experts} with a demonstration, {n_long} prompts over {cfg.max_prompt} tokens dropped), {len(val)} for evaluation; "
          f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters on {device}")
    print(f"{cfg.algo}: {cfg.steps} steps x {cfg.prompts} prompts x {cfg.group} responses in {cfg.prompts // cfg.update_prompts} updates, "
          f"temperature {cfg.temperature}, lr {cfg.lr}; {objective}", flush=True)
    if objective.demo != "none" and not experts:
        raise ValueError(f"{cfg.data}: --algo {cfg.algo} needs demonstrations, and no row has a response; add a column response, or use --algo dapo")
    if cfg.dry_run:
        return
    optimizers = run.make_optimizers(model, "adamw", cfg.lr, (0.9, 0.999), cfg.weight_decay)
    book = run.Run(cfg, cfg.resume, cfg.overwrite, start=str(folder))
    totals, start, cursor, stop = {"tokens": 0, "flops": 0.0, "flops_hw": 0.0}, 0, 0, run.catch_signals()
    if book.resumed:
        state = book.load(model, optimizers)
        start, cursor, totals = state["step"], state["cursor"], {k: state[k] for k in totals}
        print(f"resuming {cfg.out} after step {start}, at prompt {cursor}", flush=True)
    for step in range(start, cfg.steps + 1):
        due = step % cfg.eval_every == 0 or step == cfg.steps
        if due or cfg.save_every and step % cfg.save_every == 0 or stop:
            book.save(step, lambda to: evaluate.save_model(model, tokenizer, to), model, optimizers, **totals, cursor=cursor, seed=cfg.seed)
        if due and not any(row["step"] == step for row in book.of_kind("eval")):
            evaluate_now(cfg, book, step, model, tokenizer, val, totals)
            book.prune(cfg.keep, {max(book.of_kind("eval"), key=lambda row: row["pass1"])["step"]})
        if step == cfg.steps or stop:
            break
        began = time.monotonic()
        groups, cursor, stats, records = collect(cfg, objective, model, tokenizer, pool, cursor, step)
        sampled = time.monotonic()
        if step == start and groups:
            show_first(groups, pool, tokenizer)
        book.log_samples(step + 1, [{**r, "kind": "train"} for r in records[:8]])
        result = update(cfg, objective, model, reference, optimizers, groups, book, step, device) if groups else {"updates": 0, "_trained": [], "_experts": [], "_old": []}
        lengths, trained, experts_paid = stats.pop("_generated"), result.pop("_trained"), result.pop("_experts")
        forwards = lengths + result.pop("_old")
        totals = {"tokens": totals["tokens"] + sum(lengths),
                  "flops": totals["flops"] + flops_of(model.config, lengths, trained, experts_paid if objective.demo == "row" else []),
                  "flops_hw": totals["flops_hw"] + model_file.hardware_flops(model.config, forwards) + 3 * model_file.hardware_flops(model.config, trained)}
        row = book.log(step + 1, "train", **totals, **stats, **result, sample_s=round(sampled - began, 2), update_s=round(time.monotonic() - sampled, 2))
        print_step(cfg, row, book)
    if stop:
        print(f"stopped by {stop[0]}, saved. Go on with: torchrun rl.py --resume --init {cfg.init} --out {cfg.out}")
        return
    best = max(book.of_kind("eval"), key=lambda row: row["pass1"])
    print(f"done: best pass@1 {best['pass1']:.1f} at step {best['step']}; the last checkpoint is {book.path(cfg.steps)}\n"
          f"next: python evaluate.py --init {cfg.out}")


def flops_of(config, generated: list[int], trained: list[int], experts: list[int]) -> float:
    """The paper's compute of a round (24)-(29): one forward for each generated row, three for each trained row, and for LUFFY and SRFT a
    generation forward for the expert's rows too (26). Lengths in tokens, prompt included."""
    return model_file.forward_flops(config, generated) + 3 * model_file.forward_flops(config, trained) + model_file.forward_flops(config, experts)


def print_step(cfg, row: dict, book) -> None:
    if not row["updates"]:
        print(f"step {row['step']:4d}/{cfg.steps}  no prompt had both right and wrong answers in {row['rounds']} rounds: no update", flush=True)
        return
    print(f"step {row['step']:4d}/{cfg.steps}  reward {row['reward']:5.1f}  signal {row['signal']:3.0f}%  rounds {row['rounds']}  length {row['length']:4.0f}  "
          f"cut {row['truncated']:4.1f}%  unparsed {row['unparsed']:4.1f}%  entropy {row['entropy']:.3f}  kl {row['kl']:.4f}  grad {row['grad_norm']:.2f}  "
          f"{row['sample_s']:.1f}+{row['update_s']:.1f} s  {book.eta(row['step'], cfg.steps)}", flush=True)


if __name__ == "__main__":
    run.cli(main, Config, preset, losses.Objective)
