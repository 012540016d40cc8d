"""Supervised fine-tuning on expert trajectories, through the regimes of its validation loss.

    torchrun sft.py                                  built-in problems, tiny model -> runs/sft
    torchrun sft.py --init Qwen/Qwen2.5-0.5B --data train.jsonl --val val.jsonl --out runs/q

One step: plan() picks rows -> deal() cuts micro-batches of like length -> hidden states (B, T, D)
-> log-probs of the response tokens -> minus their sum over the number of response tokens of the
WHOLE step -> backward -> clip -> optimizer step. Every --eval-every steps: save, validate, name the
regime (phases.py): adaptive, stable, mild, severe. RL starts from the minimum of that loss.

Choices: 1) The loss is a mean over all response tokens of the step, however it is cut into
micro-batches (the paper's code averages their means). 2) Only responses and their EOS are trained.
3) The built-in task keeps its learning rate constant, so that no schedule looks like saturation;
real models default to the paper's cosine. 4) Without --init a tiny base model is made first, once,
by this same file on plain text (runs/base).

Shapes: B rows, T tokens, D model width. Losses in nats per token; compute in FLOPs.
"""

import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import core.start  # must run before torch is imported

import torch

import data
import evaluate
import losses
import model as model_file
import phases
import tasks
from core import cli, estimates, flops, launch, memory, optim, page, ranks
from core.errors import UserError
from core.files import write_json
from core.run import CACHE, Run, is_new
from core.wide import wide
from tasks import scoring

BASE = Path("runs/base")  # the tiny base model


@dataclass
class Config:
    init: str = ""  # model folder, checkpoint, run directory or hub name; empty = built-in base
    data: str = ""  # trajectories: file, task's folder or hub name (docs/data.md); empty = built-in
    val: str = ""  # validation trajectories; empty = 199 rows (at most 10%) held out of --data
    problems: str = ""  # problems to sample answers for at each validation; empty = none
    reward: str = "math"  # judges those answers: math, text, a task, or FILE.py:FUNCTION
    out: str = "runs/sft"  # run directory
    overwrite: bool = False  # delete an earlier run in --out
    resume: bool = False  # go on from the newest checkpoint in --out
    dry_run: bool = False  # show model, data and plan, then stop
    from_scratch: bool = False  # random weights: take only config.json and tokenizer of --init
    steps: int = 0  # optimizer steps; 0 = --epochs
    epochs: float = 8.0  # passes over the data
    batch: int = 512  # trajectories per optimizer step
    micro_tokens: int = 16384  # tokens per micro-batch, padding included
    max_len: int = 16384  # tokens per example; longer ones are dropped and counted
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: on the matrices, AdamW on the rest
    loss: Literal["nll", "dft", "trsft"] = "nll"  # of a token, see losses.imitation_loss
    trust_alpha: float = 0.1  # trsft: a token with p below this has weight p / this (our choice)
    lr: float = 1e-5  # learning rate
    schedule: Literal["cosine", "constant"] = "cosine"  # after warm-up
    warmup: float = 0.1  # share of the steps with a rising learning rate
    weight_decay: float = 0.01  # decoupled, as AdamW
    clip: float = 1.0  # largest gradient norm
    bf16: bool = False  # compute in bfloat16; weights, gradients and optimizer stay fp32
    recompute: bool = True  # keep no activations inside a block: less memory, 4/3 of the work
    compile: bool = False  # torch.compile each block: slow to start, then faster steps
    offload: bool = False  # several GPUs: weights and optimizer state wait in the CPU's memory
    gpus: int = 0  # --dry-run: memory plan for so many GPUs; 0 = the running processes
    seed: int = 0  # order of the data
    save_every: int = 0  # steps between checkpoints besides the validated ones; 0 = none
    log_every: int = 1  # steps between printed lines; metrics.jsonl has every step
    eval_every: int = 0  # steps between validations; each is saved; 0 = ten in the run
    log_to: Literal["", "tensorboard", "wandb"] = ""  # send metrics there too
    keep: int = 0  # checkpoints to keep; 0 = all; the newest and the best always stay
    until: Literal["", "stable", "mild", "severe"] = ""  # stop once this regime is reached
    max_new: int = 1024  # tokens per response when sampling --problems
    rows: int = 512  # of those responses in flight at once
    reward_workers: int = 0  # processes that call the reward while sampling goes on; 0 = none
    reward_timeout: float = 30.0  # seconds per call in such a process; over it the reward is 0
    samples: int = 8  # per problem, besides: what RL in groups of so many would find; 0 = none
    sample_problems: int = 64  # the first so many of --problems, for those samples
    temperature: float = 1.0  # of those samples: RL's
    betas = (0.9, 0.95)  # of AdamW, as the paper's; no flag, as it has no annotation

    def __post_init__(self):
        cli.require_positive(self, "batch", "micro_tokens", "max_len", "log_every", "max_new")
        cli.require_positive(self, "epochs", "lr", "clip", "sample_problems", "temperature")
        cli.require_positive(self, "rows", "reward_timeout")
        cli.require_not_negative(self, "steps", "eval_every", "save_every", "keep", "gpus")
        cli.require_not_negative(self, "weight_decay", "samples", "reward_workers")
        cli.require_share(self, "warmup", "trust_alpha")
        if self.samples == 1:
            raise UserError("--samples 1: a group of one has no signal; 0 = none, or 2 and more")

    @property
    def alpha(self) -> float:
        """alpha of losses.imitation_loss: 0 = NLL, 1 = DFT, between them a trust region."""
        return {"nll": 0.0, "dft": 1.0, "trsft": self.trust_alpha}[self.loss]


