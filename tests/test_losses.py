"""losses.py against vectors, short independent references and the properties every objective must keep."""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import losses
from losses import OBJECTIVES, Objective, Rows

SHARED = Path(__file__).resolve().parents[2] / "shared" / "objective_cases.json"
VECTORS = json.loads(SHARED.read_text()) if SHARED.exists() else {"cases": [], "misc": []}
needs_vectors = pytest.mark.skipif(not SHARED.exists(), reason="the shared vectors are not part of the project")

TIS = {None: "none", "tis": "token", "token": "token", "seq_tis": "sequence", "seq": "sequence", "icepop": "icepop", "clamp": "token"}
STARTS = {"gspo": Objective(sequence_ratio=True), "cispo": Objective(surrogate="cispo"), "dr_grpo": Objective(), "sft": Objective(imitation=1.0)}
RENAMED = {"adv_ddof": "adv_ddof", "adv_eps": "adv_eps", "singleton": "singleton", "clip_low": "clip_low", "clip_high": "clip_high", "dual_clip": "dual_clip",
           "log_ratio_clamp": "log_ratio_clamp", "kl_coef": "kl_coef", "kl_type": "kl_type", "kl_clamp": "kl_clamp", "entropy_coef": "entropy_coef",
           "filter_groups": "dynamic_sampling", "mask_truncated": "mask_truncated", "is_low": "tis_low", "is_high": "tis_high", "agg": "agg",
           "success_threshold": "success_threshold", "norm_const": "norm_const", "const_div_seqs": "const_div_seqs", "shaping_gamma": "shaping_gamma",
           "w1_scale": "imitation", "w2_scale": "success_coef", "sft_coef": "imitation", "srft_entropy": "entropy_weights", "mix_norm": "mix_norm",
           "gate_gamma": "gate_gamma", "prefix_adv": "prefix_adv", "prefix_clip": "prefix_clip", "drop_ratio": "drop_ratio",
           "ratio_cap": "ratio_cap", "ratio_floor": "ratio_floor"}


def objective_of(algo: str, hparams: dict) -> Objective:
    """The Objective of a case: the method's own, then every hyper-parameter of the case; an unknown one is an error, not a default."""
    unknown = set(hparams) - set(RENAMED) - {"adv_norm", "is_mode"}
    assert not unknown, f"hyper-parameters without a meaning here: {sorted(unknown)}"
    chosen = {RENAMED[name]: value for name, value in hparams.items() if name in RENAMED}
    assert hparams["adv_norm"] in ("none", "group_std"), hparams["adv_norm"]
    return replace(STARTS.get(algo) or OBJECTIVES[algo], normalize_std=hparams["adv_norm"] == "group_std", tis=TIS[hparams["is_mode"]], **chosen)


def prepare(objective: Objective, algo: str, inputs: dict, dtype: torch.dtype):
    """Rows, weights and what else a case expects, by the calls rl.py makes: filter or gate, mask, advantages, ranking, weights."""
    floats = {name: None if value is None else torch.tensor(value, dtype=dtype) for name, value in inputs.items()}
    mask, rewards, ids = floats["mask"] > 0, floats["rewards"], torch.tensor(inputs["group_ids"])
    expert = floats["is_expert"] > 0 if objective.demo in ("row", "gate") else torch.zeros_like(rewards, dtype=torch.bool)
    active = torch.ones_like(expert)
    if objective.demo == "gate":
        active = losses.gate_rows(rewards, ids, expert, objective.gate_gamma)
    pool = active if objective.demo == "gate" else torch.ones_like(expert)       # rows that share a baseline
    if objective.dynamic_sampling:
        active = active & (losses.is_informative(rewards, torch.where(pool, ids, -1 - torch.arange(len(ids)))) | (expert & (objective.imitation > 0)))
    mask = mask & active[:, None]
    if objective.mask_truncated:
        mask = mask & (floats["truncated"] == 0)[:, None]
    is_prefix = losses.prefix_tokens(mask, floats["prefix_len"].long())
    advantages = torch.zeros_like(rewards)
    if algo != "sft":
        advantages[pool] = losses.group_advantages(rewards[pool], ids[pool], objective.normalize_std, objective.adv_eps, objective.singleton, objective.adv_ddof)
    advantages = advantages[:, None] * mask
    if objective.demo == "gate":
        advantages = advantages * ~expert[:, None]
    if objective.demo == "prefix":
        keep = losses.most_uncertain(floats["entropy"], is_prefix, objective.drop_ratio)
        advantages = losses.prefix_advantages(objective, rewards, ids, is_prefix, keep) * mask
    if algo == "sft":
        expert = torch.ones_like(expert)
    mean_entropy = None
    if objective.entropy_weights != "none":
        mean_entropy = losses.mean_entropy(floats["entropy"], mask, objective.entropy_weights)
    rows = Rows(mask, advantages, floats["old_logp"], floats["ref_logp"], floats["rollout_logp"], expert, is_prefix,
                rewards > objective.success_threshold, mean_entropy)
    some = losses.batch_weights(objective, mask.sum(1)[active], ids[active], expert[active])
    weights = losses.Weights(*(torch.zeros(len(ids), dtype=torch.float64).masked_scatter(active, w) for w in some))
    return rows, weights, active


def run_case(case: dict, dtype: torch.dtype = torch.float64):
    """(loss, grad_logp (B,T), grad_entropy (B,T) | None, advantages (B,T)) of a case as losses.py computes them."""
    return _run(case, dtype)[:4]


def _run(case: dict, dtype: torch.dtype):
    objective = objective_of(case["algo"], case["hparams"])
    rows, weights, active = prepare(objective, case["algo"], case["inputs"], dtype)
    logp = torch.tensor(case["inputs"]["logp"], dtype=dtype, requires_grad=True)
    entropy = None if case["inputs"]["entropy"] is None else torch.tensor(case["inputs"]["entropy"], dtype=dtype, requires_grad=True)
    loss = losses.update_loss(objective, logp, entropy, rows, weights)
    loss.backward()
    bonus = entropy is not None and objective.entropy_coef != 0
    return loss.detach(), logp.grad, entropy.grad if bonus else None, rows.advantages, rows, active


@needs_vectors
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["id"])
def test_a_shared_case_agrees_in_loss_gradients_and_advantages(case, dtype):
    expected = case["expected"]
    loss, grad_logp, grad_entropy, advantages, rows, active = _run(case, dtype)
    tolerance = dict(rtol=1e-9, atol=1e-12) if dtype == torch.float64 else dict(rtol=2e-5, atol=2e-6)
    close = lambda a, b: torch.testing.assert_close(a, torch.tensor(b, dtype=dtype), **tolerance)
    close(loss, expected["loss"])
    close(grad_logp, expected["grad_logp"])
    close(advantages, expected["advantages"])
    assert (grad_entropy is None) == (expected["grad_entropy"] is None)
    if grad_entropy is not None:
        close(grad_entropy, expected["grad_entropy"])
    assert int(rows.mask.sum()) == expected["n_tokens"]
    assert active.int().tolist() == expected["active_rows"]
