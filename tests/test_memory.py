"""The memory table: its numbers are those that autograd and the optimizer keep, and it says what fits."""

from dataclasses import dataclass

import pytest
import torch

import model as m
from core import memory, optim, ranks, run

SHAPES = {
    "qwen2": m.ModelConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "qwen3": m.ModelConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        model_type="qwen3",
        attention_bias=False,
        qk_norm=True,
        tie_word_embeddings=False,
    ),
    "llama": m.ModelConfig(
        vocab_size=700,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=6,
        model_type="llama",
        attention_bias=False,
        output_bias=True,
        mlp_bias=True,
    ),
}
QWEN_7B = m.ModelConfig(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)


def saved_bytes(model, ids) -> int:
    """Bytes of all tensors that autograd keeps of a forward; parameters and the head's gradient left out."""
    storages, params = (
        {},
        {tuple(p.shape) for p in model.parameters()},
    )  # by address; held, so that none is used twice

    def keep(tensor):
        if tuple(tensor.shape) not in params and tuple(tensor.shape)[::-1] not in params:
            storages[tensor.untyped_storage().data_ptr()] = (
                tensor,
                tensor.untyped_storage().nbytes(),
            )
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = m.response_logp_sum(model, ids, torch.ones_like(ids, dtype=torch.bool))
    assert total.requires_grad
    return sum(size for _, size in storages.values())


@pytest.mark.parametrize("name", SHAPES)
def test_weights_are_counted_exactly(name):
    model = m.init_model(SHAPES[name], 0)
    block, matrices, root = memory.weights_of(SHAPES[name])
    assert SHAPES[name].num_hidden_layers * block + root == sum(
        p.numel() for p in model.parameters()
    )
    assert matrices == sum(p.numel() for p in model.model["layers"][0].parameters() if p.ndim == 2)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_activations_are_those_that_autograd_keeps(name, bf16, recompute):
    ids = torch.randint(
        0, 500, (3, 331), generator=torch.Generator().manual_seed(0)
    )  # sizes that no weight has
    net = ranks.compute(m.init_model(SHAPES[name], 0), bf16, recompute)
    found = saved_bytes(net, ids)
    counted, _ = memory.activations(
        SHAPES[name], ids.numel(), 2 if bf16 else 4, recompute, fused_norm=False
    )
    assert abs(counted / found - 1) < 0.1, (counted, found)


def test_the_chunk_of_logits_is_the_models():
    assert memory.CHUNK_LOGITS == m.CHUNK_LOGITS


def test_shards_shrink_with_the_processes_and_activations_do_not():
    one, eight = (
        memory.table(QWEN_7B, world, 8192, bf16=True, checkpointing=True) for world in (2, 16)
    )
    for a, b in zip(one, eight):
        shrinks = a.name.split(",")[0] in ("weights", "optimizer state", "gradients")
        assert a.bytes == (8 * b.bytes if shrinks else b.bytes), a.name
    n = 7.6156e9  # 16 bytes a parameter in all: master, gradient, two moments
    assert sum(
        part.bytes
        for part in eight
        if part.name.split(",")[0] in ("weights", "optimizer state", "gradients")
    ) == pytest.approx(16 * n / 16, rel=1e-3)


def test_the_verdict_for_7b_on_eight_gpus_of_80_gb():
    parts = memory.table(QWEN_7B, 8, 16384, bf16=True, checkpointing=True)
    assert 15e9 < memory.peak(parts) < 40e9 and "  fits in 80 GB" in memory.report(parts, 80e9)
    alone = memory.table(QWEN_7B, 1, 16384, bf16=True, checkpointing=True)
    assert memory.peak(alone) > 16 * 7.6e9 and "DOES NOT FIT in 80 GB" in memory.report(alone, 80e9)


def test_rollout_and_update_do_not_stand_beside_each_other():
    sft = memory.table(QWEN_7B, 8, 16384, checkpointing=True)
    rl = memory.table(QWEN_7B, 8, 16384, checkpointing=True, rows=8, slots=64)
    assert memory.peak(sft) == memory.peak(rl)
    large = memory.table(
        QWEN_7B, 8, 16384, checkpointing=True, rows=512, slots=9216, reference=True
    )
    cache = [part.bytes for part in large if "cache" in part.name]
    assert (
        cache == [2 * 28 * 4 * 128 * 512 * 9216 * 2]
        and memory.peak(large) > cache[0] + 3 * 4 * 7.6e9 / 8
    )


@dataclass
class Config:
    out: str


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_checkpoint_takes_as_much_of_the_disk_as_counted(tmp_path, bf16, optimizer):
    model = m.init_model(SHAPES["qwen2"], 0)
    optimizers = optim.make_optimizers(model, optimizer, 1e-3)
    m.response_logp_sum(
        model, torch.arange(20)[None], torch.ones(1, 20, dtype=torch.bool)
    ).backward()
    optim.update(model, optimizers, 1e-3, 1.0)
    path = run.Run(Config(str(tmp_path / "r"))).save(
        1,
        lambda to: m.save_model(model, to, torch.bfloat16 if bf16 else torch.float32),
        model,
        optimizers,
    )
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert size == pytest.approx(
        memory.checkpoint_bytes(SHAPES["qwen2"], bf16, optimizer), rel=0.02
    )
