"""Several processes of one group, as torchrun starts them, for tests. None of them can hang a test.

A process that fails or dies ends the others at once, and a deadline ends them all; the test then
fails with what each of them said last. Before the deadline every process writes down where it is.
"""

import faulthandler
import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path

import torch

DEADLINE = 240  # seconds; the slowest of these tests takes 30 on a busy machine


def run_in(world: int, folder: Path, work, *args, deadline: float = DEADLINE) -> None:
    """work(*args) in `world` processes of one group. folder: for the group's store and reports."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / f"store {world} {time.monotonic_ns()}"
    context = multiprocessing.get_context("spawn")
    group = []
    for rank in range(world):
        report = folder / f"report {world} {rank}"
        given = (rank, world, store, report, time.time() + deadline, work, args)
        process = context.Process(target=_enter, args=given, daemon=True)
        process.start()
        group.append(process)
    try:
        failure = _wait(group, time.monotonic() + deadline)
    finally:
        for process in group:  # SIGTERM would be remembered, not obeyed, by a training loop
            process.kill()
            process.join(10)
    if failure:
        said = [f"process {n}: {_read(folder / f'report {world} {n}')}" for n in range(world)]
        raise AssertionError("\n".join([failure, *said]))


def _wait(group: list, end: float) -> str:
    """Until all are through ("") or one of them is not going to be (what happened)."""
    # Asked, not waited for: a sentinel stays silent while a process of the child's holds it open
    while True:
        codes = [process.exitcode for process in group]
        if any(codes):
            # One that dies makes the others fail, and may be seen after them
            time.sleep(0.5)
            return _failed(group)
        if None not in codes:
            return ""
        if time.monotonic() > end:
            waiting = [rank for rank, code in enumerate(codes) if code is None]
            return f"processes {waiting} did not end in time"
        time.sleep(0.02)


def _failed(group: list) -> str:
    failed = [(rank, process.exitcode) for rank, process in enumerate(group) if process.exitcode]
    return ", ".join(f"process {rank} ended with code {code}" for rank, code in failed)


def _read(report: Path) -> str:
    text = report.read_text().strip() if report.exists() else ""
    return text or "said nothing"


def _enter(rank: int, world: int, store: Path, report: Path, end: float, work, args) -> None:
    """The life of one process; it ends by os._exit, as scripts do (core/ranks.py, stop)."""
    file = open(report, "w")
    faulthandler.dump_traceback_later(max(1.0, end - time.time() - 5), file=file)
    sys.stdout = sys.stderr = file if rank == 0 else open(os.devnull, "w")
    torch.set_num_threads(1)
    code = 0
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world
        )
        work(*args)
        torch.distributed.destroy_process_group()
    except BaseException:
        traceback.print_exc(file=file)
        code = 1
    file.flush()
    os._exit(code)
