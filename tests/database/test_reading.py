"""``reading`` and ``areading``: read-only, on a standby where there is one; listeners on a standby."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, aclosing, closing
from datetime import timedelta

import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.orm import Session

from gathering_pipeline import (
    AsyncRunRepository,
    ConfigurationError,
    Database,
    DatabaseSettings,
    DatabaseUnavailableError,
    EventRepository,
    EventType,
    ForkedConnectionError,
    Pipeline,
    PipelineRepository,
    PipelineUpdate,
    ReadOnlySessionError,
    RunNotFoundError,
    RunRead,
    RunRepository,
    RunStatus,
    TransactionAbortedError,
    is_transient,
)
from gathering_pipeline.embedded import EmbeddedServer
from tests.support import servers
from tests.support.databases import contents
from tests.support.forks import in_child
from tests.support.pipelines import new
from tests.support.runs import LEASE, done, store
from tests.support.sessions import names

LIMIT_S = 30


def mine() -> Pipeline:
    return Pipeline(name="x", nodes=[{"id": "a", "type": "trigger", "name": "A"}])


def flush(session: Session) -> None:
    session.add(mine())
    session.flush()


def flush_by_call(session: Session) -> None:
    session.add(mine())
    RunRepository(session).counts()


WRITES: dict[str, Callable[[Session, int], object]] = {
    "create pipeline": lambda session, _: PipelineRepository(session).create(new()),
    "update": lambda session, _: PipelineRepository(session).update(1, PipelineUpdate(name="q")),
    "pause": lambda session, _: PipelineRepository(session).pause(1),
    "delete": lambda session, _: PipelineRepository(session).delete(1, force=True),
    "create": lambda session, _: RunRepository(session).create(1),
    "create again": lambda session, _: RunRepository(session).create(1, idempotency_key="k"),
    "claim": lambda session, _: RunRepository(session).claim("w", LEASE),
    "claim nothing": lambda session, _: RunRepository(session).claim("w", LEASE, pipelines=[]),
    "advance": lambda session, run: RunRepository(session).advance(run),
    "start": lambda session, run: RunRepository(session).start(run),
    "start_node": lambda session, run: RunRepository(session).start_node(run, "a"),
    "complete_node": lambda session, run: RunRepository(session).complete_node(run, "a"),
    "fail_node": lambda session, run: RunRepository(session).fail_node(run, "a", "x"),
    "skip_node": lambda session, run: RunRepository(session).skip_node(run, "a"),
    "record": lambda session, run: RunRepository(session).record(run, [done("a")]),
    "record_run": lambda session, _: RunRepository(session).record_run(1, [done("a")]),
    "finish": lambda session, run: RunRepository(session).finish(run),
    "complete": lambda session, run: RunRepository(session).complete(run),
    "fail": lambda session, run: RunRepository(session).fail(run, "x"),
    "cancel": lambda session, run: RunRepository(session).cancel(run),
    "heartbeat": lambda session, run: RunRepository(session).heartbeat(run, LEASE, token=1),
    "release": lambda session, run: RunRepository(session).release(run, token=1),
    "append_log": lambda session, run: RunRepository(session).append_log(run, {}),
    "sweep": lambda session, _: RunRepository(session).sweep(),
    "resume": lambda session, run: RunRepository(session).resume(run),
    "rerun": lambda session, run: RunRepository(session).rerun(run),
    "recover": lambda session, _: RunRepository(session).recover(),
    "expire": lambda session, _: RunRepository(session).expire(),
    "purge": lambda session, _: RunRepository(session).purge(timedelta(0)),
    "purge events": lambda session, _: EventRepository(session).purge(timedelta(0)),
    "flush": lambda session, _: flush(session),
    "flush at the end": lambda session, _: session.add(mine()),
    "flush of a call": lambda session, _: flush_by_call(session),
    "raw SQL": lambda session, _: session.execute(text("DELETE FROM circle.pipelines")),
}


def test_reading_that_writes_raises(database: Database, session: Session, raw: psycopg.Connection) -> None:
    run = RunRepository(session).create(store(session, "a"), idempotency_key="k")
    session.commit()
    before = contents(raw)
    for write in WRITES.values():
        with pytest.raises(ReadOnlySessionError) as caught, database.reading() as reads:
            write(reads, run.id)
        assert not is_transient(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301 - made here
    assert contents(raw) == before


def test_areading_that_writes_raises(database: Database, raw: psycopg.Connection) -> None:
    async def call() -> None:
        async with database.areading() as reads:
            await AsyncRunRepository(reads).claim("w", LEASE)

    async def flush() -> None:
        async with database.areading() as reads:
            reads.add(mine())

    async def work() -> None:
        async with database:
            for write in (call, flush):
                with pytest.raises(ReadOnlySessionError):
                    await write()
            async with database.async_session() as session:  # on the connection that the reads had
                session.add(mine())

    asyncio.run(work())
    assert names(raw) == ["x"]


def test_reading_without_read_url_reads_the_database(database: Database, session: Session) -> None:
    run = RunRepository(session).create(store(session, "a"))
    session.commit()
    with database.reading() as reads:
        assert RunRepository(reads).get(run.id) == run
        assert reads.connection().exec_driver_sql("SHOW transaction_read_only").scalar() == "on"
    with database.session() as writes:  # on the same connection
        assert RunRepository(writes).start(run.id).status == "running"


def test_reading_after_refused_call_goes_on(database: Database) -> None:
    with database.reading() as reads:
        with pytest.raises(ReadOnlySessionError):
            RunRepository(reads).claim("w", LEASE)
        assert RunRepository(reads).counts()
    with pytest.raises(TransactionAbortedError), database.reading() as reads:
        with pytest.raises(ReadOnlySessionError):  # by the server
            PipelineRepository(reads).create(new())
        RunRepository(reads).counts()


def test_reading_in_a_forked_child_has_a_connection_of_its_own(database: Database) -> None:
    def counts() -> int:
        with database.reading() as own:
            RunRepository(own).counts()
        with pytest.raises(ForkedConnectionError), database.reading():
            RunRepository(reads).counts()
        return driver_pid(database)

    def leave() -> None:
        block.close()  # resets the connection in the pool, too

    with database.reading() as reads:
        RunRepository(reads).counts()
        assert in_child(counts) != reads.scalar(text("SELECT pg_backend_pid()"))
        block = ExitStack()
        block.enter_context(database.reading())
        in_child(leave)
        block.close()
        assert RunRepository(reads).counts()


def driver_pid(database: Database) -> int:
    with database.reading() as session:
        pid: int = session.scalar(text("SELECT pg_backend_pid()"))
        return pid


# --- which URL -------------------------------------------------------------------------------------------------------


def test_read_url_of_settings_is_used_with_their_database_only(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reads(database: Database) -> str | None:
        with database:
            return database._reader.url.database

    other = make_url(database_url).set(database="other").render_as_string(hide_password=False)
    own = make_url(database_url).database
    monkeypatch.setenv("GATHERING_READ_URL", other)
    monkeypatch.setenv("GATHERING_DATABASE_URL", database_url)
    assert reads(Database()) == "other"
    assert reads(Database(database_url)) == own
    assert reads(Database(engine=create_engine(database_url))) == own
    assert reads(Database(database_url, read_url=other)) == "other"
    settings = DatabaseSettings(database_url=SecretStr(database_url), read_url=SecretStr(other))
    assert reads(Database(settings=settings)) == "other"
    assert reads(Database(database_url, settings=settings)) == own
    monkeypatch.setenv("GATHERING_READ_URL", "")
    assert reads(Database()) == own
    monkeypatch.delenv("GATHERING_DATABASE_URL")
    with pytest.raises(ConfigurationError, match="there is a URL for reads, but none of the database"):
        Database(read_url=other)


@pytest.mark.parametrize("url", ["sqlite:///x", "postgresql://u:s3cret@x@h/d", ""])
def test_read_url_that_is_wrong_is_named(url: str) -> None:
    with pytest.raises(ConfigurationError, match="the URL for reads can't be (used|read)") as caught:
        Database("postgresql://h/d", read_url=url)
    assert "s3cret" not in str(caught.value)


# --- on a standby ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[EmbeddedServer, EmbeddedServer]]:
    with servers.own() as primary:
        with Database(primary.url) as database:
            database.upgrade()
        with servers.standby(primary) as standby:
            yield primary, standby


@pytest.fixture
def replicated(pair: tuple[EmbeddedServer, EmbeddedServer]) -> Iterator[Database]:
    primary, standby = pair
    with Database(primary.url, read_url=standby.url) as database:
        yield database


def until_seen(database: Database, run_id: int) -> RunRead:
    """Read a run on the standby, as soon as it is there."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        with database.reading() as reads:
            try:
                return RunRepository(reads).get(run_id)
            except RunNotFoundError:
                assert time.monotonic() < deadline
        time.sleep(0.01)


