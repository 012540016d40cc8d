"""The plan has every arm and fits its time; a killed study goes on; verdicts follow the numbers."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import data
import methods
import rl
import sft
from core import cli, files
from paper import findings, plan, report, results, sets, study
from tasks import countdown

ROOT = Path(__file__).resolve().parents[1]
OWN = ("data", "val", "problems", "dev", "test")


def config(*argv):
    return cli.parse(study.Config, list(argv), study.preset)


def jobs_of(cfg):
    return plan.jobs_of(cfg, plan.QUICK if cfg.quick else plan.FULL)


def own_config(folder, *argv):
    words = []
    for name in OWN:
        words += [f"--{name}", f"{folder}/{name}.jsonl"]
    return config("--init", "some/model", *words, *argv)


# --------------------------------------------------------------------------------------------- plan
def test_the_plan_has_every_arm_that_a_claim_compares():
    planned = {job.name for job in jobs_of(config())}
    wanted = {f"exam-rl-{scale}-stable-0" for scale in results.SCALES}
    wanted |= {f"rl-fixed-{start}-{seed}" for start in results.STARTS for seed in (0, 1)}
    wanted |= {f"exam-{kind}-middle-2" for kind in ("half", "pure")}
    wanted |= {"exam-base-dapo-1", "exam-base-mixed-0", "exam-then-mixed-2", "rl-dft-accuracy-0"}
    wanted |= {f"exam-late-{name}-0" for name in results.EXACT}
    for algo in ("dapo", *plan.MIXED):
        wanted |= {f"screen-{kind}-{algo}-{n}" for kind in ("base", "then") for n in range(3)}
    assert wanted <= planned
    assert "difficulty" not in planned
    harder = {job.name for job in jobs_of(config("--difficulty"))}
    assert {"difficulty", "exam-rl-hard-stable-1"} <= harder


def test_quick_is_the_same_plan_with_one_seed():
    quick = {job.name for job in jobs_of(config("--quick"))}
    full = {job.name for job in jobs_of(config())}
    assert quick < full
    left = {name for name in full - quick if not name.startswith("screen")}
    assert left and all(name[-2:] in ("-1", "-2") for name in left)


@pytest.mark.parametrize("argv, minutes", [([], 100), (["--quick"], 10)])
def test_planned_minutes_fit_two_cores_with_a_margin(argv, minutes):
    assert sum(job.minutes for job in jobs_of(config(*argv))) / 2 < 0.95 * minutes


@pytest.mark.parametrize("argv", [(), ("--quick",), ("--difficulty",)])
def test_every_need_is_planned_before_it_is_needed(argv):
    seen = set()
    for job in jobs_of(config(*argv)):
        assert set(job.needs) <= seen, job.name
        assert job.name not in seen
        seen.add(job.name)


def before(jobs, name) -> set[str]:
    """All jobs that a job waits for, directly or not."""
    found = set(jobs[name].needs)
    for need in jobs[name].needs:
        found |= before(jobs, need)
    return found


def test_a_job_needs_every_run_that_its_command_is_filled_in_from(tmp_path):
    for cfg in (config(), own_config(tmp_path)):
        jobs = {job.name: job for job in jobs_of(cfg)}
        for name, job in jobs.items():
            done = before(jobs, name)
            for word in (word[1:] for word in job.command if word.startswith("@")):
                head, *rest = word.split(":")
                if head in ("lr", "algo"):
                    screens = f"screen-{rest[0].partition('-')[0]}-"
                    assert any(each.startswith(screens) for each in done), (name, word)
                else:
                    assert (rest[0] if head in ("total", "rest") else head) in done, (name, word)


def test_own_task_gets_the_handoff_with_its_own_flags_and_says_so(tmp_path, capsys):
    cfg = own_config(tmp_path, "--nproc", "8")
    jobs = {job.name: job for job in jobs_of(cfg)}
    assert {f"rl-own-{start}-0" for start in results.STARTS} <= set(jobs)
    assert not any(name.startswith(("screen", "rl-small", "base-mixed")) for name in jobs)
    assert "--lr" not in jobs["sft-own-0"].command
    assert "some/model" in jobs["base-dapo-0"].command
    study.show_plan(cfg, list(jobs.values()), set())
    assert "asked of your own task: the handoff's claims" in capsys.readouterr().out
    with pytest.raises(ValueError, match="missing: --test"):
        config("--init", "m", "--data", "x", "--val", "x", "--problems", "x", "--dev", "x")
    with pytest.raises(ValueError, match="belong to the built-in study"):
        own_config(tmp_path, "--quick")


def test_every_flag_is_known_to_its_script_and_agrees_with_its_built_in_preset():
    own = {"data", "val", "problems", "steps", "eval_every", "log_every", "lr", "reward"}
    for job in jobs_of(config()):
        script, *argv = job.command
        if script not in ("sft.py", "rl.py") or job.name == plan.BASE:
            continue
        script = {"sft.py": sft, "rl.py": rl}[script]
        filled = []
        for word in argv:
            filled.append("luffy" if word.startswith("@algo") else word)
        numbers = ("@lr", "@rest", "@total")
        filled = ["1e-3" if word.startswith(numbers) else word for word in filled]
        options = ("algo", methods.load) if script is rl else None
        cfg = cli.parse(script.Config, filled, script.preset, options)
        for name, value in script.preset({}).items():  # what the study sets by itself left out
            assert name in own or getattr(cfg, name) == value, (job.name, name)


# --------------------------------------------------------------------------------------------- sets
@pytest.fixture(scope="module")
def tiny_sets(tmp_path_factory):
    out = tmp_path_factory.mktemp("sets")
    sets.write(out, config("--quick"), plan.QUICK)
    return {path.stem: data.read_rows(path) for path in (out / "sets").glob("*.jsonl")}, out


def test_no_training_file_holds_a_problem_of_an_unseen_kind(tiny_sets):
    rows, _ = tiny_sets
    for name in (*plan.QUICK.rows, "fixed", "fixed-val", "val", "problems", "dev"):
        assert rows[name] and all(sets.is_seen(row) for row in rows[name]), name
    assert len(rows["base"]) == sets.BASE_DOCUMENTS and all(map(sets.base_is_seen, rows["base"]))
    assert not sets.base_is_seen({"text": "Make 10 from 3 9 4 -> x"})
    assert not sets.base_is_seen({"text": "Make 30 from 1 2 4 -> x"})
    assert sets.base_is_seen({"text": "Make 30 -> 5 * 6 = 30 yes"})


def test_exams_out_of_distribution_are_of_one_unseen_kind_each_and_all_different(tiny_sets):
    rows, out = tiny_sets
    parts = json.loads((out / "sets" / "counts.json").read_text())["exam"]
    assert parts == {"test": 24, "pair": 12, "band": 12}
    kinds = [sets.kind_of(row["numbers"], int(row["answer"])) for row in rows["exam"]]
    assert kinds == ["seen"] * 24 + ["pair"] * 12 + ["band"] * 12
    problems = {(tuple(sorted(row["numbers"])), row["answer"]) for row in rows["exam"]}
    assert len(problems) == 48


def test_scales_are_nested_and_share_no_prompt_with_an_evaluation(tiny_sets):
    rows, _ = tiny_sets
    assert rows["small"] == rows["middle"][:60] and rows["middle"] == rows["large"][:90]
    prompts = {name: {row["prompt"] for row in rows[name]} for name in rows if name != "base"}
    evaluated = prompts["dev"] | prompts["exam"]
    assert not evaluated & (prompts["large"] | prompts["problems"] | prompts["fixed"])
    assert not prompts["dev"] & prompts["exam"]
    for name in results.EXACT:
        assert not prompts[name] & (prompts[f"{name}-exam"] | prompts[f"{name}-dev"])


def test_the_fixed_expert_is_right_and_its_response_is_fixed_by_the_problem(tiny_sets):
    rows, _ = tiny_sets
    for row in rows["fixed"]:
        assert countdown.reward(row["response"], row).correct
        chance = random.Random(7)
        again = countdown.expert(row["numbers"], int(row["answer"]), 0, 17, chance, nearest=True)
        assert again == (row["response"], True)


def test_exact_answers_are_what_their_prompts_say(tiny_sets):
    rows, _ = tiny_sets
    for row in rows["chain"]:
        words = row["prompt"].split()[1:-1]
        value = int(words[0])
        for op, number in zip(words[1::2], words[2::2]):
            value = countdown.apply(value, op, int(number))
        assert row["answer"] == str(value) and row["response"].endswith(f"</think> {value}")
    for row in rows["sort"]:
        numbers = list(map(int, row["prompt"].split()[2:-1]))
        assert list(map(int, row["answer"].split())) == sorted(numbers)


def test_own_files_are_cleaned_of_evaluation_prompts(tmp_path):
    rows = {name: [{"prompt": f"{name} {n} ?", "answer": "1"} for n in range(5)] for name in OWN}
    rows["data"] += rows["test"][:2] + rows["data"][:1]
    for name in OWN:
        lines = "".join(json.dumps(row) + "\n" for row in rows[name])
        (tmp_path / f"{name}.jsonl").write_text(lines)
    cfg = own_config(tmp_path, "--near", "0", "--out", str(tmp_path / "out"))
    sets.write(tmp_path / "out", cfg, plan.FULL)
    counts = json.loads((tmp_path / "out" / "sets" / "counts.json").read_text())
    assert counts["curated"]["data"]["kept"] == 5 and counts["exam"] == {"test": 5, "ood": 0}


# --------------------------------------------------------------------------------------------- work
def write_run(folder, kind, points, **more):
    """A run with checkpoints at each (step, flops, value): validation losses or pass@1."""
    key = {"val": "val_loss", "eval": "pass1"}[kind]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.jsonl", "a") as file:
        for step, flops, value in points:
            (folder / "checkpoints" / f"step_{step:06d}").mkdir(parents=True, exist_ok=True)
            row = {"step": step, "kind": kind, "flops": flops, key: value, "n": 800}
            if more.get("samples"):
                mixed = min(40, round(value) + 1)
                row["right_counts"] = [60 - mixed, mixed, *[0] * 6, 4]
                row["entropy"] = 0.5 - value / 200
            file.write(json.dumps(row) + "\n")
    config = {"lr": more.get("lr", 1e-3), "algo": more.get("algo", "dapo")}
    about = {"val_set": more.get("val_set", "v"), "config": config}
    (folder / "run.json").write_text(json.dumps(about))


def test_words_with_at_become_checkpoints_rates_and_compute(tmp_path):
    cfg = config("--out", str(tmp_path), "--rl-flops", "8e9")
    losses = [2.0, 1.5, 1.2, 1.0, 0.8, 0.81, 1.0, 1.2, 1.5]
    run = tmp_path / "sft-middle-0"
    write_run(run, "val", [(i * 10, i * 1e9, loss) for i, loss in enumerate(losses)])
    write_run(run, "eval", [(i * 10, i * 1e9, i + 1.0) for i in range(9)], samples=True)
    rises = [(0, 0, 5.0), (1, 3e9, 8.0), (2, 5e9, 7.0), (3, 8e9, 9.0)]
    write_run(tmp_path / "rl-middle-stable-0", "eval", rises)

    def at(word):
        return int(plan.fill(word, cfg).rpartition("_")[2])

    steps = {start: at(f"@sft-middle-0:{start}") for start in results.STARTS}
    assert steps == {"stable": 40, "adaptive": 20, "late": 80, "signal": 80, "accuracy": 80}
    assert at("@rl-middle-stable-0:best") == 3
    assert at("@rl-middle-stable-0:best:half") == 1  # within 4e9
    assert at("@sft-middle-0:matched") == 80  # 4e9 to Stable and half of RL
    assert float(plan.fill("@total:sft-middle-0", cfg)) == 8e9
    rest = {start: float(plan.fill(f"@rest:sft-middle-0:{start}", cfg)) for start in steps}
    assert rest == {"stable": 8e9, "adaptive": 10e9, "late": 4e9, "signal": 4e9, "accuracy": 4e9}
    for n, (algo, lr, rates) in enumerate(
        [("dapo", 1e-4, (1, 2, 3)), ("dapo", 1e-3, (9, 9, 1, 0)), ("upt", 3e-4, (1, 1, 1))]
    ):
        points = [(i, i * 1e9, rate) for i, rate in enumerate(rates)]
        write_run(tmp_path / f"screen-then-{algo}-{n}", "eval", points, lr=lr, algo=algo)
    assert plan.fill("@lr:then-dapo", cfg) == "0.0001"  # a peak before a fall does not count
    assert plan.fill("@algo:then", cfg) == "upt" and plan.fill("@lr:then-mixed", cfg) == "0.0003"
    assert plan.fill("--seed", cfg) == "--seed"


def test_a_start_beyond_its_compute_keeps_a_quarter_of_rl(tmp_path):
    cfg = config("--out", str(tmp_path), "--rl-flops", "4e9")
    losses = [2.0, 0.8, 1.0, 1.2, 1.5, 1.6, 1.7, 1.8, 1.9]
    points = [(i * 10, i * 1e9, loss) for i, loss in enumerate(losses)]
    write_run(tmp_path / "sft-fixed-0", "val", points)
    assert float(plan.fill("@rest:sft-fixed-0:late", cfg)) == 1e9
    assert float(plan.fill("@rest:sft-fixed-0:stable", cfg)) == 8e9  # the same in total
    free = config("--out", str(tmp_path), "--rl-flops", "0")
    assert plan.rl_flops(free, tmp_path / "sft-fixed-0") == 1e9


JOBS = """
import json
import sys
from pathlib import Path

