"""losses.py against vectors, short independent references and the properties every objective must keep."""

import copy
import json
import math
import random
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import losses
from losses import OBJECTIVES, Objective, Rows

SHARED = Path(__file__).resolve().parents[2] / "shared" / "objective_cases.json"
VECTORS = json.loads(SHARED.read_text()) if SHARED.exists() else {"cases": [], "misc": []}
needs_vectors = pytest.mark.skipif(
    not SHARED.exists(), reason="the shared vectors are not part of the project"
)

STARTS = {
    "gspo": Objective(surrogate="sequence"),
    "cispo": Objective(surrogate="cispo"),
    "dr_grpo": Objective(),
    "sft": Objective(imitation=1.0),
    **OBJECTIVES,
}
TIS = {
    None: "none",
    "none": "none",
    "tis": "token",
    "token": "token",
    "clamp": "token",
    "seq_tis": "sequence",
    "seq": "sequence",
    "icepop": "icepop",
}
SAME = """singleton clip_low clip_high dual_clip log_ratio_clamp kl_coef kl_type kl_clamp entropy_coef mask_truncated
          agg norm_const const_div_seqs shaping_gamma mix_norm gate_gamma prefix_adv prefix_clip drop_ratio""".split()
RENAMED = {
    "filter_groups": "dynamic_sampling",
    "is_low": "tis_low",
    "is_high": "tis_high",
    "w1_scale": "imitation",
    "w2_scale": "success_coef",
    "sft_coef": "imitation",
    "srft_entropy": "entropy_weights",
}
ELSEWHERE = {
    "adv_norm",
    "adv_ddof",
    "adv_eps",
    "success_threshold",
    "is_mode",
    "ratio_cap",
    "ratio_floor",
}


def objective_of(algo: str, hparams: dict) -> Objective:
    """The Objective of a case: the method's own fields, then every hyper-parameter; an unknown one is an error."""
    unknown = set(hparams) - set(SAME) - set(RENAMED) - ELSEWHERE
    assert not unknown, f"hyper-parameters without a meaning here: {sorted(unknown)}"
    assert hparams["adv_norm"] in ("none", "group_std"), hparams["adv_norm"]
    chosen = {
        RENAMED.get(name, name): value for name, value in hparams.items() if name not in ELSEWHERE
    }
    if algo == "cispo":  # its bounds are absolute, ours are distances from 1
        cap, floor = hparams["ratio_cap"], hparams["ratio_floor"]
        chosen.update(
            clip_high=None if cap is None else cap - 1,
            clip_low=None if floor is None else 1 - floor,
        )
    chosen.update(normalize_std=hparams["adv_norm"] == "group_std", tis=TIS[hparams["is_mode"]])
    return replace(STARTS[algo], **chosen)


def rows_that_stay(objective: Objective, rewards, ids, expert):
    """(B,) bool: what gate and filter leave, and (B,) long: groups that share a baseline."""
    if objective.demo != "gate":
        keep = torch.ones_like(expert)
        return (
            keep & losses.is_informative(rewards, ids) if objective.dynamic_sampling else keep
        ), ids
    own = torch.where(
        expert, -1 - ids, ids
    )  # an imitated expert has no say in the rollouts' baseline
    keep = losses.gate_rows(rewards, ids, expert, objective.gate_gamma)
    return (
        keep & (expert | losses.is_informative(rewards, own))
        if objective.dynamic_sampling
        else keep
    ), own


def prepare(objective: Objective, case: dict, dtype: torch.dtype):
    """(rows, weights (4,B), active (B,) bool) of a case, by the calls that training makes, in their order."""
    hparams = case["hparams"]
    given = {
        name: None if x is None else torch.tensor(x, dtype=dtype)
        for name, x in case["inputs"].items()
    }
    full, rewards, ids = given["mask"] > 0, given["rewards"], given["group_ids"].long()
    expert = (given["is_expert"] > 0) & (objective.demo in ("row", "gate"))
    active, baseline = rows_that_stay(objective, rewards, ids, expert)
    mask = (
        full
        & active[:, None]
        & ((given["truncated"] == 0) | (not objective.mask_truncated))[:, None]
    )
    is_prefix = losses.prefix_tokens(full, given["prefix_len"].long())
    options = dict(
        normalize_std=objective.normalize_std,
        singleton=objective.singleton,
        eps=hparams["adv_eps"],
        ddof=hparams["adv_ddof"],
    )
    if objective.demo == "prefix":
        keep = losses.most_uncertain(given["entropy"], is_prefix & mask, objective.drop_ratio)
        advantages = losses.prefix_advantages(
            rewards, ids, is_prefix, keep, objective.prefix_adv == "split", **options
        )
    else:
        imitated = expert & (objective.demo == "gate")
        advantages = (losses.group_advantages(rewards, baseline, **options) * ~imitated)[:, None]
    if case["algo"] == "sft":
        expert, advantages = torch.ones_like(expert), advantages * 0
    entropy_over = objective.entropy_weights
    rows = Rows(
        mask,
        advantages * mask,
        given["old_logp"],
        given["ref_logp"],
        given["rollout_logp"],
        expert,
        is_prefix,
        rewards > hparams["success_threshold"],
        None
        if entropy_over == "none"
        else losses.mean_entropy(given["entropy"], mask, entropy_over),
    )
    weights = torch.zeros(4, len(ids), dtype=torch.float64)
    weights[:, active] = losses.batch_weights(
        objective, mask.sum(1)[active], ids[active], expert[active]
    )
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
    return (
        loss.detach(),
        logp.grad,
        entropy.grad if objective.entropy_coef else None,
        rows.advantages,
    )


