"""The decoder: a Hugging Face folder in, hidden states and token log-probs out, the same folder back.

One pre-norm transformer covers the Qwen2 / Qwen2.5, Qwen3, Llama 2 / 3.x, SmolLM2 and Mistral checkpoints; they differ
by fields of ModelConfig. What is not implemented is refused by name: a model that is almost right trains in silence.
  1) Parameters carry Hugging Face's names, so folders are read and written without renaming and without transformers.
  2) Rotary angles come from the positions at each forward and are never stored: nothing to refill after a start on the
     meta device, no length limit. Norms, angles and log-probs are taken in fp32 whatever the weights are.
  3) Causality is by position. Rows are padded on the right, so neither training nor decoding needs a padding mask: what
     stands behind a row's last token is invisible to it, in the row and in the cache.
  4) The logits (B, T, V) are never held: forward() ends at the hidden states, token_logp() takes the head in chunks.
  5) forward_flops() counts as the paper does (equations 20-22): embedding product included, attention not halved.
     hardware_flops() is the other count, the work a machine has to do.
  6) # differs: no dropout, so attention_dropout in a config.json is not read.

    model = load_model("runs/sft/checkpoints/step_000400")      # or init_model(ModelConfig(...), seed=0)
    hidden = model(ids)                                         # (B, T, D)
    logp = token_logp(hidden[:, :-1], model.head, ids[:, 1:])   # (B, T-1) nats

    cache = Cache(model.config, rows=B, slots=T + 64)           # decoding, under torch.inference_mode()
    hidden = model(ids, cache=cache)                            # prefill: a row's tokens go to slots 0..T-1
    hidden = model(new, positions, cache)                       # new (B, 1) at positions (B, 1), each row at its own

Shapes: B rows, T tokens, V vocabulary, D hidden width, H query heads, Hkv key/value heads, K head width, L layers,
N = tokens of all rows in one list, n = a chunk of them.
"""
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FAMILIES = "qwen2", "qwen3", "llama", "mistral"   # the values of model_type that load
ROPE_NUMBERS = {"default": (), "linear": ("factor",),
                "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
CHUNK_LOGITS = 2**25   # logits that token_logp holds at once: 128 MB in fp32, 220 tokens of Qwen's 152k vocabulary


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of one model. The defaults are the built-in one's: Qwen2 style with a tied head."""
    model_type: str = "qwen2"                # family: decides which transformers class reads the folder
    vocab_size: int                          # V
    hidden_size: int                         # D
    intermediate_size: int                   # width inside the gated MLP
    num_hidden_layers: int                   # L
    num_attention_heads: int                 # H
    num_key_value_heads: int | None = None   # Hkv; None = H
    head_dim: int | None = None              # K; None = D / H
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0              # base of the rotary wavelengths
    rope_scaling: dict | None = None         # None or {"rope_type": "linear" | "llama3", "factor": ..., ...}
    max_position_embeddings: int = 32768     # what the checkpoint was trained for; nothing here stops at it
    tie_word_embeddings: bool = True         # the head is the embedding matrix
    attention_bias: bool = True              # on q, k and v
    output_bias: bool = False                # on the attention's output
    mlp_bias: bool = False
    qk_norm: bool = False                    # RMSNorm over each head of q and k (Qwen3)
    dtype: str = "float32"                   # of the stored weights
    raw: dict = field(default_factory=dict, repr=False, compare=False)   # config.json as read; kept when saved

    def __post_init__(self):
        D, H = self.hidden_size, self.num_attention_heads
        object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or H)   # the class is frozen
        object.__setattr__(self, "head_dim", self.head_dim or D // H)
        if H % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError(f"num_attention_heads {H} must be a multiple of num_key_value_heads {self.num_key_value_heads}, "
                             f"and head_dim {self.head_dim} even, since rotary positions turn pairs")


# ---- the network -----------------------------------------------------------------------------------------------------
def rope_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each rotated pair, (K/2,) fp32 on the CPU. "linear" divides all of them by the factor;
    "llama3" only those too slow to turn low_freq_factor times within the original context, with a ramp up to
    high_freq_factor turns (Llama 3.1)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float() / config.head_dim
    fast = 1.0 / config.rope_theta**exponents
    rope = config.rope_scaling
    if rope is None:
        return fast
    slow = fast / rope["factor"]
    if rope["rope_type"] == "linear":
        return slow
    turns = rope["original_max_position_embeddings"] * fast / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * slow + keep * fast   # exact at both ends, so far positions do not drift from transformers'


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs by their angles: x (B, T, H, K); cos, sin (B or 1, T, 1, K), the first half of sin negated. Hugging
    Face pairs x[i] with x[i + K/2]; rolling by K/2 swaps the halves, so this takes three operations."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        # rms_norm computes in fp32 and rounds once; the weight multiplies the rounded value, as in transformers
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        D, H, Hkv, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.shape = H, Hkv, K
        self.q_proj = nn.Linear(D, H * K, bias=config.attention_bias)
        self.k_proj = nn.Linear(D, Hkv * K, bias=config.attention_bias)
        self.v_proj = nn.Linear(D, Hkv * K, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * K, D, bias=config.output_bias)   # H K differs from D in Qwen3
        self.q_norm = RMSNorm(K, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(K, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kv=None, at=None, mask: Tensor | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D). kv: this layer's cached (keys, values), to be written at = (rows (B, 1), slots).
        With mask (B, 1, T, used) the queries read the cache, without it the row itself, causally."""
        B, T, D = x.shape
        H, Hkv, K = self.shape
        q = rotate(self.q_norm(self.q_proj(x).view(B, T, H, K)), cos, sin)
        k = rotate(self.k_norm(self.k_proj(x).view(B, T, Hkv, K)), cos, sin)
        v = self.v_proj(x).view(B, T, Hkv, K)
        if kv is not None:
            rows, slots = at
            kv[0][rows, :, slots] = k   # into (B, Hkv, slots, K): indexed dimensions come first, so k fits as it is
            kv[1][rows, :, slots] = v
        if mask is None:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=Hkv < H)   # (B, H, T, K)
            return self.o_proj(y.transpose(1, 2).reshape(B, T, H * K))
        # The n query heads that share a key head are laid along the query axis: the cache is read once and never copied
        n, used = H // Hkv, mask.shape[-1]
        q = q.view(B, T, Hkv, n, K).permute(0, 2, 3, 1, 4).reshape(B, Hkv, n * T, K)
        mask = mask if T == 1 else mask.repeat(1, 1, n, 1)
        y = F.scaled_dot_product_attention(q, kv[0][:, :, :used], kv[1][:, :, :used], attn_mask=mask)
        return self.o_proj(y.view(B, Hkv, n, T, K).permute(0, 3, 1, 2, 4).reshape(B, T, H * K))


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
    """One layer. Called with tensors only, so that it can be sharded, recomputed or compiled on its own."""
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kv=None, at=None, mask: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, kv, at, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Cache:
    """Keys and values of `rows` sequences with `slots` positions each; k and v are lists over layers of tensors
    (rows, Hkv, slots, K). The token at position p of a row lives in slot p. Attention reads slots[:used], used = 1 + the
    largest position written so far. Fresh slots are zero: a masked slot weighs 0, but 0 x NaN would still be NaN.
    For use under torch.inference_mode(): writing in place would break a backward."""
    def __init__(self, config: ModelConfig, rows: int, slots: int, dtype: torch.dtype = torch.float32, device="cpu"):
        shape = rows, config.num_key_value_heads, slots, config.head_dim
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.rows, self.slots, self.used = rows, slots, 0

    def select(self, index: Tensor) -> "Cache":
        """Keep, repeat or reorder rows, in place: row i becomes what row index[i] was; index (n,) long. A prompt's row
        repeated n times shares one prefill; finished rows are simply left out. Returns the cache itself."""
        return self._rebuild(lambda old: old.index_select(0, index), len(index), self.slots)

    def grow(self, slots: int) -> "Cache":
        """Make room for positions 0..slots-1, in place; what is cached stays. Returns the cache itself."""
        if slots < self.used:
            raise ValueError(f"cannot give a cache {slots} slots: {self.used} are in use; ask for at least as many")
        return self._rebuild(lambda old: old, self.rows, slots)

    def _rebuild(self, choose, rows: int, slots: int) -> "Cache":
        for tensors in (self.k, self.v):
            for i, old in enumerate(tensors):   # tensor by tensor: the peak is one tensor above the result
                tensors[i] = old.new_zeros(rows, old.shape[1], slots, old.shape[3])
                tensors[i][:, :, :self.used] = choose(old[:, :, :self.used])
        self.rows, self.slots = rows, slots
        return self


class Model(nn.Module):
    """ids (B, T) -> hidden (B, T, D). Parameters have Hugging Face's names; lm_head only where it is not tied."""
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
            layers=nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            norm=RMSNorm(config.hidden_size, config.rms_norm_eps)))
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.inv_freq = rope_frequencies(config)   # no buffer: not saved or sharded, real while the rest is on meta

    @property
    def head(self) -> Tensor:
        """The output matrix (V, D)."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, ids: Tensor, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """ids (B, T) long, positions (B, T) long (None: 0..T-1 in each row) -> hidden (B, T, D) after the final norm.

        Without a cache attention is causal along the row and positions only turn the angles. With one, keys and values
        are written at slot = position and a query sees all slots up to its own position. Positions None with a cache is
        a prefill from slot 0. Raises ValueError where rows or positions do not fit the cache."""
        B, T = ids.shape
        at = mask = None
        places = torch.arange(T, device=ids.device)[None] if positions is None else positions   # (1 or B, T)
        if cache is not None:
            top = T if positions is None else int(positions.max()) + 1
            if B != cache.rows or top > cache.slots:
                raise ValueError(f"{B} rows up to position {top - 1} do not fit a cache of {cache.rows} rows x "
                                 f"{cache.slots} slots; select() the rows or grow() the slots first")
            cache.used = max(cache.used, top)
            at = torch.arange(B, device=ids.device)[:, None], places
            if positions is not None:   # a prefill from slot 0 sees only itself: causal, without reading the cache
                seen = torch.arange(cache.used, device=ids.device) <= positions[..., None]
                mask = seen[:, None]   # (B, 1, T, used)
        x = self.model.embed_tokens(ids)   # (B, T, D)
        cos, sin = self._angles(places, x.dtype)
        for i, block in enumerate(self.model.layers):
            x = block(x, cos, sin) if cache is None else block(x, cos, sin, (cache.k[i], cache.v[i]), at, mask)
        return self.model.norm(x)

    def _angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions (B or 1, T) -> cos and sin (B or 1, T, 1, K) for rotate()."""
        if self.inv_freq.device != positions.device:
            self.inv_freq = self.inv_freq.to(positions.device)
        angles = positions[..., None, None].float() * self.inv_freq   # (B or 1, T, 1, K/2)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def init_model(config: ModelConfig, seed: int) -> Model:
    """A fresh fp32 model: matrices normal(0, 0.02), norms 1, biases 0, drawn from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):   # torch's own initialisation would cost time and draw from the global generator
        model = Model(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                p.normal_(0, 0.02, generator=generator)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


# ---- token log-probs -------------------------------------------------------------------------------------------------
def _product(a: Tensor, b: Tensor) -> Tensor:
    """a (n, m) @ b (m, k) in fp32 (float64 for float64). On CUDA a half-precision product keeps its fp32 accumulator; the
    CPU has no such kernel and rounds the result once to the input's type, as the logits of transformers are."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).to(torch.promote_types(a.dtype, torch.float32))


