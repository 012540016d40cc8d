"""The memory plan: its numbers are those that autograd and the optimizer keep."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model as m
from core import checkpoint, memory, optim, ranks, softmax

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
SHAPES["olmo2"] = replace(SHAPES["qwen3"], model_type="olmo2", joint_qk_norm=True, post_norm=True)
QWEN_7B = m.ModelConfig(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)


TINY = dict(
    hidden_size=4,
    intermediate_size=4,
    num_hidden_layers=1,
    num_attention_heads=1,
)


def saved_bytes(model, ids) -> int:
    """Bytes of all tensors that autograd keeps of a forward, without parameters and the gradient
    of the head."""
    params = {tuple(p.shape) for p in model.parameters()}
    storages = {}  # by address; the tensors are held, so that no address is used twice

    def keep(tensor):
        shape = tuple(tensor.shape)
        if shape not in params and shape[::-1] not in params:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = (tensor, storage.nbytes())
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
    assert matrices == sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim == 2)


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


def test_the_chunk_of_logits_is_that_of_the_softmax():
    assert memory.CHUNK_LOGITS == softmax.CHUNK_LOGITS


SHARDED = ("weights, fp32", "optimizer state, adamw", "gradients, fp32")


def plan_of(world, **changes):
    return memory.Plan(config=QWEN_7B, world=world, recompute=True, **changes)


def test_shards_shrink_with_the_ranks_and_activations_do_not():
    two = plan_of(2, micro_tokens=8192).table()
    sixteen = plan_of(16, micro_tokens=8192).table()
    for a, b in zip(two, sixteen):
        assert a.bytes == (8 * b.bytes if a.name in SHARDED else b.bytes), a.name
    n = 7.6156e9  # 16 bytes per parameter in all: weight, gradient, two moments
    kept = sum(part.bytes for part in sixteen if part.name in SHARDED)
    assert kept == pytest.approx(16 * n / 16, rel=1e-3)


def test_the_verdict_for_7b_on_eight_gpus_of_80_gb():
    eight = plan_of(8)
    assert 15e9 < eight.peak() < 40e9
    assert "  fits in 80 GB" in eight.report(80e9)
    alone = plan_of(1)
    assert alone.peak() > 16 * 7.6e9
    assert "DOES NOT FIT in 80 GB" in alone.report(80e9)


def test_rollout_and_update_do_not_stand_beside_each_other():
    assert plan_of(8, rows=8, slots=64).peak() == plan_of(8, rows=1, slots=1).peak()
    large = plan_of(8, rows=512, slots=9216, reference=True)
    cache = [part.bytes for part in large.table() if "cache" in part.name]
    assert cache == [2 * 28 * 4 * 128 * 512 * 9216 * 2]
    assert large.peak() > cache[0] + 3 * 4 * 7.6e9 / 8


def test_a_rollout_is_planned_with_as_many_rows_as_fit():
    plan = plan_of(8)
    row = 2 * 28 * 4 * 128 * 9216 * 2  # bytes of the cache of one row of 9,216 tokens
    assert plan.with_rollout(512, 9216, capacity=800e9).rows == 512
    few = plan.with_rollout(512, 9216, capacity=80e9)
    rollout = sum(part.bytes for part in few.table() if part.phase != "update")
    assert 0.8 * 80e9 - row < rollout <= 0.8 * 80e9
    assert plan.with_rollout(512, 9216, capacity=1e9).rows == 1


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made by the operations inside hold at one moment."""

    def __init__(self):
        super().__init__()
        self.live = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.live:
                    self.live[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage.data_ptr(), None)
        self.most = max(self.most, sum(self.live.values()))
        return out


@pytest.mark.parametrize("entropy", [False, True])
def test_a_chunk_of_logits_on_cuda_takes_what_its_operations_hold_at_once(entropy, monkeypatch):
    monkeypatch.setattr(softmax, "PIECE_LOGITS", 2**40)  # the whole chunk at once, as on CUDA
    N, V = 64, 5000
    hidden = torch.randn(N, 4, requires_grad=True)
    head = torch.randn(V, 4, requires_grad=True)
    targets = torch.arange(N)
    with LiveBytes() as found:
        values = m.token_logp(hidden, head, targets, entropy=entropy)
        sum(v.sum() for v in (values if entropy else [values])).backward()
    config = m.ModelConfig(**TINY, vocab_size=V)
    rl = memory.Plan(config=config, micro_tokens=N, bf16=False, rows=1, slots=1)
    sft = replace(rl, rows=0)
    table = (rl if entropy else sft).table()
    counted = [part.bytes for part in table if part.name == "logits of a chunk"]
    assert counted == [(12 if entropy else 8) * N * V]  # by hand
    assert found.most == pytest.approx(counted[0], rel=0.05)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_checkpoint_takes_as_much_of_the_disk_as_counted(tmp_path, bf16, optimizer):
    model = m.init_model(SHAPES["qwen2"], 0)
    optimizers = optim.make_optimizers(model, optimizer, 1e-3)
    m.response_logp_sum(
        model, torch.arange(20)[None], torch.ones(1, 20, dtype=torch.bool)
    ).backward()
    optim.update(model, optimizers, 1e-3, 1.0)
    dtype = torch.bfloat16 if bf16 else torch.float32
    path = checkpoint.folder_of(tmp_path, 1)
    checkpoint.save(path, model, optimizers, lambda to: m.save_model(model, to, dtype), {})
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert size == pytest.approx(
        memory.checkpoint_bytes(SHAPES["qwen2"], bf16, optimizer), rel=0.02
    )
