"""losses.py against shared vectors, loops over tokens, and the properties of every objective."""

import copy
import json
import math
import random
import re
from pathlib import Path
from typing import get_args, get_type_hints

import objective
import pytest
import reference
import torch
from reference import CLIP, METHODS, MIXED, N_ROWS, WIDTH, make_case

import losses
from core.errors import UserError
from losses import GRPO, Row

AGGREGATORS = get_args(get_type_hints(GRPO)["agg"])


# ---- the shared vectors --------------------------------------------------------------------------
SHARED = Path(__file__).resolve().parents[2] / "shared" / "objective_cases.json"
VECTORS = json.loads(SHARED.read_text()) if SHARED.exists() else {"cases": [], "misc": []}
CASES = {case["id"]: case for case in VECTORS["cases"]}
needs_vectors = pytest.mark.skipif(
    not SHARED.exists(), reason="the shared vectors are not part of the project"
)
SKIPPED = {  # cases of options that were dropped on purpose
    "grpo_11_kl_k3_clamped": "a bound on the KL estimate, which binds here (kl_clamp)",
    "srft_4_official_separate": "a denominator per kind of token, by micro-batch (mix_norm)",
    "upt_4_official_separate_noclip": "a denominator per kind of token (mix_norm)",
}
TIS = {None: "none", "tis": "token", "seq_tis": "sequence", "icepop": "icepop"}
SAME = "clip_low clip_high dual_clip kl_coef kl_type entropy_coef mask_truncated agg".split()
SAME += "shaping_gamma gate_gamma drop_ratio sft_coef".split()
RENAMED = {
    "filter_groups": "dynamic_sampling",
    "is_low": "tis_low",
    "is_high": "tis_high",
    "w1_scale": "imitation",
    "w2_scale": "success_coef",
}
FIXED = {  # what losses.py always does
    "adv_ddof": 1,
    "adv_eps": 1e-6,
    "singleton": "zero",
    "success_threshold": 0.5,
    "log_ratio_clamp": None,
    "srft_entropy": "seq",
    "mix_norm": "joint",
    "prefix_adv": "group",
    "prefix_clip": True,
    "kl_clamp": None,
}
TRANSLATED = "adv_norm is_mode norm_const const_div_seqs ratio_cap ratio_floor".split()


def translated(case: dict) -> dict:
    """A shared case with the names of our flags; one without a meaning is an error."""
    options = {}
    for name, value in case["hparams"].items():
        if name in FIXED:
            assert value == FIXED[name], f"{name} is {value}"
        elif name not in TRANSLATED:
            assert name in SAME or name in RENAMED, f"{name} has no meaning here"
            options[RENAMED.get(name, name)] = value
    h = case["hparams"]
    options["normalize_std"] = {"none": False, "group_std": True}[h["adv_norm"]]
    options["tis"] = TIS[h["is_mode"]]
    options["norm_const"] = h["norm_const"] or 8.0
    if not h["const_div_seqs"]:  # the sum over the constant alone
        options["norm_const"] /= len(case["inputs"]["rewards"])
    if case["algo"] == "gspo":
        options["surrogate"] = "sequence"
    if case["algo"] == "cispo":  # its bounds are absolute, ours are distances from 1
        options["surrogate"] = "cispo"
        options["clip_high"] = h["ratio_cap"] - 1
        assert h["ratio_floor"] is None
    algo = "dapo" if case["algo"] == "dapo_dc" else case["algo"]
    return {"algo": algo, "inputs": case["inputs"], "options": options}


def run_sft(case: dict, dtype: torch.dtype) -> objective.Result:
    """SFT is minus the log-prob of each token under the one aggregator."""
    mask = torch.tensor(case["inputs"]["mask"]) > 0
    logp = objective.leaf(case["inputs"]["logp"], dtype)
    loss = losses.aggregate(-logp, mask, losses.row_weights(mask.sum(1), case["hparams"]["agg"]))
    loss.backward()
    return objective.Result(loss.detach(), logp.grad, None, torch.zeros_like(logp))


