"""What becomes of a session whose block goes on after a refused call, a broken connection or an interrupt."""

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, suppress
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import InternalError, InvalidRequestError, OperationalError, ProgrammingError
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

from gathering_pipeline import (
    AsyncEventRepository,
    AsyncPipelineRepository,
    AsyncRunRepository,
    CommitIndeterminateError,
    Database,
    DatabaseSettings,
    DatabaseUnavailableError,
    EventRepository,
    IntegrityViolationError,
    InvalidDataError,
    Pipeline,
    PipelineCreate,
    PipelineRepository,
    PipelineRun,
    PipelineStatus,
    RunNotFoundError,
    RunRepository,
    SchemaRevisionError,
    TransactionAbortedError,
    is_transient,
)

NODES: list[dict[str, Any]] = [{"id": "t", "type": "trigger", "name": "T"}]
KEPT = PipelineCreate(name="kept", status=PipelineStatus.ACTIVE, nodes=NODES)
BLOCKED = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
COMMANDS = r"'alembic upgrade head', 'gathering-pipeline db upgrade' or Database\(\).upgrade\(\)"


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


class Blocker:
    """Holds a lock on all of ``circle.pipelines`` and ``pipeline_runs``, and does something to who waits for it."""

    def __init__(self, raw: psycopg.Connection, connect: Callable[[str], psycopg.Connection], url: str) -> None:
        self._raw = raw
        self._holder = connect(url)
        self._holder.execute("BEGIN; LOCK circle.pipelines, circle.pipeline_runs IN ACCESS EXCLUSIVE MODE")

    def waiter(self) -> int:
        while not (found := self._raw.execute(BLOCKED).fetchone()):
            pass
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


@pytest.fixture
def blocker(
    raw: psycopg.Connection, connect: Callable[[str], psycopg.Connection], database_url: str
) -> Iterator[Callable[[], Blocker]]:
    # Python leaves SIGINT ignored where it is started so, as in the background of a shell.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: Blocker(raw, connect, database_url)
    signal.signal(signal.SIGINT, before)


# --- a refused call ends the transaction ------------------------------------------------------------------------------


def test_a_block_that_swallows_a_refusal_is_no_success(database: Database, raw: psycopg.Connection) -> None:
    with pytest.raises(TransactionAbortedError, match=r"begin_nested\(\).*autocommit=True"):
        with database.session() as session:
            PipelineRepository(session).create(KEPT)
            with suppress(RunNotFoundError):
                RunRepository(session).start(1)
    assert names(raw) == []
    with database.session() as session:  # the connection is as good as before
        PipelineRepository(session).create(KEPT)
    assert names(raw) == ["kept"]


def test_so_is_an_async_one(database: Database, raw: psycopg.Connection) -> None:
    async def work() -> None:
        with pytest.raises(TransactionAbortedError):
            async with database.async_session() as session:
                await AsyncPipelineRepository(session).create(KEPT)
                with suppress(RunNotFoundError):
                    await AsyncRunRepository(session).start(1)
        assert names(raw) == []
        async with database.async_session() as session:
            await AsyncPipelineRepository(session).create(KEPT)

    run_async(database, work)
    assert names(raw) == ["kept"]


def test_so_is_a_commit_of_the_callers_own(database: Database, raw: psycopg.Connection) -> None:
    with database.session() as session:
        PipelineRepository(session).create(KEPT)
        with suppress(RunNotFoundError):
            RunRepository(session).start(1)
        with pytest.raises(TransactionAbortedError):
            session.commit()
        session.rollback()
        PipelineRepository(session).create(KEPT.model_copy(update={"name": "second"}))
    assert names(raw) == ["second"]


def test_the_next_call_after_a_refusal_says_so_too(database: Database) -> None:
    with pytest.raises(TransactionAbortedError) as caught, database.session() as session:
        with suppress(RunNotFoundError):
            RunRepository(session).start(1)
        RunRepository(session).counts()
    assert not is_transient(caught.value)


