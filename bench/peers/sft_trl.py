"""Peer of `bench sft`: the same rows through TRL's SFTTrainer, or a plain loop over transformers.

    python bench/peers/sft_trl.py --model FOLDER --work work.json --mode pack --micro 8

Imports nothing of ours: it needs torch and transformers 5, and for TRL trl, datasets, accelerate.
work.json: {"rows": [[ids]], "per_step": rows per optimizer step, "seq": longest row}; the first
step is warm-up and not counted.
pack      SFTTrainer, packing on: rows of seq tokens, as many per step as hold per_step rows
nopack    SFTTrainer, packing off
loop      micro-batches padded on the right, loss.backward(), AdamW, nothing else
The last line printed is JSON: seconds, cpu_seconds, tokens (padding left out), slots (padding
included), peak_mb.
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
parser.add_argument("--mode", choices=["pack", "nopack", "loop"], default="pack")
parser.add_argument("--micro", type=int, default=8, help="rows per forward")
parser.add_argument(
    "--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast over fp32 weights"
)
parser.add_argument("--checkpointing", action="store_true")
parser.add_argument("--lr", type=float, default=1e-4)
parser.add_argument("--threads", type=int, default=1)


def spent() -> tuple[float, float]:
    """(wall, CPU) seconds of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), usage.ru_utime + usage.ru_stime


def plain_loop(model, work: dict, args) -> dict:
    """One optimizer step per per_step rows, `micro` rows a forward in the order of the data."""
    import torch

    device = model.device
    marks = []  # (wall, CPU) at the end of each step
    tokens = 0
    slots = 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    for first in range(0, len(work["rows"]), work["per_step"]):
        step = work["rows"][first : first + work["per_step"]]
        n_trained = sum(len(row) - 1 for row in step)
        for i in range(0, len(step), args.micro):
            part = step[i : i + args.micro]
            width = max(map(len, part))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in part], device=device)
            lengths = torch.tensor([len(row) for row in part], device=device)
            seen = torch.arange(width, device=device) < lengths[:, None]
            with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
                loss = model(
                    input_ids=ids,
                    attention_mask=seen.long(),
                    labels=ids.masked_fill(~seen, -100),
                    num_items_in_batch=n_trained,
                    use_cache=False,
                ).loss
            loss.backward()
            if first > 0:
                tokens += int(seen.sum())
                slots += ids.numel()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        marks.append(spent())
    return {"marks": marks, "tokens": tokens, "slots": slots}


def with_trl(model, work: dict, args) -> dict:
    """SFTTrainer over tokenized rows; tokens are counted in the batches that reach the model."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    marks = []  # (wall, CPU, counts) at the end of each step
    count = {"tokens": 0, "slots": 0}
    packing = args.mode == "pack"
    per_step = work["per_step"]
    n_steps = len(work["rows"]) // per_step
    if packing:  # as many packed rows per step as hold the tokens of the other modes
        n_tokens = sum(map(len, work["rows"]))
        per_step = max(1, round(n_tokens / n_steps / work["seq"]))
    micro = min(args.micro, per_step)

    class Marks(TrainerCallback):
        def on_step_end(self, settings, state, control, **_):
            marks.append((*spent(), dict(count)))

    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=per_step // micro,
        max_steps=n_steps,
        learning_rate=args.lr,
        weight_decay=0.01,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        packing=packing,
        max_length=work["seq"],
        gradient_checkpointing=args.checkpointing,
        bf16=args.dtype == "bf16",
        use_cpu=model.device.type == "cpu",
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        seed=0,
        dataset_kwargs={"skip_prepare_dataset": not packing},
    )
    # not AutoTokenizer: it would take the family's own, and its regex
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=f"{args.model}/tokenizer.json", eos_token="<eos>", pad_token="<eos>"
    )
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_dict({"input_ids": work["rows"]}),
        processing_class=tokenizer,
        callbacks=[Marks()],
    )
    compute_loss = trainer.compute_loss

    def counted(model, inputs, *rest, **named):
        ids = inputs["input_ids"]
        seen = inputs.get("attention_mask")
        count["slots"] += ids.numel()
        count["tokens"] += ids.numel() if seen is None else int(seen.sum())
        return compute_loss(model, inputs, *rest, **named)

    trainer.compute_loss = counted
    trainer.train()
    before, after = marks[0][2], marks[-1][2]
    counted_after_first = {key: after[key] - before[key] for key in count}
    return {"marks": marks, **counted_after_first}


def main(args) -> None:
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    with open(args.work) as file:
        work = json.load(file)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="sdpa"
    ).train()
    if torch.cuda.is_available():
        model.cuda()
    if args.checkpointing and args.mode == "loop":
        model.gradient_checkpointing_enable()
    run = plain_loop if args.mode == "loop" else with_trl
    found = run(model, work, args)
    marks = found.pop("marks")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**20
    found["seconds"] = marks[-1][0] - marks[0][0]
    found["cpu_seconds"] = marks[-1][1] - marks[0][1]
    found["peak_mb"] = peak
    print(json.dumps(found))


if __name__ == "__main__":
    main(parser.parse_args())
