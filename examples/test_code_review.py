"""Tests of a pipeline and its handlers, as a program has them: ``pytest examples/test_code_review.py``."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from examples.demo import load_pipeline
from examples.worker import HANDLERS
from gathering_pipeline import (
    EventRepository,
    NodeContext,
    NodeStatus,
    PermanentError,
    PipelineRepository,
    RunRepository,
    RunStatus,
)
from gathering_pipeline.testing import run_to_end

pytest_plugins = ["gathering_pipeline.testing"]


def code_review(session: Session) -> tuple[RunRepository, int]:
    """A run of the pipeline."""
    pipeline = PipelineRepository(session).create(load_pipeline("code_review.json"))
    runs = RunRepository(session)
    return runs, runs.create(pipeline.id, {"branch": "topic"}).id


def test_approved_branch_is_merged(pipeline_session: Session) -> None:
    runs, run_id = code_review(pipeline_session)
    assert run_to_end(runs, run_id, HANDLERS).status is RunStatus.COMPLETED
    nodes = {node.node_id: node for node in runs.nodes(run_id)}
    assert nodes["merge"].status is NodeStatus.COMPLETED
    assert nodes["ask"].status is NodeStatus.SKIPPED
    assert nodes["security"].retry_count == 1


def test_rejected_branch_is_sent_back(pipeline_session: Session) -> None:
    def reject(context: NodeContext) -> dict[str, Any]:
        assert context.run.trigger_data == {"branch": "topic"}
        return {"approved": False}

    runs, run_id = code_review(pipeline_session)
    run_to_end(runs, run_id, HANDLERS | {"agent": reject})
    assert [node.node_id for node in runs.nodes(run_id) if node.status is NodeStatus.SKIPPED] == ["settle", "merge"]


def test_review_that_fails_ends_the_run(pipeline_session: Session) -> None:
    def fail(_context: NodeContext) -> None:
        raise PermanentError("the repository is gone")

    runs, run_id = code_review(pipeline_session)
    run = run_to_end(runs, run_id, HANDLERS | {"agent": fail})
    assert (run.status, run.error_message) == (RunStatus.FAILED, "the repository is gone")
    assert EventRepository(pipeline_session).read(run_id=run_id).items[-1].ends_run