def test_a_refused_flush_ends_the_transaction_too(database: Database, raw: psycopg.Connection) -> None:
    with pytest.raises(TransactionAbortedError), database.session() as session:
        PipelineRepository(session).create(KEPT)
        session.add(PipelineRun(pipeline_id=0))
        with pytest.raises(IntegrityViolationError) as refused:
            RunRepository(session).counts()
        assert refused.value.constraint == "pipeline_runs_pipeline_id_fkey"
        with pytest.raises(TransactionAbortedError):
            RunRepository(session).counts()
    assert names(raw) == []


def test_what_the_caller_rolled_back_is_over(database: Database, raw: psycopg.Connection) -> None:
    with database.session() as session:
        with suppress(RunNotFoundError):
            RunRepository(session).start(1)
        session.rollback()
    with database.session() as session:
        with suppress(RunNotFoundError):
            RunRepository(session).start(1)
        session.rollback()
        PipelineRepository(session).create(KEPT)
    assert names(raw) == ["kept"]


def test_a_session_that_did_nothing_needs_no_server() -> None:
    with Database("postgresql://localhost:1/name") as database, database.session() as session:
        assert session.in_transaction() is False


def test_in_autocommit_a_refusal_ends_nothing(database: Database, raw: psycopg.Connection) -> None:
    async def work() -> None:
        async with database.async_session(autocommit=True) as session:
            with suppress(RunNotFoundError):
                await AsyncRunRepository(session).start(1)
            await AsyncPipelineRepository(session).create(KEPT)
            with suppress(RunNotFoundError):
                await AsyncRunRepository(session).start(1)

    with database.session(autocommit=True) as session:
        with suppress(RunNotFoundError):
            RunRepository(session).start(1)
        PipelineRepository(session).create(KEPT)
        with suppress(RunNotFoundError):
            RunRepository(session).start(1)
    run_async(database, work)
    assert names(raw) == ["kept", "kept"]


def test_a_savepoint_keeps_the_rest(database: Database, raw: psycopg.Connection) -> None:
    def refused(session: Session) -> None:
        with pytest.raises(RunNotFoundError), session.begin_nested():
            PipelineRepository(session).create(KEPT.model_copy(update={"name": "lost"}))
            RunRepository(session).start(1)

    async def work() -> None:
        async with database.async_session() as session:
            await AsyncPipelineRepository(session).create(KEPT)
            with pytest.raises(RunNotFoundError):
                async with session.begin_nested():
                    await AsyncPipelineRepository(session).create(KEPT.model_copy(update={"name": "lost"}))
                    await AsyncRunRepository(session).start(1)
            await AsyncPipelineRepository(session).create(KEPT)

    with database.session() as session:
        PipelineRepository(session).create(KEPT)
        refused(session)
        PipelineRepository(session).create(KEPT)
    run_async(database, work)
    assert names(raw) == ["kept"] * 4


def test_a_savepoint_whose_own_block_swallows_the_refusal_is_no_success(
    database: Database, raw: psycopg.Connection
) -> None:
    with pytest.raises(TransactionAbortedError), database.session() as session:
        PipelineRepository(session).create(KEPT)
        with pytest.raises(InternalError, match="aborted"), session.begin_nested():
            with suppress(RunNotFoundError):
                RunRepository(session).start(1)
    assert names(raw) == []


# --- a schema that is not there, or is an older one -------------------------------------------------------------------


