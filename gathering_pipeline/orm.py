"""ORM classes of the tables in schema ``circle``, and the registration of the pre-insert and pre-update hooks.

No queries are here. The hooks check what passes SQLAlchemy's unit of work and ``insert(Pipeline)`` and
``update(Pipeline)``; the database's own guards hold for every other path.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from enum import StrEnum
from itertools import chain, groupby
from typing import Any, Literal, cast

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    DateTime,
    Dialect,
    FetchedValue,
    Float,
    ForeignKey,
    Identity,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Result,
    SmallInteger,
    String,
    Table,
    Text,
    Update,
    bindparam,
    event,
    inspect,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.dialects.postgresql.base import ischema_names
from sqlalchemy.exc import DontWrapMixin, InvalidRequestError
from sqlalchemy.ext.mutable import MutableList
from sqlalchemy.orm import (
    DeclarativeBase,
    InstanceState,
    Load,
    Mapped,
    Mapper,
    ORMExecuteState,
    Session,
    mapped_column,
    relationship,
    undefer,
    validates,
)
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.sql.elements import BindParameter, ClauseElement
from sqlalchemy.sql.naming import conv
from sqlalchemy.sql.operators import OperatorType
from sqlalchemy.types import TypeDecorator, TypeEngine, UserDefinedType

from . import hooks
from .arguments import check_json
from .errors import InvalidDataError
from .json_values import quote
from .lifecycle import HistoryKind, NodeStatus, PipelineStatus, RunStatus
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


class NaiveTimeError(InvalidDataError, DontWrapMixin):
    """``InvalidDataError`` about a time; SQLAlchemy passes it on as it is, where it wraps others."""


class Time(TypeDecorator[datetime]):
    """A time with an offset from UTC. One without would be stored as the time zone of the session has it."""

    impl = DateTime(timezone=True)
    cache_ok = True

    @property
    def python_type(self) -> type[datetime]:
        """The type of its values."""
        return datetime

    def coerce_compared_value(self, op: OperatorType | None, value: Any) -> TypeEngine[Any]:
        """As of the implementation for what isn't a time, such as an interval."""
        return self if isinstance(value, datetime) else self.impl_instance.coerce_compared_value(op, value)

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Refuse a time without an offset.

        Raises:
            InvalidDataError: It has none.
        """
        if isinstance(value, datetime) and value.utcoffset() is None:
            raise NaiveTimeError(f"a time must have an offset from UTC, not {quote(value)}: add tzinfo=UTC")
        return value


class Base(DeclarativeBase):
    """Base of the ORM classes."""

    metadata = metadata
    type_annotation_map = {datetime: Time(), str: Text(), float: Float()}  # noqa: RUF012 (SQLAlchemy's)


class JSONList(MutableList[Any]):
    """A JSON list that tracks edits in place; an edit inside an item is not tracked (assign the item again)."""

    @classmethod
    def coerce(cls, key: str, value: object) -> JSONList | None:  # noqa: ARG003 - SQLAlchemy's signature
        """Take any list; another value of a legacy row becomes the only item, so that the row can be read."""
        if value is None or isinstance(value, cls):
            return value
        return cls(value if isinstance(value, list | tuple) else [value])


class _UnsetList(JSONList):
    """What an attribute that nobody has set shows; an edit in place sets it."""

    def changed(self) -> None:
        """Become the value of the new object that has none."""
        for state, key in list(self._parents.items()):
            if state.key is None and key not in state.dict:
                setattr(state.obj(), key, self)
        super().changed()


Table(  # Alembic's own: a host that autogenerates with this metadata would propose to drop it
    "alembic_version",
    metadata,
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name=conv("alembic_version_pkc")),
)


def _one_of(column: str, values: type[StrEnum]) -> str:
    listed = ", ".join(f"'{value}'" for value in values)
    return f"{column} IN ({listed})"


def _value_check(column: str, values: type[StrEnum], name: str) -> CheckConstraint:
    return CheckConstraint(_one_of(column, values), name=conv(name))


def _by_trigger() -> Any:
    """A column that triggers may complete, so that it is read back after a write."""
    return mapped_column(server_default=FetchedValue(), server_onupdate=FetchedValue())


def _reading(order_by: Any = False) -> Any:
    """A relationship to load explicitly, by ``selectinload`` or ``joinedload``: it is read only, and deletes nothing.

    A flush leaves foreign keys to their columns and cascades to the database. Access to what isn't loaded raises, in
    async sessions as in others: it would be a query for each object.
    """
    return relationship(viewonly=True, lazy="raise", order_by=order_by)


class Pipeline(Base):
    """A stored pipeline.

    ``nodes`` and ``edges`` take raw JSON lists or Pydantic objects and hold JSON. The graph is checked when the object
    is flushed: ``InvalidPipelineError`` unless it is valid. ``allow_incomplete=True`` (not a column) accepts a draft
    without nodes or with missing configuration. Loading a row never checks it.

    ``revision`` is SQLAlchemy's version counter: the flush of an object whose row was edited since it was loaded raises
    ``sqlalchemy.orm.exc.StaleDataError``. ``Session.bulk_update_mappings`` needs the ``revision`` in each mapping.

    ``runs`` are all its runs, oldest first; like each relationship here it is read only, and is loaded explicitly.
    """

    __tablename__ = "pipelines"
    __table_args__ = (
        _value_check("status", PipelineStatus, "pipelines_status_check"),
        CheckConstraint(
            "timeout_seconds >= 0 AND max_retries_per_node >= 0"
            " AND retry_backoff_base >= 0 AND retry_backoff_base <= 31536000"
            " AND retry_backoff_max >= 0 AND retry_backoff_max <= 31536000"
            " AND run_count >= 0 AND success_count >= 0 AND error_count >= 0"
            " AND circle.are_readable_times(LEAST(created_at, updated_at, last_run),"
            " GREATEST(created_at, updated_at, last_run))",
            name=conv("ck_pipelines"),
        ),
        CheckConstraint("max_running >= 0", name=conv("ck_pipelines_max_running")),
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
    max_running: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    version: Mapped[int] = mapped_column(Integer, server_default=text("1"), server_onupdate=FetchedValue())
    revision: Mapped[int] = mapped_column(BigInteger, server_default=text("1"), server_onupdate=FetchedValue())
    status_changed_at: Mapped[datetime | None] = _by_trigger()

    runs: Mapped[list[PipelineRun]] = _reading("PipelineRun.id")

    __mapper_args__ = {  # noqa: RUF012 (SQLAlchemy's)
        "version_id_col": revision,
        "version_id_generator": False,  # the database counts, for every writer
        "eager_defaults": True,
    }

    allow_incomplete = False

    def __init__(self, *, allow_incomplete: bool = False, **values: Any) -> None:
        super().__init__(**values)
        self.allow_incomplete = allow_incomplete

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
        _value_check("status", RunStatus, "pipeline_runs_status_check"),
        CheckConstraint(
            "circle.is_valid_run(status, duration_seconds, created_at, started_at, completed_at, claim_token,"
            " claim_count, lapsed_claims, worker_id, lease_expires_at, run_at, waits_until)",
            name=conv("ck_pipeline_runs_leased"),
        ),
        Index("idx_pipeline_runs_pipeline_id", "pipeline_id"),
        Index(
            "idx_pipeline_runs_resumed_from",
            "resumed_from",
            unique=True,
            postgresql_where=text("resumed_from IS NOT NULL"),
        ),
        Index("idx_pipeline_runs_status", "status"),
        Index(
            "idx_pipeline_runs_queue",
            "pipeline_id",
            text("priority DESC"),
            "id",
            postgresql_where=text("status = 'pending' AND waits_until IS NULL AND pipeline_version IS NOT NULL"),
        ),
        Index(
            "idx_pipeline_runs_waiting",
            "waits_until",
            postgresql_where=text("status = 'pending' AND waits_until IS NOT NULL"),
        ),
        Index("idx_pipeline_runs_running", "pipeline_id", "id", postgresql_where=text("status = 'running'")),
        Index("idx_pipeline_runs_history", "pipeline_id", "id"),
        Index("idx_pipeline_runs_status_history", "status", "id"),
        Index(
            "idx_pipeline_runs_completed_at", "completed_at", "id", postgresql_where=text("completed_at IS NOT NULL")
        ),
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
    started_at: Mapped[datetime | None] = _by_trigger()
    completed_at: Mapped[datetime | None] = _by_trigger()
    current_node: Mapped[str | None] = mapped_column(String(100))
    logs: Mapped[Any | None] = mapped_column(JSONB(none_as_null=True), server_default=text("'[]'"))
    trigger_data: Mapped[Any | None] = mapped_column(JSONB(none_as_null=True), server_default=text("'{}'"))
    error_message: Mapped[str | None]
    created_at: Mapped[datetime | None] = mapped_column(server_default=text("CURRENT_TIMESTAMP"))
    duration_seconds: Mapped[int] = mapped_column(Integer, server_default=text("0"), server_onupdate=FetchedValue())
    pipeline_version: Mapped[int | None] = mapped_column(Integer, server_default=FetchedValue())
    failed_node: Mapped[str | None] = mapped_column(String(100))
    worker_id: Mapped[str | None] = mapped_column(String(255))
    claim_token: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    claim_count: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    lease_expires_at: Mapped[datetime | None] = _by_trigger()
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    lapsed_claims: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    released_token: Mapped[int | None] = mapped_column(BigInteger)
    priority: Mapped[int] = mapped_column(SmallInteger, server_default=text("0"))
    run_at: Mapped[datetime | None]
    waits_until: Mapped[datetime | None]
    resumed_from: Mapped[int | None] = mapped_column(
        BigInteger, ForeignKey("circle.pipeline_runs.id", ondelete="SET NULL")
    )

    pipeline: Mapped[Pipeline] = _reading()
    node_runs: Mapped[list[PipelineNodeRun]] = _reading("PipelineNodeRun.position, PipelineNodeRun.id")

    __mapper_args__ = {"eager_defaults": True}  # noqa: RUF012 (SQLAlchemy's)


class PipelineNodeRun(Base):
    """One node of a run; ``position`` is its place in execution order, from 0. See ``NodeRunRead`` for the columns."""

    __tablename__ = "pipeline_node_runs"
    __table_args__ = (
        _value_check("status", NodeStatus, "pipeline_node_runs_status_check"),
        CheckConstraint(
            "circle.is_valid_node_run(node_type, status, retry_count, duration_ms, started_at, completed_at,"
            " available_at)",
            name=conv("ck_pipeline_node_runs_due"),
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
    started_at: Mapped[datetime | None] = _by_trigger()
    completed_at: Mapped[datetime | None] = _by_trigger()
    duration_ms: Mapped[int] = mapped_column(Integer, server_default=text("0"), server_onupdate=FetchedValue())
    position: Mapped[int | None] = mapped_column(Integer)
    predecessors: Mapped[list[int] | None] = mapped_column(ARRAY(Integer))
    successors: Mapped[list[int] | None] = mapped_column(ARRAY(Integer))
    available_at: Mapped[datetime | None] = _by_trigger()
    untaken: Mapped[list[int] | None] = mapped_column(ARRAY(Integer))
    taken_from: Mapped[int | None] = mapped_column(BigInteger)

    run: Mapped[PipelineRun] = _reading()

    __mapper_args__ = {"eager_defaults": True}  # noqa: RUF012 (SQLAlchemy's)


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
    leases_lost: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    last_run: Mapped[datetime | None]


class PipelineRunTag(Base):
    """A tag of a run."""

    __tablename__ = "pipeline_run_tags"
    __table_args__ = (
        PrimaryKeyConstraint("run_id", "key"),
        Index("idx_pipeline_run_tags_value", "key", "value", "run_id"),
    )

    run_id: Mapped[int] = mapped_column(BigInteger, ForeignKey("circle.pipeline_runs.id", ondelete="CASCADE"))
    key: Mapped[str] = mapped_column(String(100))
    value: Mapped[str] = mapped_column(String(255))


class PipelineRunLog(Base):
    """An entry of a run's log that ``append_log`` wrote."""

    __tablename__ = "pipeline_run_logs"
    __table_args__ = (
        PrimaryKeyConstraint("run_id", "id"),
        CheckConstraint(
            "(circle.nested_too_deep(entry) OR circle.number_too_large(entry)) IS NOT TRUE"
            " AND circle.are_readable_times(created_at, created_at)",
            name=conv("ck_pipeline_run_logs"),
        ),
    )

    run_id: Mapped[int] = mapped_column(BigInteger, ForeignKey("circle.pipeline_runs.id", ondelete="CASCADE"))
    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True))
    entry: Mapped[Any] = mapped_column(JSONB)
    created_at: Mapped[datetime] = mapped_column(server_default=text("clock_timestamp()"))


