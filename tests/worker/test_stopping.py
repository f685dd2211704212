"""How a worker and its handlers end: by a signal, by a cancelled run, by a lost lease."""

from __future__ import annotations

import asyncio
import threading
import time
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from gathering_pipeline import Database, LeaseLostError, NodeContext, NodeStatus, RunRepository, RunStatus
from tests.support.databases import Connect
from tests.support.workers import made, new_run, outcome, run_once, run_with, until

pytestmark = pytest.mark.once  # a worker calls the repositories, which tests/runs shows on both servers


class Blocking:
    """A handler that runs until it is let go or cancelled, async or sync."""

    def __init__(self, kind: str) -> None:
        self.begun: list[str] = []
        self.cancelled: list[str] = []
        self.go = threading.Event()
        self.handle = self.handle_async if kind == "async" else self.handle_sync

    async def handle_async(self, context: NodeContext) -> dict[str, Any]:
        self.begun.append(context.node.id)
        try:
            await until(self.go.is_set)
        except asyncio.CancelledError:
            assert context.cancelled.is_set()
            self.cancelled.append(context.node.id)
            raise
        return {"done": True}

    def handle_sync(self, context: NodeContext) -> dict[str, Any]:
        self.begun.append(context.node.id)
        while not self.go.is_set():
            if context.cancelled.wait(0.01):
                self.cancelled.append(context.node.id)
                break
        return {"done": True}


KINDS = pytest.mark.parametrize("kind", ["async", "sync"])


@KINDS
def test_stop_lets_handlers_end_and_begins_no_other_node(database: Database, kind: str) -> None:
    run_id, last_id, other_id = new_run(database, "a>b"), new_run(database, "a"), new_run(database, "a")
    blocking = Blocking(kind)
    worker = made(database, blocking.handle, concurrency=2)

    async def meanwhile(running: asyncio.Task[None]) -> None:
        await until(lambda: len(blocking.begun) == 2)
        worker.stop()
        await asyncio.sleep(0.1)
        assert not running.done()
        blocking.go.set()
        await running

    run_with(worker, meanwhile)
    run, nodes = outcome(database, run_id)
    assert (run.status, run.lapsed_claims, run.worker_id) == (RunStatus.PENDING, 0, None)
    assert (nodes["a"].status, nodes["a"].output_data) == (NodeStatus.COMPLETED, {"done": True})
    assert (nodes["b"].status, nodes["b"].retry_count) == (NodeStatus.PENDING, 0)
    assert outcome(database, last_id)[0].status is RunStatus.COMPLETED
    assert outcome(database, other_id)[0].claim_count == 0
    assert blocking.cancelled == []
    run_once(worker)
    assert outcome(database, run_id)[0].status is RunStatus.COMPLETED


@KINDS
@pytest.mark.parametrize("way", ["grace", "second stop", "cancel"])
def test_stop_after_the_grace_time_releases_runs_without_waiting(database: Database, kind: str, way: str) -> None:
    run_id = new_run(database, "a>b d", {"d": {"type": "delay", "config": {"seconds": 3600}}})
    blocking = Blocking(kind)
    worker = made(database, blocking.handle, grace=timedelta(seconds=0.1 if way == "grace" else 3600))

    async def meanwhile(running: asyncio.Task[None]) -> None:
        await until(lambda: blocking.begun == ["a"])
        if way == "cancel":
            running.cancel()
            await asyncio.wait([running])
            assert running.cancelled()
            return
        worker.stop()
        if way == "second stop":
            await asyncio.sleep(0.1)
            assert not running.done()
            worker.stop()
        await running

    run_with(worker, meanwhile)
    run, nodes = outcome(database, run_id)
    assert (run.status, run.worker_id, run.lapsed_claims) == (RunStatus.PENDING, None, 0)
    assert {(node.status, node.retry_count) for node in nodes.values()} == {(NodeStatus.PENDING, 0)}
    deadline = time.monotonic() + 10
    while blocking.cancelled != ["a"]:  # a thread is not waited for
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_stop_releases_a_run_that_only_waits_for_a_delay_at_once(database: Database) -> None:
    run_id = new_run(database, "d", {"d": {"type": "delay", "config": {"seconds": 3600}}})
    worker = made(database, lambda _: None, grace=timedelta(hours=1))

    async def meanwhile(_running: asyncio.Task[None]) -> None:
        await until(lambda: outcome(database, run_id)[1]["d"].status is NodeStatus.RUNNING)

    run_with(worker, meanwhile)
    assert outcome(database, run_id)[0].status is RunStatus.PENDING


@KINDS
def test_cancelled_run_reaches_its_handlers_within_a_heartbeat(database: Database, kind: str) -> None:
    run_id = new_run(database, "a b")
    blocking = Blocking(kind)
    worker = made(database, blocking.handle, concurrency=2, lease=timedelta(seconds=0.6))

    async def meanwhile(_running: asyncio.Task[None]) -> None:
        await until(lambda: len(blocking.begun) == 2)
        with database.session() as session:
            RunRepository(session).cancel(run_id)
        begun = time.monotonic()
        await until(lambda: len(blocking.cancelled) == 2)
        assert time.monotonic() - begun < 10
        next_id = new_run(database, "c")
        blocking.go.set()
        await until(lambda: outcome(database, next_id)[0].status is RunStatus.COMPLETED)

    run_with(worker, meanwhile)
    assert {node.status for node in outcome(database, run_id)[1].values()} == {NodeStatus.CANCELLED}


