"""Rows of a database that is upgraded: repaired, refused, or left alone."""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

import json
from typing import Any

import psycopg
import pytest
from psycopg.errors import Diagnostic
from sqlalchemy import create_engine, event
from sqlalchemy.pool import NullPool

from gathering_pipeline import (
    AdoptionError,
    Database,
    InvalidPipelineError,
    PipelineRepository,
    PipelineUpdate,
    RunRepository,
    migrations,
)
from tests.support.adoption import BY_HAND, revision, rows_of_006
from tests.support.schema import catalog

LEGACY = """
ALTER SEQUENCE circle.pipelines_id_seq RESTART 10;
INSERT INTO circle.pipelines (name, status, nodes, edges, created_at, updated_at, run_count, success_count, error_count,
    timeout_seconds, max_retries_per_node, retry_backoff_base, retry_backoff_max)
VALUES ('nulls', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL);
ALTER SEQUENCE circle.pipeline_runs_id_seq RESTART 10;
INSERT INTO circle.pipeline_runs
    (pipeline_id, status, created_at, started_at, completed_at, error_message, duration_seconds) VALUES
    (10, NULL, '2025-01-01', NULL, NULL, NULL, NULL),
    (10, NULL, '2025-01-01', '2025-01-02', NULL, NULL, 0),
    (10, NULL, '2025-01-01', '2025-01-02', '2025-01-03', 'boom', 0),
    (10, 'completed', '2025-01-01', '2025-01-02', NULL, NULL, NULL),
    (10, 'failed', '2025-01-01', NULL, NULL, 'never began', 0),
    (10, 'timeout', NULL, NULL, '2025-01-04', 'late', 5),
    (10, 'completed', '2025-01-01', '2025-01-02', '2025-01-02 00:00:09', NULL, 0);
INSERT INTO circle.pipeline_node_runs
    (run_id, node_id, node_type, status, started_at, completed_at, error_message, retry_count, duration_ms) VALUES
    (13, 'a', 'agent', NULL, NULL, NULL, NULL, NULL, NULL),
    (13, 'b', 'agent', NULL, '2025-01-02', NULL, NULL, 0, 0),
    (13, 'c', 'agent', NULL, NULL, '2025-01-02', 'boom', 0, 0),
    (13, 'd', 'agent', 'completed', '2025-01-02 01:00', NULL, NULL, 0, 0),
    (13, 'e', 'agent', 'skipped', NULL, NULL, NULL, 0, 0),
    (14, 'f', 'agent', 'failed', NULL, NULL, 'x', 2, 7);
"""


def test_upgrade_repairs_unambiguous_rows(url: str, used: psycopg.Connection) -> None:
    used.execute("SET timezone = 'UTC'")
    used.execute(BY_HAND + LEGACY)
    untouched = used.execute("SELECT * FROM circle.pipelines WHERE id < 10 ORDER BY id").fetchall()
    migrations.upgrade(url, "008_valid_rows")
    assert used.execute("SELECT * FROM circle.pipelines WHERE id < 10 ORDER BY id").fetchall() == untouched
    migrations.upgrade(url)
    pipeline = used.execute(
        """SELECT status, nodes, edges, created_at, updated_at, run_count, success_count, error_count, timeout_seconds,
        max_retries_per_node, retry_backoff_base, retry_backoff_max FROM circle.pipelines WHERE id = 10"""
    ).fetchall()
    assert pipeline == [("draft", [], [], None, None, 0, 0, 0, None, 3, 1.0, 60.0)]
    runs = used.execute(
        """SELECT id, status, to_char(completed_at, 'DD HH24:MI:SS'), error_message, duration_seconds
        FROM circle.pipeline_runs WHERE id >= 10 ORDER BY id"""
    ).fetchall()
    assert runs == [
        (10, "pending", None, None, 0),
        (11, "running", None, None, 0),
        (12, "failed", "03 00:00:00", "boom", 86_400),
        (13, "completed", "02 00:00:00", None, 0),
        (14, "failed", "01 00:00:00", "never began", 0),
        (15, "timeout", "04 00:00:00", "late", 5),
        (16, "completed", "02 00:00:09", None, 0),  # nothing was missing
    ]
    nodes = used.execute(
        """SELECT node_id, status, to_char(completed_at, 'DD HH24:MI'), retry_count, duration_ms
        FROM circle.pipeline_node_runs ORDER BY id"""
    ).fetchall()
    assert nodes == [
        ("a", "pending", None, 0, 0),
        ("b", "running", None, 0, 0),
        ("c", "failed", "02 00:00", 0, 0),
        ("d", "completed", "02 01:00", 0, 0),
        ("e", "skipped", "02 00:00", 0, 0),  # when its run ended
        ("f", "failed", "01 00:00", 2, 7),
    ]