class PipelineRunHistory(Base):
    """Who took or gave up a run, or cancelled it; written by the functions that do so."""

    __tablename__ = "pipeline_run_history"
    __table_args__ = (
        PrimaryKeyConstraint("run_id", "id"),
        CheckConstraint(
            f"{_one_of('kind', HistoryKind)} AND circle.are_readable_times(at, at)",
            name=conv("ck_pipeline_run_history"),
        ),
    )

    run_id: Mapped[int] = mapped_column(BigInteger, ForeignKey("circle.pipeline_runs.id", ondelete="CASCADE"))
    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True))
    at: Mapped[datetime] = mapped_column(server_default=text("clock_timestamp()"))
    kind: Mapped[str] = mapped_column(String(20))
    worker_id: Mapped[str | None] = mapped_column(String(255))
    token: Mapped[int | None] = mapped_column(BigInteger)
    reason: Mapped[str | None]


class PipelineSweep(Base):
    """The one row that says when the next sweep may begin."""

    __tablename__ = "pipeline_sweep"
    __table_args__ = (CheckConstraint("id", name=conv("ck_pipeline_sweep")),)

    id: Mapped[bool] = mapped_column(primary_key=True, server_default=text("true"))
    next_at: Mapped[datetime] = mapped_column(server_default=text("'2000-01-01 00:00:00+00'"))


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
_JSON_COLUMNS: dict[type[Base], tuple[str, ...]] = {
    PipelineRun: ("trigger_data", "logs"),
    PipelineNodeRun: ("input_data", "output_data"),
}


