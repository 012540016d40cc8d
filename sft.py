"""Supervised fine-tuning on expert trajectories, through the regimes of its validation loss.

    torchrun sft.py                                    built-in problems, tiny model, no download -> runs/sft
    torchrun sft.py --init Qwen/Qwen2.5-0.5B --data train.jsonl --val val.jsonl --out runs/q

One batch, end to end: plan() picks the rows of the step -> cut() makes micro-batches of like length -> hidden (B, T, D)
-> log-probs of the response tokens -> minus their sum over the number of response tokens of the WHOLE step -> backward
-> clip -> AdamW. Every --eval-every steps: save, validate, name the regime (phases.py): adaptive, stable, mild, severe.
Start RL from the minimum.

Choices: 1) The loss is a mean over all response tokens of the optimizer step, however the step is cut (the paper's code
averages micro-batch means). 2) Only responses and their EOS are trained; prompts are read. 3) The built-in task keeps
its learning rate constant, so that no schedule imitates saturation; real models default to the paper's cosine.
4) Without --init a tiny base model is made first, once, by this same file on plain text (runs/base).
Shapes: B rows, T tokens, D model width. Losses in nats a token; compute in FLOPs.
"""

import hashlib
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

import data
import evaluate
import model as model_file
import phases
from core import cli, files, optim, ranks, run
from core.errors import UserError
from tasks import countdown

BASE = Path("runs/base")
TINY = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


@dataclass
class Config:
    init: str = ""  # model folder, checkpoint, run directory or hub name; empty = the built-in base
    data: str = ""  # trajectories: .jsonl, .parquet or a folder of countdown.py; empty = built-in
    val: str = (
        ""  # validation trajectories; empty = 199 rows (10% if under 1,990) held out of --data
    )
    problems: str = ""  # problems to sample answers for at each validation; empty = none
    out: str = "runs/sft"  # run directory
    overwrite: bool = False  # delete an earlier run in --out
    resume: bool = False  # go on from the newest checkpoint in --out
    dry_run: bool = False  # show model, data and plan, then stop
    from_scratch: bool = False  # random weights: take only config.json and tokenizer from --init
    steps: int = 0  # optimizer steps; 0 = --epochs
    epochs: float = 8.0  # passes over the data
    batch: int = 512  # trajectories an optimizer step
    micro_tokens: int = 16384  # tokens a micro-batch, padding included
    max_len: int = 16384  # tokens an example; longer ones are dropped and counted
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: Muon on the matrices, AdamW on the rest
    lr: float = 1e-5  # learning rate
    schedule: Literal["cosine", "constant"] = "cosine"  # after warm-up
    warmup: float = 0.1  # share of the steps with a rising learning rate
    weight_decay: float = 0.01  # decoupled, as AdamW
    clip: float = 1.0  # largest gradient norm
    bf16: bool = False  # compute in bfloat16; weights, gradients and optimizer stay fp32
    recompute: bool = (
        True  # keep no activations inside a block for the backward: less memory, 4/3 of the work
    )
    compile: bool = False  # torch.compile each block: a minute or two at first, then faster steps
    offload: bool = False  # several GPUs: weights and optimizer state wait in the CPU's memory
    gpus: int = 0  # of --dry-run: show the memory for so many; 0 = the processes there are
    seed: int = 0  # order of the data
    save_every: int = 0  # steps between checkpoints besides the validated ones; 0 = none
    log_every: int = 1  # steps between printed lines; metrics.jsonl has every step
    eval_every: int = 360  # steps between validations; each is saved
    keep: int = 0  # checkpoints to keep; 0 = all. The newest and the minimum-loss one always stay
    until: Literal["", "stable", "mild", "severe"] = ""  # stop once this regime is reached for good
    max_new: int = 1024  # tokens a response when sampling --problems

    def __post_init__(self):
        cli.require_positive(
            self,
            "batch",
            "micro_tokens",
            "max_len",
            "eval_every",
            "log_every",
            "epochs",
            "lr",
            "clip",
            "max_new",
        )
        if self.steps < 0:
            raise UserError(f"--steps is {self.steps}; give a number of steps, or 0 for --epochs")


