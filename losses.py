"""The objective: advantages, a loss per token, one aggregator. Other methods are in methods/.

    loss = sum over rows b, tokens t of  w[b] (ell[b,t] + kl_coef kl[b,t]) - entropy_coef H[b,t] / N

One optimizer step, in the order of rl.py:
    batch = make_batch(rows, device)          tensors of all rows of the step
    batch = weigh(method, batch)              advantages, and the weight w of each row
    update_loss(method, logp, H, take(batch, part)).backward()     per micro-batch; parts add up
The weights are made from ALL rows of the step before its first backward, so the gradient does not
depend on how the rows are cut into micro-batches or dealt to ranks. Nothing here takes a mean.

`GRPO` is the base class of every method: rl.py asks it what to sample, which rows complete a group,
whether a group carries a signal, and for advantages and the loss of a token. A file in methods/
overrides the answers that differ. Its dataclass fields are flags of rl.py, their comments the help.

Choices where papers and official code differ; [n] is equation n of arXiv 2512.11470:
1) w = 1/N, N = trained tokens of the step (token-mean). Official code: 1/8192, or per micro-batch.
2) Groups whose rewards agree, and groups of one, have an advantage of exactly 0.
3) old_logp is computed by the trainer at the start of the round. The first update of a round uses
   its own log-probs as old_logp: the ratio is 1 and no clip acts.

Shapes: B rows, R response tokens. Log-probs in nats, of logits over the temperature. Where a mask
is False a value may be NaN: it reaches neither loss nor gradient.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor

from core.errors import UserError
from core.wide import wide


# ---- rows and batches ----------------------------------------------------------------------------
class Row(NamedTuple):
    """One sequence of a group. A finished response ends with EOS."""

    prompt: list[int]
    response: list[int]
    logp: list[float]  # the sampler's; 0 on tokens of a demonstration
    correct: float  # the reward before penalties, for signal, gates and logs
    reward: float  # the reward with penalties, for advantages
    group: int  # number of the prompt in the endless stream of prompts
    is_expert: bool = False
    n_prefix: int = 0  # leading response tokens copied from the demonstration
    finished: bool = True

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.response)


class Batch(NamedTuple):
    """The rows of one optimizer step as tensors, or some of these rows."""

    mask: Tensor  # (B, R) bool: trained tokens, EOS included
    rewards: Tensor  # (B,)
    is_success: Tensor  # (B,) bool: the response is right
    groups: Tensor  # (B,) long: number of the prompt
    is_expert: Tensor  # (B,) bool: written by the expert; old_logp and rollout_logp are not read
    is_prefix: Tensor  # (B, R) bool: demonstration tokens at the head of a rollout
    rollout_logp: Tensor  # (B, R) as the sampler computed it
    old_logp: Tensor | None = None  # (B, R) at the start of the round; None = this forward's
    ref_logp: Tensor | None = None  # (B, R) of the frozen reference, for kl_coef
    entropy: Tensor | None = None  # (B, R) at the start of the round, if the method needs it
    advantages: Tensor | None = None  # (B, R), 0 outside the mask
    weights: Tensor | None = None  # (B,) float64: w of the formula above
    mean_weights: Tensor | None = None  # (B,) float64: 1/N

    @property
    def is_rollout(self) -> Tensor:
        """(B, R) bool: trained tokens of rows that the policy wrote, a copied prefix included."""
        return self.mask & ~self.is_expert[:, None]

    @property
    def is_sampled(self) -> Tensor:
        """(B, R) bool: trained tokens that the policy itself chose."""
        return self.is_rollout & ~self.is_prefix


def make_batch(rows: list[Row], device, mask_truncated: bool = False) -> Batch:
    """Tensors of these rows; R = the longest response. mask_truncated: cut rows train no token."""

    def column(values, dtype=torch.float32):
        return torch.tensor(list(values), dtype=dtype, device=device)

    lengths = column((len(row.response) for row in rows), torch.long)
    R = int(lengths.max())
    place = torch.arange(R, device=device)
    mask = place < lengths[:, None]  # (B, R)
    is_prefix = place < column((row.n_prefix for row in rows), torch.long)[:, None]
    if mask_truncated:
        mask = mask & column((row.finished for row in rows), torch.bool)[:, None]
    return Batch(
        mask=mask,
        rewards=column(row.reward for row in rows),
        is_success=column(row.correct > 0.5 for row in rows).bool(),
        groups=column((row.group for row in rows), torch.long),
        is_expert=column((row.is_expert for row in rows), torch.bool),
        is_prefix=is_prefix,
        rollout_logp=column(row.logp + [0.0] * (R - len(row.logp)) for row in rows),
    )


def take(batch: Batch, index) -> Batch:
    """Some of the rows, by any index that a tensor accepts."""
    return Batch(*(None if field is None else field[index] for field in batch))


# ---- advantages ----------------------------------------------------------------------------------
def group_mean(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, size) of each row's group, both (B,) float64."""
    same = wide(groups[:, None] == groups)  # (B, B): at most a few thousand rows
    count = same.sum(1)
    return same @ wide(values) / count.clamp(min=1), count


