"""One worker for several databases."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import timedelta

import pytest

from gathering_pipeline import Databases, InvalidDataError, NodeContext, RunRepository, RunStatus
from tests.support.runs import store
from tests.support.servers import Server
from tests.support.workers import made, new_run, outcome, run_once

pytestmark = pytest.mark.once  # a worker calls the repositories, which tests/runs shows on both servers


@pytest.fixture
def databases(database_url: str, server: Server, template: str) -> Iterator[Databases]:
    name = server.create(template)
    with Databases({"a": database_url, "b": server.database_url(name)}) as opened:
        yield opened
    server.drop(name)


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


def test_run_once_leaves_no_run_of_a_database_that_pauses(databases: Databases) -> None:
    first = new_run(databases["b"], "a", max_running=1)
    with databases["b"].session() as session:
        runs = RunRepository(session)
        second = runs.create(runs.get(first).pipeline_id).id

    async def handle(_context: NodeContext) -> None:
        await asyncio.sleep(0.5)  # claims find nothing meanwhile, and their pauses grow

    run_once(made(databases, handle))
    assert {outcome(databases["b"], run_id)[0].status for run_id in (first, second)} == {RunStatus.COMPLETED}
