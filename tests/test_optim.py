"""The optimizers against the formulas they are named after."""

import math

import pytest
import torch

import model as model_file
from core import optim

CONFIG = model_file.ModelConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    tie_word_embeddings=False,
)


def matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_orthogonal_keeps_the_singular_vectors_and_brings_the_values_near_one(shape):
    x = matrix(*shape)
    U, _, V = torch.linalg.svd(x, full_matrices=False)
    values = U.T @ optim.orthogonal(x) @ V.T
    diagonal = values.diagonal()
    assert (values - torch.diag(diagonal)).abs().max() < 1e-4
    assert diagonal.min() > 0.6
    assert diagonal.max() < 1.3


def test_orthogonal_of_zero_is_zero_and_no_nan():
    assert torch.equal(optim.orthogonal(torch.zeros(4, 6)), torch.zeros(4, 6))


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_everything_else():
    model = model_file.init_model(CONFIG, 0)
    adamw, muon = optim.make_optimizers(model, "muon", 1e-3)
    names = {p: name for name, p in model.named_parameters()}
    taken = {names[p] for p in muon.param_groups[0]["params"]}
    left = {names[p] for p in adamw.param_groups[0]["params"]}
    assert taken == {n for n in names.values() if "proj.weight" in n}
    assert taken | left == set(names.values())
    assert not taken & left
    assert len(optim.make_optimizers(model, "adamw", 1e-3)) == 1


def test_two_muon_steps_equal_the_formula():
    lr, decay, beta = 0.1, 0.01, 0.95
    p = torch.nn.Parameter(matrix(6, 4))
    expected, average = p.detach().clone(), torch.zeros(6, 4)
    muon = optim.Muon([p], lr, decay)
    for step in range(2):
        gradient = matrix(6, 4 + step)[:, :4]
        p.grad = gradient.clone()
        muon.step()
        average = beta * average + (1 - beta) * gradient
        direction = optim.orthogonal(beta * average + (1 - beta) * gradient)
        expected = (1 - lr * decay) * expected - lr * 0.2 * math.sqrt(6) * direction
    assert torch.allclose(p, expected, atol=1e-6)


def test_update_clips_to_the_given_norm_returns_the_norm_before_and_clears_the_gradients():
    model = torch.nn.Linear(4, 3, bias=False)
    before = model.weight.detach().clone()
    model.weight.grad = torch.full((3, 4), 2.0)
    norm = optim.update(model, [torch.optim.SGD(model.parameters(), lr=1.0)], 0.5, 1.0)
    assert norm == pytest.approx(2 * math.sqrt(12))
    assert model.weight.grad is None
    moved = (before - model.weight.detach()).norm().item()
    assert moved == pytest.approx(0.5, rel=1e-4)
