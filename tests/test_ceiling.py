"""The ceiling's estimators against curves of known truth, and against the paper's own data.

The paper's data are tested where ../shared has them. The figures that docs/LOG.md quotes, with all
200 synthetic curves:

    python tests/test_ceiling.py"""

import csv
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the command above

import ceiling  # noqa: E402
from core import curvefit  # noqa: E402

RETU = Path(__file__).resolve().parents[2] / "shared" / "retu"
needs_paper_data = pytest.mark.skipif(not RETU.is_dir(), reason="the paper's points are not here")
AT_BOUND = {
    ("Easy102K", 720),
    ("Easy102K", 1080),
    ("Easy102K", 1800),
    ("SFT889K", 360),
}  # as published


def truth(x, a, p_sft, b, c):
    """Eq. (2) as printed, with eps = 0."""
    x = np.asarray(x, float)
    return p_sft + (a - p_sft) / (1 + np.maximum(x, 1e-9) ** -b * c**b)


def synthetic(rng, n=30, noise=0.5):
    """A run of n evaluations and one at 0, with Gaussian noise: (flops, performance, its truth)."""
    b = rng.uniform(0.8, 3)
    gain = rng.uniform(3, 15)
    p_sft = rng.uniform(40, 75)
    c = math.exp(rng.uniform(math.log(0.05), 0))  # of the run's compute
    x = np.linspace(0, 1, n + 1)
    reached = float(truth(1, 1, 0, b, c))
    known = {
        "a": p_sft + gain,
        "p_sft": p_sft,
        "gain": gain,
        "b": b,
        "c": c * 1e20,
        "share": reached,
    }
    return x * 1e20, truth(x, p_sft + gain, p_sft, b, c) + rng.normal(0, noise, n + 1), known


def synthetic_coverage(n_curves):
    """How often 90% intervals hold the truth, and the median error of A_post.

    The error is that of the posterior's median, where the data reach 70% of the gain."""
    rng = np.random.default_rng(0)
    hits = []
    errors = []
    for _ in range(n_curves):
        x, y, known = synthetic(rng)
        found = ceiling.fit(x, y)
        ends = vars(found)
        pairs = (("a_post", "a"), ("plasticity", "gain"), ("c_mid", "c"), ("share", "share"))
        hits.append(
            [ends[f"{ours}_low"] <= known[name] <= ends[f"{ours}_high"] for ours, name in pairs]
        )
        if known["share"] >= 0.7:
            post = found.posterior
            errors.append(abs(np.median(post.p_sft + post.eps + post.gain) - known["a"]))
    return np.mean(hits, axis=0), float(np.median(errors)), len(errors)


KINDS = (
    "clean",
    "binomial",
    "drift 0.7",
    "drift 1.5",
    "random walk",
    "plateau, then rise",
    "late start",
    "zero gain",
)


def curve_of_kind(kind, rng, n=30):
    """A run that eq. (2) describes badly: (flops, performance, responses or None, true A_post).

    The noise of an evaluation is 0.5 points, or that of 800 responses (binomial). A drift is an
    Ornstein-Uhlenbeck process of this size and of length 0.3; a random walk has steps of 0.3. The
    second rise starts after 30-70% of the run, a late start after 20-50%."""
    b = rng.uniform(0.8, 3)
    gain = rng.uniform(3, 15)
    p_sft = rng.uniform(40, 75)
    c = math.exp(rng.uniform(math.log(0.05), 0))  # of the run's compute
    x = np.linspace(0, 1, n + 1)
    top = p_sft + gain
    if kind == "zero gain":
        top = p_sft
        y = np.full(n + 1, p_sft)
    elif kind == "late start":
        begin = rng.uniform(0.2, 0.5)
        y = truth(np.maximum(x - begin, 0) / (1 - begin), top, p_sft, b, min(c, 0.5))
    elif kind == "plateau, then rise":
        first = rng.uniform(0.4, 0.7) * gain
        begin = rng.uniform(0.3, 0.7)
        y = truth(x, p_sft + first, p_sft, max(b, 1.5), min(c, 0.1))
        y = y + truth(np.maximum(x - begin, 0), gain - first, 0, 2, rng.uniform(0.1, 0.3))
    else:
        y = truth(x, top, p_sft, b, c)
    if kind.startswith("drift"):
        correlation = np.exp(-np.abs(x[1:, None] - x[1:]) / 0.3)
        y[1:] += float(kind.split()[1]) * np.linalg.cholesky(correlation) @ rng.normal(size=n)
    if kind == "random walk":
        y[1:] += np.cumsum(rng.normal(0, 0.3, n))
    if kind == "binomial":
        return x * 1e20, rng.binomial(800, y / 100) / 8, 800, top
    return x * 1e20, y + rng.normal(0, 0.5, n + 1), None, top


