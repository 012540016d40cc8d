"""The plan has every arm and fits its time; a killed study goes on; verdicts follow the numbers."""

import dataclasses
import json
import os
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
from paper import findings, report, study

ROOT = Path(__file__).resolve().parents[1]


def config(*argv):
    return cli.parse(study.Config, list(argv), study.preset)


def names(jobs):
    return {job.name for job in jobs}


# --------------------------------------------------------------------------------------------- plan
def test_the_plan_has_every_arm_of_the_paper():
    planned = names(study.plan(config()))
    assert {
        f"sft-{name}-{seed}" for name in ("small", "middle", "large") for seed in range(3)
    } <= planned
    assert {
        f"rl-{name}-{start}-0" for name in findings.SETS for start in findings.STARTS
    } <= planned
    assert {f"base-{algo}-0" for algo in ("dapo", *findings.MIXED)} | {
        f"then-{algo}-0" for algo in findings.MIXED
    } <= planned
    several = {
        f"{arm}-{seed}"
        for arm in (
            "pure-middle",
            "base-dapo",
            "base-luffy",
            "rl-small-stable",
            "rl-middle-stable",
            "rl-large-stable",
        )
        for seed in range(3)
    }
    assert {f"exam-{name}" for name in several} <= planned, "three seeds of the two main contrasts"


def test_quick_is_the_same_plan_with_one_seed():
    assert names(study.plan(config("--quick"))) == names(study.plan(config("--seeds", "1")))


@pytest.mark.parametrize("argv, minutes", [([], 90), (["--quick"], 15)])
def test_planned_minutes_fit_two_cores_with_a_margin(argv, minutes):
    assert sum(job.minutes for job in study.plan(config(*argv))) / 2 < 0.95 * minutes


def test_every_need_is_planned_before_it_is_needed():
    for argv in ([], ["--quick"]):
        seen = set()
        for job in study.plan(config(*argv)):
            assert set(job.needs) <= seen and job.name not in seen
            seen.add(job.name)


def test_a_job_needs_every_run_that_its_command_is_filled_in_from():
    jobs = {job.name: job for job in study.plan(config())}
    for job in jobs.values():
        before = {*job.needs, *(earlier for need in job.needs for earlier in jobs[need].needs)}
        for name, which in (word[1:].split(":") for word in job.command if word.startswith("@")):
            assert (
                f"rl-middle-stable-{which}" if name in ("budget", "spent") else name
            ) in before, (job.name, name)


def test_own_model_takes_the_papers_settings_and_all_of_its_files(tmp_path):
    files = [
        word
        for name in ("data", "val", "problems", "dev", "test")
        for word in (f"--{name}", f"{name}.jsonl")
    ]
    cfg = config("--init", "some/model", *files, "--nproc", "8")
    jobs = {job.name: job for job in study.plan(cfg)}
    assert (
        "base" not in jobs
        and "--lr" not in jobs["sft-large-0"].command
        and "some/model" in jobs["base-luffy-0"].command
    )
    assert (
        "--max-flops" not in jobs["rl-large-stable-0"].command
        and "@budget:0" in jobs["base-luffy-0"].command
    )
    with pytest.raises(ValueError, match="missing: --test"):
        config("--init", "some/model", *files[:-2])
    with pytest.raises(ValueError, match="three rising numbers"):
        config("--sizes", "3000,1000,9000")


def test_every_flag_is_known_to_its_script_and_agrees_with_its_built_in_preset():
    for job in study.plan(config()):
        script, *argv = job.command
        if script not in ("sft.py", "rl.py") or job.name == "base":
            continue
        script = {"sft.py": sft, "rl.py": rl}[script]
        filled = ["1e12" if word.startswith(("@budget", "@spent")) else word for word in argv]
        options = ("algo", methods.load) if script is rl else None
        cfg = cli.parse(script.Config, filled, script.preset, options)
        own = {
            "data",
            "val",
            "problems",
            "steps",
            "eval_every",
            "log_every",
        }  # what the study sets by itself
        for name, value in script.preset({}).items():
            assert name in own or getattr(cfg, name) == value, (job.name, name)


