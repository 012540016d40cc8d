"""The decoder for sampling: its logits are the training network's, its cache loses nothing, and the
model is restored."""

import pytest
import torch
from test_model import BASE, CONFIGS, random_ids, random_model

import model as m
from core import decode, softmax

# 4 panels of 160 columns, and 2 of 200
WIDE = CONFIGS | {"panels": m.ModelConfig(**BASE | {"vocab_size": 640, "intermediate_size": 200})}


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids) @ model.head.T


@pytest.mark.parametrize("family", WIDE)
def test_logits_step_by_step_are_those_of_one_forward_for_ragged_rows(family):
    model = random_model(WIDE[family])
    ids = random_ids(3, 14)
    starts = torch.tensor([3, 7, 5])
    ends = torch.tensor([14, 10, 12])
    full = logits_of(model, ids)
    cache = decode.Cache(model.config, 4, 14)
    # other tokens behind a prompt's end
    padded = torch.where(torch.arange(7) < starts[:, None], ids[:, :7], random_ids(3, 7, 9))
    with torch.no_grad(), decode.decoder_of(model) as decoder:
        hidden = decoder.read(padded, cache)
        for b, n in enumerate(starts):
            logits = decoder.logits(hidden[b, :n])
            torch.testing.assert_close(logits, full[b, :n], atol=2e-5, rtol=1e-5)
        at = starts.clone()
        while (at < ends).any():
            here = at.minimum(ends - 1)  # a finished row repeats its last token, as stragglers do
            logits = decoder.step(ids.gather(1, here[:, None])[:, 0], here, cache, 14)
            torch.testing.assert_close(logits, full[torch.arange(3), here], atol=2e-5, rtol=1e-5)
            at += 1


def test_bf16_weights_give_the_logits_of_the_bf16_network():
    model = random_model(CONFIGS["qwen3"]).to(torch.bfloat16)
    ids = random_ids(2, 9)
    with torch.no_grad(), decode.decoder_of(model) as decoder:
        expected = softmax.head_logits(model(ids).flatten(0, 1), model.head).view(2, 9, -1)
        cache = decode.Cache(model.config, 2, 9, torch.bfloat16)
        decoder.read(ids[:, :8], cache)
        logits = decoder.step(ids[:, 8], torch.full((2,), 8), cache, 9)
    assert (logits - expected[:, 8]).abs().max() < 2e-2 * expected.abs().max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_prompts_in_fp32_are_read_by_a_fused_kernel_on_cuda():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model = random_model(CONFIGS["qwen3"]).cuda()
    ids = random_ids(2, 9).cuda()
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    with torch.no_grad(), decode.decoder_of(model) as decoder:
        cache = decode.Cache(model.config, 2, 9, device="cuda")
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION]):
            hidden = decoder.read(ids, cache)  # raises where only the MATH backend can do it
        torch.testing.assert_close(hidden, model(ids), atol=2e-5, rtol=1e-5)


def test_copied_rows_of_a_resized_cache_go_on_like_their_originals():
    model = random_model(CONFIGS["qwen2"])
    ids = random_ids(3, 10)
    cache = decode.Cache(model.config, 3, 6)
    index = torch.tensor([2, 0, 0, 2, 2])  # row 1 has finished, the others are repeated
    full = logits_of(model, ids)
    with torch.no_grad(), decode.decoder_of(model) as decoder:
        decoder.read(ids[:, :6], cache)
        cache.resize(5, 10)
        assert (cache.rows, cache.slots, cache.used) == (5, 10, 6)
        assert cache.k[0].shape == (5, 2, 10, 6)
        cache.put(torch.arange(5), cache, index, 6)
        for t in range(6, 10):
            logits = decoder.step(ids[index, t], torch.full((5,), t), cache, t + 1)
            torch.testing.assert_close(logits, full[index, t], atol=2e-5, rtol=1e-5)


def test_a_step_at_earlier_positions_loses_nothing_of_the_cache():
    model = random_model(CONFIGS["qwen2"])
    ids = random_ids(1, 8)
    cache = decode.Cache(model.config, 1, 8)
    full = logits_of(model, ids)
    with torch.no_grad(), decode.decoder_of(model) as decoder:
        decoder.read(ids[:, :7], cache)
        decoder.step(ids[:, 2], torch.tensor([2]), cache, 3)
        assert cache.used == 7
        cache.resize(1, 8)
        logits = decoder.step(ids[:, 7], torch.tensor([7]), cache, 8)
        torch.testing.assert_close(logits, full[:, 7], atol=2e-5, rtol=1e-5)


def test_what_does_not_fit_the_cache_is_named():
    model = random_model(CONFIGS["qwen2"])
    cache = decode.Cache(model.config, 2, 4)
    with torch.no_grad(), decode.decoder_of(model) as decoder:
        for call in (
            lambda: decoder.read(random_ids(2, 5), cache),
            lambda: decoder.read(random_ids(3, 2), cache),
            lambda: decoder.step(torch.zeros(2, dtype=torch.long), torch.full((2,), 4), cache, 5),
        ):
            with pytest.raises(AssertionError, match="2 rows x 4 slots"):
                call()


@pytest.mark.parametrize("family", WIDE)
def test_the_parameters_come_back_bit_for_bit_whatever_ends_the_block(family):
    model = random_model(WIDE[family])
    before = {name: p.clone() for name, p in model.named_parameters()}
    total = sum(p.numel() for p in before.values())
    with pytest.raises(KeyboardInterrupt), decode.decoder_of(model):
        assert sum(p.numel() for p in model.parameters()) < 0.2 * total  # no second copy
        raise KeyboardInterrupt
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(storages) == len(before), "two parameters share memory"
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.is_contiguous()


def test_a_function_to_record_runs_each_time_where_there_is_no_gpu():
    graphs = decode.Graphs(torch.device("cpu"))
    runs = []
    for key in (1, 1, 2, 1):
        graphs.run(key, lambda: runs.append(key))
    assert runs == [1, 1, 2, 1]


def test_the_graphs_used_longest_ago_are_given_up():
    graphs = decode.Graphs(torch.device("cpu"))
    for key in range(decode.MAX_GRAPHS):
        graphs.run(key, lambda: None)
    graphs.run(0, lambda: None)  # used again, so 1 is now the oldest
    graphs.run("new", lambda: None)
    assert set(graphs.recorded) == {*range(decode.MAX_GRAPHS), "new"} - {1}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_recorded_functions_do_on_cuda_what_they_did_the_first_time():
    graphs = decode.Graphs(torch.device("cuda"))
    x = torch.zeros(3, device="cuda")
    for key in (1, 1, 2, 1, 2, 2):
        graphs.run(key, lambda: x.add_(1))
    assert x.tolist() == [6, 6, 6]
    assert all(graph is not None for graph in graphs.recorded.values())
