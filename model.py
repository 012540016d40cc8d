"""The decoder: token ids to hidden states, and hidden states to log-probs of the response tokens.

One transformer covers Qwen2, Qwen2.5, Qwen3, Llama 2 and 3, SmolLM2, SmolLM3, Mistral and OLMo 2.
They differ by fields of ModelConfig; core/folder.py reads the folders and refuses other families.

    model = load_model("runs/sft/checkpoints/step_000400")      # or init_model(config, seed=0)
    hidden = model(ids)                                         # (B, T, D)
    logp = token_logp(hidden[:, :-1], model.head, ids[:, 1:])   # (B, T-1), nats

1) Parameters have Hugging Face's names, so folders are read and written without renaming.
2) Rotary angles are computed from the positions in each forward; no table limits the length.
   Norms, angles and log-probs are computed in fp32, whatever the type of the weights.
3) Causality is by position. Rows are padded on the right, behind all that their tokens see.
4) The logits (B, T, V) are never held: core/softmax.py goes from hidden states to log-probs.
5) differs: no dropout; attention_dropout in config.json is not read.

Shapes: B rows, T tokens, V vocabulary, D hidden width, H query heads, Hkv key and value heads,
K head width, Q queries, n keys, N tokens of all rows in one list.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core import ranks
from core.folder import ModelConfig, read_config, read_weights, write_folder
from core.rope import dynamic_frequencies, rope_frequencies, rope_magnitude
from core.shared import Line, Places
from core.softmax import SumLogp, token_logp


# ---- the network
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of x (B, T, H, K) by their angles; cos, sin (B or 1, T, 1, K) of Model.angles.

    The pairs of Hugging Face are x[i] and x[i + K/2]: rolling by K/2 exchanges the two halves, and
    the first half of sin is negated.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """q (B, Q, H, K), k and v (B, n, Hkv, K) -> (B, Q, H, K).

    visible (B, 1, Q, n): keys that each query sees; None = causal, with n = Q.
    """
    q = q.transpose(1, 2)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    group = q.shape[1] // k.shape[1]
    if q.is_cuda and (q.dtype == torch.float32 or visible is not None):
        # In these cases CUDA has no fused kernel in which query heads share key heads: repeat them
        k = k.repeat_interleave(group, 1)
        v = v.repeat_interleave(group, 1)
        group = 1
    causal = visible is None
    y = F.scaled_dot_product_attention(q, k, v, visible, is_causal=causal, enable_gqa=group > 1)
    return y.transpose(1, 2)


def attend_shared(q: Tensor, k: Tensor, v: Tensor, places: Places) -> Tensor:
    """q (N, H, K), k and v (N, Hkv, K) of a line of core/shared.py -> (N, H, K): prompts attend to
    themselves, responses to their prompt and themselves."""
    prompt_k = k[places.prompts]  # (G, P, Hkv, K)
    prompt_v = v[places.prompts]
    of_prompts = attend(q[places.prompts], prompt_k, prompt_v)
    row_k = torch.cat((prompt_k[places.group], k[places.rows]), 1)  # (B, P + R, Hkv, K)
    row_v = torch.cat((prompt_v[places.group], v[places.rows]), 1)
    of_rows = attend(q[places.rows], row_k, row_v, places.visible)
    return torch.cat((of_prompts.flatten(0, 1), of_rows.flatten(0, 1)))[places.back]


class Attention(nn.Module):
    """Causal self-attention in which groups of H / Hkv query heads share a key and a value head."""

    def __init__(self, config: ModelConfig, rotary: bool):
        super().__init__()
        D = config.hidden_size
        K = config.head_dim
        q_width = config.num_attention_heads * K  # differs from D in Qwen3
        kv_width = config.num_key_value_heads * K
        self.head_dim = K
        self.rotary = rotary
        self.q_proj = nn.Linear(D, q_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(D, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(D, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_width, D, bias=config.output_bias)
        # How many numbers one norm covers: those of one head, or of all heads
        self.q_norm_width = q_width if config.joint_qk_norm else K
        self.k_norm_width = kv_width if config.joint_qk_norm else K
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.q_norm_width, config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(self.k_norm_width, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, places: Places | None) -> Tensor:
        B, T, _ = x.shape
        heads = (B, T, -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.q_norm_width)).view(heads)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.k_norm_width)).view(heads)
        v = self.v_proj(x).view(heads)
        if self.rotary:
            q = rotate(q, cos, sin)
            k = rotate(k, cos, sin)
        y = attend(q, k, v) if places is None else attend_shared(q[0], k[0], v[0], places)
        return self.o_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        D = config.hidden_size
        inner = config.intermediate_size
        self.gate_proj = nn.Linear(D, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(D, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, D, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        up = self.up_proj(x)
        join = lambda gate, up: self.down_proj(F.silu(gate) * up)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # The backward computes silu(gate) * up again, but not the matrix product behind it:
            # half of the memory for the activations of the MLP. A compiler decides for itself.
            return checkpoint(join, gate, up, use_reentrant=False, preserve_rng_state=False)
        return join(gate, up)


class Block(nn.Module):
    """One layer. ranks.compute sets `recompute` and `compiled`; FSDP2 shards block by block."""

    def __init__(self, config: ModelConfig, i: int):
        super().__init__()
        D = config.hidden_size
        # differs, in bf16 only: transformers rounds before it multiplies by the norm's weight
        if not config.post_norm:
            self.input_layernorm = nn.RMSNorm(D, config.rms_norm_eps)
        self.self_attn = Attention(config, not config.rotary_layers or config.rotary_layers[i])
        self.post_attention_layernorm = nn.RMSNorm(D, config.rms_norm_eps)
        self.mlp = MLP(config)
        if config.post_norm:
            self.post_feedforward_layernorm = nn.RMSNorm(D, config.rms_norm_eps)
        self.post_norm = config.post_norm
        self.recompute = False  # keep only x for the backward, which runs the block once more
        self.compiled = None  # torch.compile of _run, where it is used

    def forward(self, x: Tensor, *context) -> Tensor:
        run = self.compiled or self._run
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(run, x, *context, use_reentrant=False, preserve_rng_state=False)
        return run(x, *context)

    def _run(self, x: Tensor, cos: Tensor, sin: Tensor, places: Places | None) -> Tensor:
        """x (B, T, D) -> (B, T, D); cos, sin and places: as in Attention."""
        if self.post_norm:
            x = x + self.post_attention_layernorm(self.self_attn(x, cos, sin, places))
            return x + self.post_feedforward_layernorm(self.mlp(x))
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, places)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    """ids (B, T) -> hidden (B, T, D). A tied head has no parameter of its own."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = nn.Module()  # for Hugging Face's names: model.layers.0 ...
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.model.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Not buffers: these are not saved or sharded, nor on meta while the parameters are
        self.inv_freq = rope_frequencies(config)
        self.magnitude = rope_magnitude(config)

    @property
    def head(self) -> Tensor:
        """The output matrix (V, D)."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.weight
        return self.lm_head.weight

    def forward(
        self, ids: Tensor, positions: Tensor | None = None, places: Places | None = None
    ) -> Tensor:
        """ids (B, T) -> hidden (B, T, D), after the final norm.

        positions (B or 1, T) only rotate queries and keys; None = 0..T-1 in each row. Attention is
        causal within each row; with places, ids are a line of core/shared.py (B = 1).
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        x = self.model.embed_tokens(ids)  # (B, T, D)
        cos, sin = self.angles(positions, x.dtype)
        for block in self.model.layers:
            x = block(x, cos, sin, places)
        return self.model.norm(x)

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions (B or 1, T) -> cos and sin (B or 1, T, 1, K) for rotate()."""
        if self.inv_freq.device != positions.device:
            self.inv_freq = self.inv_freq.to(positions.device)
        inv_freq = self.inv_freq
        if self.config.rope_scaling and self.config.rope_scaling["rope_type"] == "dynamic":
            inv_freq = dynamic_frequencies(self.config, positions)
        angles = positions[..., None, None].float() * inv_freq  # (B or 1, T, 1, K/2)
        cos = (angles.cos() * self.magnitude).to(dtype)
        sin = (angles.sin() * self.magnitude).to(dtype)
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


# ---- token log-probs
def response_logp_sum(model: Model, ids: Tensor, mask: Tensor) -> Tensor:
    """Scalar, nats: the sum of the log-probs of all tokens that mask (B, T) trains.

    Equal to response_logp(...)[0].sum(), for a loss in which every token has the same weight.
    """
    hidden, targets = _trained(model, ids, mask)
    return SumLogp.apply(hidden, model.head, targets, None, torch.is_grad_enabled())


def response_logp(
    model: Model, ids: Tensor, mask: Tensor, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log-probs of the tokens that mask trains, moved to the left of each row.

    | ids, mask | (B, T) | mask is True where a token is trained                               |
    | logp      | (B, R) | nats; R = most trained tokens in a row; 0 where a row has fewer     |
    | entropy   | (B, R) | nats, of the distribution at that token; None if not asked for      |
    | chosen    | (B, R) | bool: True for tokens, False for padding                            |
    """
    lengths = mask[:, 1:].sum(1)
    chosen = torch.arange(int(lengths.max()), device=mask.device) < lengths[:, None]
    chosen = chosen.to(ids.device)
    hidden, targets = _trained(model, ids, mask)
    return (*_logp_in_rows(hidden, model.head, targets, chosen, temperature, entropy), chosen)