def preset(given: dict) -> dict:
    """The built-in task's settings, where they differ from Config; {} for other data."""
    settings = tasks.preset("sft", given)
    if not settings and "init" not in given:
        raise UserError(
            f"--data {given['data']} needs --init: a model folder or a hub name to start from"
        )
    if "epochs" in given:
        settings.pop("steps", None)
    return settings


# ---- the built-in base model ---------------------------------------------------------------------
def base_config() -> Config:
    """The run that makes the tiny base model: plain text, random start."""
    task = tasks.load(tasks.BUILT_IN)
    settings = tasks.preset("base", {})
    return Config(**settings, init=str(task.FOLDER), out=str(BASE), resume=BASE.exists())


def write_built_in(task) -> None:
    """The task's rows and tokenizer, and config.json: the shape of the tiny base model."""
    task.write(task.FOLDER)
    vocabulary = json.loads((task.FOLDER / "tokenizer.json").read_text())["model"]["vocab"]
    write_json(task.FOLDER / "config.json", {**task.BASE_MODEL, "vocab_size": len(vocabulary)})


def make_built_in(cfg: Config) -> Config:
    """cfg with the tiny base model as its init; writes its problems and trains it on first use."""
    task = tasks.load(tasks.BUILT_IN)
    marker = task.FOLDER / f"{tasks.BUILT_IN}.json"
    if not ranks.from_first(marker.exists):
        print(f"writing the built-in problems and expert trajectories to {task.FOLDER}", flush=True)
        ranks.from_first(lambda: write_built_in(task))
    base = base_config()
    if not (BASE / "checkpoints" / f"step_{base.steps:06d}").exists():
        if cfg.dry_run:
            print(f"no base model in {BASE}: a run would make it first, from plain text (a minute)")
            return replace(cfg, init=str(task.FOLDER))  # its shape and its tokenizer
        print(f"no base model in {BASE}: making it once, from plain text (about a minute)")
        if not main(base):  # the same script with another config
            raise SystemExit(0)  # Ctrl-C: the base is saved and will be resumed
        print(f"the base model is made; now SFT -> {cfg.out}\n", flush=True)
    return replace(cfg, init=str(BASE))


# ---- data ----------------------------------------------------------------------------------------
def cache_folder(cfg: Config, start: Path) -> Path | None:
    """The folder for tokenized rows, emptied by --overwrite; None for a dry run."""
    if cfg.dry_run:
        return None
    folder = Path(cfg.out) / CACHE

    def prepare():
        if is_new(cfg, start) and cfg.overwrite:
            shutil.rmtree(folder, ignore_errors=True)

    ranks.from_first(prepare)
    return folder


