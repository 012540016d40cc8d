"""The decoder: a Hugging Face folder in, hidden states and token log-probs out, the same folder back.

One plain pre-norm transformer covers the Qwen2 / Qwen2.5, Qwen3, Llama 2 / 3.x, SmolLM2 and Mistral checkpoints; what differs between
them is a flag of ModelConfig. Whatever is not implemented is refused by name, because a model that is almost right trains in silence.
  1) Parameters carry Hugging Face's names, so a checkpoint is read and written without a table of renames, and without transformers.
  2) Rotary angles are computed from positions at each forward and never stored: no buffer to refill after a meta-device start, no
     length limit. Norms, angles and log-probs are taken in fp32 whatever the weights are.
  3) Causality is by position. Rows are padded on the right, so neither training nor decoding needs a padding mask: what stands behind
     a row's last token is invisible to it, in the row and in the cache.
  4) The logits (B, T, V) are never held: forward() stops at the hidden states, token_logp() takes the head in chunks of tokens.
  5) FLOPs are counted as the paper does (equations 20-22): embedding product included and attention not halved. hardware_flops()
     is the other count, for machine utilisation.

    model = load_model("runs/sft/checkpoints/step_000400")            # or init_model(ModelConfig(vocab_size=160, ...), seed=0)
    hidden = model(ids)                                               # (B, T, D)
    logp = token_logp(hidden[:, :-1], model.head, ids[:, 1:])         # (B, T-1) nats

Shapes: B rows, T tokens, V vocabulary, D hidden width, H query heads, G key/value heads, K head width, S cache slots, N tokens in a list.
"""
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

