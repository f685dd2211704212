"""What is taken for a session, and what is refused."""

import asyncio
from typing import Any

import psycopg
import pytest
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from gathering_pipeline import (
    AsyncEventRepository,
    AsyncPipelineRepository,
    AsyncRunRepository,
    Database,
    EventRepository,
    InvalidDataError,
    PipelineRepository,
    RunRepository,
)
from tests.support.sessions import KEPT, names, run_async


def test_what_is_no_session_is_refused_at_once_with_where_to_get_one(database: Database) -> None:
    wrong: list[Any] = [database, database.session(), AsyncSession(), None]
    for kind in (PipelineRepository, RunRepository, EventRepository):
        for value in wrong:
            with pytest.raises(
                InvalidDataError, match=rf"^session must be of type Session, not .*Async{kind.__name__}"
            ):
                kind(value)
    for akind in (AsyncPipelineRepository, AsyncRunRepository, AsyncEventRepository):
        for value in (database, Session(), None):
            with pytest.raises(InvalidDataError, match="must be of type AsyncSession, not .* 'async with database"):
                akind(value)  # type: ignore[arg-type]


def test_so_are_dicts_where_a_schema_is_needed(session: Session) -> None:
    values: Any = {"name": "x"}
    with pytest.raises(InvalidDataError, match=r"data must be of type PipelineCreate, not dict: PipelineCreate\("):
        PipelineRepository(session).create(values)
    with pytest.raises(InvalidDataError, match=r"changes must be of type PipelineUpdate, not dict"):
        PipelineRepository(session).update(1, values)
    with pytest.raises(InvalidDataError, match="settings must be of type DatabaseSettings, not dict"):
        Database(settings=values)
    assert not session.in_transaction()  # no SQL was sent


def test_a_scoped_session_is_a_session(database: Database) -> None:
    scoped = scoped_session(sessionmaker(database.engine))
    assert RunRepository(scoped).counts()  # type: ignore[arg-type]
    scoped.remove()


def test_so_is_an_async_one_in_whichever_task_it_is_used(database: Database, raw: psycopg.Connection) -> None:
    async def create(pipelines: AsyncPipelineRepository, scoped: async_scoped_session[AsyncSession]) -> None:
        await pipelines.create(KEPT)
        await scoped.commit()
        await scoped.remove()

    async def work() -> None:
        scoped = async_scoped_session(async_sessionmaker(database.async_engine), asyncio.current_task)
        pipelines = AsyncPipelineRepository(scoped)
        await asyncio.gather(*(create(pipelines, scoped) for _ in range(3)))
        await create(pipelines, scoped)

    run_async(database, work)
    assert len(names(raw)) == 4


def test_a_call_that_is_not_awaited_is_named(database: Database) -> None:
    call = AsyncRunRepository(AsyncSession()).get(1)
    assert "RunRepository.get" in repr(call)
    call.close()


def test_a_repository_ends_with_its_session(database: Database) -> None:
    """A closed session would begin a transaction that nobody commits."""
    with database.session() as session:
        runs = RunRepository(session)
    with pytest.raises(InvalidRequestError, match="closed"):
        runs.counts()
