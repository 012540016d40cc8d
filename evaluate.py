"""Evaluate a checkpoint on a problem file: pass@1 with its standard error, mean of n, unbiased pass@k, samples on disk.

    python evaluate.py --init runs/rl                                        the built-in test problems
    python evaluate.py --init DIR --data test.jsonl --n 4 --temperature 0.7 --out eval.jsonl

    torchrun --nproc_per_node=8 -- evaluate.py --init DIR --n 4       several GPUs; without -- torchrun takes the --n

Choices: 1) pass@1 = the mean over problems of the share of right answers among n samples; its standard error is over
problems. 2) pass@k is Chen et al.'s unbiased estimate, 1 - C(n-c, k) / C(n, k) for c right of n. 3) The strict verdict
counts; the lenient one is printed beside it. 4) An answer that ran into --max-new without EOS counts as verified, as a
user would read it, and `truncated` says how many there were; training asks for EOS too. 5) Ctrl-C: the responses that
have ended are judged and written to --out, in the order of their problems. They are no sample: short ones end first.
"""

import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import model as model_file
import phases
import rollout
import verify
from core import cli, files, memory, ranks, run
from core.errors import UserError

BUILT_IN = Path("runs/countdown")  # where sft.py puts the built-in problems


@dataclass
class Config:
    init: str = "runs/rl"  # model folder, checkpoint, run directory or hub name
    data: str = (
        ""  # problems: .jsonl, .parquet or a folder of countdown.py; empty = the built-in test
    )
    out: str = ""  # one JSON line a sample goes here; empty = nowhere
    n: int = 4  # samples a problem
    temperature: float = 0.7  # 0 = greedy
    top_p: float = 1.0  # share of the probability that is sampled from
    top_k: int = 0  # draw from the likeliest so many tokens only; 0 = from all
    max_new: int = 8192  # tokens a response, at most
    max_prompt: int = 1024  # tokens a prompt; longer ones are dropped and counted
    limit: int = 0  # evaluate the first so many problems only; 0 = all
    rows: int = 512  # responses in flight at once
    seed: int = 0  # seed of the samples
    bf16: bool = False  # load the weights in bfloat16

    def __post_init__(self):
        cli.require_positive(self, "rows", "max_new", "max_prompt")
        if self.n < 1 or self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise UserError(
                f"--n {self.n} --temperature {self.temperature} --top-p {self.top_p} --top-k {self.top_k}"
                ": n >= 1, temperature >= 0, 0 < top-p <= 1, top-k >= 0"
            )
        if self.n > 1 and self.temperature == 0:
            raise UserError(
                f"--temperature 0 is greedy: {self.n} samples would be the same; use --n 1"
            )


def built_in(given: dict) -> Path | None:
    """The folder of built-in problems that a command line means: the default one without --data, or --data FOLDER
    where countdown.py wrote that folder (taken out of `given`, as a preset names the files in it)."""
    folder = Path(given.get("data", BUILT_IN))
    if "data" in given and not (folder / "countdown.json").exists():
        return None
    given.pop("data", None)
    return folder


def preset(given: dict) -> dict:
    """The built-in test set's own limits."""
    folder = built_in(given)
    return {"data": str(folder / "test.jsonl"), "max_new": 128} if folder else {}


def find(init: str, weights: bool = True) -> Path:
    """The model folder that --init means: itself, a run directory's checkpoint, or a hub model's local copy (without
    its weights, where only its shape and tokenizer are needed)."""
    folder = Path(init)
    if (folder / "metrics.jsonl").exists():
        name, why = ranks.from_first(lambda: pick_checkpoint(folder))  # it may still be written to
        folder = Path(name)
        print(f"{init} is a run: taking {folder.name}, {why}")
    elif not folder.exists():
        if folder.parts[:1] == ("runs",):
            raise UserError(
                f"{init}: there is no such run; `python sft.py` makes runs/sft, "
                "`python rl.py --init runs/sft` makes runs/rl"
            )
        folder = download(init, weights)
    return folder


def open_tokenizer(folder: Path) -> data.Tokenizer:
    """The folder's tokenizer, whose ids the folder's model must have."""
    tokenizer, size = data.Tokenizer(folder), model_file.read_config(folder).vocab_size
    if tokenizer.vocab_size > size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model {size}; "
            "they are not of one model: copy the tokenizer that the model was trained with"
        )
    return tokenizer


def open_trained(folder: Path, device, cfg, seed: int | None = None):
    """The folder's model in fp32 to be trained, sharded where several processes train; seed: with random weights."""
    config, shard = model_file.read_config(folder), None
    if ranks.world() > 1:
        sums_first = memory.sums_first(config, capacity(device))

        def shard(model):
            ranks.shard(model, cfg.bf16, cfg.offload, sums_first)

    if cfg.offload and not (shard and device.type == "cuda"):
        raise UserError(
            "--offload works with several processes on GPUs; leave it out, "
            "or start with torchrun --nproc_per_node=2 or more"
        )
    place = "cpu" if cfg.offload else device
    if seed is not None:
        return model_file.init_model(config, seed, place, shard)
    return model_file.load_model(folder, torch.float32, place, shard)


