"""The sampler: log-probs are the trainer's, a response depends on its request alone, EOS is kept,
and no row or memory is wasted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import model as model_file
import rollout
from core.decode import decoder_of
from rollout import Hooks, Sampling, generate

SLOT = 2 * 2 * 2 * 8 * 4  # bytes of a slot in `small`: k and v, 2 layers, 2 heads, 8 wide, fp32


def prompts_of(n, longest=40, vocab=160):
    g = torch.Generator().manual_seed(1)
    prompts = []
    for _ in range(n):
        length = int(torch.randint(1, longest, (), generator=g))
        prompts.append(torch.randint(3, vocab, (length,), generator=g).tolist())
    return prompts


def ragged(n, mean, most):
    g = torch.Generator().manual_seed(2)
    return torch.empty(n).exponential_(1 / mean, generator=g).long().clamp(1, most).tolist()


def flat(groups):
    return [response for group in groups for response in group]


def ids_of(groups):
    return [response.ids for response in flat(groups)]


def scored(model, prompt, ids, temperature):
    """Log-probs and entropies of a response by one uncached forward: the definition."""
    with torch.no_grad():
        hidden = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1]
        logp = torch.log_softmax(hidden.double() @ model.head.T.double() / temperature, -1)
    return logp[torch.arange(len(ids)), ids], -(logp.exp() * logp).sum(-1)


class Meter:
    """Counts what is computed, as Hooks.on_forward."""

    def __init__(self):
        self.steps = []  # rows of each decode step
        self.prompts = 0  # prompts read
        self.largest = 0  # bytes of the largest cache
        self.longest = 0  # slots of the longest cache
        self.sizes = set()  # (rows, slots) of all caches

    def __call__(self, what, rows, cache):
        if what == "read":
            self.prompts += rows
            return
        self.steps.append(rows)
        self.largest = max(self.largest, sum(x.nbytes for x in cache.k + cache.v))
        self.longest = max(self.longest, cache.slots)
        self.sizes.add((cache.rows, cache.slots))


def metered(model, prompts, n, sampling):
    meter = Meter()
    return generate(model, prompts, n, sampling, Hooks(on_forward=meter)), meter


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_are_those_of_an_uncached_forward_for_ragged_prompts(small, temperature):
    model = small[0]
    long = prompts_of(40, longest=300)[0] * 300
    prompts = [*prompts_of(6, longest=150), [5], [7, 9], long[:300]]
    sampling = Sampling(30, temperature, eos_ids=[0], seed=3, rows=10)
    for prompt, group in zip(prompts, generate(model, prompts, 3, sampling)):
        for r in group:
            logp, entropy = scored(model, prompt, r.ids, temperature)
            assert torch.allclose(torch.tensor(r.logp).double(), logp, atol=1e-4)
            assert torch.allclose(torch.tensor(r.entropy).double(), entropy, atol=1e-4)


def test_trainer_and_sampler_agree_on_log_probs(small):
    model = small[0]
    prompts = prompts_of(5)
    groups = generate(model, prompts, 2, Sampling(20, eos_ids=[0]))
    rows = [data.Example(p, r.ids) for p, group in zip(prompts, groups) for r in group]
    with torch.no_grad():
        logp, _, chosen = model_file.response_logp(model, *data.collate(rows))
    sampled = torch.cat([torch.tensor(r.logp) for r in flat(groups)])
    assert torch.allclose(logp[chosen], sampled, atol=1e-4)


def test_a_response_does_not_depend_on_rows_order_or_neighbours(small):
    model = small[0]
    prompts = prompts_of(7)
    eos = range(0, 160, 9)
    together = generate(model, prompts, 4, Sampling(25, eos_ids=eos, seed=5, rows=512))
    for rows in (1, 3, 10):
        other = generate(model, prompts, 4, Sampling(25, eos_ids=eos, seed=5, rows=rows))
        assert ids_of(other) == ids_of(together)
    first_only = generate(model, prompts[:1], 4, Sampling(25, eos_ids=eos, seed=5))
    assert ids_of(first_only) == ids_of(together[:1])


def test_steps_of_padded_size_give_the_same_responses(small):
    model = small[0]
    prompts = prompts_of(7)
    settings = dict(max_new=25, eos_ids=range(0, 160, 9), seed=5)
    exact = generate(model, prompts, 4, Sampling(**settings))
    steps = set()
    # 28 rows; 11; 20 that become 11
    for rows, cache_bytes in ((512, None), (11, None), (512, 20 * 65 * SLOT)):
        sampling = Sampling(**settings, rows=rows, cache_bytes=cache_bytes, bucketed=True)
        padded, meter = metered(model, prompts, 4, sampling)
        assert ids_of(padded) == ids_of(exact)
        steps |= set(meter.steps)
    assert {1, 2, 4, 8, 11, 28} <= steps and not {3, 5, 6, 7, 9} & steps


def test_padded_steps_have_powers_of_two_rows_up_to_64_and_multiples_of_32_above(small):
    lengths = [1 + i // 2 for i in range(130)]  # two rows less at each step
    sampling = Sampling(lengths, bucketed=True)
    _, meter = metered(small[0], [[3]], 130, sampling)
    assert set(meter.steps) == {2, 4, 8, 16, 32, 64, 96, 128, 130}  # 130 = all rows


def test_padded_steps_use_rows_again_that_returned_to_the_queue(small):
    settings = dict(max_new=[150] + [10] * 89, cache_bytes=456 * SLOT)
    exact, padded = (
        generate(small[0], [[3, 4]] * 90, 1, Sampling(**settings, bucketed=bucketed))
        for bucketed in (False, True)
    )
    assert ids_of(exact) == ids_of(padded)


def test_another_seed_gives_other_responses_and_the_group_is_diverse(small):
    first = generate(small[0], prompts_of(2), 4, Sampling(20, eos_ids=[0], seed=1))
    other = generate(small[0], prompts_of(2), 4, Sampling(20, eos_ids=[0], seed=2))
    assert first[0][0].ids != other[0][0].ids
    assert len({tuple(r.ids) for r in first[0]}) > 1


def test_temperature_zero_is_the_argmax_of_each_step(small):
    model = small[0]
    prompt = prompts_of(1)[0]
    response = generate(model, [prompt], 1, Sampling(12, temperature=0.0))[0][0]
    ids = list(prompt)
    for _ in range(12):
        with torch.no_grad():
            ids.append(int((model(torch.tensor([ids]))[0, -1] @ model.head.T).argmax()))
    assert response.ids == ids[len(prompt) :] and not response.finished


def test_eos_ends_a_response_and_is_kept_with_its_log_prob(small):
    every = list(range(0, 160, 3))  # many ending tokens: responses end early, at ragged lengths
    groups = generate(small[0], prompts_of(8), 4, Sampling(40, eos_ids=every))
    for r in flat(groups):
        assert len(r.ids) == len(r.logp) == len(r.entropy)
        assert all(i not in every for i in r.ids[:-1])
        assert r.finished == (r.ids[-1] in every) and (r.finished or len(r.ids) == 40)
    assert len({len(r.ids) for r in flat(groups)}) > 3


def test_each_prompt_may_ask_for_its_own_number_of_responses(small):
    groups = generate(small[0], prompts_of(3), [1, 4, 2], Sampling(10, eos_ids=[0], rows=4))
    assert [len(g) for g in groups] == [1, 4, 2]


def test_an_empty_prompt_is_refused(small):
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        generate(small[0], [[3], []], 1, Sampling(4))


def test_model_returns_to_training_mode(small):
    model = small[0].train()
    generate(model, [[3]], 1, Sampling(2))
    assert model.training
    assert all(p.is_contiguous() for p in model.parameters())


# ---- batching and memory
def test_no_row_is_computed_in_vain_and_each_prompt_is_read_once(small):
    prompts = prompts_of(8)
    lengths = ragged(64, 24, 64)
    groups, meter = metered(small[0], prompts, 8, Sampling(lengths, rows=16))
    assert [len(ids) for ids in ids_of(groups)] == lengths
    assert sum(meter.steps) == sum(lengths)  # one row computed per token
    assert meter.prompts == len(prompts)
    half = len(meter.steps) // 2
    assert meter.steps[:half] == [16] * half  # ended rows are refilled at once


def test_a_response_cut_earlier_is_the_beginning_of_the_longer_one(small):
    prompts = prompts_of(3)
    lengths = [3, 9, 1, 20, 4, 15]
    short = generate(small[0], prompts, 2, Sampling(lengths, eos_ids=[0], seed=8))
    long = generate(small[0], prompts, 2, Sampling(20, eos_ids=[0], seed=8))
    for a, b, n in zip(ids_of(short), ids_of(long), lengths):
        assert a == b[:n]


def test_the_cache_grows_with_the_longest_live_row_not_with_max_new(small):
    sampling = Sampling(4000, eos_ids=range(0, 160, 8))
    groups, meter = metered(small[0], [[3, 4, 5]] * 4, 2, sampling)
    assert max(len(ids) for ids in ids_of(groups)) < 125
    assert meter.longest <= 128


def test_the_cache_changes_its_size_few_times_while_a_response_becomes_long(small):
    _, meter = metered(small[0], [[3]], 1, Sampling(1000))
    assert sorted(slots for _, slots in meter.sizes) == [64, 128, 192, 320, 512, 768, 1000]


def test_little_memory_gives_the_same_responses_within_it_and_draws_no_token_twice(small):
    model = small[0]
    prompts = prompts_of(4)
    lengths = ragged(12, 40, 150)
    plenty = generate(model, prompts, 3, Sampling(lengths, seed=4))
    need = max(len(p) for p in prompts) + max(lengths)
    for slots in (need, 3 * need, 8 * 100):
        budget = slots * SLOT
        sampling = Sampling(lengths, seed=4, cache_bytes=budget)
        tight, meter = metered(model, prompts, 3, sampling)
        assert ids_of(tight) == ids_of(plenty) and sum(meter.steps) == sum(lengths)
        for one, other in zip(flat(tight), flat(plenty)):
            numbers = torch.tensor([one.logp, one.entropy])
            expected = torch.tensor([other.logp, other.entropy])
            torch.testing.assert_close(numbers, expected, atol=1e-4, rtol=0)
        assert 0.5 * budget < meter.largest <= budget


def test_a_request_that_returns_to_the_queue_twice_reads_all_that_it_has_drawn(small):
    lengths = [150, 100, 200, 60]
    plenty = generate(small[0], [[3, 4]] * 4, 1, Sampling(lengths))
    tight = generate(small[0], [[3, 4]] * 4, 1, Sampling(lengths, cache_bytes=330 * SLOT))
    assert ids_of(plenty) == ids_of(tight)


def test_memory_that_a_long_response_held_goes_back_to_the_waiting_ones(small):
    lengths = [150] + [10] * 89
    sampling = Sampling(lengths, cache_bytes=456 * SLOT)
    groups, meter = metered(small[0], [[3, 4]] * 90, 1, sampling)
    assert [len(ids) for ids in ids_of(groups)] == lengths
    assert meter.largest <= 456 * SLOT
    # 456 slots: 7 rows of 64, 3 of 151
    assert meter.steps[:63] == [7] * 63 and meter.steps[70:100] == [3] * 30
    assert 7 in meter.steps[150:]  # the long one has ended


def test_a_request_that_no_memory_holds_is_refused_with_the_numbers(small):
    message = r"prompt 1: 2 tokens and max_new 1000 need 0.3 MB of cache, and 0.1 MB are given"
    with pytest.raises(ValueError, match=message):
        generate(small[0], [[3], [3, 4]], 1, Sampling(1000, cache_bytes=100_000))


def test_without_cache_bytes_the_cpu_gives_half_of_its_free_memory_at_most(small):
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with decoder_of(small[0]) as decoder:
        budget = rollout.cache_budget(decoder, 512, Sampling())
        assert 0 < budget <= physical / 2
        given = rollout.cache_budget(decoder, 512, Sampling(cache_bytes=1000))
        assert given == 1000
    beyond = physical // SLOT  # tokens of a response that the machine cannot hold
    with pytest.raises(ValueError, match=f"max_new {beyond} need .* MB of cache"):
        generate(small[0], [[3]], 1, Sampling(beyond))


def test_max_new_needs_one_number_or_one_for_each_request(small):
    for wrong in ([5, 5, 5], [5, 0], 0):
        with pytest.raises(ValueError, match="max_new: "):
            generate(small[0], [[3], [3, 4]], 1, Sampling(wrong))


def test_an_interrupt_leaves_the_finished_responses_and_the_model_as_it_was(small):
    model = small[0].train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    sampling = Sampling(ragged(16, 20, 60), seed=1)
    kept = []

    def interrupt(n_done, n_total):
        if n_done >= 5:
            raise KeyboardInterrupt

    hooks = Hooks(interrupt, on_response=lambda request, one: kept.append((request.prompt, one)))
    with pytest.raises(KeyboardInterrupt):
        generate(model, prompts_of(4), 4, sampling, hooks)
    whole = generate(model, prompts_of(4), 4, sampling)
    assert 5 <= len(kept) < 16
    assert all(response in whole[prompt] for prompt, response in kept)
    assert model.training
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.is_contiguous()


def test_progress_counts_to_the_number_of_requests(small):
    seen = []
    hooks = Hooks(progress=lambda n_done, n_total: seen.append((n_done, n_total)))
    generate(small[0], prompts_of(3), 4, Sampling(ragged(12, 10, 30), seed=1, rows=3), hooks)
    assert seen == sorted(set(seen)) and seen[-1] == (12, 12)


# ---- bf16 and sharding
def test_bf16_log_probs_are_those_of_the_trainers_bf16_forward(small_task):
    model = model_file.init_model(model_file.read_config(small_task), 0).to(torch.bfloat16)
    prompts = prompts_of(6)
    groups = generate(model, prompts, 4, Sampling(40, eos_ids=[0], rows=7))
    rows = [data.Example(p, r.ids) for p, group in zip(prompts, groups) for r in group]
    with torch.no_grad():
        logp, _, chosen = model_file.response_logp(model, *data.collate(rows))
    sampled = torch.cat([torch.tensor(r.logp) for r in flat(groups)])
    assert torch.allclose(logp[chosen], sampled, atol=2e-2)


# Both ranks: sample alone, shard, sample again with equal and with other weights.
SHARDED = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, sys.argv[1])
import model as model_file
from core import ranks
from rollout import Sampling, generate

torch.set_num_threads(1)
rank = int(sys.argv[3])
model = model_file.load_model(sys.argv[2])
prompts = [[3, 4, 5], [6], [7, 8]]
sampling = Sampling([4, 9, 3, 1, 30, 2], seed=1)  # ranks need unequal numbers of steps
alone = generate(model, prompts, 2, sampling)
expected = {}
for scale in (1, 2):
    for p in model.parameters():
        p.data.mul_(scale)
    expected[scale] = model(torch.tensor([[3, 4, 5]]))
for p in model.parameters():
    p.data.div_(2)
dist.init_process_group("gloo", init_method="file://" + sys.argv[4], rank=rank, world_size=2)
for block in model.model.layers:
    fully_shard(block)
fully_shard(model)
for scale in (1, 2):  # training goes on with other weights
    for p in model.parameters():
        p.data.mul_(scale)
    sampled = generate(model, prompts, 2, sampling)
    same = [[r.ids for r in g] for g in sampled] == [[r.ids for r in g] for g in alone]
    assert scale == 2 or same
    first, second = ranks.gather(sampled)  # as JSON, which keeps every bit of a float
    assert first == second  # to the last bit, wherever a response was sampled
    assert type(model.model.layers[0].mlp.up_proj.weight.data).__name__ == "DTensor"
    hidden = model(torch.tensor([[3, 4, 5]]))  # a collective
    torch.testing.assert_close(hidden, expected[scale], atol=1e-4, rtol=1e-4)
    ranks.reshard(model)
dist.barrier()
"""


