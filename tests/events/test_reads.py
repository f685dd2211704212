"""Events are read without a gap, in order, at little cost."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import EventRepository, PipelineEvent, RunRepository
from gathering_pipeline.errors import InvalidCursorError, InvalidDataError
from tests.support.databases import Connect
from tests.support.events import forget, names, raw_run, read_all
from tests.support.graphs import DIAMOND
from tests.support.runs import done, store


def test_read_pages_in_order_and_after_commit_only(session: Session) -> None:
    runs, events = RunRepository(session), EventRepository(session)
    begin = events.read()
    assert begin.items == ()
    assert events.read(begin.next_cursor) == begin
    assert events.last() == begin.next_cursor
    run = runs.create(store(session, DIAMOND))
    runs.record(run.id, [done(name) for name in "abcd"])
    runs.finish(run.id)
    assert events.read() == begin  # not before the commit
    session.commit()
    everything = events.read()
    assert names(everything.items) == ["run started", *(f"{name} completed" for name in "abcd"), "run completed"]
    assert events.last() == everything.next_cursor == everything.items[-1].cursor
    paged: list[PipelineEvent] = []
    after = begin.next_cursor
    while (page := events.read(after, limit=4)).items:
        paged += page.items
        after = page.next_cursor
    assert tuple(paged) == everything.items
    for at, event in enumerate(everything.items):
        assert events.read(event.cursor).items == everything.items[at + 1 :]
        assert events.read(event.cursor, run_id=run.id).items == everything.items[at + 1 :]
    assert events.read(run_id=run.id + 1).items == events.read(run_id=2**70).items == ()


def test_read_withholds_events_behind_an_open_transaction(
    database_url: str, raw: psycopg.Connection, connect: Connect, session: Session
) -> None:
    """Two transactions that commit in another order than they began in."""
    first, second = raw_run(raw, session, "pending"), raw_run(raw, session, "pending")
    early, late = connect(database_url), connect(database_url)
    for connection in (early, late):
        connection.autocommit = False
    start = "UPDATE circle.pipeline_runs SET status = 'running' WHERE id = %s"
    early.execute(start, [first])
    late.execute(start, [second])
    late.commit()
    page = EventRepository(session).read()
    assert page.items == ()  # the early one may still commit
    session.commit()
    early.commit()
    page = EventRepository(session).read(page.next_cursor)
    assert [event.run_id for event in page.items] == [first, second]


def test_read_orders_events_of_a_run_by_commit(
    database_url: str, raw: psycopg.Connection, connect: Connect, session: Session
) -> None:
    """The transaction that began first is the second one to change the run."""
    run_id = raw_run(raw, session, "pending")
    forget(raw)
    early = connect(database_url)
    early.autocommit = False
    early.execute("SELECT pg_current_xact_id()")
    raw.execute("UPDATE circle.pipeline_runs SET status = 'running' WHERE id = %s", [run_id])
    early.execute("UPDATE circle.pipeline_runs SET status = 'completed' WHERE id = %s", [run_id])
    early.commit()
    assert names(read_all(session)) == ["run started", "run completed"]


def test_read_with_bad_cursor_raises_invalid_cursor(session: Session, raw: psycopg.Connection) -> None:
    raw_run(raw, session)
    events = EventRepository(session)
    (cursor,) = (event.cursor for event in events.read().items)
    system, database, xid, last, micros = cursor.split("-")
    for bad in (
        "",
        "x",
        "1",
        f"{cursor}-1",
        f"{system}-{database}-{2**64}-1-0",
        f"{system}-{database}-1-1",
        f"{cursor} ",
        7,
        10**5000,
        b"x",
        "\u0661-1-1-1-1",
    ):
        with pytest.raises(InvalidCursorError, match="must be the cursor"):
            events.read(bad)  # type: ignore[arg-type]
    event = f"{xid}-{last}-{micros}"
    for foreign in (f"{int(system) + 1}-{database}-{event}", f"{system}-{int(database) + 1}-{event}"):
        with pytest.raises(InvalidCursorError, match="another database"):
            events.read(foreign)
    for gone in (
        f"{int(xid) + 1_000_000}-{last}-{micros}",
        f"{xid}-{int(last) + 1}-{micros}",
        f"{xid}-{last}-{int(micros) + 1}",
    ):
        with pytest.raises(InvalidCursorError, match="is gone"):
            events.read(f"{system}-{database}-{gone}")
    with pytest.raises(InvalidDataError):
        events.read(limit=0)


def test_read_with_select_rights_only_succeeds(raw: psycopg.Connection, session: Session) -> None:
    raw_run(raw, session)
    raw.execute("CREATE ROLE gathering_reader")
    try:
        raw.execute(
            "GRANT USAGE ON SCHEMA circle TO gathering_reader; GRANT SELECT ON ALL TABLES IN SCHEMA circle TO gathering_reader"
        )
        session.connection().exec_driver_sql("SET ROLE gathering_reader")
        assert names(read_all(session)) == ["run started"]
        session.rollback()
    finally:
        raw.execute("DROP OWNED BY gathering_reader; DROP ROLE gathering_reader")


def test_read_skips_events_of_unknown_types(raw: psycopg.Connection, session: Session) -> None:
    raw_run(raw, session)
    raw.execute("INSERT INTO circle.pipeline_events (xid, run_id, type, data) VALUES ('3', 1, 'mine', '[]')")
    assert names(read_all(session)) == ["run started"]


MANY = 120_000


def test_read_among_many_events_touches_few_rows(raw: psycopg.Connection, session: Session) -> None:
    """Whatever the statistics say: here they are those of an empty table."""
    raw.execute("ALTER TABLE circle.pipeline_events SET (autovacuum_enabled = off); ANALYZE circle.pipeline_events")
    raw.execute(
        "INSERT INTO circle.pipeline_events (xid, run_id, type) SELECT '3', n / 20, 'pipeline_run.started'"
        " FROM generate_series(1, %s) n",
        [MANY],
    )

    def entries() -> dict[str, int]:
        session.commit()
        rows = raw.execute(
            "SELECT relname, pg_stat_get_tuples_returned(oid) FROM pg_class WHERE relname IN"
            " ('pipeline_events', 'pipeline_events_pkey', 'idx_pipeline_events_run')"
        ).fetchall()
        return dict(rows)

    events = EventRepository(session)
    end = events.last()
    raw_run(raw, session)

    def read(**arguments: Any) -> tuple[int, dict[str, int]]:
        """How many events a page has, and how many rows and entries it took; asked for until they are counted."""
        session.connection().exec_driver_sql("SELECT pg_stat_force_next_flush()")
        before = entries()
        found = len(events.read(**arguments).items)
        session.connection().exec_driver_sql("SELECT pg_stat_force_next_flush()")
        after = entries()
        return found, {name: number - before[name] for name, number in after.items() if number != before[name]}

    for _ in range(7):  # by then the plan is a generic one
        for arguments, expected, index in (
            ({"after": end}, 1, "pipeline_events_pkey"),
            ({"limit": 50}, 50, "pipeline_events_pkey"),
            ({"run_id": 4_000}, 20, "idx_pipeline_events_run"),
            ({"run_id": 4_000, "limit": 5}, 5, "idx_pipeline_events_run"),
        ):
            found, used = read(**arguments)
            assert found == expected
            if index != "pipeline_events_pkey":  # where the newest event stands
                assert used.pop("pipeline_events_pkey", 0) <= 2
            assert set(used) == {index}
            assert used[index] <= expected + 2


def test_purge_deletes_old_events_only(raw: psycopg.Connection, session: Session) -> None:
    raw.execute(
        "INSERT INTO circle.pipeline_events (xid, run_id, type, created_at) SELECT n::text::xid8, n, 'pipeline_run.started',"
        " now() - interval '1 hour' * (100 - n) FROM generate_series(1, 100) n"
    )
    events = EventRepository(session)
    assert [events.purge(timedelta(hours=40, minutes=30), limit=25) for _ in range(4)] == [25, 25, 8, 0]
    session.commit()
    assert min(event.run_id for event in read_all(session)) == 59
    with pytest.raises(InvalidDataError):
        events.purge(timedelta(seconds=-1))
    behind = events.read(limit=5).next_cursor
    assert [events.purge(timedelta(0), limit=1) for _ in range(2)] == [1, 1]
    assert events.purge(timedelta(0)) == 39  # the newest of the old ones stays, for the readers that have it
    session.commit()
    with pytest.raises(InvalidCursorError, match="is gone"):
        events.read(behind)
    session.rollback()
    assert events.read(events.last()).items == ()


def test_read_after_run_is_purged_returns_its_events(raw: psycopg.Connection, session: Session) -> None:
    run_id = raw_run(raw, session)
    raw.execute("UPDATE circle.pipeline_runs SET status = 'cancelled'")
    assert RunRepository(session).purge(timedelta(0)).deleted == 1
    session.commit()
    assert names(read_all(session, run_id)) == ["run started", "run cancelled"]


def test_purge_leaves_readers_that_are_up_to_date_their_cursor(raw: psycopg.Connection, session: Session) -> None:
    insert = (
        "INSERT INTO circle.pipeline_events (xid, run_id, type, created_at)"
        " VALUES (%s::xid8, %s, 'pipeline_run.started', now() - interval '1 hour' * %s)"
    )
    events = EventRepository(session)
    for number, (run, hours) in enumerate([(1, 5), (2, 4), (2, 3)], 1):
        raw.execute(insert, [str(number), run, hours])
    readers = {run_id: events.read(run_id=run_id).next_cursor for run_id in (None, 1, 2, 3)}
    session.commit()
    raw.execute(insert, ["4", 1, 0])
    assert events.purge(timedelta(hours=1)) == 2
    session.commit()
    for run_id, cursor in readers.items():
        assert len(events.read(cursor, run_id=run_id).items) == (run_id in (None, 1))
