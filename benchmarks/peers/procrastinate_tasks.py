"""procrastinate: a task for each node, which defers the next one; the worker is in this process, one task at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, LiteralString

import procrastinate  # pyright: ignore[reportMissingImports] - only in the environment of this peer
import psycopg

from benchmarks.peers.interface import Task
from benchmarks.peers.loops import LoopThread

RECORDED: LiteralString = "SELECT count(*) FROM procrastinate_jobs WHERE status = 'succeeded'"


@contextmanager
def prepare(task: Task) -> Iterator[Callable[[], object]]:
    """Create the tables and start a worker."""
    with LoopThread() as loop:
        app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=task.url))
        loop.run(_open(app))
        try:
            chain = _Chain(app, task)
            worker = loop.start(app.run_worker_async(concurrency=1, install_signal_handlers=False))
            try:
                _wait_for_listener(task.url)
                yield lambda: loop.run(chain.record())
            finally:
                loop.end(worker, cancel=True)
        finally:
            loop.run(_close(app))


class _Chain:
    """The tasks of a run, and the signal that the last of them is recorded as finished."""

    def __init__(self, app: Any, task: Task) -> None:
        self._task = task
        self._left = 0
        self._over = asyncio.Event()
        self._defer = app.task(name="node")(self._node).defer_async
        # A task returns before its end is recorded, so the end is seen where the worker records it, without polling.
        self._finish_job = app.job_manager.finish_job
        app.job_manager.finish_job = self._finish

    async def record(self) -> None:
        """Defer the first task and wait for the end of the last one."""
        self._left = self._task.count
        self._over.clear()
        await self._defer(at=0, output=self._task.output)
        await self._over.wait()

    async def _node(self, at: int, output: dict[str, Any]) -> None:
        if at + 1 < self._task.count:
            await self._defer(at=at + 1, output=output)

    async def _finish(self, **arguments: Any) -> None:
        await self._finish_job(**arguments)
        self._left -= 1
        if not self._left:
            self._over.set()


async def _open(app: Any) -> None:
    await app.open_async()
    await app.schema_manager.apply_schema_async()


async def _close(app: Any) -> None:
    await app.close_async()


def _wait_for_listener(url: str) -> None:
    """Wait until the worker listens: a job that was deferred before would wait for the worker's next poll."""
    query: LiteralString = (
        "SELECT FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle' AND query ILIKE 'LISTEN %'"
    )
    with psycopg.connect(url, autocommit=True) as connection:
        while not connection.execute(query).rowcount:
            time.sleep(0.01)
