"""Every objective as a per-token loss, a mask and one aggregator: SFT, GRPO, DAPO, LUFFY, SRFT, UPT, Prefix-RFT.

    loss = sum W policy + sum U imitation + kl_coef sum K kl - entropy_coef sum H / N     over all rows and tokens
token_loss() gives policy and imitation (B,T), batch_weights() the row weights W, U, K, 1/N, from the lengths of ALL
rows of the optimizer step, before its first backward: micro-batches and ranks cannot change a gradient.
Choices where papers and official code differ; [n] and "equation n" are those of arXiv 2512.11470:
1) W = 1/N, N the trained tokens of the step (token-mean); official code: 1/8192, or 1/tokens of each micro-batch
2) GRPO [11, 12]: reward minus group mean, clip 0.2/0.2; DAPO_dc: over the std too, 0.2/0.28. Groups that agree, and
   groups of one, have advantage exactly 0. With one update per round the ratio is 1 and no clip ever acts
3) LUFFY [13]: rollouts unclipped; expert tokens p/(p + 0.1), as if their sampler had given them probability 1
4) SRFT [14-16]: entropy weights by sequence; the off-policy term raises the advantage, unlike the sum as printed
5) UPT [17]: a prompt at or below the gate trains on its demonstration alone, another on its rollouts, clipped
6) Prefix-RFT [18, 19]: the hybrid is one of its group; only the step's most uncertain fifth of prefix tokens teach

    weights = batch_weights(objective, lengths, group_ids, is_expert)                        # whole step, all ranks
    update_loss(objective, logp, entropy, take(rows, part), weights[:, part]).backward()     # each micro-batch
Shapes: B rows, T response positions. Nats, of logits over the temperature. Where a mask is False a value may be NaN; it
reaches no loss and no gradient.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from core.errors import UserError

CHOICES = {
    "surrogate": ("token", "sequence", "cispo", "success"),
    "demo": ("none", "row", "gate", "prefix"),
    "entropy_weights": ("none", "seq", "batch"),
    "prefix_adv": ("group", "split"),
    "kl_type": ("k1", "k2", "k3"),
    "tis": ("none", "token", "sequence", "icepop"),
    "mix_norm": ("joint", "separate"),
    "singleton": ("zero", "raw"),
    "agg": ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "group-token-mean", "const"),
}


@dataclass(frozen=True)
class Objective:
    """What one optimizer step minimises. Defaults are GRPO's; a field's trailing comment is its help text."""

    surrogate: str = (
        "token"  # ratio by token, by sequence (GSPO: clips 3e-4, 4e-4), cispo, success (SRFT)
    )
    clip_low: float | None = 0.2  # clip ratios below 1 - this (cispo: usually none)
    clip_high: float | None = 0.2  # clip ratios above 1 + this (cispo: 4, so that weights end at 5)
    dual_clip: float | None = (
        None  # where A < 0, loss at most this times |A| (verl 3, the paper's scripts 10)
    )
    log_ratio_clamp: float | None = (
        20.0  # logp - old_logp within +-this, no gradient outside: exp cannot overflow
    )
    normalize_std: bool = False  # divide advantages by the group's standard deviation
    singleton: str = "zero"  # advantage of a group of one: zero, or raw = its reward (verl)
    demo: str = "none"  # demonstration: none, row (one more), gate (instead of rollouts), prefix
    shaping_gamma: float | None = (
        None  # expert tokens: p/(p + gamma) times the advantage; none = no such term
    )
    imitation: float = 0.0  # expert tokens: coefficient of -logp (UPT's sft_coef, SRFT's 0.5)
    success_coef: float = 0.1  # success: weight of a correct rollout, times exp(H)
    entropy_weights: str = (
        "none"  # imitation times exp(-H), success times exp(H); H by seq, or of the whole batch
    )
    gate_gamma: float = 0.0  # gate: imitate where the rollouts' mean reward is at most this
    prefix_clip: bool = True  # prefix: clip the ratio of demonstration tokens too
    prefix_adv: str = (
        "group"  # prefix: group (one baseline for all), split (the authors' dr_grpo_prefix)
    )
    drop_ratio: float = (
        0.8  # prefix: share of demonstration tokens, the surest, that lose their advantage
    )
    dynamic_sampling: bool = False  # replace prompts whose rewards all agree
    mask_truncated: bool = (
        False  # responses cut by the length limit count in the baseline, train no token
    )
    tis: str = "none"  # weigh by trainer over sampler probability: none, token, sequence, icepop
    tis_low: float | None = None  # that weight at least this (icepop: 0 below it)
    tis_high: float | None = 2.0  # that weight at most this (icepop: 0 above it)
    kl_coef: float = 0.0  # penalty against the frozen reference
    kl_type: str = "k3"  # k1, k2 or k3; only k2's gradient is that of KL(policy | reference)
    kl_clamp: float | None = (
        None  # k3 within +-this, its log-ratio within +-20, no gradient outside (verl 10)
    )
    entropy_coef: float = (
        0.001  # entropy bonus: a token mean whatever agg is, expert tokens included
    )
    agg: str = "token-mean"  # or seq-mean-token-mean, seq-mean-token-sum, group-token-mean, const
    norm_const: float = 8192.0  # const: tokens to divide by
    const_div_seqs: bool = (
        True  # const: over the rows too (Dr. GRPO); LUFFY's and UPT's code does not
    )
    mix_norm: str = (
        "joint"  # joint (one denominator), separate (imitation: mean over expert tokens)
    )

    def __post_init__(self):
        for name, values in CHOICES.items():
            if getattr(self, name) not in values:
                raise UserError(
                    f"objective: {name} is {getattr(self, name)!r}; choose one of {', '.join(values)}"
                )


OBJECTIVES = {
    "grpo": Objective(),
    "dapo_d": Objective(dynamic_sampling=True),
    "dapo_dc": Objective(
        dynamic_sampling=True, normalize_std=True, clip_high=0.28, entropy_coef=0.0
    ),
    "luffy": Objective(demo="row", clip_low=None, clip_high=None, shaping_gamma=0.1),
    "srft": Objective(
        demo="row", surrogate="success", shaping_gamma=0.1, imitation=0.5, entropy_weights="seq"
    ),
    "upt": Objective(demo="gate", imitation=1.0),
    "prefix_rft": Objective(demo="prefix"),
}
OBJECTIVES["dapo"] = OBJECTIVES["dapo_dc"]


def overlong_penalty(length: int, max_len: int, cache_len: int, factor: float = 1.0) -> float:
    """Added to the reward of a response of `length` tokens: 0, falling to -factor over the last cache_len (DAPO)."""
    return factor * max(-1.0, min(0.0, (max_len - cache_len - length) / cache_len))


def _group_mean(
    values: Tensor, group_ids: Tensor, member: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """(mean, count) of the member rows of each row's group, both (B,) float64; mean 0 where there is none."""
    same = (
        group_ids[:, None] == group_ids
    ).double() * member  # (B,B): a few thousand rows at most, a table will do
    count = same.sum(1)
    return same @ values.double() / count.clamp(min=1), count