def head_logits(hidden: Tensor, head: Tensor, temperature: float = 1.0) -> Tensor:
    """hidden (N, D), head (V, D) -> logits (N, V) over the temperature, fp32. A sampler that draws from these draws from
    exactly the distribution that token_logp() scores."""
    logits = _product(hidden, head.to(hidden.dtype).T)
    return logits if temperature == 1.0 else logits / temperature


class _TokenLogp(torch.autograd.Function):
    """token_logp() on flat inputs. Between forward and backward only the inputs and two numbers a token are kept; each
    chunk's logits are computed a second time in backward."""
    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, chunk: int, entropy: bool):
        N, work = len(hidden), head.to(hidden.dtype)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logp, lse, spread = (torch.zeros(N, dtype=wide, device=hidden.device) for _ in range(3))   # (N,) each
        for s in (slice(i, i + chunk) for i in range(0, N, chunk)):
            logits = head_logits(hidden[s], work, temperature)   # (n, V)
            lse[s] = logits.logsumexp(-1)
            logp[s] = logits.gather(1, targets[s, None])[:, 0] - lse[s]
            if entropy:
                logits -= lse[s, None]
                spread[s] = -(logits.exp() * logits).sum(-1)   # H = -sum p log p
        ctx.save_for_backward(hidden, head, targets, lse, spread)
        ctx.settings = temperature, chunk, entropy
        if not entropy:
            ctx.mark_non_differentiable(spread)
        return logp, spread

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logp: Tensor, g_entropy: Tensor):
        hidden, head, targets, lse, spread = ctx.saved_tensors
        temperature, chunk, entropy = ctx.settings
        work = head.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_head = torch.zeros_like(head, dtype=lse.dtype) if ctx.needs_input_grad[1] else None   # fp32 sum over chunks
        for s in (slice(i, i + chunk) for i in range(0, len(hidden), chunk)):
            log_p = head_logits(hidden[s], work, temperature).sub_(lse[s, None])   # (n, V)
            g = g_logp[s, None]
            if entropy:   # dH/dz_j = -p_j (log p_j + H) and dlogp/dz_j = [j = target] - p_j, z = logits / temperature
                p = log_p.exp()
                d_z = log_p.add_(spread[s, None]).mul_(-g_entropy[s, None]).sub_(g).mul_(p)
            else:
                d_z = log_p.exp_().mul_(-g)
            d_z = d_z.scatter_add_(1, targets[s, None], g).div_(temperature).to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[s] = d_z @ work
            if d_head is not None:
                d_head += _product(d_z.T, hidden[s])
        return d_hidden, None if d_head is None else d_head.to(head.dtype), None, None, None, None


