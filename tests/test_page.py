"""A run as one HTML file: what it says, what it marks, and that no rollout can do harm in it."""

import html.parser
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from small_runs import rl_config, sft_config

import rl
import sft
from core import page, svg
from core.errors import UserError
from core.run import KEPT_GROUPS, KEPT_TEXT, Run, whole_groups

HOSTILE = [
    '</script><script>alert(1)</script><img src=x onerror="alert(2)">',
    "<!-- <script> ]]> &lt; $name ${policy} $$",
    "\u202eright to left \u2067 \u2028 \u0000 \ud800 end",
    "x" * 20_000,
]


class Elements(html.parser.HTMLParser):
    """The elements of a page: [(tag, attributes)], and the text of each script."""

    def __init__(self, text: str):
        super().__init__()
        self.found = []
        self.scripts = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.lasttag == "script" and data.strip():
            self.scripts[-1] += data


def sample(**changes) -> dict:
    row = {
        "step": 1,
        "kind": "train",
        "problem": "Make 9 from 7 2 5 ->",
        "gold": "9",
        "response": "\\boxed{ 7 - 5 + 2 }",
        "answer": "7 - 5 + 2",
        "reason": "wrong value",
        "reward": 0.0,
        "correct": False,
        "truncated": False,
        "length": 9,
        "group": 0,
        "trained": True,
    }
    return row | changes


