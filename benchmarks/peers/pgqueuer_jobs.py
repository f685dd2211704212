"""pgqueuer: a job for each node, which enqueues the next one; the worker is in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, LiteralString

import asyncpg  # pyright: ignore[reportMissingImports] - only in the environment of this peer
from pgqueuer import PgQueuer  # pyright: ignore[reportMissingImports] - the same

from benchmarks.peers.interface import Task
from benchmarks.peers.loops import LoopThread

RECORDED: LiteralString = "SELECT count(*) FROM pgqueuer_log WHERE status = 'successful'"


@contextmanager
def prepare(task: Task) -> Iterator[Callable[[], object]]:
    """Create the tables and start a worker."""
    with LoopThread() as loop:
        # Its driver for psycopg makes statements wait while it listens on the same connection.
        connection = loop.run(_connect(task.url))
        try:
            queuer = PgQueuer.from_asyncpg_connection(connection)
            loop.run(queuer.queries.install())
            chain = _Chain(queuer, task)
            # Ends are recorded in batches of this size or ten times a second: one by one, as every store here does.
            worker = loop.start(queuer.qm.run(batch_size=1))
            try:
                yield lambda: loop.run(chain.record())
            finally:
                loop.run(_shut_down(queuer))
                loop.end(worker, cancel=False)
        finally:
            loop.run(connection.close())


class _Chain:
    """The jobs of a run, and the signal that the last of them is recorded as finished."""

    def __init__(self, queuer: Any, task: Task) -> None:
        self._task = task
        self._left = 0
        self._over = asyncio.Event()
        self._queries = queuer.queries
        queuer.entrypoint("node")(self._node)
        # A job returns before its end is recorded, so the end is seen where the worker records it, without polling.
        self._log_jobs = self._queries.log_jobs
        self._queries.log_jobs = self._log

    async def record(self) -> None:
        """Enqueue the first job and wait for the end of the last one."""
        self._left = self._task.count
        self._over.clear()
        await self._enqueue(0)
        await self._over.wait()

    async def _enqueue(self, at: int) -> None:
        await self._queries.enqueue("node", json.dumps({"at": at, "output": self._task.output}).encode())

    async def _node(self, job: Any) -> None:
        at: int = json.loads(job.payload)["at"]
        if at + 1 < self._task.count:
            await self._enqueue(at + 1)

    async def _log(self, job_status: list[Any]) -> None:
        await self._log_jobs(job_status)
        self._left -= len(job_status)
        if not self._left:
            self._over.set()


async def _connect(url: str) -> Any:
    return await asyncpg.connect(url)


async def _shut_down(queuer: Any) -> None:
    queuer.shutdown.set()
