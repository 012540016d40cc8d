"""Each mistake a user can make ends in one line that says what, where and how to fix, and in exit code 2."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import evaluate
import losses
import rl
import sft
from core import cli

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    "sft": (sft.main, sft.Config, sft.preset),
    "evaluate": (evaluate.main, evaluate.Config, evaluate.preset),
    "rl": (rl.main, rl.Config, rl.preset, losses.Objective),
}


def changed(folder: Path, name: str, **changes) -> None:
    """Rewrite some keys of a JSON file of a model folder."""
    path = folder / name
    path.write_text(
        json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes})
    )


def lines(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def reshaped(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()
    save_file(weights, folder / "model.safetensors")


GOOD = '{"prompt": "Make 3 from 1 2 ->", "response": "\\\\boxed{ 1 + 2 }", "answer": "3"}\n'
# (script, what is done to the model folder m, flags, what the line must name)
CASES = {
    "unknown flag": ("sft", None, "--stepps 3", "--stepps"),
    "missing data": ("sft", None, "--data nowhere.jsonl", "nowhere.jsonl: no such file"),
    "not JSON": (
        "sft",
        lambda m: lines(m, "a.jsonl", GOOD + "{oops\n"),
        "--data M/a.jsonl",
        "a.jsonl:2: not JSON",
    ),
    "no columns": (
        "sft",
        lambda m: lines(m, "a.jsonl", '{"x": 1}\n'),
        "--data M/a.jsonl",
        "a.jsonl:1: no prompt and response",
    ),
    "no answer": (
        "evaluate",
        lambda m: lines(m, "a.jsonl", '{"prompt": "x"}\n'),
        "--data M/a.jsonl",
        'a.jsonl:1: no "answer"',
    ),
    "empty file": (
        "sft",
        lambda m: lines(m, "a.jsonl", ""),
        "--data M/a.jsonl",
        "a.jsonl: no rows",
    ),
    "not UTF-8": (
        "sft",
        lambda m: (m / "a.jsonl").write_bytes(GOOD.encode() + b'{"prompt": "\xff"}\n'),
        "--data M/a.jsonl",
        "a.jsonl:2: not UTF-8",
    ),
    "all over-long": ("sft", None, "--max-len 3", "longer than 3 tokens; raise --max-len"),
    "no config.json": ("sft", lambda m: (m / "config.json").unlink(), "", "config.json"),
    "no tokenizer": ("sft", lambda m: (m / "tokenizer.json").unlink(), "", "no tokenizer.json"),
    "unsupported model": (
        "sft",
        lambda m: changed(m, "config.json", model_type="mamba"),
        "",
        "mamba",
    ),
    "unsupported feature": (
        "sft",
        lambda m: changed(m, "config.json", rope_scaling={"type": "yarn", "factor": 4.0}),
        "",
        "yarn",
    ),
    "truncated weights": (
        "sft",
        lambda m: truncate(m / "model.safetensors"),
        "",
        "model.safetensors",
    ),
    "missing weights": ("sft", lambda m: (m / "model.safetensors").unlink(), "", "safetensors"),
    "wrong shape": ("sft", reshaped, "", "model.norm.weight"),
    "small vocabulary": ("sft", lambda m: changed(m, "config.json", vocab_size=100), "", "100"),
    "broken template": (
        "sft",
        lambda m: changed(m, "tokenizer_config.json", chat_template="{% if %}"),
        "",
        "does not compile",
    ),
    "used out": (
        "sft",
        lambda m: (m / "out").mkdir() or lines(m / "out", "x", "x"),
        "",
        "--overwrite",
    ),
    "batch does not divide": (
        "rl",
        None,
        "--prompts 64 --update-prompts 24",
        "--update-prompts 16 or 32",
    ),
    "init is nothing": ("rl", None, "--init nowhere", "nowhere: no such folder"),
    "top-p in training": ("rl", None, "--top-p 0.9", "full distribution"),
    "wrong option": ("rl", None, "--agg median", "median"),
    "no demonstrations either": (
        "rl",
        lambda m: lines(m, "a.jsonl", '{"prompt": "x", "answer": "1"}\n'),
        "--algo grpo --demo gate --data M/a.jsonl",
        "response",
    ),
    "no rows in flight": ("rl", None, "--rows 0", "--rows is 0"),
    "no evaluations": ("rl", None, "--eval-every 0", "--eval-every is 0"),
    "negative steps": ("sft", None, "--steps -1", "--steps is -1"),
    "a run that is not there": ("rl", None, "--init runs/nothing", "there is no such run"),
    "null content": (
        "sft",
        lambda m: lines(m, "a.jsonl", '{"messages": [{"role": "assistant", "content": null}]}\n'),
        "--data M/a.jsonl",
        "a.jsonl: no example left: 1 rows with an empty prompt dropped",
    ),
    "no object": (
        "sft",
        lambda m: lines(m, "a.jsonl", GOOD + "[1]\n"),
        "--data M/a.jsonl",
        "a.jsonl:2: a list, not an object",
    ),
    "metrics but no checkpoint": (
        "sft",
        lambda m: (
            (m / "out").mkdir()
            or lines(m / "out", "metrics.jsonl", '{"step": 3, "kind": "train"}\n')
        ),
        "--resume",
        "no whole checkpoint",
    ),
    "no demonstrations": (
        "rl",
        lambda m: lines(m, "a.jsonl", '{"prompt": "x", "answer": "1"}\n'),
        "--algo luffy --data M/a.jsonl",
        "response",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_clear_line_and_exit_code_2(
    name, small_task, tmp_path, monkeypatch, capsys
):
    script, damage, flags, named = CASES[name]
    model = tmp_path / "m"
    shutil.copytree(small_task, model)
    if damage:
        damage(model)
    argv = ["--init", str(model), "--data", str(model / "train.jsonl")] + (
        ["--out", str(model / "out")] if script != "evaluate" else []
    )
    monkeypatch.setattr(
        sys, "argv", [f"{script}.py", *argv, *flags.replace("M/", f"{model}/").split()]
    )
    with pytest.raises(SystemExit) as end:
        cli.cli(*SCRIPTS[script])
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and "error:" in message and named in message, message


def test_own_data_need_a_model_of_their_own(tmp_path):
    with pytest.raises(ValueError, match="needs --init"):
        cli.parse(sft.Config, ["--data", str(tmp_path / "x.jsonl")], sft.preset)


def test_the_real_command_ends_with_code_2_and_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "sft.py"), "--init", "nowhere", "--data", "x.jsonl"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and "Traceback" not in done.stderr
        and "nowhere: no such folder" in done.stderr
    )
