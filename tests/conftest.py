"""Fixtures: the project's files on the path, one thread, and tiny problems with a model.

One thread, because two busy OpenMP threads on shared cores run 10 to 20 times slower.
"""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch  # after OMP_NUM_THREADS, which it reads once

torch.set_num_threads(1)

import small_runs


@pytest.fixture(autouse=True)
def signals_as_before():
    """A training loop leaves its handlers behind; they would swallow the Ctrl-C of whoever runs
    the tests."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def small_task(tmp_path_factory):
    """The folder of small_runs.write_small_task; nobody writes into it."""
    return small_runs.write_small_task(tmp_path_factory.mktemp("task"))


@pytest.fixture()
def small(small_task):
    """(model, tokenizer, folder) of small_task."""
    import data
    import model

    return model.load_model(small_task), data.Tokenizer(small_task), small_task


@pytest.fixture(scope="session")
def coin(small_task, tmp_path_factory):
    """The folder of small_runs.write_coin; nobody writes into it."""
    return small_runs.write_coin(tmp_path_factory.mktemp("coin"), small_task)
