"""Every change of a status is an event, whoever makes it; and events are read without a gap, in order, at little cost."""

# Statements are put together from names that stand here, which pyright can't know.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from contextlib import closing
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import EventRepository, EventType, NodeStatus, PipelineEvent, RunRepository, RunStatus
from gathering_pipeline.database import Database
from gathering_pipeline.errors import DatabaseUnavailableError, InvalidCursorError, InvalidDataError
from gathering_pipeline.lifecycle import (
    INITIAL_RUN_STATUSES,
    NODE_EVENTS,
    NODE_TRANSITIONS,
    RUN_EVENTS,
    RUN_TRANSITIONS,
)
from tests.integration.test_runs import DIAMOND, LEASE, done, store

Connect = Callable[[str], psycopg.Connection]

NODE = "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, status) VALUES (%s, %s, 'action', %s) RETURNING id"


def stored(raw: psycopg.Connection) -> list[tuple[str | None, str]]:
    """Node and type of all events, in the order in which they are read."""
    return raw.execute("SELECT node_id, type FROM circle.pipeline_events ORDER BY xid, id").fetchall()


def forget(raw: psycopg.Connection) -> None:
    raw.execute("TRUNCATE circle.pipeline_events")


def names(events: tuple[PipelineEvent, ...] | list[PipelineEvent]) -> list[str]:
    return [f"{event.node_id or 'run'} {event.type.partition('.')[2]}" for event in events]


def read_all(session: Session, run_id: int | None = None) -> list[PipelineEvent]:
    return list(EventRepository(session).read(run_id=run_id, limit=10_000).items)


def raw_run(raw: psycopg.Connection, session: Session, status: str = "running") -> int:
    pipeline_id = store(session)
    session.commit()
    row = raw.execute(
        "INSERT INTO circle.pipeline_runs (pipeline_id, status) VALUES (%s, %s) RETURNING id", [pipeline_id, status]
    ).fetchone()
    assert row is not None
    run_id: int = row[0]
    return run_id


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", RunStatus)
@pytest.mark.parametrize("old", [None, *RunStatus])
def test_each_transition_of_a_run_has_its_event(
    raw: psycopg.Connection, session: Session, old: RunStatus | None, new: RunStatus
) -> None:
    legal = new in (INITIAL_RUN_STATUSES if old is None else RUN_TRANSITIONS[old])
    if old is not None:
        run_id = raw_run(raw, session)
        if old is not RunStatus.RUNNING:
            raw.execute("UPDATE circle.pipeline_runs SET status = %s WHERE id = %s", [old, run_id])
        forget(raw)
    try:
        if old is None:
            raw_run(raw, session, new)
        else:
            raw.execute("UPDATE circle.pipeline_runs SET status = %s WHERE id = %s", [new, run_id])
    except psycopg.Error:
        assert not legal
    else:
        assert legal
    event = RUN_EVENTS.get(new)
    assert stored(raw) == ([(None, event)] if legal and event else [])


@pytest.mark.parametrize("new", NodeStatus)
@pytest.mark.parametrize("old", [None, *NodeStatus])
def test_each_transition_of_a_node_has_its_event(
    raw: psycopg.Connection, session: Session, old: NodeStatus | None, new: NodeStatus
) -> None:
    run_id = raw_run(raw, session)
    legal = old is None or new in NODE_TRANSITIONS[old]
    if old is not None:
        raw.execute(NODE, [run_id, "n", old])
    forget(raw)
    try:
        if old is None:
            raw.execute(NODE, [run_id, "n", new])
        else:
            raw.execute("UPDATE circle.pipeline_node_runs SET status = %s WHERE run_id = %s", [new, run_id])
    except psycopg.Error:
        assert not legal
    else:
        assert legal
    event = NODE_EVENTS.get(new)
    if new is NodeStatus.PENDING and old is None:
        event = None  # a retry is one of a node that ran
    assert stored(raw) == ([("n", event)] if legal and event else [])