@needs_vectors
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", VECTORS["cases"], ids=[case["id"] for case in VECTORS["cases"]])
def test_a_shared_case_agrees_in_loss_gradients_and_advantages(case, dtype):
    expected = case["expected"]
    tolerance = (
        dict(rtol=1e-9, atol=1e-12) if dtype == torch.float64 else dict(rtol=2e-5, atol=2e-6)
    )
    got = dict(zip(("loss", "grad_logp", "grad_entropy", "advantages"), run_case(case, dtype)))
    assert (got["grad_entropy"] is None) == (expected["grad_entropy"] is None)
    for name, value in got.items():
        if value is not None:
            want = torch.tensor(expected[name], dtype=dtype)
            torch.testing.assert_close(value, want, **tolerance, msg=lambda text: f"{name}: {text}")
    rows, _, active = prepare(objective_of(case["algo"], case["hparams"]), case, dtype)
    assert (
        int(rows.mask.sum()) == expected["n_tokens"]
        and active.int().tolist() == expected["active_rows"]
    )
    if "H" in expected["extra"]:
        torch.testing.assert_close(
            rows.mean_entropy, torch.tensor(expected["extra"]["H"], dtype=dtype), **tolerance
        )
    for group, decision in expected["extra"].items() if case["algo"] == "upt" else ():
        mine = torch.tensor(case["inputs"]["group_ids"]) == int(group)
        assert bool((rows.is_expert & active)[mine].any()) == (decision == "sft")


def run_rule(case: dict):
    """What losses.py gives for one of the smaller rules: overlong, prefix_window, dynamic_sampling, ..."""
    x = dict(case["input"])
    if case["kind"] == "overlong":
        return losses.overlong_penalty(x["length"], x["max_len"], x["cache_len"], x["factor"])
    if case["kind"] == "prefix_window":
        return list(losses.prefix_window(x.pop("step"), x.pop("total_steps"), **x))
    if case["kind"] == "prefix_length":
        window = losses.prefix_window(x["step"], x["total_steps"])
        return losses.prefix_length(x["u"], window, x["demo_len"], x["min_prefix_len"])
    if case["kind"] == "dynamic_sampling":
        found = losses.collect_informative(x["rounds"], x["train_prompts"], x.get("max_rounds", 10))
        names = ("selected", "dropped", "discarded_surplus", "rounds_used", "status")
        return {
            **dict(zip(names, found)),
            "leftover": [],
        }  # nothing is carried over to the next step
    assert case["kind"] == "group_advantage", case["kind"]
    options = {name: x[name] for name in ("singleton", "ddof", "eps") if name in x}
    rewards, ids = torch.tensor(x["rewards"], dtype=torch.float64), torch.tensor(x["group_ids"])
    return losses.group_advantages(
        rewards, ids, normalize_std=x["norm"] == "group_std", **options
    ).tolist()


@needs_vectors
@pytest.mark.parametrize("case", VECTORS["misc"], ids=[case["id"] for case in VECTORS["misc"]])
def test_a_shared_rule_gives_the_expected_value(case):
    exact = case["kind"] in ("dynamic_sampling", "prefix_length")
    assert run_rule(case) == (
        case["expected"] if exact else pytest.approx(case["expected"], rel=1e-9, abs=0)
    )


# --------------------------------------------------------------------------- an independent reference, loops and floats
DEFAULTS = dict(
    agg="token-mean",
    norm_const=8.0,
    const_div_seqs=True,
    adv_norm="none",
    adv_ddof=1,
    adv_eps=1e-6,
    singleton="zero",
    clip_low=None,
    clip_high=None,
    dual_clip=None,
    log_ratio_clamp=None,
    kl_coef=0.0,
    kl_type="k3",
    kl_clamp=None,
    entropy_coef=0.0,
    filter_groups=False,
    mask_truncated=False,
    is_mode=None,
    is_low=None,
    is_high=None,
    success_threshold=0.5,
)
CLIP = dict(clip_low=0.2, clip_high=0.2)
METHODS = {
    "sft": {},
    "grpo": CLIP,
    "dapo_d": {**CLIP, "filter_groups": True},
    "dr_grpo": {**CLIP, "agg": "const"},
    "dapo_dc": dict(adv_norm="group_std", clip_low=0.2, clip_high=0.28, filter_groups=True),
    "gspo": dict(agg="seq-mean-token-mean", adv_norm="group_std", clip_low=0.1, clip_high=0.1),
    "cispo": dict(ratio_cap=1.3, ratio_floor=None),
    "luffy": dict(shaping_gamma=0.1),
    "srft": dict(
        shaping_gamma=0.1, w1_scale=0.5, w2_scale=0.1, srft_entropy="seq", mix_norm="joint"
    ),
    "upt": {**CLIP, "gate_gamma": 0.25, "sft_coef": 0.7, "mix_norm": "joint"},
    "prefix_rft": {**CLIP, "drop_ratio": 0.6, "prefix_adv": "group", "prefix_clip": True},
}
N_ROWS, WIDTH = 14, 5


