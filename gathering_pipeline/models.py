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
    GetJsonSchemaHandler,
    PlainValidator,
    StrictBool,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core.core_schema import CoreSchema, list_schema

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
    """A directed edge between two nodes; JSON spells its ends ``from`` and ``to``. Unknown keys are kept."""

    model_config = ConfigDict(populate_by_name=True, extra="allow")

    id: Strict = Field(description="Unique among the edges of the graph.")
    # the aliases stand in the annotations: there type checkers don't take them for the names of the parameters
    from_node: Annotated[Strict, Field(alias="from")] = Field(description="Id of the node that comes first.")
    to_node: Annotated[Strict, Field(alias="to")] = Field(description="Id of the node that follows.")
    condition: Strict | None = Field(
        None,
        description=(
            "Label of the branch that the edge belongs to: a node that completes with this outcome takes it,"
            " in lower or upper case. null or blank: always taken."
        ),
    )


class PipelineNode(_Model):
    """A step of a pipeline. Unknown keys are kept (``model_extra``)."""

    model_config = ConfigDict(extra="allow")

    id: Strict = Field(description="Unique among the nodes of the graph; at most 100 characters.")
    type: NodeType = Field(description="What the node does; decides which configuration it needs.")
    name: Strict = Field(description="Label for people.")
    config: Object = Field(
        default_factory=dict, description="The raw configuration, see `NodeConfig`; unknown keys and nulls are kept."
    )
    position: Object | None = Field(None, description='Place in the editor, such as `{"x": 50, "y": 100}`.')
    next: Annotated[list[Strict], Field(strict=True)] | None = Field(
        None, description="Ids of the following nodes, which some writers store; the edges decide."
    )


class PipelineDefinition(_Model):
    """A graph: nodes and the edges between them. It may be invalid, see ``find_issues``."""

    # The validator caches the order here: in a slot, which equality, copies and pickles ignore.
    __slots__ = ("_order",)

    nodes: list[PipelineNode] = Field(description="The nodes.")
    edges: list[PipelineEdge] = Field(description="The edges between them.")

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
    """The result of one node of a run, reported by an executor."""

    # a misspelt field, such as ``outputs``, would be lost silently
    model_config = ConfigDict(extra="forbid")

    node_id: str = Field(description="The node.")
    status: Literal["completed", "failed", "skipped", "cancelled"] = Field(description="Terminal status of the node.")
    output: dict[str, Any] | None = Field(None, description="JSON object that the node produced.")
    error: str | None = Field(None, description="Reason of the failure.")
    duration_ms: StrictInt32 = Field(0, description="Time taken, in milliseconds.")
    retry_count: StrictInt32 = Field(0, description="Retries made, so 0 after one attempt.")


def _branch(value: object, info: ValidationInfo) -> object:
    check_branch(value)
    if value is not None and info.data.get("status", "completed") != "completed":
        raise ValueError("only a completed node takes a branch")
    return value


class NodeResult(NodeExecutionResult):
    """The result of an attempt of a node."""

    attempt: Annotated[int, Field(strict=True, ge=1, le=MAX_INT32)] | None = Field(
        None,
        description=(
            "The attempt that it is about, 1 for the first: a late report about an earlier one is "
            "recognised. null: the current one."
        ),
    )
    retryable: StrictBool | None = Field(
        None,
        description="Whether a failed attempt is retried while retries are left; null: as `retry` of the call says.",
    )
    branch: Annotated[bool | str | None, PlainValidator(_branch)] = Field(
        None,
        description=(
            "The outcome of a completed node, which decides the edges that it takes, see "
            "`untaken_successors`; null: all."
        ),
    )


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


_OF_PIPELINES = {
    "name": "Name for people, 1 to 255 characters.",
    "description": "Free text.",
    "status": "Only an `active` pipeline can be run.",
    "nodes": "The nodes as JSON objects, see `PipelineNode`; unknown keys are kept.",
    "edges": "The edges as JSON objects, see `PipelineEdge`; unknown keys are kept.",
    "timeout_seconds": "Longest duration of a run, in seconds; null or 0: no limit.",
    "max_retries_per_node": "Retries of a failed node, so 3 means up to 4 attempts.",
    "retry_backoff_base": "First retry delay, in seconds; it doubles with each retry.",
    "retry_backoff_max": "Longest retry delay, in seconds.",
    "max_running": "Most runs that `claim` lets run at the same time; 0: no limit.",
}
"""The descriptions of the fields that a pipeline has as it is written, changed and read."""


