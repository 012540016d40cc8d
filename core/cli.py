"""A script's command line: one flat dataclass whose fields are the flags."""

import argparse
import dataclasses
import inspect
import os
import re
import sys
import time
import types
import typing

from core import ranks
from core.errors import UserError


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(
            f"{message}; --help lists the flags"
        )  # argparse would print two screens of usage above it


def parse(Config, argv: list[str] | None = None, preset=None, options=None):
    """A dataclass as command line: `save_every: int = 0  # text` becomes `--save-every INT  text`; bool: --x, --no-x.

    preset(given: dict) -> dict of values that replace defaults (never what the user typed); used for the built-in task.
    options: a second dataclass whose fields are flags too; those that were typed go into Config.options as a dict.
    Config.refused: {"--flag": why it does not exist}, for flags that users of other trainers will try.
    """
    parser = Parser(
        description=inspect.getdoc(sys.modules[Config.__module__]),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_flags(parser, Config)
    if options:
        _add_flags(
            parser.add_argument_group(
                "options of the objective (losses.py; the default is --algo's)"
            ),
            options,
        )
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        why = getattr(Config, "refused", {}).get(unknown[0], "--help lists the flags there are")
        raise UserError(f"{unknown[0]}: no such flag; {why}")
    given = vars(known)
    extra = (
        {f.name: given.pop(f.name) for f in dataclasses.fields(options) if f.name in given}
        if options
        else {}
    )
    values = (
        preset(given) if preset else {}
    )  # may take a flag out of `given` that it has understood
    if "data" in values and not int(os.environ.get("RANK", 0)):
        chosen = [
            "--"
            + "no-" * (value is False)
            + name.replace("_", "-")
            + f" {value}" * (value is not False)
            for name, value in values.items()
            if name not in given
        ]
        print(f"the built-in task, with {' '.join(chosen)}", flush=True)
    values |= given
    return Config(**values, options=extra) if options else Config(**values)


def _add_flags(parser, Config) -> None:
    source = "".join(
        inspect.getsource(each) for each in Config.__mro__ if dataclasses.is_dataclass(each)
    )
    comments = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", source, re.M))
    hints = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        kind, options = hints[field.name], {}
        if kind is dict:
            continue
        if isinstance(kind, types.UnionType):  # X | None
            inner = next(k for k in kind.__args__ if k is not type(None))
            kind = _or_none(inner)
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is typing.Literal:
            options["choices"] = list(kind.__args__)
        else:
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        text = f"{comments.get(field.name, '')} (default: {field.default!r})".replace("%", "%%")
        parser.add_argument(
            "--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **options
        )


def _or_none(kind):
    """A converter that also takes the word none."""

    def convert(text):
        return None if text.lower() == "none" else kind(text)

    convert.__name__ = kind.__name__
    return convert


def cli(main, Config, preset=None, options=None) -> None:
    """Run a script: parse, then main(cfg).

    A UserError or an OSError is one line and exit code 2. Every other exception is a bug and keeps
    its traceback.
    """
    try:
        main(parse(Config, preset=preset, options=options))
    except KeyboardInterrupt:
        what_now = "; checkpoints on disk are whole: --resume goes on from the newest"
        _give_up(f"stopped at once{what_now if hasattr(Config, 'resume') else ''}", 130)
    except (UserError, OSError) as error:
        _give_up(f"error: {str(error).splitlines()[0]}", 2)
    except RuntimeError as error:  # gloo's and NCCL's word for it
        if ranks.world() == 1 or not re.search(r"(?i)gloo|nccl|connection|peer|socket", str(error)):
            raise
        _give_up(
            f"error: process {ranks.rank()} lost another one ({str(error).splitlines()[0][:120]}); what that one "
            "said last is above. --resume goes on from the newest checkpoint",
            1,
        )
    ranks.stop()


def _give_up(message: str, code: int) -> None:
    """One line on stderr, and the end. All processes make the same mistake; the first one says it, and another only if
    it is the only one left a while later."""
    sys.stdout.flush()
    if ranks.rank():
        time.sleep(5)
    print(f"\n{message}", file=sys.stderr, flush=True)
    os._exit(code) if ranks.world() > 1 else sys.exit(
        code
    )  # an exit that waits for no thread of a broken group


def require_positive(cfg, *names: str) -> None:
    """Raise ValueError for the first of these fields that is not above 0."""
    for name in names:
        if getattr(cfg, name) <= 0:
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(cfg, name)}; it must be above 0"
            )
