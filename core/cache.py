"""Tokenized rows on disk: written once, then read by their number, so that no process holds them.

    rows, told = cache.keep(folder, facts, examples, tell)    written if not there yet, then opened
    rows[7]                 Example(prompt ids, response ids)
    rows.pick(places)       some of them, in this order

    runs/sft/cache/train/ids.bin     ids of all rows, one after the other (uint16, or int32 where
                                     the vocabulary is larger)
    runs/sft/cache/train/rows.bin    an ENTRY per row
    runs/sft/cache/train/about.json  facts: what the rows were made from; told: notes on them; sizes

Written as train.tmp, flushed to disk and renamed: a folder without .tmp is whole. Where facts or
file sizes differ, the rows are written again; a row whose checksum differs is refused.
Ids are read by position, not mapped: mapped pages count as memory of each process that touched
them, and a file that is cut short would kill the process instead of being refused.
"""

import copy
import errno
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core import ranks
from core.errors import UserError
from core.files import write_json
from core.run import lock

ENTRY = np.dtype(
    [
        ("start", "<i8"),  # its first id, counted from the first of all
        ("n_ids", "<i4"),
        ("n_prompt", "<i4"),
        ("checksum", "<u4"),
        ("prompt_key", "<u8"),  # the same for rows with the same prompt
    ]
)


class Example(NamedTuple):
    """One training row: `prompt` is read, `response` is trained; its last id is EOS."""

    prompt: Sequence[int]
    response: Sequence[int]


def prompt_key(row) -> int:
    """64 bits of a hash of the prompt; plain text has no prompt, so all of it is hashed."""
    ids = row.prompt
    if isinstance(row, Example) and len(row.prompt) == 1:  # plain text
        ids = [*row.prompt, *row.response]
    digest = hashlib.blake2b(array("i", ids).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class Rows(Sequence):
    """Rows of a cache, each read from its file when it is asked for."""

    def __init__(self, folder: Path, typecode: str):
        """typecode: of array.array, "H" or "i"."""
        self._ids = open(folder / "ids.bin", "rb", buffering=0)
        self._entries = np.asarray(np.memmap(folder / "rows.bin", ENTRY, mode="r"))
        self._typecode = typecode
        self._places = np.arange(len(self._entries), dtype=np.int32)

    def pick(self, places) -> "Rows":
        """The rows at these places."""
        picked = copy.copy(self)
        picked._places = self._places[places]
        return picked

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, prompt and response."""
        return self._entries["n_ids"][self._places]

    @property
    def n_bytes(self) -> int:
        """The size of the files, which hold the rows that pick() left out, too."""
        return os.fstat(self._ids.fileno()).st_size + self._entries.nbytes

    @property
    def prompt_keys(self) -> np.ndarray:
        return self._entries["prompt_key"][self._places]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[n] for n in range(*i.indices(len(self)))]
        start, n_ids, n_prompt, checksum, _ = self._entries[self._places[i]].item()
        ids = array(self._typecode)
        raw = os.pread(self._ids.fileno(), n_ids * ids.itemsize, start * ids.itemsize)
        if zlib.crc32(raw) != checksum:
            folder = Path(self._ids.name).parent
            raise UserError(f"{folder}: a row is damaged; delete this folder and start again")
        ids.frombytes(raw)
        return Example(ids[:n_prompt], ids[n_prompt:])


def keep(folder: Path | None, facts: dict, examples: Iterator, tell: Callable) -> tuple[Rows, dict]:
    """(rows, what tell() returned). Where `folder` is missing, damaged or made from other facts,
    rank 0 writes it first, while the other ranks wait.

    folder: None = temporary files of this process. facts: everything that decides the ids, as JSON,
    and their typecode. examples: (Example, prompt key) of each row, read only to write them. tell:
    called after the last example; returns notes for the user, as JSON.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "rows"
            _write(folder, facts, examples, tell)
            return _open(folder, facts)

    def write_if_needed():
        if _open(folder, facts) is None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with lock(folder.parent):  # a process that is killed releases it, too
                _write(folder, facts, examples, tell)

    ranks.from_first(write_if_needed)
    found = _open(folder, facts)
    if found is None:
        raise UserError(
            f"{folder}: not the rows that rank 0 wrote; --out must be seen by all nodes"
        )
    return found


def _open(folder: Path, facts: dict) -> tuple[Rows, dict] | None:
    """The rows and the notes on them; None where they are damaged or made from other facts."""
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in about["sizes"]}
        if about["facts"] != facts or about["sizes"] != sizes:
            return None
        rows = Rows(folder, facts["typecode"])
        if zlib.crc32(rows._entries) != about["checksum"]:
            return None
        return rows, about["told"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(folder: Path, facts: dict, examples: Iterator, tell: Callable) -> None:
    """Write the rows to `folder`, whole or not at all."""
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)  # left by a process that was killed
    aside.mkdir()
    try:
        about = {"facts": facts, "checksum": 0, "sizes": {}}
        with open(aside / "ids.bin", "wb") as ids, open(aside / "rows.bin", "wb") as entries:
            for raw, entry in _encoded(examples, facts["typecode"]):
                ids.write(raw)
                entries.write(entry)
                about["checksum"] = zlib.crc32(entry, about["checksum"])
            for file in (ids, entries):
                file.flush()
                os.fsync(file.fileno())
                about["sizes"][Path(file.name).name] = file.tell()
        write_json(aside / "about.json", {**about, "told": tell()})
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            f"could not keep the tokenized rows in {folder} ({error.strerror}); free some space, "
            "or pick another --out (a dry run: another TMPDIR)"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _encoded(examples: Iterator, typecode: str) -> Iterator[tuple[bytes, bytes]]:
    """Ids and ENTRY of each row, in bytes."""
    start = 0
    for (prompt, response), prompt_key in examples:
        ids = array(typecode, [*prompt, *response])
        raw = ids.tobytes()
        entry = np.array((start, len(ids), len(prompt), zlib.crc32(raw), prompt_key), ENTRY)
        yield raw, entry.tobytes()
        start += len(ids)
