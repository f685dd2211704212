"""ORM classes of the tables in schema ``circle``, and the registration of the pre-insert and pre-update hooks.

No queries are here. The hooks check what passes SQLAlchemy's unit of work and ``insert(Pipeline)`` and
``update(Pipeline)``; the database's own guards hold for every other path.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    DateTime,
    Float,
    ForeignKey,
    Identity,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Result,
    String,
    Table,
    Text,
    event,
    inspect,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.dialects.postgresql.base import ischema_names
from sqlalchemy.ext.mutable import MutableList
from sqlalchemy.orm import (
    DeclarativeBase,
    InstanceState,
    Mapped,
    Mapper,
    ORMExecuteState,
    Session,
    mapped_column,
    validates,
)
from sqlalchemy.sql.elements import BindParameter, ClauseElement
from sqlalchemy.sql.naming import conv
from sqlalchemy.types import UserDefinedType

from . import hooks
from .arguments import check_json
from .lifecycle import NodeStatus, PipelineStatus, RunStatus
from .models import PipelineDefinition

SCHEMA = "circle"

metadata = MetaData(
    schema=SCHEMA,
    naming_convention={
        "ix": "idx_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
        "pk": "%(table_name)s_pkey",
    },
)


class Base(DeclarativeBase):
    """Base of the ORM classes."""

    metadata = metadata
    type_annotation_map = {datetime: DateTime(timezone=True), str: Text(), float: Float()}  # noqa: RUF012 (SQLAlchemy's)


class JSONList(MutableList[Any]):
    """A JSON list that tracks edits in place; an edit inside an item is not tracked (assign the item again)."""

    @classmethod
    def coerce(cls, key: str, value: object) -> JSONList | None:  # noqa: ARG003 - SQLAlchemy's signature
        """Take any list; another value of a legacy row becomes the only item, so that the row can be read."""
        if value is None or isinstance(value, cls):
            return value
        return cls(value if isinstance(value, list | tuple) else [value])


Table(  # Alembic's own: a host that autogenerates with this metadata would propose to drop it
    "alembic_version",
    metadata,
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name=conv("alembic_version_pkc")),
)


def _status_check(table: str, statuses: type[StrEnum]) -> CheckConstraint:
    values = ", ".join(f"'{status}'" for status in statuses)
    return CheckConstraint(f"status IN ({values})", name=conv(f"{table}_status_check"))


class Pipeline(Base):
    """A stored pipeline.

    ``nodes`` and ``edges`` take raw JSON lists or Pydantic objects and hold JSON. The graph is checked when the object
    is flushed: ``InvalidPipelineError`` unless it is valid. ``allow_incomplete=True`` (not a column) accepts a draft
    without nodes or with missing configuration. Loading a row never checks it.
    """

    __tablename__ = "pipelines"
    __table_args__ = (
        _status_check("pipelines", PipelineStatus),
        CheckConstraint(
            "timeout_seconds >= 0 AND max_retries_per_node >= 0"
            " AND retry_backoff_base >= 0 AND retry_backoff_base <= 31536000"
            " AND retry_backoff_max >= 0 AND retry_backoff_max <= 31536000"
            " AND run_count >= 0 AND success_count >= 0 AND error_count >= 0"
            " AND isfinite(created_at) AND isfinite(updated_at) AND isfinite(last_run)",
            name=conv("ck_pipelines"),
        ),
        Index("idx_pipelines_status", "status"),
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    name: Mapped[str] = mapped_column(String(255))
    description: Mapped[str | None]
    status: Mapped[str] = mapped_column(String(50), server_default=text("'draft'"))
    nodes: Mapped[list[Any]] = mapped_column(
        JSONList.as_mutable(JSONB(none_as_null=True)), default=list, server_default=text("'[]'")
    )
    edges: Mapped[list[Any]] = mapped_column(
        JSONList.as_mutable(JSONB(none_as_null=True)), default=list, server_default=text("'[]'")
    )
    created_at: Mapped[datetime | None] = mapped_column(server_default=text("CURRENT_TIMESTAMP"))
    updated_at: Mapped[datetime | None] = mapped_column(server_default=text("CURRENT_TIMESTAMP"))
    last_run: Mapped[datetime | None]
    run_count: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    success_count: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    error_count: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    # evaluates_none: None means "no limit"; left out, the column has its default
    timeout_seconds: Mapped[int | None] = mapped_column(Integer().evaluates_none(), server_default=text("3600"))
    max_retries_per_node: Mapped[int] = mapped_column(Integer, server_default=text("3"))
    retry_backoff_base: Mapped[float] = mapped_column(Float, server_default=text("1.0"))
    retry_backoff_max: Mapped[float] = mapped_column(Float, server_default=text("60.0"))
    version: Mapped[int] = mapped_column(Integer, server_default=text("1"))

    allow_incomplete = False

    def __init__(self, *, allow_incomplete: bool = False, **values: Any) -> None:
        super().__init__(**values)
        self.allow_incomplete = allow_incomplete
        # a new object has the lists that it will store, so that they can be appended to
        for key in ("nodes", "edges"):
            if key not in values and "definition" not in values:
                setattr(self, key, [])

    @validates("nodes", "edges")
    def _take_json(self, key: Literal["nodes", "edges"], value: object) -> object:
        hooks.check_list(key, value)
        return value

    @property
    def definition(self) -> PipelineDefinition:
        """The typed graph, parsed on each use; assign one to replace nodes and edges.

        Raises:
            InvalidPipelineError: What is stored is not a graph.
        """
        return PipelineDefinition.from_json(self.nodes, self.edges)

    @definition.setter
    def definition(self, definition: PipelineDefinition) -> None:
        self.nodes = list(definition.nodes)
        self.edges = list(definition.edges)


class PipelineRun(Base):
    """One run of a pipeline, bound to the version of the graph that it began with."""

    __tablename__ = "pipeline_runs"
    __table_args__ = (
        _status_check("pipeline_runs", RunStatus),
        CheckConstraint(
            "circle.is_valid_run(status, duration_seconds, created_at, started_at, completed_at, claim_token,"
            " claim_count, worker_id, lease_expires_at)",
            name=conv("ck_pipeline_runs_leased"),
        ),
        Index("idx_pipeline_runs_pipeline_id", "pipeline_id"),
        Index("idx_pipeline_runs_status", "status"),
        Index("idx_pipeline_runs_pending", "id", postgresql_where=text("status = 'pending'")),
        Index("idx_pipeline_runs_running", "id", postgresql_where=text("status = 'running'")),
        Index("idx_pipeline_runs_history", "pipeline_id", "id"),
        Index("idx_pipeline_runs_status_history", "status", "id"),
        Index("idx_pipeline_runs_completed_at", "completed_at", postgresql_where=text("completed_at IS NOT NULL")),
        Index(
            "idx_pipeline_runs_idempotency_key",
            "pipeline_id",
            "idempotency_key",
            unique=True,
            postgresql_where=text("idempotency_key IS NOT NULL"),
        ),
    )

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    pipeline_id: Mapped[int] = mapped_column(ForeignKey("circle.pipelines.id", ondelete="CASCADE"))
    status: Mapped[str] = mapped_column(String(50), server_default=text("'pending'"))
    started_at: Mapped[datetime | None]
    completed_at: Mapped[datetime | None]
    current_node: Mapped[str | None] = mapped_column(String(100))
    logs: Mapped[Any | None] = mapped_column(JSONB(none_as_null=True), server_default=text("'[]'"))
    trigger_data: Mapped[Any | None] = mapped_column(JSONB(none_as_null=True), server_default=text("'{}'"))
    error_message: Mapped[str | None]
    created_at: Mapped[datetime | None] = mapped_column(server_default=text("CURRENT_TIMESTAMP"))
    duration_seconds: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    pipeline_version: Mapped[int | None] = mapped_column(Integer)
    failed_node: Mapped[str | None] = mapped_column(String(100))
    worker_id: Mapped[str | None] = mapped_column(String(255))
    claim_token: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    claim_count: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    lease_expires_at: Mapped[datetime | None]
    idempotency_key: Mapped[str | None] = mapped_column(String(255))


class PipelineNodeRun(Base):
    """One node of a run; ``position`` is its place in execution order, from 0."""

    __tablename__ = "pipeline_node_runs"
    __table_args__ = (
        _status_check("pipeline_node_runs", NodeStatus),
        CheckConstraint(
            "circle.is_valid_node_run(node_type, status, retry_count, duration_ms, started_at, completed_at)",
            name=conv("ck_pipeline_node_runs"),
        ),
        Index("idx_pipeline_node_runs_run_id", "run_id"),
        Index("idx_pipeline_node_runs_run_node", "run_id", "node_id", unique=True),
        Index("idx_pipeline_node_runs_run_position", "run_id", "position", unique=True),
    )

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    run_id: Mapped[int] = mapped_column(ForeignKey("circle.pipeline_runs.id", ondelete="CASCADE"))
    node_id: Mapped[str] = mapped_column(String(100))
    node_type: Mapped[str] = mapped_column(String(50))
    status: Mapped[str] = mapped_column(String(50), server_default=text("'pending'"))
    input_data: Mapped[Any | None] = mapped_column(JSONB(none_as_null=True), server_default=text("'{}'"))
    output_data: Mapped[Any | None] = mapped_column(JSONB(none_as_null=True), server_default=text("'{}'"))
    error_message: Mapped[str | None]
    retry_count: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    started_at: Mapped[datetime | None]
    completed_at: Mapped[datetime | None]
    duration_ms: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    position: Mapped[int | None] = mapped_column(Integer)
    predecessors: Mapped[list[int] | None] = mapped_column(ARRAY(Integer))
    successors: Mapped[list[int] | None] = mapped_column(ARRAY(Integer))
    available_at: Mapped[datetime | None]


class CompiledNode(UserDefinedType[Any]):
    """A node of a compiled graph; the view ``circle.pipeline_version_nodes`` shows them as rows."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        """Name the type in SQL."""
        return "circle.compiled_node"


ischema_names["circle.compiled_node"] = CompiledNode  # for reflection, which ``alembic check`` compares with


class PipelineVersion(Base):
    """A version of a graph; written by the database, never changed."""

    __tablename__ = "pipeline_versions"

    pipeline_id: Mapped[int] = mapped_column(ForeignKey("circle.pipelines.id", ondelete="CASCADE"), primary_key=True)
    version: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    nodes: Mapped[Any] = mapped_column(JSONB)
    edges: Mapped[Any] = mapped_column(JSONB)
    node_count: Mapped[int] = mapped_column(Integer)
    compiled: Mapped[Any] = mapped_column(ARRAY(CompiledNode))
    created_at: Mapped[datetime] = mapped_column(server_default=text("clock_timestamp()"))


class PipelineCounterRow(Base):
    """A change of a pipeline's counters; written by the database. The sum of its rows counts."""

    __tablename__ = "pipeline_counters"
    __table_args__ = (PrimaryKeyConstraint("pipeline_id", "id"),)

    pipeline_id: Mapped[int] = mapped_column(Integer)
    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True))
    pending: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    running: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    completed: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    failed: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    cancelled: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    timeout: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    run_count: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    success_count: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    error_count: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    last_run: Mapped[datetime | None]


