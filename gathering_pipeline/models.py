"""The graph of a pipeline, and the schemas in which rows are written and read (Pydantic; no SQLAlchemy).

The graph models parse the JSON that existing databases hold. They check shapes only: what a graph means (ends of
edges, cycles, what a node's configuration lacks) is reported by ``validator``, so that a half-drawn or broken graph can
be held, shown and mended.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from .errors import InvalidPipelineError, Issue, shorten
from .json_values import json_path, show, text_reason
from .lifecycle import NodeStatus, PipelineStatus, RunStatus

NodeType = Literal["trigger", "agent", "condition", "action", "parallel", "delay"]
"""What a node can be."""

MAX_INT32 = 2_147_483_647
"""Largest value of PostgreSQL's ``INTEGER``."""

MAX_SECONDS = 31_536_000.0
"""Longest backoff, in seconds: a year."""

T = TypeVar("T")


def _storable_text(value: str) -> str:
    if reason := text_reason(value):
        raise ValueError(reason)
    return value


Text = Annotated[str, AfterValidator(_storable_text)]
# strict: a model holds what the JSON holds, so bytes are not decoded and tuples are not made lists
Strict = Annotated[str, Field(strict=True)]
Object = Annotated[dict[Strict, Any], Field(strict=True)]
Name = Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_storable_text)]
Int32 = Annotated[int, Field(ge=0, le=MAX_INT32)]
Retries = Annotated[int, Field(ge=0, le=1_000_000)]
Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False)]


# --- the graph ------------------------------------------------------------------------------------------------------


class _Model(BaseModel):
    # built on first use: until then a service that imports the package doesn't pay for Pydantic's schema machinery
    model_config = ConfigDict(defer_build=True)


class PipelineEdge(_Model):
    """An arrow between two nodes; JSON spells its ends ``from`` and ``to``.

    Attributes:
        id: Unique among the edges of the graph.
        from_node: Id of the node that comes first.
        to_node: Id of the node that follows.
        condition: Expression under which an executor takes this edge; ``None`` means always.
    """

    model_config = ConfigDict(populate_by_name=True)

    id: Strict
    # the aliases stand in the annotations: there type checkers don't take them for the names of the parameters
    from_node: Annotated[Strict, Field(alias="from")]
    to_node: Annotated[Strict, Field(alias="to")]
    condition: Strict | None = None


class PipelineNode(_Model):
    """A step of a pipeline.

    Attributes:
        id: Unique among the nodes of the graph; at most 100 characters.
        type: What the node does; decides which configuration it needs.
        name: What people call it.
        config: The raw configuration, see ``NodeConfig``; unknown keys and nulls are kept.
        position: Where the editor draws it, such as ``{"x": 50, "y": 100}``.
        next: Ids of the following nodes as some writers note them; the edges decide, not this.
    """

    id: Strict
    type: NodeType
    name: Strict
    config: Object = Field(default_factory=dict)
    position: Object | None = None
    next: Annotated[list[Strict], Field(strict=True)] | None = None


class _NodeConfig(_Model):
    model_config = ConfigDict(extra="allow")


class TriggerNodeConfig(_NodeConfig):
    """Configuration of a trigger; nothing is required."""

    type: Literal["trigger"] = "trigger"


class AgentNodeConfig(_NodeConfig):
    """Configuration of an agent: who does what; existing rows hold ``agent_id`` as a number, too."""

    type: Literal["agent"] = "agent"
    agent_id: str = Field(coerce_numbers_to_str=True)
    task: str


class ConditionNodeConfig(_NodeConfig):
    """Configuration of a condition: an expression."""

    type: Literal["condition"] = "condition"
    condition: str = "true"


class ActionNodeConfig(_NodeConfig):
    """Configuration of an action: its name, and whatever the action itself takes."""

    type: Literal["action"] = "action"
    action: str


class ParallelNodeConfig(_NodeConfig):
    """Configuration of a fork; nothing is required."""

    type: Literal["parallel"] = "parallel"


