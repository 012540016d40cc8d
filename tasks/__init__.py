"""Built-in problems and rewards by name.

A task is one file here: its problems, its expert, its reward, and the settings that suit it. A
reward is one function, `reward(response: str, row: dict) -> float | Verdict`, where `row` is the
data row as read, with all of its columns. `--reward math` is the one of tasks/math.py, `--reward
my/file.py:name` a function of your own.
"""

import importlib
import importlib.util
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from core.errors import UserError
from verify import Verdict

HERE = Path(__file__).parent
BUILT_IN = "countdown"  # what the scripts run on without --data


def load(name: str):
    """The module of a task."""
    return importlib.import_module(f"tasks.{name}")


def names() -> list[str]:
    """The rewards that come with the project: the files beside this one that define one."""
    return sorted(path.stem for path in HERE.glob("*.py") if "\ndef reward(" in path.read_text())


# ---- settings ------------------------------------------------------------------------------------
FILES = ("data", "val", "problems", "demonstrations")  # settings that name a file of the folder


def preset(script: str, given: dict) -> dict:
    """The settings of a task for a script ("sft", "rl", "evaluate"): of the built-in task without
    --data, of the task that wrote --data FOLDER, or {} where --data is anything else.

    --data FOLDER is taken out of `given`, as the settings name the files in it.
    """
    task = load(BUILT_IN)
    folder = Path(given.get("data", task.FOLDER))
    if "data" in given:
        written = [name for name in names() if (folder / f"{name}.json").exists()]
        if not written:
            return {}
        task = load(written[0])
        del given["data"]
    elif not has_tokenizer_of(given.get("init", ""), task):
        raise UserError(
            f"--init {given['init']} is a model of your own: give --data too (and --val). The "
            "built-in problems and their settings are for runs/base and what is trained from it"
        )
    settings = dict(task.SETTINGS[script])
    if script == "rl":
        settings["demonstrations"] = task.DEMONSTRATIONS
    for name in FILES:
        if settings.get(name):
            settings[name] = str(folder / settings[name])
    if "problems" in settings or script != "sft":
        settings["reward"] = task.__name__.split(".")[-1]
    return settings


def has_tokenizer_of(init: str, task) -> bool:
    """Whether --init is empty, missing, or a model with the tokenizer of the built-in task."""
    folder = Path(init.partition("@")[0])
    ours = task.FOLDER / "tokenizer.json"
    if not init or (folder.parts[:1] == ("runs",) and not folder.exists()):
        return True
    if not ours.exists():  # nothing can descend from it yet
        return False
    for place in (folder, *sorted(folder.glob("checkpoints/step_*"))):
        if (place / "tokenizer.json").exists():
            return (place / "tokenizer.json").read_bytes() == ours.read_bytes()
    return False


def flags_for(cfg, **flags: str) -> str:
    """The data and reward flags of the next command that a run suggests; "" after the built-in
    task, whose settings are the defaults. flags: {field of cfg: flag of the next command}."""
    if Path(cfg.data).parent == load(BUILT_IN).FOLDER:
        return ""
    words = []
    for name, flag in flags.items():
        words += [flag, getattr(cfg, name) or cfg.data]
    return " " + shlex.join([*words, "--reward", cfg.reward])


# ---- rewards -------------------------------------------------------------------------------------
def load_reward(name: str) -> Callable:
    """The reward of this name: a task's, or FILE.py:FUNCTION."""
    path, _, function = name.partition(":")
    if path.endswith(".py"):
        if not Path(path).is_file():
            raise UserError(f"--reward {name}: no file {path}")
        spec = importlib.util.spec_from_file_location(f"reward:{path}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    elif path in names():
        module = load(path)
    else:
        raise UserError(f"--reward {name}: choose {', '.join(names())}, or give FILE.py:FUNCTION")
    function = function or "reward"
    if not callable(getattr(module, function, None)):
        raise UserError(f"--reward {name}: {path} has no function {function}(response, row)")
    return getattr(module, function)


def scorer(name: str) -> Callable:
    """score() with the reward of this name, for a worker of core/pool.py."""
    return partial(score, load_reward(name))


def score(reward: Callable, response: str, row: dict) -> tuple[float, Verdict]:
    """(number, verdict): a Verdict counts 1 or 0; a number is right above one half."""
    answer = reward(response, row)
    if isinstance(answer, Verdict):
        return float(answer.correct), answer
    value = float(answer)
    return value, Verdict(value > 0.5, value > 0.5, "", "scored")


def columns(name: str) -> dict:
    """What data.problems() has to know of a reward, as its keyword arguments. reads: its columns
    besides the gold answer (COLUMNS of its module). needs_gold: each row needs a gold answer that
    is text (NEEDS_GOLD, by default true; a FILE.py's reward needs none). check: raises UserError
    for a bad row, where a task's reward reads other columns than the gold answer."""
    reward = load_reward(name)
    module = sys.modules[reward.__module__]
    ours = name.partition(":")[0] in names()
    needs_gold = ours and getattr(module, "NEEDS_GOLD", True)
    check = partial(reward, "") if ours and not needs_gold else None
    return {"reads": getattr(module, "COLUMNS", ()), "needs_gold": needs_gold, "check": check}
