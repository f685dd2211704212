"""Programs that migrate by a connection of their own."""

import asyncio
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic.autogenerate import produce_migrations, render_python_code
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Column, Integer, MetaData, Table, create_engine, event, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool

from gathering_pipeline import metadata, migrations, migrator
from gathering_pipeline.database import Database
from gathering_pipeline.errors import ConfigurationError, DatabaseUnavailableError
from gathering_pipeline.maintenance.doctor import doctor
from tests.support.adoption import GATHERING
from tests.support.databases import ADVISORY_LOCKS, Connect
from tests.support.revisions import BIG_TABLE, INDEX, WAITS, wait_until, write_revision
from tests.support.schema import catalog

pytestmark = pytest.mark.once  # whose connection a migration uses is decided by this package and Alembic


def test_upgrade_on_given_connection_restores_it(empty_database_url: str) -> None:
    engine = create_engine(empty_database_url, poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text("SET lock_timeout = '7s'"))
        with pytest.raises(ConfigurationError, match="inside a transaction: commit it first"):
            migrations.upgrade(connection)
        connection.rollback()
        migrations.upgrade(connection)
        assert not connection.in_transaction()
        migrations.check(connection)
        assert connection.get_isolation_level() == "READ COMMITTED"
        assert connection.scalar(text("SHOW lock_timeout")) == "0"
        assert connection.scalar(text(ADVISORY_LOCKS)) == 0


def test_upgrade_on_given_connection_keeps_its_settings(empty_database_url: str) -> None:
    engine = create_engine(empty_database_url, pool_size=1, max_overflow=0)

    @event.listens_for(engine, "connect")
    def _set(connection: psycopg.Connection, _record: object) -> None:
        connection.execute(
            "SET statement_timeout = '33s'; SET lock_timeout = '44s'; SET search_path = \"$user\", public, x;"
            "SET max_parallel_workers_per_gather = 3"
        )
        connection.commit()

    names = "'lock_timeout', 'search_path', 'statement_timeout', 'max_parallel_workers_per_gather'"
    show = f"SELECT pg_backend_pid(), current_setting(name) FROM unnest(ARRAY[{names}]) name"
    uses: list[Callable[[], object]] = [
        lambda: migrations.upgrade(engine, "006_pipelines"), lambda: doctor(engine), lambda: doctor(engine, repair=True),
        lambda: doctor(engine),
    ]  # fmt: skip
    with engine.connect() as connection:
        before = connection.execute(text(show)).all()
        assert [row.current_setting for row in before] == ["44s", '"$user", public, x', "33s", "3"]
    for use in uses:
        use()
        with engine.connect() as connection:
            assert connection.execute(text(show)).all() == before
    engine.dispose()


def test_upgrade_on_given_async_connection_succeeds(empty_database_url: str, connect: Connect) -> None:
    raw = connect(empty_database_url)

    async def go() -> None:
        engine = create_async_engine(empty_database_url, poolclass=AsyncAdaptedQueuePool, pool_size=1, max_overflow=0)
        async with engine.connect() as connection:
            await connection.run_sync(migrations.upgrade, "007_pipeline_execution")
            others = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND NOT pid = ANY (%s)"
            pids = [raw.info.backend_pid, await connection.scalar(text("SELECT pg_backend_pid()"))]
            await connection.rollback()
            wait_until(lambda: raw.execute(others, [pids]).fetchone() is None)
            await connection.run_sync(migrations.upgrade)
            await connection.run_sync(migrations.check)
        await engine.dispose()

    asyncio.run(go())


def test_upgrade_on_given_async_connection_yields_to_waiters(
    scripts: Path, empty_database_url: str, connect: Connect
) -> None:
    raw, reader = connect(empty_database_url), connect(empty_database_url)
    raw.execute(BIG_TABLE)
    raw.execute("CREATE INDEX idx_old ON circle.t (filler)")
    write_revision(scripts, "one", None, f"-- == index: circle.idx_t\n{INDEX}")

    async def go() -> None:
        async with Database(empty_database_url) as database, database.async_engine.connect() as connection:
            await connection.run_sync(migrations.upgrade)

    migrator = threading.Thread(target=asyncio.run, args=(go(),))
    with reader.transaction():
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        reader.execute("SELECT FROM circle.t LIMIT 1")
        migrator.start()
        wait_until(lambda: raw.execute(WAITS).fetchone() is not None)
        raw.execute("SET lock_timeout = '10s'")
        raw.execute("CREATE INDEX IF NOT EXISTS idx_old ON circle.t (filler)")
        assert migrator.is_alive()
    migrator.join(30)
    index = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'circle.idx_t'::regclass"
    assert raw.execute(index).fetchone() == (True,)


def test_upgrade_on_other_driver_raises() -> None:
    with pytest.raises(ConfigurationError, match="the driver of the engine is pysqlite: this package needs psycopg"):
        migrations.upgrade(create_engine("sqlite://", poolclass=NullPool))


def test_upgrade_keeps_logging_configuration(empty_database_url: str) -> None:
    before = list(logging.root.handlers), logging.root.level
    migrations.upgrade(empty_database_url, "006_pipelines")
    assert (list(logging.root.handlers), logging.root.level) == before


def test_tables_of_a_host_are_not_a_migrated_schema(empty_database_url: str, connect: Connect) -> None:
    raw = connect(empty_database_url)
    raw.execute("CREATE SCHEMA circle; CREATE TABLE circle.pipeline_events (id int)")
    with Database(empty_database_url) as database, database.engine.connect() as connection:
        assert migrator.missing_revision_hint(connection) is None
        raw.execute("CREATE TABLE circle.pipelines (id int)")
        assert migrator.missing_revision_hint(connection) is None