def is_informative(rewards: Tensor, groups: Tensor) -> Tensor:
    """(B,) bool: the rewards of the row's group differ."""
    # Compared, not computed: the fp32 mean of three 0.1 is not 0.1, and that tiny residue over a
    # tiny standard deviation becomes a huge advantage
    return ((groups[:, None] == groups) & (rewards[:, None] != rewards)).any(1)


def group_advantages(
    rewards: Tensor, groups: Tensor, normalize_std: bool = False, eps: float = 1e-6, ddof: int = 1
) -> Tensor:
    """(B,) reward minus the mean of its group, optionally over the group's std + eps [11].

    Exactly 0 where all rewards of the group agree. ddof: 1 = unbiased standard deviation.
    """
    mean, count = group_mean(rewards, groups)
    advantages = (rewards - mean) * is_informative(rewards, groups)
    if normalize_std:
        mean_square, _ = group_mean(advantages**2, groups)
        variance = mean_square * count / (count - ddof).clamp(min=1)
        advantages = advantages / (variance.sqrt() + eps)
    return advantages.to(rewards.dtype)


def overlong_penalty(length: int, max_len: int, soft_len: int, factor: float = 1.0) -> float:
    """Added to the reward of a response of `length` tokens: 0, falling to -factor over the last
    soft_len tokens before max_len (soft overlong punishment, DAPO, arXiv 2503.14476)."""
    return factor * max(-1.0, min(0.0, (max_len - soft_len - length) / soft_len))


# ---- the aggregator ------------------------------------------------------------------------------
def row_weights(
    lengths: Tensor,
    agg: str = "token-mean",
    groups: Tensor | None = None,
    norm_const: float | None = None,
) -> Tensor:
    """(B,) float64: the weight of each token of a row, from the trained tokens (B,) of ALL rows.

    With N tokens, S rows that have a token, P prompts, n tokens in the row, N_p in its group:

    | token-mean          | 1 / N        | DAPO, and the default here                              |
    | seq-mean-token-mean | 1 / (S n)    | the first GRPO, GSPO                                    |
    | seq-mean-token-sum  | 1 / S        | [10] read literally                                     |
    | group-token-mean    | 1 / (P N_p)  | [12] read literally                                     |
    | const               | 1 / (B C)    | Dr. GRPO; C = norm_const, B counts empty rows too       |
    """
    n = wide(lengths)
    filled = lengths > 0
    n_rows = wide(filled.sum())
    if agg == "token-mean":
        size = n.sum()
    elif agg == "seq-mean-token-mean":
        size = n_rows * n
    elif agg == "seq-mean-token-sum":
        size = n_rows
    elif agg == "group-token-mean":
        in_group = wide(groups[:, None] == groups) @ n
        size = len(groups[filled].unique()) * in_group
    else:
        assert agg == "const", agg
        size = n.new_tensor(norm_const * len(n))
    return torch.where(filled, 1 / size, 0.0)  # a row without tokens weighs 0


