"""What commands print: tables, JSON, and texts of users, whose control characters are escaped."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from gathering_pipeline.errors import PipelineError, shorten
from gathering_pipeline.texts import printable, printable_lines

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

ACTION_NEEDED = 3
"""Exit code of a report that an operator has to act on."""

_MOST_CHARACTERS = 200
"""Of a cell of a table."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command found or did in a database.

    Attributes:
        text: The result in one line.
        data: The result for ``--json``.
        needs_action: Whether an operator has to act on it.
    """

    text: str
    data: dict[str, Any]
    needs_action: bool = False


class Group(click.Group):
    """Prints an error as one sentence and exits with 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """As of ``click.Group``."""
        # it repeats at WARNING what the sentence says
        faults, silence = logging.getLogger("gathering_pipeline.calls"), logging.Filter("-")
        faults.addFilter(silence)
        try:
            return super().invoke(ctx)
        except Exception as error:
            sentence = describe(error)
            if sentence is None:
                raise
            raise click.ClickException(printable_lines(sentence)) from error
        finally:
            faults.removeFilter(silence)


def describe(error: Exception) -> str | None:
    """The sentence for an error that a command expects; ``None`` for any other."""
    if isinstance(error, PipelineError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if "sqlalchemy" not in sys.modules:  # without it there is no error of it
        return None
    from alembic.util import CommandError
    from psycopg import Error
    from sqlalchemy.exc import DBAPIError

    if isinstance(error, CommandError):
        return str(error)
    original = error.orig if isinstance(error, DBAPIError) else error
    if isinstance(original, Error) or isinstance(error, DBAPIError):
        reason = getattr(getattr(original, "diag", None), "message_primary", None) or str(original).strip()
        state = getattr(original, "sqlstate", None)
        return f"PostgreSQL reports: {shorten(reason)}" + (f" (SQLSTATE {state})" if state else "")
    return None


def echo(text: str, *, err: bool = False) -> None:
    """Print lines that may hold texts of users."""
    click.echo(printable_lines(text), err=err)


def to_json(value: object, *, only_ascii: bool = False, indent: int | None = 2) -> str:
    """Write JSON for people and programs; what isn't printable is escaped, which changes no value."""
    text = json.dumps(value, indent=indent, ensure_ascii=only_ascii)
    return "\n".join(
        line
        if line.isprintable()
        else "".join(character if character.isprintable() else json.dumps(character)[1:-1] for character in line)
        for line in text.split("\n")
    )


def print_json(value: object, *, indent: int | None = 2) -> None:
    """Print one JSON document; without an indent on one line."""
    click.echo(to_json(value, only_ascii=not sys.stdout.encoding.lower().startswith("utf"), indent=indent))


def is_terminal() -> bool:
    """Whether people read the output as it comes."""
    return sys.stdout.isatty()


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table: for people in a terminal, else a line for each row, with tabs between the values.

    Args:
        columns: The names; of numbers they begin with ``#``, which is not printed.
        rows: The values.
    """
    if is_terminal():
        from rich.console import Console

        Console().print(make_table(columns, rows))
        return
    for row in rows:
        click.echo("\t".join(as_text(value) for value in row))


def make_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Make a table for a terminal; ``print_table`` has the arguments."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, collapse_padding=True)
    names = [name.lstrip("#") for name in columns]
    for name, given in zip(names, columns, strict=True):
        is_number = given != name
        table.add_column(name, justify="right" if is_number else "left", no_wrap=is_number or name in _WHOLE)
    for row in rows:
        table.add_row(*(_cell(name, value) for name, value in zip(names, row, strict=True)))
    return table


_WHOLE = frozenset({"status", "type", "created", "started", "last run"})
"""Columns that are never folded or cut."""
_CUT = frozenset({"name", "node", "error", "detail"})
"""Columns that are cut where there is no room, so that a row is a line."""


def _cell(name: str, value: object) -> Text:
    from rich.text import Text

    text = f"{value:%m-%d %H:%M:%S}" if isinstance(value, datetime) else shorten(as_text(value), _MOST_CHARACTERS)
    style = style_of(text) if name == "status" else ""
    if name in _CUT:
        return Text(text, style, no_wrap=True, overflow="ellipsis")
    return Text(text, style, overflow="fold")  # a Text, because a name such as [red] is no markup


_STYLES = {
    "pending": "dim",
    "running": "cyan",
    "completed": "green",
    "active": "green",
    "failed": "bold red",
    "timeout": "bold red",
    "error": "bold red",
    "cancelled": "yellow",
    "paused": "yellow",
    "skipped": "dim",
}


def style_of(status: str) -> str:
    """The style of a status in a terminal; of any other text none."""
    return _STYLES.get(status, "")


def as_text(value: object) -> str:
    """A value in one line; times in UTC, of nothing a minus sign."""
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    return printable(str(value))
