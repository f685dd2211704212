"""Writes what is generated and committed: ``python -m tests.generated`` (``make generated``)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import click
from click.testing import CliRunner

from gathering_pipeline import migrations
from gathering_pipeline.cli.commands import cli
from gathering_pipeline.database import Database
from gathering_pipeline.maintenance import catalog
from tests.support import locks, servers
from tests.support.schema_text import schema_text

ROOT = Path(__file__).parents[1]
CATALOG, PAGE = ROOT / "alembic" / "catalog.json", ROOT / "docs" / "cli.md"
LOCKS, SCHEMA = ROOT / "alembic" / "locks.json", ROOT / "alembic" / "schema.sql"
HEADING = "## Commands\n"
SUBJECTS = {(): "Pipelines", ("db",): "The schema", ("runs",): "Runs"}
"""Of the commands, by the group in which they stand."""


def clean_catalog(url: str) -> str:
    """The catalog of a database at head, an object a line."""
    with Database(url) as database, database.engine.connect() as connection:
        lines = [json.dumps([*item, definition]) for item, definition in sorted(catalog.capture(connection).items())]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def clean_schema(url: str) -> str:
    """The schema of a database at head, for reading."""
    with servers.connect(url) as raw:
        return schema_text(raw)


def clean_locks(server: servers.Server) -> str:
    """The locks of each step of an upgrade, a step a line."""
    return locks.as_json(locks.observe(server))


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command, groups left out; first those that stand in no group."""
    for name, command in sorted(group.commands.items(), key=lambda item: (isinstance(item[1], click.Group), item[0])):
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


def help_texts() -> str:
    """The help of every command by subject, as a section of the page."""
    parts = []
    for subject, described in groupby(commands(), key=lambda words: SUBJECTS[words[:-1]]):
        parts.append(f"\n### {subject}\n")
        for words in described:
            shown = CliRunner().invoke(cli, [*words, "--help"], prog_name="gathering-pipeline", terminal_width=100)
            parts.append(f"\n#### {' '.join(words)}\n\n```\n{shown.output}```\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text(encoding="utf-8").split(HEADING)[0] + HEADING + help_texts(), encoding="utf-8")
    with servers.start() as server:
        url = server.database_url(server.create())
        migrations.upgrade(url)
        CATALOG.write_text(clean_catalog(url), encoding="utf-8")
        SCHEMA.write_text(clean_schema(url), encoding="utf-8")
        LOCKS.write_text(clean_locks(server), encoding="utf-8")
