"""The sampler: prompts in, responses out, each token with its log-prob under the policy that chose it.

    responses = generate(model, prompts, n=8, max_new=512, temperature=1.0, eos_ids=[2], seed=0)

How it works: the cache has one row per response and one slot per position. A wave of at most `rows` responses starts
together: each prompt is read once (prefill), its cache row is copied to the n responses of its group, then every step
feeds one token a row and draws the next. Rows stand at positions of their own, so prompts need no padding on the left.
When a quarter of the rows have finished, the cache is cut down to the others.

Choices: 1) EOS is a chosen token like any other: it is returned with its log-prob, and the trainer learns to choose it.
2) A response depends on (weights, prompt, seed, request number) only: each request has a stream of uniform numbers, and
the token is where the cumulated distribution passes the next of them. Neighbours and row numbers change nothing but
rounding. 3) Log-probs are those of the distribution sampled from, at the sampling temperature. top_p would make them
differ from the trainer's, so it is for evaluation; rl.py does not pass it.
Shapes: R rows (responses in flight), V vocabulary. Log-probs and entropies in nats.
"""
from typing import NamedTuple

import torch

import run
from model import Cache, head_logits


class Response(NamedTuple):
    """ids end with EOS if finished; logp and entropy: one number a token, of the sampling distribution."""
    ids: list[int]
    logp: list[float]
    entropy: list[float]
    finished: bool


def draw(logits: torch.Tensor, uniform: torch.Tensor, temperature: float,
         top_p: float = 1.0) -> tuple[torch.Tensor, ...]:
    """One token a row. logits (R, V), uniform (R,) in [0, 1) -> token (R,), logp (R,), entropy (R,).

    Temperature 0 is greedy; greedy choices report the log-prob at temperature 1.
    """
    logp = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)  # (R, V) nats
    probs = logp.exp()
    entropy = -(probs * logp.clamp_min(-1e4)).sum(-1)                        # clamped: 0 * -inf is NaN
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        if top_p < 1:
            ranked, order = probs.sort(-1, descending=True)
            beyond = ranked.cumsum(-1) - ranked >= top_p  # the first token always stays
            probs = torch.zeros_like(probs).scatter(-1, order, ranked.masked_fill(beyond, 0.0))
        mass = probs.cumsum(-1, dtype=torch.float64)      # fp32 sums over 150,000 tokens drift
        token = torch.searchsorted(mass, uniform[:, None] * mass[:, -1:], right=True)[:, 0]
        token = token.clamp_max(logits.shape[-1] - 1)
    return token, logp.gather(-1, token[:, None])[:, 0], entropy


@torch.no_grad()
def generate(model, prompts: list[list[int]], n: int | list[int] = 1, max_new: int = 512, temperature: float = 1.0,
             eos_ids=(), seed: int = 0, rows: int = 512, top_p: float = 1.0, progress=None) -> list[list[Response]]:
    """Sample n responses (one number for all prompts, or one each) to each prompt (token ids): one list per prompt.

    max_new: tokens, EOS included; a response that reaches it without EOS has finished = False. seed: with the request
    number (counted through all prompts' responses) it fixes every draw. progress(done, total): called after each wave.
    """
    counts = [n] * len(prompts) if isinstance(n, int) else n
    if any(len(p) == 0 for p in prompts):
        raise ValueError(f"prompt {[len(p) for p in prompts].index(0)} has no tokens; a prompt needs at least one")
    was_training = model.training
    model.eval()
    groups: list[list[Response]] = []
    first = done = 0  # the wave's first prompt, and its first request
    while first < len(prompts):
        last, in_wave = first + 1, counts[first]
        while last < len(prompts) and in_wave + counts[last] <= rows:
            last, in_wave = last + 1, in_wave + counts[last]
        wave = _wave(model, prompts[first:last], counts[first:last], done, max_new, temperature, eos_ids, seed, top_p)
        for count in counts[first:last]:
            groups.append(wave[:count])
            wave = wave[count:]
        first, done = last, done + in_wave
        if progress:
            progress(done, sum(counts))
    model.train(was_training)
    return groups


def _prefill(model, prompts: list[list[int]], slots: int) -> tuple[Cache, torch.Tensor]:
    """Read the prompts, padded on the right. Returns their cache and the hidden state at each one's last token (P, D).

    What padding writes into the cache stands beyond the row's position: never seen, and overwritten by the response.
    """
    device = model.head.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    T = int(lengths.max())
    ids = torch.tensor([p + [0] * (T - len(p)) for p in prompts], device=device)  # (P, T)
    cache = Cache(model.config, len(prompts), slots, model.head.dtype, device)
    hidden = model(ids, torch.arange(T, device=device).expand_as(ids), cache)     # (P, T, D)
    return cache, hidden[torch.arange(len(prompts), device=device), lengths - 1]


def _wave(model, prompts, counts, first_request, max_new, temperature, eos_ids, seed, top_p) -> list[Response]:
    """Sample counts[i] responses to prompt i, all at once. Returns them flat, group after group."""
    device, R = model.head.device, sum(counts)
    cache, hidden = _prefill(model, prompts, max(len(p) for p in prompts) + max_new)
    group = torch.arange(len(prompts)).repeat_interleave(torch.tensor(counts)).to(device)  # (R,) the prompt of each row
    cache.select(group)
    hidden = hidden[group]
    position = torch.tensor([len(p) for p in prompts], device=device)[group]  # (R,) where the next token goes
    streams = [run.generator(seed, "request", first_request + r) for r in range(R)]
    uniform = torch.stack([torch.rand(max_new, generator=g, dtype=torch.float64) for g in streams])  # (R, max_new)
    uniform = uniform.to(device)
    eos = torch.tensor(sorted(eos_ids), device=device)
    live = torch.arange(R, device=device)                   # which request each cache row serves
    alive = torch.ones(R, dtype=torch.bool, device=device)  # rows of `live` still growing
    out = [torch.zeros(R, max_new, dtype=dtype, device=device) for dtype in (torch.long, torch.float32, torch.float32)]
    length = torch.zeros(R, dtype=torch.long, device=device)
    finished = torch.zeros(R, dtype=torch.bool, device=device)
    for t in range(max_new):
        token, logp, entropy = draw(head_logits(hidden, model.head), uniform[live, t], temperature, top_p)
        for store, value in zip(out, (token, logp, entropy)):
            store[live, t] = value
        length[live] += alive
        finished[live] |= alive & torch.isin(token, eos)
        alive = alive & ~finished[live]
        n_alive = int(alive.sum())  # the one wait for the device a step
        if n_alive == 0 or t + 1 == max_new:
            break
        if n_alive <= 0.75 * len(live):
            kept = alive.nonzero()[:, 0]
            cache.select(kept)
            live, token, position, alive = live[kept], token[kept], position[kept], alive[kept]
        hidden = model(token[:, None], position[:, None], cache)[:, 0]  # (R, D)
        position = position + 1
    ids, logp, entropy = (store.cpu() for store in out)
    return [Response(ids[r, :k].tolist(), logp[r, :k].tolist(), entropy[r, :k].tolist(), bool(finished[r]))
            for r, k in enumerate(length.tolist())]
