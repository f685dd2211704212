"""Preflight: the locks of an upgrade, and the sessions that block it."""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import psycopg
import pytest

from gathering_pipeline import migrations, migrator
from gathering_pipeline.database import Database
from gathering_pipeline.errors import SchemaRevisionError
from gathering_pipeline.maintenance.preflight import Preflight, preflight
from tests import generated
from tests.support import locks
from tests.support.servers import Server

Connect = Callable[[str], psycopg.Connection]

ROWS = """
INSERT INTO circle.pipelines (name, nodes) SELECT 'p', '[{"id": "a", "type": "trigger", "name": "A"}]' FROM generate_series(1, 20);
INSERT INTO circle.pipeline_runs (pipeline_id, status) SELECT g % 20 + 1, 'completed' FROM generate_series(1, 500) g;
"""


def look(url: str) -> Preflight:
    with Database(url) as database, database.engine.connect() as connection:
        return preflight(connection)


def test_locks_json_is_what_pg_locks_shows(server: Server) -> None:
    """If it fails: ``make generated``."""
    observed = locks.observe(server)
    assert [(row.revision, row.title) for row in observed] == [
        (revision, step.title) for revision in migrations.revisions() for step in migrator.steps(revision)
    ]
    assert locks.as_json(observed) == generated.LOCKS.read_text(encoding="utf-8")
    taken = {mode for row in observed for mode in row.locks.values()}
    assert taken == {"ROW EXCLUSIVE", "SHARE UPDATE EXCLUSIVE", "SHARE ROW EXCLUSIVE", "ACCESS EXCLUSIVE"}
    indexes = {row.title for row in observed if row.if_small}
    assert indexes == {step.title for revision in migrations.revisions() for step in migrator.steps(revision)
                       if step.is_index}  # fmt: skip


def test_preflight_lists_pending_steps_and_table_sizes(empty_database_url: str, connect: Connect) -> None:
    raw = connect(empty_database_url)
    assert look(empty_database_url).revision is None
    assert {lock for step in look(empty_database_url).steps for lock in step.locks} == set(), "nothing is there yet"

    migrations.upgrade(empty_database_url, "007_pipeline_execution")
    raw.execute(ROWS)
    assert {lock.rows for step in look(empty_database_url).steps for lock in step.locks} == {None}, "never analysed"
    raw.execute("ANALYZE")
    plan = look(empty_database_url)
    assert (plan.revision, plan.target) == ("007_pipeline_execution", migrations.head())
    later = migrations.revisions()[2:]
    assert [step.title for step in plan.steps] == [step.title for r in later for step in migrator.steps(r)]
    assert {step.revision for step in plan.steps} == set(later)
    said = {(lock.table, lock.rows) for step in plan.steps for lock in step.locks}
    assert said == {("circle.pipelines", 20), ("circle.pipeline_runs", 500), ("circle.pipeline_node_runs", 0)}
    size = raw.execute("SELECT pg_relation_size('circle.pipeline_runs')").fetchone()
    assert {(lock.bytes,) for step in plan.steps for lock in step.locks if lock.rows == 500} == {size}
    builds = [step for step in plan.steps if step.title == "circle.idx_pipeline_runs_history"]
    assert [lock.mode for lock in builds[0].locks] == ["SHARE"], "a small table's index is built at once"

    raw.execute("ALTER TABLE circle.pipeline_runs ALTER logs SET STORAGE EXTERNAL")
    raw.execute("UPDATE circle.pipeline_runs SET error_message = repeat(md5(random()::text), 60)")
    size_of_runs = "SELECT pg_relation_size('circle.pipeline_runs') < %s"
    while raw.execute(size_of_runs, [migrator.SMALL_TABLE]).fetchone() == (True,):
        raw.execute("INSERT INTO circle.pipeline_runs (pipeline_id, error_message) "
                    "SELECT pipeline_id, error_message FROM circle.pipeline_runs LIMIT 4000")  # fmt: skip
    builds = [step for step in look(empty_database_url).steps if step.title == "circle.idx_pipeline_runs_history"]
    assert [lock.mode for lock in builds[0].locks] == ["SHARE UPDATE EXCLUSIVE"]

    # that one waits for every older transaction, also for one that holds none of our tables
    other = connect(empty_database_url)
    with other.transaction():
        other.execute("SELECT 1")
        time.sleep(1.1)
        (blocker,) = look(empty_database_url).blockers
    assert blocker.label == f"session {other.info.backend_pid}"
    assert "has an open transaction" in blocker.reason


def test_preflight_at_head_lists_nothing(database_url: str, connect: Connect) -> None:
    raw = connect(database_url)
    with raw.transaction():
        raw.execute("LOCK TABLE circle.pipelines")
        plan = look(database_url)
    assert (plan.revision, plan.steps, plan.blockers) == (migrations.head(), (), ())


def test_preflight_at_unknown_revision_raises(database_url: str, connect: Connect) -> None:
    connect(database_url).execute("UPDATE circle.alembic_version SET version_num = '099_future'")
    with pytest.raises(SchemaRevisionError, match="099_future"):
        look(database_url)


def test_preflight_lists_blocking_sessions(empty_database_url: str, connect: Connect) -> None:
    migrations.upgrade(empty_database_url, "007_pipeline_execution")
    raw, reader, writer, elsewhere = (connect(empty_database_url) for _ in range(4))
    raw.execute("CREATE TABLE circle.agents (id int)")
    assert look(empty_database_url).blockers == ()
    with reader.transaction():
        reader.execute("SET LOCAL application_name = 'report'")
        reader.execute("SELECT count(*) FROM circle.pipeline_runs")
        time.sleep(0.2)
        with writer.transaction(), elsewhere.transaction():
            writer.execute("UPDATE circle.pipelines SET name = 'x'")
            elsewhere.execute("SELECT count(*) FROM circle.agents")
            first, second = look(empty_database_url).blockers
    assert first.label == f"session {reader.info.backend_pid}"
    assert first.seconds is not None
    assert second.seconds is not None
    assert 60 > first.seconds > second.seconds > 0, "the oldest first"
    assert first.reason.startswith("holds ACCESS SHARE on circle.pipeline_runs; user ")
    assert "application report; idle in transaction; query started at 20" in first.reason
    assert first.reason.endswith("SELECT count(*) FROM circle.pipeline_runs")
    assert second.label == f"session {writer.info.backend_pid}"
    assert "holds ROW EXCLUSIVE on circle.pipelines" in second.reason


def test_preflight_ignores_locks_without_conflict(empty_database_url: str, connect: Connect) -> None:
    migrations.upgrade(empty_database_url, "010_graph")
    raw = connect(empty_database_url)
    with raw.transaction():
        raw.execute("UPDATE circle.pipelines SET name = name")  # 011 leaves this table alone
        raw.execute("UPDATE circle.pipeline_versions SET created_at = now() WHERE false")
        assert look(empty_database_url).blockers == ()
        raw.execute("SELECT FROM circle.pipeline_runs")
        assert len(look(empty_database_url).blockers) == 1


def test_preflight_lists_other_migrator(empty_database_url: str, connect: Connect) -> None:
    migrations.upgrade(empty_database_url, "007_pipeline_execution")
    raw = connect(empty_database_url)
    raw.execute("SELECT pg_advisory_lock(%s)", (migrator.MIGRATION_LOCK,))
    (blocker,) = look(empty_database_url).blockers
    assert "is another migrator" in blocker.reason
    threading.Timer(0.5, raw.close).start()
    migrations.upgrade(empty_database_url, "008_valid_rows")  # waits for this very lock
