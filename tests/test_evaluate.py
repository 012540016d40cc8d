"""evaluate.py's command line: a Ctrl-C keeps what has ended, top-k reaches the sampler."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import data
import evaluate

SCRIPT = Path(evaluate.__file__)


def test_ctrl_c_writes_the_finished_responses_and_counts_them(small_task, tmp_path):
    out = tmp_path / "eval.jsonl"
    command = [
        sys.executable,
        SCRIPT,
        "--init",
        small_task,
        "--data",
        small_task,
        "--n",
        "200",
        "--rows",
        "2",
        "--temperature",
        "1",
        "--out",
        out,
    ]
    process = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert (
        "the built-in task, with --data" in process.stdout.readline()
        and "20 problems" in process.stdout.readline()
    )
    time.sleep(3)  # 4,000 responses take minutes
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    kept = int(re.search(r"stopped with (\d+) of 4000 responses; they are in", errors)[1])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert 0 < kept == len(rows) < 4000 and set(rows[0]) >= {
        "problem",
        "response",
        "correct",
        "length",
    }


def test_the_likeliest_token_alone_is_greedy(small):
    model, tokenizer, folder = small
    problems, _ = data.problems(str(folder / "test.jsonl"), tokenizer, 256)
    cut, greedy = (
        evaluate.evaluate(model, tokenizer, problems[:4], 1, *how)[1]
        for how in ((1.0, 12, 0, 8, 1.0, None, 1), (0.0, 12))
    )
    assert [r["response"] for r in cut] == [r["response"] for r in greedy]
