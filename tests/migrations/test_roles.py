"""Roles with few rights."""

import asyncio
import io
import time
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, make_url
from sqlalchemy.pool import NullPool

from gathering_pipeline import migrations
from gathering_pipeline.database import Database
from gathering_pipeline.errors import (
    ConfigurationError,
    DatabaseUnavailableError,
)
from tests.support.databases import Connect
from tests.support.revisions import BIG_TABLE, INDEX, wait_until, write_revision


@pytest.mark.parametrize("engine_kind", ["a host's engine", "the package's engine", "an async one"])
def test_upgrade_by_role_with_one_connection_raises_unavailable(
    scripts: Path, empty_database_url: str, connect: Connect, engine_kind: str
) -> None:
    """A step that takes long needs a second one, to see who waits behind it."""
    raw = connect(empty_database_url)
    raw.execute(BIG_TABLE)
    write_revision(scripts, "one", None, f"-- == index: circle.idx_t\n{INDEX}")
    name = f"gathering_test_single_{time.monotonic_ns()}"
    raw.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'x' CONNECTION LIMIT 1".encode())
    raw.execute(f"ALTER SCHEMA circle OWNER TO {name}; ALTER TABLE circle.t OWNER TO {name}".encode())
    url = make_url(empty_database_url).set(username=name, password="x")

    async def go() -> None:
        async with Database(url) as database, database.async_engine.connect() as connection:
            await connection.run_sync(migrations.upgrade)

    try:
        with pytest.raises(DatabaseUnavailableError, match="too many connections for role"):
            if engine_kind == "an async one":
                asyncio.run(go())
            elif engine_kind == "the package's engine":
                migrations.upgrade(url)
            else:
                migrations.upgrade(create_engine(url.set(drivername="postgresql+psycopg"), poolclass=NullPool))
    finally:
        wait_until(lambda: raw.execute("SELECT FROM pg_stat_activity WHERE usename = %s", [name]).fetchone() is None)
        raw.execute(f"DROP OWNED BY {name}; DROP ROLE {name}".encode())


@pytest.mark.parametrize("name", ["GATHERING_DATABASE_URL", "DATABASE_URL"])
def test_upgrade_with_unused_empty_variable_succeeds(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "")
    migrations.upgrade(empty_database_url, "006_pipelines")
    with pytest.raises(ConfigurationError, match=f"{name} can't be used: it is empty"):
        migrations.upgrade()
    monkeypatch.setenv("GATHERING_MIGRATION_URL", empty_database_url)
    migrations.upgrade()
    with Database(empty_database_url) as database:
        database.check()


def test_current_and_check_write_nothing(empty_database_url: str, connect: Connect) -> None:
    with Database(empty_database_url) as database:
        output = io.StringIO()
        config = Config(stdout=output)
        for name, value in migrations.config().get_section("alembic", {}).items():
            config.set_main_option(name, value.replace("%", "%%"))
        config.attributes["connection"] = database.engine
        command.current(config)
    raw = connect(empty_database_url)
    assert raw.execute("SELECT to_regnamespace('circle')").fetchone() == (None,)


def test_upgrade_by_role_without_create_right_succeeds(
    empty_database_url: str, server: object, connect: Connect
) -> None:
    raw = connect(empty_database_url)
    name = f"gathering_test_owner_{time.monotonic_ns()}"
    raw.execute(f"CREATE ROLE {name}; CREATE SCHEMA circle AUTHORIZATION {name}".encode())
    engine = create_engine(empty_database_url, poolclass=NullPool, connect_args={"options": f"-c role={name}"})
    try:
        migrations.upgrade(engine)
    finally:
        raw.execute(f"DROP OWNED BY {name}; DROP ROLE {name}".encode())
