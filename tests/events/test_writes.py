"""Each change of a status is an event, whatever made it."""

from __future__ import annotations

import random
from datetime import datetime
from itertools import pairwise

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import NodeStatus, RunRepository, RunStatus
from gathering_pipeline.lifecycle import (
    INITIAL_RUN_STATUSES,
    NODE_EVENTS,
    NODE_TRANSITIONS,
    RUN_EVENTS,
    RUN_TRANSITIONS,
)
from tests.support import databases
from tests.support import shared as fixtures
from tests.support.events import NODE, forget, names, raw_run, read_all, stored
from tests.support.runs import LEASE, claimed, done, lose_lease, store

shared, database_url, database, raw = fixtures.shared, fixtures.database_url, fixtures.database, fixtures.raw


@pytest.mark.parametrize("new", RunStatus)
@pytest.mark.parametrize("old", [None, *RunStatus])
def test_run_transition_writes_its_event(
    raw: psycopg.Connection, session: Session, old: RunStatus | None, new: RunStatus
) -> None:
    legal = new in (INITIAL_RUN_STATUSES if old is None else RUN_TRANSITIONS[old])
    run_id = 0
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
def test_node_transition_writes_its_event(
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


def test_events_of_a_run_hold_its_data(session: Session) -> None:
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
    data = [event.data for event in events]
    assert datetime.fromisoformat(data[2].pop("available_at")) == due  # PostgreSQL writes no trailing zeros
    durations = [item.pop("duration_ms") for item in data if "duration_ms" in item]
    assert len(durations) == 2
    assert data == [
        {},
        {"attempt": 1, "worker_id": None},
        {"attempt": 1, "worker_id": None, "error": "first"},
        {"attempt": 2, "worker_id": None},
        {"attempt": 2, "worker_id": None, "error": "second"},
        {"worker_id": None, "duration_seconds": 0, "error": "given up"},
    ]
    assert all(before.created_at <= after.created_at for before, after in pairwise(events))
    assert all(before.id < after.id for before, after in pairwise(events))


def test_events_of_a_claimed_run_name_worker_attempt_and_duration(session: Session) -> None:
    runs = RunRepository(session)
    runs.create(store(session, "a>b b>c", retry_backoff_base=0))
    (run,) = runs.claim("first", LEASE)
    runs.advance(run.id, token=run.token)
    runs.advance(run.id, [done("a", "failed")], retry=True, token=run.token)
    runs.release(run.id, token=run.token)
    (run,) = runs.claim("second", LEASE)
    runs.advance(run.id, token=run.token)
    runs.advance(run.id, [done("a", duration_ms=1_500)], token=run.token)
    runs.record(run.id, [done("b", duration_ms=20), done("c", "skipped")], token=run.token)
    ended = runs.finish(run.id, token=run.token)
    session.commit()
    events = read_all(session)
    told = [(event.data.get("worker_id"), event.data.get("attempt")) for event in events]
    assert [(name, *data) for name, data in zip(names(events), told, strict=True)] == [
        ("run started", "first", None),
        *(("a started", "first", 1), ("a retrying", "first", 1)),
        *(("a started", "first", 2), ("a retrying", "first", 2)),
        ("run started", "second", None),
        *(("a started", "second", 2), ("a completed", "second", 2)),
        *(("b started", "second", 1), ("b completed", "second", 1), ("c skipped", None, None)),
        ("run completed", "second", None),
    ]
    assert [event.data["duration_ms"] for event in events if event.type == "pipeline_node.completed"] == [1_500, 20]
    assert events[-2].data == {}
    assert events[-1].data == {"worker_id": "second", "duration_seconds": ended.duration_seconds}


def test_recovered_node_names_the_worker_that_was_lost(session: Session, raw: psycopg.Connection) -> None:
    runs = RunRepository(session)
    run = claimed(runs, session, "a")
    runs.advance(run.id, token=run.token)
    session.commit()
    lose_lease(raw, run.id)
    runs.recover()
    session.commit()
    retried = read_all(session)[-1]
    assert names([retried]) == ["a retrying"]
    assert (retried.data["worker_id"], retried.data["attempt"]) == ("worker", 1)
    assert retried.data["duration_ms"] >= 0


def test_events_of_raw_writers_have_what_their_rows_hold(session: Session, raw: psycopg.Connection) -> None:
    run_id = raw_run(raw, session)
    raw.execute("UPDATE circle.pipeline_runs SET worker_id = 'legacy' WHERE id = %s", [run_id])
    raw.execute(
        "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, status, retry_count, duration_ms, error_message)"
        " VALUES (%s, 'a', 'action', 'completed', 2, 7, NULL), (%s, 'b', 'action', 'failed', 0, 9, 'x'),"
        " (%s, 'c', 'action', 'running', 0, 0, NULL)",
        [run_id] * 3,
    )
    raw.execute("UPDATE circle.pipeline_node_runs SET status = 'completed', duration_ms = 5 WHERE node_id = 'c'")
    worker = {"worker_id": "legacy"}
    assert [event.data for event in read_all(session)] == [
        {},
        {"attempt": 3, "duration_ms": 7} | worker,
        {"attempt": 1, "duration_ms": 9, "error": "x"} | worker,
        {"attempt": 1} | worker,
        {"attempt": 1, "duration_ms": 5} | worker,
    ]


def test_record_orders_node_events_by_position_before_the_run_ends(session: Session) -> None:
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


def test_update_many_nodes_orders_events_by_position(raw: psycopg.Connection, session: Session) -> None:
    run = RunRepository(session).create(store(session, " ".join(f"n{at}" for at in range(30))))
    RunRepository(session).start(run.id)
    session.commit()
    # the rows lie in the opposite order, and the scan goes by it
    raw.execute("CREATE TEMP TABLE n AS SELECT * FROM circle.pipeline_node_runs")
    with databases.unguarded(raw, "pipeline_node_runs"):
        raw.execute("DELETE FROM circle.pipeline_node_runs")
    raw.execute("INSERT INTO circle.pipeline_node_runs SELECT * FROM n ORDER BY position DESC")
    raw.execute("UPDATE circle.pipeline_node_runs SET status = 'running'")
    raw.execute("UPDATE circle.pipeline_node_runs SET status = 'completed'")
    expected = [f"n{at}" for at in range(30)]
    assert [node for node, kind in stored(raw) if kind == "pipeline_node.started"] == expected
    assert [node for node, kind in stored(raw) if kind == "pipeline_node.completed"] == expected


def test_insert_node_outside_the_graph_writes_event(raw: psycopg.Connection, session: Session) -> None:
    run_id = raw_run(raw, session)
    forget(raw)
    raw.execute(
        "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, status, position)"
        " SELECT %s, 'n' || n, 'action', 'completed', p FROM unnest(ARRAY[NULL, NULL, -1, 2147483647, 131072, 131071, 0])"
        " WITH ORDINALITY x (p, n)",
        [run_id],
    )
    assert len(stored(raw)) == 7


def test_skip_node_writes_events_of_followers_in_order(session: Session) -> None:
    runs = RunRepository(session)
    run = runs.create(store(session, "a>b a>c b>d c>d d>e x"))
    runs.start(run.id)
    runs.skip_node(run.id, "a")
    session.commit()
    assert names(read_all(session)) == ["run started", *(f"{name} skipped" for name in "abcde")]


def test_release_writes_retrying_event(session: Session) -> None:
    runs = RunRepository(session)
    run = runs.create(store(session, "a>b"))
    (claimed,) = runs.claim("w", LEASE)
    runs.advance(run.id, token=claimed.token)
    runs.release(run.id, token=claimed.token)
    runs.cancel(run.id, "enough")
    session.commit()
    events = read_all(session)
    assert names(events) == ["run started", "a started", "a retrying", "run cancelled"]
    assert (events[2].data["attempt"], events[2].data["worker_id"]) == (1, "w")
    assert events[3].data == {"worker_id": None, "duration_seconds": 0, "error": "enough"}


def test_rolled_back_call_writes_no_event(raw: psycopg.Connection, session: Session) -> None:
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


def test_update_event_is_refused(raw: psycopg.Connection, session: Session) -> None:
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


def test_transition_under_replica_role_writes_no_event(raw: psycopg.Connection, session: Session) -> None:
    raw.execute("SET session_replication_role = replica")
    run_id = raw_run(raw, session)
    raw.execute("UPDATE circle.pipeline_runs SET status = 'completed' WHERE id = %s", [run_id])
    assert stored(raw) == []


def test_reset_event_xids_after_restore_makes_events_readable(raw: psycopg.Connection, session: Session) -> None:
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
