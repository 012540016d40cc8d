"""Each mistake of a user's ends in one line that says what, where and how to fix, and in code 2."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from small_runs import ENV, ROOT

import evaluate
import methods
import rl
import sft
from core import cli
from core.errors import UserError

SCRIPTS = {
    "sft": (sft.main, sft.Config, sft.preset),
    "evaluate": (evaluate.main, evaluate.Config, evaluate.preset),
    "rl": (rl.main, rl.Config, rl.preset, ("algo", methods.load)),
}
GOOD = '{"prompt": "Make 3 from 1 2 ->", "response": "\\\\boxed{ 1 + 2 }", "answer": "3"}\n'
NO_RESPONSE = '{"prompt": "x", "answer": "1"}\n'
NULL_CONTENT = '{"messages": [{"role": "assistant", "content": null}]}\n'


# ---- what is done to a copy of the model folder, M in the flags ----------------------------------
def rows(text: str | bytes, name: str = "a.jsonl"):
    """Write a file of rows."""
    content = text.encode() if isinstance(text, str) else text

    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    return write


def config(name: str = "config.json", **changes):
    """Change some keys of a JSON file."""

    def change(folder: Path) -> None:
        path = folder / name
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**before, **changes}))

    return change


def without(name: str):
    def remove(folder: Path) -> None:
        (folder / name).unlink()

    return remove


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def reshape_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()
    save_file(weights, folder / "model.safetensors")


def nothing(folder: Path) -> None:
    pass


METRICS = '{"step": 3, "kind": "train"}\n'
ROPE = {"type": "yarn", "factor": 4.0}
OWN = "--data M/a.jsonl"
# name: (script, damage, flags, what the line must name)
CASES = {
    # flags
    "unknown flag": ("sft", nothing, "--stepps 3", "--stepps"),
    "top-p in training": ("rl", nothing, "--top-p 0.9", "full distribution"),
    "wrong option": ("rl", nothing, "--agg median", "median"),
    "option of another method": ("rl", nothing, "--algo grpo --gate-gamma 0", "--gate-gamma"),
    "unknown method": ("rl", nothing, "--algo lufy", "--algo lufy: no such method"),
    "unknown reward": ("rl", nothing, "--reward maths", "--reward maths: choose"),
    "no rows in flight": ("rl", nothing, "--rows 0", "--rows is 0"),
    "no evaluations": ("rl", nothing, "--eval-every 0", "--eval-every is 0"),
    "negative steps": ("sft", nothing, "--steps -1", "--steps is -1"),
    "learning rate by another name": ("sft", nothing, "--learning-rate 1", "did you mean --lr"),
    "a learning rate that is no number": ("sft", nothing, "--lr nan", "--lr is nan"),
    "an infinite learning rate": ("rl", nothing, "--lr inf", "--lr is inf"),
    "no passes": ("sft", nothing, "--epochs 0", "--epochs is 0"),
    "keep less than none": ("sft", nothing, "--keep -1", "--keep is -1; give 0 or more"),
    "keep less than none in rl": ("rl", nothing, "--keep -2", "--keep is -2"),
    "save less than never": ("sft", nothing, "--save-every -1", "--save-every is -1"),
    "save less than never in rl": ("rl", nothing, "--save-every -1", "--save-every is -1"),
    "validate less than never": ("sft", nothing, "--eval-every -5", "--eval-every is -5"),
    "warm-up in steps": ("sft", nothing, "--warmup 100", "it is a share, from 0 to 1"),
    "warm-up in steps in rl": ("rl", nothing, "--warmup 10", "it is a share, from 0 to 1"),
    "a negative share": ("rl", nothing, "--until-share -0.5", "it is a share"),
    "greedy evaluation": ("rl", nothing, "--eval-temperature 0 --eval-n 4", "use --eval-n 1"),
    "negative temperature": ("rl", nothing, "--eval-temperature -1", "--eval-temperature is -1"),
    "greedy training": ("rl", nothing, "--temperature 0", "--temperature is 0"),
    "no probability": ("evaluate", nothing, "--top-p 0", "--top-p is 0"),
    "a probability above 1": ("evaluate", nothing, "--top-p 1.5", "--top-p is 1.5"),
    "negative limit": ("evaluate", nothing, "--limit -1", "--limit is -1"),
    "a share above 1": ("sft", nothing, "--warmup 2", "--warmup is 2"),
    "a group of one": ("rl", nothing, "--group 1", "--group 1: needs at least 2"),
    "greedy samples": ("evaluate", nothing, "--temperature 0 --n 4", "use --n 1"),
    "batch does not divide": (
        "rl",
        nothing,
        "--prompts 64 --update-prompts 24",
        "--update-prompts 16 or 32",
    ),
    # data
    "missing data": ("sft", nothing, "--data nowhere.jsonl", "nowhere.jsonl: no such file"),
    "not JSON": ("sft", rows(GOOD + "{oops\n"), OWN, "a.jsonl:2: not JSON"),
    "no object": ("sft", rows(GOOD + "[1]\n"), OWN, "a.jsonl:2: a list, not an object"),
    "no columns": ("sft", rows('{"x": 1}\n'), OWN, "a.jsonl:1: no prompt and response"),
    "no answer": ("evaluate", rows('{"prompt": "x"}\n'), OWN, 'a.jsonl:1: no "answer"'),
    "null content": ("sft", rows(NULL_CONTENT), OWN, "a.jsonl:1: no prompt"),
    "empty file": ("sft", rows(""), OWN, "a.jsonl: no rows"),
    "not UTF-8": ("sft", rows(GOOD.encode() + b'{"a": "\xff"}\n'), OWN, "a.jsonl:2: not UTF-8"),
    "all over-long": ("sft", nothing, "--max-len 3", "longer than 3 tokens; raise --max-len"),
    "no demonstrations": ("rl", rows(NO_RESPONSE), f"--algo luffy {OWN}", "add a column response"),
    "no prefixes": ("rl", rows(NO_RESPONSE), f"--algo prefix_rft {OWN}", "add a column response"),
    # models
    "init is nothing": ("rl", nothing, "--init nowhere", "nowhere: no such folder"),
    "a run that is not there": ("rl", nothing, "--init runs/nothing", "there is no such run"),
    "no config.json": ("sft", without("config.json"), "", "config.json"),
    "no tokenizer": ("sft", without("tokenizer.json"), "", "no tokenizer.json"),
    "missing weights": ("sft", without("model.safetensors"), "", "safetensors"),
    "truncated weights": ("sft", cut_weights, "", "model.safetensors"),
    "wrong shape": ("sft", reshape_weights, "", "model.norm.weight"),
    "unsupported model": ("sft", config(model_type="mamba"), "", "mamba"),
    "unsupported feature": ("sft", config(rope_scaling=ROPE), "", "yarn"),
    "small vocabulary": ("sft", config(vocab_size=100), "", "100"),
    "broken template": (
        "sft",
        config("tokenizer_config.json", chat_template="{% if %}"),
        "",
        "does not compile",
    ),
    # run directories
    "used out": ("sft", rows("x", "out/x"), "", "--overwrite"),
    "used out of no run": ("sft", rows("x", "out/x"), "--overwrite", "not a run directory"),
    "metrics but no checkpoint": (
        "sft",
        rows(METRICS, "out/metrics.jsonl"),
        "--resume",
        "no whole checkpoint",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_clear_line_and_exit_code_2(
    name, small_task, tmp_path, monkeypatch, capsys
):
    script, damage, flags, named = CASES[name]
    model = tmp_path / "m"
    shutil.copytree(small_task, model)
    damage(model)
    argv = [f"{script}.py", "--init", str(model), "--data", str(model / "train.jsonl")]
    if script != "evaluate":
        argv += ["--out", str(model / "out")]
    argv += flags.replace("M/", f"{model}/").split()
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as end:
        cli.run(*SCRIPTS[script])
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2
    assert message.startswith("error:")
    assert named in message


def test_own_data_need_a_model_of_their_own(tmp_path):
    with pytest.raises(UserError, match="needs --init"):
        cli.parse(sft.Config, ["--data", str(tmp_path / "x.jsonl")], sft.preset)


@pytest.mark.parametrize("script", [sft, rl, evaluate])
@pytest.mark.parametrize("init", ["M", "Qwen/Qwen2.5-0.5B", "M/other"])
def test_a_model_of_ones_own_needs_data_of_its_own(small_task, tmp_path, script, init, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_task, tmp_path / "M")
    if init == "M":
        (tmp_path / "runs/countdown").mkdir(parents=True)
        (tmp_path / "runs/countdown/tokenizer.json").write_text("{}")  # the built-in one is another
    with pytest.raises(UserError, match=f"--init {init} is a model of your own: give --data"):
        cli.parse(script.Config, ["--init", init], script.preset)


@pytest.mark.parametrize("script", ["sft.py", "rl.py", "evaluate.py"])
def test_the_real_command_ends_with_code_2_and_no_traceback(script, tmp_path):
    command = [sys.executable, ROOT / script, "--init", "nowhere", "--data", "x.jsonl"]
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "error: nowhere: no such folder" in done.stderr
