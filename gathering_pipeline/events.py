"""The names of all lifecycle events, and an event as it is read."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict


class EventType(StrEnum):
    """What can happen to a run and to a node of a run; the value is the event's name on the wire."""

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


class PipelineEvent(BaseModel):
    """A lifecycle event as stored.

    Attributes:
        id: Grows within a run; numbers are left out.
        run_id: The run.
        node_id: The node; ``None`` for an event of the run itself.
        type: What happened.
        data: ``error`` of what failed, timed out or was cancelled; of a retry ``attempt`` (the one that ended, from 1),
            ``error`` and ``available_at`` (when the next one is due).
        created_at: When it happened, by the database's clock.
        cursor: Where a reader goes on after this event; good for this database only.
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


class EventPage(BaseModel):
    """A part of the event log.

    Attributes:
        items: The events, in the order in which they are read.
        next_cursor: Goes into ``after=`` for what follows, also when ``items`` is empty.
    """

    model_config = ConfigDict(frozen=True, defer_build=True)

    items: tuple[PipelineEvent, ...]
    next_cursor: str
