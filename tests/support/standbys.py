"""Commits that wait for a standby which does not exist, and what ends their wait."""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import psycopg

from tests.support.databases import scalar
from tests.support.servers import connect

CANCELLED, TERMINATED = "pg_cancel_backend(%s)", "pg_terminate_backend(%s, 5000)"
WAITING = "SELECT pid, query FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


@dataclass
class Ender:
    """Ends the waits.

    Attributes:
        ending: How.
        ended: The statements of the sessions.
    """

    ending: str
    ended: list[str] = field(default_factory=list)


@contextmanager
def absent(url: str) -> Iterator[None]:
    """Let all commits of a server wait for a standby that never comes. A superuser's URL is needed."""
    with connect(url) as admin:
        admin.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        admin.execute("SELECT pg_reload_conf()")
        try:
            with ending_waits(url, TERMINATED), suppress(psycopg.OperationalError):
                while True:  # until the server has read its configuration
                    with connect(url) as raw:
                        raw.execute("SELECT pg_logical_emit_message(true, 'test', '')")  # a commit that waits
            yield
        finally:
            with connect(url) as raw:  # the server may have been restarted
                raw.execute("ALTER SYSTEM RESET synchronous_standby_names")
                raw.execute("SELECT pg_reload_conf()")


@contextmanager
def ending_waits(url: str, ending: str) -> Iterator[Ender]:
    """Cancel or terminate each session that waits for the standby."""
    ender = Ender(ending)
    over = threading.Event()

    def end() -> None:
        with connect(url) as admin:
            while not over.is_set():
                for pid, query in admin.execute(WAITING).fetchall():
                    ender.ended.append(query)
                    admin.execute(f"SELECT {ender.ending}", [pid])
                over.wait(0.01)

    thread = threading.Thread(target=end)
    thread.start()
    try:
        yield ender
    finally:
        over.set()
        thread.join()


def wait_for_waiting(url: str) -> None:
    """Return once a session waits for the standby."""
    with connect(url) as raw:
        deadline = time.monotonic() + 20
        while not scalar(raw, f"SELECT count(*) FROM ({WAITING}) w"):
            assert time.monotonic() < deadline, "no commit waits"
            time.sleep(0.01)