def test_what_the_events_hold(session: Session) -> None:
    runs = RunRepository(session)
    run = runs.create(store(session, "a>b", retry_backoff_base=0, max_retries_per_node=1))
    runs.start(run.id)
    runs.start_node(run.id, "a")
    due = runs.fail_node(run.id, "a", "first").available_at
    assert due is not None
    runs.start_node(run.id, "a")
    runs.fail_node(run.id, "a", "second")
    runs.fail(run.id, "given up")
    session.commit()
    events = read_all(session)
    assert names(events) == ["run started", "a started", "a retrying", "a started", "a failed", "run failed"]
    assert {event.run_id for event in events} == {run.id}
    data = [event.data for event in events if event.data]
    assert datetime.fromisoformat(data[0].pop("available_at")) == due  # PostgreSQL writes no trailing zeros
    assert data == [
        {"attempt": 1, "error": "first"},
        {"error": "second"},
        {"error": "given up"},
    ]
    assert all(before.created_at <= after.created_at for before, after in pairwise(events))
    assert all(before.id < after.id for before, after in pairwise(events))


def test_nodes_of_one_call_stand_by_position_and_before_the_end_of_the_run(session: Session) -> None:
    runs = RunRepository(session)
    width = 40
    spec = " ".join(f"s>{n} {n}>e" for n in (f"n{at}" for at in range(width)))
    run = runs.create(store(session, spec))
    order = [node.node_id for node in runs.nodes(run.id)][1:-1]
    chance = random.Random(3)
    runs.advance(run.id)
    runs.advance(run.id, [done("s")])
    runs.advance(run.id, [done(name) for name in chance.sample(order, width)])
    runs.advance(run.id, [done("e")])
    other = runs.create(run.pipeline_id)
    everything = ["s", *order, "e"]
    runs.record(other.id, [done(name) for name in chance.sample(everything, len(everything))])
    runs.finish(other.id)
    session.commit()
    assert names(read_all(session, run.id)) == [
        *("run started", "s started", "s completed"),
        *(f"{name} started" for name in order),
        *(f"{name} completed" for name in order),
        *("e started", "e completed", "run completed"),
    ]
    assert names(read_all(session, other.id)) == [
        "run started",
        *(f"{name} completed" for name in everything),
        "run completed",
    ]


def test_a_raw_update_of_many_nodes_leaves_them_by_position(raw: psycopg.Connection, session: Session) -> None:
    run = RunRepository(session).create(store(session, " ".join(f"n{at}" for at in range(30))))
    RunRepository(session).start(run.id)
    session.commit()
    # the rows lie in the opposite order, and the scan goes by it
    raw.execute("CREATE TEMP TABLE n AS SELECT * FROM circle.pipeline_node_runs")
    raw.execute("DELETE FROM circle.pipeline_node_runs")
    raw.execute("INSERT INTO circle.pipeline_node_runs SELECT * FROM n ORDER BY position DESC")
    raw.execute("UPDATE circle.pipeline_node_runs SET status = 'running'")
    raw.execute("UPDATE circle.pipeline_node_runs SET status = 'completed'")
    expected = [f"n{at}" for at in range(30)]
    assert [node for node, kind in stored(raw) if kind == "pipeline_node.started"] == expected
    assert [node for node, kind in stored(raw) if kind == "pipeline_node.completed"] == expected


def test_nodes_without_a_place_or_with_an_odd_one_have_events_of_their_own(
    raw: psycopg.Connection, session: Session
) -> None:
    run_id = raw_run(raw, session)
    forget(raw)
    raw.execute(
        "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, status, position)"
        " SELECT %s, 'n' || n, 'action', 'completed', p FROM unnest(ARRAY[NULL, NULL, -1, 2147483647, 131072, 131071, 0])"
        " WITH ORDINALITY x (p, n)",
        [run_id],
    )
    assert len(stored(raw)) == 7


def test_a_skip_takes_its_followers_along_in_order(session: Session) -> None:
    runs = RunRepository(session)
    run = runs.create(store(session, "a>b a>c b>d c>d d>e x"))
    runs.start(run.id)
    runs.skip_node(run.id, "a")
    session.commit()
    assert names(read_all(session)) == ["run started", *(f"{name} skipped" for name in "abcde")]