@pytest.mark.parametrize("adopted", [False, True])
def test_autogenerate_of_a_host_proposes_nothing_about_the_schema(
    empty_database_url: str, connect: Connect, adopted: bool
) -> None:
    if adopted:
        connect(empty_database_url).execute(GATHERING)
    migrations.upgrade(empty_database_url)
    host = MetaData()
    Table("mine", host, Column("id", Integer, primary_key=True))
    engine = create_engine(empty_database_url, poolclass=NullPool)
    with engine.connect() as connection:
        both: Any = [host, metadata]  # as Alembic's documentation allows it
        options = {"include_schemas": True, "target_metadata": both, "compare_server_default": True}
        proposed = produce_migrations(MigrationContext.configure(connection, opts=options), both)
    assert proposed.upgrade_ops is not None
    code = render_python_code(proposed.upgrade_ops)
    assert code.count("op.") == 1
    assert "op.create_table('mine'" in code


def test_upgrade_with_translated_schema_raises(database_url: str) -> None:
    engine = create_engine(database_url, poolclass=NullPool)
    translating = engine.execution_options(schema_translate_map={"circle": "tenant"})
    with translating.connect() as connection:
        for given in (translating, connection):
            with pytest.raises(ConfigurationError, match="schema_translate_map renames schema circle"):
                migrations.upgrade(given)
    migrations.upgrade(engine.execution_options(schema_translate_map={"circle": "circle", None: "mine"}))


def test_upgrade_of_read_only_database_raises_unavailable(empty_database_url: str, connect: Connect) -> None:
    raw = connect(empty_database_url)
    raw.execute(f"ALTER DATABASE {raw.info.dbname} SET default_transaction_read_only = on".encode())
    with pytest.raises(DatabaseUnavailableError, match=r"read-only \(cannot execute .*default_transaction_read_only"):
        migrations.upgrade(empty_database_url)


@pytest.mark.parametrize("sqlstate", ["53100", "58030"])
def test_upgrade_of_server_without_resources_raises_unavailable(
    empty_database_url: str, connect: Connect, sqlstate: str
) -> None:
    raw = connect(empty_database_url)
    raw.execute(
        f"""CREATE FUNCTION public.f() RETURNS event_trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION 'the cause' USING ERRCODE = '{sqlstate}'; END $$;
        CREATE EVENT TRIGGER f ON ddl_command_end WHEN TAG IN ('CREATE INDEX') EXECUTE FUNCTION public.f()""".encode()
    )
    with pytest.raises(DatabaseUnavailableError, match=r"lacks disk space.* \(the cause\): .*continues"):
        migrations.upgrade(empty_database_url)
    raw.execute("DROP EVENT TRIGGER f")
    migrations.upgrade(empty_database_url)


def test_upgrade_by_role_without_rights_names_them(empty_database_url: str, connect: Connect) -> None:
    raw = connect(empty_database_url)
    role = f"gathering_test_guest_{raw.info.backend_pid}"
    raw.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'x'".encode())
    url = make_url(empty_database_url).set(username=role, password="x").render_as_string(hide_password=False)
    try:
        with pytest.raises(ConfigurationError, match="lacks a right .permission denied for database .*may create one"):
            migrations.upgrade(url)
        raw.execute("CREATE SCHEMA circle")
        with pytest.raises(ConfigurationError, match="permission denied for schema circle.: migrate as the owner"):
            migrations.upgrade(url)
        migrations.upgrade(empty_database_url)
        with Database(url) as database:
            for call in (database.check, database.upgrade):
                with pytest.raises(ConfigurationError, match=r"can't read circle.alembic_version \(permission denied"):
                    call()
        raw.execute(
            f"GRANT USAGE ON SCHEMA circle TO {role}; GRANT SELECT ON circle.alembic_version TO {role}".encode()
        )
        with Database(url) as database:
            database.check()
            with pytest.raises(ConfigurationError, match="must be owner of relation .*migrate as the owner"):
                migrations.downgrade(database.engine, "010_graph")
    finally:
        raw.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())


@pytest.mark.parametrize(
    ("target", "table"),
    [
        ("base", "pipelines"),
        ("-1", "pipeline_counters"),
        ("007_pipeline_execution", "pipeline_versions"),
        ("base", "pipeline_runs"),
    ],
)
def test_downgrade_below_a_foreign_key_of_a_host_raises_and_changes_nothing(
    database_url: str, raw: psycopg.Connection, target: str, table: str
) -> None:
    key = {"pipeline_counters": "pipeline_id, id", "pipeline_versions": "pipeline_id, version"}.get(table, "id")
    columns = ", ".join(f"{name} bigint" for name in key.split(", "))
    raw.execute(
        f"CREATE TABLE mine ({columns}, CONSTRAINT my_key FOREIGN KEY ({key}) REFERENCES circle.{table})".encode()
    )
    before = catalog(database_url)
    with pytest.raises(
        ConfigurationError, match="that the downgrade drops: my_key of public.mine: .* nothing was changed"
    ):
        migrations.downgrade(database_url, target)
    assert catalog(database_url) == before
    with Database(database_url) as database:
        database.check()
    if table != "pipeline_counters":
        migrations.downgrade(database_url, "-1")
    raw.execute("DROP TABLE mine")
    migrations.downgrade(database_url, target)


def test_downgrade_keeps_adopted_tables_with_a_foreign_key_of_a_host(empty_database_url: str, connect: Connect) -> None:
    raw = connect(empty_database_url)
    raw.execute(GATHERING)
    raw.execute("CREATE TABLE mine (id int REFERENCES circle.pipeline_runs)")
    migrations.upgrade(empty_database_url)
    migrations.downgrade(empty_database_url, "base")
    assert raw.execute("SELECT count(*) FROM mine JOIN circle.pipeline_runs USING (id)").fetchone() == (0,)