@needs_vectors
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_a_shared_case_agrees_in_loss_gradients_and_advantages(name, dtype):
    if name in SKIPPED:
        pytest.skip(SKIPPED[name])
    case = CASES[name]
    expected = case["expected"]
    tolerance = dict(rtol=1e-9, atol=1e-12)
    if dtype == torch.float32:
        tolerance = dict(rtol=2e-5, atol=2e-6)
    if case["algo"] == "sft":
        found = run_sft(case, dtype)
    else:
        found = objective.run(translated(case), dtype)
        _, batch, kept = objective.prepare(translated(case), dtype)
        assert int(batch.mask.sum()) == expected["n_tokens"]
        assert [int(b in kept) for b in range(len(expected["active_rows"]))] == (
            expected["active_rows"]
        )
    assert (found.grad_entropy is None) == (expected["grad_entropy"] is None)
    for field, value in found._asdict().items():
        if value is not None:
            wanted = torch.tensor(expected[field], dtype=dtype)
            torch.testing.assert_close(
                value, wanted, **tolerance, msg=lambda text: f"{field}: {text}"
            )


@needs_vectors
def test_all_but_three_shared_cases_are_compared():
    assert len(CASES) == 27
    assert set(SKIPPED) < set(CASES)
    assert len(CASES) - len(SKIPPED) == 24


@needs_vectors
@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case["expected"]["extra"]]
)
def test_a_shared_case_has_the_expected_entropies_and_gate_decisions(name):
    case = CASES[name]
    extra = dict(case["expected"]["extra"])
    if "H" in extra:
        entropy = torch.tensor(case["inputs"]["entropy"], dtype=torch.float64)
        mask = torch.tensor(case["inputs"]["mask"]) > 0
        wanted = torch.tensor(extra.pop("H"), dtype=torch.float64)
        torch.testing.assert_close(losses.mean_entropy(entropy, mask), wanted, rtol=1e-9, atol=0)
    if case["algo"] != "upt":
        return
    gate = {"gate_gamma": case["hparams"]["gate_gamma"]}
    method = objective.method_of({"algo": "upt", "options": gate})
    kept = objective.trained_rows(method, case["inputs"])
    for group, decision in extra.items():
        imitated = [
            b
            for b in kept
            if case["inputs"]["group_ids"][b] == int(group) and case["inputs"]["is_expert"][b]
        ]
        assert bool(imitated) == (decision == "sft")


def shared_rules(kind: str) -> list:
    return [
        pytest.param(rule["input"], rule["expected"], id=rule["id"])
        for rule in VECTORS["misc"]
        if rule["kind"] == kind
    ]


@needs_vectors
@pytest.mark.parametrize("given, expected", shared_rules("overlong"))
def test_the_shared_overlong_penalties(given, expected):
    penalty = losses.overlong_penalty(
        given["length"], given["max_len"], given["cache_len"], given["factor"]
    )
    assert penalty == pytest.approx(expected, rel=1e-9, abs=0)


@needs_vectors
@pytest.mark.parametrize("given, expected", shared_rules("group_advantage"))
def test_the_shared_group_advantages(given, expected):
    rewards = torch.tensor(given["rewards"], dtype=torch.float64)
    groups = torch.tensor(given["group_ids"])
    found = losses.group_advantages(rewards, groups, given["norm"] == "group_std")
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=0)


# ---- loops over tokens ---------------------------------------------------------------------------
OPTIONS = [{}] + [dict(agg=agg) for agg in AGGREGATORS]
OPTIONS += [
    dict(normalize_std=True),
    dict(surrogate="sequence"),
    dict(surrogate="cispo", clip_low=0.2, clip_high=0.28),
    dict(dual_clip=1.1),
    dict(clip_low=0.1, clip_high=None),
    dict(tis="token", tis_high=1.1),
    dict(tis="token", tis_low=0.9, tis_high=1.2),
    dict(tis="sequence", tis_high=1.5),
    dict(tis="icepop", tis_low=0.8, tis_high=1.25),
    dict(kl_coef=0.1, kl_type="k1"),
    dict(kl_coef=0.1, kl_type="k2"),
    dict(kl_coef=0.1),
    dict(entropy_coef=0.01),
    dict(mask_truncated=True),
    dict(dynamic_sampling=True),
]
SPECIAL = {
    "luffy": [CLIP],
    "srft": [dict(imitation=1.0, success_coef=0.7), dict(trust_alpha=0.3)],
    "upt": [
        dict(trust_alpha=0.3),
        dict(trust_alpha=1.0),
        dict(gate_gamma=0.0),
        dict(gate_gamma=0.5),
        dict(clip_low=None, clip_high=None),
        dict(dynamic_sampling=True, agg="group-token-mean"),
    ],
    "prefix_rft": [
        dict(drop_ratio=0.0),
        dict(drop_ratio=1.0),
        dict(dual_clip=1.1, drop_ratio=0.0),
        dict(tis="sequence", tis_high=1.2),
        dict(mask_truncated=True, drop_ratio=0.4),
    ],
}


