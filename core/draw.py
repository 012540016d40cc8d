"""Drawing a token from logits: temperature, top-p, top-k, log-prob and entropy.

Shapes: n rows, V vocabulary. Log-probs and entropies in nats.
"""

import torch
import torch.nn.functional as F

from core.wide import NARROW

PIECE = 128  # tokens per piece of the vocabulary: a draw finds the piece, then the token in it
DRAW_LOGITS = 2**18  # logits that draw() takes at once on the CPU: 1 MB, to stay in a core's cache


def draw(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One token per row: logits (n, V), uniform (n,) float64 in [0, 1) -> token, logp, entropy.

    All three are (n,). The token is the first whose cumulative probability exceeds uniform; see
    _find(). Temperature 0 is greedy and reports log-probs at temperature 1.
    """
    n, V = logits.shape
    if logits.device.type in NARROW:
        drawn = draw(logits.cpu(), uniform.cpu(), temperature, top_p, top_k)
        token, logp, entropy = (values.to(logits.device) for values in drawn)
        return token, logp, entropy
    at_once = max(1, DRAW_LOGITS // V) if logits.device.type == "cpu" else n
    if n > at_once:  # 64 x 32,000 at once: 14 ms, most of it for new pages of memory; in parts 5 ms
        pairs = zip(logits.split(at_once), uniform.split(at_once))
        parts = [draw(part, u, temperature, top_p, top_k) for part, u in pairs]
        token, logp, entropy = (torch.cat(values) for values in zip(*parts))
        return token, logp, entropy
    z = logits.float() - logits.amax(-1, keepdim=True)  # (n, V) <= 0
    if temperature not in (0, 1):
        z /= temperature
    p = z.exp()  # not yet divided by its sum
    pieces = F.pad(p, (0, -V % PIECE)).view(n, -1, PIECE)  # (n, V / 128, 128)
    mass = pieces.sum(-1).double()  # (n, V / 128)
    total = mass.sum(-1)
    # Clamped, because 0 * -inf is NaN.
    entropy = total.log() - torch.linalg.vecdot(p, z.clamp_min_(-1e4)) / total
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        if top_p < 1 or top_k:
            p = _cut(p, total, top_p, top_k)
            pieces = F.pad(p, (0, -V % PIECE)).view(n, -1, PIECE)
            mass = pieces.sum(-1).double()
        token = _find(pieces, mass, uniform)
    logp = z.gather(1, token[:, None])[:, 0] - total.log()
    return token, logp.float(), entropy.float()


def _find(pieces: torch.Tensor, mass: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token (n,) at which the cumulative probability exceeds uniform (n,).

    pieces (n, V / 128, 128) are probabilities times any factor, mass (n, V / 128) their sums. The
    piece is sought first and then the token inside it, so no running sum over V is made. A piece
    is summed in fp32 and everything else in float64: fp32 alone drifts over 150,000 tokens.
    """
    mass = mass.cumsum(-1)
    aim = uniform[:, None] * mass[:, -1:]
    piece = torch.searchsorted(mass, aim, right=True).clamp_max(mass.shape[1] - 1)  # (n, 1)
    inside = pieces.gather(1, piece[:, :, None].expand(-1, 1, PIECE))[:, 0]  # (n, 128)
    inside = inside.double().cumsum(-1)
    rest = aim - F.pad(mass, (1, 0)).gather(1, piece)
    rest = rest.minimum(inside[:, -1:] * (1 - 1e-12))  # so that rounding never leaves the piece
    return (piece * PIECE + torch.searchsorted(inside, rest, right=True))[:, 0]


def _cut(p: torch.Tensor, total: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """p (n, V) with 0 outside the top_k likeliest tokens (0 = all) and the fewest with top_p."""
    ranked, order = p.sort(-1, descending=True)
    before = ranked.cumsum(-1, dtype=torch.float64) - ranked  # so the first token always stays
    is_out = before >= top_p * total[:, None]
    if top_k:
        is_out[:, top_k:] = True
    return torch.zeros_like(p).scatter(-1, order, ranked.masked_fill(is_out, 0.0))
