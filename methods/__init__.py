"""Methods by name: `load("luffy")` is methods/luffy.py, `load("my/idea.py")` is your own file.

A method's file defines one class named `Method`, derived from losses.GRPO or from another method.
"""

import importlib.util
import sys
from pathlib import Path

from core.errors import UserError

HERE = Path(__file__).parent


def names() -> list[str]:
    """The methods that come with the project: the files beside this one."""
    return sorted(path.stem for path in HERE.glob("*.py") if path.stem != "__init__")


def load(name: str) -> type:
    """The method class of this name or file."""
    path = Path(name) if name.endswith(".py") else HERE / f"{name}.py"
    if not path.is_file():
        raise UserError(f"--algo {name}: no such method; choose {', '.join(names())}, or a file.py")
    if path.parent == HERE:
        module = importlib.import_module(f"methods.{path.stem}")
    else:
        spec = importlib.util.spec_from_file_location(f"algo_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclass and --help look for the class
        spec.loader.exec_module(module)
    if not hasattr(module, "Method"):
        raise UserError(f"--algo {name}: the file defines no class Method(losses.GRPO)")
    return module.Method
