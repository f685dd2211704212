"""Repairs: locks, retries, failures."""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import threading
import time
from dataclasses import replace

import psycopg
import pytest
from sqlalchemy.engine import Connection, make_url

from gathering_pipeline import migrator
from gathering_pipeline.database import Database
from gathering_pipeline.errors import DatabaseUnavailableError
from gathering_pipeline.maintenance import repairs
from gathering_pipeline.maintenance.doctor import doctor
from gathering_pipeline.maintenance.findings import Finding
from tests.support.databases import Connect, scalar, unguarded
from tests.support.doctor import NODE_RUNS, RUNS, catalog, found, outcomes, pipeline


def test_repair_invalid_index_rebuilds_it_once_possible(
    database: Database, raw: psycopg.Connection, database_url: str
) -> None:
    pipeline(database, runs=1)
    clean = catalog(database_url)
    raw.execute("DROP INDEX circle.idx_pipeline_node_runs_run_node")
    twice = f"INSERT INTO {NODE_RUNS} (run_id, node_id, node_type) VALUES (1, 'a', 'trigger') RETURNING id"
    double = scalar(raw, twice)
    name = "idx_pipeline_node_runs_run_node"
    for index in (name, "idx_mine"):
        with pytest.raises(psycopg.errors.UniqueViolation):
            raw.execute(f"CREATE UNIQUE INDEX CONCURRENTLY {index} ON {NODE_RUNS} (run_id, node_id)")
    expected, additional = (f"index circle.{index} of {NODE_RUNS}" for index in (name, "idx_mine"))
    assert found(database) == [("invalid_index", expected), ("invalid_index", additional)]

    repaired, left = doctor(database.engine, repair=True)
    assert (repaired.object, repaired.outcome) == (additional, "repaired")
    assert left.object == expected
    assert left.outcome is not None
    assert left.outcome.startswith("not repaired: could not create unique index")
    assert "23505" in left.outcome

    with unguarded(raw, "pipeline_node_runs"):
        raw.execute(f"DELETE FROM {NODE_RUNS} WHERE id = %s", (double,))
    assert outcomes(doctor(database.engine, repair=True)) == {"repaired"}
    assert found(database) == []
    assert catalog(database_url) == clean


QUEUE = (
    "pipeline_id, priority DESC, id) WHERE status = 'pending' AND waits_until IS NULL AND pipeline_version IS NOT NULL"
)


def test_repair_leaves_index_under_construction_alone(
    database: Database, raw: psycopg.Connection, connect: Connect, database_url: str
) -> None:
    pipeline(database, runs=1)
    writer, builder = connect(database_url), connect(database_url)
    raw.execute("DROP INDEX circle.idx_pipeline_runs_queue")
    with writer.transaction():
        writer.execute(f"UPDATE {RUNS} SET current_node = 'a'")
        thread = threading.Thread(
            target=builder.execute,
            args=(f"CREATE INDEX CONCURRENTLY idx_pipeline_runs_queue ON {RUNS} ({QUEUE}",),
        )
        thread.start()
        deadline = time.monotonic() + 60
        while not found(database) or ("drift", f"index circle.idx_pipeline_runs_queue of {RUNS}") in found(database):
            assert time.monotonic() < deadline
        (finding,) = doctor(database.engine, repair=True)
    thread.join()
    assert (finding.severity, finding.code, finding.outcome) == ("warning", "invalid_index", None)
    assert "being built" in finding.message
    assert found(database) == []


