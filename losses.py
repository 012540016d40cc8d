"""Every objective as a per-token loss, a mask and one aggregator: SFT, GRPO, DAPO, LUFFY, SRFT, UPT, Prefix-RFT and their usual options.

The one formula, over all rows b and tokens t of an optimizer step (all its micro-batches, all ranks):
    loss = sum_bt W_b policy_bt + sum_bt U_b imitation_bt + kl_coef sum_bt K_b kl_bt - entropy_coef sum_bt (1/N) H_bt
token_loss() gives `policy` and `imitation` (B,T), batch_weights() gives W, U, K and 1/N (B,) from nothing but the lengths of the step's rows, and
update_loss() adds it up for one micro-batch. Weights are fixed before the first backward, so the gradient does not depend on how a step is cut.

Choices, where papers and official code differ (paper = arXiv 2512.11470, equation numbers are its own):
1) token-mean everywhere by default: W = 1/N, N = trained tokens of the whole step; no micro-batch or rank ever divides by its own count
2) GRPO (11, 12): advantage R - mean of the group, clip 0.2/0.2; DAPO_dc: std on, clip 0.2/0.28. With one update per round the ratio is 1 and no clip acts
3) LUFFY (13): rollouts -A r unclipped; expert tokens -A p/(p + 0.1), the sampler of the demonstration taken as probability 1
4) SRFT (14-16): entropy weights per sequence; signs of the off-policy term as in code that trains, not as the sum is printed
5) UPT (17): a prompt at or below the gate trains on its demonstration alone, any other on its rollouts alone, with GRPO's clip
6) Prefix-RFT (18, 19): the hybrid row is an ordinary group member; of its demonstration tokens only the most uncertain fifth keep an advantage
7) a group whose rewards agree has advantage exactly 0, and so has a group of one

How to use:   objective = replace(OBJECTIVES["dapo"], entropy_coef=0.001);   loss = update_loss(objective, logp, entropy, rows, weights)
Shapes: B rows, T response positions, N trained tokens of the step. Log-probs and entropies in nats, from logits divided by the temperature.
Masks are bool by position. What lies under a False is never read: it may be NaN.
"""
import math
from dataclasses import dataclass, fields
from typing import Iterable, NamedTuple

import torch
from torch import Tensor

AGGREGATORS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "group-token-mean", "const")


