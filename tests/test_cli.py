"""core/cli.py: flags from a dataclass, what a newcomer types wrongly, and how a script ends."""

import io
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from small_runs import ENV, ROOT

import methods
import rl
import sft
from core import cli
from core.errors import UserError


@dataclass
class Config:
    out: str = "runs/x"  # where it goes
    lr: float = 1e-5  # learning rate, a share of 100%
    limit: int | None = None  # most rows; none = all
    shape: Literal["a", "b"] = "a"  # which
    save_every: int = 0  # steps between checkpoints
    resume: bool = False  # go on

    refused = {"--top-p": "sample from all of it"}


@dataclass
class Narrow(Config):
    out: str = "runs/y"  # somewhere else


@dataclass
class WithOptions(Config):
    options: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    clip: float | None = 0.2  # largest step
    settings: ClassVar[dict] = {"lr": 7.0}


# ---- parse ---------------------------------------------------------------------------------------
def test_flags_come_from_the_dataclass():
    argv = ["--lr", "3", "--limit", "4", "--save-every=5", "--resume", "--shape", "b"]
    wanted = Config(lr=3.0, limit=4, save_every=5, resume=True, shape="b")
    assert cli.parse(Config, argv) == wanted
    assert cli.parse(Config, ["--limit", "none", "--no-resume"]) == Config()


def test_presets_never_beat_what_was_typed():
    cfg = cli.parse(Config, ["--lr", "3"], preset=lambda given: {"lr": 7.0, "shape": "b"})
    assert cfg == Config(lr=3.0, shape="b")


def test_a_preset_can_take_a_flag_that_it_understood():
    def preset(given):
        return {"out": given.pop("out") + "/inside"}

    assert cli.parse(Config, ["--out", "here"], preset) == Config(out="here/inside")


def test_options_that_were_typed_are_kept_apart():
    cfg = cli.parse(
        WithOptions, ["--clip", "none", "--lr", "2"], options=("shape", lambda name: Method)
    )
    assert cfg.options == {"clip": None}
    assert cfg.lr == 2.0
    assert cli.parse(WithOptions, [], options=("shape", lambda name: Method)).options == {}


def test_one_flag_can_be_read_before_the_others_are_known():
    assert cli.peek(["--clip", "2", "--algo", "luffy"], "algo", "dapo") == "luffy"
    assert cli.peek(["--algo=my/idea.py"], "algo", "dapo") == "my/idea.py"
    assert cli.peek(["--clip", "2"], "algo", "dapo") == "dapo"


def test_help_shows_each_comment_and_default(capsys):
    with pytest.raises(SystemExit):
        cli.parse(WithOptions, ["--help"], options=("shape", lambda name: Method))
    text = " ".join(capsys.readouterr().out.split())
    assert "learning rate, a share of 100% (7.0)" in text  # the method's setting
    assert "where it goes ('runs/x')" in text
    assert "most rows; none = all (none)" in text
    assert "largest step (0.2)" in text


def test_a_comment_of_a_subclass_counts():
    comments = cli.field_comments(Narrow)
    assert comments["out"] == "somewhere else"
    assert comments["save_every"] == "steps between checkpoints"


@pytest.mark.parametrize(
    "flag, hint",
    [
        ("--learning-rate", "did you mean --lr"),
        ("--model", "--init"),
        ("--save-evry", "did you mean --save-every"),
        ("--top-p", "sample from all of it"),
        ("--zzzz", "--help lists the flags"),
        ("--ou", "--out"),  # an abbreviation is not taken for the flag
    ],
)
def test_a_flag_that_does_not_exist_is_named_with_the_one_that_was_meant(flag, hint):
    with pytest.raises(UserError, match=f"{flag}: no such flag.*{hint}"):
        cli.parse(Config, [flag, "1"])


def test_the_built_in_task_says_which_flags_it_sets(capsys):
    @dataclass
    class Script:
        data: str = ""  # problems
        bf16: bool = True  # compute in bfloat16
        max_new: int = 1  # tokens

    preset = {"data": "x.jsonl", "bf16": False, "max_new": 128}
    cli.parse(Script, ["--max-new", "64"], preset=lambda given: preset)
    printed = capsys.readouterr().out
    assert printed == "the built-in task, with --data x.jsonl --no-bf16\n"


@pytest.mark.parametrize(
    "require, good, bad",
    [
        (cli.require_positive, 1, 0),
        (cli.require_positive, 0.5, float("nan")),
        (cli.require_not_negative, 0, -1),
        (cli.require_not_negative, 0.0, float("nan")),
        (cli.require_share, 1.0, 1.5),
        (cli.require_share, 0.0, -0.1),
    ],
)
def test_a_number_out_of_range_is_refused_with_its_flag(require, good, bad):
    require(Config(save_every=good), "lr", "save_every")
    with pytest.raises(UserError, match=f"--save-every is {bad}"):
        require(Config(save_every=bad), "lr", "save_every")


def test_the_command_that_goes_on_is_the_one_that_was_typed_and_resume(monkeypatch):
    monkeypatch.setattr("sys.argv", ["sft.py", "--out", "a b", "--overwrite"])
    assert cli.again() == "python sft.py --out 'a b' --resume"


@pytest.fixture()
def saved(tmp_path):
    """A run directory with its settings."""
    config = {"out": "elsewhere", "lr": 7.0, "shape": "b", "resume": False, "gone": 1}
    (tmp_path / "run.json").write_text(json.dumps({"config": config}))
    return str(tmp_path)