@event.listens_for(Pipeline.nodes, "init_scalar", retval=True, propagate=True)
def _show_nodes(pipeline: Pipeline, _value: object, dict_: dict[str, Any]) -> JSONList:
    return _unset_list(pipeline, "nodes", dict_)


@event.listens_for(Pipeline.edges, "init_scalar", retval=True, propagate=True)
def _show_edges(pipeline: Pipeline, _value: object, dict_: dict[str, Any]) -> JSONList:
    return _unset_list(pipeline, "edges", dict_)


def _unset_list(pipeline: Pipeline, key: str, dict_: dict[str, Any]) -> JSONList:
    """The list of a new object that was given none: it can be appended to, and until then ``merge`` copies nothing."""
    shown: JSONList = dict_.setdefault(f"_unset_{key}", _UnsetList())
    shown._parents[inspect(pipeline)] = key  # noqa: SLF001 - of its own subclass
    return shown


@event.listens_for(Pipeline, "before_insert", propagate=True)
@event.listens_for(Pipeline, "before_update", propagate=True)
def _before_pipeline(_mapper: Mapper[Pipeline], _connection: Connection, pipeline: Pipeline) -> None:
    state = inspect(pipeline)
    for key in ("version", "revision", "status_changed_at"):  # the database sets them, whatever was given
        if state.key is None and key in state.dict:
            delattr(pipeline, key)
        elif key != "revision" and state.attrs[key].history.has_changes() and state.session is not None:
            state.session.expire(pipeline, [key])
    keys = {key for key in state.mapper.column_attrs.keys() if state.attrs[key].history.has_changes()}  # noqa: SIM118
    if not state.persistent or keys.intersection(_GRAPH) or ("status" in keys and pipeline.status == "active"):
        # both halves of the graph together, and the status, which decides whether it may be incomplete
        keys |= {*_GRAPH, "status"} if state.persistent or "status" in keys else set(_GRAPH)
    values = {key: getattr(pipeline, key) for key in keys}
    for key, value in hooks.prepare_fields(values, allow_incomplete=pipeline.allow_incomplete).items():
        if value != values[key]:
            setattr(pipeline, key, value)
        elif key not in state.dict:
            setattr(pipeline, key, values[key])  # the list that the new object shows


