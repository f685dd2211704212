"""How the steps of a revision run."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy.exc import DBAPIError

from gathering_pipeline import migrations
from gathering_pipeline.database import Database
from gathering_pipeline.errors import (
    WITHDRAWN_REVISIONS,
    DatabaseUnavailableError,
    SchemaRevisionError,
)
from gathering_pipeline.maintenance.doctor import doctor
from gathering_pipeline.maintenance.preflight import preflight
from tests.support.databases import Connect
from tests.support.revisions import wait_until, write_revision


def test_each_step_is_its_own_transaction(scripts: Path, empty_database_url: str, connect: Connect) -> None:
    write_revision(
        scripts,
        "one",
        None,
        """-- == a table, and a percent sign
CREATE TABLE circle.t (id int, xid xid8 DEFAULT pg_current_xact_id(), word text CHECK (word LIKE '%'));
-- == two rows
INSERT INTO circle.t VALUES (1);
INSERT INTO circle.t VALUES (2);
""",
        """-- Another file
-- == a third, which commits as it goes
DO $$ BEGIN INSERT INTO circle.t VALUES (3); COMMIT; INSERT INTO circle.t VALUES (4); END $$;
-- == this one fails, and nothing of it stays
INSERT INTO circle.t VALUES (5);
SELECT 1/0;
""",
    )
    with pytest.raises(DBAPIError, match="division by zero"):
        migrations.upgrade(empty_database_url)
    raw = connect(empty_database_url)
    rows = raw.execute("SELECT id, dense_rank() OVER (ORDER BY xid) FROM circle.t ORDER BY id").fetchall()
    assert rows == [(1, 1), (2, 1), (3, 2), (4, 3)]
    assert raw.execute("SELECT version_num FROM circle.alembic_version").fetchall() == []


def test_upgrade_uses_no_parallel_workers(scripts: Path, empty_database_url: str, connect: Connect) -> None:
    show = "current_setting('max_parallel_maintenance_workers') || current_setting('max_parallel_workers_per_gather')"
    write_revision(scripts, "one", None, f"-- == a step\nCREATE TABLE circle.workers AS SELECT {show} AS workers")
    migrations.upgrade(empty_database_url)
    assert connect(empty_database_url).execute("SELECT workers FROM circle.workers").fetchall() == [("00",)]


def test_step_without_lock_yields_and_retries(scripts: Path, empty_database_url: str, connect: Connect) -> None:
    raw, reader = connect(empty_database_url), connect(empty_database_url)
    raw.execute("CREATE SCHEMA circle; CREATE TABLE circle.t (id int)")
    write_revision(
        scripts,
        "one",
        None,
        "-- == counted\nCREATE SEQUENCE IF NOT EXISTS circle.runs; SELECT nextval('circle.runs');\n"
        "-- == column\nALTER TABLE circle.t ADD COLUMN IF NOT EXISTS more int;\n",
    )
    with reader.transaction():
        reader.execute("SELECT * FROM circle.t")
        migrator = threading.Thread(target=migrations.upgrade, args=(empty_database_url,))
        migrator.start()
        longest = 0.0
        for _ in range(20):
            start = time.monotonic()
            raw.execute("INSERT INTO circle.t VALUES (1)")
            longest = max(longest, time.monotonic() - start)
            time.sleep(0.05)
        assert migrator.is_alive()
    migrator.join(30)
    assert longest < 2  # without a limit: as long as the reader reads
    assert raw.execute("SELECT count(more) FROM circle.t").fetchone() == (0,)
    assert raw.execute("SELECT last_value FROM circle.runs").fetchone() == (1,)  # only the step that failed ran again


def test_step_without_lock_gives_up_after_patience(scripts: Path, empty_database_url: str, connect: Connect) -> None:
    reader = connect(empty_database_url)
    reader.execute("CREATE SCHEMA circle; CREATE TABLE circle.t (id int)")
    write_revision(scripts, "one", None, "-- == column\nALTER TABLE circle.t ADD COLUMN more int;\n")
    config = migrations.config(empty_database_url)
    config.attributes.update(patience=0, lock_timeout="50ms")
    with reader.transaction():
        reader.execute("SELECT * FROM circle.t")
        message = "retried for 0 s, but a lock was not free within 50ms: 'gathering-pipeline db preflight' or pg_stat_"
        with pytest.raises(DatabaseUnavailableError, match=message):
            command.upgrade(config, "head")


@pytest.mark.parametrize("sql", ["ALTER TABLE circle.t ADD COLUMN more int;", "SELECT pg_sleep(60);"])
def test_step_with_broken_connection_raises_unavailable(
    scripts: Path, empty_database_url: str, connect: Connect, sql: str
) -> None:
    raw, reader = connect(empty_database_url), connect(empty_database_url)
    raw.execute("CREATE SCHEMA circle; CREATE TABLE circle.t (id int)")
    write_revision(scripts, "one", None, f"-- == column\n{sql}\n")
    broken: list[str] = []

    def migrate() -> None:
        try:
            migrations.upgrade(empty_database_url)
        except DatabaseUnavailableError as error:
            broken.append(str(error))

    migrator = threading.Thread(target=migrate)
    with reader.transaction():
        reader.execute("SELECT FROM circle.t")
        migrator.start()
        wait_until(lambda: raw.execute("SELECT to_regclass('circle.alembic_version')").fetchone() != (None,))
        end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'gathering_pipeline'"
        wait_until(lambda: raw.execute(f"{end} AND datname = current_database()").fetchone() is not None)
        migrator.join(30)
    assert broken == ["the connection broke during the migration: start it again, it continues where it was"]


@pytest.mark.parametrize("revision", sorted(WITHDRAWN_REVISIONS))
def test_command_at_unreleased_revision_raises(
    database: Database, database_url: str, connect: Connect, revision: str
) -> None:
    assert revision not in migrations.revisions()
    connect(database_url).execute("UPDATE circle.alembic_version SET version_num = %s", [revision])
    advice = "an unreleased version of this package left the revision: recreate the database, or downgrade it to"
    sentence = f"at revision {revision}, this code needs {migrations.head()}: {advice} 007_pipeline_execution"
    calls: list[Callable[[], object]] = [
        lambda: migrations.upgrade(database_url),
        lambda: migrations.downgrade(database_url, "007_pipeline_execution"),
        lambda: migrations.downgrade(database_url, "base"),
        database.check,
    ]
    for call in calls:
        with pytest.raises(SchemaRevisionError, match=sentence):
            call()
    with database.engine.connect() as connection, pytest.raises(SchemaRevisionError, match=sentence):
        preflight(connection)
    (finding,) = doctor(database.engine, repair=True)
    assert (finding.code, finding.outcome) == ("revision", None)
    assert finding.advice.startswith(advice)
