"""The state machines, cell by cell, as the specification draws them."""

from __future__ import annotations

from datetime import timedelta

import pytest

from gathering_pipeline.events import EventType
from gathering_pipeline.lifecycle import (
    INITIAL_RUN_STATUSES,
    NODE_EVENTS,
    NODE_TRANSITIONS,
    RUN_EVENTS,
    RUN_TRANSITIONS,
    NodeStatus,
    PipelineStatus,
    RunStatus,
    retry_delay,
)

RUN = {
    "pending": {"running", "failed", "cancelled"},
    "running": {"completed", "failed", "cancelled", "timeout", "pending"},
    **{terminal: set[str]() for terminal in ("completed", "failed", "cancelled", "timeout")},
}
NODE = {
    "pending": {"running", "completed", "failed", "skipped", "cancelled"},
    "running": {"completed", "failed", "cancelled", "pending"},
    **{terminal: set[str]() for terminal in ("completed", "failed", "skipped", "cancelled")},
}


def test_pipeline_statuses() -> None:
    assert {"active", "paused", "draft"} == set(PipelineStatus)


def test_run_transitions() -> None:
    assert {status: set(after) for status, after in RUN_TRANSITIONS.items()} == RUN


def test_node_transitions() -> None:
    assert {status: set(after) for status, after in NODE_TRANSITIONS.items()} == NODE


def test_a_new_run_is_pending_or_running() -> None:
    assert {"pending", "running"} == INITIAL_RUN_STATUSES


def test_terminal() -> None:
    assert {"completed", "failed", "cancelled", "timeout"} == {status for status in RunStatus if status.is_terminal}
    assert {"completed", "failed", "skipped", "cancelled"} == {status for status in NodeStatus if status.is_terminal}


def test_the_tables_cant_be_changed() -> None:
    with pytest.raises(TypeError):
        RUN_TRANSITIONS[RunStatus.COMPLETED] = frozenset({RunStatus.RUNNING})  # type: ignore[index]


def test_each_event_has_one_transition() -> None:
    assert set(EventType) == {*RUN_EVENTS.values(), *NODE_EVENTS.values()}
    assert len(EventType) == len(RUN_EVENTS) + len(NODE_EVENTS)


@pytest.mark.parametrize(
    ("status", "event"),
    [
        (RunStatus.RUNNING, "pipeline_run.started"),
        (RunStatus.COMPLETED, "pipeline_run.completed"),
        (RunStatus.FAILED, "pipeline_run.failed"),
        (RunStatus.CANCELLED, "pipeline_run.cancelled"),
        (RunStatus.TIMEOUT, "pipeline_run.timeout"),
        (RunStatus.PENDING, None),
    ],
)
def test_run_events(status: RunStatus, event: str | None) -> None:
    assert event == RUN_EVENTS.get(status)


@pytest.mark.parametrize(
    ("status", "event"),
    [
        (NodeStatus.RUNNING, "pipeline_node.started"),
        (NodeStatus.COMPLETED, "pipeline_node.completed"),
        (NodeStatus.FAILED, "pipeline_node.failed"),
        (NodeStatus.SKIPPED, "pipeline_node.skipped"),
        (NodeStatus.PENDING, "pipeline_node.retrying"),
        (NodeStatus.CANCELLED, None),
    ],
)
def test_node_events(status: NodeStatus, event: str | None) -> None:
    assert event == NODE_EVENTS.get(status)


@pytest.mark.parametrize(
    ("retries", "base", "longest", "seconds"),
    [
        (0, 1.0, 60.0, 1),
        (3, 1.0, 60.0, 8),
        (6, 1.0, 60.0, 60),
        (1000000, 1.0, 60.0, 60),
        (5, 0.0, 60.0, 0),
        (2, 10.0, 0.0, 0),
        (1000000, 31536000.0, 31536000.0, 31536000),
    ],
)
def test_retry_delay(retries: int, base: float, longest: float, seconds: float) -> None:
    assert timedelta(seconds=seconds) == retry_delay(retries, base, longest)