UNREPAIRABLE = {
    "UPDATE circle.pipelines SET timeout_seconds = -1 WHERE id = 2": "circle.pipelines id 2: timeout_seconds",
    "UPDATE circle.pipelines SET max_retries_per_node = -1 WHERE id = 2": "circle.pipelines id 2: max_retries",
    "UPDATE circle.pipelines SET retry_backoff_base = 'NaN' WHERE id = 2": "circle.pipelines id 2: retry_backoff",
    "UPDATE circle.pipelines SET retry_backoff_max = 'Infinity' WHERE id = 2": "circle.pipelines id 2: retry_backoff",
    "UPDATE circle.pipelines SET error_count = -1 WHERE id = 1": "circle.pipelines id 1: a counter is negative",
    "UPDATE circle.pipelines SET last_run = 'infinity' WHERE id = 2": "circle.pipelines id 2: a timestamp is before",
    "UPDATE circle.pipeline_runs SET status = NULL WHERE id = 1": "circle.pipeline_runs id 1: status is NULL",
    "UPDATE circle.pipeline_runs SET completed_at = now() WHERE id = 3": "id 3: completed_at is set, but the run",
    "UPDATE circle.pipeline_runs SET completed_at = '1999-01-01' WHERE id = 1": "id 1: completed_at is before",
    "UPDATE circle.pipeline_runs SET duration_seconds = -5 WHERE id = 2": "circle.pipeline_runs id 2: duration_seconds",
    "UPDATE circle.pipeline_runs SET started_at = '-infinity' WHERE id = 3": "id 3: a timestamp is before",
    "UPDATE circle.pipeline_runs SET created_at = '10000-01-01' WHERE id = 3": "id 3: a timestamp is before",
    "UPDATE circle.pipeline_runs SET created_at = NULL, started_at = NULL, completed_at = NULL WHERE id = 2": (
        "circle.pipeline_runs id 2: the status is terminal, but no timestamp shows since when"
    ),
    "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type) VALUES (1, 'x', 'robot')": (
        "circle.pipeline_node_runs id 1: node_type is unknown"
    ),
    "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, retry_count) VALUES (1, 'x', 'agent', -1)": (
        "circle.pipeline_node_runs id 1: retry_count or duration_ms is negative"
    ),
    "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type) VALUES (1, 'x', 'agent'), (1, 'x', 'agent')": (
        "circle.pipeline_node_runs id 2: node x occurs more than once in run 1"
    ),
    "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, completed_at) SELECT 1, 'x', 'agent', now()": (
        "circle.pipeline_node_runs id 1: completed_at is set, but the node run is pending"
    ),
}


def test_upgrade_with_unrepairable_row_names_it(url: str, used: psycopg.Connection) -> None:
    migrations.upgrade(url, "007_pipeline_execution")
    before = catalog(url)
    for statement, expected in UNREPAIRABLE.items():
        with used.transaction(force_rollback=False):
            used.execute(
                "CREATE TABLE keep_p AS TABLE circle.pipelines; CREATE TABLE keep_r AS TABLE circle.pipeline_runs"
            )
            used.execute(statement)
        rows = everything_text(used)
        with pytest.raises(AdoptionError) as refused:
            migrations.upgrade(url)
        assert len(refused.value.differences) == 1
        assert expected in refused.value.differences[0]
        assert everything_text(used) == rows
        assert catalog(url) == before
        assert revision(used) == "007_pipeline_execution"
        used.execute(
            """TRUNCATE circle.pipelines, circle.pipeline_runs, circle.pipeline_node_runs;
            INSERT INTO circle.pipelines TABLE keep_p; INSERT INTO circle.pipeline_runs TABLE keep_r;
            ALTER SEQUENCE circle.pipeline_node_runs_id_seq RESTART;
            DROP TABLE keep_p, keep_r"""
        )
    migrations.upgrade(url)


def everything_text(raw: psycopg.Connection) -> list[Any]:
    """As text: Python's datetime can't hold infinity."""
    tables = ("pipelines", "pipeline_runs", "pipeline_node_runs")
    return [raw.execute(f"SELECT t::text FROM circle.{table} t ORDER BY id").fetchall() for table in tables]


def test_upgrade_with_many_unrepairable_rows_names_100(url: str, used: psycopg.Connection) -> None:
    used.execute(BY_HAND)
    used.execute("UPDATE circle.pipelines SET timeout_seconds = -1, run_count = -1")
    used.execute("UPDATE circle.pipeline_runs SET completed_at = 'infinity' WHERE id = 2")
    used.execute("INSERT INTO circle.pipelines (name, error_count) SELECT 'p', -1 FROM generate_series(1, 200)")
    with pytest.raises(AdoptionError) as refused:
        migrations.upgrade(url)
    assert len(refused.value.differences) == 100  # a readable number of them
    used.execute("DELETE FROM circle.pipelines WHERE id > 2")
    with pytest.raises(AdoptionError) as refused:
        migrations.upgrade(url)
    assert [line.partition(": ")[0] for line in refused.value.differences] == [
        "circle.pipeline_runs id 2",
        *["circle.pipelines id 1"] * 2,
        *["circle.pipelines id 2"] * 2,
    ]


