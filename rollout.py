"""The sampler: prompts in, responses out, each token with its log-prob under the policy that chose it.

    responses = generate(model, prompts, n=8, max_new=512, temperature=1.0, eos_ids=[2], seed=0)

Continuous batching. The cache has a fixed number of rows, and a row holds one response at a position of its own:

    step      1  2  3  4  5  6  7  8  9 ...          waiting: request 4, request 5, ...
    row 0     a  a  a  a  EOS|4  4  4  4             ended at step 5, so request 4 decodes in it at step 6
    row 1     b  b  EOS|3  3  3  3  3  EOS|5         a static batch would idle here until row 2 is through
    row 2     c  c  c  c  c  c  c  c  c
Each turn of the loop in generate() does three things:
    fit       the cache grows by a block when the longest live row reaches its end, within the memory given: where that
              leaves fewer rows, the last ones wait, with what they have drawn
    admit     free rows take waiting requests. A prompt is read once (prefill, several prompts at a time), all but its
              last token, and its keys and values are copied to the rows of its group
    step      each live row feeds its newest token (a new row: the prompt's last) and draws the next one. Rows that
              ended are handed back, and the last rows move into their places: a step computes live rows only
Nothing is padded on the left, and attention reads as far as the longest live row, however large max_new is.

Choices: 1) EOS is a chosen token like any other: it is returned with its log-prob, and the trainer learns to choose it.
2) A response depends on (weights, prompt, seed, request number) only: each request has a stream of uniform numbers, and
the token is where the cumulated distribution passes the next of them. Neighbours, order and row numbers change nothing
but rounding. 3) So a row that had to wait reads its own tokens like a prompt and goes on, as in vLLM. 4) Log-probs are
those of softmax(logits / temperature). top_p and top_k draw from another distribution, which the trainer does not have:
they are for evaluation, and rl.py does not pass them. 5) # differs from vLLM: no paged cache. A row's slots are
contiguous, so attention is one kernel of PyTorch; growing by blocks bounds what stands empty. 6) This file schedules
and draws; the network's step, its cache and CUDA graphs are decode.py's.
Shapes: R rows in the cache, n of them live, D hidden width, V vocabulary. Log-probs and entropies in nats.
"""

import json
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from core import ranks
from core.decode import Cache, Decoder, Graphs, decoder_of
from core.errors import UserError

BLOCK = 64  # slots by which the cache grows
PREFILL = 2048  # prompt tokens read at once, padding included; at least one prompt
PIECE = 128  # tokens of the vocabulary whose probabilities are summed first, see draw()
KINDS = (
    np.int32,
    np.float32,
    np.float32,
)  # of a response's ids, log-probs and entropies between processes
DRAWN = (
    2**18
)  # logits worked on at once on the CPU: 1 MB, so that a core's own cache holds what draw() makes


class Response(NamedTuple):
    """ids end with EOS if finished; logp and entropy: one number a token, of the sampling distribution."""

    ids: list[int]
    logp: list[float]
    entropy: list[float]
    finished: bool


class Request(NamedTuple):
    """One response that is asked for. number counts through all prompts' requests and seeds its stream."""

    prompt: int
    number: int
    limit: int  # tokens, EOS included