def options_of(algo: str) -> list[dict]:
    return OPTIONS + SPECIAL.get(algo, [])


def slope(case: dict, advantages: dict, b: int, t: int) -> float:
    """The reference loss by this token's log-prob, as a difference quotient."""
    up = copy.deepcopy(case["inputs"]["logp"])
    down = copy.deepcopy(case["inputs"]["logp"])
    up[b][t] += 1e-6
    down[b][t] -= 1e-6
    return (reference.loss(case, up, advantages) - reference.loss(case, down, advantages)) / 2e-6


def count_tokens_that_agree(case: dict) -> int:
    """Compare loss, advantages and the slope at every token with the loops; trained tokens."""
    found = objective.run(case)
    advantages = reference.plan(case)
    expected = reference.loss(case, case["inputs"]["logp"], advantages)
    assert found.loss.item() == pytest.approx(expected, rel=1e-10, abs=1e-12), case["options"]
    for b in range(N_ROWS):
        for t in range(WIDTH):
            own = found.advantages[b, t].item()
            assert own == pytest.approx(advantages.get((b, t), 0.0), rel=1e-10, abs=1e-14)
            gradient = found.grad_logp[b, t].item()
            if (b, t) not in advantages:
                assert gradient == 0
                continue
            near = pytest.approx(slope(case, advantages, b, t), rel=1e-5, abs=1e-8)
            assert gradient == near, (b, t, case["options"])
    if found.grad_entropy is not None:
        trained = torch.zeros(N_ROWS, WIDTH, dtype=torch.float64)
        for b, t in advantages:
            trained[b, t] = 1.0
        per_token = case["options"]["entropy_coef"] / max(len(advantages), 1)
        assert torch.allclose(found.grad_entropy, -per_token * trained)
    return len(advantages)


@pytest.mark.parametrize("algo", METHODS)
def test_every_method_under_every_option_agrees_with_loops_over_tokens(algo):
    for seed, options in enumerate(options_of(algo)):
        assert count_tokens_that_agree(make_case(algo, seed, **options)) >= 10


@pytest.mark.parametrize("algo", METHODS)
def test_float32_stays_close_to_float64_under_every_option(algo):
    for seed, options in enumerate(options_of(algo)):
        case = make_case(algo, seed, **options)
        single = objective.run(case, torch.float32)
        double = objective.run(case, torch.float64)
        for a, b in zip(single, double):
            assert (a is None) == (b is None)
            if a is not None:
                assert torch.allclose(a.double(), b, rtol=2e-5, atol=2e-6), options


@pytest.mark.parametrize("algo", METHODS)
def test_one_update_per_round_agrees_with_loops_over_tokens(algo):
    options = {} if algo == "gspo" else dict(tis="token", tis_high=1.1)
    case = make_case(algo, 100, **options)
    case["inputs"]["old_logp"] = None
    live = objective.run(case)
    case["inputs"]["old_logp"] = case["inputs"]["logp"]
    for a, b in zip(live, objective.run(case)):
        assert a is b is None or torch.equal(a, b)
    assert count_tokens_that_agree(case) >= 10


