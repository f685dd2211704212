"""``recover``, ``expire`` and ``purge``."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import (
    Database,
    PurgeResult,
    RunRepository,
    RunStatus,
)
from gathering_pipeline.errors import InvalidCursorError
from tests.support.databases import unguarded
from tests.support.runs import LEASE, claim_token, claimed, counters, done, lose_lease, started, statuses, store


def test_recover_lost_lease_counts_a_failed_attempt(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    pipeline = store(session, max_retries_per_node=2, retry_backoff_base=0)
    run_id = runs.create(pipeline).id
    tokens = [0]
    for attempt in range(3):
        (run,) = runs.claim("worker", LEASE)
        tokens.append(run.token)
        assert run.claim_count == attempt + 1
        if attempt == 0:
            runs.advance(run_id, token=run.token)
            runs.advance(run_id, [done("a")], token=run.token)
        else:
            assert [node.node_id for node in runs.advance(run_id, token=run.token).started] == ["b", "c"]
        assert runs.recover() == []  # the lease holds
        lose_lease(raw, run_id)
        (recovered,) = runs.recover()
        assert (recovered.id, recovered.lease_expires_at) == (run_id, None)
        tokens.append(claim_token(raw, run_id))
        if attempt < 2:
            assert (recovered.status, recovered.worker_id) == ("pending", None)
            _, b, c, d = runs.nodes(run_id)
            assert [(n.status, n.retry_count) for n in (b, c, d)] == [("pending", attempt + 1)] * 2 + [("pending", 0)]
            assert "lease" in (b.error_message or "")
    recovered = runs.get(run_id)
    assert recovered.status == RunStatus.FAILED
    assert "lease" in (recovered.error_message or "")
    assert statuses(runs, run_id) == {"a": "completed", "b": "failed", "c": "failed", "d": "cancelled"}
    assert counters(raw, pipeline) == (1, 0, 1)
    assert tokens[:-1] == sorted(set(tokens[:-1]))  # they only grow
    assert tokens[-1] >= tokens[-2]


def test_recover_after_too_many_claims_fails_the_run(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    pipeline = store(session, "a", max_retries_per_node=1_000)
    run_id = runs.create(pipeline).id
    for count in range(1, 11):
        assert [(run.claim_count, run.lapsed_claims) for run in runs.claim("crasher", LEASE)] == [(count, count - 1)]
        lose_lease(raw, run_id)
        (run,) = runs.recover()
        assert run.status == ("failed" if count == 10 else "pending")
    assert "10 times" in (runs.get(run_id).error_message or "")
    assert statuses(runs, run_id) == {"a": "cancelled"}
    assert counters(raw, pipeline) == (1, 0, 1)
    runs.create(pipeline)
    runs.claim("crasher", LEASE)
    raw.execute("UPDATE circle.pipeline_runs SET lease_expires_at = now() - interval '1 s' WHERE status = 'running'")
    assert [run.status for run in runs.recover(max_claims=1)] == ["failed"]


def test_recover_run_with_all_nodes_terminal_ends_it(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    pipeline = store(session, "a")
    run_id = runs.create(pipeline).id
    (run,) = runs.claim("worker", LEASE)
    runs.record(run_id, [done("a")], token=run.token)
    lose_lease(raw, run_id)
    assert [(run.id, run.status) for run in runs.recover()] == [(run_id, "completed")]
    assert counters(raw, pipeline) == (1, 1, 0)


def test_recover_takes_only_runs_with_lost_lease(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    without = started(runs, session)
    held = claimed(runs, session)
    lost = [claimed(runs, session).id for _ in range(3)]
    for run_id in lost:
        lose_lease(raw, run_id)
    assert [run.id for run in runs.recover(limit=2)] == lost[:2]
    assert [run.id for run in runs.recover(limit=2)] == lost[2:]
    assert runs.recover() == []
    assert (runs.get(without).status, runs.get(held.id).status) == ("running", "running")


def test_expire_takes_runs_past_their_timeout(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    limited = store(session, timeout_seconds=100)
    ids = [runs.start(runs.create(limited).id).id for _ in range(3)]
    in_time = runs.start(runs.create(limited).id).id
    waiting = runs.create(limited).id
    unlimited = [started(runs, session, timeout_seconds=limit) for limit in (None, 0)]
    runs.start_node(ids[0], "a")
    raw.execute(
        "UPDATE circle.pipeline_runs SET started_at = clock_timestamp() - interval '101 s' WHERE id = ANY (%s)",
        [[*ids, *unlimited]],
    )
    raw.execute(
        "UPDATE circle.pipeline_runs SET started_at = clock_timestamp() - interval '90 s' WHERE id = %s", [in_time]
    )
    raw.execute("UPDATE circle.pipeline_runs SET created_at = clock_timestamp() - interval '200 s'")
    expired = runs.expire(limit=2)
    assert [(run.id, run.status) for run in expired] == [(run_id, "timeout") for run_id in ids[:2]]
    assert "100 seconds" in (expired[0].error_message or "")
    assert expired[0].completed_at is not None
    assert expired[0].duration_seconds == pytest.approx(101, abs=5)
    assert set(statuses(runs, ids[0]).values()) == {"cancelled"}
    assert [run.id for run in runs.expire()] == ids[2:]
    assert runs.expire() == []
    assert [runs.get(run_id).status for run_id in (in_time, *unlimited, waiting)] == [*["running"] * 3, "pending"]
    assert counters(raw, limited) == (5, 0, 3)
    # a run that never noted its start: raw, and older than the guards
    raw.execute("UPDATE circle.pipeline_runs SET started_at = NULL WHERE id = %s", [in_time])
    assert [run.id for run in runs.expire()] == [in_time]


def test_expire_after_second_claim_counts_from_first_start(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    run = claimed(runs, session, timeout_seconds=100)
    raw.execute("UPDATE circle.pipeline_runs SET started_at = clock_timestamp() - interval '101 s'")
    lose_lease(raw, run.id)
    runs.recover()
    assert runs.expire() == []  # pending: the table of transitions has no way from there to timeout
    runs.claim("next", LEASE)
    assert [expired.id for expired in runs.expire()] == [run.id]


def purge_all(runs: RunRepository, limit: int) -> list[PurgeResult]:
    answers = [runs.purge(timedelta(0), limit)]
    while cursor := answers[-1].next_cursor:
        answers.append(runs.purge(timedelta(0), limit, after=cursor))
    return answers


@pytest.mark.parametrize("end", ["clock_timestamp()", "now()"])  # each its own; the same for all
@pytest.mark.parametrize("protected", [20, 300])
def test_purge_reaches_runs_behind_many_that_are_kept(
    runs: RunRepository, session: Session, raw: psycopg.Connection, protected: int, end: str
) -> None:
    pipeline = store(session, "a")
    ids = [runs.create(pipeline).id for _ in range(protected + 30)]
    raw.execute(f"UPDATE circle.pipeline_runs SET status = 'cancelled', completed_at = {end}".encode())
    raw.execute("CREATE TABLE mine (id bigint REFERENCES circle.pipeline_runs DEFERRABLE INITIALLY DEFERRED)")
    try:
        raw.execute("INSERT INTO mine SELECT unnest(%s::bigint[])", [ids[:protected]])
        purged = purge_all(runs, limit=25)
        assert sum(answer.deleted for answer in purged) == 30
        assert sorted(run_id for answer in purged for run_id in answer.kept) == ids[:protected]
    finally:
        raw.execute("DROP TABLE mine")


@pytest.mark.parametrize(
    "cursor",
    [
        *("", "x", 5, "2026-01-01", "2026-01-01T00:00:00+00:00/-1", "2026-01-01T00:00:00+00:00"),
        *("2026-13-01T00:00:00+00:00/1", "2026-01-01T25:00:00+00:00/1"),
    ],
)
def test_purge_with_bad_cursor_raises_invalid_cursor(runs: RunRepository, cursor: Any) -> None:
    with pytest.raises(InvalidCursorError):
        runs.purge(timedelta(0), after=cursor)


@pytest.mark.parametrize("action", ["NO ACTION", "RESTRICT", "NO ACTION DEFERRABLE INITIALLY DEFERRED"])
@pytest.mark.parametrize(("table", "key"), [("pipeline_runs", "id"), ("pipeline_node_runs", "run_id")])
def test_purge_keeps_and_reports_runs_that_a_host_refers_to(
    runs: RunRepository, session: Session, raw: psycopg.Connection, table: str, key: str, action: str
) -> None:
    pipeline = store(session, "a>b")
    ids = [runs.cancel(runs.create(pipeline).id).id for _ in range(9)]
    raw.execute(f"CREATE TABLE mine (id bigint REFERENCES circle.{table} ON DELETE {action})".encode())
    try:
        kept = [*ids[:3], ids[7]]
        raw.execute(f"INSERT INTO mine SELECT id FROM circle.{table} WHERE {key} = ANY (%s)".encode(), [kept])
        purged = purge_all(runs, limit=2)
        assert [answer.deleted for answer in purged] == [2, 2, 1]
        assert sorted(kept) == sorted(run_id for answer in purged for run_id in answer.kept)
        assert [run.id for run in runs.search().items] == kept[::-1]
        raw.execute("DELETE FROM mine")
        answer = runs.purge(timedelta(0))
        assert (answer.deleted, answer.kept) == (4, ())
    finally:
        raw.execute("DROP TABLE mine")


def test_purge_deletes_old_terminal_runs_only(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    pipeline = store(session, "a>b")
    ids = [runs.start(runs.create(pipeline).id).id for _ in range(7)]
    for run_id in ids[:6]:
        runs.cancel(run_id)
    with unguarded(raw, "pipeline_runs"):
        raw.execute(
            "UPDATE circle.pipeline_runs SET started_at = started_at - interval '10 days',"
            " completed_at = completed_at - interval '10 days' WHERE id = ANY (%s)",
            [ids[:5]],
        )
    assert runs.purge(timedelta(days=11)).deleted == 0
    assert [runs.purge(timedelta(days=9), limit=2).deleted for _ in range(4)] == [2, 2, 1, 0]
    assert [run.id for run in runs.search().items] == [ids[6], ids[5]]
    assert raw.execute("SELECT count(*) FROM circle.pipeline_node_runs").fetchone() == (4,)
    assert counters(raw, pipeline) == (7, 0, 0)  # purged runs are history
    assert runs.purge(timedelta(0)).deleted == 1
    assert runs.get(ids[6]).status == RunStatus.RUNNING


# --- sweep -------------------------------------------------------------------------------------------------------------


def let_sweep(raw: psycopg.Connection) -> None:
    raw.execute("UPDATE circle.pipeline_sweep SET next_at = now()")


def overdue(runs: RunRepository, session: Session, raw: psycopg.Connection) -> int:
    """The id of a running run that is past the timeout of its pipeline."""
    run_id = started(runs, session, "a", timeout_seconds=1)
    raw.execute("UPDATE circle.pipeline_runs SET started_at = now() - interval '1 h' WHERE id = %s", [run_id])
    return run_id


def test_sweep_recovers_and_expires_in_turns(database: Database, raw: psycopg.Connection) -> None:
    with database.session(autocommit=True) as session:
        runs = RunRepository(session)
        lost, late = claimed(runs, session, "a").id, overdue(runs, session, raw)
        lose_lease(raw, lost)
        let_sweep(raw)
        assert {run.id: run.status.value for run in runs.sweep()} == {lost: "pending", late: "timeout"}
        again = overdue(runs, session, raw)
        assert runs.sweep() == []  # within a second of the last
        let_sweep(raw)
        with raw.transaction():
            raw.execute("SELECT FROM circle.pipeline_sweep FOR UPDATE")
            assert runs.sweep() == []  # another caller sweeps
        assert [run.id for run in runs.sweep()] == [again]


def test_sweep_that_left_runs_is_followed_at_once(database: Database, raw: psycopg.Connection) -> None:
    with database.session(autocommit=True) as session:
        runs = RunRepository(session)
        pipeline = store(session, "a", timeout_seconds=1)
        late = {runs.start(runs.create(pipeline).id).id for _ in range(5)}
        raw.execute("UPDATE circle.pipeline_runs SET started_at = now() - interval '1 h'")
        let_sweep(raw)
        swept = [[run.id for run in runs.sweep(limit=2)] for _ in range(4)]
        assert [len(ids) for ids in swept] == [2, 2, 1, 0]
        assert {run_id for ids in swept for run_id in ids} == late


def test_first_sweep_of_a_database_sweeps(database: Database, raw: psycopg.Connection) -> None:
    raw.execute("DELETE FROM circle.pipeline_sweep")
    with database.session(autocommit=True) as session:
        runs = RunRepository(session)
        late = overdue(runs, session, raw)
        assert [run.id for run in runs.sweep()] == [late]
        assert runs.sweep() == []
    assert raw.execute("SELECT next_at > now() FROM circle.pipeline_sweep").fetchall() == [(True,)]


def test_claim_sweeps_in_autocommit_only(database: Database, raw: psycopg.Connection) -> None:
    with database.session(autocommit=True) as session:
        lost = claimed(RunRepository(session), session, "a").id
        late = overdue(RunRepository(session), session, raw)
    lose_lease(raw, lost)
    let_sweep(raw)
    with database.session() as session:
        assert RunRepository(session).claim("another", LEASE) == []
    with database.session(autocommit=True) as session:
        runs = RunRepository(session)
        (run,) = runs.claim("another", LEASE)
        assert (run.id, run.lapsed_claims) == (lost, 1)
        assert runs.get(late).status == RunStatus.TIMEOUT
        lose_lease(raw, lost)
        let_sweep(raw)
        assert runs.claim("another", LEASE, max_claims=2) == []
        assert runs.get(lost).status == RunStatus.FAILED
