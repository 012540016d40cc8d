"""Optimizers: AdamW, or Muon on the matrices; the learning rate of a step; the update itself."""

import math

import torch

from core import ranks

# Newton-Schulz of degree 5, y <- a y + (b S + c S S) y with S = y y^T (Jordan et al. 2024):
# five steps take singular values of 0.01 .. 1 to 0.7 .. 1.2
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def make_optimizers(
    model, name: str, lr: float, betas=(0.9, 0.95), weight_decay: float = 0.01
) -> list[torch.optim.Optimizer]:
    """adamw: AdamW on all parameters, as in the paper. muon: Muon on the matrices of the blocks,
    AdamW on embeddings, head, norms and biases.

    With Muon, `lr` is Muon's own (about 2e-3); AdamW takes the same rate for the rest.
    """
    matrices = []
    rest = []
    for parameter_name, p in model.named_parameters():
        outside_blocks = "embed" in parameter_name or "lm_head" in parameter_name
        if name == "muon" and p.ndim == 2 and not outside_blocks:
            matrices.append(p)
        else:
            rest.append(p)
    adamw = torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
    return [adamw, Muon(matrices, lr, weight_decay)] if matrices else [adamw]


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is made orthogonal before it is applied (Jordan et al. 2024).

    The step is lr x 0.2 sqrt(longer side), which has the size of AdamW's (arXiv 2502.16982).
    Why not torch.optim.Muon: it multiplies the rows of each process in bfloat16, so the number of
    processes would change the run. Here the matrix is gathered first, and on a CPU it is fp32.
    """

    def __init__(self, params, lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr = group["lr"]
            beta = group["momentum"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                momentum = state["momentum_buffer"].lerp_(p.grad, 1 - beta)
                nesterov = p.grad.lerp(momentum, beta)
                direction = orthogonal(ranks.whole(nesterov))
                size = lr * 0.2 * max(p.shape) ** 0.5
                p.mul_(1 - lr * group["weight_decay"])
                ranks.add_rows(p, direction, alpha=-size)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """x (m, n) = U S V^T -> about U V^T (m, n), by five Newton-Schulz steps; bfloat16 on CUDA."""
    a, b, c = NEWTON_SCHULZ
    is_tall = x.shape[0] > x.shape[1]
    y = x.T if is_tall else x  # y y^T is then the smaller square
    y = y.bfloat16() if x.is_cuda else y.float()
    y = y / y.norm().clamp_min(1e-7)  # no singular value is above 1
    for _ in range(5):
        square = y @ y.T
        polynomial = torch.addmm(square, square, square, beta=b, alpha=c)
        y = torch.addmm(y, polynomial, y, beta=a)
    return (y.T if is_tall else y).to(x.dtype)


def lr_at(step: int, steps: int, lr: float, schedule: str, warmup: float) -> float:
    """The learning rate of the update after `step` steps: a linear warm-up over warmup * steps,
    then constant, or a cosine that reaches 0 at `steps`."""
    n_warm = int(warmup * steps)
    if step < n_warm:
        return lr * (step + 1) / n_warm
    if schedule == "constant":
        return lr
    done = (step - n_warm) / max(1, steps - n_warm)
    return lr * 0.5 * (1 + math.cos(math.pi * done))


def update(model, optimizers, lr: float, clip: float) -> float:
    """Clip gradients, step, clear gradients. Returns the gradient norm before clipping.

    A NaN or infinite norm skips the step: weights and optimizer state stay as they were.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    norm = ranks.whole(norm).item()
    if math.isfinite(norm):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return norm
