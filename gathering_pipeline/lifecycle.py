"""Statuses, the transitions that are legal, and what each of them is called as an event.

The database carries the same table (``alembic/sql/009b_lifecycle/4_guards.sql``); a test compares the two cell by cell.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from enum import StrEnum
from types import MappingProxyType

from .events import EventType


class PipelineStatus(StrEnum):
    """Whether a pipeline may be run."""

    ACTIVE = "active"
    PAUSED = "paused"
    DRAFT = "draft"


class RunStatus(StrEnum):
    """Where a run is in its life."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"

    @property
    def is_terminal(self) -> bool:
        """Whether the run is over for ever."""
        return not RUN_TRANSITIONS[self]


class NodeStatus(StrEnum):
    """Where a node of a run is in its life."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    SKIPPED = "skipped"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether the node is over for ever."""
        return not NODE_TRANSITIONS[self]


RUN_TRANSITIONS: Mapping[RunStatus, frozenset[RunStatus]] = MappingProxyType(
    {
        RunStatus.PENDING: frozenset({RunStatus.RUNNING, RunStatus.FAILED, RunStatus.CANCELLED}),
        # back to pending: given back by its worker, or the lease ran out
        RunStatus.RUNNING: frozenset(set(RunStatus) - {RunStatus.RUNNING}),
        RunStatus.COMPLETED: frozenset(),
        RunStatus.FAILED: frozenset(),
        RunStatus.CANCELLED: frozenset(),
        RunStatus.TIMEOUT: frozenset(),
    }
)
"""What a run may become, by its status."""

NODE_TRANSITIONS: Mapping[NodeStatus, frozenset[NodeStatus]] = MappingProxyType(
    {
        # completed and failed without running: an executor that reports afterwards
        NodeStatus.PENDING: frozenset(set(NodeStatus) - {NodeStatus.PENDING}),
        # back to pending: a retry
        NodeStatus.RUNNING: frozenset(
            {NodeStatus.COMPLETED, NodeStatus.FAILED, NodeStatus.CANCELLED, NodeStatus.PENDING}
        ),
        NodeStatus.COMPLETED: frozenset(),
        NodeStatus.FAILED: frozenset(),
        NodeStatus.SKIPPED: frozenset(),
        NodeStatus.CANCELLED: frozenset(),
    }
)
"""What a node run may become, by its status; it moves only while its run is ``running``."""

INITIAL_RUN_STATUSES = frozenset({RunStatus.PENDING, RunStatus.RUNNING})
"""What a new run may be; a new node run may be anything, because executors may report afterwards."""

RUN_EVENTS: Mapping[RunStatus, EventType] = MappingProxyType(
    {
        RunStatus.RUNNING: EventType.PIPELINE_RUN_STARTED,
        RunStatus.COMPLETED: EventType.PIPELINE_RUN_COMPLETED,
        RunStatus.FAILED: EventType.PIPELINE_RUN_FAILED,
        RunStatus.CANCELLED: EventType.PIPELINE_RUN_CANCELLED,
        RunStatus.TIMEOUT: EventType.PIPELINE_RUN_TIMEOUT,
    }
)
"""The event of a run's new status; one that is not here has none (a run given back)."""

NODE_EVENTS: Mapping[NodeStatus, EventType] = MappingProxyType(
    {
        NodeStatus.RUNNING: EventType.PIPELINE_NODE_STARTED,
        NodeStatus.COMPLETED: EventType.PIPELINE_NODE_COMPLETED,
        NodeStatus.FAILED: EventType.PIPELINE_NODE_FAILED,
        NodeStatus.SKIPPED: EventType.PIPELINE_NODE_SKIPPED,
        # only from running: a retry
        NodeStatus.PENDING: EventType.PIPELINE_NODE_RETRYING,
    }
)
"""The event of a node run's new status; a node cancelled with its run has none, the run's own event tells."""


def retry_delay(retry_count: int, base_seconds: float, max_seconds: float) -> timedelta:
    """How long a failed node waits before its next attempt: ``min(base * 2^n, max)``.

    Args:
        retry_count: Retries made so far, ``n``; the exponent is clamped at 62, so that no count overflows.
        base_seconds: The first delay in seconds.
        max_seconds: The longest delay in seconds.
    """
    return timedelta(seconds=min(base_seconds * 2.0 ** min(retry_count, 62), max_seconds))
