"""The decoder: a Hugging Face folder in, hidden states and token log-probs out, the same folder back.

One pre-norm transformer covers Qwen2 / Qwen2.5, Qwen3, Llama 2 / 3.x, SmolLM2 and Mistral checkpoints; they differ by
fields of ModelConfig (folder.py, which also refuses by name what is not implemented here).
  1) Parameters carry Hugging Face's names, so folders are read and written without renaming and without transformers.
  2) Rotary angles come from the positions at each forward and are never stored: nothing to refill after a start on the
     meta device, no length limit. Norms, angles and log-probs are taken in fp32 whatever the weights are.
  3) Causality is by position. Rows are padded on the right, so neither training nor decoding needs a padding mask: what
     stands behind a row's last token is invisible to it, in the row and in the cache.
  4) The logits (B, T, V) are never held: forward() ends at the hidden states, token_logp() takes the head in chunks.
  5) # differs: no dropout; attention_dropout in a config.json is not read.

    model = load_model("runs/sft/checkpoints/step_000400")      # or init_model(ModelConfig(...), seed=0)
    hidden = model(ids)                                         # (B, T, D)
    logp = token_logp(hidden[:, :-1], model.head, ids[:, 1:])   # (B, T-1) nats

Shapes: B rows, T tokens, V vocabulary, D hidden width, H query heads, Hkv key/value heads, K head width, L layers,
N = tokens of all rows in one list, n = a chunk of them.
"""

import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from core import ranks
from core.folder import ModelConfig, config_dict, read_config, read_weights, write_folder

__all__ = [
    "ModelConfig",
    "read_config",
    "config_dict",
    "Model",
    "init_model",
    "load_model",
    "save_model",
    "head_logits",
    "token_logp",
    "sum_logp",
    "response_logp",
    "response_logp_sum",
    "forward_flops",
    "hardware_flops",
]
CHUNK_LOGITS = (
    2**25
)  # logits held at once: 128 MB in fp32, 220 tokens of Qwen's 152k vocabulary. On CUDA 8 times as
# many, since each chunk is one more pass over the head's gradient
PIECE_LOGITS = 2**20  # of them worked on at once on the CPU: 4 MB, about a core's cache