def test_resume_takes_the_settings_of_the_run_and_what_is_typed_beats_them(saved):
    cfg = cli.parse(Config, ["--resume", "--out", saved], preset=lambda given: {"lr": 1.0})
    assert cfg == Config(out=saved, lr=7.0, shape="b", resume=True)
    assert cli.parse(Config, ["--resume", f"--out={saved}", "--lr", "2"]).lr == 2.0
    assert cli.parse(Config, ["--out", saved]).lr == 1e-5
    assert cli.parse(Config, ["--out", saved, "--resume", "--no-resume"]).lr == 1e-5


@pytest.mark.parametrize("text", ["{", "[1]", '"x"'])
def test_settings_that_cannot_be_read_are_named(saved, text):
    (Path(saved) / "run.json").write_text(text)
    with pytest.raises(UserError, match="run.json: not the settings of a run"):
        cli.parse(Config, ["--resume", "--out", saved])


@pytest.mark.parametrize("script", [sft, rl])
def test_the_command_that_goes_on_means_the_same_data(script, small_task, tmp_path):
    """--data FOLDER stands for files in it, also in the command that is typed again."""
    words = ["--init", str(small_task), "--data", str(small_task), "--out", str(tmp_path)]
    options = ("algo", methods.load) if script is rl else None
    cfg = cli.parse(script.Config, words, script.preset, options)
    (tmp_path / "run.json").write_text(json.dumps({"config": vars(cfg)}))
    again = cli.parse(script.Config, [*words, "--resume"], script.preset, options)
    assert vars(again) == {**vars(cfg), "resume": True}
    bare = cli.parse(script.Config, ["--out", str(tmp_path), "--resume"], script.preset, options)
    assert vars(bare) == vars(again)


# ---- how a script ends ---------------------------------------------------------------------------
@pytest.mark.parametrize("argv", [["--nope"], ["--lr", "fast"], ["--shape", "c"], ["--ou", "x"]])
def test_a_wrong_flag_is_one_line_and_code_2(argv, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", *argv])
    with pytest.raises(SystemExit) as end:
        cli.run(lambda cfg: None, Config)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert line.startswith("error: ")
    assert argv[0] in line


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_without_unicode_is_no_reason_to_die(encoding, monkeypatch):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setattr("sys.argv", ["x"])

    def main(cfg):
        print("2 → 3")
        raise UserError("没有: odd")

    with pytest.raises(SystemExit) as end:
        cli.run(main, Config)
    assert end.value.code == 2
    for stream, text in zip(streams, (b"2 \\u2192 3", b"error: \\u6ca1\\u6709: odd")):
        stream.flush()
        assert text in stream.buffer.getvalue()


def raises(error):
    def main(cfg):
        raise error

    return main


@pytest.mark.parametrize("error", [UserError("a.jsonl:3: odd"), OSError("a.jsonl:3: odd")])
def test_a_users_mistake_is_one_line_and_code_2(error, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x"])
    with pytest.raises(SystemExit) as end:
        cli.run(raises(error), Config)
    assert end.value.code == 2
    assert capsys.readouterr().err == "\nerror: a.jsonl:3: odd\n"


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyError("x"), RuntimeError("peer"), TypeError("x")]
)
def test_every_other_exception_is_a_bug_and_passes_through(error, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x"])
    with pytest.raises(type(error)):
        cli.run(raises(error), Config)


@pytest.mark.parametrize("Script, resumes", [(Config, True), (Method, False)])
def test_a_second_ctrl_c_ends_with_code_130_and_says_what_can_be_done(
    Script, resumes, monkeypatch, capsys
):
    monkeypatch.setattr("sys.argv", ["x"])
    with pytest.raises(SystemExit) as end:
        cli.run(raises(KeyboardInterrupt()), Script)
    assert end.value.code == 130
    message = capsys.readouterr().err
    assert "stopped at once" in message
    assert ("--resume" in message) == resumes


def test_a_planted_bug_keeps_its_traceback_in_the_real_command(small_task, tmp_path):
    (tmp_path / "reward.py").write_text("def reward(response, row):\n    return 1 / 0\n")
    command = [sys.executable, ROOT / "evaluate.py", "--init", small_task, "--n", "1"]
    command += ["--data", small_task / "test.jsonl", "--limit", "1", "--max-new", "4"]
    command += ["--reward", f"{tmp_path}/reward.py:reward"]
    done = subprocess.run(list(map(str, command)), env=ENV, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert re.search(r'reward.py", line 2, in reward', done.stderr)
    *_, error, row = done.stderr.splitlines()
    assert error == "ZeroDivisionError: division by zero"
    assert row.startswith("in --reward, for the row {'prompt': 'Make ")


# ---- lists of words ------------------------------------------------------------------------------
@dataclass
class Talk:
    words: tuple[str, ...] = ()  # what to say
    init: tuple[str, ...] = ("runs/rl", "runs/sft")  # models
    n: int = 1  # how often

    positional: ClassVar[str] = "words"


def test_words_without_a_flag_stand_anywhere_and_a_flag_may_take_several():
    found = cli.parse(Talk, ["a b", "--n", "2", "c", "--init", "x", "y"])
    assert list(found.words) == ["a b", "c"]
    assert list(found.init) == ["x", "y"]
    assert found.n == 2
    assert cli.parse(Talk, []) == Talk()
    with pytest.raises(UserError, match="--nn: no such flag; did you mean --n"):
        cli.parse(Talk, ["a", "--nn", "2"])