# ---- properties ----------------------------------------------------------------------------------
def sum_of_shares(case: dict, cut) -> tuple:
    """(loss, grad_logp, grad_entropy) of a step cut into micro-batches, each as wide as its rows.

    cut(batch) -> lists of row numbers.
    """
    method, batch, kept = objective.prepare(case)
    logp = objective.leaf(case["inputs"]["logp"], torch.float64)
    entropy = objective.leaf(case["inputs"]["entropy"], torch.float64)
    total = 0.0
    for part in cut(batch):
        mine = losses.take(batch, torch.tensor(part))
        width = max(int(mine.mask.sum(1).max()), 1)
        fields = []
        for field in mine:
            is_wide = field is not None and field.dim() == 2
            fields.append(field[:, :width] if is_wide else field)
        rows = [kept[i] for i in part]
        share = losses.update_loss(
            method, logp[rows, :width], entropy[rows, :width], losses.Batch(*fields)
        )
        share.backward()
        total += share.item()
    if entropy.grad is None:
        entropy.grad = torch.zeros_like(entropy)
    return torch.tensor(total), logp.grad, entropy.grad


def in_one(batch) -> list:
    return [list(range(len(batch.rewards)))]


def row_by_row(batch) -> list:
    return [[i] for i in range(len(batch.rewards))]


def experts_apart(batch) -> list:
    experts = [i for i, expert in enumerate(batch.is_expert.tolist()) if expert] or [0]
    return [experts, [i for i in range(len(batch.rewards)) if i not in experts]]


def uneven(batch) -> list:
    """The row without a token is a micro-batch of its own."""
    last = len(batch.rewards) - 1
    return [[last], [0, 1, 2], list(range(3, last))]


