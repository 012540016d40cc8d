"""The layers of the project: a file imports only files below its own, and importing one does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEVELS = {
    0: {"folder", "mathexpr", "losses", "phases", "ceiling", "countdown", "ranks"},
    1: {"memory", "model", "run", "verify", "figures", "findings"},
    2: {"decode", "data", "report"},
    3: {"rollout", "curate"},
    4: {"evaluate", "study"},
    5: {"sft", "bench"},
    6: {"rl"},
}
WITHOUT_TORCH = {"verify", "mathexpr", "phases", "ceiling", "countdown", "findings", "report"}


def imports_of(path: Path) -> set[str]:
    """Top-level names of every module that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def test_every_file_has_a_level_and_imports_only_lower_ones():
    level = {name: n for n, names in LEVELS.items() for name in names}
    ours = {path.stem for path in ROOT.glob("*.py")}
    assert ours <= set(level), "a new file needs a level"
    for name in ours:
        above = {
            other for other in imports_of(ROOT / f"{name}.py") & ours if level[other] >= level[name]
        }
        assert not above, f"{name} imports {above}, which is not below it"


def test_files_meant_to_be_lifted_out_do_not_need_torch():
    for name in WITHOUT_TORCH:
        assert "torch" not in imports_of(ROOT / f"{name}.py"), name


def test_only_agreed_packages_are_imported():
    agreed = {
        "torch",
        "tokenizers",
        "safetensors",
        "numpy",
        "jinja2",
        "sympy",
        "huggingface_hub",
        "tqdm",
        "matplotlib",
        "pyarrow",
    }
    ours = {path.stem for path in ROOT.glob("*.py")}
    for name in ours:
        others = (
            imports_of(ROOT / f"{name}.py") - ours - set(sys.stdlib_module_names) - {"__future__"}
        )
        assert others <= agreed, f"{name} imports {others - agreed}"


def test_importing_every_file_prints_nothing_parses_nothing_and_starts_nothing():
    names = sorted(path.stem for path in ROOT.glob("*.py"))
    code = f"import sys; sys.argv = ['x', '--nonsense']; import {', '.join(names)}; import torch; print(torch.distributed.is_initialized())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "False\n", done.stderr