def _before_json(_mapper: Mapper[Any], _connection: Connection, row: PipelineRun | PipelineNodeRun) -> None:
    state: InstanceState[Any] = inspect(row)
    if state.key is None and "pipeline_version" in state.dict:  # as for Pipeline
        del row.pipeline_version  # type: ignore[union-attr]  # only runs have it
    for key in _json_columns(type(row)):
        if state.attrs[key].history.has_changes():
            check_json(getattr(row, key), key)


for _class in _JSON_COLUMNS:
    event.listen(_class, "before_insert", _before_json, propagate=True)
    event.listen(_class, "before_update", _before_json, propagate=True)


_CHANGED = "gathering_pipeline.changed_runs"


@event.listens_for(PipelineRun, "after_update", propagate=True)
@event.listens_for(PipelineNodeRun, "after_update", propagate=True)
def _note_change(_mapper: Mapper[Any], _connection: Connection, row: PipelineRun | PipelineNodeRun) -> None:
    state: InstanceState[Any] = inspect(row)
    if state.attrs["status"].history.has_changes() and state.session is not None:
        state.session.info.setdefault(_CHANGED, set()).add(row.id if isinstance(row, PipelineRun) else row.run_id)


@event.listens_for(Session, "after_flush_postexec")
def _show_cascade(session: Session, _context: object) -> None:
    """A run ends its nodes, and a node that fails is noted in its run: let the session's other objects show it."""
    for run_id in session.info.pop(_CHANGED, ()):
        for row in list(session.identity_map.values()):
            key = {PipelineRun: "id", PipelineNodeRun: "run_id"}.get(inspect(row).mapper.base_mapper.class_)
            if key is not None and row.__dict__.get(key) == run_id:
                _expire(session, row)


