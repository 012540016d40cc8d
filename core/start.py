"""What has to happen before torch is loaded: every command imports this file first.

1) OpenMP's threads wait for each other in a busy loop. Where other programs use the same cores, a
   waiting thread can occupy the core that the thread it waits for needs. So the loop is made short,
   unless the user has set how threads wait or how many there are.
2) Loading torch takes 2 seconds and --help needs no tensor, so --help imports a stand-in for torch.
   Where that fails, as with a method's file that computes while it is imported, the command starts
   once more with torch.
"""

import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

SPIN = "300"  # iterations of the waiting loop; libgomp's default is 300,000
SAID = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # with one of these set: no change
HEAVY = ("torch", "safetensors")
WITH_TORCH = "HELP_WITH_TORCH"  # set for the command that starts once more


def is_command() -> bool:
    """Whether this process runs one of the project's commands, not a program that imports them."""
    script = Path(getattr(sys.modules["__main__"], "__file__", os.devnull)).resolve()
    return Path(__file__).resolve().parents[1] in (script.parent, script.parent.parent)


def wait_briefly(environment) -> None:
    """Shorten the waiting loop of OpenMP, which reads the variable once, when torch is loaded."""
    if not any(name in environment for name in SAID):
        environment["GOMP_SPINCOUNT"] = SPIN


class StandIn(type):
    """Metaclass of the stand-in. Its attributes and calls return the stand-in itself, so it serves
    as a module, a type, a base class or a decorator; it is false."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __call__(cls, *args, **kwargs):
        return cls

    def __bool__(cls):
        return False


def start_again(*error) -> None:
    os.environ[WITH_TORCH] = "1"
    os.execv(sys.executable, sys.orig_argv)


class Finder:
    """Answers every import of a heavy package, and of what is inside it, with a stand-in."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return StandIn("Nothing", (), {})

    def exec_module(self, module):
        pass


if is_command():
    wait_briefly(os.environ)
    asked = {"-h", "--help"} & set(sys.argv[1:]) and "--" not in sys.argv
    if asked and WITH_TORCH not in os.environ and "torch" not in sys.modules:
        sys.meta_path.insert(0, Finder())
        sys.excepthook = start_again  # the same command, with torch