def load_examples(cfg: Config, tokenizer, cache: Path | None) -> tuple[data.Rows, data.Rows]:
    """(training examples, validation examples)."""
    reads = tasks.columns(cfg.reward)["reads"]  # the reward's own columns

    def load(path: str, name: str) -> tuple[data.Rows, int]:
        folder = cache and cache / name
        return data.sft_examples(path, tokenizer, cfg.max_len, reads, folder)

    train, n_long = load(cfg.data, "train")
    if cfg.val:
        val, n_long_val = load(cfg.val, "val")
    else:
        train, val = data.hold_out(train, 199)
        n_long_val = 0
        print(f"no --val: {len(val)} rows of {cfg.data} held out for validation")
    kept = f"; ids in {cache}, {memory.text(train.n_bytes)}" if cache else ""
    print(
        f"{len(train)} training and {len(val)} validation examples; "
        f"{n_long + n_long_val} over {cfg.max_len} tokens dropped{kept}",
        flush=True,
    )
    return train, val


def load_problems(cfg: Config, tokenizer) -> list:
    """The problems whose answers are sampled at each validation."""
    if not cfg.problems:
        return []
    columns = tasks.columns(cfg.reward)
    problems, _ = data.problems(cfg.problems, tokenizer, cfg.max_len, **columns)
    return problems


class Step(NamedTuple):
    """The batch of one optimizer step: its micro-batches on this rank, and totals of all ranks."""

    parts: list  # this rank's micro-batches: (ids (B, T), mask (B, T)) each
    lengths: list[int]  # tokens of all rows, on all ranks
    n_trained: int  # response tokens of all rows, on all ranks


def make_step(rows: list, micro_tokens: int, pin: bool = False) -> Step:
    """The Step of these rows. pin: ids in page-locked memory, for asynchronous copies."""
    parts = []
    for _, ids, mask in data.micro_batches(rows, micro_tokens, ranks.rank(), ranks.world()):
        parts.append((ids.pin_memory() if pin else ids, mask))
    lengths = [len(row.prompt) + len(row.response) for row in rows]
    return Step(parts, lengths, sum(len(row.response) for row in rows))


def prepare_resume(cfg: Config, run: Run) -> None:
    """Apply a --keep that is now smaller, and warn where the schedule has ended."""
    if run.of_kind("val"):
        run.prune({diagnose(run).recommended_step})
    rate = optim.lr_at(run.first, run.last, cfg.lr, cfg.schedule, cfg.warmup)
    if run.resumed and rate < 0.02 * cfg.lr:
        print(  # not logged: a resumed run has the metrics of one that was never stopped
            f"hint: --schedule {cfg.schedule} has --lr {cfg.lr:g} down to {rate:.1e} where this "
            "run goes on, so the rest teaches next to nothing; "
            "give more --steps or --schedule constant",
        )


def show_plan(cfg: Config, train: data.Rows, tokenizer, folder: Path, device, steps: int) -> None:
    """The run in one line, the first row as the model sees it, and what it will take."""
    config = model_file.read_config(folder)
    lengths = train.lengths
    print(
        f"{steps} steps x {cfg.batch} = {steps * cfg.batch / len(train):.1f} epochs on "
        f"{ranks.world()} x {device}, validates every {cfg.eval_every} steps; "
        f"mean length {lengths.mean():.0f} tokens, longest {lengths.max()}"
    )
    prompt, (*response, eos) = train[0]
    end = tokenizer.backend.id_to_token(eos)
    print(
        f"first example: {len(prompt)} tokens read, {len(response) + 1} trained (marked >> <<):\n"
        f"  {tokenizer.decode(prompt)}>>{tokenizer.decode(response)}{end}<<\n",
        flush=True,
    )
    launch.show_memory(cfg, config, device)
    launch.show_disk(cfg, config, steps, cfg.optimizer)
    if cfg.dry_run:
        world = cfg.gpus or ranks.world()
        first = lengths[data.plan(len(train), cfg.seed, 0, cfg.batch)].tolist()
        n_parts = len(data.deal(first, cfg.micro_tokens, 0, world))
        print(
            f"first step: {sum(first):,} tokens in {n_parts} micro-batches on each of {world} "
            f"processes, {data.padding(first, cfg.micro_tokens):.1f}% padding\n"
            "prompt and response are tokenized apart; as one text, "
            f"{data.joint_mismatch(cfg.data, tokenizer):.1f}% of the rows would get other ids"
        )
        columns = tasks.columns(cfg.reward) | {"needs_gold": False}
        try:
            problems, _ = data.problems(cfg.data, tokenizer, cfg.max_len, **columns, most=1000)
        except UserError:  # plain text, or conversations that ask nothing
            problems = []
        policy = evaluate.Policy(None, tokenizer, tasks.load_reward(cfg.reward), cfg.max_new)
        print(scoring.check_demonstrations(problems, policy))