def make_case(algo: str, seed: int = 0, **hparams) -> dict:
    """Three groups of four and one of one, padded with garbage; group 2 has a fifth row, without a token.

    Groups 0 and 1 have an expert or a hybrid if the method knows such a thing, group 2 has none.
    """
    rng = random.Random(f"{algo} {seed}")
    lengths = [rng.randint(1, WIDTH) for _ in range(N_ROWS - 1)] + [0]
    ids = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 2]
    kind = [1 if i in (3, 10) else 0 for i in range(N_ROWS)]

    def table(make):
        return [
            [make(b, t) if t < n else rng.choice([-200.0, 0.0, 77.0]) for t in range(WIDTH)]
            for b, n in enumerate(lengths)
        ]

    logp = table(lambda b, t: -rng.expovariate(1.0) - 0.01)
    near = lambda width: table(lambda b, t: logp[b][t] + rng.gauss(0, width))
    binary = rng.random() < 0.7
    inputs = dict(
        logp=logp,
        old_logp=near(0.3),
        ref_logp=near(1.0),
        rollout_logp=near(0.3),
        entropy=table(lambda b, t: rng.expovariate(1.0)),
        mask=[[int(t < n) for t in range(WIDTH)] for n in lengths],
        group_ids=ids,
        rewards=[float(rng.random() < 0.5) if binary else rng.random() for _ in range(N_ROWS)],
        is_expert=kind if algo in ("luffy", "srft", "upt") else [0] * N_ROWS,
        prefix_len=[
            min(k * rng.randint(1, 4), max(n - 1, 0)) * (algo == "prefix_rft")
            for k, n in zip(kind, lengths)
        ],
        truncated=[int(rng.random() < 0.2) for _ in range(N_ROWS)],
    )
    return dict(
        id=f"{algo} {seed}",
        algo=algo,
        inputs=inputs,
        hparams={**DEFAULTS, **METHODS[algo], **hparams},
    )


def reference_advantage(rewards: list[float], b: int, members: list[int], h: dict) -> float:
    """Advantage of row b among `members`, by the definition."""
    values = [rewards[i] for i in members]
    if len(values) == 1:
        return rewards[b] if h["singleton"] == "raw" else 0.0
    if max(values) == min(values):
        return 0.0
    centred = rewards[b] - sum(values) / len(values)
    if h["adv_norm"] == "none":
        return centred
    return centred / (
        (statistics.stdev if h["adv_ddof"] else statistics.pstdev)(values) + h["adv_eps"]
    )


def reference_rows(case: dict):
    """(active rows, trained tokens [(b, t)], advantages {(b, t): float}) by loops."""
    x, h, algo = case["inputs"], case["hparams"], case["algo"]
    rows = range(len(x["rewards"]))
    expert = [bool(e) for e in x["is_expert"]]
    active = set(rows)
    for g in set(x["group_ids"]):
        members = [b for b in rows if x["group_ids"][b] == g]
        if algo == "upt":
            plain = [b for b in members if not expert[b]]
            solved = sum(x["rewards"][b] for b in plain) / len(plain)
            imitate = len(plain) < len(members) and solved <= h["gate_gamma"] + 1e-9
            active -= {b for b in members if expert[b] != imitate}
            members = [] if imitate else plain
        if h["filter_groups"] and members and len({x["rewards"][b] for b in members}) == 1:
            active -= set(members)
    tokens = [
        (b, t)
        for b in sorted(active)
        for t in range(len(x["mask"][b]))
        if x["mask"][b][t] and not (h["mask_truncated"] and x["truncated"][b])
    ]
    in_prefix = lambda b, t: t < x["prefix_len"][b]
    ranked = sorted((x["entropy"][b][t], b, t) for b, t in tokens if in_prefix(b, t))
    lost = {(b, t) for _, b, t in ranked[: int(h.get("drop_ratio", 0) * len(ranked))]}
    advantages = {}
    for b, t in tokens:
        group = [
            i
            for i in rows
            if x["group_ids"][i] == x["group_ids"][b] and not (algo == "upt" and expert[i])
        ]
        plain = [i for i in group if not x["prefix_len"][i]]
        if algo == "sft" or (b, t) in lost or (algo == "upt" and expert[b]):
            advantages[b, t] = 0.0
        elif h.get("prefix_adv") == "split" and x["prefix_len"][b]:
            baseline = sum(x["rewards"][i] for i in plain) / len(plain)
            advantages[b, t] = x["rewards"][b] - (baseline if in_prefix(b, t) else 0.0)
        else:
            members = plain if h.get("prefix_adv") == "split" else group
            advantages[b, t] = reference_advantage(x["rewards"], b, members, h)
    return active, tokens, advantages


def reference_weight(b: int, rows: list[int], lengths: dict, x: dict, h: dict) -> float:
    """Weight of a token of row b when `rows` make up the batch."""
    filled = [i for i in rows if lengths[i]]
    if h["agg"] == "token-mean":
        return 1 / sum(lengths[i] for i in rows)
    if h["agg"] == "const":
        return 1 / h["norm_const"] / (len(rows) if h["const_div_seqs"] else 1)
    if h["agg"] == "group-token-mean":
        mine = sum(lengths[i] for i in rows if x["group_ids"][i] == x["group_ids"][b])
        return 1 / len({x["group_ids"][i] for i in filled}) / mine
    return 1 / len(filled) / (lengths[b] if h["agg"] == "seq-mean-token-mean" else 1)


def reference_ratio(case: dict, logp, b: int, t: int, row: list[int]) -> float:
    """exp of the (clamped) log-ratio of a rollout token, or of its mean over the row's tokens."""
    x, h = case["inputs"], case["hparams"]
    bound = math.inf if h["log_ratio_clamp"] is None else h["log_ratio_clamp"]
    old = x["old_logp"] or x["logp"]
    d = {s: max(-bound, min(bound, logp[b][s] - old[b][s])) for s in row}
    return math.exp(sum(d.values()) / len(row) if case["algo"] == "gspo" else d[t])


def reference_sampler_weight(case: dict, b: int, t: int, row: list[int]) -> float:
    """Weight of the gap between trainer and sampler; tokens that were not sampled weigh 1."""
    x, h = case["inputs"], case["hparams"]
    if h["is_mode"] is None or t < x["prefix_len"][b]:
        return 1.0
    gap = {
        s: (x["old_logp"] or x["logp"])[b][s] - x["rollout_logp"][b][s]
        for s in row
        if s >= x["prefix_len"][b]
    }
    weight = math.exp(sum(gap.values()) if h["is_mode"] == "seq_tis" else gap[t])
    low, high = h["is_low"] or 0.0, math.inf if h["is_high"] is None else h["is_high"]
    if h["is_mode"] == "icepop":
        return weight if low <= weight <= high else 0.0
    return max(low, min(high, weight))


