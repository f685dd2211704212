"""One claimed run: its nodes are executed and their results reported until it ends, is released or is lost."""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from time import monotonic
from typing import TypeVar

from sqlalchemy.pool import QueuePool

from gathering_pipeline import (
    AsyncRunRepository,
    ClaimedRun,
    Database,
    IllegalTransitionError,
    InvalidDataError,
    LeaseLostError,
    PermanentError,
    PipelineError,
    PipelineNode,
    RunNotFoundError,
    RunOverError,
    RunStatus,
    StartedNode,
    StatementCancelledError,
    Step,
    is_transient,
)
from gathering_pipeline.worker.handlers import (
    DELAY,
    Cancellation,
    Handler,
    NodeContext,
    Result,
    Slots,
    failure_of,
    in_thread,
    result_of,
    result_without_handler,
)

logger = logging.getLogger("gathering_pipeline.worker")

T = TypeVar("T")

FIRST_PAUSE_SECONDS = 0.1
MAX_PAUSE_SECONDS = 15.0
"""Shortest and longest time between two attempts of a call that the database can't answer now."""
RELEASE_SECONDS = 5.0
"""Longest time for the release of a run whose worker ends."""
UNGATHERED = 4
"""Reports on a database that are sent at the same time without a group commit, each on a connection of the pool."""
ENOUGH_CONNECTIONS = 4
"""Smallest pool with which reports share commits."""
GRAPHS = 256
"""Graphs that a worker remembers at most."""


@dataclass(eq=False, slots=True)
class Shared:
    """What the executions of a worker share.

    Attributes:
        handlers: The handlers by type of nodes.
        slots: The slots of the handlers.
        stopping: Set once no further node is to be begun.
        lease: Duration of a claim.
        poll: Pause after a claim that found nothing.
        graphs: The nodes of graphs by database, pipeline and version.
        reports: What sends the reports, by database.
    """

    handlers: Mapping[str, Handler]
    slots: Slots
    stopping: asyncio.Event
    lease: timedelta
    poll: timedelta
    graphs: dict[tuple[int, int, int | None], Mapping[str, PipelineNode]] = field(default_factory=dict)
    reports: dict[int, Reports] = field(default_factory=dict)

    def reports_to(self, database: Database) -> Reports:
        """What sends the reports to a database."""
        return self.reports.setdefault(id(database), Reports(database))


class Reports:
    """Sends the reports on the runs of one database. Where many are under way, they share statements and commits."""

    def __init__(self, database: Database) -> None:
        self._database = database
        pool = database.async_engine.pool
        # a group commit holds two connections, while heartbeats, claims and what it leaves out need others
        self._can_gather = not isinstance(pool, QueuePool) or not 0 < pool.size() < ENOUGH_CONNECTIONS
        self._under_way = 0
        self._opened = AsyncExitStack()
        self._group: AsyncRunRepository | None = None
        self._changing = asyncio.Lock()

    async def send(self, call: Callable[[AsyncRunRepository], Awaitable[T]]) -> T:
        """Make a call until it is answered. The last of many gives their connections back."""
        self._under_way += 1
        try:
            if not self._can_gather or (self._under_way <= UNGATHERED and self._group is None):
                return await insist(self._database, call)
            return await insisted(lambda: self._gathered(call))
        finally:
            self._under_way -= 1
            if self._under_way == 0:
                await self._close()

    async def _gathered(self, call: Callable[[AsyncRunRepository], Awaitable[T]]) -> T:
        async with self._changing:
            if self._group is None:
                self._group = await self._opened.enter_async_context(self._database.group_commit())
            group = self._group
        return await call(group)

    async def _close(self) -> None:
        async with self._changing:
            if self._under_way == 0:
                self._group = None
                await self._opened.aclose()