def is_informative(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """(B,) bool: the rewards of the row's group differ. To filter, pass raw correctness, before penalties (DAPO)."""
    # compared, not computed: the fp32 mean of three 0.1 is not 0.1, and that residue over eps is a spike
    return ((group_ids[:, None] == group_ids) & (rewards[:, None] != rewards)).any(1)


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    normalize_std: bool = False,
    eps: float = 1e-6,
    singleton: str = "zero",
    ddof: int = 1,
) -> Tensor:
    """(B,) reward minus its group's mean, optionally over the group's std + eps [11]; exactly 0 where they all agree.

    rewards    (B,)  float  one scalar a row
    group_ids  (B,)  long   prompt of each row, in any order
    singleton, ddof         advantage of a group of one: "zero", or "raw" = its reward; 1 = unbiased std
    """
    mean, count = _group_mean(rewards, group_ids)
    advantages = (rewards.double() - mean) * is_informative(rewards, group_ids)
    if normalize_std:
        mean_square, _ = _group_mean(advantages**2, group_ids)
        advantages = advantages / ((mean_square * count / (count - ddof).clamp(min=1)).sqrt() + eps)
    if singleton == "raw":
        advantages = torch.where(count == 1, rewards.double(), advantages)
    return advantages.to(rewards.dtype)


def prefix_advantages(
    rewards: Tensor, group_ids: Tensor, is_prefix: Tensor, keep: Tensor, split: bool = False, **how
) -> Tensor:
    """Token advantages (B,T) of Prefix-RFT (paper, equations 18, 19).

    is_prefix, keep (B,T) bool: prefix_tokens(), most_uncertain(); split: prefix_adv; how: as in group_advantages.
    """
    own = prefix = group_advantages(rewards, group_ids, **how)
    if split:  # plain rows among themselves; a continuation gets its bare reward, its prefix the gain over plain rows
        hybrid = is_prefix.any(1)
        own = torch.where(hybrid, rewards, group_advantages(rewards, 2 * group_ids + hybrid, **how))
        prefix = (rewards.double() - _group_mean(rewards, group_ids, ~hybrid)[0]).to(rewards.dtype)
    return torch.where(is_prefix, prefix[:, None], own[:, None]) * ~(is_prefix & ~keep)