def draw(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
) -> tuple[torch.Tensor, ...]:
    """One token a row. logits (n, V), uniform (n,) float64 in [0, 1) -> token (n,), logp (n,), entropy (n,).

    The token is the first whose cumulated probability exceeds uniform: sought among sums over pieces of the vocabulary,
    then within one piece, so that no running sum over V is made. Temperature 0 is greedy and reports log-probs at 1.
    """
    rows = max(1, DRAWN // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    if (
        len(logits) > rows
    ):  # 64 x 32,000 at once: 14 ms, most of it for fresh pages of memory; in parts 5 ms
        parts = [
            draw(*part, temperature, top_p, top_k)
            for part in zip(logits.split(rows), uniform.split(rows))
        ]
        return tuple(torch.cat(values) for values in zip(*parts))
    z = logits.float() - logits.amax(-1, keepdim=True)  # (n, V) <= 0
    if temperature not in (0, 1):
        z /= temperature
    p = z.exp()  # not yet divided by its sum
    mass = _pieces(p).sum(-1).double()  # (n, V / 128)
    total = mass.sum(-1)
    entropy = (
        total.log() - torch.linalg.vecdot(p, z.clamp_min_(-1e4)) / total
    )  # clamped: 0 * -inf is NaN
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        if top_p < 1 or top_k:
            p = _cut(p, total, top_p, top_k)
            mass = _pieces(p).sum(-1).double()
        token = _pass(p, mass, uniform)
    return token, (z.gather(1, token[:, None])[:, 0] - total.log()).float(), entropy.float()


def _pieces(p: torch.Tensor) -> torch.Tensor:
    """p (n, V) cut along V into pieces of 128, zeros behind the last token: (n, V / 128, 128)."""
    n, V = p.shape
    return (F.pad(p, (0, -V % PIECE)) if V % PIECE else p).view(n, -1, PIECE)


