"""The attempts of a run's nodes, put together from its events, and how long nodes take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from gathering_pipeline.events import EventType, PipelineEvent
from gathering_pipeline.lifecycle import NodeStatus
from gathering_pipeline.models import NodeRunRead, RunRead

_OUTCOMES = {
    EventType.PIPELINE_NODE_COMPLETED: NodeStatus.COMPLETED,
    EventType.PIPELINE_NODE_FAILED: NodeStatus.FAILED,
    EventType.PIPELINE_NODE_RETRYING: NodeStatus.FAILED,
}


@dataclass(frozen=True, slots=True)
class Attempt:
    """An attempt of a node.

    Attributes:
        node_id: The node.
        start: When it began.
        end: When it ended; ``None``: it is running.
        outcome: How it ended; ``running`` if it didn't, ``cancelled`` if the run ended, or gave it up, before it did.
        error: Why it failed.
        worker_id: The worker that executed it; ``None``: the event doesn't name one.
    """

    node_id: str
    start: datetime
    end: datetime | None
    outcome: NodeStatus
    error: str | None = None
    worker_id: str | None = None


def find_attempts(
    run: RunRead, nodes: Sequence[NodeRunRead], events: Iterable[PipelineEvent]
) -> dict[str, list[Attempt]]:
    """The attempts of each node that was started, oldest first.

    Args:
        run: The run.
        nodes: Its nodes; where the events of one were purged, its last attempt is taken from here.
        events: Its events, in their order.
    """
    found: dict[str, list[Attempt]] = {}
    begun: dict[str, PipelineEvent] = {}
    rows = {node.node_id: node for node in nodes}
    for event in events:
        if event.node_id is None:
            continue
        attempts = found.setdefault(event.node_id, [])
        if event.type is EventType.PIPELINE_NODE_STARTED:
            begun[event.node_id] = event
        elif (outcome := _OUTCOMES.get(event.type)) is not None:
            began = begun.pop(event.node_id, None)
            start = _reported_start(event) if began is None else began.created_at
            error = event.data.get("error")
            # without a due time it is no retry: its worker gave the run up
            if event.type is EventType.PIPELINE_NODE_RETRYING and event.data.get("available_at") is None:
                outcome = NodeStatus.CANCELLED
            attempts.append(
                Attempt(event.node_id, start, event.created_at, outcome, error, event.data.get("worker_id"))
            )
    for node_id, began in begun.items():
        is_running = run.completed_at is None and node_id in rows and rows[node_id].status is NodeStatus.RUNNING
        outcome = NodeStatus.RUNNING if is_running else NodeStatus.CANCELLED
        end = None if is_running else run.completed_at or began.created_at
        worker = began.data.get("worker_id")
        found[node_id].append(Attempt(node_id, began.created_at, end, outcome, worker_id=worker))
    for node in nodes:
        if not found.get(node.node_id) and node.started_at is not None and node.taken_from is None:
            if node.status is NodeStatus.PENDING:  # it waits for its retry: when the attempt ended is not known
                continue
            found[node.node_id] = [
                Attempt(node.node_id, node.started_at, node.completed_at, node.status, node.error_message)
            ]
    return {node_id: attempts for node_id, attempts in found.items() if attempts}


def node_duration(node: NodeRunRead, now: datetime) -> timedelta | None:
    """How long the last attempt of a node took, or takes already; ``None`` if none was started, or the next one waits.

    Args:
        node: The node.
        now: When it was read.
    """
    if node.started_at is None or node.status is NodeStatus.PENDING:
        return None
    if node.status is NodeStatus.RUNNING:
        return now - node.started_at
    return timedelta(milliseconds=node.duration_ms)


def _reported_start(event: PipelineEvent) -> datetime:
    """When an attempt began that was reported afterwards."""
    return event.created_at - timedelta(milliseconds=event.data.get("duration_ms") or 0)
