"""Peer of `bench rl`: TRL's GRPOTrainer on the same prompts, with transformers as its sampler.

    python bench/peers/grpo_trl.py --model FOLDER --work work.json --group 8 --micro 16

Imports nothing of ours: it needs torch, transformers 5, trl, datasets and accelerate.
work.json: {"prompts": [text], "per_step": prompts per step}; the first step is warm-up and not
counted. A step is one round of sampling and one optimizer step over it, `micro` rows per forward;
no KL term. The reward is the share of even tokens: it differs between rows and costs nothing.
The last line printed is JSON: seconds, cpu_seconds, tokens (of responses), peak_mb, sample_s,
update_s (the rest).
"""

import argparse
import json
import os
import resource
import tempfile
import time

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--model", required=True)
parser.add_argument("--work", required=True)
parser.add_argument("--group", type=int, default=8, help="responses per prompt")
parser.add_argument("--max-new", type=int, default=128, help="tokens per response, EOS ignored")
parser.add_argument("--micro", type=int, default=16, help="rows per forward")
parser.add_argument(
    "--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast over fp32 weights"
)
parser.add_argument("--checkpointing", action="store_true")
parser.add_argument("--lr", type=float, default=1e-6)
parser.add_argument("--threads", type=int, default=1)


def spent() -> tuple[float, float]:
    """(wall, CPU) seconds of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), usage.ru_utime + usage.ru_stime


def main(args) -> None:
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(args.threads)
    with open(args.work) as file:
        work = json.load(file)
    marks = []  # (wall, CPU, counts) at the end of each step
    count = {"tokens": 0, "sample_s": 0.0}
    n_rows = work["per_step"] * args.group

    def share_of_even(completions, completion_ids=None, **_):
        count["tokens"] += sum(map(len, completion_ids))
        return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]

    class Marks(TrainerCallback):
        def on_step_end(self, settings, state, control, **_):
            marks.append((*spent(), dict(count)))

    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.generation_config.eos_token_id = None
    # not AutoTokenizer: it would take the family's own, and its regex
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=f"{args.model}/tokenizer.json", eos_token="<eos>", pad_token="<eos>"
    )
    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=args.micro,
        gradient_accumulation_steps=n_rows // args.micro,
        num_generations=args.group,
        num_iterations=1,
        beta=0.0,
        max_completion_length=args.max_new,
        generation_kwargs={"eos_token_id": None},
        temperature=1.0,
        max_steps=len(work["prompts"]) // work["per_step"],
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        bf16=args.dtype == "bf16",
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=args.checkpointing,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        seed=0,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=share_of_even,
        args=settings,
        callbacks=[Marks()],
        train_dataset=Dataset.from_dict({"prompt": work["prompts"]}),
        processing_class=tokenizer,
    )
    sample = trainer._generate_single_turn  # where TRL samples; it has no public name

    def timed(*rest, **named):
        started = time.perf_counter()
        out = sample(*rest, **named)
        count["sample_s"] += time.perf_counter() - started
        return out

    trainer._generate_single_turn = timed
    trainer.train()
    wall, cpu, before = marks[0]
    wall_end, cpu_end, after = marks[-1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**20
    sample_s = after["sample_s"] - before["sample_s"]
    found = {
        "seconds": wall_end - wall,
        "cpu_seconds": cpu_end - cpu,
        "peak_mb": peak,
        "tokens": after["tokens"] - before["tokens"],
        "sample_s": sample_s,
        "update_s": wall_end - wall - sample_s,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(parser.parse_args())
