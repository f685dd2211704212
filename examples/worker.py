"""An asyncio worker, as the start of your own executor: ``python -m examples.worker [--name NAME] [--once]``.

It claims runs from the database that the environment names, runs the ready nodes of each in parallel, keeps its leases,
has failed nodes retried, and takes back the runs of workers that died. Any number of workers may run beside each other.
On SIGTERM or SIGINT it gives its runs back, and another worker goes on with them.

``perform`` is what to replace: it only pretends, as a node's ``config["simulate"]`` says.
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
    Database,
    NodeExecutionResult,
    NodeStatus,
    PipelineDefinition,
    PipelineError,
    PipelineNode,
    RunRead,
    is_transient,
)

LEASE = timedelta(seconds=15)
POLL_SECONDS = 0.1
SWEEP_SECONDS = 5.0
LONGEST_PAUSE = 15.0
"""Seconds between two attempts to reach a database that is away for long."""
RUNS_AT_ONCE = 2

logger = logging.getLogger("examples.worker")


async def perform(node: PipelineNode, inputs: Mapping[str, Any], attempt: int) -> dict[str, Any]:
    """Do what a node says and return its output; an exception is a failed attempt, counted from 0."""
    simulate = node.config.get("simulate") or {}
    await asyncio.sleep((node.config if node.type == "delay" else simulate).get("seconds") or 0)
    if attempt < simulate.get("failures", 0):
        raise ConnectionError("the model does not answer")
    if node.type == "condition":
        return {"result": any(output.get(node.config["condition"]) for output in inputs.values())}
    return dict(simulate.get("output") or {})


def untaken(graph: PipelineDefinition, condition_id: str, *, result: bool) -> list[str]:
    """The nodes that only edges lead to which a condition does not take: the first ones of its untaken branches."""
    taken = (None, "true" if result else "false")
    dead = {edge.to_node for edge in graph.edges if edge.from_node == condition_id and edge.condition not in taken}
    return sorted(
        dead - {edge.to_node for edge in graph.edges if edge.from_node != condition_id or edge.condition in taken}
    )


class Worker:
    """Claims runs and executes them until ``stopping`` is set."""

    def __init__(self, database: Database, name: str) -> None:
        self.database = database
        self.name = name
        self.stopping = asyncio.Event()

    @asynccontextmanager
    async def runs(self) -> AsyncIterator[AsyncRunRepository]:
        """A repository for a moment: each call commits, and no connection is held while nodes work."""
        async with self.database.async_session(autocommit=True) as session:
            yield AsyncRunRepository(session)

    async def serve(self, *, once: bool = False) -> None:
        """Work; with ``once`` only until there is nothing left to claim."""
        drivers: set[asyncio.Task[None]] = set()
        stopped = asyncio.create_task(self.stopping.wait())
        sweep_at, pause = monotonic(), POLL_SECONDS
        while not stopped.done():
            try:
                async with self.runs() as runs:
                    if monotonic() >= sweep_at:
                        sweep_at = monotonic() + SWEEP_SECONDS
                        for run in [*await runs.recover(), *await runs.expire()]:
                            logger.warning("run %s was left behind, it is %s now", run.id, run.status)
                    if len(drivers) < RUNS_AT_ONCE:  # one at a time, so that other workers get some, too
                        for run in await runs.claim(self.name, LEASE):
                            drivers.add(asyncio.create_task(self.drive(run)))
                pause = POLL_SECONDS
            except Exception as error:
                if once or not is_transient(error):
                    raise
                pause = min(2 * pause, LONGEST_PAUSE)
                logger.warning("the database is away, next attempt within %.1f s: %s", pause, error)
            if once and not drivers:
                break
            # at random, so that many workers don't come all at once when it is back
            timeout = pause * random.uniform(0.5, 1)  # noqa: S311 - no secret
            await asyncio.wait({stopped, *drivers}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            drivers = {driver for driver in drivers if not driver.done()}
        for task in (stopped, *drivers):
            task.cancel()
        await asyncio.gather(stopped, *drivers, return_exceptions=True)

    async def drive(self, run: RunRead) -> None:
        """Hold a run and take it to its end; if that is broken off, give it back."""
        try:
            async with asyncio.TaskGroup() as group:
                keeper = group.create_task(self.keep(run))
                await self.execute(run, group)
                keeper.cancel()
        except asyncio.CancelledError:
            async with self.runs() as runs:
                await runs.release(run.id, token=run.claim_token)
            logger.info("run %s given back", run.id)
            raise
        except ExceptionGroup as errors:
            # LeaseLostError: it was cancelled, or is somebody else's by now. A broken connection: its lease runs out,
            # and somebody goes on with it.
            logger.warning("run %s dropped: %s", run.id, errors.exceptions[0])
        else:
            logger.info("run %s done", run.id)

    async def keep(self, run: RunRead) -> None:
        """Extend the lease for ever."""
        while True:
            await asyncio.sleep(LEASE.total_seconds() / 3)
            async with self.runs() as runs:
                await runs.heartbeat(run.id, LEASE, token=run.claim_token)

    async def execute(self, run: RunRead, group: asyncio.TaskGroup) -> None:
        """Run every node as soon as it is ready. ``advance`` says which ones are, and ends the run after the last."""
        async with self.runs() as runs:
            graph = await runs.definition(run.id)
            stored = await runs.nodes(run.id)  # somebody may have been at work on it
        outputs = {node.node_id: node.output_data for node in stored if node.status is NodeStatus.COMPLETED}
        retries = {node.node_id for node in stored if node.status is NodeStatus.PENDING and node.retry_count}
        results: list[NodeExecutionResult] = []
        attempts: set[asyncio.Task[NodeExecutionResult]] = set()
        while True:
            async with self.runs() as runs:
                for failure in (result for result in results if result.status == "failed"):
                    node = await runs.fail_node(run.id, failure.node_id, failure.error or "", token=run.claim_token)
                    retries |= {node.node_id} if node.status is NodeStatus.PENDING else set()
                reports = [result for result in results if result.status != "failed"]
                started = await runs.advance(run.id, reports, token=run.claim_token)
            for node in started:
                retries.discard(node.node_id)
                before = {edge.from_node for edge in graph.edges if edge.to_node == node.node_id}
                inputs = {source: outputs[source] for source in before & outputs.keys()}
                attempt = self.attempt(graph.node_map[node.node_id], inputs, node.retry_count)
                attempts.add(group.create_task(attempt))
            if attempts:
                due = POLL_SECONDS if retries else None
                done, attempts = await asyncio.wait(attempts, timeout=due, return_when=asyncio.FIRST_COMPLETED)
            elif retries:
                done = set()
                await asyncio.sleep(POLL_SECONDS)
            else:
                return
            results = [task.result() for task in done]
            for result in [result for result in results if result.status == "completed"]:
                outputs[result.node_id] = result.output
                if graph.node_map[result.node_id].type == "condition":
                    skipped = untaken(graph, result.node_id, result=bool((result.output or {})["result"]))
                    results += [NodeExecutionResult(node_id=node_id, status="skipped") for node_id in skipped]

    async def attempt(self, node: PipelineNode, inputs: Mapping[str, Any], retry_count: int) -> NodeExecutionResult:
        """Run a node once."""
        begun = monotonic()
        try:
            output = await perform(node, inputs, retry_count)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the node's failure
            return NodeExecutionResult(node_id=node.id, status="failed", error=f"{type(error).__name__}: {error}")
        spent = round((monotonic() - begun) * 1000)
        return NodeExecutionResult(
            node_id=node.id, status="completed", output=output, duration_ms=spent, retry_count=retry_count
        )


async def main() -> None:
    """Run a worker as the command line says."""
    parser = argparse.ArgumentParser(description="Execute pipeline runs.")
    parser.add_argument("--name", default=f"worker-{os.getpid()}", help="shown as the run's worker_id")
    parser.add_argument("--once", action="store_true", help="end when nothing is left to claim")
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