def preset(given: dict) -> dict:
    """What the built-in task uses instead of the defaults for real models."""
    folder = evaluate.built_in(given)
    if folder is None:
        if "init" not in given:
            raise UserError(
                f"--data {given['data']} needs --init: a model folder or a hub name to start from"
            )
        return {}
    return {
        "data": f"{folder}/train.jsonl",
        "val": f"{folder}/val.jsonl",
        "problems": f"{folder}/eval.jsonl",
        "steps": 0 if "epochs" in given else 1000,
        "batch": 32,
        "micro_tokens": 4096,
        "max_len": 256,
        "max_new": 128,
        "optimizer": "muon",
        "lr": 2e-3,
        "schedule": "constant",
        "warmup": 0.0,
        "eval_every": 100,
        "log_every": 25,
        "recompute": False,
    }


def base_config() -> Config:
    """The run that makes the tiny base model: plain text, random start."""
    folder = evaluate.BUILT_IN
    return replace(
        Config(**preset({})),
        init=str(folder),
        data=f"{folder}/base.jsonl",
        val="",
        problems="",
        out=str(BASE),
        from_scratch=True,
        steps=704,
        lr=3e-3,
        eval_every=352,
        keep=1,
        resume=BASE.exists(),
    )


def write_built_in(folder: Path) -> None:
    countdown.write(folder)
    words = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    files.write_json(folder / "config.json", {**TINY, "vocab_size": words})


def make_built_in(cfg: Config) -> Config:
    """Write the built-in problems and train the tiny base model, each once; returns cfg with the base as its init."""
    folder = evaluate.BUILT_IN
    if not ranks.from_first(lambda: (folder / "countdown.json").exists()):
        print(f"writing the built-in problems and expert trajectories to {folder}", flush=True)
        ranks.from_first(lambda: write_built_in(folder))
    if not (BASE / "checkpoints" / f"step_{base_config().steps:06d}").exists():
        print(
            f"no base model in {BASE}: making it once, from plain text (about a minute)", flush=True
        )
        if not main(base_config()):
            raise SystemExit(0)  # Ctrl-C: the base is saved and will be resumed
        print(f"the base model is made; now SFT -> {cfg.out}\n", flush=True)
    return replace(cfg, init=str(BASE))


