"""Calls that go to the driver directly: when they may, what they prepare, and that they answer as a cursor does."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg import pq
from sqlalchemy import create_engine, event, text
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session

from gathering_pipeline import (
    AsyncRunRepository,
    Database,
    DatabaseSettings,
    IllegalTransitionError,
    PipelineRun,
    RunNotFoundError,
    RunRepository,
)
from gathering_pipeline.connections import AsyncDirectConnection, DirectConnection, Statement, direct
from tests.support.runs import store
from tests.support.sessions import driver_connection, new_run

PARAMETERS: dict[str, Any] = {"number": 7, "word": "naïve ☃", "nothing": None, "flag": True, "fraction": 0.1}
ECHO = Statement("""
SELECT json_build_array(%(number)s::bigint, %(word)s::text, %(nothing)s::text, %(flag)s::boolean, %(fraction)s::float8,
                        %(number)s::bigint + 1)::text""")


@contextmanager
def direct_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The statements that go the direct way during a block."""
    sent: list[str] = []

    def spy(kind: type[Any]) -> None:
        steps = kind._steps

        def recorded(self: Any, statement: Statement, parameters: Any) -> Any:
            sent.append(statement.sql)
            return steps(self, statement, parameters)

        monkeypatch.setattr(kind, "_steps", recorded)

    with monkeypatch.context():
        spy(DirectConnection)
        spy(AsyncDirectConnection)
        yield sent


def names(driver: psycopg.Connection) -> list[str]:
    """Names of the prepared statements of a session."""
    with driver.cursor() as cursor:
        rows = cursor.execute("SELECT name FROM pg_prepared_statements ORDER BY prepare_time", prepare=False).fetchall()
    return [name for (name,) in rows]


