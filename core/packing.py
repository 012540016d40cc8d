"""Which rows share a micro-batch: rows of like length, under a token budget, alike on all ranks."""

import math
from collections.abc import Sequence


def cut(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut rows into micro-batches of at most `budget` tokens, padding included.

    Returns lists of indices into `lengths`, the longest rows first; a row over the budget gets a
    micro-batch of its own. Of all ways to cut the rows in order of length this is the cheapest,
    where a micro-batch costs its tokens and a 64th of the budget besides, as many small ones cost
    time too. On geometric lengths 1 to 5% is padding.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    cost = [0.0] + [math.inf] * len(order)  # of the first n rows
    first = [0] * (len(order) + 1)  # where the last micro-batch of the first n rows begins
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

    Rows are dealt by length, there and back (0 1 2 2 1 0 ...), so that all get alike. Every
    process gets as many micro-batches, as each is a collective; the missing ones are [].
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