def reference_rollout_token(
    case: dict, logp, b: int, t: int, row: list[int], A: float, H: float
) -> float:
    """The loss of one token the policy wrote. Stopped gradients read case["inputs"]["logp"], live ones `logp`."""
    x, h, algo = case["inputs"], case["hparams"], case["algo"]
    if algo == "srft":
        return (
            -h["w2_scale"] * math.exp(H) * logp[b][t]
            if x["rewards"][b] > h["success_threshold"]
            else logp[b][t]
        )
    if algo == "cispo":
        r = reference_ratio(case, x["logp"], b, t, row)
        return -min(max(r, h["ratio_floor"] or 0.0), h["ratio_cap"]) * A * logp[b][t]
    r = reference_ratio(case, logp, b, t, row)
    free = t < x["prefix_len"][b] and not h["prefix_clip"]
    low = -math.inf if free or h["clip_low"] is None else 1 - h["clip_low"]
    high = math.inf if free or h["clip_high"] is None else 1 + h["clip_high"]
    ell = -min(r * A, min(max(r, low), high) * A)
    return min(ell, -A * h["dual_clip"]) if h["dual_clip"] is not None and A < 0 else ell


def reference_kl(case: dict, logp, b: int, t: int) -> float:
    x, h = case["inputs"], case["hparams"]
    d = logp[b][t] - x["ref_logp"][b][t]
    if h["kl_type"] in ("k1", "k2"):
        return d if h["kl_type"] == "k1" else d * d / 2
    k3 = math.exp(-d) + d - 1
    return k3 if h["kl_clamp"] is None else max(-h["kl_clamp"], min(h["kl_clamp"], k3))


def reference_loss(case: dict, logp, plan) -> float:
    """The whole step's loss, token by token; plan: reference_rows(case)."""
    x, h, algo = case["inputs"], case["hparams"], case["algo"]
    active, tokens, advantages = plan
    rows = {b: [t for i, t in tokens if i == b] for b in active}
    lengths = {b: len(row) for b, row in rows.items()}
    expert = [bool(e) or algo == "sft" for e in x["is_expert"]]
    n_imitated = sum(lengths[b] for b in active if expert[b])
    separate = h.get("mix_norm") == "separate"
    mean_H = lambda group: sum(x["entropy"][b][t] for b, t in group) / len(group)
    loss = 0.0
    for b, t in tokens:
        H = mean_H(tokens if h.get("srft_entropy") == "batch" else [(b, s) for s in rows[b]])
        joint = reference_weight(b, list(active), lengths, x, h)
        policy_rows = [i for i in active if not (separate and algo == "upt" and expert[i])]
        if not expert[b]:
            ell = reference_rollout_token(case, logp, b, t, rows[b], advantages[b, t], H)
            ell *= reference_sampler_weight(case, b, t, rows[b])
            loss += ell * reference_weight(b, policy_rows, lengths, x, h)
        else:
            srft = h.get("w1_scale", 0.0) * math.exp(-H)
            coef = {"sft": 1.0, "upt": h.get("sft_coef"), "luffy": 0.0, "srft": srft}[algo]
            loss += -coef * logp[b][t] * (1 / n_imitated if separate else joint)
        if expert[b] and algo in ("luffy", "srft"):
            p = math.exp(logp[b][t])
            loss += -advantages[b, t] * p / (p + h["shaping_gamma"]) * joint
        loss += h["kl_coef"] * reference_kl(case, logp, b, t) * joint if h["kl_coef"] else 0.0
        loss -= h["entropy_coef"] * x["entropy"][b][t] / len(tokens)
    return loss


def count_tokens_that_agree(case: dict) -> int:
    """Compares loss, advantages and the slope at every token with the loops; number of trained tokens."""
    loss, grad_logp, grad_entropy, advantages = run_case(case)
    x = case["inputs"]
    plan = _, tokens, expected = reference_rows(case)
    assert loss.item() == pytest.approx(
        reference_loss(case, x["logp"], plan), rel=1e-10, abs=1e-12
    ), case["hparams"]
    for b in range(N_ROWS):
        for t in range(WIDTH):
            assert advantages[b, t].item() == pytest.approx(
                expected.get((b, t), 0.0), rel=1e-10, abs=1e-14
            )
            if (b, t) not in expected:
                assert grad_logp[b, t] == 0
                continue
            up, down = copy.deepcopy(x["logp"]), copy.deepcopy(x["logp"])
            up[b][t] += 1e-6
            down[b][t] -= 1e-6
            slope = (reference_loss(case, up, plan) - reference_loss(case, down, plan)) / 2e-6
            assert grad_logp[b, t].item() == pytest.approx(slope, rel=1e-5, abs=1e-8), (
                b,
                t,
                case["hparams"],
            )
    if grad_entropy is not None:
        per_token = case["hparams"]["entropy_coef"] / max(len(tokens), 1)
        trained = torch.tensor(
            [[float((b, t) in expected) for t in range(WIDTH)] for b in range(N_ROWS)]
        )
        assert torch.allclose(grad_entropy, -per_token * trained.double())
    return len(tokens)