sys.path.insert(0, {root!r})
from core import cli
from paper import plan, study

out = Path({out!r})
(out / "done").mkdir(parents=True, exist_ok=True)


def make(name, rows, *needs):
    sizes = ["--base", str(rows), "--trajectories", "20"]
    sizes += ["--val", "20", "--rl", "20", "--test", "20"]
    return plan.Job(name, ["-m", "tasks.countdown", "--out", str(out / name), *sizes], needs, 0.05)


jobs = [make("a", 20), make("b", 20000, "a"), make("c", 21, "b"), make("bad", "{bad}", "c")]
done = study.finished(out, jobs)
print("done before:", sorted(done), flush=True)
lock = study.claim(out)
study.work(cli.parse(study.Config, ["--out", str(out)], study.preset), jobs, done)
print("all done")
"""


def drive(out, bad="20"):
    return subprocess.Popen(
        [sys.executable, "-c", JOBS.format(root=str(ROOT), out=str(out), bad=bad)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def test_a_study_killed_outright_goes_on_where_it_was_and_never_beside_its_own_rest(tmp_path):
    first = drive(tmp_path)
    while not (tmp_path / "logs" / "b.txt").exists():
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = drive(tmp_path)
    said = second.communicate(timeout=300)[0]
    assert second.returncode == 0 and "done before: ['a']" in said and "all done" in said
    assert said.count("] a ") == 0 and said.count("] b ") == said.count("] c ") == 1
    assert all((tmp_path / name / "countdown.json").exists() for name in "abc")
    assert float(json.loads((tmp_path / "done" / "b.json").read_text())["cpu_s"]) > 0


def test_jobs_that_end_together_are_all_noticed(tmp_path):
    code = JOBS.format(root=str(ROOT), out=str(tmp_path), bad="20")
    code = code.replace(
        'make("b", 20000, "a"), make("c", 21, "b"), make("bad", "20", "c")',
        '*(make(f"n{i}", 20 + i) for i in range(6))',
    )
    code = code.replace('["--out", str(out)]', '["--out", str(out), "--workers", "4"]')
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "all done" in done.stdout and len(list((tmp_path / "done").glob("*.json"))) == 7, (
        done.stdout + done.stderr
    )


def test_a_job_that_fails_stops_the_study_and_names_its_log(tmp_path):
    child = drive(tmp_path, bad="-1")
    said = child.communicate(timeout=300)[0]
    assert (
        child.returncode != 0
        and "bad did not finish" in said
        and "logs/bad.txt" in said
        and "base is -1" in said
    )
    assert not (tmp_path / "done" / "bad.json").exists() and (tmp_path / "done" / "c.json").exists()


def test_a_job_whose_filled_in_command_was_run_before_is_a_link(tmp_path):
    cfg = config("--out", str(tmp_path))
    (tmp_path / "done").mkdir()
    (tmp_path / "a").mkdir()
    words = ["rl.py", "--lr", "1", "--out", str(tmp_path / "a"), "--resume"]
    done = {}
    study.mark_done(cfg, plan.Job("a", []), {"cpu_s": 9.0, "wall_s": 9.0}, words, done)
    other = [*words[:4], str(tmp_path / "b"), "--resume"]
    assert study.link_to_same(cfg, plan.Job("b", []), other, done)
    assert (tmp_path / "b").resolve() == tmp_path / "a" and done["b"]["same_as"] == "a"
    assert json.loads((tmp_path / "done" / "b.json").read_text())["cpu_s"] == 0
    different = ["rl.py", "--lr", "2", "--out", str(tmp_path / "c"), "--resume"]
    assert not study.link_to_same(cfg, plan.Job("c", []), different, done)


# ------------------------------------------------------------------------------------------- report
LEVEL = {"tiny": 4, "small": 8, "middle": 18, "wide": 22, "large": 28, "fixed": 20, "dft": 18}
LEVEL |= {"chain": 70, "sort": 70, "own": 18}


def end_of(name: str) -> float:
    """pass@1 that is planted for a run's final evaluation."""
    kind, *rest = name.split("-")
    level = LEVEL.get(rest[0] if rest else "", 18)
    if kind in ("sft", "late"):
        late = {"sort": -10, "chain": 8}.get(rest[0], 0)
        return level + (late if kind == "late" else 0)
    if kind == "rl":
        shift = {"adaptive": -6, "late": 6, "signal": 6}.get(rest[1], 0)
        return level * 1.4 + (shift if rest[0] not in results.EXACT else 0)
    return {"base": 2, "half": 24, "pure": 20, "then": 24}[kind] + (rest[:1] == ["dapo"]) * 6


