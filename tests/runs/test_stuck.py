"""``stuck``: the live runs that nothing moves and nothing holds on purpose."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import (
    AsyncRunRepository,
    Database,
    InvalidDataError,
    PipelineRepository,
    RunRepository,
    RunSummary,
)
from tests.support.databases import scalar, unguarded
from tests.support.runs import LEASE, claimed, done, lose_lease, started, store

HOUR = timedelta(hours=1)
NO_TIMEOUT: dict[str, Any] = {"timeout_seconds": None}


def later(raw: psycopg.Connection, hours: int = 2) -> None:
    """As if all that happened so far had happened hours earlier."""
    columns = {
        "pipelines": "status_changed_at",
        "pipeline_runs": "created_at started_at lease_expires_at waits_until run_at completed_at",
        "pipeline_node_runs": "started_at completed_at available_at",
        "pipeline_run_history": "at",
        "pipeline_events": "created_at",
    }
    for table, names in columns.items():
        moved = ", ".join(f"{name} = {name} - make_interval(hours => {hours})" for name in names.split())
        with unguarded(raw, table):
            raw.execute(f"UPDATE circle.{table} SET {moved}".encode())


def ids(runs: RunRepository, older_than: timedelta = HOUR, limit: int = 50) -> list[int]:
    return [run.id for run in runs.stuck(older_than, limit)]


def expect(runs: RunRepository, raw: psycopg.Connection, *run_ids: int) -> None:
    """Stuck once nothing has moved for an hour, and not before."""
    assert ids(runs) == []
    later(raw)
    assert ids(runs) == sorted(run_ids)
    assert ids(runs, timedelta(hours=3)) == []


def lease_past(runs: RunRepository, session: Session, raw: psycopg.Connection) -> int:
    run = claimed(runs, session, **NO_TIMEOUT)
    runs.advance(run.id, token=run.token)
    lose_lease(raw, run.id)
    return run.id


def without_lease_and_ready(runs: RunRepository, session: Session, _raw: psycopg.Connection) -> int:
    return started(runs, session, **NO_TIMEOUT)


def without_lease_and_running(runs: RunRepository, session: Session, _raw: psycopg.Connection) -> int:
    run_id = started(runs, session, **NO_TIMEOUT)
    runs.advance(run_id)
    return run_id


def not_ended(runs: RunRepository, session: Session, _raw: psycopg.Connection) -> int:
    run_id = started(runs, session, "a", **NO_TIMEOUT)
    runs.record(run_id, [done("a")])
    return run_id


def past_timeout(runs: RunRepository, session: Session, _raw: psycopg.Connection) -> int:
    run_id = runs.create(store(session, timeout_seconds=60)).id
    runs.advance(run_id)
    return run_id


def not_claimed(runs: RunRepository, session: Session, _raw: psycopg.Connection) -> int:
    return runs.create(store(session)).id


def not_claimed_since_release(runs: RunRepository, session: Session, _raw: psycopg.Connection) -> int:
    run = claimed(runs, session, **NO_TIMEOUT)
    runs.release(run.id, token=run.token)
    return run.id


def not_claimed_of_limited_pipeline(runs: RunRepository, session: Session, _raw: psycopg.Connection) -> int:
    return runs.create(store(session, max_running=1)).id


def without_version(_runs: RunRepository, session: Session, raw: psycopg.Connection) -> int:
    pipeline = store(session)
    raw.execute("SET session_replication_role = replica")  # as a subscriber stores the run of a broken graph
    insert = "INSERT INTO circle.pipeline_runs (pipeline_id, status) VALUES (%s, 'pending') RETURNING id"
    run_id: int = scalar(raw, insert, [pipeline])
    raw.execute("RESET session_replication_role")
    return run_id


STUCK = [
    *(lease_past, without_lease_and_ready, without_lease_and_running, not_ended, past_timeout),
    *(not_claimed, not_claimed_since_release, not_claimed_of_limited_pipeline, without_version),
]


@pytest.mark.parametrize("make", STUCK, ids=lambda make: make.__name__)
def test_stuck_run_is_found_once_it_is_old_enough(
    runs: RunRepository,
    session: Session,
    raw: psycopg.Connection,
    make: Callable[[RunRepository, Session, psycopg.Connection], int],
) -> None:
    expect(runs, raw, make(runs, session, raw))


def test_stuck_leased_run_without_a_started_node_is_found(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    """Its worker keeps the lease, and starts nothing."""
    run = claimed(runs, session, **NO_TIMEOUT)
    later(raw)
    runs.heartbeat(run.id, LEASE, token=run.token)
    assert ids(runs) == [run.id]
    runs.advance(run.id, token=run.token)
    assert ids(runs) == []
    later(raw)
    runs.heartbeat(run.id, LEASE, token=run.token)
    assert ids(runs) == []  # a node runs for long, and its worker is alive


def test_stuck_run_that_waits_past_its_time_is_found(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    run_id = runs.create(store(session), run_at=datetime.now(UTC) + timedelta(minutes=1)).id
    expect(runs, raw, run_id)


def test_run_that_is_held_deliberately_is_not_stuck(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    paused, paused_with_due_run = store(session), store(session)
    runs.create(paused)
    runs.create(paused_with_due_run, run_at=datetime.now(UTC) + timedelta(minutes=1))
    for pipeline in (paused, paused_with_due_run):
        PipelineRepository(session).pause(pipeline)
    runs.create(store(session), run_at=datetime.now(UTC) + timedelta(days=1))
    full = store(session, "a", max_running=1, **NO_TIMEOUT)
    runs.create(full)
    (run,) = runs.claim("worker", LEASE)
    runs.create(full)
    runs.advance(run.id, token=run.token)
    retries = {"retry_backoff_base": 86_400, "retry_backoff_max": 86_400}
    for claim in (True, False):  # it waits for a retry
        waiting = runs.create(store(session, "a", **retries, **NO_TIMEOUT)).id
        token = runs.claim("worker", LEASE)[0].token if claim else None
        runs.advance(waiting, token=token)
        runs.fail_node(waiting, "a", "x", token=token)
        if token is not None:
            runs.release(waiting, token=token)
    terminal = started(runs, session, "a")
    runs.cancel(terminal)
    later(raw)
    runs.heartbeat(run.id, LEASE, token=run.token)
    assert ids(runs) == []


def test_run_that_became_claimable_lately_is_not_stuck(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    activated = store(session)
    runs.create(activated)
    PipelineRepository(session).pause(activated)
    freed = store(session, "a", max_running=1, **NO_TIMEOUT)
    runs.create(freed)
    (run,) = runs.claim("worker", LEASE)
    runs.create(freed)
    retried = runs.create(store(session, "a", retry_backoff_base=3_700, retry_backoff_max=10_000, **NO_TIMEOUT))
    (held,) = runs.claim("worker", LEASE)
    assert held.id == retried.id
    runs.advance(held.id, token=held.token)
    runs.fail_node(held.id, "a", "x", token=held.token)
    runs.release(held.id, token=held.token)
    later(raw)
    PipelineRepository(session).activate(activated)
    runs.heartbeat(run.id, LEASE, token=run.token)
    runs.complete_node(run.id, "a", token=run.token)
    runs.finish(run.id, token=run.token)
    runs.claim("worker", LEASE, pipelines=[])  # the retry is due: the run joins its queue
    assert ids(runs, timedelta(hours=1, minutes=30)) == []
    later(raw)
    assert len(ids(runs)) == 3


def test_run_whose_retry_was_due_lately_is_not_stuck(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    """Its last event is two hours old, and its worker may start the node since half an hour."""
    run = claimed(runs, session, "a", retry_backoff_base=5_400, retry_backoff_max=10_000, **NO_TIMEOUT)
    runs.advance(run.id, token=run.token)
    runs.fail_node(run.id, "a", "x", token=run.token)
    later(raw)
    runs.heartbeat(run.id, LEASE, token=run.token)
    assert ids(runs) == []
    assert ids(runs, timedelta(minutes=15)) == [run.id]


def test_stuck_returns_the_oldest_runs_as_summaries(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    pipelines = [store(session, "a", **NO_TIMEOUT) for _ in range(3)]
    stuck = [runs.create(pipeline).id for _ in range(3) for pipeline in pipelines]
    later(raw)
    assert ids(runs) == stuck
    assert len(ids(runs, limit=2)) == 2
    (first, *_) = runs.stuck(HOUR, 1)
    assert type(first) is RunSummary
    assert first.id == runs.get(first.id).id


def test_async_stuck_answers_like_sync(
    runs: RunRepository, session: Session, raw: psycopg.Connection, database_url: str
) -> None:
    runs.create(store(session))
    later(raw)

    async def ask() -> list[RunSummary]:
        async with Database(database_url) as database, database.async_session() as opened:
            return await AsyncRunRepository(opened).stuck(HOUR)

    assert asyncio.run(ask()) == runs.stuck(HOUR)


@pytest.mark.parametrize("bad", [3600, -HOUR, None, "1 h"])
def test_stuck_with_a_wrong_age_raises_invalid_data(runs: RunRepository, bad: Any) -> None:
    with pytest.raises(InvalidDataError, match="older_than must be a timedelta"):
        runs.stuck(bad)
    with pytest.raises(InvalidDataError, match="limit must be a whole number"):
        runs.stuck(HOUR, 0)
