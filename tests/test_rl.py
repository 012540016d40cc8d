"""rl.collect: how many prompts are sampled, which groups are trained on, what a reward decides."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import boxed, policy_of, rl_config, write_jsonl

import data
import evaluate
import losses
import methods
import rl
import rollout
from core import flops
from core.errors import UserError
from core.run import Run

SHARED = Path(__file__).resolve().parents[2] / "shared" / "objective_cases.json"
RULES = json.loads(SHARED.read_text())["misc"] if SHARED.exists() else []


class Scripted:
    """A reward that gives each problem's responses the numbers of its row, in their order."""

    def __init__(self):
        self.n_judged = Counter()

    def __call__(self, response: str, row: dict) -> float:
        rewards = row["rewards"]
        n = self.n_judged[row["name"]]
        self.n_judged[row["name"]] += 1
        return rewards[n % len(rewards)]


def pool_of(groups: list, folder: Path, tokenizer) -> list:
    """Problems in the order in which collect() draws them; groups: [(name, rewards)]. All have a
    demonstration."""
    rows = [{}] * len(groups)
    for (name, rewards), place in zip(groups, data.plan(len(groups), 0, 0, len(groups))):
        rows[place] = {"prompt": "Make 1 ->", "answer": "1", "response": boxed(1, 1)}
        rows[place] |= {"name": name, "rewards": rewards}
    problems, _ = data.problems(write_jsonl(folder / "pool.jsonl", rows), tokenizer, 64)
    return problems


@pytest.fixture()
def collect(small_task, tmp_path):
    """collect(groups, **settings) -> (Round, names that were sampled, Run)."""

    def run_it(groups, algo="dapo", **settings):
        policy = policy_of(small_task)
        policy.tokenizer.eos_ids = list(range(policy.tokenizer.vocab_size))  # one token each
        policy.reward = Scripted()
        cfg = rl_config(small_task, tmp_path / "r", group=len(groups[0][1]), overwrite=True)
        cfg = replace(cfg, update_prompts=1, **settings)
        run = Run(cfg, cfg.steps, small_task)
        pool = pool_of(groups, tmp_path, policy.tokenizer)
        found = rl.collect(cfg, methods.load(algo)(**cfg.options), policy, pool, run)
        return found, set(policy.reward.n_judged), run, pool

    return run_it


def names_of(found: rl.Round, pool: list) -> list[str]:
    """Names of the groups that are trained on."""
    names = []
    for group in found.groups:
        (place,) = data.plan(len(pool), 0, group[0].group, 1)
        names.append(pool[place].row["name"])
    return names


# ---- dynamic sampling ----------------------------------------------------------------------------


@pytest.mark.skipif(not RULES, reason="the shared vectors are not part of the project")
@pytest.mark.parametrize(
    "rule", [pytest.param(r, id=r["id"]) for r in RULES if r["kind"] == "dynamic_sampling"]
)
def test_the_shared_rounds_of_dynamic_sampling(rule, collect):
    rounds = rule["input"]["rounds"]
    width = max(len(groups) for groups in rounds)
    groups = []
    for number, named in enumerate(rounds):
        for name, rewards in named:
            groups.append((f"{name} {number}", rewards))
        while len(groups) < (number + 1) * width:  # all rounds draw alike; these are never chosen
            groups.append((f"more {len(groups)}", [0, 0]))
    found, _, _, pool = collect(
        groups,
        prompts=rule["input"]["train_prompts"],
        gen_prompts=width,
        max_rounds=rule["input"].get("max_rounds", 10),
    )
    expected = rule["expected"]
    assert [name.split()[0] for name in names_of(found, pool)] == expected["selected"]
    assert found.stats["rounds"] == expected["rounds_used"]
    sampled = expected["rounds_used"] * width
    assert found.stats["discarded"] == sampled - len(expected["selected"])


def test_no_round_is_drawn_that_is_not_needed_and_the_surplus_is_discarded(collect):
    groups = []
    for n in range(3):
        groups += [(f"flat{n}", [1, 1, 1]), (f"mixed{n}", [1, 0, 1]), (f"also{n}", [0, 0, 1])]
    found, sampled, run, pool = collect(groups, prompts=3, gen_prompts=3)
    assert names_of(found, pool) == ["mixed0", "also0", "mixed1"]
    assert sampled == {"flat0", "mixed0", "also0", "flat1", "mixed1", "also1"}
    assert found.stats["rounds"] == 2
    assert found.stats["discarded"] == 3
    assert run.position == 6  # the next step goes on behind the surplus
    assert sum(len(group) for group in found.sampled) == 18
    assert len(found.records) == 18


