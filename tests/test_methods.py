"""methods/: what each method samples, which rows complete a group, and what it minimises."""

import math

import objective
import pytest
import torch
from reference import METHODS, N_ROWS, make_case, rows_of
from test_losses import gradient, needs_vectors, shared_rules

import losses
import methods
from core.errors import UserError
from losses import Row
from methods.prefix_rft import most_uncertain, prefix_length, prefix_window

NAMES = ["dapo", "dapo_d", "dapo_dc", "grpo", "luffy", "prefix_rft", "srft", "upt"]


def rollout(correct: float, **changes) -> Row:
    return Row([1], [5, 0], [-0.5, -0.1], correct, correct, 3, **changes)


EXPERT = Row([1], [6, 7, 0], [0.0] * 3, 1.0, 1.0, 3, is_expert=True)


# ---- methods by name -----------------------------------------------------------------------------
def test_the_methods_of_the_paper_are_there_by_name():
    assert methods.names() == NAMES
    for name in NAMES:
        assert issubclass(methods.load(name), losses.GRPO)
    assert methods.load("dapo_dc") is methods.load("dapo")


def test_a_method_in_a_file_of_the_users_is_loaded_by_its_path(tmp_path):
    (tmp_path / "idea.py").write_text(
        "from dataclasses import dataclass\n"
        "from losses import GRPO\n"
        "@dataclass(frozen=True)\n"
        "class Method(GRPO):\n"
        "    strength: float = 2.0  # of the idea\n"
        "    def advantages(self, batch):\n"
        "        return self.strength * super().advantages(batch)\n"
    )
    Method = methods.load(str(tmp_path / "idea.py"))
    batch = losses.make_batch([rollout(1.0), rollout(0.0)], "cpu")
    assert Method().advantages(batch).tolist() == [1.0, -1.0]
    assert Method(strength=4.0).advantages(batch).tolist() == [2.0, -2.0]


def test_a_file_of_methods_given_by_its_path_is_the_same_class():
    path = str(methods.HERE / "luffy.py")
    assert methods.load(path) is methods.load("luffy")


@pytest.mark.parametrize("name", ["lufy", "nowhere/idea.py"])
def test_an_unknown_method_is_refused_with_the_ones_there_are(name):
    with pytest.raises(UserError, match="no such method; choose dapo, .*luffy.* or a file.py"):
        methods.load(name)


def test_a_file_without_a_method_is_refused(tmp_path):
    (tmp_path / "empty.py").write_text("class Methode: pass\n")
    with pytest.raises(UserError, match="defines no class Method"):
        methods.load(str(tmp_path / "empty.py"))


# ---- what differs between the methods of the paper (table 2, section C.2.2) ----------------------
def test_the_settings_are_those_of_the_papers_comparison():
    for name in NAMES:
        settings = methods.load(name).settings
        is_dapo = name in ("dapo", "dapo_dc")
        assert settings["lr"] == (5e-6 if name == "upt" else 1e-6)
        assert settings["prompts"] == (64 if is_dapo else 128)
        assert settings["update_prompts"] == 64
        assert settings["temperature"] == (0.7 if is_dapo else 1.0)


@pytest.mark.parametrize(
    "name, clip, normalize_std, dynamic_sampling",
    [
        ("grpo", (0.2, 0.2), False, False),
        ("dapo_d", (0.2, 0.2), False, True),
        ("dapo", (0.2, 0.28), True, True),
        ("luffy", (None, None), False, False),
        ("srft", (None, None), False, False),
        ("upt", (0.2, 0.2), False, False),
        ("prefix_rft", (0.2, 0.2), False, False),
    ],
)
def test_the_defaults_are_those_of_the_papers_comparison_without_its_entropy_bonus(
    name, clip, normalize_std, dynamic_sampling
):
    method = methods.load(name)()
    assert (method.clip_low, method.clip_high) == clip
    assert method.normalize_std is normalize_std
    assert method.dynamic_sampling is dynamic_sampling
    assert method.entropy_coef == 0
    assert method.kl_coef == 0
    assert method.agg == "token-mean"


