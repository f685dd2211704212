"""The repositories for ``AsyncSession``: each method is the sync method, run by ``AsyncSession.run_sync``."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import Session

from gathering_pipeline.arguments import check_type

from .events import EventRepository
from .pipelines import PipelineRepository
from .runs import RunRepository

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")


class _Async:
    _sync: Callable[[Session], Any]

    def __init__(self, session: AsyncSession | async_scoped_session[AsyncSession]) -> None:
        name = type(self).__name__.removeprefix("Async")
        hint = f"'async with database.async_session() as session:' gives one; {name} takes a Session"
        check_type(session, (AsyncSession, async_scoped_session), "session", hint)
        self._session = session

    def _current(self) -> AsyncSession:
        """The session; from a scoped session that of the current task."""
        return self._session() if isinstance(self._session, async_scoped_session) else self._session


def awaitable(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[_Async, P], Coroutine[Any, Any, R]]:
    """Make the async twin of a repository's method, with the same arguments, result and errors."""

    @wraps(method)
    async def twin(self: _Async, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await self._current().run_sync(lambda session: method(self._sync(session), *args, **kwargs))

    return twin


class AsyncPipelineRepository(_Async):
    """``PipelineRepository`` for ``AsyncSession``."""

    _sync = PipelineRepository

    create = awaitable(PipelineRepository.create)
    get = awaitable(PipelineRepository.get)
    search = awaitable(PipelineRepository.search)
    update = awaitable(PipelineRepository.update)
    activate = awaitable(PipelineRepository.activate)
    pause = awaitable(PipelineRepository.pause)
    delete = awaitable(PipelineRepository.delete)


class AsyncRunRepository(_Async):
    """``RunRepository`` for ``AsyncSession``."""

    _sync = RunRepository

    create = awaitable(RunRepository.create)
    start = awaitable(RunRepository.start)
    complete = awaitable(RunRepository.complete)
    finish = awaitable(RunRepository.finish)
    fail = awaitable(RunRepository.fail)
    cancel = awaitable(RunRepository.cancel)
    append_log = awaitable(RunRepository.append_log)
    start_node = awaitable(RunRepository.start_node)
    complete_node = awaitable(RunRepository.complete_node)
    skip_node = awaitable(RunRepository.skip_node)
    fail_node = awaitable(RunRepository.fail_node)
    advance = awaitable(RunRepository.advance)
    record = awaitable(RunRepository.record)
    claim = awaitable(RunRepository.claim)
    heartbeat = awaitable(RunRepository.heartbeat)
    release = awaitable(RunRepository.release)
    recover = awaitable(RunRepository.recover)
    expire = awaitable(RunRepository.expire)
    purge = awaitable(RunRepository.purge)
    get = awaitable(RunRepository.get)
    search = awaitable(RunRepository.search)
    nodes = awaitable(RunRepository.nodes)
    ready_nodes = awaitable(RunRepository.ready_nodes)
    definition = awaitable(RunRepository.definition)
    counts = awaitable(RunRepository.counts)
    statistics = awaitable(RunRepository.statistics)


class AsyncEventRepository(_Async):
    """``EventRepository`` for ``AsyncSession``."""

    _sync = EventRepository

    read = awaitable(EventRepository.read)
    last = awaitable(EventRepository.last)
    purge = awaitable(EventRepository.purge)