def aggregate(ell: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """Scalar: the sum of weights[b] * ell[b, t] under the mask. Micro-batches and ranks add up."""
    return (torch.where(mask, ell, 0.0) * weights.to(ell.dtype)[:, None]).sum()


# ---- the loss of a token -------------------------------------------------------------------------
LOG_RATIO_BOUND = 20.0  # exp of the log-ratio cannot overflow; outside there is no gradient


def kl_penalty(logp: Tensor, ref_logp: Tensor, mask: Tensor, kind: str = "k3") -> Tensor:
    """(B, R) estimate of KL(policy | reference) per token, d = logp - ref_logp (Schulman 2020):
    k1 = d, k2 = d^2 / 2, k3 = exp(-d) + d - 1. Only k2 has, in expectation, that KL's gradient."""
    d = torch.where(mask, logp - ref_logp, 0.0)
    if kind == "k1":
        return d
    if kind == "k2":
        return d**2 / 2
    return torch.exp(-d) + d - 1


def mean_entropy(entropy: Tensor, mask: Tensor) -> Tensor:
    """(B,) detached: the mean token entropy of each row."""
    total = torch.where(mask, entropy.detach(), 0.0).sum(1)
    return total / mask.sum(1).clamp(min=1)


def log_ratio(logp: Tensor, old_logp: Tensor | None, tokens: Tensor, per_sequence=False) -> Tensor:
    """(B, R) logp - old_logp on `tokens` (B, R) bool, 0 elsewhere; old_logp None: the ratio is 1.

    per_sequence: the mean over the row's tokens instead (GSPO, arXiv 2507.18071, equation 7).
    """
    old_logp = logp.detach() if old_logp is None else old_logp
    d = torch.where(tokens, logp - old_logp, 0.0).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    if not per_sequence:
        return d
    return (d.sum(1) / tokens.sum(1).clamp(min=1))[:, None].expand_as(d)


def imitation_loss(logp: Tensor, alpha: float = 0.0) -> Tensor:
    """-w logp of each token of a demonstration, w = p / max(p, alpha) held constant.

    alpha 0 is NLL, w = 1. alpha 1 is DFT, w = p (arXiv 2508.05629). Between them is trust-region
    SFT (arXiv 2512.17636): tokens that the policy gives less than alpha pull no harder than alpha.
    """
    if alpha == 0:
        return -logp
    weight = torch.exp(logp.detach() - math.log(alpha)).clamp(max=1)
    return -weight * logp


@dataclass(frozen=True)
class GRPO:
    """GRPO [11, 12], its common variants as flags, and the questions that rl.py asks a method."""

    surrogate: Literal["token", "sequence", "cispo"] = "token"  # PPO's ratio; GSPO; CISPO
    clip_low: float | None = 0.2  # clip ratios below 1 - this; GSPO 3e-4, CISPO none
    clip_high: float | None = 0.2  # clip ratios above 1 + this; GSPO 4e-4, CISPO 4
    dual_clip: float | None = None  # where A < 0: the loss is at most this times |A| (verl: 3)
    normalize_std: bool = False  # divide advantages by the group's standard deviation
    dynamic_sampling: bool = False  # replace prompts whose rewards all agree (DAPO)
    mask_truncated: bool = False  # cut responses count in the baseline and train no token
    agg: Literal[
        "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "group-token-mean", "const"
    ] = "token-mean"  # how tokens are averaged, see losses.row_weights
    norm_const: float = 8192.0  # const: the number to divide by (Dr. GRPO: --max-new)
    tis: Literal["none", "token", "sequence", "icepop"] = "none"  # truncated importance sampling
    tis_low: float | None = None  # weight p_trainer / p_sampler: at least this (icepop: 0 below it)
    tis_high: float | None = 2.0  # that weight: at most this (icepop: 0 above it)
    kl_coef: float = 0.0  # penalty against the frozen --init
    kl_type: Literal["k1", "k2", "k3"] = "k3"  # estimator of that KL, see losses.kl_penalty
    entropy_coef: float = 0.0  # entropy bonus, a token mean whatever --agg is; the paper's: 0.001

    # Defaults of rl.py's own flags: the paper's comparison of methods (section 6.1)
    settings: ClassVar[dict] = dict(prompts=128, update_prompts=64, lr=1e-6, temperature=1.0)
    demonstrations: ClassVar[str] = ""  # what it needs of them: "", "rows" or "prefixes"
    needs_entropy: ClassVar[bool] = False  # entropies before the update: one more forward
    expert_forward: ClassVar[bool] = False  # the paper's FLOPs count a forward per expert row [26]

    def __post_init__(self):
        for name, kind in get_type_hints(type(self)).items():
            choices = get_args(kind)
            value = getattr(self, name)
            if choices and isinstance(choices[0], str) and value not in choices:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} is {value!r}; choose one of {', '.join(choices)}")

    # ---- sampling --------------------------------------------------------------------------------
    def requests(self, expert: list[int] | None, group: int, done: float, u: float) -> list:
        """[(first tokens of the response, number of responses)] to sample for one prompt.

        expert: the demonstration's ids, if the prompt has one. done: share of the run that is done.
        u: uniform in [0, 1), drawn for this prompt.
        """
        return [([], group)]

    def complete(self, rollouts: list[Row], expert: Row | None) -> list[Row]:
        """The group to train on, given its rollouts and, if there is one, the expert's row."""
        return rollouts

    def carries_signal(self, rewards: list[float], expert: list[int] | None) -> bool:
        """Dynamic sampling keeps the group: the rewards of its rollouts differ (DAPO, eq. 11)."""
        return max(rewards) > min(rewards)

    # ---- learning --------------------------------------------------------------------------------
    def advantages(self, batch: Batch) -> Tensor:
        """(B,) or (B, R): reward minus the mean of its group [11]."""
        return group_advantages(batch.rewards, batch.groups, self.normalize_std)

    def token_loss(self, logp: Tensor, entropy: Tensor | None, batch: Batch) -> Tensor:
        """(B, R) loss of each token: max(-r A, -clip(r) A), r the probability ratio [12]."""
        d = log_ratio(logp, batch.old_logp, batch.is_rollout, self.surrogate == "sequence")
        ratio = torch.exp(d)
        low, high = self.clip_range
        clipped = ratio.clamp(low, high)
        if self.surrogate == "cispo":  # a constant weight, so that no token loses its gradient
            return -clipped.detach() * batch.advantages * logp
        ell = torch.maximum(-ratio * batch.advantages, -clipped * batch.advantages)
        if self.dual_clip is not None:  # (Ye et al. 2020, equation 5)
            bounded = torch.minimum(ell, -self.dual_clip * batch.advantages)
            ell = torch.where(batch.advantages < 0, bounded, ell)
        return ell

    @property
    def clip_range(self) -> tuple[float, float]:
        """(lowest, highest) ratio that is not clipped."""
        low = -math.inf if self.clip_low is None else 1 - self.clip_low
        high = math.inf if self.clip_high is None else 1 + self.clip_high
        return low, high

    def teaches(self, batch: Batch) -> Tensor:
        """(B,) bool: rows that get a gradient from the reward. Without one there is no update: an
        entropy bonus alone would be all of the gradient, and Adam would scale it up."""
        return (batch.advantages != 0).any(1)