@pytest.mark.parametrize("autocommit", [False, True])
@pytest.mark.parametrize("revision", [None, "007_pipeline_execution", "010b_graph_guard"])
def test_a_call_that_misses_something_of_the_schema_says_what_to_run(
    empty_database_url: str, revision: str | None, autocommit: bool
) -> None:
    calls: list[Callable[[Session], object]] = [lambda session: EventRepository(session).read()]
    acalls: list[Callable[[AsyncSession], Coroutine[Any, Any, object]]] = [
        lambda session: AsyncEventRepository(session).read()
    ]
    if revision != "010b_graph_guard":
        calls += [
            lambda session: RunRepository(session).start(1),
            lambda session: PipelineRepository(session).create(KEPT),
        ]
        acalls += [lambda session: AsyncPipelineRepository(session).create(KEPT)]

    async def work() -> None:
        for acall in acalls:
            with pytest.raises(SchemaRevisionError, match=rf"lacks .*: run {COMMANDS}"):
                async with database.async_session(autocommit=autocommit) as session:
                    await acall(session)

    with Database(empty_database_url) as database:
        if revision is not None:
            database.upgrade(revision)
        for call in calls:
            with pytest.raises(SchemaRevisionError, match=rf"lacks .*: run {COMMANDS}") as caught:
                with database.session(autocommit=autocommit) as session:
                    call(session)
            assert caught.value.missing
            assert not is_transient(caught.value)
        run_async(database, work)


def test_a_table_of_the_callers_own_that_is_not_there_is_none_of_the_schema(database: Database) -> None:
    class Theirs(DeclarativeBase):
        pass

    class Missing(Theirs):
        __tablename__ = "missing"
        id: Mapped[int] = mapped_column(primary_key=True)

    with pytest.raises(ProgrammingError, match="missing"), database.session() as session:
        session.add(Missing(id=1))
        RunRepository(session).counts()


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("INSERT INTO audit_log VALUES (1)", 'relation "audit_log"'),
        ("INSERT INTO audit.log VALUES (1)", 'relation "audit.log"'),
        ("PERFORM audit(NEW.id)", r"function audit\(integer\)"),
        ("PERFORM mine FROM pg_class", 'column "mine"'),
        ("PERFORM NEW.mine", 'has no field "mine"'),
        ("IF NEW.mine THEN NULL; END IF", 'has no field "mine"'),
        ("SELECT 1 INTO NEW.mine", 'has no field "mine"'),
        ("PERFORM audit(NEW)", r"function audit\(circle\.pipeline"),
        ("PERFORM p.mine FROM circle.pipelines p", "column p.mine"),
    ],
)
def test_nor_is_what_their_own_trigger_misses(
    database: Database, raw: psycopg.Connection, body: str, told: str
) -> None:
    with database.session() as session:
        pipeline = PipelineRepository(session).create(KEPT).id
    function = (
        f"CREATE FUNCTION public.audited() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body}; RETURN NEW; END $$"
    )
    raw.execute(function.encode())
    trigger = "CREATE TRIGGER audited AFTER INSERT ON {} FOR EACH ROW EXECUTE FUNCTION public.audited()"
    for table in ("circle.pipelines", "circle.pipeline_runs"):
        raw.execute(trigger.format(table).encode())
    with pytest.raises(psycopg.ProgrammingError, match=told), database.session() as session:
        RunRepository(session).create(pipeline)
    with pytest.raises(ProgrammingError, match=told), database.session() as session:
        PipelineRepository(session).create(KEPT)


@pytest.mark.parametrize(
    ("column", "call"),
    [
        ("pipeline_runs DROP worker_id", lambda session: RunRepository(session).claim("w", timedelta(seconds=9))),
        # as a field of a trigger's NEW
        ("pipeline_runs DROP lease_expires_at", lambda session: RunRepository(session).start(1)),
        ("pipelines DROP description", lambda session: PipelineRepository(session).create(KEPT)),
        ("pipeline_runs DROP id", lambda session: RunRepository(session).get(1)),
    ],
)
def test_a_column_of_ours_that_is_not_there_is_of_the_schema(
    database: Database, raw: psycopg.Connection, column: str, call: Callable[[Session], object]
) -> None:
    new_run(database)
    raw.execute(f"ALTER TABLE circle.{column} CASCADE".encode())
    with pytest.raises(SchemaRevisionError), database.session() as session:
        call(session)