def _expire(session: Session, row: object) -> None:
    """Let an object be read on access, or at once in an async session, where that is not possible."""
    session.expire(row)
    if session.get_bind(type(row)).dialect.is_async:
        with suppress(InvalidRequestError):  # its row was deleted
            session.refresh(row)


def _json_columns(class_: type) -> tuple[str, ...]:
    return next((keys for base, keys in _JSON_COLUMNS.items() if issubclass(class_, base)), ())


@event.listens_for(Session, "do_orm_execute")
def _before_statement(state: ORMExecuteState) -> Result[Any] | None:
    """Check the rows of ``insert`` and ``update`` of our classes, for which mapper events don't fire."""
    if state.is_select:
        _load_revision(state)
    if state.bind_mapper is None or not (state.is_insert or state.is_update):
        return None
    class_ = state.bind_mapper.class_
    if issubclass(class_, Pipeline):
        if getattr(state.statement, "select", None) is not None:  # only the database sees what a SELECT inserts
            return None
        result = _write_pipelines(state)
    elif keys := _json_columns(class_):
        _check_json_columns(state, keys)
        result = state.invoke_statement()
    else:  # of the application
        return None
    if state.is_update:
        _show_update(state, class_)
    return result


def _load_revision(state: ORMExecuteState) -> None:
    """Load ``revision`` in spite of ``load_only``: without it a flush wouldn't notice that the row was edited."""
    statement: Any = state.statement
    options = getattr(statement, "_with_options", ())
    elements = chain.from_iterable(getattr(option, "context", ()) for option in options)
    paths = [element.path.path for element in elements]
    if (
        not options
        or state.is_column_load
        # SQLAlchemy refuses two options about a column: defer(Pipeline.revision) stays
        or any(getattr(path[-1], "key", None) == "revision" for path in paths)
    ):
        return
    for column in statement.column_descriptions:
        entity, class_ = column["expr"], column["type"]
        if isinstance(class_, type) and issubclass(class_, Pipeline):
            statement = statement.options(undefer(entity.revision))
    # a path of classes and relationships in turns; one that ends with a column has an even length
    for way in dict.fromkeys(path[:-1] for path in paths if len(path) % 2 == 0):
        if way[1:] and issubclass(way[-1].mapper.class_, Pipeline):  # of a related class
            option: Any = Load(way[0].entity)
            for entity, relation, related in zip(way[::2], way[1::2], way[2::2], strict=False):
                option = option.defaultload(getattr(entity.entity, relation.key).of_type(related.entity))
            statement = statement.options(option.undefer(way[-1].entity.revision))
    state.statement = statement


