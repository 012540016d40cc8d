"""A case of reference.py through losses.py, by the calls that rl.py makes, in their order."""

from typing import NamedTuple

import torch
from torch import Tensor

import losses
import methods
from losses import Batch, Row

FILES = {"dr_grpo": "grpo", "gspo": "grpo", "cispo": "grpo"}  # variants that are flags of GRPO


class Result(NamedTuple):
    loss: Tensor
    grad_logp: Tensor  # (B, T)
    grad_entropy: Tensor | None  # (B, T)
    advantages: Tensor  # (B, T)


def method_of(case: dict) -> losses.GRPO:
    return methods.load(FILES.get(case["algo"], case["algo"]))(**case["options"])


def trained_rows(method, inputs: dict) -> list[int]:
    """What rl.collect would train on: groups that carry a signal, completed by the method."""
    kept = []
    for group in sorted(set(inputs["group_ids"])):
        rollouts = []
        expert = None
        for b, g in enumerate(inputs["group_ids"]):
            reward = inputs["rewards"][b]
            row = Row([b], [], [], reward, reward, group, is_expert=bool(inputs["is_expert"][b]))
            if g == group and row.is_expert:
                expert = row
            elif g == group:
                rollouts.append(row)
        rewards = [row.correct for row in rollouts]
        demonstration = [0] if expert else None
        if not method.dynamic_sampling or method.carries_signal(rewards, demonstration):
            kept += [row.prompt[0] for row in method.complete(rollouts, expert)]
    return sorted(kept)


def prepare(case: dict, dtype: torch.dtype = torch.float64) -> tuple[losses.GRPO, Batch, list[int]]:
    """(method, weighed batch of the rows that are trained, their numbers)."""
    method = method_of(case)
    given = {}
    for name, values in case["inputs"].items():
        given[name] = None if values is None else torch.tensor(values, dtype=dtype)
    full = given["mask"] > 0
    mask = full
    if method.mask_truncated:
        mask = full & (given["truncated"] == 0)[:, None]
    unread = torch.zeros_like(given["mask"])
    batch = Batch(
        mask=mask,
        rewards=given["rewards"],
        is_success=given["rewards"] > 0.5,
        groups=given["group_ids"].long(),
        is_expert=given["is_expert"] > 0,
        is_prefix=full & (full.cumsum(1) <= given["prefix_len"][:, None]),
        rollout_logp=unread if given["rollout_logp"] is None else given["rollout_logp"],
        old_logp=given["old_logp"],
        ref_logp=given["ref_logp"],
        entropy=given["entropy"],
    )
    kept = trained_rows(method, case["inputs"])
    index = torch.tensor(kept, dtype=torch.long)
    return method, losses.weigh(method, losses.take(batch, index)), kept


def leaf(values, dtype: torch.dtype) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=dtype, requires_grad=True)


def run(case: dict, dtype: torch.dtype = torch.float64) -> Result:
    """Loss, gradients and advantages of a case; 0 at rows that are not trained."""
    method, batch, kept = prepare(case, dtype)
    logp = leaf(case["inputs"]["logp"], dtype)
    entropy = leaf(case["inputs"]["entropy"], dtype)
    given = None if entropy is None else entropy[kept]
    loss = losses.update_loss(method, logp[kept], given, batch)
    loss.backward()
    advantages = torch.zeros_like(logp.detach())
    advantages[kept] = batch.advantages
    grad_entropy = entropy.grad if method.entropy_coef else None
    return Result(loss.detach(), logp.grad, grad_entropy, advantages)