def test_slot_of_a_sync_handler_that_does_not_look_is_free_when_it_ends(database: Database) -> None:
    run_id, next_id = new_run(database, "a"), 0
    blocking, begun = Blocking("sync"), threading.Event()

    def deaf(context: NodeContext) -> None:
        begun.set()
        if context.run.id == run_id:
            blocking.go.wait(30)

    worker = made(database, deaf, concurrency=1, lease=timedelta(seconds=0.3))

    async def meanwhile(_running: asyncio.Task[None]) -> None:
        nonlocal next_id
        await until(begun.is_set)
        with database.session() as session:
            RunRepository(session).cancel(run_id)
        await until(lambda: not worker._held)
        next_id = new_run(database, "b")
        await asyncio.sleep(0.2)
        assert outcome(database, next_id)[0].claim_count == 0  # another worker may take it
        blocking.go.set()
        await until(lambda: outcome(database, next_id)[0].status is RunStatus.COMPLETED)

    run_with(worker, meanwhile)


@KINDS
def test_run_taken_over_by_another_worker_is_dropped(
    database: Database, raw: psycopg.Connection, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = new_run(database, "a", max_retries_per_node=3, retry_backoff_base=0)
    blocking = Blocking(kind)
    worker = made(database, blocking.handle, lease=timedelta(seconds=0.6))

    async def meanwhile(_running: asyncio.Task[None]) -> None:
        await until(lambda: blocking.begun == ["a"])
        with database.session(autocommit=True) as session:
            runs = RunRepository(session)
            raw.execute("UPDATE circle.pipelines SET status = 'paused'")
            raw.execute("UPDATE circle.pipeline_runs SET lease_expires_at = clock_timestamp() - interval '1 s'")
            runs.recover()
            await until(lambda: blocking.cancelled == ["a"])
            raw.execute("UPDATE circle.pipelines SET status = 'active'")
            blocking.go.set()
            await until(lambda: runs.get(run_id).status is RunStatus.COMPLETED)

    run_with(worker, meanwhile)
    run, nodes = outcome(database, run_id)
    assert (run.claim_count, run.lapsed_claims, nodes["a"].retry_count) == (2, 1, 1)
    assert f"run {run_id} is dropped: the lease on run {run_id} is lost" in caplog.text


def test_leases_are_extended_while_handlers_and_delays_take_long(database: Database) -> None:
    run_ids = [new_run(database, "a d", {"d": {"type": "delay", "config": {"seconds": 1.2}}}) for _ in range(4)]

    async def handle(_context: NodeContext) -> None:
        await asyncio.sleep(1.2)

    run_once(made(database, handle, lease=timedelta(seconds=0.5), concurrency=4))
    for run_id in run_ids:
        run, _ = outcome(database, run_id)
        assert (run.status, run.claim_count, run.lapsed_claims) == (RunStatus.COMPLETED, 1, 0)


def test_lease_is_extended_while_another_run_is_locked(
    database: Database, database_url: str, connect: Connect, raw: psycopg.Connection
) -> None:
    locked_id, other_id = new_run(database, "a"), new_run(database, "b")
    blocking = Blocking("async")
    worker = made(database, blocking.handle, concurrency=2, lease=timedelta(seconds=1))

    async def meanwhile(_running: asyncio.Task[None]) -> None:
        await until(lambda: len(blocking.begun) == 2)
        holder = connect(database_url)
        holder.execute("BEGIN")
        holder.execute("SELECT FROM circle.pipeline_runs WHERE id = %s FOR UPDATE", [locked_id])
        await asyncio.sleep(2.5)
        expired = raw.execute(
            "SELECT id FROM circle.pipeline_runs WHERE lease_expires_at < clock_timestamp()"
        ).fetchall()
        assert expired == [(locked_id,)]  # nobody can take it, either
        holder.execute("ROLLBACK")
        blocking.go.set()
        await until(lambda: outcome(database, locked_id)[0].status is RunStatus.COMPLETED)

    run_with(worker, meanwhile)
    assert outcome(database, other_id)[0].claim_count == 1


def test_run_that_is_deleted_is_dropped(database: Database, raw: psycopg.Connection) -> None:
    new_run(database, "a")
    blocking = Blocking("async")
    worker = made(database, blocking.handle, lease=timedelta(seconds=0.3))

    async def meanwhile(_running: asyncio.Task[None]) -> None:
        await until(lambda: blocking.begun == ["a"])
        raw.execute("DELETE FROM circle.pipelines")
        await until(lambda: blocking.cancelled == ["a"])

    run_with(worker, meanwhile)


def test_stale_worker_reports_nothing(database: Database, raw: psycopg.Connection) -> None:
    """The fence is the token, whatever the worker knows: here no heartbeat tells it in time."""
    run_id = new_run(database, "a")
    token = None

    async def handle(context: NodeContext) -> dict[str, Any]:
        nonlocal token
        if context.attempt > 1:
            return {"by": "second"}
        with database.session(autocommit=True) as session:
            raw.execute("UPDATE circle.pipeline_runs SET lease_expires_at = clock_timestamp() - interval '1 s'")
            runs = RunRepository(session)
            runs.recover()
            raw.execute("UPDATE circle.pipeline_node_runs SET available_at = NULL")
            raw.execute("UPDATE circle.pipeline_runs SET waits_until = NULL")
            (claimed,) = runs.claim("other", timedelta(hours=1))
            token = claimed.token
            runs.advance(run_id, token=token)
        return {"by": "first"}

    run_once(made(database, handle, lease=timedelta(hours=1)))
    run, nodes = outcome(database, run_id)
    assert (run.status, run.worker_id, nodes["a"].output_data) == (RunStatus.RUNNING, "other", {})
    assert token is not None
    with database.session(autocommit=True) as session, pytest.raises(LeaseLostError):
        RunRepository(session).advance(run_id, token=token - 1)