# --------------------------------------------------------------------------------------------- work
def test_sets_are_nested_free_of_duplicates_and_of_every_evaluation_prompt(tmp_path):
    cfg = config("--quick", "--sizes", "50,100,200", "--out", str(tmp_path))
    study.make_sets(cfg)
    rows = {f.stem: data.read_rows(f) for f in (tmp_path / "sets").glob("*.jsonl")}
    assert (
        rows["small"] == rows["middle"][:50]
        and rows["middle"] == rows["large"][:100]
        and len(rows["large"]) == 200
    )
    prompts = {name: {row["prompt"] for row in members} for name, members in rows.items()}
    assert all(len(prompts[name]) == len(rows[name]) for name in rows)
    assert (
        not (prompts["large"] | prompts["problems"]) & (prompts["dev"] | prompts["exam"])
        and not prompts["dev"] & prompts["exam"]
    )
    counts = json.loads((tmp_path / "sets" / "counts.json").read_text())
    assert counts["curated"]["data"]["kept"] >= 200 and (counts["test"], counts["ood"]) == (
        200,
        100,
    )
    assert all(len(row["numbers"]) == 5 for row in rows["exam"][200:]) and all(
        len(row["numbers"]) < 5 for row in rows["exam"][:200]
    )
    with pytest.raises(ValueError, match="only .* are left after dedup"):
        files = {
            "data": "sets/small",
            "val": "data/val",
            "problems": "data/rl",
            "dev": "data/eval",
            "test": "data/test",
        }
        argv = [
            word
            for name, file in files.items()
            for word in (f"--{name}", f"{tmp_path}/{file}.jsonl")
        ]
        study.make_sets(
            config(
                "--init",
                "m",
                *argv,
                "--near",
                "0",
                "--sizes",
                "10,20,90",
                "--out",
                str(tmp_path / "own"),
            )
        )


def write_run(folder, kind, points):
    """A run with checkpoints at each (step, flops, value): validation losses or pass@1."""
    key = {"val": "val_loss", "eval": "pass1"}[kind]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.jsonl", "a") as file:
        for step, flops, value in points:
            (folder / "checkpoints" / f"step_{step:06d}").mkdir(parents=True, exist_ok=True)
            file.write(
                json.dumps({"step": step, "kind": kind, "flops": flops, key: value, "n": 800})
                + "\n"
            )
    (folder / "run.json").write_text('{"val_set": "v"}')


def test_words_with_at_become_checkpoints_and_compute(tmp_path):
    losses = [2.0, 1.5, 1.2, 1.0, 0.8, 0.81, 1.0, 1.2, 1.5]
    write_run(
        tmp_path / "sft-middle-0", "val", [(i * 10, i * 1e9, loss) for i, loss in enumerate(losses)]
    )
    write_run(
        tmp_path / "sft-middle-0",
        "eval",
        [(i * 10, i * 1e9, p) for i, p in enumerate([1, 2, 3, 4, 5, 6, 7, 8, 9])],
    )
    write_run(tmp_path / "rl-middle-stable-0", "eval", [(0, 0, 5.0), (1, 1e9, 9.0), (2, 2e9, 7.0)])
    at = lambda word: study.fill(word, tmp_path).rpartition("_")[2]
    assert [at(f"@sft-middle-0:{which}") for which in ("stable", "adaptive", "late", "best")] == [
        "000040",
        "000020",
        "000080",
        "000080",
    ]
    assert at("@rl-middle-stable-0:best") == "000001" and study.fill("--seed", tmp_path) == "--seed"
    assert (
        float(study.fill("@spent:0", tmp_path)) == 2e9
        and float(study.fill("@budget:0", tmp_path)) == 6e9
    )
    assert at("@sft-middle-0:matched") == "000060", (
        "the best SFT checkpoint within the same compute, not the last"
    )