def coverage_of_kind(kind, n_curves, seed=8):
    """(fitted, coverage of A_post, share identified, coverage among those) of n_curves."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    covered = []
    identified = []
    for _ in range(n_curves):
        x, y, n, top = curve_of_kind(kind, rng)
        found = ceiling.fit(x, y, n=n)
        if found.status == "ok":
            covered.append(found.a_post_low <= top <= found.a_post_high)
            identified.append(found.identified)
    among = np.array(covered)[np.array(identified)]
    inside = among.mean() if len(among) else math.nan
    return len(covered), np.mean(covered), np.mean(identified), inside


# -- the formula and the closed forms


def test_sigmoid_is_half_at_c_mid_zero_at_zero_and_grows_by_b():
    s = curvefit.sigmoid([0, 1, 2, 4], [1.0, 3.0], [2.0, 2.0])
    assert s[:, 0].tolist() == [0, 0] and s[:, 2].tolist() == [0.5, 0.5]
    assert s[1, 3] == pytest.approx(1 / (1 + (4 / 2) ** -3))


def test_posterior_of_one_cell_is_that_of_generalized_least_squares():
    """Mean, covariance and differences of the evidence, with the full covariance, unrotated."""
    rng = np.random.default_rng(1)
    x = np.array([0, 1, 2, 3, 5, 8.0])
    y, sigma, tau = rng.normal(size=6), 0.7, 0.9
    cov = sigma**2 * np.eye(6) + tau**2 * curvefit._kernel(x, x, 8.0)
    values, rotate = np.linalg.eigh(curvefit._kernel(x, x, 8.0))
    cells = curvefit.sigmoid(x, [1.0, 2.0], [2.0, 3.0])
    design = np.stack([np.broadcast_to(v, (2, 6)) for v in (np.ones(6), x > 0)] + [cells])
    weight = 1 / (sigma**2 + tau**2 * values)[None]
    mean, covariance, log_fit = curvefit._linear_posterior(weight, design @ rotate, y @ rotate)
    prior = np.diag([100.0**2, 0.3**2, 20.0**2])
    evidence = []
    for k in range(2):
        a = design[:, k].T
        expected = np.linalg.inv(a.T @ np.linalg.solve(cov, a) + np.linalg.inv(prior))
        assert np.allclose(covariance[0, k], expected)
        assert np.allclose(mean[0, k], expected @ a.T @ np.linalg.solve(cov, y))
        marginal = cov + a @ prior @ a.T
        evidence.append(
            -0.5 * y @ np.linalg.solve(marginal, y) - 0.5 * np.linalg.slogdet(marginal)[1]
        )
    assert log_fit[0, 1] - log_fit[0, 0] == pytest.approx(evidence[1] - evidence[0])


def test_forecast_carries_the_last_deviation_on_as_a_gaussian_process_does():
    x = np.array([0, 1, 2, 3.0])
    y = np.array([50, 55, 60, 66.0])
    at = np.array([3.5, 30.0])
    one = curvefit.Posterior(
        *(np.array([v]) for v in (50.0, 0.0, 12.0, 1.5, 1.0, 0.5, 2.0, 0.3)), x, y, np.ones(4)
    )
    many = curvefit.Posterior(*(np.repeat(v, 20000) for v in one[:8]), *one[8:])
    mean, low, high = ceiling.predict(many, at)
    length = 0.3 * 3.0
    cov = 0.25 * np.eye(4) + 4 * curvefit._kernel(x, x, length)
    cross = 4 * curvefit._kernel(at, x, length)
    trend = lambda v: truth(v, 62, 50, 1.5, 1.0)
    expected = trend(at) + cross @ np.linalg.solve(cov, y - trend(x))
    spread = 1.645 * np.sqrt(0.25 + 4 - (cross * np.linalg.solve(cov, cross.T).T).sum(1))
    assert np.allclose(mean, expected, atol=1e-6) and np.allclose(high - expected, spread, atol=0.1)
    assert mean[0] - trend(at)[0] > 1 > abs(mean[1] - trend(at)[1]) + 0.9  # fades far away


def test_least_squares_returns_the_parameters_of_a_noiseless_curve():
    x = np.linspace(0, 5e19, 40)
    found = curvefit.least_squares_fit(x, truth(x, 8, 0, 1.4, 1.2e19))
    assert (found.top, found.b, found.c) == pytest.approx(
        (8, 1.4, 1.2e19), rel=2e-3
    ) and not found.at_bound
    offset = curvefit.least_squares_fit(
        x[1:], 1 + 7 * curvefit.sigmoid(x[1:], [3.0], [1.2e19])[0], free_epsilon=True
    )
    assert (offset.top, offset.eps, offset.b) == pytest.approx((8, 1, 3), rel=5e-3)


def test_least_squares_drops_outliers_and_c_steps_keep_their_share():
    x = np.linspace(0, 50, 30)
    y = truth(x, 8, 0, 1.4, 12) + np.random.default_rng(0).normal(0, 0.1, 30)
    y[[7, 20]] += 4
    plain = curvefit.least_squares_fit(x, y)
    steps = curvefit.least_squares_fit(x, y, lts_alpha=0.75)
    assert not plain.keep[[7, 20]].any() and plain.top == pytest.approx(8, abs=0.4)
    assert steps.keep.sum() == int(0.75 * plain.keep.sum())


def test_least_squares_at_its_bound_is_not_identified():
    x = np.linspace(0, 1, 20)
    found = ceiling.fit(x, 50 + 3 * x, paper={})
    assert not found.identified and found.a_post is None and found.forecast[0]["mean"] > 53


# -- the posterior on curves of known truth


def test_noiseless_curve_gives_its_parameters_back():
    x = np.linspace(0, 1e20, 31)
    found = ceiling.fit(x, truth(x, 80, 70, 2, 2e19))
    assert found.identified and found.status == "ok"
    assert found.a_post == pytest.approx(80, abs=0.4)
    assert found.plasticity == pytest.approx(10, abs=0.4)
    assert found.c_mid == pytest.approx(2e19, rel=0.05) and found.b == pytest.approx(2, abs=0.15)
    assert found.share == pytest.approx(float(truth(5, 1, 0, 2, 1)), abs=0.02)


def test_intervals_hold_the_truth_about_nine_times_in_ten_on_synthetic_curves():
    """40 curves here; the 200 of docs/LOG.md: python tests/test_ceiling.py."""
    coverage, error, _ = synthetic_coverage(40)
    assert 0.8 <= coverage[0] <= 1 and (coverage[1:] >= 0.75).all() and error < 1


@pytest.mark.parametrize("kind", ["drift 0.7", "random walk", "zero gain"])
def test_ceiling_is_covered_on_curves_that_the_sigmoid_does_not_describe(kind):
    """20 curves here; 200 of every kind in docs/ceiling.md: python tests/test_ceiling.py."""
    _, covered, *_ = coverage_of_kind(kind, 20)
    assert covered >= 0.8


def test_plasticity_carries_the_noise_of_p_sft():
    """On a long plateau A_post is sharp, but the gain is no better known than P_sft, one point."""
    x = np.linspace(0, 1, 61)
    y = truth(x, 80, 70, 4, 0.05) + np.random.default_rng(0).normal(0, 0.5, 61)
    found = ceiling.fit(x, y)
    width = found.plasticity_high - found.plasticity_low
    assert width > found.a_post_high - found.a_post_low and width > 0.7 * 2 * 1.645 * 0.5


def test_few_points_take_their_noise_from_the_responses_and_many_show_it_themselves():
    x = np.linspace(0, 1, 16)
    y = truth(x, 50, 30, 1.5, 0.2) + np.random.default_rng(0).normal(0, 0.3, 16)

    def widths(at):
        fits = [ceiling.fit(x[at], y[at], n=n) for n in (200, 20000)]
        return [found.a_post_high - found.a_post_low for found in fits]

    few = widths([0, 4, 8, 12, 15])
    many = widths(slice(None))
    assert few[0] > 1.3 * few[1] and many[0] == pytest.approx(many[1], rel=0.05)


def test_noise_of_a_level_is_told_apart_and_is_in_no_interval():
    x = np.linspace(0, 1, 16)
    y = truth(x, 50, 30, 1.5, 0.2) + np.random.default_rng(0).normal(0, 0.3, 16)
    found = ceiling.fit(x, y, n=200)
    rate = y[-1] / 100
    assert found.level_se == pytest.approx(100 * math.sqrt(rate * (1 - rate) / 200))
    assert found.forecast[0]["high"] - found.forecast[0]["low"] < 2 * found.level_se


def test_point_with_few_responses_counts_little():
    x = np.linspace(0, 1, 7)
    y, n = truth(x, 60, 40, 1.5, 0.2), np.full(7, 4000)
    y[-1] += 6
    n[-1] = 40
    trusted, doubted = ceiling.fit(x, y, n=4000), ceiling.fit(x, y, n=n)
    assert doubted.reached < trusted.reached - 1


def test_one_outlier_does_not_move_the_ceiling():
    x = np.linspace(0, 1, 31)
    y = truth(x, 80, 70, 2, 0.2) + np.random.default_rng(3).normal(0, 0.3, 31)
    spoiled = y.copy()
    spoiled[15] -= 6
    clean, found = ceiling.fit(x, y), ceiling.fit(x, spoiled)
    assert found.n_fit <= 30 and found.a_post == pytest.approx(clean.a_post, abs=0.3)


def test_order_units_and_missing_points_do_not_matter():
    rng = np.random.default_rng(4)
    x, y, _ = synthetic(rng)
    order = rng.permutation(len(x))
    base = ceiling.fit(x, y)
    again = ceiling.fit(np.r_[x[order], 3e19] / 1e18, np.r_[y[order], math.nan])
    assert again.a_post_high == pytest.approx(base.a_post_high, abs=1e-6)
    assert again.c_mid_low * 1e18 == pytest.approx(base.c_mid_low, rel=1e-6)


def test_p_sft_as_a_number_is_the_point_at_zero_and_without_it_plasticity_is_null():
    x, y, _ = synthetic(np.random.default_rng(5))
    with_point, with_number = ceiling.fit(x, y), ceiling.fit(x[1:], y[1:], p_sft=y[0])
    neither = ceiling.fit(x[1:], y[1:])
    assert with_number.as_json() == with_point.as_json() and with_number.p_sft == y[0]
    assert neither.plasticity_low is None and neither.share_high is None and neither.a_post_low > 0


def test_ceiling_never_exceeds_the_metric():
    x = np.linspace(0, 1, 20)
    found = ceiling.fit(x, 90 + 8 * x)
    assert found.a_post_high <= 100 and all(f["high"] <= 100 for f in found.forecast)


def test_same_points_give_the_same_numbers():
    x, y, _ = synthetic(np.random.default_rng(6))
    assert ceiling.fit(x, y).as_json() == ceiling.fit(x, y).as_json()


# -- what cannot be known is said so


@pytest.mark.parametrize("gain", [0, 0.3])
def test_flat_noisy_curve_is_not_identified_and_its_values_are_null(gain):
    x = np.linspace(0, 1, 13)
    found = ceiling.fit(x, 12 + gain * x + np.random.default_rng(1).normal(0, 1, 13), n=2000)
    row = found.as_json()
    assert found.status == "ok" and not row["identified"]
    assert all(
        row[name] is None for name in ("a_post", "plasticity", "c_mid", "b", "epsilon", "share")
    )
    assert row["a_post_low"] < row["a_post_high"] and row["forecast"][0]["mean"] is not None
    assert "ceiling not identified [" in ceiling.report(found)


def test_straight_rise_is_not_identified():
    x = np.linspace(0, 1, 30)
    found = ceiling.fit(x, 50 + 5 * x + np.random.default_rng(0).normal(0, 0.4, 30))
    assert not found.identified and found.share_low < 0.6


def test_few_points_are_too_few_and_five_are_not():
    assert ceiling.fit([0, 1, 2, 3], [10, 15, 17, 18]).status == "too few points"
    assert (
        ceiling.fit([], []).status == "too few points"
        and ceiling.fit([0] * 6, [1] * 6).status == "too few points"
    )
    five = ceiling.fit([0, 1, 2, 3, 4], [10, 15, 17, 18, 18.5])
    assert five.status == "ok" and five.a_post_high - five.a_post_low > 1


def test_collapse_reports_the_best_before_it_without_interval_or_forecast():
    x = np.linspace(0, 1, 30)
    y = truth(x, 78, 68, 2, 0.2) + np.random.default_rng(0).normal(0, 0.3, 30)
    best = y[:24].max()
    y[24:] -= [5, 9, 12, 9, 14, 15]
    found = ceiling.fit(x, y)
    assert (
        found.status == "collapse"
        and not found.identified
        and found.a_post == best
        and found.a_post_low is None
    )
    assert found.plasticity == best - y[0] and all(f["mean"] is None for f in found.forecast)


def test_repeated_falls_are_an_oscillation_and_one_bad_point_or_noise_is_neither():
    rng = np.random.default_rng(0)
    y = 70 + 3 * np.linspace(0, 1, 30) + rng.normal(0, 0.3, 30)
    assert ceiling.falls(y)[0] == "ok"
    one = y.copy()
    one[12] -= 8
    assert ceiling.falls(one)[0] == "ok"
    one[20:22] -= 8
    assert ceiling.falls(one)[0] == "oscillation"
    assert all(ceiling.falls(40 + rng.normal(0, 1.5, 40))[0] == "ok" for _ in range(50))


def test_share_is_not_called_reached_before_it_is():
    """rl.py --until-share 0.95 stops by the interval's lower end: seldom below the true share."""
    rng = np.random.default_rng(3)
    stops = []
    for _ in range(8):
        b, c = rng.uniform(2, 4), rng.uniform(2, 6)
        x = np.arange(0, 61, 4.0)
        y = truth(x, 45, 30, b, c) + rng.normal(0, 0.4, len(x))
        for k in range(5, len(x) + 1):
            if (ceiling.fit(x[:k], y[:k]).share_low or 0) >= 0.95:
                stops.append(float(truth(x[k - 1], 1, 0, b, c)))
                break
    assert len(stops) >= 4 and sum(share >= 0.95 for share in stops) >= len(stops) - 1


