"""What operators run: ``gathering-pipeline db ...``."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import click
from alembic.util import CommandError
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sqlalchemy.exc import DBAPIError

from gathering_pipeline import embedded, migrations
from gathering_pipeline.database import Database
from gathering_pipeline.doctor import doctor as examine
from gathering_pipeline.errors import ConfigurationError, PipelineError, shorten
from gathering_pipeline.preflight import MODES, Preflight
from gathering_pipeline.preflight import preflight as look_ahead
from gathering_pipeline.settings import DatabaseSettings

VARIABLES = ("GATHERING_MIGRATION_URL", "GATHERING_DATABASE_URL", "DATABASE_URL")
NEEDS_YOU = 3
"""Exit code of a report that somebody has to act on."""


class _Sentences(click.Group):
    """Says what went wrong in one sentence, and leaves with 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (PipelineError, CommandError) as error:
            raise click.ClickException(str(error)) from error
        except DBAPIError as error:
            diagnostic = getattr(error.orig, "diag", None)
            reason = getattr(diagnostic, "message_primary", None) or str(error.orig).strip()
            state = getattr(error.orig, "sqlstate", None)
            raise click.ClickException(
                f"PostgreSQL says: {shorten(reason)}" + (f" (SQLSTATE {state})" if state else "")
            ) from error


