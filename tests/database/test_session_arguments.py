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
    ConfigurationError,
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


def test_repository_of_session_with_translated_schema_raises(database: Database) -> None:
    async def work() -> None:
        async with AsyncSession(database.async_engine) as session:
            await session.connection(execution_options={"schema_translate_map": {"circle": "tenant"}})
            with pytest.raises(ConfigurationError, match="renames schema circle"):
                await AsyncRunRepository(session).counts()

    with Session(database.engine.execution_options(schema_translate_map={"circle": "tenant"})) as session:
        with pytest.raises(ConfigurationError, match="schema_translate_map renames schema circle"):
            PipelineRepository(session).create(KEPT)
    with Session(database.engine.execution_options(schema_translate_map={"circle": "circle"})) as session:
        assert PipelineRepository(session).create(KEPT).id == 1
    run_async(database, work)


def test_async_api_without_asyncio_raises_a_sentence(database: Database) -> None:
    """As under trio: the coroutine is driven, but no loop of asyncio runs."""

    async def call() -> None:
        async with database.async_session() as session:
            await AsyncRunRepository(session).counts()

    async def group() -> None:
        async with database.group_commit() as runs:
            await runs.advance(1)

    async def connect() -> None:
        await database.async_engine.connect()

    async def listen() -> None:
        await anext(database.alisten())

    for work in (call, group, connect, listen):
        with pytest.raises(ConfigurationError, match="needs an event loop of asyncio, and none is running"):
            work().send(None)


def test_call_with_wrong_arguments_names_the_class_that_was_called(database: Database) -> None:
    calls: list[Any] = [
        lambda runs: runs.create(1, {}, "key"),
        lambda runs: runs.create(),
        lambda runs: runs.create(1, key="k"),
    ]
    with database.session() as session:
        for call in calls:
            with pytest.raises(TypeError, match=r"^RunRepository\.create\(\) ") as caught:
                call(RunRepository(session))
            assert caught.value.__cause__ is None

    async def work() -> None:
        async with database.async_session() as session:
            for call in calls:
                with pytest.raises(TypeError, match=r"^AsyncRunRepository\.create\(\) "):
                    await call(AsyncRunRepository(session))

    run_async(database, work)
