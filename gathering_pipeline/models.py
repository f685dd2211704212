"""The graph of a pipeline, and the schemas in which rows are written and read (Pydantic; no SQLAlchemy).

The graph models parse the JSON that existing databases hold. They check shapes only: ``validator`` reports what a graph
means (ends of edges, cycles, missing configuration), so that an unfinished or broken graph can be loaded, shown and
repaired.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    StrictBool,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from .arguments import check_branch
from .errors import InvalidPipelineError, Issue, IssueCode, shorten
from .json_values import json_path, quote, text_reason
from .lifecycle import NodeStatus, PipelineStatus, RunStatus
from .node_types import (
    ActionNodeConfig,
    AgentNodeConfig,
    ConditionNodeConfig,
    DelayNodeConfig,
    NodeConfig,
    NodeType,
    ParallelNodeConfig,
    TriggerNodeConfig,
)

__all__ = [
    "END_ALIASES",
    "MAX_INT32",
    "MAX_SECONDS",
    "ActionNodeConfig",
    "AgentNodeConfig",
    "ChangedRuns",
    "ClaimedRun",
    "ConditionNodeConfig",
    "DelayNodeConfig",
    "LogEntry",
    "NodeConfig",
    "NodeExecutionResult",
    "NodeRunRead",
    "NodeType",
    "Page",
    "ParallelNodeConfig",
    "PipelineCreate",
    "PipelineDefinition",
    "PipelineEdge",
    "PipelineNode",
    "PipelineRead",
    "PipelineUpdate",
    "PipelineVersion",
    "RunRead",
    "RunStatistics",
    "RunSummary",
    "TriggerNodeConfig",
    "end_issues",
    "list_issue",
    "shape_issues",
]

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
StrictInt32 = Annotated[int, Field(strict=True, ge=0, le=MAX_INT32)]
Retries = Annotated[int, Field(ge=0, le=1_000_000)]
Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False)]


# --- the graph ------------------------------------------------------------------------------------------------------


class _Model(BaseModel):
    # built on first use, so that importing the package is cheap
    model_config = ConfigDict(defer_build=True)


class PipelineEdge(_Model):
    """A directed edge between two nodes; JSON spells its ends ``from`` and ``to``. Unknown keys are kept.

    Attributes:
        id: Unique among the edges of the graph.
        from_node: Id of the node that comes first.
        to_node: Id of the node that follows.
        condition: Label of the branch that the edge belongs to: a node that completes with this outcome takes it, in
            lower or upper case. ``None`` or blank: always taken.
    """

    model_config = ConfigDict(populate_by_name=True, extra="allow")

    id: Strict
    # the aliases stand in the annotations: there type checkers don't take them for the names of the parameters
    from_node: Annotated[Strict, Field(alias="from")]
    to_node: Annotated[Strict, Field(alias="to")]
    condition: Strict | None = None


class PipelineNode(_Model):
    """A step of a pipeline. Unknown keys are kept (``model_extra``).

    Attributes:
        id: Unique among the nodes of the graph; at most 100 characters.
        type: What the node does; decides which configuration it needs.
        name: Label for people.
        config: The raw configuration, see ``NodeConfig``; unknown keys and nulls are kept.
        position: Place in the editor, such as ``{"x": 50, "y": 100}``.
        next: Ids of the following nodes, which some writers store; the edges decide.
    """

    model_config = ConfigDict(extra="allow")

    id: Strict
    type: NodeType
    name: Strict
    config: Object = Field(default_factory=dict)
    position: Object | None = None
    next: Annotated[list[Strict], Field(strict=True)] | None = None


class PipelineDefinition(_Model):
    """A graph: nodes and the edges between them. It may be invalid, see ``find_issues``."""

    # The validator caches the order here: in a slot, which equality, copies and pickles ignore.
    __slots__ = ("_order",)

    nodes: list[PipelineNode]
    edges: list[PipelineEdge]

    @property
    def node_map(self) -> dict[str, PipelineNode]:
        """The nodes by id; the last of several nodes with the same id."""
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
        if issues := [*list_issue("nodes", nodes), *list_issue("edges", edges)]:
            raise InvalidPipelineError(issues)
        try:
            return cls.model_validate({"nodes": nodes, "edges": edges})
        except ValidationError as error:
            raise InvalidPipelineError(shape_issues(error, {"nodes": nodes, "edges": edges})) from None


END_ALIASES = {"from_node": "from", "to_node": "to"}
_FIELD_CODES = {"id": IssueCode.INVALID_ID, "type": IssueCode.INVALID_TYPE, "config": IssueCode.INVALID_CONFIG}
_ITEM_CODES = {"nodes": IssueCode.INVALID_NODE, "edges": IssueCode.INVALID_EDGE}


def list_issue(key: Literal["nodes", "edges"], value: object) -> list[Issue]:
    """The issue of ``nodes`` or ``edges`` that is not a list; empty if it is one."""
    if isinstance(value, list):
        return []
    kind = "null" if value is None else type(value).__name__
    message = f"Invalid {key[:-1]} data: {key} must be a list, not {kind}"
    return [Issue("error", IssueCode.NOT_A_LIST, message, loc=(key,))]


def end_issues(index: int, edge: dict[Any, Any]) -> list[Issue]:
    """The issues of an edge whose ends are spelled both ways and differ."""
    return [
        Issue(
            "error",
            IssueCode.INVALID_EDGE,
            f"Invalid edge data: edges[{index}] has both {alias} and {name}, and they differ",
            loc=("edges", index, alias),
        )
        for name, alias in END_ALIASES.items()
        if name in edge and edge.get(alias, edge[name]) != edge[name]
    ]


def shape_issues(error: ValidationError, lists: dict[str, Any], prefix: tuple[str | int, ...] = ()) -> list[Issue]:
    """Name each place at which Pydantic refused a graph.

    Args:
        error: The error of ``PipelineDefinition``, or of the item at ``prefix``.
        lists: The lists that were parsed.
        prefix: Place of what was parsed.
    """
    details = error.errors(include_url=False, include_context=False, include_input=False)
    return [_shape_issue(lists, (*prefix, *detail["loc"]), detail["type"], detail["msg"]) for detail in details]


def _shape_issue(lists: dict[str, Any], place: Sequence[str | int], kind: str, reason: str) -> Issue:
    root, index, *keys = place
    assert isinstance(root, str)
    assert isinstance(index, int)
    keys = [END_ALIASES.get(str(key), key) for key in keys[:1]] + keys[1:]
    code = _FIELD_CODES.get(str(keys[0]), _ITEM_CODES[root]) if keys else _ITEM_CODES[root]
    # values of config and position may be anything, so a key is refused
    if kind == "invalid_key" or (len(keys) > 1 and keys[0] in ("config", "position")):
        key = keys.pop(0 if kind == "invalid_key" else 1)
        code, reason, keys = IssueCode.INVALID_JSON, f"has a key that is not a string: {quote(key)}", keys[:1]
    item = lists[root][index]
    name = item.get("id") if isinstance(item, dict) else getattr(item, "id", None)
    name = name if isinstance(name, str) else None
    what = root[:-1]
    label = f" ({what} {quote(name)})" if name else ""
    return Issue(
        "error",
        code,
        f"Invalid {what} data: {json_path(root, [index, *keys])}{label}: {shorten(reason, 200)}",
        node_id=name if what == "node" else None,
        edge_id=name if what == "edge" else None,
        loc=(root, index, *keys),
    )


class NodeExecutionResult(_Model):
    """The result of one node of a run, reported by an executor.

    Attributes:
        node_id: The node.
        status: Terminal status of the node.
        output: JSON object that the node produced.
        error: Reason of the failure.
        duration_ms: Time taken, in milliseconds.
        retry_count: Retries made, so 0 after one attempt.
    """

    # a misspelt field, such as ``outputs``, would be lost silently
    model_config = ConfigDict(extra="forbid")

    node_id: str
    status: Literal["completed", "failed", "skipped", "cancelled"]
    output: dict[str, Any] | None = None
    error: str | None = None
    duration_ms: StrictInt32 = 0
    retry_count: StrictInt32 = 0


def _branch(value: object, info: ValidationInfo) -> object:
    check_branch(value)
    if value is not None and info.data.get("status", "completed") != "completed":
        raise ValueError("only a completed node takes a branch")
    return value


class NodeResult(NodeExecutionResult):
    """The result of an attempt of a node.

    Attributes:
        attempt: The attempt that it is about, 1 for the first: a late report about an earlier one is recognised.
            ``None``: the current one.
        retryable: Whether a failed attempt is retried while retries are left; ``None``: as ``retry`` of the call says.
        branch: The outcome of a completed node, which decides the edges that it takes, see ``untaken_successors``;
            ``None``: all.
    """

    attempt: Annotated[int, Field(strict=True, ge=1, le=MAX_INT32)] | None = None
    retryable: StrictBool | None = None
    branch: Annotated[bool | str | None, PlainValidator(_branch)] = None


class RunReport(NamedTuple):
    """The arguments of ``advance`` for one of many runs.

    Attributes:
        run_id: The run.
        results: ``NodeResult``, ``NodeExecutionResult`` or mappings with their fields.
        token: The token of the claim.
        inputs: Whether started nodes have the outputs of their predecessors.
    """

    run_id: int
    results: Iterable[NodeExecutionResult | Mapping[str, Any]] = ()
    token: int | None = None
    inputs: bool = False


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
        max_running: Most runs that ``claim`` lets run at the same time; 0: no limit.
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
    max_running: Retries = 0


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
    max_running: Retries | None = None

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
    """A stored pipeline. ``nodes`` and ``edges`` are the raw JSON, unchecked: a broken graph can still be read.

    Attributes:
        version: Number of the graph.
        revision: Number of the row, for ``expected_revision``: each edit adds one, counters don't.
        status_changed_at: Since when it has its status; ``None`` where that is older than this column.
    """

    id: int
    name: str
    description: str | None
    status: PipelineStatus
    status_changed_at: datetime | None
    nodes: Any
    edges: Any
    version: int
    revision: int
    timeout_seconds: int | None
    max_retries_per_node: int
    retry_backoff_base: float
    retry_backoff_max: float
    max_running: int
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


class PipelineVersion(_Read):
    """A version of a pipeline's graph.

    Attributes:
        version: Its number.
        node_count: How many nodes it has.
        created_at: When it was written.
    """

    version: int
    node_count: int
    created_at: datetime


class RunSummary(_Read):
    """A run as a list shows it; times are the database's, ``duration_seconds`` is rounded.

    Attributes:
        claim_count: How often it was claimed.
        lapsed_claims: How many of these claims ended because the lease ran out.
        priority: Runs with a higher one are claimed first.
        run_at: The time that ``create`` was given.
        waits_until: A pending run isn't claimed before: it waits for ``run_at`` or for the retry of a node.
        resumed_from: The run that it takes completed nodes over from; ``None`` once that one is deleted.
    """

    id: int
    pipeline_id: int
    pipeline_version: int | None
    status: RunStatus
    current_node: str | None
    error_message: str | None
    failed_node: str | None
    duration_seconds: int
    worker_id: str | None
    claim_count: int
    lapsed_claims: int
    lease_expires_at: datetime | None
    priority: int
    run_at: datetime | None
    waits_until: datetime | None
    resumed_from: int | None
    started_at: datetime | None
    completed_at: datetime | None
    created_at: datetime | None


class RunRead(RunSummary):
    """A stored run.

    Attributes:
        trigger_data: The JSON input.
        logs: The column ``logs``, which raw writers fill; ``RunRepository.logs`` reads all entries.
        idempotency_key: The key that it was created with.
    """

    trigger_data: Any
    logs: Any
    idempotency_key: str | None


class ClaimedRun(RunRead):
    """A run that its worker has just claimed.

    Attributes:
        token: Names the claim: the worker's calls on the run need it.
    """

    token: int = Field(validation_alias=AliasChoices("claim_token", "token"), repr=False)


class LogEntry(_Read):
    """An entry of a run's log.

    Attributes:
        id: Its place in the log. Entries that raw writers put into the column ``logs`` have negative ones.
        entry: JSON.
        created_at: When it was appended; ``None`` for an entry of the column.
    """

    id: int
    entry: Any
    created_at: datetime | None


class NodeRunRead(_Read):
    """A node of a stored run.

    Attributes:
        position: Its place in execution order, from 0.
        predecessors: Their positions.
        successors: Their positions.
        untaken: The successors that it didn't take when it completed; ``None``: it took all. A skipped node with a
            completed predecessor was not taken by it; any other follows skipped nodes.
        taken_from: The run that executed it, where a resumed run took it over.
    """

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
    untaken: list[int] | None
    taken_from: int | None
    available_at: datetime | None
    started_at: datetime | None
    completed_at: datetime | None
    duration_ms: int


class NodeState(_Read):
    """A node run after a transition.

    Attributes:
        run_id: The run.
        node_id: The node.
        node_type: Its type.
        status: Its status.
        attempt: The number of the current attempt, 1 for the first; of a pending node that of the next one.
        available_at: When its retry is due.
        error_message: Why the last attempt failed.
    """

    run_id: int
    node_id: str
    node_type: str
    status: NodeStatus
    attempt: int
    available_at: datetime | None
    error_message: str | None


class StartedNode(_Read):
    """An attempt of a node that is running: what a worker executes.

    Attributes:
        node_id: The node.
        node_type: Its type.
        attempt: The number of the attempt, 1 for the first.
        inputs: The outputs of the completed predecessors that take it, by node id; ``None`` unless they were asked for.
    """

    node_id: str
    node_type: str
    attempt: int
    inputs: dict[str, Any] | None = None


class Step(_Read):
    """What ``advance`` did.

    Attributes:
        status: The run's status.
        started: The nodes that the call started, in execution order.
        running: The nodes that are running, where the call started none.
        next_due: When the next retry is due, where the call started no node.
    """

    status: RunStatus
    started: tuple[StartedNode, ...] = ()
    running: tuple[StartedNode, ...] = ()
    next_due: datetime | None = None

    @field_validator("started", "running", mode="before")
    @classmethod
    def _none_is_empty(cls, value: object) -> object:
        return () if value is None else value


class RunStatistics(_Read):
    """Counts and durations of a pipeline's latest runs.

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


class ChangedRuns(_Read):
    """What a call of ``resume_all`` or ``cancel_all`` did.

    Attributes:
        runs: The resumed or cancelled runs.
        refused: Why others could not be, by their ids.
        next_cursor: The ``after=`` of the next call; ``None``: no older run is left.
    """

    runs: tuple[RunRead, ...]
    refused: dict[int, str]
    next_cursor: int | None


class PurgeResult(_Read):
    """What a call of ``RunRepository.purge`` did.

    Attributes:
        deleted: Number of deleted runs.
        kept: Ids of old runs that could not be deleted, because rows of other tables refer to them.
        next_cursor: The ``after=`` of the next call; ``None``: no older run is left.
    """

    deleted: int
    kept: tuple[int, ...]
    next_cursor: str | None


class Page(_Read, Generic[T]):
    """One page of a list; ``next_cursor`` is the ``after=`` of the next page, ``None`` on the last."""

    items: tuple[T, ...]
    next_cursor: int | None