def _check_json_columns(state: ORMExecuteState, keys: tuple[str, ...]) -> None:
    for row in _written(state):
        for key in keys:
            if not isinstance(row.get(key), ClauseElement):
                check_json(row.get(key), key)


def _write_pipelines(state: ORMExecuteState) -> Result[Any]:
    statement: Any = state.statement
    fixed = _fixed(statement)

    def graph(row: Mapping[Any, Any]) -> dict[str, Any]:
        values = fixed | _by_name(row)
        if state.is_insert:
            values = {key: [] for key in _GRAPH} | values
        # the database checks SQL expressions, but a graph can't be one
        values = {key: value for key, value in values.items() if key in _GRAPH or not isinstance(value, ClauseElement)}
        incomplete = bool(state.execution_options.get("allow_incomplete"))
        return hooks.prepare_fields(values, allow_incomplete=incomplete)

    if statement._multi_values:  # noqa: SLF001
        rows = [row | graph(row) for row in _several(statement)]
        statement = statement._generate()  # noqa: SLF001
        statement._multi_values = (rows,)  # noqa: SLF001
        return state.invoke_statement(statement)
    if isinstance(state.parameters, Mapping):
        return state.invoke_statement(params=graph(state.parameters))
    if not state.parameters:
        return state.invoke_statement(statement.values(graph({})))
    rows = [graph(row) for row in state.parameters]
    if state.is_update and not all("revision" in row for row in state.parameters):
        return _update_by_key(state, [{**row, **checked} for row, checked in zip(state.parameters, rows, strict=True)])
    return state.invoke_statement(params=rows)


