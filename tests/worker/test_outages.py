"""A worker whose database goes away, or whose answers are lost: it neither ends nor executes anything twice."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from gathering_pipeline import (
    Database,
    DatabaseUnavailableError,
    EventRepository,
    NodeContext,
    RunStatus,
    SchemaRevisionError,
)
from gathering_pipeline.embedded import EmbeddedServer
from tests.support import standbys
from tests.support.databases import Connect
from tests.support.servers import connect, restart
from tests.support.workers import made, new_run, outcome, run_once, run_with, until

pytestmark = pytest.mark.once  # a worker calls the repositories, which tests/runs shows on both servers

WAITING = "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%advance_run%'"


def completions(database: Database, run_id: int) -> list[str | None]:
    with database.session() as session:
        events = EventRepository(session).read(run_id=run_id).items
    return [event.node_id for event in events if event.type == "pipeline_node.completed"]


@pytest.fixture
def own_database(own_server: EmbeddedServer) -> Iterator[Database]:
    with Database(own_server.url) as database:
        database.upgrade()
        yield database


def test_worker_survives_a_crash_of_the_server(own_server: EmbeddedServer, own_database: Database) -> None:
    run_id = new_run(own_database, "a>b b>c")
    executed: list[str] = []

    async def handle(context: NodeContext) -> dict[str, Any]:
        executed.append(context.node.id)
        if context.node.id == "b":
            await asyncio.to_thread(restart, own_server, "immediate")
        return {"node": context.node.id}

    worker = made(own_database, handle)

    async def meanwhile(_running: asyncio.Task[None]) -> None:
        await until(lambda: executed == ["a", "b", "c"])
        await until(lambda: outcome(own_database, run_id)[0].status is RunStatus.COMPLETED)
        later_id = new_run(own_database, "d")
        await until(lambda: outcome(own_database, later_id)[0].status is RunStatus.COMPLETED)

    run_with(worker, meanwhile)
    assert outcome(own_database, run_id)[0].claim_count == 1
    assert completions(own_database, run_id) == ["a", "b", "c"]


def test_reports_that_share_a_connection_survive_its_end(database: Database, raw: psycopg.Connection) -> None:
    run_ids = [new_run(database, "a>b b>c") for _ in range(16)]
    together = asyncio.Barrier(16)
    executed: list[tuple[int, str]] = []

    async def handle(context: NodeContext) -> None:
        executed.append((context.run.id, context.node.id))
        await together.wait()
        if context.run.id == run_ids[0]:  # while the reports of the others are sent
            raw.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )

    async def meanwhile(_running: asyncio.Task[None]) -> None:
        await until(lambda: {outcome(database, run_id)[0].status for run_id in run_ids} == {RunStatus.COMPLETED})

    run_with(made(database, handle, concurrency=16, lease=timedelta(minutes=1)), meanwhile)
    assert sorted(executed) == sorted((run_id, node_id) for run_id in run_ids for node_id in "abc")


@pytest.mark.parametrize("at", ["a", "b"])
def test_report_whose_answer_is_lost_is_repeated(own_database: Database, own_server: EmbeddedServer, at: str) -> None:
    """Lost with the report of a node, or with the call that begins a retry while another node runs."""
    run_id = new_run(own_database, "a>b b>c x", retry_backoff_base=0.3)
    executed: list[tuple[str, int]] = []
    losing = threading.Event()
    lost: list[str] = []

    def lose() -> None:
        with standbys.absent(own_server.url), standbys.ending_waits(own_server.url, standbys.TERMINATED) as ender:
            losing.set()
            while not any("advance_run" in query for query in ender.ended):
                threading.Event().wait(0.01)
            lost.extend(ender.ended)

    thread = threading.Thread(target=lose)

    async def handle(context: NodeContext) -> dict[str, Any]:
        executed.append((context.node.id, context.attempt))
        if executed[-1] == ("x", 1):
            raise ConnectionError
        if context.node.id == at:
            thread.start()
            await asyncio.to_thread(losing.wait)
            if at == "b":  # the retry of x comes due
                await asyncio.to_thread(thread.join)
        return {"inputs": dict(context.inputs)}

    run_once(made(own_database, handle))
    thread.join()
    assert lost
    run, nodes = outcome(own_database, run_id)
    assert run.status is RunStatus.COMPLETED
    assert sorted(executed) == [("a", 1), ("b", 1), ("c", 1), ("x", 1), ("x", 2)]
    assert sorted(map(str, completions(own_database, run_id))) == ["a", "b", "c", "x"]
    assert nodes["c"].output_data == {"inputs": {"b": {"inputs": {"a": {"inputs": {}}}}}}


def test_first_call_whose_answer_is_lost_leaves_no_node_behind(
    own_database: Database, own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The node is running and the worker doesn't know it: the run is released, and claimed again."""
    run_id = new_run(own_database, "a>b")
    executed: list[str] = []

    async def handle(context: NodeContext) -> None:
        executed.append(context.node.id)

    async def meanwhile(_running: asyncio.Task[None]) -> None:
        await until(lambda: bool(watcher.execute(WAITING).fetchall()))
        with standbys.absent(own_server.url), standbys.ending_waits(own_server.url, standbys.TERMINATED) as ender:
            holder.execute("ROLLBACK")
            await until(lambda: any("advance_run" in query for query in ender.ended))
        await until(lambda: outcome(own_database, run_id)[0].status is RunStatus.COMPLETED)

    with connect(own_server.url) as holder, connect(own_server.url) as watcher:
        holder.execute("BEGIN; LOCK circle.pipeline_node_runs IN SHARE MODE")  # claims write no node
        run_with(made(own_database, handle), meanwhile)
    assert executed == ["a", "b"]
    assert outcome(own_database, run_id)[0].claim_count == 2
    assert f"run {run_id} is released: it is running, but no node of it runs" in caplog.text


