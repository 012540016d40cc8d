"""The sampler: prompts in, responses out, with the log-prob of each token under the policy.

    responses = generate(model, prompts, n=8, Sampling(max_new=512, eos_ids=(2,), seed=0))
    python rollout.py --init runs/rl "Make 35 from 9 8 9 9 ->"     talk to it: paper/talk.py

Continuous batching. The cache has a fixed number of rows; a row holds one response at its own
position:

    step    1  2  3  4  5  6  7  8  9 ...        waiting: requests 3, 4, 5, ...
    row 0   a  a  a  a  EOS|4  4  4  4           a ended at step 5: request 4 begins at step 6
    row 1   b  b  EOS|3  3  3  3  3  EOS|5       a static batch would idle here until row 2 ends
    row 2   c  c  c  c  c  c  c  c  c

Each turn of the loop in generate() does three things:
    fit     the cache grows when the longest running row reaches its end. Where the memory then
            holds fewer rows, the last ones return to the queue, with what they have drawn
    admit   waiting requests get the free rows. A prompt is read once (prefill, several prompts at
            a time) except for its last token; its keys and values are copied to its group's rows
    step    each running row feeds its newest token (at first the prompt's last) and draws the next
            one. Rows that ended are removed and the last rows take their places, so only running
            rows are computed

Choices: 1) EOS is a token like any other: it is returned with its log-prob, and the trainer learns
to choose it. 2) A response depends on (weights, prompt, seed, request number) alone: each request
has its own stream of uniform numbers. Neighbours, order and rows change nothing but rounding.
3) So a request that returned to the queue reads its own tokens like a prompt and continues, as in
vLLM. 4) Log-probs are those of softmax(logits / temperature). top_p and top_k draw from another
distribution, which the trainer does not have: they are for evaluation. 5) Unlike vLLM's the cache
is not paged: the slots of a row are contiguous, so attention is one PyTorch kernel.
The network's step, its cache and CUDA graphs are in core/decode.py. Log-probs and entropies are in
nats. Shapes: n running rows, V vocabulary, P prompts read at once, T tokens.
"""

import importlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import core.start  # before torch

import numpy as np
import torch

from core import ranks
from core.decode import GRAPH_BYTES, MAX_GRAPHS, Cache, Decoder, Graphs, decoder_of
from core.draw import draw
from core.errors import UserError
from core.wide import wide

