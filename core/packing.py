"""Which rows are trained when: the held-out split, the order of an epoch, micro-batches of rows of
similar length under a token budget. Every rank computes the same."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from core import ranks
from core.cache import Rows, prompt_key


def hold_out(found: Sequence, most: int) -> tuple[Sequence, Sequence]:
    """(rows to train on, rows held out) of examples or problems, split by prompt.

    `most` prompts, or a tenth of the distinct ones if that is less, are held out: the first row of
    each is for validation, and its other rows are not used. The seed of the run does not change
    which prompts these are.
    """
    if isinstance(found, Rows):
        keys = found.prompt_keys
    else:
        keys = np.array([prompt_key(row) for row in found], np.uint64)
    _, first = np.unique(keys, return_index=True)
    first.sort()  # places of the first row of each prompt, in the order of the file
    n_held = min(most, max(1, len(first) // 10))
    picked = plan(len(first), ranks.seed_of("held out"), 0, n_held)
    held = first[sorted(picked)]
    kept = np.flatnonzero(~np.isin(keys, keys[held]))
    if not len(kept):
        kept = np.arange(len(found))
    return _pick(found, kept), _pick(found, held)


def _pick(found: Sequence, places: np.ndarray) -> Sequence:
    if isinstance(found, Rows):
        return found.pick(places)
    return [found[i] for i in places]


def plan(n: int, seed: int, start: int, count: int) -> list[int]:
    """`count` row numbers from position `start` of an endless stream: shuffled epochs of n rows."""
    picked = []
    while len(picked) < count:
        epoch, offset = divmod(start + len(picked), n)
        missing = count - len(picked)
        picked += _permutation(n, seed, epoch)[offset : offset + missing].tolist()
    return picked


@lru_cache(maxsize=2)  # a million rows take longer to shuffle than a small step to train
def _permutation(n: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(n, generator=ranks.generator(seed, "epoch", epoch)).int()


def cut(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut rows into micro-batches of at most `budget` tokens, padding included.

    Returns lists of indices into `lengths`, the longest rows first; a row over the budget gets a
    micro-batch of its own. Of all ways to cut the sorted rows this is the cheapest (dynamic
    programming). The cost of a micro-batch is its tokens with padding, plus 1/64 of the budget for
    its overhead. On geometric lengths 1 to 5% is padding.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    cost = [0.0] + [math.inf] * len(order)  # cost[n]: lowest cost of the n longest rows
    first = [0] * (len(order) + 1)  # first[n]: where their last micro-batch begins
    for i, row in enumerate(order):
        width = lengths[row]
        most = min(max(1, budget // width), len(order) - i)
        for n in range(1, most + 1):
            total = cost[i] + n * width + budget / 64
            if total < cost[i + n]:
                cost[i + n] = total
                first[i + n] = i
    batches = []
    end = len(order)
    while end:
        batches.append(order[first[end] : end])
        end = first[end]
    return batches[::-1]


def deal(lengths: list[int], budget: int, rank: int, world: int) -> list[list[int]]:
    """The micro-batches of one of `world` processes, as lists of indices into `lengths`.

    Rows are dealt from the longest to the shortest, to processes 0 1 2 2 1 0 ..., so that all get
    similar work. Each micro-batch is a collective, so all get the same number: [] fills up.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    own = []
    most = 0
    for process in range(world):
        turns = (process, 2 * world - 1 - process)
        hand = [i for n, i in enumerate(order) if n % (2 * world) in turns]
        parts = cut([lengths[i] for i in hand], budget)
        most = max(most, len(parts))
        if process == rank:
            for part in parts:
                own.append([hand[i] for i in part])
    return own + [[]] * (most - len(own))


def padding(lengths: list[int], budget: int) -> float:
    """% of the tokens of cut()'s micro-batches that are padding."""
    size = sum(len(part) * lengths[part[0]] for part in cut(lengths, budget))
    return 100 * (1 - sum(lengths) / size)
