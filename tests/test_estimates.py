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


def test_an_eval_line_of_counts_is_read_back_as_the_estimates_it_was_made_from():
    right = [0, 3, 8, 1]
    row = estimates.group_line(right, [4.0, 2.0, 1.0, 3.0], [10, 10, 10, 20], 8)
    assert row["right_counts"] == [1, 1, 0, 1, 0, 0, 0, 0, 1]
    assert row["entropy"] == pytest.approx(10 / 50)
    ready = estimates.readiness_of({"pass1": 30.0, **row}, 8)
    assert ready.signal == (row["signal"], row["signal_se"])
    assert ready.signal == estimates.expected_signal(right, 8, 8)
    assert ready.pass_at.value == row["pass_at_8"] == pytest.approx(75)
    assert "signal 50% (se 29)  pass@8 75 (se 25)  entropy 0.200 (0." in ready.line(8)


def test_the_standard_error_of_entropy_is_that_of_repeated_draws_of_problems():
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(400):
        tokens = rng.integers(20, 200, 60)
        nats = tokens * rng.normal(0.4, 0.1, 60)
        rows.append(estimates.group_line(rng.integers(0, 9, 60), nats, tokens, 8))
    scatter = np.std([row["entropy"] for row in rows])
    assert scatter == pytest.approx(np.mean([row["entropy_se"] for row in rows]), rel=0.1)