class _ShownAs:
    """Shows a type in the JSON Schema of a field that takes more, or of which nothing is checked."""

    def __init__(self, model: type[BaseModel]) -> None:
        self.model = model

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        self.model.model_rebuild()
        return handler(list_schema(self.model.__pydantic_core_schema__))


class PipelineCreate(_Schema):
    """A pipeline to be stored; the graph is checked when it is written, and raw JSON is stored as it is."""

    name: Name = Field(description=_OF_PIPELINES["name"])
    description: Text | None = Field(None, description=_OF_PIPELINES["description"])
    status: PipelineStatus = Field(PipelineStatus.DRAFT, description=_OF_PIPELINES["status"])
    nodes: Annotated[list[Any], Field(strict=True), _ShownAs(PipelineNode)] = Field(
        default_factory=list, description=_OF_PIPELINES["nodes"]
    )
    edges: Annotated[list[Any], Field(strict=True), _ShownAs(PipelineEdge)] = Field(
        default_factory=list, description=_OF_PIPELINES["edges"]
    )
    timeout_seconds: Int32 | None = Field(3600, description=_OF_PIPELINES["timeout_seconds"])
    max_retries_per_node: Retries = Field(3, description=_OF_PIPELINES["max_retries_per_node"])
    retry_backoff_base: Seconds = Field(1.0, description=_OF_PIPELINES["retry_backoff_base"])
    retry_backoff_max: Seconds = Field(60.0, description=_OF_PIPELINES["retry_backoff_max"])
    max_running: Retries = Field(0, description=_OF_PIPELINES["max_running"])


class PipelineUpdate(_Schema):
    """The fields of a pipeline to be changed: those given (``model_fields_set``), as in ``PipelineCreate``."""

    name: Name | None = Field(None, description=_OF_PIPELINES["name"])
    description: Text | None = Field(None, description=_OF_PIPELINES["description"])
    status: PipelineStatus | None = Field(None, description=_OF_PIPELINES["status"])
    nodes: Annotated[list[Any], Field(strict=True), _ShownAs(PipelineNode)] | None = Field(
        None, description=_OF_PIPELINES["nodes"]
    )
    edges: Annotated[list[Any], Field(strict=True), _ShownAs(PipelineEdge)] | None = Field(
        None, description=_OF_PIPELINES["edges"]
    )
    timeout_seconds: Int32 | None = Field(None, description=_OF_PIPELINES["timeout_seconds"])
    max_retries_per_node: Retries | None = Field(None, description=_OF_PIPELINES["max_retries_per_node"])
    retry_backoff_base: Seconds | None = Field(None, description=_OF_PIPELINES["retry_backoff_base"])
    retry_backoff_max: Seconds | None = Field(None, description=_OF_PIPELINES["retry_backoff_max"])
    max_running: Retries | None = Field(None, description=_OF_PIPELINES["max_running"])

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

    id: int = Field(description="Id of the pipeline.")
    name: str = Field(description=_OF_PIPELINES["name"])
    description: str | None = Field(description=_OF_PIPELINES["description"])
    status: PipelineStatus = Field(description=_OF_PIPELINES["status"])
    status_changed_at: datetime | None = Field(
        description="Since when it has its status; null where that is older than this column."
    )
    nodes: Annotated[Any, _ShownAs(PipelineNode)] = Field(description=_OF_PIPELINES["nodes"])
    edges: Annotated[Any, _ShownAs(PipelineEdge)] = Field(description=_OF_PIPELINES["edges"])
    version: int = Field(description="Number of the graph; each edit of the graph adds one.")
    revision: int = Field(description="Number of the row, for `expected_revision`; each edit adds one, counters don't.")
    timeout_seconds: int | None = Field(description=_OF_PIPELINES["timeout_seconds"])
    max_retries_per_node: int = Field(description=_OF_PIPELINES["max_retries_per_node"])
    retry_backoff_base: float = Field(description=_OF_PIPELINES["retry_backoff_base"])
    retry_backoff_max: float = Field(description=_OF_PIPELINES["retry_backoff_max"])
    max_running: int = Field(description=_OF_PIPELINES["max_running"])
    run_count: int = Field(description="Number of runs that were created.")
    success_count: int = Field(description="Number of runs that completed.")
    error_count: int = Field(description="Number of runs that failed or timed out.")
    last_run: datetime | None = Field(description="When the last run was created; null: never.")
    created_at: datetime | None = Field(description="When it was created.")
    updated_at: datetime | None = Field(description="When it was last edited.")

    @property
    def definition(self) -> PipelineDefinition:
        """The typed graph, parsed on each use.

        Raises:
            InvalidPipelineError: The stored JSON is not a graph.
        """
        return PipelineDefinition.from_json(self.nodes, self.edges)

    def to_create(self) -> PipelineCreate:
        """A draft with the same fields and graph, unknown keys included: to be edited and stored as another pipeline.

        Raises:
            ValidationError: What is stored was written before the rules of ``PipelineCreate``.
        """
        fields = {name: getattr(self, name) for name in PipelineCreate.model_fields}
        return PipelineCreate.model_validate(fields | {"status": PipelineStatus.DRAFT})