@dataclass(frozen=True)
class Objective:
    """What one step minimises. Defaults are GRPO's; the trailing comment of a field is its help text."""
    surrogate: str = "ratio"            # rollout tokens: ratio (policy gradient with importance ratio), cispo, success (SRFT's weighted log-probs)
    sequence_ratio: bool = False        # one ratio per sequence, the geometric mean over its tokens (GSPO; wants agg seq-mean-token-mean, clip 3e-4/4e-4)
    clip_low: float | None = 0.2        # ratios below 1 - this are clipped; none = no lower clip
    clip_high: float | None = 0.2       # ratios above 1 + this are clipped; none = no upper clip
    dual_clip: float | None = None      # cap on the loss of negative advantages, times |A| (verl 3, the paper's scripts 10)
    ratio_cap: float | None = 5.0       # CISPO: largest weight, an absolute ratio
    ratio_floor: float | None = None    # CISPO: smallest weight
    log_ratio_clamp: float | None = None  # clamp of logp - old_logp in nats, no gradient outside (newer verl 20)
    normalize_std: bool = False         # divide advantages by the standard deviation of the group
    adv_ddof: int = 1                   # 1 = unbiased standard deviation (verl, TRL), 0 = population
    adv_eps: float = 1e-6               # added to that standard deviation
    singleton: str = "zero"             # advantage of a group of one: zero, or raw (= its reward, as verl does)
    demo: str = "none"                  # how a demonstration enters: none, row (one more row), gate (instead of the rollouts), prefix (start of a rollout)
    shaping_gamma: float | None = None  # expert tokens: weight p/(p + gamma) on the advantage (LUFFY, SRFT); none = no such term
    imitation: float = 0.0              # expert tokens: coefficient of -logp (UPT's sft_coef, SRFT's 0.5)
    success_coef: float = 0.1           # SRFT: weight of a correct rollout is this times exp(+H)
    entropy_weights: str = "none"       # SRFT: scale imitation by exp(-H) and successes by exp(+H); H of the sequence (seq) or of the whole step (batch)
    success_threshold: float = 0.5      # SRFT: a rollout is correct above this reward
    gate_gamma: float = 0.0             # UPT: imitate when the mean reward of the rollouts is at most this
    prefix_clip: bool = True            # Prefix-RFT: clip the ratio of demonstration tokens too
    prefix_adv: str = "group"           # Prefix-RFT: group (all rows share one baseline) or split (authors' dr_grpo_prefix)
    drop_ratio: float = 0.8             # Prefix-RFT: share of demonstration tokens, the most certain ones, that lose their advantage
    dynamic_sampling: bool = False      # replace prompts whose rewards all agree
    mask_truncated: bool = False        # responses cut by the length limit count in the baseline but train no token
    tis: str = "none"                   # correct for the sampler's own log-probs: none, token, sequence, icepop (token, 0 outside the bounds)
    tis_low: float | None = None        # lower bound of that weight
    tis_high: float | None = 2.0        # upper bound of that weight
    kl_coef: float = 0.0                # penalty against the frozen reference
    kl_type: str = "k3"                 # k1, k2 or k3
    kl_clamp: float | None = None       # k3 within +-this, and its log-ratio within +-20, no gradient outside (verl 10)
    entropy_coef: float = 0.001         # entropy bonus, always a token mean, expert tokens included
    agg: str = "token-mean"             # token-mean, seq-mean-token-mean, seq-mean-token-sum, group-token-mean, const
    norm_const: float = 8192.0          # const: tokens to divide by
    const_div_seqs: bool = True         # const: divide by the number of rows too (Dr. GRPO); off in LUFFY's and UPT's code
    mix_norm: str = "joint"             # joint (one denominator) or separate (imitation: mean over expert tokens; the rest: agg)

    def __post_init__(self):
        allowed = dict(surrogate=("ratio", "cispo", "success"), singleton=("zero", "raw"), demo=("none", "row", "gate", "prefix"),
                       entropy_weights=("none", "seq", "batch"), prefix_adv=("group", "split"), tis=("none", "token", "sequence", "icepop"),
                       kl_type=("k1", "k2", "k3"), agg=AGGREGATORS, mix_norm=("joint", "separate"), adv_ddof=(0, 1))
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"objective: {name} is {getattr(self, name)!r}; choose one of {', '.join(map(str, values))}")
        if self.sequence_ratio and self.surrogate != "ratio":
            raise ValueError(f"objective: sequence_ratio needs surrogate ratio, not {self.surrogate}; switch one of the two off")


_DAPO_DC = Objective(normalize_std=True, clip_high=0.28, dynamic_sampling=True, entropy_coef=0.0)
OBJECTIVES = {
    "grpo": Objective(),
    "dapo_d": Objective(dynamic_sampling=True),
    "dapo_dc": _DAPO_DC,
    "dapo": _DAPO_DC,
    "luffy": Objective(clip_low=None, clip_high=None, demo="row", shaping_gamma=0.1),
    "srft": Objective(surrogate="success", clip_low=None, clip_high=None, demo="row", shaping_gamma=0.1, imitation=0.5, entropy_weights="seq"),
    "upt": Objective(demo="gate", imitation=1.0),
    "prefix_rft": Objective(demo="prefix"),
}


# ---- rewards -> advantages -------------------------------------------------------------------------------------------------------------

