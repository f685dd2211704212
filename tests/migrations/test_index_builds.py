"""Indexes that are built concurrently."""

import threading
from pathlib import Path

import psycopg
import pytest
from alembic import command

from gathering_pipeline import migrations
from gathering_pipeline.errors import (
    DatabaseUnavailableError,
)
from tests.support.databases import Connect
from tests.support.revisions import BIG_TABLE, INDEX, WAITS, wait_until, write_revision


def test_upgrade_with_invalid_index_rebuilds_it(scripts: Path, empty_database_url: str, connect: Connect) -> None:
    raw = connect(empty_database_url)
    raw.execute("CREATE SCHEMA circle; CREATE TABLE circle.t (id int); INSERT INTO circle.t VALUES (1), (1)")
    with pytest.raises(psycopg.errors.UniqueViolation):
        raw.execute("CREATE UNIQUE INDEX CONCURRENTLY idx_t ON circle.t (id)")
    valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'circle.idx_t'::regclass"
    assert raw.execute(valid).fetchone() == (False,)
    raw.execute("DELETE FROM circle.t")
    write_revision(
        scripts,
        "one",
        None,
        "-- == index: circle.idx_t\nCREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS idx_t ON circle.t (id);\n",
    )
    migrations.upgrade(empty_database_url)
    assert raw.execute(valid).fetchone() == (True,)


@pytest.mark.parametrize("what", ["a request behind a reader", "a writer that is waited for"])
def test_index_build_yields_to_create_index_if_not_exists(
    scripts: Path, empty_database_url: str, connect: Connect, what: str
) -> None:
    """Else the one would wait for as long as the reader reads, and the other would be a deadlock."""
    raw, other = connect(empty_database_url), connect(empty_database_url)
    raw.execute(BIG_TABLE)
    raw.execute("CREATE INDEX idx_old ON circle.t (filler)")
    write_revision(scripts, "one", None, f"-- == index: circle.idx_t\n{INDEX}")
    migrator = threading.Thread(target=migrations.upgrade, args=(empty_database_url,))
    with other.transaction():
        other.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        other.execute("SELECT FROM circle.t LIMIT 1")
        if what == "a writer that is waited for":
            other.execute("UPDATE circle.t SET id = id WHERE id = 1")
        migrator.start()
        wait_until(lambda: raw.execute(WAITS).fetchone() is not None)
        requester = raw if what == "a request behind a reader" else other
        requester.execute("SET lock_timeout = '10s'")
        requester.execute("CREATE INDEX IF NOT EXISTS idx_old ON circle.t (filler)")
        assert migrator.is_alive()
    migrator.join(30)
    index = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'circle.idx_t'::regclass"
    assert raw.execute(index).fetchone() == (True,)


def test_index_build_yields_to_waiting_session(scripts: Path, empty_database_url: str, connect: Connect) -> None:
    raw, other = connect(empty_database_url), connect(empty_database_url)
    raw.execute(BIG_TABLE)
    raw.execute("CREATE INDEX idx_old ON circle.t (filler)")
    write_revision(scripts, "one", None, f"-- == index: circle.idx_t\n{INDEX}")
    config = migrations.config(empty_database_url)
    config.attributes["patience"] = 0
    failures: list[BaseException] = []

    def migrate() -> None:
        try:
            command.upgrade(config, "head")
        except DatabaseUnavailableError as error:
            failures.append(error)

    migrator = threading.Thread(target=migrate)
    with other.transaction():
        other.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        other.execute("SELECT FROM circle.t LIMIT 1")
        migrator.start()
        wait_until(lambda: raw.execute(WAITS).fetchone() is not None)
        raw.execute("CREATE INDEX IF NOT EXISTS idx_old ON circle.t (filler)")
        migrator.join(30)
        (failure,) = failures
        assert str(failure) == (
            "the migration was retried for 0 s, but other sessions waited for the step: "
            "stop those that send CREATE INDEX or VACUUM, or set yield=no"
        )
        # the INVALID index is dropped under an exclusive lock, which the reader doesn't share
    config.attributes["yield"] = "no"
    command.upgrade(config, "head")
    index = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'circle.idx_t'::regclass"
    assert raw.execute(index).fetchone() == (True,)