class PipelineVersion(_Read):
    """A version of a pipeline's graph."""

    version: int = Field(description="Its number.")
    node_count: int = Field(description="How many nodes it has.")
    created_at: datetime = Field(description="When it was written.")


class RunSummary(_Read):
    """A run as a list shows it; times are the database's, ``duration_seconds`` is rounded."""

    id: int = Field(description="Id of the run.")
    pipeline_id: int = Field(description="Its pipeline.")
    pipeline_version: int | None = Field(description="The version of the graph that it is bound to; null: it has none.")
    status: RunStatus = Field(description="Its status.")
    current_node: str | None = Field(description="The node that was started last.")
    error_message: str | None = Field(description="Why it failed, timed out or was cancelled.")
    failed_node: str | None = Field(description="The first node, in execution order, that failed.")
    duration_seconds: int = Field(description="From its start to its end, in seconds, rounded.")
    worker_id: str | None = Field(description="The worker that holds it, or held it when it ended.")
    claim_count: int = Field(description="How often it was claimed.")
    lapsed_claims: int = Field(description="How many of these claims ended because the lease ran out.")
    lease_expires_at: datetime | None = Field(description="Until when its worker holds it; null: no worker does.")
    priority: int = Field(description="Runs with a higher one are claimed first.")
    run_at: datetime | None = Field(description="The time before which no worker was to claim it.")
    waits_until: datetime | None = Field(
        description="A pending run isn't claimed before: it waits for `run_at` or for the retry of a node."
    )
    resumed_from: int | None = Field(
        description="The run that it takes completed nodes over from; null once that one is deleted."
    )
    started_at: datetime | None = Field(description="When it was first started.")
    completed_at: datetime | None = Field(description="When it ended.")
    created_at: datetime | None = Field(description="When it was created.")


class RunRead(RunSummary):
    """A stored run."""

    trigger_data: Any = Field(description="The JSON input.")
    logs: Any = Field(description="The column `logs`, which raw writers fill; `RunRepository.logs` reads all entries.")
    idempotency_key: str | None = Field(description="The key that it was created with.")


class ClaimedRun(RunRead):
    """A run that its worker has just claimed."""

    token: int = Field(
        validation_alias=AliasChoices("claim_token", "token"),
        repr=False,
        description="Names the claim: the worker's calls on the run need it.",
    )


class LogEntry(_Read):
    """An entry of a run's log."""

    id: int = Field(
        description="Its place in the log. Entries that raw writers put into the column `logs` have negative ones."
    )
    entry: Any = Field(description="JSON.")
    created_at: datetime | None = Field(description="When it was appended; null for an entry of the column.")