# ----------------------------------------------------------------------------------------------------------------- data
def load_examples(cfg: Config, tokenizer) -> tuple[list, list, str]:
    """(training examples, validation examples, hash of the validation set)."""
    train, n_long = data.sft_examples(cfg.data, tokenizer, cfg.max_len, reads=("numbers",))
    if cfg.val:
        val, n_long_val = data.sft_examples(cfg.val, tokenizer, cfg.max_len, reads=("numbers",))
    else:
        n_val, n_long_val = min(199, max(1, len(train) // 10)), 0
        held_out = set(
            data.plan(len(train), ranks.seed_of("held out"), 0, n_val)
        )  # the same rows whatever --seed is
        val = [train[i] for i in sorted(held_out)]
        train = [row for i, row in enumerate(train) if i not in held_out] or val
        print(f"no --val: {n_val} rows of {cfg.data} held out for validation")
    print(
        f"{len(train)} training and {len(val)} validation examples; "
        f"{n_long + n_long_val} over {cfg.max_len} tokens dropped",
        flush=True,
    )
    digest = hashlib.sha256(repr([tuple(map(tuple, row)) for row in val]).encode()).hexdigest()[:16]
    return train, val, digest


def show_example(example, tokenizer) -> None:
    """The first row as the model sees it, the trained part between >> and <<."""
    print(
        f"first example: {len(example.prompt)} tokens read, {len(example.response)} trained (marked >> <<):"
    )
    *response, eos = example.response
    print(
        f"  {tokenizer.decode(example.prompt)}>>{tokenizer.decode(response)}{tokenizer.backend.id_to_token(eos)}<<\n",
        flush=True,
    )


# ---------------------------------------------------------------------------------------------------------------- maths
def batch_loss(net, batch, denominator: int, device) -> torch.Tensor:
    """Scalar: minus the summed log-prob of the response tokens of a micro-batch, over `denominator` (nats a token).

    # differs: equation 10 of the paper sums over a response; ours is a mean over all tokens of the step."""
    ids, mask = batch  # (B, T), (B, T)
    return -model_file.response_logp_sum(net, ids.to(device, non_blocking=True), mask) / denominator


def micro_batches(rows, micro_tokens: int, pin: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This process's share of the rows, as (ids, mask) of like length; every process gets as many."""
    parts = data.deal(
        [len(r.prompt) + len(r.response) for r in rows], micro_tokens, ranks.rank(), ranks.world()
    )
    batches = [data.collate([rows[i] for i in part]) for part in parts]
    return [(ids.pin_memory(), mask) for ids, mask in batches] if pin else batches


@torch.no_grad()
def validation_loss(net, rows, micro_tokens: int, device) -> float:
    """Mean loss over all response tokens of the validation set, nats a token."""
    n_tokens = sum(len(r.response) for r in rows)
    return ranks.totals(
        sum(
            batch_loss(net, batch, n_tokens, device).item()
            for batch in micro_batches(rows, micro_tokens, False)
        )
    )[0]


def train_step(
    cfg: Config, net, model, optimizers, batches, n_trained: int, lr: float, device
) -> dict:
    """One optimizer step over these micro-batches; its numbers for the log, the loss in nats a token."""
    began, total = time.monotonic(), torch.zeros((), dtype=torch.float64, device=device)
    for n, batch in enumerate(batches, 1):
        ranks.reduce_now(net, n == len(batches))
        loss = batch_loss(net, batch, n_trained, device)
        loss.backward()
        total += loss.detach()
    loss = ranks.add_up(total).item()  # the step's one wait for the device, but for the norm
    trained = time.monotonic()
    norm = optim.update(model, optimizers, lr, cfg.clip)
    ranks.refresh(net, model)
    return {
        "loss": loss,
        "grad_norm": norm,
        "lr": lr,
        "train_s": round(trained - began, 4),
        "update_s": round(time.monotonic() - trained, 4),
        **run.peak_memory(device),
    }


# ----------------------------------------------------------------------------------------------------------------- main
def validate(cfg, book, step, net, tokenizer, val, problems, device, totals) -> None:
    """Validation loss, the regime it is in so far, and pass@1 on --problems; logged as a val and an eval line."""
    lines = {"val": {**totals, "val_loss": validation_loss(net, val, cfg.micro_tokens, device)}}
    shown = ""
    if problems:
        seed = ranks.seed_of(cfg.seed, "eval")
        summary, records = evaluate.evaluate(net, tokenizer, problems, 1, 0.7, cfg.max_new, seed)
        lines["eval"] = {**totals, **summary}
        shown = f"  pass@1 {summary['pass1']:.1f} (se {summary['pass1_se']:.1f})"
        book.log_samples(step, records[:20])
    book.log_together(step, lines)
    found = diagnose(book)
    regime = found.regimes[-1]
    if (
        regime == "stable" and not found.saturated
    ):  # the lowest so far is Stable by definition; is it a minimum yet?
        regime = (
            "adaptive" if "stable" not in found.regimes[:-1] else "stable"
        ) + ", still improving"
    print(f"step {step:5d}  val loss {lines['val']['val_loss']:.4f}  {regime}{shown}", flush=True)


def diagnose(book) -> phases.Diagnosis:
    """Regimes, saturation and recommended checkpoint of the validations so far."""
    points = book.of_kind("val")
    saved = {int(folder.name[5:]) for folder in book.checkpoints.glob("step_*[0-9]")}
    return phases.diagnose(
        [p["step"] for p in points], [p["val_loss"] for p in points], saved=saved
    )


def main(cfg: Config) -> bool:
    """Train; False when a signal or --dry-run ended it early."""
    device = ranks.start()
    if not cfg.init:
        cfg = make_built_in(cfg)
    folder = evaluate.find(cfg.init, not cfg.dry_run)
    tokenizer = evaluate.open_tokenizer(folder)
    train, val, val_set = load_examples(cfg, tokenizer)
    problems = data.problems(cfg.problems, tokenizer, cfg.max_len, reads=("numbers",))[0] if cfg.problems else []
    steps = cfg.steps or max(1, round(cfg.epochs * len(train) / cfg.batch))
    lengths = [len(r.prompt) + len(r.response) for r in train]
    print(
        f"{steps} steps x {cfg.batch} = {steps * cfg.batch / len(train):.1f} epochs on {ranks.world()} x {device}; "
        f"mean length {sum(lengths) / len(lengths):.0f} tokens, longest {max(lengths)}"
    )
    show_example(train[0], tokenizer)
    first = [lengths[i] for i in data.plan(len(train), cfg.seed, 0, cfg.batch)]
    parts = data.deal(first, cfg.micro_tokens, 0, cfg.gpus or ranks.world())
    evaluate.show_memory(cfg, folder, device, cfg.optimizer, len(parts))
    evaluate.show_disk(cfg, folder, steps, cfg.optimizer)
    if cfg.dry_run:
        print(
            f"first step: {sum(first):,} tokens in {len(parts)} micro-batches on each of {cfg.gpus or ranks.world()} "
            f"processes, {data.padding(first, cfg.micro_tokens):.1f}% padding"
        )
        print(
            f"tokenizing prompt and response as one text would change the ids of "
            f"{data.joint_mismatch(cfg.data, tokenizer):.1f}% of the rows"
        )
        return False
    model = evaluate.open_trained(folder, device, cfg, cfg.seed if cfg.from_scratch else None)
    net = ranks.compute(model, cfg.bf16, cfg.recompute, cfg.compile)
    optimizers = optim.make_optimizers(model, cfg.optimizer, cfg.lr, weight_decay=cfg.weight_decay)
    book = run.Run(cfg, cfg.resume, cfg.overwrite, val_set=val_set, base=cfg.init)
    totals, start, stop = {"tokens": 0, "flops": 0.0, "flops_hw": 0.0}, 0, run.catch_signals()
    if book.resumed:
        state = book.load(model, optimizers)
        ranks.refresh(net, model)
        start, totals = state["step"], {k: state[k] for k in totals}
        if start > steps:
            raise UserError(
                f"{cfg.out} is at step {start} already, beyond the {steps} asked for; give more --steps"
            )
        print(f"resuming {cfg.out} after step {start}", flush=True)

    def save(step):
        dtype = torch.bfloat16 if cfg.bf16 else torch.float32
        return book.save(
            step,
            lambda to: evaluate.save_model(model, tokenizer, to, dtype),
            model,
            optimizers,
            **totals,
            seed=cfg.seed,
        )

    def prepare(step):
        rows = [train[i] for i in data.plan(len(train), cfg.seed, step * cfg.batch, cfg.batch)]
        return rows, micro_batches(rows, cfg.micro_tokens, device.type == "cuda")

    coming = data.prefetch(prepare, range(start, steps))
    for step in range(start, steps + 1):
        stopping = ranks.any_of(stop)
        if step % cfg.eval_every == 0 or step == steps:
            save(step)
            if not any(row["step"] == step for row in book.of_kind("val")):
                validate(cfg, book, step, net, tokenizer, val, problems, device, totals)
                book.prune(cfg.keep, {diagnose(book).recommended_step})
            if cfg.until and ranks.any_of(phases.reached(diagnose(book), cfg.until)):
                print(f"--until {cfg.until}: reached at step {step}")
                break
        elif stopping or (cfg.save_every and step % cfg.save_every == 0):
            save(step)
        if step == steps or stopping:
            break
        began = time.monotonic()
        rows, batches = next(coming)
        waited = time.monotonic() - began
        sizes = [len(r.prompt) + len(r.response) for r in rows]
        lr = optim.lr_at(step, steps, cfg.lr, cfg.schedule, cfg.warmup)
        n_trained = sum(len(r.response) for r in rows)
        done = train_step(cfg, net, model, optimizers, batches, n_trained, lr, device)
        book.watch(done["grad_norm"], step + 1)
        passes = 4 if cfg.recompute else 3  # a backward is two forwards
        totals = {
            "tokens": totals["tokens"] + sum(sizes),
            "flops": totals["flops"] + 3 * model_file.forward_flops(model.config, sizes),
            "flops_hw": totals["flops_hw"]
            + passes * model_file.hardware_flops(model.config, sizes),
        }
        epoch = (step + 1) * cfg.batch / len(train)
        book.log(step + 1, "train", **totals, **done, epoch=epoch, data_s=round(waited, 4))
        if (step + 1) % cfg.log_every == 0:
            print(
                f"step {step + 1:5d}/{steps}  loss {done['loss']:.4f}  grad {done['grad_norm']:.2f}  lr {lr:.1e}  "
                f"epoch {epoch:.2f}  {totals['tokens'] / max(1e-9, book.seconds):,.0f} tok/s  "
                f"{book.eta(step + 1, steps)}",
                flush=True,
            )
    finish(cfg, book, stopping)
    return not stopping


def finish(cfg: Config, book, stopped: bool) -> None:
    """Where the run stands, which checkpoint RL should start from, and the next command to type."""
    if stopped:
        print(f"stopped and saved. Go on with: {run.again()}")
        return
    if Path(cfg.out) == BASE:
        return
    end = diagnose(book)
    print("regimes: " + "  ".join(f"{s} {r}" for s, r in zip(end.steps, end.regimes)))
    if end.recommended_step is not None:
        print(
            f"start RL from {book.path(end.recommended_step)}: {end.reason}\nnext: torchrun rl.py --init {cfg.out}"
        )


if __name__ == "__main__":
    cli.cli(main, Config, preset)