def plant_run(out, job, rng) -> None:
    kind, *rest = job.name.split("-")
    x = np.arange(10) / 9
    if kind == "screen":
        points = [(i, i * 1e11, 1.0 + int(rest[2]) + i / 10) for i in range(5)]
        algo = rest[1] if rest[0] != "sft" else "sft"
        write_run(out / job.name, "eval", points, algo=algo, lr=10.0 ** -int(rest[2]))
    elif kind == "sft":
        level = LEVEL[rest[0]]
        loss = 2.0 - level / 50 + 0.5 * (x - 0.5) ** 2
        where = "f" if rest[0] == "fixed" else "v"
        points = [(i * 100, i * 1e12, v) for i, v in enumerate(loss)]
        write_run(out / job.name, "val", points, val_set=where)
        rates = [(i * 100, i * 1e12, level * min(1, 0.2 + i / 5)) for i in range(10)]
        write_run(out / job.name, "eval", rates, samples=True, val_set=where)
    elif rest and kind in ("rl", "base", "then"):
        top = end_of(job.name)
        start = 2 if kind == "base" else 0.6 * top
        points = []
        for i, v in enumerate(x):
            value = start + (top - start) * v / (v + 0.1) + rng.normal(0, 0.3)
            points.append((i, i * 4e11, value))
        write_run(out / job.name, "eval", points)


