"""Regimes of every kind of validation curve, the recommendation, reading and comparing runs."""

import json
import math

import numpy as np
import pytest

import phases
from core import estimates
from phases import diagnose, reached, regimes

NAN = float("nan")


def named(losses, steps=None) -> str:
    """Regimes of a curve as their first letters: "aassm"."""
    found = diagnose(steps or range(100, 100 * len(losses) + 100, 100), losses)
    return (
        "".join(name[1 if name == "stable" else 0] for name in found.regimes)
        .replace("t", "S")
        .replace("s", "X")
    )


def noisy_valley(seed, sigma, n=30, rise=0.0):
    """Decay to .26 within 4 evaluations, flat or rising from the 15th on, with Gaussian noise."""
    i = np.arange(n)
    return (
        0.26
        + 0.6 * np.exp(-i / 4)
        + rise * np.maximum(i - 15, 0)
        + np.random.default_rng(seed).normal(0, sigma, n)
    )


# -- the definition, eq. (5)-(9), on every kind of curve: a adaptive, S stable, m mild, X severe


def test_u_shaped_curve_passes_all_four_regimes_in_order():
    losses = [0.9, 0.7, 0.6, 0.505, 0.5, 0.509, 0.511, 0.54, 0.5501, 0.7]
    found = diagnose(range(10), losses)
    assert named(losses) == "aaaSSSmmXX"
    assert found.saturated and found.recommended_step == 4 and found.alternative_step == 6


def test_band_edges_are_those_of_the_paper():
    """L <= 1.02 L_min is Stable, L >= 1.1 L_min is Severe: both edges belong."""
    assert regimes([1, 2, 3, 4], [1.0, 1.02, 1.0999, 1.1]) == ["stable", "stable", "mild", "severe"]


def test_monotone_curve_is_adaptive_until_its_end_and_still_improving():
    found = diagnose([1, 2, 3, 4, 5], [1.0, 0.8, 0.65, 0.55, 0.5])
    assert named([1.0, 0.8, 0.65, 0.55, 0.5]) == "aaaaS"
    assert not found.saturated and found.recommended_step == 5 and "still improving" in found.reason


def test_spike_does_not_end_stable():
    losses = [1.0, 0.6, 0.5, 0.5, 0.9, 0.503, 0.5, 0.505, 0.53, 0.6]
    assert named(losses) == "aaSSSSSSmX"
    assert diagnose(range(10), losses).noise == 0  # one spike is not noise


def test_two_equal_minima_enclose_one_stable_stretch():
    assert named([1, 0.6, 0.5, 0.6, 0.7, 0.6, 0.5, 0.499, 0.52, 0.56]) == "aaSSSSSSmX"


def test_lower_second_minimum_makes_the_first_adaptive():
    found = diagnose(range(12), [1, 0.6, 0.4, 0.5, 0.6, 0.5, 0.45, 0.35, 0.352, 0.356, 0.36, 0.4])
    assert (
        named([1, 0.6, 0.4, 0.5, 0.6, 0.5, 0.45, 0.35, 0.352, 0.356, 0.36, 0.4]) == "aaaaaaaSSSmX"
    )
    assert found.recommended_step == 7


def test_three_points_and_one_point_have_a_regime_each():
    assert (
        named([0.752, 0.617, 0.665]) == "aSm"
        and diagnose([1, 2, 3], [0.752, 0.617, 0.665]).saturated
    )
    one = diagnose([7], [1.3])
    assert (one.regimes, one.saturated, one.recommended_step) == (["stable"], False, 7)


def test_curve_of_a_built_in_run_passes_all_four_regimes():
    """Validation losses of the built-in task, 4,000 trajectories, every 100 steps from 0."""
    losses = [
        1.9208,
        0.4300,
        0.3373,
        0.2927,
        0.2751,
        0.2651,
        0.2575,
        0.2590,
        0.2634,
        0.2655,
        0.2634,
        0.2703,
        0.2861,
        0.2944,
    ]
    found = diagnose(range(0, 1400, 100), losses)
    assert named(losses) == "aaaaaaSSmmmmXX" and found.noise == 0
    assert (found.recommended_step, found.alternative_step, found.saturated) == (600, 800, True)