def open_frozen(folder: Path, device, cfg):
    """The folder's model for forwards only, in the type that it computes in, sharded as the trained one."""
    if ranks.world() > 1:
        return open_trained(folder, device, cfg).requires_grad_(False)
    return model_file.load_model(
        folder, torch.bfloat16 if cfg.bf16 else torch.float32, device
    ).requires_grad_(False)


def capacity(device) -> float:
    """Bytes of memory that a process has: its GPU's, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return (
        os.sysconf("SC_PAGE_SIZE")
        * os.sysconf("SC_PHYS_PAGES")
        / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    )


def show_memory(
    cfg, folder: Path, device, optimizer: str, micro_batches: int, slots: int = 0, reference=False
) -> None:
    """What a process will need, from the shapes: a line at the start of a run, a table under --dry-run, there for
    --gpus devices of 80 GB if given. slots (RL): tokens of a prompt and its response, at most."""
    config, world = model_file.read_config(folder), cfg.gpus or ranks.world()
    there, rows = 80e9 if cfg.gpus else capacity(device), 0

    def table(rows):
        return memory.table(
            config,
            world,
            cfg.micro_tokens,
            cfg.bf16,
            cfg.recompute,
            optimizer,
            cfg.offload,
            micro_batches > 1 and memory.sums_first(config, there),
            rows,
            slots,
            reference,
            cuda=bool(cfg.gpus) or device.type == "cuda",
        )

    if slots:  # the sampler takes fewer rows at a time where memory is short
        rows = min(cfg.rows, -(-cfg.gen_prompts // world) * cfg.group)
        *rest, cache = [part.bytes for part in table(1) if part.phase != "update"]
        rows = max(1, min(rows, int(0.8 * (there - sum(rest)) / cache)))
    parts = table(rows)
    if cfg.dry_run:
        print(f"memory of each of {world} processes:\n{memory.report(parts, there)}")
        return
    sizes = ", ".join(f"{part.name} {memory.text(part.bytes)}" for part in parts)
    print(
        f"memory of a process, estimated: {sizes}; at most {memory.text(memory.peak(parts))} of {memory.text(there)}",
        flush=True,
    )


def show_disk(cfg, folder: Path, steps: int, optimizer: str) -> None:
    """What the checkpoints of a run will take, beside what is free."""
    every = math.gcd(cfg.eval_every, cfg.save_every) if cfg.save_every else cfg.eval_every
    count, size = (
        -(-steps // every) + 1,
        memory.checkpoint_bytes(model_file.read_config(folder), cfg.bf16, optimizer),
    )
    count = (
        min(count, cfg.keep + 2) if cfg.keep else count
    )  # the newest and the best one stay in any case
    there = next(
        path for path in (Path(cfg.out), *Path(cfg.out).absolute().parents) if path.exists()
    )
    free = shutil.disk_usage(there).free
    print(
        f"checkpoints: at most {count} x {memory.text(size)} = {memory.text(count * size)} on disk, "
        f"{memory.text(free)} free" + ("; --keep N keeps fewer" if count * size > free else ""),
        flush=True,
    )


def pick_checkpoint(run_dir: Path) -> tuple[str, str]:
    """(checkpoint, why) of a run directory: an SFT run's recommended one (phases.py), any other run's newest."""
    steps = {
        int(f.name[5:]): f
        for f in sorted((run_dir / "checkpoints").glob("step_*[0-9]"))
        if not run.damaged(f)
    }
    if not steps:
        raise UserError(
            f"{run_dir}: no whole checkpoint in it yet; let the run reach its first one"
        )
    if any(
        row["kind"] == "val"
        for row in files.read_jsonl(run_dir / "metrics.jsonl", broken_tail=True)
    ):
        curve = phases.read_run(run_dir)
        found = phases.diagnose(curve.steps, curve.losses, curve.flops, steps)
        if found.recommended_step is not None:
            return str(steps[found.recommended_step]), found.reason
    return str(steps[max(steps)]), "its newest checkpoint"


def save_model(model, tokenizer, folder, dtype=torch.float32) -> None:
    """Write a Hugging Face model folder: weights, configuration and tokenizer. All processes call it."""
    model_file.save_model(model, folder, dtype)
    if ranks.rank() == 0:
        tokenizer.save(folder)


def download(name: str, weights: bool) -> Path:
    """The local folder of a hub model, downloaded if need be (configuration, tokenizer, safetensors; never pickles)."""
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise UserError(
            f"{name}: no such folder; --init takes a model folder, a checkpoint, a run directory "
            "or a hub name such as Qwen/Qwen2.5-0.5B"
        )
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.jinja"] + ["*.safetensors"] * weights
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # no network, no such model, no access
        reason = str(error).strip().splitlines()[0][:160]
        raise UserError(
            f"{name}: no such folder here, and the hub did not give it ({reason}); "
            "download it, then --init FOLDER"
        ) from None


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that any of k samples is right, estimated without bias from `right` of n (Chen et al. 2021, eq. 1)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def judge(problem, response, tokenizer) -> dict:
    """Decode and verify one response: a record as samples.jsonl keeps it."""
    text = tokenizer.decode(response.ids)
    verdict = verify.verify(problem.opened + text, problem.gold, problem.text)
    return {
        "problem": problem.text,
        "response": text,
        "gold": problem.gold,
        "answer": verdict.extracted,
        "reason": verdict.reason,
        "correct": verdict.correct,
        "lenient": verdict.lenient,
        "finished": response.finished,
        "truncated": not response.finished,
        "length": len(response.ids),
    }


def evaluate(
    model,
    tokenizer,
    problems,
    n: int,
    temperature: float,
    max_new: int,
    seed: int = 0,
    rows: int = 512,
    top_p: float = 1.0,
    progress=None,
    top_k: int = 0,
    on_response=None,
) -> tuple[dict, list[dict]]:
    """Sample, verify, summarise: (summary, one record a response). pass1, pass1_se, lenient, truncated in 0..100.
    progress, on_response: see rollout.generate()."""
    prompts = [p.prompt for p in problems]
    groups = rollout.generate(
        model,
        prompts,
        n,
        max_new,
        temperature,
        tokenizer.eos_ids,
        seed,
        rows,
        top_p,
        progress,
        top_k,
        on_response=on_response,
    )
    flat = [
        judge(problem, response, tokenizer)
        for problem, group in zip(problems, groups)
        for response in group
    ]
    P = len(problems)
    share = torch.tensor([r["correct"] for r in flat], dtype=torch.float64).view(P, n)
    spread = share.mean(1).std().item() if P > 1 else 0.0
    summary = {
        "pass1": 100 * share.mean().item(),
        "pass1_se": 100 * spread / math.sqrt(P),
        "n": len(flat),
        "problems": P,
        "lenient": 100 * sum(r["lenient"] for r in flat) / len(flat),
        "length": sum(r["length"] for r in flat) / len(flat),
        "truncated": 100 * sum(r["truncated"] for r in flat) / len(flat),
    }
    for k in (2**i for i in range(1, int(math.log2(n)) + 1)):
        summary[f"pass_at_{k}"] = (
            100 * sum(pass_at_k(n, int(c), k) for c in share.sum(1).tolist()) / P
        )
    return summary, flat


def show_progress(what: str):
    """A progress line on a terminal; nothing in a pipe."""
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    bar = tqdm(desc=what, unit="response", leave=False)

    def advance(done, total):
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return advance


def write_samples(path: str, records: list[dict]) -> None:
    """One JSON line a response, where a path was given; by the first process only."""
    if path and ranks.rank() == 0:
        Path(path).write_text(
            "".join(json.dumps(r) + "\n" for r in records)
        )  # in place: it may be /dev/stdout


def main(cfg: Config) -> None:
    device = ranks.start()
    if (
        cfg.out and ranks.rank() == 0
    ):  # a place that cannot be written to is found now, not after hours of sampling
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
        open(cfg.out, "a").close()
    folder = find(cfg.init)
    tokenizer = open_tokenizer(folder)
    model = model_file.load_model(folder, torch.bfloat16 if cfg.bf16 else torch.float32, device)
    problems, n_long = data.problems(cfg.data, tokenizer, cfg.max_prompt)
    problems = problems[: cfg.limit or None]
    print(
        f"{folder}: {len(problems)} problems of {cfg.data} x {cfg.n} samples at temperature {cfg.temperature}"
        + (f"; {n_long} prompts over {cfg.max_prompt} tokens left out" if n_long else ""),
        flush=True,
    )
    started = time.monotonic()
    seed, progress = ranks.seed_of(cfg.seed, "evaluate"), show_progress("sampling")
    ended: list[tuple] = []  # (number of the problem, response)
    try:
        summary, records = evaluate(
            model,
            tokenizer,
            problems,
            cfg.n,
            cfg.temperature,
            cfg.max_new,
            seed,
            cfg.rows,
            cfg.top_p,
            progress,
            cfg.top_k,
            lambda *one: ended.append(one),
        )
    except KeyboardInterrupt:
        records = [
            judge(problems[i], r, tokenizer) for i, r in sorted(ended, key=lambda one: one[0])
        ]
        write_samples(cfg.out, records)
        print(
            f"\nstopped with {len(records)} of {len(problems) * cfg.n} responses; "
            + (f"they are in {cfg.out}" if cfg.out else "--out FILE would have kept them"),
            file=sys.stderr,
        )
        sys.exit(130)
    write_samples(cfg.out, records)
    rest = "  ".join(
        f"{k.replace('pass_at_', 'pass@')} {v:.1f}"
        for k, v in summary.items()
        if k not in ("pass1", "pass1_se", "n", "problems")
    )
    print(
        f"pass@1 {summary['pass1']:.1f} (standard error {summary['pass1_se']:.1f})  {rest}  "
        f"in {time.monotonic() - started:.0f} s"
    )
    print(json.dumps({"init": str(folder), "data": cfg.data, **summary}))


if __name__ == "__main__":
    cli.cli(main, Config, preset)
