"""Runs for workers, and what became of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from typing import Any

from gathering_pipeline import (
    Database,
    Databases,
    NodeContext,
    NodeRunRead,
    PipelineCreate,
    PipelineRepository,
    PipelineStatus,
    RunRead,
    RunRepository,
    Worker,
)
from tests.support.graphs import graph

LIMIT_S = 60
CONFIG: dict[str, dict[str, Any]] = {
    "agent": {"agent_id": 1, "task": "do"},
    "condition": {"condition": "?"},
    "action": {"action": "do"},
}


def new_run(database: Database, spec: str, nodes: Mapping[str, dict[str, Any]] | None = None, **fields: Any) -> int:
    """A pending run of a new pipeline.

    Args:
        database: The database.
        spec: As ``graph`` takes it; every node is an action.
        nodes: Fields of nodes that are different.
        fields: Fields of the pipeline.
    """
    stored, edges = graph(spec)
    for node in stored:
        given = (nodes or {}).get(node["id"], {})
        node.update({"config": CONFIG.get(given.get("type", "action"), {})} | given)
    fields = {"name": "p", "status": PipelineStatus.ACTIVE, "nodes": stored, "edges": edges} | fields
    with database.session() as session:
        pipeline = PipelineRepository(session).create(PipelineCreate(**fields))
        return RunRepository(session).create(pipeline.id, {"by": "test"}).id


def outcome(database: Database, run_id: int) -> tuple[RunRead, dict[str, NodeRunRead]]:
    with database.session() as session:
        runs = RunRepository(session)
        return runs.get(run_id), {node.node_id: node for node in runs.nodes(run_id)}


def made(database: Database | Databases, handle: Callable[[NodeContext], Any], **options: Any) -> Worker:
    """A quick worker with one handler for all types that need one."""
    options = {"poll": timedelta(seconds=0.02), "lease": timedelta(seconds=3)} | options
    return Worker(database, dict.fromkeys(("agent", "condition", "action"), handle), **options)


def run_once(worker: Worker) -> None:
    """Let a worker execute everything that can be claimed."""
    asyncio.run(asyncio.wait_for(_run_once(worker), LIMIT_S))


async def _run_once(worker: Worker) -> None:
    try:
        await worker.run(once=True)
    finally:
        await worker.database.adispose()


def run_with(worker: Worker, meanwhile: Callable[[asyncio.Task[None]], Awaitable[None]]) -> None:
    """Let a worker run while something else happens; it is stopped at the end unless that has been done."""

    async def work() -> None:
        running = asyncio.create_task(worker.run())
        try:
            await meanwhile(running)
            if not running.done():
                worker.stop()
                await running
        finally:
            running.cancel()
            await asyncio.wait([running])
            await worker.database.adispose()

    asyncio.run(asyncio.wait_for(work(), LIMIT_S))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - of the database, or of another thread
        await asyncio.sleep(0.01)
