"""One worker for several databases."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import timedelta

import pytest
from psycopg.pq import TransactionStatus

from gathering_pipeline import Databases, InvalidDataError, NodeContext, RunRepository, RunStatus
from tests.support.databases import Connect
from tests.support.runs import store
from tests.support.servers import Server
from tests.support.workers import made, new_run, outcome, run_once, until

WAITING = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"

pytestmark = pytest.mark.once  # a worker calls the repositories, which tests/runs shows on both servers


@pytest.fixture
def other_url(server: Server, template: str) -> Iterator[str]:
    name = server.create(template)
    yield server.database_url(name)
    server.drop(name)


@pytest.fixture
def databases(database_url: str, other_url: str) -> Iterator[Databases]:
    with Databases({"a": database_url, "b": other_url}) as opened:
        yield opened


def test_worker_of_two_databases_executes_the_runs_of_both(databases: Databases) -> None:
    run_ids = [new_run(databases["a"], "a>b") for _ in range(3)]
    other_ids = [new_run(databases["b"], "c>d") for _ in range(3)]
    assert run_ids == other_ids  # and the pipelines' ids are the same, with other graphs
    seen: list[tuple[int, str]] = []

    async def handle(context: NodeContext) -> None:
        seen.append((context.run.id, context.node.id))

    run_once(made(databases, handle))
    for name in databases:
        assert {outcome(databases[name], run_id)[0].status for run_id in run_ids} == {RunStatus.COMPLETED}
    assert sorted(seen) == sorted((run_id, node_id) for run_id in run_ids for node_id in "abcd")


def test_pipelines_of_many_databases_are_refused(databases: Databases) -> None:
    with pytest.raises(InvalidDataError, match="pipelines are those of one Database"):
        made(databases, lambda _: None, pipelines=[1])


def test_worker_without_a_free_slot_sweeps_all_databases(databases: Databases) -> None:
    new_run(databases["a"], "a")
    with databases["b"].session(autocommit=True) as session:
        lost = RunRepository(session).create(store(session, "b")).id
        RunRepository(session).claim("gone", timedelta(milliseconds=1))
    seen: list[str] = []

    async def handle(context: NodeContext) -> None:
        seen.append(context.node.id)
        while context.node.id == "a" and outcome(databases["b"], lost)[0].status != RunStatus.PENDING:  # noqa: ASYNC110
            await asyncio.sleep(0.02)

    run_once(made(databases, handle, concurrency=1, poll=timedelta(milliseconds=50)))
    assert seen == ["a", "b"]


def test_sweep_that_waits_keeps_no_worker_from_stopping(databases: Databases, connect: Connect, other_url: str) -> None:
    run_id = new_run(databases["a"], "a")
    locker, watcher = connect(other_url), connect(other_url)

    async def handle(_context: NodeContext) -> None:
        locker.execute("BEGIN; LOCK TABLE circle.pipeline_runs")
        await until(lambda: watcher.execute(WAITING).fetchone() is not None)
        worker.stop()

    worker = made(databases, handle, concurrency=1)
    run_once(worker)
    assert outcome(databases["a"], run_id)[0].status == RunStatus.COMPLETED
    assert locker.info.transaction_status == TransactionStatus.INTRANS


def test_run_once_leaves_no_run_of_a_database_that_pauses(databases: Databases) -> None:
    first = new_run(databases["b"], "a", max_running=1)
    with databases["b"].session() as session:
        runs = RunRepository(session)
        second = runs.create(runs.get(first).pipeline_id).id

    async def handle(_context: NodeContext) -> None:
        await asyncio.sleep(0.5)  # claims find nothing meanwhile, and their pauses grow

    run_once(made(databases, handle))
    assert {outcome(databases["b"], run_id)[0].status for run_id in (first, second)} == {RunStatus.COMPLETED}
