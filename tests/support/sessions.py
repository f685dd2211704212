"""Steps that tests of sessions share."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import psycopg
from sqlalchemy.orm import Session

from gathering_pipeline import (
    Database,
    PipelineCreate,
    PipelineRepository,
    PipelineStatus,
    RunRepository,
)

BLOCKED = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
NODES: list[dict[str, Any]] = [{"id": "t", "type": "trigger", "name": "T"}]


KEPT = PipelineCreate(name="kept", status=PipelineStatus.ACTIVE, nodes=NODES)


def names(raw: psycopg.Connection) -> list[str]:
    return [name for (name,) in raw.execute("SELECT name FROM circle.pipelines ORDER BY id").fetchall()]


def run_async(database: Database, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def go() -> None:
        async with database:
            await work()

    asyncio.run(go())


def new_run(database: Database) -> int:
    with database.session() as session:
        return RunRepository(session).create(PipelineRepository(session).create(KEPT).id).id


def driver_connection(session: Session) -> psycopg.Connection:
    driver = session.connection().connection.driver_connection
    assert isinstance(driver, psycopg.Connection | psycopg.AsyncConnection)
    return driver  # type: ignore[return-value]


class Blocker:
    """Holds a lock on all of ``circle.pipelines`` and ``pipeline_runs``, and does something to who waits for it."""

    def __init__(self, raw: psycopg.Connection, connect: Callable[[str], psycopg.Connection], url: str) -> None:
        self._raw = raw
        self._holder = connect(url)
        self._holder.execute("BEGIN; LOCK circle.pipelines, circle.pipeline_runs IN ACCESS EXCLUSIVE MODE")

    def waiter(self) -> int:
        while not (found := self._raw.execute(BLOCKED).fetchone()):
            time.sleep(0.005)
        pid: int = found[0]
        return pid

    def terminate(self) -> None:
        self._raw.execute("SELECT pg_terminate_backend(%s, 5000)", [self.waiter()])
        self._holder.execute("ROLLBACK")

    def interrupt(self) -> None:
        self.waiter()
        os.kill(os.getpid(), signal.SIGINT)

    def end(self) -> None:
        self._holder.execute("ROLLBACK")

    def meanwhile(self, action: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=action)
        thread.start()
        return thread