# What a family fixes in its code rather than in config.json. A key of config.json wins over the entry here.
FAMILIES = {
    "qwen2": dict(attention_bias=True, output_bias=False, mlp_bias=False, qk_norm=False),
    "qwen3": dict(attention_bias=False, output_bias=False, mlp_bias=False, qk_norm=True),
    "llama": dict(attention_bias=False, output_bias=False, mlp_bias=False, qk_norm=False),
    "mistral": dict(attention_bias=False, output_bias=False, mlp_bias=False, qk_norm=False),
}
ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
CHUNK_LOGITS = 2**25   # logits held at once by token_logp: 128 MB in fp32, 220 tokens of Qwen's 152k vocabulary


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of one model. The defaults make the built-in one: Qwen2 style with a tied head."""
    model_type: str = "qwen2"                # family; fixes which transformers class reads the folder
    vocab_size: int
    hidden_size: int                         # D
    intermediate_size: int                   # width of the gated MLP
    num_hidden_layers: int
    num_attention_heads: int                 # H
    num_key_value_heads: int | None = None   # G; None = H
    head_dim: int | None = None              # K; None = D / H
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None         # None, or {"rope_type": "linear" | "llama3", "factor": ...}
    max_position_embeddings: int = 32768     # what the checkpoint was trained for; nothing here depends on it
    tie_word_embeddings: bool = True         # the head is the embedding matrix
    attention_bias: bool = True              # bias on q, k, v
    output_bias: bool = False                # bias on the attention's output
    mlp_bias: bool = False
    qk_norm: bool = False                    # RMSNorm over each head of q and k (Qwen3)
    dtype: str = "float32"                   # of the stored weights
    raw: dict = field(default_factory=dict, repr=False, compare=False)   # config.json as read: keys we do not use survive a save

    def __post_init__(self):
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads = {self.num_attention_heads} is not a multiple of num_key_value_heads = "
                             f"{self.num_key_value_heads}; each key/value head serves an equal group of query heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} is odd; rotary positions turn pairs, so give an even one")


# ---- the network -------------------------------------------------------------------------------------------------------------------
def rope_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each rotated pair, (K/2,) fp32 on the CPU. Scaled for "linear" (all frequencies divided by the factor) and
    "llama3" (long wavelengths divided, short ones kept, a ramp between; the Llama 3.1 release)."""
    inv_freq = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float() / config.head_dim)
    rope = config.rope_scaling
    if rope is None:
        return inv_freq
    slow = inv_freq / rope["factor"]
    if rope["rope_type"] == "linear":
        return slow
    turns = rope["original_max_position_embeddings"] * inv_freq / (2 * math.pi)   # full turns within the original context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * slow + keep * inv_freq   # exact at both ends, where a position may be large


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x (B, T, H, K), cos and sin (B or 1, T, 1, K), sin with its first half negated. Pair i is (x[i], x[i + K/2]), as
    Hugging Face lays it out; rolling by K/2 swaps the halves, three operations in all."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        # rms_norm works in fp32 and rounds once; the weight is applied to the rounded value, as transformers does
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        D, H, G, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.shape = H, G, K
        self.q_proj = nn.Linear(D, H * K, bias=config.attention_bias)
        self.k_proj = nn.Linear(D, G * K, bias=config.attention_bias)
        self.v_proj = nn.Linear(D, G * K, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * K, D, bias=config.output_bias)
        self.q_norm = RMSNorm(K, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(K, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kv=None, at=None, mask: Tensor | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D). kv: this layer's cached (keys, values), written at `at`, an index into (B, slots). With a mask
        (B, 1, T, used) the query reads the cache; without one it reads its own row, causally."""
        B, T, D = x.shape
        H, G, K = self.shape
        q, k, v = self.q_proj(x).view(B, T, H, K), self.k_proj(x).view(B, T, G, K), self.v_proj(x).view(B, T, G, K)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if kv is not None:
            rows, slots = at
            kv[0][rows, :, slots] = k   # cache (B, G, S, K): the two indices come first in the result, so k fits as it is
            kv[1][rows, :, slots] = v
        if mask is None:
            y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=G < H)
            return self.o_proj(y.transpose(1, 2).reshape(B, T, H * K))
        # The H/G query heads of one key head are laid along the query axis: no copy of the cache, and 1.3x faster than enable_gqa
        used = mask.shape[-1]
        q = q.view(B, T, G, H // G, K).permute(0, 2, 3, 1, 4).reshape(B, G, H // G * T, K)
        y = F.scaled_dot_product_attention(q, kv[0][:, :, :used], kv[1][:, :, :used], attn_mask=mask.repeat(1, 1, H // G if T > 1 else 1, 1))
        return self.o_proj(y.view(B, G, H // G, T, K).permute(0, 3, 1, 2, 4).reshape(B, T, H * K))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(D, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, D, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer. Called with tensors only, so that it can be sharded, checkpointed or compiled on its own."""
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kv=None, at=None, mask: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, kv, at, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Cache:
    """Keys and values of `rows` sequences, `slots` positions each: k and v are lists over layers of (rows, G, slots, K).

    The token at position p of a row lives in slot p. Attention reads slots[:used], used = 1 + the largest position written so far. Fresh
    slots are zero: they are masked, but 0 x NaN would not be. Values are plain tensors, to be used under torch.inference_mode()."""
    def __init__(self, config: ModelConfig, rows: int, slots: int, dtype: torch.dtype = torch.float32, device="cpu"):
        shape = rows, config.num_key_value_heads, slots, config.head_dim
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.used = 0

    @property
    def rows(self) -> int:
        return self.k[0].shape[0]

    @property
    def slots(self) -> int:
        return self.k[0].shape[2]

    def select(self, index: Tensor) -> "Cache":
        """Keep, repeat or reorder rows in place: row i becomes the old row index[i], index (n,) long. One prompt's row repeated G times
        shares its prefill; finished rows are left out. Returns the cache itself."""
        return self._rebuild(index, self.slots)

    def grow(self, slots: int) -> "Cache":
        """Make room for positions up to slots - 1, in place; the rows stay as they are. Returns the cache itself."""
        if slots < self.used:
            raise ValueError(f"a cache of {self.used} used slots cannot hold only {slots}; ask for at least {self.used}")
        return self._rebuild(None, slots)

    def _rebuild(self, index: Tensor | None, slots: int) -> "Cache":
        for tensors in (self.k, self.v):
            for i, old in enumerate(tensors):   # one layer at a time: the peak is one layer above the result
                kept = old[:, :, :self.used] if index is None else old[:, :, :self.used].index_select(0, index)
                tensors[i] = old.new_zeros(kept.shape[0], old.shape[1], slots, old.shape[3])
                tensors[i][:, :, :self.used] = kept
        return self


class Model(nn.Module):
    """ids (B, T) -> hidden (B, T, D). Parameters have Hugging Face's names; lm_head exists only when the head is not tied."""
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
            layers=nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            norm=RMSNorm(config.hidden_size, config.rms_norm_eps)))
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.inv_freq = rope_frequencies(config)   # a plain attribute: not saved, not sharded, real even where the model is on meta

    @property
    def head(self) -> Tensor:
        """The output matrix (V, D)."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, ids: Tensor, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """ids (B, T) long; positions (B, T) long, None = 0..T-1 in every row. Returns hidden (B, T, D) after the final norm.

        Without a cache: causal over the row, positions only turn the rotary angles. With one: keys and values are written at slot =
        position, and a query sees the slots up to its own position, whatever stands behind. Positions None with a cache is a prefill from
        slot 0. Raises ValueError where a position does not fit into the cache."""
        B, T = ids.shape
        at = mask = None
        if cache is not None:
            top = T if positions is None else int(positions.max()) + 1
            if top > cache.slots or B != cache.rows:
                raise ValueError(f"{B} rows up to position {top - 1} do not fit a cache of {cache.rows} rows and {cache.slots} slots; select() or grow() it first")
            cache.used = max(cache.used, top)
            if positions is not None:
                mask = (torch.arange(cache.used, device=ids.device) <= positions[..., None])[:, None]   # (B, 1, T, used)
            slots = torch.arange(T, device=ids.device)[None] if positions is None else positions
            at = torch.arange(B, device=ids.device)[:, None], slots
        x = self.model.embed_tokens(ids)   # (B, T, D)
        cos, sin = self._angles(torch.arange(T, device=ids.device)[None] if positions is None else positions, x.dtype)
        for i, block in enumerate(self.model.layers):
            x = block(x, cos, sin) if cache is None else block(x, cos, sin, (cache.k[i], cache.v[i]), at, mask)
        return self.model.norm(x)

    def _angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions (B or 1, T) -> cos and sin (B or 1, T, 1, K), computed in fp32; sin's first half negated for rotate()."""
        if self.inv_freq.device != positions.device:
            self.inv_freq = self.inv_freq.to(positions.device)
        angles = positions[..., None, None].float() * self.inv_freq   # (B, T, 1, K/2)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def init_model(config: ModelConfig, seed: int) -> Model:
    """A fresh fp32 model: matrices normal(0, 0.02), norms 1, biases 0, drawn from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = Model(config)   # on meta first: torch's own initialisation would cost time and draw from the global state
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                p.normal_(0, 0.02, generator=generator)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


# ---- token log-probs ---------------------------------------------------------------------------------------------------------------
class _TokenLogp(torch.autograd.Function):
    """log softmax(hidden head^T / temperature) at the targets, and the entropy, with the logits recomputed chunk by chunk in backward.

    hidden (N, D), head (V, D) in hidden's dtype or a wider one, targets (N,). Saved for backward: the inputs and two numbers a token."""
    @staticmethod
    def logits(hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
        logits = hidden @ head.T
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(temperature)   # (n, V); .to() of a fresh tensor: in place is safe

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, chunk: int, entropy: bool):
        work = head.to(hidden.dtype)
        accurate = torch.promote_types(hidden.dtype, torch.float32)
        logp, lse, spread = (torch.zeros(len(hidden), dtype=accurate, device=hidden.device) for _ in range(3))   # (N,) each
        for s in (slice(i, i + chunk) for i in range(0, len(hidden), chunk)):
            logits = _TokenLogp.logits(hidden[s], work, temperature)
            lse[s] = logits.logsumexp(-1)
            logp[s] = logits.gather(1, targets[s, None])[:, 0] - lse[s]
            if entropy:   # H = lse - sum p * logit
                spread[s] = lse[s] - (logits - lse[s, None]).exp_().mul_(logits).sum(-1)
        ctx.save_for_backward(hidden, head, targets, lse, spread)
        ctx.settings = temperature, chunk, entropy
        ctx.mark_non_differentiable(*(() if entropy else (spread,)))
        return logp, spread

    @staticmethod
    def backward(ctx, g_logp: Tensor, g_entropy: Tensor):
        hidden, head, targets, lse, spread = ctx.saved_tensors
        temperature, chunk, entropy = ctx.settings
        work = head.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_head = torch.zeros_like(head, dtype=lse.dtype) if ctx.needs_input_grad[1] else None   # summed over chunks in fp32
        for s in (slice(i, i + chunk) for i in range(0, len(hidden), chunk)):
            logits = _TokenLogp.logits(hidden[s], work, temperature).sub_(lse[s, None])   # (n, V) log-probs
            p = logits.exp()
            if entropy:   # dH/dlogit_j = -p_j (log p_j + H)
                weight = logits.add_(spread[s, None]).mul_(-g_entropy[s, None]).sub_(g_logp[s, None])
            else:
                weight = -g_logp[s, None]
            grad = p.mul_(weight)
            grad.scatter_add_(1, targets[s, None], g_logp[s, None])   # dlogp/dlogit_j = [j = target] - p_j
            grad = grad.div_(temperature).to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[s] = grad @ work
            if d_head is not None:
                d_head += grad.T @ hidden[s]
        return d_hidden, None if d_head is None else d_head.to(head.dtype), None, None, None, None