def in_loop(database: Database, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def whole() -> None:
        await work()
        await database.adispose()

    asyncio.run(whole())


# --- when -------------------------------------------------------------------------------------------------------------


def test_fetch_returns_what_a_cursor_returns(database: Database) -> None:
    with database.session(autocommit=True) as session:
        driver = driver_connection(session)
        assert isinstance(driver, DirectConnection)
        by_cursor = driver.execute(ECHO.sql.encode(), PARAMETERS).fetchall()
        assert driver.fetch(ECHO, PARAMETERS) == [row[0] for row in by_cursor]


def test_call_in_autocommit_is_direct(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = new_run(database)
    with direct_calls(monkeypatch) as sent, database.session(autocommit=True) as session:
        RunRepository(session).start(run_id)
        RunRepository(session).get(run_id)
    assert len(sent) == 2


def test_call_in_a_transaction_is_direct_after_begin(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = new_run(database)
    with direct_calls(monkeypatch) as sent, database.session() as session:
        RunRepository(session).start(run_id)  # sends BEGIN first
        assert sent == []
        RunRepository(session).get(run_id)
        assert len(sent) == 1
        session.rollback()
        assert RunRepository(session).get(run_id).status == "pending"


def test_async_call_needs_no_greenlet(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = new_run(database)
    switches: list[object] = []
    run_sync = AsyncSession.run_sync

    async def counted(self: AsyncSession, action: Any, *arguments: Any, **keywords: Any) -> Any:
        switches.append(action)
        return await run_sync(self, action, *arguments, **keywords)

    async def work() -> None:
        async with database.async_session(autocommit=True) as session:
            runs = AsyncRunRepository(session)
            await runs.start(run_id)
            switches.clear()
            for _ in range(3):
                await runs.get(run_id)
            assert switches == []

    monkeypatch.setattr(AsyncSession, "run_sync", counted)
    with direct_calls(monkeypatch) as sent:
        in_loop(database, work)
    assert len(sent) == 4


def test_async_calls_of_a_scoped_session_use_the_connection_of_their_task(database: Database) -> None:
    run_ids = [new_run(database) for _ in range(2)]

    async def work() -> None:
        scoped = async_scoped_session(async_sessionmaker(database.async_engine), asyncio.current_task)
        runs = AsyncRunRepository(scoped)
        both_started = asyncio.Barrier(2)

        async def task(run_id: int) -> None:
            await runs.start(run_id)
            await both_started.wait()  # both transactions are open
            assert [(await runs.get(other)).status == "running" for other in run_ids] == [
                other == run_id for other in run_ids
            ]
            await both_started.wait()
            await scoped.rollback()
            await scoped.remove()

        await asyncio.gather(*map(task, run_ids))

    in_loop(database, work)


def test_async_call_with_pending_changes_flushes_them(database: Database) -> None:
    async def work() -> None:
        async with database.async_session() as session:
            runs = AsyncRunRepository(session)
            pipeline_id = await session.run_sync(lambda sync: store(sync))
            run = await runs.create(pipeline_id)
            row = await session.get(PipelineRun, run.id)
            assert row is not None
            row.error_message = "written by hand"
            assert (await runs.get(run.id)).error_message == "written by hand"

    in_loop(database, work)


@pytest.mark.parametrize("where", ["engine", "class"])
@pytest.mark.parametrize("name", ["before_cursor_execute", "after_cursor_execute"])
def test_call_with_a_listener_is_seen_by_it(database: Database, name: str, where: str) -> None:
    run_id = new_run(database)
    seen: list[str] = []
    target = database.engine if where == "engine" else Engine

    def listener(_connection: Any, _cursor: Any, statement: str, *_more: Any) -> None:
        seen.append(statement)

    event.listen(target, name, listener)
    try:
        with database.session(autocommit=True) as session:
            RunRepository(session).start(run_id)
            RunRepository(session).get(run_id)
    finally:
        event.remove(target, name, listener)
    assert [("start_run" in statement) for statement in seen] == [True, False]


def test_refused_call_is_seen_by_handle_error(database: Database) -> None:
    run_id = new_run(database)
    seen: list[str | None] = []

    @event.listens_for(database.engine, "handle_error")
    def listener(context: Any) -> None:
        seen.append(context.original_exception.sqlstate)

    with database.session(autocommit=True) as session:
        RunRepository(session).start(run_id)
        with pytest.raises(IllegalTransitionError):
            RunRepository(session).start(run_id)
    assert seen == ["PL001"]


def test_call_with_echo_is_logged(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    engine = create_engine(make_url(database_url), echo=True)
    with caplog.at_level(logging.INFO, "sqlalchemy.engine"), Session(engine) as session:
        for _ in range(2):
            with pytest.raises(RunNotFoundError):
                RunRepository(session).get(1)
    engine.dispose()
    assert sum("FROM circle.pipeline_runs r" in record.getMessage() for record in caplog.records) == 2


def test_call_over_a_foreign_connection_class_goes_through_sqlalchemy(
    database_url: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = new_run(database)
    engine = create_engine(make_url(database_url), isolation_level="AUTOCOMMIT")
    with direct_calls(monkeypatch) as sent, Session(engine) as session:
        runs = RunRepository(session)
        assert runs.start(run_id).status == "running"
        with pytest.raises(IllegalTransitionError) as caught:
            runs.start(run_id)
        assert isinstance(caught.value.__cause__, psycopg.Error)
    engine.dispose()
    assert sent == []


def test_async_call_over_a_foreign_connection_class_goes_through_sqlalchemy(
    database_url: str, database: Database
) -> None:
    run_id = new_run(database)

    async def work() -> None:
        engine = create_async_engine(make_url(database_url), isolation_level="AUTOCOMMIT")
        async with AsyncSession(engine) as session:
            runs = AsyncRunRepository(session)
            assert (await runs.start(run_id)).status == "running"
            with pytest.raises(IllegalTransitionError):
                await runs.start(run_id)
        await engine.dispose()

    in_loop(database, work)


def test_call_with_a_foreign_cursor_class_is_seen_by_it(database: Database) -> None:
    run_id = new_run(database)
    seen: list[Any] = []

    class Cursor(psycopg.Cursor[Any]):
        def execute(self, query: Any, *arguments: Any, **keywords: Any) -> Any:
            seen.append(query)
            return super().execute(query, *arguments, **keywords)

    with database.session(autocommit=True) as session:
        driver_connection(session).cursor_factory = Cursor
        RunRepository(session).start(run_id)
        driver_connection(session).cursor_factory = psycopg.Cursor
    assert len(seen) == 1


def test_call_with_another_client_encoding_goes_through_sqlalchemy(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with database.session() as session:
        runs = RunRepository(session)
        run = runs.create(store(session), {"name": "naïve"})
        session.execute(text("SET client_encoding = 'LATIN1'"))
        with direct_calls(monkeypatch) as sent:
            assert runs.get(run.id).trigger_data == {"name": "naïve"}
        assert sent == []
        session.execute(text("SET client_encoding = 'UTF8'"))


@pytest.mark.parametrize("kind", ["pipeline", "stream", "failed"])
def test_direct_inside_a_pipeline_stream_or_failed_transaction_is_none(database: Database, kind: str) -> None:
    with database.session() as session:
        driver = driver_connection(session)
        assert isinstance(driver, DirectConnection)
        session.execute(text("SELECT 1"))
        assert direct(session.connection()) is driver
        if kind == "pipeline":
            with driver.pipeline():
                assert direct(session.connection()) is None
        elif kind == "stream":
            for _ in driver.cursor().stream("SELECT generate_series(1, 3)"):
                assert direct(session.connection()) is None
        else:
            with pytest.raises(psycopg.errors.DivisionByZero):
                driver.execute("SELECT 1 / 0")
            assert direct(session.connection()) is None
        session.rollback()


# --- what is prepared -------------------------------------------------------------------------------------------------


def test_fetch_prepares_a_statement_after_the_threshold(database_url: str) -> None:
    with Database(database_url, settings=DatabaseSettings(prepare_threshold=2)) as database:
        with database.session(autocommit=True) as session:
            driver = driver_connection(session)
            assert isinstance(driver, DirectConnection)
            prepared = []
            for _ in range(4):
                driver.fetch(ECHO, PARAMETERS)
                prepared.append(names(driver))
    assert prepared == [[], [], ["gathering_1"], ["gathering_1"]]


@pytest.mark.parametrize(("threshold", "autocommit"), [(None, True), (0, False)])
def test_fetch_in_a_transaction_or_without_threshold_prepares_nothing(
    database_url: str, threshold: int | None, autocommit: bool
) -> None:
    with Database(database_url, settings=DatabaseSettings(prepare_threshold=threshold)) as database:
        with database.session(autocommit=autocommit) as session:
            session.execute(text("SELECT 1"), execution_options={"no_parameters": True})
            driver = driver_connection(session)
            assert isinstance(driver, DirectConnection)
            for _ in range(3):
                driver.fetch(ECHO, PARAMETERS)
            assert [name for name in names(driver) if name.startswith("gathering")] == []


@pytest.mark.parametrize(
    "disturbance",
    [
        "DISCARD ALL",
        "DEALLOCATE ALL",
        "DEALLOCATE gathering_{turn}",
        "CREATE TABLE t{turn} (a integer)",
        "ANALYZE pg_class",
    ],
)
def test_call_after_a_disturbance_of_the_session_succeeds(database_url: str, disturbance: str) -> None:
    with Database(database_url, settings=DatabaseSettings(prepare_threshold=0)) as database:
        run_id = new_run(database)
        with database.session(autocommit=True) as session:
            runs = RunRepository(session)
            runs.get(run_id)
            for turn in (1, 2):
                driver_connection(session).execute(disturbance.format(turn=turn).encode(), prepare=False)
                assert runs.get(run_id).status == "pending"
                assert runs.get(run_id).status == "pending"


def test_fetch_after_ddl_changed_the_result_prepares_again(database_url: str) -> None:
    statement = Statement("SELECT a FROM changing")
    with Database(database_url, settings=DatabaseSettings(prepare_threshold=0)) as database:
        with database.session(autocommit=True) as session:
            driver = driver_connection(session)
            assert isinstance(driver, DirectConnection)
            driver.execute("CREATE TABLE changing (a integer)")
            driver.execute("INSERT INTO changing VALUES (1)")
            assert driver.fetch(statement, {}) == ["1"]
            driver.execute("ALTER TABLE changing ALTER a TYPE numeric(5, 2)")
            assert driver.fetch(statement, {}) == ["1.00"]
            assert driver.fetch(statement, {}) == ["1.00"]


def test_call_after_a_rollback_succeeds(database_url: str) -> None:
    with Database(database_url, settings=DatabaseSettings(prepare_threshold=0)) as database:
        run_id = new_run(database)
        for _ in range(3):
            with database.session(autocommit=True) as session:
                assert RunRepository(session).get(run_id).status == "pending"
            with database.session() as session:  # the same pooled connection
                RunRepository(session).start(run_id)
                session.rollback()


def test_connection_behind_a_pooler_prepares_nothing(database_url: str, pooler: str | None) -> None:
    if pooler is None:
        pytest.skip("no PgBouncer: make pytest-pgbouncer runs this")
    url = make_url(pooler).set(database=make_url(database_url).database)
    with Database(url, settings=DatabaseSettings(prepare_threshold=5)) as database:
        with database.session(autocommit=True) as session:
            assert driver_connection(session).prepare_threshold is None


@pytest.mark.parametrize("threshold", [0, 5, None])
def test_calls_of_many_clients_behind_a_pooler_get_their_own_answers(
    database_url: str, pooler: str | None, threshold: int | None
) -> None:
    """Eight clients, more than PgBouncer has servers for, make 60 calls each, none of them twice in a row."""
    if pooler is None:
        pytest.skip("no PgBouncer: make pytest-pgbouncer runs this")
    url = make_url(pooler).set(database=make_url(database_url).database)
    settings = DatabaseSettings(prepare_threshold=threshold, pool_size=1, max_overflow=0)

    def client(number: int) -> int:
        right = 0
        with Database(url, settings=settings) as database, database.session(autocommit=True) as session:
            runs = RunRepository(session)
            pipeline_id = store(session, name=f"pipeline of client {number}")
            for turn in range(15):
                run = runs.create(pipeline_id, {"client": number, "turn": turn})
                right += run.trigger_data == {"client": number, "turn": turn}
                right += runs.start(run.id).status == "running"
                right += runs.start_node(run.id, "a").node_id == "a"
                right += runs.complete_node(run.id, "a", {"turn": turn}).run_id == run.id
        return right

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(client, range(8))) == [60] * 8


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT (1 / %(number)s::integer)::text",
        "SELECT no_such_function(%(number)s::integer)",
        "SELECT '{\"a\": 1}'::jsonb::text, %(number)s::text; SELECT 2",
        "INSERT INTO circle.pipeline_runs (pipeline_id) VALUES (%(number)s::integer) RETURNING id::text",
        "SELECT circle.start_run(%(number)s, NULL)::text",
    ],
)
def test_refused_fetch_raises_what_a_cursor_raises(database: Database, sql: str) -> None:
    with database.session(autocommit=True) as session:
        driver = driver_connection(session)
        assert isinstance(driver, DirectConnection)
        with pytest.raises(psycopg.Error) as by_cursor:
            driver.execute(sql.encode(), {"number": 0})
        with pytest.raises(psycopg.Error) as directly:
            driver.fetch(Statement(sql), {"number": 0})
        assert driver.info.transaction_status == pq.TransactionStatus.IDLE
    assert type(directly.value) is type(by_cursor.value)
    assert directly.value.sqlstate == by_cursor.value.sqlstate
    for field in ("message_primary", "message_detail", "schema_name", "table_name", "constraint_name", "severity"):
        assert getattr(directly.value.diag, field) == getattr(by_cursor.value.diag, field)


def test_refused_call_in_a_transaction_fails_the_transaction(database: Database) -> None:
    with database.session() as session:
        runs = RunRepository(session)
        with pytest.raises(RunNotFoundError):
            runs.get(2**31)
        with pytest.raises(RunNotFoundError):
            runs.start(2**31)
        assert driver_connection(session).info.transaction_status == pq.TransactionStatus.INERROR
        session.rollback()
