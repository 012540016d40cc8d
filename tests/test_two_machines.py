"""docs/scaling.md's line for two nodes, between two network namespaces: machines with an address,
a name and a loopback of their own, over one folder. Needs root and `ip` (Debian: iproute2)."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_runs import ENV, ROOT, lines_of, lose_checkpoint, weights_of
from test_faults import rl_command, run_to_end, sft_command, wait_for
from test_ranks import far, responses_of

from core import ranks

ADDRESSES = ("10.77.7.1", "10.77.7.2")


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)


class Machines:
    """Two of them, NODE0 and NODE1, with a cable between."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.names = [f"node{n}-{os.getpid()}" for n in (0, 1)]

    def build(self) -> None:
        first, second = self.names
        for name in self.names:
            ip(f"netns add {name}")
        ip(f"link add cable netns {first} type veth peer name cable netns {second}")
        for n, name in enumerate(self.names):
            ip(f"-n {name} addr add {ADDRESSES[n]}/24 dev cable")
            ip(f"-n {name} link set lo up")
            ip(f"-n {name} link set cable up")
            ip(f"-n {name} route add default dev cable")
            # As Debian writes it: a machine's own name is an address of its loopback
            other = f"{ADDRESSES[1 - n]} NODE{1 - n}"
            hosts = f"127.0.0.1 localhost\n127.0.1.1 NODE{n}\n{other}\n"
            (self.folder / f"hosts{n}").write_text(hosts)

    def start(self, n: int, words: list[str]) -> subprocess.Popen:
        shell = (
            f"mount --bind {self.folder}/hosts{n} /etc/hosts; "
            f'echo NODE{n} > /proc/sys/kernel/hostname; exec "$@"'
        )
        inside = ["ip", "netns", "exec", self.names[n], "unshare", "--uts", "--mount"]
        return subprocess.Popen(
            [*inside, "sh", "-c", shell, "sh", *words],
            env=ENV,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=open(self.folder / f"errors{n}", "w"),
        )

    def torchrun(self, command: list[str]) -> list[subprocess.Popen]:
        """The command on both, as the documentation says."""
        text = (ROOT / "docs" / "scaling.md").read_text().replace("\\\n", " ")
        flags = re.search(r"torchrun (--nnodes=2 .*?) sft\.py", text)[1].split()
        flags[flags.index("--nproc_per_node=8")] = "--nproc_per_node=1"
        words = [sys.executable, "-m", "torch.distributed.run", *flags, *command[1:]]
        return [self.start(n, words) for n in (0, 1)]

    def errors(self, n: int) -> str:
        return (self.folder / f"errors{n}").read_text()

    def cut(self) -> None:
        ip(f"-n {self.names[1]} link set cable down")

    def remove(self) -> None:
        for name in self.names:
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for number in found.stdout.split():
                os.kill(int(number), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture()
def machines(tmp_path) -> Iterator[Machines]:
    if os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("network namespaces need root, ip and unshare")
    pair = Machines(tmp_path)
    try:
        try:
            pair.build()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not allowed here: {error.stderr.decode()}")
        yield pair
    finally:
        pair.remove()


def test_connections_are_watched_and_an_unknown_host_has_no_interface():
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as connection:
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
            ranks.watch_connections()
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            timeout = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
            assert timeout == 1000 * ranks.LOST
            connection.sendall(b"still open")
    assert ranks.interface_to("no-such-host.invalid") == ""


@pytest.mark.parametrize("make_command", [sft_command, rl_command])
def test_a_run_on_two_machines_is_the_run_of_one_process_which_may_go_on_with_it(
    machines, coin, small_task, tmp_path, make_command
):
    folder = small_task if make_command is sft_command else coin
    steps = ["--steps", "4", "--eval-every", "2"]
    whole, both = tmp_path / "whole", tmp_path / "both"
    run_to_end(make_command(folder, whole, *steps))
    group = machines.torchrun(make_command(folder, both, *steps))
    codes = [process.wait(timeout=300) for process in group]
    assert codes == [0, 0], machines.errors(0) + machines.errors(1)
    assert far(weights_of(whole, 4), weights_of(both, 4)) < 1e-5
    for step in (3, 4):
        lose_checkpoint(both, step)
    run_to_end(make_command(folder, both, *steps, "--resume"))
    assert far(weights_of(whole, 4), weights_of(both, 4)) < 1e-5
    assert len(lines_of(both)) == len(lines_of(whole))
    if make_command is rl_command:
        assert responses_of(both) == responses_of(whole)


def test_when_a_machine_is_cut_off_the_other_says_so_in_one_line_and_ends_within_a_minute(
    machines, small_task, tmp_path
):
    out = tmp_path / "r"
    more = ["--steps", "5000", "--eval-every", "5000", "--save-every", "0"]
    group = machines.torchrun(sft_command(small_task, out, *more))
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(lines_of(out)) > 3, group, 300)
    machines.cut()
    cut_at = time.monotonic()
    code = group[0].wait(timeout=4 * ranks.LOST)
    assert time.monotonic() - cut_at < 60
    assert code == 1
    said = machines.errors(0)
    assert said.count("lost another one") == 1
    assert "--resume" in said
    assert f'File "{ROOT}/sft.py"' not in said  # no traceback of ours
