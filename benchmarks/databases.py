"""The databases that benchmarks run on: a pair for each, so that no benchmark sees what another one left behind."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from psycopg import sql
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

from benchmarks import floor
from benchmarks.graphs import Graph
from gathering_pipeline import (
    Database,
    PipelineCreate,
    PipelineRepository,
    PipelineStatus,
    RunRepository,
    embedded,
    migrations,
)

FLOOR_REVISION = "007_pipeline_execution"
"""The tables as GatheRing has them, without guards."""

_number = count()


class StoredPipeline(NamedTuple):
    """The ids of a pipeline that both sides store."""

    ours: int
    floor: int


class Databases:
    """Two databases on one server and the connections to them.

    Attributes:
        our_url: SQLAlchemy URL of our database, at head.
        floor_url: SQLAlchemy URL of the floor's database, at ``FLOOR_REVISION``.
    """

    def __init__(self, our_url: str, floor_url: str) -> None:
        self.our_url = our_url
        self.floor_url = floor_url
        self._opened = ExitStack()

    def close(self) -> None:
        """Close the connections."""
        self._opened.close()

    @cached_property
    def database(self) -> Database:
        """Our database."""
        return self._opened.enter_context(Database(self.our_url))

    @cached_property
    def session(self) -> Session:
        """A worker's session: autocommit, and so one connection for all calls, as the floor's script has."""
        return self._opened.enter_context(self.database.session(autocommit=True))

    @cached_property
    def runs(self) -> RunRepository:
        """The repository of that session."""
        return RunRepository(self.session)

    @cached_property
    def floor(self) -> floor.Connection:
        """The connection of the floor's script."""
        return self._opened.enter_context(floor.connect(self.floor_url))

    def store(self, graph: Graph) -> StoredPipeline:
        """Store an active pipeline on both sides."""
        with self.database.session() as session:
            data = PipelineCreate(name="bench", status=PipelineStatus.ACTIVE, nodes=graph[0], edges=graph[1])
            ours = PipelineRepository(session).create(data).id
        insert = "INSERT INTO circle.pipelines (name, status) VALUES ('bench', 'active') RETURNING id"
        return StoredPipeline(ours, floor.fetch_value(self.floor.execute(insert, prepare=False)))


class Server:
    """A server with two template databases, from which a pair is cloned for each benchmark.

    Args:
        url: SQLAlchemy URL of the server's maintenance database, with the right to create databases.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._names: list[str] = []

    def __enter__(self) -> Self:
        """Create the templates."""
        try:
            self._our_template = self._create("template0")
            migrations.upgrade(self._url_of(self._our_template))
            self._floor_template = self._create("template0")
            migrations.upgrade(self._url_of(self._floor_template), FLOOR_REVISION)
        except BaseException:
            self._drop_all()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._drop_all()

    @contextmanager
    def databases(self) -> Iterator[Databases]:
        """A new pair of databases, dropped at the end."""
        ours, base = self._create(self._our_template), self._create(self._floor_template)
        databases = Databases(self._url_of(ours), self._url_of(base))
        try:
            yield databases
        finally:
            databases.close()
            self._drop(ours)
            self._drop(base)

    def _url_of(self, name: str) -> str:
        return make_url(self._url).set(database=name).render_as_string(hide_password=False)

    def _create(self, template: str) -> str:
        name = f"gathering_bench_{os.getpid()}_{next(_number)}"
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        with floor.connect(self._url) as admin:
            admin.execute(statement.format(sql.Identifier(name), sql.Identifier(template)))
        self._names.append(name)
        return name

    def _drop(self, name: str) -> None:
        with floor.connect(self._url) as admin:
            admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
        self._names.remove(name)

    def _drop_all(self) -> None:
        for name in tuple(self._names):
            self._drop(name)


@contextmanager
def open_server() -> Iterator[Server]:
    """The server of GATHERING_TEST_URL; without that variable, an embedded one that syncs as in production."""
    if url := os.environ.get("GATHERING_TEST_URL"):
        with Server(url) as server:
            yield server
        return
    folder = Path(tempfile.mkdtemp(prefix="gathering-bench-"))
    try:
        started = embedded.start(folder / "data")
        try:
            with Server(started.url) as server:
                yield server
        finally:
            started.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