JOBS = """
import json
import sys
from pathlib import Path

sys.path.insert(0, {root!r})
from core import cli
from paper import study

out = Path({out!r})
(out / "done").mkdir(parents=True, exist_ok=True)


def make(name, rows, *needs):
    sizes = ["--base", str(rows), "--trajectories", "20"]
    sizes += ["--val", "20", "--rl", "20", "--test", "20"]
    return study.Job(name, ["-m", "tasks.countdown", "--out", str(out / name), *sizes], needs, 0.05)


jobs = [make("a", 20), make("b", 20000, "a"), make("c", 20, "b"), make("bad", "{bad}", "c")]
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
    said = second.communicate(timeout=60)[0]
    assert second.returncode == 0 and "done before: ['a']" in said and "all done" in said
    assert said.count("] a ") == 0 and said.count("] b ") == said.count("] c ") == 1
    assert all((tmp_path / name / "countdown.json").exists() for name in "abc")
    assert float(json.loads((tmp_path / "done" / "b.json").read_text())["cpu_s"]) > 0


def test_jobs_that_end_together_are_all_noticed(tmp_path):
    code = JOBS.format(root=str(ROOT), out=str(tmp_path), bad="20")
    code = code.replace(
        'make("b", 20000, "a"), make("c", 20, "b"), make("bad", "20", "c")',
        '*(make(f"n{i}", 20) for i in range(6))',
    )
    code = code.replace('["--out", str(out)]', '["--out", str(out), "--workers", "4"]')
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "all done" in done.stdout and len(list((tmp_path / "done").glob("*.json"))) == 7, (
        done.stdout + done.stderr
    )


def test_a_job_that_fails_stops_the_study_and_names_its_log(tmp_path):
    child = drive(tmp_path, bad="-1")
    said = child.communicate(timeout=60)[0]
    assert (
        child.returncode != 0
        and "bad did not finish" in said
        and "logs/bad.txt" in said
        and "base is -1" in said
    )
    assert not (tmp_path / "done" / "bad.json").exists() and (tmp_path / "done" / "c.json").exists()


# ------------------------------------------------------------------------------------------- report
@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished study with planted results: RL's gain grows and losses fall with scale."""
    out = tmp_path_factory.mktemp("study")
    rng = np.random.default_rng(0)
    cfg = config()
    files.write_json(out / "study.json", vars(cfg))
    (out / "command.txt").write_text("python -m paper.study\n")
    for folder in ("sets", "exams", "done"):
        (out / folder).mkdir()
    counted = {"rows": 10, "duplicate": 1, "overlap": 0, "near": 0, "kept": 9}
    files.write_json(
        out / "sets" / "counts.json",
        {
            "curated": {"data": counted, "problems": counted},
            "sizes": [1, 2, 3],
            "test": 500,
            "ood": 100,
        },
    )
    level = {"small": 8, "easy": 14, "middle": 18, "hard": 18, "large": 26}
    ends = {"base": 2}
    ease = rng.normal(size=600)
    for job in study.plan(cfg):
        kind, *rest = job.name.split("-")
        x = np.arange(10) / 9
        if kind == "sft":
            loss = 0.9 - level[rest[0]] / 50 + 0.5 * (x - 0.5) ** 2
            write_run(out / job.name, "val", [(i * 100, i * 1e12, v) for i, v in enumerate(loss)])
            write_run(
                out / job.name,
                "eval",
                [(i * 100, i * 1e12, level[rest[0]] * min(1, 0.2 + i / 5)) for i in range(10)],
            )
            ends[job.name], ends[f"pure-{job.name[4:]}"] = level[rest[0]], level[rest[0]] + 2
        elif rest and kind in ("rl", "base", "then"):
            start = {"rl": level.get(rest[0]), "base": 2, "then": 18}[kind]
            top = start * 1.6 if kind == "rl" else start + 3
            shift = rng.normal(0, 0.5)
            write_run(
                out / job.name,
                "eval",
                [
                    (
                        i,
                        i * 4e11,
                        start + (top + shift - start) * v / (v + 0.15) + rng.normal(0, 0.3),
                    )
                    for i, v in enumerate(x)
                ],
            )
            ends[job.name] = top + shift
    for job in study.plan(cfg):
        files.write_json(out / "done" / f"{job.name}.json", {"cpu_s": 60.0, "wall_s": 60.0})
        if job.name.startswith("exam-"):
            p = np.clip(ends[job.name[5:]] / 100 + 0.1 * ease, 0, 1)
            rows = [json.dumps({"correct": bool(c)}) for q in p for c in rng.random(4) < q]
            (out / "exams" / f"{job.name[5:]}.jsonl").write_text("\n".join(rows))
    return out


def test_planted_effects_get_the_verdicts_they_deserve(made):
    found = {f.claim: f for f in findings.all_of(findings.Study(made))}
    assert all(
        found[f"SFT-then-RL ends above {rival}"].verdict == "holds"
        for rival in ("SFT alone", "RL alone")
    )
    assert found["More data raise the ceiling: large over middle"].verdict == "holds"
    assert found["Harder data raise the end: hard over middle"].verdict != "holds", (
        "hard and middle were planted alike"
    )
    assert found["RL from Stable ends higher than from Adaptive"].verdict != "holds", (
        "starts were planted alike"
    )
    best = found["The lower the minimum validation loss, the higher the ceiling"]
    assert best.verdict == "holds" and 0.9 < best.effect <= 1
    assert sum("out of distribution" in claim for claim in found) == 5