# ---- the network -----------------------------------------------------------------------------------------------------
def rope_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each rotated pair, (K/2,) fp32 on the CPU. "linear" divides all of them by the factor;
    "llama3" only those too slow to turn low_freq_factor times within the original context, with a ramp up to
    high_freq_factor turns (Llama 3.1)."""
    exponents = (
        torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float()
        / config.head_dim
    )
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
    return (
        1 - keep
    ) * slow + keep * fast  # exact at both ends, so far positions do not drift from transformers'


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs by their angles: x (B, T, H, K); cos, sin (B or 1, T, 1, K), the first half of sin negated. Hugging
    Face pairs x[i] with x[i + K/2]; rolling by K/2 swaps the halves, so this takes three operations."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        # One operation, in fp32, rounded once: on CUDA it keeps x and a number a row, and no normalised values
        # differs: transformers rounds before it multiplies by the weight, which shows in bf16 only
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        D, H, Hkv, K = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.shape = H, Hkv, K
        self.q_proj = nn.Linear(D, H * K, bias=config.attention_bias)
        self.k_proj = nn.Linear(D, Hkv * K, bias=config.attention_bias)
        self.v_proj = nn.Linear(D, Hkv * K, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * K, D, bias=config.output_bias)  # H K differs from D in Qwen3
        self.q_norm = RMSNorm(K, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(K, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, D = x.shape
        H, Hkv, K = self.shape
        q = rotate(self.q_norm(self.q_proj(x).view(B, T, H, K)), cos, sin)
        k = rotate(self.k_norm(self.k_proj(x).view(B, T, Hkv, K)), cos, sin)
        v = self.v_proj(x).view(B, T, Hkv, K)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if (
            q.is_cuda and q.dtype == torch.float32
        ):  # no fused kernel of CUDA shares key heads in fp32
            k, v = (x.repeat_interleave(H // Hkv, 1) for x in (k, v))
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=k.shape[1] < H
        )  # (B, H, T, K)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, H * K))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(D, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, D, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if (
            not torch.is_grad_enabled() or torch.compiler.is_compiling()
        ):  # the compiler decides for itself
            return self._join(gate, up)
        # Their product is made again in backward (the matrix product behind it is not): half of the MLP's activations
        return checkpoint(self._join, gate, up, use_reentrant=False, preserve_rng_state=False)

    def _join(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """One layer. Called with tensors only, so that it can be sharded, recomputed or compiled on its own."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.recompute = False  # keep only x for the backward, and run the block once more there
        self.compiled = None  # what runs, if not _run itself

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        run = self.compiled or self._run
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(run, x, cos, sin, use_reentrant=False, preserve_rng_state=False)
        return run(x, cos, sin)

    def _run(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    """ids (B, T) -> hidden (B, T, D). Parameters have Hugging Face's names; lm_head only where it is not tied."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            dict(
                embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
                layers=nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
                norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
            )
        )
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.inv_freq = rope_frequencies(
            config
        )  # no buffer: not saved or sharded, real while the rest is on meta

    @property
    def head(self) -> Tensor:
        """The output matrix (V, D)."""
        return (
            self.model.embed_tokens.weight
            if self.config.tie_word_embeddings
            else self.lm_head.weight
        )

    def forward(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """ids (B, T) long, positions (B or 1, T) long (None: 0..T-1 in each row) -> hidden (B, T, D) after the final
        norm. Attention is causal along the row; positions only turn the angles."""
        places = (
            torch.arange(ids.shape[1], device=ids.device)[None] if positions is None else positions
        )
        x = self.model.embed_tokens(ids)  # (B, T, D)
        cos, sin = self.angles(places, x.dtype)
        for block in self.model.layers:
            x = block(x, cos, sin)
        return self.model.norm(x)

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions (B or 1, T) -> cos and sin (B or 1, T, 1, K) for rotate()."""
        if self.inv_freq.device != positions.device:
            self.inv_freq = self.inv_freq.to(positions.device)
        angles = positions[..., None, None].float() * self.inv_freq  # (B or 1, T, 1, K/2)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def _build(
    config: ModelConfig, values: Iterator[tuple[str, Tensor]], dtype: torch.dtype, device, shard
) -> Model:
    """A model with these (name, rows) as parameters. It begins on the meta device, so that neither memory nor time goes
    into weights that are replaced at once, and so that a process never holds more than its rows of a sharded one."""
    with torch.device("meta"):
        model = Model(config).to(dtype)
    if shard:
        shard(model)
    model.to_empty(device=device)
    params = dict(model.named_parameters())
    with torch.no_grad():
        for name, rows in values:
            ranks.local(params[name]).copy_(rows)
    return model


def init_model(config: ModelConfig, seed: int, device="cpu", shard=None) -> Model:
    """A fresh fp32 model: matrices normal(0, 0.02), norms 1, biases 0, drawn from a generator of its own. shard: as in
    load_model; every process draws all numbers and keeps its own, so their number changes nothing."""
    generator = torch.Generator().manual_seed(seed)

    def drawn():
        for name, shape in _shapes(config).items():
            first, end = ranks.rows_of(shape[0], shard is not None)
            if len(shape) == 2:
                yield name, torch.empty(shape).normal_(0, 0.02, generator=generator)[first:end]
            else:
                yield name, torch.full((end - first,), 0.0 if name.endswith("bias") else 1.0)

    return _build(config, drawn(), torch.float32, device, shard)


def _shapes(config: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in Model(config).named_parameters()}


# ---- token log-probs -------------------------------------------------------------------------------------------------
def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a (n, m) @ b (m, k) in fp32 (float64 for float64), written into out where one is given. On CUDA a half-precision
    product keeps its fp32 accumulator; the CPU has no such kernel and rounds once to the input's type, as the logits of
    transformers are."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    product = torch.mm(a, b).float()
    return product if out is None else out.copy_(product)


