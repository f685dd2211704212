"""Migrators at the same time, and revisions that this release does not know."""

import logging
from functools import partial

import pytest
from alembic import command

from gathering_pipeline import migrations
from gathering_pipeline.errors import (
    DatabaseUnavailableError,
    SchemaRevisionError,
)
from tests.support.databases import ADVISORY_LOCKS, Connect
from tests.support.forks import Child
from tests.support.revisions import wait_until


def count_steps(url: str) -> int:
    """Upgrade, and return how many steps that took."""
    steps = 0

    def count(record: logging.LogRecord) -> bool:
        nonlocal steps
        steps += record.msg == "step: %s"
        return record.msg != "step: %s"

    logger = logging.getLogger("alembic.gathering_pipeline")
    logger.addFilter(count)
    logger.setLevel(logging.DEBUG)
    migrations.upgrade(url)
    return steps


def test_upgrade_from_ten_processes_runs_each_step_once(empty_database_url: str, connect: Connect) -> None:
    """The others wait for it, and find nothing to do."""
    raw = connect(empty_database_url)
    raw.execute("SELECT pg_advisory_lock(%s)", [0x6761746865720007])  # until all of them are there
    processes = [Child(partial(count_steps, empty_database_url)) for _ in range(10)]
    clients = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    wait_until(lambda: raw.execute(clients).fetchone() == (10,))
    raw.execute("SELECT pg_advisory_unlock_all()")
    steps = sorted(process.result() for process in processes)
    assert steps[:9] == [0] * 9
    assert steps[9] > 50
    assert raw.execute("SELECT version_num FROM circle.alembic_version").fetchall() == [(migrations.head(),)]
    assert raw.execute(ADVISORY_LOCKS).fetchone() == (0,)


def test_upgrade_from_unknown_revision_raises(database_url: str, connect: Connect) -> None:
    connect(database_url).execute("UPDATE circle.alembic_version SET version_num = '099_future'")
    with pytest.raises(SchemaRevisionError, match="at revision 099_future, this code needs .*upgrade the package"):
        migrations.upgrade(database_url)
    with pytest.raises(SchemaRevisionError, match="at revision 099_future"):
        migrations.downgrade(database_url, "base")


def test_upgrade_while_migrator_is_stuck_raises(empty_database_url: str, connect: Connect) -> None:
    other = connect(empty_database_url)
    other.execute("SELECT pg_advisory_lock(%s)", [0x6761746865720007])
    config = migrations.config(empty_database_url)
    config.attributes["patience"] = 0.3
    with pytest.raises(DatabaseUnavailableError, match="another migrator has been running"):
        command.upgrade(config, "head")
