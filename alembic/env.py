"""How revisions run: where the database is, one migrator at a time, short locks, and steps that can be run again.

The database is, in this order: ``config.attributes["connection"]`` (an Engine, or a Connection outside a transaction),
``config.attributes["url"]``, GATHERING_MIGRATION_URL (a direct URL, where the usual one leads through a pooler),
GATHERING_DATABASE_URL, DATABASE_URL, the embedded server.

Options, as ``-x NAME=VALUE`` of ``alembic`` and ``gathering-pipeline db upgrade``, or as ``config.attributes[NAME]``:
``lock_timeout`` (default 100ms), the longest time for which a step may wait for a lock, and so make others wait behind
it; ``patience`` (default 600, in seconds), for how long a step is tried again, and another migrator is waited for;
``yield`` (default yes), whether a step that takes long is broken off and tried again when somebody waits behind it.
"""

from __future__ import annotations

import io
import json
import logging
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging.config import fileConfig
from pathlib import Path
from typing import Annotated, Any

from alembic import context
from alembic.operations import MigrateOperation, Operations
from alembic.script.revision import ResolutionError
from alembic.util import CommandError
from pydantic import Field, TypeAdapter, ValidationError
from sqlalchemy import MetaData, text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError, PendingRollbackError

from gathering_pipeline import migrations
from gathering_pipeline.database import Database
from gathering_pipeline.errors import (
    AdoptionError,
    ConfigurationError,
    DatabaseUnavailableError,
    PipelineError,
    SchemaRevisionError,
)
from gathering_pipeline.migrations import (
    BUSY,
    MIGRATOR,
    SCHEMA,
    SMALL_TABLE,
    GaveWayError,
    Step,
    execute,
    execute_yielding,
    gently,
    sqlstate,
)
from gathering_pipeline.settings import DatabaseSettings

VERSIONS = f"{SCHEMA}.alembic_version"
DIFFERS = "PL090"  # with which a revision refuses what it finds; the error's detail is a JSON list of sentences
CREATE_SCHEMA = f"""DO $$ BEGIN
    -- IF NOT EXISTS alone asks for the right to create one even where there is one
    IF to_regnamespace('{SCHEMA}') IS NULL THEN CREATE SCHEMA IF NOT EXISTS {SCHEMA}; END IF;
END $$"""

logger = logging.getLogger("alembic.gathering_pipeline")
config = context.config


# Zero would be no limit: all others would wait behind the step for as long as it waits.
DURATION = Annotated[str, Field(pattern=r"^([1-9]\d{0,5} ?(ms|s)?|[1-9]\d{0,3} ?min)$", coerce_numbers_to_str=True)]
SECONDS = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def option(name: str, kind: Any, default: str, form: str) -> Any:
    """An option from ``-x``, else from the attributes of the host's configuration."""
    written = migrations.known(context.get_x_argument(as_dictionary=True))
    given = written.get(name, config.attributes.get(name, default))
    try:
        return TypeAdapter(kind).validate_python(given)
    except ValidationError:
        raise ConfigurationError(f"the option {name} can't be {given!r}: {form}") from None


def again(action: Callable[[], None], undo: Callable[[], None] = lambda: None) -> None:
    """Run an action until it gets its locks; in the growing pauses those who wait for the same ones go first."""
    deadline, pause = time.monotonic() + PATIENCE, 0.2
    while True:
        try:
            return action()
        except (DBAPIError, GaveWayError) as error:
            if isinstance(error, GaveWayError):
                why = "others waited behind the step: stop what sends CREATE INDEX or VACUUM, or go first with yield=no"
            elif sqlstate(error) in BUSY:
                why = (
                    f"a lock was not free within {LOCK_TIMEOUT}: see by gathering-pipeline db preflight, or in"
                    " pg_stat_activity, which transaction is open"
                )
            else:
                raise
            undo()
            if time.monotonic() > deadline:
                raise DatabaseUnavailableError(f"the migration was tried for {PATIENCE:.0f} s, but {why}") from error
            logger.info("%s; trying again", why)
        time.sleep(pause * random.uniform(0.75, 1.25))  # noqa: S311 - only spreads the retries
        pause = min(pause * 1.5, 2.0)


# Steps, which migrations.steps reads from sql/REVISION/: each is idempotent and a transaction of its own.


@Operations.register_operation("run_steps")
class RunSteps(MigrateOperation):
    """Run one direction of a revision's SQL."""

    def __init__(self, revision: str, direction: str) -> None:
        self.revision = revision
        self.direction = direction

    @classmethod
    def run_steps(cls, operations: Operations, revision: str, direction: str) -> None:
        """Run the steps of a direction in their order."""
        operations.invoke(cls(revision, direction))