# ---- what is sampled and what completes a group --------------------------------------------------
@pytest.mark.parametrize("name", ["grpo", "dapo", "upt"])
def test_a_group_is_sampled_from_the_prompt_alone(name):
    assert methods.load(name)().requests([5, 6, 0], 8, 0.5, 0.5) == [([], 8)]


@pytest.mark.parametrize("name", ["luffy", "srft"])
def test_the_experts_row_takes_the_place_of_one_rollout(name):
    method = methods.load(name)()
    assert method.requests([5, 6, 0], 8, 0.5, 0.5) == [([], 7)]
    assert method.requests(None, 8, 0.5, 0.5) == [([], 8)]
    rollouts = [rollout(1.0), rollout(0.0)]
    assert method.complete(rollouts, EXPERT) == [*rollouts, EXPERT]
    assert method.complete(rollouts, None) == rollouts


def test_the_gate_imitates_at_or_below_gamma_and_only_where_there_is_a_demonstration():
    half = [rollout(0.0), rollout(0.0), rollout(1.0), rollout(1.0)]
    never = [rollout(0.0)] * 4
    gated = methods.load("upt")
    assert gated().complete(half, EXPERT) == half
    assert gated().complete(never, EXPERT) == [EXPERT]
    assert gated().complete(never, EXPERT._replace(correct=0.0)) == [EXPERT._replace(correct=0.0)]
    assert gated().complete(never, None) == never
    assert gated(gate_gamma=0.5).complete(half, EXPERT) == [EXPERT]
    assert gated(gate_gamma=-1.0).complete(never, EXPERT) == never


def test_a_share_of_solved_rollouts_meets_its_gate_whatever_the_rounding():
    rollouts = [rollout(0.1)] * 3  # their sum over 3 is not 0.1
    assert sum(row.correct for row in rollouts) / 3 != 0.1
    assert methods.load("upt")(gate_gamma=0.1).complete(rollouts, EXPERT) == [EXPERT]


@pytest.mark.parametrize("name", ["luffy", "srft", "upt"])
def test_an_unsolved_prompt_with_a_demonstration_carries_a_signal(name):
    method = methods.load(name)()
    assert method.carries_signal([0.0, 0.0], [5, 6, 0])
    assert not method.carries_signal([0.0, 0.0], None)
    assert not method.carries_signal([1.0, 1.0], [5, 6, 0])
    assert method.carries_signal([0.0, 1.0], None)


def test_upt_keeps_every_prompt_that_its_gate_imitates():
    assert methods.load("upt")(gate_gamma=0.25).carries_signal([0.2, 0.2], [5, 6, 0])
    assert not methods.load("upt")().carries_signal([0.2, 0.2], [5, 6, 0])


def test_every_row_of_srft_that_has_a_token_teaches_whatever_its_reward():
    rows = [rollout(0.0), rollout(0.0)]
    for name, teaching in (("srft", [True, True]), ("grpo", [False, False])):
        method = methods.load(name)()
        batch = losses.weigh(method, losses.make_batch(rows, "cpu"))
        assert method.teaches(batch).tolist() == teaching
    cut = [row._replace(finished=False) for row in rows]
    batch = losses.make_batch(cut, "cpu", mask_truncated=True)
    assert not methods.load("srft")().teaches(batch).any()


def test_prefix_rft_continues_one_demonstration_per_group():
    method = methods.load("prefix_rft")()
    demonstration = list(range(100))
    assert method.requests(demonstration, 8, 1.0, 0.6) == [([], 7), (demonstration[:59], 1)]
    assert method.requests([0], 8, 1.0, 0.5) == [([], 8)]  # nothing would be left to write
    assert method.requests(None, 8, 1.0, 0.5) == [([], 8)]