def token_logp(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float = 1.0, chunk: int | None = None,
               entropy: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of each target under softmax(hidden head^T / temperature), without holding the logits of all tokens.

    | name        | shape    | unit | meaning                                                                   |
    | hidden      | (..., D) |      | the model's output; any float type                                        |
    | head        | (V, D)   |      | cast to hidden's type if it differs; its gradient is summed in fp32       |
    | targets     | (...)    |      | token ids                                                                 |
    | chunk       |          |      | tokens at once; None = as many as keep their logits below 128 MB          |
    | returns     | (...)    | nats | logp, or with entropy=True the pair (logp, entropy); fp32, differentiable |

    The peak is about three (chunk, V) tensors, plus the head's gradient in backward."""
    chunk = chunk or max(1, CHUNK_LOGITS // head.shape[0])
    flat = hidden.reshape(-1, hidden.shape[-1])   # (N, D)
    logp, spread = _TokenLogp.apply(flat, head, targets.reshape(-1), temperature, chunk, entropy)
    return (logp.view(targets.shape), spread.view(targets.shape)) if entropy else logp.view(targets.shape)


# ---- compute ---------------------------------------------------------------------------------------------------------
def forward_flops(config: ModelConfig, lengths: Iterable[int]) -> float:
    """FLOPs of one forward over rows of these lengths, the paper's count: sum of S F_fwd(S) with F_fwd(S) =
    2 [L (P_mlp + P_attn) + P_vocab] + 4 S L D_q (20, 21). A backward is twice as much (22)."""
    D, L, D_q = config.hidden_size, config.num_hidden_layers, config.num_attention_heads * config.head_dim
    p_mlp = 3 * D * config.intermediate_size
    p_attn = 2 * D * (D_q + config.num_key_value_heads * config.head_dim)   # D_q = D but for Qwen3
    p_vocab = 2 * config.vocab_size * D
    return float(sum(S * (2 * (L * (p_mlp + p_attn) + p_vocab) + 4 * S * L * D_q) for S in lengths))


def hardware_flops(config: ModelConfig, lengths: Iterable[int]) -> float:
    """FLOPs that the same forward costs a machine: no embedding product, and the causal half of the attention core."""
    lengths, D_q = list(lengths), config.num_attention_heads * config.head_dim
    unused = sum(2 * S * (config.vocab_size * config.hidden_size + S * config.num_hidden_layers * D_q) for S in lengths)
    return forward_flops(config, lengths) - unused


# ---- Hugging Face folders --------------------------------------------------------------------------------------------
def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a model folder, with config.json and *.safetensors")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:   # of the JSON or of its encoding
        raise ValueError(f"{path}: not readable as JSON ({error}); copy or write the file again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object; copy or write the file again")
    return content


def _refuse(raw: dict, path: Path) -> None:
    """Raise ValueError for what would change the computation and is not implemented."""
    family, kinds = raw.get("model_type"), set(raw.get("layer_types") or ())
    # Qwen's window is off unless switched on; Mistral's is on unless null, and 4096 where the key is missing
    window = raw.get("sliding_window", 4096) if family == "mistral" else raw.get("use_sliding_window")
    experts = [key for key in ("num_experts", "num_local_experts", "n_routed_experts") if raw.get(key)]
    refused = {
        f"mixture of experts (model_type {family!r})": experts or "moe" in str(family) or family == "mixtral",
        f"model_type {family!r}": family not in FAMILIES,
        "quantization_config": raw.get("quantization_config"),
        f"sliding_window {raw.get('sliding_window', 4096)}": window,
        f"layer_types {sorted(kinds)}": kinds - {"full_attention"},
        f"hidden_act {raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") != "silu",
    }
    for what, found in refused.items():
        if found:
            raise ValueError(f"{path}: {what} is not implemented; use a dense, unquantized model with full attention and "
                             f"silu, of model_type {', '.join(FAMILIES)}")


def _read_rope(raw: dict, path: Path) -> tuple[float, dict | None]:
    """Base and scaling, from rope_theta and rope_scaling (transformers 4) or from rope_parameters (5)."""
    given = [raw[key] for key in ("rope_parameters", "rope_scaling") if raw.get(key)]   # the later one wins
    flat = all(isinstance(rope, dict) and not any(isinstance(v, dict) for v in rope.values()) for rope in given)
    kinds = {rope.get("rope_type", rope.get("type", "default")) for rope in given} if flat else set()
    kind = kinds.pop() if kinds else None if given else "default"
    rope = {key: value for one in given for key, value in one.items()} if flat else {}
    part = raw.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0
    if kinds or kind not in ROPE_NUMBERS or part != 1.0:
        raise ValueError(f"{path}: rotary settings {given} are not implemented; use a model whose rope_type is one of "
                         f"{', '.join(ROPE_NUMBERS)}, the same in each layer and over the whole head")
    numbers = {key: rope.get(key) for key in ROPE_NUMBERS[kind]}
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    for key, value in {"rope_theta": theta, **numbers}.items():
        if not isinstance(value, (int, float)):
            raise ValueError(f"{path}: {key} is {value!r}; rope_type {kind} needs a number, copy it from the original model")
    return float(theta), {"rope_type": kind, **numbers} if numbers else None


def read_config(folder) -> ModelConfig:
    """config.json of a model folder, as transformers 4 or 5 spell it. Raises ValueError, naming the file, for a missing
    file or key and for every feature that is not implemented."""
    path = Path(folder) / "config.json"
    raw = _read_json(path)
    _refuse(raw, path)
    theta, scaling = _read_rope(raw, path)
    sizes = {"num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", *sizes):
        value = sizes[key] = raw.get(key, sizes.get(key))
        if value is None and key in ("num_key_value_heads", "head_dim"):
            continue   # derived from the other sizes; were that wrong, the weights' shapes would not fit
        if not isinstance(value, float if key == "rms_norm_eps" else int) or value <= 0:
            raise ValueError(f"{path}: {key} is {value!r}; write the positive number that the weights were made with")
    kind = raw["model_type"]
    bias = kind in ("qwen3", "llama") and bool(raw.get("attention_bias"))   # the others do not read the key
    try:
        return ModelConfig(
            model_type=kind, **sizes, rope_theta=theta, rope_scaling=scaling, raw=raw, qk_norm=kind == "qwen3",
            tie_word_embeddings=bool(raw.get("tie_word_embeddings")), attention_bias=bias or kind == "qwen2",
            output_bias=bias, mlp_bias=kind == "llama" and bool(raw.get("mlp_bias")),
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def config_dict(config: ModelConfig) -> dict:
    """A config.json that transformers 4 and 5 both read: the keys it was read with, and ours over them. Rotary settings
    and dtype are spelled as in version 4, which 5 still reads."""
    silent = {"architectures": [f"{config.model_type.title()}ForCausalLM"], "hidden_act": "silu", "sliding_window": None}
    others = {key: value for key, value in config.raw.items() if key not in ("rope_parameters", "dtype")}
    ours = {f.name: getattr(config, f.name) for f in fields(config)} | {"torch_dtype": config.dtype}
    # attention_bias in a file means all four projections; it is the name of another thing than our field
    ours["attention_bias"] = config.output_bias
    return silent | others | {key: ours[key] for key in ours if key not in ("raw", "dtype", "output_bias", "qk_norm")}


def _read_weights(folder: Path, dtype: torch.dtype, device) -> dict[str, Tensor]:
    """All weights of a folder by name, from model.safetensors or from the shards of its index."""
    files, index = [folder / "model.safetensors"], folder / "model.safetensors.index.json"
    if not files[0].is_file() and index.is_file():
        files = [folder / name for name in sorted(set(_read_json(index).get("weight_map", {}).values()))]
    elif not files[0].is_file():
        pickles = [path.name for kind in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(kind))]
        why = f"{pickles[0]} can run code when opened and is never read, convert it" if pickles else "add the weights"
        raise ValueError(f"{folder}: neither model.safetensors nor model.safetensors.index.json; {why}")
    weights = {}
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path}: no such file, but the index beside it names it; copy the missing shard")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                names = [name for name in file.keys() if not name.endswith("rotary_emb.inv_freq")]   # once stored, unused
                # Copies: the tensors are views of the mapped file, and saving over it would change the loaded model
                weights |= {name: file.get_tensor(name).to(dtype, copy=True) for name in names}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error}); copy it again") from None
    return weights


