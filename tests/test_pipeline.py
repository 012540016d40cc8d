"""The loops end to end on a tiny model: they learn, resume to the same bits, and do not depend on how a step is cut."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import evaluate
import losses
import model as model_file
import rl
import sft
from core import run


def sft_config(folder, out, **changes):
    return replace(
        sft.Config(
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
        ),
        **changes,
    )


def rl_config(folder, out, **changes):
    return replace(
        rl.Config(
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
        ),
        **changes,
    )


@pytest.fixture(scope="session")
def task(small_task):
    """small_task, with problems that carry a demonstration (mixed.jsonl)."""
    rows = data.read_rows(small_task / "train.jsonl")[:40]
    mixed = [
        {
            "prompt": row["prompt"],
            "answer": row["prompt"].split()[1],
            "numbers": [int(x) for x in row["prompt"].split()[3:-1]],
            "response": row["response"],
        }
        for row in rows
    ]
    (small_task / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed))
    return small_task


def write_coin(folder, small_task):
    """A model that answers 1 or 2 about equally often, and problems whose answer is 1: groups with right and wrong answers from the start."""
    rows = [
        {
            "prompt": f"Make {n} ->",
            "response": f"<think> {n} = {n} </think> \\boxed{{ {1 + n % 2} }}",
        }
        for n in range(40)
    ]
    rows += [
        {
            **row,
            "response": row["response"]
            .replace("{ 1 }", "{ x }")
            .replace("{ 2 }", "{ 1 }")
            .replace("{ x }", "{ 2 }"),
        }
        for row in rows
    ]
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mixed.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "prompt": row["prompt"],
                    "answer": "1",
                    "response": rows[i + i % 2 * 40]["response"],
                }
            )
            + "\n"
            for i, row in enumerate(rows[:40])
        )
    )
    (folder / "eval.jsonl").write_text((folder / "mixed.jsonl").read_text())
    sft.main(
        sft_config(
            small_task,
            folder / "run",
            data=f"{folder}/sft.jsonl",
            val=f"{folder}/sft.jsonl",
            steps=60,
            eval_every=60,
        )
    )
    for file in (folder / "run" / "checkpoints" / "step_000060").iterdir():
        if file.is_file():
            file.rename(folder / file.name)
    return folder


@pytest.fixture(scope="session")
def coin(small_task, tmp_path_factory):
    return write_coin(tmp_path_factory.mktemp("coin"), small_task)


def weights_of(out, step):
    return load_file(Path(out) / "checkpoints" / f"step_{step:06d}" / "model.safetensors")


def lines_of(out):
    """metrics.jsonl without the wall times."""
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds" and not k.endswith("_s")}
        for line in (Path(out) / "metrics.jsonl").read_text().splitlines()
    ]


def test_sft_learns_and_leaves_a_model_folder_a_regime_and_the_next_command(task, tmp_path, capsys):
    sft.main(sft_config(task, tmp_path / "a", steps=30, eval_every=10))
    values = [row["val_loss"] for row in lines_of(tmp_path / "a") if row["kind"] == "val"]
    assert len(values) == 4 and values[-1] < 0.7 * values[0]
    printed = capsys.readouterr().out
    assert (
        ">>" in printed
        and "<eos><<" in printed
        and "torchrun rl.py --init" in printed
        and "ETA" in printed
    )
    folder = evaluate.find(str(tmp_path / "a"))
    assert folder.name == "step_000030" and evaluate.open_tokenizer(folder).eos_ids == [0]
    assert sum(p.numel() for p in model_file.load_model(folder).parameters()) > 10_000


def test_sft_resumes_to_the_same_bits_and_the_same_metrics(task, tmp_path):
    sft.main(sft_config(task, tmp_path / "whole"))
    sft.main(sft_config(task, tmp_path / "cut"))
    for path in (tmp_path / "cut" / "checkpoints").glob(
        "step_000006"
    ):  # as if killed while writing the last one
        path.rename(path.with_suffix(".tmp"))
    sft.main(sft_config(task, tmp_path / "cut", resume=True))
    whole, cut = weights_of(tmp_path / "whole", 6), weights_of(tmp_path / "cut", 6)
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "cut")


@pytest.mark.parametrize("algo", ["grpo", "dapo", "luffy", "srft", "upt", "prefix_rft"])
def test_rl_resumes_to_the_same_bits_at_the_same_prompt(coin, tmp_path, algo):
    cfg = rl_config(coin, tmp_path / "whole", algo=algo, max_rounds=4)
    rl.main(cfg)
    assert (
        sum(row["updates"] for row in lines_of(tmp_path / "whole") if row["kind"] == "train") >= 6
    )
    rl.main(replace(cfg, out=str(tmp_path / "cut"), steps=4))
    for path in (tmp_path / "cut" / "checkpoints").glob("step_000004"):
        path.rename(path.with_suffix(".tmp"))
    rl.main(replace(cfg, out=str(tmp_path / "cut"), resume=True))
    whole, cut = weights_of(tmp_path / "whole", 4), weights_of(tmp_path / "cut", 4)
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "cut")


def test_sft_gradients_do_not_depend_on_how_the_step_is_cut(small, task):
    model, tokenizer, _ = small
    rows, _ = data.sft_examples(f"{task}/train.jsonl", tokenizer, 256)
    rows, gradients = rows[:16], []
    for budget in (1, 300, 100_000):  # one row each, some, all at once
        model.zero_grad()
        for batch in sft.micro_batches(rows, budget, False):
            sft.batch_loss(
                model, batch, sum(len(r.response) for r in rows), torch.device("cpu")
            ).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    largest = gradients[0].abs().max()
    assert largest > 0 and all(
        (g - gradients[0]).abs().max() < 1e-6 * max(1, largest) for g in gradients
    )


def rows_for(algo, tokenizer, problems):
    """Hand-made groups with right and wrong rollouts, some cut, some with an expert or a copied prefix."""
    groups = []
    for number, problem in enumerate(problems[:4]):
        group = []
        for i in range(4):
            response = problem.expert[: 6 + 3 * i] if i else problem.expert[::-1]
            group.append(
                rl.Row(
                    problem.prompt,
                    response,
                    [-0.5] * len(response),
                    float(i % 2),
                    float(i % 2),
                    number,
                    n_prefix=3 if algo == "prefix_rft" and i == 3 else 0,
                    finished=i != 2,
                )
            )
        if algo in ("luffy", "srft", "upt"):
            group.append(rl.expert_row(problem, tokenizer, number))
        groups.append(group)
    return groups


@pytest.mark.parametrize("algo", ["grpo", "dapo", "luffy", "srft", "upt", "prefix_rft"])
def test_rl_gradients_do_not_depend_on_how_the_update_is_cut(small, task, tmp_path, algo):
    model, tokenizer, _ = small
    problems, _ = data.problems(f"{task}/mixed.jsonl", tokenizer, 64)
    groups, objective, gradients = rows_for(algo, tokenizer, problems), losses.OBJECTIVES[algo], []
    rows = [row for group in groups for row in group]
    for budget in (1, 200, 100_000):
        cfg = rl_config(task, tmp_path, algo=algo, micro_tokens=budget)
        _, entropy = rl.forward_rows(cfg, model, rows, torch.device("cpu"), entropy=True)
        index, batch, weights = rl.weigh(objective, rows, entropy, torch.device("cpu"))
        kept = [rows[i] for i in index.tolist()]
        model.zero_grad()
        rl.train_on(cfg, objective, model, kept, batch, weights, torch.device("cpu"))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    largest = gradients[0].abs().max()
    assert largest > 0 and all(
        (g - gradients[0]).abs().max() < 2e-6 * max(1, largest) for g in gradients
    )


def test_rows_without_an_advantage_are_left_out_of_the_work_and_not_of_the_mean(
    small, task, tmp_path
):
    model, tokenizer, _ = small
    problems, _ = data.problems(f"{task}/mixed.jsonl", tokenizer, 64)
    groups = rows_for("grpo", tokenizer, problems)
    groups[1:3] = [
        [row._replace(correct=1.0, reward=1.0) for row in group] for group in groups[1:3]
    ]  # these agree
    cfg, objective, gradients = (
        rl_config(task, tmp_path, update_prompts=4),
        replace(losses.OBJECTIVES["grpo"], entropy_coef=0.0),
        [],
    )
    ((rows, batch, weights),) = rl.plan_updates(
        cfg, objective, model, None, groups, torch.device("cpu")
    )[0]
    everything = [row for group in groups for row in group]
    assert len(rows) == 8 and len(everything) == 16
    for args in (
        (rows, batch, weights),
        (everything, *rl.weigh(objective, everything, None, torch.device("cpu"))[1:]),
    ):
        model.zero_grad()
        rl.train_on(cfg, objective, model, *args, torch.device("cpu"))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[0].abs().max() > 1e-3 and (gradients[0] - gradients[1]).abs().max() < 2e-6


def test_a_round_without_signal_leaves_weights_optimizer_and_steps_alone(task, tmp_path, capsys):
    impossible = [
        {"prompt": f"Make {n} from 1 1 1 ->", "answer": "59", "numbers": [1, 1, 1]}
        for n in range(1, 30)
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in impossible))
    rl.main(
        rl_config(
            task, tmp_path / "r", algo="dapo", data=str(tmp_path / "p.jsonl"), steps=2, max_rounds=2
        )
    )
    before, after = weights_of(tmp_path / "r", 0), weights_of(tmp_path / "r", 2)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert "no update" in capsys.readouterr().out
    rounds = [row["rounds"] for row in lines_of(tmp_path / "r") if row["kind"] == "train"]
    assert rounds == [2, 2]


def test_compute_is_the_papers_and_counts_discarded_groups(task, tmp_path):
    rl.main(rl_config(task, tmp_path / "r", steps=1))
    step = [row for row in lines_of(tmp_path / "r") if row["kind"] == "train"][-1]
    assert step["flops"] > 0 and step["tokens"] > 0 and step["flops_hw"] != step["flops"]
    config = model_file.read_config(task)
    lengths = [30, 50]
    assert rl.flops_of(config, lengths, lengths, []) == pytest.approx(
        4 * model_file.forward_flops(config, lengths)
    )  # (25)


def test_rl_learns_which_answer_is_right(coin, tmp_path):
    rl.main(
        rl_config(
            coin, tmp_path / "r", algo="dapo", steps=12, eval_every=12, prompts=8, update_prompts=4
        )
    )
    first, last = (row["pass1"] for row in lines_of(tmp_path / "r") if row["kind"] == "eval")
    assert 20 < first < 80 and last > first + 15


def test_the_best_of_n_estimates_are_unbiased():
    for n, k, right in ((8, 2, 3), (5, 4, 1), (6, 1, 2), (4, 4, 0)):
        import itertools

        picks = list(itertools.combinations([1] * right + [0] * (n - right), k))
        assert evaluate.pass_at_k(n, right, k) == pytest.approx(
            sum(any(p) for p in picks) / len(picks)
        )


def test_evaluation_reports_points_with_a_standard_error_over_problems(small, task):
    model, tokenizer, _ = small
    problems, _ = data.problems(f"{task}/eval.jsonl", tokenizer, 64)
    summary, records = evaluate.evaluate(model, tokenizer, problems, 2, 1.0, 16)
    assert (
        summary["problems"] == 20
        and summary["n"] == 40 == len(records)
        and 0 <= summary["pass1"] <= 100
    )
    assert {"problem", "response", "gold", "answer", "reason", "finished", "truncated"} <= set(
        records[0]
    )


def test_a_batch_that_does_not_divide_names_two_values_that_do():
    with pytest.raises(
        ValueError, match="does not divide.*--update-prompts 16 or 32|--update-prompts 32 or 16"
    ):
        rl.Config(prompts=64, update_prompts=24)


def test_mixed_methods_without_demonstrations_say_what_is_missing(task, tmp_path):
    with pytest.raises(ValueError, match="no row has a response"):
        rl.main(rl_config(task, tmp_path / "r", algo="luffy", data=f"{task}/rl.jsonl"))


def test_stopping_by_signal_saves_and_resume_goes_on(task, tmp_path, monkeypatch, capsys):
    cfg = sft_config(task, tmp_path / "r", steps=5, eval_every=5)
    monkeypatch.setattr(
        run, "catch_signals", lambda: ["SIGTERM"]
    )  # as if the signal came in the first step
    assert sft.main(cfg) is False and "--resume" in capsys.readouterr().out
    monkeypatch.undo()
    assert sft.main(replace(cfg, resume=True)) is True


def test_until_stops_sft_once_it_overfits_four_trajectories(task, tmp_path, capsys):
    (tmp_path / "four.jsonl").write_text(
        "".join((task / "train.jsonl").read_text().splitlines(keepends=True)[:4])
    )
    sft.main(
        sft_config(
            task,
            tmp_path / "r",
            data=f"{tmp_path}/four.jsonl",
            batch=4,
            steps=150,
            eval_every=5,
            lr=1e-2,
            until="mild",
        )
    )
    losses_seen = [row["val_loss"] for row in lines_of(tmp_path / "r") if row["kind"] == "val"]
    assert (
        len(losses_seen) < 31
        and losses_seen[-1] > 1.02 * min(losses_seen)
        and losses_seen[0] > 1.1 * min(losses_seen)
    )
    assert "--until mild: reached" in capsys.readouterr().out


def test_until_share_stops_rl_when_the_interval_says_so(coin, tmp_path, capsys):
    rl.main(
        rl_config(
            coin,
            tmp_path / "r",
            algo="dapo",
            steps=20,
            eval_every=1,
            prompts=8,
            update_prompts=4,
            until_share=0.01,
        )
    )
    last = max(row["step"] for row in lines_of(tmp_path / "r"))
    assert 4 <= last < 20 and "surely reached" in capsys.readouterr().out
    rl.main(
        rl_config(
            coin,
            tmp_path / "r",
            algo="dapo",
            steps=20,
            eval_every=1,
            prompts=8,
            update_prompts=4,
            until_share=0.01,
            resume=True,
        )
    )
    assert max(row["step"] for row in lines_of(tmp_path / "r")) == last, (
        "a resumed run knows it too"
    )


def test_a_run_beyond_the_steps_asked_for_is_named(coin, tmp_path):
    rl.main(rl_config(coin, tmp_path / "r", steps=2))
    with pytest.raises(ValueError, match="at step 2 already, beyond --steps 1"):
        rl.main(rl_config(coin, tmp_path / "r", steps=1, resume=True))


def test_under_max_flops_the_prefix_and_the_time_left_follow_the_compute_that_is_spent(
    coin, tmp_path, monkeypatch, capsys
):
    seen, window = [], losses.prefix_window
    monkeypatch.setattr(
        losses,
        "prefix_window",
        lambda done, total: seen.append(done / total) or window(done, total),
    )
    rl.main(rl_config(coin, tmp_path / "r", algo="prefix_rft", steps=8, eval_every=8))
    assert seen == [step / 8 for step in range(8)]
    spent = [row["flops"] for row in lines_of(tmp_path / "r") if row["kind"] == "train"]
    seen.clear(), capsys.readouterr()
    rl.main(
        rl_config(
            coin, tmp_path / "s", algo="prefix_rft", steps=10**6, eval_every=8, max_flops=spent[3]
        )
    )
    flops = [0.0] + [row["flops"] for row in lines_of(tmp_path / "s") if row["kind"] == "train"]
    assert seen == [at / spent[3] for at in flops[:-1]] and len(seen) >= 3 and 0.3 < seen[-1] < 1
    ends = [
        int(steps) for steps in re.findall(r"step +\d+/(\d+) ", capsys.readouterr().out)
    ]  # of step 1/ENDS
    assert ends[-1] == len(seen) == len(ends) and max(ends) <= 2 * len(seen)


def test_max_flops_ends_a_run_with_an_evaluation_and_a_checkpoint(coin, tmp_path):
    rl.main(rl_config(coin, tmp_path / "r", steps=50, eval_every=50, max_flops=1.0))
    rows = lines_of(tmp_path / "r")
    assert (
        rows[-1]["kind"] == "eval"
        and rows[-1]["step"] == 1
        and (tmp_path / "r" / "checkpoints" / "step_000001").exists()
    )
