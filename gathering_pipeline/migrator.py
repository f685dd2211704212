"""Runs migrations: steps, locks, retries, yielding, the offline script. ``alembic/env.py`` wires it to Alembic.

Only one migrator works on a database at a time. The SQL of a revision consists of steps. A step is idempotent and a
transaction of its own (or an index that is built concurrently). It waits for a lock for ``lock_timeout`` at most; if it
gets none, it is retried after a pause in which other sessions get theirs.
"""

from __future__ import annotations

import json
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from alembic import op
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.script.revision import ResolutionError
from alembic.util import CommandError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy import inspect, text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError, PendingRollbackError

from gathering_pipeline import urls
from gathering_pipeline.connections import check_usable, open_second_connection, temporary_engine
from gathering_pipeline.errors import (
    AdoptionError,
    ConfigurationError,
    DatabaseUnavailableError,
    SchemaRevisionError,
)

SCHEMA = "circle"
VERSION_TABLE = f"{SCHEMA}.alembic_version"
MIGRATION_LOCK = 0x6761746865720007
"""Key of the advisory lock of the only migrator; an arbitrary constant. Advisory locks belong to one database."""
SMALL_TABLE = 8 * 1024 * 1024
"""Size in bytes below which an index is built at once, which is faster, instead of concurrently."""
LOW_IMPACT = {"statement_timeout": 0, "max_parallel_maintenance_workers": 0, "max_parallel_workers_per_gather": 0}
"""Session parameters for work concurrently with live services: no time limit, one core."""
SEARCH_PATH = "pg_catalog, pg_temp"
"""Of sessions that create or repair objects: a name without a schema is PostgreSQL's own, although others may
create objects in ``public``. CHECKs and views keep for good what their names and operators meant when made."""
RETRYABLE = ("55P03", "40P01")
"""SQLSTATEs after which a statement is retried: lock_not_available, deadlock_detected."""
_QUERY_CANCELED = "57014"
_INSUFFICIENT_PRIVILEGE = "42501"
_READ_ONLY = "25006"
_RESOURCE_CLASSES = ("53", "58")
_TABLES_DIFFER = "PL090"  # raised by a revision that refuses existing tables; its detail is a JSON list of differences
_CREATE_SCHEMA = f"""DO $$ BEGIN
    -- IF NOT EXISTS alone requires the right to create a schema even if it exists
    IF to_regnamespace('{SCHEMA}') IS NULL THEN CREATE SCHEMA IF NOT EXISTS {SCHEMA}; END IF;
END $$"""
# The script compares revisions by >=, which holds between those that it knows only.
_REFUSE_UNKNOWN = f"""DO $$
DECLARE
    found text;
BEGIN
    IF to_regclass('{VERSION_TABLE}') IS NOT NULL THEN
        SELECT version_num INTO found FROM {VERSION_TABLE} WHERE version_num NOT IN ({{names}});
        IF found IS NOT NULL THEN
            RAISE EXCEPTION 'the schema is at revision %, which this script does not know', found;
        END IF;
    END IF;
END $$"""  # noqa: S608 - constant names

# Of tables that revision 006 adopted the downgrade drops none: they lack the comment.
_FOREIGN_KEYS = f"""
SELECT format('%I of %s', f.conname, f.conrelid::regclass) FROM pg_constraint f
JOIN pg_class t ON t.oid = f.confrelid JOIN pg_class h ON h.oid = f.conrelid
WHERE f.contype = 'f' AND f.conparentid = 0 AND t.relnamespace = to_regnamespace('{SCHEMA}')
  AND t.relname = ANY (:dropped) AND NOT (h.relnamespace = t.relnamespace AND h.relname = ANY (:ours))
  AND (t.relname NOT IN ('pipelines', 'pipeline_runs') OR EXISTS (
      SELECT FROM pg_constraint k WHERE k.conrelid = t.oid AND k.contype = 'p'
          AND obj_description(k.oid, 'pg_constraint') = 'created by gathering_pipeline revision 006_pipelines'))
ORDER BY 1"""  # noqa: S608 - a constant name

Direction = Literal["upgrade", "downgrade"]
T = TypeVar("T")

logger = logging.getLogger("alembic.gathering_pipeline")


# Options