def collect_informative(
    rounds, wanted: int, max_rounds: int = 10
) -> tuple[list, list, list, int, str]:
    """Dynamic sampling: draw rounds of (group, raw rewards) until `wanted` groups carry a signal (DAPO, eq. 11).

    Returns (selected, first come first served; dropped, whose rewards agree; surplus, to be discarded so that all rows
    are on-policy; rounds drawn; "full", "partial" or "empty"). A generator of rounds samples none in vain; it may end.
    """
    informative, dropped, drawn, rounds = [], [], 0, iter(rounds)
    while (
        len(informative) < wanted
        and drawn < max_rounds
        and (batch := next(rounds, None)) is not None
    ):
        drawn += 1
        for group, rewards in batch:
            (informative if max(rewards) > min(rewards) else dropped).append(group)
    status = "full" if len(informative) >= wanted else "partial" if informative else "empty"
    return informative[:wanted], dropped, informative[wanted:], drawn, status


def gate_rows(rewards: Tensor, group_ids: Tensor, is_expert: Tensor, gamma: float = 0.0) -> Tensor:
    """(B,) bool, rows that stay: the expert's, if any, where the rollouts' mean reward is <= gamma, else theirs."""
    success, _ = _group_mean(rewards, group_ids, ~is_expert)
    _, n_experts = _group_mean(rewards, group_ids, is_expert)
    imitate = (success <= gamma + 1e-9) & (
        n_experts > 0
    )  # 1e-9: 2 of 8 meets a gate of 0.25 whatever the rounding
    return imitate == is_expert


def prefix_window(
    step: float, total: float, low_init: float = 0.95, low_target: float = 0.05, high: float = 0.95
):
    """(low, high) of the share of a demonstration given as prefix; low falls along a cosine to low_target."""
    return low_target + 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0))) * (
        low_init - low_target
    ), high


def prefix_length(u: float, window: tuple[float, float], demo_len: int, min_len: int = 1) -> int:
    """Demonstration tokens to copy, u uniform in [0, 1); at least one is left to write; 0 = an ordinary rollout."""
    low, high = window
    return max(0, min(max(int((low + (high - low) * u) * demo_len), min_len), demo_len - 1))


def prefix_tokens(mask: Tensor, prefix_len: Tensor) -> Tensor:
    """(B,T) bool: the first prefix_len (B,) response tokens of each row, wherever its padding lies."""
    return mask & (mask.cumsum(1) <= prefix_len[:, None])


def most_uncertain(entropy: Tensor, among: Tensor, drop_ratio: float = 0.8) -> Tensor:
    """Bool like `among`: its tokens without the int(drop_ratio * n) of lowest entropy; of equal ones, earlier ones go.

    Call it once on all rows of the step (official: by micro-batch), with entropies of the forward that gave old_logp.
    """
    rank = entropy.detach()[among].argsort(stable=True).argsort()  # (n,) 0 = surest
    return torch.zeros_like(among).masked_scatter(among, rank >= int(drop_ratio * len(rank)))


def row_weights(
    lengths: Tensor,
    agg: str = "token-mean",
    group_ids: Tensor | None = None,
    const_len: float | None = None,
    div_seqs: bool = True,
) -> Tensor:
    """Weight of each token of a row, (B,) float64, from the trained tokens (B,) of ALL rows of the step, on all ranks.

    N tokens, S rows with a token, P prompts with a token; const alone counts empty rows in B. An empty row weighs 0.
    """
    n, filled = lengths.double(), lengths > 0
    S = filled.sum().double()
    if agg == "token-mean":
        size = n.sum()
    elif agg == "seq-mean-token-mean":
        size = S * n
    elif agg == "seq-mean-token-sum":
        size = S
    elif agg == "group-token-mean":
        size = len(group_ids[filled].unique()) * (
            (group_ids[:, None] == group_ids).double() @ n
        )  # P N_p
    elif agg == "const":
        size = n.new_tensor(const_len * (len(n) if div_seqs else 1))  # B C, or C
    else:
        raise UserError(
            f"row_weights: unknown agg {agg!r}; choose one of {', '.join(CHOICES['agg'])}"
        )
    return torch.where(filled, 1 / size, 0.0)