OPTIONS = [dict(agg=agg) for agg in losses.CHOICES["agg"]] + [
    dict(agg="const", const_div_seqs=False),
    dict(adv_norm="group_std"),
    dict(adv_norm="group_std", adv_ddof=0),
    dict(singleton="raw"),
    dict(dual_clip=1.1),
    dict(log_ratio_clamp=0.2),
    dict(clip_low=0.1, clip_high=None),
    dict(is_mode="tis", is_high=1.1),
    dict(is_mode="tis", is_low=0.9, is_high=1.2),
    dict(is_mode="seq_tis", is_high=1.5),
    dict(is_mode="icepop", is_low=0.8, is_high=1.25),
    dict(kl_coef=0.1, kl_type="k1"),
    dict(kl_coef=0.1, kl_type="k2"),
    dict(kl_coef=0.1),
    dict(kl_coef=0.1, kl_clamp=0.5),
    dict(entropy_coef=0.01),
    dict(mask_truncated=True),
    dict(filter_groups=True),
]
OFFICIAL = dict(mix_norm="separate", agg="const", const_div_seqs=False)
SPECIAL = {
    "cispo": [dict(ratio_floor=0.8, ratio_cap=1.28)],
    "luffy": [CLIP],
    "srft": [
        OFFICIAL,
        dict(mix_norm="separate"),
        dict(srft_entropy="batch"),
        dict(success_threshold=0.2),
    ],
    "upt": [
        OFFICIAL,
        dict(gate_gamma=0.0),
        dict(gate_gamma=0.5),
        dict(mix_norm="separate"),
        dict(mix_norm="separate", agg="const", kl_coef=0.1),
        dict(clip_low=None, clip_high=None),
        dict(mix_norm="separate", filter_groups=True, agg="group-token-mean"),
    ],
    "prefix_rft": [
        dict(prefix_adv="split"),
        dict(prefix_clip=False, dual_clip=1.1),
        dict(drop_ratio=0.0),
        dict(drop_ratio=1.0),
        dict(prefix_adv="split", is_mode="seq_tis", is_high=1.2),
        dict(prefix_adv="split", mask_truncated=True),
        dict(prefix_adv="split", singleton="raw"),
    ],
}


@pytest.mark.parametrize("algo", METHODS)
def test_every_method_under_every_option_agrees_with_loops_over_tokens(algo):
    for seed, options in enumerate([{}] + OPTIONS + SPECIAL.get(algo, [])):
        assert count_tokens_that_agree(make_case(algo, seed, **options)) >= 10


@pytest.mark.parametrize("algo", METHODS)
def test_float32_stays_close_to_float64_under_every_option(algo):
    for seed, options in enumerate([{}] + OPTIONS + SPECIAL.get(algo, [])):
        case = make_case(algo, seed, **options)
        for single, double in zip(run_case(case, torch.float32), run_case(case, torch.float64)):
            assert single is double is None or torch.allclose(
                single.double(), double, rtol=2e-5, atol=2e-6
            ), options


@pytest.mark.parametrize("algo", METHODS)
def test_one_update_per_round_agrees_with_loops_over_tokens(algo):
    case = make_case(algo, 100, **({"is_mode": "tis", "is_high": 1.1} if algo != "gspo" else {}))
    case["inputs"]["old_logp"] = None
    live = run_case(case)
    case["inputs"]["old_logp"] = case["inputs"]["logp"]
    for a, b in zip(live, run_case(case)):
        assert a is b is None or torch.equal(a, b)
    assert count_tokens_that_agree(case) >= 10


# --------------------------------------------------------------------------------------------------------- properties
def sum_of_shares(case: dict, parts: list[list[int]]):
    """(loss, grad_logp, grad_entropy) of a step cut into micro-batches, each of its own width, as ranks have them."""
    objective = objective_of(case["algo"], case["hparams"])
    rows, weights, _ = prepare(objective, case, torch.float64)
    logp = torch.tensor(case["inputs"]["logp"], dtype=torch.float64, requires_grad=True)
    entropy = torch.tensor(case["inputs"]["entropy"], dtype=torch.float64, requires_grad=True)
    total = 0.0
    for part in parts:
        width = max(int(rows.mask[part].sum(1).max()), 1)
        narrow = Rows(
            *(
                None if x is None else x[:, :width] if x.dim() == 2 else x
                for x in losses.take(rows, part)
            )
        )
        share = losses.update_loss(
            objective, logp[part, :width], entropy[part, :width], narrow, weights[:, part]
        )
        share.backward()
        total += share.item()
    return total, logp.grad, torch.zeros_like(logp) if entropy.grad is None else entropy.grad


@pytest.mark.parametrize("algo", METHODS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(agg="group-token-mean", kl_coef=0.1, entropy_coef=0.01),
        dict(agg="seq-mean-token-mean"),
    ],
    ids=["default", "group mean, KL, entropy", "sequence mean"],
)
def test_the_cut_into_micro_batches_and_ranks_changes_neither_loss_nor_gradient(algo, options):
    extra = dict(mix_norm="separate") if algo in ("srft", "upt") and options else {}
    case = make_case(algo, 7, **options, **extra)
    experts = [b for b, e in enumerate(case["inputs"]["is_expert"]) if e] or [0]
    others = [b for b in range(N_ROWS) if b not in experts]
    whole = sum_of_shares(case, [list(range(N_ROWS))])
    assert whole[1].abs().sum() > 0
    empty = N_ROWS - 1  # the row without a token, once as a micro-batch of its own
    uneven = [[empty], others[:3], [b for b in others[3:] if b != empty], experts]
    for parts in ([[b] for b in range(N_ROWS)], [experts, others], uneven):
        for one, cut in zip(whole, sum_of_shares(case, parts)):
            assert torch.allclose(
                torch.as_tensor(one), torch.as_tensor(cut), rtol=1e-12, atol=1e-15
            )


