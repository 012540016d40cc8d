"""Peer of `bench parity`: losses and gradients of TRL's own trainers on given rows.

    python bench/peers/trl_parity.py --work FOLDER

Imports nothing of ours: it needs torch, transformers 5, trl, datasets and accelerate.
FOLDER has model/ (a model folder), moved.safetensors (the same weights, moved a little) and
work.json:

    prompts    [ids], responses [[ids]] and rewards [[number]], a list per prompt
    micro      rows per forward
    cases      {name: settings of GRPOConfig, or of SFTConfig where "trainer" is "sft"}

GRPOTrainer gets responses and rewards through its own rollout_func and reward_funcs, so that
advantages, normalisers, micro-batches and backward are its own. It makes two steps of one round
(num_iterations 2) with a learning rate of 0; after the first one the weights are replaced by the
moved ones, so that in the second step ratios differ from 1 and clips act. SFTTrainer makes one.
Gradients are read where the trainer is about to step, not clipped: FOLDER/CASE STEP.safetensors.
The last line printed is JSON: {"losses": {"CASE STEP": loss}, "trl": version}.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--work", required=True, type=Path)


def make_trainer(name: str, work: dict, model, tokenizer, callback):
    """The trainer of this case, ready to train."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    given = dict(work["cases"][name])
    is_sft = given.pop("trainer", "grpo") == "sft"
    pairs = []
    for prompt, group in zip(work["prompts"], work["responses"], strict=True):
        pairs += [(prompt, response) for response in group]
    common = dict(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=work["micro"],
        gradient_accumulation_steps=len(pairs) // work["micro"],
        learning_rate=0.0,
        weight_decay=0.0,
        max_grad_norm=0.0,  # gradients are left as they are
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
    shared = dict(model=model, processing_class=tokenizer, callbacks=[callback])
    if is_sft:
        columns = {
            "input_ids": [prompt + response for prompt, response in pairs],
            "completion_mask": [[0] * len(p) + [1] * len(r) for p, r in pairs],
        }
        settings = SFTConfig(**common, max_steps=1, completion_only_loss=True, **given)
        return SFTTrainer(args=settings, train_dataset=Dataset.from_dict(columns), **shared)

    rewards = {}
    for group, values in zip(work["responses"], work["rewards"], strict=True):
        rewards |= {tuple(ids): value for ids, value in zip(group, values, strict=True)}

    def rollout(prompts, trainer):
        """Every prompt comes once per response of its group."""
        numbers = [int(prompt) for prompt in prompts]
        waiting = {n: list(work["responses"][n]) for n in set(numbers)}
        return {
            "prompt_ids": [work["prompts"][n] for n in numbers],
            "completion_ids": [waiting[n].pop(0) for n in numbers],
            "logprobs": None,
        }

    def reward(completions, completion_ids, **_):
        return [rewards[tuple(ids)] for ids in completion_ids]

    settings = GRPOConfig(
        **common,
        max_steps=2,
        num_iterations=2,
        num_generations=len(work["responses"][0]),
        max_completion_length=work["max_new"],
        temperature=work["temperature"],
        **given,
    )
    numbers = [str(n) for n in range(len(work["prompts"]))]
    return GRPOTrainer(
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": numbers}),
        reward_funcs=reward,
        rollout_func=rollout,
        **shared,
    )


def run_case(name: str, work: dict, folder: Path, losses: dict) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="sdpa"
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "model" / "tokenizer.json"),
        eos_token="<eos>",
        pad_token="<eos>",
    )
    parts = []  # the loss of each micro-batch of the step

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **_):
            step = f"{name} {state.global_step + 1}"
            losses[step] = sum(parts)
            parts.clear()
            found = {key: p.grad.contiguous() for key, p in model.named_parameters()}
            save_file(found, folder / f"{step}.safetensors")

        def on_step_end(self, args, state, control, **_):
            moved = load_file(folder / "moved.safetensors")
            with torch.no_grad():
                for key, p in model.named_parameters():
                    p.copy_(moved[key])

    trainer = make_trainer(name, work, model, tokenizer, Watch())
    compute_loss = trainer.compute_loss

    def noted(*given, **named):
        loss = compute_loss(*given, **named)
        parts.append(loss.item())
        return loss

    trainer.compute_loss = noted
    trainer.train()


def main(args) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    import torch
    import trl

    torch.set_num_threads(1)
    work = json.loads((args.work / "work.json").read_text())
    losses = {}
    for name in work["cases"]:
        run_case(name, work, args.work, losses)
    print(json.dumps({"losses": losses, "trl": trl.__version__}))


if __name__ == "__main__":
    main(parser.parse_args())