@Operations.implementation_for(RunSteps)
def run_steps(operations: Operations, operation: RunSteps) -> None:
    migration = operations.get_context()
    steps = migrations.steps(operation.revision, operation.direction, Path(context.script.dir))
    with migration.autocommit_block():
        if context.is_offline_mode():
            write_steps(operation, steps)
            return
        assert migration.connection is not None
        if lost := migrations.lost(migration.connection):  # its steps would put older functions in the place of newer
            raise AdoptionError([lost])
        for what, body, is_index in steps:
            run_step(migration.connection, what, body, is_index=is_index)


def run_step(connection: Connection, what: str, body: str, *, is_index: bool) -> None:
    """Run a step on a connection in autocommit: several statements sent as one are one transaction of the server."""
    logger.debug("step: %s", what)
    if is_index:
        again(lambda: build(connection, what, body))
    elif "VALIDATE CONSTRAINT" in body:
        again(lambda: (execute_yielding if YIELD else execute)(connection, body))
    else:
        again(lambda: execute(connection, body))


def build(connection: Connection, name: str, body: str) -> None:
    invalid = text("SELECT EXISTS (SELECT FROM pg_index WHERE indexrelid = to_regclass(:name) AND NOT indisvalid)")
    if connection.scalar(invalid, {"name": name}):
        # Left over from a build that was broken off; IF NOT EXISTS would take it for the finished one.
        execute(connection, f"DROP INDEX {name}")
    table = re.search(r"\bON (\S+)", body)
    small = text("SELECT coalesce(pg_relation_size(to_regclass(:name)), 0) < :limit")
    if not YIELD or (table is not None and connection.scalar(small, {"name": table[1], "limit": SMALL_TABLE})):
        # Done in a moment; or the one way past a writer that sends CREATE INDEX IF NOT EXISTS all the time.
        execute(connection, body.replace(" CONCURRENTLY", ""))
        return
    # A concurrent build waits for transactions of others and blocks nobody: a lock timeout would only break it off.
    execute(connection, "SET lock_timeout = 0")
    try:
        execute_yielding(connection, body)
    finally:
        if not connection.invalidated:
            execute(connection, f"SET lock_timeout = '{LOCK_TIMEOUT}'")


def write_steps(operation: RunSteps, steps: list[Step]) -> None:
    """Write steps into the script that a DBA runs with ``psql -v ON_ERROR_STOP=1``, again where it was broken off."""
    output = context.get_context().impl.static_output
    there = f"EXISTS (SELECT FROM {VERSIONS} WHERE version_num >= '{operation.revision}')"
    done = there if operation.direction == "upgrade" else f"NOT {there}"
    output(f"SELECT {done} AS done \\gset\n\\if :done\n\\else")
    for what, body, is_index in steps:
        output(f"-- {what}")
        if is_index:
            output(
                "DO $$ BEGIN\n"
                f"IF EXISTS (SELECT FROM pg_index WHERE indexrelid = to_regclass('{what}') AND NOT indisvalid) THEN\n"
                f"    DROP INDEX {what};\nEND IF;\nEND $$;\n"
                f"SET lock_timeout = 0;\n{body}\nSET lock_timeout = '{LOCK_TIMEOUT}';"
            )
        elif re.search(r"^\s*COMMIT;", body, re.MULTILINE):
            output(body)  # it commits as it goes
        else:
            output(f"BEGIN;\n{body}\nCOMMIT;")
    output("\\endif")


# The run


def models() -> MetaData:
    """The models; only what compares with them needs them."""
    from gathering_pipeline.orm import metadata

    return metadata


def configure(**where: Any) -> None:
    """Configure the migration context. What is ours are the tables of our metadata in schema circle."""
    metadata = None if changes_schema() else models()

    def include_name(name: str | None, kind: str, parents: Any) -> bool:
        if kind == "schema":
            return name == SCHEMA
        if kind == "table":
            return metadata is not None and parents["schema_qualified_table_name"] in metadata.tables
        return True

    context.configure(
        target_metadata=metadata,
        version_table_schema=SCHEMA,
        transaction_per_migration=True,
        include_schemas=True,
        include_name=include_name,
        compare_type=True,
        compare_server_default=True,
        # Comments are no part of the models: revision 006 writes into one that it created the table.
        autogenerate_plugins=[
            "alembic.autogenerate.*",
            "~alembic.autogenerate.comments",
            "alembic.ext.checkconstraint_byname",
        ],
        **where,
    )


def changes_schema() -> bool:
    """Whether the command is one that needs the schema and keeps others out (not ``current``, ``check``)."""
    try:
        context.get_revision_argument()
    except KeyError:
        return False
    return True


def is_relative() -> bool:
    """Whether the revision wanted is +N or -N, which is counted from where the schema is."""
    return changes_schema() and str(context.get_revision_argument()).startswith(("+", "-"))


def how_to_go_on() -> str:
    """What to do after a migration that was broken off."""
    return "start it again, it goes on where it was" + ("; name the revision instead of a number" * is_relative())