@pytest.mark.parametrize("algo", METHODS)
def test_row_order_group_names_and_padding_change_nothing(algo):
    case = make_case(algo, 8, kl_coef=0.1, entropy_coef=0.01)
    loss, grad, grad_entropy, advantages = run_case(case)
    order = random.Random(1).sample(range(N_ROWS), N_ROWS)
    renamed = {g: name for g, name in zip((0, 1, 2, 3), (40, 3, 17, 0))}

    def rearranged(values):
        """Rows in another order, two columns of garbage on the left and one on the right."""
        if not isinstance(values[0], list):
            return [values[b] for b in order]
        junk = 0 if isinstance(values[0][0], int) else 99.0
        return [[junk, junk] + values[b] + [junk] for b in order]

    inputs = {name: rearranged(values) for name, values in case["inputs"].items()}
    inputs["group_ids"] = [renamed[g] for g in inputs["group_ids"]]
    moved = run_case({**case, "inputs": inputs})
    assert moved[0].item() == pytest.approx(loss.item(), rel=1e-12)
    for before, after in zip((grad, grad_entropy, advantages), moved[1:]):
        assert torch.allclose(after[:, 2:-1], before[order], rtol=1e-12, atol=1e-15)
        assert after[:, :2].abs().sum() == 0 and after[:, -1].abs().sum() == 0


@pytest.mark.parametrize("algo", METHODS)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_garbage_under_the_mask_reaches_neither_loss_nor_gradient(algo, garbage):
    case = make_case(algo, 9, kl_coef=0.1, entropy_coef=0.01, is_mode="tis", is_high=1.2)
    clean = run_case(case)
    dirty = copy.deepcopy(case)
    for b in range(N_ROWS):
        for t in range(WIDTH):
            for name in ("logp", "entropy", "ref_logp", "old_logp", "rollout_logp"):
                unread = case["inputs"]["is_expert"][b] and name in (
                    "old_logp",
                    "rollout_logp",
                )  # decoys
                if not case["inputs"]["mask"][b][t] or unread:
                    dirty["inputs"][name][b][t] = garbage
    for a, b in zip(clean, run_case(dirty)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("norm", ["none", "group_std"])
@pytest.mark.parametrize("algo", ["grpo", "luffy", "prefix_rft", "gspo"])
def test_adding_a_constant_to_the_rewards_of_a_group_changes_nothing(algo, norm):
    case = make_case(algo, 10, adv_norm=norm)
    shifted = copy.deepcopy(case)
    for b, g in enumerate(case["inputs"]["group_ids"]):
        shifted["inputs"]["rewards"][b] += (0.0, 3.0, -0.7, 11.0)[g]
    for a, b in zip(run_case(case), run_case(shifted)):
        assert a is b is None or torch.allclose(a, b, rtol=1e-8, atol=1e-12)


def gradient(algo: str, case: dict, **changes) -> torch.Tensor:
    """grad_logp of the same inputs under another method or other options."""
    hparams = {
        **DEFAULTS,
        **METHODS[algo],
        **{k: v for k, v in case["hparams"].items() if k == "agg"},
        **changes,
    }
    return run_case({**case, "algo": algo, "hparams": hparams})[1]


@pytest.mark.parametrize("agg", losses.CHOICES["agg"])
def test_on_policy_every_ratio_method_is_reinforce_and_no_clip_acts(agg):
    case = make_case("grpo", 11, agg=agg)
    case["inputs"]["old_logp"] = case["inputs"]["logp"]
    plain = gradient("grpo", case)
    rows, weights, _ = prepare(objective_of("grpo", case["hparams"]), case, torch.float64)
    assert torch.allclose(
        plain, -rows.advantages * weights[0][:, None] * rows.mask, rtol=1e-12, atol=1e-15
    )
    for algo, options in (
        ("cispo", {}),
        ("grpo", dict(clip_low=None, clip_high=None)),
        ("grpo", dict(dual_clip=3.0)),
        ("grpo", dict(clip_low=3e-4, clip_high=4e-4)),
        ("gspo", dict(adv_norm="none", agg=agg)),
    ):
        assert torch.allclose(gradient(algo, case, **options), plain, rtol=1e-12, atol=1e-15), (
            algo,
            options,
        )


def test_luffy_without_experts_is_grpo_without_a_clip():
    case = make_case("grpo", 12)
    assert torch.equal(
        gradient("luffy", case), gradient("grpo", case, clip_low=None, clip_high=None)
    )


@pytest.mark.parametrize(
    "variant", [{}, dict(prefix_adv="split"), dict(prefix_clip=False)], ids=str
)
def test_prefix_rft_without_a_hybrid_is_grpo(variant):
    case = make_case("grpo", 13)
    assert torch.equal(gradient("prefix_rft", case, **variant), gradient("grpo", case))


def test_upt_with_a_gate_below_every_reward_is_grpo_on_the_rollouts():
    case = make_case("upt", 14)
    ungated = gradient("upt", case, gate_gamma=-1.0)
    keep = [b for b in range(N_ROWS) if not case["inputs"]["is_expert"][b]]
    rollouts = {
        **case,
        "inputs": {name: [values[b] for b in keep] for name, values in case["inputs"].items()},
    }
    assert torch.allclose(ungated[keep], gradient("grpo", rollouts), rtol=1e-12)
    assert (
        all(ungated[b].abs().sum() == 0 for b in range(N_ROWS) if b not in keep)
        and ungated.abs().sum() > 0
    )


def test_upt_with_a_gate_above_every_reward_is_sft_on_the_experts():
    case = make_case("upt", 15)
    with_demo = [
        b for b in range(N_ROWS) if case["inputs"]["group_ids"][b] in (0, 1)
    ]  # the groups that have one
    case["inputs"] = {
        name: [values[b] for b in with_demo] for name, values in case["inputs"].items()
    }
    experts = [i for i, e in enumerate(case["inputs"]["is_expert"]) if e]
    imitated = gradient("upt", case, gate_gamma=1.0, sft_coef=1.0)
    only = {
        **case,
        "inputs": {name: [values[i] for i in experts] for name, values in case["inputs"].items()},
    }
    assert torch.allclose(imitated[experts], gradient("sft", only), rtol=1e-12)
    assert imitated.abs().sum() > 0
    assert all(imitated[i].abs().sum() == 0 for i in range(len(with_demo)) if i not in experts)


def test_luffy_weighs_an_expert_token_most_where_its_probability_is_gamma():
    p = torch.tensor([[1e-6, 0.01, 0.1, 0.5, 0.999]], dtype=torch.float64)
    logp = p.log().requires_grad_()
    advantage = torch.tensor([0.875], dtype=torch.float64)
    rows = Rows(torch.ones(1, 5, dtype=torch.bool), advantage, is_expert=torch.tensor([True]))
    losses.token_loss(OBJECTIVES["luffy"], logp, rows)[0].sum().backward()
    assert torch.allclose(logp.grad, -0.875 * 0.1 * p / (p + 0.1) ** 2) and logp.grad.argmin() == 2


@pytest.mark.parametrize("algo, policy_too", [("luffy", True), ("srft", True), ("upt", False)])
def test_an_expert_row_has_an_advantage_term_only_in_the_methods_that_give_it_one(algo, policy_too):
    logp = torch.tensor([[-0.5, -2.0], [-0.3, -1.0]])
    rows = Rows(
        torch.ones(2, 2, dtype=torch.bool),
        torch.tensor([1.0, -1.0]),
        is_expert=torch.tensor([True, False]),
        is_success=torch.tensor([True, False]),
        mean_entropy=torch.ones(2),
    )
    policy, imitation = losses.token_loss(OBJECTIVES[algo], logp, rows)
    assert bool((policy[0] != 0).all()) == bool((policy[0] != 0).any()) == policy_too
    assert (policy[1] != 0).all() and (imitation[1] == 0).all()
    assert bool((imitation[0] > 0).all()) == (algo != "luffy")


def test_srft_without_entropy_weights_has_its_plain_coefficients():
    logp = torch.tensor([[-0.5, -2.0], [-0.3, -1.0], [-0.7, -0.2]])
    rows = Rows(
        torch.ones(3, 2, dtype=torch.bool),
        torch.tensor([1.0, 1.0, -1.0]),
        is_expert=torch.tensor([True, False, False]),
        is_success=torch.tensor([True, True, False]),
    )
    policy, imitation = losses.token_loss(
        replace(OBJECTIVES["srft"], entropy_weights="none"), logp, rows
    )
    assert (
        torch.allclose(imitation[0], -0.5 * logp[0])
        and torch.allclose(policy[1], -0.1 * logp[1])
        and torch.allclose(policy[2], logp[2])
    )


@pytest.mark.parametrize("prefix_clip, slope", [(True, 0.0), (False, -1.5)])
def test_prefix_clip_decides_whether_a_far_demonstration_token_still_teaches(prefix_clip, slope):
    logp = torch.tensor([[math.log(0.3), math.log(0.3)]], requires_grad=True)
    rows = Rows(
        torch.ones(1, 2, dtype=torch.bool),
        torch.tensor([1.0]),
        torch.full((1, 2), math.log(0.2)),
        is_prefix=torch.tensor([[True, False]]),
    )
    losses.token_loss(replace(OBJECTIVES["prefix_rft"], prefix_clip=prefix_clip), logp, rows)[
        0
    ].sum().backward()
    assert logp.grad[0].tolist() == pytest.approx([slope, 0.0])  # its own token: clipped either way


# --------------------------------------------------------------------------------------------- rules, one at a time
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups_that_agree_have_advantage_exactly_zero_whatever_the_rounding_of_their_mean(dtype):
    rewards, ids = (
        torch.tensor([0.1, 0.1, 0.1, 0.7, 1.0, 0.0], dtype=dtype),
        torch.tensor([0, 0, 0, 1, 2, 2]),
    )
    assert losses.group_advantages(rewards, ids, normalize_std=True).tolist()[:4] == [0, 0, 0, 0]
    assert losses.group_advantages(rewards, ids).tolist() == [0, 0, 0, 0, 0.5, -0.5]
    assert losses.group_advantages(rewards, ids, singleton="raw").tolist()[3] == rewards[3]


def test_one_row_of_a_group_is_informative_only_if_rewards_differ():
    rewards, ids = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]), torch.tensor([5, 5, 2, 2, 9])
    assert losses.is_informative(rewards, ids).tolist() == [True, True, False, False, False]