def test_a_supply_that_runs_dry_trains_on_what_there_is(collect):
    groups = [("mixed", [1, 0]), ("flat", [1, 1])]
    found, _, run, pool = collect(groups, prompts=99, gen_prompts=2, max_rounds=3)
    assert names_of(found, pool) == ["mixed"] * 3
    assert found.stats["rounds"] == 3
    assert run.position == 6


def test_rewards_that_never_differ_stop_at_max_rounds_with_no_group(collect):
    groups = [(f"flat{n}", [0, 0]) for n in range(5)]
    found, _, _, _ = collect(groups, prompts=1, gen_prompts=2)
    assert found.groups == []
    assert found.stats["rounds"] == 10
    assert found.stats["discarded"] == 20
    assert found.stats["signal"] == 0


def test_without_dynamic_sampling_one_round_of_prompts_is_trained_on_whatever_it_earned(collect):
    groups = [("flat", [0, 0]), ("right", [1, 1]), ("mixed", [1, 0]), ("not drawn", [1, 0])]
    found, sampled, run, pool = collect(groups, algo="grpo", prompts=3, gen_prompts=4)
    assert names_of(found, pool) == ["flat", "right", "mixed"]
    assert "not drawn" not in sampled
    assert run.position == 3
    assert found.stats["signal"] == pytest.approx(100 / 3)
    assert found.stats["discarded"] == 0


def test_partial_credit_is_a_signal(collect):
    found, _, _, pool = collect([("near", [0.2, 0.3]), ("flat", [0.4, 0.4])], prompts=1)
    assert names_of(found, pool) == ["near"]
    assert [row.reward for row in found.groups[0]] == [0.2, 0.3]


@pytest.mark.parametrize(
    "algo, n_unsolved",
    [("upt", 1), ("luffy", 3)],  # the demonstration alone; with two rollouts
)
def test_an_unsolved_prompt_with_a_demonstration_is_not_replaced(collect, algo, n_unsolved):
    groups = [("unsolved", [0, 0, 1]), ("solved", [1, 1, 1]), ("mixed", [1, 0, 1])]
    if algo == "upt":
        groups[0] = ("unsolved", [0, 0, 0])
    options = {"dynamic_sampling": True}
    found, _, _, pool = collect(groups, algo, prompts=2, gen_prompts=3, options=options)
    assert names_of(found, pool) == ["unsolved", "mixed"]
    assert len(found.groups[0]) == n_unsolved
    assert found.groups[0][-1].is_expert
    assert found.stats["rounds"] == 1


def test_demonstrations_that_are_longer_than_a_response_may_be_are_dropped_and_counted(
    small_task, capsys
):
    tokenizer = evaluate.open_tokenizer(small_task)
    problems, _ = data.problems(f"{small_task}/mixed.jsonl", tokenizer, 64)
    lengths = sorted(len(problem.expert) for problem in problems)
    cfg = rl_config(small_task, "never written", max_new=lengths[20])
    method = methods.load("upt")()
    pool, _ = rl.load_problems(cfg, method, tokenizer)
    kept = [problem for problem in pool if problem.expert]
    assert len(pool) == 40
    assert max(len(problem.expert) for problem in kept) == lengths[20]
    n_dropped = 40 - len(kept)
    assert f"{n_dropped} demonstrations over --max-new {cfg.max_new}" in capsys.readouterr().out
    with pytest.raises(UserError, match="all 40 are over --max-new 16 tokens; raise it"):
        rl.load_problems(replace(cfg, max_new=16), method, tokenizer)


# ---- rewards -------------------------------------------------------------------------------------
def test_the_log_has_the_mean_reward_and_the_share_of_right_responses(collect):
    groups = [("a", [0.2, 0.4]), ("b", [0.6, 1.0])]
    found, _, _, _ = collect(groups, algo="grpo", prompts=2)
    assert found.stats["reward"] == pytest.approx(55)  # percent of one
    assert found.stats["right"] == 50  # above one half
    assert found.stats["truncated"] == 0
    assert found.stats["length"] == 1


def row_of(folder, reward: float, n_tokens=4, finished=True, prefix=(), **settings) -> losses.Row:
    """A response of so many tokens that a reward gives this number."""
    policy = policy_of(folder)
    policy.reward = lambda text, row: reward
    problem = data.problems(f"{folder}/mixed.jsonl", policy.tokenizer, 64)[0][0]
    response = rollout.Response([5] * n_tokens, [-0.5] * n_tokens, [0.0] * n_tokens, finished)
    request = evaluate.Request(problem, list(prefix), 2, number=7)
    cfg = rl_config(folder, "never written", **settings)
    (record,) = policy.judge([(problem, response)])
    return rl.score(cfg, request, response, record)


