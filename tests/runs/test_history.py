"""The history of claims: who took and gave up a run, and who cancelled it."""

from __future__ import annotations

import re
from typing import Any

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import Database, InvalidDataError, LeaseLostError, RunOverError, RunRepository
from tests.support.databases import scalar
from tests.support.runs import LEASE, claimed, done, lose_lease, started, store


def history(raw: psycopg.Connection) -> list[tuple[Any, ...]]:
    """Run, kind, worker, and whether the token is that of the run's claim now, in order."""
    return raw.execute(
        "SELECT h.run_id, h.kind, h.worker_id, h.token = r.claim_token FROM circle.pipeline_run_history h"
        " JOIN circle.pipeline_runs r ON r.id = h.run_id ORDER BY h.id"
    ).fetchall()


def test_claim_of_several_runs_writes_a_row_each(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    pipeline = store(session, "a")
    ids = [runs.create(pipeline).id for _ in range(3)]
    assert [run.id for run in runs.claim("w", LEASE, 2)] == ids[:2]
    assert history(raw) == [(run_id, "claimed", "w", True) for run_id in ids[:2]]
    assert runs.claim("w", LEASE, pipelines=[]) == []
    assert len(history(raw)) == 2


def test_release_writes_one_row_with_its_reason(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    run = claimed(runs, session)
    for _ in range(2):  # the second changes nothing
        runs.release(run.id, token=run.token, reason="the worker stops")
    assert history(raw) == [(run.id, "claimed", "worker", False), (run.id, "released", "worker", False)]
    assert scalar(raw, "SELECT reason FROM circle.pipeline_run_history WHERE kind = 'released'") == "the worker stops"
    (again,) = runs.claim("other", LEASE)
    assert history(raw)[2:] == [(run.id, "claimed", "other", True)]
    with pytest.raises(InvalidDataError, match="reason"):
        runs.release(run.id, token=again.token, reason=7)  # type: ignore[arg-type]
    with pytest.raises(LeaseLostError):
        runs.release(run.id, token=again.token + 1)
    assert len(history(raw)) == 3


def test_recover_writes_a_row_with_the_worker_and_why(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    run = claimed(runs, session)
    ended = claimed(runs, session, "a")
    runs.record(ended.id, [done("a")], token=ended.token)
    for run_id in (run.id, ended.id):
        lose_lease(raw, run_id)
    assert [recovered.status for recovered in runs.recover()] == ["pending", "completed"]
    assert history(raw)[2:] == [(run.id, "recovered", "worker", False), (ended.id, "recovered", "worker", True)]
    reason: str = scalar(raw, "SELECT min(reason) FROM circle.pipeline_run_history WHERE kind = 'recovered'")
    assert re.fullmatch(r"the lease ended at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", reason)


def test_cancel_writes_the_role_and_the_reason(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    run_id = started(runs, session)
    runs.cancel(run_id, "not needed any more")
    with pytest.raises(RunOverError):
        runs.cancel(run_id)
    assert history(raw) == [(run_id, "cancelled", scalar(raw, "SELECT session_user"), None)]
    assert scalar(raw, "SELECT reason FROM circle.pipeline_run_history") == "not needed any more"


def test_other_ends_and_calls_on_nodes_write_none(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    runs.fail(started(runs, session), "x")
    run_id = started(runs, session, "a")
    runs.advance(run_id)
    runs.advance(run_id, [done("a")])
    runs.record_run(store(session, "a"), [done("a")])
    assert history(raw) == []


def test_claim_that_is_rolled_back_leaves_no_row(database: Database, raw: psycopg.Connection) -> None:
    with database.session() as session:
        RunRepository(session).create(store(session, "a"))
    with database.session() as session:
        assert len(RunRepository(session).claim("w", LEASE)) == 1
        session.rollback()
    assert history(raw) == []


def test_history_goes_with_its_run(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    run = claimed(runs, session)
    raw.execute("DELETE FROM circle.pipeline_runs WHERE id = %s", [run.id])
    assert scalar(raw, "SELECT count(*) FROM circle.pipeline_run_history") == 0


def test_history_of_an_unknown_kind_is_refused(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    run_id = started(runs, session)
    with pytest.raises(psycopg.errors.CheckViolation):
        raw.execute("INSERT INTO circle.pipeline_run_history (run_id, kind) VALUES (%s, 'lost')", [run_id])
