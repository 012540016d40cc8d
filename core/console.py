"""What a run prints: a line per step in fixed columns, and once per run what is odd about it."""

import math


def number(value, form: str) -> str:
    """A dash where a number was not measured."""
    return "-" if value is None else format(value, form)


def print_rl_step(cfg, run, step: int, row: dict) -> None:
    last = cfg.steps
    if cfg.max_flops:  # the steps that the run is likely to have
        last = min(last, math.ceil(step * cfg.max_flops / run.totals["flops"]))
    last = max(last, step)
    line = f"step {step:4d}/{last}  reward {row['reward']:5.1f}  signal {row['signal']:3.0f}%  "
    if row["updates"]:
        seconds = f"{row['sample_s']:.1f}+{row['logp_s'] + row['update_s']:.1f} s"
        line += (
            f"rounds {row['rounds']}  length {row['length']:4.0f}  cut {row['truncated']:4.1f}%  "
            f"unparsed {row['unparsed']:4.1f}%  entropy {number(row['entropy'], '.3f')}  "
            f"grad {row['grad_norm']:.2f}  {seconds}  {run.eta(step, last)}"
        )
    else:
        tries = "1 round" if row["rounds"] == 1 else f"{row['rounds']} rounds"
        line += f"no prompt had both right and wrong answers in {tries}: no update"
    print(line, flush=True)


def show_rollout(row, tokenizer) -> None:
    """The first rollout as text, the trained part between >> and <<."""
    end = "<eos>" if row.finished else " [cut]"
    print(
        "first rollout, the trained part between >> and <<:\n"
        f"  {tokenizer.decode(row.prompt)}>>{tokenizer.decode(row.response)}{end}<<  "
        f"reward {row.reward:g}\n",
        flush=True,
    )


def print_hints(cfg, run, row: dict) -> None:
    """What is odd in a step of RL, once per run, with the flag that helps."""
    if row["truncated"] > 50:
        run.hint(
            "cut",
            f"{row['truncated']:.0f}% of the responses are cut at --max-new {cfg.max_new}, and a "
            "cut response earns nothing: raise it",
        )
    elif row["unparsed"] > 80:
        run.hint(
            "unparsed",
            f"{row['unparsed']:.0f}% of the responses hold no answer that --reward {cfg.reward} "
            f"finds; read {run.dir / 'samples.jsonl'}, then teach the format with sft.py or give "
            "another reward",
        )
    elif row["signal"] == 0:
        same = "wrong" if row["right"] < 50 else "right"
        other = "easier" if same == "wrong" else "harder"
        run.hint(
            "signal",
            f"all responses to each prompt are {same}: there is nothing to learn from. Try "
            f"{other} problems; --dry-run scores the demonstrations by the reward",
        )
    measured = [step for step in run.of_kind("train") if step.get("entropy") is not None]
    if len(measured) < 20:
        return
    first = measured[0]
    last = measured[-1]
    if last["entropy"] > 1.5 * first["entropy"] and last["reward"] <= first["reward"]:
        run.hint(
            "entropy",
            f"entropy rose from {first['entropy']:.2f} to {last['entropy']:.2f} nats and the "
            "reward did not: lower --lr or --entropy-coef",
        )
