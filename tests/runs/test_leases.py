"""``claim``, ``heartbeat``, ``release``, and the token that fences a stale worker."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import (
    RunRepository,
)
from gathering_pipeline.errors import (
    IllegalTransitionError,
    LeaseLostError,
)
from tests.support.runs import LEASE, claim_token, claimed, clock, done, lose_lease, raised, started, statuses, store


def test_claim_takes_oldest_pending_runs(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    pipeline = store(session, "a")
    ids = [runs.create(pipeline).id for _ in range(6)]
    runs.start(ids[0])
    runs.cancel(ids[2])
    since = clock(raw)
    first = runs.claim("one", LEASE)
    assert [run.id for run in first] == [ids[1]]
    (run,) = first
    assert (run.status, run.worker_id, run.claim_count) == ("running", "one", 1)
    assert since <= datetime.fromtimestamp(run.token / 1_000_000, UTC) <= clock(raw)
    assert run.lease_expires_at is not None
    assert since + LEASE <= run.lease_expires_at <= clock(raw) + LEASE
    assert run.started_at is not None
    assert [run.id for run in runs.claim("two", LEASE, limit=2)] == ids[3:5]
    assert [run.id for run in runs.claim("two", LEASE, limit=100)] == ids[5:]
    assert runs.claim("two", LEASE, limit=100) == []


def test_heartbeat_extends_lease(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    run = claimed(runs, session)
    since = clock(raw)
    ends = runs.heartbeat(run.id, timedelta(hours=1), token=run.token)
    assert since + timedelta(hours=1) <= ends <= clock(raw) + timedelta(hours=1)
    assert runs.get(run.id).lease_expires_at == ends
    lose_lease(raw, run.id)  # the token decides, not the clock
    runs.heartbeat(run.id, LEASE, token=run.token)
    assert runs.recover() == []


def test_heartbeat_with_wrong_token_raises_lease_lost_with_status(
    runs: RunRepository, session: Session, refuses: Callable[..., Any]
) -> None:
    run = claimed(runs, session, "a")
    for token in (0, run.token + 1, -1, 2**40):
        with refuses(LeaseLostError) as caught:
            runs.heartbeat(run.id, LEASE, token=token)
        assert (caught.value.run_id, caught.value.status) == (run.id, "running")
    runs.cancel(run.id)
    for call in (
        lambda: runs.heartbeat(run.id, LEASE, token=run.token),
        lambda: runs.release(run.id, token=run.token),
    ):
        with refuses(LeaseLostError) as caught:
            call()
        assert (caught.value.run_id, caught.value.status) == (run.id, "cancelled")
    unclaimed = started(runs, session, "a")
    with refuses(LeaseLostError) as caught:
        runs.heartbeat(unclaimed, LEASE, token=0)
    assert caught.value.status == "running"


def test_release_returns_run_to_pending_and_keeps_finished_nodes(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    run = claimed(runs, session)
    runs.advance(run.id, token=run.token)
    runs.advance(run.id, [done("a")], token=run.token)
    given = runs.release(run.id, token=run.token)
    assert (given.status, given.worker_id, given.lease_expires_at, given.claim_count) == ("pending", None, None, 1)
    given_token = claim_token(raw, run.id)
    assert given_token > run.token
    assert (given.started_at, given.lapsed_claims) == (run.started_at, 0)
    assert runs.release(run.id, token=run.token) == given  # its answer may have been lost
    assert statuses(runs, run.id) == {"a": "completed", "b": "pending", "c": "pending", "d": "pending"}
    assert [node.retry_count for node in runs.nodes(run.id)] == [0] * 4
    (again,) = runs.claim("another", LEASE)
    assert (again.id, again.started_at) == (run.id, run.started_at)
    assert again.token > given_token
    assert [node.node_id for node in runs.advance(run.id, token=again.token).started] == ["b", "c"]


WRITES: dict[str, Callable[[RunRepository, int, Any], object]] = {
    "start": lambda runs, run_id, token: runs.start(run_id, token=token),
    "complete": lambda runs, run_id, token: runs.complete(run_id, token=token),
    "finish": lambda runs, run_id, token: runs.finish(run_id, token=token),
    "fail": lambda runs, run_id, token: runs.fail(run_id, "late", token=token),
    "append_log": lambda runs, run_id, token: runs.append_log(run_id, "late", token=token),
    "start_node": lambda runs, run_id, token: runs.start_node(run_id, "b", token=token),
    "complete_node": lambda runs, run_id, token: runs.complete_node(run_id, "a", token=token),
    "skip_node": lambda runs, run_id, token: runs.skip_node(run_id, "b", token=token),
    "fail_node": lambda runs, run_id, token: runs.fail_node(run_id, "a", "late", token=token),
    "advance": lambda runs, run_id, token: runs.advance(run_id, [done("a")], token=token),
    "advance alone": lambda runs, run_id, token: runs.advance(run_id, token=token),
    "record": lambda runs, run_id, token: runs.record(run_id, [done("a")], token=token),
    "record nothing": lambda runs, run_id, token: runs.record(run_id, [], token=token),
    "heartbeat": lambda runs, run_id, token: runs.heartbeat(run_id, LEASE, token=-1 if token is None else token),
    "release": lambda runs, run_id, token: runs.release(run_id, token=-1 if token is None else token),
}


@pytest.mark.parametrize("name", WRITES)
def test_write_with_stale_token_raises_lease_lost(
    runs: RunRepository, session: Session, raw: psycopg.Connection, refuses: Callable[..., Any], name: str
) -> None:
    stale = claimed(runs, session, "a b")
    runs.start_node(stale.id, "a", token=stale.token)
    lose_lease(raw, stale.id)
    assert [run.id for run in runs.recover()] == [stale.id]
    with refuses(LeaseLostError) as caught:  # before the next owner has come
        WRITES[name](runs, stale.id, stale.token)
    assert (caught.value.run_id, caught.value.status) == (stale.id, "pending")
    (run,) = runs.claim("next", LEASE)
    raw.execute("UPDATE circle.pipeline_node_runs SET available_at = NULL")
    runs.start_node(run.id, "a", token=run.token)
    wrong = (None, 0, stale.token, run.token - 1, run.token + 1, -1, 2**63 - 1)
    for token in wrong:
        with refuses(LeaseLostError) as caught:
            WRITES[name](runs, run.id, token)
        assert (caught.value.run_id, caught.value.status) == (run.id, "running")
    if name not in ("complete", "finish"):  # not legal now, but not for want of a lease
        WRITES[name](runs, run.id, run.token)
    else:
        with refuses(IllegalTransitionError):
            WRITES[name](runs, run.id, run.token)


def test_write_with_token_beyond_bigint_raises_lease_lost(runs: RunRepository, session: Session) -> None:
    run = claimed(runs, session, "a b")
    for token in (2**63, -(10**30)):
        found = {name: raised(call, runs, run.id, token) for name, call in WRITES.items()}
        assert found == dict.fromkeys(WRITES, "LeaseLostError")
