"""The revision of a pipeline's row: each edit adds one, and an edit of what was changed meanwhile is refused."""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import Any

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import (
    Database,
    PipelineRepository,
    PipelineUpdate,
    RunRepository,
    StaleVersionError,
)
from tests.support.graphs import DELAY, NODES
from tests.support.pipelines import new

EDITS = [
    "name = 'q'",
    "description = 'd'",
    "status = 'active'",
    'nodes = nodes || \'[{"id": "d", "type": "delay", "name": "D"}]\'',
    "edges = '[]'",
    "timeout_seconds = 5",
    "timeout_seconds = NULL",
    "max_retries_per_node = 9",
    "retry_backoff_base = 9",
    "retry_backoff_max = 9",
]
NO_EDITS = [
    "run_count = run_count + 1",
    "success_count = 3, error_count = 2",
    "last_run = now()",
    "updated_at = now()",
    "name = name, description = description, status = status, nodes = nodes, edges = edges",
    "version = 9",
    "revision = revision",
]


@pytest.fixture
def pipeline_id(each: Session) -> int:
    return PipelineRepository(each).create(new()).id


def revision(raw: psycopg.Connection) -> Any:
    row = raw.execute("SELECT revision FROM circle.pipelines").fetchone()
    assert row is not None
    return row[0]


@pytest.mark.parametrize("change", EDITS)
@pytest.mark.usefixtures("pipeline_id")
def test_update_by_sql_of_an_edited_column_adds_one(change: str, raw: psycopg.Connection) -> None:
    raw.execute(f"UPDATE circle.pipelines SET {change}")
    assert revision(raw) == 2


@pytest.mark.parametrize("change", NO_EDITS)
@pytest.mark.usefixtures("pipeline_id")
def test_update_by_sql_of_anything_else_keeps_the_revision(change: str, raw: psycopg.Connection) -> None:
    raw.execute(f"UPDATE circle.pipelines SET {change}")
    assert revision(raw) == 1


@pytest.mark.usefixtures("pipeline_id")
def test_update_by_sql_compares_the_revision_that_it_sets(raw: psycopg.Connection) -> None:
    raw.execute("UPDATE circle.pipelines SET name = 'q', revision = 1")
    assert revision(raw) == 2
    for stale in (1, 3, -1):
        with pytest.raises(psycopg.Error, match=f"is at revision 2, not {stale}") as refused:
            raw.execute("UPDATE circle.pipelines SET name = 'r', revision = %s", [stale])
        assert refused.value.sqlstate == "PL009"
    with pytest.raises(psycopg.errors.NotNullViolation):
        raw.execute("UPDATE circle.pipelines SET revision = NULL")


@pytest.mark.usefixtures("pipeline_id")
def test_replica_keeps_the_revision_that_it_is_given(raw: psycopg.Connection) -> None:
    raw.execute("INSERT INTO circle.pipelines (name, revision) VALUES ('new', 7)")
    assert raw.execute("SELECT revision FROM circle.pipelines WHERE name = 'new'").fetchone() == (1,)
    raw.execute("SET session_replication_role = replica")
    raw.execute("UPDATE circle.pipelines SET name = 'q', revision = 40 WHERE name = 'p'")
    raw.execute("INSERT INTO circle.pipelines (name, revision) VALUES ('copy', 7)")
    raw.execute("RESET session_replication_role")
    rows = raw.execute("SELECT name, revision FROM circle.pipelines ORDER BY id").fetchall()
    assert rows == [("q", 40), ("new", 1), ("copy", 7)]


def test_counters_fire_no_guard(pipeline_id: int, raw: psycopg.Connection) -> None:
    """A column list keeps counter updates, the most frequent ones, free of triggers."""
    plan = raw.execute(
        "EXPLAIN (ANALYZE, FORMAT JSON) UPDATE circle.pipelines SET run_count = run_count + 1, last_run = now(),"
        " updated_at = now() WHERE id = %s",
        [pipeline_id],
    ).fetchone()
    assert plan is not None
    assert plan[0][0]["Triggers"] == []


def test_update_with_stale_revision_raises(each: Session) -> None:
    pipelines = PipelineRepository(each)
    made = pipelines.create(new())
    first = second = pipelines.get(made.id)
    changed = pipelines.update(made.id, PipelineUpdate(timeout_seconds=10), first.revision)
    assert (changed.revision, changed.version) == (2, 1)
    with pytest.raises(StaleVersionError) as refused:
        pipelines.update(made.id, PipelineUpdate(timeout_seconds=20), second.revision)
    assert (refused.value.pipeline_id, refused.value.expected, refused.value.current) == (made.id, 1, 2)
    assert pipelines.get(made.id) == changed
    graph = pipelines.update(made.id, PipelineUpdate(nodes=[*NODES, DELAY]), changed.revision)
    assert (graph.revision, graph.version) == (3, 2)


def test_pause_makes_an_open_edit_stale(each: Session) -> None:
    pipelines = PipelineRepository(each)
    editor = pipelines.create(new(status="active"))
    assert pipelines.pause(editor.id).revision == 2
    assert pipelines.pause(editor.id).revision == 2
    assert pipelines.activate(editor.id).revision == 3
    with pytest.raises(StaleVersionError):
        pipelines.update(editor.id, PipelineUpdate(name="q"), expected_revision=editor.revision)


def test_runs_leave_the_revision(database: Database) -> None:
    with database.session(autocommit=True) as session:
        pipelines, runs = PipelineRepository(session), RunRepository(session)
        made = pipelines.create(new(status="active"))
        for _ in range(3):
            step = runs.advance(run_id := runs.create(made.id).id)
            while step.started:
                step = runs.advance(run_id, [{"node_id": node.node_id, "status": "completed"} for node in step.started])
        runs.recover()
        after = pipelines.get(made.id)
        assert (after.run_count, after.success_count, after.revision) == (3, 3, 1)
        pipelines.update(made.id, PipelineUpdate(name="q"), expected_revision=made.revision)
