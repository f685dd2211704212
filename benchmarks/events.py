"""How soon a listener receives events, and what that costs. Guards write the events: ``breakdown`` shows their cost."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from functools import partial
from time import perf_counter, sleep
from typing import LiteralString

from benchmarks import floor
from benchmarks.databases import Databases
from benchmarks.graphs import chain
from benchmarks.runs import LEASE, advance_through
from benchmarks.table import Row, Size, timed
from gathering_pipeline import Database, EventRepository, RunRepository

INSERT: LiteralString = """
INSERT INTO circle.pipeline_events (xid, run_id, type)
SELECT circle.event_xid(), 0, 'pipeline_run.started' FROM generate_series(1, %s)"""
NODES = 10
POLL_SECONDS = 0.5
COMMITS = 60
WRITERS = 8
SECONDS = 3.0


def events(databases: Databases, size: Size) -> Iterator[Row]:
    """All rows on events."""
    yield from latency(databases, size)
    yield from notifications(databases, size)
    yield from newest(databases, size)


def latency(databases: Databases, size: Size) -> Iterator[Row]:
    """From the commit to the listener, one commit at a time; the floor's figure is the interval of polling."""
    pipeline_id = databases.store(chain(1)).ours
    poll = size.seconds(POLL_SECONDS)
    with floor.connect(databases.our_url) as admin:
        for what, notifies in (("polling", False), ("notified", True)):
            admin.execute("SELECT circle.notify_events(%s)", (notifies,), prepare=False)
            times = sorted(_latencies(databases, pipeline_id, poll, size.repeats(COMMITS)))
            for name, at in (("p50", len(times) // 2), ("p99", len(times) * 99 // 100)):
                yield Row.of_times(f"commit to listener, {what}, {name}", times[at], poll, 1.1)
        admin.execute("SELECT circle.notify_events(false)", prepare=False)


def _latencies(databases: Databases, pipeline_id: int, poll: float, commits: int) -> list[float]:
    runs = databases.runs
    ids = [runs.create(pipeline_id).id for _ in range(commits)]
    first = runs.create(pipeline_id).id
    runs.start(first)
    committed: dict[int, float] = {}
    received: dict[int, float] = {}

    def write() -> None:
        with databases.database.session(autocommit=True) as session:
            writer_runs = RunRepository(session)
            for at, run_id in enumerate(ids):
                sleep(0.11 + 0.017 * (at % 7))  # at every phase of the poll
                writer_runs.start(run_id)
                committed[run_id] = perf_counter()

    writer = threading.Thread(target=write)
    with closing(databases.database.listen(poll=timedelta(seconds=poll))) as stream:
        for event in stream:
            if event.run_id == first:
                writer.start()
            elif event.run_id in ids:
                received[event.run_id] = perf_counter()
                if len(received) == len(ids):
                    break
    writer.join()
    return [max(received[run_id] - committed[run_id], 0.0) for run_id in ids]


def notifications(databases: Databases, size: Size) -> Iterator[Row]:
    """Commits of eight writers with notifications and one listener, against the same without notifications."""
    writers = size.count(WRITERS)
    ids = [databases.store(chain(size.count(NODES))).ours for _ in range(writers)]
    figures: dict[bool, list[float]] = {True: [], False: []}
    with floor.connect(databases.our_url) as admin, floor.connect(databases.our_url) as listener:
        listener.execute("LISTEN circle_events", prepare=False)
        for turn in range(size.repeats(3)):
            for notifies in (True, False) if turn % 2 else (False, True):
                admin.execute("SELECT circle.notify_events(%s)", (notifies,), prepare=False)
                figures[notifies].append(_calls_per_second(databases.database, ids, size))
        admin.execute("SELECT circle.notify_events(false)", prepare=False)
    with_it, without = statistics.median(figures[True]), statistics.median(figures[False])
    yield Row.of_rates(f"{writers} writers: calls with notifications, to without", with_it, without, 0.5)


def _calls_per_second(database: Database, ids: list[int], size: Size) -> float:
    calls = [0] * len(ids)
    begin = perf_counter()

    def work(at: int) -> None:
        with database.session(autocommit=True) as session:
            runs = RunRepository(session)
            while True:
                runs.create(ids[at])
                for run in runs.claim(f"worker-{at}", LEASE):
                    advance_through(runs, run.id, run.token)
                    calls[at] += size.count(NODES) + 3
                if perf_counter() - begin >= size.seconds(SECONDS):
                    return

    threads = [threading.Thread(target=work, args=(at,)) for at in range(len(ids))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(calls) / (perf_counter() - begin)


def _insert_events(admin: floor.Connection, count: int) -> None:
    """Insert events and wait until they can be read: once no older transaction of the server is open."""
    admin.execute(INSERT, (count,), prepare=False)
    readable: LiteralString = "SELECT max(xid) < pg_snapshot_xmin(pg_current_snapshot()) FROM circle.pipeline_events"
    while not floor.fetch_value(admin.execute(readable, prepare=False)):
        sleep(0.01)


def newest(databases: Databases, size: Size) -> Iterator[Row]:
    """The newest of 1,000,000 events, against the newest of 10,000."""
    repository = EventRepository(databases.session)
    medians: list[float] = []
    counts = size.count(10_000), size.count(1_000_000)
    with floor.connect(databases.our_url) as admin:
        admin.execute("TRUNCATE circle.pipeline_events", prepare=False)
        for added in (counts[0], counts[1] - counts[0]):
            _insert_events(admin, added - 1)
            after = repository.last()
            _insert_events(admin, 1)
            assert len(repository.read(after).items) == 1
            medians.append(statistics.median(timed(partial(repository.read, after)) for _ in range(size.repeats(200))))
    small, large = medians
    yield Row.of_times(f"read the last of {counts[1]:,} events, to of {counts[0]:,}", large, small, 1.5)
