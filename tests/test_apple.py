"""Steps without float64, which Apple's GPUs lack: run on the CPU, where making one fails here."""

import math

import pytest
import torch
from small_runs import ALGOS, groups_for, policy_of, rl_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import methods
import rl
import sft
from core import wide


class NoFloat64(TorchDispatchMode):
    """Fails where an operation makes a tensor of float64, as an Apple GPU would."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            assert not (isinstance(x, torch.Tensor) and x.dtype == torch.float64), func
        return made


@pytest.mark.parametrize("algo", ALGOS)
def test_an_update_makes_no_float64_where_there_is_none(algo, small_task, tmp_path, monkeypatch):
    policy = policy_of(small_task)
    problems, _ = data.problems(f"{small_task}/mixed.jsonl", policy.tokenizer, 64)
    groups = groups_for(algo, policy, problems)
    cfg = rl_config(small_task, tmp_path)
    method = methods.load(algo)()
    monkeypatch.setattr(wide, "NARROW", {"cpu"})
    with NoFloat64():
        updates = rl.make_batches(cfg, method, policy.net, None, groups)
        sums = [rl.train_on(cfg, method, policy.net, update) for update in updates]
    assert sums
    assert all(math.isfinite(value) for value in sums[0].values())


def test_a_step_of_sft_makes_no_float64_where_there_is_none(small_task, monkeypatch):
    policy = policy_of(small_task)
    rows, _ = data.sft_examples(f"{small_task}/train.jsonl", policy.tokenizer, 64)
    monkeypatch.setattr(wide, "NARROW", {"cpu"})
    step = sft.make_step([rows[i] for i in range(4)], 256)
    with NoFloat64():
        for ids, mask in step.parts:
            sft.batch_loss(policy.net, ids, mask, step.n_trained).backward()
            assert sft.batch_loss(policy.net, ids, mask, step.n_trained, 0.5).isfinite()
