"""The sampler: log-probs are the trainer's, responses depend on the request alone, EOS is kept, rows and memory are not wasted."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import model as model_file
import rollout


def prompts_of(n, longest=40, vocab=160):
    g = torch.Generator().manual_seed(1)
    return [
        torch.randint(
            3, vocab, (int(torch.randint(1, longest, (), generator=g)),), generator=g
        ).tolist()
        for _ in range(n)
    ]


def scored(model, prompt, ids, temperature):
    """Log-probs and entropies of a response by one uncached forward over the whole sequence: the definition."""
    with torch.no_grad():
        hidden = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1]
        logp = torch.log_softmax(hidden.double() @ model.head.T.double() / temperature, -1)
    return logp[torch.arange(len(ids)), ids], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_are_those_of_an_uncached_forward_for_ragged_prompts(small, temperature):
    model, _, _ = small
    prompts = [*prompts_of(6, longest=150), [5], [7, 9], prompts_of(40, longest=300)[0] * 300][:9]
    prompts[-1] = prompts[-1][:300]
    groups = rollout.generate(model, prompts, 3, 30, temperature, eos_ids=[0], seed=3, rows=10)
    for prompt, group in zip(prompts, groups):
        for r in group:
            logp, entropy = scored(model, prompt, r.ids, temperature)
            assert torch.allclose(torch.tensor(r.logp).double(), logp, atol=1e-4)
            assert torch.allclose(torch.tensor(r.entropy).double(), entropy, atol=1e-4)


def test_trainer_and_sampler_agree_on_log_probs(small):
    model, _, _ = small
    prompts = prompts_of(5)
    groups = rollout.generate(model, prompts, 2, 20, 1.0, eos_ids=[0], seed=0)
    rows = [data.Example(p, r.ids) for p, g in zip(prompts, groups) for r in g]
    with torch.no_grad():
        logp, _, chosen = model_file.response_logp(model, *data.collate(rows))
    sampled = torch.tensor([x for g in groups for r in g for x in r.logp])
    assert torch.allclose(logp[chosen], sampled, atol=1e-4)


def ids_of(groups):
    return [[r.ids for r in g] for g in groups]


class Meter:
    """Counts what is computed: rows of each decode step, prompts read, the largest cache. Handed on as on_forward."""

    def __init__(self):
        self.steps, self.prompts, self.largest, self.longest = [], 0, 0, 0

    def __call__(self, what, rows, cache):
        if what == "read":
            self.prompts += rows
            return
        self.steps.append(rows)
        self.largest = max(self.largest, sum(x.nbytes for x in cache.k + cache.v))
        self.longest = max(self.longest, cache.slots)


def ragged(n, mean, most):
    g = torch.Generator().manual_seed(2)
    return torch.empty(n).exponential_(1 / mean, generator=g).long().clamp(1, most).tolist()


def test_a_response_does_not_depend_on_rows_order_or_neighbours(small):
    model, _, _ = small
    prompts = prompts_of(7)
    together = rollout.generate(
        model, prompts, 4, 25, 1.0, eos_ids=range(0, 160, 9), seed=5, rows=512
    )
    for rows in (1, 3, 10):
        assert ids_of(together) == ids_of(
            rollout.generate(
                model, prompts, 4, 25, 1.0, eos_ids=range(0, 160, 9), seed=5, rows=rows
            )
        )
    together = rollout.generate(model, prompts, 4, 25, 1.0, eos_ids=[0], seed=5)
    first_only = rollout.generate(model, prompts[:1], 4, 25, 1.0, eos_ids=[0], seed=5)
    assert [r.ids for r in first_only[0]] == [r.ids for r in together[0]]


def test_steps_of_padded_size_give_the_same_responses(small):
    model, _, _ = small
    prompts, meter = prompts_of(7), Meter()
    how = dict(temperature=1.0, eos_ids=range(0, 160, 9), seed=5)
    exact = rollout.generate(model, prompts, 4, 25, **how)
    for rows, cache_bytes in (
        (512, None),
        (11, None),
        (512, 20 * 65 * 2 * 2 * 2 * 8 * 4),
    ):  # 28 rows, 11, 20 to 11
        assert ids_of(
            rollout.generate(
                model,
                prompts,
                4,
                25,
                **how,
                rows=rows,
                cache_bytes=cache_bytes,
                bucketed=True,
                on_forward=meter,
            )
        ) == ids_of(exact)
    lengths, memory = (
        [150] + [10] * 89,
        456 * 2 * 2 * 2 * 8 * 4,
    )  # rows go back to the queue, and free ones are used again
    exact, padded = (
        rollout.generate(
            model, [[3, 4]] * 90, 1, lengths, 1.0, seed=0, cache_bytes=memory, bucketed=b
        )
        for b in (False, True)
    )
    assert ids_of(exact) == ids_of(padded)
    assert {1, 2, 4, 8, 11, 28} <= set(meter.steps) and not {3, 5, 6, 7, 9} & set(meter.steps)


def test_another_seed_gives_other_responses_and_the_group_is_diverse(small):
    model, _, _ = small
    a = rollout.generate(model, prompts_of(2), 4, 20, 1.0, eos_ids=[0], seed=1)
    b = rollout.generate(model, prompts_of(2), 4, 20, 1.0, eos_ids=[0], seed=2)
    assert a[0][0].ids != b[0][0].ids
    assert len({tuple(r.ids) for r in a[0]}) > 1


def test_temperature_zero_is_the_argmax_of_each_step(small):
    model, _, _ = small
    prompt = prompts_of(1)[0]
    out = rollout.generate(model, [prompt], 1, 12, 0.0, eos_ids=[], seed=0)[0][0]
    ids = list(prompt)
    for _ in range(12):
        with torch.no_grad():
            ids.append(int((model(torch.tensor([ids]))[0, -1] @ model.head.T).argmax()))
    assert out.ids == ids[len(prompt) :] and not out.finished


def test_eos_ends_a_response_and_is_kept_with_its_log_prob(small):
    model, _, _ = small
    every = list(range(0, 160, 3))  # many ending tokens: responses end early, at ragged lengths
    groups = rollout.generate(model, prompts_of(8), 4, 40, 1.0, eos_ids=every, seed=0)
    lengths = set()
    for r in (r for g in groups for r in g):
        assert len(r.ids) == len(r.logp) == len(r.entropy)
        assert all(i not in every for i in r.ids[:-1])
        assert r.finished == (r.ids[-1] in every) and (r.finished or len(r.ids) == 40)
        lengths.add(len(r.ids))
    assert len(lengths) > 3


def test_each_prompt_may_ask_for_its_own_number_of_responses(small):
    model, _, _ = small
    groups = rollout.generate(model, prompts_of(3), [1, 4, 2], 10, 1.0, eos_ids=[0], seed=0, rows=4)
    assert [len(g) for g in groups] == [1, 4, 2]


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().repeat(20_000, 1)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    token, logp, entropy = rollout.draw(logits, uniform, 1.0)
    share = torch.bincount(token, minlength=4) / 20_000
    assert torch.allclose(
        share, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.012
    )  # 3.5 standard errors
    assert torch.allclose(logp, logits[0, token], atol=1e-6)
    token, _, _ = rollout.draw(logits, uniform, 1.0, top_p=0.65)
    assert set(token.tolist()) == {2, 3}  # 0.4 + 0.3 is the smallest set with 65%


def test_an_empty_prompt_is_refused(small):
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        rollout.generate(small[0], [[3], []], 1, 4)


def test_model_returns_to_training_mode(small):
    model = small[0].train()
    rollout.generate(model, [[3]], 1, 2)
    assert model.training
    assert all(p.is_contiguous() for p in model.parameters())


# ---- batching and memory ---------------------------------------------------------------------------------------------
def test_no_row_is_computed_in_vain_and_each_prompt_is_read_once(small):
    model, _, _ = small
    prompts, lengths = prompts_of(8), ragged(64, 24, 64)
    meter = Meter()
    groups = rollout.generate(
        model, prompts, 8, lengths, 1.0, eos_ids=[], seed=0, rows=16, on_forward=meter
    )
    assert [len(r.ids) for g in groups for r in g] == lengths
    assert sum(meter.steps) == sum(lengths)  # 1 row computed per token
    assert meter.prompts == len(prompts)
    assert meter.steps[: len(meter.steps) // 2] == [16] * (
        len(meter.steps) // 2
    )  # ended rows are refilled at once


def test_a_response_cut_earlier_is_the_beginning_of_the_longer_one(small):
    model, _, _ = small
    prompts, lengths = prompts_of(3), [3, 9, 1, 20, 4, 15]
    short = rollout.generate(model, prompts, 2, lengths, 1.0, eos_ids=[0], seed=8)
    long = rollout.generate(model, prompts, 2, 20, 1.0, eos_ids=[0], seed=8)
    for a, b, n in zip((r for g in short for r in g), (r for g in long for r in g), lengths):
        assert a.ids == b.ids[:n]


def test_the_cache_grows_with_the_longest_live_row_not_with_max_new(small):
    model, _, _ = small
    meter = Meter()
    groups = rollout.generate(
        model, [[3, 4, 5]] * 4, 2, 4000, 1.0, eos_ids=range(0, 160, 8), seed=0, on_forward=meter
    )
    assert max(len(r.ids) for g in groups for r in g) < 125
    assert meter.longest <= 128


def test_little_memory_gives_the_same_responses_within_it_and_draws_no_token_twice(small):
    model, _, _ = small
    prompts, lengths = prompts_of(4), ragged(12, 40, 150)
    slot = 2 * 2 * 2 * 8 * 4  # keys and values, 2 layers, 2 heads, 8 wide, fp32
    plenty = rollout.generate(model, prompts, 3, lengths, 1.0, eos_ids=[], seed=4)
    need = max(len(p) for p in prompts) + max(lengths)
    for budget in (slot * need, slot * 3 * need, slot * 8 * 100):
        meter = Meter()
        tight = rollout.generate(
            model,
            prompts,
            3,
            lengths,
            1.0,
            eos_ids=[],
            seed=4,
            cache_bytes=budget,
            on_forward=meter,
        )
        assert ids_of(tight) == ids_of(plenty) and sum(meter.steps) == sum(lengths)
        for one, other in zip(sum(tight, []), sum(plenty, [])):
            torch.testing.assert_close(
                torch.tensor([one.logp, one.entropy]),
                torch.tensor([other.logp, other.entropy]),
                atol=1e-4,
                rtol=0,
            )
        assert 0.5 * budget < meter.largest <= budget


def test_a_row_that_makes_room_twice_reads_all_that_it_has_drawn(small):
    lengths, slot = [150, 100, 200, 60], 2 * 2 * 2 * 8 * 4
    plenty, tight = (
        rollout.generate(small[0], [[3, 4]] * 4, 1, lengths, 1.0, seed=0, cache_bytes=memory)
        for memory in (None, slot * 330)
    )
    assert ids_of(plenty) == ids_of(tight)


def test_memory_that_a_long_response_held_goes_back_to_the_waiting_ones(small):
    model, _, _ = small
    lengths, slot = [150] + [10] * 89, 2 * 2 * 2 * 8 * 4
    meter = Meter()
    groups = rollout.generate(
        model, [[3, 4]] * 90, 1, lengths, 1.0, seed=0, cache_bytes=slot * 456, on_forward=meter
    )
    assert [len(g[0].ids) for g in groups] == lengths
    assert meter.largest <= slot * 456
    assert (
        meter.steps[:63] == [7] * 63 and meter.steps[70:100] == [3] * 30
    )  # 456 slots: 7 rows of 64, 3 of 151
    assert 7 in meter.steps[150:]  # the long one is through


def test_a_request_that_no_memory_holds_is_refused_with_the_numbers(small):
    with pytest.raises(
        ValueError,
        match=r"prompt 1: 2 tokens and max_new 1000 need 0.3 MB of cache, and 0.1 MB are given",
    ):
        rollout.generate(small[0], [[3], [3, 4]], 1, 1000, cache_bytes=100_000)


def test_max_new_needs_one_number_or_one_for_each_request(small):
    for wrong in ([5, 5, 5], [5, 0], 0):
        with pytest.raises(ValueError, match="max_new: "):
            rollout.generate(small[0], [[3], [3, 4]], 1, wrong)


def test_an_interrupt_leaves_the_finished_responses_and_the_model_as_it_was(small):
    model, kept = small[0].train(), []
    before = {name: p.clone() for name, p in model.named_parameters()}

    def interrupt(done, total):
        if done >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rollout.generate(
            model,
            prompts_of(4),
            4,
            ragged(16, 20, 60),
            1.0,
            seed=1,
            progress=interrupt,
            on_response=lambda *x: kept.append(x),
        )
    whole = rollout.generate(model, prompts_of(4), 4, ragged(16, 20, 60), 1.0, seed=1)
    assert 5 <= len(kept) < 16 and all(response in whole[prompt] for prompt, response in kept)
    assert model.training and all(
        torch.equal(p, before[n]) and p.is_contiguous() for n, p in model.named_parameters()
    )


def test_progress_counts_to_the_number_of_requests(small):
    seen = []
    rollout.generate(
        small[0],
        prompts_of(3),
        4,
        ragged(12, 10, 30),
        1.0,
        seed=1,
        rows=3,
        progress=lambda *x: seen.append(x),
    )
    assert seen == sorted(set(seen)) and seen[-1] == (12, 12)


def test_packed_responses_come_back_to_the_last_bit(small):
    groups = rollout.generate(small[0], prompts_of(3), 2, 9, 1.0, eos_ids=[0], seed=0)
    ended = [(3, groups[0][1]), (0, groups[2][0]), (4, rollout.Response([7], [-0.5], [1.25], True))]
    found = rollout._unpack(rollout._pack(ended), 6)
    assert found == [ended[1][1], None, None, ended[0][1], ended[2][1], None]
    assert rollout._unpack(rollout._pack([]), 2) == [None, None]


# ---- bf16 and sharding -----------------------------------------------------------------------------------------------
def test_bf16_log_probs_are_those_of_the_trainers_bf16_forward(small_task):
    model = model_file.init_model(model_file.read_config(small_task), 0).to(torch.bfloat16)
    groups = rollout.generate(model, prompts_of(6), 4, 40, 1.0, eos_ids=[0], seed=0, rows=7)
    rows = [data.Example(p, r.ids) for p, g in zip(prompts_of(6), groups) for r in g]
    with torch.no_grad():
        logp, _, chosen = model_file.response_logp(model, *data.collate(rows))
    sampled = torch.tensor([x for g in groups for r in g for x in r.logp])
    assert torch.allclose(logp[chosen], sampled, atol=2e-2)


SHARDED = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import model as model_file, rollout
from core import ranks
from torch.distributed.fsdp import fully_shard
torch.set_num_threads(1)
rank, model = int(sys.argv[3]), model_file.load_model(sys.argv[2])
prompts, lengths = [[3, 4, 5], [6], [7, 8]], [4, 9, 3, 1, 30, 2]               # ranks need unequal numbers of steps
alone = rollout.generate(model, prompts, 2, lengths, 1.0, seed=1)
expected = {scale: model(torch.tensor([[3, 4, 5]])) for scale in (1, 2) if [p.data.mul_(scale) for p in model.parameters()]}
[p.data.div_(2) for p in model.parameters()]
dist.init_process_group("gloo", init_method="file://" + sys.argv[4], rank=rank, world_size=2)
for block in model.model.layers:
    fully_shard(block)
fully_shard(model)
for scale in (1, 2):                                                            # training goes on with other weights
    for p in model.parameters():
        p.data.mul_(scale)
    sampled = rollout.generate(model, prompts, 2, lengths, 1.0, seed=1)
    assert scale == 2 or [[r.ids for r in g] for g in sampled] == [[r.ids for r in g] for g in alone]
    assert type(model.model.layers[0].mlp.up_proj.weight.data).__name__ == "DTensor"
    torch.testing.assert_close(model(torch.tensor([[3, 4, 5]])), expected[scale], atol=1e-4, rtol=1e-4)   # a collective
    ranks.settle(model)
dist.barrier()
"""


