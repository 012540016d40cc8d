"""core/start.py: --help without torch, and threads that wait briefly unless the user decided it."""

import os
import re
import subprocess
import sys

import pytest
from small_runs import ROOT

from core import start

COMMANDS = ("sft.py", "rl.py", "rl.py --algo luffy", "evaluate.py", "rollout.py")
COMMANDS += ("phases.py", "ceiling.py", "verify.py", "-m core.page", "-m tasks.countdown")
COMMANDS += ("-m paper.study", "-m paper.curate", "-m paper.report", "-m paper.figures")
COMMANDS += ("-m bench", "-m bench rl", "-m bench gpu")
UNSAID = {name: value for name, value in os.environ.items() if name not in start.SAID}


def run(*words, **more) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, words)]
    environment = {**UNSAID, **more}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


# ---- --help --------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_no_torch(command):
    done = run("-X", "importtime", *command.split(), "--help")
    assert done.returncode == 0
    assert re.search("^usage|python -m bench", done.stdout, re.M)
    assert re.search(r"\| +argparse$", done.stderr, re.M)  # the list of imports is there
    assert "torch._C" not in done.stderr


def test_help_is_the_same_text_with_torch():
    for command in ("rl.py --algo luffy", "evaluate.py"):
        words = [*command.split(), "--help"]
        assert run(*words).stdout == run(*words, **{start.WITH_TORCH: "1"}).stdout


def test_a_method_that_computes_while_it_is_imported_shows_its_options(tmp_path):
    lines = ["import torch", "from dataclasses import dataclass", "from losses import GRPO"]
    lines += ["TABLE = torch.arange(3) * 2.0", "@dataclass(frozen=True)", "class Method(GRPO):"]
    lines += ["    strength: float = 0.5  # of the idea"]
    (tmp_path / "idea.py").write_text("\n".join(lines))
    done = run("rl.py", "--algo", tmp_path / "idea.py", "--help")
    assert done.returncode == 0, done.stderr
    assert re.search(r"--strength FLOAT +of the idea \(0.5\)", done.stdout)


def test_a_program_that_imports_the_project_gets_torch_and_its_own_environment():
    code = (
        "import os, sft, torch; print(torch.ones(2).sum().item(), os.environ.get('GOMP_SPINCOUNT'))"
    )
    done = run("-c", code, "--help")
    assert done.stdout == "2.0 None\n", done.stderr


# ---- threads -------------------------------------------------------------------------------------
def test_threads_wait_briefly_where_the_user_said_nothing():
    environment = {"PATH": "/bin"}
    start.wait_briefly(environment)
    assert environment == {"PATH": "/bin", "GOMP_SPINCOUNT": start.SPIN}


@pytest.mark.parametrize("name", start.SAID)
def test_what_the_user_has_set_is_never_overruled(name):
    environment = {name: "1"}
    start.wait_briefly(environment)
    assert environment == {name: "1"}


@pytest.mark.parametrize("script", ["sft.py", "rl.py", "evaluate.py", "rollout.py"])
def test_torch_sees_the_bound_in_every_script_that_computes(script):
    done = run(script, "--init", "nowhere", "--data", "none", OMP_DISPLAY_ENV="verbose")
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this torch has another OpenMP")
    assert f"GOMP_SPINCOUNT = '{start.SPIN}'" in done.stderr
    done = run(script, "--nope", OMP_DISPLAY_ENV="verbose", OMP_WAIT_POLICY="ACTIVE")
    assert f"GOMP_SPINCOUNT = '{start.SPIN}'" not in done.stderr
