"""Hidden states to log-probs of tokens and entropies, without holding the logits of all tokens.

    logp, entropy = token_logp(hidden, head, targets, temperature=0.7, entropy=True)

The head is applied to a chunk of tokens at a time, in the forward and again in the backward. With
z = logits / temperature and p = softmax(z):

    d log p_t / d z_j = [j = t] - p_j
    H = -sum_j p_j log p_j,   d H / d z_j = -p_j (log p_j + H)

Shapes: V vocabulary, D hidden width, N tokens of all rows in one list, n tokens of one chunk.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from core.wide import wide

# Logits held at once: 128 MB in fp32, 220 tokens of Qwen's vocabulary of 152k. On CUDA 8 times as
# many, because each chunk costs one more pass over the gradient of the head.
CHUNK_LOGITS = 2**25
# On the CPU, logits of a chunk that are worked on at once: 4 MB, about the cache of one core.
PIECE_LOGITS = 2**20


def token_logp(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    chunk: int | None = None,
    entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of each target under softmax(hidden head^T / temperature).

    | hidden  | (..., D) | output of the model, of any float type                            |
    | head    | (V, D)   | cast to the type of hidden; its gradient is summed in fp32        |
    | targets | (...)    | token ids                                                         |
    | chunk   | tokens   | whose logits are held at once; None = 128 MB of them, on CUDA 1 GB |
    | returns | (...)    | logp, or with entropy=True (logp, entropy): nats, fp32, differentiable |
    """
    flat = hidden.reshape(-1, hidden.shape[-1])  # (N, D)
    values = TokenLogp.apply(flat, head, targets.reshape(-1), temperature, chunk, entropy)
    logp, entropies = (x.view(targets.shape) for x in values)
    return (logp, entropies) if entropy else logp


def head_logits(hidden: Tensor, head: Tensor, temperature: float = 1.0) -> Tensor:
    """hidden (N, D), head (V, D) -> logits (N, V) over the temperature, fp32.

    A sampler that draws from these draws from the distribution that token_logp() scores.
    """
    logits = _matmul(hidden, head.to(hidden.dtype).T)
    return logits if temperature == 1.0 else logits / temperature


