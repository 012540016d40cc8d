"""JSON files: written whole or not at all, read with the place of what is wrong."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from core.errors import UserError


def write_aside(path: Path, text: str) -> None:
    """Write beside the place, then rename: a file that is there is whole."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    aside.rename(path)


def write_json(path: Path, value) -> None:
    write_aside(path, json.dumps(value, indent=2, default=str) + "\n")


def identity(path: Path) -> list:
    """[path, size, time of the last change]: known without reading a file of many GB."""
    found = path.resolve()
    about = found.stat()
    return [str(found), about.st_size, about.st_mtime_ns]


def fingerprint(paths: Iterable) -> str:
    """A hash of what is in these files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:16]


def read_jsonl(path: Path, broken_tail: bool = False, make_object=None) -> Iterator[dict]:
    """Rows of a JSONL file, one at a time: a million trajectories may not fit in memory.

    broken_tail: a last line that was cut short by a kill is passed over, not refused.
    make_object: makes a JSON object of its (key, value) pairs; raises ValueError to refuse it.
    """
    with open(path, "rb") as lines:  # in bytes, lines end at \\n alone: U+2028 may be in a string
        for n, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(
                    line.decode("utf-8-sig" if n == 1 else "utf-8"), object_pairs_hook=make_object
                )
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}:{n}: not UTF-8 text (byte {error.start} of the line); "
                    "save the file as UTF-8"
                ) from None
            except json.JSONDecodeError as error:
                if broken_tail and not any(rest.strip() for rest in lines):
                    break
                raise UserError(
                    f"{path}:{n}: not JSON ({error.msg} at column {error.colno}); "
                    "each line must be one JSON object"
                ) from None
            except (
                ValueError,
                RecursionError,
            ) as error:  # make_object's, or a number of thousands of digits
                raise UserError(f"{path}:{n}: {error}") from None