def test_noisier_built_in_run_still_improves_at_its_end():
    """8,000 trajectories: the last point is within noise of the lowest, the second half falls."""
    losses = [
        1.9208,
        0.4301,
        0.3364,
        0.2924,
        0.2776,
        0.2612,
        0.2486,
        0.2431,
        0.2403,
        0.2335,
        0.2293,
        0.2320,
        0.2281,
        0.2244,
        0.2255,
        0.2248,
    ]
    found = diagnose(range(0, 1600, 100), losses)
    assert 0.001 < found.noise < 0.005 and not found.saturated and found.recommended_step == 1400
    assert found.regimes.index("stable") == 9


def test_nan_is_infinitely_bad_and_a_nan_end_is_a_divergence():
    middle = diagnose([1, 2, 3, 4, 5], [1, 0.5, NAN, 0.501, 0.53])
    assert (
        middle.regimes == ["adaptive", "stable", "stable", "stable", "mild"]
        and middle.diverged_step is None
    )
    end = diagnose([1, 2, 3, 4], [1, 0.5, NAN, None])
    assert end.regimes == ["adaptive", "stable", "severe", "severe"]
    assert (
        end.diverged_step == 3 and end.recommended_step == 2 and "diverged at step 3" in end.reason
    )


def test_only_nan_recommends_nothing_and_says_so():
    found = diagnose([1, 2], [NAN, math.inf])
    assert (
        found.regimes == ["severe", "severe"]
        and found.recommended_step is None
        and not found.saturated
    )
    assert "no validation loss is finite" in found.reason
    assert json.loads(json.dumps(found.as_json()))["regimes"][0]["val_loss"] is None


def test_jump_that_stays_is_a_divergence_but_overfitting_is_not():
    assert diagnose([1, 2, 3, 4, 5], [1, 0.6, 0.5, 3, 4]).diverged_step == 4
    assert diagnose(range(8), [1, 0.6, 0.5, 0.6, 0.8, 1.0, 1.2, 1.5]).diverged_step is None
    assert diagnose([1, 2, 3, 4, 5], [1, 0.6, 0.5, 3, 0.5]).diverged_step is None


def test_order_of_rows_does_not_matter():
    steps, losses = [5, 1, 4, 2, 3], [0.6, 1, 0.5, 0.7, 0.52]
    shuffled, ordered = (
        diagnose(steps, losses),
        diagnose(sorted(steps), [x for _, x in sorted(zip(steps, losses))]),
    )
    assert shuffled == ordered and shuffled.steps == [1, 2, 3, 4, 5]
    assert regimes(steps, losses)[0] == ordered.regimes[-1]


def test_later_row_of_a_step_counts():
    found = diagnose([1, 2, 3, 2], [1, 0.2, 0.5, 0.6])
    assert (
        found.steps == [1, 2, 3] and found.losses == [1, 0.6, 0.5] and found.recommended_step == 3
    )


@pytest.mark.parametrize("seed", range(150))
def test_every_checkpoint_has_one_regime_and_regimes_never_go_back(seed):
    rng = np.random.default_rng(seed)
    losses = np.where(
        rng.random(n := rng.integers(1, 26)) < 0.2, NAN, np.exp(rng.uniform(-4.6, 2.3, n))
    ).tolist()
    found = diagnose(range(len(losses)), losses)
    order = [
        min(phases.REGIMES.index(name), 2) for name in found.regimes
    ]  # mild and severe may alternate
    assert len(order) == len(losses) and (order == sorted(order) or np.isnan(losses).all())
    if not np.isnan(losses).all():
        low = int(np.nanargmin(losses))
        assert found.regimes[low] == "stable"
        if found.noise == 0:
            assert found.recommended_step == low


# -- noise


def test_noise_of_a_noisy_curve_is_found_and_of_a_smooth_one_is_zero():
    sizes = [diagnose(range(30), noisy_valley(seed, 0.02)).noise for seed in range(20)]
    assert 0.012 < np.median(sizes) < 0.028
    assert diagnose(range(30), 0.26 + 0.6 * np.exp(-np.arange(30) / 8)).noise == 0


