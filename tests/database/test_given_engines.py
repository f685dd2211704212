"""A ``Database`` on engines of the program: they stay the program's own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import aclosing, closing
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from gathering_pipeline import (
    AsyncRunRepository,
    ConfigurationError,
    Database,
    DatabaseUnavailableError,
    EventType,
    InvalidDataError,
    PipelineError,
    PipelineRepository,
    RunRepository,
    Step,
    TransactionAbortedError,
)
from tests.support.forks import in_child
from tests.support.pipelines import new
from tests.support.runs import done, store
from tests.support.sessions import names, new_run

pytestmark = pytest.mark.once  # whose engine a call uses is decided by this package

SOON = timedelta(seconds=0.02)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """As of a program, whose own level is another one."""
    engine = create_engine(database_url, isolation_level="REPEATABLE READ")
    yield engine
    engine.dispose()


async def on_async_engine(url: str, work: Callable[[Database], Any]) -> Any:
    engine = create_async_engine(url, isolation_level="REPEATABLE READ")
    try:
        async with Database(async_engine=engine) as database:
            return await work(database)
    finally:
        await engine.dispose()


def test_given_engine_serves_every_sync_call(engine: Engine, raw: psycopg.Connection) -> None:
    with Database(engine=engine) as database:
        assert database.engine is engine
        assert repr(database) == f"Database({engine.url.render_as_string()!r})"
        database.upgrade()
        database.check()
        run = new_run(database)
        with database.session(autocommit=True) as session:
            assert RunRepository(session).advance(run).started[0].node_id == "t"
        with database.session() as session:
            level = session.connection().exec_driver_sql("SHOW transaction_isolation")
            assert level.scalar() == "read committed"
            assert RunRepository(session).advance(run, [done("t")]).status == "completed"
        with database.reading() as session:
            assert RunRepository(session).get(run).status == "completed"
        health = database.health()
        assert (health.ok, health.connections_in_use, health.connections_allowed) == (True, 0, 15)
    with engine.connect() as connection:  # the pool is as it was
        assert connection.exec_driver_sql("SHOW transaction_isolation").scalar() == "repeatable read"
        assert connection.exec_driver_sql("SHOW transaction_read_only").scalar() == "off"
    assert names(raw) == ["kept"]


def test_given_engine_is_not_disposed(database_url: str) -> None:
    with create_engine(database_url).connect() as connection:
        pid = connection.scalar(text("SELECT pg_backend_pid()"))
        engine = connection.engine
    with Database(engine=engine) as database:
        database.check()
    asyncio.run(database.adispose())
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT pg_backend_pid()")) == pid
    engine.dispose()

    async def work() -> None:
        async def session_pid(database: Database) -> int:
            async with database.async_session() as session:
                found: int = await session.scalar(text("SELECT pg_backend_pid()"))
                return found

        engine = create_async_engine(database_url)
        async with Database(async_engine=engine) as database:
            pid = await session_pid(database)
        assert await session_pid(database) == pid
        database.dispose()
        assert await session_pid(database) == pid
        await engine.dispose()

    asyncio.run(work())


def test_given_engine_refuses_commit_after_swallowed_refusal(engine: Engine, raw: psycopg.Connection) -> None:
    database = Database(engine=engine)
    with pytest.raises(TransactionAbortedError), database.session() as session:
        PipelineRepository(session).create(new("lost"))
        with pytest.raises(PipelineError):
            RunRepository(session).start(4711)
    with database.session() as session:
        PipelineRepository(session).create(new("kept"))
        with pytest.raises(PipelineError), session.begin_nested():
            RunRepository(session).start(4711)
    assert names(raw) == ["kept"]

    async def work(asynchronous: Database) -> None:
        async with asynchronous.async_session() as session:
            with pytest.raises(PipelineError):
                await AsyncRunRepository(session).start(4711)

    with pytest.raises(TransactionAbortedError):
        asyncio.run(on_async_engine(engine.url.render_as_string(hide_password=False), work))


def test_given_engine_listens(engine: Engine, database_url: str) -> None:
    database = Database(engine=engine)
    run = new_run(database)
    with database.session() as session:
        RunRepository(session).start(run)
    with closing(database.listen(poll=SOON)) as events:
        assert next(events).type is EventType.PIPELINE_RUN_STARTED
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]  # of a QueuePool

    async def work(asynchronous: Database) -> EventType:
        async with aclosing(asynchronous.alisten(run, poll=SOON)) as feed:
            return (await anext(feed)).type

    assert asyncio.run(on_async_engine(database_url, work)) is EventType.PIPELINE_RUN_STARTED


def test_given_engine_commits_in_groups(engine: Engine, database_url: str) -> None:
    database = Database(engine=engine)
    with database.session() as session:
        pipeline = store(session, "a")
        ids = [RunRepository(session).create(pipeline).id for _ in range(12)]
    with database.group_commit() as runs:
        assert [runs.advance(run).started[0].node_id for run in ids[:2]] == ["a", "a"]

    async def work(asynchronous: Database) -> list[Step]:
        async with asynchronous.group_commit() as group:
            await asyncio.gather(*(group.advance(run) for run in ids))
            return await asyncio.gather(*(group.advance(run, [done("a")]) for run in ids))

    steps = asyncio.run(on_async_engine(database_url, work))
    assert {step.status for step in steps} == {"completed"}


def test_given_engine_after_a_fork_is_renewed_by_its_program(engine: Engine) -> None:
    database = Database(engine=engine)
    database.check()

    def work() -> int:
        engine.dispose(close=False)
        return new_run(database)

    run = in_child(work)
    with database.session() as session:
        assert RunRepository(session).get(run).status == "pending"


def test_given_engine_of_one_kind_refuses_calls_of_the_other(engine: Engine, database_url: str) -> None:
    database = Database(engine=engine)
    calls: list[Callable[[], object]]
    calls = [database.async_session, database.areading, database.alisten, lambda: database.async_engine]
    for call in calls:
        with pytest.raises(ConfigurationError, match="no engine for async calls: make it with async_engine=, too"):
            call()
    asynchronous = Database(async_engine=create_async_engine(database_url))
    calls = [asynchronous.session, asynchronous.reading, asynchronous.listen, asynchronous.upgrade]
    for call in calls:
        with pytest.raises(ConfigurationError, match="no engine for sync calls: make it with engine=, too"):
            call()


def test_given_engine_with_pool_that_does_not_count_is_healthy(database_url: str) -> None:
    health = Database(engine=create_engine(database_url, poolclass=NullPool)).health()
    assert (health.ok, health.connections_in_use, health.connections_allowed) == (True, None, None)


def test_given_engine_without_server_raises_unavailable() -> None:
    database = Database(engine=create_engine("postgresql+psycopg://u@127.0.0.1:1/x"))
    with pytest.raises(DatabaseUnavailableError), database.session() as session:
        RunRepository(session).counts()
    assert not database.health().reachable
    with pytest.raises(OperationalError):
        database.check()


def test_given_engine_ignores_urls_of_the_environment(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GATHERING_DATABASE_URL", "GATHERING_MIGRATION_URL", "GATHERING_READ_URL"):
        monkeypatch.setenv(name, "postgresql://localhost:1/unused")
    database = Database(engine=engine)
    database.upgrade()
    with database.reading() as session:
        assert RunRepository(session).counts()


def test_database_of_unusable_engine_raises(engine: Engine, database_url: str) -> None:
    url = "postgresql+psycopg://h/d"
    asynchronous: AsyncEngine = create_async_engine(url)
    with pytest.raises(ConfigurationError, match="url and an engine are given"):
        Database(database_url, engine=engine)
    with pytest.raises(InvalidDataError, match="^engine must be of type Engine, not AsyncEngine: create_engine"):
        Database(engine=asynchronous)  # type: ignore[arg-type]
    with pytest.raises(InvalidDataError, match="^async_engine must be of type AsyncEngine, not str: create_async_eng"):
        Database(async_engine=url)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="the driver of engine is pysqlite: this package needs psycopg"):
        Database(engine=create_engine("sqlite://"))
    renaming = create_engine(url).execution_options(schema_translate_map={"circle": "x"})
    with pytest.raises(ConfigurationError, match="schema_translate_map renames schema circle"):
        Database(engine=renaming)