class Options(BaseModel):
    """Options of a migration; docs/operations.md explains them to operators.

    Attributes:
        lock_timeout: Longest wait of a step for a lock, and so of the sessions that queue behind it. Never zero, which
            would mean no limit.
        patience: Seconds for which a step is retried, and for which another migrator is waited for.
        yields: Option ``yield``: whether a long step is cancelled and retried if a session waits for it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    lock_timeout: Annotated[str, Field(pattern=r"^([1-9]\d{0,5} ?(ms|s)?|[1-9]\d{0,3} ?min)$")] = "100ms"
    patience: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 600
    yields: Annotated[bool, Field(alias="yield")] = True


_OPTION_FORMS = {
    "lock_timeout": "write a duration such as 100ms, 2s or 1min",
    "patience": "write a number of seconds",
    "yield": "write yes or no",
}


def validate_options(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the options unchanged if all names are known.

    Raises:
        ConfigurationError: A name is unknown, probably misspelt.
    """
    for name in options:
        if name not in _OPTION_FORMS:
            raise ConfigurationError(f"there is no option {name!r}: there are {', '.join(_OPTION_FORMS)}")
    return options


def read_options(arguments: Mapping[str, Any], attributes: Mapping[str, Any]) -> Options:
    """Read the options of a migration.

    Args:
        arguments: Arguments ``-x NAME=VALUE`` of the command line; they override the attributes.
        attributes: Attributes of Alembic's configuration, which a host program sets; may have other names, too.

    Raises:
        ConfigurationError: An option is unknown or has an invalid value.
    """
    given = {name: attributes[name] for name in _OPTION_FORMS if name in attributes} | dict(validate_options(arguments))
    try:
        return Options.model_validate(given)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        raise ConfigurationError(f"the option {name} can't be {given[name]!r}: {_OPTION_FORMS[name]}") from None


# Revisions


def scripts() -> Path:
    """The folder of ``env.py`` and the revisions: inside an installed wheel, else next to the package.

    Raises:
        ConfigurationError: There is none on the disk: the package is imported from a zip file.
    """
    package = Path(__file__).parent
    for folder in (package / "_alembic", package.parent / "alembic"):
        if folder.is_dir():
            return folder
    raise ConfigurationError(f"the revisions can't be read from {package}: install the package into a folder, by pip")


def revision_names(directory: ScriptDirectory) -> list[str]:
    """All revisions, the first one first."""
    return [revision.revision for revision in directory.walk_revisions()][::-1]


def current(connection: Connection) -> str | None:
    """The revision of the schema; None if it has none."""
    context = MigrationContext.configure(connection, opts={"version_table_schema": SCHEMA})
    try:
        return context.get_current_revision()
    except DBAPIError as error:
        if sqlstate(error) != _INSUFFICIENT_PRIVILEGE:
            raise
        raise ConfigurationError(
            f"the role can't read {VERSION_TABLE} ({_primary(error)}): docs/operations.md has the rights of a service"
        ) from error


def missing_revision_hint(connection: Connection) -> str | None:
    """How to restore the revision of a schema that was migrated but has none, as after a restore; else None."""
    if current(connection) is not None:
        return None
    inspector = inspect(connection)
    tables = inspector.get_table_names(SCHEMA)
    if not {"pipelines", "pipeline_versions"}.issubset(tables):
        return None
    # a host may have tables with these names, but not with this column of revision 010
    if all(column["name"] != "version" for column in inspector.get_columns("pipelines", SCHEMA)):
        return None
    # the lowest revision that the schema can have: an upgrade repeats the later ones, which are idempotent
    revision = "011_lifecycle" if "pipeline_counters" in tables else "010_graph"
    insert = f"INSERT INTO {VERSION_TABLE} VALUES ('{revision}')"  # noqa: S608 - constant names
    return f"the schema was migrated, but the row with its revision is missing: restore it by {insert}"


def _refuse_missing_revision(connection: Connection) -> None:
    if hint := missing_revision_hint(connection):
        raise AdoptionError([hint])


# Steps


class Step(NamedTuple):
    """A step of a revision: its title, its SQL, and whether it builds an index concurrently."""

    title: str
    sql: str
    is_index: bool


