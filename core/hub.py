"""Models and data by their names on the Hugging Face hub, from its cache where there is no network.

Nothing here runs code of a repository or reads a pickle.
"""

import re
from pathlib import Path

from core.errors import UserError

DATA_NAME = re.compile(r"([\w.-]+/[\w.-]+):([\w.-]+(?:/[\w.-]+)*)")  # OWNER/NAME:CONFIG/SPLIT
CONVERTED = "refs/convert/parquet"  # where the hub keeps Parquet of what was uploaded otherwise


def model_folder(name: str, weights: bool) -> Path:
    """The local folder of a hub model, downloaded if need be.

    weights: False where only the shape and the tokenizer are needed.
    """
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise UserError(
            f"{name}: no such folder; --init takes a model folder, a checkpoint, a run directory "
            "or a hub name such as Qwen/Qwen2.5-0.5B"
        )
    patterns = ["*.json", "*.jinja"]
    if weights:
        patterns.append("*.safetensors")
    try:
        return _snapshot(name, patterns)
    except (OSError, ValueError) as error:  # no network, no such model, no access
        raise UserError(
            f"{name}: no such folder here, and the hub did not give it ({_first_line(error)}); "
            "download it, then --init FOLDER"
        ) from None


def data_files(name: str) -> list[Path]:
    """The .parquet or .jsonl files of OWNER/NAME:SPLIT or OWNER/NAME:CONFIG/SPLIT, in order.

    A repository keeps a split as CONFIG/SPLIT-00000-of-00001.parquet, SPLIT.jsonl, SPLIT/..., with
    or without data/ before it.
    """
    repo, split = DATA_NAME.fullmatch(name).groups()
    patterns = [split]
    for folder in ("", "data/"):
        for mark in "-./":
            for ending in ("parquet", "jsonl"):
                patterns.append(f"{folder}{split}{mark}*{ending}")
    wanted = re.compile(rf"(data/)?{re.escape(split)}([-./].*)?")
    reason = f"it has no .parquet or .jsonl of {split}"
    for revision in (None, CONVERTED):
        try:
            folder = _snapshot(repo, patterns, repo_type="dataset", revision=revision)
        except (OSError, ValueError) as error:  # no network, no such data, no access
            if revision is None:
                reason = _first_line(error)
            continue
        found = []
        for path in sorted(folder.rglob("*")):
            is_data = path.suffix in (".parquet", ".jsonl")
            if is_data and wanted.fullmatch(path.relative_to(folder).as_posix()):
                found.append(path)
        if found:
            return found
    raise UserError(
        f"{name}: no such file here, and the hub did not give it ({reason}); "
        "give OWNER/NAME:CONFIG/SPLIT, or download it and give the file"
    )


def _snapshot(name: str, patterns: list[str], **more) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{name}: the hub needs huggingface_hub; pip install it") from None
    return Path(snapshot_download(name, allow_patterns=patterns, **more))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:160]
