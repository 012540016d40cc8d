"""The objectives once more, by loops over rows and tokens in plain floats; and cases for both.

A case is {"algo", "inputs", "options"}: inputs are lists, as rows and tokens; options are all flags
of the method, written out here so that a changed default cannot hide. Stopped gradients read
case["inputs"]["logp"], live ones the argument logp, so a difference quotient gives the gradient.
"""

import math
import random
import statistics

DEFAULTS = dict(
    surrogate="token",
    clip_low=None,
    clip_high=None,
    dual_clip=None,
    normalize_std=False,
    dynamic_sampling=False,
    mask_truncated=False,
    agg="token-mean",
    norm_const=8.0,
    tis="none",
    tis_low=None,
    tis_high=None,
    kl_coef=0.0,
    kl_type="k3",
    entropy_coef=0.0,
)
CLIP = dict(clip_low=0.2, clip_high=0.2)
METHODS = {
    "grpo": CLIP,
    "dapo_d": {**CLIP, "dynamic_sampling": True},
    "dapo": dict(normalize_std=True, clip_low=0.2, clip_high=0.28, dynamic_sampling=True),
    "dr_grpo": {**CLIP, "agg": "const"},
    "gspo": dict(
        surrogate="sequence",
        agg="seq-mean-token-mean",
        normalize_std=True,
        clip_low=0.1,
        clip_high=0.1,
    ),
    "cispo": dict(surrogate="cispo", clip_high=0.3),
    "luffy": dict(shaping_gamma=0.1),
    "srft": dict(shaping_gamma=0.1, imitation=0.5, success_coef=0.1),
    "upt": {**CLIP, "gate_gamma": 0.25, "sft_coef": 0.7},
    "prefix_rft": {**CLIP, "drop_ratio": 0.6},
}
MIXED = ("luffy", "srft", "upt")  # methods with whole demonstrations as rows
N_ROWS = 14
WIDTH = 5


# ---- cases ---------------------------------------------------------------------------------------
def make_case(algo: str, seed: int = 0, **options) -> dict:
    """Three groups of four, one of one; padded with garbage; group 2 has a fifth row, of no token.

    Groups 0 and 1 have an expert or a hybrid if the method knows such a thing, group 2 has none.
    """
    rng = random.Random(f"{algo} {seed}")
    lengths = [rng.randint(1, WIDTH) for _ in range(N_ROWS - 1)] + [0]
    special = [int(b in (3, 10)) for b in range(N_ROWS)]

    def table(make):
        rows = []
        for b, n in enumerate(lengths):
            garbage = [rng.choice([-200.0, 0.0, 77.0]) for _ in range(WIDTH - n)]
            rows.append([make(b, t) for t in range(n)] + garbage)
        return rows

    def near(width):
        return table(lambda b, t: logp[b][t] + rng.gauss(0, width))

    def reward():
        return float(rng.random() < 0.5) if is_binary else rng.random()

    logp = table(lambda b, t: -rng.expovariate(1.0) - 0.01)
    is_binary = rng.random() < 0.7
    prefixes = []
    for one, n in zip(special, lengths):
        prefixes.append(min(rng.randint(1, 4), max(n - 1, 0)) if one else 0)
    rewards = [reward() for _ in range(N_ROWS)]
    rewards[8] = 1 - rewards[2]  # group 2 carries a signal in any case
    inputs = dict(
        logp=logp,
        old_logp=near(0.3),
        ref_logp=near(1.0),
        rollout_logp=near(0.3),
        entropy=table(lambda b, t: rng.expovariate(1.0)),
        mask=[[int(t < n) for t in range(WIDTH)] for n in lengths],
        group_ids=[0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 2],
        rewards=rewards,
        is_expert=special if algo in MIXED else [0] * N_ROWS,
        prefix_len=prefixes if algo == "prefix_rft" else [0] * N_ROWS,
        truncated=[int(rng.random() < 0.2) for _ in range(N_ROWS)],
    )
    return dict(algo=algo, inputs=inputs, options={**DEFAULTS, **METHODS[algo], **options})


def rows_of(case: dict, rows: list[int]) -> dict:
    """The case with these rows only."""
    inputs = {}
    for name, values in case["inputs"].items():
        inputs[name] = None if values is None else [values[b] for b in rows]
    return {**case, "inputs": inputs}


# ---- which tokens are trained, and their advantages ----------------------------------------------
def active_rows(case: dict) -> list[int]:
    """Rows that dynamic sampling and UPT's gate leave."""
    x = case["inputs"]
    active = []
    for group in sorted(set(x["group_ids"])):
        members = [b for b, g in enumerate(x["group_ids"]) if g == group]
        rollouts = [b for b in members if not x["is_expert"][b]]
        rewards = [x["rewards"][b] for b in rollouts]
        experts = [b for b in members if x["is_expert"][b]]
        agree = len(set(rewards)) == 1
        if case["algo"] == "upt":
            solved = sum(rewards) / len(rewards)
            imitate = experts and solved <= case["options"]["gate_gamma"] + 1e-9
            members = experts if imitate else rollouts
            agree = agree and not imitate
        elif experts and max(rewards) <= 0:
            agree = False  # the demonstration is the only signal
        if case["options"]["dynamic_sampling"] and agree:
            continue
        active += members
    return sorted(active)


def advantage(rewards: list[float], own: float, normalize_std: bool) -> float:
    """Of a row with reward `own` in a group with these rewards, by the definition."""
    if max(rewards) == min(rewards):
        return 0.0
    centred = own - sum(rewards) / len(rewards)
    return centred / (statistics.stdev(rewards) + 1e-6) if normalize_std else centred


