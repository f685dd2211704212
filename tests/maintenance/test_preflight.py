"""What is said before an upgrade is what happens in it."""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable

import psycopg
import pytest

from gathering_pipeline import migrations
from gathering_pipeline.database import Database
from gathering_pipeline.errors import SchemaRevisionError
from gathering_pipeline.preflight import MODES, Preflight, locks, preflight

Connect = Callable[[str], psycopg.Connection]

TAKEN = """
SELECT 'circle.' || c.relname, l.mode FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
WHERE l.locktype = 'relation' AND l.pid = %s AND c.relkind = 'r' AND c.relnamespace = to_regnamespace('circle')
"""
ROWS = """
INSERT INTO circle.pipelines (name, nodes) SELECT 'p', '[{"id": "a", "type": "trigger", "name": "A"}]' FROM generate_series(1, 20);
INSERT INTO circle.pipeline_runs (pipeline_id, status) SELECT g % 20 + 1, 'completed' FROM generate_series(1, 500) g;
"""


def look(url: str) -> Preflight:
    with Database(url) as database, database.engine.connect() as connection:
        return preflight(connection)


def strongest(rows: list[tuple[str, str]]) -> dict[str, str]:
    """By table, in the manual's words, without the locks of readers."""
    found: dict[str, str] = {}
    for table, name in rows:
        mode = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name.removesuffix("Lock")).upper()
        if MODES.index(mode) >= MODES.index("ROW EXCLUSIVE"):
            found[table] = max(mode, found.get(table, mode), key=MODES.index)
    return found


def test_the_locks_said_are_those_that_are_taken(empty_database_url: str, connect: Connect) -> None:
    """Every step of every revision in a transaction, on tables with rows; pg_locks tells what it took."""
    raw = connect(empty_database_url)
    raw.execute("CREATE SCHEMA circle")
    compared = 0
    for revision in migrations.revisions():
        there = {
            row[0] for row in raw.execute("SELECT 'circle.' || tablename FROM pg_tables WHERE schemaname = 'circle'")
        }
        for step in migrations.steps(revision):
            # in a transaction a step can't commit as it goes, and an index can't be built concurrently
            sql = re.sub(r"^\s*COMMIT;", "", step.sql, flags=re.MULTILINE).replace(" CONCURRENTLY", "")
            with raw.transaction():
                raw.execute(sql)
                taken = strongest(raw.execute(TAKEN, (raw.info.backend_pid,)).fetchall())
            said = locks(step._replace(sql=sql))
            compared += len(taken)
            assert {table: mode for table, mode in said.items() if table in there} == {
                table: mode for table, mode in taken.items() if table in there
            }, f"{revision}: {step.what}"
        if revision == "007_pipeline_execution":
            raw.execute(ROWS)
            raw.execute(
                "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, status) "
                "SELECT id, 'a', 'trigger', 'completed' FROM circle.pipeline_runs"
            )
    assert compared > 40


def test_a_concurrent_build_takes_the_lock_that_is_said(empty_database_url: str, connect: Connect) -> None:
    raw, builder = connect(empty_database_url), connect(empty_database_url)
    migrations.upgrade(empty_database_url, "008_integrity")
    raw.execute(ROWS)
    steps = {step.what: step for step in migrations.steps("009b_lifecycle") if step.is_index}
    step = steps["circle.idx_pipeline_runs_history"]
    with raw.transaction():
        raw.execute("UPDATE circle.pipeline_runs SET current_node = 'a'")
        thread = threading.Thread(target=builder.execute, args=(step.sql,))
        thread.start()
        deadline = time.monotonic() + 30
        taken: dict[str, str] = {}
        while not taken:
            assert time.monotonic() < deadline
            taken = strongest(raw.execute(TAKEN, (builder.info.backend_pid,)).fetchall())
    thread.join()
    assert taken == locks(step) == {"circle.pipeline_runs": "SHARE UPDATE EXCLUSIVE"}