class NodeRunRead(_Read):
    """A node of a stored run."""

    id: int = Field(description="Id of the node run.")
    run_id: int = Field(description="Its run.")
    node_id: str = Field(description="Id of the node in the graph.")
    node_type: str = Field(description="Its type.")
    status: NodeStatus = Field(description="Its status.")
    input_data: Any = Field(description="JSON that it was started with.")
    output_data: Any = Field(description="JSON that it produced.")
    error_message: str | None = Field(description="Why its last attempt failed.")
    retry_count: int = Field(description="Retries made, so 0 in the first attempt.")
    position: int | None = Field(description="Its place in execution order, from 0.")
    predecessors: list[int] | None = Field(description="Positions of the nodes before it.")
    successors: list[int] | None = Field(description="Positions of the nodes that follow it.")
    untaken: list[int] | None = Field(
        description="Positions of the successors that it didn't take when it completed; null: it took all."
    )
    taken_from: int | None = Field(description="The run that executed it, where a resumed run took it over.")
    available_at: datetime | None = Field(description="When its retry is due.")
    started_at: datetime | None = Field(description="When its last attempt was started.")
    completed_at: datetime | None = Field(description="When it ended.")
    duration_ms: int = Field(description="Duration of the last attempt, in milliseconds.")


class NodeState(_Read):
    """A node run after a transition."""

    run_id: int = Field(description="The run.")
    node_id: str = Field(description="The node.")
    node_type: str = Field(description="Its type.")
    status: NodeStatus = Field(description="Its status.")
    attempt: int = Field(
        description="The number of the current attempt, 1 for the first; of a pending node that of the next one."
    )
    available_at: datetime | None = Field(description="When its retry is due.")
    error_message: str | None = Field(description="Why the last attempt failed.")


class StartedNode(_Read):
    """An attempt of a node that is running: what a worker executes."""

    node_id: str = Field(description="The node.")
    node_type: str = Field(description="Its type.")
    attempt: int = Field(description="The number of the attempt, 1 for the first.")
    inputs: dict[str, Any] | None = Field(
        None,
        description=(
            "The outputs of the completed predecessors that take it, by node id; null unless they were asked for."
        ),
    )


class Step(_Read):
    """What ``advance`` did."""

    status: RunStatus = Field(description="The run's status.")
    started: tuple[StartedNode, ...] = Field((), description="The nodes that the call started, in execution order.")
    running: tuple[StartedNode, ...] = Field((), description="The nodes that are running, where the call started none.")
    next_due: datetime | None = Field(None, description="When the next retry is due, where the call started no node.")

    @field_validator("started", "running", mode="before")
    @classmethod
    def _none_is_empty(cls, value: object) -> object:
        return () if value is None else value


class RunStatistics(_Read):
    """Counts and durations of a pipeline's latest runs."""

    runs: dict[RunStatus, int] = Field(description="Number of runs by status.")
    success_rate: float | None = Field(
        description="Completed runs among those that completed, failed or timed out, 0 to 1; null before the first."
    )
    duration_p50: timedelta | None = Field(description="Median duration of the completed runs.")
    duration_p95: timedelta | None = Field(description="Duration that 95 % of the completed runs did not exceed.")


class ChangedRuns(_Read):
    """What a call of ``resume_all`` or ``cancel_all`` did."""

    runs: tuple[RunRead, ...] = Field(description="The resumed or cancelled runs.")
    refused: dict[int, str] = Field(description="Why others could not be, by their ids.")
    next_cursor: int | None = Field(description="The `after=` of the next call; null: no older run is left.")


class PurgeResult(_Read):
    """What a call of ``RunRepository.purge`` did."""

    deleted: int = Field(description="Number of deleted runs.")
    kept: tuple[int, ...] = Field(
        description="Ids of old runs that could not be deleted, because rows of other tables refer to them."
    )
    next_cursor: str | None = Field(description="The `after=` of the next call; null: no older run is left.")


class Page(_Read, Generic[T]):
    """One page of a list; ``next_cursor`` is the ``after=`` of the next page, ``None`` on the last."""

    items: tuple[T, ...] = Field(description="The items of the page.")
    next_cursor: int | None = Field(description="The `after` of the next page; null on the last.")