def test_a_cut_response_earns_nothing_and_keeps_a_negative_reward(small_task):
    assert row_of(small_task, 0.8, finished=False).reward == 0
    assert row_of(small_task, -1.0, finished=False).reward == -1
    assert row_of(small_task, 0.8).reward == 0.8


def test_a_long_right_response_is_punished_and_stays_right_for_the_filter(small_task):
    row = row_of(small_task, 1.0, n_tokens=15, max_new=20, overlong=10)
    assert row.correct == 1
    assert row.reward == 0.5
    assert losses.make_batch([row], "cpu").is_success.all()


def test_a_sample_is_recorded_with_the_reward_that_is_trained_on(collect):
    found, _, _, _ = collect([("a", [1, 0])], algo="grpo", prompts=1, max_new=1, overlong=1)
    assert [row.correct for row in found.groups[0]] == [1, 0]
    assert [record["reward"] for record in found.records] == [0, -1]


def test_a_row_knows_its_prompt_the_number_of_its_group_and_its_prefix(small_task):
    plain = row_of(small_task, 1.0)
    hybrid = row_of(small_task, 1.0, prefix=[5, 5])
    assert (plain.group, hybrid.group) == (7, 7)
    assert (plain.n_prefix, hybrid.n_prefix) == (0, 2)
    tokenizer = evaluate.open_tokenizer(small_task)
    assert plain.prompt == data.problems(f"{small_task}/mixed.jsonl", tokenizer, 64)[0][0].prompt


def test_a_demonstration_that_the_reward_calls_wrong_earns_nothing(small_task):
    policy = policy_of(small_task)
    problem = data.problems(f"{small_task}/mixed.jsonl", policy.tokenizer, 64)[0][0]
    values = []
    for value in (1.0, 0.0):
        policy.reward = lambda text, row, value=value: value
        row = rl.expert_rows(rl_config(small_task, "never written"), policy, {3: problem})[3]
        assert row.is_expert
        assert row.response == problem.expert
        assert row.logp == [0.0] * len(problem.expert)
        values.append((row.correct, row.reward))
    assert values == [(1, 1), (0, 0)]


def test_a_demonstration_is_not_punished_for_its_length(small_task):
    policy = policy_of(small_task)
    problem = data.problems(f"{small_task}/mixed.jsonl", policy.tokenizer, 64)[0][0]
    policy.reward = lambda text, row: 1.0
    n = len(problem.expert)
    cfg = rl_config(small_task, "never written", max_new=n, overlong=n)
    assert rl.expert_rows(cfg, policy, {3: problem})[3].reward == 1


# ---- what is sampled -----------------------------------------------------------------------------
def collected_from(folder, tmp_path, algo: str, **settings) -> rl.Round:
    policy = policy_of(folder, "math")
    cfg = replace(rl_config(folder, tmp_path / "r", overwrite=True), **settings)
    run = Run(cfg, cfg.steps, Path(folder))
    run.step = 2
    pool, _ = data.problems(cfg.data, policy.tokenizer, 64)
    return rl.collect(cfg, methods.load(algo)(), policy, pool, run)


def test_a_hybrid_starts_with_its_demonstration_and_goes_on_by_itself(coin, tmp_path):
    found = collected_from(coin, tmp_path, "prefix_rft")
    tokenizer = evaluate.open_tokenizer(coin)
    experts = {}
    for problem in data.problems(f"{coin}/mixed.jsonl", tokenizer, 64)[0]:
        experts[tuple(problem.prompt)] = problem.expert
    for group in found.groups:
        assert [row.n_prefix > 0 for row in group] == [False, False, False, True]
        hybrid = group[-1]
        n = hybrid.n_prefix
        assert hybrid.response[:n] == experts[tuple(hybrid.prompt)][:n]
        assert hybrid.logp[:n] == [0.0] * n
        assert len(hybrid.response) > n
        assert all(x < 0 for x in hybrid.logp[n:])


def test_a_group_of_luffy_has_the_demonstration_in_place_of_one_rollout(coin, tmp_path):
    found = collected_from(coin, tmp_path, "luffy")
    for group in found.groups:
        assert [row.is_expert for row in group] == [False, False, False, True]
    for group in found.sampled:
        assert [row.is_expert for row in group] == [False] * 3


def test_what_is_sampled_depends_on_the_seed_alone(coin, tmp_path):
    first = collected_from(coin, tmp_path, "grpo")
    again = collected_from(coin, tmp_path, "grpo")
    other = collected_from(coin, tmp_path, "grpo", seed=1)
    assert first.groups == again.groups
    assert first.groups != other.groups


