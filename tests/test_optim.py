"""core/optim.py: the learning rate of a step, and a gradient that is not a number."""

import math

import pytest
import torch
from test_checkpoint import small_model

from core import optim


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_nan_gradient_touches_neither_weights_nor_optimizer(name):
    model = small_model()
    optimizers = optim.make_optimizers(model, name, 1e-2)
    before = [p.clone() for p in model.parameters()]
    (model(torch.ones(2, 4)).sum() * math.nan).backward()
    assert math.isnan(optim.update(model, optimizers, 1e-2, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert not any(optimizer.state for optimizer in optimizers)


def test_the_learning_rate_warms_up_then_falls_to_zero_or_stays():
    cosine = [optim.lr_at(step, 100, 1.0, "cosine", 0.1) for step in range(101)]
    assert cosine[0] == pytest.approx(0.1)
    assert cosine[9] == 1.0
    assert cosine[55] == pytest.approx(0.5)
    assert cosine[100] == pytest.approx(0)
    constant = [optim.lr_at(step, 100, 1.0, "constant", 0.0) for step in (0, 50, 99)]
    assert constant == [1.0] * 3
