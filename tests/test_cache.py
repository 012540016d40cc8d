"""Tokenized rows on disk: the same ids, whole or not there, read by number."""

import json
import os
import signal
import subprocess
import sys
import time
from array import array
from dataclasses import replace
from pathlib import Path

import pytest
from processes import run_in
from small_runs import ENV, ROOT, lines_of, sft_config, write_jsonl

import data
import sft
from core import cache, packing
from core.errors import UserError

ROWS = [{"prompt": f"Make {n} ->", "response": f"{n} = {n}", "level": n} for n in range(40)]
LONG = {"prompt": "Make 3 ->", "response": "1 + 2 " * 60}
EMPTY = {"prompt": "", "response": "3"}
FILES = {"ids.bin", "rows.bin", "about.json"}


@pytest.fixture()
def path(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", [*ROWS, LONG, EMPTY])


def kept(path, tokenizer, folder, max_len=99, **settings):
    examples, n_long = data.sft_examples(path, tokenizer, max_len, folder=folder, **settings)
    return list(examples), n_long


def times(folder: Path) -> dict:
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


# ---- the same rows
def test_kept_rows_are_those_of_a_file_that_is_read_and_are_written_once(small, path, tmp_path):
    folder = tmp_path / "cache" / "train"
    first = kept(path, small[1], folder)
    written = times(folder)
    assert set(written) == FILES
    assert first == kept(path, small[1], None) == kept(path, small[1], folder)
    assert times(folder) == written
    assert len(first[0]) == 40
    assert first[1] == 1


def test_what_is_said_of_a_file_is_said_at_every_start(small, path, tmp_path, capsys):
    said = []
    for folder in (None, tmp_path / "c" / "train", tmp_path / "c" / "train"):
        kept(path, small[1], folder)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2]
    assert "1 rows with an empty prompt dropped" in said[0]
    assert "columns not used: level" in said[0]


@pytest.mark.parametrize("changed", ["file", "tokenizer", "max_len", "reads", "code"])
def test_rows_of_another_file_tokenizer_setting_or_code_are_made_anew(
    small, path, tmp_path, monkeypatch, changed
):
    folder = tmp_path / "cache" / "train"
    tokenizer = data.Tokenizer(small[2])
    before = kept(path, tokenizer, folder)
    written = times(folder)
    settings = {}
    if changed == "file":
        write_jsonl(Path(path), [*ROWS, LONG])
    elif changed == "tokenizer":
        tokenizer.eos = 1
    elif changed == "code":
        monkeypatch.setattr(data, "CODE", (*data.CODE, __file__))
    else:
        settings = {"max_len": {"max_len": 200}, "reads": {"reads": ["level"]}}[changed]
    after = kept(path, tokenizer, folder, **settings)
    assert times(folder) != written
    assert after == kept(path, tokenizer, None, **settings)
    assert (after != before) == (changed in ("tokenizer", "max_len"))


