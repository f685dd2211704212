"""The names of all lifecycle events, and the schema in which they are read."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


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

    ``data`` of an event of a node has ``attempt`` (from 1), ``worker_id`` (``None``: no worker held the run),
    ``duration_ms`` of an attempt that ended, ``error`` of a failure and of a retry, and ``available_at``, the time of
    the next attempt; that of a skipped node is empty. A run that starts has ``claim``, the number of the
    claim, and ``worker_id`` if it was claimed, and if it resumes another ``resumed_from`` and ``taken_over``, a number
    of nodes. One that ends has ``worker_id``, ``duration_seconds``, and ``error`` unless it completed.
    """

    # a later revision of the schema may have more columns
    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)

    id: int = Field(description="Increases within a run, with gaps.")
    run_id: int = Field(description="The run.")
    node_id: str | None = Field(description="The node; null for an event of the run itself.")
    type: EventType = Field(description="What happened.")
    data: dict[str, Any] = Field(
        description=(
            "What belongs to the event: `attempt`, `worker_id` and `duration_ms` of a node, `claim`, "
            "`worker_id` and `duration_seconds` of a run, `error` of a failure, `available_at` of a retry."
        ),
    )
    created_at: datetime = Field(description="When it happened, by the database's clock.")
    cursor: str = Field(description="The `after=` for the events that follow; valid in this database only.")

    @property
    def ends_run(self) -> bool:
        """Whether this is the last event of its run."""
        return self.type in RUN_ENDS


class EventPage(BaseModel):
    """One page of the event log."""

    model_config = ConfigDict(frozen=True, defer_build=True)

    items: tuple[PipelineEvent, ...] = Field(description="The events in reading order.")
    next_cursor: str = Field(description="The `after=` of the next page, also when `items` is empty.")