def grouped_logp(
    model: Model, line: Line, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """response_logp() of all responses of a line of core/shared.py: logp and entropy, (B, R)."""
    device = model.head.device
    ids = line.ids.to(device)
    hidden = model(ids, line.positions.to(device), line.places.to(device))[0]
    hidden = hidden.index_select(0, line.sources.to(device))
    targets = ids[0, line.targets.to(device)]
    return _logp_in_rows(hidden, model.head, targets, line.chosen.to(device), temperature, entropy)


def _logp_in_rows(hidden, head, targets, chosen, temperature: float, entropy: bool) -> tuple:
    """Log-probs and entropies (or None) of N targets, put where chosen (B, R) is True: (B, R)."""
    values = token_logp(hidden, head, targets, temperature, entropy=entropy)
    logp, entropies = values if entropy else (values, None)
    zeros = torch.zeros(chosen.shape, dtype=logp.dtype, device=hidden.device)
    if entropy:
        entropies = zeros.masked_scatter(chosen, entropies)
    return zeros.masked_scatter(chosen, logp), entropies


def _trained(model: Model, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (N, D) that predict the trained tokens, and the ids (N,) of those tokens.

    The state at t - 1 predicts the token at t. States that predict no trained token never reach
    the head. Where the mask is on the CPU, nothing here waits for the device.
    """
    index = mask[:, 1:].flatten().nonzero()[:, 0].to(ids.device)
    hidden = model(ids)[:, :-1].flatten(0, 1).index_select(0, index)
    return hidden, ids[:, 1:].flatten()[index]


# ---- Hugging Face folders
def init_model(config: ModelConfig, seed: int, device="cpu", shard=None) -> Model:
    """A fresh fp32 model: matrices normal(0, 0.02), norms 1, biases 0, from a generator of its own.

    shard: as in load_model. Every rank draws all numbers and keeps its rows, so the number of ranks
    changes nothing.
    """
    generator = torch.Generator().manual_seed(seed)

    def rows() -> Iterator[tuple[str, Tensor]]:
        for name, shape in _shapes(config).items():
            first, end = ranks.rows_of(shape[0], shard is not None)
            if len(shape) == 2:
                drawn = torch.empty(shape).normal_(0, 0.02, generator=generator)
                yield name, drawn[first:end]
            else:
                yield name, torch.full((end - first,), 0.0 if name.endswith("bias") else 1.0)

    return _build(config, rows(), torch.float32, device, shard)


def load_model(folder, dtype: torch.dtype = torch.float32, device="cpu", shard=None) -> Model:
    """The model of a Hugging Face folder, its weights cast to dtype on the device.

    shard(model) makes the parameters of the empty model sharded (ranks.shard); each rank then reads
    its own rows only. Raises UserError, naming the file, for what is missing, damaged, at odds with
    config.json or not implemented.
    """
    config = read_config(folder)
    rows = read_weights(folder, _shapes(config), lambda n: ranks.rows_of(n, shard is not None))
    return _build(config, rows, dtype, device, shard)


def save_model(
    model: Model, folder, dtype: torch.dtype | None = None, max_shard_bytes: float = 5e9
) -> None:
    """Write the model as a Hugging Face folder, in dtype (None = the parameters' own, exactly).

    Weights above max_shard_bytes are cut into several files with an index; a tied head is left out.
    All ranks of a sharded model call it, and the first one writes.
    """
    weights = dict(model.named_parameters())
    dtype = dtype or model.head.dtype
    writes = ranks.rank() == 0
    write_folder(folder, model.config, weights, dtype, max_shard_bytes, ranks.whole, writes)


def _build(
    config: ModelConfig, rows: Iterator[tuple[str, Tensor]], dtype: torch.dtype, device, shard
) -> Model:
    """A model whose parameters are (name, rows of this rank).

    It starts on the meta device: neither time nor memory goes into weights that are replaced, and a
    rank never holds more than its rows.
    """
    with torch.device("meta"):
        model = Model(config).to(dtype)
    if shard:
        shard(model)
    model.to_empty(device=device)
    params = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in rows:
            ranks.local(params[name]).copy_(values)
    return model


def _shapes(config: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in Model(config).named_parameters()}
