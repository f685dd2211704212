"""``PipelineRepository.update``."""

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import (
    InvalidPipelineError,
    PipelineNotFoundError,
    PipelineRepository,
    PipelineStatus,
    PipelineUpdate,
)
from tests.support.graphs import AGENT, CYCLE, TRIGGER, UNFINISHED
from tests.support.pipelines import new


def test_update_writes_given_fields_only(each: Session, raw: psycopg.Connection) -> None:
    pipelines = PipelineRepository(each)
    made = pipelines.create(new(description="d", timeout_seconds=60))
    changed = pipelines.update(made.id, PipelineUpdate(name="q", timeout_seconds=None))
    assert changed.updated_at is not None
    assert made.updated_at is not None
    assert changed.updated_at > made.updated_at
    assert changed == pipelines.get(made.id)
    kept = {"name", "timeout_seconds", "updated_at", "revision"}
    assert changed.model_dump(exclude=kept) == made.model_dump(exclude=kept)
    assert (changed.name, changed.timeout_seconds, changed.version, changed.revision) == ("q", None, 1, 2)
    # another writer's field stays
    raw.execute("UPDATE circle.pipelines SET run_count = 5")
    assert pipelines.update(made.id, PipelineUpdate(description=None)).run_count == 5
    assert pipelines.update(made.id, PipelineUpdate()).name == "q"


def test_update_half_a_graph_that_breaks_it_raises_invalid_pipeline(each: Session) -> None:
    pipelines = PipelineRepository(each)
    made = pipelines.create(new())
    for changes, sentence in (
        (PipelineUpdate(edges=CYCLE), "cycle"),
        (PipelineUpdate(nodes=[TRIGGER]), "references unknown target node"),
        (PipelineUpdate(nodes=[TRIGGER, TRIGGER], edges=[]), "Duplicate node id"),
        (PipelineUpdate(nodes=[]), "at least one node"),
        (PipelineUpdate(nodes=[TRIGGER, UNFINISHED]), "missing its task"),
        (PipelineUpdate(nodes=[], edges=[]), "at least one node"),
    ):
        with pytest.raises(InvalidPipelineError, match=sentence):
            pipelines.update(made.id, changes)
    assert pipelines.get(made.id) == made


def test_update_draft_keeps_it_incomplete_with_allow_incomplete(each: Session) -> None:
    pipelines = PipelineRepository(each)
    made = pipelines.create(new(nodes=[], edges=[]), allow_incomplete=True)
    with pytest.raises(InvalidPipelineError):
        pipelines.update(made.id, PipelineUpdate(nodes=[UNFINISHED]))
    changed = pipelines.update(made.id, PipelineUpdate(nodes=[UNFINISHED]), allow_incomplete=True)
    assert changed.version == 2
    with pytest.raises(InvalidPipelineError):
        pipelines.update(made.id, PipelineUpdate(status=PipelineStatus.ACTIVE), allow_incomplete=True)
    with pytest.raises(InvalidPipelineError):
        pipelines.update(
            made.id, PipelineUpdate(nodes=[UNFINISHED], edges=[], status=PipelineStatus.ACTIVE), allow_incomplete=True
        )
    assert pipelines.update(made.id, PipelineUpdate(nodes=[AGENT], status=PipelineStatus.ACTIVE)).status == "active"


def test_update_active_pipeline_to_incomplete_raises(each: Session) -> None:
    """3.2: making an incomplete pipeline active is refused; so is making an active one incomplete."""
    pipelines = PipelineRepository(each)
    made = pipelines.create(new(status="active"))
    for changes in (PipelineUpdate(nodes=[], edges=[]), PipelineUpdate(nodes=[TRIGGER, UNFINISHED])):
        with pytest.raises(InvalidPipelineError):
            pipelines.update(made.id, changes, allow_incomplete=True)
    assert pipelines.get(made.id) == made
    both = PipelineUpdate(nodes=[], edges=[], status=PipelineStatus.PAUSED)
    assert pipelines.update(made.id, both, allow_incomplete=True).status == "paused"


def test_update_missing_pipeline_raises_not_found(pipelines: PipelineRepository, session: Session) -> None:
    for call in (
        lambda: pipelines.update(1, PipelineUpdate(name="x")),
        lambda: pipelines.update(1, PipelineUpdate(name="x"), expected_revision=3),
        lambda: pipelines.update(1, PipelineUpdate(status=PipelineStatus.ACTIVE)),
        lambda: pipelines.update(1, PipelineUpdate()),
        lambda: pipelines.activate(1),
        lambda: pipelines.pause(1),
        lambda: pipelines.delete(1),
        lambda: pipelines.delete(1, force=True),
    ):
        with pytest.raises(PipelineNotFoundError):
            call()
        session.rollback()
