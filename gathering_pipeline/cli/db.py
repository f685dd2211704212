"""The commands of operators for the schema: ``gathering-pipeline db ...``."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from gathering_pipeline.cli.options import json_option, migration_url_option, open_database, yes_option
from gathering_pipeline.cli.output import ACTION_NEEDED, Outcome, echo, print_json, print_table

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from gathering_pipeline.cli.many import Action, Target
    from gathering_pipeline.maintenance.findings import Finding
    from gathering_pipeline.maintenance.preflight import Preflight
    from gathering_pipeline.maintenance.rights import Purpose

    Targets = list[Target] | None

x_option = click.option(
    "-x",
    "options",
    metavar="NAME=VALUE",
    multiple=True,
    callback=lambda _context, _option, given: dict(item.partition("=")[::2] for item in given),
    help="lock_timeout, patience or yield, see docs/operations.md; may be repeated.",
)


def _read_targets(_context: click.Context, _option: click.Parameter, path: str | None) -> Targets:
    from gathering_pipeline.cli import many

    return None if path is None else many.read_targets(path)


urls_option = click.option(
    "--urls",
    "targets",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    callback=_read_targets,
    help="Many databases: a file with a line NAME URL for each, or - for stdin. Lines that begin with # are comments.",
)
jobs_option = click.option(
    "-j", "--jobs", type=click.IntRange(min=1), metavar="N", help="Worker processes for --urls, by default 1."
)


@contextmanager
def _progress() -> Iterator[None]:
    """Log on stderr which revision runs, and what it waits for."""
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


@click.group()
def db() -> None:
    """Migrate and maintain the schema of a database."""


def _is_many(url: str | None, targets: Targets, jobs: int | None) -> bool:
    """Whether --urls is given; refuses what contradicts that."""
    if targets is None and jobs is not None:
        raise click.UsageError("-j needs --urls")
    if targets is not None and url is not None:
        raise click.UsageError("--url and --urls exclude each other: leave one out")
    return targets is not None


def _run(action: Action, url: str | None, targets: Targets, jobs: int | None, *, as_json: bool) -> None:
    """Run a command on one database, or on many."""
    if _is_many(url, targets, jobs):
        from gathering_pipeline.cli import many

        assert targets is not None, "there are many"
        click.get_current_context().exit(many.run(targets, action, jobs or 1, as_json=as_json))
    with _progress(), open_database(url, for_migrations=True) as database:
        outcome = action(database.engine)
    if as_json:
        print_json(outcome.data)
    else:
        click.echo(outcome.text)


def _revision(engine: Engine) -> Outcome:
    from gathering_pipeline import migrations

    with engine.connect() as connection:
        revision = migrations.current(connection)
    return Outcome(f"the schema is at revision {revision or 'none'}", {"revision": revision, "head": migrations.head()})


@db.command()
@click.argument("revision", default="head")
@x_option
@json_option
@migration_url_option
@urls_option
@jobs_option
def upgrade(
    *, revision: str, options: dict[str, str], as_json: bool, url: str | None, targets: Targets, jobs: int | None
) -> None:
    """Upgrade the schema to REVISION, by default the newest.

    Runs concurrently with live writers: each step is short, waits for its locks for a moment, and is retried after a
    pause. Start an interrupted migration again; it continues. Only one runs at a time. Run preflight first.
    """

    def action(engine: Engine) -> Outcome:
        from gathering_pipeline import migrations

        migrations.upgrade(engine, revision, options)
        return _revision(engine)

    _run(action, url, targets, jobs, as_json=as_json)


@db.command(context_settings={"ignore_unknown_options": True})  # -1 is a revision
@click.argument("revision")
@yes_option
@x_option
@migration_url_option
def downgrade(revision: str, yes: bool, options: dict[str, str], url: str | None) -> None:
    """Downgrade the schema to REVISION, such as -1 or "base".

    -1 is the previous revision, and "base" is below the first. Deletes the objects of the later revisions with their
    data. Tables that existed before revision 006 are kept.
    """
    from gathering_pipeline import migrations

    if revision.startswith("-") and not revision[1:].isdecimal():
        raise click.NoSuchOption(revision)
    with _progress(), open_database(url, for_migrations=True) as database:
        if not yes:  # after the name of the database is printed
            click.confirm("This deletes the objects of the later revisions with their data. Continue?", abort=True)
        migrations.downgrade(database.engine, revision, options)
        click.echo(_revision(database.engine).text)


@db.command()
@json_option
@migration_url_option
@urls_option
@jobs_option
def current(as_json: bool, url: str | None, targets: Targets, jobs: int | None) -> None:
    """Print the schema's revision."""
    _run(_revision, url, targets, jobs, as_json=as_json)


