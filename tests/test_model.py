"""The decoder beside a reference of plain loops and beside transformers; token log-probs."""

import cmath
import json
import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model as m
from core import decode, rope, softmax

BASE = dict(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "qwen2": m.ModelConfig(**BASE),
    "qwen3": m.ModelConfig(
        **BASE, model_type="qwen3", head_dim=8, attention_bias=False, qk_norm=True, rope_theta=1e6
    ),
    "llama": m.ModelConfig(
        **BASE, model_type="llama", output_bias=True, mlp_bias=True, rope_scaling=LLAMA3
    ),
    "mistral": m.ModelConfig(
        **BASE | {"num_key_value_heads": 4},
        model_type="mistral",
        attention_bias=False,
        tie_word_embeddings=False,
        rope_scaling={"rope_type": "linear", "factor": 4.0},
    ),
    "smollm3": m.ModelConfig(
        **BASE, model_type="smollm3", attention_bias=False, rotary_layers=(True, False)
    ),
    "olmo2": m.ModelConfig(
        **BASE,
        model_type="olmo2",
        attention_bias=False,
        qk_norm=True,
        joint_qk_norm=True,
        post_norm=True,
    ),
}


def random_model(config, seed=0):
    """Weights far from their start: norms away from 1, biases from 0, logits with spread."""
    model = m.init_model(config, seed)
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.data.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=g)
    return model


