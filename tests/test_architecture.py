"""The layers of the project: a file imports what is below it, and importing a file does nothing."""

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("core", "methods", "tasks", "paper", "bench")
SCRIPTS = {"sft", "rl", "evaluate"}
COMPONENTS = {"data", "model", "rollout", "losses", "verify", "phases", "ceiling"}
LAYERS = ("core", "component", "method or task", "script", "paper or bench")  # from the ground up
# lifted out by others: the standard library and numpy
ALONE = {"verify", "phases", "ceiling", "core.mathexpr", "core.errors"}
# the decode step is model.py's network once more, laid out for few tokens; the page of a run, which
# both scripts write and nothing else in core knows, says what these two say of the run
UPWARD = {("core.decode", "model"), ("core.page", "ceiling"), ("core.page", "phases")}
WITHOUT_TORCH = ALONE | {"tasks.countdown", "paper.findings", "paper.figures", "paper.report"}
WITHOUT_TORCH |= {"core.page"}
AGREED = {
    "torch",
    "tokenizers",
    "safetensors",
    "numpy",
    "jinja2",
    "huggingface_hub",
    "tqdm",
    "matplotlib",
    "pyarrow",
    "wandb",
}


def product_files() -> dict[str, Path]:
    """Name of the module -> its file, for all files of the project but tests and peers."""
    found = {path.stem: path for path in ROOT.glob("*.py")}
    for package in PACKAGES:
        for path in (ROOT / package).glob("*.py"):
            name = package if path.stem == "__init__" else f"{package}.{path.stem}"
            found[name] = path
    return found


FILES = product_files()


def layer_of(module: str) -> int:
    package = module.split(".")[0]
    if package in ("paper", "bench"):
        name = "paper or bench"
    elif package in ("methods", "tasks"):
        name = "method or task"
    elif package == "core":
        name = "core"
    else:
        name = "script" if module in SCRIPTS else "component"
    return LAYERS.index(name)


@cache
def imports_of(module: str) -> frozenset[str]:
    """Every module that a file imports anywhere in it: ours by their full names."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide what a file stands on"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & set(FILES) or {node.module}
    return frozenset(found)


@cache
def below(module: str) -> frozenset[str]:
    """All our modules that a module stands on, however indirectly; assumes no circle."""
    found = set()
    for other in imports_of(module) & set(FILES):
        found |= {other} | below(other)
    return frozenset(found)


def outside(module: str) -> set[str]:
    """The packages of others that a file imports."""
    tops = {name.split(".")[0] for name in imports_of(module)}
    return tops - {name.split(".")[0] for name in FILES} - set(sys.stdlib_module_names)


def python(code: str, *arguments: str, cwd: Path = ROOT):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


# ---- what stands on what
def test_every_file_at_the_root_is_a_script_or_a_component():
    at_root = {path.stem for path in ROOT.glob("*.py")}
    assert at_root == SCRIPTS | COMPONENTS


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_point_down(module):
    for other in imports_of(module) & set(FILES):
        is_below = layer_of(other) <= layer_of(module)
        assert is_below or (module, other) in UPWARD, f"{module} imports {other}, above it"


def test_no_file_imports_itself_by_way_of_others():
    order: list[str] = []  # files whose imports are all before them
    left = set(FILES)
    while left:
        ready = {m for m in left if not (imports_of(m) & set(FILES)) - set(order)}
        assert ready, f"a circle among {sorted(left)}"
        order += sorted(ready)
        left -= ready


def test_core_knows_nothing_of_losses_text_and_rewards():
    science = {module for module in FILES if layer_of(module) > 0} - {"model"}
    for module in FILES:
        if layer_of(module) == 0:
            above = {other for upper, other in UPWARD if upper == module}
            known = (below(module) & science) - above
            assert not known, f"{module} stands on {known}"


def test_files_meant_to_be_lifted_out_need_numpy_at_most():
    for module in ALONE:
        for each in {module} | below(module):
            assert outside(each) <= {"numpy"}, f"{module} needs {outside(each)} by {each}"


def test_files_without_tensors_do_not_load_torch():
    code = f"import sys, {', '.join(sorted(WITHOUT_TORCH))}; print('torch' in sys.modules)"
    done = python(code)
    assert done.stdout == "False\n", done.stderr


def test_only_agreed_packages_are_imported():
    for module in FILES:
        assert outside(module) <= AGREED, f"{module} imports {outside(module) - AGREED}"


def test_the_sampler_knows_no_script_and_no_reward_until_it_is_run_as_a_command():
    # Its last line starts paper/talk.py by name: `python rollout.py` talks to a model.
    code = "import rollout, sys; print({'evaluate', 'data', 'tasks', 'paper'} & set(sys.modules))"
    done = python(code)
    assert done.stdout == "set()\n", done.stderr


# ---- importing a file
def test_importing_every_file_prints_nothing_parses_nothing_and_starts_nothing(tmp_path):
    code = f"""
import multiprocessing, sys, threading
sys.argv = ["x", "--nonsense"]
import {", ".join(sorted(FILES))}
import torch.distributed
threads, children = threading.active_count(), multiprocessing.active_children()
print(torch.distributed.is_initialized(), threads, children)
"""
    done = python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "False 1 []\n"
    assert done.stderr == ""
    assert not list(tmp_path.iterdir())


# ---- errors
def test_a_users_mistake_is_a_user_error_and_never_a_bare_value_error():
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise):
                raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
                is_bare = isinstance(raised, ast.Name) and raised.id == "ValueError"
                assert not is_bare, f"{module}, line {node.lineno}"


def test_a_bug_in_a_script_keeps_its_traceback(tmp_path):
    source = (ROOT / "sft.py").read_text()
    lines = source.splitlines()
    (main,) = (n for n in ast.parse(source).body if getattr(n, "name", "") == "main")
    lines.insert(main.body[1].lineno - 1, "    first, second = 1, 2, 3  # behind the docstring")
    (tmp_path / "sft.py").write_text("\n".join(lines))
    code = "import runpy; runpy.run_path('sft.py', run_name='__main__')"
    done = python(code, "--init", "x", "--data", "y", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "in main" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("ValueError: too many values to unpack")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batch", "0"], "--batch is 0"),  # while the command line is read
        (["--init", "nowhere", "--data", "nothing.jsonl"], "nowhere"),  # inside main
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    code = f"import runpy; runpy.run_path({str(ROOT / 'sft.py')!r}, run_name='__main__')"
    done = python(code, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
