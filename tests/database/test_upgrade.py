"""``Database.upgrade`` and ``check``."""

from collections.abc import Callable

import psycopg
import pytest
from pydantic import SecretStr

from gathering_pipeline import migrations
from gathering_pipeline.database import Database
from gathering_pipeline.errors import (
    SchemaRevisionError,
)
from gathering_pipeline.settings import DatabaseSettings


def test_upgrade_empty_database_passes_check(
    empty_database_url: str, connect: Callable[[str], psycopg.Connection]
) -> None:
    with Database(empty_database_url) as database:
        with pytest.raises(
            SchemaRevisionError, match=r"at revision none, this code needs \w+: run 'alembic upgrade head'"
        ):
            database.check()
        found = connect(empty_database_url).execute("SELECT count(*) FROM pg_namespace WHERE nspname = 'circle'")
        assert found.fetchone() == (0,)  # it only looked
        database.upgrade("007_pipeline_execution")
        with pytest.raises(SchemaRevisionError) as caught:
            database.check()
        assert (caught.value.found, caught.value.expected) == ("007_pipeline_execution", migrations.head())
        database.upgrade()
        database.check()


def test_upgrade_by_direct_url_uses_settings(empty_database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unused = SecretStr("postgresql://nobody@127.0.0.1:1/pooler")
    settings = DatabaseSettings(database_url=unused, migration_url=SecretStr(empty_database_url))
    monkeypatch.setenv("DATABASE_URL", "")
    monkeypatch.setenv("GATHERING_POOL_SIZE", "not read")
    with Database(settings=settings) as database:
        database.upgrade()
    with Database(empty_database_url, settings=settings) as database:
        database.check()


def test_upgrade_uses_direct_url(
    empty_database_url: str, connect: Callable[[str], psycopg.Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATHERING_MIGRATION_URL", empty_database_url)
    monkeypatch.setenv("GATHERING_DATABASE_URL", "postgresql://localhost:1/unused")
    Database().upgrade()
    raw = connect(empty_database_url)
    assert raw.execute("SELECT version_num FROM circle.alembic_version").fetchall() == [(migrations.head(),)]