# ---- loss ----------------------------------------------------------------------------------------
def batch_loss(net, ids, mask, n_trained: int, alpha: float = 0.0) -> torch.Tensor:
    """Scalar: minus the summed log-prob of a micro-batch's response tokens, over the response
    tokens of the whole step (nats per token). alpha: see losses.imitation_loss.

    # differs: equation 10 of the paper sums over a response; ours is a mean over the step's tokens.
    """
    ids = ids.to(net.head.device, non_blocking=True)  # (B, T)
    if alpha == 0:  # all weights are 1: the logits are computed once
        return -model_file.response_logp_sum(net, ids, mask) / n_trained
    logp, _, _ = model_file.response_logp(net, ids, mask)  # (B, R), 0 where there is no token
    return losses.imitation_loss(logp, alpha).sum() / n_trained


@torch.no_grad()
def validation_loss(net, rows: list, micro_tokens: int) -> float:
    """Mean NLL over all response tokens of the validation set, nats per token, for any --loss."""
    batch = make_step(list(rows), micro_tokens)
    loss = 0.0
    for ids, mask in batch.parts:
        loss += batch_loss(net, ids, mask, batch.n_trained).item()
    return ranks.total(loss)


def validate(cfg: Config, run: Run, step: int, policy, val: list, problems: list) -> None:
    """Validation loss, the regime so far; on --problems pass@1 and what RL would find there. A val
    and an eval line."""
    loss = validation_loss(policy.net, val, cfg.micro_tokens)
    lines = {"val": {"val_loss": loss}}
    shown = ""
    if problems:
        sampling = policy.sampling(temperature=0.7, seed=ranks.seed_of(cfg.seed, "eval"))
        lines["eval"], records = evaluate.evaluate(policy, problems, 1, sampling)
        shown = f"  pass@1 {lines['eval']['pass1']:.1f} (se {lines['eval']['pass1_se']:.1f})"
        run.log_samples(step, records[:20])
        if cfg.samples:
            sampling = policy.sampling(cfg.temperature, ranks.seed_of(cfg.seed, "readiness"))
            few = problems[: cfg.sample_problems]
            lines["eval"] |= evaluate.readiness(policy, few, cfg.samples, sampling)
            found = estimates.readiness_of(lines["eval"], cfg.samples)
            shown += f"  {found.line(cfg.samples)}"
    run.log(step, **lines)
    found = diagnose(run)
    print(f"step {step:5d}  val loss {loss:.4f}  {regime_now(found)}{shown}", flush=True)
    run.prune({found.recommended_step})


def regime_now(found: phases.Diagnosis) -> str:
    """The regime of the last validation. The lowest loss so far is "stable" by definition, and
    until the loss is saturated nobody knows whether it is the minimum."""
    regime = found.regimes[-1]
    if regime != "stable" or found.saturated:
        return regime
    before = "stable" if "stable" in found.regimes[:-1] else "adaptive"
    return f"{before}, still improving"


def diagnose(run: Run) -> phases.Diagnosis:
    """Regimes, saturation and recommended checkpoint of the validations so far."""
    points = run.of_kind("val")
    steps = [point["step"] for point in points]
    return phases.diagnose(steps, [point["val_loss"] for point in points], saved=run.saved())


