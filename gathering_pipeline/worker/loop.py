"""``Worker``: it claims runs as it has room, extends their leases, sweeps, and stops."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from time import monotonic

from gathering_pipeline import AsyncRunRepository, ClaimedRun, Database, Databases, InvalidDataError
from gathering_pipeline.worker.execution import (
    Execution,
    Shared,
    jittered,
    logger,
    may_pass,
    pauses_between_attempts,
)
from gathering_pipeline.worker.handlers import NEEDED, Handler, Slots, check_handlers

HEARTBEATS = 4
"""Leases that are extended at the same time: a run that somebody has locked keeps no other waiting."""
RUNS_PER_SLOT = 16
"""Runs that a worker holds at most, for each handler that it may run at a time; most of them are in delays then."""
SWEEP_SECONDS = 5.0
"""Pause between two sweeps of ``Databases`` by a worker without room: a sweep asks each database."""


class Worker:
    """Claims runs and executes their nodes by handlers; any number of workers may run at the same time.

    Args:
        database: The database, or ``Databases``.
        handlers: A function for each type of nodes, async or sync; a sync one runs in a thread. It takes a
            ``NodeContext`` and returns the output as a dict, the branch to take as a bool or a text, a ``NodeResult``,
            or None. An exception is a failed attempt, which is retried while retries are left, unless it is a
            ``PermanentError``. Without a function a trigger and a parallel node complete with their inputs, and a delay
            waits.
        concurrency: Most handlers that run at the same time.
        name: The ``worker_id`` of its runs; None: host and process id.
        lease: How long its runs stay claimed if it dies.
        pipelines: Only runs of these pipelines.
        partial: Whether types may lack a function. A node of such a type fails: give ``pipelines`` that have none.
        poll: Pause after a claim that found nothing.
        grace: How long handlers may go on once the worker is stopped.

    Raises:
        InvalidDataError: An argument can't be used.
    """

    def __init__(
        self,
        database: Database | Databases,
        handlers: Mapping[str, Handler],
        *,
        concurrency: int = 8,
        name: str | None = None,
        lease: timedelta = timedelta(seconds=30),
        pipelines: Collection[int] | None = None,
        partial: bool = False,
        poll: timedelta = timedelta(seconds=0.5),
        grace: timedelta = timedelta(seconds=30),
    ) -> None:
        self.database = database
        self.name = name or f"{socket.gethostname()}-{os.getpid()}"
        self._handlers = check_handlers(handlers, () if partial else NEEDED)
        if type(concurrency) is not int or concurrency < 1:
            raise InvalidDataError(f"concurrency must be a whole number from 1, not {concurrency!r:.100}")
        self._concurrency = concurrency
        if pipelines is not None and isinstance(database, Databases):
            raise InvalidDataError("pipelines are those of one Database: leave them out")
        self._pipelines = pipelines
        self._lease = _check_duration(lease, "lease")
        self._poll = _check_duration(poll, "poll")
        self._grace = _check_duration(grace, "grace", lowest=timedelta(0))
        self._reset()

    def _reset(self) -> None:
        """Make what belongs to one call of ``run``."""
        self._stopping = asyncio.Event()
        self._shared = Shared(self._handlers, Slots(self._concurrency), self._stopping, self._lease, self._poll)
        self._held: dict[Execution, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._is_hurried = False
        self._retry_at = 0.0

    def stop(self) -> None:
        """Claim no further run, let handlers end within ``grace``, then release; a second call releases at once.

        It is called in the event loop of ``run``, as by ``loop.add_signal_handler``.
        """
        self._is_hurried = self._stopping.is_set()
        logger.info("worker %s %s", self.name, "releases its runs" if self._is_hurried else "stops")
        self._stopping.set()
        self._changed.set()
        for execution in self._held:
            execution.wake()

    async def run(self, *, once: bool = False) -> None:
        """Execute runs until ``stop`` is called. If it is cancelled, it releases its runs at once.

        Args:
            once: Return when no run is left to claim, and raise if the database is unavailable.

        Raises:
            PipelineError: The database can't be used; one that is merely unavailable is waited for.
        """
        self._reset()
        try:
            async with asyncio.TaskGroup() as tasks:
                heartbeats = tasks.create_task(self._extend_leases())
                sweeps = tasks.create_task(self._sweep())
                await self._claim_runs(tasks, once=once)
                sweeps.cancel()
                await self._let_end()
                heartbeats.cancel()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    def main(self, *, once: bool = False) -> None:
        """``run`` in an event loop of its own, until SIGTERM or SIGINT; then close the database's connections."""

        async def work() -> None:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.stop)
            try:
                await self.run(once=once)
            finally:
                await self.database.adispose()

        asyncio.run(work())

    async def _claim_runs(self, tasks: asyncio.TaskGroup, *, once: bool) -> None:
        pauses, asked_all, has_claimed = pauses_between_attempts(), False, False
        while not self._stopping.is_set():
            self._changed.clear()
            pause = jittered(self._poll.total_seconds())
            is_idle, found = not self._held, 0  # idle: a run that ends during the claim may make another one claimable
            try:
                found = await self._claim(tasks)
                pauses = pauses_between_attempts()
                if not has_claimed:
                    logger.info("worker %s claims runs, for up to %s handlers at a time", self.name, self._concurrency)
                    has_claimed = True
            except Exception as error:
                if once or not may_pass(error):
                    raise
                pause = next(pauses)
                logger.warning("the database is unavailable, next attempt in %.1f s: %s", pause, error)
            if once and is_idle and not found and monotonic() >= self._retry_at:
                if asked_all or not isinstance(self.database, Databases):
                    return
                self.database.end_pauses()
                asked_all = True
                continue
            asked_all = False
            await self._wait(pause)

    def _room(self) -> int:
        """The number of runs that may be claimed; not positive: none."""
        room = self._shared.slots.free - sum(execution.demand for execution in self._held)
        return min(room, RUNS_PER_SLOT * self._concurrency - len(self._held))

    async def _claim(self, tasks: asyncio.TaskGroup) -> int:
        """Claim as many runs as there is room for. A claim sweeps, too; without room one database is only swept."""
        claimed = await self._claimed(self._room())
        for database, run in claimed:
            execution = Execution(self._shared, database, run)
            self._held[execution] = tasks.create_task(self._follow(execution))
        return len(claimed)

    async def _claimed(self, room: int) -> Sequence[tuple[Database, ClaimedRun]]:
        if isinstance(self.database, Databases):
            if room <= 0:
                return []
            found = await self.database.aclaim(self.name, self._lease, room)
            if found:
                self._changed.set()  # a call asks one database: the next one may have runs, too
            return [(self.database[name], run) for name, run in found]
        async with self.database.async_session(autocommit=True) as session:
            runs = AsyncRunRepository(session)
            if room <= 0:
                await runs.sweep()
                return []
            claimed = await runs.claim(self.name, self._lease, room, self._pipelines)
        return [(self.database, run) for run in claimed]

    async def _sweep(self) -> None:
        """Sweep ``Databases`` while there is no room for a claim: in a task of its own: it asks each of them."""
        while isinstance(self.database, Databases):
            await asyncio.sleep(jittered(self._poll.total_seconds()))
            if self._room() <= 0:
                await self.database.asweep()
                await asyncio.sleep(SWEEP_SECONDS)

    async def _follow(self, execution: Execution) -> None:
        try:
            await execution.follow()
        finally:
            del self._held[execution]
            self._retry_at = max(self._retry_at, execution.retry_at)
            self._changed.set()

    async def _extend_leases(self) -> None:
        interval = self._lease.total_seconds() / 3
        limit = asyncio.Semaphore(HEARTBEATS)

        async def extend(execution: Execution) -> None:
            async with limit:
                if execution in self._held:
                    await execution.extend_lease(interval)

        while True:
            await asyncio.sleep(jittered(interval))
            async with asyncio.TaskGroup() as heartbeats:
                for execution in self._held:
                    heartbeats.create_task(extend(execution))

    async def _let_end(self) -> None:
        """Let the runs that are held end or be released; cancel those that take longer than the grace time."""
        deadline = monotonic() + self._grace.total_seconds()
        while self._held and not self._is_hurried and (left := deadline - monotonic()) > 0:
            self._changed.clear()
            await self._wait(left)
        followers = [*self._held.values()]
        for follower in followers:
            follower.cancel()
        if followers:
            await asyncio.wait(followers)

    async def _wait(self, seconds: float) -> None:
        """Wait until a run is not held any more, or the worker is stopped."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()


def _check_duration(value: object, name: str, lowest: timedelta = timedelta.resolution) -> timedelta:
    if not isinstance(value, timedelta) or value < lowest:
        raise InvalidDataError(f"{name} must be a timedelta of at least {lowest}, not {value!r:.100}")
    return value
