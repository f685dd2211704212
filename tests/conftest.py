"""A real PostgreSQL for the tests: a server and a migrated template for each worker, a clone of it for each test.

Workers share no server: events are readable once no older transaction is open in any database of the server, and some
tests create roles, use up the connections or change the configuration.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from sqlalchemy.engine import make_url

# Nobody's own database is touched: these are gone before anything of the package is imported.
for _name in (
    *("DATABASE_URL", "GATHERING_DATABASE_URL", "GATHERING_MIGRATION_URL", "GATHERING_READ_URL", "GATHERING_DATA_DIR"),
    *("PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGUSER", "PGPASSWORD", "PGPASSFILE", "PGSERVICE", "PGOPTIONS"),
):
    os.environ.pop(_name, None)

from tests.support import databases, measuring, servers  # noqa: E402 - see above

MOST_WORKERS = 8
"""Each has a server with the memory that it takes."""

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from gathering_pipeline.database import Database
    from gathering_pipeline.embedded import EmbeddedServer


def pytest_xdist_auto_num_workers() -> int:
    """``-n auto``: a worker a core; one alone on a server that was given, where they would meet one another's roles."""
    return 0 if servers.kind() == "url" else min(os.cpu_count() or 1, MOST_WORKERS)


# A shell's background job ignores interrupts, and so would the programs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", 0):
        return
    # Coverage of this process has begun (see the Makefile); of the programs that tests start, commands are measured.
    if configuration := os.environ.pop("COVERAGE_PROCESS_START", None):
        os.environ[measuring.COVERAGE] = configuration


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what depends on no server, or starts its own, which is the embedded one on each kind."""
    for item in items:
        if "server" not in getattr(item, "fixturenames", ()):
            item.add_marker("once")


def pytest_report_header() -> str:
    names = {"url": "GATHERING_TEST_URL", "container": f"container {servers.image()}", "embedded": "embedded server"}
    return f"PostgreSQL: {names[servers.kind()]}, one for each worker"


@pytest.fixture(scope="session")
def server() -> Iterator[servers.Server]:
    """The server; tests that only look at server-wide things may use it as it is."""
    with servers.start() as running:
        yield running


@pytest.fixture(scope="session")
def template(server: servers.Server) -> Iterator[str]:
    """The name of a database at head; clone it, never connect to it."""
    from gathering_pipeline import migrations

    name = server.create()
    try:
        migrations.upgrade(server.database_url(name))
        yield name
    finally:
        server.drop(name)


@pytest.fixture(scope="session")
def narrow_template(server: servers.Server) -> Iterator[str]:
    """The name of a database at head whose ids are INTEGER; clone it, never connect to it."""
    from tests.support import narrow

    name = narrow.create(server)
    yield name
    server.drop(name)


@pytest.fixture
def narrow_url(server: servers.Server, narrow_template: str) -> Iterator[str]:
    """A database of its own, at head, whose ids of runs and node runs are INTEGER."""
    name = server.create(narrow_template)
    yield server.database_url(name)
    server.drop(name)


@pytest.fixture
def database_url(server: servers.Server, template: str) -> Iterator[str]:
    """A database of its own, at head."""
    name = server.create(template)
    yield server.database_url(name)
    server.drop(name)


@pytest.fixture(scope="module")
def module_database_url(server: servers.Server, template: str) -> Iterator[str]:
    """A database at head that the tests of a module share; see ``tests.support.shared``."""
    name = server.create(template)
    yield server.database_url(name)
    server.drop(name)


@pytest.fixture
def empty_database_url(server: servers.Server) -> Iterator[str]:
    """A database of its own, with nothing in it."""
    name = server.create()
    yield server.database_url(name)
    server.drop(name)


@pytest.fixture(scope="session")
def pooler(server: servers.Server) -> Iterator[str | None]:
    """The URL of a PgBouncer in transaction mode, if GATHERING_TEST_POOLER names the program."""
    program = os.environ.get("GATHERING_TEST_POOLER")
    if program is None:
        yield None
        return
    with servers.pooled(server, program) as url:
        yield url


@pytest.fixture
def database(database_url: str, pooler: str | None) -> Iterator[Database]:
    from gathering_pipeline.database import Database

    if pooler is not None:
        database_url = make_url(pooler).set(database=make_url(database_url).database).render_as_string()
    with Database(database_url) as made:
        yield made


@pytest.fixture
def session(database: Database) -> Iterator[Session]:
    with database.session() as opened:
        yield opened


@pytest.fixture
def connect() -> Iterator[Callable[[str], psycopg.Connection]]:
    """Opens autocommit psycopg connections for raw SQL, and closes them in the end."""
    opened: list[psycopg.Connection] = []

    def open_one(url: str) -> psycopg.Connection:
        opened.append(servers.connect(url))
        return opened[-1]

    yield open_one
    for connection in opened:
        connection.close()


@pytest.fixture
def raw(database_url: str, connect: Callable[[str], psycopg.Connection]) -> psycopg.Connection:
    """A raw autocommit connection to the test's own database (the one of ``database`` and ``session``)."""
    return connect(database_url)


@pytest.fixture
def own_server() -> Iterator[EmbeddedServer]:
    """An embedded server that serves one test, which may restart it or change how it is configured."""
    with servers.own() as running:
        yield running


@pytest.fixture
def refuses(raw: psycopg.Connection) -> Callable[..., Any]:
    """``with refuses(Error) as caught``: the error is of exactly this class, and every table is as it was."""

    @contextmanager
    def check(kind: type[Exception]) -> Iterator[pytest.ExceptionInfo[Any]]:
        before = databases.contents(raw)
        with pytest.raises(kind) as caught:
            yield caught
        assert caught.type is kind
        assert databases.contents(raw) == before

    return check


@pytest.fixture
def admin(server: servers.Server, connect: Callable[[str], psycopg.Connection]) -> psycopg.Connection:
    """A raw autocommit connection with admin rights to the server's maintenance database."""
    return connect(server.url)
