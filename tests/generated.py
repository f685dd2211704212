"""Writes what is generated and committed: ``python -m tests.generated`` (``make generated``)."""

from __future__ import annotations

import json
from pathlib import Path

from gathering_pipeline import catalog, migrations
from gathering_pipeline.database import Database
from tests import servers

CATALOG = Path(__file__).parents[1] / "alembic" / "catalog.json"


def clean_catalog(url: str) -> str:
    """The catalog of a database at head, an object a line."""
    with Database(url) as database, database.engine.connect() as connection:
        lines = [json.dumps([*item, definition]) for item, definition in sorted(catalog.capture(connection).items())]
    return "[\n" + ",\n".join(lines) + "\n]\n"


if __name__ == "__main__":
    with servers.start() as server:
        url = server.database_url(server.create())
        migrations.upgrade(url)
        CATALOG.write_text(clean_catalog(url), encoding="utf-8")