def test_sharded_ranks_share_the_prompts_and_return_what_one_process_samples(small_task, tmp_path):
    root = str(Path(rollout.__file__).parent)
    store = str(tmp_path / "store")
    ranks = []
    for rank in range(2):
        command = [sys.executable, "-c", SHARDED, root, str(small_task), str(rank), store]
        ranks.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for process in ranks:
        try:
            _, errors = process.communicate(timeout=120)
        finally:
            for other in ranks:  # none is left behind where one failed or hangs
                if other.returncode is None and process.returncode != 0:
                    other.kill()
        assert process.returncode == 0, errors


# ---- draws
def test_draws_follow_the_distribution():
    expected = torch.tensor([0.1, 0.2, 0.3, 0.4])
    logits = expected.log().repeat(20_000, 1)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    token, logp, _ = rollout.draw(logits, uniform, 1.0)
    share = torch.bincount(token, minlength=4) / 20_000
    assert torch.allclose(share, expected, atol=0.012)  # 3.5 standard errors
    assert torch.allclose(logp, logits[0, token], atol=1e-6)
    token, _, _ = rollout.draw(logits, uniform, 1.0, top_p=0.65)
    assert set(token.tolist()) == {2, 3}  # 0.4 + 0.3 is the smallest set with 65%


@pytest.mark.parametrize("V", [1, 100, 128, 1000, 32000])
def test_draws_are_where_the_cumulated_distribution_passes(V):
    g = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(64, V, generator=g)
    uniform = torch.rand(64, generator=g, dtype=torch.float64)
    token, logp, entropy = rollout.draw(logits, uniform, 0.7)
    expected = torch.log_softmax(logits.double() / 0.7, -1)
    at_token = expected.gather(1, token[:, None])[:, 0]
    after = expected.exp().cumsum(-1).gather(1, token[:, None])[:, 0]
    before = after - at_token.exp()
    assert (before <= uniform + 1e-5).all() and (uniform <= after + 1e-5).all()
    assert torch.allclose(logp.double(), at_token, atol=1e-5)
    assert torch.allclose(entropy.double(), -(expected.exp() * expected).sum(-1), atol=1e-5)


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
    expected = torch.log_softmax(logits, -1).gather(1, token[:, None])[:, 0]
    assert torch.allclose(logp, expected, atol=1e-5)