def test_what_is_pending_on_how_much(empty_database_url: str, connect: Connect) -> None:
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
    assert [step.what for step in plan.steps] == [step.what for r in later for step in migrations.steps(r)]
    assert {step.revision for step in plan.steps} == set(later)
    said = {(lock.table, lock.rows) for step in plan.steps for lock in step.locks}
    assert said == {("circle.pipelines", 20), ("circle.pipeline_runs", 500), ("circle.pipeline_node_runs", 0)}
    size = raw.execute("SELECT pg_relation_size('circle.pipeline_runs')").fetchone()
    assert {(lock.bytes,) for step in plan.steps for lock in step.locks if lock.rows == 500} == {size}
    builds = [step for step in plan.steps if step.what == "circle.idx_pipeline_runs_history"]
    assert [lock.mode for lock in builds[0].locks] == ["SHARE"], "a small table's index is built at once"

    raw.execute("ALTER TABLE circle.pipeline_runs ALTER logs SET STORAGE EXTERNAL")
    raw.execute("UPDATE circle.pipeline_runs SET error_message = repeat(md5(random()::text), 60)")
    size_of_runs = "SELECT pg_relation_size('circle.pipeline_runs') < %s"
    while raw.execute(size_of_runs, [migrations.SMALL_TABLE]).fetchone() == (True,):
        raw.execute("INSERT INTO circle.pipeline_runs (pipeline_id, error_message) "
                    "SELECT pipeline_id, error_message FROM circle.pipeline_runs LIMIT 4000")  # fmt: skip
    builds = [step for step in look(empty_database_url).steps if step.what == "circle.idx_pipeline_runs_history"]
    assert [lock.mode for lock in builds[0].locks] == ["SHARE UPDATE EXCLUSIVE"]

    # that one waits for every older transaction, also for one that holds none of our tables
    other = connect(empty_database_url)
    with other.transaction():
        other.execute("SELECT 1")
        time.sleep(1.1)
        (blocker,) = look(empty_database_url).blockers
    assert blocker.who == f"session {other.info.backend_pid}"
    assert "has an open transaction" in blocker.why


def test_nothing_is_pending_at_head(database_url: str, connect: Connect) -> None:
    raw = connect(database_url)
    with raw.transaction():
        raw.execute("LOCK TABLE circle.pipelines")
        plan = look(database_url)
    assert (plan.revision, plan.steps, plan.blockers) == (migrations.head(), (), ())


def test_a_revision_that_this_code_does_not_know(database_url: str, connect: Connect) -> None:
    connect(database_url).execute("UPDATE circle.alembic_version SET version_num = '099_future'")
    with pytest.raises(SchemaRevisionError, match="099_future"):
        look(database_url)


def test_who_is_in_the_way(empty_database_url: str, connect: Connect) -> None:
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
    assert first.who == f"session {reader.info.backend_pid}"
    assert first.seconds is not None
    assert second.seconds is not None
    assert 60 > first.seconds > second.seconds > 0, "the oldest first"
    assert first.why.startswith("holds ACCESS SHARE on circle.pipeline_runs; user ")
    assert "application report; idle in transaction; query begun at 20" in first.why
    assert first.why.endswith("SELECT count(*) FROM circle.pipeline_runs")
    assert second.who == f"session {writer.info.backend_pid}"
    assert "holds ROW EXCLUSIVE on circle.pipelines" in second.why


def test_a_lock_that_no_pending_step_conflicts_with_is_in_nobodys_way(
    empty_database_url: str, connect: Connect
) -> None:
    migrations.upgrade(empty_database_url, "009b_lifecycle")
    raw = connect(empty_database_url)
    with raw.transaction():
        raw.execute("SELECT FROM circle.pipelines")  # 010 makes writers wait there, but no readers
        assert look(empty_database_url).blockers == ()
        raw.execute("SELECT FROM circle.pipelines FOR UPDATE")
        assert look(empty_database_url).blockers == ()
        raw.execute("UPDATE circle.pipelines SET name = name")
        assert len(look(empty_database_url).blockers) == 1


def test_another_migrator_is_in_the_way(empty_database_url: str, connect: Connect) -> None:
    migrations.upgrade(empty_database_url, "007_pipeline_execution")
    raw = connect(empty_database_url)
    raw.execute("SELECT pg_advisory_lock(%s)", (migrations.MIGRATOR,))
    (blocker,) = look(empty_database_url).blockers
    assert "is another migrator" in blocker.why
    threading.Timer(0.5, raw.close).start()
    migrations.upgrade(empty_database_url, "008_integrity")  # waits for this very lock
