"""The embedded server stops with the last live process that uses it, and never before, however processes end."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from gathering_pipeline import embedded
from tests.support.forks import in_child
from tests.support.servers import connect

pytestmark = pytest.mark.once

LIMIT_S = 60
"""Longest wait for a process."""

# Starts the server, prints its process id and its URL; ends when its input ends.
USER = """
import os, sys
from pathlib import Path
from gathering_pipeline import embedded
server = embedded.start(Path(sys.argv[1]))
print((Path(sys.argv[1]) / "postmaster.pid").read_text().split()[0], server.url, flush=True)
sys.stdin.read()
"""
# A forked child that outlives its parent: the parent ends at the first line of the input, the child at the second.
FORKING = """
import os, sys, time
from pathlib import Path
from gathering_pipeline import embedded
server = embedded.start(Path(sys.argv[1]))
first = os.fork()
if first == 0:
    sys.exit()
os.waitpid(first, 0)
if os.fork():
    print((Path(sys.argv[1]) / "postmaster.pid").read_text().split()[0], server.url, flush=True)
    sys.stdin.readline()
    sys.exit()
parent = os.getppid()
while os.getppid() == parent:
    time.sleep(0.02)
time.sleep(0.5)
print("alone", flush=True)
sys.stdin.readline()
sys.exit()
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder outside of pytest's, which a session that starts meanwhile closes to the server's user."""
    folder = Path(tempfile.mkdtemp(prefix="gathering-users-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a program on the folder ``data``; the end of the test kills it, and whatever serves the folder."""
    started: list[subprocess.Popen[str]] = []

    def start(program: str = USER, **options: bool) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", program, str(tmp_path / "data")]
        started.append(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, **options)  # type: ignore[call-overload]
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait(LIMIT_S)
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()
    for left in processes(tmp_path / "data"):
        with suppress(psutil.Error):
            left.kill()


def line(process: subprocess.Popen[str]) -> list[str]:
    """The words of the next line that a process prints."""
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], LIMIT_S)[0], "the process printed nothing"
    return process.stdout.readline().split()


def close(process: subprocess.Popen[str]) -> None:
    """Let a process end by itself."""
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(LIMIT_S) == 0