def test_reading_on_a_standby_reads_history_statistics_and_events(replicated: Database) -> None:
    with replicated.session() as session:
        run = RunRepository(session).record_run(store(session, "a>b"), [done("a"), done("b")])
    assert until_seen(replicated, run.id) == run
    with replicated.reading() as reads:
        runs = RunRepository(reads)
        assert reads.scalar(text("SELECT pg_is_in_recovery()"))
        assert runs.search(pipeline_id=run.pipeline_id).items[0].id == run.id
        assert [node.node_id for node in runs.nodes(run.id)] == ["a", "b"]
        assert runs.definition(run.id).node_map.keys() == {"a", "b"}
        assert runs.counts()[RunStatus.COMPLETED] >= 1
        assert replicated.metrics().runs == runs.counts()
        assert runs.statistics(run.pipeline_id).success_rate == 1
        assert PipelineRepository(reads).get(run.pipeline_id).run_count == 1
        assert EventRepository(reads).read(run_id=run.id).items[-1].type is EventType.PIPELINE_RUN_COMPLETED

    async def work() -> None:
        async with replicated:
            async with replicated.areading() as asynchronous:
                assert await AsyncRunRepository(asynchronous).get(run.id) == run
            with pytest.raises(ReadOnlySessionError):
                async with replicated.areading() as asynchronous:
                    await AsyncRunRepository(asynchronous).cancel(run.id)

    asyncio.run(work())
    with pytest.raises(ReadOnlySessionError), replicated.reading() as reads:
        RunRepository(reads).claim("w", LEASE)