url_option = click.option(
    "--url",
    metavar="URL",
    help="postgresql://USER:PASSWORD@HOST:PORT/DATABASE; by default what GATHERING_MIGRATION_URL, "
    "GATHERING_DATABASE_URL or DATABASE_URL says, else the embedded server.",
)
x_option = click.option(
    "-x",
    "options",
    metavar="NAME=VALUE",
    multiple=True,
    callback=lambda _context, _option, given: dict(item.partition("=")[::2] for item in given),
    help="lock_timeout, patience or yield, as docs/operations.md explains them; may be repeated.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


@contextmanager
def _database(url: str | None) -> Iterator[Database]:
    if url == "":
        raise ConfigurationError("--url is set but empty: leave it out, or write a URL")
    settings, url = DatabaseSettings.for_migrations(url)
    folder = None
    if url is None and settings.database_url is None:
        server = embedded.start(settings.data_dir)
        url, folder = server.url, server.data_dir
    with Database(url, settings=settings) as database:
        if folder is not None:
            told = f"the embedded server in {folder}, because none of {', '.join(VARIABLES)} is set"
        else:  # as the server has it, whatever libpq added to the URL
            with database.engine.connect() as connection:
                info = connection.connection.driver_connection.info  # type: ignore[union-attr]
            told = f"{info.dbname} at {info.host}:{info.port}, user {info.user}"
        click.echo(f"database: {told}", err=True)
        yield database


@contextmanager
def _progress() -> Iterator[None]:
    """Show on stderr which revision runs, and for what it waits."""
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: not record.getMessage().startswith(("Context impl", "Will assume")))
    loggers = [logging.getLogger(name) for name in ("alembic.runtime.migration", "alembic.gathering_pipeline")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


@click.group(cls=_Sentences, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gathering-pipeline")
def cli() -> None:
    """The data layer of GatheRing's pipelines.

    Exit codes: 0 done; 1 it failed, and one sentence on stderr says why; 2 the command was not understood; 3 doctor or
    preflight found something that needs you.
    """


@cli.group()
def db() -> None:
    """Bring the schema of a database, and look after it."""


@db.command()
@click.argument("revision", default="head")
@x_option
@url_option
def upgrade(revision: str, options: dict[str, str], url: str | None) -> None:
    """Bring the schema to REVISION, by default the newest.

    May run beside live writers: each step is short, waits a moment for its locks, lets others pass and tries again.
    A migration that was broken off is simply started again. Only one runs at a time. Run preflight before.
    """
    with _progress(), _database(url) as database:
        migrations.upgrade(database.engine, revision, options)
        _tell_revision(database)


@db.command(context_settings={"ignore_unknown_options": True})  # -1 is a revision
@click.argument("revision")
@click.option("--yes", is_flag=True, help="Confirm the action without prompting.")
@x_option
@url_option
def downgrade(revision: str, yes: bool, options: dict[str, str], url: str | None) -> None:
    """Take the schema back to REVISION; "base" is below the first, -1 the one before.

    Deletes what the later revisions added, with the data in it. Tables that were there before revision 006 stay.
    """
    if revision.startswith("-") and not revision[1:].isdecimal():
        raise click.NoSuchOption(revision)
    with _progress(), _database(url) as database:
        if not yes:  # the answer depends on which database was named
            click.confirm("What the later revisions added is deleted, with the data in it. Go on?", abort=True)
        migrations.downgrade(database.engine, revision, options)
        _tell_revision(database)


def _tell_revision(database: Database) -> None:
    with database.engine.connect() as connection:
        click.echo(f"the schema is at revision {migrations.current(connection) or 'none'}")


@db.command()
@json_option
@url_option
def current(as_json: bool, url: str | None) -> None:
    """Print the schema's revision."""
    with _database(url) as database:
        if not as_json:
            _tell_revision(database)
            return
        with database.engine.connect() as connection:
            _print_json({"revision": migrations.current(connection), "head": migrations.head()})


@db.command()
@url_option
def check(url: str | None) -> None:
    """Fail unless the schema is at the revision of this version.

    A quick question for the start of a service; doctor examines the schema itself.
    """
    with _database(url) as database:
        database.check()
        _tell_revision(database)


@db.command()
@click.argument("revision", default="head")
@click.option("--down", is_flag=True, help="Write a downgrade; REVISION has to be FROM:TO, as in head:base.")
def sql(revision: str, down: bool) -> None:
    """Print the SQL of an upgrade to REVISION, for a DBA: psql -v ON_ERROR_STOP=1 -f FILE.

    REVISION may be FROM:TO, where the schema is at FROM already. Needs no database.
    """
    click.echo(migrations.script(revision, down=down), nl=False)


@db.command()
@click.option("--repair", is_flag=True, help="Mend what can be mended; docs/cli.md says what waits.")
@json_option
@url_option
def doctor(repair: bool, as_json: bool, url: str | None) -> None:
    """Report what is wrong with the schema and the rows.

    Compares every column, constraint, index, trigger and function with a clean build, recounts the pipelines'
    counters, and looks for runs that are over with live nodes, leases that ran out, graphs that are broken or were
    never compiled, triggers of others, transactions that hold the events back, and ids that run short.

    Reads every run and node run once. Run it as the owner of the tables; with pg_monitor it sees the sessions of
    others, too.
    """
    with _progress(), _database(url) as database:
        findings = examine(database.engine, repair=repair)
    if as_json:
        _print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            done = finding.outcome == "repaired"
            click.secho("repaired" if done else finding.severity, fg="green" if done else "red", bold=True, nl=False)
            click.echo(f" {finding.code}: {finding.object}: {finding.message}")
            if not done:
                click.echo(f"    {finding.outcome or finding.advice}")
        if not findings:
            click.echo("nothing found: the database is as it should be")
    if any(finding.outcome != "repaired" for finding in findings):
        click.get_current_context().exit(NEEDS_YOU)


@db.command()
@json_option
@url_option
def preflight(as_json: bool, url: str | None) -> None:
    """Tell what an upgrade would lock, and who is in its way now.

    Lists the locks that each pending step takes at most on tables that are there, with the rows as their statistics
    estimate them. From SHARE on a lock makes writers wait, while the step runs. Locks nothing itself.
    """
    with _database(url) as database, database.engine.connect() as connection:
        plan = look_ahead(connection)
    if as_json:
        _print_json(asdict(plan))
    else:
        _show(plan)
    if plan.blockers:
        click.get_current_context().exit(NEEDS_YOU)


def _show(plan: Preflight) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a file has no width to fit into
    click.echo(f"the schema is at revision {plan.revision or 'none'}; {len(plan.steps)} steps to {plan.target}")
    table = Table("Revision", "Step", "Table", "Lock", "Rows, about", "Size")
    for step in plan.steps:
        for lock in step.locks:
            rows = "unknown" if lock.rows is None else f"{lock.rows:,}"
            mode = Text(lock.mode, style="bold" if MODES.index(lock.mode) >= MODES.index("SHARE") else "")
            table.add_row(step.revision, Text(step.what), lock.table, mode, rows, f"{lock.bytes / 2**20:,.1f} MiB")
    if table.row_count:
        console.print(table)
    elif plan.steps:
        click.echo("none of them locks a table that is there")
    for blocker in plan.blockers:
        age = "" if blocker.seconds is None else f", its transaction {blocker.seconds:,.0f} s old"
        click.echo(f"in the way: {blocker.who}{age}: {blocker.why}")