def test_repair_blocked_by_rows_is_reported(database: Database, raw: psycopg.Connection) -> None:
    pipeline(database)
    raw.execute("ALTER TABLE circle.pipelines DROP CONSTRAINT ck_pipelines")
    raw.execute("UPDATE circle.pipelines SET max_retries_per_node = -1")
    (left,) = doctor(database.engine, repair=True)
    assert left.outcome is not None
    said, _, query = left.outcome.partition("; correct these rows first: ")
    assert said.endswith("violated by some row (SQLSTATE 23514)")
    assert raw.execute(query.replace("*", "max_retries_per_node").encode()).fetchall() == [(-1,)]
    (left,) = doctor(database.engine)
    assert left.advice == f"the repair validates it once no row violates it: correct these first, {query}"
    with pytest.raises(psycopg.errors.CheckViolation):  # but new rows are held to it again
        raw.execute("INSERT INTO circle.pipelines (name, max_retries_per_node) VALUES ('p', -1)")
    raw.execute("UPDATE circle.pipelines SET max_retries_per_node = 1")
    assert outcomes(doctor(database.engine, repair=True)) == {"repaired"}


def test_repair_of_not_null_blocked_by_rows_leaves_no_check(
    database: Database, raw: psycopg.Connection, database_url: str
) -> None:
    pipeline(database)
    raw.execute("ALTER TABLE circle.pipelines ALTER retry_backoff_max DROP NOT NULL")
    raw.execute("UPDATE circle.pipelines SET retry_backoff_max = NULL")
    broken = catalog(database_url)
    (left,) = doctor(database.engine, repair=True)
    assert left.outcome is not None
    said, _, query = left.outcome.partition("; correct these rows first: ")
    assert said.endswith("violated by some row (SQLSTATE 23514)")
    assert query == "SELECT * FROM circle.pipelines WHERE NOT (retry_backoff_max IS NOT NULL)"
    assert catalog(database_url) == broken
    raw.execute("UPDATE circle.pipelines SET description = 'still written'")


def test_repair_without_second_connection_fails_alone(
    database: Database, raw: psycopg.Connection, database_url: str
) -> None:
    raw.execute("ALTER TABLE circle.pipelines DISABLE TRIGGER pipelines_accept")
    raw.execute("ALTER TABLE circle.pipelines ALTER retry_backoff_max DROP NOT NULL")
    broken = catalog(database_url)
    role = f"gathering_test_single_{time.monotonic_ns()}"
    raw.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'x' CONNECTION LIMIT 1 IN ROLE {raw.info.user}".encode())
    try:
        with Database(make_url(database_url).set(username=role, password="x")) as single:
            repaired, left = doctor(single.engine, repair=True)
        assert (repaired.code, repaired.outcome) == ("demoted_trigger", "repaired")
        assert left.outcome is not None
        assert "too many connections for role" in left.outcome
    finally:
        raw.execute(f"DROP ROLE {role}".encode())
    raw.execute("ALTER TABLE circle.pipelines DISABLE TRIGGER pipelines_accept")
    assert catalog(database_url) == broken, "no check of the repair is left"


def test_failed_repair_is_reported_with_its_reason(database: Database, raw: psycopg.Connection) -> None:
    """The missing index is an invalid one afterwards."""
    pipeline(database, runs=1)
    raw.execute("DROP INDEX circle.idx_pipeline_node_runs_run_node")
    raw.execute(f"INSERT INTO {NODE_RUNS} (run_id, node_id, node_type) VALUES (1, 'a', 'trigger')")
    findings = doctor(database.engine, repair=True)
    assert [finding.code for finding in findings] == ["invalid_index"]
    assert "not repaired: could not create unique index" in str(findings[0].outcome)


