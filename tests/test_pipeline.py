"""The loops end to end on a tiny model: they learn, resume to the same bits, and do not depend on
how a step is cut."""

import math
import re
from dataclasses import replace

import pytest
import torch
from small_runs import (
    ALGOS,
    CPU,
    flat_gradient,
    groups_for,
    lines_of,
    lose_checkpoint,
    policy_of,
    rl_config,
    sft_config,
    weights_of,
    write_jsonl,
)

import data
import evaluate
import losses
import methods
import model as model_file
import rl
import sft
from core import console, flops, run
from core.errors import UserError
from methods import prefix_rft


def assert_same_run(a, b, step: int) -> None:
    """The weights at this step are equal to the bit, and so are all metrics but the times."""
    weights = weights_of(a, step)
    others = weights_of(b, step)
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert lines_of(a) == lines_of(b)


# ---- SFT -----------------------------------------------------------------------------------------
def test_sft_learns_and_leaves_a_model_folder_a_regime_and_the_next_command(
    small_task, tmp_path, capsys
):
    sft.main(sft_config(small_task, tmp_path / "a", steps=30, eval_every=10))
    values = [row["val_loss"] for row in lines_of(tmp_path / "a", "val")]
    assert len(values) == 4
    assert values[-1] < 0.7 * values[0]
    printed = capsys.readouterr().out
    for part in (">>", "<eos><<", "torchrun rl.py --init", "ETA", "regimes: 0 adaptive"):
        assert part in printed
    folder = evaluate.find(str(tmp_path / "a"))
    assert folder.name == "step_000030"
    assert evaluate.open_tokenizer(folder).eos_ids == [0]
    assert sum(p.numel() for p in model_file.load_model(folder).parameters()) > 10_000