def plant_study(out, cfg):
    """A finished study with planted results: gains grow and losses fall with scale; RL from the end
    beats RL from Stable; overfitting costs accuracy on sort and not on chain."""
    rng = np.random.default_rng(0)
    files.write_json(out / "study.json", {**vars(cfg), "design": results.DESIGN})
    (out / "command.txt").write_text("python -m paper.study\n")
    for folder in ("sets", "exams", "done"):
        (out / folder).mkdir()
    for n, name in enumerate(results.SCALES):
        (out / "sets" / f"{name}.jsonl").write_text("{}\n" * 2**n)
    counted = {"rows": 10, "duplicate": 1, "overlap": 0, "near": 0, "kept": 9}
    parts = {"test": 400, "ood": 100} if cfg.init else {"test": 400, "pair": 50, "band": 50}
    counts = {"curated": {"data": counted}, "exam": parts}
    counts |= {name: {"test": 500} for name in results.EXACT}
    files.write_json(out / "sets" / "counts.json", counts)
    ease = rng.normal(size=500)
    for job in jobs_of(cfg):
        files.write_json(out / "done" / f"{job.name}.json", {"cpu_s": 60.0, "wall_s": 60.0})
        plant_run(out, job, rng)
        if job.name.startswith("exam-"):
            name = job.name[5:]
            p = end_of(name) / 100 + rng.normal(0, 0.005) + 0.1 * ease
            if not cfg.init or name != "base":
                p[400:] /= 2
            rows = [json.dumps({"correct": bool(c)}) for q in p for c in rng.random(4) < q]
            (out / "exams" / f"{name}.jsonl").write_text("\n".join(rows))
    for start in ("accuracy",):  # the same checkpoint as late
        path = out / "exams" / f"rl-fixed-{start}-0.jsonl"
        if path.exists():
            path.unlink()
            path.symlink_to(out / "exams" / "rl-fixed-late-0.jsonl")
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return plant_study(tmp_path_factory.mktemp("study"), config())


