"""Prompts that are read once per group: the same numbers as rows that each have their own."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from test_model import CONFIGS, random_model

import data
import model as m
from core import ranks, shared

WIDTH = 9  # of the longest response below


class Row(NamedTuple):
    prompt: list[int]
    response: list[int]


def rows_of(n_prompts: int = 3) -> list[Row]:
    g = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(0, 61, (n,), generator=g).tolist()
    rows = []
    for n in (7, 3, 12)[:n_prompts]:
        prompt = draw(n)
        rows += [Row(prompt, draw(length)) for length in (5, 1, WIDTH, 4)]
    return rows


def alone(model, rows: list[Row]) -> tuple:
    ids, mask = data.collate([data.Example(*row) for row in rows])
    return m.response_logp(model, ids, mask, 0.7, entropy=True)[:2]


def in_lines(model, rows: list[Row], budget: int) -> tuple:
    values = torch.zeros(2, len(rows), WIDTH, dtype=torch.float64)
    for part, line in shared.micro_batches(rows, budget, 0, 1):
        found = torch.stack(m.grouped_logp(model, line, 0.7, entropy=True))
        found = F.pad(found, (0, WIDTH - found.shape[2]))
        values = values.index_copy(1, torch.tensor(part), found)
    return values[0], values[1]


def with_gradient(model, logp, entropy) -> tuple:
    """The values, and the gradient of a loss in which every token has its own weight."""
    weights = torch.randn(logp.shape, generator=ranks.generator("weights"), dtype=logp.dtype)
    model.zero_grad()
    (weights * (logp + 0.1 * entropy)).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return logp.detach(), entropy.detach(), gradient


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("budget", [1000, 60, 20, 1])
def test_values_and_gradient_are_those_of_rows_with_prompts_of_their_own(family, budget):
    model = random_model(CONFIGS[family]).double()
    rows = rows_of()
    expected = with_gradient(model, *alone(model, rows))
    found = with_gradient(model, *in_lines(model, rows, budget))
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() < 1e-10 * b.abs().max()


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputed_blocks_give_the_same_gradient(recompute):
    model = random_model(CONFIGS["qwen2"]).double()
    rows = rows_of()
    expected = with_gradient(model, *alone(model, rows))
    net = ranks.compute(model, bf16=False, recompute=recompute)
    found = with_gradient(model, *in_lines(net, rows, 1000))
    assert (found[2] - expected[2]).abs().max() < 1e-10 * expected[2].abs().max()


def test_a_line_holds_each_prompt_once_and_no_padding():
    rows = rows_of()
    ((part, line),) = shared.micro_batches(rows, 1000, 0, 1)
    assert sorted(part) == list(range(12))
    assert line.ids.shape == (1, 7 + 3 + 12 + 3 * (5 + 1 + WIDTH + 4))
    for place, i in enumerate(part):
        ids = line.ids[0, line.places.rows[place, : len(rows[i].response)]]
        assert ids.tolist() == rows[i].response
        prompt = line.places.prompts[line.places.group[place], : len(rows[i].prompt)]
        assert line.ids[0, prompt].tolist() == rows[i].prompt


def test_a_group_over_the_budget_is_cut_and_a_row_over_it_is_alone():
    lines = list(shared.micro_batches(rows_of(1), 7 + 9, 0, 1))
    assert all(line.ids.shape[1] <= 7 + 9 for _, line in lines)
    assert sorted(part for part, _ in lines) == [[0, 1], [2], [3]]
    assert len(list(shared.micro_batches(rows_of(1), 1, 0, 1))) == 4


@pytest.mark.parametrize("world", [2, 5, 20])
def test_every_rank_gets_as_many_micro_batches_and_every_row_is_trained_once(world):
    rows = rows_of()
    hands = [list(shared.micro_batches(rows, 40, rank, world)) for rank in range(world)]
    assert len({len(hand) for hand in hands}) == 1
    trained = [i for hand in hands for part, _ in hand for i in part]
    assert sorted(trained) == list(range(len(rows)))
    assert all(line.ids.numel() for hand in hands for _, line in hand)


def test_rows_of_one_prompt_that_do_not_follow_one_another_are_read_apart():
    first, second, *_ = rows_of(1)
    other = Row([1, 2], [3])
    ((_, line),) = shared.micro_batches([first, other, second], 1000, 0, 1)
    assert len(line.places.prompts) == 3
