"""``Database.listen`` and ``alisten``."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import closing
from datetime import timedelta

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import EventType, RunRepository
from gathering_pipeline.database import Database
from gathering_pipeline.errors import DatabaseUnavailableError, InvalidCursorError, InvalidDataError
from tests.support.events import raw_run
from tests.support.runs import store

pytestmark = pytest.mark.once  # the loop is this package's; tests/events/test_reads.py has its statement


def test_listen_yields_events_of_all_runs_or_one(database: Database, session: Session) -> None:
    runs = RunRepository(session)
    run = runs.create(store(session, "a>b"))
    runs.advance(run.id)
    other = runs.create(run.pipeline_id)
    runs.start(other.id)
    session.commit()
    with closing(database.listen(poll=timedelta(seconds=0.05))) as everything:
        seen = [next(everything) for _ in range(3)]
        assert [(event.run_id, event.type) for event in seen] == [
            (run.id, EventType.PIPELINE_RUN_STARTED),
            (run.id, EventType.PIPELINE_NODE_STARTED),
            (other.id, EventType.PIPELINE_RUN_STARTED),
        ]

        def cancel() -> None:
            runs.cancel(run.id)
            session.commit()

        threading.Timer(0.2, cancel).start()
        assert next(everything).type is EventType.PIPELINE_RUN_CANCELLED
    with closing(database.listen(run.id, seen[0].cursor)) as tail:
        assert [next(tail).type for _ in range(2)] == [
            EventType.PIPELINE_NODE_STARTED,
            EventType.PIPELINE_RUN_CANCELLED,
        ]


def test_listen_closed_leaves_no_connection(database: Database, raw: psycopg.Connection, session: Session) -> None:
    raw_run(raw, session)
    listening = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE '%page_of_events%' AND pid <> pg_backend_pid()"

    async def one() -> None:
        async for event in database.alisten():
            assert event.type is EventType.PIPELINE_RUN_STARTED
            break
        await database.adispose()

    with closing(database.listen()) as events:
        next(events)
        assert raw.execute(listening).fetchone() == (1,)
    asyncio.run(one())
    deadline = time.monotonic() + 60
    while raw.execute(listening).fetchone() != (0,):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_alisten_after_broken_connection_continues(
    database: Database, raw: psycopg.Connection, session: Session
) -> None:
    run_id = raw_run(raw, session)

    async def work() -> list[EventType]:
        events = database.alisten(run_id, poll=timedelta(seconds=0.05))
        seen = [(await anext(events)).type]
        raw.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        raw.execute("UPDATE circle.pipeline_runs SET status = 'completed' WHERE id = %s", [run_id])
        seen.append((await anext(events)).type)
        await events.aclose()
        await database.adispose()
        return seen

    session.rollback()
    assert asyncio.run(work()) == [EventType.PIPELINE_RUN_STARTED, EventType.PIPELINE_RUN_COMPLETED]


def test_listen_wakes_on_notification(database: Database, raw: psycopg.Connection, session: Session) -> None:
    raw.execute("SELECT circle.notify_events(true)")
    run_id = raw_run(raw, session)
    with closing(database.listen(poll=timedelta(minutes=10))) as events:
        next(events)
        change = "UPDATE circle.pipeline_runs SET status = 'completed' WHERE id = %s"
        timer = threading.Timer(0.5, lambda: raw.execute(change, [run_id]))
        begun = time.monotonic()
        timer.start()
        assert next(events).type is EventType.PIPELINE_RUN_COMPLETED
        assert time.monotonic() - begun < 300
        timer.join()
    raw.execute("SELECT circle.notify_events(false)")
    rows = raw.execute("SELECT tgname FROM pg_trigger WHERE tgname = 'pipeline_events_notify'").fetchall()
    assert rows == []


def test_listen_without_server_or_with_bad_arguments_raises(database: Database) -> None:
    with Database("postgresql://u@127.0.0.1:1/x") as nowhere, pytest.raises(DatabaseUnavailableError):
        next(nowhere.listen())
    with pytest.raises(InvalidCursorError):
        next(database.listen(after="x"))
    with pytest.raises(InvalidDataError, match="poll"):
        next(database.listen(poll=timedelta(0)))