FITS = {}  # of the planted study: its ceilings are fitted once


def study_of(out) -> results.Study:
    found = results.Study(out)
    if out not in FITS:
        FITS[out] = found.fits
    found.fits = dict(FITS[out])
    return found


def verdicts_of(study_):
    return {f.claim: f for f in findings.all_of(study_)}


def test_planted_effects_get_the_verdicts_they_deserve(made):
    found = verdicts_of(study_of(made))
    assert found["SFT-then-RL ends above SFT alone"].verdict == "holds"
    assert found["SFT-then-RL ends above RL alone"].verdict == "holds"
    assert found["RL from Stable ends higher than from Adaptive"].verdict == "holds"
    assert found["RL from Stable ends higher than from the end of SFT"].verdict == "opposite"
    assert found["RL started by signal ends higher than by loss"].verdict == "holds"
    assert found["More data raise the ceiling: large over middle"].verdict == "holds"
    assert found["RL's gain carries over to unseen kinds"].verdict == "holds"
    accuracy = "SFT's accuracy is higher at the minimum of the loss than at the end"
    assert found[f"{accuracy}: sort"].verdict == "holds"
    assert found[f"{accuracy}: chain"].verdict == "opposite"
    best = found["The lower the minimum validation loss, the higher the ceiling"]
    assert best.verdict == "holds" and 0.9 < best.effect <= 1
    assert 20 <= len(found) <= 24
    assert sum("unseen kinds" in claim for claim in found) == 4