@db.command()
@json_option
@migration_url_option
@urls_option
@jobs_option
def check(as_json: bool, url: str | None, targets: Targets, jobs: int | None) -> None:
    """Fail unless the schema is at the revision of this version.

    A quick check for the start of a service; doctor examines the schema itself.
    """

    def action(engine: Engine) -> Outcome:
        from gathering_pipeline import migrations

        with engine.connect() as connection:
            migrations.check(connection)
        return _revision(engine)

    _run(action, url, targets, jobs, as_json=as_json)


@db.command()
@click.argument("revision", default="head")
@click.option("--down", is_flag=True, help="Print a downgrade; REVISION must be FROM:TO, as in head:base.")
def sql(revision: str, down: bool) -> None:
    """Print the SQL of an upgrade to REVISION.

    For a DBA: psql -v ON_ERROR_STOP=1 -f FILE. REVISION may be FROM:TO if the schema is at FROM. Needs no database.
    """
    from gathering_pipeline import migrations

    click.echo(migrations.script(revision, down=down), nl=False)


@db.command()
@click.option("--repair", is_flag=True, help="Repair what can be repaired; docs/cli.md lists the locks.")
@json_option
@migration_url_option
@urls_option
@jobs_option
def doctor(repair: bool, as_json: bool, url: str | None, targets: Targets, jobs: int | None) -> None:
    """Report problems of the schema and the rows.

    Compares every column, constraint, index, trigger and function with a clean build, recounts the pipelines'
    counters, and looks for terminal runs with live nodes, expired leases, graphs that are broken or were never
    compiled, foreign triggers, transactions that hold back the events, and ids that run out.

    Reads every run and node run once. Run it as the owner of the tables; pg_monitor lets it see the sessions of other
    roles.
    """
    from gathering_pipeline.maintenance.doctor import doctor as run_doctor

    if _is_many(url, targets, jobs):
        _run(lambda engine: _summary(run_doctor(engine, repair=repair)), url, targets, jobs, as_json=as_json)
    with _progress(), open_database(url, for_migrations=True) as database:
        findings = run_doctor(database.engine, repair=repair)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            repaired = finding.outcome == "repaired"
            label, color = ("repaired", "green") if repaired else (finding.severity, "red")
            click.secho(label, fg=color, bold=True, nl=False)
            echo(f" {finding.code}: {finding.object}: {finding.message}")
            if not repaired:
                echo(f"    {finding.outcome or finding.advice}")
        if not findings:
            click.echo("no problems found")
    if _summary(findings).needs_action:
        click.get_current_context().exit(ACTION_NEEDED)


def _summary(findings: list[Finding]) -> Outcome:
    """The result of doctor in one line."""
    codes: dict[str, list[str]] = {"problems": [], "repaired": []}
    for finding in findings:
        codes["repaired" if finding.outcome == "repaired" else "problems"].append(finding.code)
    parts = [f"{what}: {', '.join(dict.fromkeys(found))}" for what, found in codes.items() if found]
    data = {"findings": [asdict(finding) for finding in findings]}
    return Outcome("; ".join(parts) or "no problems found", data, needs_action=bool(codes["problems"]))


@db.command()
@click.argument("role")
@click.option("--read-only", "purpose", flag_value="read-only", help="For a role that only reads.")
@click.option("--migrate", "purpose", flag_value="migrate", help="For the role that upgrades: it owns the schema.")
def grants(role: str, purpose: Purpose | None) -> None:
    """Print the SQL that gives ROLE the smallest rights of a service.

    A service can't write events and versions, which triggers write, nor delete events. For --migrate: where the tables
    exist, grant the role that owns them to ROLE instead. Needs no database.
    """
    from gathering_pipeline.maintenance.rights import grants as make_grants

    for statement in make_grants(role, purpose or "service"):
        click.echo(statement)