# -- the second ceiling, and the line of a log


def entropic_run(tmp_path, entropy, y):
    """A run directory whose policy of step s has this entropy and performance."""
    rows = [{"step": i + 1, "kind": "train", "entropy": float(h)} for i, h in enumerate(entropy)]
    for i, v in enumerate(y):
        rows.append({"step": i, "kind": "eval", "flops": i * 1e15, "pass1": float(v)})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ceiling.fit_points(ceiling.read_run(tmp_path))


def test_entropy_law_gives_the_performance_at_zero_entropy(tmp_path):
    entropy = np.linspace(0.8, 0.2, 13)
    y = 60 - 10 * np.exp(entropy) + np.random.default_rng(0).normal(0, 0.2, 13)
    found = entropic_run(tmp_path, entropy, y)
    assert found.entropy_ceiling == pytest.approx(50, abs=1)
    low, high = found.entropy_ceiling_low, found.entropy_ceiling_high
    assert low < found.entropy_ceiling < high and high - low < 2


def test_interval_of_the_entropy_law_covers_nine_times_in_ten():
    entropy = np.linspace(0.8, 0.2, 13)
    hits = []
    for seed in range(100):
        y = 60 - 10 * np.exp(entropy) + np.random.default_rng(seed).normal(0, 0.5, 13)
        low, high = np.quantile(curvefit.entropy_law(entropy, y), (0.05, 0.95))
        hits.append(low < 50 < high)
    assert 0.83 <= np.mean(hits) <= 0.97