def test_sharded_ranks_share_the_prompts_and_return_what_one_process_samples(small_task, tmp_path):
    root = str(Path(rollout.__file__).parent)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SHARDED, root, str(small_task), str(r), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors


# ---- draws -----------------------------------------------------------------------------------------------------------
def test_draws_over_a_large_vocabulary_are_where_the_cumulated_distribution_passes():
    g = torch.Generator().manual_seed(0)
    for V in (1, 100, 128, 1000, 32000):
        logits, uniform = (
            4 * torch.randn(64, V, generator=g),
            torch.rand(64, generator=g, dtype=torch.float64),
        )
        token, logp, entropy = rollout.draw(logits, uniform, 0.7)
        reference = torch.log_softmax(logits.double() / 0.7, -1)
        reach = reference.exp().cumsum(-1)
        after, before = (
            reach.gather(1, token[:, None])[:, 0],
            (reach - reference.exp()).gather(1, token[:, None])[:, 0],
        )
        assert (before <= uniform + 1e-5).all() and (uniform <= after + 1e-5).all()
        assert torch.allclose(logp.double(), reference.gather(1, token[:, None])[:, 0], atol=1e-5)
        assert torch.allclose(entropy.double(), -(reference.exp() * reference).sum(-1), atol=1e-5)


def test_impossible_tokens_are_never_drawn():
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    logits[:, [0, 1, 127, 128, 255, 256, 298, 299]] = -torch.inf
    for u in (0.0, 1 - 2**-53):
        token, logp, entropy = rollout.draw(logits, torch.full((3,), u, dtype=torch.float64), 1.0)
        assert torch.isfinite(logp).all() and torch.isfinite(entropy).all()


def test_top_k_keeps_the_likeliest_tokens_and_reports_the_full_distribution():
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(0)).repeat(2000, 1)
    uniform = torch.linspace(0, 1 - 1e-9, 2000, dtype=torch.float64)
    token, logp, _ = rollout.draw(logits, uniform, 1.0, top_k=5)
    assert set(token.tolist()) == set(logits[0].topk(5).indices.tolist())
    assert torch.allclose(
        logp, torch.log_softmax(logits, -1).gather(1, token[:, None])[:, 0], atol=1e-5
    )
