"""A database that a module shares, emptied before each test, and a session of each kind."""

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from sqlalchemy import (
    Engine,
    create_engine,
)
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import NullPool

from gathering_pipeline import (
    Database,
)
from tests.support import shared as fixtures
from tests.support.graphs import GOOD
from tests.support.orm_writes import Run

shared, database_url, database, raw = fixtures.shared, fixtures.database_url, fixtures.database, fixtures.raw


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    made = create_engine(database_url, poolclass=NullPool)
    yield made
    made.dispose()


@pytest.fixture(params=["Database", "own sessionmaker", "async Database", "own async_sessionmaker"])
def run(request: pytest.FixtureRequest, database: Database, engine: Engine, database_url: str) -> Run:
    """A session of each kind that a service may have."""

    def by_database(work: Callable[..., Any], *arguments: Any) -> Any:
        with database.session() as session:
            return work(session, *arguments)

    def by_sessionmaker(work: Callable[..., Any], *arguments: Any) -> Any:
        with sessionmaker(engine).begin() as session:
            return work(session, *arguments)

    def by_async_database(work: Callable[..., Any], *arguments: Any) -> Any:
        async def go() -> Any:
            async with database.async_session() as session:
                result = await session.run_sync(work, *arguments)
            await database.adispose()
            return result

        return asyncio.run(go())

    def by_async_sessionmaker(work: Callable[..., Any], *arguments: Any) -> Any:
        async def go() -> Any:
            own = create_async_engine(database_url, poolclass=NullPool)
            async with async_sessionmaker(own).begin() as session:
                result = await session.run_sync(work, *arguments)
            await own.dispose()
            return result

        return asyncio.run(go())

    return {
        "Database": by_database,
        "own sessionmaker": by_sessionmaker,
        "async Database": by_async_database,
        "own async_sessionmaker": by_async_sessionmaker,
    }[request.param]


@pytest.fixture
def pipeline_id(raw: psycopg.Connection) -> int:
    row = raw.execute(
        "INSERT INTO circle.pipelines (name, nodes, edges) VALUES ('p', %s, %s) RETURNING id", [*map(json.dumps, GOOD)]
    ).fetchone()
    assert row is not None
    return int(row[0])