def test_a_run_that_is_given_back(session: Session) -> None:
    runs = RunRepository(session)
    run = runs.create(store(session, "a>b"))
    (claimed,) = runs.claim("w", LEASE)
    runs.advance(run.id, token=claimed.claim_token)
    runs.release(run.id, token=claimed.claim_token)
    runs.cancel(run.id, "enough")
    session.commit()
    events = read_all(session)
    assert names(events) == ["run started", "a started", "a retrying", "run cancelled"]
    assert (events[2].data["attempt"], events[3].data) == (1, {"error": "enough"})


def test_what_is_rolled_back_leaves_no_event(raw: psycopg.Connection, session: Session) -> None:
    run = RunRepository(session).create(store(session))
    session.commit()
    RunRepository(session).advance(run.id)
    session.rollback()
    with session.begin_nested() as savepoint:
        RunRepository(session).advance(run.id)
        savepoint.rollback()
    RunRepository(session).start(run.id)
    session.commit()
    assert stored(raw) == [(None, "pipeline_run.started")]


def test_an_event_is_never_changed(raw: psycopg.Connection, session: Session) -> None:
    raw_run(raw, session)
    for role in ("origin", "replica"):
        raw.execute(f"SET session_replication_role = {role}")
        for change in (
            "type = 'x'",
            "data = '{\"a\": 1}'",
            "run_id = 0",
            "node_id = 'n'",
            "created_at = now()",
            "xid = '1'",
        ):
            with pytest.raises(psycopg.errors.IntegrityConstraintViolation):
                raw.execute(f"UPDATE circle.pipeline_events SET {change}")


def test_under_replica_role_none_is_written(raw: psycopg.Connection, session: Session) -> None:
    raw.execute("SET session_replication_role = replica")
    run_id = raw_run(raw, session)
    raw.execute("UPDATE circle.pipeline_runs SET status = 'completed' WHERE id = %s", [run_id])
    assert stored(raw) == []


# --- what is read ----------------------------------------------------------------------------------------------------


def test_pages(session: Session) -> None:
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
    paged, after = [], begin.next_cursor
    while (page := events.read(after, limit=4)).items:
        paged += page.items
        after = page.next_cursor
    assert tuple(paged) == everything.items
    for at, event in enumerate(everything.items):
        assert events.read(event.cursor).items == everything.items[at + 1 :]
        assert events.read(event.cursor, run_id=run.id).items == everything.items[at + 1 :]
    assert events.read(run_id=run.id + 1).items == events.read(run_id=2**70).items == ()


