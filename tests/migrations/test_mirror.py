"""The Pydantic schemas, the ORM classes and the migrated tables say the same: fields, types, nullability, defaults."""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

import re
import types
from collections.abc import Callable
from datetime import datetime
from typing import Any, Literal, Union, get_args, get_origin

import psycopg
import pytest
from annotated_types import Ge, Le, MaxLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from sqlalchemy import ARRAY, BigInteger, Column, DefaultClause, Double, Float, Integer, String
from sqlalchemy.dialects import postgresql

from gathering_pipeline import (
    NodeRunRead,
    NodeStatus,
    Pipeline,
    PipelineCreate,
    PipelineDefinition,
    PipelineNode,
    PipelineNodeRun,
    PipelineRead,
    PipelineRun,
    PipelineStatus,
    PipelineUpdate,
    RunRead,
    RunStatus,
    metadata,
)
from gathering_pipeline.models import MAX_INT32, MAX_SECONDS
from tests.support.databases import scalar

pytestmark = pytest.mark.once  # the catalog that is compared is the same; test_schema_text.py reads it on both servers

READS: dict[type[BaseModel], Any] = {PipelineRead: Pipeline, RunRead: PipelineRun, NodeRunRead: PipelineNodeRun}
JSON = Any
"""How the schemas annotate JSON: anything, so that a bad legacy row can be read."""


def columns_of(orm: Any) -> dict[str, Column[Any]]:
    return {column.key: column for column in orm.__table__.columns}


def unwrap(field: FieldInfo) -> tuple[Any, bool]:
    """The annotation without ``None``, and whether that was there."""
    annotation = field.annotation
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [argument for argument in get_args(annotation) if argument is not type(None)]
        assert len(rest) == 1
        annotation = rest[0]
        return (get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation), True
    return annotation, False


def python_type(column: Column[Any]) -> Any:
    """What a column's values are in a schema."""
    if column.key == "status":
        return {"pipelines": PipelineStatus, "pipeline_runs": RunStatus, "pipeline_node_runs": NodeStatus}[
            column.table.name
        ]
    if isinstance(column.type, postgresql.JSONB):
        return JSON
    if isinstance(column.type, ARRAY):
        return list[int]
    return {String: str, Integer: int, BigInteger: int, Float: float, Double: float}.get(type(column.type)) or (
        column.type.python_type
    )


def database_columns(raw: psycopg.Connection, table: str) -> dict[str, tuple[str, bool, Any]]:
    """Name to type, whether NULL is allowed, and the default's value; that of a moment or of a sequence is its text."""
    rows = raw.execute(
        """SELECT a.attname, format_type(a.atttypid, a.atttypmod), NOT a.attnotnull, pg_get_expr(d.adbin, d.adrelid)
        FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
        WHERE a.attrelid = %s::regclass AND a.attnum > 0 AND NOT a.attisdropped""",
        [f"circle.{table}"],
    ).fetchall()
    return {name: (kind, nullable, evaluate(raw, default, kind)) for name, kind, nullable, default in rows}


def evaluate(raw: psycopg.Connection, default: str | None, kind: str) -> Any:
    if default is None or "nextval" in default or "CURRENT_TIMESTAMP" in default or "clock_timestamp" in default:
        return default
    row = raw.execute(f"SELECT ({default})::{kind}").fetchone()
    assert row is not None
    return row[0]


def orm_default(raw: psycopg.Connection, column: Column[Any]) -> Any:
    if not isinstance(column.server_default, DefaultClause):  # none, an identity, or what a trigger fills
        return None
    text = str(column.server_default.arg)
    kind = column.type.compile(dialect=postgresql.dialect())  # type: ignore[no-untyped-call]
    return evaluate(raw, text, kind)


def plain(value: Any) -> Any:
    return getattr(value, "value", value)


TOKENS = {"claim_token", "released_token"}
"""Only a claimed run tells its token."""


@pytest.mark.parametrize("schema", READS, ids=lambda schema: schema.__name__)
def test_read_model_has_the_columns(schema: type[BaseModel], raw: psycopg.Connection) -> None:
    columns = columns_of(READS[schema])
    stored = database_columns(raw, READS[schema].__tablename__)
    assert set(columns) == set(stored)
    assert set(columns) - set(schema.model_fields) == (TOKENS if schema is RunRead else set())
    for name, field in schema.model_fields.items():
        kind, nullable = unwrap(field)
        assert kind == python_type(columns[name]), name
        assert field.is_required(), name  # a row has every column
        if kind is not JSON:
            assert nullable == columns[name].nullable == stored[name][1], name


@pytest.mark.parametrize("table", metadata.sorted_tables, ids=lambda table: table.name)
def test_orm_columns_equal_database(table: Any, raw: psycopg.Connection) -> None:
    stored = database_columns(raw, table.name)
    assert set(table.columns.keys()) == set(stored)
    names = {"TIMESTAMP WITH TIME ZONE": "timestamp with time zone", "FLOAT": "double precision"}
    for name, (kind, nullable, default) in stored.items():
        column = table.columns[name]
        declared: str = column.type.compile(dialect=postgresql.dialect())  # type: ignore[no-untyped-call]
        declared = re.sub(r"^VARCHAR", "character varying", names.get(declared, declared)).lower()
        assert declared == kind, name
        assert column.nullable == nullable, name
        if default is not None and "nextval" in str(default):
            assert column.primary_key
        else:
            assert orm_default(raw, column) == default, name