def test_sft_resumes_to_the_same_bits_and_the_same_metrics(small_task, tmp_path):
    sft.main(sft_config(small_task, tmp_path / "whole"))
    sft.main(sft_config(small_task, tmp_path / "cut"))
    lose_checkpoint(tmp_path / "cut", 6)
    sft.main(sft_config(small_task, tmp_path / "cut", resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "cut", 6)


def test_a_run_resumed_where_its_schedule_has_ended_says_that_it_teaches_nothing(
    small_task, tmp_path, capsys
):
    out = tmp_path / "a"
    config = sft_config(small_task, out, steps=50, eval_every=49, schedule="cosine")
    sft.main(config)
    lose_checkpoint(out, 50)
    capsys.readouterr()
    sft.main(replace(config, resume=True))
    assert "give more --steps or --schedule constant" in capsys.readouterr().out


def test_sft_samples_answers_where_problems_are_given(small_task, tmp_path):
    cfg = sft_config(small_task, tmp_path / "r", steps=3, max_new=16, samples=0)
    sft.main(replace(cfg, problems=f"{small_task}/eval.jsonl", reward="countdown"))
    rows = lines_of(tmp_path / "r")
    assert [row["kind"] for row in rows if row["step"] == 0] == ["val", "eval"]
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [0, 3]
    assert all(0 <= row["pass1"] <= 100 for row in rows if row["kind"] == "eval")
    assert "right_counts" not in rows[1]


def test_each_validation_says_what_rl_would_find_at_its_temperature(coin, tmp_path, capsys):
    cfg = sft_config(coin, tmp_path / "r", data=f"{coin}/sft.jsonl", val=f"{coin}/sft.jsonl")
    cfg = replace(cfg, problems=f"{coin}/eval.jsonl", steps=2, eval_every=2, max_new=64)
    sft.main(replace(cfg, sample_problems=30))
    row = lines_of(tmp_path / "r", "eval")[0]
    assert len(row["right_counts"]) == 9 and sum(row["right_counts"]) == 30
    assert row["signal"] > 60  # a coin agrees with itself eight times in 128 groups
    assert row["signal_se"] < 15 and 0 < row["entropy_se"] < row["entropy"]
    assert row["entropy"] < 2
    said = capsys.readouterr().out
    assert "  signal " in said
    pairs = replace(cfg, samples=2, out=str(tmp_path / "pairs"))
    sft.main(pairs)
    assert sum(lines_of(tmp_path / "pairs", "eval")[0]["right_counts"]) == 40
    with pytest.raises(UserError, match="a group of one"):
        replace(cfg, samples=1)


def test_sft_gradients_do_not_depend_on_how_the_step_is_cut(small):
    model, tokenizer, folder = small
    rows, _ = data.sft_examples(f"{folder}/train.jsonl", tokenizer, 256)
    gradients = []
    for budget in (1, 300, 100_000):  # one row each, some, all at once
        batch = sft.make_step(rows[:16], budget)
        for ids, mask in batch.parts:
            sft.batch_loss(model, ids, mask, batch.n_trained).backward()
        gradients.append(flat_gradient(model))
    largest = gradients[0].abs().max()
    assert largest > 0
    for gradient in gradients:
        assert (gradient - gradients[0]).abs().max() < 1e-6 * max(1, largest)


@pytest.mark.parametrize(
    "given, weight",
    [
        (dict(), lambda p: 1.0),
        (dict(loss="dft"), lambda p: p),
        (dict(loss="trsft", trust_alpha=0.02), lambda p: p / max(p, 0.02)),
        (dict(loss="trsft", trust_alpha=0.0), lambda p: 1.0),
        (dict(loss="trsft", trust_alpha=1.0), lambda p: p),
    ],
)
def test_an_sft_objective_has_the_gradient_of_a_loop_over_weighted_tokens(small, given, weight):
    model, tokenizer, folder = small
    rows, _ = data.sft_examples(f"{folder}/train.jsonl", tokenizer, 256)
    rows = rows[:3]
    cfg = sft.Config(**given)
    batch = sft.make_step(rows, 100_000)
    ((ids, mask),) = batch.parts
    loss = sft.batch_loss(model, ids, mask, batch.n_trained, cfg.alpha)
    loss.backward()
    gradient = flat_gradient(model)

    weights = set()
    expected = torch.zeros(())
    for row in rows:
        whole = torch.tensor(row.prompt + row.response)
        logits = model(whole[None])[0] @ model.head.T
        for t in range(len(row.prompt), len(whole)):
            logp = torch.log_softmax(logits[t - 1], -1)[whole[t]]
            weights.add(weight(logp.exp().item()))
            expected = expected - weight(logp.exp().item()) * logp / batch.n_trained
    expected.backward()
    reference = flat_gradient(model)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (gradient - reference).abs().max() < 1e-5 * reference.abs().max()
    if given.get("trust_alpha") == 0.02:
        assert min(weights) < 1 and max(weights) == 1  # both sides of the trust region are there


def test_nll_computes_the_logits_once_as_it_always_did(small):
    model, tokenizer, folder = small
    rows, _ = data.sft_examples(f"{folder}/train.jsonl", tokenizer, 256)
    batch = sft.make_step(rows[:4], 100_000)
    ((ids, mask),) = batch.parts
    loss = sft.batch_loss(model, ids, mask, batch.n_trained, sft.Config().alpha)
    assert loss.equal(-model_file.response_logp_sum(model, ids, mask) / batch.n_trained)
    assert type(loss.grad_fn.next_functions[0][0].next_functions[0][0]).__name__.startswith(
        "SumLogp"
    )


def test_the_validation_loss_does_not_depend_on_how_the_rows_are_cut(small):
    model, tokenizer, folder = small
    rows, _ = data.sft_examples(f"{folder}/val.jsonl", tokenizer, 256)
    values = [sft.validation_loss(model, rows, budget) for budget in (1, 300, 100_000)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


def test_stopping_by_signal_saves_and_resume_goes_on(small_task, tmp_path, monkeypatch, capsys):
    cfg = sft_config(small_task, tmp_path / "r", steps=5, eval_every=5)
    # As if the signal had come in the first step
    monkeypatch.setattr(run, "catch_signals", lambda: ["SIGTERM"])
    assert sft.main(cfg) is False
    assert "--resume" in capsys.readouterr().out
    monkeypatch.undo()
    assert sft.main(replace(cfg, resume=True)) is True


def test_until_stops_sft_once_it_overfits_four_trajectories(small_task, tmp_path, capsys):
    path = write_jsonl(tmp_path / "four.jsonl", data.read_rows(small_task / "train.jsonl")[:4])
    cfg = sft_config(small_task, tmp_path / "r", data=path, batch=4, steps=150, eval_every=5)
    sft.main(replace(cfg, lr=1e-2, until="mild"))
    values = [row["val_loss"] for row in lines_of(tmp_path / "r", "val")]
    assert len(values) < 31
    assert values[-1] > 1.02 * min(values)
    assert values[0] > 1.1 * min(values)
    assert "--until mild is reached" in capsys.readouterr().out


# ---- RL ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("algo", ALGOS)
def test_rl_resumes_to_the_same_bits_at_the_same_prompt(coin, tmp_path, algo):
    cfg = rl_config(coin, tmp_path / "whole", algo=algo, max_rounds=4)
    rl.main(cfg)
    assert sum(row["updates"] for row in lines_of(tmp_path / "whole", "train")) >= 6
    rl.main(replace(cfg, out=str(tmp_path / "cut")))
    lose_checkpoint(tmp_path / "cut", 4)
    rl.main(replace(cfg, out=str(tmp_path / "cut"), resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "cut", 4)


def test_a_method_in_a_users_file_trains_and_its_options_are_flags(coin, tmp_path):
    (tmp_path / "half.py").write_text(
        "from dataclasses import dataclass\n"
        "from losses import GRPO\n"
        "@dataclass(frozen=True)\n"
        "class Method(GRPO):\n"
        "    share: float = 1.0  # of the advantage\n"
        "    def advantages(self, batch):\n"
        "        return self.share * super().advantages(batch)\n"
    )
    shared = dict(update_prompts=4, steps=1, lr=1e-3)
    own = rl_config(coin, tmp_path / "own", algo=str(tmp_path / "half.py"), **shared)
    rl.main(replace(own, options={"share": 0.5, "entropy_coef": 0.0}))
    grpo = rl_config(coin, tmp_path / "grpo", options={"entropy_coef": 0.0}, **shared)
    rl.main(grpo)
    (half,) = lines_of(tmp_path / "own", "train")
    (full,) = lines_of(tmp_path / "grpo", "train")
    assert full["grad_norm"] > 0
    assert half["grad_norm"] == pytest.approx(full["grad_norm"] / 2, rel=1e-4)


@pytest.mark.parametrize("algo", ALGOS)
def test_rl_gradients_do_not_depend_on_how_the_update_is_cut(small_task, tmp_path, algo):
    policy = policy_of(small_task)
    problems, _ = data.problems(f"{small_task}/mixed.jsonl", policy.tokenizer, 64)
    groups = groups_for(algo, policy, problems)
    method = methods.load(algo)()
    gradients = []
    for budget in (1, 200, 100_000):
        cfg = rl_config(small_task, tmp_path, micro_tokens=budget, update_prompts=4)
        (update,) = rl.make_batches(cfg, method, policy.net, None, groups)
        rl.train_on(cfg, method, policy.net, update)
        gradients.append(flat_gradient(policy.net))
    largest = gradients[0].abs().max()
    assert largest > 0
    for gradient in gradients:
        assert (gradient - gradients[0]).abs().max() < 2e-6 * max(1, largest)


@pytest.mark.parametrize(
    "algo, options, n_trained",
    [
        ("grpo", {}, 8),
        ("grpo", {"entropy_coef": 0.01}, 16),
        ("dapo", {}, 8),
        ("luffy", {}, 10),
        ("srft", {}, 20),
        ("upt", {}, 12),
    ],
)
def test_rows_without_a_gradient_are_left_out_of_the_work_and_not_of_the_mean(
    small_task, tmp_path, algo, options, n_trained
):
    policy = policy_of(small_task)
    policy.reward = lambda text, row: 1.0  # of the demonstrations
    problems, _ = data.problems(f"{small_task}/mixed.jsonl", policy.tokenizer, 64)
    groups = groups_for(algo, policy, problems)
    for number in (1, 2):  # these agree
        groups[number] = [row._replace(correct=1.0, reward=1.0) for row in groups[number]]
    cfg = rl_config(small_task, tmp_path, update_prompts=4)
    method = methods.load(algo)(**options)
    (update,) = rl.make_batches(cfg, method, policy.net, None, groups)
    assert len(update.rows) == n_trained
    everything = [row for group in groups for row in group]
    batch = losses.weigh(method, losses.make_batch(everything, CPU))
    gradients = []
    for each in (update, rl.Update(everything, batch)):
        rl.train_on(cfg, method, policy.net, each)
        gradients.append(flat_gradient(policy.net))
    assert gradients[0].abs().max() > 1e-3
    assert (gradients[0] - gradients[1]).abs().max() < 2e-6


def test_only_the_first_update_of_a_round_takes_its_own_forward_as_the_old_policy(
    small_task, tmp_path
):
    policy = policy_of(small_task)
    problems, _ = data.problems(f"{small_task}/mixed.jsonl", policy.tokenizer, 64)
    groups = groups_for("grpo", policy, problems)
    cfg = rl_config(small_task, tmp_path, update_prompts=2)
    first, second = rl.make_batches(cfg, methods.load("grpo")(), policy.net, None, groups)
    assert first.batch.old_logp is None
    row = second.rows[0]
    ids, mask = data.collate([data.Example(row.prompt, row.response)])
    logp, _, _ = model_file.response_logp(policy.net, ids, mask, cfg.temperature)
    found = second.batch.old_logp[0, : len(row.response)]
    assert torch.allclose(found, logp[0], atol=1e-5)


def test_a_later_update_trains_where_its_longest_row_has_no_advantage(small, tmp_path):
    net, _, folder = small

    def row(group: int, length: int, reward: float) -> losses.Row:
        ids = [6] * length
        return losses.Row([3, 31, 4], ids, [-1.0] * length, reward, reward, group)

    groups = [[row(n, 3, 0.0), row(n, 4, 1.0)] for n in range(3)]
    groups.append([row(3, 9, 1.0), row(3, 9, 1.0)])
    cfg = rl_config(folder, tmp_path, update_prompts=2)
    method = methods.load("grpo")(entropy_coef=0.0)
    _, second = rl.make_batches(cfg, method, net, None, groups)
    assert len(second.rows) == 2
    assert second.batch.old_logp.shape == second.batch.mask.shape
    assert math.isfinite(rl.train_on(cfg, method, net, second)["loss"])


def impossible(path) -> str:
    """Problems without a solution: every response gets 0."""
    rows = []
    for n in range(1, 30):
        rows.append({"prompt": f"Make {n} from 1 1 1 ->", "answer": "59", "numbers": [1, 1, 1]})
    return write_jsonl(path, rows)


@pytest.mark.parametrize(
    "algo, options, rounds",
    [("dapo", {}, 2), ("grpo", {"entropy_coef": 0.001}, 1), ("grpo", {"kl_coef": 0.1}, 1)],
)
def test_rounds_without_a_signal_leave_the_weights_alone(
    small_task, tmp_path, capsys, algo, options, rounds
):
    path = impossible(tmp_path / "p.jsonl")
    cfg = rl_config(small_task, tmp_path / "r", algo=algo, data=path, reward="countdown")
    rl.main(replace(cfg, steps=2, max_rounds=2, options=options))
    before = weights_of(tmp_path / "r", 0)
    after = weights_of(tmp_path / "r", 2)
    assert all(torch.equal(before[k], after[k]) for k in before)
    printed = capsys.readouterr().out
    assert printed.count("no update") == 2
    assert printed.count("hint:") == 1
    rows = lines_of(tmp_path / "r", "train")
    assert [row["rounds"] for row in rows] == [rounds, rounds]
    assert [row["signal"] for row in rows] == [0, 0]
    assert all(row["updates"] == 0 and "loss" not in row for row in rows)


def test_a_step_that_only_imitates_has_numbers_of_the_update_and_none_of_the_policy(
    coin, tmp_path, capsys
):
    problems = data.read_rows(coin / "mixed.jsonl")
    path = write_jsonl(tmp_path / "p.jsonl", [{**row, "answer": "59"} for row in problems])
    cfg = rl_config(coin, tmp_path / "r", algo="upt", data=path, steps=1, max_new=64)
    rl.main(cfg)
    (row,) = lines_of(tmp_path / "r", "train")
    assert row["updates"] == 2
    assert row["grad_norm"] > 0
    assert row["entropy"] is row["gap"] is row["kl"] is row["clipped"] is None
    printed = capsys.readouterr().out
    assert "entropy -" in printed
    assert "nothing to learn from" not in printed


def test_entropy_that_rises_without_the_reward_is_said_once(coin, tmp_path, capsys):
    cfg = rl_config(coin, tmp_path / "r")
    run_now = run.Run(cfg, cfg.steps, coin)
    run_now.attach(policy_of(coin, "math").net, [], None)
    row = dict.fromkeys(("truncated", "unparsed", "unscored"), 0.0)
    row |= {"kind": "train", "signal": 50.0, "right": 40.0, "reward": 40.0, "updates": 1}
    for step in range(30):
        run_now.metrics.append({**row, "entropy": 1 + step / 20})
        console.print_hints(cfg, run_now, row, [])
        if step == 10:
            assert capsys.readouterr().out == ""
    assert capsys.readouterr().out.count("entropy rose from 1.00") == 1


def sampled_lengths(folder, out) -> list[int]:
    """Tokens of prompt and response of all rows of a step that sampled at most 8."""
    tokenizer = evaluate.open_tokenizer(folder)
    lengths = []
    for row in data.read_rows(out / "samples.jsonl"):
        if row["kind"] == "train":
            (prompt,) = tokenizer.encode([(row["problem"], True)])
            lengths.append(len(prompt) + row["length"])
    return lengths


def test_compute_is_the_papers_and_counts_discarded_groups(coin, tmp_path):
    cfg = rl_config(coin, tmp_path / "r", algo="dapo", steps=1, prompts=1, update_prompts=1)
    rl.main(replace(cfg, gen_prompts=2, max_rounds=1))
    (row,) = lines_of(tmp_path / "r", "train")
    samples = data.read_rows(tmp_path / "r" / "samples.jsonl")
    rewards = [sample["reward"] for sample in samples if sample["kind"] == "train"]
    informative = [g for g in (0, 4) if len(set(rewards[g : g + 4])) == 2]
    assert informative, "another seed is needed"
    assert row["discarded"] == 1
    config = model_file.read_config(coin)
    lengths = sampled_lengths(coin, tmp_path / "r")
    assert len(lengths) == 8
    count = flops.forward_flops
    trained = lengths[informative[0] : informative[0] + 4]
    expected = count(config, lengths) + 3 * count(config, trained)  # (25)
    assert row["flops"] == pytest.approx(expected)
    assert row["tokens"] == sum(lengths)
    assert row["flops_hw"] != row["flops"]


def test_the_papers_compute_counts_a_forward_per_demonstration_of_luffy(coin, tmp_path):
    rl.main(rl_config(coin, tmp_path / "r", algo="luffy", steps=1, prompts=2))
    (row,) = lines_of(tmp_path / "r", "train")
    config = model_file.read_config(coin)
    tokenizer = evaluate.open_tokenizer(coin)
    problems, _ = data.problems(f"{coin}/mixed.jsonl", tokenizer, 64)
    sampled = sampled_lengths(coin, tmp_path / "r")
    assert len(sampled) == 6
    length = {len(problem.prompt) + len(problem.expert) for problem in problems}
    experts = 2 * sorted(length)  # all demonstrations are of one length
    assert len(experts) == 2
    count = flops.forward_flops
    expected = count(config, sampled) + 3 * count(config, sampled + experts)
    assert row["flops"] == pytest.approx(expected + count(config, experts))  # (26)


def test_rl_learns_which_answer_is_right(coin, tmp_path):
    cfg = rl_config(coin, tmp_path / "r", algo="dapo", steps=12, eval_every=12)
    rl.main(replace(cfg, prompts=8, update_prompts=4))
    first, last = (row["pass1"] for row in lines_of(tmp_path / "r", "eval"))
    assert 20 < first < 80
    assert last > first + 15


def test_a_batch_that_does_not_divide_names_two_values_that_do():
    with pytest.raises(UserError, match="does not divide.*--update-prompts (16 or 32|32 or 16)"):
        rl.Config(prompts=64, update_prompts=24)


def test_mixed_methods_without_demonstrations_say_what_is_missing(small_task, tmp_path):
    cfg = rl_config(small_task, tmp_path / "r", algo="luffy", data=f"{small_task}/rl.jsonl")
    with pytest.raises(UserError, match="no row has a response"):
        rl.main(cfg)


def test_until_share_stops_rl_when_the_interval_says_so(coin, tmp_path, capsys):
    cfg = rl_config(coin, tmp_path / "r", algo="dapo", steps=20, eval_every=1, until_share=0.01)
    cfg = replace(cfg, prompts=8, update_prompts=4)
    rl.main(cfg)
    last = max(row["step"] for row in lines_of(tmp_path / "r"))
    assert 4 <= last < 20
    assert "surely reached" in capsys.readouterr().out
    rl.main(replace(cfg, resume=True))
    assert max(row["step"] for row in lines_of(tmp_path / "r")) == last, "it knows when resumed"


def test_a_run_beyond_the_steps_asked_for_is_named(coin, tmp_path):
    rl.main(rl_config(coin, tmp_path / "r", steps=2))
    with pytest.raises(UserError, match="at step 2 already, beyond the 1 asked for"):
        rl.main(rl_config(coin, tmp_path / "r", steps=1, resume=True))


# ---- a budget of compute -------------------------------------------------------------------------
@pytest.fixture()
def windows_seen(monkeypatch):
    """The shares of the run for which prefix_rft asked its window."""
    seen = []
    window = prefix_rft.prefix_window

    def watched(done):
        seen.append(done)
        return window(done)

    monkeypatch.setattr(prefix_rft, "prefix_window", watched)
    return seen


def test_the_prefix_follows_the_steps(coin, tmp_path, windows_seen):
    rl.main(rl_config(coin, tmp_path / "r", algo="prefix_rft", steps=4))
    assert sorted(set(windows_seen)) == [0, 0.25, 0.5, 0.75]


def test_under_max_flops_prefix_and_time_left_follow_the_compute_that_is_spent(
    coin, tmp_path, windows_seen, capsys
):
    cfg = rl_config(coin, tmp_path / "r", algo="prefix_rft", steps=4, eval_every=8)
    rl.main(cfg)
    budget = lines_of(tmp_path / "r", "train")[3]["flops"]
    windows_seen.clear()
    capsys.readouterr()
    rl.main(replace(cfg, out=str(tmp_path / "s"), steps=10**6, max_flops=budget))
    flops = [0.0] + [row["flops"] for row in lines_of(tmp_path / "s", "train")]
    shares = sorted(set(windows_seen))
    assert shares == [spent / budget for spent in flops[:-1]]
    assert len(shares) >= 3
    assert 0.3 < shares[-1] < 1
    lasts = re.findall(r"step +\d+/(\d+) ", capsys.readouterr().out)  # of "step 1/LAST"
    lasts = [int(last) for last in lasts]
    assert lasts[-1] == len(shares) == len(lasts)
    assert max(lasts) <= 2 * len(shares)


def test_max_flops_ends_a_run_with_an_evaluation_and_a_checkpoint(coin, tmp_path):
    rl.main(rl_config(coin, tmp_path / "r", steps=50, eval_every=50, max_flops=1.0))
    last = lines_of(tmp_path / "r")[-1]
    assert last["kind"] == "eval"
    assert last["step"] == 1
    assert (tmp_path / "r" / "checkpoints" / "step_000001").exists()