@pytest.mark.parametrize(
    "low, high, says",
    [
        (0.1, 5, "holds"),
        (-5, -0.1, "opposite"),
        (-3, 0.9, "no effect of 1 shown"),
        (0, 0, "no effect of 1 shown"),
        (-1, 2, "cannot tell"),
    ],
)
def test_verdicts_follow_the_rules_written_beforehand(low, high, says):
    assert findings.Finding("", "", 0, low, high).verdict == says
    assert findings.Finding("", "", 0, low, high, known=False).verdict == "cannot tell"


def test_holm_multiplies_the_smallest_p_by_the_number_of_claims_and_never_falls():
    claims = [findings.Finding("", "", 1, 0, 1, p) for p in (0.01, 0.04, 0.03, 1.0)]
    assert findings.holm(claims) == pytest.approx([0.04, 0.09, 0.09, 1.0])


def test_a_correlation_over_five_scales_is_as_uncertain_as_five_points_are(made):
    best = findings.loss_and_ceiling(study_of(made))[1]
    z = np.arctanh(min(best.effect, 0.999))
    assert best.low == pytest.approx(np.tanh(z - 1.645 / np.sqrt(2)), abs=0.15)


def test_intervals_of_no_effect_cover_zero_and_narrow_with_seeds(made):
    found = study_of(made)
    three = [f"half-middle-{seed}" for seed in range(3)]
    one = findings.by_exam(found, "", "", [(three[:1], three[1:2])])
    several = findings.by_exam(found, "", "", [(three, ["base-dapo-0", "base-dapo-1"])])
    assert one.low < 0 < one.high
    assert several.high - several.low < one.high - one.low


