"""When a session commits, and what a failed commit says."""

import asyncio
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.abc import PQGen
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError

from gathering_pipeline import embedded
from gathering_pipeline.database import Database
from gathering_pipeline.errors import (
    CommitIndeterminateError,
)
from gathering_pipeline.settings import DatabaseSettings
from tests.support.servers import connect

pytestmark = pytest.mark.once  # when a session commits is decided by this package and SQLAlchemy

INSERT = text("INSERT INTO circle.pipelines (name) VALUES (:name) RETURNING id")


def _cancel_a_waiting_commit(url: str) -> threading.Thread:
    """As an operator does who sees a commit hang because the standby is gone."""

    def cancel() -> None:
        with connect(url) as raw:
            waiting: list[Any] = []
            while not waiting:
                waiting = raw.execute("SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'").fetchall()
            for (pid,) in waiting:
                raw.execute("SELECT pg_cancel_backend(%s)", [pid])

    thread = threading.Thread(target=cancel)
    thread.start()
    return thread


def _interrupt_an_unconfirmed_commit(database: Database, url: str) -> None:
    """Nor does the next statement answer for a commit whose caller was interrupted when the server's word was there."""

    def interrupted(steps: PQGen[None]) -> PQGen[None]:
        yield from steps
        raise KeyboardInterrupt

    with database.engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert isinstance(driver, psycopg.Connection)
        driver.execute("INSERT INTO t VALUES (1)")
        canceller = _cancel_a_waiting_commit(url)
        with pytest.raises(KeyboardInterrupt):
            driver.wait(interrupted(driver._commit_gen()))
        canceller.join()
        assert driver.execute("SELECT 1").fetchall() == [(1,)]


def _messages_of(trace: Path) -> list[str]:
    """What libpq sent, by the name of the message; its trace has a line a message: F for what the frontend sends."""
    lines = [line.split("\t") for line in trace.read_text().splitlines()]
    return [fields[2] for fields in lines if fields[0] == "F"]


COUNT = text("SELECT count(*) FROM circle.pipelines")


def test_session_block_commits_on_success_and_rolls_back_on_error(database: Database, raw: psycopg.Connection) -> None:
    with database.session() as session:
        session.execute(INSERT, {"name": "kept"})
    with pytest.raises(ZeroDivisionError), database.session() as session:
        session.execute(INSERT, {"name": "lost"})
        raise ZeroDivisionError
    assert raw.execute("SELECT name FROM circle.pipelines").fetchall() == [("kept",)]


def test_async_session_block_commits_on_success_and_rolls_back_on_error(
    database: Database, raw: psycopg.Connection
) -> None:
    async def use() -> None:
        async with database:
            async with database.async_session() as session:
                await session.execute(INSERT, {"name": "kept"})
            with pytest.raises(ZeroDivisionError):
                async with database.async_session() as session:
                    await session.execute(INSERT, {"name": "lost"})
                    raise ZeroDivisionError
            async with database.async_session(autocommit=True) as session:
                assert (await session.execute(COUNT)).scalar_one() == 1

    asyncio.run(use())
    assert raw.execute("SELECT name FROM circle.pipelines").fetchall() == [("kept",)]


@pytest.mark.parametrize("prepared", [True, False])
def test_autocommit_call_sends_one_message(database_url: str, tmp_path: Path, prepared: bool) -> None:
    settings = DatabaseSettings(pool_size=1, prepare_threshold=0 if prepared else None)
    with Database(database_url, settings=settings) as database:
        with database.session(autocommit=True) as session:
            session.execute(INSERT, {"name": "prepare it"})
            driver = session.connection().connection.driver_connection
            assert isinstance(driver, psycopg.Connection)
        with (tmp_path / "trace").open("w") as trace:
            driver.pgconn.trace(trace.fileno())
            driver.pgconn.set_trace_flags(psycopg.pq.Trace.SUPPRESS_TIMESTAMPS)
            for _ in range(2):  # the connection goes back to the pool in between
                with database.session(autocommit=True) as session:
                    session.execute(INSERT, {"name": "a"})
                    session.execute(INSERT, {"name": "b"})
            driver.pgconn.untrace()
        call = ["Bind", "Describe", "Execute", "Sync"]
        assert _messages_of(tmp_path / "trace") == (call if prepared else ["Parse", *call]) * 4


def test_autocommit_calls_stay_committed_after_error(database: Database, raw: psycopg.Connection) -> None:
    with pytest.raises(ZeroDivisionError), database.session(autocommit=True) as session:
        session.execute(INSERT, {"name": "kept"})
        raise ZeroDivisionError
    with database.session() as session:  # the next user of the connection has transactions again
        session.execute(INSERT, {"name": "uncommitted"})
        assert raw.execute("SELECT name FROM circle.pipelines").fetchall() == [("kept",)]
        session.rollback()


def test_commit_refused_by_database_raises_its_error(database: Database, raw: psycopg.Connection) -> None:
    raw.execute("CREATE TABLE late (id int UNIQUE DEFERRABLE INITIALLY DEFERRED); INSERT INTO late VALUES (1)")
    with pytest.raises(Exception, match="late_id_key") as caught, database.session() as session:
        session.execute(text("INSERT INTO late VALUES (1)"))
    assert caught.type.__name__ == "IntegrityError"


def test_commit_with_broken_connection_raises_commit_indeterminate(database: Database, raw: psycopg.Connection) -> None:
    with pytest.raises(CommitIndeterminateError, match="the connection broke during the commit"):
        with database.session() as session:
            pid = session.execute(text("SELECT pg_backend_pid()")).scalar_one()
            raw.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])


def test_statement_error_passes_unchanged(database: Database) -> None:
    with pytest.raises(ProgrammingError), database.session() as session:
        session.execute(text("SELECT 1 FROM nothing"))


def test_commit_unconfirmed_by_standby_raises_commit_indeterminate(own_server: embedded.EmbeddedServer) -> None:
    async def insert(database: Database, *, autocommit: bool) -> None:
        async with database.async_session(autocommit=autocommit) as session:
            await session.execute(text("INSERT INTO t VALUES (1)"))

    def insert_sync(database: Database, *, autocommit: bool) -> None:
        with database.session(autocommit=autocommit) as session:
            session.execute(text("INSERT INTO t VALUES (1)"))

    async def run(action: Coroutine[Any, Any, None], database: Database) -> None:
        try:
            await action
        finally:
            await database.adispose()

    with connect(own_server.url) as raw:
        raw.execute("CREATE TABLE t (id int)")
        raw.execute("SET synchronous_commit = local")
        raw.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        raw.execute("SELECT pg_reload_conf()")
        time.sleep(0.5)
        try:
            with Database(own_server.url) as database:
                for autocommit in (False, True):
                    canceller = _cancel_a_waiting_commit(own_server.url)
                    with pytest.raises(CommitIndeterminateError, match="its standby did not confirm it"):
                        insert_sync(database, autocommit=autocommit)
                    canceller.join()
                    canceller = _cancel_a_waiting_commit(own_server.url)
                    with pytest.raises(CommitIndeterminateError, match="its standby did not confirm it"):
                        asyncio.run(run(insert(database, autocommit=autocommit), database))
                    canceller.join()
                _interrupt_an_unconfirmed_commit(database, own_server.url)
                with database.session() as session:  # the connection is as good as before
                    session.execute(text("SET LOCAL synchronous_commit = local"))
                    assert session.execute(text("SELECT count(*) FROM t")).scalar_one() == 5
        finally:
            raw.execute("ALTER SYSTEM RESET synchronous_standby_names")
            raw.execute("SELECT pg_reload_conf()")
