"""Optimizers: AdamW, or Muon on the matrices; the learning rate of a step; clip and step."""

import math

import torch

from core import ranks


def make_optimizers(
    model, name: str, lr: float, betas=(0.9, 0.95), weight_decay: float = 0.01
) -> list[torch.optim.Optimizer]:
    """adamw: AdamW on all, as the paper. muon: Muon on the blocks' matrices, AdamW on embeddings, norms and biases.

    With Muon `lr` is Muon's own (about 2e-3); embeddings and norms then take AdamW at the same rate.
    """
    named = list(model.named_parameters())
    inner = (
        [p for n, p in named if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
        if name == "muon"
        else []
    )
    inner_ids = {id(p) for p in inner}
    rest = [p for _, p in named if id(p) not in inner_ids]
    optimizers = [
        torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
    ]
    if inner:
        optimizers.append(Muon(inner, lr, weight_decay))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is brought to orthogonal before it is applied (Jordan et al. 2024), at AdamW's step size:
    lr x 0.2 sqrt(longer side) (Liu et al. 2025, arXiv 2502.16982).

    Why not torch.optim.Muon: it multiplies rows cut over processes in bfloat16, so their number would change the run;
    here a matrix is made whole, and on a CPU in fp32, which is also the faster there.
    """

    def __init__(self, params, lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            beta = group["momentum"]
            for p in group["params"]:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                average = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - beta)
                direction = orthogonal(
                    ranks.whole(p.grad.lerp(average, beta))
                )  # Nesterov: a look ahead
                first, end = ranks.rows_of(len(direction), ranks.is_sharded(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                ranks.local(p).add_(
                    direction[first:end], alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5
                )


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """x (m, n) -> about U V^T of its singular value decomposition: five Newton-Schulz steps of degree 5, whose
    coefficients take singular values of 0.01 .. 1 to 0.7 .. 1.2."""
    wide = x.T if x.shape[0] > x.shape[1] else x
    y = wide.bfloat16() if x.is_cuda else wide.float()
    y = y / y.norm().clamp_min(1e-7)
    for _ in range(5):
        square = y @ y.T
        y = torch.addmm(
            y, torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315), y, beta=3.4445
        )
    return (y.T if x.shape[0] > x.shape[1] else y).to(x.dtype)


def lr_at(step: int, steps: int, lr: float, schedule: str, warmup: float) -> float:
    """Learning rate of the update after `step`: linear warm-up over warmup * steps, then constant or cosine to 0."""
    n_warm = int(warmup * steps)
    if step < n_warm:
        return lr * (step + 1) / n_warm
    if schedule == "constant":
        return lr
    return lr * 0.5 * (1 + math.cos(math.pi * (step - n_warm) / max(1, steps - n_warm)))


def update(model, optimizers, lr: float, clip: float) -> float:
    """Clip, step, clear. Returns the gradient norm before clipping; a NaN or infinite one skips the step."""
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