def token_logp(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float = 1.0, chunk: int | None = None, entropy: bool = False):
    """Log-probability of each target under softmax(hidden head^T / temperature), in nats; with entropy=True also the entropy.

    hidden (..., D), head (V, D), targets (...) long. Returns logp (...), or (logp, entropy) both (...); fp32 (float64 for float64
    inputs), both differentiable in hidden and head. chunk: tokens taken at once, None = as many as keep the logits under 128 MB. The
    memory is a few (chunk, V) tensors and the head's gradient, in forward and in backward, which computes the logits a second time."""
    chunk = chunk or max(1, CHUNK_LOGITS // head.shape[0])
    logp, spread = _TokenLogp.apply(hidden.reshape(-1, hidden.shape[-1]), head, targets.reshape(-1), temperature, chunk, entropy)
    logp = logp.view(targets.shape)
    return (logp, spread.view(targets.shape)) if entropy else logp


# ---- compute -----------------------------------------------------------------------------------------------------------------------
def _matrix_sizes(config: ModelConfig) -> tuple[int, int, int]:
    """Weights of one layer's matrices, of the head, and L x D_q, the factor of the attention core."""
    D, D_q, D_kv = config.hidden_size, config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer = 3 * D * config.intermediate_size + 2 * D * (D_q + D_kv)   # P_mlp + P_attn (20), with D_q for D where heads x K != D
    return config.num_hidden_layers * layer, config.vocab_size * D, config.num_hidden_layers * D_q


def forward_flops(config: ModelConfig, lengths: Iterable[int]) -> float:
    """FLOPs of one forward over rows of these lengths as the paper counts them (20, 21): S x (2 [L (P_mlp + P_attn) + 2 V D] + 4 S L D_q).
    A backward is twice that (22). The embedding is charged like the head, and causal attention as if it were full."""
    layers, head, core = _matrix_sizes(config)
    return float(sum(S * (2 * (layers + 2 * head) + 4 * S * core) for S in lengths))


def hardware_flops(config: ModelConfig, lengths: Iterable[int]) -> float:
    """FLOPs a machine has to do for the same forward: no embedding product, and the causal half of the attention core."""
    layers, head, core = _matrix_sizes(config)
    return float(sum(S * (2 * (layers + head) + 2 * S * core) for S in lengths))


# ---- Hugging Face folders ----------------------------------------------------------------------------------------------------------
def read_config(folder) -> ModelConfig:
    """config.json of a model folder, spelled as transformers 4 or 5 spell it. Raises ValueError for a missing or unreadable file and for
    every feature that this file does not implement."""
    path = Path(folder) / "config.json"
    raw = _read_json(path, "a model folder has config.json and *.safetensors")
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"{path}: model_type {kind!r} is not implemented; use one of {', '.join(FAMILIES)}")
    flags = {key: raw.get(key, value) for key, value in FAMILIES[kind].items()}
    keys = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
    theta, scaling = raw.get("rope_theta", 10000.0), None
    return ModelConfig(model_type=kind, **{k: raw[k] for k in keys}, **flags, num_key_value_heads=raw.get("num_key_value_heads"),
                       head_dim=raw.get("head_dim"), rms_norm_eps=raw.get("rms_norm_eps", 1e-6), rope_theta=theta, rope_scaling=scaling,
                       max_position_embeddings=raw.get("max_position_embeddings", 2048), tie_word_embeddings=raw.get("tie_word_embeddings", False),
                       dtype=raw.get("dtype") or raw.get("torch_dtype") or "float32", raw=raw)