def test_two_starting_points_that_are_one_run_differ_by_nothing(made):
    found = study_of(made)
    pair = (["rl-fixed-accuracy-0"], ["rl-fixed-late-0"])
    same = findings.by_exam(found, "", "", [pair])
    assert same.effect == same.low == same.high == 0
    assert same.verdict == "no effect of 1 shown"


def test_seed_noise_is_pooled_and_assumed_where_no_arm_has_seeds(made):
    found = study_of(made)
    sd, df = found.seed_noise[False]
    assert 0.1 < sd < 3 and df > 8
    found.exams = {name: rates for name, rates in found.exams.items() if name.endswith("-0")}
    del found.__dict__["seed_noise"]
    assert found.seed_noise[False] == (results.SEED_SD, 0)


def test_exact_tasks_have_the_seed_noise_of_their_own_arms(made):
    found = study_of(made)
    found.exams = dict(found.exams)
    for name in list(found.exams):
        if results.is_exact(name) and name.endswith("-1"):
            found.exams[name] = {"test": found.exams[name]["test"] + 10}
    (usual, _), (exact, _) = found.seed_noise[False], found.seed_noise[True]
    assert usual < 3 < exact < 10
    rng = np.random.default_rng(0)
    widths = []
    for arm in ("rl-chain-stable", "rl-middle-stable"):
        draws = findings.seed_draws(found, [([f"{arm}-0"], [])], rng)
        widths.append(np.std(draws))
    assert widths[0] > 2 * widths[1]


def test_arms_that_solve_nothing_cannot_be_told_apart(made):
    found = study_of(made)
    for exam in found.exams.values():
        exam["ood"] = 0 * exam["ood"]
    floor = [f for claim, f in verdicts_of(found).items() if "unseen kinds" in claim]
    assert len(floor) == 4
    assert all(f.verdict == "cannot tell" and "below 1 point" in f.test for f in floor)


def test_a_run_without_a_ceiling_is_left_out_and_counted(made):
    found = study_of(made)
    lost = dataclasses.replace(found.fits["rl-middle-stable-1"], posterior=None)
    found.fits["rl-middle-stable-1"] = lost
    claim = "More data raise the ceiling: large over middle"
    assert "(1 runs without a fit left out)" in verdicts_of(found)[claim].test
    for name in [name for name in found.fits if name.split("-")[1] in ("tiny", "wide", "large")]:
        found.fits[name] = lost
    nothing = verdicts_of(found)[claim]
    assert nothing.verdict == "cannot tell"
    assert "| **cannot tell** | - |" in report.findings_table([nothing])
    few = verdicts_of(found)["The lower the minimum validation loss, the higher the ceiling"]
    assert few.verdict == "cannot tell" and "too few" in few.test


def test_the_share_of_rls_gain_that_carries_over_is_the_planted_half(made):
    share, low, high = findings.transfer(study_of(made))
    assert low < 0.5 < high and high - low < 0.6 and low < share < high


def test_readiness_finds_the_planted_predictor_and_keeps_other_losses_apart(made):
    rows = findings.readiness(study_of(made))
    assert len({(row.sft, row.start) for row in rows}) == len(rows) > 15
    assert not any(row.comparable for row in rows if row.set == "fixed")
    planted = []
    for i, row in enumerate(rows):
        noise = {"signal": float(i), "entropy": float(i % 3)}
        planted.append(row._replace(ended=2 * row.accuracy, **noise))
    found = {p.name: p for p in findings.predictors(planted, "ended", findings.PREDICTORS)}
    assert found["accuracy"].r == pytest.approx(1) and found["accuracy"].best > 0.9
    assert found["signal"].low < found["signal"].r < found["signal"].high


