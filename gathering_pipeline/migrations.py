"""Find the revision scripts and run them; how they are run stands in their ``env.py``, which uses what is here."""

from __future__ import annotations

import io
import logging
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import DBAPIError

from gathering_pipeline.errors import ConfigurationError, DatabaseUnavailableError, SchemaRevisionError, shorten

SCHEMA = "circle"
MIGRATOR = 0x6761746865720007
"""Key of the advisory lock under which ``env.py`` is the only migrator; any constant, the lock is one of a database."""
SMALL_TABLE = 8 * 1024 * 1024
"""Size in bytes below which ``env.py`` builds an index at once, which is quicker, instead of concurrently."""
OPTIONS = ("lock_timeout", "patience", "yield")
"""Options of a migration; docs/operations.md explains them."""
GENTLE = {"statement_timeout": 0, "max_parallel_maintenance_workers": 0, "max_parallel_workers_per_gather": 0}
"""How a session works beside live services: as long as it takes, and on one core, the others are theirs."""
BUSY = ("55P03", "40P01")
"""SQLSTATEs after which the same is tried again: a lock that was not free, a deadlock."""
_CANCELED = "57014"

logger = logging.getLogger("alembic.gathering_pipeline")

_turn = threading.Lock()
"""Alembic's context is one of the process. Processes are kept apart by the lock that env.py takes in the database."""

Target = str | URL | Engine | Connection | None
"""What is migrated. A connection must not be in a transaction; None: what the environment says."""


def scripts() -> Path:
    """The folder of ``env.py`` and the revisions: inside an installed wheel, else beside the package."""
    package = Path(__file__).parent
    bundled = package / "_alembic"
    return bundled if bundled.is_dir() else package.parent / "alembic"


