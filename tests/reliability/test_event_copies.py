"""Copies of a database: dumps that are restored in another cluster, and a logical subscriber. Data and events are the same."""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy.engine import make_url

from gathering_pipeline import Database, EventRepository, RunRepository
from gathering_pipeline.embedded import EmbeddedServer
from gathering_pipeline.errors import InvalidCursorError
from tests.support import servers
from tests.support.databases import contents
from tests.support.events import names, read_all
from tests.support.graphs import DIAMOND
from tests.support.runs import done, store
from tests.support.servers import connect

BUSY = 5_000
"""Transactions of the source that the target hasn't had, so that its numbers are ahead."""


@pytest.fixture(scope="module")
def source() -> Iterator[EmbeddedServer]:
    with servers.own() as server:
        with connect(server.url) as raw:
            raw.execute("ALTER SYSTEM SET wal_level = logical")
        servers.restart(server)
        with Database(server.url) as database:
            database.upgrade()
            with connect(server.url) as raw:
                for _ in range(BUSY):
                    raw.execute("SELECT pg_current_xact_id()")
            with database.session(autocommit=True) as session:
                live(RunRepository(session), store(session, DIAMOND))
        yield server


@pytest.fixture(scope="module")
def cluster() -> Iterator[EmbeddedServer]:
    with servers.own() as server:
        yield server


@pytest.fixture
def target(cluster: EmbeddedServer) -> Iterator[str]:
    """An empty database in the other cluster."""
    name = "target"
    with connect(cluster.url) as raw:
        raw.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'")
    yield make_url(cluster.url).set(database=name).render_as_string(hide_password=False)
    with connect(cluster.url) as raw:
        raw.execute(f"DROP DATABASE {name} WITH (FORCE)")


def live(runs: RunRepository, pipeline: int) -> None:
    """A run of each kind."""
    completed, running, pending, failed = (runs.create(pipeline).id for _ in range(4))
    runs.record(completed, [done(name) for name in "abcd"])
    runs.finish(completed)
    runs.advance(running)
    runs.advance(running, [done("a")])
    runs.start(failed)
    runs.start_node(failed, "a")
    runs.fail(failed, "no more")
    assert runs.get(pending).status == "pending"


def dump(source: EmbeddedServer, file: Path, *options: str) -> None:
    where = ("-h", str(source.data_dir), "-U", "postgres", "-d", "postgres")
    servers.program(source, "pg_dump", *where, "--format=custom", "--schema=circle", *options, "-f", str(file))


def restore(cluster: EmbeddedServer, file: Path, *options: str, **environment: str) -> None:
    where = ("-h", str(cluster.data_dir), "-U", "postgres", "-d", "target", "--exit-on-error")
    servers.program(cluster, "pg_restore", *where, *options, str(file), **environment)


Copy = Callable[[EmbeddedServer, EmbeddedServer, str], None]


def in_full(source: EmbeddedServer, cluster: EmbeddedServer, _url: str) -> None:
    dump(source, file := source.data_dir / "full.dump")
    restore(cluster, readable(file, cluster))


def data_only(source: EmbeddedServer, cluster: EmbeddedServer, url: str) -> None:
    into_schema(source, cluster, url, PGOPTIONS="-c session_replication_role=replica")


def with_triggers_disabled(source: EmbeddedServer, cluster: EmbeddedServer, url: str) -> None:
    into_schema(source, cluster, url, "--disable-triggers")


def into_schema(source: EmbeddedServer, cluster: EmbeddedServer, url: str, *options: str, **environment: str) -> None:
    with Database(url) as database:
        database.upgrade()
    dump(source, file := source.data_dir / "data.dump", "--data-only", "--exclude-table=circle.alembic_version")
    restore(cluster, readable(file, cluster), "--data-only", *options, **environment)


def readable(file: Path, cluster: EmbeddedServer) -> Path:
    """Both clusters may be the same user's, who owns the one's folder and the other's."""
    assert file.stat().st_uid == (cluster.data_dir / "PG_VERSION").stat().st_uid
    return file


def events_of(raw: psycopg.Connection) -> list[tuple[Any, ...]]:
    return raw.execute(
        "SELECT run_id, id, node_id, type, data, created_at FROM circle.pipeline_events ORDER BY xid, id"
    ).fetchall()


@pytest.mark.parametrize("copy", [in_full, data_only, with_triggers_disabled], ids=lambda copy: copy.__name__)
def test_dump_restored_in_other_cluster_keeps_events_readable(
    source: EmbeddedServer, cluster: EmbeddedServer, target: str, copy: Copy
) -> None:
    copy(source, cluster, target)
    with connect(source.url) as here, connect(target) as there:
        assert contents(there) == contents(here)
        expected = events_of(here)
        assert len(expected) > 10
    with Database(source.url) as database, database.session() as session:
        cursor = EventRepository(session).last()
    with Database(target) as database:
        with database.session() as session:
            events = EventRepository(session)
            with pytest.raises(InvalidCursorError, match="another database"):
                events.read(cursor)
            assert events.read().items == ()  # its transactions have lower numbers than those of the source
        with connect(target) as raw:
            assert raw.execute("SELECT circle.reset_event_xids()").fetchone() == (len(expected),)
            assert events_of(raw) == expected
        with database.session() as session:
            before = read_all(session)
            assert [(event.run_id, event.id) for event in before] == [row[:2] for row in expected]
            runs = RunRepository(session)
            (running,) = runs.search(status="running").items  # type: ignore[arg-type]
            runs.cancel(running.id)
            session.commit()
            assert names(EventRepository(session).read(before[-1].cursor).items) == ["run cancelled"]
            assert names(read_all(session, running.id))[-1] == "run cancelled"


def test_logical_subscriber_has_each_event_once(source: EmbeddedServer, cluster: EmbeddedServer, target: str) -> None:
    with Database(target) as database:
        database.upgrade()
    with connect(source.url) as here, connect(target) as there:
        here.execute("CREATE PUBLICATION everything FOR TABLES IN SCHEMA circle")
        there.execute("TRUNCATE circle.alembic_version")
        there.execute(
            f"CREATE SUBSCRIPTION everything CONNECTION 'host={source.data_dir} user=postgres dbname=postgres'"
            " PUBLICATION everything"
        )
        try:
            with Database(source.url) as database, database.session(autocommit=True) as session:
                live(RunRepository(session), 1)  # concurrently with the first copy
                caught_up(here, there)
                live(RunRepository(session), store(session, DIAMOND))
                assert EventRepository(session).purge(timedelta(0)) > 0
                live(RunRepository(session), 1)
            caught_up(here, there)
            assert events_of(there) == events_of(here)
        finally:
            there.execute("DROP SUBSCRIPTION everything")
            here.execute("DROP PUBLICATION everything")


def caught_up(here: psycopg.Connection, there: psycopg.Connection) -> None:
    deadline = time.monotonic() + 120
    while contents(there) != contents(here):
        assert time.monotonic() < deadline, "the subscriber does not apply everything"
        time.sleep(0.2)
