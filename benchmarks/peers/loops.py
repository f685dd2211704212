"""An event loop in a thread of its own, for peers whose worker is a coroutine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, Self, TypeVar

T = TypeVar("T")


class LoopThread:
    """A loop that runs on between two runs, so that a worker comes to rest as it would in a process of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Wait for a coroutine."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a coroutine."""

        async def start() -> asyncio.Task[None]:
            return asyncio.create_task(coroutine)

        return self.run(start())

    def end(self, task: asyncio.Task[None], *, cancel: bool) -> None:
        """Wait for the end of a task, whatever it is."""

        async def end() -> None:
            if cancel:
                task.cancel()
            await asyncio.wait([task])

        self.run(end())