def test_listen_on_a_standby_yields_each_event(replicated: Database) -> None:
    with replicated.session() as session:
        run = RunRepository(session).create(store(session, "a"))
        cursor = EventRepository(session).last()
    poll = timedelta(seconds=0.02)

    def cancel() -> None:
        with replicated.session() as session:
            RunRepository(session).cancel(run.id)

    with closing(replicated.listen(run.id, cursor, poll)) as events:
        timer = threading.Timer(0.2, cancel)
        timer.start()
        assert next(events).type is EventType.PIPELINE_RUN_CANCELLED
        timer.join()

    async def work() -> EventType:
        async with replicated:
            async with aclosing(replicated.alisten(run.id, cursor, poll)) as asynchronous:
                return (await anext(asynchronous)).type

    assert asyncio.run(work()) is EventType.PIPELINE_RUN_CANCELLED


def test_read_url_of_several_hosts_prefers_the_standby(pair: tuple[EmbeddedServer, EmbeddedServer]) -> None:
    primary, standby = pair
    hosts = "&".join(f"host={server.data_dir}:5432" for server in (primary, standby))
    url = f"postgresql://postgres@/postgres?{hosts}&target_session_attrs=prefer-standby"
    with Database(primary.url, read_url=url) as database, database.reading() as reads:
        assert reads.scalar(text("SELECT pg_is_in_recovery()"))
    url = f"postgresql://postgres@/postgres?host={standby.data_dir}x:5432&{hosts}&target_session_attrs=read-write"
    with Database(primary.url, read_url=url) as database, database.reading() as reads:
        assert not reads.scalar(text("SELECT pg_is_in_recovery()"))


def test_standby_reports_its_lag(pair: tuple[EmbeddedServer, EmbeddedServer]) -> None:
    with Database(pair[1].url) as database:
        health = database.health()
        assert (health.reachable, health.is_primary, health.ok) == (True, False, False)
        assert health.replication_lag is not None
        assert health.replication_lag < timedelta(minutes=1)
        with pytest.raises(DatabaseUnavailableError, match="read-only"), database.session() as session:
            RunRepository(session).recover()
