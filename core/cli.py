"""A script's command line: one flat dataclass whose fields are the flags.

    save_every: int = 0  # steps between checkpoints     becomes     --save-every INT
so a flag, its type, its default and its help text are written once. bool: --x, --no-x.
"""

import argparse
import dataclasses
import difflib
import inspect
import math
import os
import re
import shlex
import sys
import time
import types
import typing

from core import ranks
from core.errors import UserError
from core.run import recorded


# ---- parse ---------------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        # argparse would print two screens of usage above it
        raise UserError(f"{message}; --help lists the flags")


class Formatter(argparse.RawDescriptionHelpFormatter):
    """One line per flag."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=25, width=119)

    def _format_action_invocation(self, action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0]  # --x; that --no-x exists is said once
        return super()._format_action_invocation(action)


def parse(Config, argv: list[str] | None = None, preset=None, options=None):
    """The Config of a command line.

    preset(given): {name: value} that replace defaults, never what the user typed.
    options: (flag, load): load(value of that flag) is a second dataclass whose fields are flags
        too; those that were typed go into Config.options. Its `settings` are defaults of Config's
        own flags.
    Config.positional: the field that is given without a flag, where there is one.
    Config.refused: {"--flag": why it does not exist}, for flags of other trainers.
    With --resume the defaults are the settings that the run was begun with.
    """
    argv = sys.argv[1:] if argv is None else argv
    saved = saved_settings(argv, Config)
    parser = Parser(
        usage=f"python {os.path.basename(sys.argv[0])} [--flag value ...]",
        description=inspect.getdoc(sys.modules[Config.__module__]),
        allow_abbrev=False,
        formatter_class=Formatter,
    )
    Options = None
    if options:
        flag, load = options
        Options = load(peek(argv, flag, saved.get(flag, getattr(Config, flag))))
    flags = parser.add_argument_group("flags (default in brackets; --no-x switches x off)")
    add_flags(flags, Config, getattr(Options, "settings", {}))
    if Options:
        add_flags(parser.add_argument_group("options of this --algo"), Options)
    read = parser.parse_known_args
    if hasattr(Config, "positional"):  # words before and behind the flags
        read = parser.parse_known_intermixed_args
    known, unknown = read(argv)
    if unknown:
        refuse(unknown[0].split("=")[0], parser, getattr(Config, "refused", {}))
    given = vars(known)
    chosen = saved.pop("options", {})
    if Options:
        for field in dataclasses.fields(Options):
            if field.name in given:
                chosen[field.name] = given.pop(field.name)
    values = saved
    if saved and preset and "data" in given:  # a task's folder means the files in it, as before
        asked = {"init": saved["init"], **given}
        given["data"] = preset(asked).get("data", given["data"])
    elif preset and not saved:  # preset may remove flags that it has used from `given`
        values = preset(given)
        values = {name: value for name, value in values.items() if name not in given}
        if "data" in values and not int(os.environ.get("RANK", 0)):
            print(f"the built-in task, with {as_flags(values)}", flush=True)
    values = values | given
    return Config(**values, options=chosen) if Options else Config(**values)


def saved_settings(argv: list[str], Config) -> dict:
    """The settings in run.json of the run that --resume goes on with; {} where there is none."""
    if "--resume" not in argv or "--no-resume" in argv:
        return {}
    config = recorded(peek(argv, "out", getattr(Config, "out", ""))).get("config", {})
    fields = {field.name for field in dataclasses.fields(Config)}
    dropped = ("resume", "overwrite", "dry_run", "out")
    return {name: v for name, v in config.items() if name in fields and name not in dropped}


def peek(argv: list[str], name: str, default: str) -> str:
    """The value of one flag, before the others are known."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", default=default)
    return getattr(parser.parse_known_args(argv)[0], name)


def refuse(flag: str, parser, refused: dict) -> None:
    """Raise UserError for a flag that does not exist, with the one that was meant."""
    if flag in refused:
        raise UserError(f"{flag}: no such flag; {refused[flag]}")
    there = [name for action in parser._actions for name in action.option_strings]
    aliases = {"--learning-rate": "--lr", "--model": "--init", "--output-dir": "--out"}
    near = [aliases[flag]] if flag in aliases else difflib.get_close_matches(flag, there, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"{flag}: no such flag; {hint}--help lists the flags there are")


def as_flags(values: dict) -> str:
    """{name: value} as it would be typed."""
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words.append(f"--{flag} {value}")
    return " ".join(words)