def _pass(p: torch.Tensor, mass: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Where the cumulated p (n, V) passes uniform (n,) times its sum; mass (n, V / 128) float64: the pieces' sums. They
    are fp32 of 128 terms, everything above them is float64: fp32 alone drifts over 150,000 tokens."""
    pieces, mass = _pieces(p), mass.cumsum(-1)
    aim = uniform[:, None] * mass[:, -1:]
    piece = torch.searchsorted(mass, aim, right=True).clamp_max(mass.shape[1] - 1)  # (n, 1)
    inside = (
        pieces.gather(1, piece[:, :, None].expand(-1, 1, PIECE))[:, 0].double().cumsum(-1)
    )  # (n, 128)
    rest = aim - F.pad(mass, (1, 0)).gather(1, piece)
    rest = rest.minimum(inside[:, -1:] * (1 - 1e-12))  # rounding must not pass the last possible
    return (piece * PIECE + torch.searchsorted(inside, rest, right=True))[:, 0]


def _cut(p: torch.Tensor, total: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """p (n, V) with 0 outside the top_k likeliest tokens (0 = all) and outside the fewest that reach top_p."""
    ranked, order = p.sort(-1, descending=True)
    beyond = (
        ranked.cumsum(-1, dtype=torch.float64) - ranked >= top_p * total[:, None]
    )  # the first token always stays
    if top_k:
        beyond[:, top_k:] = True
    return torch.zeros_like(p).scatter(-1, order, ranked.masked_fill(beyond, 0.0))


@torch.no_grad()
def generate(
    model,
    prompts: list[list[int]],
    n: int | list[int] = 1,
    max_new: int | list[int] = 512,
    temperature: float = 1.0,
    eos_ids=(),
    seed: int = 0,
    rows: int = 512,
    top_p: float = 1.0,
    progress=None,
    top_k: int = 0,
    cache_bytes: int | None = None,
    on_response: Callable[[int, Response], None] | None = None,
    on_forward=None,
    bucketed: bool | None = None,
) -> list[list[Response]]:
    """Sample n responses (one number for all prompts, or one each) to each prompt (token ids): one list per prompt.
    Several processes share the prompts out and all return all responses.

    | max_new     | tokens, EOS included; one number, or one for each request. Cut there, finished = False             |
    | seed        | with the request number (counted through all prompts' responses) it fixes every draw               |
    | rows        | responses in flight at once, at most                                                               |
    | cache_bytes | for keys and values of the rows in flight; None: most of what is free on CUDA, no bound on the CPU |
    | progress    | progress(done, total), called whenever responses have ended                                        |
    | on_response | on_response(number of the prompt, response), called as each one ends: what is to survive a Ctrl-C  |
    | on_forward  | on_forward("read" or "step", rows computed, the cache), called before each: for meters           |
    | bucketed    | round a step's rows and attention length up, as CUDA graphs need it; None: on CUDA only            |

    Raises ValueError where a prompt is empty or one request alone does not fit cache_bytes. KeyboardInterrupt passes
    through, with the model as it was before.
    """
    requests = _requests(prompts, n, max_new)
    mine = [
        r for r in requests if r.prompt % ranks.world() == ranks.rank()
    ]  # a group stays together
    responses: list = [None] * len(requests)
    done, was_training = 0, model.training
    model.eval()
    try:
        with decoder_of(model) as decoder:
            flight = Flight(
                decoder,
                prompts,
                mine,
                rows,
                cache_bytes,
                seed,
                eos_ids,
                (temperature, top_p, top_k),
            )
            flight.bucketed = decoder.device.type == "cuda" if bucketed is None else bucketed
            flight.on_forward = on_forward or flight.on_forward
            waiting = flight.queue(mine)
            while waiting or flight.live:
                flight.fit(waiting)
                flight.admit(waiting)
                ended = flight.step()
                for request, response in flight.release(ended):
                    responses[request.number] = response
                    if on_response:
                        on_response(request.prompt, response)
                done += len(ended)
                if progress and ended:
                    progress(done, len(mine))
            del flight  # its cache makes room for the weights' own layout
    finally:
        model.train(was_training)
    if ranks.world() > 1:
        for others in ranks.gather_bytes(_pack([(r.number, responses[r.number]) for r in mine])):
            responses = [old or new for old, new in zip(responses, _unpack(others, len(requests)))]
    groups: list[list[Response]] = [[] for _ in prompts]
    for request, response in zip(requests, responses):
        groups[request.prompt].append(response)
    return groups


def _pack(ended: list[tuple[int, Response]]) -> bytes:
    """Numbered responses for the other processes, 12 bytes a token: JSON takes 50 and seconds a round."""
    head = [[number, len(r.ids), r.finished] for number, r in ended]
    parts = [
        np.asarray([x for _, r in ended for x in r[part]], kind).tobytes()
        for part, kind in enumerate(KINDS)
    ]
    return b"".join([json.dumps(head).encode(), b"\n", *parts])


def _unpack(packed: bytes, n: int) -> list[Response | None]:
    """The reverse, each response at its number of n."""
    head, _, body = packed.partition(b"\n")
    found, total, first = [None] * n, len(body) // (3 * 4), 0
    ids, logp, entropy = (
        np.frombuffer(body, kind, total, 4 * part * total) for part, kind in enumerate(KINDS)
    )
    for number, length, finished in json.loads(head):
        part = slice(first, first + length)
        found[number] = Response(
            ids[part].tolist(), logp[part].tolist(), entropy[part].tolist(), finished
        )
        first += length
    return found


def _requests(prompts, n, max_new) -> list[Request]:
    """All requests in the order of their numbers."""
    if any(len(p) == 0 for p in prompts):
        raise UserError(
            f"prompt {[len(p) for p in prompts].index(0)} has no tokens; a prompt needs at least one"
        )
    counts = [n] * len(prompts) if isinstance(n, int) else n
    owners = [i for i, count in zip(range(len(prompts)), counts, strict=True) for _ in range(count)]
    limits = [max_new] * len(owners) if isinstance(max_new, int) else max_new
    if len(limits) != len(owners) or min(limits, default=1) < 1:
        raise UserError(
            f"max_new: {len(limits)} numbers for {len(owners)} requests, the least {min(limits)}; "
            "give one number for all, or one each, and 1 at least"
        )
    return [Request(i, number, limit) for number, (i, limit) in enumerate(zip(owners, limits))]


class Live(NamedTuple):
    """A request in its row. Its position is `ahead` + the number of steps done so far."""

    request: Request
    began: int  # steps done before its first token, as if it had drawn all of them in this row
    ahead: int


class Flight:
    """The responses in flight: rows 0..n-1 of the cache and of every tensor below, row r serving live[r]."""

    def __init__(self, decoder: Decoder, prompts, requests, rows, cache_bytes, seed, eos_ids, how):
        config, self.device = decoder.config, decoder.device
        self.decoder, self.prompts, self.seed, self.how, self.eos = (
            decoder,
            prompts,
            seed,
            how,
            set(eos_ids),
        )
        self.slot_bytes = (
            2
            * config.num_hidden_layers
            * config.num_key_value_heads
            * config.head_dim
            * decoder.dtype.itemsize
        )
        if cache_bytes is None and self.device.type == "cuda":
            torch.cuda.empty_cache()  # what training has left in torch's own store counts as free
            # logits and what draw() makes of them, bytes a token of the vocabulary: in the graphs' memory, and outside
            scratch = (
                (96 if how[1] < 1 or how[2] else 36) * min(rows, len(requests)) * config.vocab_size
            )
            cache_bytes = int(0.9 * torch.cuda.mem_get_info(self.device)[0]) - scratch
        self.budget = cache_bytes
        worst = max(requests, key=self._slots, default=Request(0, 0, 1))
        self.most = self._slots(worst) if requests else 0  # no row is ever longer
        if cache_bytes is not None and self.most * self.slot_bytes > cache_bytes:
            raise UserError(
                f"prompt {worst.prompt}: {len(prompts[worst.prompt])} tokens and max_new {worst.limit} "
                f"need {self.most * self.slot_bytes / 1e6:.1f} MB of cache, and "
                f"{cache_bytes / 1e6:.1f} MB are given; lower max_new or give more"
            )
        self.rows, width = min(rows, len(requests)), max((r.limit for r in requests), default=0)
        self.live: list[Live] = []
        self.steps = 0
        self.cache = self._new_cache(0, 0)
        self.graphs, self.bucketed, self.on_forward = Graphs(self.device), False, lambda *what: None
        self.kept: dict[
            int, list
        ] = {}  # by request: [ids, logp, entropy] of those that had to make room
        self.ready: dict[
            tuple, int
        ] = {}  # what was read ahead (see _source), and its row in self.prompt_cache

        def per_row(*shape, dtype=torch.long):
            return torch.zeros(self.rows, *shape, dtype=dtype, device=self.device)

        self.token, self.position, self.drawn, self.limit = (per_row() for _ in range(4))
        self.alive, self.ended = (
            per_row(),
            per_row(dtype=torch.bool),
        )  # alive: 1 where the row serves a request
        self.uniform = per_row(width, dtype=torch.float64)
        self.out = [
            per_row(width, dtype=dtype) for dtype in (torch.long, torch.float32, torch.float32)
        ]
        self.moved = [self.token, self.position, self.drawn, self.limit, self.uniform, *self.out]
        self.eos_ids = torch.tensor(sorted(self.eos), dtype=torch.long, device=self.device)

    def _new_cache(self, rows: int, slots: int) -> Cache:
        return Cache(self.decoder.config, rows, slots, self.decoder.dtype, self.device)

    def _slots(self, request: Request) -> int:
        """Slots that a request fills at most: the last token drawn is never fed."""
        return len(self.prompts[request.prompt]) + request.limit - 1

    def _index(self, rows) -> torch.Tensor:
        return torch.tensor(list(rows), dtype=torch.long, device=self.device)

    def _drawn(self, request: Request) -> list[int]:
        """What a request that is waiting has drawn already: nothing, unless it had to make room."""
        return self.kept[request.number][0] if request.number in self.kept else []

    def _length(self, request: Request) -> int:
        """Tokens to read before a waiting request draws its next one."""
        return len(self.prompts[request.prompt]) + len(self._drawn(request))

    def _source(self, request: Request) -> tuple:
        """What is read for it: the same for all requests to a prompt, but for those that have drawn already."""
        n = len(self._drawn(request))
        return (request.prompt, request.number, n) if n else (request.prompt,)

    def queue(self, requests) -> deque[Request]:
        """The longest first: those read together are of like length, and the cache finds its size early."""
        return deque(sorted(requests, key=lambda r: (-self._length(r), r.number)))

    def fit(self, waiting: deque[Request]) -> None:
        """Give the cache the slots that the coming step needs, and the rows that the memory then holds. Rows for which
        there is no memory any more go back to the queue. When waiting requests could use the memory of slots that
        nobody fills any more, the cache is cut back."""
        longest = self.top()
        if waiting and len(self.live) < self.rows:
            longest = max(longest, self._length(waiting[0]))
        slots, cache = min(-(-longest // BLOCK) * BLOCK, self.most), self.cache
        starved = waiting and cache.rows < min(self.rows, len(self.live) + len(waiting))
        if slots <= cache.slots and not (starved and slots <= cache.slots // 2):
            return
        rows = min(self.rows, len(self.live) + len(waiting))
        if self.budget is not None:
            rows = min(rows, self.budget // (slots * self.slot_bytes))
        if len(self.live) > rows:
            back = [row.request for row in self.live[rows:]]
            self.kept |= {
                r.number: parts for r, parts in zip(back, self._take(range(rows, len(self.live))))
            }
            del self.live[rows:]
            again = self.queue([*back, *waiting])
            waiting.clear(), waiting.extend(again)
        self.graphs.forget()
        if not self.live:
            self.cache = self._new_cache(rows, slots)
            return
        cache.used = min(self.top(), cache.used)
        if rows != cache.rows:
            cache.select(torch.arange(rows, device=self.device).clamp_max(cache.rows - 1))
        cache.grow(slots)

    def top(self) -> int:
        """1 + the largest position of the coming step, known without asking the device."""
        return self.steps + max((row.ahead for row in self.live), default=-self.steps - 1) + 1

    def admit(self, waiting: deque[Request]) -> None:
        """Begin waiting requests in free rows."""
        while waiting and len(self.live) < self.cache.rows:
            if self._source(waiting[0]) not in self.ready:
                self._prefill(waiting)
            first, index = len(self.live), []
            while (
                waiting
                and len(self.live) < self.cache.rows
                and self._source(waiting[0]) in self.ready
            ):
                request = waiting.popleft()
                self.live.append(
                    Live(
                        request,
                        self.steps - len(self._drawn(request)),
                        self._length(request) - 1 - self.steps,
                    )
                )
                index.append(self.ready[self._source(request)])
            begun, rows = [row.request for row in self.live[first:]], slice(first, len(self.live))
            self.cache.put(
                self._index(range(first, len(self.live))),
                self.prompt_cache,
                self._index(index),
                max(map(self._length, begun)) - 1,
            )
            self.token[rows] = self._index(
                (self._drawn(r) or self.prompts[r.prompt])[-1] for r in begun
            )
            self.position[rows] = self._index(self._length(r) - 1 for r in begun)
            self.limit[rows] = self._index(r.limit for r in begun)
            self.drawn[rows], self.alive[rows] = self._index(len(self._drawn(r)) for r in begun), 1
            for row, r in enumerate(
                begun, first
            ):  # on the CPU's generator, so that a GPU draws the same
                stream = ranks.generator(self.seed, "request", r.number)
                self.uniform[row, : r.limit] = torch.rand(
                    r.limit, generator=stream, dtype=torch.float64
                ).to(self.device)
                for store, values in zip(self.out, self.kept.pop(r.number, ())):
                    store[row, : len(values)] = torch.tensor(values, dtype=store.dtype)

    def _prefill(self, waiting: deque[Request]) -> None:
        """Read the next prompts of the queue, but for their last tokens, padded on the right to the longest, the first.

        What padding writes into the cache stands beyond the row's position: never seen, overwritten by the response.
        """
        T, chosen, self.ready = self._length(waiting[0]) - 1, [], {}
        for request in waiting:
            if self._source(request) not in self.ready:
                if chosen and (len(chosen) + 1) * T > PREFILL:
                    break
                self.ready[self._source(request)] = len(chosen)
                chosen.append([*self.prompts[request.prompt], *self._drawn(request)][:-1])
        self.prompt_cache = self._new_cache(len(chosen), T)
        ids = torch.tensor(
            [known + [0] * (T - len(known)) for known in chosen],
            dtype=torch.long,
            device=self.device,
        )  # (P, T)
        if T:
            self.on_forward("read", len(chosen), self.prompt_cache)
            self.decoder.read(ids, self.prompt_cache)

    def step(self) -> list[int]:
        """Feed every live row its newest token and draw the next one. Returns the rows that ended, ascending."""
        live, top = len(self.live), self.top()
        rows = live
        if (
            self.bucketed
        ):  # few different sizes, so that few graphs serve: free rows decode at position 0, in vain
            rows = min(1 << (live - 1).bit_length(), self.cache.rows)
            top = min(-(-top // BLOCK) * BLOCK, self.cache.slots)
        self.on_forward("step", rows, self.cache)
        self.graphs.run((rows, top), lambda: self._advance(rows, top))
        self.steps += 1
        return self.ended[:live].nonzero()[:, 0].tolist()  # the one wait for the device a step

    def _advance(self, n: int, top: int) -> None:
        """The first n rows by a token. Everything it reads and writes stays where it is: a CUDA graph may hold it."""
        token, position, drawn, alive = (
            self.token[:n],
            self.position[:n],
            self.drawn[:n],
            self.alive[:n],
        )  # views
        logits = self.decoder.step(token, position, self.cache, top)  # (n, V)
        uniform = self.uniform[:n].gather(1, drawn[:, None])[:, 0]
        chosen = draw(logits, uniform, *self.how)  # token, logp, entropy: (n,) each
        for store, values in zip(self.out, chosen):
            store[:n].scatter_(1, drawn[:, None], values[:, None])
        token.copy_(chosen[0])
        position += alive
        drawn += alive
        torch.logical_or(
            drawn == self.limit[:n], (token[:, None] == self.eos_ids).any(1), out=self.ended[:n]
        )

    def release(self, ended: list[int]) -> list[tuple[Request, Response]]:
        """Take the responses of these rows out, and move the last rows into their places."""
        if not ended:
            return []
        requests, taken, gone = [self.live[r].request for r in ended], self._take(ended), set(ended)
        n = len(self.live) - len(ended)
        holes, last = (
            [r for r in ended if r < n],
            [r for r in range(n, len(self.live)) if r not in gone],
        )
        for hole, row in zip(holes, last):
            self.live[hole] = self.live[row]
        del self.live[n:]
        if holes:
            to, source = self._index(holes), self._index(last)
            self.cache.put(to, self.cache, source, min(self.top(), self.cache.slots))
            for x in self.moved:
                x.index_copy_(0, to, x.index_select(0, source))
        # free rows: a padded step computes them at position 0. fit() gives the cache no row that is not taken at once
        self.alive[n:] = self.position[n:] = self.drawn[n:] = 0
        return [
            (request, Response(*parts, parts[0][-1] in self.eos))
            for request, parts in zip(requests, taken)
        ]

    def _take(self, rows) -> list[list[list]]:
        """[ids, logp, entropy] that each of these rows has drawn so far."""
        values = [
            store.index_select(0, self._index(rows)).cpu() for store in self.out
        ]  # (rows, width) each
        return [
            [x[i, : self.steps - self.live[r].began].tolist() for x in values]
            for i, r in enumerate(rows)
        ]
