"""The sampler: log-probs are the trainer's, responses depend on the request alone, EOS is kept."""
import pytest
import torch

import data
import model as model_file
import rollout


def prompts_of(n, longest=40, vocab=160):
    g = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocab, (int(torch.randint(1, longest, (), generator=g)),), generator=g).tolist() for _ in range(n)]


def scored(model, prompt, ids, temperature):
    """Log-probs and entropies of a response by one uncached forward over the whole sequence: the definition."""
    with torch.no_grad():
        hidden = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1:-1]
        logp = torch.log_softmax(hidden.double() @ model.head.T.double() / temperature, -1)
    return logp[torch.arange(len(ids)), ids], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_are_those_of_an_uncached_forward_for_ragged_prompts(small, temperature):
    model, _, _ = small
    prompts = prompts_of(6, longest=150)
    groups = rollout.generate(model, prompts, 3, 30, temperature, eos_ids=[0], seed=3)
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


def test_a_response_does_not_depend_on_rows_order_or_neighbours(small):
    model, _, _ = small
    prompts = prompts_of(7)
    together = rollout.generate(model, prompts, 4, 25, 1.0, eos_ids=[0], seed=5, rows=512)
    few_rows = rollout.generate(model, prompts, 4, 25, 1.0, eos_ids=[0], seed=5, rows=3)
    assert [[r.ids for r in g] for g in together] == [[r.ids for r in g] for g in few_rows]
    first_only = rollout.generate(model, prompts[:1], 4, 25, 1.0, eos_ids=[0], seed=5)
    assert [r.ids for r in first_only[0]] == [r.ids for r in together[0]]


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
    assert out.ids == ids[len(prompt):] and not out.finished


def test_eos_ends_a_response_and_is_kept_with_its_log_prob(small):
    model, _, _ = small
    every = list(range(0, 160, 3))                                                 # many ending tokens: responses end early, at ragged lengths
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
    assert torch.allclose(share, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.012)   # 3.5 standard errors
    assert torch.allclose(logp, logits[0, token], atol=1e-6)
    token, _, _ = rollout.draw(logits, uniform, 1.0, top_p=0.65)
    assert set(token.tolist()) == {2, 3}                                           # 0.4 + 0.3 is the smallest set with 65%


def test_an_empty_prompt_is_refused(small):
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        rollout.generate(small[0], [[3], []], 1, 4)


def test_model_returns_to_training_mode(small):
    model = small[0].train()
    rollout.generate(model, [[3]], 1, 2)
    assert model.training