class Execution:
    """A claimed run, and what of it is under way.

    Attributes:
        run: The run as it was claimed.
        retry_at: When the first of its retries is due, if it was released for that; by the monotonic clock.
    """

    def __init__(self, shared: Shared, database: Database, run: ClaimedRun) -> None:
        assert run.lease_expires_at is not None, "it was claimed"
        self.run = run
        self.retry_at = 0.0
        self._shared = shared
        self._database = database
        # times of the database are compared with this: its clock may differ from the worker's
        self._claimed_at = run.lease_expires_at - shared.lease, monotonic()
        self._nodes: Mapping[str, PipelineNode] = {}
        self._cancelled = Cancellation()
        self._lost: PipelineError | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._is_waiting = False
        # attempts: all that were begun; those that have not ended, of these those with a handler, and without a slot
        self._begun: set[tuple[str, int]] = set()
        self._under_way = self._handled = self._queued = 0
        # reports: results to send, the last ones that were sent, whether to send none at all but ask what is ready
        self._results: list[Result] = []
        self._reported: list[Result] = []
        self._asks = True
        self._one_by_one = False
        self._due: datetime | None = None

    @property
    def demand(self) -> int:
        """Slots that it waits for, or may need next."""
        return self._queued if self._handled or self._is_waiting else 1

    def wake(self) -> None:
        """Let it look whether the worker stops."""
        self._changed.set()

    async def extend_lease(self, seconds: float) -> None:
        """Extend the lease within a time limit, as somebody may have locked the run. A run that is lost is dropped."""

        async def extend(runs: AsyncRunRepository) -> datetime:
            return await runs.heartbeat(self.run.id, self._shared.lease, token=self.run.token)

        try:
            async with asyncio.timeout(seconds):
                await insist(self._database, extend)
        except TimeoutError:
            logger.warning("the lease on run %s was not extended within %.1f s", self.run.id, seconds)
        except (LeaseLostError, RunNotFoundError) as error:
            self._lost = error
            self.wake()
        except Exception:
            logger.exception("the lease on run %s was not extended", self.run.id)

    async def follow(self) -> None:
        """Execute the run until it ends, is released or is lost. If it is cancelled, the run is released."""
        async with asyncio.TaskGroup() as attempts:
            try:
                if await self._execute(attempts):
                    await self._release()
            except (LeaseLostError, RunOverError, RunNotFoundError) as error:
                logger.warning("run %s is dropped: %s", self.run.id, error)
            except asyncio.CancelledError:
                self._cancel()
                await self._release_in_time()
                raise
            except Exception:
                logger.exception("run %s is dropped; it can be claimed when its lease has expired", self.run.id)
            finally:
                self._cancel()

    async def _execute(self, attempts: asyncio.TaskGroup) -> bool:
        """Report results and begin what the answers name; whether the run goes on when nothing is under way."""
        if not self._is_stopping:
            await self._load_graph()
        while True:
            self._changed.clear()
            if self._results or (self._asks and not self._is_stopping):
                step = await self._report()
                if step is not None and step.status is not RunStatus.RUNNING:
                    logger.info("run %s is %s", self.run.id, step.status)
                    return False
                if step is not None and not self._is_stopping:
                    self._begin(step.started, attempts)
            elif self._under_way == 0:
                return True
            else:
                await self._wait()

    @property
    def _is_stopping(self) -> bool:
        return self._shared.stopping.is_set()

    def _cancel(self) -> None:
        """Let the handlers that run stop."""
        if self._tasks:
            self._cancelled.set()
        for task in self._tasks:
            task.cancel()

    async def _wait(self) -> None:
        """Wait until an attempt ends, a retry is due, or the worker stops."""
        self._is_waiting = True
        try:
            async with asyncio.timeout(None if self._due is None else self._seconds_until(self._due)):
                await self._changed.wait()
        except TimeoutError:
            self._asks = True
        self._is_waiting = False
        if self._lost is not None:
            raise self._lost

    def _seconds_until(self, due: datetime) -> float:
        time, at = self._claimed_at
        return max((due - time).total_seconds() - (monotonic() - at), 0) + 0.01

    # --- reports ---

    async def _report(self) -> Step | None:
        """Send what is to be reported; None: a result was refused, and the rest is still to be sent."""
        batch = self._results[:1] if self._one_by_one else self._results[:]

        async def advance(runs: AsyncRunRepository) -> Step:
            return await runs.advance(self.run.id, batch, retry=True, inputs=True, token=self.run.token)

        try:
            step = await self._shared.reports_to(self._database).send(advance)
        except (InvalidDataError, IllegalTransitionError) as error:
            if not batch or isinstance(error, RunOverError):
                raise
            if len(batch) == 1:
                self._results[:1] = self._replacement(batch[0], error)
            self._one_by_one = self._asks = True  # one refused result refuses all
            return None
        del self._results[: len(batch)]
        self._one_by_one = self._one_by_one and bool(self._results)
        self._look_ahead(step, batch)
        return step

    def _look_ahead(self, step: Step, batch: list[Result]) -> None:
        """Decide what to report next, besides the results of the attempts that are under way."""
        if step.started:
            # a retry may wait; only an answer that starts nothing tells when the next one is due
            is_resumed = not batch and (self._due is not None or self.run.claim_count > 1)
            self._asks = is_resumed or any(result["status"] == "failed" for result in batch)
        else:
            self._asks, self._due = False, step.next_due
            if self._reported and any(_key(node) not in self._begun for node in step.running):
                # the answer that named a node was lost; a repeated report is answered with all that is running
                self._results[:0], batch = self._reported, []
                self._reported = []
        self._reported = batch or self._reported

    def _replacement(self, result: Result, error: PipelineError) -> list[Result]:
        """What to report instead of a result that was refused."""
        node_id = result["node_id"]
        if isinstance(error, InvalidDataError) and result["status"] != "failed":
            logger.warning("run %s: the result of node %s can't be stored: %s", self.run.id, node_id, error)
            return [failure_of(PermanentError(str(error)), node_id, result["attempt"])]
        logger.warning("run %s: the result of node %s is dropped: %s", self.run.id, node_id, error)
        return []

    async def _load_graph(self) -> None:
        graphs, key = self._shared.graphs, (id(self._database), self.run.pipeline_id, self.run.pipeline_version)
        if key not in graphs:
            definition = await insist(self._database, lambda runs: runs.definition(self.run.id))
            if len(graphs) >= GRAPHS:
                graphs.clear()
            graphs[key] = definition.node_map
        self._nodes = graphs[key]

    async def _release(self) -> None:
        """Release the run: it waits for a retry, or the worker stops."""
        if self._due is not None:
            self.retry_at = monotonic() + self._seconds_until(self._due)
        elif not self._is_stopping:
            logger.warning("run %s is released: it is running, but no node of it runs, is ready or waits", self.run.id)
            with suppress(TimeoutError):  # it may be claimed again at once
                async with asyncio.timeout(self._shared.poll.total_seconds()):
                    await self._shared.stopping.wait()
        await insist(self._database, self._give_up)
        logger.info("run %s is released%s", self.run.id, f", a retry is due at {self._due}" if self._due else "")

    async def _release_in_time(self) -> None:
        """Release the run, whatever its handlers do."""
        try:
            async with asyncio.timeout(RELEASE_SECONDS), self._database.async_session(autocommit=True) as session:
                await self._give_up(AsyncRunRepository(session))
            logger.info("run %s is released", self.run.id)
        except Exception as error:  # noqa: BLE001 - the worker ends in any case
            logger.warning("run %s is not released, its lease has to expire: %s", self.run.id, error)

    async def _give_up(self, runs: AsyncRunRepository) -> None:
        await runs.release(self.run.id, token=self.run.token)

    # --- attempts ---

    def _begin(self, nodes: Iterable[StartedNode], attempts: asyncio.TaskGroup) -> None:
        """Begin attempts, except those that an earlier answer named, too."""
        for started in nodes:
            if _key(started) in self._begun:
                continue
            self._begun.add(_key(started))
            self._under_way += 1
            node = self._nodes[started.node_id]
            if handler := self._shared.handlers.get(node.type):
                self._handled += 1
                self._queued += 1
                attempt = self._handle(node, started, handler)
            elif node.type == DELAY:
                attempt = self._delay(node, started)
            else:
                result = result_without_handler(node, started)
                self._log_failure(result, started.attempt)
                self._end(result)
                continue
            task = attempts.create_task(attempt)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _end(self, result: Result | None) -> None:
        self._under_way -= 1
        if result is not None:
            self._results.append(result)
        self._changed.set()

    async def _delay(self, node: PipelineNode, started: StartedNode) -> None:
        result = None
        try:
            async with asyncio.timeout(node.config.get("seconds") or 0):
                await self._shared.stopping.wait()  # it begins anew where the run goes on
        except TimeoutError:
            result = result_without_handler(node, started)
        self._end(result)

    async def _handle(self, node: PipelineNode, started: StartedNode, handler: Handler) -> None:
        result = None
        try:
            await self._shared.slots.acquire()
            self._queued -= 1
            if self._is_stopping:
                self._shared.slots.release()
            else:
                result = await self._call(node, started, handler)
        finally:
            self._handled -= 1
            self._end(result)

    async def _call(self, node: PipelineNode, started: StartedNode, handler: Handler) -> Result:
        """Call a handler, which has a slot."""
        context = NodeContext(
            run=self.run,
            node=node,
            inputs=started.inputs or {},
            attempt=started.attempt,
            cancelled=self._cancelled,
        )
        begun = monotonic()
        shown: BaseException | None = None
        try:
            result = result_of(await self._outcome(handler, context), started)
        except asyncio.CancelledError as error:
            if self._cancelled.is_set():
                raise
            result = failure_of(error, node.id, started.attempt)  # the handler cancelled itself
        except PermanentError as error:
            result = failure_of(error, node.id, started.attempt)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - it is the node's failure
            shown, result = error, failure_of(error, node.id, started.attempt)
        self._log_failure(result, started.attempt, shown)
        return {"duration_ms": round((monotonic() - begun) * 1000)} | result

    def _log_failure(self, result: Result, attempt: int, shown: BaseException | None = None) -> None:
        if result["status"] == "failed":
            place = self.run.id, result["node_id"], attempt
            logger.warning("run %s: node %s failed in attempt %s: %s", *place, result.get("error"), exc_info=shown)

    async def _outcome(self, handler: Handler, context: NodeContext) -> object:
        release = self._shared.slots.release
        if inspect.iscoroutinefunction(handler):
            try:
                return await handler(context)
            finally:
                release()
        outcome = await in_thread(lambda: handler(context), release)
        return await outcome if inspect.isawaitable(outcome) else outcome


