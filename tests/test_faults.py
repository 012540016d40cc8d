"""What goes wrong on real machines: kills, dead processes, full disks, exploding runs. Nothing
saved is lost.

    python -m pytest -q tests/test_faults.py     two kills per script, under a minute
    python tests/test_faults.py 20               as many kills of sft.py and of rl.py, at random
                                                 moments; a few minutes
"""

import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from small_runs import ENV, ROOT, lines_of, write_coin, write_small_task


# ---- the real commands ---------------------------------------------------------------------------
def command(script: str, flags: str, folder: Path, out: Path, *more) -> list[str]:
    words = [sys.executable, ROOT / script, "--init", folder, "--out", out, *flags.split(), *more]
    return list(map(str, words))


def sft_command(folder: Path, out: Path, *more) -> list[str]:
    data = ["--data", folder / "train.jsonl", "--val", folder / "val.jsonl"]
    flags = "--steps 12 --batch 8 --max-len 256 --lr 1e-3 --eval-every 4 --save-every 1"
    return command("sft.py", flags, folder, out, *data, *more)


def rl_command(folder: Path, out: Path, *more) -> list[str]:
    data = ["--data", folder / "mixed.jsonl", "--val", folder / "eval.jsonl"]
    flags = "--steps 8 --prompts 4 --update-prompts 2 --group 4 --max-new 24 --temperature 1"
    flags += " --lr 1e-3 --eval-every 3 --save-every 1"
    return command("rl.py", flags, folder, out, *data, *more)


