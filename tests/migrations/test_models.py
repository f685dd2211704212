"""The models declare what the revisions create."""

from pytest_alembic.plugin.fixtures import alembic_runner  # noqa: F401 - a fixture
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from gathering_pipeline import metadata, migrations
from tests.support.databases import Connect
from tests.support.schema import facts


def test_create_all_equals_upgrade(database_url: str, empty_database_url: str, connect: Connect) -> None:
    connect(empty_database_url).execute("CREATE SCHEMA circle")
    engine = create_engine(empty_database_url, poolclass=NullPool)
    metadata.create_all(engine)
    for kind in ("constraint", "index"):
        assert facts(empty_database_url, kind) == facts(database_url, kind)
    declared, migrated = facts(empty_database_url, "column"), facts(database_url, "column")
    # the order of columns is history
    assert {name: text.split(" ", 1)[1] for name, text in declared.items()} == {
        name: text.split(" ", 1)[1]
        for name, text in migrated.items()
        if not name.startswith(("pending_node_runs.", "startable_node_runs."))
    }


def test_metadata_has_every_table(database_url: str) -> None:
    tables = {name for name, kind in facts(database_url, "relation").items() if kind.startswith("r")}
    assert tables == {table.name for table in metadata.tables.values()}


def test_current_after_create_all_is_none(empty_database_url: str) -> None:
    """A database that was made by ``create_all`` is not taken for one at head."""
    engine = create_engine(empty_database_url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA circle"))
        metadata.create_all(connection)
    with engine.connect() as connection:
        assert migrations.current(connection) is None