def test_noisy_plateau_stays_stable_and_the_reason_says_so():
    found = diagnose(range(30), noisy_valley(0, 0.015))
    raw = regimes(range(30), noisy_valley(0, 0.015))
    assert found.regimes.count("stable") > raw.count("stable") and "noisy by" in found.reason
    assert set(found.regimes[found.steps.index(found.recommended_step) :]) <= {"stable", "mild"}


def test_noisy_but_falling_curve_is_still_improving_though_its_last_point_is_not_the_lowest():
    i = np.arange(25)
    found = [
        diagnose(i, 0.25 + 0.8 * np.exp(-i / 12) + np.random.default_rng(s).normal(0, 0.01, 25))
        for s in range(60)
    ]
    late = [d for d in found if 0 < d.losses[-1] - min(d.losses) <= 2 * d.noise]
    assert len(late) >= 5 and all(not d.saturated for d in late)


def test_noisy_curve_is_started_nearer_its_true_minimum_by_a_mean_of_three():
    """Mean excess over the true minimum of 200 noisy valleys, against the lowest single value."""
    means = []
    singles = []
    for seed in range(200):
        truth = noisy_valley(seed, 0, rise=0.006)
        losses = noisy_valley(seed, 0.006, rise=0.006)
        found = diagnose(range(30), losses)
        if found.noise:
            means.append(truth[found.recommended_step] - truth.min())
            singles.append(truth[np.argmin(losses)] - truth.min())
    assert len(means) > 100 and np.mean(means) < 0.85 * np.mean(singles)


def test_a_plateau_is_called_saturated_so_far_only():
    assert "saturated so far" in diagnose(range(5), [1, 0.6, 0.5, 0.51, 0.52]).reason


# -- readiness for RL


def write_readiness(run, rows):
    """Eval lines of a run: {step: (pass1, right_counts)}."""
    with open(run / "metrics.jsonl", "a") as file:
        for step, (pass1, counts) in rows.items():
            row = {"step": step, "kind": "eval", "pass1": pass1, "pass1_se": 1.0, "entropy": 0.4}
            file.write(json.dumps(row | {"right_counts": counts}) + "\n")
    return str(run)


