"""``PipelineRepository.create`` and ``get``."""

from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from pydantic import ValidationError
from sqlalchemy.orm import Session

from gathering_pipeline import (
    Database,
    IntegrityViolationError,
    InvalidPipelineError,
    PipelineCreate,
    PipelineDefinition,
    PipelineInactiveError,
    PipelineNode,
    PipelineNotFoundError,
    PipelineRead,
    PipelineRepository,
    PipelineStatus,
    PipelineUpdate,
    RunRepository,
)
from tests.support.graphs import CYCLE, DELAY, EDGES, NODES, TRIGGER, UNFINISHED
from tests.support.pipelines import count, new


def test_create_returns_what_is_stored(each: Session) -> None:
    before = datetime.now(UTC) - timedelta(minutes=1)
    pipelines = PipelineRepository(each)
    made = pipelines.create(new(description="d", timeout_seconds=None, retry_backoff_max=2.5, status="active"))
    assert made == pipelines.get(made.id)
    assert made.model_dump(exclude={"id", "created_at", "updated_at", "status_changed_at"}) == {
        "name": "p",
        "description": "d",
        "status": PipelineStatus.ACTIVE,
        "nodes": NODES,
        "edges": EDGES,
        "version": 1,
        "revision": 1,
        "max_running": 0,
        "timeout_seconds": None,
        "max_retries_per_node": 3,
        "retry_backoff_base": 1.0,
        "retry_backoff_max": 2.5,
        "run_count": 0,
        "success_count": 0,
        "error_count": 0,
        "last_run": None,
    }
    assert made.created_at is not None
    assert made.created_at > before
    assert isinstance(made.definition, PipelineDefinition)
    with pytest.raises(ValidationError):
        made.name = "frozen"  # type: ignore[misc]


def test_create_with_pydantic_objects_stores_json(pipelines: PipelineRepository) -> None:
    definition = PipelineDefinition.from_json(NODES, EDGES)
    made = pipelines.create(PipelineCreate(name="p", nodes=definition.nodes, edges=definition.edges))
    assert (made.nodes, made.edges) == (NODES, EDGES)
    assert made.definition == definition


def test_create_bad_graph_raises_with_every_issue(each: Session, raw: psycopg.Connection) -> None:
    bad = new(nodes=[TRIGGER, UNFINISHED, DELAY, DELAY], edges=[*CYCLE, {"id": "g", "from": "t", "to": "ghost"}])
    with pytest.raises(InvalidPipelineError) as refused:
        PipelineRepository(each).create(bad)
    assert {(issue.code, issue.node_id, issue.edge_id) for issue in refused.value.issues} == {
        ("missing_config", "a", None),
        ("duplicate_node", "d", None),
        ("unknown_target", None, "g"),
        ("cycle", "t", None),
    }
    assert "Pipeline contains a cycle: t -> a -> t" in str(refused.value)
    assert isinstance(refused.value, ValueError)
    assert count(raw) == 0


def test_create_in_failed_block_stores_nothing(database: Database, raw: psycopg.Connection) -> None:
    with pytest.raises(ZeroDivisionError), database.session() as session:
        PipelineRepository(session).create(new())
        raise ZeroDivisionError
    assert count(raw) == 0


def test_create_incomplete_graph_needs_allow_incomplete(each: Session) -> None:
    pipelines = PipelineRepository(each)
    for nodes, edges in (([], []), ([TRIGGER, UNFINISHED], EDGES)):
        with pytest.raises(InvalidPipelineError):
            pipelines.create(new(nodes=nodes, edges=edges))
        with pytest.raises(InvalidPipelineError):
            pipelines.create(new(nodes=nodes, edges=edges, status="active"), allow_incomplete=True)
        made = pipelines.create(new(nodes=nodes, edges=edges), allow_incomplete=True)
        assert (made.status, made.nodes, made.edges) == ("draft", nodes, edges)
        with pytest.raises(InvalidPipelineError):
            pipelines.activate(made.id)
        with pytest.raises(PipelineInactiveError):
            RunRepository(each).create(made.id)
    with pytest.raises(InvalidPipelineError, match="cycle"):
        pipelines.create(new(nodes=[TRIGGER, UNFINISHED], edges=CYCLE), allow_incomplete=True)


def test_get_missing_pipeline_raises_not_found(pipelines: PipelineRepository) -> None:
    for missing in (1, 0, -1, 2**31, 2**62):
        with pytest.raises(PipelineNotFoundError, match=f"pipeline {missing} does not exist") as refused:
            pipelines.get(missing)
        assert isinstance(refused.value, LookupError)


def test_create_with_unvalidated_schema_raises(each: Session, raw: psycopg.Connection) -> None:
    made = PipelineRepository(each).create(new())
    fields: list[dict[str, Any]] = [
        {"name": ""},
        {"timeout_seconds": -1},
        {"nodes": None},
        {"retry_backoff_base": float("nan")},
    ]
    for field in fields:
        whole = {**new().model_dump(), "nodes": NODES, "edges": EDGES, **field}
        with pytest.raises((InvalidPipelineError, IntegrityViolationError)):
            PipelineRepository(each).create(PipelineCreate.model_construct(**whole))
        with pytest.raises((InvalidPipelineError, IntegrityViolationError)):
            PipelineRepository(each).update(made.id, PipelineUpdate.model_construct(**field))
    assert count(raw) == 1


def test_create_refused_by_database_raises_package_error(each: Session) -> None:
    """A half of a graph, of which the hook can't see the other: the compiler's answer, with its place."""
    made = PipelineRepository(each).create(new())
    with pytest.raises(InvalidPipelineError) as refused:
        PipelineRepository(each).update(made.id, PipelineUpdate(nodes=[TRIGGER]))
    (issue,) = refused.value.issues
    assert (issue.code, issue.edge_id, issue.message) == (
        "unknown_target",
        "e",
        "Edge 'e' references unknown target node: 'a'",
    )


def test_read_models_dump_as_json(pipelines: PipelineRepository) -> None:
    made = pipelines.create(new())
    assert PipelineRead.model_validate_json(made.model_dump_json()) == made
    assert isinstance(made.definition.nodes[0], PipelineNode)
