"""Wires Alembic to ``gathering_pipeline.migrator``.

The database is ``config.attributes["connection"]`` (an engine, or a connection outside of a transaction), else
``config.attributes["url"]``, else the one that ``gathering_pipeline.urls.locate`` finds in the environment. The options
of ``gathering_pipeline.migrator.Options`` are read from ``-x NAME=VALUE``, else from ``config.attributes[NAME]``.
"""

from __future__ import annotations

import io
import sys
from logging.config import fileConfig
from typing import Any

from alembic import context
from alembic.util import CommandError
from sqlalchemy import BigInteger, Integer, MetaData

from gathering_pipeline import migrator
from gathering_pipeline.errors import PipelineError

config = context.config


def target_revision() -> str | None:
    """The revision to migrate to; None for a command that doesn't change the schema."""
    try:
        return str(context.get_revision_argument() or "base")
    except KeyError:
        return None


def compare_type(_context: Any, _column: Any, _model: Any, found: Any, wanted: Any) -> bool | None:
    """Whether the types of a column differ; ids of large tables stay INTEGER. None: as Alembic finds."""
    return False if isinstance(wanted, BigInteger) and isinstance(found, Integer) else None


def run_migrations(run: migrator.Migrator, **where: Any) -> None:
    """Run the revisions, or the comparison of ``alembic check``, on a connection or into a script."""
    metadata: MetaData | None = None
    if run.target is None:  # only a comparison loads the models
        from gathering_pipeline import orm

        metadata = orm.metadata

    def include_name(name: str | None, kind: str, parents: Any) -> bool:
        if kind == "schema":
            return name == migrator.SCHEMA
        if kind == "table":  # the schema also holds tables of the host
            return metadata is not None and parents["schema_qualified_table_name"] in metadata.tables
        return True

    def include_object(_object: Any, name: str | None, kind: str, _reflected: bool, _other: Any) -> bool:
        return kind != "table" or name != "alembic_version"  # Alembic makes it itself

    context.configure(
        target_metadata=metadata,
        version_table_schema=migrator.SCHEMA,
        transaction_per_migration=True,
        include_schemas=True,
        include_name=include_name,
        include_object=include_object,
        compare_type=compare_type,
        compare_server_default=True,
        # without comments: an adopted table may have one, the models have none
        autogenerate_plugins=[
            "alembic.autogenerate.*",
            "~alembic.autogenerate.comments",
            "alembic.ext.checkconstraint_byname",
        ],
        migrator=run,
        **where,
    )
    with context.begin_transaction():
        context.run_migrations()


def main() -> None:
    """Run the command, or write its SQL."""
    options = migrator.read_options(context.get_x_argument(as_dictionary=True), config.attributes)
    run = migrator.Migrator(options, context.script, target_revision())
    with run.translated_errors():
        if context.is_offline_mode():
            sql, named = io.StringIO(), {"paramstyle": "named"}
            run_migrations(run, dialect_name="postgresql", dialect_opts=named, literal_binds=True, output_buffer=sql)
            (config.output_buffer or sys.stdout).write(run.script(sql.getvalue()))
            return
        with migrator.open_connection(config.attributes.get("connection"), config.attributes.get("url")) as connection:
            run.run(connection, lambda: run_migrations(run, connection=connection))


if config.cmd_opts is None:  # called by a program, which has its own logging and handles this package's errors
    main()
else:
    if config.config_file_name is not None:
        fileConfig(config.config_file_name, disable_existing_loggers=False)
    try:
        main()
    except PipelineError as error:
        raise CommandError(str(error)) from error  # printed by the command as one sentence, without a traceback