def processes(folder: Path) -> list[psutil.Process]:
    """The server of a folder, its keepers and its ``initdb``; not the test's own programs."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            if str(folder) in words and USER not in words and FORKING not in words:
                found.append(process)
    return found


def keepers(folder: Path) -> list[psutil.Process]:
    return [process for process in processes(folder) if embedded.START_KEEPER in process.cmdline()]


def wait_until_gone(folder: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while left := processes(folder):
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.05)
    assert not (folder / "postmaster.pid").exists()


def serves(url: str) -> bool:
    with connect(url) as raw:
        return raw.execute("SELECT 1").fetchone() == (1,)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_server_of_a_killed_user_stops(start: Start, tmp_path: Path, number: signal.Signals) -> None:
    user = start()
    _, url = line(user)
    assert serves(url)
    user.send_signal(number)
    assert user.wait(LIMIT_S) == -number
    wait_until_gone(tmp_path / "data")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_server_stays_for_the_other_user_of_a_killed_one(start: Start, tmp_path: Path, number: signal.Signals) -> None:
    killed, other = start(), start()
    first, second = line(killed), line(other)
    assert first == second
    killed.send_signal(number)
    killed.wait(LIMIT_S)
    time.sleep(1)
    late = start()
    assert line(late) == first
    close(late)
    assert serves(first[1])
    close(other)
    assert not (tmp_path / "data" / "postmaster.pid").exists()
    wait_until_gone(tmp_path / "data")


def test_user_killed_in_its_start_leaves_nothing(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for step in range(12):
        user = start()
        time.sleep(0.1 + step * 0.2)  # the first in initdb, later ones in the start or after it
        user.terminate()
        user.wait(LIMIT_S)
        if step % 3 == 2:  # the next user comes while the server is stopped, too
            wait_until_gone(folder)
    last = start()
    assert serves(line(last)[1])
    close(last)
    wait_until_gone(folder)


def test_interrupt_of_the_whole_group_leaves_a_usable_folder(start: Start, tmp_path: Path) -> None:
    """Ctrl-C reaches all programs of a terminal; initdb would remove what it made."""
    for delay in (0.4, 0.8, 1.2):
        user = start(start_new_session=True)
        time.sleep(delay)
        deadline = time.monotonic() + LIMIT_S
        while user.poll() is None:  # Python ignores an interrupt that comes while it collects garbage
            assert time.monotonic() < deadline
            with suppress(ProcessLookupError):
                os.killpg(user.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                user.wait(5)
    last = start()
    assert serves(line(last)[1])
    close(last)
    wait_until_gone(tmp_path / "data")


def test_users_killed_in_their_start_stop_no_server_of_another(start: Start, tmp_path: Path) -> None:
    user = start()
    pid, url = line(user)
    for step in range(12):
        joining = start()
        time.sleep(step * 0.06)
        joining.send_signal(signal.SIGTERM if step % 2 else signal.SIGKILL)
        joining.wait(LIMIT_S)
    third = start()
    assert line(third) == [pid, url]
    close(third)
    assert serves(url)
    assert len(keepers(tmp_path / "data")) == 1
    close(user)
    assert not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
    wait_until_gone(tmp_path / "data")


def test_users_that_come_and_go_find_a_server(start: Start, tmp_path: Path) -> None:
    """The last user of one server and the first of the next meet."""
    users = [start() for _ in range(3)]
    for _ in range(5):
        users.append(start())
        leaving = users.pop(0)
        assert serves(line(leaving)[1])
        close(leaving)
    for user in users:
        assert serves(line(user)[1])
        close(user)
    wait_until_gone(tmp_path / "data")


def test_forked_child_uses_the_server_and_never_stops_it(start: Start, tmp_path: Path) -> None:
    parent = start(FORKING)
    pid, url = line(parent)
    assert parent.stdin is not None
    assert serves(url)  # its first child has ended
    parent.stdin.write("\n")
    assert parent.wait(LIMIT_S) == 0
    assert line(parent) == ["alone"]
    assert serves(url)
    assert (tmp_path / "data" / "postmaster.pid").read_text().split()[0] == pid
    parent.stdin.write("\n")
    wait_until_gone(tmp_path / "data")


def test_stop_in_a_child_leaves_the_server_to_the_parent(tmp_path: Path) -> None:
    server = embedded.start(tmp_path / "data")
    try:
        in_child(server.stop)
        assert serves(server.url)

        def use() -> bool:
            own = embedded.start(tmp_path / "data")
            assert own == server
            result = serves(own.url)
            own.stop()
            return result

        assert in_child(use)
        assert serves(server.url)
    finally:
        server.stop()
    assert not (tmp_path / "data" / "postmaster.pid").exists()
    wait_until_gone(tmp_path / "data")


def test_killed_keeper_is_replaced(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    first = start()
    found = line(first)
    (keeper,) = keepers(folder)
    keeper.kill()
    psutil.wait_procs([keeper], LIMIT_S)
    second = start()
    assert line(second) == found
    close(first)
    assert serves(found[1])
    second.kill()
    wait_until_gone(folder)


def test_last_user_stops_a_server_without_keeper(start: Start, tmp_path: Path) -> None:
    user = start()
    line(user)
    (keeper,) = keepers(tmp_path / "data")
    keeper.kill()
    close(user)
    wait_until_gone(tmp_path / "data")


def test_crashed_server_is_started_again(tmp_path: Path) -> None:
    """Its file names a process id that another program may have by now."""
    folder = tmp_path / "data"
    server = embedded.start(folder)
    try:
        crashed = psutil.Process(int((folder / "postmaster.pid").read_text().split()[0]))
        lines = (folder / "postmaster.pid").read_text().splitlines()
        family = [crashed, *crashed.children()]
        for process in family:
            with suppress(psutil.NoSuchProcess):  # it ends by itself without the postmaster
                process.kill()
        psutil.wait_procs(family, LIMIT_S)
        (folder / "postmaster.pid").write_text("\n".join([str(os.getpid()), *lines[1:]]) + "\n")
        assert embedded.start(folder) == server
        assert serves(server.url)
    finally:
        server.stop()
    wait_until_gone(folder)


def test_start_after_the_folder_was_replaced(tmp_path: Path) -> None:
    """The lock is on the folder, not on its name."""
    server = embedded.start(tmp_path / "data")
    server.stop()
    server = embedded.start(tmp_path / "data")
    (tmp_path / "data").rename(tmp_path / "old")
    try:
        new = embedded.start(tmp_path / "data")
        assert serves(new.url)
        new.stop()
    finally:
        for left in processes(tmp_path / "data"):
            left.kill()
