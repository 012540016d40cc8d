"""Peer of `bench rollout`: the same requests through transformers.

    python bench/peers/generate_hf.py --model FOLDER --work work.json --mode static --batch 16

Imports nothing of ours: it runs in any environment with torch and transformers 5.
work.json: {"prompts": [[ids]], "lengths": [tokens per response]}, one prompt per response. Static
batches take the requests in order and run until their longest response is through; continuous
batching is transformers' own manager.
The last line printed is JSON: seconds, cpu_seconds, tokens (asked for), steps, peak_mb.
"""

import argparse
import json
import os
import resource
import time

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--model", required=True)
parser.add_argument("--work", required=True)
parser.add_argument("--mode", choices=["static", "continuous"], default="static")
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
parser.add_argument("--threads", type=int, default=1)


def spent() -> tuple[float, float]:
    """(wall, CPU) seconds of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), usage.ru_utime + usage.ru_stime


def static(model, prompts, lengths, batch: int, settings: dict) -> int:
    """One generate() per batch, each row stopped at its own length. Returns the steps done."""
    import torch
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    class OwnLength(StoppingCriteria):
        def __init__(self, ends):
            self.ends = ends

        def __call__(self, ids, scores, **_):
            return ids.shape[1] >= self.ends

    steps = 0
    for i in range(0, len(prompts), batch):
        # prompts of one length: nothing is padded
        ids = torch.tensor(prompts[i : i + batch], device=model.device)
        wanted = torch.tensor(lengths[i : i + batch], device=model.device)
        config = GenerationConfig(**settings, max_new_tokens=int(wanted.max()))
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([OwnLength(ids.shape[1] + wanted)]),
        )
        steps += out.shape[1] - ids.shape[1]
    return steps


def continuous(model, prompts, lengths, batch: int, settings: dict) -> int:
    """All requests to the continuous-batching manager. Returns 0: it does not tell its steps."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    block = 32
    blocks = batch * ((len(prompts[0]) + max(lengths)) // block + 2)
    config = ContinuousBatchingConfig(
        block_size=block,
        num_blocks=blocks,
        max_batch_tokens=512,
        use_cuda_graph=False,
        max_requests_per_batch=batch,
        allow_block_sharing=False,
    )
    generation = GenerationConfig(**{**settings, "eos_token_id": -1}, max_new_tokens=max(lengths))
    manager = model.init_continuous_batching(
        generation_config=generation, continuous_batching_config=config
    )
    manager.start()
    for prompt, length in zip(prompts, lengths):
        manager.add_request(prompt, max_new_tokens=length)
    done = 0
    tokens = 0
    while done < len(prompts):
        result = manager.get_result(timeout=5)
        if result is None and not manager.is_running():
            raise SystemExit("the manager of transformers stopped before all requests were done")
        if result is not None and result.is_finished():
            done += 1
            tokens += len(result.generated_tokens)
    manager.stop(block=True)
    if tokens != sum(lengths):
        raise SystemExit(
            f"continuous batching returned {tokens} tokens, not the {sum(lengths)} asked for"
        )
    return 0


def main(args) -> None:
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    with open(args.work) as file:
        work = json.load(file)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=dtype, attn_implementation="sdpa"
    ).eval()
    if torch.cuda.is_available():
        model.cuda()
    settings = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    prompts = work["prompts"]
    lengths = work["lengths"]
    static(model, prompts[:2], [2, 2], 2, settings)  # warm-up
    run = static if args.mode == "static" else continuous
    wall, cpu = spent()
    steps = run(model, prompts, lengths, args.batch, settings)
    wall_end, cpu_end = spent()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**20
    found = {
        "seconds": wall_end - wall,
        "cpu_seconds": cpu_end - cpu,
        "tokens": sum(lengths),
        "steps": steps,
        "peak_mb": peak,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(parser.parse_args())