# ---- updates -------------------------------------------------------------------------------------
def pair(group: int, rewards: tuple) -> list[losses.Row]:
    """Two responses, of 3 and of 2 tokens, to a prompt of 4."""
    rows = []
    for n, reward in zip((3, 2), rewards):
        rows.append(losses.Row([3, 31, 4, 5], [6] * n, [-1.0] * n, reward, reward, group))
    return rows


@pytest.mark.parametrize(
    "options",
    [{}, {"entropy_coef": 0.01}, {"kl_coef": 0.1}, {"entropy_coef": 0.01, "kl_coef": 0.1}],
)
def test_rows_without_a_signal_make_no_update_whatever_else_the_loss_holds(
    small_task, tmp_path, options
):
    net = policy_of(small_task).net
    cfg = rl_config(small_task, tmp_path, update_prompts=1)
    method = losses.GRPO(**options)
    reference = net if method.kl_coef else None
    groups = [pair(0, (0.0, 0.0)), pair(1, (1.0, 1.0))]
    assert rl.make_batches(cfg, method, net, reference, groups) == []
    (update,) = rl.make_batches(cfg, method, net, reference, [*groups, pair(2, (1.0, 0.0))])
    assert [row.group for row in update.rows] == [2, 2]
    assert update.batch.old_logp is None  # no other update has changed the weights


@pytest.mark.parametrize("kl_coef, n_forwards", [(0.0, 7), (0.1, 9)])
def test_the_machines_flops_of_a_round_are_those_counted_by_hand(
    small_task, tmp_path, kl_coef, n_forwards
):
    net = policy_of(small_task).net
    cfg = rl_config(small_task, tmp_path, update_prompts=1)
    method = losses.GRPO(kl_coef=kl_coef)
    groups = [pair(0, (1.0, 0.0)), pair(1, (0.0, 1.0))]
    updates = rl.make_batches(cfg, method, net, net if kl_coef else None, groups)
    collected = rl.Round(groups, groups, [], {})
    tokens, _, machine = flops.of_round(cfg, method, net.config, collected, updates)
    assert tokens == 2 * (7 + 6)
    # 2 layers of 3 x 32 x 64 + 2 x 32 x (32 + 16) weights; 4 x 32 FLOPs per query and key
    per_token = 2 * 2 * 9216
    per_pair = 2 * 4 * 32
    head = 2 * net.config.vocab_size * 32
    # A group reads its prompt once, with its first response; half of the queries see a key
    sampled = 9 * per_token + (7**2 + 6**2 - 4**2) / 2 * per_pair + 5 * head
    # Per update: forward, backward (two), and with a KL the reference; before the second: old_logp
    expected = (2 + n_forwards) * sampled + 2 * (sampled - 5 * head)  # recomputed blocks
    assert machine == expected


def test_the_forward_that_ranks_prefixes_reads_all_rows_and_the_update_those_that_teach(
    small_task, tmp_path
):
    net = policy_of(small_task).net
    cfg = rl_config(small_task, tmp_path, update_prompts=1, recompute=False)
    method = methods.load("prefix_rft")()
    groups = [pair(0, (0.0, 0.0)), pair(1, (0.0, 1.0)), pair(2, (0.0, 1.0))]
    updates = rl.make_batches(cfg, method, net, None, groups)
    assert len(updates) == 2
    collected = rl.Round(groups, [], [], {})
    _, _, machine = flops.of_round(cfg, method, net.config, collected, updates)
    forward = flops.hardware_flops(net.config, [7, 6], n_head=5, cached=[0, 4])
    assert machine == pytest.approx(3 * forward + 2 * 3 * forward)


# ---- what an update measures ---------------------------------------------------------------------
def test_the_distance_to_the_sampler_is_small_and_is_measured_in_the_first_update(coin, tmp_path):
    found = collected_from(coin, tmp_path, "grpo")
    policy = policy_of(coin, "math")
    cfg = rl_config(coin, tmp_path)
    method = methods.load("grpo")()
    first, second = rl.make_batches(cfg, method, policy.net, None, found.groups)
    sums = rl.train_on(cfg, method, policy.net, first)
    numbers = losses.describe_updates([sums, {**sums, "gap": 1e9}], [1.0, 1.0])
    assert 0 <= numbers["gap"] < 1e-3
    assert numbers["clipped"] == 0
    assert numbers["kl"] == pytest.approx(0, abs=1e-9)
    assert 0 < numbers["entropy"] < math.log(policy.tokenizer.vocab_size)
