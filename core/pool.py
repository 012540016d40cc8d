"""A pool of processes that call one function, each call within a time limit.

    pool = Pool(tasks.scorer, "my/file.py:reward", workers=4, limit=30.0)
    future = pool.submit(response, row)     begins as soon as a worker is free
    future.result()                         what the function returned, or Lost, or its exception

1) Processes, because only killing its process ends a call that hangs in C. 2) A worker is a new
interpreter: a fork of a process with threads or CUDA may hang, and multiprocessing's spawn would
run the script, and so import torch, in each of them. 3) A thread of this process serves each
worker, one call at a time. It kills a worker whose call is over the limit, with all that it had
started, and starts another. 4) A worker whose pipe closes, because this process has ended, kills
itself in the middle of its call.
"""

import faulthandler
import importlib
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection, Pipe

from core.errors import UserError

TIMED_OUT = "reward timed out"
DIED = "reward died"
LOST = (TIMED_OUT, DIED)
SPARE = 10  # seconds over the limit after which a worker ends by itself, should nobody kill it


class Lost(Exception):
    """A call without an answer; the text is TIMED_OUT or DIED."""


class Failed(Exception):
    """The function raised an exception; the text is its traceback."""


class Pool:
    """Workers that call one function. Each makes it once, at its start, by load(argument)."""

    def __init__(self, load: Callable, argument: str, workers: int, limit: float):
        self._calls = queue.SimpleQueue()  # (future, arguments); None ends a thread
        self._threads = []
        for _ in range(workers):
            worker = Worker(load, argument, limit)
            thread = threading.Thread(target=self._serve, args=(worker,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def submit(self, *arguments) -> Future:
        future = Future()
        self._calls.put((future, arguments))
        return future

    def close(self) -> None:
        """End the workers when all calls are done."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()

    def _serve(self, worker: "Worker") -> None:
        while (call := self._calls.get()) is not None:
            future, arguments = call
            try:
                future.set_result(worker.call(arguments))
            except BaseException as error:  # raised where the result is asked for
                future.set_exception(error)
        worker.kill()


class Worker:
    """A process that runs work(), and our end of its pipe."""

    def __init__(self, load: Callable, argument: str, limit: float):
        self.settings = (load.__module__, load.__name__, argument, limit)
        self.limit = limit
        self.start()

    def start(self) -> None:
        self.is_ready = False
        self.pipe, theirs = Pipe()
        call = f"pool.work{(theirs.fileno(), *self.settings)}"
        code = f"import sys; sys.path[:] = {sys.path}; from core import pool; {call}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            env={"OMP_NUM_THREADS": "1", **os.environ},
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # no Ctrl-C reaches it, and kill() takes its children too
        )
        theirs.close()

    def call(self, arguments: tuple):
        if self.process.poll() is not None:
            self.start()
        try:
            if not self.is_ready:
                self.is_ready = self.pipe.recv()
            self.pipe.send(arguments)
            in_time = self.pipe.poll(self.limit)
            error, value = self.pipe.recv() if in_time else (Lost, TIMED_OUT)
        except (EOFError, OSError):  # the pipe is closed: the worker has ended
            error, value = Lost, DIED
        if error is Lost:
            self.kill()
            if not self.is_ready:
                raise UserError(f"a worker for {self.settings[2]} ended at its start; see above")
        if error:
            raise error(value)
        return value

    def kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self.pipe.close()


# ---- in the worker -------------------------------------------------------------------------------
def work(fd: int, module: str, load: str, argument: str, limit: float) -> None:
    """Answer calls from the pipe, each with (None, result) or (class of the exception, text)."""
    pipe = Connection(fd)
    calls = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, calls), daemon=True).start()
    function = getattr(importlib.import_module(module), load)(argument)
    pipe.send(True)
    silent = open(os.devnull, "w")
    while True:
        arguments = calls.get()
        # A thread in C, which also ends a call that never lets go of the interpreter
        faulthandler.dump_traceback_later(limit + SPARE, exit=True, file=silent)
        try:
            answer = (None, function(*arguments))
        except UserError as error:
            answer = (UserError, str(error))
        except Exception:  # raised again on the other side
            answer = (Failed, traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        pipe.send(answer)


def _receive(pipe: Connection, calls: queue.SimpleQueue) -> None:
    """Hand on the calls; end this process and its children when the pipe closes."""
    try:
        while True:
            calls.put(pipe.recv())
    except (EOFError, OSError):
        os.killpg(0, signal.SIGKILL)