def plan(case: dict) -> dict:
    """{(row, token): advantage} of all trained tokens."""
    x = case["inputs"]
    active = active_rows(case)
    tokens = []
    for b in active:
        if not (case["options"]["mask_truncated"] and x["truncated"][b]):
            tokens += [(b, t) for t, trained in enumerate(x["mask"][b]) if trained]
    prefix = [(x["entropy"][b][t], b, t) for b, t in tokens if t < x["prefix_len"][b]]
    n_surest = int(case["options"].get("drop_ratio", 0) * len(prefix))
    surest = {(b, t) for _, b, t in sorted(prefix)[:n_surest]}
    advantages = {}
    for b, t in tokens:
        group = [x["rewards"][i] for i in active if x["group_ids"][i] == x["group_ids"][b]]
        own = advantage(group, x["rewards"][b], case["options"]["normalize_std"])
        advantages[b, t] = 0.0 if (b, t) in surest else own
    return advantages


# ---- the loss ------------------------------------------------------------------------------------
def weight(case: dict, b: int, lengths: dict[int, int]) -> float:
    """Of a token of row b; lengths: trained tokens of each active row."""
    ids = case["inputs"]["group_ids"]
    filled = [i for i, n in lengths.items() if n]
    agg = case["options"]["agg"]
    if agg == "token-mean":
        return 1 / sum(lengths.values())
    if agg == "const":
        return 1 / case["options"]["norm_const"] / len(lengths)
    if agg == "group-token-mean":
        mine = sum(n for i, n in lengths.items() if ids[i] == ids[b])
        return 1 / len({ids[i] for i in filled}) / mine
    if agg == "seq-mean-token-sum":
        return 1 / len(filled)
    assert agg == "seq-mean-token-mean"
    return 1 / len(filled) / lengths[b]


def ratio(case: dict, logp: list, b: int, t: int, row: list[int]) -> float:
    """exp of the log-ratio of a token, or of its mean over the row's tokens."""
    old = case["inputs"]["old_logp"] or case["inputs"]["logp"]
    if case["options"]["surrogate"] == "sequence":
        return math.exp(sum(logp[b][s] - old[b][s] for s in row) / len(row))
    return math.exp(logp[b][t] - old[b][t])


def sampler_weight(case: dict, b: int, t: int, row: list[int]) -> float:
    """Weight of the gap between trainer and sampler; tokens that were not sampled weigh 1."""
    x = case["inputs"]
    h = case["options"]
    n_prefix = x["prefix_len"][b]
    if h["tis"] == "none" or t < n_prefix:
        return 1.0
    old = x["old_logp"] or x["logp"]
    gaps = {s: old[b][s] - x["rollout_logp"][b][s] for s in row if s >= n_prefix}
    found = math.exp(sum(gaps.values()) if h["tis"] == "sequence" else gaps[t])
    low = h["tis_low"] or 0.0
    high = math.inf if h["tis_high"] is None else h["tis_high"]
    if h["tis"] == "icepop":
        return found if low <= found <= high else 0.0
    return max(low, min(high, found))


def rollout_token(case: dict, logp: list, b: int, t: int, row: list[int], A: float) -> float:
    """The loss of one token that the policy wrote."""
    x = case["inputs"]
    h = case["options"]
    if case["algo"] == "srft":
        H = sum(x["entropy"][b][s] for s in row) / len(row)
        right = x["rewards"][b] > 0.5
        return -h["success_coef"] * math.exp(H) * logp[b][t] if right else logp[b][t]
    low = -math.inf if h["clip_low"] is None else 1 - h["clip_low"]
    high = math.inf if h["clip_high"] is None else 1 + h["clip_high"]
    if h["surrogate"] == "cispo":
        r = ratio(case, x["logp"], b, t, row)
        return -max(low, min(high, r)) * A * logp[b][t]
    r = ratio(case, logp, b, t, row)
    ell = -min(r * A, max(low, min(high, r)) * A)
    if h["dual_clip"] is not None and A < 0:
        return min(ell, -A * h["dual_clip"])
    return ell


def expert_token(case: dict, logp: list, b: int, t: int, row: list[int], A: float) -> float:
    """The loss of one token of a demonstration."""
    h = case["options"]
    p = math.exp(case["inputs"]["logp"][b][t])  # held constant in the weight of imitation
    weight = p / max(p, h.get("trust_alpha", 0.0))
    if case["algo"] == "upt":
        return -h["sft_coef"] * weight * logp[b][t]
    p = math.exp(logp[b][t])
    ell = -A * p / (p + h["shaping_gamma"])
    if case["algo"] == "srft":
        H = sum(case["inputs"]["entropy"][b][s] for s in row) / len(row)
        ell -= h["imitation"] * math.exp(-H) * weight * logp[b][t]
    return ell


def kl(case: dict, logp: list, b: int, t: int) -> float:
    d = logp[b][t] - case["inputs"]["ref_logp"][b][t]
    estimates = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) + d - 1}
    return estimates[case["options"]["kl_type"]]


def loss(case: dict, logp: list, advantages: dict) -> float:
    """The whole step's loss, token by token; advantages: plan(case)."""
    x = case["inputs"]
    h = case["options"]
    rows = {b: [t for i, t in advantages if i == b] for b in active_rows(case)}
    lengths = {b: len(row) for b, row in rows.items()}
    total = 0.0
    for (b, t), A in advantages.items():
        if x["is_expert"][b]:
            ell = expert_token(case, logp, b, t, rows[b], A)
        else:
            ell = rollout_token(case, logp, b, t, rows[b], A)
            ell *= sampler_weight(case, b, t, rows[b])
        if h["kl_coef"]:
            ell += h["kl_coef"] * kl(case, logp, b, t)
        total += ell * weight(case, b, lengths)
        total -= h["entropy_coef"] * x["entropy"][b][t] / len(advantages)
    return total