class SumLogp(torch.autograd.Function):
    """The sum of token_logp() of all tokens, with the logits of each chunk computed once.

    The gradient of a sum is known up to a factor before the backward, so the forward computes it
    while the logits are there, and the backward scales it.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, chunk, learning: bool):
        """hidden (N, D), head (V, D), targets (N,) -> scalar; learning: gradients are wanted."""
        work = head.to(hidden.dtype)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        total = wide(torch.zeros((), device=hidden.device))
        d_hidden = torch.empty_like(hidden) if learning else None
        d_head = torch.zeros_like(head, dtype=exact) if learning else None
        for s, log_p, _ in _log_softmax(hidden, work, 1.0, chunk):
            target = targets[s, None]  # (n, 1)
            total += wide(log_p.gather(1, target)).sum()
            if learning:
                d_logits = log_p.exp_().neg_()
                d_logits.scatter_add_(1, target, torch.ones_like(target, dtype=exact))
                d_logits = d_logits.to(hidden.dtype)
                d_hidden[s] = d_logits @ work
                _matmul(d_logits.T, hidden[s], out=d_head, add=True)
        ctx.save_for_backward(d_hidden, d_head)
        ctx.head_dtype = head.dtype
        return total.to(exact)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        # In place: PyTorch refuses a second backward through the graph anyway.
        d_hidden, d_head = ctx.saved_tensors
        return d_hidden.mul_(g), d_head.mul_(g).to(ctx.head_dtype), None, None, None


class TokenLogp(torch.autograd.Function):
    """token_logp() of a flat list of tokens.

    From forward to backward it keeps its inputs, the entropies, and the log-probs of the last
    chunk. The backward begins with that chunk and computes the logits of the others a second time.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, temperature, chunk, entropy):
        """hidden (N, D), head (V, D), targets (N,) -> logp (N,), entropy (N,) or zeros."""
        work = head.to(hidden.dtype)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        logp = torch.zeros(len(hidden), dtype=exact, device=hidden.device)
        entropies = torch.zeros_like(logp)
        ctx.last = None
        for s, log_p, rows in _log_softmax(hidden, work, temperature, chunk):
            logp[s] = log_p.gather(1, targets[s, None])[:, 0]
            if entropy:  # H = -sum_j p_j log p_j
                parts = [(piece.exp() * piece).sum(-1) for piece in log_p.split(rows)]
                entropies[s] = -torch.cat(parts)
            ctx.last = (s, log_p, rows)
        ctx.save_for_backward(hidden, head, targets, entropies)
        ctx.settings = (temperature, chunk, entropy)
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return logp, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logp: Tensor, g_entropy: Tensor):
        hidden, head, targets, entropies = ctx.saved_tensors
        temperature, chunk, entropy = ctx.settings
        work = head.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden)
        d_head = torch.zeros_like(head, dtype=entropies.dtype)

        def add(s: slice, log_p: Tensor, rows: int) -> None:
            """Gradients of one chunk, written over its log-probs."""
            g = g_logp[s, None] / temperature  # (n, 1)
            if entropy:
                g_H = g_entropy[s, None] / temperature
                columns = (x.split(rows) for x in (log_p, entropies[s, None], g_H, g))
                for piece, H, g_H, g_own in zip(*columns):
                    p = piece.exp()
                    piece.add_(H).mul_(-g_H).sub_(g_own).mul_(p)
            else:
                log_p.exp_().mul_(-g)
            log_p.scatter_add_(1, targets[s, None], g)
            d_logits = log_p.to(hidden.dtype)
            d_hidden[s] = d_logits @ work
            _matmul(d_logits.T, hidden[s], out=d_head, add=True)

        n_left = len(hidden)
        if ctx.last is not None:  # a second backward through one graph finds None
            add(*ctx.last)
            n_left = ctx.last[0].start
            ctx.last = None  # the chunks below take over its memory
        for s, log_p, rows in _log_softmax(hidden[:n_left], work, temperature, chunk):
            add(s, log_p, rows)
        return d_hidden, d_head.to(head.dtype), None, None, None, None


def _log_softmax(
    hidden: Tensor, head: Tensor, temperature: float, chunk: int | None
) -> Iterator[tuple[slice, Tensor, int]]:
    """For each chunk of the tokens: (their slice, their log-probs (n, V) in fp32, rows per piece).

    All chunks share one buffer, which the caller may overwrite: getting fresh pages from the system
    takes as long as the arithmetic on them. On the CPU, several operations in a row are faster on
    pieces of a few rows, which stay in the cache; on CUDA a piece is the whole chunk.
    """
    N = len(hidden)
    V = len(head)
    if chunk is None:
        chunk = max(1, CHUNK_LOGITS * (8 if hidden.is_cuda else 1) // V)
    rows = chunk if hidden.is_cuda else max(1, PIECE_LOGITS // V)
    exact = torch.promote_types(hidden.dtype, torch.float32)
    buffer = hidden.new_empty(min(chunk, N), V, dtype=exact)
    for start in range(0, N, chunk):
        s = slice(start, min(start + chunk, N))
        logits = _matmul(hidden[s], head.T, out=buffer[: s.stop - s.start])
        for piece in logits.split(rows):
            if temperature != 1.0:
                piece.div_(temperature)
            piece.copy_(F.log_softmax(piece, -1))
        yield s, logits, rows


def _matmul(a: Tensor, b: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """a (n, m) @ b (m, k) in fp32 (float64 for float64): returned, written to out or added to it.

    On CUDA a product of half-precision matrices keeps its fp32 accumulator. The CPU has no such
    kernel and rounds once to the type of the inputs, as the logits of transformers are rounded.
    """
    half = a.dtype in (torch.bfloat16, torch.float16)
    if add:
        return out.add_(_matmul(a, b)) if half else out.addmm_(a, b)
    if not half:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    product = torch.mm(a, b).float()
    return product if out is None else out.copy_(product)
