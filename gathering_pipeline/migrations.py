"""Migrations as functions: upgrade, downgrade, current, head, check, script, revisions. ``migrator`` runs them."""

from __future__ import annotations

import io
import threading
from collections.abc import Mapping
from functools import cache
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy.engine import URL, Connection, Engine

from gathering_pipeline.errors import ConfigurationError, SchemaRevisionError, shorten
from gathering_pipeline.forks import call_in_child
from gathering_pipeline.migrator import current, revision_names, scripts, validate_options

__all__ = ["Target", "check", "config", "current", "downgrade", "head", "revisions", "script", "upgrade"]

_alembic = threading.Lock()
"""Alembic's context is global in a process. The advisory lock of ``migrator`` separates processes."""


def _renew_lock() -> None:
    global _alembic  # noqa: PLW0603 - a forked child has no thread that would release it
    _alembic = threading.Lock()


call_in_child(_renew_lock)

Target = str | URL | Engine | Connection | None
"""What is migrated. A connection must not be in a transaction; None: as ``urls.locate`` decides."""


def config(target: Target = None, options: Mapping[str, Any] | None = None) -> Config:
    """Make Alembic's configuration without a file and without logging; ``migrator.Options`` lists the options.

    Raises:
        ConfigurationError: An option is unknown.
    """
    result = Config()
    result.set_main_option("script_location", str(scripts()).replace("%", "%%"))
    result.set_main_option("path_separator", "os")
    if isinstance(target, (Engine, Connection)):
        result.attributes["connection"] = target
    elif target is not None:
        result.attributes["url"] = target if isinstance(target, str) else target.render_as_string(hide_password=False)
    result.attributes.update(validate_options(options or {}))
    return result


def upgrade(target: Target = None, revision: str = "head", options: Mapping[str, Any] | None = None) -> None:
    """Upgrade the schema to a revision.

    Args:
        target: A URL, an engine, or a connection outside of a transaction; None: the database of the environment.
        revision: Its name, ``head``, or ``+N``.
        options: ``lock_timeout``, the longest wait of a step for a lock, as ``"100ms"``; ``patience``, the seconds for
            which a step is retried; ``yield``, whether a long step is cancelled and retried if a session waits for it.

    Raises:
        AdoptionError: Existing tables or rows can't be adopted; nothing was changed.
        ConfigurationError: The URL, the server, the connection or an option can't be used.
        DatabaseUnavailableError: Other transactions or another migrator blocked it for longer than ``patience``.
        SchemaRevisionError: The schema is at a revision that this code doesn't know.
    """
    _check_given(revision)
    with _alembic:
        command.upgrade(config(target, options), revision)


def downgrade(target: Target, revision: str, options: Mapping[str, Any] | None = None) -> None:
    """Downgrade the schema to a revision: its name, ``base``, which is below all of them, or ``-N``.

    The other arguments and the errors are those of ``upgrade``.
    """
    _check_given(revision)
    with _alembic:
        command.downgrade(config(target, options), revision)


def revisions() -> list[str]:
    """All revisions, the first one first."""
    return revision_names(ScriptDirectory.from_config(config()))


@cache
def head() -> str:
    """The revision that this code is written for."""
    revision = ScriptDirectory.from_config(config()).get_current_head()
    assert revision is not None, "the package contains its revisions"
    return revision


def check(connection: Connection) -> None:
    """Check that the schema is at the revision of this code.

    Raises:
        SchemaRevisionError: It is at another one.
    """
    found, expected = current(connection), head()
    if found != expected:
        raise SchemaRevisionError(found, expected)


def script(revision: str = "head", *, down: bool = False) -> str:
    """The SQL of a migration, for ``psql -v ON_ERROR_STOP=1``.

    Args:
        revision: ``TO`` or ``FROM:TO``; a downgrade needs both.
        down: Whether it is a downgrade.

    Raises:
        ConfigurationError: The revision is empty or has another form, or leads in the other direction.
    """
    if down and not all(revision.partition(":")):
        raise ConfigurationError(f"a downgrade needs both ends: write FROM:TO, as in head:{revisions()[1]}")
    first, *others = revision.split(":")
    if len(others) > 1:
        raise ConfigurationError(f"{shorten(revision, 100)!r} has more than two revisions: write TO or FROM:TO")
    for given in (first, *others):
        _check_given(given)
    settings = config()
    directory = ScriptDirectory.from_config(settings)
    start, end = _place(directory, first), _place(directory, others[0] if others else first)
    if start is not None and end is not None and (start < end if down else start > end):
        raise ConfigurationError(
            f"{revision} is {'an upgrade: leave out --down' if down else 'a downgrade: add --down'}"
            f" ({'script(..., down=False)' if down else 'script(..., down=True)'})"
        )
    settings.output_buffer = io.StringIO()
    with _alembic:
        (command.downgrade if down else command.upgrade)(settings, revision, sql=True)
    return settings.output_buffer.getvalue()


def _check_given(revision: str) -> None:
    """Check that a revision is not empty, which Alembic fails at."""
    if not revision.strip():
        raise ConfigurationError(f"the revision is empty: write base, {', '.join(revisions())} or head")


def _place(directory: ScriptDirectory, revision: str) -> int | None:
    """Place of a revision in their order; base: -1; None for a relative or unknown one."""
    if revision == "base":
        return -1
    try:
        found = directory.get_revision(revision)
    except CommandError:
        return None
    return revision_names(directory).index(found.revision)