def _by_group(values: Tensor, group_ids: Tensor, member: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Member rows of each row's group (B,B) float64, their number (B,) and their mean (B,). B is a few hundred: a (B,B) table beats bookkeeping."""
    same = (group_ids[:, None] == group_ids[None, :]).double()
    if member is not None:
        same = same * member.double()
    count = same.sum(1)
    return same, count, (same * values.double()).sum(1) / count.clamp(min=1)


def is_informative(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """(B,) bool: rows of groups whose rewards are not all equal. Pass raw correctness, before any penalty is added (DAPO, dynamic sampling)."""
    same = group_ids[:, None] == group_ids[None, :]
    # compared, not computed: in floating point the spread of equal rewards need not come out as 0
    return (same & (rewards[None, :] != rewards[:, None])).any(1)


def group_advantages(rewards: Tensor, group_ids: Tensor, normalize_std: bool = False, eps: float = 1e-6, singleton: str = "zero", ddof: int = 1) -> Tensor:
    """Reward minus the mean of its group, optionally over the group's standard deviation (paper, equation 11).

    rewards        (B,)  float   one scalar per row; rows of a group need not be neighbours
    group_ids      (B,)  long    which prompt
    normalize_std                divide by (std + eps); std has B_g - ddof in its denominator
    singleton                    advantage of a group of one: "zero", or "raw" = its reward
    returns        (B,)  float   exactly 0 where all rewards of the group are equal
    """
    same, count, mean = _by_group(rewards, group_ids)
    centred = rewards.double() - mean
    advantages = torch.where(is_informative(rewards, group_ids), centred, torch.zeros_like(centred))
    if normalize_std:
        variance = (same * centred[None, :] ** 2).sum(1) / (count - ddof).clamp(min=1)
        advantages = advantages / (variance.sqrt() + eps)
    if singleton == "raw":
        advantages = torch.where(count == 1, rewards.double(), advantages)
    return advantages.to(rewards.dtype)


def prefix_advantages(objective: Objective, rewards: Tensor, group_ids: Tensor, is_prefix: Tensor, keep: Tensor) -> Tensor:
    """Token advantages of Prefix-RFT (paper, equations 18 and 19).

    rewards, group_ids  (B,)          as in group_advantages
    is_prefix           (B,T) bool    tokens copied from the demonstration: prefix_tokens()
    keep                (B,T) bool    those of them that keep an advantage: most_uncertain()
    returns             (B,T) float   0 on the other demonstration tokens, which still count in N
    """
    options = dict(normalize_std=objective.normalize_std, eps=objective.adv_eps, singleton=objective.singleton, ddof=objective.adv_ddof)
    hybrid = is_prefix.any(1)                                                       # (B,)
    if objective.prefix_adv == "group":
        own = prefix = group_advantages(rewards, group_ids, **options)
    else:
        # authors' dr_grpo_prefix: plain rows are centred among themselves, a continuation gets its bare reward, its prefix the gain over plain rows
        _, _, plain_mean = _by_group(rewards, group_ids, ~hybrid)
        plain = group_advantages(rewards, 2 * group_ids + hybrid.to(group_ids.dtype), **options)
        own = torch.where(hybrid, rewards, plain)
        prefix = rewards - plain_mean.to(rewards.dtype)
    tokens = torch.where(is_prefix, prefix[:, None], own[:, None])                  # (B,T)
    return torch.where(is_prefix & ~keep, torch.zeros_like(tokens), tokens)


def overlong_penalty(length: int, max_len: int, cache_len: int, factor: float = 1.0) -> float:
    """What to add to the reward of a response of `length` tokens: 0, then linear over the last cache_len tokens, -factor at max_len and beyond (DAPO, eq. 13)."""
    return factor * max(-1.0, min(0.0, (max_len - cache_len - length) / cache_len))


# ---- which rows and tokens take part ---------------------------------------------------------------------------------------------------

class Collected(NamedTuple):
    selected: list      # groups to train on, first come first served
    dropped: list       # groups whose rewards all agree
    surplus: list       # informative groups beyond the wanted number: discarded, so that every trained row is from the current policy
    rounds: int         # rounds used
    status: str         # full, partial (train on what there is) or empty (skip the step)


def collect_informative(rounds: Iterable, wanted: int, max_rounds: int = 10) -> Collected:
    """Dynamic sampling: draw rounds of (group, rewards) until `wanted` groups carry a signal (DAPO). A lazy iterator samples only what is needed.

    rounds   iterable of lists of (group, rewards): any object and its raw correctness values; it may end early, which is not an error
    """
    selected, dropped, used = [], [], 0
    iterator = iter(rounds)
    while len(selected) < wanted and used < max_rounds and (batch := next(iterator, None)) is not None:
        used += 1
        for group, rewards in batch:
            (selected if max(rewards) > min(rewards) else dropped).append(group)
    status = "full" if len(selected) >= wanted else "partial" if selected else "empty"
    return Collected(selected[:wanted], dropped, selected[wanted:], used, status)


def gate_rows(rewards: Tensor, group_ids: Tensor, is_expert: Tensor, gamma: float = 0.0) -> Tensor:
    """(B,) bool, rows that stay: where the rollouts' mean reward is <= gamma only the expert's, elsewhere only the rollouts (UPT, equation 17).

    A prompt without an expert row keeps its rollouts whatever their rewards.
    """
    _, _, success = _by_group(rewards, group_ids, ~is_expert)
    _, n_experts, _ = _by_group(rewards, group_ids, is_expert)
    imitate = (success <= gamma + 1e-9) & (n_experts > 0)       # 1e-9: a mean of exactly gamma must not depend on rounding
    return imitate == is_expert


def prefix_window(step: int, total_steps: int, low_init: float = 0.95, low_target: float = 0.05, high: float = 0.95) -> tuple[float, float]:
    """Bounds of the share of a demonstration given as prefix: the lower one falls along a cosine from low_init to low_target (Prefix-RFT)."""
    progress = min(max(step / max(total_steps, 1), 0.0), 1.0)
    return low_target + 0.5 * (1 + math.cos(math.pi * progress)) * (low_init - low_target), high


def prefix_length(u: float, window: tuple[float, float], demo_len: int, min_len: int = 1) -> int:
    """Demonstration tokens to give as prefix, from u uniform in [0, 1). Leaves one token to be generated; 0 = an ordinary rollout (demonstration of 0 or 1)."""
    low, high = window
    return max(0, min(max(int((low + (high - low) * u) * demo_len), min_len), demo_len - 1))


def prefix_tokens(mask: Tensor, prefix_len: Tensor) -> Tensor:
    """(B,T) bool: the first prefix_len (B,) response tokens of each row, wherever its padding lies."""
    return mask & (mask.long().cumsum(1) <= prefix_len[:, None])


def most_uncertain(entropy: Tensor, among: Tensor, drop_ratio: float = 0.8) -> Tensor:
    """Bool like `among`: True on its tokens except the int(drop_ratio * n) of lowest entropy (Prefix-RFT).

    Call it once on all rows of the optimizer step, with entropies of the forward that gives old_logp: a ranking within micro-batches
    (as the official code does) would let the cut decide what is learnt. Ties keep the later token.
    """
    keep = among.clone()
    values = entropy.detach()[among]                                                # (n,) row by row
    dropped = torch.argsort(values, stable=True)[:int(drop_ratio * values.numel())]
    flags = torch.ones_like(values, dtype=torch.bool)
    flags[dropped] = False
    keep[among] = flags
    return keep


# ---- the aggregator --------------------------------------------------------------------------------------------------------------------

def row_weights(lengths: Tensor, agg: str = "token-mean", group_ids: Tensor | None = None, const_len: float | None = None, div_seqs: bool = True) -> Tensor:
    """Weight of each token of a row, from the lengths of ALL rows of the optimizer step over all micro-batches and ranks.

    lengths     (B,)   trained tokens per row; 0 is allowed (a masked row) and never divides
    agg                token-mean 1/N; seq-mean-token-mean 1/(S n_b), S rows with a token; seq-mean-token-sum 1/S;
                       group-token-mean 1/(P N_p), P prompts with a token; const 1/(B const_len), or 1/const_len when not div_seqs
    returns     (B,)   float64; 0 on empty rows
    """
    n = lengths.double()
    filled = n > 0
    if agg == "token-mean":
        weights = torch.ones_like(n) / n.sum().clamp(min=1)
    elif agg in ("seq-mean-token-mean", "seq-mean-token-sum"):
        per_row = n.clamp(min=1) if agg == "seq-mean-token-mean" else torch.ones_like(n)
        weights = 1 / (filled.sum().clamp(min=1) * per_row)
    elif agg == "group-token-mean":
        if group_ids is None:
            raise ValueError("row_weights: agg group-token-mean needs group_ids, the prompt of each row; pass them or choose another agg")
        same = (group_ids[:, None] == group_ids[None, :]).double()
        n_prompts = group_ids[filled].unique().numel()
        weights = 1 / (max(n_prompts, 1) * (same @ n).clamp(min=1))
    elif agg == "const":
        if not const_len:
            raise ValueError("row_weights: agg const needs const_len, the number of tokens to divide by (the longest response allowed)")
        weights = torch.full_like(n, 1 / (const_len * (max(len(n), 1) if div_seqs else 1)))
    else:
        raise ValueError(f"row_weights: unknown agg {agg!r}; choose one of {', '.join(AGGREGATORS)}")
    return torch.where(filled, weights, torch.zeros_like(weights))


class Weights(NamedTuple):
    """Weight of each token of a row for the four terms of the loss, each (B,) float64."""
    policy: Tensor
    imitation: Tensor
    kl: Tensor
    token: Tensor       # 1/N, for the entropy bonus

    def take(self, index) -> "Weights":
        return Weights(*(w[index] for w in self))


def batch_weights(objective: Objective, lengths: Tensor, group_ids: Tensor | None = None, is_expert: Tensor | None = None) -> Weights:
    """The four row weights of a whole optimizer step; lengths, group_ids, is_expert (B,) of all its rows on all ranks, in any order."""
    def weigh(rows: Tensor) -> Tensor:                      # over a subset of the rows, 0 elsewhere
        chosen = row_weights(lengths[rows], objective.agg, None if group_ids is None else group_ids[rows], objective.norm_const, objective.const_div_seqs)
        return torch.zeros(len(lengths), dtype=torch.float64, device=lengths.device).masked_scatter(rows, chosen)

    every = torch.ones_like(lengths, dtype=torch.bool)
    everywhere, token = weigh(every), row_weights(lengths)
    if objective.mix_norm == "joint" or is_expert is None:
        return Weights(everywhere, everywhere, everywhere, token)
    # separate: a method without an advantage term on expert tokens (UPT) has its rollouts alone in the policy term
    policy = everywhere if objective.shaping_gamma is not None else weigh(~is_expert)
    return Weights(policy, row_weights(lengths * is_expert), everywhere, token)


def aggregate(ell: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """Scalar: sum over b, t of weights[b] * ell[b, t] where mask. Micro-batches and ranks add up, nothing is averaged afterwards."""
    return (torch.where(mask, ell, torch.zeros_like(ell)) * weights.to(ell.dtype)[:, None]).sum()


# ---- the per-token losses --------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Rows:
    """The rows of a micro-batch (or of a whole step): what update_loss needs besides the policy's own forward. None = not used."""
    mask: Tensor                        # (B,T) bool: tokens the loss trains, EOS included
    advantages: Tensor                  # (B,) or (B,T)
    old_logp: Tensor | None = None      # (B,T) nats under the weights at the start of the round; None = this forward, detached (one update per round)
    ref_logp: Tensor | None = None      # (B,T) nats under the frozen reference, for kl_coef
    rollout_logp: Tensor | None = None  # (B,T) nats as the sampler saw them, for tis
    is_expert: Tensor | None = None     # (B,) bool: rows written by the expert; their old_logp and rollout_logp are never read
    is_prefix: Tensor | None = None     # (B,T) bool: tokens copied from a demonstration into a rollout
    is_success: Tensor | None = None    # (B,) bool: reward above success_threshold (SRFT)
    mean_entropy: Tensor | None = None  # (B,) nats: H in SRFT's weights; None = of each row, from this forward

    def take(self, index) -> "Rows":
        return Rows(**{f.name: None if (value := getattr(self, f.name)) is None else value[index] for f in fields(self)})


def mean_entropy(entropy: Tensor, mask: Tensor, over: str = "seq") -> Tensor:
    """(B,) nats, detached: mean token entropy of each row, or with over="batch" of all rows together, repeated (SRFT, equations 14-16)."""
    total, count = torch.where(mask, entropy.detach(), torch.zeros_like(entropy)).sum(1), mask.sum(1)
    if over == "batch":
        total, count = total.sum().expand(len(mask)), count.sum().expand(len(mask))
    return total / count.clamp(min=1)


def entropy_weights(entropy: Tensor, imitation: float = 0.5, success: float = 0.1) -> tuple[Tensor, Tensor]:
    """SRFT's weights of an expert row, imitation * exp(-H), and of a correct rollout, success * exp(+H), for H (B,) nats."""
    return imitation * torch.exp(-entropy), success * torch.exp(entropy)


def kl_penalty(logp: Tensor, ref_logp: Tensor, mask: Tensor, kind: str = "k3", clamp: float | None = None) -> Tensor:
    """(B,T) estimate of KL(policy || reference) per token, from d = logp - ref_logp: k1 d, k2 d^2/2, k3 exp(-d) + d - 1 (schulman, "Approximating KL").

    As a loss only k2 has the reverse KL's gradient: k1's is 0 on average, k3's is the forward KL's. clamp: see Objective.kl_clamp.
    """
    d = torch.where(mask, logp - ref_logp, torch.zeros_like(logp))
    if kind == "k1":
        return d
    if kind == "k2":
        return d ** 2 / 2
    d = d if clamp is None else d.clamp(-20, 20)
    value = torch.exp(-d) + d - 1
    return value if clamp is None else value.clamp(-clamp, clamp)


def log_ratio(objective: Objective, logp: Tensor, old_logp: Tensor | None, rollout: Tensor) -> Tensor:
    """(B,T) nats: logp - old_logp on the tokens of `rollout` (B,T) bool, 0 elsewhere; with sequence_ratio the mean over the row (GSPO, eq. 7)."""
    d = torch.where(rollout, logp - (logp.detach() if old_logp is None else old_logp), torch.zeros_like(logp))
    if objective.log_ratio_clamp is not None:
        d = d.clamp(-objective.log_ratio_clamp, objective.log_ratio_clamp)
    if objective.sequence_ratio:
        d = (d.sum(1) / rollout.sum(1).clamp(min=1))[:, None].expand_as(d)
    return d


def sampler_weight(objective: Objective, old_logp: Tensor, rollout_logp: Tensor, sampled: Tensor) -> Tensor:
    """(B,T) constant weight for the gap between trainer and sampler: exp(old_logp - rollout_logp) per token or as the product over a row, bounded.

    Tokens outside `sampled` (expert rows, prefixes, padding) weigh 1. Wrong on top of a ratio that is taken against rollout_logp: it would count twice.
    """
    d = torch.where(sampled, old_logp - rollout_logp, torch.zeros_like(old_logp)).detach()
    if objective.tis == "sequence":
        d = torch.where(sampled, d.sum(1, keepdim=True), torch.zeros_like(d))
    low, high = objective.tis_low, objective.tis_high
    low, high = 0.0 if low is None else low, math.inf if high is None else high
    weight = torch.exp(d)
    bounded = weight * ((weight >= low) & (weight <= high)) if objective.tis == "icepop" else weight.clamp(low, high)
    return torch.where(sampled, bounded, torch.ones_like(bounded))


def surrogate(objective: Objective, ratio_log: Tensor, logp: Tensor, advantages: Tensor, unclipped: Tensor | None = None) -> Tensor:
    """(B,T) policy loss of rollout tokens, all inputs (B,T) with padding already neutral: PPO's clipped ratio (equation 12), or CISPO.

    dual clip (Ye et al. 2020): for A < 0 the loss is at most -A * dual_clip. unclipped: tokens that the clip leaves alone.
    """
    ratio = torch.exp(ratio_log)
    if objective.surrogate == "cispo":      # the clipped ratio is a constant weight, so that no token loses its gradient
        return -ratio.detach().clamp(objective.ratio_floor or 0.0, math.inf if objective.ratio_cap is None else objective.ratio_cap) * advantages * logp
    ell = -ratio * advantages
    if objective.clip_low is not None or objective.clip_high is not None:
        low = -math.inf if objective.clip_low is None else 1 - objective.clip_low
        high = math.inf if objective.clip_high is None else 1 + objective.clip_high
        clipped = torch.maximum(ell, -ratio.clamp(low, high) * advantages)
        ell = clipped if unclipped is None else torch.where(unclipped, ell, clipped)
    if objective.dual_clip is not None:
        ell = torch.where(advantages < 0, torch.minimum(ell, -objective.dual_clip * advantages), ell)
    return ell


def token_loss(objective: Objective, logp: Tensor, rows: Rows, entropy: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The per-token losses (policy, imitation), both (B,T), 0 on padding; in joint normalisation the loss is simply their sum's aggregate.

    logp      (B,T)  nats   log-probs of the response tokens, the only input gradients flow to
    entropy   (B,T)  nats   of the same forward; only SRFT reads it, and only when rows.mean_entropy is None

    method                    rollout token                        expert token: policy            expert token: imitation
    SFT (10)                  -                                    -                               -logp
    GRPO, DAPO (11, 12)       -min(r A, clip(r) A)                 -                               -
    LUFFY (13)                -r A                                 -A p/(p + gamma)                -
    SRFT (14-16)              -0.1 exp(H) logp correct, +logp not  -A p/(p + gamma)                -0.5 exp(-H) logp
    UPT (17)                  -min(r A, clip(r) A)                 -                               -sft_coef logp
    Prefix-RFT (18, 19)       -min(r A, clip(r) A), prefix too     -                               -
    """
    mask = rows.mask
    zero = torch.zeros_like(logp)
    logp = torch.where(mask, logp, zero)                    # before any exp: 0 * exp(garbage) is NaN, and so is its gradient
    advantages = rows.advantages if rows.advantages.dim() == 2 else rows.advantages[:, None]
    advantages = torch.where(mask, advantages.to(logp.dtype), zero)
    expert = torch.zeros_like(mask) if rows.is_expert is None else mask & rows.is_expert[:, None]
    rollout = mask & ~expert
    imitation_weight = torch.full_like(logp[:, 0], objective.imitation)
    if objective.entropy_weights != "none":
        imitation_weight, success_weight = entropy_weights(_row_entropy(objective, rows, entropy), objective.imitation, objective.success_coef)
    if objective.surrogate == "success":
        policy = torch.where(rows.is_success[:, None], -success_weight[:, None] * logp, logp)
    else:
        unclipped = rows.is_prefix if not objective.prefix_clip else None
        policy = surrogate(objective, log_ratio(objective, logp, rows.old_logp, rollout), logp, advantages, unclipped)
    if objective.tis != "none":
        old_logp = logp.detach() if rows.old_logp is None else rows.old_logp
        sampled = rollout if rows.is_prefix is None else rollout & ~rows.is_prefix
        policy = policy * sampler_weight(objective, old_logp, rows.rollout_logp, sampled)
    policy = torch.where(rollout, policy, zero)
    if objective.shaping_gamma is not None:                 # p/(p + gamma), written so that p -> 0 is exact
        policy = torch.where(expert, -advantages * torch.sigmoid(logp - math.log(objective.shaping_gamma)), policy)
    return policy, torch.where(expert, -imitation_weight[:, None] * logp, zero)


def _row_entropy(objective: Objective, rows: Rows, entropy: Tensor | None) -> Tensor:
    """(B,) nats: H of each row for SRFT's weights, given or from this forward; the step's H cannot come from a micro-batch."""
    if rows.mean_entropy is not None:
        return rows.mean_entropy
    if entropy is None or objective.entropy_weights == "batch":
        raise ValueError("token_loss: SRFT's weights need entropy (B,T), and with entropy_weights batch rows.mean_entropy, taken over the whole step")
    return mean_entropy(entropy, rows.mask)


def update_loss(objective: Objective, logp: Tensor, entropy: Tensor | None, rows: Rows, weights: Weights) -> Tensor:
    """Scalar: one micro-batch's share of the step's loss. Add them up over micro-batches and ranks; never divide again.

    logp, entropy  (B,T) nats   this forward; entropy may be None where neither the bonus nor SRFT asks for it
    rows                        the same B rows
    weights                     batch_weights() of the whole step, cut to these B rows
    """
    policy, imitation = token_loss(objective, logp, rows, entropy)
    loss = aggregate(policy, rows.mask, weights.policy) + aggregate(imitation, rows.mask, weights.imitation)
    if objective.kl_coef:
        kl = kl_penalty(logp, rows.ref_logp, rows.mask, objective.kl_type, objective.kl_clamp)
        loss = loss + objective.kl_coef * aggregate(kl, rows.mask, weights.kl)
    if objective.entropy_coef:
        loss = loss - objective.entropy_coef * aggregate(entropy, rows.mask, weights.token)
    return loss


def sft_loss(logp: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """Scalar: one micro-batch's share of SFT's loss, -logp of the response tokens (paper, equation 10); weights = row_weights() of the whole step.

    differs: equation 10 sums over a response (agg seq-mean-token-sum); the default here is the mean over the step's tokens.
    """
    return aggregate(-logp, mask, weights)
