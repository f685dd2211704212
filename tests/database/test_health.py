"""``health``, ``check`` and ``upgrade``, sync and async."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta

import pytest
from sqlalchemy import text

from gathering_pipeline import Database, DatabaseSettings, Health, SchemaRevisionError, migrations
from tests.support.servers import Server


def sync(database: Database) -> Health:
    return database.health()


def asynchronous(database: Database) -> Health:
    async def ask() -> Health:
        try:
            return await database.ahealth()
        finally:
            await database.adispose()

    return asyncio.run(ask())


both = pytest.mark.parametrize("ask", [sync, asynchronous])


@both
def test_health_of_a_migrated_database_is_ok(database: Database, ask: Callable[[Database], Health]) -> None:
    health = ask(database)
    assert health.ok
    assert (health.reachable, health.error, health.is_primary, health.replication_lag) == (True, None, True, None)
    assert health.revision == health.expected_revision == migrations.head()
    assert health.user == database.engine.url.username
    assert (health.server_version or 0) >= 15
    assert (health.connections_in_use, health.connections_allowed) == (0, 20)


@both
def test_health_of_another_revision_is_not_ok(server: Server, ask: Callable[[Database], Health]) -> None:
    name = server.create()
    try:
        with Database(server.database_url(name)) as database:
            assert (ask(database).reachable, ask(database).revision, ask(database).ok) == (True, None, False)
            migrations.upgrade(database.engine, "007_pipeline_execution")
            assert (ask(database).revision, ask(database).ok) == ("007_pipeline_execution", False)
    finally:
        server.drop(name)


@both
def test_health_without_server_says_why(ask: Callable[[Database], Health]) -> None:
    with Database("postgresql://u:S3CRET@localhost:1/d") as database:
        health = ask(database)
    assert not health.ok
    assert not health.reachable
    assert "no answer from the PostgreSQL server at localhost:1" in (health.error or "")
    assert "S3CRET" not in repr(health)


def test_health_with_exhausted_pool_says_why(database_url: str) -> None:
    settings = DatabaseSettings(pool_size=1, max_overflow=0, pool_timeout=timedelta(seconds=0.1))
    with Database(database_url, settings=settings) as database, database.session() as session:
        session.execute(text("SELECT 1"))
        health = database.health()
    assert (health.reachable, health.connections_in_use, health.connections_allowed) == (False, 1, 1)
    assert "QueuePool limit" in (health.error or "")


def test_async_upgrade_and_check(server: Server) -> None:
    async def migrate(database: Database) -> None:
        with pytest.raises(SchemaRevisionError):
            await database.acheck()
        await database.aupgrade("009_events")
        with pytest.raises(SchemaRevisionError):
            await database.acheck()
        await database.aupgrade()
        await database.acheck()
        await database.adispose()

    name = server.create()
    try:
        asyncio.run(migrate(Database(server.database_url(name))))
    finally:
        server.drop(name)
