"""Peer of `bench.py rl`: TRL's GRPOTrainer on the same prompts, with transformers as its sampler. Imports nothing of
ours, so that it runs in any environment with torch, transformers 5, trl, datasets and accelerate.

    python peers/grpo_trl.py --model FOLDER --work work.json --group 8 --max-new 128 --micro 16 --threads 1

work.json: {"prompts": [text], "per_step": prompts a step}; the first step is warm-up and not counted. A step is one
round of sampling and one optimizer step over it, `micro` rows a forward; no KL term. The reward is the share of even
tokens: it differs between rows and costs nothing.
The last line printed is JSON: seconds, cpu_seconds, tokens (of responses), peak_mb; sample_s, update_s (the rest).
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
parser.add_argument("--group", type=int, default=8, help="responses a prompt")
parser.add_argument(
    "--max-new", type=int, default=128, help="tokens a response: EOS does not end one"
)
parser.add_argument("--micro", type=int, default=16, help="rows a forward")
parser.add_argument(
    "--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast over fp32 weights"
)
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
    marks, count, n_rows = [], {"tokens": 0, "sample_s": 0.0}, work["per_step"] * args.group

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
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=f"{args.model}/tokenizer.json", eos_token="<eos>", pad_token="<eos>"
    )  # AutoTokenizer would take the family's own, and its regex
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
        gradient_checkpointing=False,
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
    sample = trainer._generate_single_turn  # the one place where TRL samples: no public name for it

    def timed(*rest, **named):
        started = time.perf_counter()
        out = sample(*rest, **named)
        count["sample_s"] += time.perf_counter() - started
        return out

    trainer._generate_single_turn = timed
    trainer.train()
    first, *_, last = marks
    done = {key: last[2][key] - first[2][key] for key in count}
    seconds = last[0] - first[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**20
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu_seconds": last[1] - first[1],
                "peak_mb": peak,
                **done,
                "update_s": seconds - done["sample_s"],
            }
        )
    )


if __name__ == "__main__":
    main(parser.parse_args())
