"""Printed output: the line per step, hints (each once per run), a table of models, progress."""

import math
import sys
import time
from collections import Counter
from collections.abc import Iterator

from core.pool import LOST


def number(value, form: str) -> str:
    """A dash where a number was not measured."""
    return "-" if value is None else format(value, form)


def print_rl_step(cfg, run, step: int, row: dict) -> None:
    last = cfg.steps
    if cfg.max_flops:  # the steps that the run is likely to have
        last = min(last, math.ceil(step * cfg.max_flops / run.totals["flops"]))
    last = max(last, step)
    line = (
        f"step {step:4d}/{last}  reward {row['reward']:5.1f}  signal {row['signal']:3.0f}%  "
        f"rounds {row['rounds']}  length {row['length']:4.0f}  cut {row['truncated']:4.1f}%  "
        f"unparsed {row['unparsed']:4.1f}%  "
    )
    if row["unscored"]:
        line += f"unscored {row['unscored']:.1f}%  "
    if row["updates"]:
        collecting = row["sample_s"] + row["score_s"]
        seconds = f"{collecting:.1f}+{row['logp_s'] + row['update_s']:.1f} s"
        line += (
            f"entropy {number(row['entropy'], '.3f')}  "
            f"grad {row['grad_norm']:.2f}  {seconds}  {run.eta(step, last)}"
        )
    else:
        line += "no prompt had both right and wrong answers: no update"
    print(line, flush=True)


def show_rollout(row, tokenizer) -> None:
    """The first rollout as text, the trained part between >> and <<."""
    end = tokenizer.backend.id_to_token(row.response[-1]) if row.finished else " [cut]"
    print(
        "first rollout, the trained part between >> and <<:\n"
        f"  {tokenizer.decode(row.prompt)}>>{tokenizer.decode(row.response)}{end}<<  "
        f"reward {row.reward:g}\n",
        flush=True,
    )


def nearly_all_wrong(cfg, records: list[dict]) -> str:
    """A hint: the most frequent reasons, one wrong answer with its gold, what to do by cause."""
    reasons = Counter(record["reason"] for record in records).most_common(2)
    told = ", ".join(f"{n} {reason}" for reason, n in reasons)
    told = told.replace("scored", "scored one half or less")  # by a function that gives numbers
    n_right = sum(record["correct"] for record in records)
    first = next(record for record in records if not record["correct"])
    answer = first["response"][-60:] if first["answer"] in (None, "") else first["answer"][:60]
    return (
        f"{n_right} of {len(records)} responses are right by --reward {cfg.reward} ({told}): there "
        f"is little to learn from. A wrong one: answer {answer!r}, gold {first['gold'][:60]!r}. Is "
        "the gold wrong? Then it is read from a wrong column of --data (docs/data.md). Is the "
        "answer right? Give another --reward. Neither? Take easier problems, or sft.py first"
    )


def is_stuck(run, steps: int = 10) -> bool:
    """Whether less than 3% of the responses were right in each of the last `steps` steps."""
    last = run.of_kind("train")[-steps:]
    return len(last) == steps and all(step["right"] < 3 for step in last)


def print_hints(cfg, run, row: dict, records: list[dict]) -> None:
    """What is odd in a step of RL, once per run, with the flag that helps. records: its samples."""
    if row["unscored"]:
        lost = next(record for record in records if record["reason"] in LOST)
        run.hint(
            "unscored",
            f"{row['unscored']:.1f}% of the rewards earn 0 because a call took over "
            f"--reward-timeout {cfg.reward_timeout:g} s or ended its process; the first: "
            f"{lost['reason']}, gold {lost['gold'][:60]!r}, response {lost['response'][-60:]!r}",
        )
    if row["truncated"] > 25:
        run.hint(
            "cut",
            f"{row['truncated']:.0f}% of the responses are cut at --max-new {cfg.max_new}, and a "
            "cut response earns nothing: raise it",
        )
    elif row["unparsed"] > 50:
        first = next(record for record in records if record["answer"] is None)
        run.hint(
            "unparsed",
            f"{row['unparsed']:.0f}% of the responses hold no answer that --reward {cfg.reward} "
            f"finds (the first ends {first['response'][-60:]!r}: {first['reason']}); say in the "
            "prompt how to answer, teach it with sft.py, or give another --reward",
        )
    elif row["right"] < 3 and (not row["updates"] or is_stuck(run)):
        run.hint("wrong", nearly_all_wrong(cfg, records))
    elif row["signal"] == 0 and not row["updates"]:
        run.hint(
            "signal",
            "the responses to each prompt are all right or all wrong: there is nothing to learn "
            f"from in this step. {row['right']:.0f}% are right: raise --group or take problems "
            f"that are {'harder' if row['right'] > 50 else 'easier'}",
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


def print_summary(summary: dict, seconds: float) -> None:
    rest = []
    left_out = {"pass1", "pass1_se", "n", "problems", "reward"}
    if not summary["unscored"]:
        left_out.add("unscored")
    for name, value in summary.items():
        if name not in left_out:
            rest.append(f"{name.replace('pass_at_', 'pass@')} {value:.1f}")
    print(
        f"pass@1 {summary['pass1']:.1f} (standard error {summary['pass1_se']:.1f})  "
        f"{'  '.join(rest)}  in {seconds:.0f} s"
    )


def print_comparison(names: list[str], summaries: list[dict], differences: list[dict]) -> None:
    """A row per model, then the differences."""
    width = max(len(name) for name in names)
    print(f"\n{'model':{width}}  pass@1   se  length  cut %")
    for name, row in zip(names, summaries):
        print(
            f"{name:{width}}  {row['pass1']:6.1f}  {row['pass1_se']:3.1f}  {row['length']:6.0f}  "
            f"{row['truncated']:5.1f}"
        )
    print("differences in pass@1, paired by problem, with 90% intervals:")
    for row in differences:
        interval = f"[{number(row['low'], '+.1f')}, {number(row['high'], '+.1f')}]"
        print(f"  {row['from']} -> {row['to']}  {row['difference']:+.1f} {interval}")


def show_rows(rows: Iterator, total: int, what: str) -> Iterator:
    """Yield the rows and show their rate: a bar on a terminal, a line per half minute in a log."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(rows, desc=what, total=total, unit=" rows", leave=False)
        return
    began = time.monotonic()
    printed = began
    for n, row in enumerate(rows, 1):
        yield row
        now = time.monotonic()
        if now - printed > 30:
            printed = now
            rate = n / (now - began)
            left = (total - n) / rate / 60
            print(
                f"{what}: {n:,} of {total:,} rows, {rate:,.0f} per s, {left:.0f} minutes left",
                flush=True,
            )


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