def random_ids(B, T, seed=1):
    return torch.randint(
        0, BASE["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed)
    )


# ---- the network
def reference_frequency(config, i):
    """Pair i's radians per position, from the published descriptions, in Python numbers."""
    f = config.rope_theta ** (-2 * i / config.head_dim)
    rope = config.rope_scaling
    if rope is None:
        return f
    if rope["rope_type"] == "linear":
        return f / rope["factor"]
    wavelength = 2 * math.pi / f
    old = rope["original_max_position_embeddings"]
    if wavelength > old / rope["low_freq_factor"]:
        return f / rope["factor"]
    if wavelength < old / rope["high_freq_factor"]:
        return f
    smooth = (old / wavelength - rope["low_freq_factor"]) / (
        rope["high_freq_factor"] - rope["low_freq_factor"]
    )
    return (1 - smooth) * f / rope["factor"] + smooth * f


def reference_hidden(model, ids, positions):
    """One row, ids and positions lists -> hidden (T, D) in float64, by heads and tokens."""
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    c = model.config
    K = c.head_dim
    n = c.num_attention_heads // c.num_key_value_heads

    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * w[name + ".weight"]

    def turn(x, p):  # (K,): pair i is the complex number x[i] + i x[i + K/2]
        z = [
            complex(x[i], x[i + K // 2]) * cmath.exp(1j * p * reference_frequency(c, i))
            for i in range(K // 2)
        ]
        return torch.tensor([v.real for v in z] + [v.imag for v in z], dtype=torch.float64)

    x = w["model.embed_tokens.weight"][ids]
    for i in range(c.num_hidden_layers):
        a = f"model.layers.{i}.self_attn."
        h = x if c.post_norm else norm(x, f"model.layers.{i}.input_layernorm")
        q, k, v = (linear(h, a + s) for s in ("q_proj", "k_proj", "v_proj"))  # (T, heads x K)
        if c.qk_norm and c.joint_qk_norm:
            q = norm(q, a + "q_norm")
            k = norm(k, a + "k_norm")
        q, k, v = (y.unflatten(-1, (-1, K)) for y in (q, k, v))  # (T, heads, K)
        if c.qk_norm and not c.joint_qk_norm:
            q = norm(q, a + "q_norm")
            k = norm(k, a + "k_norm")
        turned = turn if not c.rotary_layers or c.rotary_layers[i] else lambda x, p: x
        out = torch.zeros_like(q)
        for t in range(len(ids)):
            for head in range(c.num_attention_heads):
                query = turned(q[t, head], positions[t])
                scores = (
                    torch.stack(
                        [turned(k[s, head // n], positions[s]) @ query for s in range(t + 1)]
                    )
                    / K**0.5
                )
                out[t, head] = scores.softmax(0) @ v[: t + 1, head // n]
        y = linear(out.flatten(1), a + "o_proj")
        middle = f"model.layers.{i}.post_attention_layernorm"
        x = x + (norm(y, middle) if c.post_norm else y)
        h = x if c.post_norm else norm(x, middle)
        gate = linear(h, f"model.layers.{i}.mlp.gate_proj")
        up = linear(h, f"model.layers.{i}.mlp.up_proj")
        y = linear(gate * gate.sigmoid() * up, f"model.layers.{i}.mlp.down_proj")
        x = x + (norm(y, f"model.layers.{i}.post_feedforward_layernorm") if c.post_norm else y)
    return norm(x, "model.norm")


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("start", [0, 40])
def test_forward_equals_a_reference_written_as_loops(family, start):
    model = random_model(CONFIGS[family]).double()
    ids = random_ids(1, 6)
    hidden = model(ids, None if start == 0 else torch.arange(6)[None] + start)
    expected = reference_hidden(model, ids[0].tolist(), range(start, start + 6))
    # angles are fp32: 40 x 6e-8
    assert (hidden[0] - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 3.0},
        {**LLAMA3, "original_max_position_embeddings": 512},
    ],
)
def test_rotary_frequencies_follow_their_published_formulas(scaling):
    config = m.ModelConfig(**BASE, head_dim=64, rope_theta=5e5, rope_scaling=scaling)
    expected = torch.tensor([reference_frequency(config, i) for i in range(32)])
    torch.testing.assert_close(rope.rope_frequencies(config), expected, atol=0, rtol=1e-5)


def test_dynamic_frequencies_change_only_beyond_the_positions_of_the_pretraining():
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    config = m.ModelConfig(**BASE, max_position_embeddings=16, rope_scaling=scaling)
    plain = m.init_model(replace(config, rope_scaling=None), 0)
    dynamic = m.init_model(config, 0)
    ids = random_ids(2, 17)
    assert torch.equal(dynamic(ids[:, :16]), plain(ids[:, :16]))
    assert not torch.equal(dynamic(ids), plain(ids))


def test_parameters_have_hugging_face_names_and_a_tied_head_is_the_embedding():
    names = dict(random_model(CONFIGS["qwen3"]).named_parameters())
    assert {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.post_attention_layernorm.weight",
    } < set(names)
    assert "lm_head.weight" not in names
    tied = random_model(CONFIGS["qwen2"])
    assert tied.head is tied.model.embed_tokens.weight
    untied = random_model(CONFIGS["mistral"])
    assert untied.head is untied.lm_head.weight


def test_only_parameters_are_state():
    model = random_model(CONFIGS["llama"])
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()} and not list(
        model.buffers()
    )


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    a = m.init_model(CONFIGS["qwen2"], 5)
    state = torch.get_rng_state()
    b = m.init_model(CONFIGS["qwen2"], 5)
    c = m.init_model(CONFIGS["qwen2"], 6)
    assert torch.equal(state, torch.get_rng_state())  # the global generator is not touched
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.head, c.head)
    assert (
        abs(a.head.std().item() - 0.02) < 0.002
        and (a.model.norm.weight == 1).all()
        and (a.model.layers[0].self_attn.q_proj.bias == 0).all()
    )


@pytest.mark.parametrize("family", CONFIGS)
def test_padding_never_changes_a_row(family):
    model = random_model(CONFIGS[family])
    lengths = torch.tensor([9, 4, 1])
    real = torch.arange(9) < lengths[:, None]
    one, two = (torch.where(real, random_ids(3, 9), random_ids(3, 9, seed)) for seed in (2, 3))
    assert not torch.equal(one, two)
    assert torch.equal(model(one)[real], model(two)[real])
    alone = torch.cat([model(one[b : b + 1, :n])[0] for b, n in enumerate(lengths)])
    torch.testing.assert_close(model(one)[real], alone, atol=2e-5, rtol=1e-5)


# ---- token log-probs
def draw(N, D, V, dtype, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    hidden, head = (torch.randn(n, D, generator=g, dtype=torch.float64) * scale for n in (N, V))
    return (
        hidden.to(dtype).requires_grad_(),
        head.to(dtype).requires_grad_(),
        torch.randint(0, V, (N,), generator=g),
    )


def naive(hidden, head, targets, temperature):
    logp = (hidden.double() @ head.double().T / temperature).log_softmax(-1)
    return logp.gather(-1, targets[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize(
    "chunk, piece", [(1, 8), (3, 22), (100, 2**20), (100, 22)]
)  # piece 22: two rows of 11 logits
def test_token_logp_and_entropy_have_exact_values_and_gradients(chunk, piece, monkeypatch):
    monkeypatch.setattr(softmax, "PIECE_LOGITS", piece)
    hidden, head, targets = draw(7, 5, 11, torch.float64)
    for ours, theirs in zip(
        m.token_logp(hidden, head, targets, 0.7, chunk, entropy=True),
        naive(hidden, head, targets, 0.7),
    ):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        m.token_logp(hidden, head, targets, 0.7, chunk), naive(hidden, head, targets, 0.7)[0]
    )
    assert torch.autograd.gradcheck(
        lambda h, w: m.token_logp(h, w, targets, 0.7, chunk, entropy=True), (hidden, head)
    )
    assert torch.autograd.gradcheck(
        lambda h, w: m.token_logp(h, w, targets, 0.7, chunk), (hidden, head)
    )


def sum_logp(hidden, head, targets, chunk=None):
    return m.SumLogp.apply(hidden, head, targets, chunk, True)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_a_sum_of_log_probs_has_exact_values_and_gradients(chunk):
    hidden, head, targets = draw(7, 5, 11, torch.float64)
    torch.testing.assert_close(
        sum_logp(hidden, head, targets, chunk), naive(hidden, head, targets, 1.0)[0].sum()
    )
    ours = -0.3 * sum_logp(hidden, head, targets, chunk)
    theirs = -0.3 * naive(hidden, head, targets, 1.0)[0].sum()
    gradients = torch.autograd.grad(ours, (hidden, head))
    torch.testing.assert_close(gradients, torch.autograd.grad(theirs, (hidden, head)))
    with pytest.raises(RuntimeError):  # the gradients were scaled in place: not wrong in silence
        twice = sum_logp(hidden, head, targets, chunk)
        twice.backward(retain_graph=True)
        twice.backward()
    hidden.grad = head.grad = None
    none = sum_logp(hidden[:0], head, targets[:0])
    none.backward()
    assert none == 0 and (head.grad == 0).all()


def test_the_summed_loss_is_the_sum_of_the_rows_log_probs():
    model = random_model(CONFIGS["qwen3"])
    ids = random_ids(3, 9)
    mask = torch.arange(9) >= torch.tensor([[2], [5], [9]])  # the last row trains nothing
    values, gradients = [], []
    for total in (
        lambda: m.response_logp(model, ids, mask)[0].sum(),
        lambda: m.response_logp_sum(model, ids, mask),
    ):
        values.append(total())
        gradients.append(torch.autograd.grad(values[-1], list(model.parameters())))
    torch.testing.assert_close(*values)
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_logits_are_computed_once_for_a_sum_and_for_a_single_chunk():
    hidden, head, targets = draw(60, 4, 100, torch.float32)

    def one_chunk():
        return m.token_logp(hidden, head, targets).sum()

    def three_chunks():
        return m.token_logp(hidden, head, targets, chunk=20).sum()

    def summed():
        return sum_logp(hidden, head, targets, chunk=20)

    def matrix_products(loss):
        with torch.profiler.profile() as profile:
            loss().backward()
        return sum(
            e.count
            for e in profile.key_averages()
            if e.key in ("aten::mm", "aten::addmm_", "aten::addmm")
        )

    assert (
        matrix_products(one_chunk) == 3 and matrix_products(summed) == 9
    )  # logits, and the two gradients from them
    assert matrix_products(three_chunks) == 11  # two of three chunks have their logits twice


def test_token_logp_keeps_the_shape_of_its_targets_and_takes_no_tokens():
    hidden, head, targets = draw(6, 5, 11, torch.float32)
    logp, entropy = m.token_logp(hidden.view(2, 3, 5), head, targets.view(2, 3), entropy=True)
    assert logp.shape == entropy.shape == (2, 3)
    torch.testing.assert_close(
        logp.flatten().double(), naive(hidden, head, targets, 1.0)[0], atol=1e-5, rtol=1e-5
    )
    none = m.token_logp(hidden[:0], head, targets[:0])
    none.sum().backward()
    assert none.shape == (0,) and (head.grad == 0).all()


def test_gradients_reach_only_what_asks_for_them():
    hidden, head, targets = draw(6, 5, 11, torch.float32)
    m.token_logp(hidden, head.detach(), targets).sum().backward()
    alone = hidden.grad.clone()
    hidden.grad = None
    m.token_logp(hidden, head, targets).sum().backward()
    assert torch.equal(alone, hidden.grad) and head.grad is not None


@pytest.mark.parametrize(
    "head_type", [torch.float32, torch.bfloat16]
)  # an fp32 master beside bf16 activations, or bf16 alone
def test_bf16_hidden_gives_fp32_log_probs_and_sums_the_head_gradient_in_fp32(head_type):
    hidden, head, targets = draw(3000, 16, 23, torch.bfloat16, scale=0.5)
    master = head.detach().to(head_type).requires_grad_()
    logp, entropy = m.token_logp(hidden, master, targets, chunk=1, entropy=True)
    (logp.sum() + entropy.sum()).backward()
    exact_hidden = hidden.detach().double().requires_grad_()
    exact_head = head.detach().double().requires_grad_()
    exact = naive(exact_hidden, exact_head, targets, 1.0)
    (exact[0].sum() + exact[1].sum()).backward()
    assert logp.dtype == entropy.dtype == torch.float32
    assert (logp - exact[0]).abs().max() < 0.05 and (
        entropy - exact[1]
    ).abs().max() < 0.05  # logits rounded to 8 bits
    assert (logp.exp().double() - exact[0].exp()).mean().abs() < 1e-3
    # summed in bf16, 3,000 chunks of one token would be off by tens of percent
    assert master.grad.dtype == head_type
    assert (master.grad.double() - exact_head.grad).norm() < 0.01 * exact_head.grad.norm()
    assert (hidden.grad.double() - exact_hidden.grad).norm() < 0.02 * exact_hidden.grad.norm()


class Sizes(TorchDispatchMode):
    """Elements of every tensor made by the operations inside."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.made += [
            t.numel()
            for t in (out if isinstance(out, (tuple, list)) else [out])
            if isinstance(t, torch.Tensor)
        ]
        return out


def test_logits_of_all_tokens_are_never_held():
    N, D, V = 1000, 4, 50
    chunk = 10
    hidden, head, targets = draw(N, D, V, torch.float32)
    with Sizes() as sizes:
        logp, entropy = m.token_logp(hidden, head, targets, chunk=chunk, entropy=True)
        forward = len(sizes.made)
        (logp + entropy).sum().backward()
    assert len(sizes.made) > 2 * forward  # the backward was watched too
    assert max(sizes.made) <= max(
        chunk * V, N * D
    )  # N * V is 50,000, chunk * V 500, the hidden states 4,000


def test_the_default_chunk_bounds_the_logits_for_any_vocabulary(monkeypatch):
    hidden, head, targets = draw(64, 4, 100, torch.float32)
    monkeypatch.setattr(softmax, "CHUNK_LOGITS", 800)
    with Sizes() as sizes:
        m.token_logp(hidden, head, targets).sum().backward()
    assert max(sizes.made) == 800
    monkeypatch.setattr(
        softmax, "CHUNK_LOGITS", 8
    )  # less than one row of logits: one token at a time
    torch.testing.assert_close(
        m.token_logp(hidden, head, targets).double(),
        naive(hidden, head, targets, 1.0)[0],
        atol=1e-5,
        rtol=1e-5,
    )


def test_a_sampler_sees_the_distribution_that_is_scored():
    hidden, head, targets = draw(6, 5, 11, torch.bfloat16)
    with torch.no_grad():
        logits = softmax.head_logits(hidden, head, 0.6)
        expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(
            m.token_logp(hidden, head, targets, 0.6), expected, atol=1e-6, rtol=1e-6
        )


# ---- transformers
SHAPE = dict(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
SCALED = {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
YARN_OPTIONS = {
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "mscale": 1.5,
    "mscale_all_dim": 0.5,
    "truncate": False,
}
PEERS = {  # name: (config class, what differs from SHAPE, old spelling of config.json, shard size)
    "qwen2.5": ("Qwen2Config", dict(rope_theta=1e6, tie_word_embeddings=True), True, "1GB"),
    "qwen2.5-untied-sharded": (
        "Qwen2Config",
        dict(rope_theta=1e6, tie_word_embeddings=False),
        False,
        "60KB",
    ),
    "qwen3": (
        "Qwen3Config",
        dict(rope_theta=1e6, tie_word_embeddings=True, head_dim=32),
        False,
        "1GB",
    ),
    "qwen3-bias-untied": (
        "Qwen3Config",
        dict(head_dim=32, tie_word_embeddings=False, attention_bias=True),
        True,
        "60KB",
    ),
    "llama2": ("LlamaConfig", dict(num_key_value_heads=4, tie_word_embeddings=False), True, "1GB"),
    "llama3.2": (
        "LlamaConfig",
        dict(rope_theta=5e5, rope_scaling=SCALED, tie_word_embeddings=True),
        True,
        "60KB",
    ),
    "llama3.2-new": (
        "LlamaConfig",
        dict(rope_theta=5e5, rope_scaling=SCALED, tie_word_embeddings=True, head_dim=24),
        False,
        "1GB",
    ),
    "llama-linear-biases": (
        "LlamaConfig",
        dict(
            rope_scaling={"rope_type": "linear", "factor": 4.0},
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
        ),
        True,
        "1GB",
    ),
    "smollm2": (
        "LlamaConfig",
        dict(
            rope_theta=1e5,
            tie_word_embeddings=True,
            hidden_size=72,
            num_attention_heads=9,
            num_key_value_heads=3,
        ),
        True,
        "1GB",
    ),
    "qwen2.5-yarn": (
        "Qwen2Config",
        dict(rope_theta=1e6, rope_scaling=YARN, max_position_embeddings=256),
        True,
        "1GB",
    ),
    "qwen3-yarn": (
        "Qwen3Config",
        dict(head_dim=32, rope_theta=1e4, rope_scaling={**YARN, **YARN_OPTIONS}),
        False,
        "1GB",
    ),
    "llama-dynamic": (
        "LlamaConfig",
        dict(rope_scaling={"rope_type": "dynamic", "factor": 4.0}, rope_theta=1e4, head_dim=24),
        True,
        "1GB",
    ),
    "mistral-dynamic": (
        "MistralConfig",
        dict(
            rope_scaling={"rope_type": "dynamic", "factor": 2.0},
            sliding_window=None,
            max_position_embeddings=20,  # the greedy tokens pass it
        ),
        False,
        "1GB",
    ),
    "olmo2": (
        "Olmo2Config",
        dict(rope_theta=5e5, tie_word_embeddings=False, num_key_value_heads=4),
        True,
        "60KB",
    ),
    "olmo2-bias-tied-yarn": (
        "Olmo2Config",
        dict(rope_scaling=YARN, tie_word_embeddings=True, attention_bias=True),
        False,
        "1GB",
    ),
    "smollm3": (
        "SmolLM3Config",
        dict(tie_word_embeddings=True, num_hidden_layers=5),
        False,
        "1GB",
    ),
    "smollm3-biases-untied": (
        "SmolLM3Config",
        dict(
            no_rope_layers=[1, 0, 1],
            tie_word_embeddings=False,
            attention_bias=True,
            mlp_bias=True,
            rope_theta=5e4,
        ),
        True,
        "60KB",
    ),
    "mistral": (
        "MistralConfig",
        dict(rope_theta=1e6, sliding_window=None, head_dim=24, tie_word_embeddings=False),
        False,
        "1GB",
    ),
}


def peer_model(transformers, name, folder):
    """A random transformers model of the family, saved to the folder."""
    kind, changes, old_spelling, shard = PEERS[name]
    peer = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, kind)(**{**SHAPE, **changes}), attn_implementation="eager"
    )
    g = torch.Generator().manual_seed(len(name))
    for key, p in peer.named_parameters():
        p.data.normal_(1.0 if "norm" in key else 0.0, 0.5 if "embed" in key else 0.1, generator=g)
    peer.float().eval().save_pretrained(folder, max_shard_size=shard)
    path = folder / "config.json"
    content = json.loads(path.read_text())
    if old_spelling and "rope_parameters" in content:
        rope = content.pop("rope_parameters")
        content |= {
            "rope_theta": rope.pop("rope_theta"),
            "rope_scaling": None if rope["rope_type"] == "default" else rope,
            "torch_dtype": content.pop("dtype"),
        }
        path.write_text(json.dumps(content))
    return peer


def logits_of(model, ids, positions=None):
    hidden = model(ids, positions)
    return softmax.head_logits(hidden.flatten(0, 1), model.head).unflatten(0, ids.shape)


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def greedy(model, tokens, n):
    """tokens (B, T) and the n most probable ones behind them, by the sampler's decoder."""
    B, T = tokens.shape
    cache = decode.Cache(model.config, B, T + n)
    with decode.decoder_of(model) as decoder:
        logits = decoder.logits(decoder.read(tokens, cache)[:, -1])
        for t in range(T, T + n):
            new = logits.argmax(-1)
            tokens = torch.cat((tokens, new[:, None]), 1)
            logits = decoder.step(new, torch.full((B,), t), cache, t + 1)
    return tokens


@pytest.mark.parametrize("name", PEERS)
def test_transformers_gives_the_same_logits_and_greedy_tokens_and_loads_what_we_save(
    name, tmp_path
):
    transformers = pytest.importorskip("transformers")
    peer = peer_model(transformers, name, tmp_path / "theirs")
    assert ("sharded" in name) <= (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    ours = m.load_model(tmp_path / "theirs")
    ids = torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(3))
    real = torch.arange(40) < torch.tensor([[40], [23], [6]])
    far = torch.arange(40)[None] + 500  # max_position_embeddings is 128
    with torch.inference_mode():
        expected = peer(ids).logits
        assert relative(logits_of(ours, ids), expected) < 1e-5
        padded = peer(ids.where(real, 0), attention_mask=real.long()).logits
        assert relative(logits_of(ours, ids)[real], padded[real]) < 1e-5
        distant = peer(ids[:1], position_ids=far).logits
        assert relative(logits_of(ours, ids[:1], far), distant) < 1e-5
        tokens = peer.generate(
            ids[:, :16],
            attention_mask=torch.ones(3, 16, dtype=torch.long),
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert torch.equal(greedy(ours, ids[:, :16], 16), tokens)
        for folder, size in (("one", 5e9), ("shards", 60e3)):
            m.save_model(ours, tmp_path / folder, max_shard_bytes=size)
            again = transformers.AutoModelForCausalLM.from_pretrained(
                tmp_path / folder, attn_implementation="eager"
            )
            assert again.dtype == torch.float32
            assert torch.equal(again(ids).logits, expected)


def test_bf16_logits_are_as_close_to_fp32_as_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    peer = peer_model(transformers, "qwen3", tmp_path)
    ids = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        exact = peer(ids).logits
        theirs = relative(peer.to(torch.bfloat16)(ids).logits.float(), exact)
        assert (
            relative(logits_of(m.load_model(tmp_path, torch.bfloat16), ids), exact) < 1.5 * theirs
        )
