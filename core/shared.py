"""Responses to shared prompts in one line of tokens, so that an update reads each prompt once.

    rows     a group of three                     the line, N = 4 + 2 + 3 + 1 tokens
             p p p p a a                          p p p p a a b b b c
             p p p p b b b
             p p p p c

Norms, projections and the MLP see the line as it is: no prompt twice and no padding. Attention
looks tokens up in it: a prompt attends to itself, a response to its prompt and itself
(model.attend_shared).

Shapes: G prompts of at most P tokens, B responses of at most R tokens, N tokens of all.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from core.packing import deal


class Places(NamedTuple):
    """Where the tokens are in the line, as indices into it; padding has index 0."""

    prompts: Tensor  # (G, P) the tokens of each prompt
    rows: Tensor  # (B, R) the tokens of each response
    group: Tensor  # (B,) the number of each response's prompt
    visible: Tensor  # (B, 1, R, P + R) bool: keys that a query sees: prompt, then response
    back: Tensor  # (N,) index of each token in prompts.flatten() followed by rows.flatten()

    def to(self, device) -> "Places":
        return Places(*(x.to(device, non_blocking=True) for x in self))


class Line(NamedTuple):
    """The rows of one micro-batch."""

    ids: Tensor  # (1, N)
    positions: Tensor  # (1, N) of each token in its row
    places: Places
    sources: Tensor  # (n,) places of the hidden states that predict the response tokens
    targets: Tensor  # (n,) places of those tokens, in the order of the rows
    chosen: Tensor  # (B, R) bool: True for tokens, False for padding


def lay_out(groups: list[list]) -> Line:
    """The Line of these groups, each a list of rows (prompt, response: token ids) of one prompt."""
    ids = []
    positions = []
    prompts = []
    rows = []
    group = []
    for number, members in enumerate(groups):
        prompt = members[0].prompt
        prompts.append(range(len(ids), len(ids) + len(prompt)))
        ids += prompt
        positions += range(len(prompt))
        for row in members:
            rows.append(range(len(ids), len(ids) + len(row.response)))
            group.append(number)
            ids += row.response
            positions += range(len(prompt), len(prompt) + len(row.response))
    sources = []
    targets = []
    for place, number in zip(rows, group):
        sources += [prompts[number][-1], *place[:-1]]
        targets += place
    prompt_places, in_prompt = _padded(prompts)
    row_places, chosen = _padded(rows)
    group_B = torch.tensor(group)
    R = row_places.shape[1]
    of_prompt = in_prompt[group_B][:, None, :].expand(-1, R, -1)  # (B, R, P)
    of_row = torch.ones(R, R, dtype=torch.bool).tril().expand(len(rows), -1, -1)  # (B, R, R)
    back = torch.empty(len(ids), dtype=torch.long)
    places = torch.cat((prompt_places[in_prompt], row_places[chosen]))
    is_token = torch.cat((in_prompt.flatten(), chosen.flatten()))
    back[places] = is_token.nonzero()[:, 0]
    return Line(
        ids=torch.tensor([ids]),
        positions=torch.tensor([positions]),
        places=Places(
            prompt_places,
            row_places,
            group_B,
            torch.cat((of_prompt, of_row), 2)[:, None],
            back,
        ),
        sources=torch.tensor(sources),
        targets=torch.tensor(targets),
        chosen=chosen,
    )


def _padded(ranges: list[range]) -> tuple[Tensor, Tensor]:
    """(places (n, longest), padded with 0 on the right; bool mask, True where not padding)."""
    starts = torch.tensor([places.start for places in ranges])[:, None]
    lengths = torch.tensor([len(places) for places in ranges])[:, None]
    steps = torch.arange(max(1, int(lengths.max())))
    is_token = steps < lengths
    return (starts + steps) * is_token, is_token


def micro_batches(rows: list, budget: int, rank: int, world: int) -> Iterator[tuple]:
    """(indices of rows, their Line) of each micro-batch of this rank, of at most `budget` tokens.
    All ranks get the same number of them; one with too few rows gets ([], a line that trains
    nothing) for the rest."""
    units = _units(rows, budget)
    lengths = []
    for unit in units:
        lengths.append(len(rows[unit[0]].prompt) + sum(len(rows[i].response) for i in unit))
    for part in deal(lengths, budget, rank, world):
        indices = []
        groups = []
        for n in part:
            indices += units[n]
            groups.append([rows[i] for i in units[n]])
        yield indices, lay_out(groups or [[rows[0]]])


def _units(rows: list, budget: int) -> list[list[int]]:
    """Lists of indices of consecutive rows with the same prompt; a list ends where the prompt and
    its responses would exceed the budget."""
    units = []
    size = 0
    for i, row in enumerate(rows):
        more = len(row.response)
        joins = units and rows[units[-1][0]].prompt == row.prompt and size + more <= budget
        if joins:
            units[-1].append(i)
            size += more
        else:
            units.append([i])
            size = len(row.prompt) + more
    return units
