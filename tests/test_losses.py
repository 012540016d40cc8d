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

STARTS = {"gspo": Objective(surrogate="sequence"), "cispo": Objective(surrogate="cispo"), "dr_grpo": Objective(),
          "sft": Objective(imitation=1.0), **OBJECTIVES}
TIS = {None: "none", "none": "none", "tis": "token", "token": "token", "clamp": "token", "seq_tis": "sequence", "seq": "sequence",
       "icepop": "icepop"}
SAME = ("singleton clip_low clip_high dual_clip log_ratio_clamp kl_coef kl_type kl_clamp entropy_coef mask_truncated agg norm_const "
        "const_div_seqs shaping_gamma mix_norm gate_gamma prefix_adv prefix_clip drop_ratio").split()
RENAMED = {"filter_groups": "dynamic_sampling", "is_low": "tis_low", "is_high": "tis_high", "w1_scale": "imitation",
           "w2_scale": "success_coef", "sft_coef": "imitation", "srft_entropy": "entropy_weights"}
ELSEWHERE = {"adv_norm", "adv_ddof", "adv_eps", "success_threshold", "is_mode", "ratio_cap", "ratio_floor"}


def objective_of(algo: str, hparams: dict) -> Objective:
    """The Objective of a case: the method's own fields, then every hyper-parameter; an unknown one is an error, not a default."""
    unknown = set(hparams) - set(SAME) - set(RENAMED) - ELSEWHERE
    assert not unknown and hparams["adv_norm"] in ("none", "group_std"), f"no meaning here: {sorted(unknown)}, {hparams['adv_norm']}"
    chosen = {RENAMED.get(name, name): value for name, value in hparams.items() if name not in ELSEWHERE}
    if algo == "cispo":         # its bounds are absolute, ours are distances from 1
        cap, floor = hparams["ratio_cap"], hparams["ratio_floor"]
        chosen.update(clip_high=None if cap is None else cap - 1, clip_low=None if floor is None else 1 - floor)
    return replace(STARTS[algo], normalize_std=hparams["adv_norm"] == "group_std", tis=TIS[hparams["is_mode"]], **chosen)


def rows_that_stay(objective: Objective, rewards, ids, expert):
    """(B,) bool: what gate and filter leave, and (B,) long: groups that share a baseline."""
    if objective.demo != "gate":
        keep = torch.ones_like(expert)
        return (keep & losses.is_informative(rewards, ids) if objective.dynamic_sampling else keep), ids
    own = torch.where(expert, -1 - ids, ids)                    # an imitated expert has no say in the rollouts' baseline
    keep = losses.gate_rows(rewards, ids, expert, objective.gate_gamma)
    return (keep & (expert | losses.is_informative(rewards, own)) if objective.dynamic_sampling else keep), own


def prepare(objective: Objective, case: dict, dtype: torch.dtype):
    """(rows, weights (4,B), active (B,) bool) of a case, by the calls that training makes: gate, filter, mask, advantages, ranking, weights."""
    hparams = case["hparams"]
    given = {name: None if value is None else torch.tensor(value, dtype=dtype) for name, value in case["inputs"].items()}
    full, rewards, ids = given["mask"] > 0, given["rewards"], given["group_ids"].long()
    expert = (given["is_expert"] > 0) & (objective.demo in ("row", "gate"))
    active, baseline = rows_that_stay(objective, rewards, ids, expert)
    mask = full & active[:, None] & ((given["truncated"] == 0) | (not objective.mask_truncated))[:, None]
    is_prefix = losses.prefix_tokens(full, given["prefix_len"].long())
    options = dict(normalize_std=objective.normalize_std, eps=hparams["adv_eps"], singleton=objective.singleton, ddof=hparams["adv_ddof"])
    if objective.demo == "prefix":
        keep = losses.most_uncertain(given["entropy"], is_prefix & mask, objective.drop_ratio)
        advantages = losses.prefix_advantages(rewards, ids, is_prefix, keep, objective.prefix_adv == "split", **options)
    else:
        advantages = losses.group_advantages(rewards, baseline, **options)[:, None] * ~(expert & (objective.demo == "gate"))[:, None]
    if case["algo"] == "sft":
        expert, advantages = torch.ones_like(expert), advantages * 0
    entropy_over = objective.entropy_weights
    rows = Rows(mask, advantages * mask, given["old_logp"], given["ref_logp"], given["rollout_logp"], expert, is_prefix,
                rewards > hparams["success_threshold"],
                None if entropy_over == "none" else losses.mean_entropy(given["entropy"], mask, entropy_over))
    weights = torch.zeros(4, len(ids), dtype=torch.float64)
    weights[:, active] = losses.batch_weights(objective, mask.sum(1)[active], ids[active], expert[active])
    return rows, weights, active


def run_case(case: dict, dtype: torch.dtype = torch.float64):
    """(loss, grad_logp (B,T), grad_entropy (B,T) or None, advantages (B,T)) of a case as losses.py computes them."""
    objective = objective_of(case["algo"], case["hparams"])
    rows, weights, _ = prepare(objective, case, dtype)
    logp = torch.tensor(case["inputs"]["logp"], dtype=dtype, requires_grad=True)
    entropy = case["inputs"]["entropy"]
    entropy = None if entropy is None else torch.tensor(entropy, dtype=dtype, requires_grad=True)
    loss = losses.update_loss(objective, logp, entropy, rows, weights)
    loss.backward()
    return loss.detach(), logp.grad, entropy.grad if objective.entropy_coef else None, rows.advantages


@needs_vectors
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["id"])
def test_a_shared_case_agrees_in_loss_gradients_and_advantages(case, dtype):
    expected = case["expected"]
    tolerance = dict(rtol=1e-9, atol=1e-12) if dtype == torch.float64 else dict(rtol=2e-5, atol=2e-6)
    got = dict(zip(("loss", "grad_logp", "grad_entropy", "advantages"), run_case(case, dtype)))
    assert (got["grad_entropy"] is None) == (expected["grad_entropy"] is None)
    for name, value in got.items():
        if value is not None:
            torch.testing.assert_close(value, torch.tensor(expected[name], dtype=dtype), **tolerance, msg=lambda text: f"{name}: {text}")
    rows, _, active = prepare(objective_of(case["algo"], case["hparams"]), case, dtype)
    assert int(rows.mask.sum()) == expected["n_tokens"] and active.int().tolist() == expected["active_rows"]
    if "H" in expected["extra"]:
        torch.testing.assert_close(rows.mean_entropy, torch.tensor(expected["extra"]["H"], dtype=dtype), **tolerance)
    for group, decision in expected["extra"].items() if case["algo"] == "upt" else ():
        mine = torch.tensor(case["inputs"]["group_ids"]) == int(group)
        assert bool((rows.is_expert & active)[mine].any()) == (decision == "sft")