def known(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same options; a misspelt one would be passed over.

    Raises:
        ConfigurationError: There is none of a name.
    """
    for name in options:
        if name not in OPTIONS:
            raise ConfigurationError(f"there is no option {name!r}: there are {', '.join(OPTIONS)}")
    return options


def config(target: Target = None, options: Mapping[str, Any] | None = None) -> Config:
    """Alembic's configuration, without any file and without logging of its own; ``env.py`` tells the options."""
    result = Config()
    result.set_main_option("script_location", str(scripts()).replace("%", "%%"))
    result.set_main_option("path_separator", "os")
    if isinstance(target, (Engine, Connection)):
        result.attributes["connection"] = target
    elif target is not None:
        result.attributes["url"] = target if isinstance(target, str) else target.render_as_string(hide_password=False)
    result.attributes.update(known(options or {}))
    return result


def upgrade(target: Target = None, revision: str = "head", options: Mapping[str, Any] | None = None) -> None:
    """Bring the schema to a revision.

    Args:
        target: A URL, an engine, or a connection outside of a transaction; None: as ``Database()`` finds it.
        revision: Its name, ``head``, or ``+N``.
        options: ``lock_timeout``, the longest wait of a step for a lock, as ``"100ms"``; ``patience``, for how many
            seconds a step is tried again; ``yield``, whether a long step gives way to who waits behind it.

    Raises:
        AdoptionError: Tables or rows are there that can't be taken over; nothing was changed.
        ConfigurationError: The URL, the server, the connection or an option can't be used.
        DatabaseUnavailableError: Other transactions or another migrator stood in the way all the time.
        SchemaRevisionError: The schema is at a revision that this code doesn't know.
    """
    with _turn:
        command.upgrade(config(target, options), revision)


def downgrade(target: Target, revision: str, options: Mapping[str, Any] | None = None) -> None:
    """Take the schema back to a revision: its name, ``base``, which is below all of them, or ``-N``.

    The rest of the arguments and the errors are those of ``upgrade``.
    """
    with _turn:
        command.downgrade(config(target, options), revision)


@cache
def head() -> str:
    """The revision that this code is written for."""
    revision = ScriptDirectory.from_config(config()).get_current_head()
    assert revision is not None, "the scripts are part of the package"
    return revision


def current(connection: Connection) -> str | None:
    """The revision of the schema; None where there is none yet."""
    context = MigrationContext.configure(connection, opts={"version_table_schema": SCHEMA})
    return context.get_current_revision()


def lost(connection: Connection) -> str | None:
    """What to do where the schema was migrated but has no revision, as a restore may leave it; else None."""
    if current(connection) is not None:
        return None
    inspector = inspect(connection)
    tables = inspector.get_table_names(SCHEMA)
    if not {"pipelines", "pipeline_versions"}.issubset(tables):
        return None
    # a host may have tables of such names, but not this column of 009, too
    if all(column["name"] != "version" for column in inspector.get_columns("pipelines", SCHEMA)):
        return None
    # at least this one: an upgrade runs again what comes after it, which does no harm
    revision = "011b_events" if "pipeline_events" in tables else "009b_lifecycle"
    insert = f"INSERT INTO {SCHEMA}.alembic_version VALUES ('{revision}')"  # noqa: S608 - our own names
    return f"the schema was migrated, but the row with its revision is gone: put it back by {insert}"


def check(connection: Connection) -> None:
    """Make sure that the schema is at the revision of this code.

    Raises:
        SchemaRevisionError: It is at another one.
    """
    found, expected = current(connection), head()
    if found != expected:
        raise SchemaRevisionError(found, expected)


class Step(NamedTuple):
    """A step of a revision: what it does, its SQL, and whether it builds an index concurrently."""

    what: str
    sql: str
    is_index: bool


def revisions() -> list[str]:
    """All revisions, the first one first."""
    return [revision.revision for revision in ScriptDirectory.from_config(config()).walk_revisions()][::-1]


def steps(revision: str, wanted: str = "upgrade", folder: Path | None = None) -> list[Step]:
    """Read the steps of a revision in their order.

    They are in ``sql/REVISION/N_subject.sql``, those of the downgrade in ``sql/REVISION/down/``. A line ``-- == WHAT``
    begins a step, ``-- == index: SCHEMA.NAME`` one that builds an index.

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
        for index, what, sql in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
            found.append(Step(what, sql.strip(), bool(index)))
    return found


def script(revision: str = "head", *, down: bool = False) -> str:
    """The SQL that a migration would run, for ``psql -v ON_ERROR_STOP=1``.

    Args:
        revision: ``TO`` or ``FROM:TO``; a downgrade needs both.
        down: Whether it is a downgrade.

    Raises:
        ConfigurationError: A downgrade's revision is not ``FROM:TO``.
    """
    if down and not all(revision.partition(":")):
        raise ConfigurationError(f"a downgrade needs both ends: write FROM:TO, as in head:{revisions()[1]}")
    settings = config()
    settings.output_buffer = io.StringIO()
    with _turn:
        (command.downgrade if down else command.upgrade)(settings, revision, sql=True)
    return settings.output_buffer.getvalue()


class GaveWayError(Exception):
    """Somebody waited behind a statement that takes long, which was broken off for that."""


def sqlstate(error: DBAPIError) -> str | None:
    """The code of PostgreSQL; None where the connection broke."""
    return getattr(error.orig, "sqlstate", None)


def execute(connection: Connection, sql: str) -> None:
    """Send SQL as it stands, percent signs included."""
    connection.exec_driver_sql(sql, execution_options={"no_parameters": True})


@contextmanager
def gently(connection: Connection, *more: str) -> Iterator[None]:
    """Have the session work as GENTLE says; then set back what was there, and ``more``: a host may have its own."""
    names = (*GENTLE, *more)
    own = (
        "SELECT name, current_setting(name) AS value FROM pg_settings WHERE name = ANY (:names) AND source = 'session'"
    )
    found = connection.execute(text(own), {"names": list(names)}).all()
    connection.commit()
    try:
        execute(connection, "; ".join(f"SET {name} = {value}" for name, value in GENTLE.items()))
        connection.commit()
        yield
    finally:
        connection.rollback()
        if not connection.invalidated:
            execute(connection, "; ".join(f"RESET {name}" for name in names))
            for name, value in found:
                connection.execute(text("SELECT set_config(:name, :value, false)"), {"name": name, "value": value})
            connection.commit()


def _second(connection: Connection) -> psycopg.Connection[Any]:
    """A connection like this one, but outside of the host's pool; for a thread, so never an async one."""
    try:
        if connection.dialect.is_async:
            info = connection.connection.driver_connection.info  # type: ignore[union-attr]
            here = {"host": info.host, "hostaddr": info.hostaddr, "port": info.port, "password": info.password}
            return psycopg.connect(**info.get_parameters() | here, autocommit=True)
        pooled = connection.engine.pool.recreate().connect()  # by the host's own way to connect
        other = pooled.driver_connection
        pooled.detach()
        assert isinstance(other, psycopg.Connection)
        other.autocommit = True
    except psycopg.OperationalError as error:
        reason = shorten(str(error).strip(), 200)
        raise DatabaseUnavailableError(f"a second connection, to see who waits, is not to be had: {reason}") from error
    return other


def execute_yielding(connection: Connection, sql: str) -> None:
    """Send SQL that blocks no writer, and break it off as soon as it does.

    A ``CREATE INDEX IF NOT EXISTS`` waits until a build or a validation is over, all writers wait behind it, and a
    build that waits for its transaction in turn would be a deadlock.

    Raises:
        GaveWayError: It was broken off. A build leaves its index INVALID then.
        DatabaseUnavailableError: There is no second connection, by which to see who waits.
    """
    over, gave_way = threading.Event(), threading.Event()
    me = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
    cancel = (
        f"SELECT pg_cancel_backend({me}) WHERE EXISTS (SELECT FROM pg_locks WHERE NOT granted"  # noqa: S608 - a number
        f" AND waitstart < clock_timestamp() - interval '20 ms' AND {me} = ANY (pg_blocking_pids(pid)))"
    )
    other = _second(connection)

    def watch() -> None:
        try:
            cursor = other.cursor()
            while not over.wait(0.03):
                cursor.execute(cancel.encode())
                if cursor.fetchone() is not None:
                    gave_way.set()
        except Exception as error:  # noqa: BLE001 - whatever it was: it goes on without giving way, and that is told
            logger.warning("nobody watches any more who waits behind the step: %s", error)
        finally:
            other.close()

    def stop() -> None:
        over.set()
        watcher.join(10)  # a server that hangs doesn't answer it any more

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        execute(connection, sql)
    except DBAPIError as error:
        stop()  # the cancellation is there before the watcher knows that it sent one
        if gave_way.is_set() and sqlstate(error) == _CANCELED:
            raise GaveWayError from error
        raise
    finally:
        stop()