def run_offline() -> None:
    script = io.StringIO()
    settings = "".join(f"SET {name} = {value};\n" for name, value in migrations.GENTLE.items())
    script.write(f"SET lock_timeout = '{LOCK_TIMEOUT}';\n{settings}\n{CREATE_SCHEMA};\n\n")
    configure(dialect_name="postgresql", literal_binds=True, dialect_opts={"paramstyle": "named"}, output_buffer=script)
    with context.begin_transaction():
        context.run_migrations()
    # Alembic takes for granted that its table is not there yet; a script that was broken off is run again.
    sql = script.getvalue().replace(f"CREATE TABLE {VERSIONS} ", f"CREATE TABLE IF NOT EXISTS {VERSIONS} ")
    first = re.compile(rf"(INSERT INTO {VERSIONS} \(version_num\)) VALUES \(('\w+')\)[^;]*")
    (config.output_buffer or sys.stdout).write(
        first.sub(rf"\1 SELECT \2 WHERE NOT EXISTS (SELECT FROM {VERSIONS})", sql)
    )


def run_online(connection: Connection) -> None:
    if connection.dialect.driver != "psycopg":
        raise ConfigurationError(
            f"the connection's driver is {connection.dialect.driver}: migrations need psycopg, as postgresql+psycopg://"
        )
    start: str | None = None

    def migrate() -> None:
        if is_relative() and (at := migrations.current(connection)) != start:  # tried again: it would go too far
            raise DatabaseUnavailableError(
                f"a lock was not free, and the schema is at {at or 'none'} by now: {how_to_go_on()}"
            )
        connection.rollback()
        configure(connection=connection)
        with context.begin_transaction():
            context.run_migrations()

    if not changes_schema():
        migrate()
        connection.rollback()
        return
    with alone(connection), gently(connection, "lock_timeout"):
        execute(connection, f"SET lock_timeout = '{LOCK_TIMEOUT}'")
        execute(connection, CREATE_SCHEMA)
        start = migrations.current(connection)
        connection.commit()
        try:
            again(migrate, connection.rollback)
        except CommandError as error:
            connection.rollback()
            if lost := migrations.lost(connection):
                raise AdoptionError([lost]) from error
            at = migrations.current(connection)
            if at is None or at in migrations.revisions():
                raise
            raise SchemaRevisionError(at, migrations.head()) from error
        if lost := migrations.lost(connection):  # a downgrade had nothing to do
            raise AdoptionError([lost])


@contextmanager
def alone(connection: Connection) -> Iterator[None]:
    """Be the only migrator. Polled: who waits inside a statement holds up an index that is built concurrently."""
    deadline, told = time.monotonic() + PATIENCE, False
    while True:
        free = connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": MIGRATOR})
        connection.commit()
        if free:
            break
        if time.monotonic() > deadline:
            raise DatabaseUnavailableError(f"another migrator has been at work for {PATIENCE:.0f} s: try again later")
        if not told:
            logger.info("waiting for another migrator")
            told = True
        time.sleep(0.2)
    try:
        yield
    finally:
        connection.rollback()
        if not connection.invalidated:
            connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": MIGRATOR})
            connection.commit()


def main() -> None:
    # Logging is set up for the command `alembic` alone; a host that calls from its program has its own.
    if config.cmd_opts is not None and config.config_file_name is not None:
        fileConfig(config.config_file_name, disable_existing_loggers=False)
    if context.is_offline_mode():
        run_offline()
        return
    given = config.attributes.get("connection")
    if isinstance(given, Connection):
        if given.in_transaction():
            raise ConfigurationError("the connection is inside a transaction: commit it first, each step needs its own")
        run_online(given)
    elif isinstance(given, Engine):
        with given.connect() as connection:
            run_online(connection)
    else:
        settings, url = DatabaseSettings.for_migrations(config.attributes.get("url"))
        with Database(url, settings=settings) as database, database.engine.connect() as connection:
            run_online(connection)


try:
    LOCK_TIMEOUT = option("lock_timeout", DURATION, "100ms", "write a duration as 100ms, 2s or 1min")
    PATIENCE = option("patience", SECONDS, "600", "write a number of seconds")
    YIELD = option("yield", bool, "yes", "write yes or no")
    main()
except (DBAPIError, PendingRollbackError) as error:
    told: PipelineError
    if isinstance(error, PendingRollbackError) or error.connection_invalidated:  # the former hides the latter
        told = DatabaseUnavailableError(f"the connection broke during the migration: {how_to_go_on()}")
    elif sqlstate(error) == DIFFERS:
        told = AdoptionError(json.loads(error.orig.diag.message_detail))  # type: ignore[union-attr]
    else:
        raise
    raise (CommandError(str(told)) if config.cmd_opts is not None else told) from error
except CommandError as error:
    if isinstance(error.__cause__, ResolutionError):
        raise CommandError(f"{error}: there are base, {', '.join(migrations.revisions())} and head") from error
    raise
except PipelineError as error:
    if config.cmd_opts is None:
        raise
    raise CommandError(str(error)) from error  # the command `alembic` prints it as one sentence, without a traceback