def test_a_tokenizer_has_the_same_fingerprint_in_every_process(small):
    code = "import sys, data; print(data.Tokenizer(sys.argv[1]).fingerprint())"
    words = [sys.executable, "-c", code, str(small[2])]
    done = subprocess.run(words, env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == small[1].fingerprint(), done.stderr


def test_ids_over_65535_are_kept(tmp_path):
    rows = [(cache.Example([70_000], [1, 2**31 - 1]), 5)]
    found, told = cache.keep(tmp_path / "c" / "t", {"typecode": "i"}, iter(rows), lambda: "told")
    assert found[0] == (array("i", [70_000]), array("i", [1, 2**31 - 1]))
    assert told == "told"


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("text", [False, True])
def test_kept_rows_are_held_out_as_rows_in_memory_are(small, tmp_path, copies, text):
    rows = [{"text": f"{n} + {n % 7}"} for n in range(30)] if text else ROWS
    path = write_jsonl(tmp_path / "rows.jsonl", rows * copies)
    examples, _ = data.sft_examples(path, small[1], 99, folder=tmp_path / "c" / "train")
    train, val = packing.hold_out(examples, 199)
    assert (list(train), list(val)) == packing.hold_out(list(examples), 199)
    assert train.lengths.tolist() == [len(row.prompt) + len(row.response) for row in train]
    assert len(val) == len(rows) // 10
    assert len(train) == copies * (len(rows) - len(val))


# ---- whole or not there
@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("damage", ["cut", "gone", "longer"])
def test_a_damaged_cache_is_written_again(small, path, tmp_path, name, damage):
    folder = tmp_path / "cache" / "train"
    before = kept(path, small[1], folder)
    file = folder / name
    if damage == "gone":
        file.unlink()
    else:
        raw = file.read_bytes()
        file.write_bytes(raw[:-3] if damage == "cut" else raw + b"00")
    assert kept(path, small[1], folder) == before
    assert set(times(folder)) == FILES


def test_a_flipped_bit_is_seen_and_no_wrong_id_is_trained(small, path, tmp_path):
    folder = tmp_path / "cache" / "train"
    before = kept(path, small[1], folder)
    for name, refused in (("rows.bin", False), ("ids.bin", True)):
        raw = bytearray((folder / name).read_bytes())
        raw[33] ^= 4
        (folder / name).write_bytes(raw)
        if refused:
            with pytest.raises(UserError, match="train: a row is damaged; delete this folder"):
                kept(path, small[1], folder)
        else:
            assert kept(path, small[1], folder) == before


@pytest.mark.parametrize("last", [{"promt": "Make 3", "response": "3"}, LONG, EMPTY])
def test_a_file_that_is_refused_leaves_no_cache(small, tmp_path, last):
    path = write_jsonl(tmp_path / "rows.jsonl", [*ROWS, last] if "promt" in last else [last])
    folder = tmp_path / "cache" / "train"
    with pytest.raises(UserError, match="rows.jsonl:41: no prompt|no example left"):
        kept(path, small[1], folder)
    assert not [file for file in folder.parent.iterdir() if file.name != ".lock"]


def command(small_task: Path, rows: str, out: Path) -> list[str]:
    words = [sys.executable, ROOT / "sft.py", "--init", small_task, "--data", rows, "--out", out]
    words += ["--steps", 1, "--batch", 4, "--max-len", 256]
    return list(map(str, words))


@pytest.fixture()
def many(small_task, tmp_path):
    """Rows that take some seconds."""
    return write_jsonl(tmp_path / "many.jsonl", data.read_rows(small_task / "train.jsonl") * 100)


def test_a_kill_while_tokenizing_leaves_no_half_cache_and_the_same_command_works(
    small_task, many, tmp_path
):
    out = tmp_path / "r"
    words = command(small_task, many, out)
    process = subprocess.Popen(words, env=ENV, stdout=subprocess.DEVNULL)
    aside = out / "cache" / "train.tmp" / "ids.bin"
    while not (aside.exists() and aside.stat().st_size):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "cache" / "train").exists()
    assert aside.exists()
    done = subprocess.run(words, env=ENV, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert set(times(out / "cache" / "train")) == FILES
    assert not aside.exists()


def test_a_full_disk_while_tokenizing_is_one_line_and_leaves_no_cache(small_task, many, tmp_path):
    out = tmp_path / "r"
    # Files may not grow so far: that is what a full disk does to a write
    shell = ["bash", "-c", 'ulimit -f 100; exec "$@"', "bash"]
    words = [*shell, *command(small_task, many, out)]
    done = subprocess.run(words, env=ENV, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "could not keep the tokenized rows in" in done.stderr
    assert "free some space" in done.stderr
    assert [file.name for file in (out / "cache").iterdir()] == [".lock"]


# ---- several processes
def _same_rows(path: str, folder: Path, task: Path) -> None:
    """Each rank writes down which rows it sees."""
    examples, n_long = data.sft_examples(path, data.Tokenizer(task), 99, folder=folder / "c" / "t")
    seen = [[list(row.prompt), list(row.response)] for row in examples]
    name = f"seen {packing.ranks.rank()}.json"
    (folder / name).write_text(json.dumps([seen, n_long, times(folder / "c" / "t")]))


def test_the_processes_of_a_run_wait_for_the_writer_and_see_the_same_rows(small, path, tmp_path):
    run_in(2, tmp_path / "group", _same_rows, path, tmp_path, small[2])
    seen = [json.loads((tmp_path / f"seen {rank}.json").read_text()) for rank in (0, 1)]
    assert seen[0] == seen[1]
    examples, n_long = kept(path, small[1], None)
    assert seen[0][:2] == [[[list(p), list(r)] for p, r in examples], n_long]


def _refused(path: str, task: Path, folder: Path) -> None:
    try:
        data.sft_examples(path, data.Tokenizer(task), 99, folder=folder / "c" / "t")
    except UserError as error:
        (folder / f"error {packing.ranks.rank()}").write_text(str(error))


def test_what_the_writer_refuses_ends_all_processes(small, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [*ROWS, {"promt": "x"}])
    run_in(2, tmp_path / "group", _refused, path, small[2], tmp_path)
    errors = [(tmp_path / f"error {rank}").read_text() for rank in (0, 1)]
    assert errors[0] == errors[1]
    assert "rows.jsonl:41: no prompt and response" in errors[0]


def test_a_second_run_in_the_directory_is_refused_while_the_first_writes(small, path, tmp_path):
    code = (
        "import sys; from core import cache; from pathlib import Path\n"
        "def rows():\n"
        "    print('writing', flush=True); sys.stdin.read(); yield cache.Example([1], [2]), 3\n"
        "cache.keep(Path(sys.argv[1]), {'typecode': 'H'}, rows(), dict)"
    )
    folder = tmp_path / "cache" / "train"
    words = [sys.executable, "-c", code, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env=ENV, cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "writing\n"
        with pytest.raises(UserError, match=f"process {process.pid} is writing in it"):
            kept(path, small[1], folder)
        process.communicate("")
    assert process.returncode == 0


def test_reading_all_rows_keeps_none_of_them_in_memory(tmp_path):
    """80 MB of ids, read by a process that then holds less than 8 MB more than before."""
    row = cache.Example([7] * 1000, [8] * 9000)
    rows = ((row, 1) for _ in range(2000))
    facts = {"typecode": "i"}
    cache.keep(tmp_path / "c" / "t", facts, rows, dict)
    code = (
        "import re, sys; from core import cache; from pathlib import Path\n"
        "def held():\n"
        "    return int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "rows, _ = cache.keep(Path(sys.argv[1]), {'typecode': 'i'}, None, None)\n"
        "before = held()\n"
        "n_ids = sum(len(row.prompt) + len(row.response) for row in rows)\n"
        "print(n_ids, held() - before)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "c" / "t")]
    done = subprocess.run(words, env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=200)
    n_ids, grown = map(int, done.stdout.split())
    assert n_ids == 20_000_000
    assert grown < 8_000  # kB


# ---- in a run
def test_a_resumed_run_reads_what_the_first_kept_and_overwrite_makes_it_anew(small_task, tmp_path):
    cfg = sft_config(small_task, tmp_path / "r", steps=3)
    sft.main(cfg)
    written = times(tmp_path / "r" / "cache" / "train")
    first = lines_of(tmp_path / "r")
    sft.main(replace(cfg, resume=True, steps=6))
    assert times(tmp_path / "r" / "cache" / "train") == written
    sft.main(replace(cfg, overwrite=True))
    assert times(tmp_path / "r" / "cache" / "train") != written
    assert lines_of(tmp_path / "r") == first
    assert times(tmp_path / "r" / "cache" / "val")


def test_a_folder_that_is_no_run_gets_no_cache(small_task, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for changes in ({}, {"overwrite": True}):
        with pytest.raises(UserError, match="exists already|is not a run directory"):
            sft.main(sft_config(small_task, tmp_path / "mine", **changes))
    assert os.listdir(tmp_path / "mine") == ["notes.txt"]


def test_a_dry_run_shows_the_same_rows_and_leaves_nothing(small_task, tmp_path, capsys):
    cfg = sft_config(small_task, tmp_path / "r", steps=3)
    sft.main(replace(cfg, dry_run=True))
    dry = capsys.readouterr().out
    assert not (tmp_path / "r").exists()
    sft.main(cfg)
    whole = capsys.readouterr().out
    example = dry[dry.index("first example") : dry.index("<<")]
    assert example in whole
    first = next(line for line in lines_of(tmp_path / "r", "train") if line["step"] == 1)
    assert f"first step: {first['tokens']:,} tokens" in dry