BLOCK = 64  # slots by which the cache grows
PREFILL = 2048  # prompt tokens read at once, padding included; at least one prompt


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn, and within which limits."""

    max_new: int | list[int] = 512  # tokens, EOS included: one number, or one per request
    temperature: float = 1.0  # 0 = greedy, with log-probs at temperature 1
    eos_ids: tuple | list = ()  # tokens that end a response
    seed: int = 0  # with the request number it fixes every draw
    rows: int = 512  # responses that run at once, at most
    top_p: float = 1.0  # draw among the fewest tokens that reach this probability
    top_k: int = 0  # draw among the likeliest top_k tokens; 0 = all
    cache_bytes: int | None = None  # of keys and values; None: 90% of what is free (CPU: half)
    bucketed: bool | None = None  # round sizes up, as CUDA graphs need it; None: on CUDA only


@dataclass
class Hooks:
    """Functions that generate() calls on the way."""

    progress: Callable | None = None  # (n_done, n_total) whenever responses have ended
    on_response: Callable | None = None  # (request, response) as each one ends
    on_forward: Callable | None = None  # ("read" or "step", rows, cache) before each forward


class Response(NamedTuple):
    """One response. logp and entropy: one number per token, of the sampling distribution."""

    ids: list[int]  # the last one is an EOS if finished
    logp: list[float]
    entropy: list[float]
    finished: bool


@dataclass
class Request:
    """One response that is asked for."""

    prompt: int  # index of its prompt
    number: int  # counted through all prompts; seeds the stream of its draws
    limit: int  # tokens, EOS included
    tokens: list[int]  # the prompt, and what was drawn before the request returned to the queue
    n_prompt: int
    drawn: tuple = ((), (), ())  # ids, logp, entropy of those
    source: tuple = ()  # key of its prefill: a group shares one until a request is returned
    began: int = 0  # while it runs: steps - began = tokens drawn, see ContinuousBatch


def requests_of(
    prompts: list[list[int]], n: int | list[int], max_new: int | list[int]
) -> list[Request]:
    """n requests per prompt (one number, or one each), in the order of their numbers.

    Raises UserError where a prompt is empty, or max_new has a wrong length or a number below 1.
    """
    counts = [n] * len(prompts) if isinstance(n, int) else n
    limits = [max_new] * sum(counts) if isinstance(max_new, int) else max_new
    if len(limits) != sum(counts) or min(limits, default=1) < 1:
        raise UserError(
            f"max_new: {len(limits)} numbers for {sum(counts)} requests, the least "
            f"{min(limits, default=0)}; give one number for all, or one each, and 1 at least"
        )
    requests = []
    for i, (tokens, count) in enumerate(zip(prompts, counts, strict=True)):
        if not tokens:
            raise UserError(f"prompt {i} has no tokens; a prompt needs at least one")
        for _ in range(count):
            number = len(requests)
            request = Request(i, number, limits[number], tokens, len(tokens), source=(i,))
            requests.append(request)
    return requests


@torch.no_grad()
def generate(
    model,
    prompts: list[list[int]],
    n: int | list[int],
    sampling: Sampling,
    hooks: Hooks | None = None,
) -> list[list[Response]]:
    """Sample n responses (one number, or one per prompt) to each prompt: one list per prompt.

    Several processes share the prompts, and each returns all responses. Raises UserError where a
    prompt is empty or one request alone exceeds the memory. A KeyboardInterrupt passes through;
    the model is then as it was before.
    """
    hooks = hooks or Hooks()
    requests = requests_of(prompts, n, sampling.max_new)
    mine = [r for r in requests if r.prompt % ranks.world() == ranks.rank()]  # groups stay whole
    responses: list = [None] * len(requests)
    n_done = 0
    was_training = model.training
    model.eval()
    try:
        with decoder_of(model) as decoder:
            batch = ContinuousBatch(decoder, mine, sampling, hooks.on_forward)
            while batch.waiting or batch.running:
                batch.fit()
                batch.admit()
                ended = batch.step()
                for request, response in ended:
                    responses[request.number] = response
                    if hooks.on_response:
                        hooks.on_response(request, response)
                n_done += len(ended)
                if hooks.progress and ended:
                    hooks.progress(n_done, len(mine))
            del batch  # frees its cache before the weights return to their own layout
    finally:
        model.train(was_training)
    if ranks.world() > 1:
        numbered = [(r.number, responses[r.number]) for r in mine]
        for packed in ranks.gather_bytes(_pack(numbered)):
            for number, response in _unpack(packed):
                responses[number] = response
    groups: list[list[Response]] = [[] for _ in prompts]
    for request, response in zip(requests, responses):
        groups[request.prompt].append(response)
    return groups


def _pack(numbered: list[tuple[int, Response]]) -> bytes:
    """Numbered responses for the other ranks, 12 bytes per token (JSON takes 50): a line of JSON,
    then for each response its ids, log-probs and entropies."""
    head = [(number, len(r.ids), r.finished) for number, r in numbered]
    parts = [json.dumps(head).encode(), b"\n"]
    for _, r in numbered:
        parts.append(np.array(r.ids, np.int32).tobytes())
        parts.append(np.array([r.logp, r.entropy], np.float32).tobytes())
    return b"".join(parts)


def _unpack(packed: bytes) -> Iterator[tuple[int, Response]]:
    """The reverse of _pack()."""
    head, _, body = packed.partition(b"\n")
    at = 0
    for number, n, finished in json.loads(head):
        ids = np.frombuffer(body, np.int32, n, at).tolist()
        logp, entropy = np.frombuffer(body, np.float32, 2 * n, at + 4 * n).reshape(2, n).tolist()
        yield number, Response(ids, logp, entropy, finished)
        at += 12 * n


class ContinuousBatch:
    """The requests that wait and the ones that run, with the state of the running ones.

    Row r of the cache and of each tensor below serves running[r]. A request has drawn steps - began
    tokens, so the coming step feeds its token at position n_prompt - 1 + steps - began.
    """

    def __init__(self, decoder: Decoder, requests: list[Request], sampling: Sampling, on_forward):
        device = decoder.device
        self.decoder = decoder
        self.device = device
        self.sampling = sampling
        self.on_forward = on_forward or (lambda what, rows, cache: None)
        self.waiting = deque(sorted(requests, key=lambda r: (-len(r.tokens), r.number)))
        self.running: list[Request] = []
        self.steps = 0  # steps done so far
        self.rows = min(sampling.rows, len(requests))
        # The last token drawn is never fed.
        self.slots = max((len(r.tokens) + r.limit - 1 for r in requests), default=0)
        c = decoder.config
        per_layer = 2 * c.num_key_value_heads * c.head_dim * decoder.dtype.itemsize
        self.slot_bytes = per_layer * c.num_hidden_layers
        self.budget = cache_budget(decoder, self.rows, sampling)
        if self.slots * self.slot_bytes > self.budget:
            worst = max(requests, key=lambda r: len(r.tokens) + r.limit)
            raise UserError(
                f"prompt {worst.prompt}: {len(worst.tokens)} tokens and max_new {worst.limit} "
                f"need {self.slots * self.slot_bytes / 1e6:.1f} MB of cache, and "
                f"{self.budget / 1e6:.1f} MB are given; lower max_new or give more"
            )
        self.cache = Cache(c, 0, 0, decoder.dtype, device)
        self.prompt_cache: Cache | None = None
        self.prompt_row: dict[tuple, int] = {}  # row of prompt_cache in which a source was read
        bucketed = sampling.bucketed
        self.bucketed = device.type == "cuda" if bucketed is None else bucketed
        self.graphs: Graphs | None = None  # of steps on the present cache, where sizes are bucketed

        width = max((r.limit for r in requests), default=0)
        per_row = (self.rows,)
        per_token = (self.rows, width)
        self.token = torch.zeros(per_row, dtype=torch.long, device=device)  # the newest
        self.position = torch.zeros(per_row, dtype=torch.long, device=device)  # of that token
        self.drawn = torch.zeros(per_row, dtype=torch.long, device=device)  # tokens drawn so far
        self.limit = torch.zeros(per_row, dtype=torch.long, device=device)
        self.alive = torch.zeros(per_row, dtype=torch.long, device=device)  # 1 = serves a request
        self.ended = torch.zeros(per_row, dtype=torch.bool, device=device)
        self.uniform = wide(torch.zeros(per_token, device=device))
        self.ids = torch.zeros(per_token, dtype=torch.long, device=device)
        self.logp = torch.zeros(per_token, dtype=torch.float32, device=device)
        self.entropy = torch.zeros(per_token, dtype=torch.float32, device=device)
        self.eos_ids = torch.tensor(sorted(sampling.eos_ids), dtype=torch.long, device=device)

    def top(self) -> int:
        """1 + the largest position of the coming step, known without asking the device."""
        return max((r.n_prompt + self.steps - r.began for r in self.running), default=0)

    def fit(self) -> None:
        """Give the cache the slots of the coming step, and the rows that the memory then holds.

        Rows without memory return to the queue. The cache shrinks when half of its slots or more
        are beyond every row, and requests wait that could use the memory.
        """
        longest = self.top()
        if self.waiting and len(self.running) < self.rows:
            longest = max(longest, len(self.waiting[0].tokens))
        slots = min(-(-longest // BLOCK) * BLOCK, self.slots)
        rows = min(self.rows, len(self.running) + len(self.waiting))
        starved = self.waiting and self.cache.rows < rows
        if slots <= self.cache.slots and not (starved and slots <= self.cache.slots // 2):
            return
        # Growing by a half keeps copies and new sizes few, where the memory holds it for all rows.
        half_more = -(-self.cache.slots * 3 // 2 // BLOCK) * BLOCK
        roomy = min(max(slots, half_more), self.slots)
        if slots > self.cache.slots and rows * roomy * self.slot_bytes <= self.budget:
            slots = roomy
        rows = min(rows, self.budget // (slots * self.slot_bytes))
        if len(self.running) > rows:
            for request, drawn in self.remove(list(range(rows, len(self.running)))):
                request.drawn = drawn
                request.tokens = request.tokens[: request.n_prompt] + drawn[0]
                request.source = (request.prompt, request.number, len(drawn[0]))
                self.waiting.append(request)
            self.waiting = deque(sorted(self.waiting, key=lambda r: (-len(r.tokens), r.number)))
        self.cache.used = min(self.cache.used, self.top())
        self.cache.resize(rows, slots)
        if self.bucketed:
            self.graphs = Graphs(self.device)

    def admit(self) -> None:
        """Begin waiting requests in free rows."""
        while self.waiting and len(self.running) < self.cache.rows:
            if self.waiting[0].source not in self.prompt_row:
                self._prefill()
            begun: list[Request] = []
            n_free = self.cache.rows - len(self.running)
            while self.waiting and len(begun) < n_free:
                if self.waiting[0].source not in self.prompt_row:
                    break
                begun.append(self.waiting.popleft())
            first = len(self.running)
            self.running += begun
            rows = torch.arange(first, len(self.running), device=self.device)
            prompt_rows = [self.prompt_row[r.source] for r in begun]
            index = torch.tensor(prompt_rows, device=self.device)
            self.cache.put(rows, self.prompt_cache, index, max(len(r.tokens) for r in begun) - 1)
            state = (self.token, self.position, self.drawn, self.limit, self.alive)
            values = [(r.tokens[-1], len(r.tokens) - 1, len(r.drawn[0]), r.limit, 1) for r in begun]
            columns = torch.tensor(values, device=self.device).T
            for tensor, column in zip(state, columns):
                tensor[first : len(self.running)] = column
            for row, r in enumerate(begun, first):
                r.began = self.steps - len(r.drawn[0])
                # Drawn on the CPU, so that a GPU draws the same tokens.
                stream = ranks.generator(self.sampling.seed, "request", r.number)
                uniform = torch.rand(r.limit, generator=stream, dtype=torch.float64)
                self.uniform[row, : r.limit] = uniform.to(self.uniform.dtype).to(self.device)
                for store, earlier in zip((self.ids, self.logp, self.entropy), r.drawn):
                    store[row, : len(earlier)] = torch.tensor(earlier, dtype=store.dtype)

    def _prefill(self) -> None:
        """Read the next waiting prompts except for their last tokens, padded to the longest.

        The longest is the first. What padding writes into the cache lies beyond the row's position:
        it is never seen, and the response overwrites it.
        """
        T = len(self.waiting[0].tokens) - 1
        chosen = []
        self.prompt_row = {}
        for request in self.waiting:
            if request.source in self.prompt_row:
                continue
            if chosen and (len(chosen) + 1) * T > PREFILL:
                break
            self.prompt_row[request.source] = len(chosen)
            known = request.tokens[:-1]
            chosen.append(known + [0] * (T - len(known)))
        config = self.decoder.config
        self.prompt_cache = Cache(config, len(chosen), T, self.decoder.dtype, self.device)
        if T:
            self.on_forward("read", len(chosen), self.prompt_cache)
            ids = torch.tensor(chosen, device=self.device)  # (P, T)
            self.decoder.read(ids, self.prompt_cache)

    def step(self) -> list[tuple[Request, Response]]:
        """Feed each running row its newest token and draw the next. Returns what has ended."""
        n = len(self.running)
        rows = n
        top = self.top()
        if self.bucketed:  # few sizes, so that few graphs serve; free rows decode at position 0
            # The next power of 2 up to 64, above it the next multiple of 32
            rows = 1 << (n - 1).bit_length() if n <= 64 else -(-n // 32) * 32
            rows = min(rows, self.cache.rows)
            top = min(-(-top // BLOCK) * BLOCK, self.cache.slots)
        self.on_forward("step", rows, self.cache)
        if self.bucketed:
            self.graphs.run((rows, top), lambda: self._advance(rows, top))
        else:
            self._advance(rows, top)
        self.steps += 1
        ended = self.ended[:n].nonzero()[:, 0].tolist()  # waits for the device, once per step
        if not ended:
            return []
        finished = []
        for request, (ids, logp, entropy) in self.remove(ended):
            response = Response(ids, logp, entropy, ids[-1] in self.sampling.eos_ids)
            finished.append((request, response))
        return finished

    def _advance(self, n: int, top: int) -> None:
        """Draw a token in each of the first n rows. CUDA graphs record it, so it works in place."""
        token = self.token[:n]  # a view, like the next two
        position = self.position[:n]
        drawn = self.drawn[:n]
        s = self.sampling
        logits = self.decoder.step(token, position, self.cache, top)  # (n, V)
        uniform = self.uniform[:n].gather(1, drawn[:, None])[:, 0]
        chosen, logp, entropy = draw(logits, uniform, s.temperature, s.top_p, s.top_k)  # (n,) each
        self.ids[:n].scatter_(1, drawn[:, None], chosen[:, None])
        self.logp[:n].scatter_(1, drawn[:, None], logp[:, None])
        self.entropy[:n].scatter_(1, drawn[:, None], entropy[:, None])
        token.copy_(chosen)
        position += self.alive[:n]
        drawn += self.alive[:n]
        is_eos = (token[:, None] == self.eos_ids).any(1)
        torch.logical_or(drawn == self.limit[:n], is_eos, out=self.ended[:n])

    def remove(self, rows: list[int]) -> list[tuple[Request, tuple[list, list, list]]]:
        """Take these rows (ascending) out of the batch; the last rows move into their places.

        Returns the request of each one with (ids, logp, entropy) of all tokens that it has drawn.
        """
        index = torch.tensor(rows, device=self.device)
        stores = [x.index_select(0, index).cpu() for x in (self.ids, self.logp, self.entropy)]
        removed = []
        for i, row in enumerate(rows):
            request = self.running[row]
            n_drawn = self.steps - request.began
            drawn = tuple(store[i, :n_drawn].tolist() for store in stores)
            removed.append((request, drawn))
        n = len(self.running) - len(rows)
        holes = [row for row in rows if row < n]
        movers = sorted(set(range(n, len(self.running))) - set(rows))
        for hole, mover in zip(holes, movers):
            self.running[hole] = self.running[mover]
        del self.running[n:]
        if holes:
            to = torch.tensor(holes, device=self.device)
            source = torch.tensor(movers, device=self.device)
            self.cache.put(to, self.cache, source, min(self.top(), self.cache.slots))
            state = (self.token, self.position, self.drawn, self.limit, self.uniform)
            for x in (*state, self.ids, self.logp, self.entropy):
                x.index_copy_(0, to, x.index_select(0, source))
        for x in (self.alive, self.position, self.drawn):  # a padded step computes free rows too
            x[n:] = 0
        return removed


def cache_budget(decoder: Decoder, rows: int, sampling: Sampling) -> int:
    """Bytes for keys and values of the running rows."""
    if sampling.cache_bytes is not None:
        return sampling.cache_bytes
    if decoder.device.type == "cuda":
        torch.cuda.empty_cache()  # what training has left in PyTorch's own store counts as free
        free, _ = torch.cuda.mem_get_info(decoder.device)
        # Logits and what draw() makes of them, in the memory of the graphs and outside.
        per_logit = 96 if sampling.top_p < 1 or sampling.top_k else 36  # bytes
        scratch = per_logit * rows * decoder.config.vocab_size
        graphs = MAX_GRAPHS * GRAPH_BYTES * decoder.config.num_hidden_layers
        return int(0.9 * free) - scratch - graphs
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        available = re.search(r"MemAvailable: *(\d+) kB", meminfo.read_text())
        free = 1024 * int(available[1])
    else:  # macOS: half of the memory counts as available
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return free // (2 * ranks.world())


if __name__ == "__main__":  # by name, so that this file imports nothing of paper/
    importlib.import_module("paper.talk").start()
