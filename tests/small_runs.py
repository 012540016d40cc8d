"""Tiny problems, models and runs that several test files use; conftest.py has their fixtures."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

import data
import evaluate
import losses
import model as model_file
import rl
import sft
import tasks
from core import ranks
from tasks import countdown

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
ALGOS = ("grpo", "dapo", "luffy", "srft", "upt", "prefix_rft")
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}

SMALL = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


# ---- folders -------------------------------------------------------------------------------------
def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_small_task(folder: Path) -> Path:
    """Few Countdown problems and trajectories, their tokenizer, a random model of 30,000 weights.

    mixed.jsonl: problems that carry a demonstration.
    """
    sizes = countdown.Config(trajectories=200, val=40, rl=100, test=20, base=40)
    countdown.write(folder, sizes)
    words = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    (folder / "config.json").write_text(json.dumps({**SMALL, "vocab_size": words}))
    net = model_file.init_model(model_file.read_config(folder), 0)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim == 2:
                p.mul_(8)  # logits with spread: a wrong position shows
    model_file.save_model(net, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    write_jsonl(folder / "mixed.jsonl", data.read_rows(folder / "train.jsonl")[:40])
    return folder


def boxed(number: int, answer: int) -> str:
    return f"<think> {number} = {number} </think> \\boxed{{ {answer} }}"


def write_coin(folder: Path, small_task: Path) -> Path:
    """A model that answers 1 or 2 about equally often, and problems whose answer is 1: groups with
    right and wrong answers from the start."""
    trajectories = []
    problems = []
    for n in range(40):
        prompt = f"Make {n} ->"
        for answer in (1, 2):
            trajectories.append({"prompt": prompt, "response": boxed(n, answer)})
        problems.append({"prompt": prompt, "answer": "1", "response": boxed(n, 1)})
    write_jsonl(folder / "mixed.jsonl", problems)
    write_jsonl(folder / "eval.jsonl", problems)
    path = write_jsonl(folder / "sft.jsonl", trajectories)
    out = folder / "run"
    sft.main(sft_config(small_task, out, data=path, val=path, steps=60, eval_every=60))
    for file in (out / "checkpoints" / "step_000060").iterdir():
        if file.is_file():
            shutil.copy2(file, folder)
    shutil.rmtree(out)
    return folder


# ---- runs ----------------------------------------------------------------------------------------
def sft_config(folder, out, **changes) -> sft.Config:
    cfg = sft.Config(
        init=str(folder),
        data=f"{folder}/train.jsonl",
        val=f"{folder}/val.jsonl",
        out=str(out),
        steps=6,
        batch=16,
        micro_tokens=1024,
        max_len=256,
        optimizer="muon",
        lr=5e-3,
        schedule="constant",
        warmup=0.0,
        eval_every=3,
    )
    return replace(cfg, **changes)


def rl_config(folder, out, **changes) -> rl.Config:
    """An RL run; problems of write_small_task need reward="countdown"."""
    cfg = rl.Config(
        init=str(folder),
        data=f"{folder}/mixed.jsonl",
        val=f"{folder}/eval.jsonl",
        out=str(out),
        algo="grpo",
        steps=4,
        prompts=4,
        update_prompts=2,
        group=4,
        max_new=24,
        temperature=1.0,
        lr=1e-3,
        micro_tokens=512,
        eval_every=2,
        eval_n=2,
    )
    return replace(cfg, **changes)


def weights_of(out, step: int) -> dict:
    return load_file(Path(out) / "checkpoints" / f"step_{step:06d}" / "model.safetensors")


def lines_of(out, kind: str = "") -> list[dict]:
    """metrics.jsonl, or its lines of one kind, without the wall times."""
    lines = []
    for line in (Path(out) / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        timed = [name for name in row if name == "seconds" or name.endswith("_s")]
        for name in timed:
            del row[name]
        if kind in ("", row["kind"]):
            lines.append(row)
    return lines


def lose_checkpoint(out, step: int) -> None:
    """As if the run had been killed while it wrote this one."""
    path = Path(out) / "checkpoints" / f"step_{step:06d}"
    path.rename(path.with_suffix(".tmp"))


def policy_of(folder: Path, reward: str = "countdown") -> evaluate.Policy:
    """The folder's model in fp32, its tokenizer, and a reward by name."""
    tokenizer = evaluate.open_tokenizer(folder)
    net = model_file.load_model(folder)
    return evaluate.Policy(net, tokenizer, tasks.load_reward(reward), max_new=24)


def flat_gradient(model) -> torch.Tensor:
    """All gradients as one long vector; the model's are zero afterwards."""
    found = torch.cat([ranks.whole(p.grad).flatten() for p in model.parameters()])
    model.zero_grad()
    return found


def groups_for(algo: str, policy, problems: list) -> list[list[losses.Row]]:
    """Hand-made groups with right and wrong rollouts, some cut, some with an expert or a copied
    prefix."""
    groups = []
    for number, problem in enumerate(problems[:4]):
        rows = []
        for i in range(4):
            response = problem.expert[: 6 + 3 * i] if i else problem.expert[::-1]
            row = losses.Row(
                prompt=problem.prompt,
                response=response,
                logp=[-0.5] * len(response),
                correct=float(i % 2),
                reward=float(i % 2),
                group=number,
                n_prefix=3 if algo == "prefix_rft" and i == 3 else 0,
                finished=i != 2,
            )
            rows.append(row)
        if algo in ("luffy", "srft", "upt"):
            rows += rl.expert_rows(rl.Config(), policy, {number: problem}).values()
        groups.append(rows)
    return groups