# ---- a step, as rl.py calls it -------------------------------------------------------------------
def weigh(method: GRPO, batch: Batch) -> Batch:
    """The batch with advantages and weights, made from all rows of the step."""
    advantages = method.advantages(batch)
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    lengths = batch.mask.sum(1)
    return batch._replace(
        advantages=torch.where(batch.mask, advantages, 0.0),
        weights=row_weights(lengths, method.agg, batch.groups, method.norm_const),
        mean_weights=row_weights(lengths),
    )


def sampler_weight(method: GRPO, logp: Tensor, batch: Batch) -> Tensor:
    """(B, R) constant: bounded exp(old_logp - rollout_logp) on sampled tokens, 1 elsewhere.

    It corrects for a sampler whose log-probs differ from the trainer's (truncated importance
    sampling). "sequence": the product over the row's tokens. "icepop": 0 outside the bounds.
    """
    old_logp = logp.detach() if batch.old_logp is None else batch.old_logp
    d = torch.where(batch.is_sampled, old_logp - batch.rollout_logp, 0.0)
    if method.tis == "sequence":
        d = d.sum(1, keepdim=True).expand_as(d)
    weight = torch.exp(d)
    high = math.inf if method.tis_high is None else method.tis_high
    bounded = weight.clamp(method.tis_low or 0.0, high)
    if method.tis == "icepop":
        bounded = torch.where(bounded == weight, weight, 0.0)
    return torch.where(batch.is_sampled, bounded, 1.0)


