"""One decode step for many rows: the network of model.py once more, laid out for sampling.

    with decoder_of(model) as decoder:
        cache = Cache(model.config, rows=8, slots=512)
        decoder.read(prompts, cache)                                  # (P, T) ids to slots 0..T-1 of rows 0..P-1
        logits = decoder.step(token, position, cache, top)            # (n,) and (n,), each row at its own -> (n, V)

Why twice: training needs modules, gradients and shards, and a step of n rows x one token needs few and fast operations.
Here one product makes q, k and v, one more gate and up, and one rotation turns q and k. A test holds both to equality.
1) On the CPU in fp32 the weights are laid out in panels of at most 256 columns, (N / 256, K, 256): MKL copies what it
multiplies by, and copies short rows that stand together faster. A step of 8 to 32 rows takes 15-25% less so, to the
same bits. The parameters are given up meanwhile and come back afterwards: there is never a second copy of the model.
2) Elsewhere (CUDA, bf16, FSDP2's gathered storage) the weights are used where they lie.
3) On CUDA a step is some 20 kernels a layer, each shorter than its launch. Graphs records the step once for each (rows,
attention length) and replays it in one launch. No GPU was at hand when this was written: the recorded function runs in
the tests, on the CPU, with the same padded rows; the recording itself has not run yet.
Shapes: n rows, T tokens, D hidden width, H query heads, Hkv key/value heads, K head width, V vocabulary.
"""

import math
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import UserError
from model import ModelConfig, head_logits, rotate

PANEL = 256  # columns; 192-320 measure alike, 512 and more lose half of the gain at 8 rows


class Cache:
    """Keys and values of `rows` sequences with `slots` positions each; k and v are lists over layers of tensors
    (rows, Hkv, slots, K). The token at position p of a row lives in slot p; used = 1 + the largest position written so
    far, and no more is ever read. Fresh slots are zero: a masked slot weighs 0, but 0 x NaN would still be NaN.
    Under torch.no_grad() only: writing in place would break a backward."""

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        slots: int,
        dtype: torch.dtype = torch.float32,
        device="cpu",
    ):
        shape = rows, config.num_key_value_heads, slots, config.head_dim
        self.k = [
            torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)
        ]
        self.v = [
            torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)
        ]
        self.rows, self.slots, self.used = rows, slots, 0

    def select(self, index: Tensor) -> "Cache":
        """Keep, repeat or reorder rows, in place: row i becomes what row index[i] was; index (n,) long. Returns the
        cache itself."""
        return self._rebuild(lambda old: old.index_select(0, index), len(index), self.slots)

    def grow(self, slots: int) -> "Cache":
        """Make room for positions 0..slots-1 (at least `used`), in place. Returns the cache itself."""
        return self._rebuild(lambda old: old, self.rows, slots)

    def put(self, rows: Tensor, source: "Cache", index: Tensor, slots: int) -> None:
        """Row rows[i] takes over positions 0..slots-1 of the source's row index[i]; both (n,) long. The source may be
        this cache, where no row is read after it was written."""
        for mine, other in zip(self.k + self.v, source.k + source.v):
            mine[:, :, :slots].index_copy_(0, rows, other[:, :, :slots].index_select(0, index))
        self.used = max(self.used, slots)

    def _rebuild(self, choose, rows: int, slots: int) -> "Cache":
        for tensors in (self.k, self.v):
            for i, old in enumerate(
                tensors
            ):  # tensor by tensor: the peak is one tensor above the result
                tensors[i] = old.new_zeros(rows, old.shape[1], slots, old.shape[3])
                tensors[i][:, :, : self.used] = choose(old[:, :, : self.used])
        self.rows, self.slots = rows, slots
        return self


