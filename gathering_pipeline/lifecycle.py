"""Statuses, legal transitions, and the event of each.

The database carries the same table (``alembic/sql/011_lifecycle/3_guards.sql``); a test compares the two cell by cell.
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
    """Status of a run."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"

    @property
    def is_terminal(self) -> bool:
        """Whether no transition leads out of this status."""
        return not RUN_TRANSITIONS[self]


class NodeStatus(StrEnum):
    """Status of a node run."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    SKIPPED = "skipped"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether no transition leads out of this status."""
        return not NODE_TRANSITIONS[self]


class HistoryKind(StrEnum):
    """What an entry of the history of a run's claims is about."""

    CLAIMED = "claimed"
    RELEASED = "released"
    RECOVERED = "recovered"
    CANCELLED = "cancelled"
    RESUMED = "resumed"


RUN_TRANSITIONS: Mapping[RunStatus, frozenset[RunStatus]] = MappingProxyType(
    {
        RunStatus.PENDING: frozenset({RunStatus.RUNNING, RunStatus.FAILED, RunStatus.CANCELLED}),
        # back to pending: released by its worker, or the lease expired
        RunStatus.RUNNING: frozenset(set(RunStatus) - {RunStatus.RUNNING}),
        RunStatus.COMPLETED: frozenset(),
        RunStatus.FAILED: frozenset(),
        RunStatus.CANCELLED: frozenset(),
        RunStatus.TIMEOUT: frozenset(),
    }
)
"""The legal next statuses of a run, by its status."""

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
"""The legal next statuses of a node run, by its status; its run must be ``running``."""

INITIAL_RUN_STATUSES = frozenset({RunStatus.PENDING, RunStatus.RUNNING})
"""Legal statuses of a new run; a new node run may have any, because executors may report afterwards."""

RUN_EVENTS: Mapping[RunStatus, EventType] = MappingProxyType(
    {
        RunStatus.RUNNING: EventType.PIPELINE_RUN_STARTED,
        RunStatus.COMPLETED: EventType.PIPELINE_RUN_COMPLETED,
        RunStatus.FAILED: EventType.PIPELINE_RUN_FAILED,
        RunStatus.CANCELLED: EventType.PIPELINE_RUN_CANCELLED,
        RunStatus.TIMEOUT: EventType.PIPELINE_RUN_TIMEOUT,
    }
)
"""The event of a run's new status; ``pending`` (a released run) has none."""

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
"""The event of a node run's new status; ``cancelled`` has none, because the run's own event reports it."""


def retry_delay(retry_count: int, base_seconds: float, max_seconds: float) -> timedelta:
    """The delay of a failed node before its next attempt: ``min(base * 2^n, max)``.

    Args:
        retry_count: Retries made so far, ``n``; the exponent is clamped at 62, so that no count overflows.
        base_seconds: The first delay in seconds.
        max_seconds: The longest delay in seconds.
    """
    return timedelta(seconds=min(base_seconds * 2.0 ** min(retry_count, 62), max_seconds))