def test_entropy_that_does_not_fall_gives_no_second_ceiling(tmp_path):
    rng = np.random.default_rng(0)
    y = truth(np.linspace(0, 1, 13), 50, 30, 1.5, 0.2)
    found = entropic_run(tmp_path, 0.5 + rng.normal(0, 0.02, 13), y)
    assert found.entropy_ceiling is None and "entropy law" not in ceiling.report(found)


def test_two_ceilings_that_disagree_are_one_line(tmp_path):
    """Performance levels off while entropy still falls: its law promises 45, the curve 35."""
    x = np.linspace(0, 1, 31)
    y = truth(x, 35, 20, 2, 0.1)
    entropy = np.log(3 - (y - 20) / 15)
    found = entropic_run(tmp_path, entropy, y + np.random.default_rng(0).normal(0, 0.1, 31))
    assert found.entropy_ceiling_low > found.a_post_high
    assert "disagrees" in ceiling.report(found).splitlines()[-1]


def test_line_says_what_twice_the_compute_may_give_in_every_state():
    x, y, _ = synthetic(np.random.default_rng(5))
    found = ceiling.fit(x, y)
    ahead = found.forecast[-2]
    expected = f"at 2x the compute {ahead['mean']:.1f} [{ahead['low']:.1f}, {ahead['high']:.1f}]"
    assert ahead["flops"] == 2 * x.max() and expected in ceiling.line(found)
    assert "too few" in ceiling.line(ceiling.fit([0, 1], [2, 3]))
    y[20:] -= 30
    assert "collapse; the best before it" in ceiling.line(ceiling.fit(x, y))