# ---- limits in which a method is another one -----------------------------------------------------
def test_luffy_without_experts_is_grpo_without_a_clip():
    case = make_case("grpo", 12)
    free = gradient("grpo", case, clip_low=None, clip_high=None)
    assert torch.equal(gradient("luffy", case), free)


def test_prefix_rft_without_a_hybrid_is_grpo():
    case = make_case("grpo", 13)
    assert torch.equal(gradient("prefix_rft", case), gradient("grpo", case))


def test_upt_with_a_gate_below_every_reward_is_grpo_on_the_rollouts():
    case = make_case("upt", 14)
    ungated = gradient("upt", case, gate_gamma=-1.0)
    experts = [b for b in range(N_ROWS) if case["inputs"]["is_expert"][b]]
    rollouts = [b for b in range(N_ROWS) if b not in experts]
    alone = gradient("grpo", rows_of(case, rollouts))
    assert torch.allclose(ungated[rollouts], alone, rtol=1e-12)
    assert ungated[experts].abs().sum() == 0
    assert ungated.abs().sum() > 0


def test_upt_with_a_gate_above_every_reward_is_sft_on_the_experts():
    with_demonstration = [b for b in range(N_ROWS) if b % 3 < 2 and b < 12]  # groups 0 and 1
    case = rows_of(make_case("upt", 15), with_demonstration)
    is_expert = torch.tensor(case["inputs"]["is_expert"]) > 0
    imitated = gradient("upt", case, gate_gamma=1.0, sft_coef=1.0)
    mask = torch.tensor(case["inputs"]["mask"])[is_expert] > 0
    sft = -mask.double() / mask.sum()
    assert torch.allclose(imitated[is_expert], sft, rtol=1e-12)
    assert imitated.abs().sum() > 0
    assert imitated[~is_expert].abs().sum() == 0


# ---- the loss of a token -------------------------------------------------------------------------
def weighed(rows: list[Row], advantages: list[float]) -> losses.Batch:
    """A batch with these advantages, as if all rows of the step were here."""
    batch = losses.make_batch(rows, "cpu")
    values = torch.tensor(advantages)[:, None].expand_as(batch.mask)
    return batch._replace(advantages=torch.where(batch.mask, values, 0.0))


def test_luffy_weighs_an_expert_token_most_where_its_probability_is_gamma():
    p = torch.tensor([[1e-6, 0.01, 0.1, 0.5, 0.999]], dtype=torch.float64)
    logp = p.log().requires_grad_()
    expert = Row([1], [2, 3, 4, 5, 0], [0.0] * 5, 1.0, 1.0, 0, is_expert=True)
    batch = weighed([expert], [0.875])
    methods.load("luffy")().token_loss(logp, None, batch).sum().backward()
    assert torch.allclose(logp.grad, -0.875 * 0.1 * p / (p + 0.1) ** 2)
    assert logp.grad.argmin() == 2


@pytest.mark.parametrize("name, reads_advantage", [("luffy", True), ("srft", True), ("upt", False)])
def test_an_expert_row_has_an_advantage_term_only_in_the_methods_that_give_it_one(
    name, reads_advantage
):
    logp = torch.tensor([[-0.5, -2.0, -0.1]])
    entropy = torch.ones(1, 3)
    method = methods.load(name)()
    without = method.token_loss(logp, entropy, weighed([EXPERT], [0.0]))
    with_advantage = method.token_loss(logp, entropy, weighed([EXPERT], [1.0]))
    imitates = name != "luffy"
    assert bool((without > 0).all()) == imitates
    assert bool((with_advantage < without).all()) == reads_advantage
    assert bool((with_advantage == without).all()) != reads_advantage