def test_cancelled_statement_is_repeated(
    database: Database, database_url: str, raw: psycopg.Connection, connect: Connect
) -> None:
    holder = connect(database_url)  # within its transaction pg_stat_activity stays as it was at first
    run_id = new_run(database, "a")

    calls: list[int] = []

    async def handle(context: NodeContext) -> None:
        calls.append(context.attempt)
        if len(calls) == 1:  # on a slow machine the run may be claimed again
            holder.execute("BEGIN")
            holder.execute("SELECT FROM circle.pipeline_runs FOR UPDATE")

    worker = made(database, handle)

    async def meanwhile(_running: asyncio.Task[None]) -> None:
        await until(lambda: bool(raw.execute(WAITING).fetchall()))
        raw.execute(f"SELECT pg_cancel_backend(pid) FROM ({WAITING}) w")
        holder.execute("ROLLBACK")
        await until(lambda: outcome(database, run_id)[0].status is RunStatus.COMPLETED)

    run_with(worker, meanwhile)


def test_worker_once_without_a_server_raises() -> None:
    with Database("postgresql://u@127.0.0.1:1/x") as nowhere, pytest.raises(DatabaseUnavailableError):
        run_once(made(nowhere, lambda _: None))


def test_worker_without_a_schema_raises(empty_database_url: str) -> None:
    with Database(empty_database_url) as empty, pytest.raises(SchemaRevisionError):
        run_with(made(empty, lambda _: None), lambda running: running)


def test_result_that_another_writer_contradicts_is_dropped(
    database: Database, raw: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = new_run(database, "a>b")

    async def handle(context: NodeContext) -> dict[str, Any]:
        if context.node.id == "a":
            raw.execute(
                "UPDATE circle.pipeline_node_runs SET status = 'completed', output_data = '{}' WHERE node_id = 'a'"
            )
        return {"mine": True}

    run_once(made(database, handle))
    run, nodes = outcome(database, run_id)
    assert run.status is RunStatus.COMPLETED
    assert (nodes["a"].output_data, nodes["b"].output_data) == ({}, {"mine": True})
    assert f"run {run_id}: the result of node a is dropped" in caplog.text