@db.command()
@json_option
@migration_url_option
def preflight(as_json: bool, url: str | None) -> None:
    """Show the locks an upgrade takes and the sessions blocking it.

    Lists the strongest lock that each pending step takes on existing tables, with their estimated rows. SHARE and
    stronger locks block writers while the step runs. The command itself takes no lock.
    """
    from gathering_pipeline.maintenance.preflight import preflight as run_preflight

    with open_database(url, for_migrations=True) as database, database.engine.connect() as connection:
        plan = run_preflight(connection)
    if as_json:
        print_json(asdict(plan))
    else:
        _print_preflight(plan)
    if plan.blockers:
        click.get_current_context().exit(ACTION_NEEDED)


def _print_preflight(plan: Preflight) -> None:
    click.echo(f"the schema is at revision {plan.revision or 'none'}; {len(plan.steps)} steps to {plan.target}")
    rows = [
        (
            step.revision,
            step.title,
            lock.table,
            lock.mode,
            "unknown" if lock.rows is None else f"{lock.rows:,}",
            f"{lock.bytes / 2**20:,.1f} MiB",
        )
        for step in plan.steps
        for lock in step.locks
    ]
    if rows:
        print_table(["Revision", "Step", "Table", "Lock", "#Rows (estimate)", "#Size"], rows)
    elif plan.steps:
        click.echo("none of them locks an existing table")
    for blocker in plan.blockers:
        age = "" if blocker.seconds is None else f", its transaction is {blocker.seconds:,.0f} s old"
        echo(f"blocked by {blocker.label}{age}: {blocker.reason}")


@db.command()
@click.option("--dry-run", is_flag=True, help="Print the steps and what prevents them; change nothing.")
@x_option
@migration_url_option
def widen(dry_run: bool, options: dict[str, str], url: str | None) -> None:
    """Change the INTEGER ids of runs and node runs to BIGINT.

    Revision 008 leaves the ids of large tables INTEGER. This runs concurrently with live writers: it copies each id
    into a second column, some rows at a time, and exchanges the columns in a short transaction. It needs space for the
    tables a second time. Start it again after an interruption; it continues.
    """
    from gathering_pipeline.maintenance.widening import plan as plan_widening
    from gathering_pipeline.maintenance.widening import widen as run_widening

    with _progress(), open_database(url, for_migrations=True) as database:
        if not dry_run:
            changed = run_widening(database.engine, options)
            click.echo(f"{', '.join(changed)}: BIGINT now" if changed else "no column is INTEGER")
            return
        with database.engine.connect() as connection:
            plan = plan_widening(connection)
    click.echo(f"INTEGER: {', '.join(plan.columns) or 'no column'}")
    for step in plan.steps:
        click.echo(f"    {step}")
    for obstacle in plan.obstacles:
        echo(f"prevented: {obstacle}")
    if plan.obstacles:
        click.get_current_context().exit(ACTION_NEEDED)


@db.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("arguments", metavar="[PSQL-ARGUMENT]...", nargs=-1, type=click.UNPROCESSED)
@migration_url_option
def shell(arguments: tuple[str, ...], url: str | None) -> None:
    """Start psql on the database, with the arguments that follow.

    As in: db shell -c "SELECT 1". The password is not in the arguments, which every user of the machine can see. psql
    is that of the system, else that of the embedded server.
    """
    from psycopg.conninfo import make_conninfo

    from gathering_pipeline import embedded
    from gathering_pipeline.urls import SECRET

    program = shutil.which("psql") or embedded.find_program("psql")
    if program is None:
        raise click.ClickException(
            "psql is not installed: install PostgreSQL's client (postgresql-client on Debian), or pip install"
            " 'gathering-pipeline[embedded]', which has it"
        )
    with open_database(url, for_migrations=True) as database:
        location = database.engine.url
    parameters = location.get_dialect()().create_connect_args(location)[1]
    environment = os.environ | {"PGPASSWORD": parameters.pop("password")} if "password" in parameters else None
    if hidden := sorted(name for name in parameters if SECRET.search(name)):
        raise click.ClickException(
            f"the URL has {hidden[0]}, which psql takes only from its arguments: start it by hand"
        )
    interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)  # psql has a handler of its own
    try:
        command = [program, "--dbname", make_conninfo(**parameters), *arguments]
        done = subprocess.run(command, env=environment, check=False)  # noqa: S603 - the program was found above
    finally:
        signal.signal(signal.SIGINT, interrupted)
    click.get_current_context().exit(done.returncode)