def test_srft_without_entropy_has_its_plain_coefficients():
    rows = [EXPERT, rollout(1.0), rollout(0.0)]
    batch = weighed(rows, [0.0, 1.0, -1.0])
    logp = torch.tensor([[-0.5, -2.0, -0.1], [-0.3, -1.0, 0.0], [-0.7, -0.2, 0.0]])
    ell = methods.load("srft")().token_loss(logp, torch.zeros(3, 3), batch)
    assert torch.allclose(ell[0], -0.5 * logp[0])
    assert torch.allclose(ell[1], -0.1 * logp[1])
    assert torch.allclose(ell[2], logp[2])


def test_srft_imitates_surely_and_repeats_unsurely():
    rows = [EXPERT, rollout(1.0)]
    batch = weighed(rows, [0.0, 1.0])
    logp = torch.full((2, 3), -1.0)
    entropy = torch.full((2, 3), math.log(2))
    ell = methods.load("srft")().token_loss(logp, entropy, batch)
    assert ell[0].tolist() == pytest.approx([0.25] * 3)
    assert ell[1, :2].tolist() == pytest.approx([0.2] * 2)


def test_prefix_tokens_are_clipped_like_the_policys_own():
    logp = torch.full((1, 2), math.log(0.3), requires_grad=True)
    batch = weighed([rollout(1.0, n_prefix=1)], [1.0])
    batch = batch._replace(old_logp=torch.full((1, 2), math.log(0.2)))
    methods.load("prefix_rft")().token_loss(logp, None, batch).sum().backward()
    assert logp.grad.tolist() == [[0.0, 0.0]]


def test_surest_prefix_tokens_lose_their_advantage_and_stay_in_the_mean():
    case = make_case("prefix_rft", 16, drop_ratio=1.0)
    _, batch, _ = objective.prepare(case)
    prefix = batch.is_prefix & batch.mask
    assert prefix.any()
    assert (batch.advantages[prefix] == 0).all()
    n = sum(map(sum, case["inputs"]["mask"]))
    assert batch.weights.max().item() == pytest.approx(1 / n)


# ---- rules ---------------------------------------------------------------------------------------
@needs_vectors
@pytest.mark.parametrize("given, expected", shared_rules("prefix_window"))
def test_the_shared_prefix_windows(given, expected):
    done = given.pop("step") / given.pop("total_steps")
    assert prefix_window(done, **given) == pytest.approx(tuple(expected), rel=1e-9, abs=0)


@needs_vectors
@pytest.mark.parametrize("given, expected", shared_rules("prefix_length"))
def test_the_shared_prefix_lengths(given, expected):
    window = prefix_window(given["step"] / given["total_steps"])
    assert given["min_prefix_len"] == 1
    assert prefix_length(given["u"], window, given["demo_len"]) == expected


def test_the_prefix_window_opens_from_the_top_and_stays_open():
    assert prefix_window(0) == pytest.approx((0.95, 0.95))
    assert prefix_window(0.5) == pytest.approx((0.5, 0.95))
    assert prefix_window(1.0) == pytest.approx((0.05, 0.95))
    assert prefix_window(1.8) == prefix_window(1.0)


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
    assert prefix_length(u, (0.05, 0.95), demo_len) == expected


def test_the_ranking_of_prefix_tokens_spans_the_step_and_rounds_down():
    entropy = torch.tensor([[5.0, 1.0, 9.0], [2.0, float("nan"), 8.0], [4.0, 3.0, 0.0]])
    among = torch.tensor([[True, True, False], [True, False, False], [True, True, False]])
    kept = most_uncertain(entropy, among, 0.5)  # of 5, 1 2 3 4: int(2.5) = 2 go
    assert kept.tolist() == [[True, False, False], [False, False, False], [True, True, False]]
    assert most_uncertain(entropy, among, 0.0).equal(among)
    assert not most_uncertain(entropy, among, 1.0).any()


def test_every_method_has_a_case_in_the_comparison_with_loops():
    assert set(NAMES) - {"dapo_dc"} <= set(METHODS)