def write_run(folder: Path, config: dict, metrics: list[dict], samples: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"init": "runs/base", "data": "d.jsonl", "steps": 9} | config
    (folder / "run.json").write_text(json.dumps({"config": config, "argv": ["rl.py"]}))
    for name, rows in (("metrics", metrics), ("samples", samples)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def rl_run(folder: Path, n_steps: int = 20, samples=(), hints=(), config=None) -> Path:
    """An RL run whose pass@1 rises and levels off."""
    metrics = []
    for step in range(n_steps + 1):
        common = {"step": step, "flops": step * 1e12, "seconds": 60.0 * step}
        numbers = {"reward": 2.0 * step, "right": 2.0 * step, "entropy": 0.5, "grad_norm": 0.1}
        if step:
            metrics.append(common | {"kind": "train", "updates": 2} | numbers)
        if step % 2 == 0:
            level = {"pass1": 40 * step / (step + 4), "pass1_se": 1.0, "n": 2000}
            metrics.append(common | {"kind": "eval"} | level)
    metrics += [{"step": n_steps, "seconds": 1200.0, "kind": "hint", **hint} for hint in hints]
    return write_run(folder, {"algo": "dapo"} | (config or {}), metrics, list(samples))


def sft_run(folder: Path) -> Path:
    metrics = []
    for step in range(0, 100, 10):
        common = {"step": step, "flops": step * 1e9, "seconds": step}
        loss = 1.0 + abs(step - 60) / 200
        metrics.append(common | {"kind": "val", "val_loss": loss})
        metrics.append(common | {"kind": "train", "loss": loss + 0.1, "grad_norm": 1.0})
    (folder / "checkpoints" / "step_000060").mkdir(parents=True)
    return write_run(folder, {}, metrics, [])


def rendered(run: Path) -> str:
    return Path(page.write(run)).read_text(encoding="utf-8")


def samples_in(text: str) -> list[dict]:
    return json.loads(Elements(text).scripts[0])


# ---- what it says --------------------------------------------------------------------------------
def test_the_page_of_rl_says_what_it_did_and_whether_it_still_improves(tmp_path):
    text = rendered(rl_run(tmp_path / "r"))
    assert "RL (dapo) from runs/base on d.jsonl: 20 of 9 steps, 20.0 minutes." in text
    assert "0.0 at the start, 33.3 at step 20" in text
    assert re.search(r"Does it still improve\? Yes: the curve has reached 33", text)
    assert "forecast to twice the compute" in text
    for title in ("pass@1 33.3", "Reward 40", "Right 40", "Entropy 0.5"):
        assert f"<b>{title}</b>" in text


def test_the_page_of_sft_shows_regimes_and_where_rl_starts(tmp_path):
    text = rendered(sft_run(tmp_path / "r"))
    assert "Does it still improve? No: minimum validation loss 1 at step 60" in text
    for regime in ("adaptive", "stable", "mild", "severe"):
        assert f'<polygon class="{regime}"' in text


def test_a_run_with_too_few_evaluations_is_not_judged(tmp_path):
    assert "Not known yet: a forecast needs" in rendered(rl_run(tmp_path / "r", n_steps=3))


def test_hints_and_rounds_without_an_update_are_among_the_warnings(tmp_path):
    run = rl_run(tmp_path / "r", hints=[{"key": "cut", "text": "97% are cut: raise --max-new"}])
    with open(run / "metrics.jsonl", "a") as file:
        row = {"step": 21, "kind": "train", "seconds": 1.0, "reward": 0.0, "updates": 0}
        file.write(json.dumps(row) + "\n")
    text = rendered(run)
    assert "step 20: 97% are cut: raise --max-new" in text
    assert "1 rounds without an update" in text


def test_the_page_can_be_made_while_a_line_is_being_written(tmp_path):
    run = rl_run(tmp_path / "r", samples=[sample()])
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(run / name, "a") as file:
            file.write('{"step": 21, "ki')
    assert len(samples_in(rendered(run))) == 1


def test_what_is_no_run_directory_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(UserError, match="no run.json in it"):
        page.write(tmp_path)
    assert page.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---- rollouts ------------------------------------------------------------------------------------
def test_samples_are_shown_in_their_groups_with_verdict_and_reason(tmp_path):
    rows = [sample(), sample(correct=True, reward=1.0), sample(group=1, trained=False)]
    (step,) = samples_in(rendered(rl_run(tmp_path / "r", samples=rows)))
    assert [len(group["rows"]) for group in step["groups"]] == [2, 1]
    assert [group["trained"] for group in step["groups"]] == [True, False]
    assert step["groups"][0]["rows"][0]["reason"] == "wrong value"


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_a_rollout_becomes_part_of_the_page(text, tmp_path):
    names = ("problem", "gold", "response", "answer", "reason")
    hostile = sample(**dict.fromkeys(names, text))
    made = rendered(rl_run(tmp_path / "a", samples=[hostile], config={"init": text, "data": text}))
    plain = rendered(rl_run(tmp_path / "b", samples=[sample()]))
    assert [tag for tag, _ in Elements(made).found] == [tag for tag, _ in Elements(plain).found]
    assert Elements(made).scripts[1] == Elements(plain).scripts[1]
    (step,) = samples_in(made)
    shown = step["groups"][0]["rows"][0]["response"]
    if len(text) <= page.LONGEST:
        assert shown == text.translate(page.DIRECTIONS)
        assert "\u202e" not in made
        assert "\\u202e" not in made
    else:
        assert "14,000 characters left out" in shown
        assert shown.startswith("xxx") and shown.endswith("xxx")


def test_the_page_asks_for_nothing_and_runs_its_own_script_alone(tmp_path):
    text = rendered(rl_run(tmp_path / "r"))
    (policy,) = [a["content"] for tag, a in Elements(text).found if "http-equiv" in a]
    assert policy.startswith("default-src 'none'")
    assert "script-src 'sha256-" in policy
    for _, attributes in Elements(text).found:
        assert not set(attributes) & {"src", "href", "onclick", "onload"}


def test_the_policy_names_the_hash_of_the_script(tmp_path):
    text = rendered(rl_run(tmp_path / "r"))
    digest = page.digest_of(Elements(text).scripts[1])
    assert f"script-src 'sha256-{digest}'" in text


@pytest.mark.parametrize("text", ["a" * 5000, "\u0639" * 5000])
def test_a_page_of_50_rounds_stays_below_2_mb(text, tmp_path):
    rows = []
    for step in range(1, 51):
        for number in range(KEPT_GROUPS):
            rows += [sample(step=step, group=number, response=text)] * 8
    run = rl_run(tmp_path / "r", n_steps=50, samples=rows)
    page.write(run)
    assert (run / "page.html").stat().st_size < 2_000_000
    steps = [step["step"] for step in samples_in((run / "page.html").read_text())]
    assert steps[0] == 1
    assert steps[-1] == 50


# ---- charts --------------------------------------------------------------------------------------
@pytest.mark.parametrize("low, high", [(0, 1), (0, 4.3e-7), (-3, 1200), (0, 37.6), (99.5, 100)])
def test_ticks_are_few_and_inside(low, high):
    found = svg.ticks(low, high)
    assert 2 <= len(found) <= 7
    assert all(low <= value <= high + 1e-9 for value in found)


def test_a_long_line_is_averaged_and_keeps_its_mean():
    points = [(step, float(step % 2)) for step in range(1200)]
    shown = svg.thin(points)
    assert len(shown) <= svg.MOST_POINTS
    assert sum(y for _, y in shown) / len(shown) == pytest.approx(0.5)


# ---- what the loops keep for it ------------------------------------------------------------------
def test_samples_are_whole_groups_with_the_trained_ones_first():
    records = [{"group": i // 8, "response": "x"} for i in range(80)]
    kept = whole_groups(records, trained={7, 9})
    assert [row["group"] for row in kept[::8]] == [7, 9, 0, 1]
    assert len(kept) == 8 * KEPT_GROUPS
    assert [row["trained"] for row in kept[::8]] == [True, True, False, False]


def test_long_groups_are_fewer_and_one_is_always_kept():
    records = [{"group": i // 8, "response": "x" * (KEPT_TEXT // 16)} for i in range(80)]
    assert len(whole_groups(records, set())) == 16
    records = [{"group": i // 8, "response": "x" * KEPT_TEXT} for i in range(80)]
    assert len(whole_groups(records, set())) == 8


@dataclass
class Config:
    out: str
    resume: bool = False
    overwrite: bool = False
    eval_every: int = 2
    save_every: int = 0
    keep: int = 0
    seed: int = 0


def test_a_hint_is_printed_and_logged_once_in_a_run(tmp_path, capsys):
    def opened(**changes):
        run = Run(Config(str(tmp_path / "r"), **changes), 10, tmp_path)
        run.attach(torch.nn.Linear(1, 1), [], lambda folder: None)
        return run

    run = opened()
    run.hint("cut", "97% are cut")
    run.hint("cut", "98% are cut")
    run.save(1)
    again = opened(resume=True)
    again.hint("cut", "99% are cut")
    (row,) = again.of_kind("hint")
    assert (row["step"], row["key"], row["text"]) == (1, "cut", "97% are cut")
    assert capsys.readouterr().out.count("hint: ") == 1


def test_both_scripts_write_the_page_at_their_end_and_rl_keeps_whole_groups(
    small_task, coin, tmp_path
):
    sft.main(sft_config(small_task, tmp_path / "sft"))
    cfg = rl_config(coin, tmp_path / "rl")
    rl.main(cfg)
    assert "SFT from" in (tmp_path / "sft" / "page.html").read_text()
    text = (tmp_path / "rl" / "page.html").read_text()
    assert "RL (grpo) from" in text
    steps = samples_in(text)
    assert {step["kind"] for step in steps} == {"train", "eval"}
    for step in steps:
        size = cfg.group if step["kind"] == "train" else cfg.eval_n
        assert {len(group["rows"]) for group in step["groups"]} == {size}
    assert any(group["trained"] for step in steps for group in step["groups"])
