"""Models and data by name, from a cache folder laid by hand and without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")
ROOT = Path(__file__).resolve().parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MAIN = {
    "main/train-00000-of-00002.jsonl": [{"question": "1+1?", "answer": "#### 2"}],
    "main/train-00001-of-00002.jsonl": [{"question": "1+2?", "answer": "#### 3"}],
    "main/train_extra.jsonl": [{"question": "no part of the split", "answer": "0"}],
    "main/test-00000-of-00001.jsonl": [{"question": "1+3?", "answer": "#### 4"}],
    "data/dev.jsonl": [{"question": "1+4?", "answer": "#### 5"}],
}


def lay(cache: Path, repo: str, files: dict, revision: str = "main") -> Path:
    """The folder of a repository as huggingface_hub leaves it behind a download."""
    folder = cache / repo
    ref = folder / "refs" / revision
    ref.parent.mkdir(parents=True)
    ref.write_text(COMMIT)
    for name, rows in files.items():
        path = folder / "snapshots" / COMMIT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "snapshots" / COMMIT


def offline(code: str, *arguments: str, cache: Path, cwd: Path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment |= {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


def questions(name: str, cache: Path, cwd: Path) -> list[str]:
    code = "import sys, json; from core import rows; print(json.dumps(rows.read_rows(sys.argv[1])))"
    done = offline(code, name, cache=cache, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return [row["question"] for row in json.loads(done.stdout)]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("openai/gsm8k:main/train", ["1+1?", "1+2?"]),
        ("openai/gsm8k:main/test", ["1+3?"]),
        ("openai/gsm8k:dev", ["1+4?"]),
        ("openai/gsm8k:main/train-00001-of-00002.jsonl", ["1+2?"]),
    ],
)
def test_a_split_is_read_from_the_cache_without_a_network(name, expected, tmp_path):
    lay(tmp_path / "cache", "datasets--openai--gsm8k", MAIN)
    assert questions(name, tmp_path / "cache", tmp_path) == expected


def test_a_name_that_is_also_a_path_is_the_path(tmp_path):
    lay(tmp_path / "cache", "datasets--openai--gsm8k", MAIN)
    (tmp_path / "openai").mkdir()
    (tmp_path / "openai" / "gsm8k:dev").write_text('{"question": "mine?"}\n')
    assert questions("openai/gsm8k:dev", tmp_path / "cache", tmp_path) == ["mine?"]


def test_parquet_that_the_hub_made_of_other_files_is_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    folder = "datasets--a--b"
    snapshot = lay(tmp_path / "cache", folder, {"default/train/x": []}, "refs/convert/parquet")
    rows = pyarrow.Table.from_pylist([{"question": "1+5?", "answer": "6"}])
    pyarrow.parquet.write_table(rows, snapshot / "default" / "train" / "0000.parquet")
    assert questions("a/b:default/train", tmp_path / "cache", tmp_path) == ["1+5?"]


@pytest.mark.parametrize("name", ["openai/gsm8k:main/validation", "nobody/nothing:train"])
def test_data_that_is_nowhere_is_refused_in_one_line_with_what_to_give(name, tmp_path):
    lay(tmp_path / "cache", "datasets--openai--gsm8k", MAIN)
    code = (
        "from core import rows\nfrom core.errors import UserError\n"
        f"try:\n    rows.read_rows({name!r})\nexcept UserError as error:\n    print(error)"
    )
    done = offline(code, cache=tmp_path / "cache", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{name}: no such file here")
    assert "OWNER/NAME:CONFIG/SPLIT" in line


def test_a_model_is_found_in_the_cache_by_its_name(tmp_path):
    snapshot = lay(tmp_path / "cache", "models--tiny--model", {"config.json": [{}]})
    code = "from core import hub; print(hub.model_folder('tiny/model', weights=True))"
    done = offline(code, cache=tmp_path / "cache", cwd=tmp_path)
    assert done.stdout.strip() == str(snapshot), done.stderr
