"""Several processes are one: the same gradients for every objective and cut, the same weights, states that any number loads."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from test_pipeline import coin, lines_of, rl_config, rows_for, sft_config, task, weights_of  # noqa: F401  fixtures

import data
import evaluate
import losses
import model as model_file
import rl
import sft
from core import ranks, run

ALGOS = ("grpo", "dapo", "luffy", "srft", "upt", "prefix_rft")
CPU = torch.device("cpu")


def in_processes(world: int, work, *args) -> None:
    """work(*args) in `world` processes that torchrun would have started."""
    mp.spawn(_enter, (world, str(args[-1]), work, args), nprocs=world)


def _enter(rank, world, folder, work, args) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world
    )
    if rank:
        sys.stdout = open("/dev/null", "w")
    work(*args)
    ranks.stop()


def gradients(folder, sizes, bf16=False) -> dict[str, torch.Tensor]:
    """The gradient of one step on fixed rows by objective and tokens a micro-batch, whole, as one long vector."""
    cfg = sft_config(folder, "unused", bf16=bf16)
    model = evaluate.open_trained(folder, CPU, cfg)
    net, tokenizer, found = ranks.compute(model, bf16, recompute=True), data.Tokenizer(folder), {}
    examples = data.sft_examples(f"{folder}/train.jsonl", tokenizer, 256)[0][:9]
    problems = data.problems(f"{folder}/mixed.jsonl", tokenizer, 64)[0]

    def take(name):
        found[name] = torch.cat([ranks.whole(p.grad).flatten() for p in model.parameters()])
        model.zero_grad()

    for size in sizes:
        batches = sft.micro_batches(examples, size, False)
        for n, batch in enumerate(batches, 1):
            ranks.reduce_now(net, n == len(batches))
            sft.batch_loss(net, batch, sum(len(r.response) for r in examples), CPU).backward()
        take(f"sft {size}")
        for algo in ALGOS:
            objective = replace(losses.OBJECTIVES[algo], entropy_coef=0.01)
            cfg = rl_config(folder, "unused", algo=algo, micro_tokens=size)
            ((rows, batch, weights),) = rl.plan_updates(
                replace(cfg, update_prompts=4),
                objective,
                net,
                None,
                rows_for(algo, tokenizer, problems),
                CPU,
            )[0]
            rl.train_on(cfg, objective, net, rows, batch, weights, CPU)
            take(f"{algo} {size}")
    return found


def save_gradients(folder, sizes, out) -> None:
    found = gradients(folder, sizes)
    if ranks.rank() == 0:
        torch.save(found, Path(out) / f"{ranks.world()}.pt")


@pytest.mark.parametrize("world", [2, 4])
def test_gradients_of_every_objective_are_those_of_one_process_however_the_step_is_cut(
    task, tmp_path, world
):
    alone = gradients(task, [100_000])
    in_processes(world, save_gradients, task, [1, 300], tmp_path)
    for name, found in torch.load(tmp_path / f"{world}.pt", weights_only=True).items():
        expected = alone[f"{name.split()[0]} 100000"]
        assert expected.abs().max() > 1e-3
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max().clamp_min(1), name


def test_bf16_gradients_are_near_those_of_fp32_and_arrive_in_fp32(task):
    exact, rough = gradients(task, [300]), gradients(task, [300], bf16=True)
    assert all(g.dtype == torch.float32 for g in rough.values())
    assert all(
        1e-4 < (rough[k] - exact[k]).norm() / exact[k].norm() < 0.1
        for k in ("sft 300", "grpo 300", "srft 300")
    )


def train(cfgs) -> None:
    for main, cfg in cfgs:
        main(cfg)


def train_in(world, tmp_path, *cfgs) -> None:
    if world == 1:
        return train(cfgs)
    (tmp_path / str(world)).mkdir(exist_ok=True)
    mp.spawn(_enter, (world, str(tmp_path / str(world)), train, (cfgs,)), nprocs=world)


def far(a, b) -> float:
    """The largest difference of two sets of weights over the largest weight."""
    return max((a[k] - b[k]).abs().max() for k in a) / max(a[k].abs().max() for k in a)


def test_runs_on_two_processes_are_the_run_of_one_and_go_on_with_one_or_three(task, coin, tmp_path):  # noqa: F811
    def cfgs(name, steps, resume=False):
        return (
            (
                sft.main,
                sft_config(
                    task,
                    tmp_path / f"sft {name}",
                    steps=steps,
                    eval_every=3,
                    resume=resume,
                    micro_tokens=300,
                ),
            ),
            (
                rl.main,
                rl_config(
                    coin,
                    tmp_path / f"rl {name}",
                    steps=steps // 3,
                    eval_every=1,
                    algo="dapo",
                    resume=resume,
                    options={"kl_coef": 0.01},
                ),
            ),
        )

    train_in(1, tmp_path, *cfgs("one", 6))
    train_in(2, tmp_path, *cfgs("two", 3))
    for name in ("sft two", "rl two"):
        for world in (1, 3):
            target = tmp_path / name.replace("two", f"then {world}")
            target.mkdir()
            for path in sorted((tmp_path / name).rglob("*")):
                mirror = target / path.relative_to(tmp_path / name)
                mirror.mkdir() if path.is_dir() else mirror.write_bytes(path.read_bytes())
    train_in(1, tmp_path, *cfgs("then 1", 6, resume=True))
    train_in(3, tmp_path, *cfgs("then 3", 6, resume=True))
    for kind, step in (("sft", 6), ("rl", 2)):
        alone = weights_of(tmp_path / f"{kind} one", step)
        assert all(
            far(alone, weights_of(tmp_path / f"{kind} then {world}", step)) < 1e-5
            for world in (1, 3)
        ), kind
    samples = [
        [
            json.loads(line)["response"]
            for line in (tmp_path / f"rl {name}" / "samples.jsonl").read_text().splitlines()
        ]
        for name in ("one", "then 1", "then 3")
    ]
    assert samples[0] == samples[1] == samples[2]
    assert [row["tokens"] for row in lines_of(tmp_path / "rl one")] == [
        row["tokens"] for row in lines_of(tmp_path / "rl then 3")
    ]


def say_nothing_twice(folder, out) -> None:
    """A user's mistake that only the first process can see reaches all of them."""
    try:
        run.Run(sft_config(folder, out))
    except ValueError as error:
        (Path(out) / f"said {ranks.rank()}").write_text(str(error))


