"""The models declare what the revisions create."""

import psycopg
import pytest
from pytest_alembic.plugin.fixtures import alembic_runner  # noqa: F401 - a fixture
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from gathering_pipeline import metadata, migrations
from gathering_pipeline.maintenance.catalog import expected
from gathering_pipeline.maintenance.repairs import rebuild
from tests.support.databases import Connect
from tests.support.schema import facts

pytestmark = pytest.mark.once  # Alembic compares; test_schema_text.py reads the catalog on both servers

VIEWS_AND_TYPES = ("pending_node_runs.", "startable_node_runs.", "pipeline_version_nodes.", "node_result.")


FUNCTIONS_OF_CHECKS = tuple(
    f"circle.{name}" for name in ("are_readable_times(", "is_valid_", "nested_too_deep(", "number_too_large(")
)


def create_what_tables_use(raw: psycopg.Connection) -> None:
    """The schema, a type, and the functions of CHECKs, which ``create_all`` doesn't create."""
    raw.execute("CREATE SCHEMA circle")
    for item, definition in expected().items():
        if item.kind == "type" and item.name == "circle.compiled_node":
            raw.execute(f"CREATE TYPE {item.name} AS ({definition})".encode())
        elif item.kind == "function" and item.name.startswith(FUNCTIONS_OF_CHECKS):
            raw.execute("".join(rebuild(item, expected())).encode())


def test_create_all_equals_upgrade(database_url: str, empty_database_url: str, connect: Connect) -> None:
    create_what_tables_use(connect(empty_database_url))
    engine = create_engine(empty_database_url, poolclass=NullPool)
    metadata.create_all(engine)
    for kind in ("constraint", "index"):
        assert facts(empty_database_url, kind) == facts(database_url, kind)
    declared, migrated = facts(empty_database_url, "column"), facts(database_url, "column")
    # the order of columns is history
    assert {name: text.split(" ", 1)[1] for name, text in declared.items()} == {
        name: text.split(" ", 1)[1] for name, text in migrated.items() if not name.startswith(VIEWS_AND_TYPES)
    }


def test_metadata_has_every_table(database_url: str) -> None:
    tables = {name for name, kind in facts(database_url, "relation").items() if kind.startswith("r")}
    assert tables | {"alembic_version"} == {table.name for table in metadata.tables.values()}


def test_current_after_create_all_is_none(empty_database_url: str, connect: Connect) -> None:
    """A database that was made by ``create_all`` is not taken for one at head."""
    create_what_tables_use(connect(empty_database_url))
    engine = create_engine(empty_database_url, poolclass=NullPool)
    metadata.create_all(engine)
    with engine.connect() as connection:
        assert migrations.current(connection) is None
