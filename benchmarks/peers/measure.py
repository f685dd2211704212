"""One run after the other of a store and of the floor, in turns; a peer's by its own process."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from psycopg import sql
from sqlalchemy.engine import make_url

from benchmarks import floor
from benchmarks.databases import Databases, Server
from benchmarks.graphs import chain
from benchmarks.peers.environments import find_python
from benchmarks.peers.interface import Task
from benchmarks.peers.process import open_process
from benchmarks.peers.registry import Base, Peer
from benchmarks.runs import advance_through, run_by_advance, run_by_steps
from benchmarks.table import Comparison, Size, timed
from gathering_pipeline import RunRepository

NODES = 10
REPEATS = 60


@dataclass(frozen=True, slots=True)
class Figures:
    """Median seconds of a run on both sides, and the median of the ratios of neighbouring runs.

    Attributes:
        version: The version of the store.
        times: The figures; ``ours`` is the store's.
    """

    version: str
    times: Comparison


def measure_ours(server: Server, size: Size) -> Iterator[tuple[str, Comparison]]:
    """Our repositories, each way on databases of its own."""
    count = size.count(NODES)
    with server.databases() as databases:
        pipeline = databases.store(chain(count))
        run = partial(run_by_steps, databases.runs, pipeline.ours, count)
        yield "ours, step by step", _in_turns(partial(timed, run), _floor(databases, count), size)
    with server.databases() as databases:
        pipeline = databases.store(chain(count))
        run = partial(run_by_advance, databases.runs, pipeline.ours)
        yield "ours, by advance", _in_turns(partial(timed, run), _floor(databases, count), size)
    with server.databases() as databases, databases.database.group_commit() as runs:
        pipeline = databases.store(chain(count))
        run = partial(_run_by_group, runs, databases.runs, pipeline.ours)
        yield "ours, by group commit, one caller", _in_turns(partial(timed, run), _floor(databases, count), size)


def measure(server: Server, peer: Peer, folder: Path, size: Size) -> Figures:
    """A peer, on databases of its own.

    Raises:
        NotInstalledError: Its environment can't be made.
        NotMeasuredError: Its process failed.
    """
    python = find_python(peer, folder)
    count = size.count(NODES)
    with server.databases() as databases, _database(databases, peer.base) as url:
        task = Task(url, count, floor.OUTPUT)
        with open_process(python, peer, task) as process:
            times = _in_turns(process.record, _floor(databases, count), size)
        return Figures(process.version, times)


def _run_by_group(runs: RunRepository, creator: RunRepository, pipeline_id: int) -> None:
    """Create the run on a connection that is open already, which a group commit has for ``advance`` only."""
    advance_through(runs, creator.create(pipeline_id).id)


def _floor(databases: Databases, count: int) -> Callable[[], float]:
    pipeline = databases.store(chain(count))
    return partial(timed, partial(floor.record_run, databases.floor.execute, pipeline.floor, count))


def _in_turns(theirs: Callable[[], float], base: Callable[[], float], size: Size) -> Comparison:
    """Take turns as ``table.compare`` does, with sides that tell their own time."""
    repeats = size.repeats(REPEATS)
    times: list[tuple[float, float]] = []
    for turn in range(-min(3, repeats), repeats):
        if turn % 2:
            their_time, floor_time = theirs(), base()
        else:
            floor_time, their_time = base(), theirs()
        if turn >= 0:
            times.append((their_time, floor_time))
    return Comparison(
        statistics.median(their_time for their_time, _ in times),
        statistics.median(floor_time for _, floor_time in times),
        statistics.median(their_time / floor_time for their_time, floor_time in times),
    )


@contextmanager
def _database(databases: Databases, base: Base) -> Iterator[str]:
    """The URL of a peer's database, as libpq reads it."""
    url = make_url(databases.floor_url).set(drivername="postgresql")
    if base is Base.FLOOR:
        yield url.render_as_string(hide_password=False)
        return
    name = f"{url.database}_peer"
    # Not on the connection that is measured: the floor's session stays as it is elsewhere.
    with floor.connect(databases.floor_url) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(name)))
    try:
        yield url.set(database=name).render_as_string(hide_password=False)
    finally:
        with floor.connect(databases.floor_url) as admin:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
