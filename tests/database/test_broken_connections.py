"""Calls whose connection breaks."""

from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from gathering_pipeline import (
    AsyncPipelineRepository,
    AsyncRunRepository,
    CommitIndeterminateError,
    Database,
    DatabaseSettings,
    DatabaseUnavailableError,
    EventRepository,
    Pipeline,
    PipelineRepository,
    RunRepository,
    TransactionAbortedError,
    is_transient,
)
from tests.support.sessions import KEPT, NODES, Blocker, names, new_run, run_async

pytestmark = pytest.mark.once  # what a call makes of a broken connection is decided on this side of it

CALLS: dict[str, Callable[[Session, int], object]] = {
    "a function": lambda session, run_id: RunRepository(session).start(run_id),
    "through SQLAlchemy": lambda session, _: PipelineRepository(session).create(KEPT),
}


ACALLS: dict[str, Callable[[AsyncSession, int], Coroutine[Any, Any, object]]] = {
    "a function": lambda session, run_id: AsyncRunRepository(session).start(run_id),
    "through SQLAlchemy": lambda session, _: AsyncPipelineRepository(session).create(KEPT),
}


@pytest.mark.parametrize("how", CALLS)
def test_autocommit_write_with_broken_connection_raises_commit_indeterminate(
    database: Database, blocker: Callable[[], Blocker], how: str
) -> None:
    async def work() -> None:
        async with database.async_session(autocommit=True) as session:
            await session.execute(text("SELECT 1"))
            holder = blocker()
            killer = holder.meanwhile(holder.terminate)
            with pytest.raises(CommitIndeterminateError, match="the connection broke") as caught:
                await ACALLS[how](session, run_id)
            killer.join()
            assert is_transient(caught.value)
            await ACALLS[how](session, run_id)  # by another connection

    run_id = new_run(database)
    with database.session(autocommit=True) as session:
        session.execute(text("SELECT 1"))
        holder = blocker()
        killer = holder.meanwhile(holder.terminate)
        with pytest.raises(CommitIndeterminateError, match="the connection broke") as caught:
            CALLS[how](session, run_id)
        killer.join()
        assert is_transient(caught.value)
        CALLS[how](session, run_id)
    run_id = new_run(database)
    run_async(database, work)


READS: list[Callable[[Session], object]] = [
    lambda session: PipelineRepository(session).get(1),
    lambda session: PipelineRepository(session).search(),
    lambda session: RunRepository(session).get(1),
    lambda session: RunRepository(session).search(),
    lambda session: RunRepository(session).nodes(1),
    lambda session: RunRepository(session).ready_nodes(1),
    lambda session: RunRepository(session).definition(1),
    lambda session: RunRepository(session).counts(),
    lambda session: RunRepository(session).statistics(1),
    lambda session: EventRepository(session).read(),
    lambda session: EventRepository(session).last(),
]


@pytest.mark.parametrize("number", range(len(READS)))
def test_autocommit_read_with_broken_connection_raises_unavailable(
    database: Database, raw: psycopg.Connection, number: int
) -> None:
    with database.session(autocommit=True) as session:
        pid = session.execute(text("SELECT pg_backend_pid()")).scalar_one()
        raw.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
        with pytest.raises(DatabaseUnavailableError, match="the connection broke") as caught:
            READS[number](session)
        assert is_transient(caught.value)
        assert RunRepository(session).counts()  # by another connection


@pytest.mark.parametrize("how", CALLS)
def test_transaction_with_broken_connection_is_lost(
    database: Database, raw: psycopg.Connection, blocker: Callable[[], Blocker], how: str
) -> None:
    run_id = new_run(database)
    with pytest.raises(TransactionAbortedError), database.session() as session:
        session.execute(text("INSERT INTO circle.pipelines (name) VALUES ('lost') RETURNING id"))
        session.commit()
        session.execute(text("SELECT 1"))
        holder = blocker()
        killer = holder.meanwhile(holder.terminate)
        with pytest.raises(DatabaseUnavailableError, match="the connection broke") as caught:
            CALLS[how](session, run_id)
        killer.join()
        assert is_transient(caught.value)
    assert raw.execute("SELECT status FROM circle.pipeline_runs").fetchall() == [("pending",)]


def test_flush_with_broken_connection_is_not_commit_indeterminate(database: Database, raw: psycopg.Connection) -> None:
    with pytest.raises(OperationalError) as caught, database.session() as session:
        pid = session.execute(text("SELECT pg_backend_pid()")).scalar_one()
        session.add(Pipeline(name="lost", nodes=NODES, edges=[]))
        raw.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
    assert is_transient(caught.value)
    assert names(raw) == []


@pytest.mark.parametrize("autocommit", [False, True])
def test_connections_that_broke_in_the_pool_are_replaced(
    database: Database, raw: psycopg.Connection, autocommit: bool
) -> None:
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(database.session(autocommit=True)).execute(text("SELECT 1"))
    raw.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    for _ in range(5):
        with database.session(autocommit=autocommit) as session:
            RunRepository(session).counts()


def test_session_from_exhausted_pool_raises_unavailable(database_url: str) -> None:
    settings = DatabaseSettings(pool_size=1, max_overflow=0, pool_timeout=timedelta(seconds=0.1))
    with Database(database_url, settings=settings) as database, database.session() as first:
        first.execute(text("SELECT 1"))
        with pytest.raises(DatabaseUnavailableError, match="no connection became free") as caught:
            with database.session() as second:
                RunRepository(second).counts()
        assert is_transient(caught.value)


def test_error_of_a_block_is_kept_where_its_connection_breaks(database: Database, raw: psycopg.Connection) -> None:
    """The rollback fails, and has nothing to roll back."""

    async def work() -> None:
        with pytest.raises(ZeroDivisionError):
            async with database.async_session() as session:
                pid = (await session.execute(text("SELECT pg_backend_pid()"))).scalar_one()
                raw.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
                raise ZeroDivisionError
        async with database.async_session() as session:
            await session.execute(text("SELECT 1"))

    with pytest.raises(ZeroDivisionError), database.session() as session:
        pid = session.execute(text("SELECT pg_backend_pid()")).scalar_one()
        raw.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
        raise ZeroDivisionError
    with database.session() as session:
        session.execute(text("SELECT 1"))
    run_async(database, work)
