"""Two PostgreSQL servers, of which one follows the other by streaming replication, and what can happen to them."""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import psycopg

from gathering_pipeline import migrations
from tests.support import servers
from tests.support.databases import scalar

SETTINGS = """
listen_addresses = '127.0.0.1'
fsync = off  # no power is cut here
wal_keep_size = '256MB'
max_connections = 100
synchronous_standby_names = ''
"""


@dataclass(frozen=True, slots=True)
class Node:
    """A server.

    Attributes:
        folder: Its data directory.
        port: Its port on 127.0.0.1.
        programs: PostgreSQL's programs.
        user: The system user that runs it.
    """

    folder: Path
    port: int
    programs: Path
    user: int

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/postgres"

    def run(self, program: str, *arguments: str) -> None:
        """Run one of PostgreSQL's programs."""
        subprocess.run(
            [self.programs / program, *arguments],
            check=True,
            capture_output=True,
            timeout=120,
            cwd=self.folder,
            user=self.user if os.geteuid() == 0 else None,
        )

    def ctl(self, *words: str) -> None:
        # its output would be held open by the server
        with Path(os.devnull).open("w") as null:
            subprocess.run(
                [self.programs / "pg_ctl", "-D", self.folder, "-w", *words],
                check=True,
                stdout=null,
                stderr=null,
                timeout=120,
                cwd=self.folder,
                user=self.user if os.geteuid() == 0 else None,
            )

    def start(self) -> None:
        options = f"-p {self.port} -c unix_socket_directories={self.folder}"
        self.ctl("-l", str(self.folder / "log"), "-o", options, "start")

    def restart(self) -> None:
        """Shut down, which ends all sessions, and start."""
        self.ctl("-m", "fast", "stop")
        self.start()

    def start_again(self) -> None:
        """Start the server if it has given up; else wait until it has recovered."""
        deadline = time.monotonic() + 60
        while True:
            if not self.processes():
                (self.folder / "postmaster.pid").unlink(missing_ok=True)
                self.start()
            with suppress(psycopg.OperationalError):
                self.connect().close()
                return
            assert time.monotonic() < deadline, "the server doesn't come back"
            time.sleep(0.05)

    def processes(self) -> list[psutil.Process]:
        """All processes of the server; none if it doesn't run."""
        with suppress(OSError, psutil.NoSuchProcess, ValueError, IndexError):
            postmaster = psutil.Process(int((self.folder / "postmaster.pid").read_text(encoding="utf-8").split()[0]))
            return [postmaster, *postmaster.children(recursive=True)]
        return []

    def kill(self) -> None:
        """Kill all processes at once, as a machine that loses its power does.

        They are stopped first: a session that sees the end of the postmaster no longer waits for the standby, and others
        would read for a moment what it has committed.
        """
        processes = self.processes()
        for signal_number in (signal.SIGSTOP, signal.SIGKILL):
            for process in reversed(processes):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal_number)
        psutil.wait_procs(processes, timeout=30)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop all processes; the kernel goes on taking what is sent to them."""
        processes = self.processes()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGCONT)

    def connect(self) -> psycopg.Connection:
        """A connection whose own commits wait for no standby, and which no limit ends."""
        limits = ("statement_timeout", "lock_timeout", "idle_session_timeout", "idle_in_transaction_session_timeout")
        options = " ".join(f"-c {name}=0" for name in limits) + " -c synchronous_commit=local"
        where = f"host=127.0.0.1 port={self.port} user=postgres dbname=postgres"
        return psycopg.connect(where, options=options, autocommit=True, connect_timeout=10)

    def set(self, name: str, value: str) -> None:
        """Change a setting while the server runs."""
        with self.connect() as raw:
            raw.execute(f"ALTER SYSTEM SET {name} = '{value}'")
            raw.execute("SELECT pg_reload_conf()")

    def promote(self) -> None:
        """Make a standby the primary, which waits for no standby."""
        with self.connect() as raw:
            raw.execute("SELECT pg_promote()")
        self.set("synchronous_standby_names", "")

    def follow(self, primary: Node) -> None:
        """Become a standby of another server, whose copy replaces what was here."""
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        primary.run(
            *("pg_basebackup", "-D", str(self.folder), "-h", "127.0.0.1", "-p", str(primary.port), "-U", "postgres"),
            *("-R", "-c", "fast", "-X", "stream", "--no-sync"),
        )
        self.start()

    def end_sessions(self) -> None:
        """Terminate the sessions of all others."""
        with self.connect() as raw:
            raw.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )

    def wait_for_standby(self, state: str) -> None:
        """Wait until a standby is connected: ``sync`` or ``async``."""
        with self.connect() as raw:
            deadline = time.monotonic() + 60
            while (
                scalar(
                    raw,
                    "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming' AND sync_state = %s",
                    [state],
                )
                == 0
            ):
                assert time.monotonic() < deadline, "no standby"
                time.sleep(0.02)

    def follow_synchronously(self, primary: Node) -> None:
        """``follow``, and let the primary's commits wait for this server."""
        self.follow(primary)
        primary.wait_for_standby("async")
        primary.set("synchronous_standby_names", "*")
        primary.wait_for_standby("sync")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


@contextmanager
def nodes(number: int = 2, at: Path | None = None) -> Iterator[list[Node]]:
    """Servers with the schema at head in their database ``postgres``: the first one runs, the others have no data yet.

    Args:
        number: How many.
        at: The folder of their data; None: a temporary one.
    """
    folder = Path(tempfile.mkdtemp(prefix="gathering-cluster-", dir=at))
    folder.chmod(0o755)
    found: list[Node] = []
    try:
        with servers.own() as seed:
            migrations.upgrade(seed.url)
            process = servers.postmaster(seed)
            programs, user = Path(process.exe()).parent, process.uids().real
            for place in range(number):
                data = folder / f"node{place}"
                data.mkdir(mode=0o700)
                os.chown(data, user, -1)
                found.append(Node(data, free_port(), programs, user))
            found[0].run(
                *("pg_basebackup", "-D", str(found[0].folder), "-h", str(seed.data_dir), "-U", "postgres"),
                *("-c", "fast", "--no-sync"),
            )
        with (found[0].folder / "postgresql.auto.conf").open("a") as settings:
            settings.write(SETTINGS)
        found[0].start()
        yield found
    finally:
        for node in found:
            node.kill()
        shutil.rmtree(folder, ignore_errors=True)


def several(*members: Node) -> str:
    """The URL of all servers, of which the one that takes writes is used."""
    hosts = "&".join(f"host=127.0.0.1:{node.port}" for node in members)
    return f"postgresql+psycopg://postgres@/postgres?{hosts}&target_session_attrs=read-write"
