"""Find the revision scripts and run them; how they are run stands in their ``env.py``."""

from __future__ import annotations

import io
import re
import threading
from functools import cache
from pathlib import Path
from typing import NamedTuple

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import URL, Connection, Engine

from gathering_pipeline.errors import SchemaRevisionError

SCHEMA = "circle"
MIGRATOR = 0x6761746865720007
"""Key of the advisory lock under which ``env.py`` is the only migrator."""

_turn = threading.Lock()
"""Alembic's context is one of the process. Processes are kept apart by the lock that env.py takes in the database."""

Target = str | URL | Engine | Connection | None
"""What is migrated. A connection must not be in a transaction; None: what the environment says."""


def scripts() -> Path:
    """The folder of ``env.py`` and the revisions: inside an installed wheel, else beside the package."""
    package = Path(__file__).parent
    bundled = package / "_alembic"
    return bundled if bundled.is_dir() else package.parent / "alembic"


def config(target: Target = None) -> Config:
    """Alembic's configuration, without any file and without logging of its own."""
    result = Config()
    result.set_main_option("script_location", str(scripts()).replace("%", "%%"))
    result.set_main_option("path_separator", "os")
    if isinstance(target, (Engine, Connection)):
        result.attributes["connection"] = target
    elif target is not None:
        result.attributes["url"] = target if isinstance(target, str) else target.render_as_string(hide_password=False)
    return result


def upgrade(target: Target = None, revision: str = "head") -> None:
    """Bring the schema to a revision.

    Raises:
        AdoptionError: Tables or rows are there that can't be taken over; nothing was changed.
        ConfigurationError: The URL, the server or the connection can't be used.
        DatabaseUnavailableError: Other transactions or another migrator stood in the way all the time.
    """
    with _turn:
        command.upgrade(config(target), revision)


def downgrade(target: Target, revision: str) -> None:
    """Take the schema back to a revision; ``base`` is below all of them."""
    with _turn:
        command.downgrade(config(target), revision)


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


def check(connection: Connection) -> None:
    """Make sure that the schema is at the revision of this code.

    Raises:
        SchemaRevisionError: It is at another one.
    """
    found, expected = current(connection), head()
    if found != expected:
        raise SchemaRevisionError(found, expected)


class Step(NamedTuple):
    """A step of a revision's upgrade: what it does, its SQL, and whether it builds an index concurrently."""

    what: str
    sql: str
    is_index: bool


def revisions() -> list[str]:
    """All revisions, the first one first."""
    return [revision.revision for revision in ScriptDirectory.from_config(config()).walk_revisions()][::-1]


def steps(revision: str) -> list[Step]:
    """The steps of a revision's upgrade, as ``env.py`` runs them."""
    source = (scripts() / "sql" / f"{revision}.sql").read_text(encoding="utf-8")
    _, *parts = re.split(r"^-- == (upgrade|downgrade)( index)?: (.+)$", source, flags=re.MULTILINE)
    found = zip(parts[::4], parts[1::4], parts[2::4], parts[3::4], strict=True)
    return [Step(what, sql.strip(), bool(index)) for direction, index, what, sql in found if direction == "upgrade"]


def script(revision: str = "head", *, down: bool = False) -> str:
    """The SQL that a migration would run, for ``psql -v ON_ERROR_STOP=1``.

    Args:
        revision: ``TO`` or ``FROM:TO``; a downgrade needs both.
        down: Whether it is a downgrade.
    """
    settings = config()
    settings.output_buffer = io.StringIO()
    with _turn:
        (command.downgrade if down else command.upgrade)(settings, revision, sql=True)
    return settings.output_buffer.getvalue()