class DelayNodeConfig(_NodeConfig):
    """Configuration of a delay, in seconds."""

    type: Literal["delay"] = "delay"
    # strict: the stored JSON is never rewritten, so an executor would be handed the "5" or the true as it is
    seconds: float = Field(default=0, ge=0, allow_inf_nan=False, strict=True)


NodeConfig = Annotated[
    TriggerNodeConfig | AgentNodeConfig | ConditionNodeConfig | ActionNodeConfig | ParallelNodeConfig | DelayNodeConfig,
    Field(discriminator="type"),
]
"""Any node's configuration, told apart by ``type``, which is the node's own type."""


class PipelineDefinition(_Model):
    """A graph: nodes and the edges between them. It may be broken; ``find_issues`` tells."""

    # The validator remembers the graph's order here: in a slot, which equality, copies and pickles ignore.
    __slots__ = ("_compiled",)

    nodes: list[PipelineNode]
    edges: list[PipelineEdge]

    @property
    def node_map(self) -> dict[str, PipelineNode]:
        """The nodes by id; of nodes with one id the last."""
        return {node.id: node for node in self.nodes}

    @classmethod
    def from_json(cls, nodes: object, edges: object) -> PipelineDefinition:
        """Parse the two JSON lists of a stored pipeline.

        Args:
            nodes: List of node objects; items that are ``PipelineNode`` already are taken as they are.
            edges: List of edge objects, likewise.

        Raises:
            InvalidPipelineError: With one issue for each place that is wrong.
        """
        lists = {"node": nodes, "edge": edges}
        wrong = {what: type(items).__name__ for what, items in lists.items() if not isinstance(items, list)}
        if wrong:
            raise InvalidPipelineError(
                [_shape_issue(what, f"must be a list, not {kind}") for what, kind in wrong.items()]
            )
        try:
            return cls.model_validate({"nodes": nodes, "edges": edges})
        except ValidationError as error:
            issues = []
            for detail in error.errors(include_url=False, include_context=False, include_input=False):
                root, *keys = detail["loc"]
                what = str(root)[:-1]
                item: Any = lists[what][keys[0]]  # type: ignore[index]  # they are lists, and Pydantic names a place in them
                issues.append(
                    _shape_issue(what, detail["msg"], keys, item.get("id") if isinstance(item, dict) else None)
                )
            raise InvalidPipelineError(issues) from None


def _shape_issue(what: str, message: str, keys: Sequence[str | int] = (), item_id: object = None) -> Issue:
    path = json_path(f"{what}s", keys)
    name = item_id if isinstance(item_id, str) else None
    label = f" ({what} {show(name)})" if name else ""
    ids = (name, None) if what == "node" else (None, name)
    return Issue("error", f"invalid_{what}", f"Invalid {what} data: {path}{label}: {shorten(message, 200)}", *ids)


class NodeExecutionResult(_Model):
    """What an executor reports about one node of a run.

    Attributes:
        node_id: The node.
        status: How it ended.
        output: JSON object that the node produced.
        error: Why it failed.
        duration_ms: Time taken, in milliseconds.
        retry_count: Retries made, so 0 after one attempt.
    """

    # an ``outputs`` that is no field would be lost without a word
    model_config = ConfigDict(extra="forbid")

    node_id: str
    status: Literal["completed", "failed", "skipped", "cancelled"]
    output: dict[str, Any] | None = None
    error: str | None = None
    duration_ms: Int32 = 0
    retry_count: Int32 = 0


# --- what is written ------------------------------------------------------------------------------------------------


class _Schema(_Model):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PipelineCreate(_Schema):
    """A pipeline to be stored; the graph is checked when it is written, and raw JSON is stored as it is.

    Attributes:
        name: 1 to 255 characters.
        description: Free text.
        status: Only an ``active`` pipeline can be run.
        nodes: JSON objects or ``PipelineNode``.
        edges: JSON objects or ``PipelineEdge``.
        timeout_seconds: Longest duration of a run; ``None`` or 0: no limit.
        max_retries_per_node: Retries, so 3 means up to 4 attempts.
        retry_backoff_base: First retry delay in seconds; it doubles with each retry.
        retry_backoff_max: Longest retry delay in seconds.
    """

    name: Name
    description: Text | None = None
    status: PipelineStatus = PipelineStatus.DRAFT
    nodes: Annotated[list[Any], Field(strict=True)] = Field(default_factory=list)
    edges: Annotated[list[Any], Field(strict=True)] = Field(default_factory=list)
    timeout_seconds: Int32 | None = 3600
    max_retries_per_node: Retries = 3
    retry_backoff_base: Seconds = 1.0
    retry_backoff_max: Seconds = 60.0


