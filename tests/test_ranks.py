"""Several processes are one: the same gradients for every method and cut, the same weights, states
that any number of processes loads, and an end for all where one fails."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from processes import run_in
from small_runs import (
    ALGOS,
    CPU,
    flat_gradient,
    groups_for,
    lines_of,
    rl_config,
    sft_config,
    weights_of,
)

import data
import evaluate
import methods
import model as model_file
import rl
import sft
import tasks
from core import ranks
from core.errors import UserError
from core.run import Run


# ---- gradients -----------------------------------------------------------------------------------
def opened(folder, out, **changes) -> tuple:
    """(model, Policy) as a training script opens them."""
    cfg = sft_config(folder, out, overwrite=True, **changes)
    tokenizer = evaluate.open_tokenizer(Path(folder))
    run = Run(cfg, 1, Path(folder))
    model, net, _ = evaluate.open_training(cfg, Path(folder), tokenizer, CPU, run)
    return model, evaluate.Policy(net, tokenizer, tasks.load_reward("countdown"), max_new=24)


def gradients(folder, sizes, out, bf16=False) -> dict[str, torch.Tensor]:
    """{"METHOD SIZE": gradient of one step on fixed rows}; sizes: tokens per micro-batch."""
    model, policy = opened(folder, out, bf16=bf16)
    net = policy.net
    examples, _ = data.sft_examples(f"{folder}/train.jsonl", policy.tokenizer, 256)
    problems, _ = data.problems(f"{folder}/mixed.jsonl", policy.tokenizer, 64)
    found = {}
    for size in sizes:
        batch = sft.make_step(examples[:9], size)
        for n, (ids, mask) in enumerate(batch.parts, 1):
            ranks.reduce_now(net, n == len(batch.parts))
            sft.batch_loss(net, ids, mask, batch.n_trained).backward()
        found[f"sft {size}"] = flat_gradient(model)
        for algo in ALGOS:
            method = methods.load(algo)(entropy_coef=0.01)
            cfg = rl_config(folder, out, micro_tokens=size, update_prompts=4)
            groups = groups_for(algo, policy, problems)
            (update,) = rl.make_batches(cfg, method, net, None, groups)
            rl.train_on(cfg, method, net, update)
            found[f"{algo} {size}"] = flat_gradient(model)
    return found


def save_gradients(folder, sizes, out) -> None:
    found = gradients(folder, sizes, out / "run")
    if ranks.rank() == 0:
        torch.save(found, out / f"{ranks.world()}.pt")


@pytest.mark.parametrize("world", [2, 4])
def test_gradients_of_every_method_are_those_of_one_process_however_the_step_is_cut(
    small_task, tmp_path, world
):
    alone = gradients(small_task, [100_000], tmp_path / "alone")
    run_in(world, tmp_path, save_gradients, small_task, [1, 300], tmp_path)
    found = torch.load(tmp_path / f"{world}.pt", weights_only=True)
    assert len(found) == 2 * len(alone) == 2 * (1 + len(ALGOS))
    for name, gradient in found.items():
        expected = alone[f"{name.split()[0]} 100000"]
        assert expected.abs().max() > 1e-3
        near = 1e-6 * expected.abs().max().clamp_min(1)
        assert (gradient - expected).abs().max() <= near, name


def test_bf16_gradients_are_near_those_of_fp32_and_arrive_in_fp32(small_task, tmp_path):
    exact = gradients(small_task, [300], tmp_path / "exact")
    rough = gradients(small_task, [300], tmp_path / "rough", bf16=True)
    for name in ("sft 300", "grpo 300", "srft 300"):
        assert rough[name].dtype == torch.float32
        assert 1e-4 < (rough[name] - exact[name]).norm() / exact[name].norm() < 0.1


# ---- whole runs ----------------------------------------------------------------------------------
def train(jobs: list) -> None:
    for main, cfg in jobs:
        main(cfg)


def far(a: dict, b: dict) -> float:
    """The largest difference of two sets of weights over the largest weight."""
    largest = max(a[name].abs().max() for name in a)
    return max((a[name] - b[name]).abs().max() for name in a) / largest


def responses_of(out) -> list[str]:
    return [row["response"] for row in data.read_rows(Path(out) / "samples.jsonl")]


def test_runs_on_two_processes_are_the_run_of_one_and_go_on_with_one_or_three(
    small_task, coin, tmp_path
):
    def jobs(name, steps, resume=False):
        common = dict(resume=resume)
        supervised = sft_config(
            small_task, tmp_path / f"sft {name}", steps=steps, micro_tokens=300, **common
        )
        reinforced = rl_config(
            coin,
            tmp_path / f"rl {name}",
            steps=steps // 3,
            eval_every=1,
            algo="dapo",
            options={"kl_coef": 0.01},
            **common,
        )
        return [(sft.main, supervised), (rl.main, reinforced)]

    train(jobs("one", 6))
    run_in(2, tmp_path / "group", train, jobs("two", 3))
    for kind in ("sft", "rl"):
        for world in (1, 3):
            shutil.copytree(tmp_path / f"{kind} two", tmp_path / f"{kind} then {world}")
    train(jobs("then 1", 6, resume=True))
    run_in(3, tmp_path / "group", train, jobs("then 3", 6, resume=True))
    for kind, step in (("sft", 6), ("rl", 2)):
        alone = weights_of(tmp_path / f"{kind} one", step)
        for world in (1, 3):
            other = weights_of(tmp_path / f"{kind} then {world}", step)
            assert far(alone, other) < 1e-5, (kind, world)
    alone = responses_of(tmp_path / "rl one")
    assert alone == responses_of(tmp_path / "rl then 1") == responses_of(tmp_path / "rl then 3")
    tokens = [row["tokens"] for row in lines_of(tmp_path / "rl one")]
    assert tokens == [row["tokens"] for row in lines_of(tmp_path / "rl then 3")]


def save_random_model(folder, out) -> None:
    model, _ = opened(folder, out / "run", from_scratch=True, seed=5)
    model_file.save_model(model, out / "random", max_shard_bytes=20_000)


def test_a_random_model_is_the_same_on_any_number_of_processes(small_task, tmp_path):
    run_in(2, tmp_path, save_random_model, small_task, tmp_path)
    alone = model_file.init_model(model_file.read_config(small_task), 5)
    halves = model_file.load_model(tmp_path / "random")
    assert all(torch.equal(p, q) for p, q in zip(alone.parameters(), halves.parameters()))


# ---- what one process knows, all know ------------------------------------------------------------
def open_used(folder, used) -> str:
    try:
        Run(sft_config(folder, used), 1, Path(folder))
    except UserError as error:
        return str(error)


def failure_of_first() -> str:
    def fails():
        raise OSError("no space")

    try:
        ranks.from_first(fails)
    except (OSError, UserError) as error:
        return str(error)


def exchange(folder, used, out) -> None:
    """Every way in which processes tell each other something; each writes down what it heard."""
    mine = {"rank": ranks.rank(), "text": "ä" * (3 * ranks.rank() + 1)}
    heard = {
        "add_up": ranks.add_up(torch.tensor([1.0, ranks.rank()])).tolist(),
        "gather": ranks.gather(mine),
        "total": ranks.total(0.5),
        "any_of": [ranks.any_of(ranks.rank() == 2), ranks.any_of(False)],
        "from_first": ranks.from_first(lambda: ["only", ranks.rank()]),
        "failure": failure_of_first(),
        "refusal": open_used(folder, used),
        "rows_of": [ranks.rows_of(7), ranks.rows_of(7, sharded=False)],
    }
    (out / f"heard {ranks.rank()}").write_text(json.dumps(heard))


def test_values_and_failures_of_one_process_reach_all_of_them(small_task, tmp_path):
    used = tmp_path / "used"
    used.mkdir()
    (used / "file").write_text("")
    run_in(3, tmp_path, exchange, small_task, used, tmp_path)
    heard = [json.loads((tmp_path / f"heard {n}").read_text()) for n in range(3)]
    for found in heard:
        assert found["add_up"] == [3.0, 3.0]
        assert found["gather"] == [{"rank": n, "text": "ä" * (3 * n + 1)} for n in range(3)]
        assert found["total"] == 1.5
        assert found["any_of"] == [True, False]
        assert found["from_first"] == ["only", 0]
        assert found["failure"] == "no space"
        assert "--overwrite" in found["refusal"]
    rows = [found["rows_of"] for found in heard]
    assert rows == [[[0, 3], [0, 7]], [[3, 6], [0, 7]], [[6, 7], [0, 7]]]


def test_one_process_is_a_group_of_its_own():
    assert ranks.world() == 1
    assert ranks.rank() == 0
    assert ranks.total(0.5) == 0.5
    assert ranks.gather("x") == ["x"]
    assert ranks.any_of(True) and not ranks.any_of(False)
    assert ranks.from_first(lambda: 3) == 3
    assert ranks.rows_of(7) == (0, 7)


def test_seeds_depend_on_every_part_of_their_key_only():
    assert ranks.seed_of(0, "a", 1) == ranks.seed_of(0, "a", 1)
    seeds = set()
    for seed in range(5):
        for use in ("a", "b"):
            for step in range(5):
                seeds.add(ranks.seed_of(seed, use, step))
    assert len(seeds) == 50
    first = torch.rand(1, generator=ranks.generator(0, "x"))
    assert first == torch.rand(1, generator=ranks.generator(0, "x"))


def test_rows_are_dealt_so_that_every_process_gets_as_many_micro_batches_and_each_row_once():
    g = torch.Generator().manual_seed(0)
    for n in (1, 2, 5, 64):
        lengths = torch.randint(1, 200, (n,), generator=g).tolist()
        for world in (1, 2, 3, 8):
            hands = [data.deal(lengths, 512, rank, world) for rank in range(world)]
            assert len({len(hand) for hand in hands}) == 1
            dealt = []
            loads = []
            for hand in hands:
                own = [i for part in hand for i in part]
                dealt += own
                loads.append(sum(lengths[i] for i in own))
            assert sorted(dealt) == list(range(n))
            assert max(loads) - min(loads) <= 200


# ---- an end for all ------------------------------------------------------------------------------
def one_fails() -> None:
    if ranks.rank() == 1:
        raise IndexError("planted")
    torch.distributed.barrier()


def one_dies() -> None:
    if ranks.rank() == 1:
        os._exit(3)
    torch.distributed.barrier()


def one_waits() -> None:
    if ranks.rank() == 1:
        time.sleep(600)
    torch.distributed.barrier()


@pytest.mark.parametrize(
    "work, deadline, message",
    [
        (one_fails, 60, "IndexError: planted"),
        (one_dies, 60, "process 1 ended with code 3"),
        (one_waits, 5, r"processes \[0, 1\] did not end in time"),
    ],
)
def test_no_test_waits_for_a_process_that_is_not_coming(tmp_path, work, deadline, message):
    began = time.monotonic()
    with pytest.raises(AssertionError, match=message):
        run_in(2, tmp_path, work, deadline=deadline)
    assert time.monotonic() - began < deadline + 15