def test_none_appears_behind_a_reader(
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


def test_the_order_within_a_run_is_that_of_the_commits(
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


def test_cursors_that_are_none(session: Session, raw: psycopg.Connection) -> None:
    raw_run(raw, session)
    events = EventRepository(session)
    (cursor,) = (event.cursor for event in events.read().items)
    system, database, xid, last = cursor.split("-")
    for bad in (
        "",
        "x",
        "1",
        f"{cursor}-1",
        f"{system}-{database}-{2**64}-1",
        f"{cursor} ",
        7,
        10**5000,
        b"x",
        "\u0661-1-1-1",
    ):
        with pytest.raises(InvalidCursorError, match="must be the cursor"):
            events.read(bad)  # type: ignore[arg-type]
    for foreign in (f"{int(system) + 1}-{database}-{xid}-{last}", f"{system}-{int(database) + 1}-{xid}-{last}"):
        with pytest.raises(InvalidCursorError, match="another database"):
            events.read(foreign)
    with pytest.raises(InvalidCursorError, match="ahead of the database"):
        events.read(f"{system}-{database}-{int(xid) + 1_000_000}-1")
    with pytest.raises(InvalidDataError):
        events.read(limit=0)


def test_somebody_without_rights_on_the_server_can_read(raw: psycopg.Connection, session: Session) -> None:
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


def test_what_is_no_event_of_ours_is_passed_over(raw: psycopg.Connection, session: Session) -> None:
    raw_run(raw, session)
    raw.execute("INSERT INTO circle.pipeline_events (xid, run_id, type, data) VALUES ('3', 1, 'mine', '[]')")
    assert names(read_all(session)) == ["run started"]


def test_the_types_are_the_same(raw: psycopg.Connection) -> None:
    row = raw.execute("SELECT circle.event_types()").fetchone()
    assert row is not None
    assert row[0] == list(EventType)


MANY = 120_000


def test_a_reader_reads_what_is_new(raw: psycopg.Connection, session: Session) -> None:
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
            assert set(used) == {index}
            assert used[index] <= expected + 2


def test_purge(raw: psycopg.Connection, session: Session) -> None:
    raw.execute(
        "INSERT INTO circle.pipeline_events (xid, run_id, type, created_at) SELECT n::text::xid8, n, 'pipeline_run.started',"
        " now() - interval '1 hour' * (100 - n) FROM generate_series(1, 100) n"
    )
    events = EventRepository(session)
    assert [events.purge(timedelta(hours=40, minutes=30), limit=25) for _ in range(4)] == [25, 25, 9, 0]
    session.commit()
    assert min(event.run_id for event in read_all(session)) == 60
    with pytest.raises(InvalidDataError):
        events.purge(timedelta(seconds=-1))
    assert events.purge(timedelta(0)) == 41


def test_events_outlive_their_run(raw: psycopg.Connection, session: Session) -> None:
    run_id = raw_run(raw, session)
    raw.execute("UPDATE circle.pipeline_runs SET status = 'cancelled'")
    assert RunRepository(session).purge(timedelta(0)) == 1
    session.commit()
    assert names(read_all(session, run_id)) == ["run started", "run cancelled"]


# --- listening -------------------------------------------------------------------------------------------------------


def test_listen(database: Database, session: Session) -> None:
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
        threading.Timer(0.2, lambda: [runs.cancel(run.id), session.commit()]).start()
        assert next(everything).type is EventType.PIPELINE_RUN_CANCELLED
    with closing(database.listen(run.id, seen[0].cursor)) as tail:
        assert [next(tail).type for _ in range(2)] == [
            EventType.PIPELINE_NODE_STARTED,
            EventType.PIPELINE_RUN_CANCELLED,
        ]


def test_a_listener_leaves_nothing_behind(database: Database, raw: psycopg.Connection, session: Session) -> None:
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
    deadline = time.monotonic() + 20
    while raw.execute(listening).fetchone() != (0,):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_alisten_goes_on_when_its_connection_breaks(
    database: Database, raw: psycopg.Connection, session: Session
) -> None:
    run_id = raw_run(raw, session)

    async def work() -> list[EventType]:
        events = database.alisten(run_id, poll=timedelta(seconds=0.05))
        seen = [(await anext(events)).type]
        raw.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        raw.execute("UPDATE circle.pipeline_runs SET status = 'completed' WHERE id = %s", [run_id])
        seen.append((await anext(events)).type)
        await events.aclose()
        await database.adispose()
        return seen

    session.rollback()
    assert asyncio.run(work()) == [EventType.PIPELINE_RUN_STARTED, EventType.PIPELINE_RUN_COMPLETED]


def test_a_notification_ends_the_wait(database: Database, raw: psycopg.Connection, session: Session) -> None:
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


def test_listening_begins_with_an_error_where_there_is_nothing_to_listen_to(database: Database) -> None:
    with Database("postgresql://u@127.0.0.1:1/x") as nowhere, pytest.raises(DatabaseUnavailableError):
        next(nowhere.listen())
    with pytest.raises(InvalidCursorError):
        next(database.listen(after="x"))
    with pytest.raises(InvalidDataError, match="poll"):
        next(database.listen(poll=timedelta(0)))


def test_restored_numbers_are_reset(raw: psycopg.Connection, session: Session) -> None:
    """What a dump of a busier cluster leaves behind, and what came since."""
    insert = (
        "INSERT INTO circle.pipeline_events (xid, id, run_id, type) VALUES (%s::xid8, %s, %s, 'pipeline_run.started')"
    )
    raw.execute(insert, ["4", 1, 1])
    raw.execute(insert, [str(2**40), 2, 2])
    assert [event.run_id for event in read_all(session)] == [1]
    row = raw.execute("SELECT circle.reset_event_xids()").fetchone()
    assert row == (2,)
    assert raw.execute("SELECT circle.reset_event_xids()").fetchone() == (0,)
    session.commit()
    assert [event.run_id for event in read_all(session)] == [1, 2]