@pytest.mark.parametrize("algo", METHODS)
@pytest.mark.parametrize("cut", [row_by_row, experts_apart, uneven])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(agg="group-token-mean", kl_coef=0.1, entropy_coef=0.01),
        dict(agg="seq-mean-token-mean"),
    ],
    ids=["default", "group mean, KL, entropy", "sequence mean"],
)
def test_the_cut_into_micro_batches_changes_neither_loss_nor_gradient(algo, cut, options):
    case = make_case(algo, 7, **options)
    whole = sum_of_shares(case, in_one)
    assert whole[1].abs().sum() > 0
    for one, several in zip(whole, sum_of_shares(case, cut)):
        assert torch.allclose(one, several, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("algo", METHODS)
def test_row_order_group_names_and_padding_change_nothing(algo):
    case = make_case(algo, 8, kl_coef=0.1, entropy_coef=0.01)
    before = objective.run(case)
    order = random.Random(1).sample(range(N_ROWS), N_ROWS)
    names = (40, 3, 17, 0)

    def rearranged(values):
        """Rows in another order, two columns of garbage on the left and one on the right."""
        if not isinstance(values[0], list):
            return [values[b] for b in order]
        junk = 0 if isinstance(values[0][0], int) else 99.0
        return [[junk, junk, *values[b], junk] for b in order]

    inputs = {name: rearranged(values) for name, values in case["inputs"].items()}
    inputs["group_ids"] = [names[g] for g in inputs["group_ids"]]
    after = objective.run({**case, "inputs": inputs})
    assert after.loss.item() == pytest.approx(before.loss.item(), rel=1e-12)
    for old, new in zip(before[1:], after[1:]):
        assert torch.allclose(new[:, 2:-1], old[order], rtol=1e-12, atol=1e-15)
        assert new[:, :2].abs().sum() == 0
        assert new[:, -1].abs().sum() == 0


@pytest.mark.parametrize("algo", METHODS)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_garbage_under_the_mask_reaches_neither_loss_nor_gradient(algo, garbage):
    case = make_case(algo, 9, kl_coef=0.1, entropy_coef=0.01, tis="token", tis_high=1.2)
    dirty = copy.deepcopy(case)
    inputs = dirty["inputs"]
    for b in range(N_ROWS):
        for t in range(WIDTH):
            padding = not inputs["mask"][b][t]
            for name in ("logp", "entropy", "ref_logp"):
                if padding:
                    inputs[name][b][t] = garbage
            for name in ("old_logp", "rollout_logp"):  # nobody sampled a demonstration
                if padding or inputs["is_expert"][b]:
                    inputs[name][b][t] = garbage
    for a, b in zip(objective.run(case), objective.run(dirty)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("normalize_std", [False, True])
@pytest.mark.parametrize("algo", ["grpo", "luffy", "prefix_rft", "gspo"])
def test_adding_a_constant_to_the_rewards_of_a_group_changes_nothing(algo, normalize_std):
    case = make_case(algo, 10, normalize_std=normalize_std)
    shifted = copy.deepcopy(case)
    for b, g in enumerate(case["inputs"]["group_ids"]):
        shifted["inputs"]["rewards"][b] += (0.0, 3.0, -0.7, 11.0)[g]
    for a, b in zip(objective.run(case), objective.run(shifted)):
        assert a is b is None or torch.allclose(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("algo", METHODS)
def test_rows_that_do_not_teach_have_no_gradient_and_a_bonus_or_penalty_makes_none_teach(algo):
    case = make_case(algo, 17)
    method, batch, kept = objective.prepare(case)
    gradient = objective.run(case).grad_logp[kept]
    teaching = method.teaches(batch)
    assert gradient[~teaching].abs().sum() == 0
    assert gradient[teaching].abs().sum() > 0
    # The row of group 3 is alone: it has no advantage
    assert algo == "srft" or method.dynamic_sampling or not teaching[kept.index(12)]
    method, batch, _ = objective.prepare(make_case(algo, 17, entropy_coef=0.01, kl_coef=0.1))
    assert method.teaches(batch).equal(teaching)


def gradient(algo: str, case: dict, **changes) -> torch.Tensor:
    """grad_logp of the same inputs under another method or other options."""
    agg = {"agg": case["options"]["agg"]}
    options = {**reference.DEFAULTS, **METHODS[algo], **agg, **changes}
    return objective.run({**case, "algo": algo, "options": options}).grad_logp


@pytest.mark.parametrize("agg", AGGREGATORS)
def test_on_policy_every_ratio_method_is_reinforce_and_no_clip_acts(agg):
    case = make_case("grpo", 11, agg=agg)
    case["inputs"]["old_logp"] = case["inputs"]["logp"]
    plain = gradient("grpo", case)
    _, batch, _ = objective.prepare(case)
    reinforce = -batch.advantages * batch.weights[:, None] * batch.mask
    assert torch.allclose(plain, reinforce, rtol=1e-12, atol=1e-15)
    for algo, options in (
        ("cispo", {}),
        ("grpo", dict(clip_low=None, clip_high=None)),
        ("grpo", dict(dual_clip=3.0)),
        ("grpo", dict(clip_low=3e-4, clip_high=4e-4)),
        ("gspo", dict(normalize_std=False)),
    ):
        same = gradient(algo, case, **options)
        assert torch.allclose(same, plain, rtol=1e-12, atol=1e-15), (algo, options)


# ---- rows and batches ----------------------------------------------------------------------------
def some_rows() -> list[Row]:
    """A right answer, a cut one of reward 0.5 with a copied prefix, and a demonstration."""
    right = Row([7, 8], [1, 2, 0], [-0.1, -0.2, -0.3], 1.0, 0.9, 4)
    cut = Row([7], [1, 2], [0.0, -0.5], 0.5, 0.5, 4, n_prefix=1, finished=False)
    demonstration = Row([7, 8], [3, 4, 5, 0], [0.0] * 4, 1.0, 1.0, 4, is_expert=True)
    return [right, cut, demonstration]


def test_a_batch_trains_the_tokens_of_the_responses_their_eos_included():
    batch = losses.make_batch(some_rows(), "cpu")
    assert batch.mask.int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.is_prefix.int().tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert batch.is_sampled.int().tolist() == [[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert batch.is_rollout.int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert batch.rollout_logp[1].tolist() == [0.0, -0.5, 0.0, 0.0]


def test_a_batch_learns_from_the_reward_with_penalties_and_calls_right_what_was_right_without():
    batch = losses.make_batch(some_rows(), "cpu")
    assert batch.rewards.tolist() == pytest.approx([0.9, 0.5, 1.0])
    assert batch.is_success.tolist() == [True, False, True]  # one half is not right
    assert batch.is_expert.tolist() == [False, False, True]
    assert batch.groups.tolist() == [4, 4, 4]


def test_a_row_counts_prompt_and_response():
    assert [row.length for row in some_rows()] == [5, 3, 6]


def test_masked_truncated_rows_keep_their_say_in_the_baseline():
    rows = some_rows()
    batch = losses.weigh(GRPO(), losses.make_batch(rows, "cpu", mask_truncated=True))
    assert batch.mask.sum(1).tolist() == [3, 0, 4]
    assert batch.weights.tolist() == [1 / 7, 0.0, 1 / 7]
    assert batch.advantages[0, 0].item() == pytest.approx(0.9 - 0.8)
    assert batch.advantages[1].tolist() == [0.0] * 4


def test_taking_rows_leaves_what_is_not_there_not_there():
    batch = losses.weigh(GRPO(), losses.make_batch(some_rows(), "cpu"))
    one = losses.take(batch, torch.tensor([2]))
    assert one.is_expert.tolist() == [True]
    assert one.weights.tolist() == batch.weights[2:].tolist()
    assert one.old_logp is None


# ---- rules, one at a time ------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups_that_agree_have_advantage_exactly_zero_whatever_the_rounding_of_their_mean(dtype):
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.7, 1.0, 0.0], dtype=dtype)
    groups = torch.tensor([0, 0, 0, 1, 2, 2])
    plain = losses.group_advantages(rewards, groups)
    scaled = losses.group_advantages(rewards, groups, normalize_std=True)
    assert plain.tolist() == [0, 0, 0, 0, 0.5, -0.5]
    assert scaled.tolist()[:4] == [0, 0, 0, 0]
    assert scaled.dtype == dtype


@pytest.mark.parametrize("ddof, std", [(1, math.sqrt(1 / 2)), (0, 1 / 2)])
def test_advantages_are_divided_by_the_standard_deviation_that_was_asked_for(ddof, std):
    rewards = torch.tensor([1.0, 0.0], dtype=torch.float64)
    groups = torch.tensor([3, 3])
    found = losses.group_advantages(rewards, groups, normalize_std=True, eps=0.1, ddof=ddof)
    assert found.tolist() == pytest.approx([0.5 / (std + 0.1), -0.5 / (std + 0.1)], rel=1e-12)


def test_one_row_of_a_group_is_informative_only_if_rewards_differ():
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    groups = torch.tensor([5, 5, 2, 2, 9])
    assert losses.is_informative(rewards, groups).tolist() == [True, True, False, False, False]


def test_a_group_carries_a_signal_where_its_rewards_differ_partial_credit_included():
    method = GRPO()
    assert method.carries_signal([0.0, 1.0], None)
    assert method.carries_signal([0.2, 0.3, 0.2], None)
    assert not method.carries_signal([0.0, 0.0], [5, 0])  # GRPO has no use for a demonstration
    assert not method.carries_signal([1.0], None)


def test_the_overlong_penalty_falls_linearly_between_the_two_lengths():
    lengths = (1, 80, 85, 90, 100, 101, 1000)
    penalties = [losses.overlong_penalty(n, 100, 20, 0.5) for n in lengths]
    assert penalties == [0.0, 0.0, -0.125, -0.25, -0.5, -0.5, -0.5]


@pytest.mark.parametrize("agg", AGGREGATORS)
def test_the_weights_of_a_step_without_tokens_are_zero_not_nan(agg):
    for lengths in (torch.zeros(3, dtype=torch.long), torch.zeros(0, dtype=torch.long)):
        weights = losses.row_weights(lengths, agg, torch.zeros_like(lengths), 8.0)
        assert weights.tolist() == [0.0] * len(lengths)


@pytest.mark.parametrize("agg", ["token-mean", "seq-mean-token-mean", "group-token-mean"])
def test_the_weights_of_a_mean_add_up_to_one_over_all_tokens(agg):
    lengths = torch.tensor([3, 0, 5, 1, 7])
    groups = torch.tensor([0, 3, 1, 1, 2])  # group 3 has no token
    weights = losses.row_weights(lengths, agg, groups)
    assert weights.dtype == torch.float64
    assert (weights * lengths).sum().item() == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("algo", METHODS)
def test_a_ratio_that_would_overflow_leaves_loss_and_gradient_finite(algo):
    case = make_case(algo, 18, clip_low=None, clip_high=None, tis="token", tis_high=2.0)
    for b in range(N_ROWS):
        for t in range(WIDTH):
            case["inputs"]["old_logp"][b][t] = -200.0
    found = objective.run(case, torch.float32)
    assert found.loss.isfinite()
    assert found.grad_logp.isfinite().all()


def test_a_log_ratio_beyond_the_bound_has_no_gradient():
    logp = torch.tensor([[0.0, 0.0, 0.0]], requires_grad=True)
    old = torch.tensor([[-1.0, -21.0, 21.0]])
    ratio = losses.log_ratio(logp, old, torch.ones(1, 3, dtype=torch.bool))
    ratio.sum().backward()
    assert ratio.tolist() == [[1.0, 20.0, -20.0]]
    assert logp.grad.tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    "field, value", [("agg", "mean"), ("surrogate", "yes"), ("kl_type", "k4"), ("tis", "on")]
)
def test_an_unknown_choice_is_refused_by_name_with_the_ones_there_are(field, value):
    choices = get_args(get_type_hints(GRPO)[field])
    flag = field.replace("_", "-")
    message = f"--{flag} is '{value}'; choose one of {', '.join(choices)}"
    with pytest.raises(UserError, match=re.escape(message)):
        GRPO(**{field: value})


# ---- numbers for the log -------------------------------------------------------------------------
def test_numbers_that_were_not_measured_are_null():
    none_sampled = dict.fromkeys(losses.SUMS, 0.0)
    row = losses.describe_updates([none_sampled], [0.5])
    assert row["entropy"] is row["kl"] is row["clipped"] is row["gap"] is None
    assert row["grad_norm"] == 0.5
    assert losses.describe_updates([], []) == {"updates": 0}


def test_clipped_ratios_and_the_distance_to_the_old_policy_are_counted():
    rows = [Row([1], [2, 3, 4], [0.0] * 3, 1.0, 1.0, 0)]
    batch = losses.make_batch(rows, "cpu")
    logp = torch.log(torch.tensor([[0.5, 0.5, 0.5]]))
    batch = batch._replace(old_logp=torch.log(torch.tensor([[0.5, 0.4, 1.0]])))
    entropy = torch.tensor([[0.1, 0.2, 0.3]])
    sums = losses.token_sums(GRPO(), logp, entropy, batch)
    tokens, total_entropy, clipped, kl, gap = [float(x) for x in sums]
    assert tokens == 3
    assert total_entropy == pytest.approx(0.6)
    assert clipped == 2  # ratios 1, 1.25, 0.5
    expected = (1.25 - 1 - math.log(1.25)) + (0.5 - 1 - math.log(0.5))
    assert kl == pytest.approx(expected)
    assert gap == pytest.approx(3 * math.log(2))


def test_a_copied_prefix_counts_in_no_number_of_the_policy():
    plain = [Row([1], [2, 0], [-0.5, -0.5], right, right, 0) for right in (1.0, 0.0, 0.0)]
    hybrid = Row([1], [2] * 9, [0.0] * 9, 1.0, 1.0, 0, n_prefix=8, finished=False)
    agree = [row._replace(correct=0.0) for row in plain]
    numbers = losses.describe_groups([[*plain, hybrid], [*agree, hybrid]])
    without = losses.describe_groups([plain, agree])
    assert numbers.pop("hybrid_reward") == 100
    assert numbers == without
    assert without["reward"] == pytest.approx(100 / 6)
    assert without["signal"] == 50
    assert without["length"] == 2
    assert without["truncated"] == 0


def test_losses_can_be_lifted_out_with_two_tiny_files():
    source = Path(losses.__file__).read_text()
    imported = re.findall(r"^(?:from|import) ([\w.]+)", source, re.M)
    assert set(imported) == {"math", "dataclasses", "typing", "torch", "core.errors", "core.wide"}


def test_every_method_that_takes_demonstrations_as_rows_is_among_the_mixed_cases():
    import methods

    found = [name for name in methods.names() if methods.load(name).demonstrations == "rows"]
    assert sorted(found) == sorted(MIXED)