def head_logits(hidden: Tensor, head: Tensor, temperature: float = 1.0) -> Tensor:
    """hidden (N, D), head (V, D) -> logits (N, V) over the temperature, fp32. A sampler that draws from these draws
    from exactly the distribution that token_logp() scores."""
    logits = _product(hidden, head.to(hidden.dtype).T)
    return logits if temperature == 1.0 else logits / temperature


def _chunks(hidden: Tensor, head: Tensor, temperature: float, chunk: int):
    """(slice s, log_p (n, V) of its tokens, fp32) of all tokens in turn. One buffer is filled again and again: pages
    that a fresh one of 128 MB would have to be given by the system cost as much as the arithmetic on it."""
    N, V = len(hidden), len(head)
    buffer = hidden.new_empty(
        min(chunk, N), V, dtype=torch.promote_types(hidden.dtype, torch.float32)
    )
    for s in (slice(i, min(i + chunk, N)) for i in range(0, N, chunk)):
        logits = _product(hidden[s], head.T, buffer[: s.stop - s.start])
        for (piece,) in _pieces(logits):
            piece.copy_(F.log_softmax(piece if temperature == 1.0 else piece.div_(temperature), -1))
        yield s, logits


def _pieces(*tensors: Tensor):
    """Views of the same few rows of all tensors in turn; the first is (n, V). On the CPU several operations after one
    another then find their numbers in the cache; CUDA takes all rows at once."""
    n, V = tensors[0].shape
    return zip(*(x.split(max(1, n if x.is_cuda else PIECE_LOGITS // V)) for x in tensors))


def _head_gradients(
    d_logits: Tensor, hidden: Tensor, head: Tensor, d_hidden: Tensor | None, d_head: Tensor | None
):
    """Through logits = hidden head^T for some tokens: d_hidden (n, D) is written, d_head (V, D) fp32 is added to."""
    d_logits = d_logits.to(hidden.dtype)  # (n, V)
    if d_hidden is not None:
        d_hidden.copy_(d_logits @ head)
    if d_head is not None and d_head.dtype == d_logits.dtype:
        d_head.addmm_(d_logits.T, hidden)
    elif d_head is not None:
        d_head += _product(d_logits.T, hidden)


class _TokenLogp(torch.autograd.Function):
    """token_logp() on flat inputs. Between forward and backward the inputs, two numbers a token and the last chunk's
    log-probs are kept: backward begins with that chunk, at whose side it needs the memory anyway, and computes the
    others' logits a second time. A micro-batch of one chunk computes no logits twice."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        temperature: float,
        chunk: int,
        entropy: bool,
    ):
        N, work = len(hidden), head.to(hidden.dtype)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logp, spread = (
            torch.zeros(N, dtype=wide, device=hidden.device) for _ in range(2)
        )  # (N,) each
        log_p = s = None
        for s, log_p in _chunks(hidden, work, temperature, chunk):
            logp[s] = log_p.gather(1, targets[s, None])[:, 0]
            if entropy:  # H = -sum p log p
                spread[s] = -torch.cat(
                    [(piece.exp() * piece).sum(-1) for (piece,) in _pieces(log_p)]
                )
        ctx.save_for_backward(hidden, head, targets, spread)
        ctx.settings, ctx.last = (temperature, chunk, entropy), (s, log_p) if N else None
        if not entropy:
            ctx.mark_non_differentiable(spread)
        return logp, spread

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logp: Tensor, g_entropy: Tensor):
        hidden, head, targets, spread = ctx.saved_tensors
        temperature, chunk, entropy = ctx.settings
        work = head.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_head = (
            torch.zeros_like(head, dtype=spread.dtype) if ctx.needs_input_grad[1] else None
        )  # summed in fp32

        def add(s: slice, log_p: Tensor) -> None:
            """dlogp/dz_j = [j = target] - p_j and dH/dz_j = -p_j (log p_j + H), z = logits / temperature."""
            g = g_logp[s, None] / temperature
            if entropy:
                for piece, H, g_H, own in _pieces(
                    log_p, spread[s, None], g_entropy[s, None] / temperature, g
                ):
                    p = piece.exp()
                    piece.add_(H).mul_(-g_H).sub_(own).mul_(p)
            else:
                log_p.exp_().mul_(-g)
            log_p.scatter_add_(1, targets[s, None], g)
            _head_gradients(
                log_p, hidden[s], work, None if d_hidden is None else d_hidden[s], d_head
            )

        first, ctx.last = (
            ctx.last,
            None,
        )  # used up: a second backward through this graph computes all logits again
        if first is not None:
            add(*first)
            hidden = hidden[: first[0].start]
            del first  # its memory serves the next chunk
        for s, log_p in _chunks(hidden, work, temperature, chunk):
            add(s, log_p)
        return d_hidden, None if d_head is None else d_head.to(head.dtype), None, None, None, None


class _SumLogp(torch.autograd.Function):
    """sum_logp() on flat inputs: a sum's gradient is known before backward, so it is made while the logits exist."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, chunk: int, learning: bool):
        work, total = (
            head.to(hidden.dtype),
            torch.zeros((), dtype=torch.float64, device=hidden.device),
        )
        wide = torch.promote_types(hidden.dtype, torch.float32)
        d_hidden = torch.empty_like(hidden) if learning and ctx.needs_input_grad[0] else None
        d_head = (
            torch.zeros_like(head, dtype=wide) if learning and ctx.needs_input_grad[1] else None
        )  # fp32 sum
        for s, log_p in _chunks(hidden, work, 1.0, chunk):
            total += log_p.gather(1, targets[s, None]).sum(dtype=torch.float64)
            if d_hidden is not None or d_head is not None:
                d_logits = log_p.exp_().neg_()
                d_logits.scatter_add_(
                    1, targets[s, None], torch.ones_like(targets[s, None], dtype=wide)
                )
                _head_gradients(
                    d_logits, hidden[s], work, None if d_hidden is None else d_hidden[s], d_head
                )
        ctx.save_for_backward(d_hidden, d_head)
        ctx.head_type = head.dtype
        return total.to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        d_hidden, d_head = (
            ctx.saved_tensors
        )  # scaled in place: a second backward through one graph is refused anyway
        return (
            None if d_hidden is None else d_hidden.mul_(g),
            None if d_head is None else d_head.mul_(g).to(ctx.head_type),
            None,
            None,
            None,
        )


def chunk_tokens(hidden: Tensor, head: Tensor) -> int:
    """Tokens whose logits are held at once."""
    return max(1, CHUNK_LOGITS * (8 if hidden.is_cuda else 1) // head.shape[0])


def token_logp(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    chunk: int | None = None,
    entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of each target under softmax(hidden head^T / temperature), without holding the logits of all tokens.

    | hidden  | (..., D) | the model's output, of any float type                                                |
    | head    | (V, D)   | cast to hidden's type where it differs; its gradient is summed in fp32               |
    | targets | (...)    | token ids                                                                            |
    | chunk   | tokens   | taken at once; None = as many as keep their logits below 128 MB (CUDA: 1 GB)         |
    | returns | (...)    | logp, or with entropy=True the pair (logp, entropy): nats, fp32, both differentiable |

    The peak is one (chunk, V) tensor, plus the head's gradient in backward."""
    chunk, flat = (
        chunk or chunk_tokens(hidden, head),
        hidden.reshape(-1, hidden.shape[-1]),
    )  # (N, D)
    logp, spread = _TokenLogp.apply(flat, head, targets.reshape(-1), temperature, chunk, entropy)
    return (
        (logp.view(targets.shape), spread.view(targets.shape))
        if entropy
        else logp.view(targets.shape)
    )


def sum_logp(hidden: Tensor, head: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """token_logp(...).sum() as a scalar, with each chunk's logits computed once instead of twice: all that a loss needs
    in which every token weighs the same."""
    chunk, flat = (
        chunk or chunk_tokens(hidden, head),
        hidden.reshape(-1, hidden.shape[-1]),
    )  # (N, D)
    return _SumLogp.apply(flat, head, targets.reshape(-1), chunk, torch.is_grad_enabled())


def _trained(model: Model, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the tokens that mask (B, T) trains: the hidden states that choose them (n, D), their ids (n,) and the mask of
    each row moved left (B, R). Positions that nobody trains never reach the head."""
    picked = mask[:, 1:]  # the state at t - 1 chooses token t
    at, lengths = picked.flatten().nonzero()[:, 0], picked.sum(1)
    chosen = torch.arange(int(lengths.max()), device=mask.device) < lengths[:, None]
    at, chosen = (
        at.to(ids.device),
        chosen.to(ids.device),
    )  # a mask on the CPU: nobody waited for the device
    hidden = model(ids)[:, :-1].flatten(0, 1).index_select(0, at)  # (n, D)
    return hidden, ids[:, 1:].flatten()[at], chosen


def response_logp(
    model: Model, ids: Tensor, mask: Tensor, temperature: float = 1.0, entropy: bool = False
):
    """Log-probs of each row's trained tokens, moved left: logp (B, R), entropy (B, R) or None, chosen (B, R) bool.

    ids, mask (B, T), mask True where the model chose the token; R = most such tokens of a row. chosen is False, and the
    values 0, behind a row's last one."""
    hidden, targets, chosen = _trained(model, ids, mask)
    values = token_logp(hidden, model.head, targets, temperature, entropy=entropy)
    logp, *rest = (
        torch.zeros(chosen.shape, device=ids.device).masked_scatter(chosen, v)
        for v in (values if entropy else [values])
    )
    return logp, rest[0] if entropy else None, chosen


def response_logp_sum(model: Model, ids: Tensor, mask: Tensor) -> Tensor:
    """Scalar: the sum of response_logp's log-probs at temperature 1, for a loss that weighs all tokens alike."""
    hidden, targets, _ = _trained(model, ids, mask)
    return sum_logp(hidden, model.head, targets)


# ---- compute ---------------------------------------------------------------------------------------------------------
def forward_flops(config: ModelConfig, lengths: Iterable[int]) -> float:
    """FLOPs of one forward over rows of these lengths, the paper's count: sum of S F_fwd(S) with F_fwd(S) =
    2 [L (P_mlp + P_attn) + P_vocab] + 4 S L D_q (20, 21). A backward is twice as much (22)."""
    D, L, D_q = (
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads * config.head_dim,
    )
    p_mlp = 3 * D * config.intermediate_size
    p_attn = 2 * D * (D_q + config.num_key_value_heads * config.head_dim)  # D_q = D but for Qwen3
    p_vocab = 2 * config.vocab_size * D
    return float(sum(S * (2 * (L * (p_mlp + p_attn) + p_vocab) + 4 * S * L * D_q) for S in lengths))


def hardware_flops(config: ModelConfig, lengths: Iterable[int]) -> float:
    """FLOPs that the same forward costs a machine: no embedding product, and the causal half of the attention core."""
    lengths, D_q = list(lengths), config.num_attention_heads * config.head_dim
    unused = sum(
        2 * S * (config.vocab_size * config.hidden_size + S * config.num_hidden_layers * D_q)
        for S in lengths
    )
    return forward_flops(config, lengths) - unused


# ---- Hugging Face folders --------------------------------------------------------------------------------------------
def load_model(folder, dtype: torch.dtype = torch.float32, device="cpu", shard=None) -> Model:
    """The model of a Hugging Face folder, its weights cast to dtype on the device. shard(model): makes the parameters
    of the empty model sharded (ranks.shard); each process then reads its rows only. Raises ValueError, naming the file,
    for what is missing, damaged, at odds with config.json or not implemented."""
    config = read_config(folder)
    rows = read_weights(folder, _shapes(config), lambda n: ranks.rows_of(n, shard is not None))
    return _build(config, rows, dtype, device, shard)


def save_model(
    model: Model, folder, dtype: torch.dtype | None = None, max_shard_bytes: float = 5e9
) -> None:
    """Write the model as a Hugging Face folder, in dtype (None = the parameters' own): without a cast it reads back bit
    for bit. Above max_shard_bytes the weights are cut into shards with an index. A tied head is left out. All processes
    of a sharded model call it, and the first one writes."""
    write_folder(
        folder,
        model.config,
        dict(model.named_parameters()),
        dtype or model.head.dtype,
        max_shard_bytes,
        ranks.whole,
        ranks.rank() == 0,
    )