class Matrix:
    """The weights (N_i, K) of several modules over one input, as one: x (n, K) -> (n, N), N = sum of N_i."""

    def __init__(self, modules: list, panels: bool, taken: list["Matrix"]):
        self.weights = [m.weight for m in modules]
        biases = [m.bias for m in modules if getattr(m, "bias", None) is not None]
        self.bias, self.panels = torch.cat(biases) if biases else None, None
        if panels:
            whole = (
                torch.cat([w.data for w in self.weights])
                if len(modules) > 1
                else self.weights[0].data
            )  # (N, K)
            self.sizes, N = [len(w) for w in self.weights], len(whole)
            wide = max((d for d in range(PANEL // 4, PANEL + 1) if N % d == 0), default=N)
            self.panels = (
                whole.view(-1, wide, whole.shape[1]).transpose(1, 2).contiguous()
            )  # (N / wide, K, wide)
            taken.append(self)  # from here on give_back() works
            for w in self.weights:
                w.data = w.data.new_empty(0)

    def give_back(self) -> None:
        """The parameters as they were, and no panels any more."""
        whole = self.panels.transpose(1, 2).contiguous().view(-1, self.panels.shape[1])
        self.panels = None
        for w, part in zip(self.weights, whole.split(self.sizes)):
            w.data = part.clone() if len(self.sizes) > 1 else part

    def __call__(self, x: Tensor) -> Tensor:
        if self.panels is None:
            y = (
                torch.cat([x @ w.T for w in self.weights], -1)
                if len(self.weights) > 1
                else x @ self.weights[0].T
            )
            return y if self.bias is None else y + self.bias
        P = self.panels
        if len(P) == 1:
            return x @ P[0] if self.bias is None else torch.addmm(self.bias, x, P[0])
        y = x.new_empty(len(x), len(P) * P.shape[2])
        torch.bmm(x.expand(len(P), *x.shape), P, out=y.view(len(x), len(P), -1).transpose(0, 1))
        return y if self.bias is None else y.add_(self.bias)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight, as an embedding: ids (n,) -> (n, K)."""
        if self.panels is None:
            return F.embedding(ids, self.weights[0])
        wide = self.panels.shape[2]
        return self.panels[ids // wide, :, ids % wide]


class Layer(NamedTuple):
    norm: Tensor
    qkv: Matrix
    qk_norm: Tensor | None  # (H + Hkv, K)
    out: Matrix
    mlp_norm: Tensor
    gate_up: Matrix
    down: Matrix


class Decoder:
    """The network for sampling. A decoder is made by decoder_of() and lives as long as its with-block."""

    def __init__(self, model, panels: bool, taken: list[Matrix]):
        c = self.config = model.config
        self.shape = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.angles, self.final_norm = model.angles, model.model.norm.weight
        self.device, self.dtype = model.head.device, model.head.dtype
        H, Hkv, K = self.shape

        def matrix(*modules):
            return Matrix(modules, panels, taken)

        self.layers = []
        for block in model.model.layers:
            a, mlp = block.self_attn, block.mlp
            norms = [block.post_attention_layernorm.weight]
            if c.post_norm:
                norms.append(block.post_feedforward_layernorm.weight)
            else:
                norms.insert(0, block.input_layernorm.weight)
            qk_norm = None
            if c.qk_norm:  # one head's weights for each of them, or all heads' own
                weights = (a.q_norm.weight.view(-1, K), a.k_norm.weight.view(-1, K))
                qk_norm = torch.cat((weights[0].expand(H, K), weights[1].expand(Hkv, K)))
            self.layers.append(
                Layer(
                    norms[0],
                    matrix(a.q_proj, a.k_proj, a.v_proj),
                    qk_norm,
                    matrix(a.o_proj),
                    norms[1],
                    matrix(mlp.gate_proj, mlp.up_proj),
                    matrix(mlp.down_proj),
                )
            )
        self.head = matrix(model.model.embed_tokens if c.tie_word_embeddings else model.lm_head)
        self.embed = self.head.rows if c.tie_word_embeddings else model.model.embed_tokens

    def read(self, ids: Tensor, cache: Cache) -> Tensor:
        """Prompts ids (B, T) into slots 0..T-1 of the cache's first B rows -> hidden (B, T, D). Causal along the row:
        what stands behind a prompt's last token is invisible to it, so ragged prompts are padded on the right."""
        B, T = ids.shape
        _check(cache, B, T)

        def attend(i, q, k, v):  # (B T, H or Hkv, K)
            q, k, v = (x.view(B, T, -1, x.shape[-1]).transpose(1, 2) for x in (q, k, v))
            cache.k[i][:B, :, :T], cache.v[i][:B, :, :T] = k, v
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            ).transpose(1, 2)

        return self._layers(
            ids.flatten(), torch.arange(T, device=ids.device).repeat(B), attend
        ).view(B, T, -1)

    def step(self, token: Tensor, position: Tensor, cache: Cache, top: int) -> Tensor:
        """token, position (n,) -> logits (n, V) in fp32. Row i's keys and values are written at slot position[i], and
        its query sees the slots 0..position[i]; top is greater than all positions, and no slot beyond it is read."""
        n, (H, Hkv, K) = len(token), self.shape
        _check(cache, n, top)
        rows = torch.arange(n, device=token.device)
        seen = (
            torch.arange(top, device=token.device) <= position[:, None, None, None]
        )  # (n, 1, 1, top)
        # added to the scores: from booleans, every layer would make these numbers again
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=token.device).masked_fill_(
            ~seen, -math.inf
        )

        def attend(i, q, k, v):
            cache.k[i][rows, :, position] = k
            cache.v[i][rows, :, position] = v
            # the query heads that share a key head are laid along the query axis: the cache is read once, never copied
            return F.scaled_dot_product_attention(
                q.reshape(n, Hkv, H // Hkv, K),
                cache.k[i][:n, :, :top],
                cache.v[i][:n, :, :top],
                attn_mask=mask,
            )

        return self.logits(self._layers(token, position, attend))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (n, D) -> (n, V) in fp32."""
        return (
            self.head(hidden)
            if self.head.panels is not None
            else head_logits(hidden, self.head.weights[0])
        )

    def _layers(self, ids: Tensor, position: Tensor, attend) -> Tensor:
        """ids, position (N,) -> hidden (N, D)."""
        N, (H, Hkv, K) = len(ids), self.shape
        x = self.embed(ids)
        cos, sin = self.angles(position, x.dtype)  # (N, 1, K)
        post = self.config.post_norm
        rotary = self.config.rotary_layers or [True] * len(self.layers)
        for i, layer in enumerate(self.layers):
            heads = layer.qkv(x if post else self._norm(x, layer.norm)).view(N, H + 2 * Hkv, K)
            qk, v = heads[:, : H + Hkv], heads[:, H + Hkv :]
            if layer.qk_norm is not None:
                qk = self._norm(qk, layer.qk_norm)
            if rotary[i]:
                qk = rotate(qk, cos, sin)
            y = layer.out(attend(i, qk[:, :H], qk[:, H:], v).reshape(N, H * K))
            x = x + (self._norm(y, layer.norm) if post else y)
            gate, up = layer.gate_up(x if post else self._norm(x, layer.mlp_norm)).chunk(2, -1)
            y = layer.down(F.silu(gate).mul_(up))
            x = x + (self._norm(y, layer.mlp_norm) if post else y)
        return self._norm(x, self.final_norm)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        eps = self.config.rms_norm_eps
        if weight.ndim == 1:
            return F.rms_norm(x, x.shape[-1:], weight, eps)
        wide = x.float()
        if self.config.joint_qk_norm:  # over all heads of q, and over all of k
            parts = [F.rms_norm(y, y.shape[1:], eps=eps) for y in wide.split(self.shape[:2], 1)]
            normed = torch.cat(parts, 1)
        else:
            normed = F.rms_norm(wide, x.shape[-1:], eps=eps)
        return (weight.float() * normed).to(x.dtype)  # rounded once, as there


def _check(cache: Cache, rows: int, top: int) -> None:
    if rows > cache.rows or top > cache.slots:
        raise UserError(
            f"{rows} rows up to position {top - 1} do not fit a cache of {cache.rows} rows x "
            f"{cache.slots} slots; select() the rows or grow() the slots first"
        )
    cache.used = max(cache.used, top)


@contextmanager
def decoder_of(model):
    """The model's Decoder. FSDP2: all parameters are gathered for the with-block, so that no step communicates and the
    processes may take unequal numbers of steps. Whatever ends the block, the model is then as it was."""
    sharded = [m for m in model.modules() if hasattr(m, "unshard")]
    taken: list[Matrix] = []
    try:
        for m in sharded:
            m.set_reshard_after_forward(False, recurse=False)
            m.unshard()
        head = model.head
        yield Decoder(
            model, not sharded and head.device.type == "cpu" and head.dtype == torch.float32, taken
        )
    finally:
        while taken:
            taken.pop().give_back()
        for m in sharded:
            m.set_reshard_after_forward(
                m is not model, recurse=False
            )  # the head is used after the model's forward
            m.reshard()


class Graphs:
    """Functions recorded as CUDA graphs, by key. A function runs as it is the first time, so that libraries allocate
    what they need, is recorded the second time and replayed from then on. It must return nothing, write its results in
    place into tensors that outlive it, and ask the device nothing. On the CPU it is simply called."""

    def __init__(self, device: torch.device):
        self.on = device.type == "cuda"
        self.forget()

    def run(self, key, function) -> None:
        if not self.on or key not in self.graphs:
            self.graphs[key] = None
            function()
            return
        if self.graphs[key] is None:
            self.graphs[key] = torch.cuda.CUDAGraph()
            # runs nothing; what other threads ask of the device meanwhile is no business of the recording's
            with torch.cuda.graph(
                self.graphs[key], pool=self.pool, capture_error_mode="thread_local"
            ):
                function()
        self.graphs[key].replay()

    def forget(self) -> None:
        """To be called where a tensor that the functions use was replaced."""
        self.graphs: dict = {}
        self.pool = (
            torch.cuda.graph_pool_handle() if self.on else None
        )  # scratch memory that all graphs share