def batch_weights(
    objective: Objective, lengths: Tensor, group_ids: Tensor, is_expert: Tensor | None = None
) -> Tensor:
    """(4,B) float64: weight of a row's tokens in the loss's terms policy, imitation, kl and entropy (always 1/N).

    lengths, group_ids, is_expert: (B,) of all rows of the optimizer step on all ranks, in any order.
    """
    how = objective.norm_const, objective.const_div_seqs
    policy = imitation = kl = row_weights(lengths, objective.agg, group_ids, *how)
    if objective.mix_norm == "separate" and is_expert is not None:
        imitation = row_weights(lengths * is_expert)
        if (
            objective.shaping_gamma is None
        ):  # UPT: expert rows have no policy term and no part in its denominator
            rollouts = row_weights(lengths[~is_expert], objective.agg, group_ids[~is_expert], *how)
            policy = torch.zeros_like(kl).masked_scatter(~is_expert, rollouts)
    return torch.stack([policy, imitation, kl, row_weights(lengths)])


def aggregate(ell: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """Scalar: sum of weights[b] * ell[b, t] under the mask. Micro-batches and ranks add up: nothing is averaged."""
    return (torch.where(mask, ell, 0.0) * weights.to(ell.dtype)[:, None]).sum()


class Rows(NamedTuple):
    """What the loss needs of B rows besides the policy's own forward; None = not used."""

    mask: Tensor  # (B,T) bool: trained tokens, EOS included
    advantages: Tensor  # (B,) or (B,T)
    old_logp: Tensor | None = (
        None  # (B,T) under the weights at the start of the round; None = logp, detached
    )
    ref_logp: Tensor | None = None  # (B,T) under the frozen reference, for kl_coef
    rollout_logp: Tensor | None = None  # (B,T) as the sampler saw it, for tis
    is_expert: Tensor | None = (
        None  # (B,) bool: written by the expert; old_logp and rollout_logp are not read
    )
    is_prefix: Tensor | None = None  # (B,T) bool: demonstration tokens at the head of a rollout
    is_success: Tensor | None = None  # (B,) bool: reward above 0.5
    mean_entropy: Tensor | None = (
        None  # (B,) H in SRFT's weights: mean_entropy(); "seq" is filled in by update_loss
    )


def take(rows: Rows, index) -> Rows:
    """Some of the rows, by any index that a tensor accepts."""
    return Rows(*(None if field is None else field[index] for field in rows))


def mean_entropy(entropy: Tensor, mask: Tensor, over: str = "seq") -> Tensor:
    """(B,) detached: mean token entropy of each row or, over "batch", of all rows together (SRFT, equations 14-16)."""
    total, count = torch.where(mask, entropy.detach(), 0.0).sum(1), mask.sum(1)
    if over == "batch":
        total, count = total.sum().expand(len(mask)), count.sum()
    return total / count.clamp(min=1)


def kl_penalty(
    logp: Tensor, ref_logp: Tensor, mask: Tensor, kind: str = "k3", clamp: float | None = None
) -> Tensor:
    """(B,T) KL to the reference by token, d = logp - ref_logp: k1 d, k2 d^2/2, k3 exp(-d) + d - 1 (Schulman 2020)."""
    d = torch.where(mask, logp - ref_logp, 0.0)
    if kind != "k3":
        return d if kind == "k1" else d**2 / 2
    d, bound = (d, math.inf) if clamp is None else (d.clamp(-20, 20), clamp)
    return (torch.exp(-d) + d - 1).clamp(-bound, bound)


def log_ratio(objective: Objective, logp: Tensor, old_logp: Tensor, rollout: Tensor) -> Tensor:
    """(B,T) logp - old_logp on the tokens of rollout (B,T) bool, else 0; by sequence their mean (GSPO, eq. 7)."""
    bound = math.inf if objective.log_ratio_clamp is None else objective.log_ratio_clamp
    d = torch.where(rollout, logp - old_logp, 0.0).clamp(-bound, bound)
    return (
        d
        if objective.surrogate != "sequence"
        else (d.sum(1) / rollout.sum(1).clamp(min=1))[:, None].expand_as(d)
    )


def sampler_weight(
    objective: Objective, old_logp: Tensor, rollout_logp: Tensor, sampled: Tensor
) -> Tensor:
    """(B,T) constant: bounded exp(old_logp - rollout_logp) on sampled (B,T) bool, else 1; by sequence their product."""
    d = torch.where(sampled, old_logp - rollout_logp, 0.0)
    weight = torch.exp(d.sum(1, keepdim=True).expand_as(d) if objective.tis == "sequence" else d)
    bounded = weight.clamp(
        objective.tis_low or 0.0, math.inf if objective.tis_high is None else objective.tis_high
    )
    if objective.tis == "icepop":
        bounded = torch.where(bounded == weight, weight, 0.0)
    return torch.where(sampled, bounded, 1.0)


def surrogate_loss(
    objective: Objective, d: Tensor, logp: Tensor, advantages: Tensor, unclipped: Tensor | None
):
    """(B,T) loss of rollout tokens from their log-ratio d: PPO's clipped ratio (equation 12), dual clip, or CISPO."""
    ratio = torch.exp(d)
    low = -math.inf if objective.clip_low is None else 1 - objective.clip_low
    high = math.inf if objective.clip_high is None else 1 + objective.clip_high
    bounded = ratio.clamp(low, high)
    if objective.surrogate == "cispo":  # a constant weight, so no token loses its gradient
        return -bounded.detach() * advantages * logp
    ell = -ratio * advantages
    clipped = torch.maximum(ell, -bounded * advantages)
    ell = clipped if unclipped is None else torch.where(unclipped, ell, clipped)
    if objective.dual_clip is not None:  # (Ye et al. 2020, eq. 5)
        ell = torch.where(
            advantages < 0, torch.minimum(ell, -objective.dual_clip * advantages), ell
        )
    return ell


def token_loss(objective: Objective, logp: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """(policy, imitation), both (B,T), 0 on padding; when normalised jointly their sum is the loss of each token.

    method [equation]     rollout token                             expert token: policy   imitation
    SFT [10]              -                                         -                      -logp
    GRPO, DAPO [11, 12]   max(-r A, -clip(r) A)                     -                      -
    LUFFY [13]            -r A                                      -A p/(p + 0.1)         -
    SRFT [14-16]          -0.1 exp(H) logp if correct, else +logp   -A p/(p + 0.1)         -0.5 exp(-H) logp
    UPT [17]              max(-r A, -clip(r) A)                     -                      -sft_coef logp
    Prefix-RFT [18, 19]   max(-r A, -clip(r) A), prefix included    -                      -
    """
    mask = rows.mask
    logp = torch.where(
        mask, logp, 0.0
    )  # before any exp: 0 * exp(garbage) is NaN, so is a later where's gradient
    advantages = torch.where(
        mask, rows.advantages if rows.advantages.dim() == 2 else rows.advantages[:, None], 0.0
    )
    expert = torch.zeros_like(mask) if rows.is_expert is None else mask & rows.is_expert[:, None]
    rollout = mask & ~expert
    old_logp = logp.detach() if rows.old_logp is None else rows.old_logp
    H = (
        logp.new_zeros(()) if objective.entropy_weights == "none" else rows.mean_entropy[:, None]
    )  # () or (B,1)
    imitation, success = objective.imitation * torch.exp(-H), objective.success_coef * torch.exp(H)
    if objective.surrogate == "success":
        policy = torch.where(rows.is_success[:, None], -success * logp, logp)
    else:
        d = log_ratio(objective, logp, old_logp, rollout)
        policy = surrogate_loss(
            objective, d, logp, advantages, None if objective.prefix_clip else rows.is_prefix
        )
    if objective.tis != "none":
        sampled = rollout if rows.is_prefix is None else rollout & ~rows.is_prefix
        policy = policy * sampler_weight(objective, old_logp, rows.rollout_logp, sampled)
    policy = torch.where(rollout, policy, 0.0)
    if (
        objective.shaping_gamma is not None
    ):  # p/(p + gamma) as a sigmoid of log-probs: nothing divides by 0
        policy = torch.where(
            expert, -advantages * torch.sigmoid(logp - math.log(objective.shaping_gamma)), policy
        )
    return policy, torch.where(expert, -imitation * logp, 0.0)


def update_loss(
    objective: Objective, logp: Tensor, entropy: Tensor | None, rows: Rows, weights: Tensor
) -> Tensor:
    """Scalar: one micro-batch's share of the step's loss; shares add up over micro-batches and ranks.

    logp, entropy  (B,T)  of this forward; entropy may be None when neither the bonus nor SRFT asks for it
    weights        (4,B)  the same rows' part of batch_weights() of the whole step
    """
    if objective.entropy_weights == "seq":
        rows = rows._replace(mean_entropy=mean_entropy(entropy, rows.mask))
    policy, imitation = token_loss(objective, logp, rows)
    w_policy, w_imitation, w_kl, w_entropy = weights
    loss = aggregate(policy, rows.mask, w_policy) + aggregate(imitation, rows.mask, w_imitation)
    if objective.kl_coef:
        kl = kl_penalty(logp, rows.ref_logp, rows.mask, objective.kl_type, objective.kl_clamp)
        loss = loss + objective.kl_coef * aggregate(kl, rows.mask, w_kl)
    if objective.entropy_coef:
        loss = loss - objective.entropy_coef * aggregate(entropy, rows.mask, w_entropy)
    return loss
