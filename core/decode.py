"""One decode step for many rows: the network of model.py, laid out for sampling.

    with decoder_of(model) as decoder:
        cache = Cache(model.config, rows=8, slots=512)
        decoder.read(prompts, cache)  # (B, T) ids into slots 0..T-1 of rows 0..B-1
        logits = decoder.step(token, position, cache, top)  # (n,), (n,) -> (n, V)

Training needs modules, gradients and shards; a step of n rows with one token each needs few, fast
operations. Here one product computes q, k and v, another one gate and up, and one rotation turns
q and k. A test compares the logits with those of model.py.

Where the weights are:
  CPU, fp32   in panels (class Matrix). The parameters are empty meanwhile and are restored
              afterwards, so there is never a second copy of the model.
  elsewhere   (CUDA, bf16, parameters gathered by FSDP2) where the model has them.
On CUDA a layer takes about 20 kernels, each shorter than its launch. Graphs records a step once
for each (rows, attention length) and then replays it in one launch.

Shapes: B or n rows, T tokens, D width, V vocabulary, H query heads, Hkv key/value heads, K head
width.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.softmax import head_logits
from model import ModelConfig, rotate

MAX_GRAPHS = 64  # recorded at once
GRAPH_BYTES = 2**16  # allowed per layer of a recorded step, apart from the shared scratch
PANEL = 256  # columns; 192 to 320 take equally long, 512 lose half of the gain at 8 rows


class Cache:
    """Keys and values of `rows` sequences with `slots` positions each.

    k and v are lists over layers of tensors (rows, Hkv, slots, K). The token at position p of a row
    has slot p. used = 1 + the largest position written so far; nothing beyond it is read. New slots
    are zero: a masked slot has weight 0, but 0 x NaN would be NaN. For use under torch.no_grad().
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        slots: int,
        dtype: torch.dtype = torch.float32,
        device="cpu",
    ):
        shape = (rows, config.num_key_value_heads, slots, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.rows = rows
        self.slots = slots
        self.used = 0

    def resize(self, rows: int, slots: int) -> None:
        """Change the size in place. The first rows keep their positions below `used`."""
        assert self.used <= slots, f"positions up to {self.used - 1} do not fit {slots} slots"
        kept = min(rows, self.rows)
        for tensors in (self.k, self.v):
            for i, old in enumerate(tensors):  # in turn: only one tensor exists in both sizes
                new = old.new_zeros(rows, old.shape[1], slots, old.shape[3])
                new[:kept, :, : self.used] = old[:kept, :, : self.used]
                tensors[i] = new
        self.rows = rows
        self.slots = slots

    def put(self, rows: Tensor, source: "Cache", index: Tensor, slots: int) -> None:
        """Copy positions 0..slots-1 of the source's rows index (n,) to rows (n,) of this cache.

        The source may be this cache itself.
        """
        for mine, other in zip(self.k + self.v, source.k + source.v):
            mine[:, :, :slots].index_copy_(0, rows, other[:, :, :slots].index_select(0, index))
        self.used = max(self.used, slots)


@dataclass
class Matrix:
    """The weights (N_i, K) of modules with the same input as one matrix: x (n, K) -> (n, N).

    N is the sum of N_i. Panels are the weights as (N / 256, K, 256): MKL copies what it multiplies
    by, and short rows that are stored together are copied faster. A step of a 39M model with a
    vocabulary of 32,000 takes 10 to 18% less CPU time, most of it in the head.
    """

    modules: list[nn.Module]
    panels: Tensor | None = None
    bias: Tensor | None = None  # (N,) of the panels

    def lay_out(self) -> None:
        """Move the weights into panels. Until give_back() the parameters are empty."""
        weights = [m.weight.data for m in self.modules]
        biases = [m.bias for m in self.modules if getattr(m, "bias", None) is not None]
        whole = torch.cat(weights) if len(weights) > 1 else weights[0]  # (N, K)
        N, K = whole.shape
        width = max((d for d in range(PANEL // 4, PANEL + 1) if N % d == 0), default=N)
        self.bias = torch.cat(biases) if biases else None
        self.panels = whole.view(-1, width, K).transpose(1, 2).contiguous()  # (N / width, K, width)
        for m in self.modules:
            m.weight.data = whole.new_empty(0, K)

    def give_back(self) -> None:
        """Restore the parameters from the panels, if there are any."""
        if self.panels is None:
            return
        whole = self.panels.transpose(1, 2).contiguous().view(-1, self.panels.shape[1])  # (N, K)
        self.panels = None
        if len(self.modules) == 1:
            self.modules[0].weight.data = whole
            return
        sizes = [m.out_features for m in self.modules]
        for m, part in zip(self.modules, whole.split(sizes)):
            m.weight.data = part.clone()

    def __call__(self, x: Tensor) -> Tensor:
        if self.panels is None:
            parts = [m(x) for m in self.modules]
            return torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        if len(self.panels) == 1:
            panel = self.panels[0]
            return x @ panel if self.bias is None else torch.addmm(self.bias, x, panel)
        P, K, width = self.panels.shape
        n = len(x)
        y = x.new_empty(n, P * width)
        out = y.view(n, P, width).transpose(0, 1)  # each panel writes its own columns
        torch.bmm(x.expand(P, n, K), self.panels, out=out)
        return y if self.bias is None else y.add_(self.bias)

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the matrix, for an embedding that is also the head: ids (n,) -> (n, K)."""
        if self.panels is None:
            return F.embedding(ids, self.modules[0].weight)
        width = self.panels.shape[2]
        return self.panels[ids // width, :, ids % width]


class Layer(NamedTuple):
    norm: Tensor
    qkv: Matrix
    qk_norm: Tensor | None  # (H + Hkv, K) fp32
    out: Matrix
    mlp_norm: Tensor
    gate_up: Matrix
    down: Matrix


class Decoder:
    """The network for sampling. decoder_of() makes one; it is valid inside that with-block."""

    def __init__(self, model):
        config = model.config
        self.config = config
        self.shape = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self.device = model.head.device
        self.dtype = model.head.dtype
        self.angles = model.angles
        self.final_norm = model.model.norm.weight
        tied = config.tie_word_embeddings
        self.head = Matrix([model.model.embed_tokens if tied else model.lm_head])
        self.embed = self.head.embed if tied else model.model.embed_tokens
        self.matrices = [self.head]
        self.layers = []
        H, Hkv, K = self.shape
        for block in model.model.layers:
            attention = block.self_attn
            mlp = block.mlp
            norm = block.post_attention_layernorm if config.post_norm else block.input_layernorm
            mlp_norm = block.post_attention_layernorm
            if config.post_norm:
                mlp_norm = block.post_feedforward_layernorm
            qk_norm = None
            if config.qk_norm:  # one head's weights for each of them, or all heads' own
                q_norm = attention.q_norm.weight.view(-1, K).expand(H, K)
                k_norm = attention.k_norm.weight.view(-1, K).expand(Hkv, K)
                qk_norm = torch.cat((q_norm, k_norm)).float()
            layer = Layer(
                norm.weight,
                Matrix([attention.q_proj, attention.k_proj, attention.v_proj]),
                qk_norm,
                Matrix([attention.o_proj]),
                mlp_norm.weight,
                Matrix([mlp.gate_proj, mlp.up_proj]),
                Matrix([mlp.down_proj]),
            )
            self.layers.append(layer)
            self.matrices += [layer.qkv, layer.out, layer.gate_up, layer.down]

    def read(self, ids: Tensor, cache: Cache) -> Tensor:
        """Prompts ids (B, T) into slots 0..T-1 of the cache's first B rows -> hidden (B, T, D).

        Attention is causal along the row: no token of a prompt sees what follows the prompt, so
        prompts of unequal length are padded on the right.
        """
        B, T = ids.shape
        position = torch.arange(T, device=ids.device).expand(B, T)
        hidden = self._layers(ids, position, cache, T)
        return hidden.view(B, T, -1)

    def step(self, token: Tensor, position: Tensor, cache: Cache, top: int) -> Tensor:
        """token, position (n,) -> logits (n, V) in fp32, one more token of each row.

        The keys and values of row i are written to slot position[i], and its query sees the slots
        0..position[i]. top is greater than all positions; no slot from top on is read.
        """
        slots = torch.arange(top, device=token.device)
        unseen = slots > position[:, None, None, None]  # (n, 1, 1, top)
        # Added to the scores: a boolean mask would be converted in every layer.
        mask = torch.zeros(unseen.shape, dtype=self.dtype, device=token.device)
        mask.masked_fill_(unseen, -math.inf)
        return self.logits(self._layers(token[:, None], position[:, None], cache, top, mask))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (n, D) -> (n, V) in fp32."""
        if self.head.panels is not None:
            return self.head(hidden)
        return head_logits(hidden, self.head.modules[0].weight)

    def _layers(
        self, ids: Tensor, position: Tensor, cache: Cache, top: int, mask: Tensor | None = None
    ) -> Tensor:
        """ids, position (B, T) -> hidden (B T, D). Without a mask: causal among the T tokens."""
        B, T = ids.shape
        H, Hkv, K = self.shape
        eps = self.config.rms_norm_eps
        assert B <= cache.rows and top <= cache.slots, (
            f"{B} rows up to position {top - 1} do not fit a cache of "
            f"{cache.rows} rows x {cache.slots} slots"
        )
        cache.used = max(cache.used, top)
        rows = torch.arange(B, device=ids.device)[:, None]
        x = self.embed(ids.flatten())  # (B T, D)
        D = x.shape[1:]
        post = self.config.post_norm  # norms behind attention and MLP instead of before them
        rotary = self.config.rotary_layers or [True] * len(self.layers)
        cos, sin = self.angles(position.flatten(), x.dtype)  # (B T, 1, K)
        for i, layer in enumerate(self.layers):
            normed = x if post else F.rms_norm(x, D, layer.norm, eps)
            heads = layer.qkv(normed).view(B * T, H + 2 * Hkv, K)
            qk = heads[:, : H + Hkv]
            if layer.qk_norm is not None:  # in fp32, rounded once, as in model.py
                qk = (layer.qk_norm * self._normed_heads(qk.float())).to(x.dtype)
            if rotary[i]:
                qk = rotate(qk, cos, sin)
            q = qk[:, :H].view(B, T, H, K)
            k = qk[:, H:].view(B, T, Hkv, K)
            v = heads[:, H + Hkv :].view(B, T, Hkv, K)
            cache.k[i][rows, :, position] = k
            cache.v[i][rows, :, position] = v
            if mask is None:
                if k.is_cuda and k.dtype == torch.float32:
                    # No fused kernel of CUDA shares key heads in fp32; without one, all scores
                    # (B, H, T, T) would be held.
                    k = k.repeat_interleave(H // Hkv, 2)
                    v = v.repeat_interleave(H // Hkv, 2)
                q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                y = y.transpose(1, 2)  # (B, T, H, K)
            else:
                # The query heads that share a key head are laid along the query axis: the cache is
                # read once and never copied.
                q = q.reshape(B, Hkv, H // Hkv, K)
                k = cache.k[i][:B, :, :top]
                v = cache.v[i][:B, :, :top]
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            y = layer.out(y.reshape(B * T, H * K))
            x = x + (F.rms_norm(y, D, layer.norm, eps) if post else y)
            normed = x if post else F.rms_norm(x, D, layer.mlp_norm, eps)
            gate, up = layer.gate_up(normed).chunk(2, -1)
            y = layer.down(F.silu(gate).mul_(up))
            x = x + (F.rms_norm(y, D, layer.mlp_norm, eps) if post else y)
        return F.rms_norm(x, D, self.final_norm, eps)

    def _normed_heads(self, qk: Tensor) -> Tensor:
        """qk (N, H + Hkv, K), normed per head or, in OLMo 2, over all heads of q and all of k."""
        eps = self.config.rms_norm_eps
        if not self.config.joint_qk_norm:
            return F.rms_norm(qk, qk.shape[2:], eps=eps)
        H, Hkv, _ = self.shape
        parts = [F.rms_norm(part, part.shape[1:], eps=eps) for part in qk.split((H, Hkv), 1)]
        return torch.cat(parts, 1)


@contextmanager
def decoder_of(model):
    """The model's Decoder. Whatever ends the block, the model is then as it was.

    FSDP2: all parameters are gathered for the with-block, so that no step communicates and the
    processes may take unequal numbers of steps.
    """
    sharded = [m for m in model.modules() if hasattr(m, "unshard")]
    matrices = []
    try:
        for m in sharded:
            m.set_reshard_after_forward(False, recurse=False)
            m.unshard()
        decoder = Decoder(model)
        matrices = decoder.matrices
        if not sharded and decoder.device.type == "cpu" and decoder.dtype == torch.float32:
            for matrix in matrices:
                matrix.lay_out()
        yield decoder
    finally:
        for matrix in matrices:
            matrix.give_back()
        for m in sharded:
            # The root stays gathered after its forward: the head is used then.
            m.set_reshard_after_forward(m is not model, recurse=False)
            m.reshard()


class Graphs:
    """Functions recorded as CUDA graphs, by key; at most MAX_GRAPHS of them, the latest used ones.

    A function runs as it is the first time, so that libraries allocate what they need; it is
    recorded the second time and replayed from then on. It must return nothing, write its results in
    place into tensors that outlive it, and not wait for the device. On the CPU it is simply called.
    When a tensor that the functions use is replaced, make a new Graphs.
    """

    def __init__(self, device: torch.device):
        self.on_cuda = device.type == "cuda"
        self.recorded: dict = {}  # from the one used longest ago to the latest; None: ran once
        self.pool = torch.cuda.graph_pool_handle() if self.on_cuda else None  # shared scratch

    def run(self, key, function) -> None:
        is_first = key not in self.recorded
        graph = self.recorded.pop(key, None)
        self.recorded[key] = graph
        if len(self.recorded) > MAX_GRAPHS:
            del self.recorded[next(iter(self.recorded))]
        if is_first or not self.on_cuda:
            function()
            return
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            # Recording executes nothing. Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                function()
            self.recorded[key] = graph
        graph.replay()