def test_a_used_directory_is_refused_by_all_processes(task, tmp_path):
    (tmp_path / "used").write_text("")
    in_processes(2, say_nothing_twice, task, tmp_path)
    assert all("--overwrite" in (tmp_path / f"said {n}").read_text() for n in (0, 1))


def test_rows_are_dealt_so_that_every_process_gets_as_many_micro_batches_and_each_row_once():
    g = torch.Generator().manual_seed(0)
    for n in (1, 2, 5, 64):
        lengths = torch.randint(1, 200, (n,), generator=g).tolist()
        for world in (1, 2, 3, 8):
            hands = [data.deal(lengths, 512, rank, world) for rank in range(world)]
            assert len({len(hand) for hand in hands}) == 1
            assert sorted(i for hand in hands for part in hand for i in part) == list(range(n))
            loads = [sum(lengths[i] for part in hand for i in part) for hand in hands]
            assert max(loads) - min(loads) <= 200


def test_a_random_model_is_the_same_on_any_number_of_processes(task, tmp_path):
    in_processes(2, save_random_model, task, tmp_path)
    alone, halves = (
        model_file.init_model(model_file.read_config(task), 5),
        model_file.load_model(tmp_path / "random"),
    )
    assert all(torch.equal(p, q) for p, q in zip(alone.parameters(), halves.parameters()))


def save_random_model(folder, out) -> None:
    cfg = sft_config(folder, "unused")
    model_file.save_model(
        evaluate.open_trained(folder, CPU, cfg, seed=5),
        Path(out) / "random",
        max_shard_bytes=20_000,
    )