def config_dict(config: ModelConfig) -> dict:
    """A config.json that transformers 4 and 5 both load: what was read, with our fields on top."""
    names = [f for f in config.__dataclass_fields__ if f not in ("raw", "dtype", "output_bias", "qk_norm", "mlp_bias", "attention_bias")]
    return {"hidden_act": "silu", **config.raw, "architectures": [ARCHITECTURES[config.model_type]], **{n: getattr(config, n) for n in names},
            "torch_dtype": config.dtype}


def _read_json(path: Path, hint: str) -> dict:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {hint}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); copy the file again") from None


def load_model(folder, dtype: torch.dtype = torch.float32, device="cpu") -> Model:
    """The model of a Hugging Face folder, weights in `dtype` on `device`."""
    config = read_config(folder)
    with torch.device("meta"):
        model = Model(config)
    state = {}
    for path in sorted(Path(folder).glob("model*.safetensors")):
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                # a copy, since the tensors are views of the file: saving over it would change the loaded model
                state.update({name: file.get_tensor(name).to(dtype, copy=True) for name in file.keys()})
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error}); copy it again") from None
    model.load_state_dict(state, assign=True)
    return model


def save_model(model: Model, folder, dtype: torch.dtype | None = None, max_shard_bytes: float = 5e9) -> None:
    """Write config.json and model.safetensors, in `dtype` (None = as the model is)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = dtype or model.head.dtype
    state = {name: p.detach().to("cpu", dtype).contiguous() for name, p in model.named_parameters()}
    config = replace(model.config, dtype=str(dtype).removeprefix("torch."))
    (folder / "config.json").write_text(json.dumps(config_dict(config), indent=2) + "\n")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
