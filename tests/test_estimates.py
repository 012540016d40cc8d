"""Estimates from counts are unbiased, and refuse what cannot be estimated."""

import math

import numpy as np
import pytest

from core import estimates


@pytest.mark.parametrize("p", [0.05, 0.3, 0.8])
def test_signal_and_pass_at_k_are_unbiased(p):
    """Their expectation over all counts of n = 10 samples is the formula in the true rate."""
    n = 10
    chances = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    for group in (1, 4, 8):
        signal = sum(
            w * estimates.expected_signal([c], n, group).value for c, w in enumerate(chances)
        )
        pass_at = sum(w * estimates.pass_at([c], n, group).value for c, w in enumerate(chances))
        assert signal == pytest.approx(100 * (1 - p**group - (1 - p) ** group))
        assert pass_at == pytest.approx(100 * (1 - (1 - p) ** group))


def test_standard_error_is_that_of_repeated_draws_of_problems():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        rates = rng.beta(1, 4, 100)
        found.append(estimates.expected_signal(rng.binomial(8, rates), 8, 8))
    values = [estimate.value for estimate in found]
    assert np.std(values) == pytest.approx(np.mean([estimate.se for estimate in found]), rel=0.1)


def test_fewer_samples_than_the_group_are_refused():
    with pytest.raises(ValueError, match="at least as many samples"):
        estimates.expected_signal([1, 2], 4, 8)
