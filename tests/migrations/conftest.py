"""Databases of GatheRing, catalogs at each revision, and folders of revisions."""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

import shutil
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from gathering_pipeline import (
    migrations,
)
from tests.support.adoption import GATHERING, INDEXES, ROWS
from tests.support.databases import Connect
from tests.support.revisions import ROOT
from tests.support.schema import catalog, revisions
from tests.support.servers import Server
from tests.support.servers import connect as open_connection


@pytest.fixture(scope="module")
def catalogs(server: Server) -> dict[str, list[str]]:
    """The catalog at each revision, reached from an empty database; ``base`` is below the first one."""
    name = server.create()
    url = server.database_url(name)
    try:
        found = {}
        for revision in revisions():
            migrations.upgrade(url, revision)
            found[revision] = catalog(url)
    finally:
        server.drop(name)
    return found | {"base": ["schema | circle | "]}


@pytest.fixture
def url(empty_database_url: str) -> str:
    return empty_database_url


@pytest.fixture
def used(url: str, connect: Connect) -> psycopg.Connection:
    """A connection to a database that GatheRing has used."""
    raw = connect(url)
    raw.execute(GATHERING + INDEXES + ROWS)
    return raw


@pytest.fixture(scope="module")
def adopted_catalogs(server: Server) -> Iterator[dict[str, list[str]]]:
    """The catalog at each revision of a database whose tables were adopted."""
    name = server.create()
    url = server.database_url(name)
    with open_connection(url) as raw:
        raw.execute(GATHERING + INDEXES + ROWS)
    found = {"base": catalog(url)}
    for one in revisions():
        migrations.upgrade(url, one)
        found[one] = catalog(url)
    yield found
    server.drop(name)


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of scripts with our env.py and no revisions yet."""
    folder = tmp_path / "scripts 100%"
    for name in ("versions", "sql"):
        (folder / name).mkdir(parents=True)
    shutil.copy(ROOT / "alembic" / "env.py", folder)
    monkeypatch.setattr(migrations, "scripts", lambda: folder)
    return folder