def test_report_has_each_claim_on_a_line_with_its_verdict_and_the_papers_number(
    made, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main([str(made)]) == 0
    assert "need matplotlib" in capsys.readouterr().out
    text = (made / "report.md").read_text()
    assert "![]" not in text and "nan" not in text
    for finding in findings.all_of(study_of(made)):
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {finding.claim} |")]
        assert f"**{finding.verdict}**" in line and finding.paper in line
    for piece in (
        "78.1 over 76.9",
        "74.1 + 2.5 = 76.6",
        "| fixed | late | 1 |",
        "different runs have an identified ceiling",
        "the best predictor of",
        "arrives on the unseen kinds",
        "Overfitting costs accuracy on sort: there RL has less",
        "RL after SFT | upt | ",
        "10 rows, 1 duplicate",
        "not made twice: rl-fixed-accuracy-0",
    ):
        assert piece in text, piece


@pytest.mark.parametrize(
    "verdict, says",
    [
        ("holds", "as the paper advises"),
        ("opposite", "against the paper's advice"),
        ("cannot tell", "cannot be told from these tasks"),
        ("no effect of 1 shown", "gains no point"),
    ],
)
def test_what_follows_from_the_exact_tasks_is_said_for_every_verdict(
    made, monkeypatch, verdict, says
):
    ends = {"holds": (1, 2), "opposite": (-2, -1), "cannot tell": (-2, 2)}
    low, high = ends.get(verdict, (-1, 0.5))
    planted = [findings.Finding("a: chain", "", -2, -3, -1), findings.Finding("", "", 0, low, high)]
    monkeypatch.setattr(findings, "exact_tasks", lambda study: planted)
    text = report.what_follows(study_of(made))
    assert says in text and "goes on rising" in text


def test_every_figure_is_drawn(made):
    pytest.importorskip("matplotlib")
    found = study_of(made)
    drawn = report.panels.draw(found, findings.all_of(found))
    assert drawn == list(report.panels.FIGURES)
    assert all((made / f"{name}.png").stat().st_size > 15_000 for name in drawn)


def test_the_picture_of_unseen_kinds_compares_at_equal_compute(made):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    found = study_of(made)
    figure = report.panels.transfer_figure(found, None, pyplot)
    axes = figure.axes[0]
    names = [label.get_text() for label in axes.get_xticklabels()]
    at = names.index("SFT-then-RL")
    drawn = {y for line in axes.lines for x, y in zip(*line.get_data()) if x == at}
    assert any(
        y == pytest.approx(findings.level(found, found.arms[names[at]], "test")[0]) for y in drawn
    )
    whole = findings.level(found, found.seeds(f"rl-{found.main}-stable"), "test")[0]
    assert not any(y == pytest.approx(whole) for y in drawn)
    pyplot.close(figure)


def test_a_study_of_ones_own_task_reports_the_handoff_and_nothing_else(tmp_path):
    cfg = own_config(tmp_path, "--seeds", "2", "--out", str(tmp_path / "own"))
    (tmp_path / "own").mkdir()
    out = plant_study(tmp_path / "own", cfg)
    said = report.write(out)
    text = (out / "report.md").read_text()
    assert "holds" in said and "your own task: the handoff's claims only" in text
    claims = list(verdicts_of(results.Study(out)))
    assert "SFT-then-RL ends above RL alone" in claims
    assert "RL from Stable ends higher than from Adaptive" in claims
    assert not any("data raise" in claim or "mixed" in claim for claim in claims)
    assert "Where an answer must be exact" not in text and "nan" not in text


def test_an_unfinished_study_and_one_of_the_earlier_design_are_one_line(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "no study.json" in capsys.readouterr().err
    write_run(tmp_path / "rl-small-stable-0", "eval", [(0, 0, 1.0), (1, 1e9, 2.0)])
    (tmp_path / "sets").mkdir()
    files.write_json(tmp_path / "sets" / "counts.json", {})
    files.write_json(tmp_path / "study.json", {"init": "", "design": results.DESIGN})
    assert report.main([str(tmp_path)]) == 2
    assert "no final evaluation of rl-small-stable-0" in capsys.readouterr().err
    files.write_json(tmp_path / "study.json", {"seeds": 3})
    assert report.main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "earlier design" in said and "report.md stands" in said and said.count("\n") == 1


def test_a_regime_is_named_in_its_longest_stretch():
    regimes = ["adaptive", "mild", "severe", "mild", "mild", "severe", "severe", "severe"]
    assert report.panels.longest(regimes, "mild") == [3, 4]
    assert report.panels.longest(regimes, "severe") == [5, 6, 7]
    assert report.panels.longest(regimes, "stable") == []