class PipelineUpdate(_Schema):
    """The fields of a pipeline to be changed: those given (``model_fields_set``), as in ``PipelineCreate``."""

    name: Name | None = None
    description: Text | None = None
    status: PipelineStatus | None = None
    nodes: Annotated[list[Any], Field(strict=True)] | None = None
    edges: Annotated[list[Any], Field(strict=True)] | None = None
    timeout_seconds: Int32 | None = None
    max_retries_per_node: Retries | None = None
    retry_backoff_base: Seconds | None = None
    retry_backoff_max: Seconds | None = None

    @field_validator("*", mode="after")
    @classmethod
    def _refuse_null(cls, value: object, info: ValidationInfo) -> object:
        if value is None and info.field_name not in ("description", "timeout_seconds"):
            raise ValueError(f"{info.field_name} can't be null; leave it out to keep what is stored")
        return value


# --- what is read ---------------------------------------------------------------------------------------------------


class _Read(_Schema):
    # a later revision of the schema may have more columns
    model_config = ConfigDict(extra="ignore")


class PipelineRead(_Read):
    """A stored pipeline. ``nodes`` and ``edges`` are the raw JSON, unchecked: a broken graph can still be read."""

    id: int
    name: str
    description: str | None
    status: PipelineStatus
    nodes: Any
    edges: Any
    version: int
    timeout_seconds: int | None
    max_retries_per_node: int
    retry_backoff_base: float
    retry_backoff_max: float
    run_count: int
    success_count: int
    error_count: int
    last_run: datetime | None
    created_at: datetime | None
    updated_at: datetime | None

    @property
    def definition(self) -> PipelineDefinition:
        """The typed graph, parsed on each use.

        Raises:
            InvalidPipelineError: The stored JSON is not a graph.
        """
        return PipelineDefinition.from_json(self.nodes, self.edges)


class RunRead(_Read):
    """A stored run; times are the database's, ``duration_seconds`` is rounded."""

    id: int
    pipeline_id: int
    pipeline_version: int | None
    status: RunStatus
    trigger_data: Any
    logs: Any
    current_node: str | None
    error_message: str | None
    failed_node: str | None
    duration_seconds: int
    worker_id: str | None
    claim_token: int
    claim_count: int
    lease_expires_at: datetime | None
    idempotency_key: str | None
    started_at: datetime | None
    completed_at: datetime | None
    created_at: datetime | None


class NodeRunRead(_Read):
    """A node of a stored run; ``predecessors`` and ``successors`` are positions in execution order."""

    id: int
    run_id: int
    node_id: str
    node_type: str
    status: NodeStatus
    input_data: Any
    output_data: Any
    error_message: str | None
    retry_count: int
    position: int | None
    predecessors: list[int] | None
    successors: list[int] | None
    available_at: datetime | None
    started_at: datetime | None
    completed_at: datetime | None
    duration_ms: int


class RunStatistics(_Read):
    """How the runs of a pipeline went.

    Attributes:
        runs: Number of runs by status.
        success_rate: Completed runs among those that completed, failed or timed out, 0 to 1; ``None`` before the first.
        duration_p50: Median duration of the completed runs.
        duration_p95: Duration that 95 % of the completed runs did not exceed.
    """

    runs: dict[RunStatus, int]
    success_rate: float | None
    duration_p50: timedelta | None
    duration_p95: timedelta | None


class Page(_Read, Generic[T]):
    """A part of a longer list; ``next_cursor`` goes into ``after=`` for the next one and is ``None`` on the last."""

    items: tuple[T, ...]
    next_cursor: int | None