class XID8(UserDefinedType[str]):
    """The id of a transaction, never reused; SQLAlchemy has no type for it."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        """Name the type in SQL."""
        return "XID8"


ischema_names["xid8"] = XID8  # for reflection, which ``alembic check`` compares with


class PipelineEventRow(Base):
    """An event as a row; written by the database, never changed. ``EventRepository`` reads them without a gap."""

    __tablename__ = "pipeline_events"
    __table_args__ = (
        PrimaryKeyConstraint("xid", "id"),
        Index("idx_pipeline_events_run", "run_id", "xid", "id"),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity())
    xid: Mapped[str] = mapped_column(XID8)
    run_id: Mapped[int] = mapped_column(BigInteger)
    node_id: Mapped[str | None] = mapped_column(String(100))
    type: Mapped[str] = mapped_column(String(50))
    data: Mapped[Any] = mapped_column(JSONB, server_default=text("'{}'"))
    created_at: Mapped[datetime] = mapped_column(server_default=text("clock_timestamp()"))


# --- the hooks -------------------------------------------------------------------------------------------------------

_GRAPH = ("nodes", "edges")
_JSON_COLUMNS = {PipelineRun: ("trigger_data", "logs"), PipelineNodeRun: ("input_data", "output_data")}


@event.listens_for(Pipeline, "before_insert")
@event.listens_for(Pipeline, "before_update")
def _before_pipeline(_mapper: Mapper[Pipeline], _connection: Connection, pipeline: Pipeline) -> None:
    state = inspect(pipeline)
    keys = {key for key in state.mapper.column_attrs.keys() if state.attrs[key].history.has_changes()}  # noqa: SIM118
    if not state.persistent or keys.intersection(_GRAPH) or ("status" in keys and pipeline.status == "active"):
        # both halves of the graph together, and the status, which decides whether it may be incomplete
        keys |= {*_GRAPH, "status"} if state.persistent or "status" in keys else set(_GRAPH)
    values = {key: getattr(pipeline, key) for key in keys}
    for key, value in hooks.prepare_fields(values, allow_incomplete=pipeline.allow_incomplete).items():
        if value != values[key]:
            setattr(pipeline, key, value)


def _before_json(_mapper: Mapper[Any], _connection: Connection, row: PipelineRun | PipelineNodeRun) -> None:
    state: InstanceState[Any] = inspect(row)
    for key in _JSON_COLUMNS[type(row)]:
        if state.attrs[key].history.has_changes():
            check_json(getattr(row, key), key)


for _class in _JSON_COLUMNS:
    event.listen(_class, "before_insert", _before_json)
    event.listen(_class, "before_update", _before_json)


@event.listens_for(Session, "do_orm_execute")
def _before_statement(state: ORMExecuteState) -> Result[Any] | None:
    """Check ``insert(Pipeline)`` and ``update(Pipeline)``, for which mapper events don't fire."""
    statement: Any = state.statement
    if (
        not (state.is_insert or state.is_update)
        or state.bind_mapper is None
        or state.bind_mapper.class_ is not Pipeline
        or getattr(statement, "select", None) is not None  # INSERT ... SELECT: only the database sees the rows
    ):
        return None
    fixed = _by_name(statement._values or {})  # noqa: SLF001 - SQLAlchemy has no public way to the values

    def graph(row: Mapping[Any, Any]) -> dict[str, Any]:
        values = fixed | _by_name(row)
        if state.is_insert:
            values = {key: [] for key in _GRAPH} | values
        # the database checks SQL expressions, but a graph can't be one
        values = {key: value for key, value in values.items() if key in _GRAPH or not isinstance(value, ClauseElement)}
        incomplete = bool(state.execution_options.get("allow_incomplete"))
        return hooks.prepare_fields(values, allow_incomplete=incomplete)

    if statement._multi_values:  # noqa: SLF001
        names = [column.key for column in Pipeline.__table__.columns]
        rows = [
            _by_name(row if isinstance(row, Mapping) else dict(zip(names, row, strict=False)))
            for rows in statement._multi_values  # noqa: SLF001
            for row in rows
        ]
        statement = statement._generate()  # noqa: SLF001
        statement._multi_values = (  # noqa: SLF001
            [row | graph(row) for row in rows],
        )
        return state.invoke_statement(statement)
    if isinstance(state.parameters, Mapping):
        return state.invoke_statement(params=graph(state.parameters))
    if state.parameters:
        return state.invoke_statement(params=[graph(row) for row in state.parameters])
    return state.invoke_statement(statement.values(graph({})))


def _by_name(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Name columns by their keys, and take literals out of their bind parameters; SQL expressions stay."""
    return {
        key if isinstance(key, str) else str(key.key): value.value if isinstance(value, BindParameter) else value
        for key, value in row.items()
    }