def steps(revision: str, wanted: str = "upgrade", folder: Path | None = None) -> list[Step]:
    """Read the steps of a revision in their order.

    They are in ``sql/REVISION/N_subject.sql``, those of the downgrade in ``sql/REVISION/down/``. A line ``-- == TITLE``
    begins a step, ``-- == index: SCHEMA.NAME`` one that builds an index concurrently.

    Args:
        revision: Its id.
        wanted: ``upgrade`` or ``downgrade``.
        folder: The folder of ``env.py``; None: that of this package.
    """
    place = (folder or scripts()) / "sql" / revision
    files = [path for path in (place if wanted == "upgrade" else place / "down").iterdir() if path.suffix == ".sql"]
    found: list[Step] = []
    for path in sorted(files, key=lambda path: int(path.name.partition("_")[0])):
        _, *parts = re.split(r"^-- == (index: )?(.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for index, title, sql in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
            found.append(Step(title, sql.strip(), bool(index)))
    return found


def run_steps(revision: str, direction: Direction) -> None:
    """Run the steps of one direction of a revision in order: the only function that revision files call."""
    context = op.get_context()
    migrator: Migrator = context.opts["migrator"]
    found = steps(revision, direction, Path(migrator.directory.dir))
    with context.autocommit_block():
        if context.as_sql:
            for line in _script_of_steps(revision, direction, found, migrator.options.lock_timeout):
                context.impl.static_output(line)
            return
        assert context.connection is not None
        _refuse_missing_revision(context.connection)  # the steps would replace newer functions by older ones
        for step in found:
            run_step(context.connection, step, migrator.options)


def run_step(
    connection: Connection, step: Step, options: Options, after_failure: Callable[[], None] = lambda: None
) -> None:
    """Run a step on a connection in autocommit: statements sent together are one transaction of the server."""
    logger.debug("step: %s", step.title)
    if step.is_index:
        retry(lambda: _build_index(connection, step, options), options, after_failure)
    elif options.yields and ("VALIDATE CONSTRAINT" in step.sql or step.sql.startswith("ANALYZE ")):
        retry(lambda: execute_yielding(connection, step.sql), options, after_failure)
    else:
        retry(lambda: execute(connection, step.sql), options, after_failure)


def _build_index(connection: Connection, step: Step, options: Options) -> None:
    invalid = text("SELECT EXISTS (SELECT FROM pg_index WHERE indexrelid = to_regclass(:name) AND NOT indisvalid)")
    if connection.scalar(invalid, {"name": step.title}):
        # left by an interrupted build; IF NOT EXISTS would take it for a complete index
        execute(connection, f"DROP INDEX {step.title}")
    table = re.search(r"\bON (\S+)", step.sql)
    small = text("SELECT coalesce(pg_relation_size(to_regclass(:name)), 0) < :limit")
    if not options.yields or (table is not None and connection.scalar(small, {"name": table[1], "limit": SMALL_TABLE})):
        # takes a moment; or succeeds although another session sends CREATE INDEX IF NOT EXISTS all the time
        execute(connection, step.sql.replace(" CONCURRENTLY", ""))
        return
    # A concurrent build waits for other transactions and blocks no writer, so it needs no lock timeout.
    execute(connection, "SET lock_timeout = 0")
    try:
        execute_yielding(connection, step.sql)
    finally:
        if not connection.invalidated:
            execute(connection, f"SET lock_timeout = '{options.lock_timeout}'")


# Locks and retries


def sqlstate(error: DBAPIError) -> str | None:
    """PostgreSQL's error code; None if the connection broke."""
    return getattr(error.orig, "sqlstate", None)


def _primary(error: DBAPIError) -> str:
    """PostgreSQL's message, without the statement and its context."""
    return str(getattr(getattr(error.orig, "diag", None), "message_primary", None) or error.orig)


def retry(action: Callable[[], T], options: Options, after_failure: Callable[[], None] = lambda: None) -> T:
    """Run an action until it gets its locks, and return its result. The growing pauses let other sessions take theirs.

    Args:
        action: What to run.
        options: ``patience`` limits the time, ``lock_timeout`` is named in the error.
        after_failure: Called before each pause.

    Raises:
        DatabaseUnavailableError: The action didn't get its locks within ``patience``.
    """
    deadline, pause = time.monotonic() + options.patience, 0.2
    while True:
        try:
            return action()
        except (DBAPIError, YieldedError) as error:
            if isinstance(error, YieldedError):
                reason = (
                    "other sessions waited for the step: stop those that send CREATE INDEX or VACUUM, or set yield=no"
                )
            elif sqlstate(error) in RETRYABLE:
                reason = (
                    f"a lock was not free within {options.lock_timeout}: 'gathering-pipeline db preflight' or"
                    " pg_stat_activity shows the open transaction"
                )
            else:
                raise
            after_failure()
            if time.monotonic() > deadline:
                message = f"the migration was retried for {options.patience:.0f} s, but {reason}"
                raise DatabaseUnavailableError(message) from error
            logger.info("%s; retrying", reason)
        time.sleep(pause * random.uniform(0.75, 1.25))  # noqa: S311 - only spreads the retries
        pause = min(pause * 1.5, 2.0)


@contextmanager
def migration_lock(connection: Connection, options: Options) -> Iterator[None]:
    """Hold the lock of the only migrator during a block.

    The lock is polled: a session that waits inside a statement would delay a concurrent index build.

    Raises:
        DatabaseUnavailableError: Another migrator held it for longer than ``patience``.
    """
    deadline, logged = time.monotonic() + options.patience, False
    while True:
        locked = connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": MIGRATION_LOCK})
        connection.commit()
        if locked:
            break
        if time.monotonic() > deadline:
            raise DatabaseUnavailableError(
                f"another migrator has been running for {options.patience:.0f} s: try again later"
            )
        if not logged:
            logger.info("waiting for another migrator")
            logged = True
        time.sleep(0.2)
    try:
        yield
    finally:
        connection.rollback()
        if not connection.invalidated:
            connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": MIGRATION_LOCK})
            connection.commit()


@contextmanager
def low_impact_session(connection: Connection, *restored: str) -> Iterator[None]:
    """Set the parameters of ``LOW_IMPACT`` and the search path during a block, then restore those of the session.

    Args:
        connection: Outside of a transaction, or in autocommit.
        restored: Further parameters to restore, which the block changes.
    """
    names = (*LOW_IMPACT, "search_path", *restored)
    session_values = (
        "SELECT name, current_setting(name) AS value FROM pg_settings WHERE name = ANY (:names) AND source = 'session'"
    )
    before = connection.execute(text(session_values), {"names": list(names)}).all()
    connection.commit()
    try:
        execute(connection, "; ".join(f"SET {name} = {value}" for name, value in LOW_IMPACT.items()))
        execute(connection, f"SET search_path = {SEARCH_PATH}")
        connection.commit()
        yield
    finally:
        connection.rollback()
        if not connection.invalidated:
            execute(connection, "; ".join(f"RESET {name}" for name in names))
            for name, value in before:
                connection.execute(text("SELECT set_config(:name, :value, false)"), {"name": name, "value": value})
            connection.commit()


# Statements, and those that yield


class YieldedError(Exception):
    """A long statement was cancelled because another session waited for it."""


def execute(connection: Connection, sql: str) -> None:
    """Send SQL unchanged; percent signs are not placeholders."""
    connection.exec_driver_sql(sql, execution_options={"no_parameters": True})


def execute_yielding(connection: Connection, sql: str) -> None:
    """Send SQL that blocks no writer, and cancel it as soon as another session waits for it.

    A ``CREATE INDEX IF NOT EXISTS`` of another session waits until a build or a validation ends, and all writers queue
    behind it. If the build in turn waits for that session's transaction, it is a deadlock.

    Raises:
        YieldedError: The statement was cancelled. An index build leaves its index INVALID.
        DatabaseUnavailableError: The server takes no second connection, which monitors the waiting sessions.
    """
    ended, yielded = threading.Event(), threading.Event()
    pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
    cancel_if_blocking = (
        f"SELECT pg_cancel_backend({pid}) WHERE EXISTS (SELECT FROM pg_locks WHERE NOT granted"  # noqa: S608 - a number
        f" AND waitstart < clock_timestamp() - interval '20 ms' AND {pid} = ANY (pg_blocking_pids(pid)))"
    )
    second = open_second_connection(connection)

    def monitor() -> None:
        try:
            cursor = second.cursor()
            while not ended.wait(0.03):
                cursor.execute(cancel_if_blocking.encode())
                if cursor.fetchone() is not None:
                    yielded.set()
        except Exception as error:  # noqa: BLE001 - any failure: the step continues without yielding
            logger.warning("the sessions that wait for the step are no longer monitored: %s", error)
        finally:
            second.close()

    def stop() -> None:
        ended.set()
        thread.join(10)  # with a limit, because a server that hangs never answers the monitor

    thread = threading.Thread(target=monitor, daemon=True)
    thread.start()
    try:
        execute(connection, sql)
    except DBAPIError as error:
        stop()  # the cancellation may arrive before the monitor has recorded it
        if yielded.is_set() and sqlstate(error) == _QUERY_CANCELED:
            raise YieldedError from error
        raise
    finally:
        stop()


@contextmanager
def translated_errors(how_to_continue: str) -> Iterator[None]:
    """Raise this package's errors instead of the driver's.

    Args:
        how_to_continue: What to do when the connection broke, or the server lacked something.
    """
    try:
        yield
    except (DBAPIError, PendingRollbackError) as error:
        # SQLAlchemy raises the latter instead of the error of a broken connection
        if isinstance(error, PendingRollbackError) or error.connection_invalidated:
            message = f"the connection broke during the migration: {how_to_continue}"
            raise DatabaseUnavailableError(message) from error
        if sqlstate(error) == _TABLES_DIFFER:
            raise AdoptionError(json.loads(error.orig.diag.message_detail)) from error  # type: ignore[union-attr]
        if sqlstate(error) == _INSUFFICIENT_PRIVILEGE:
            raise ConfigurationError(
                f"the role lacks a right ({_primary(error)}): migrate as the owner of schema {SCHEMA} and its"
                " tables, or, where there is no schema yet, as a role that may create one"
            ) from error
        if sqlstate(error) == _READ_ONLY:
            raise DatabaseUnavailableError(
                f"the server or the session is read-only ({_primary(error)}): connect to the primary, or set"
                " default_transaction_read_only to off"
            ) from error
        if (sqlstate(error) or "").startswith(_RESOURCE_CLASSES):
            raise DatabaseUnavailableError(
                f"the server lacks disk space, memory or another resource, or can't use a file ({_primary(error)}):"
                f" {how_to_continue}"
            ) from error
        raise


# A run of Alembic


@contextmanager
def open_connection(given: object, url: str | None) -> Iterator[Connection]:
    """Open the connection of a migration.

    Args:
        given: An engine, or a connection outside of a transaction; anything else: ``urls.locate`` decides.
        url: The explicit URL for ``urls.locate``.

    Raises:
        ConfigurationError: The URL or the connection can't be used.
    """
    if isinstance(given, Connection):
        if given.in_transaction():
            raise ConfigurationError("the connection is inside a transaction: commit it first, each step needs its own")
        check_usable(given, "the connection")
        yield given
    elif isinstance(given, Engine):
        with given.connect() as connection:
            check_usable(connection, "the engine")
            yield connection
    else:
        location = urls.locate(url, for_migrations=True)
        with temporary_engine(location.resolve(), location.settings) as engine, engine.connect() as connection:
            yield connection


@dataclass(frozen=True, slots=True)
class Migrator:
    """One run of an Alembic command.

    Attributes:
        options: How it behaves.
        directory: The revisions.
        target: The revision that the schema is migrated to; None for a command that doesn't change the schema, such as
            ``current`` and ``check``.
    """

    options: Options
    directory: ScriptDirectory
    target: str | None

    def run(self, connection: Connection, migrate: Callable[[], None]) -> None:
        """Run the command on a database.

        Args:
            connection: Outside of a transaction.
            migrate: Configures Alembic for the connection and runs the revisions.
        """
        if self.target is None:
            migrate()
            connection.rollback()
            return
        with migration_lock(connection, self.options), low_impact_session(connection, "lock_timeout"):
            execute(connection, f"SET lock_timeout = '{self.options.lock_timeout}'")
            execute(connection, _CREATE_SCHEMA)
            start = current(connection)
            self._refuse_foreign_keys(connection, start)
            connection.commit()

            def attempt() -> None:
                now = current(connection) if self._is_relative else start
                connection.rollback()
                if now != start:  # a retry would go too far
                    raise DatabaseUnavailableError(
                        f"a lock was not free, and the schema is at {now or 'none'} now: {self._how_to_continue}"
                    )
                migrate()

            try:
                retry(attempt, self.options, after_failure=connection.rollback)
            except CommandError as error:
                connection.rollback()
                if hint := missing_revision_hint(connection):
                    raise AdoptionError([hint]) from error
                found = current(connection)
                if found is None or found in revision_names(self.directory):
                    raise
                raise SchemaRevisionError(found, self.directory.get_current_head()) from error
            _refuse_missing_revision(connection)  # a downgrade without a revision does nothing

    def _refuse_foreign_keys(self, connection: Connection, start: str | None) -> None:
        """Refuse a downgrade that would stop half-way, at a table that foreign keys of the host refer to.

        Raises:
            ConfigurationError: There are such foreign keys; nothing was changed.
        """
        all_tables, dropped = (self._tables(names) for names in (None, self._undone(start)))
        keys = connection.scalars(text(_FOREIGN_KEYS), {"dropped": dropped, "ours": all_tables}).all()
        if keys:
            raise ConfigurationError(
                f"foreign keys refer to tables that the downgrade drops: {', '.join(keys)}: drop them first; nothing"
                " was changed"
            )

    def _undone(self, start: str | None) -> list[str]:
        """The revisions that the command takes back from ``start``; none if it is an upgrade."""
        names, target = revision_names(self.directory), str(self.target)
        if start not in names:
            return []
        at = names.index(start)
        if target.startswith("-") and target[1:].isdecimal():
            return names[max(at - int(target[1:]) + 1, 0) : at + 1]
        if target == "base":
            return names[: at + 1]
        try:
            revision = self.directory.get_revision(target)
        except CommandError:  # relative to a revision, or unknown, which Alembic says itself
            try:
                steps = self.directory._downgrade_revs(target, start)  # noqa: SLF001 - as the command resolves it
            except CommandError:
                return []
            return [step.revision.revision for step in steps]
        return names[names.index(revision.revision) + 1 : at + 1]

    def _tables(self, revisions: list[str] | None) -> list[str]:
        """The tables that revisions create; None: all revisions."""
        names = revision_names(self.directory) if revisions is None else revisions
        folder = Path(self.directory.dir)
        sql = "\n".join(step.sql for name in names for step in steps(name, "upgrade", folder))
        return re.findall(rf"CREATE TABLE (?:IF NOT EXISTS )?{SCHEMA}\.(\w+)", sql)

    def script(self, steps_sql: str) -> str:
        """Complete the SQL that Alembic wrote offline to a script that can be run again after an interruption."""
        session = {**LOW_IMPACT, "search_path": SEARCH_PATH}
        parameters = "".join(f"SET {name} = {value};\n" for name, value in session.items())
        known = _REFUSE_UNKNOWN.format(names=", ".join(f"'{name}'" for name in revision_names(self.directory)))
        head = f"SET lock_timeout = '{self.options.lock_timeout}';\n{parameters}\n{_CREATE_SCHEMA};\n\n{known};\n\n"
        # Alembic assumes that its table and row don't exist
        body = steps_sql.replace(f"CREATE TABLE {VERSION_TABLE} ", f"CREATE TABLE IF NOT EXISTS {VERSION_TABLE} ")
        insert = re.compile(rf"(INSERT INTO {VERSION_TABLE} \(version_num\)) VALUES \(('\w+')\)[^;]*")  # noqa: S608 - a pattern
        once = rf"\1 SELECT \2 WHERE NOT EXISTS (SELECT FROM {VERSION_TABLE})"  # noqa: S608 - constant names
        return head + insert.sub(once, body)

    @contextmanager
    def translated_errors(self) -> Iterator[None]:
        """Raise this package's errors instead of the driver's, and name the revisions where one is unknown."""
        try:
            with translated_errors(self._how_to_continue):
                yield
        except CommandError as error:
            if isinstance(error.__cause__, ResolutionError):
                names = ", ".join(revision_names(self.directory))
                raise CommandError(f"{error}: there are base, {names} and head") from error
            raise

    @property
    def _is_relative(self) -> bool:
        """Whether the target is +N or -N, which is counted from the current revision."""
        return self.target is not None and self.target.startswith(("+", "-"))

    @property
    def _how_to_continue(self) -> str:
        return "start it again, it continues where it was" + (
            "; name the revision instead of a number" if self._is_relative else ""
        )


def _script_of_steps(revision: str, direction: Direction, found: list[Step], lock_timeout: str) -> Iterator[str]:
    """The steps as a part of a script for ``psql -v ON_ERROR_STOP=1``; a revision that is done is skipped."""
    reached = f"EXISTS (SELECT FROM {VERSION_TABLE} WHERE version_num >= '{revision}')"
    done = reached if direction == "upgrade" else f"NOT {reached}"
    yield f"SELECT {done} AS done \\gset\n\\if :done\n\\else"
    for title, body, is_index in found:
        yield f"-- {title}"
        if is_index:
            yield (
                "DO $$ BEGIN\n"
                f"IF EXISTS (SELECT FROM pg_index WHERE indexrelid = to_regclass('{title}') AND NOT indisvalid) THEN\n"
                f"    DROP INDEX {title};\nEND IF;\nEND $$;\n"
                f"SET lock_timeout = 0;\n{body}\nSET lock_timeout = '{lock_timeout}';"
            )
        elif re.search(r"^\s*COMMIT;", body, re.MULTILINE):
            yield body  # it contains its own commits
        else:
            yield f"BEGIN;\n{body}\nCOMMIT;"
    yield "\\endif"