# ---- the script ----------------------------------------------------------------------------------
def main(cfg: Config) -> bool:
    """Train; False when a signal or --dry-run ended it early."""
    device = ranks.start()
    if not cfg.init:
        cfg = make_built_in(cfg)
    folder = evaluate.find_start(cfg)
    tokenizer = evaluate.open_tokenizer(folder)
    train, val = load_examples(cfg, tokenizer, cache_folder(cfg, folder))
    problems = load_problems(cfg, tokenizer)
    steps = cfg.steps or max(1, round(cfg.epochs * len(train) / cfg.batch))
    cfg = replace(cfg, eval_every=cfg.eval_every or max(1, steps // 10))
    show_plan(cfg, train, tokenizer, folder, device, steps)
    if cfg.dry_run:
        return False
    run = Run(cfg, steps, folder, val_set=data.digest(val))
    model, net, optimizers = evaluate.open_training(cfg, folder, tokenizer, device, run)
    policy = scoring.open_policy(cfg, tokenizer)
    policy.net = net
    prepare_resume(cfg, run)

    def prepare(position: int) -> Step:
        rows = [train[i] for i in data.plan(len(train), cfg.seed, position, cfg.batch)]
        return make_step(rows, cfg.micro_tokens, pin=device.type == "cuda")

    end = run.position + (steps - run.first) * cfg.batch  # rows taken when the run is over
    batches = data.prefetch(prepare, range(run.position, end, cfg.batch))

    for step in run.steps():
        run.checkpoint(step)
        if run.due(step, "val"):
            validate(cfg, run, step, policy, val, problems)
        if cfg.until and ranks.any_of(phases.reached(diagnose(run), cfg.until)):
            run.end(f"--until {cfg.until} is reached")
        if run.over(step):
            break

        clock = [time.monotonic()]  # where the parts of a step begin, see log_step
        batch = next(batches)  # made while the one before was trained
        clock.append(time.monotonic())
        loss = wide(torch.zeros((), device=device))
        for n, (ids, mask) in enumerate(batch.parts, 1):
            ranks.reduce_now(net, n == len(batch.parts))  # gradients: once per step
            part = batch_loss(net, ids, mask, batch.n_trained, cfg.alpha)
            part.backward()
            loss += part.detach()
        loss = ranks.add_up(loss).item()  # the host waits for the device here and for the norm
        clock.append(time.monotonic())

        lr = optim.lr_at(step, steps, cfg.lr, cfg.schedule, cfg.warmup)
        norm = optim.update(model, optimizers, lr, cfg.clip)
        ranks.refresh(net, model)  # net may be a bfloat16 copy of model
        run.watch(norm, step + 1)
        clock.append(time.monotonic())

        run.position += cfg.batch
        numbers = {"loss": loss, "grad_norm": norm, "lr": lr, "epoch": run.position / len(train)}
        log_step(cfg, run, step + 1, numbers, batch, clock)
    policy.close()
    finish(cfg, run)
    return not run.interrupted


def log_step(cfg: Config, run: Run, step: int, numbers: dict, batch: Step, clock: list) -> None:
    """The step's line in metrics.jsonl and, every --log-every steps, on the terminal.

    clock: 4 times: when data, forward and backward, and update began, and when the update ended.
    """
    work = flops.flops(run.model.config, batch.lengths, batch.n_trained)
    run.count(
        tokens=sum(batch.lengths),
        flops=3 * work.paper,  # a backward is two forwards
        flops_hw=3 * (work.blocks + work.head) + cfg.recompute * work.blocks,
    )
    spent = {}
    for name, began, ended in zip(("data_s", "train_s", "update_s"), clock, clock[1:]):
        spent[name] = round(ended - began, 4)
    run.log(step, train={**numbers, **spent})
    if step % cfg.log_every == 0:
        rate = run.totals["tokens"] / max(1e-9, run.seconds)
        print(
            f"step {step:5d}/{run.last}  loss {numbers['loss']:.4f}  "
            f"grad {numbers['grad_norm']:.2f}  lr {numbers['lr']:.1e}  "
            f"epoch {numbers['epoch']:.2f}  {rate:,.0f} tok/s  {run.eta(step)}",
            flush=True,
        )


def finish(cfg: Config, run: Run) -> None:
    """Where the run stands, which checkpoint RL should start from, and the next command."""
    if run.interrupted:
        print(f"stopped and saved. Go on with: {cli.again()}")
        return
    if Path(cfg.out) == BASE:
        return
    end = diagnose(run)
    passed = [f"{step} {regime}" for step, regime in zip(end.steps, end.regimes)]
    print(f"regimes: {'  '.join(passed)}")
    if end.recommended_step is not None:
        print(
            f"start RL from {run.folder(end.recommended_step)}: {end.reason}\n"
            f"next: torchrun rl.py --init {cfg.out}{tasks.flags_for(cfg, data='--data')}"
        )
    print(f"the run as a page: {ranks.from_first(lambda: page.write(cfg.out))}")


if __name__ == "__main__":
    cli.run(main, Config, preset)