# --- connections that break -------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[Session, int], object]] = {
    "a function": lambda session, run_id: RunRepository(session).start(run_id),
    "through SQLAlchemy": lambda session, _: PipelineRepository(session).create(KEPT),
}
ACALLS: dict[str, Callable[[AsyncSession, int], Coroutine[Any, Any, object]]] = {
    "a function": lambda session, run_id: AsyncRunRepository(session).start(run_id),
    "through SQLAlchemy": lambda session, _: AsyncPipelineRepository(session).create(KEPT),
}


@pytest.mark.parametrize("how", CALLS)
def test_in_autocommit_a_break_leaves_the_call_open(
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
def test_in_autocommit_a_read_that_breaks_off_leaves_nothing_open(
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
def test_in_a_transaction_a_break_loses_it_for_certain(
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


def test_a_break_in_the_last_flush_is_none_of_the_commit(database: Database, raw: psycopg.Connection) -> None:
    with pytest.raises(OperationalError) as caught, database.session() as session:
        pid = session.execute(text("SELECT pg_backend_pid()")).scalar_one()
        session.add(Pipeline(name="lost", nodes=NODES, edges=[]))
        raw.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
    assert is_transient(caught.value)
    assert names(raw) == []


@pytest.mark.parametrize("autocommit", [False, True])
def test_a_break_is_told_once_whatever_the_size_of_the_pool(
    database: Database, raw: psycopg.Connection, autocommit: bool
) -> None:
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(database.session(autocommit=True)).execute(text("SELECT 1"))
    raw.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    with pytest.raises(DatabaseUnavailableError), database.session(autocommit=autocommit) as session:
        RunRepository(session).counts()
    for _ in range(4):
        with database.session(autocommit=autocommit) as session:
            RunRepository(session).counts()


def test_an_exhausted_pool(database_url: str) -> None:
    settings = DatabaseSettings(pool_size=1, max_overflow=0, pool_timeout=timedelta(seconds=0.1))
    with Database(database_url, settings=settings) as database, database.session() as first:
        first.execute(text("SELECT 1"))
        with pytest.raises(DatabaseUnavailableError, match="no connection became free") as caught:
            with database.session() as second:
                RunRepository(second).counts()
        assert is_transient(caught.value)


# --- interrupts -------------------------------------------------------------------------------------------------------


def _driver(session: Session) -> psycopg.Connection:
    driver = session.connection().connection.driver_connection
    assert isinstance(driver, psycopg.Connection | psycopg.AsyncConnection)
    return driver  # type: ignore[return-value]


@pytest.mark.parametrize("autocommit", [False, True])
def test_an_interrupted_connection_is_not_used_again(
    database: Database, blocker: Callable[[], Blocker], autocommit: bool
) -> None:
    run_id = new_run(database)
    with pytest.raises(KeyboardInterrupt), database.session(autocommit=autocommit) as session:
        driver = _driver(session)
        session.execute(text("SELECT 1"))
        holder = blocker()
        interrupter = holder.meanwhile(holder.interrupt)
        try:
            RunRepository(session).start(run_id)
        finally:
            assert driver.closed
            interrupter.join()
            holder.end()
    with database.session() as session:
        assert RunRepository(session).start(run_id).status == "running"


@pytest.mark.parametrize("autocommit", [False, True])
def test_nor_is_a_cancelled_one(database: Database, blocker: Callable[[], Blocker], autocommit: bool) -> None:
    async def work() -> None:
        async with database.async_session(autocommit=autocommit) as session:
            driver = await session.run_sync(_driver)
            await session.execute(text("SELECT 1"))
            holder = blocker()
            call = asyncio.ensure_future(AsyncRunRepository(session).start(run_id))
            await asyncio.to_thread(holder.waiter)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert driver.closed
            holder.end()
            if not autocommit:
                with pytest.raises(TransactionAbortedError):
                    await AsyncRunRepository(session).counts()
                await session.rollback()
            assert (await AsyncRunRepository(session).start(run_id)).status == "running"

    run_id = new_run(database)
    run_async(database, work)


def test_a_transaction_that_was_interrupted_is_not_committed(
    database: Database, raw: psycopg.Connection, blocker: Callable[[], Blocker]
) -> None:
    run_id = new_run(database)
    with pytest.raises(TransactionAbortedError), database.session() as session:
        session.execute(text("SELECT 1"))
        holder = blocker()
        interrupter = holder.meanwhile(holder.interrupt)
        with suppress(KeyboardInterrupt):
            RunRepository(session).start(run_id)
        interrupter.join()
        holder.end()
    assert raw.execute("SELECT status FROM circle.pipeline_runs").fetchall() == [("pending",)]


# --- the end ----------------------------------------------------------------------------------------------------------


def test_an_error_while_disposing_is_not_lost(database: Database) -> None:
    async def use() -> None:
        async with database.async_session() as session:
            await session.execute(text("SELECT 1"))

    asyncio.run(use())

    @event.listens_for(database.async_engine.sync_engine, "engine_disposed")
    def fail(_engine: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        database.dispose()


# --- wrong types ------------------------------------------------------------------------------------------------------


def test_what_is_no_session_is_refused_at_once_with_where_to_get_one(database: Database) -> None:
    wrong: list[Any] = [database, database.session(), AsyncSession(), None]
    for kind in (PipelineRepository, RunRepository, EventRepository):
        for value in wrong:
            with pytest.raises(
                InvalidDataError, match=rf"^session must be of type Session, not .*Async{kind.__name__}"
            ):
                kind(value)
    for akind in (AsyncPipelineRepository, AsyncRunRepository, AsyncEventRepository):
        for value in (database, Session(), None):
            with pytest.raises(InvalidDataError, match="must be of type AsyncSession, not .* 'async with database"):
                akind(value)  # type: ignore[arg-type]


def test_so_are_dicts_where_a_schema_is_needed(session: Session) -> None:
    values: Any = {"name": "x"}
    with pytest.raises(InvalidDataError, match=r"data must be of type PipelineCreate, not dict: PipelineCreate\("):
        PipelineRepository(session).create(values)
    with pytest.raises(InvalidDataError, match=r"changes must be of type PipelineUpdate, not dict"):
        PipelineRepository(session).update(1, values)
    with pytest.raises(InvalidDataError, match="settings must be of type DatabaseSettings, not dict"):
        Database(settings=values)
    assert not session.in_transaction()  # no SQL was sent


def test_a_scoped_session_is_a_session(database: Database) -> None:
    scoped = scoped_session(sessionmaker(database.engine))
    assert RunRepository(scoped).counts()  # type: ignore[arg-type]
    scoped.remove()


def test_so_is_an_async_one_in_whichever_task_it_is_used(database: Database, raw: psycopg.Connection) -> None:
    async def create(pipelines: AsyncPipelineRepository, scoped: async_scoped_session[AsyncSession]) -> None:
        await pipelines.create(KEPT)
        await scoped.commit()
        await scoped.remove()

    async def work() -> None:
        scoped = async_scoped_session(async_sessionmaker(database.async_engine), asyncio.current_task)
        pipelines = AsyncPipelineRepository(scoped)
        await asyncio.gather(*(create(pipelines, scoped) for _ in range(3)))
        await create(pipelines, scoped)

    run_async(database, work)
    assert len(names(raw)) == 4


def test_a_call_that_is_not_awaited_is_named(database: Database) -> None:
    call = AsyncRunRepository(AsyncSession()).get(1)
    assert "RunRepository.get" in repr(call)
    call.close()


def test_a_repository_ends_with_its_session(database: Database) -> None:
    """A closed session would begin a transaction that nobody commits."""
    with database.session() as session:
        runs = RunRepository(session)
    with pytest.raises(InvalidRequestError, match="closed"):
        runs.counts()