def _key(node: StartedNode) -> tuple[str, int]:
    return node.node_id, node.attempt


# --- calls that are made until they are answered ---------------------------------------------------------------------


async def insist(database: Database, call: Callable[[AsyncRunRepository], Awaitable[T]]) -> T:
    """Make a call again and again while the database can't answer it; it has to be one that may be repeated."""

    async def in_session() -> T:
        async with database.async_session(autocommit=True) as session:
            return await call(AsyncRunRepository(session))

    return await insisted(in_session)


async def insisted(call: Callable[[], Awaitable[T]]) -> T:
    """The answer of a call, which is made again and again while the database can't answer it."""
    pauses = pauses_between_attempts()
    while True:
        try:
            return await call()
        except Exception as error:
            if not may_pass(error):
                raise
            pause = next(pauses)
            logger.warning("a call is repeated in %.1f s: %s", pause, error)
        await asyncio.sleep(pause)


def may_pass(error: Exception) -> bool:
    """Whether the same call may succeed later."""
    return is_transient(error) or isinstance(error, StatementCancelledError)


def jittered(seconds: float) -> float:
    """A shorter time at random, so that many workers don't call at the same moment."""
    return seconds * random.uniform(0.5, 1)  # noqa: S311 - no secret


def pauses_between_attempts() -> Iterator[float]:
    """Seconds, without end: each pause is up to twice the one before."""
    pause = FIRST_PAUSE_SECONDS
    while True:
        yield jittered(pause)
        pause = min(2 * pause, MAX_PAUSE_SECONDS)