def add_flags(parser, Config, defaults: dict | None = None) -> None:
    """A flag per field. defaults: shown instead of the field's own."""
    hints = typing.get_type_hints(Config)
    comments = field_comments(Config)
    for field in dataclasses.fields(Config):
        kind = hints[field.name]
        if kind is dict:
            continue
        settings = {}
        if isinstance(kind, types.UnionType):  # X | None
            kind = or_none(next(k for k in kind.__args__ if k is not type(None)))
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is typing.Literal:
            settings["choices"] = typing.get_args(kind)
            settings["metavar"] = "WORD"
        elif typing.get_origin(kind) is tuple:
            settings |= {"type": str, "metavar": "WORD", "nargs": "+"}
        else:
            settings |= {"type": kind, "metavar": kind.__name__.upper()}
        default = (defaults or {}).get(field.name, field.default)
        text = comments.get(field.name, "")
        if "choices" in settings:
            text += f": {', '.join(choice or 'none' for choice in settings['choices'])}"
        if isinstance(default, tuple):
            default = " ".join(default) or None
        text += " (none)" if default is None else f" ({default!r})"
        flag = "--" + field.name.replace("_", "-")
        if field.name == getattr(Config, "positional", ""):
            flag = field.name
            settings |= {"nargs": "*", "metavar": flag.upper()}
        text = text.replace("%", "%%")
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text, **settings)


def field_comments(Config) -> dict[str, str]:
    """{field: its trailing comment} of a dataclass; a subclass's comment counts."""
    comments = {}
    for each in reversed(Config.__mro__):
        if dataclasses.is_dataclass(each):
            source = inspect.getsource(each)
            comments |= re.findall(r"^    (\w+): [^#]*?# *([^\n]*)$", source, re.M)
    return comments


def or_none(kind):
    """A converter that also takes the word none."""

    def convert(text):
        return None if text.lower() == "none" else kind(text)

    convert.__name__ = kind.__name__
    return convert


def require_positive(cfg, *names: str) -> None:
    """Raise UserError for the first of these fields that is not above 0."""
    for name in names:
        value = getattr(cfg, name)
        if not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be above 0")


def require_not_negative(cfg, *names: str) -> None:
    """Raise UserError for the first of these fields that is below 0."""
    for name in names:
        value = getattr(cfg, name)
        if not 0 <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {value}; give 0 or more")


def require_share(cfg, *names: str) -> None:
    """Raise UserError for the first of these fields that is not a share of the whole."""
    for name in names:
        value = getattr(cfg, name)
        if not 0 <= value <= 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it is a share, from 0 to 1")


# ---- run -----------------------------------------------------------------------------------------
def run(main, Config, preset=None, options=None) -> None:
    """Run a script: parse, then main(cfg).

    A UserError or an OSError is one line and exit code 2. Every other exception is a bug and keeps
    its traceback.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal without UTF-8 is no reason to die
        stream.reconfigure(errors="backslashreplace")
    try:
        main(parse(Config, preset=preset, options=options))
    except KeyboardInterrupt:
        what_now = "; checkpoints on disk are whole: --resume goes on from the newest"
        give_up(f"stopped at once{what_now if hasattr(Config, 'resume') else ''}", 130)
    except (UserError, OSError) as error:
        give_up(f"error: {str(error).splitlines()[0]}", 2)
    except RuntimeError as error:
        first_line = str(error).splitlines()[0][:120]
        lost = re.search(r"(?i)gloo|nccl|connection|peer|socket", first_line)
        if ranks.world() == 1 or not lost:
            raise
        give_up(
            f"error: process {ranks.rank()} lost another one ({first_line}); its last message "
            "is above. --resume goes on from the newest checkpoint",
            1,
        )
    ranks.stop()


def give_up(message: str, code: int) -> None:
    """One line on stderr, and the end. All ranks make the same mistake; rank 0 prints it, and
    another rank only if it is still there a while later."""
    sys.stdout.flush()
    if ranks.rank():
        time.sleep(5)
    print(f"\n{message}", file=sys.stderr, flush=True)
    if ranks.world() > 1:
        os._exit(code)  # waits for no thread of a broken group
    sys.exit(code)


def again() -> str:
    """The command that goes on with this run."""
    given = [word for word in sys.argv if word not in ("--resume", "--overwrite")]
    start = ["python"]
    if ranks.world() > 1:
        start = ["torchrun", f"--nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', 1)}"]
    return shlex.join([*start, *given, "--resume"])