def run_to_end(words: list[str]) -> float:
    """Seconds that it took; its output is shown if it failed."""
    began = time.monotonic()
    done = subprocess.run(words, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return time.monotonic() - began


def fails(words: list[str]) -> subprocess.CompletedProcess:
    """Run a command that is to end with code 2 and one line."""
    done = subprocess.run(words, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def checkpoints(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").iterdir())


# ---- kills ---------------------------------------------------------------------------------------
def kill_and_resume(make_command, folder: Path, whole: Path, cut: Path, moments: list) -> None:
    """Kill a run at these moments (seconds from its start, or from its resumption), finish it, and
    compare it with the whole one."""
    for moment in moments:
        more = ["--resume"] if cut.exists() else []
        words = make_command(folder, cut, *more)
        process = subprocess.Popen(words, env=ENV, stdout=subprocess.DEVNULL)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
    run_to_end(make_command(folder, cut, "--resume"))
    assert lines_of(cut) == lines_of(whole)
    newest = checkpoints(whole)[-1].name
    for name in ("model.safetensors", "trainer/state-00000-of-00001.safetensors"):
        expected = load_file(whole / "checkpoints" / newest / name)
        found = load_file(cut / "checkpoints" / newest / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("make_command", [sft_command, rl_command])
def test_a_run_killed_at_random_moments_ends_with_the_bits_and_lines_of_one_that_was_not(
    coin, small_task, tmp_path, make_command
):
    folder = small_task if make_command is sft_command else coin
    whole = tmp_path / "whole"
    seconds = run_to_end(make_command(folder, whole))
    draw = random.Random(time.time_ns())
    moments = [seconds * draw.uniform(0.6, 0.9), seconds * draw.uniform(0.5, 0.8)]
    kill_and_resume(make_command, folder, whole, tmp_path / "cut", moments)


# ---- several processes ---------------------------------------------------------------------------
def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start_group(words: list[str], world: int) -> list[subprocess.Popen]:
    """The command as torchrun starts it."""
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    group = []
    for rank in range(world):
        env = {**ENV, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = subprocess.Popen(
            words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        group.append(process)
    return group


def wait_for(condition, group: list[subprocess.Popen], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert all(process.poll() is None for process in group), "a process ended by itself"
        assert time.monotonic() < end, f"nothing happened for {seconds} s"
        time.sleep(0.1)


def test_when_a_process_dies_the_others_say_so_and_end_at_once(small_task, tmp_path):
    out = tmp_path / "r"
    more = ["--steps", "5000", "--eval-every", "5000", "--save-every", "0"]
    group = start_group(sft_command(small_task, out, *more), 2)

    def is_training():
        return (out / "metrics.jsonl").exists() and len(lines_of(out)) > 3

    try:
        wait_for(is_training, group)
        group[1].send_signal(signal.SIGKILL)
        _, errors = group[0].communicate(timeout=60)
    finally:
        for process in group:
            process.kill()
            process.wait()
    assert group[0].returncode == 1
    assert "lost another one" in errors
    assert "--resume" in errors
    assert "Traceback" not in errors


def test_a_mistake_of_several_processes_is_printed_once_and_ends_them_all(small_task, tmp_path):
    (tmp_path / "file").write_text("")
    group = start_group(sft_command(small_task, tmp_path), 2)
    try:
        errors = [process.communicate(timeout=120)[1] for process in group]
    finally:
        for process in group:
            process.kill()
            process.wait()
    assert [process.returncode for process in group] == [2, 2]
    assert "--overwrite" in errors[0]
    assert all("Traceback" not in text for text in errors)


def test_a_bug_in_one_process_keeps_its_traceback_and_ends_the_others(coin, tmp_path):
    (tmp_path / "bug.py").write_text(
        "import os\ndef reward(response, row):\n    return 1 / (1 - int(os.environ['RANK']))\n"
    )
    words = rl_command(coin, tmp_path / "r", "--reward", f"{tmp_path}/bug.py:reward")
    group = start_group(words, 2)
    try:
        errors = [process.communicate(timeout=120)[1] for process in group]
    finally:
        for process in group:
            process.kill()
            process.wait()
    assert "ZeroDivisionError" in errors[1]
    assert "Traceback" in errors[1]
    assert group[1].returncode != 0
    assert group[0].returncode == 1
    assert "lost another one" in errors[0]


# ---- disks and numbers ---------------------------------------------------------------------------
def test_a_full_disk_ends_the_run_in_one_line_and_leaves_whole_checkpoints(small_task, tmp_path):
    out = tmp_path / "r"
    run_to_end(sft_command(small_task, out, "--steps", "4"))
    largest = max(path.stat().st_size for path in out.rglob("*") if path.is_file())
    # Files may not grow so far: that is what a full disk does to a write
    shell = f'ulimit -f {largest // 1024 - 2}; exec "$@"'
    words = sft_command(small_task, out, "--resume", "--steps", "6")
    done = fails(["bash", "-c", shell, "bash", *words])
    assert "could not save" in done.stderr
    assert "free some space" in done.stderr
    assert not list((out / "checkpoints").glob("*.tmp"))
    run_to_end(words)
    steps = [json.loads((p / "trainer.json").read_text())["step"] for p in checkpoints(out)]
    assert steps == [0, 1, 2, 3, 4, 5, 6]


def test_a_run_that_explodes_stops_by_itself_with_its_last_good_checkpoint(small_task, tmp_path):
    out = tmp_path / "r"
    more = ["--lr", "1e30", "--clip", "1e30", "--warmup", "0"]
    done = fails(sft_command(small_task, out, *more))
    assert "5 updates in a row" in done.stderr
    assert "lower --lr" in done.stderr
    assert "update skipped (5 in a row)" in done.stdout
    weights = load_file(checkpoints(out)[-1] / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_a_real_sigterm_saves_and_the_run_goes_on_to_the_same_bits(small_task, tmp_path):
    whole = tmp_path / "whole"
    cut = tmp_path / "cut"
    longer = ("--save-every", "0", "--steps", "100")  # a run cannot end before it is interrupted
    run_to_end(sft_command(small_task, whole, *longer))
    words = sft_command(small_task, cut, *longer)
    process = subprocess.Popen(words, env=ENV, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step     2/"):
            process.send_signal(signal.SIGTERM)
            break
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "stopped and saved. Go on with: python" in printed
    run_to_end([*words, "--resume"])
    expected = load_file(checkpoints(whole)[-1] / "model.safetensors")
    found = load_file(checkpoints(cut)[-1] / "model.safetensors")
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def main(kills: int) -> None:
    """Kill both scripts so often, at moments spread over their whole length, and print what came
    of it."""
    root = Path(tempfile.mkdtemp())
    task = root / "task"
    coin = root / "coin"
    task.mkdir()
    coin.mkdir()
    write_small_task(task)
    write_coin(coin, task)
    for make_command, folder in ((sft_command, task), (rl_command, coin)):
        out = root / make_command.__name__
        seconds = run_to_end(make_command(folder, out / "whole"))
        moments = [seconds * random.uniform(0.3, 0.95) for _ in range(kills)]
        kill_and_resume(make_command, folder, out / "whole", out / "cut", moments)
        print(
            f"{make_command.__name__}: killed {kills} times in runs of {seconds:.1f} s; "
            "same bits, same metrics.jsonl",
            flush=True,
        )


if __name__ == "__main__":
    main(int(sys.argv[1]))