def test_repair_done_meanwhile_counts_as_repaired(
    database: Database, raw: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw.execute("DROP INDEX circle.idx_pipeline_runs_queue")
    run = repairs.run

    def too_late(connection: Connection, finding: Finding) -> str | None:
        raw.execute(finding.repair[1].encode())
        return run(connection, replace(finding, repair=finding.repair[1:]))

    monkeypatch.setattr(repairs, "run", too_late)
    assert outcomes(doctor(database.engine, repair=True)) == {"repaired"}


def test_repair_that_needs_another_is_retried(database: Database, raw: psycopg.Connection, database_url: str) -> None:
    clean = catalog(database_url)
    functions = ["circle.node_findings(jsonb)", "circle.trimmed(text)"]  # the first by name calls the second
    raw.execute(f"DROP FUNCTION {', '.join(functions)}")
    assert [name for _, name in found(database)] == [f"function {name}" for name in functions]
    assert outcomes(doctor(database.engine, repair=True)) == {"repaired"}
    assert catalog(database_url) == clean


def test_repair_index_after_deadlock_drops_and_rebuilds(
    database: Database, raw: psycopg.Connection, connect: Connect, database_url: str
) -> None:
    clean = catalog(database_url)
    raw.execute("DROP INDEX circle.idx_pipeline_runs_queue")
    writer = connect(database_url)
    writer.execute("SET deadlock_timeout = '1min'")  # the build is the victim
    result: list[Finding] = []
    building = "SELECT FROM pg_class c JOIN pg_index ON oid = indexrelid WHERE relname = 'idx_pipeline_runs_queue'"
    with writer.transaction():
        writer.execute(f"UPDATE {RUNS} SET current_node = 'a'")
        thread = threading.Thread(target=lambda: result.extend(doctor(database.engine, repair=True)))
        thread.start()
        deadline = time.monotonic() + 60
        while raw.execute(building).fetchone() is None:
            assert time.monotonic() < deadline
        writer.execute(f"LOCK TABLE {RUNS} IN SHARE MODE")  # waits for the build, which waits for this transaction
    thread.join()
    assert outcomes(result) == {"repaired"}
    assert found(database) == []
    assert catalog(database_url) == clean


def test_repair_index_yields_to_waiting_sessions(
    database: Database, raw: psycopg.Connection, connect: Connect, database_url: str
) -> None:
    clean = catalog(database_url)
    raw.execute("DROP INDEX circle.idx_pipeline_runs_queue")
    reader, result = connect(database_url), list[Finding]()
    waits = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'CREATE INDEX CONCURRENTLY%'"
    with reader.transaction():
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        reader.execute(f"SELECT FROM {RUNS}")
        thread = threading.Thread(target=lambda: result.extend(doctor(database.engine, repair=True)))
        thread.start()
        deadline = time.monotonic() + 60
        while raw.execute(waits).fetchone() is None:
            assert time.monotonic() < deadline
        raw.execute(
            "SET lock_timeout = '10s'"
        )  # the build waits for the reader, and all writers would wait behind this
        raw.execute(f"CREATE INDEX IF NOT EXISTS idx_pipeline_runs_history ON {RUNS} (id)")
        assert thread.is_alive()
    thread.join()
    assert outcomes(result) == {"repaired"}
    assert catalog(database_url) == clean


def test_repair_concurrently_runs_one_at_a_time(database: Database, raw: psycopg.Connection) -> None:
    raw.execute("SELECT pg_advisory_lock(%s)", (migrator.MIGRATION_LOCK,))
    assert doctor(database.engine) == []
    with pytest.raises(DatabaseUnavailableError, match="a migrator or another doctor is running"):
        doctor(database.engine, repair=True)
    raw.execute("SELECT pg_advisory_unlock(%s)", (migrator.MIGRATION_LOCK,))
    assert doctor(database.engine, repair=True) == []
    assert raw.execute("SELECT pg_try_advisory_lock(%s)", (migrator.MIGRATION_LOCK,)).fetchone() == (True,)


def test_repair_waits_for_its_lock_and_lets_others_pass(
    database: Database, raw: psycopg.Connection, connect: Connect, database_url: str
) -> None:
    raw.execute("ALTER TABLE circle.pipelines DISABLE TRIGGER pipelines_accept")
    reader = connect(database_url)
    with reader.transaction():
        reader.execute("SELECT FROM circle.pipelines")
        reader.execute("LOCK TABLE circle.pipelines IN ROW EXCLUSIVE MODE")
        result: list[Finding] = []
        thread = threading.Thread(target=lambda: result.extend(doctor(database.engine, repair=True)))
        thread.start()
        for _ in range(10):  # each would wait for the repair if the repair waited on
            raw.execute("UPDATE circle.pipelines SET name = name")
            time.sleep(0.1)
        assert thread.is_alive()
    thread.join()
    assert outcomes(result) == {"repaired"}