def _update_by_key(state: ORMExecuteState, rows: list[dict[str, Any]]) -> Result[Any]:
    """Update rows by primary key as SQLAlchemy does, which raises ``KeyError`` for a row without ``revision``.

    Raises:
        StaleDataError: A row doesn't exist, or has another revision than the given one.
    """
    statement, mapper = state.statement, state.bind_mapper
    assert isinstance(statement, Update)
    if state.session.autoflush:
        state.session.flush()  # as before any UPDATE by rows
    assert mapper is not None
    connection = state.session.connection(bind_arguments=state.bind_arguments)
    expressions = {key: value for key, value in _fixed(statement).items() if isinstance(value, ClauseElement)}
    named = {parameter.key for parameter in statement._get_embedded_bindparams()}  # noqa: SLF001
    result: Any = None
    for keys, group in groupby(rows, key=frozenset):
        if "id" not in keys:
            raise InvalidRequestError("each row of update(Pipeline) needs the primary key, id")
        batch = [
            {f"row_{key}": value for key, value in row.items()} | {key: row[key] for key in named & keys}
            for row in group
        ]
        for table in mapper.tables:
            columns = {mapper.get_property_by_column(column).key: column for column in table.columns}
            sought = {"id", "revision"} & keys & columns.keys()
            written = (keys & columns.keys()) - sought
            values: dict[str, Any] = {key: bindparam(f"row_{key}") for key in written}
            values |= {key: value for key, value in expressions.items() if key in columns}
            if not values:
                continue
            result = connection.execute(
                update(table)
                .where(*statement._where_criteria, *(columns[key] == bindparam(f"row_{key}") for key in sought))  # noqa: SLF001
                .values({columns[key]: value for key, value in values.items()}),
                batch,
            )
            if result.rowcount != len(batch) and not statement._where_criteria:  # noqa: SLF001
                raise StaleDataError(f"{len(batch)} rows of {table.name} were to be updated, {result.rowcount} matched")
    return cast("Result[Any]", result)


def _show_update(state: ORMExecuteState, class_: type[Any]) -> None:
    """Let the session's objects show what an UPDATE changed and triggers completed.

    SQLAlchemy expires what it knows to be changed. An async session can't read it on access, so it is read here.
    """
    session = state.session
    if not session.identity_map or state.execution_options.get("synchronize_session") is False:
        return
    ids = {row.get("id") for row in _parameters(state)} if isinstance(state.parameters, list) else set()
    cascades = not issubclass(class_, Pipeline) and any("status" in row for row in _written(state))
    is_async = session.get_bind(**state.bind_arguments).dialect.is_async
    for row in list(session.identity_map.values()):
        row_state: InstanceState[Any] = inspect(row)
        if row_state.expired or row_state.modified:  # by a commit; with what wasn't flushed
            continue
        is_target = isinstance(row, class_)
        if (cascades and _json_columns(type(row))) or (is_target and (row_state.identity or (None,))[0] in ids):
            _expire(session, row)
        elif is_target and is_async and row_state.expired_attributes:
            with suppress(InvalidRequestError):  # its row was deleted
                session.refresh(row, row_state.expired_attributes)


def _written(state: ORMExecuteState) -> list[dict[str, Any]]:
    """What a statement writes, by the names of the columns."""
    return [_fixed(state.statement), *_several(state.statement), *map(_by_name, _parameters(state))]


def _parameters(state: ORMExecuteState) -> list[Mapping[str, Any]]:
    parameters: Any = state.parameters or []
    return [parameters] if isinstance(parameters, Mapping) else list(parameters)


def _fixed(statement: Any) -> dict[str, Any]:
    """The values of ``insert(...).values(...)`` and ``update(...).values(...)``."""
    return _by_name(statement._values or {})  # noqa: SLF001 - SQLAlchemy has no public way to the values


def _several(statement: Any) -> list[dict[str, Any]]:
    """The rows of ``insert(...).values([...])``."""
    names = [column.key for column in statement.table.columns]
    return [
        _by_name(row if isinstance(row, Mapping) else dict(zip(names, row, strict=False)))
        for row in chain.from_iterable(statement._multi_values)  # noqa: SLF001
    ]


def _by_name(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Name columns by their keys, and take literals out of their bind parameters; SQL expressions stay."""
    return {
        key if isinstance(key, str) else str(key.key): value.value if isinstance(value, BindParameter) else value
        for key, value in row.items()
    }
