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

pytestmark = pytest.mark.once


def test_repository_of_non_session_raises_with_advice(database: Database) -> None:
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


def test_call_with_dict_for_schema_raises_with_advice(session: Session) -> None:
    values: Any = {"name": "x"}
    with pytest.raises(InvalidDataError, match=r"data must be of type PipelineCreate, not dict: PipelineCreate\("):
        PipelineRepository(session).create(values)
    with pytest.raises(InvalidDataError, match=r"changes must be of type PipelineUpdate, not dict"):
        PipelineRepository(session).update(1, values)
    with pytest.raises(InvalidDataError, match="settings must be of type DatabaseSettings, not dict"):
        Database(settings=values)
    assert not session.in_transaction()  # no SQL was sent


def test_repository_of_scoped_session_works(database: Database) -> None:
    scoped = scoped_session(sessionmaker(database.engine))
    assert RunRepository(scoped).counts()
    scoped.remove()


def test_async_repository_of_scoped_session_works_in_each_task(database: Database, raw: psycopg.Connection) -> None:
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


def test_async_call_not_awaited_is_named_in_warning(database: Database) -> None:
    call = AsyncRunRepository(AsyncSession()).get(1)
    assert "RunRepository.get" in repr(call)
    call.close()


def test_repository_is_collected_with_its_session(database: Database) -> None:
    """A closed session would begin a transaction that is never committed."""
    with database.session() as session:
        runs = RunRepository(session)
    with pytest.raises(InvalidRequestError, match="closed"):
        runs.counts()