def test_intervals_of_no_effect_cover_zero_and_narrow_with_seeds(made):
    found = findings.Study(made)
    three = [f"rl-middle-stable-{seed}" for seed in range(3)]
    one = findings.by_exam(found, "", "", [(three[:1], three[1:2])])
    all_ = findings.by_exam(found, "", "", [(three, three)])
    assert (
        all_.effect == 0 and all_.low < 0 < all_.high and all_.high - all_.low < one.high - one.low
    )


def test_seed_noise_is_pooled_and_assumed_where_no_arm_has_seeds(made):
    found = findings.Study(made)
    sd, df = found.seed_noise
    assert 0.2 < sd < 3 and df == 2 * 4
    found.exams = {name: rates for name, rates in found.exams.items() if name.endswith("-0")}
    del found.__dict__["seed_noise"]
    assert found.seed_noise == (findings.SEED_SD, 0)


def test_arms_that_solve_nothing_cannot_be_told_apart(made):
    found = findings.Study(made)
    for exam in found.exams.values():
        exam["ood"][:] = 0
    verdicts = {f.claim: f for f in findings.all_of(found)}
    floor = [f for claim, f in verdicts.items() if "out of distribution" in claim]
    assert len(floor) == 5 and all(
        f.verdict == "cannot tell" and "below 1 point" in f.test for f in floor
    )


def test_a_run_without_a_ceiling_is_left_out_and_counted(made):
    found, claim = findings.Study(made), "More data raise the ceiling: large over middle"
    found.fits["rl-large-stable-1"] = dataclasses.replace(
        found.fits["rl-large-stable-1"], posterior=None
    )
    assert (
        "(1 runs without a fit left out)"
        in {f.claim: f.test for f in findings.all_of(found)}[claim]
    )
    for seed in (0, 2):
        found.fits[f"rl-large-stable-{seed}"] = found.fits["rl-large-stable-1"]
    for name in [name for name in found.fits if name.startswith(("rl-small", "rl-easy"))]:
        found.fits[name] = found.fits["rl-large-stable-1"]
    verdicts = {f.claim: f for f in findings.all_of(found)}
    assert (
        verdicts["The lower the minimum validation loss, the higher the ceiling"].verdict
        == "cannot tell"
    )
    nothing = verdicts[claim]
    assert nothing.verdict == "cannot tell" and "| - | **cannot tell** |" in report.findings_table(
        [nothing]
    )


@pytest.mark.parametrize(
    "low, high, says", [(0.1, 5, "holds"), (-3, 0.9, "does not hold"), (-1, 2, "cannot tell")]
)
def test_verdicts_follow_the_rules_written_beforehand(low, high, says):
    assert findings.Finding("", "", 0, low, high).verdict == says


def test_report_has_every_table_with_the_papers_numbers_beside(made, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main([str(made)]) == 0
    said, text = capsys.readouterr().out, (made / "report.md").read_text()
    assert "need matplotlib" in said and "![]" not in text
    for piece in (
        "**holds**",
        "not reproduced",
        "68.6 + 8.7 = 77.3",
        "24.2 -> 25.0",
        "74.5, 78.8, 79.8",
        "SFT-then-RL",
        "pooled, 8 degrees of freedom",
        "10 rows, 1 duplicate",
        "500 test and 100 out-of-distribution",
    ):
        assert piece in text, piece
    assert text.count("| large | late |") == 1 and "nan" not in text
    assert (
        "74.2 + 4.6 = 78.8*" in text
        and "-0.92 over S1K" in text
        and "| none | base model | 2 |" in text
    )
    row = next(line for line in text.splitlines() if line.startswith("| SFT-then-RL | "))
    assert row.split(" | ")[1] == f"{4e12 + 9 * 4e11:.2e}"


def test_figures_are_drawn(made):
    pytest.importorskip("matplotlib")
    assert report.draw(findings.Study(made)) == ["figure2.png", "figure3.png", "losses.png"]
    assert all(
        (made / name).stat().st_size > 15_000
        for name in ("figure2.png", "figure3.png", "losses.png")
    )


def test_an_unfinished_study_is_one_line(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "no study.json" in capsys.readouterr().err