def update_loss(method: GRPO, logp: Tensor, entropy: Tensor | None, batch: Batch) -> Tensor:
    """Scalar: one micro-batch's share of the step's loss; shares add up over parts and ranks.

    logp, entropy (B, R) of this forward; entropy may be None where neither the bonus nor the
    method reads it.
    """
    mask = batch.mask
    logp = torch.where(mask, logp, 0.0)  # before any exp: 0 * exp(garbage) would be NaN
    ell = method.token_loss(logp, entropy, batch)
    if method.tis != "none":
        ell = ell * sampler_weight(method, logp, batch)
    loss = aggregate(ell, mask, batch.weights)
    if method.kl_coef:
        kl = kl_penalty(logp, batch.ref_logp, mask, method.kl_type)
        loss = loss + method.kl_coef * aggregate(kl, mask, batch.weights)
    if method.entropy_coef:
        loss = loss - method.entropy_coef * aggregate(entropy, mask, batch.mean_weights)
    return loss


# ---- numbers for the log -------------------------------------------------------------------------
SUMS = ("loss", "tokens", "entropy", "clipped", "kl", "gap")  # of a step, see token_sums


@torch.no_grad()
def token_sums(method: GRPO, logp: Tensor, entropy: Tensor, batch: Batch) -> list[Tensor]:
    """SUMS but the loss, in that order, over the tokens that the policy sampled: number, entropy,
    clipped ratios, KL to the old policy (k3), |trainer's log-prob - sampler's|."""
    own = batch.is_sampled
    d = log_ratio(logp, batch.old_logp, own, method.surrogate == "sequence")
    ratio = d.exp()
    low, high = method.clip_range
    clipped = (ratio > high) | (ratio < low)
    gap = (logp - batch.rollout_logp).abs()
    return [wide((x * own).sum()) for x in (own, entropy, clipped, ratio - 1 - d, gap)]


def describe_updates(updates: list[dict], norms: list[float]) -> dict:
    """Numbers of a round's optimizer steps, from their SUMS and gradient norms. None = not
    measured, as where every trained row is a demonstration."""
    if not updates:
        return {"updates": 0}
    n_tokens = sum(sums["tokens"] for sums in updates)
    means = {}
    for name in ("entropy", "clipped", "kl"):
        total = sum(sums[name] for sums in updates)
        means[name] = total / n_tokens if n_tokens else None
    if n_tokens:
        means["clipped"] *= 100
    first = updates[0]  # later the weights have moved away from the sampler's
    return {
        "loss": sum(sums["loss"] for sums in updates) / len(updates),
        "grad_norm": sum(norms) / len(norms),
        "updates": len(updates),
        **means,
        "gap": first["gap"] / first["tokens"] if first["tokens"] else None,
    }


def describe_groups(groups: list[list[Row]]) -> dict:
    """Numbers of all sampled rows; shares in 0..100, lengths in tokens. Rows that begin with part
    of a demonstration are no measure of the policy: they count in `hybrid_reward` only."""
    rows = []
    hybrids = []
    agree = 0
    for group in groups:
        plain = [row for row in group if not row.n_prefix]
        rows += plain
        hybrids += [row for row in group if row.n_prefix]
        agree += len({row.correct for row in plain}) == 1
    n = len(rows) / 100  # sums over n are percentages
    extra = {}
    if hybrids:
        extra["hybrid_reward"] = 100 * sum(row.correct for row in hybrids) / len(hybrids)
    return {
        "reward": sum(row.correct for row in rows) / n,
        "right": sum(row.correct > 0.5 for row in rows) / n,
        "signal": 100 * (1 - agree / len(groups)),
        "length": sum(len(row.response) for row in rows) / len(rows),
        "truncated": sum(not row.finished for row in rows) / n,
        **extra,
    }
