"""Fixtures for the tests of your program, on a real PostgreSQL: ``pytest_plugins = ["gathering_pipeline.testing"]``.

``pipeline_database`` is an empty database of the test's own, at head, and ``pipeline_session`` a session on it. Each is
a clone of a template, which is migrated once in a run of pytest. The server is the one of ``GATHERING_TEST_URL``; else
a container, if ``GATHERING_TEST_SERVER`` is ``container``; else the embedded one.

PYTEST_DONT_REWRITE: tests import ``run_to_end`` before pytest loads the plugin.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import secrets
import shutil
import tempfile
from collections import deque
from collections.abc import Awaitable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from gathering_pipeline import connections, embedded, migrations
from gathering_pipeline.database import Database
from gathering_pipeline.errors import ConfigurationError, PipelineError, RunOverError
from gathering_pipeline.lifecycle import RunStatus
from gathering_pipeline.models import PipelineNode, RunRead, StartedNode
from gathering_pipeline.repositories import RunRepository
from gathering_pipeline.repositories._call import finish
from gathering_pipeline.settings import DatabaseSettings
from gathering_pipeline.worker.handlers import (
    NEEDED,
    Cancellation,
    Handler,
    NodeContext,
    Result,
    check_handlers,
    failure_of,
    result_of,
    result_without_handler,
)

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

OPTIONS = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"}
"""Of a server whose data need not outlive a power cut; all can be changed while it runs."""
TRUSTED = "('local all all trust'), ('host all postgres all trust'), ('host all all all scram-sha-256')"
"""Lines of ``pg_hba.conf``; the check of a password takes a client longer than all else of connecting."""
MEMORY = Path("/dev/shm")  # noqa: S108 - folders in it are made by mkdtemp
"""A file system in memory, where the system has one."""
ENOUGH_MEMORY = 4 * 2**30
"""Bytes that have to be free there."""


# --- servers ---------------------------------------------------------------------------------------------------------


@contextmanager
def temporary_folder(purpose: str, *, durable: bool = False) -> Iterator[Path]:
    """A folder for a server's data: in memory where that is possible, as copies of databases take long on a disk."""
    in_memory = not durable and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ENOUGH_MEMORY
    folder = Path(tempfile.mkdtemp(prefix=f"gathering-{purpose}-", dir=MEMORY if in_memory else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def embedded_server(*, durable: bool = False) -> Iterator[str]:
    """The URL of an embedded server of its own; a durable one writes to the disk as a server does by default."""
    with temporary_folder("test", durable=durable) as folder:
        server = embedded.start(folder / "data")
        try:
            if not durable:
                options = [f"ALTER SYSTEM SET {name} = '{value}'" for name, value in OPTIONS.items()]
                _execute(server.url, *options, "SELECT pg_reload_conf()")
            yield server.url
        finally:
            server.stop()


@contextmanager
def container_server(image: str, *, durable: bool = False) -> Iterator[str]:
    """The URL of a server in a container; testcontainers has to be installed."""
    # its helper container would have to be fetched from a registry; this process removes what it starts
    os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")
    from testcontainers.community.postgres import PostgresContainer

    settings = {"max_connections": "300"} | ({} if durable else OPTIONS)
    options = " ".join(f"-c {name}={value}" for name, value in settings.items())
    container = PostgresContainer(image, username="postgres", password="test", dbname="postgres", driver="psycopg")  # noqa: S106
    # PGDATA by name: the usual place differs between the images of PostgreSQL 17 and 18
    container.with_env("PGDATA", "/pgdata").with_command(f"postgres {options}")
    container.with_kwargs(shm_size="1g")  # docker's 64 MB are too few for parallel work on millions of rows
    if not durable:
        container.with_tmpfs_mount("/pgdata")
    with container:
        url = container.get_connection_url()
        if not durable:
            _execute(url, f"COPY (VALUES {TRUSTED}) TO '/pgdata/pg_hba.conf'", "SELECT pg_reload_conf()")
        yield url


def _execute(url: str, *statements: str) -> None:
    """Execute statements that can't run in a transaction."""
    with (
        connections.temporary_engine(make_url(url), DatabaseSettings(database_url=None)) as engine,
        engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection,
    ):
        for statement in statements:
            connection.execute(text(statement))


@dataclass(frozen=True, slots=True)
class Server:
    """The server of the tests.

    Attributes:
        url: URL of its maintenance database, as a role that may create databases.
    """

    url: str

    def create(self, template: str | None = None) -> str:
        """Create a database and return its URL.

        Args:
            template: URL of the database to copy, to which nothing may be connected; None: an empty one.
        """
        name = f"gathering_test_{secrets.token_hex(6)}"
        source = "template0 ENCODING 'UTF8' LC_COLLATE 'C' LC_CTYPE 'C'"
        if template is not None:
            source = f"{make_url(template).database} STRATEGY FILE_COPY"
        _execute(self.url, f"CREATE DATABASE {name} TEMPLATE {source}")
        return make_url(self.url).set(database=name).render_as_string(hide_password=False)

    def drop(self, url: str) -> None:
        """Drop a database that ``create`` made, also under sessions that are still connected."""
        _execute(self.url, f"DROP DATABASE IF EXISTS {make_url(url).database} WITH (FORCE)")


@contextmanager
def running_server() -> Iterator[Server]:
    """The server that the environment asks for."""
    wanted = os.environ.get("GATHERING_TEST_SERVER") or "embedded"
    if given := os.environ.get("GATHERING_TEST_URL"):
        url = make_url(given).set(drivername="postgresql+psycopg")
        yield Server(url.render_as_string(hide_password=False))
    elif wanted == "container":
        with container_server(os.environ.get("GATHERING_TEST_IMAGE") or "postgres:17") as url_of_container:
            yield Server(url_of_container)
    elif wanted == "embedded":
        with embedded_server() as url_of_embedded:
            yield Server(url_of_embedded)
    else:
        raise ConfigurationError(f"GATHERING_TEST_SERVER is {wanted!r:.100}: write container or embedded")


# --- fixtures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def pipeline_server() -> Iterator[Server]:
    """The server; override it to give another one."""
    with running_server() as server:
        yield server


@pytest.fixture(scope="session")
def pipeline_template(pipeline_server: Server) -> Iterator[str]:
    """The URL of a database at head, to be cloned; override it to give one with more in it, such as your own tables."""
    url = pipeline_server.create()
    try:
        migrations.upgrade(url)
        yield url
    finally:
        pipeline_server.drop(url)


@pytest.fixture
def pipeline_database(pipeline_server: Server, pipeline_template: str) -> Iterator[Database]:
    """A database of the test's own."""
    url = pipeline_server.create(pipeline_template)
    try:
        with Database(url) as database:
            yield database
    finally:
        pipeline_server.drop(url)


@pytest.fixture
def pipeline_session(pipeline_database: Database) -> Iterator[Session]:
    """A session on ``pipeline_database`` in which each call commits, so that others see it."""
    with pipeline_database.session(autocommit=True) as session:
        yield session


# --- runs ------------------------------------------------------------------------------------------------------------

_END_WAITS = connections.Statement("""
UPDATE circle.pipeline_node_runs SET available_at = clock_timestamp()
WHERE run_id = %(run_id)s::bigint AND status = 'pending' AND available_at > clock_timestamp()
RETURNING id::text""")


def run_to_end(runs: RunRepository, run_id: int, handlers: Mapping[str, Handler]) -> RunRead:
    """Execute a run by handlers of a ``Worker``, one node after the other, in the order in which they start.

    Nothing waits: delays and retries are due at once. There are no threads. An async handler gets an event loop of its
    own, so none may be running. An ``AssertionError`` of a handler is raised; any other exception is the failure of its
    node, as in a worker.

    Args:
        runs: A repository on the session to be used.
        run_id: The run, which no worker may have claimed.
        handlers: A function for each type of nodes that the graph has and that needs one.

    Returns:
        The run after its end.

    Raises:
        InvalidDataError: A handler is missing, or its output can't be stored.
        PipelineError: The run doesn't go on, as a node of it was started elsewhere.
    """
    run, nodes = runs.get(run_id), runs.definition(run_id).node_map
    given = check_handlers(handlers, NEEDED & {node.type for node in nodes.values()})
    waiting: deque[StartedNode] = deque()
    results: list[Result] = []
    while True:
        try:
            step = runs.advance(run_id, results, retry=True, inputs=True)
        except RunOverError:
            if not results:
                raise
            return runs.get(run_id)  # a handler ended it
        if step.status is not RunStatus.RUNNING:
            return runs.get(run_id)
        waiting += step.started
        if waiting:
            started = waiting.popleft()
            results = [_result(run, nodes[started.node_id], started, given)]
        elif finish(runs._calls._rows(_END_WAITS, run_id=run_id)):  # noqa: SLF001 - no call of users does this
            results = []
        else:
            names = ", ".join(node.node_id for node in step.running) or "none"
            raise PipelineError(f"run {run_id} doesn't go on: nodes that run elsewhere: {names}")


def _result(run: RunRead, node: PipelineNode, started: StartedNode, handlers: Mapping[str, Handler]) -> Result:
    handler = handlers.get(node.type)
    if handler is None:
        return result_without_handler(node, started)
    context = NodeContext(
        run=run, node=node, inputs=started.inputs or {}, attempt=started.attempt, cancelled=Cancellation()
    )
    try:
        outcome = handler(context)
        return result_of(_awaited(outcome) if inspect.isawaitable(outcome) else outcome, started)
    except AssertionError:
        raise
    except Exception as error:  # noqa: BLE001 - it is the node's failure
        return failure_of(error, node.id, started.attempt)


def _awaited(outcome: Awaitable[object]) -> object:
    async def wait() -> object:
        return await outcome

    return asyncio.run(wait())
