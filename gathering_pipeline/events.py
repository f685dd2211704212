"""The names of all lifecycle events."""

from __future__ import annotations

from enum import StrEnum


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