def test_each_rule_recommends_its_own_checkpoint(tmp_path, capsys):
    run = write_run(tmp_path / "sft", [1, 0.5, 0.6, 0.7], saved=(100, 200, 300, 400))
    few = [90, 10, 0, 0, 0, 0, 0, 0, 0]
    mixed = [20, 20, 20, 20, 20, 0, 0, 0, 0]
    split = [50, 0, 0, 0, 0, 0, 0, 0, 50]  # more accurate, but no group would carry a signal
    run = write_readiness(run, {200: (1, few), 300: (25, mixed), 400: (50, split)})
    chosen = {}
    for rule in ("loss", "signal", "accuracy"):
        assert phases.main([run, "--recommend", rule, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        chosen[rule] = said["recommended_step"]
        assert said["recommended_by"] == {"loss": 200, "signal": 300, "accuracy": 400}
    assert chosen == {"loss": 200, "signal": 300, "accuracy": 400}
    assert said["readiness"]["300"]["signal"] == pytest.approx(80)
    assert phases.main([run]) == 0
    table = capsys.readouterr().out
    assert "signal G=8" in table and "by loss 200, by signal 300, by accuracy 400" in table


def test_too_few_samples_for_the_group_give_no_signal(tmp_path, capsys):
    run = write_readiness(write_run(tmp_path / "sft", [1, 0.5], saved=(200,)), {200: (5, [9, 1])})
    assert phases.main([run, "--recommend", "signal"]) == 2
    assert "no saved validation has measured it" in capsys.readouterr().err
    assert phases.main([run, "--recommend", "signal", "--group", "1"]) == 0


# -- stopping


def test_until_mild_stops_a_rising_run_soon_and_not_one_spike():
    rising = [1, 0.6, 0.5, 0.5, 0.505, 0.53, 0.535, 0.54]
    stops = [reached(diagnose(range(k), rising[:k]), "mild") for k in range(1, 9)]
    assert stops == [False] * 7 + [True]
    assert not reached(diagnose(range(6), [1, 0.6, 0.5, 0.5, 0.505, 0.9]), "mild")


def test_until_stable_waits_for_three_validations_without_a_new_minimum():
    losses = [1, 0.6, 0.5, 0.501, 0.502, 0.5005]
    assert [reached(diagnose(range(k), losses[:k]), "stable") for k in range(1, 7)] == [
        False
    ] * 5 + [True]


def test_until_severe_asks_for_severe():
    mild = diagnose(range(6), [1, 0.5, 0.53, 0.53, 0.53, 0.53])
    assert reached(mild, "mild") and not reached(mild, "severe")
    assert reached(diagnose(range(6), [1, 0.5, 0.53, 0.56, 0.6, 0.6]), "severe")


def test_noise_alone_seldom_stops_a_run_and_overfitting_always_does():
    def stopped(rise, until=25):
        curves = [noisy_valley(seed, 0.006, rise=rise) for seed in range(30)]
        return np.mean(
            [
                any(reached(diagnose(range(k), y[:k]), "mild") for k in range(4, until))
                for y in curves
            ]
        )

    assert stopped(0.0) <= 0.15 and stopped(0.008) == 1


def test_diverged_run_has_reached_every_regime_and_unknown_names_are_refused():
    assert reached(diagnose([1, 2, 3], [1, 0.5, NAN]), "severe")
    with pytest.raises(ValueError, match="stable, mild, severe"):
        reached(diagnose([1], [1]), "adaptive")


# -- files


def write_run(folder, losses, saved=(), val_set="5f3a", extra=()):
    folder.mkdir()
    rows = [
        {"step": 100 * i, "kind": "val", "flops": 1e15 * i, "val_loss": x}
        for i, x in enumerate(losses, 1)
    ]
    lines = [json.dumps(row) for row in [{"step": 1, "kind": "train", "loss": 9}, *rows]]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, *extra]) + "\n")
    (folder / "run.json").write_text(json.dumps({"val_set": val_set} if val_set else {}))
    for step in saved:
        (folder / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    return folder


def test_recommended_checkpoint_is_the_lowest_that_is_saved(tmp_path):
    run = write_run(tmp_path / "sft", [1, 0.5, 0.4, 0.41, 0.43], saved=(100, 200, 400, 500))
    (run / "checkpoints" / "step_000300.tmp").mkdir()  # half written: not a checkpoint
    curve = phases.read_run(run)
    found = diagnose(curve.steps, curve.losses, curve.flops, curve.saved)
    assert (
        curve.saved == [100, 200, 400, 500]
        and found.recommended_step == 400
        and found.alternative_step == 400
    )
    assert "0.4 at step 300, is not saved" in found.reason


def test_run_without_checkpoints_recommends_none_and_says_why(tmp_path):
    curve = phases.read_run(write_run(tmp_path / "sft", [1, 0.5]))
    found = diagnose(curve.steps, curve.losses, curve.flops, curve.saved)
    assert found.recommended_step is None and "no validated step is saved" in found.reason


def test_json_has_the_documented_keys(tmp_path, capsys):
    assert (
        phases.main([str(write_run(tmp_path / "sft", [1, 0.5, 0.6], saved=(100, 200))), "--json"])
        == 0
    )
    said = json.loads(capsys.readouterr().out)
    assert {"regimes", "saturated", "recommended_step", "reason"} <= set(said)
    assert said["regimes"][1] == {"step": 200, "flops": 2e15, "val_loss": 0.5, "regime": "stable"}


def test_line_that_is_just_being_written_is_left_out_but_a_broken_one_is_named(tmp_path):
    half = write_run(tmp_path / "a", [1, 0.5], extra=['{"step": 300, "kind": "va'])
    assert phases.read_run(half).steps == [100, 200]
    with pytest.raises(ValueError, match=r"metrics.jsonl:4: not JSON"):
        phases.read_run(write_run(tmp_path / "b", [1, 0.5], extra=["oops", "{}"]))


def test_csv_takes_steps_or_flops_in_any_order(tmp_path):
    (tmp_path / "a.csv").write_text("val_loss,step\n.5,20\n1,10\n,30\n")
    (tmp_path / "b.csv").write_text("flops,val_loss\n2e18,.5\n1e18,1\n3e18,\n")
    by_step, by_flops = phases.read_csv(tmp_path / "a.csv"), phases.read_csv(tmp_path / "b.csv")
    assert (
        by_step.steps == [20, 10, 30]
        and by_flops.steps == [2, 1, 3]
        and by_flops.flops == [2e18, 1e18, 3e18]
    )
    names = [diagnose(c.steps, c.losses, c.flops).regimes for c in (by_step, by_flops)]
    assert names == [["adaptive", "stable", "severe"]] * 2


@pytest.mark.parametrize(
    "text, words",
    [
        ("step,loss\n1,2\n", "needs columns val_loss"),
        ("val_loss\n1\n", "no column step or"),
        ("", "no row"),
        ("step,val_loss\n1,x\n", "column val_loss"),
        ("step,val_loss\n,1\n", "only val_loss"),
    ],
)
def test_bad_csv_is_one_line_and_exit_code_2(tmp_path, capsys, text, words):
    (tmp_path / "c.csv").write_text(text)
    assert phases.main(["--csv", str(tmp_path / "c.csv")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and said.count("\n") == 1


def test_missing_run_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert phases.main([str(tmp_path / "nowhere")]) == 2
    assert "metrics.jsonl: not found" in capsys.readouterr().err


# -- the indicator

PAPER = {
    "s1k": (0.51, 77.3),
    "u102k": (0.42, 79.7),
    "u220k": (0.41, 82.6),
    "u440k": (0.39, 82.8),
    "sft889k": (0.37, 84.0),
}


def test_compare_finds_the_papers_correlations(tmp_path, capsys):
    """Minimum loss against ceiling over its five data sets: Pearson -0.94, Spearman -1."""
    runs = [
        str(write_run(tmp_path / name, [1, loss, 1.1 * loss])) for name, (loss, _) in PAPER.items()
    ]
    assert (
        phases.main(
            ["--compare", *runs, "--ceilings", *(str(a) for _, a in PAPER.values()), "--json"]
        )
        == 0
    )
    said = json.loads(capsys.readouterr().out)
    assert [row["run"] for row in said["runs"]] == runs[::-1]
    assert said["pearson"] == pytest.approx(-0.94, abs=0.01) and said["spearman"] == pytest.approx(
        -1
    )


def test_compare_takes_ceilings_from_a_file_for_some_of_the_runs(tmp_path, capsys):
    runs = [str(write_run(tmp_path / name, [1, loss])) for name, (loss, _) in PAPER.items()]
    (tmp_path / "a.csv").write_text(
        "run,a_post\n" + "".join(f"{run},{70 + i}\n" for i, run in enumerate(runs[:3]))
    )
    assert phases.main(["--compare", *runs, "--ceilings", str(tmp_path / "a.csv")]) == 0
    said = capsys.readouterr().out
    assert "with 3 ceilings" in said and "Spearman -1.00" in said


@pytest.mark.parametrize("other", ["77ab", None])
def test_compare_refuses_another_or_an_unknown_validation_set(tmp_path, capsys, other):
    runs = [
        str(write_run(tmp_path / "a", [1, 0.5])),
        str(write_run(tmp_path / "b", [1, 0.4], val_set=other)),
    ]
    assert phases.main(["--compare", *runs]) == 2
    assert "cannot be compared" in capsys.readouterr().err


def test_ties_share_a_rank_and_no_spread_has_no_correlation():
    assert estimates.correlation(np.array([1.0, 1.0]), np.array([2.0, 3.0])) is None
    assert list(estimates.ranks(np.array([3.0, 1.0, 3.0]))) == [2.0, 0.5, 2.0]