# -- files and the command line


def write_csv(path, columns, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return str(path)


def test_json_has_the_documented_keys_and_forecasts_the_points_left_out(tmp_path, capsys):
    x, y, _ = synthetic(np.random.default_rng(7))
    path = write_csv(
        tmp_path / "p.csv", ["run", "flops", "performance"], [("a", *row) for row in zip(x, y)]
    )
    assert ceiling.main(["--csv", path, "--fit-fraction", "0.71", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["runs"][0]
    documented = {
        f"{name}{end}"
        for name in ("a_post", "plasticity", "c_mid")
        for end in ("", "_low", "_high")
    }
    assert documented | {
        "run",
        "p_sft",
        "b",
        "epsilon",
        "identified",
        "status",
        "n_fit",
        "rmse",
        "share",
    } <= set(row)
    assert [f["flops"] for f in row["forecast"]] == [*x[22:], 2 * x[21], 10 * x[21]]
    assert all(f["low"] < f["mean"] < f["high"] for f in row["forecast"])


def test_fit_column_chooses_the_points_and_runs_stay_apart(tmp_path):
    x, y, _ = synthetic(np.random.default_rng(8))
    rows = [
        (run, *v)
        for v in zip(x[1:], y[1:], [y[0]] * 30, [2000] * 30, [1] * 20 + [0] * 10)
        for run in ("b", "a")
    ]
    found = ceiling.read_csv(
        write_csv(tmp_path / "p.csv", "run flops performance p_sft n fit".split(), rows)
    )
    assert [p.run for p in found] == ["b", "a"]
    one = ceiling.fit_points(found[0], 0.3)
    assert len(one.forecast) == 12 and one.p_sft == y[0] and one.forecast[0]["flops"] == x[21]
    assert (
        one.as_json() | {"run": ""}
        == ceiling.fit(x[:21], y[:21], n=2000, forecast_at=x[21:]).as_json()
    )


def test_run_directory_is_read_from_its_eval_lines(tmp_path, capsys):
    x, y, _ = synthetic(np.random.default_rng(9), n=8)
    rows = [
        {"step": i, "kind": "eval", "flops": x[i], "pass1": y[i], "pass1_se": 1.0, "n": 2000}
        for i in range(9)
    ]
    lines = [json.dumps(row) for row in [*rows, {"step": 8, "kind": "train", "flops": 9}]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 9, "ki')
    assert ceiling.main([str(tmp_path), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["runs"][0]
    known = {"run": str(tmp_path), "level_se": 1.0}
    assert row == ceiling.fit(x, y, n=2000).as_json() | known


@pytest.mark.parametrize(
    "text, words",
    [
        ("run,flops\na,1\n", "needs columns run, flops, performance"),
        ("", "no row"),
        ("run,flops,performance\na,x,1\n", ":2: could not convert"),
    ],
)
def test_bad_csv_is_one_line_and_exit_code_2(tmp_path, capsys, text, words):
    (tmp_path / "c.csv").write_text(text)
    assert ceiling.main(["--csv", str(tmp_path / "c.csv")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and said.count("\n") == 1


def test_user_mistakes_are_named():
    for flops, performance, n, words in (
        ([-1, 2], [1, 2], None, "from 0 on"),
        ([1], [1, 2], None, "one length"),
        ([0, 1], [1, 2], 0, "responses"),
    ):
        with pytest.raises(ValueError, match=words):
            ceiling.fit(flops, performance, n=n)
    assert ceiling.main(["runs/none", "--fit-fraction", "0"]) == 2


# -- the paper's own points


def paper_runs():
    """{(dataset, sft_step): (flops, performance, settings, Table 4's row)}; the first is at 0."""
    table = lambda name: list(csv.DictReader(open(RETU / name, newline="")))
    key = lambda row: (row["dataset"], int(row["sft_step"]))
    start = {key(row): float(row["performance"]) for row in table("sft_points.csv")} | {
        ("Base", 0): 46.71
    }
    settings = {key(row): row for row in table("fit_settings.csv")}
    published = {key(row): row for row in table("table4.csv")}
    points: dict = {}
    for row in table("rl_points.csv"):
        run = points.setdefault(key(row), [(0.0, start[key(row)])])
        run.append((float(row["flops_exa"]) * 1e18, float(row["performance"])))
    return {k: (*np.array(v).T, settings.get(k), published.get(k)) for k, v in points.items()}


def table4_rows():
    """(run, published plasticity, --paper's fit, published C_mid and B) of each run.

    The fit takes the released split and settings."""
    rows = []
    for run, (x, y, settings, published) in paper_runs().items():
        if published is None:
            continue
        part = slice(int(settings["train_start"]), int(settings["train_end"]))
        found = curvefit.least_squares_fit(
            x[part],
            (y - y[0])[part],
            float(settings["outlier_tau"]),
            float(settings["lts_alpha"]) if settings["use_lts"] == "True" else None,
            settings["free_epsilon"] == "True",
        )
        rows.append(
            (
                run,
                float(published["PL_rl"]),
                found,
                float(published["C_mid_exa"]),
                float(published["B"]),
            )
        )
    return rows


def forecast_errors(fraction):
    """(RMSE of ours, of the bounded sigmoid, coverage) by run, after `fraction` of it.

    Points below P_sft are left out."""
    rows = []
    for x, y, _, published in paper_runs().values():
        if published is None:
            continue
        n = int(fraction * len(x) + 0.5)
        held = y[n:] >= y[0]
        paper = [
            f["mean"] for f in ceiling.fit(x[:n], y[:n], forecast_at=x[n:], paper={}).forecast[:-2]
        ]
        ours = ceiling.fit(x[:n], y[:n], forecast_at=x[n:]).forecast[:-2]
        mean, low, high = (np.array([f[k] for f in ours])[held] for k in ("mean", "low", "high"))
        rmse = lambda forecast: float(np.sqrt(np.mean((forecast - y[n:][held]) ** 2)))
        rows.append(
            (
                rmse(mean),
                rmse(np.array(paper)[held]),
                np.mean((low <= y[n:][held]) & (y[n:][held] <= high)),
            )
        )
    return np.array(rows)


@needs_paper_data
def test_paper_mode_agrees_with_table_4_and_names_the_bounds():
    rows = table4_rows()
    assert {run for run, _, found, *_ in rows if found.at_bound} >= AT_BOUND
    close = [
        abs(found.top - published) <= 0.5 for _, published, found, *_ in rows if not found.at_bound
    ]
    assert len(close) >= 15 and np.mean(close) >= 0.9


@needs_paper_data
def test_command_line_fits_table_4_from_a_csv_with_its_split_and_settings(tmp_path, capsys):
    names = ["outlier_tau", "use_lts", "lts_alpha", "free_epsilon"]
    rows = []
    for run, (x, y, settings, published) in paper_runs().items():
        first, last = (
            (int(settings[k]) for k in ("train_start", "train_end")) if published else (0, 0)
        )
        rows += [
            (
                f"{run[0]}-{run[1]}",
                x[i],
                y[i],
                int(first <= i < last),
                *(settings[k] for k in names),
            )
            for i in range(len(x))
            if published
        ]
    path = write_csv(tmp_path / "p.csv", ["run", "flops", "performance", "fit", *names], rows)
    assert ceiling.main(["--csv", path, "--paper", "--json"]) == 0
    said = {row["run"]: row for row in json.loads(capsys.readouterr().out)["runs"]}
    for run, _, found, *_ in table4_rows():
        row = said[f"{run[0]}-{run[1]}"]
        assert row["identified"] == (not found.at_bound)
        assert row["plasticity"] == (None if found.at_bound else pytest.approx(found.top, abs=1e-6))


@needs_paper_data
@pytest.mark.parametrize("fraction", [0.71, 0.5, 0.35])
def test_forecasts_beat_the_bounded_sigmoid_on_both_halves_and_intervals_cover(fraction):
    rows = forecast_errors(fraction)
    for half in (rows[0::2], rows[1::2]):  # the estimator was chosen on the first
        assert half[:, 0].mean() < half[:, 1].mean()
    assert 0.85 <= rows[:, 2].mean() <= 0.97


@needs_paper_data
def test_all_given_runs_with_intervals_take_under_twenty_seconds():
    start = time.process_time()
    found = {run: ceiling.fit(x, y) for run, (x, y, *_) in paper_runs().items()}
    assert time.process_time() - start < 20 and len(found) == 21
    assert found["S1K", 62].status == "collapse" and found["Easy102K", 6120].status == "oscillation"
    assert sum(f.identified for f in found.values()) >= 9


def report() -> None:
    """Every figure that docs/LOG.md quotes of ceiling.py, as text."""
    if RETU.is_dir():
        rows = table4_rows()
        print(
            "Table 4: run, PL_rl published and ours, C_mid (EFLOP), B; at a bound = not identified"
        )
        for (name, step), published, found, c, b in rows:
            note = (
                "at a bound"
                if found.at_bound
                else ""
                if abs(found.top - published) <= 0.5
                else "off by over 0.5"
            )
            print(
                f"  {name:>9} {step:>6} {published:6.1f} {found.top:6.2f} {c:6.0f} "
                f"{found.c / 1e18:7.1f} {b:5.1f} {found.b:6.2f}  {note}"
            )
        free = [
            abs(found.top - published) for _, published, found, *_ in rows if not found.at_bound
        ]
        print(
            f"  within 0.5 points: {sum(v <= 0.5 for v in free)} of {len(free)} identified rows, "
            f"{sum(abs(f.top - v) <= 0.5 for _, v, f, *_ in rows)} of all {len(rows)}"
        )
        print(
            "Forecasts: mean RMSE over runs, ours / bounded sigmoid with MAD 2.5; coverage of the "
            "90% interval"
        )
        for fraction in (0.71, 0.5, 0.35):
            rows = forecast_errors(fraction)
            parts = [
                f"{name} {half[:, 0].mean():.3f} / {half[:, 1].mean():.3f}, {half[:, 2].mean():.0%}"
                for name, half in (
                    ("all", rows),
                    ("chosen on", rows[0::2]),
                    ("confirmed on", rows[1::2]),
                )
            ]
            print(f"  first {fraction:.0%}: {'   '.join(parts)}")
    coverage, error, n = synthetic_coverage(200)
    covered = ", ".join(
        f"{name} {v:.1%}" for name, v in zip(("A_post", "plasticity", "C_mid", "share"), coverage)
    )
    print(
        f"200 synthetic curves (30 points, noise 0.5): 90% intervals cover {covered};\n"
        f"  median error of A_post {error:.2f} points on the {n} curves that reach 70% of the gain"
    )
    print(
        "Every kind of curve: A_post covered by its 90% interval; called identified; covered then"
    )
    for kind in KINDS:
        n, covered, identified, inside = coverage_of_kind(kind, 200)
        print(
            f"  {kind:20} {n:4} fitted  {covered:4.0%} {identified:4.0%} {inside:4.0%}", flush=True
        )


if __name__ == "__main__":
    report()