def _check_weights(weights: dict[str, Tensor], model: nn.Module, folder: Path) -> None:
    """Drop a head that repeats the tied embedding; raise ValueError unless names and shapes are the model's."""
    expected, fix = dict(model.named_parameters()), "weights and config.json must come from one checkpoint"
    if "lm_head.weight" in weights and "lm_head.weight" not in expected:
        head = weights.pop("lm_head.weight")
        if not torch.equal(head, weights.get("model.embed_tokens.weight", head)):
            raise ValueError(f"{folder}: lm_head.weight differs from the embedding; set tie_word_embeddings to false")
    missing, extra = (sorted(set(a) - set(b)) for a, b in ((expected, weights), (weights, expected)))
    if missing == ["lm_head.weight"]:
        fix = "set tie_word_embeddings to true if the embedding is the head"
    if missing or extra:
        raise ValueError(f"{folder}: the weights do not fit config.json, {len(missing)} missing {missing[:3]}, "
                         f"{len(extra)} unexpected {extra[:3]}; {fix}")
    for name, p in expected.items():
        if weights[name].shape != p.shape:
            shapes = f"shape {list(weights[name].shape)}, by config.json {list(p.shape)}"
            raise ValueError(f"{folder}: {name} has {shapes}; {fix}")


def load_model(folder, dtype: torch.dtype = torch.float32, device="cpu") -> Model:
    """The model of a Hugging Face folder, its weights cast to dtype on the device. Raises ValueError, naming the file,
    for what is missing, damaged or at odds with config.json."""
    folder = Path(folder)
    with torch.device("meta"):
        model = Model(read_config(folder))
    weights = _read_weights(folder, dtype, device)
    _check_weights(weights, model, folder)
    model.load_state_dict(weights, assign=True)
    return model


def save_model(model: Model, folder, dtype: torch.dtype | None = None, max_shard_bytes: float = 5e9) -> None:
    """Write the model as a Hugging Face folder in dtype (None = the parameters' own); without a cast it reads back bit
    for bit. Above max_shard_bytes the weights are cut into shards with an index. A tied head is left out."""
    folder, dtype, weights = Path(folder), dtype or model.head.dtype, dict(model.named_parameters())
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model*.safetensors*"):   # of an earlier save in other shards, which a loader might prefer
        old.unlink()
    shards, room = [[]], max_shard_bytes   # names by shard, in the model's order
    for name, w in weights.items():
        size = w.numel() * dtype.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    places = {}
    for i, names in enumerate(shards, 1):   # one shard at a time in memory
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        part = {name: weights[name].detach().to("cpu", dtype).contiguous() for name in names}
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(w.numel() for w in weights.values()) * dtype.itemsize}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    config = replace(model.config, dtype=str(dtype).removeprefix("torch."))
    (folder / "config.json").write_text(json.dumps(config_dict(config), indent=2), encoding="utf-8")
