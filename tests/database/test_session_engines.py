"""Sessions of an application: which engine the repositories use, and drivers that they refuse."""

import asyncio
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from gathering_pipeline import (
    AsyncPipelineRepository,
    AsyncRunRepository,
    ConfigurationError,
    EventRepository,
    Pipeline,
    PipelineNodeRun,
    PipelineRepository,
    PipelineRun,
    PipelineUpdate,
    RunRepository,
)
from gathering_pipeline.orm import Base
from tests.support.pipelines import new

pytestmark = pytest.mark.once  # which engine a session uses is decided by SQLAlchemy


class _NotSentError(Exception):
    """A connection was asked for."""


def _refuse(*_args: object, **_options: object) -> Any:
    raise _NotSentError


def _driver(**more: Any) -> Any:
    """A driver's module, as far as SQLAlchemy looks at it before it connects."""
    return SimpleNamespace(paramstyle="pyformat", __version__="2.9.9", connect=_refuse, Error=_NotSentError, **more)


@pytest.fixture
def elsewhere() -> Any:
    """An engine whose server nobody may ask."""
    engine = create_engine("postgresql+psycopg://nobody@nowhere.invalid/none", poolclass=NullPool)
    yield engine
    engine.dispose()


@pytest.fixture
def ours(database_url: str) -> Any:
    engine = create_engine(database_url, poolclass=NullPool)
    yield engine
    engine.dispose()


@pytest.mark.parametrize("classes", [[Base], [Pipeline, PipelineRun, PipelineNodeRun]], ids=["Base", "each class"])
def test_repositories_use_the_engine_of_the_classes(classes: list[Any], ours: Engine, elsewhere: Engine) -> None:
    with Session(bind=elsewhere, binds=dict.fromkeys(classes, ours)) as session:
        pipelines, runs = PipelineRepository(session), RunRepository(session)
        made = pipelines.create(new(status="active"))
        pipelines.update(made.id, PipelineUpdate(name="q"))
        assert pipelines.get(made.id).name == "q"
        run_id = runs.create(made.id).id
        runs.advance(run_id)
        assert session.get_one(PipelineRun, run_id).status == "running"
        assert EventRepository(session).read().items == ()
        session.commit()


def test_repositories_use_the_engine_that_a_session_chooses(ours: Engine, elsewhere: Engine) -> None:
    class Routing(Session):
        def get_bind(self, mapper: Any = None, **_more: Any) -> Any:
            return ours if mapper is not None else elsewhere

    with Routing() as session:
        made = PipelineRepository(session).create(new())
        assert PipelineRepository(session).get(made.id) == made


def test_async_repositories_use_the_engine_of_the_classes(database_url: str) -> None:
    async def go() -> None:
        ours = create_async_engine(database_url, poolclass=NullPool)
        elsewhere = create_async_engine("postgresql+psycopg://nobody@nowhere.invalid/none", poolclass=NullPool)
        async with AsyncSession(bind=elsewhere, binds={Base: ours}) as session:
            made = await AsyncPipelineRepository(session).create(new(status="active"))
            assert (await AsyncRunRepository(session).create(made.id)).status == "pending"
        await ours.dispose()
        await elsewhere.dispose()

    asyncio.run(go())


def test_session_without_an_engine_is_refused() -> None:
    with Session() as session, pytest.raises(ConfigurationError, match="the session has no engine"):
        PipelineRepository(session).get(1)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("postgresql+psycopg2://u@h/d", "psycopg2"),
        ("postgresql+pg8000://u@h/d", "pg8000"),
        ("sqlite://", "pysqlite"),
    ],
)
def test_session_of_another_driver_is_refused(url: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("extensions", "extras"):  # SQLAlchemy imports them
        monkeypatch.setitem(sys.modules, f"psycopg2.{part}", _driver())
    monkeypatch.setitem(sys.modules, "psycopg2", _driver(extensions=_driver(), extras=_driver()))
    module = {} if name == "pysqlite" else {"module": _driver()}
    engine = create_engine(url, poolclass=NullPool, **module)
    with Session(engine) as session:
        session.add(Pipeline(**new().model_dump(include={"name", "nodes", "edges"})))  # not flushed either
        for call in (
            lambda: PipelineRepository(session).create(new()),
            lambda: PipelineRepository(session).get(1),
            lambda: PipelineRepository(session).update(1, PipelineUpdate(name="q")),
            lambda: RunRepository(session).create(1),
            lambda: RunRepository(session).counts(),
            lambda: EventRepository(session).read(),
        ):
            with pytest.raises(ConfigurationError, match=rf"driver {name} .*postgresql\+psycopg://"):
                call()
    engine.dispose()


@pytest.mark.parametrize(
    ("url", "name"), [("postgresql+asyncpg://u@h/d", "asyncpg"), ("sqlite+aiosqlite://", "aiosqlite")]
)
def test_async_session_of_another_driver_is_refused(url: str, name: str) -> None:
    async def go() -> None:
        engine = create_async_engine(
            url, poolclass=NullPool, module=_driver(sqlite_version_info=(3, 40, 0), has_stop=True)
        )
        async with AsyncSession(engine) as session:
            for call in (
                lambda: AsyncPipelineRepository(session).create(new()),
                lambda: AsyncPipelineRepository(session).get(1),
                lambda: AsyncRunRepository(session).advance(1),
            ):
                with pytest.raises(ConfigurationError, match=f"driver {name} "):
                    await call()

    asyncio.run(go())