def test_the_overlong_penalty_falls_linearly_between_the_two_lengths():
    penalties = [losses.overlong_penalty(n, 100, 20, 0.5) for n in (1, 80, 85, 90, 100, 101, 1000)]
    assert penalties == [0.0, 0.0, -0.125, -0.25, -0.5, -0.5, -0.5]


def test_the_prefix_window_opens_from_the_top_and_stays_open():
    assert losses.prefix_window(0, 500) == pytest.approx((0.95, 0.95))
    assert losses.prefix_window(250, 500) == pytest.approx((0.5, 0.95))
    assert (
        losses.prefix_window(500, 500)
        == losses.prefix_window(900, 500)
        == pytest.approx((0.05, 0.95))
    )


@pytest.mark.parametrize(
    "u, demo_len, expected",
    [
        (0.0, 0, 0),
        (0.5, 1, 0),
        (0.0, 2, 1),
        (0.0, 10, 1),
        (0.6, 10, 5),
        (0.999, 10, 9),
        (0.0, 100, 5),
    ],
)
def test_a_prefix_leaves_at_least_one_token_to_write(u, demo_len, expected):
    assert losses.prefix_length(u, (0.05, 0.95), demo_len) == expected


def test_dynamic_sampling_draws_no_round_it_does_not_need_and_survives_running_dry():
    drawn = []

    def rounds():
        for n in range(3):
            drawn.append(n)
            yield [(f"flat{n}", [1, 1, 1]), (f"mixed{n}", [1, 0, 1]), (f"also{n}", [0, 0, 1])]

    found = (["mixed0", "also0", "mixed1"], ["flat0", "flat1"], ["also1"], 2, "full")
    assert losses.collect_informative(rounds(), 3) == found
    assert drawn == [0, 1]
    assert losses.collect_informative(rounds(), 99)[2:] == ([], 3, "partial")
    assert losses.collect_informative(rounds(), 99, max_rounds=2)[3:] == (2, "partial")
    assert losses.collect_informative([[("flat", [0, 0])]] * 20, 1)[3:] == (10, "empty")
    assert losses.collect_informative([], 4) == ([], [], [], 0, "empty")


