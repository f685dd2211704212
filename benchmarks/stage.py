"""What the rows that need a server stand on: two databases, ours at head and the floor's as revision 007 leaves it."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from sqlalchemy.engine import make_url

from gathering_pipeline import Database, PipelineCreate, PipelineRepository, RunRepository, embedded, migrations

Json = dict[str, Any]
Graph = tuple[list[Json], list[Json]]


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table.

    Attributes:
        name: What was measured.
        ours: Our figure, with its unit.
        floor: The same of the floor.
        ratio: Ours to the floor's.
        bar: The ratio to reach; None: there is none.
        more_is_better: Whether ``ratio`` has to be at least, not at most ``bar``.
    """

    name: str
    ours: str
    floor: str
    ratio: float
    bar: float | None
    more_is_better: bool = False

    def verdict(self) -> str:
        """The bar, and whether it is reached."""
        if self.bar is None:
            return ""
        is_met = self.ratio >= self.bar if self.more_is_better else self.ratio <= self.bar
        bar = f"{'>=' if self.more_is_better else '<='} {self.bar:g}"
        return f"{bar:>8}  {'met' if is_met else 'missed'}"


@dataclass(frozen=True, slots=True)
class Stage:
    """Two empty databases on one server, by URL; ``ours`` at head, ``floor`` at revision 007."""

    ours: str
    floor: str


_open = ExitStack()
"""The sessions of ``worker``."""


@contextmanager
def open_stage() -> Iterator[Stage]:
    """Two databases on the server of GATHERING_TEST_URL, or on an embedded one that syncs as in production."""
    with _server() as url, connect(url) as admin:
        names = [f"gathering_bench_{what}_{os.getpid()}" for what in ("ours", "floor")]
        try:
            for name in names:
                admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(name)))
            ours, floor = (make_url(url).set(database=name).render_as_string(hide_password=False) for name in names)
            migrations.upgrade(ours)
            migrations.upgrade(floor, "007_pipeline_execution")
            yield Stage(ours, floor)
        finally:
            _open.close()
            for name in names:
                admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


@contextmanager
def _server() -> Iterator[str]:
    if os.environ.get("GATHERING_TEST_URL"):
        yield os.environ["GATHERING_TEST_URL"]
        return
    folder = Path(tempfile.mkdtemp(prefix="gathering-bench-"))
    try:
        server = embedded.start(folder / "data")
        try:
            yield server.url
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def connect(url: str) -> psycopg.Connection[tuple[Any, ...]]:
    """The floor's kind of connection: psycopg, autocommit, every statement prepared at its first use."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    connection = psycopg.connect(plain, autocommit=True)
    connection.prepare_threshold = 0
    return connection


def nodes(count: int) -> list[Json]:
    """Nodes as an editor stores them."""
    return [
        {
            "id": f"node-{at}",
            "type": "agent",
            "name": f"Node {at}",
            "config": {"agent_id": 7, "task": "write the report", "cron": None},
            "position": {"x": at * 10, "y": at % 7},
        }
        for at in range(count)
    ]


def chain(count: int) -> Graph:
    """Each node follows the one before."""
    return nodes(count), [{"id": f"e{at}", "from": f"node-{at - 1}", "to": f"node-{at}"} for at in range(1, count)]


def fan_out(count: int) -> Graph:
    """All but two nodes lie side by side between the first and the last."""
    ends = [(0, at) for at in range(1, count - 1)] + [(at, count - 1) for at in range(1, count - 1)]
    return nodes(count), [{"id": f"e{at}", "from": f"node-{a}", "to": f"node-{b}"} for at, (a, b) in enumerate(ends)]


@cache
def database(stage: Stage) -> Database:
    """Our side; the engine is made once."""
    return Database(stage.ours)


@cache
def worker(stage: Stage) -> RunRepository:
    """Our side as a worker has it: one session in autocommit, and so one connection, as the floor's script has one."""
    return RunRepository(_open.enter_context(database(stage).session(autocommit=True)))


@cache
def floor(stage: Stage) -> psycopg.Connection[tuple[Any, ...]]:
    """The floor's side."""
    return connect(stage.floor)


def store(stage: Stage, graph: Graph) -> int:
    """Store an active pipeline on both sides, under one id."""
    with database(stage).session() as session:
        data = PipelineCreate(name="bench", status="active", nodes=graph[0], edges=graph[1])
        pipeline_id = PipelineRepository(session).create(data).id
    floor(stage).execute(
        "INSERT INTO circle.pipelines (id, name, status) VALUES (%s, 'bench', 'active')", (pipeline_id,), prepare=False
    )
    return pipeline_id


def duel(ours: Callable[[], object], base: Callable[[], object], repeats: int, warm_up: int = 3) -> tuple[float, ...]:
    """Median seconds of both and the median of their ratios; they take turns, and who begins changes."""
    times: list[tuple[float, float]] = []
    for turn in range(-warm_up, repeats):
        first, second = (ours, base) if turn % 2 else (base, ours)
        a = timed(first)
        b = timed(second)
        if turn >= 0:
            times.append((a, b) if turn % 2 else (b, a))
    return (
        statistics.median(mine for mine, _ in times),
        statistics.median(other for _, other in times),
        statistics.median(mine / other for mine, other in times),
    )


def timed(action: Callable[[], object]) -> float:
    """Seconds that an action takes."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def milliseconds(seconds: float) -> str:
    """A time to be printed."""
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds * 1000:.0f} ms"


def show(rows: Sequence[Row]) -> None:
    """Print a table without its head."""
    for row in rows:
        print(f"{row.name:<58} {row.ours:>12} {row.floor:>12} {row.ratio:>7.2f} {row.verdict()}".rstrip(), flush=True)


def head() -> None:
    """Print the table's head."""
    print(f"{'what':<58} {'ours':>12} {'floor':>12} {'ratio':>7} {'bar':>8}", flush=True)
