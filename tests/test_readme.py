"""What the README and the pages tell a reader to type and to open is there."""

import contextlib
import io
import re
import runpy
import shlex
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

import evaluate
import methods
import rl
import sft
from core import cli

ROOT = Path(__file__).resolve().parents[1]
HISTORY = {"docs/LOG.md", "docs/study/report.md"}  # as it was written on its day
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if str(page.relative_to(ROOT)) not in HISTORY]
# Programs with a command line of their own, in which a flag may be named
PROGRAMS = ("sft.py", "rl.py", "evaluate.py", "phases.py", "ceiling.py", "verify.py", "rollout.py")
PROGRAMS += ("bench rollout", "bench sft", "bench rl", "bench parity", "bench gpu")
PROGRAMS += ("bench/peers/compare_math_verify.py", "tests/test_ceiling.py", "tests/test_verify.py")
PROGRAMS += ("examples/gsm8k/prepare.py", "examples/gsm8k/rollouts.py")
PROGRAMS += ("tasks.countdown", "paper.study", "paper.curate", "paper.figures", "paper.report")
OTHERS = {
    "--check",
    "--help",
    "--logdir",
    "--nproc_per_node",
    "--nnodes",
    "--rdzv_backend",
    "--rdzv_endpoint",
}
# Files that a reader makes, and names of other projects
THEIRS = re.compile(r"my/|my\.py|idea\.py|[Ff]ile\.py|FILE\.py")


# Pages that are being written beside this one; drop a name once its page is there
COMING = {"docs/page.png"}


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def in_backticks_or_blocks(text: str) -> str:
    """What is typed or named: `spans` and indented or fenced blocks."""
    blocks = re.findall(r"^    .*$", text, re.M) + re.findall(r"```.*?```", text, re.S)
    return "\n".join(blocks + re.findall(r"`[^`\n]+`", text))


@cache
def help_of(program: str) -> str:
    """What `PROGRAM --help` prints."""
    words = program.split()
    file = words[0]
    if words[0] == "bench":
        file = "bench/__main__.py"
    elif not file.endswith(".py"):
        file = f"{file.replace('.', '/')}.py"
    before = sys.argv
    sys.argv = [*words, "--help"]
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    try:
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / file), run_name="__main__")
    finally:
        sys.argv = before
    assert not end.value.code, program
    printed.flush()
    return printed.buffer.getvalue().decode()


def flags_of(program: str) -> set[str]:
    if program.startswith("tests/"):  # these read sys.argv themselves
        text = (ROOT / program).read_text()
    else:
        text = help_of(program)
    return set(re.findall(r"--[a-z][\w-]*", text))


def commands(text: str) -> list[str]:
    """Each command of the code blocks, without the words behind it that explain."""
    text = re.sub(r"\\\n\s*", " ", text)
    found = []
    for line in re.findall(r"^    ((?:pip|python|torchrun) .*)$", text, re.M):
        for part in re.split(r"\s{3,}|\s+#", line)[0].split(" && "):
            if part.startswith(("python", "torchrun")):
                found.append(part)
    return found


def program_of(command: str) -> tuple[str, list[str]]:
    """(program as in PROGRAMS, its arguments) of a command."""
    words = [word for word in shlex.split(command) if word not in ("--", "...")]
    if "-m" in words:
        i = words.index("-m") + 1
        if words[i] == "bench":
            return f"bench {words[i + 1].split('|')[0]}", words[i + 2 :]
        return words[i], words[i + 1 :]
    script = next(word for word in words if word.endswith(".py"))
    return script, words[words.index(script) + 1 :]


COMMANDS = []
for page in PAGES:
    for command in commands(page.read_text()):
        if not THEIRS.search(command.split(".py")[0] + ".py"):
            COMMANDS.append(pytest.param(command, id=f"{page.name}: {command[:70]}"))


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    assert len(text.split()) <= 1200


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_no_link_is_dead(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path = (page.parent / target).resolve()
        assert path.exists() or str(path.relative_to(ROOT)) in COMING, target


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_file_that_is_named_exists(page):
    files = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py")}
    for name in set(re.findall(r"[\w/.]+\.py\b", page.read_text())):
        if not THEIRS.search(name):
            assert any(f"/{file}".endswith(f"/{name}") for file in files), name


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_flag_that_is_named_exists(page):
    known = OTHERS | {flag for program in PROGRAMS for flag in flags_of(program)}
    for algo in ("luffy", "srft", "upt", "prefix_rft"):
        known |= {f"--{name.replace('_', '-')}" for name in vars(methods.load(algo)())}
    for config in (sft.Config, rl.Config, evaluate.Config):
        switches = [field.name for field in fields(config) if field.type is bool]
        known |= {f"--no-{name.replace('_', '-')}" for name in switches}
    for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", in_backticks_or_blocks(page.read_text())):
        assert flag in known or f"--no-{flag[2:]}" in known, flag


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("data/patient")  # what tasks.countdown --out has written by then
    folder.mkdir(parents=True)
    (folder / "countdown.json").touch()
    program, arguments = program_of(command)
    if program in ("sft.py", "rl.py", "evaluate.py"):
        module = {"sft.py": sft, "rl.py": rl, "evaluate.py": evaluate}[program]
        options = None
        if program == "rl.py":
            options = ("algo", methods.load)
        cli.parse(module.Config, arguments, module.preset, options)
        return
    assert program in PROGRAMS
    for word in arguments:
        assert not word.startswith("--") or word in flags_of(program), word


def test_a_method_in_a_file_of_ones_own_brings_its_flags(tmp_path, capsys):
    """As objectives.md shows it: SAPO."""
    text = (ROOT / "docs" / "objectives.md").read_text()
    body = re.search(r"^    @dataclass\(frozen=True\)\n(?:    .*\n|\n)+", text, re.M)[0]
    lines = [line.removeprefix("    ") for line in body.splitlines()]
    head = "from dataclasses import dataclass\nimport torch\nfrom losses import GRPO, log_ratio\n"
    path = tmp_path / "sapo.py"
    path.write_text(head + "\n".join(lines))
    argv = ["--algo", str(path), "--tau-negative", "1.1", "--init", "x", "--data", "y.jsonl"]
    cfg = cli.parse(rl.Config, argv, rl.preset, ("algo", methods.load))
    method = methods.load(cfg.algo)(**cfg.options)
    assert method.tau_negative == 1.1 and method.tau_positive == 1.0