def test_the_gate_imitates_at_or_below_gamma_and_only_where_there_is_a_demonstration():
    rewards = torch.tensor([0, 0, 0, 1] + [1, 0, 0, 1, 1] + [0, 0, 0, 0, 0.0])
    ids = torch.tensor(
        [0] * 4 + [1] * 5 + [2] * 5
    )  # group 0 has no expert; the last of 1 and of 2 is
    expert = torch.tensor([False] * 8 + [True] + [False] * 4 + [True])
    stays = lambda gamma: losses.gate_rows(rewards, ids, expert, gamma).int().tolist()
    assert stays(0.0) == [1] * 4 + [1, 1, 1, 1, 0] + [
        0,
        0,
        0,
        0,
        1,
    ]  # an expert stays even if its own reward is 0
    assert stays(0.5) == [1] * 4 + [0, 0, 0, 0, 1] + [0, 0, 0, 0, 1]
    assert stays(-1.0) == [1] * 4 + [1, 1, 1, 1, 0] + [1, 1, 1, 1, 0]


def test_the_ranking_of_prefix_tokens_spans_the_step_and_rounds_down():
    entropy = torch.tensor([[5.0, 1.0, 9.0], [2.0, float("nan"), 8.0], [4.0, 3.0, 0.0]])
    among = torch.tensor([[True, True, False], [True, False, False], [True, True, False]])
    kept = losses.most_uncertain(entropy, among, 0.5)  # of 5, 1 2 3 4: int(2.5) = 2 go
    assert kept.tolist() == [[True, False, False], [False, False, False], [True, True, False]]
    assert losses.most_uncertain(entropy, among, 0.0).equal(among)
    assert not losses.most_uncertain(entropy, among, 1.0).any()


def test_masked_truncated_rows_keep_their_say_in_the_baseline():
    case = make_case("grpo", 16, mask_truncated=True)
    case["inputs"]["truncated"] = [1] + [0] * (N_ROWS - 1)
    rows, weights, active = prepare(objective_of("grpo", case["hparams"]), case, torch.float64)
    rewards = torch.tensor(case["inputs"]["rewards"], dtype=torch.float64)
    with_all = losses.group_advantages(rewards, torch.tensor(case["inputs"]["group_ids"]))
    assert active.all() and rows.mask[0].sum() == 0 and weights[:, 0].sum() == 0
    assert torch.equal(rows.advantages, with_all[:, None] * rows.mask)


@pytest.mark.parametrize("agg", losses.CHOICES["agg"])
def test_the_weights_of_a_step_without_tokens_are_zero_not_nan(agg):
    for lengths in (torch.zeros(3, dtype=torch.long), torch.zeros(0, dtype=torch.long)):
        weights = losses.row_weights(lengths, agg, torch.zeros_like(lengths), 8.0)
        assert weights.tolist() == [0.0] * len(lengths)


@pytest.mark.parametrize(
    "agg", [name for name in losses.CHOICES["agg"] if name not in ("const", "seq-mean-token-sum")]
)
def test_the_weights_of_a_mean_add_up_to_one_over_all_tokens(agg):
    lengths = torch.tensor([3, 0, 5, 1, 7])
    weights = losses.row_weights(
        lengths, agg, torch.tensor([0, 3, 1, 1, 2])
    )  # group 3 has no token
    assert weights.dtype == torch.float64 and (weights * lengths).sum().item() == pytest.approx(
        1.0, abs=1e-15
    )


def test_a_ratio_that_would_overflow_leaves_loss_and_gradient_finite():
    for algo in OBJECTIVES:
        logp = torch.full((2, 3), -0.1, requires_grad=True)
        rows = Rows(
            torch.ones(2, 3, dtype=torch.bool),
            torch.tensor([1.0, -1.0]),
            torch.full((2, 3), -200.0),
            is_success=torch.tensor([True, False]),
            mean_entropy=torch.ones(2),
        )
        loss = losses.token_loss(OBJECTIVES[algo], logp, rows)[0].sum()
        loss.backward()
        assert loss.isfinite() and logp.grad.isfinite().all(), algo


@pytest.mark.parametrize(
    "field, value", [("agg", "mean"), ("demo", "yes"), ("kl_type", "k4"), ("tis", "on")]
)
def test_an_unknown_choice_is_refused_by_name_with_the_ones_there_are(field, value):
    with pytest.raises(
        ValueError, match=f"{field} is '{value}'; choose one of {', '.join(losses.CHOICES[field])}"
    ):
        Objective(**{field: value})


def test_importing_losses_needs_no_other_file_of_the_project():
    source = Path(losses.__file__).read_text()
    imported = {
        line.split()[1].split(".")[0]
        for line in source.splitlines()
        if line.startswith(("import ", "from "))
    }
    assert imported == {"math", "dataclasses", "typing", "torch"}
