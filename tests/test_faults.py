"""What goes wrong on real machines: kills, dead processes, full disks, exploding runs. Nothing saved is lost.

python -m pytest -q tests/test_faults.py     two kills a script, under a minute
python tests/test_faults.py 20               as many kills of sft.py and of rl.py, at random moments; a few minutes
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from test_pipeline import coin, lines_of, task  # noqa: E402, F401  fixtures

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def sft_command(folder, out, *more) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "sft.py"),
        "--init",
        folder,
        "--data",
        f"{folder}/train.jsonl",
        "--val",
        f"{folder}/val.jsonl",
        "--out",
        out,
        "--steps",
        "12",
        "--batch",
        "8",
        "--max-len",
        "256",
        "--lr",
        "1e-3",
        "--eval-every",
        "4",
        "--save-every",
        "1",
        *more,
    ]


def rl_command(folder, out, *more) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "rl.py"),
        "--init",
        folder,
        "--data",
        f"{folder}/mixed.jsonl",
        "--val",
        f"{folder}/eval.jsonl",
        "--out",
        out,
        "--steps",
        "8",
        "--prompts",
        "4",
        "--update-prompts",
        "2",
        "--group",
        "4",
        "--max-new",
        "24",
        "--temperature",
        "1",
        "--lr",
        "1e-3",
        "--eval-every",
        "3",
        "--save-every",
        "1",
        *more,
    ]


def run_to_end(command: list) -> float:
    """Seconds that it took; its output is shown if it failed."""
    began = time.monotonic()
    done = subprocess.run(list(map(str, command)), env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return time.monotonic() - began


def kill_and_resume(command, folder, whole: Path, cut: Path, moments) -> None:
    """Kill a run at these moments (seconds from its start, or from its resumption), finish it, and compare."""
    for moment in moments:
        more = ["--resume"] if cut.exists() else []
        process = subprocess.Popen(
            list(map(str, command(folder, cut, *more))), env=ENV, stdout=subprocess.DEVNULL
        )
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
    run_to_end(command(folder, cut, "--resume"))
    newest = sorted((whole / "checkpoints").iterdir())[-1].name
    assert lines_of(cut) == lines_of(whole)
    for name in (
        f"checkpoints/{newest}/model.safetensors",
        f"checkpoints/{newest}/trainer/state-00000-of-00001.safetensors",
    ):
        expected, found = load_file(whole / name), load_file(cut / name)
        assert expected.keys() == found.keys() and all(
            torch.equal(expected[k], found[k]) for k in expected
        )


@pytest.mark.parametrize("command", [sft_command, rl_command])
def test_a_run_killed_at_random_moments_ends_with_the_bits_and_lines_of_one_that_was_not(
    coin, task, tmp_path, command
):  # noqa: F811
    folder = task if command is sft_command else coin
    seconds = run_to_end(command(folder, tmp_path / "whole"))
    draw = random.Random(time.time_ns())
    kill_and_resume(
        command,
        folder,
        tmp_path / "whole",
        tmp_path / "cut",
        [seconds * draw.uniform(0.6, 0.9), seconds * draw.uniform(0.5, 0.8)],
    )


def test_when_a_process_dies_the_others_say_so_and_end_at_once(task, tmp_path):  # noqa: F811
    command = sft_command(
        task, tmp_path / "r", "--steps", "5000", "--eval-every", "5000", "--save-every", "0"
    )
    group = [
        subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **ENV,
                "WORLD_SIZE": "2",
                "RANK": str(n),
                "LOCAL_RANK": str(n),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(20000 + os.getpid() % 20000),
            },
        )
        for n in range(2)
    ]
    try:
        wait_for(
            lambda: (
                (tmp_path / "r" / "metrics.jsonl").exists() and len(lines_of(tmp_path / "r")) > 3
            ),
            group,
        )
        group[1].send_signal(signal.SIGKILL)
        _, errors = group[0].communicate(timeout=60)
    finally:
        for process in group:
            process.kill()
            process.wait()
    assert (
        group[0].returncode == 1
        and "lost another one" in errors
        and "--resume" in errors
        and "Traceback" not in errors
    )


def wait_for(condition, group) -> None:
    for _ in range(600):
        if condition():
            return
        assert all(process.poll() is None for process in group), "a process ended by itself"
        time.sleep(0.1)
    raise AssertionError("nothing happened for a minute")


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_whole_checkpoints(task, tmp_path):  # noqa: F811
    run_to_end(sft_command(task, tmp_path / "r", "--steps", "4"))
    largest = max(f.stat().st_size for f in (tmp_path / "r").rglob("*") if f.is_file())
    shell = f'ulimit -f {largest // 1024 - 2}; exec "$@"'  # files may not grow so far: what a full disk does to a write
    command = sft_command(task, tmp_path / "r", "--resume", "--steps", "6")
    done = subprocess.run(
        ["bash", "-c", shell, "bash", *map(str, command)], env=ENV, capture_output=True, text=True
    )
    assert (
        done.returncode == 2
        and "could not save" in done.stderr
        and "free some space" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert not list((tmp_path / "r" / "checkpoints").glob("*.tmp"))
    run_to_end(sft_command(task, tmp_path / "r", "--resume", "--steps", "6"))
    steps = [
        json.loads((f / "trainer.json").read_text())["step"]
        for f in sorted((tmp_path / "r" / "checkpoints").iterdir())
    ]
    assert steps == [0, 1, 2, 3, 4, 5, 6]


def test_a_run_that_explodes_stops_by_itself_with_its_last_good_checkpoint(task, tmp_path):  # noqa: F811
    command = sft_command(task, tmp_path / "r", "--lr", "1e30", "--clip", "1e30", "--warmup", "0")
    done = subprocess.run(list(map(str, command)), env=ENV, capture_output=True, text=True)
    assert (
        done.returncode == 2 and "5 updates in a row" in done.stderr and "lower --lr" in done.stderr
    )
    assert "update skipped (5 in a row)" in done.stdout
    newest = sorted((tmp_path / "r" / "checkpoints").iterdir())[-1]
    assert all(torch.isfinite(w).all() for w in load_file(newest / "model.safetensors").values())


def main(kills: int) -> None:
    """Kill both scripts so often, at moments spread over their whole length, and print what came of it."""
    import tempfile

    from conftest import write_small_task
    from test_pipeline import write_coin

    root = Path(tempfile.mkdtemp())
    (root / "task").mkdir(), (root / "coin").mkdir()
    folders = [write_small_task(root / "task"), write_coin(root / "coin", root / "task")]
    for command, folder in zip((sft_command, rl_command), folders):
        out = root / command.__name__
        seconds = run_to_end(command(folder, out / "whole"))
        moments = [seconds * random.uniform(0.3, 0.95) for _ in range(kills)]
        kill_and_resume(command, folder, out / "whole", out / "cut", moments)
        print(
            f"{command.__name__}: killed {kills} times in runs of {seconds:.1f} s; same bits, same metrics.jsonl",
            flush=True,
        )


if __name__ == "__main__":
    main(int(sys.argv[1]))
