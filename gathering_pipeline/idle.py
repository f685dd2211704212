"""Closes connections that lie in a pool unused: the last used one after a limit, the others after a second.

A connection that a session holds is never closed, however long nothing is sent on it. One thread looks after all sync
pools of the process, as long as one of them has a connection; an async pool is looked after by its event loop, which
alone may touch it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.util.queue import Empty

from gathering_pipeline.forks import call_in_child

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine
    from sqlalchemy.pool import ConnectionPoolEntry

SPARE_SECONDS = 1.0
"""Time without use after which a connection is closed if its pool has one that was used later; the pause of checks."""


def close_idle(engine: Engine, limit: float) -> None:
    """Close unused connections of an engine from now on.

    Args:
        engine: With a ``QueuePool`` whose last used connection is the next to be used (``pool_use_lifo``).
        limit: Seconds without use after which the last connection is closed.
    """
    watch = _Watch(engine, limit)
    event.listen(engine, "checkin", watch.checkin)


class _Watch:
    """The pool of an engine."""

    def __init__(self, engine: Engine, limit: float) -> None:
        self._engine = engine
        self._limits = limit, min(limit, SPARE_SECONDS)
        self._loop: asyncio.AbstractEventLoop | None = None

    def checkin(self, _connection: object, entry: ConnectionPoolEntry) -> None:
        """Note when a connection comes back, which it does after this call."""
        entry.info["idle_since"] = time.monotonic()
        if not self._engine.dialect.is_async:
            _watcher.add(self)
            return
        with suppress(RuntimeError):  # no loop runs here: the pool is disposed
            loop = asyncio.get_running_loop()
            if self._loop is not loop:
                self._loop = loop
                loop.call_later(SPARE_SECONDS, self._check_in_loop)

    def _check_in_loop(self) -> None:
        if self.check():
            assert self._loop is not None, "it called"
            self._loop.call_later(SPARE_SECONDS, self._check_in_loop)
        else:
            self._loop = None

    def check(self) -> bool:
        """Close what was unused for too long, and tell whether unused connections are left."""
        pool: Any = self._engine.pool
        queue, unused = pool._pool, []  # noqa: SLF001 - SQLAlchemy has no call that looks at unused connections
        with suppress(Empty):
            while True:
                unused.append(queue.get_nowait())
        now = time.monotonic()
        kept: list[ConnectionPoolEntry] = []
        for entry in unused:  # the last used one first
            driver = entry.driver_connection
            if driver is not None and now - entry.info.get("idle_since", now) < self._limits[bool(kept)]:
                kept.append(entry)
                continue
            if driver is not None:
                driver.pgconn.finish()  # close() would have to wait, which only a task can
            pool._dec_overflow()  # noqa: SLF001
        for entry in reversed(kept):
            pool._do_return_conn(entry)  # noqa: SLF001
        return bool(kept)


class _Watcher:
    """The thread for the sync pools."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watches: set[_Watch] = set()
        self._thread: threading.Thread | None = None

    def add(self, watch: _Watch) -> None:
        if watch in self._watches:
            return
        with self._lock, suppress(RuntimeError):  # no thread can be started at the end of the process
            self._watches.add(watch)
            if self._thread is None or not self._thread.is_alive():
                thread = threading.Thread(target=self._run, name="closes idle connections", daemon=True)
                thread.start()
                self._thread = thread

    def _run(self) -> None:
        while True:
            time.sleep(SPARE_SECONDS)
            with self._lock:
                watches, self._watches = self._watches, set()
            left = {watch for watch in watches if watch.check()}
            with self._lock:
                self._watches |= left
                if not self._watches:
                    self._thread = None
                    return


_watcher = _Watcher()


def _renew() -> None:
    global _watcher  # noqa: PLW0603 - no thread follows into a forked child
    _watcher = _Watcher()


call_in_child(_renew)
