"""The names of all lifecycle events, and the schema in which they are read."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict


class EventType(StrEnum):
    """The lifecycle events of runs and node runs; the value is the stored name."""

    PIPELINE_RUN_STARTED = "pipeline_run.started"
    PIPELINE_RUN_COMPLETED = "pipeline_run.completed"
    PIPELINE_RUN_FAILED = "pipeline_run.failed"
    PIPELINE_RUN_CANCELLED = "pipeline_run.cancelled"
    PIPELINE_RUN_TIMEOUT = "pipeline_run.timeout"
    PIPELINE_NODE_STARTED = "pipeline_node.started"
    PIPELINE_NODE_COMPLETED = "pipeline_node.completed"
    PIPELINE_NODE_FAILED = "pipeline_node.failed"
    PIPELINE_NODE_SKIPPED = "pipeline_node.skipped"
    PIPELINE_NODE_RETRYING = "pipeline_node.retrying"


RUN_ENDS = frozenset(
    {
        EventType.PIPELINE_RUN_COMPLETED,
        EventType.PIPELINE_RUN_FAILED,
        EventType.PIPELINE_RUN_CANCELLED,
        EventType.PIPELINE_RUN_TIMEOUT,
    }
)
"""The last event of a run is one of these."""


class PipelineEvent(BaseModel):
    """A lifecycle event as stored.

    Attributes:
        id: Increases within a run, with gaps.
        run_id: The run.
        node_id: The node; ``None`` for an event of the run itself.
        type: What happened.
        data: Of a node: ``attempt`` (from 1), ``worker_id`` (``None``: no worker held the run), ``duration_ms`` of the
            attempt (``None`` as it starts), ``error`` of a failure and of a retry, and ``available_at``, the time of the
            next attempt; a skipped node has none of them. Of a run that starts: ``claim``, the number of the claim, and
            ``worker_id`` if it was claimed; ``resumed_from`` and ``taken_over``, a number of nodes, if it resumes
            another. Of one that ends: ``worker_id``, ``duration_seconds``, and ``error`` unless it completed.
        created_at: When it happened, by the database's clock.
        cursor: The ``after=`` for the events that follow; valid in this database only.
    """

    # a later revision of the schema may have more columns
    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)

    id: int
    run_id: int
    node_id: str | None
    type: EventType
    data: dict[str, Any]
    created_at: datetime
    cursor: str

    @property
    def ends_run(self) -> bool:
        """Whether this is the last event of its run."""
        return self.type in RUN_ENDS


class EventPage(BaseModel):
    """One page of the event log.

    Attributes:
        items: The events in reading order.
        next_cursor: The ``after=`` of the next page, also when ``items`` is empty.
    """

    model_config = ConfigDict(frozen=True, defer_build=True)

    items: tuple[PipelineEvent, ...]
    next_cursor: str
