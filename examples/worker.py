"""An asyncio worker to start your own executor from: ``python -m examples.worker [--name NAME] [--once]``.

The worker claims runs from the database that the environment names, executes the ready nodes of each run in parallel,
extends its leases, reports failed attempts for a retry, and recovers the runs of workers that died. Any number of
workers may run concurrently. On SIGTERM or SIGINT the worker releases its runs, and another worker continues them.

Replace ``perform``: it only simulates a node, as ``config["simulate"]`` says.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from time import monotonic
from typing import Any

from gathering_pipeline import (
    AsyncRunRepository,
    ClaimedRun,
    Database,
    NodeResult,
    PipelineError,
    PipelineNode,
    StartedNode,
    is_transient,
)

LEASE = timedelta(seconds=15)
POLL_SECONDS = 0.1
SWEEP_SECONDS = 5.0
MAX_PAUSE_SECONDS = 15.0
"""Longest time between two attempts to reach an unavailable database."""
MAX_RUNS = 2
"""Runs that one worker executes concurrently."""

logger = logging.getLogger("examples.worker")


async def perform(node: PipelineNode, inputs: Mapping[str, Any], attempt: int) -> dict[str, Any]:
    """Execute a node and return its output.

    Args:
        node: The node.
        inputs: Outputs of its predecessors, by node id.
        attempt: Number of the attempt, from 0.

    Raises:
        Exception: The attempt failed.
    """
    simulate = node.config.get("simulate") or {}
    await asyncio.sleep((node.config if node.type == "delay" else simulate).get("seconds") or 0)
    if attempt < simulate.get("failures", 0):
        raise ConnectionError("the model does not answer")
    if node.type == "condition":
        return {"result": any(output.get(node.config["condition"]) for output in inputs.values())}
    return dict(simulate.get("output") or {})


class Worker:
    """Claims runs and executes them until ``stopping`` is set."""

    def __init__(self, database: Database, name: str) -> None:
        self.database = database
        self.name = name
        self.stopping = asyncio.Event()

    @asynccontextmanager
    async def runs(self) -> AsyncIterator[AsyncRunRepository]:
        """A repository for one or two calls: each call commits, and no connection is held while nodes are executed."""
        async with self.database.async_session(autocommit=True) as session:
            yield AsyncRunRepository(session)

    async def serve(self, *, once: bool = False) -> None:
        """Execute runs until ``stopping`` is set; with ``once``, until no run is left to claim."""
        executions: set[asyncio.Task[None]] = set()
        stopped = asyncio.create_task(self.stopping.wait())
        sweep_at, pause = monotonic(), POLL_SECONDS
        while not stopped.done():
            try:
                async with self.runs() as runs:
                    if monotonic() >= sweep_at:
                        sweep_at = monotonic() + SWEEP_SECONDS
                        for run in [*await runs.recover(), *await runs.expire()]:
                            logger.warning("run %s was abandoned, it is %s now", run.id, run.status)
                    if len(executions) < MAX_RUNS:  # claims one run at a time, which leaves some to other workers
                        for run in await runs.claim(self.name, LEASE):
                            executions.add(asyncio.create_task(self.execute_leased(run)))
                pause = POLL_SECONDS
            except Exception as error:
                if once or not is_transient(error):
                    raise
                pause = min(2 * pause, MAX_PAUSE_SECONDS)
                logger.warning("the database is unavailable, next attempt within %.1f s: %s", pause, error)
            if once and not executions:
                break
            # random, so that many workers don't reconnect at the same moment
            timeout = pause * random.uniform(0.5, 1)  # noqa: S311 - no secret
            await asyncio.wait({stopped, *executions}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            executions = {execution for execution in executions if not execution.done()}
        for task in (stopped, *executions):
            task.cancel()
        await asyncio.gather(stopped, *executions, return_exceptions=True)

    async def execute_leased(self, run: ClaimedRun) -> None:
        """Execute a run and extend its lease meanwhile; release the run when the task is cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                heartbeat = group.create_task(self.extend_lease(run))
                await self.execute(run, group)
                heartbeat.cancel()
        except asyncio.CancelledError:
            async with self.runs() as runs:
                await runs.release(run.id, token=run.token)
            logger.info("run %s released", run.id)
            raise
        except ExceptionGroup as errors:
            # LeaseLostError: the run was cancelled, or another worker holds it. A broken connection: the lease expires,
            # and another worker continues the run.
            logger.warning("run %s dropped: %s", run.id, errors.exceptions[0])
        else:
            logger.info("run %s done", run.id)

    async def extend_lease(self, run: ClaimedRun) -> None:
        """Extend the lease until the task is cancelled."""
        while True:
            await asyncio.sleep(LEASE.total_seconds() / 3)
            async with self.runs() as runs:
                await runs.heartbeat(run.id, LEASE, token=run.token)

    async def execute(self, run: ClaimedRun, group: asyncio.TaskGroup) -> None:
        """Execute each node as soon as it is ready. ``advance`` starts these nodes and ends the run at last."""
        async with self.runs() as runs:
            graph = await runs.definition(run.id)
        results: list[NodeResult] = []
        attempts: dict[tuple[str, int], asyncio.Task[NodeResult]] = {}
        while True:
            async with self.runs() as runs:
                step = await runs.advance(run.id, results, retry=True, inputs=True, token=run.token)
            for started in step.started:
                if (started.node_id, started.attempt) not in attempts:
                    attempt = self.attempt(graph.node_map[started.node_id], started)
                    attempts[started.node_id, started.attempt] = group.create_task(attempt)
            retrying = step.next_due is not None or any(result.status == "failed" for result in results)
            if not attempts and not retrying:
                return
            # without a result the next step starts the retries that are due
            timeout = POLL_SECONDS if retrying else None
            if attempts:
                await asyncio.wait(attempts.values(), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            else:
                await asyncio.sleep(POLL_SECONDS)
            results = [attempts.pop(key).result() for key in [key for key, task in attempts.items() if task.done()]]

    async def attempt(self, node: PipelineNode, started: StartedNode) -> NodeResult:
        """Execute a node once."""
        begin = monotonic()
        try:
            output = await perform(node, started.inputs or {}, started.attempt - 1)
        except Exception as error:  # noqa: BLE001 - any error is the node's failure
            message = f"{type(error).__name__}: {error}"
            return NodeResult(node_id=node.id, status="failed", error=message, attempt=started.attempt)
        spent = round((monotonic() - begin) * 1000)
        return NodeResult(
            node_id=node.id,
            status="completed",
            output=output,
            duration_ms=spent,
            attempt=started.attempt,
            # the edges that it takes, by their label; the nodes of the other branch are skipped
            branch=bool(output["result"]) if node.type == "condition" else None,
        )


async def main() -> None:
    """Run a worker with the options of the command line."""
    parser = argparse.ArgumentParser(description="Execute pipeline runs.")
    parser.add_argument("--name", default=f"worker-{os.getpid()}", help="shown as the run's worker_id")
    parser.add_argument("--once", action="store_true", help="exit when no run is left to claim")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {options.name}: %(message)s", datefmt="%H:%M:%S")
    async with Database() as database:
        worker = Worker(database, options.name)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, worker.stopping.set)
        await worker.serve(once=options.once)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except PipelineError as error:
        sys.exit(str(error))
