"""What events cost who writes them, and how soon they are with who listens."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from functools import partial

from benchmarks.runs import LEASE, advance_run, by_advance, record_run, steps_run
from benchmarks.stage import Row, Stage, chain, connect, database, milliseconds, store, timed
from gathering_pipeline import Database, EventRepository, RunRepository

TRIGGERS = (
    ("pipeline_runs", "pipeline_runs_event"),
    ("pipeline_node_runs", "pipeline_node_runs_event"),
    ("pipeline_node_runs", "pipeline_node_runs_event_insert"),
)
INSERT = """
INSERT INTO circle.pipeline_events (xid, run_id, type)
SELECT circle.event_xid(), 0, 'pipeline_run.started' FROM generate_series(1, %s)"""
POLL = timedelta(seconds=0.5)
COMMITS = 60
WRITERS = 8
SECONDS = 3.0


def overhead(stage: Stage) -> Iterator[Row]:
    """A run of 10 nodes with events, against the same without; both in one database, by turns."""
    db, pipeline_id = database(stage), store(stage, chain(10))
    with connect(stage.ours) as admin:

        def switch(how: str) -> None:
            for table, trigger in TRIGGERS:
                admin.execute(f"ALTER TABLE circle.{table} {how} TRIGGER {trigger}", prepare=False)

        for what, action, bar in (
            ("step by step", partial(steps_run, db, pipeline_id, 10), 1.25),
            ("by advance", partial(advance_run, db, pipeline_id), 1.25),
            ("by record", partial(record_run, db, pipeline_id, 10), 1.25),
        ):
            times: dict[str, list[float]] = {"ENABLE": [], "DISABLE": []}
            for turn in range(30):
                for how in ("ENABLE", "DISABLE") if turn % 2 else ("DISABLE", "ENABLE"):
                    switch(how)
                    action()  # what the switch made stale is planned anew
                    begin = time.perf_counter()
                    for _ in range(3):
                        action()
                    times[how].append((time.perf_counter() - begin) / 3)
            switch("ENABLE")
            with_events, without = (statistics.median(times[how]) for how in ("ENABLE", "DISABLE"))
            ratio = statistics.median(a / b for a, b in zip(times["ENABLE"], times["DISABLE"], strict=True))
            yield Row(
                f"events on, to off: 10 nodes {what}", milliseconds(with_events), milliseconds(without), ratio, bar
            )


def latency(stage: Stage) -> Iterator[Row]:
    """From the commit to the listener, one commit at a time; the floor's figure is the poll's interval."""
    pipeline_id = store(stage, chain(1))
    with connect(stage.ours) as admin:
        for what, on in (("polling", False), ("notified", True)):
            admin.execute("SELECT circle.notify_events(%s)", (on,), prepare=False)
            times = sorted(_latencies(stage, pipeline_id))
            for name, at in (("p50", len(times) // 2), ("p99", len(times) * 99 // 100)):
                ratio = times[at] / POLL.total_seconds()
                yield Row(
                    f"commit to listener, {what}, {name}",
                    milliseconds(times[at]),
                    milliseconds(POLL.total_seconds()),
                    ratio,
                    1.1,
                )
        admin.execute("SELECT circle.notify_events(false)", prepare=False)


def _latencies(stage: Stage, pipeline_id: int) -> list[float]:
    committed: dict[int, float] = {}
    with Database(stage.ours) as db, db.session(autocommit=True) as session:
        runs = RunRepository(session)
        ids = [runs.create(pipeline_id).id for _ in range(COMMITS)]
        first = runs.create(pipeline_id).id
        runs.start(first)

        def write() -> None:
            for at, run_id in enumerate(ids):
                time.sleep(0.11 + 0.017 * (at % 7))  # at every phase of the poll
                runs.start(run_id)
                committed[run_id] = time.perf_counter()

        seen: dict[int, float] = {}
        writer = threading.Thread(target=write)
        with closing(db.listen(poll=POLL)) as events:
            for event in events:
                if event.run_id == first:
                    writer.start()
                elif event.run_id in ids:
                    seen[event.run_id] = time.perf_counter()
                    if len(seen) == len(ids):
                        break
        writer.join()
    return [max(seen[run_id] - committed[run_id], 0.0) for run_id in ids]


def notify(stage: Stage) -> Iterator[Row]:
    """Commits of eight writers with notifications, against the same without; one listener is there."""
    ids = [store(stage, chain(10)) for _ in range(WRITERS)]
    with connect(stage.ours) as admin, Database(stage.ours) as db:
        figures: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(6):
            on = turn % 4 in (1, 2)
            admin.execute("SELECT circle.notify_events(%s)", (on,), prepare=False)
            with connect(stage.ours) as listener:
                listener.execute("LISTEN circle_events")
                figures[on].append(_throughput(db, ids))
        admin.execute("SELECT circle.notify_events(false)", prepare=False)
    with_it, without = (statistics.median(figures[on]) for on in (True, False))
    name = "8 writers: calls a second with notifications, to without"
    yield Row(name, f"{with_it:.0f}/s", f"{without:.0f}/s", with_it / without, 0.5, more_is_better=True)


def _throughput(db: Database, ids: list[int]) -> float:
    counts = [0] * WRITERS
    end = time.perf_counter() + SECONDS

    def work(at: int) -> None:
        with db.session(autocommit=True) as session:
            runs = RunRepository(session)
            while time.perf_counter() < end:
                runs.create(ids[at])
                for run in runs.claim(f"worker-{at}", LEASE):
                    by_advance(runs, run.id, run.claim_token)
                    counts[at] += 13

    threads = [threading.Thread(target=work, args=(at,)) for at in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / SECONDS


def tail(stage: Stage) -> Iterator[Row]:
    """The newest of 1,000,000 events, against the same of 10,000."""
    with connect(stage.ours) as admin, database(stage).session(autocommit=True) as session:
        events = EventRepository(session)
        medians = []
        for count in (10_000, 990_000):
            admin.execute(INSERT, (count,), prepare=False)
            after = events.last()
            admin.execute(INSERT, (1,), prepare=False)
            assert len(events.read(after).items) == 1
            medians.append(statistics.median(timed(partial(events.read, after)) for _ in range(200)))
        admin.execute("TRUNCATE circle.pipeline_events", prepare=False)
    small, large = medians
    yield Row(
        "read the last of 1,000,000 events, to of 10,000", milliseconds(large), milliseconds(small), large / small, 1.5
    )


def rows(stage: Stage) -> Iterator[Row]:
    """All of them."""
    for part in (overhead, latency, notify, tail):
        yield from part(stage)