A, B = {"id": "a", "type": "delay", "name": "A"}, {"id": "b", "type": "delay", "name": "B"}


BROKEN: dict[str, tuple[Any, Any]] = {
    "cycle": ([A, B], [{"id": "1", "from": "a", "to": "b"}, {"id": "2", "from": "b", "to": "a"}]),
    "self edge": ([A], [{"id": "1", "from": "a", "to": "a"}]),
    "dangling": ([A], [{"id": "1", "from": "a", "to": "ghost"}]),
    "no source": ([A], [{"id": "1", "to": "a"}]),
    "duplicate": ([A, A], []),
    "unknown type": ([{"id": "a", "type": "robot", "name": "A"}], []),
    "no id": ([{"type": "delay", "name": "A"}], []),
    "a number for an id": ([{"id": 1, "type": "delay", "name": "A"}], []),
    "a long id": ([{"id": "x" * 101, "type": "delay", "name": "A"}], []),
    "an empty id": ([{"id": "", "type": "delay", "name": "A"}], []),
    "nodes that are no objects": (["a", None, 7], []),
    "nodes that are an object": ({"a": A}, []),
    "nodes that are text": ("[]", []),
    "JSON null": (None, None),
    "edges that are an object": ([A], {"e": 1}),
    "edges that are no objects": ([A], [[1], "x"]),
}


def test_upgrade_keeps_broken_graphs_unchanged(url: str, used: psycopg.Connection) -> None:
    used.execute("DELETE FROM circle.pipelines; ALTER SEQUENCE circle.pipelines_id_seq RESTART")
    for name, (nodes, edges) in BROKEN.items():
        used.execute(
            "INSERT INTO circle.pipelines (name, status, nodes, edges) VALUES (%s, 'active', %s, %s)",
            [name, json.dumps(nodes), json.dumps(edges)],
        )
    used.execute("INSERT INTO circle.pipelines (name, status, nodes) VALUES ('good', 'active', %s)", [json.dumps([A])])
    before = rows_of_006(used)
    warnings: list[str] = []
    engine = create_engine(url, poolclass=NullPool)

    @event.listens_for(engine, "connect")
    def listen(connection: Any, _record: Any) -> None:
        def note(diagnostic: Diagnostic) -> None:
            if diagnostic.severity_nonlocalized == "WARNING":
                warnings.append(diagnostic.message_primary or "")

        connection.add_notice_handler(note)

    migrations.upgrade(engine)
    assert rows_of_006(used) == before
    assert len(warnings) == len(BROKEN)
    for pipeline_id, warning in enumerate(warnings, 1):
        assert warning.startswith(f"circle.pipelines id {pipeline_id} can't be run until its graph is repaired: ")

    with Database(url) as database:
        with database.session(autocommit=True) as session:
            pipelines, runs = PipelineRepository(session), RunRepository(session)
            assert [pipeline.name for pipeline in pipelines.search().items] == ["good", *reversed(BROKEN)]
            for pipeline_id, (name, (nodes, edges)) in enumerate(BROKEN.items(), 1):
                read = pipelines.get(pipeline_id)
                assert (read.nodes, read.edges) == (nodes, edges), name
                with pytest.raises(InvalidPipelineError):
                    runs.create(pipeline_id)
                with pytest.raises(InvalidPipelineError):
                    pipelines.activate(pipeline_id)
                # what doesn't touch the graph goes on
                assert pipelines.update(pipeline_id, PipelineUpdate(description="known")).description == "known"
                assert pipelines.get(pipeline_id).version == read.version
            used.execute("UPDATE circle.pipelines SET run_count = run_count + 1, last_run = now()")
            assert used.execute("SELECT count(*) FROM circle.pipeline_runs").fetchone() == (0,)
            # a raw run of one is bound to no graph
            row = used.execute(
                "INSERT INTO circle.pipeline_runs (pipeline_id, status) VALUES (1, 'running') RETURNING id"
            ).fetchone()
            assert row is not None
            assert runs.get(row[0]).pipeline_version is None
            with pytest.raises(InvalidPipelineError, match="bound to no version .*: cancel it and create it again"):
                runs.definition(row[0])
            for pipeline_id in range(1, len(BROKEN) + 1):
                repaired = pipelines.update(pipeline_id, PipelineUpdate(nodes=[A, B], edges=[]))
                assert repaired.version == 2
                assert runs.create(pipeline_id).pipeline_version == 2
        counted = "SELECT DISTINCT (circle.counted(p)).run_count FROM circle.pipelines p WHERE name <> 'good'"
        assert used.execute(counted).fetchall() == [(2,)]
