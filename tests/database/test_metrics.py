"""``metrics`` and ``ametrics``, and their text for Prometheus."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from datetime import timedelta

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import Database, DatabaseUnavailableError, EventRepository, Metrics, RunRepository, RunStatus
from tests.support.databases import Connect
from tests.support.runs import claimed, lose_lease, started, store


def sync(database: Database) -> Metrics:
    return database.metrics()


def asynchronous(database: Database) -> Metrics:
    async def ask() -> Metrics:
        try:
            return await database.ametrics()
        finally:
            await database.adispose()

    return asyncio.run(ask())


both = pytest.mark.parametrize("ask", [sync, asynchronous])


@both
def test_metrics_of_an_empty_database_are_zero(database: Database, ask: Callable[[Database], Metrics]) -> None:
    assert ask(database) == Metrics(
        runs=dict.fromkeys(RunStatus, 0), oldest_pending=None, leases_lost=0, event_lag=timedelta(0)
    )


@both
def test_metrics_count_runs_and_lost_leases(
    database: Database, session: Session, raw: psycopg.Connection, ask: Callable[[Database], Metrics]
) -> None:
    runs = RunRepository(session)
    pending = runs.create(store(session)).id
    raw.execute("SELECT 1")
    started(runs, session)
    runs.cancel(started(runs, session))
    session.commit()
    raw.execute("UPDATE circle.pipeline_runs SET created_at = now() - interval '1 hour' WHERE id = %s", [pending])
    found = ask(database)
    assert found.runs == dict.fromkeys(RunStatus, 0) | {"pending": 1, "running": 1, "cancelled": 1}
    assert found.oldest_pending is not None
    assert timedelta(hours=1) <= found.oldest_pending < timedelta(hours=2)
    assert found.leases_lost == 0


def test_metrics_count_each_lost_lease_whatever_becomes_of_the_run(
    database: Database, session: Session, raw: psycopg.Connection
) -> None:
    runs = RunRepository(session)
    for run in (claimed(runs, session), claimed(runs, session)):
        session.commit()
        lose_lease(raw, run.id)
        runs.recover(max_claims=run.id)  # the first run fails
        session.commit()
    found = database.metrics()
    assert (found.leases_lost, found.runs[RunStatus.FAILED], found.runs[RunStatus.PENDING]) == (2, 1, 1)
    with database.session() as other:  # sweeps fold the counters
        RunRepository(other).recover()
    assert database.metrics().leases_lost == 2


def test_event_lag_is_how_long_a_transaction_holds_events_back(
    database: Database, raw: psycopg.Connection, connect: Connect, database_url: str
) -> None:
    older = connect(database_url)
    with older.transaction():
        older.execute("SELECT pg_current_xact_id()")
        with database.session() as session:
            started(RunRepository(session), session)
        time.sleep(0.2)
        with database.session() as session:
            assert EventRepository(session).read().items == ()
        assert timedelta(seconds=0.2) <= database.metrics().event_lag < timedelta(seconds=30)
    with database.session() as session:
        assert len(EventRepository(session).read().items) == 1
    assert database.metrics().event_lag == timedelta(0)


@both
def test_metrics_without_server_raise(ask: Callable[[Database], Metrics]) -> None:
    with Database("postgresql://u:S3CRET@localhost:1/d") as database, pytest.raises(DatabaseUnavailableError):
        ask(database)


SAMPLE = re.compile(r'(?P<name>[a-z_]+)(\{status="[a-z]+"\})? (?P<value>\d+(\.\d+)?)')


def test_prometheus_text_is_valid() -> None:
    runs = {status: at for at, status in enumerate(RunStatus)}
    text = Metrics(
        runs=runs, oldest_pending=timedelta(minutes=1.5), leases_lost=3, event_lag=timedelta(microseconds=1_500)
    ).prometheus()
    assert text.endswith("\n")
    families: dict[str, str] = {}
    values: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("# HELP "):
            continue
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert f"# HELP {name} " in text
            assert name not in families
            families[name] = kind
            continue
        found = SAMPLE.fullmatch(line)
        assert found, line
        assert found["name"] == list(families)[-1]  # the samples of a family stand together, after its type
        values[line.rpartition(" ")[0]] = float(found["value"])
    assert families == {
        "gathering_pipeline_runs": "gauge",
        "gathering_pipeline_oldest_pending_run_age_seconds": "gauge",
        "gathering_pipeline_leases_lost_total": "counter",
        "gathering_pipeline_event_lag_seconds": "gauge",
    }
    assert values == {f'gathering_pipeline_runs{{status="{status}"}}': at for status, at in runs.items()} | {
        "gathering_pipeline_oldest_pending_run_age_seconds": 90,
        "gathering_pipeline_leases_lost_total": 3,
        "gathering_pipeline_event_lag_seconds": 0.0015,
    }
