"""The decoder for sampling: its logits are the training network's, its cache loses nothing, the model comes back as it was."""

import pytest
import torch
from test_model import BASE, CONFIGS, random_ids, random_model

import model as m
from core import decode

WIDE = CONFIGS | {
    "panels": m.ModelConfig(**BASE | {"vocab_size": 640, "intermediate_size": 200})
}  # 4 panels of 160, 2 of 200


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids) @ model.head.T


@pytest.mark.parametrize("family", WIDE)
def test_logits_step_by_step_are_those_of_one_forward_for_ragged_rows(family):
    model, ids = random_model(WIDE[family]), random_ids(3, 14)
    prompts, until = torch.tensor([3, 7, 5]), torch.tensor([14, 10, 12])
    full, cache = logits_of(model, ids), decode.Cache(model.config, 4, 14)
    garbage = torch.where(
        torch.arange(7) < prompts[:, None], ids[:, :7], random_ids(3, 7, 9)
    )  # behind a prompt's end
    with torch.no_grad(), decode.decoder_of(model) as decoder:
        hidden, at = decoder.read(garbage, cache), prompts.clone()
        for b, n in enumerate(prompts):
            torch.testing.assert_close(
                decoder.logits(hidden[b, :n]), full[b, :n], atol=2e-5, rtol=1e-5
            )
        while (at < until).any():
            here = at.minimum(
                until - 1
            )  # a finished row repeats its last token, as a batch with stragglers does
            logits = decoder.step(ids.gather(1, here[:, None])[:, 0], here, cache, 14)
            torch.testing.assert_close(logits, full[torch.arange(3), here], atol=2e-5, rtol=1e-5)
            at += 1


def test_bf16_weights_give_the_logits_of_the_bf16_network():
    model, ids = random_model(CONFIGS["qwen3"]).to(torch.bfloat16), random_ids(2, 9)
    with torch.no_grad(), decode.decoder_of(model) as decoder:
        expected = m.head_logits(model(ids).flatten(0, 1), model.head).view(2, 9, -1)
        cache = decode.Cache(model.config, 2, 9, torch.bfloat16)
        decoder.read(ids[:, :8], cache)
        logits = decoder.step(ids[:, 8], torch.full((2,), 8), cache, 9)
    assert (logits - expected[:, 8]).abs().max() < 2e-2 * expected.abs().max()


def test_selected_and_grown_rows_go_on_like_their_originals():
    model, ids, cache = (
        random_model(CONFIGS["qwen2"]),
        random_ids(3, 10),
        decode.Cache(CONFIGS["qwen2"], 3, 6),
    )
    index, full = (
        torch.tensor([2, 0, 0, 2, 2]),
        logits_of(model, ids),
    )  # row 1 has finished, the others are repeated
    with torch.no_grad(), decode.decoder_of(model) as decoder:
        decoder.read(ids[:, :6], cache)
        assert cache.select(index) is cache and cache.grow(10) is cache
        assert (cache.rows, cache.slots, cache.used) == (5, 10, 6) and cache.k[0].shape == (
            5,
            2,
            10,
            6,
        )
        for t in range(6, 10):
            logits = decoder.step(ids[index, t], torch.full((5,), t), cache, t + 1)
            torch.testing.assert_close(logits, full[index, t], atol=2e-5, rtol=1e-5)


def test_a_step_at_earlier_positions_loses_nothing_of_the_cache():
    model, ids, cache = (
        random_model(CONFIGS["qwen2"]),
        random_ids(1, 8),
        decode.Cache(CONFIGS["qwen2"], 1, 8),
    )
    full = logits_of(model, ids)
    with torch.no_grad(), decode.decoder_of(model) as decoder:
        decoder.read(ids[:, :7], cache)
        decoder.step(ids[:, 2], torch.tensor([2]), cache, 3)
        assert cache.used == 7
        cache.select(torch.tensor([0]))
        torch.testing.assert_close(
            decoder.step(ids[:, 7], torch.tensor([7]), cache, 8), full[:, 7], atol=2e-5, rtol=1e-5
        )


def test_what_does_not_fit_the_cache_is_named():
    model, cache = random_model(CONFIGS["qwen2"]), decode.Cache(CONFIGS["qwen2"], 2, 4)
    with torch.no_grad(), decode.decoder_of(model) as decoder:
        for call in (
            lambda: decoder.read(random_ids(2, 5), cache),
            lambda: decoder.read(random_ids(3, 2), cache),
            lambda: decoder.step(torch.zeros(2, dtype=torch.long), torch.full((2,), 4), cache, 5),
        ):
            with pytest.raises(ValueError, match="2 rows x 4 slots"):
                call()


@pytest.mark.parametrize("family", WIDE)
def test_the_parameters_come_back_bit_for_bit_whatever_ends_the_block(family):
    model = random_model(WIDE[family])
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(KeyboardInterrupt), decode.decoder_of(model):
        assert sum(p.numel() for p in model.parameters()) < 0.2 * sum(
            p.numel() for p in before.values()
        )  # no copy
        raise KeyboardInterrupt
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(storages) == len(before), "two parameters share memory"
    assert all(
        torch.equal(p, before[name]) and p.is_contiguous() for name, p in model.named_parameters()
    )


def test_a_function_to_record_runs_each_time_where_there_is_no_gpu():
    graphs, runs = decode.Graphs(torch.device("cpu")), []
    for key in (1, 1, 2, 1):
        graphs.run(key, lambda: runs.append(key))
    assert runs == [1, 1, 2, 1]