@pytest.mark.parametrize("schema", [PipelineCreate, PipelineUpdate], ids=lambda schema: schema.__name__)
def test_write_model_has_columns_types_and_nullability(schema: type[BaseModel], raw: psycopg.Connection) -> None:
    columns, stored = columns_of(Pipeline), database_columns(raw, "pipelines")
    # the rest is the database's: ids, versions, counters, times
    assert set(columns) - set(schema.model_fields) == {
        *(
            "id",
            "version",
            "revision",
            "status_changed_at",
            "run_count",
            "success_count",
            "error_count",
            "last_run",
            "created_at",
            "updated_at",
        )
    }
    for name, field in schema.model_fields.items():
        kind, nullable = unwrap(field)
        expected = python_type(columns[name])
        assert kind == (list[Any] if expected is JSON else expected), name
        if schema is PipelineCreate:
            assert nullable == columns[name].nullable == stored[name][1], name


def test_create_model_has_column_defaults(raw: psycopg.Connection) -> None:
    columns, stored = columns_of(Pipeline), database_columns(raw, "pipelines")
    for name, field in PipelineCreate.model_fields.items():
        if name == "name":
            assert field.is_required()
            assert stored[name][2] is None
            continue
        default = plain(field.get_default(call_default_factory=True))
        assert default == orm_default(raw, columns[name]) == stored[name][2], name
        assert type(default) is type(stored[name][2]), name


def test_update_model_has_no_defaults_and_same_nullability(raw: psycopg.Connection) -> None:
    assert PipelineUpdate().model_fields_set == set()
    for name, (_, nullable, _) in database_columns(raw, "pipelines").items():
        if name not in PipelineUpdate.model_fields:
            continue
        if nullable:
            assert getattr(PipelineUpdate.model_validate({name: None}), name) is None
        else:
            with pytest.raises(ValueError, match=f"{name} can't be null"):
                PipelineUpdate.model_validate({name: None})


def check_values(raw: psycopg.Connection, constraint: str) -> set[str]:
    row = raw.execute("SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = %s", [constraint]).fetchone()
    assert row is not None
    # a list of values, or one array literal
    return {value for text in re.findall("'([^']*)'", row[0]) for value in text.strip("{}").split(",")}


def test_enums_equal_check_constraints(raw: psycopg.Connection) -> None:
    assert check_values(raw, "pipelines_status_check") == set(PipelineStatus)
    assert check_values(raw, "pipeline_runs_status_check") == set(RunStatus)
    assert check_values(raw, "pipeline_node_runs_status_check") == set(NodeStatus)
    node_type = PipelineNode.model_fields["type"].annotation
    assert get_origin(node_type) is Literal
    assert set(scalar(raw, "SELECT circle.node_types()")) == set(get_args(node_type))
    for (source,) in raw.execute("SELECT prosrc FROM pg_proc WHERE proname = 'is_valid_node_run'").fetchall():
        (types,) = re.findall(r"p_node_type = ANY \('{([^}]*)}'\)", source)
        assert set(types.split(",")) == set(get_args(node_type))


def limits(field: FieldInfo) -> dict[type, Any]:
    found = list(field.metadata)
    for argument in get_args(field.annotation):  # an optional one
        found += getattr(argument, "__metadata__", ())
    for item in list(found):
        found += getattr(item, "metadata", ()) if isinstance(item, FieldInfo) else ()
    return {type(item): item for item in found if isinstance(item, Ge | Le | MaxLen)}


def test_model_limits_fit_the_columns() -> None:
    for schema in (PipelineCreate, PipelineUpdate):
        for name, field in schema.model_fields.items():
            column = columns_of(Pipeline)[name]
            found = limits(field)
            if isinstance(column.type, Integer):
                assert found[Ge].ge == 0, name
                assert found[Le].le <= MAX_INT32, name
            elif isinstance(column.type, Float):
                assert (found[Ge].ge, found[Le].le) == (0, MAX_SECONDS), name
            elif name == "name":
                assert isinstance(column.type, String)
                assert found[MaxLen].max_length == column.type.length == 255


def test_stored_row_is_equal_in_model_orm_and_sql(
    session: Any, raw: psycopg.Connection, database_url: str, connect: Callable[[str], psycopg.Connection]
) -> None:
    """The defaults that the ORM leaves to the database, read back by each."""
    pipeline = Pipeline(name="p", nodes=[{"id": "t", "type": "trigger", "name": "T"}])
    session.add(pipeline)
    session.commit()
    session.refresh(pipeline)
    read = PipelineRead.model_validate({name: getattr(pipeline, name) for name in PipelineRead.model_fields})
    cursor = raw.execute("SELECT * FROM circle.pipelines")
    row = dict(zip([column.name for column in cursor.description or ()], cursor.fetchone() or (), strict=True))
    assert read.model_dump() == row
    created = PipelineCreate(name="p", nodes=pipeline.nodes)
    assert {name: plain(getattr(created, name)) for name in PipelineCreate.model_fields} == {
        name: row[name] for name in PipelineCreate.model_fields
    }
    assert isinstance(read.created_at, datetime)
    assert read.created_at.utcoffset() is not None
    assert isinstance(pipeline.definition, PipelineDefinition)
