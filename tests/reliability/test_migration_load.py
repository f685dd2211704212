"""Each revision, up and down, on a database that is full and in use: how long a writer stands still at worst.

Four writers send what GatheRing sends, all the time; a transaction of theirs that takes longer than it does without a
migration was held up. ``GATHERING_MIGRATION_RUNS`` sets how many runs are there (100,000; ``make migration-load`` takes
5,000,000 and fails above 250 ms), with as many node runs. It prints a table.
"""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psycopg
import pytest

from gathering_pipeline import migrations
from tests.support import servers
from tests.support.adoption import GATHERING, GOOD_EDGES, GOOD_NODES, INDEXES
from tests.support.schema import revisions

RUNS = int(os.environ.get("GATHERING_MIGRATION_RUNS", "100000"))
LONG = RUNS >= 1_000_000
HOLD = 8.0 if LONG else 2.0
"""For how long, in seconds, another transaction keeps its locks and its snapshot."""
EVERY = 15.0 if LONG else 1.0
"""Seconds between two requests that send CREATE INDEX IF NOT EXISTS: an index of the long form takes some to be built."""
BAR = 0.25
WRITERS = 4

PIPELINES = f"""
INSERT INTO circle.pipelines (name, status, nodes, edges)
SELECT 'pipeline ' || n, 'active', '{json.dumps(GOOD_NODES)}', '{json.dumps(GOOD_EDGES)}' FROM generate_series(1, 50) n"""
# One in a hundred is to be repaired by 008; the first 1,000 are left to the other writer of each pass.
FILL_RUNS = f"""
INSERT INTO circle.pipeline_runs (pipeline_id, status, started_at, completed_at, logs, trigger_data)
SELECT 5 + n % 46, CASE WHEN n % 7 = 0 THEN 'failed' ELSE 'completed' END, now() - interval '1 day',
       CASE WHEN n % 100 > 0 THEN now() - interval '1 hour' END, '[{{"message": "started"}}]', '{{"by": "cron"}}'
FROM generate_series(1, {RUNS}) n"""
FILL_NODE_RUNS = """
SET session_replication_role = replica;
INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, status, started_at, completed_at)
SELECT id, 't', 'trigger', 'completed', started_at, completed_at FROM circle.pipeline_runs
WHERE status IN ('completed', 'failed');
RESET session_replication_role;
UPDATE circle.pipeline_runs SET status = 'timeout' WHERE id % 1000 = 1 AND status = 'failed'"""


class Steps(logging.Handler):
    """Which step of the migration is running."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.begun: list[tuple[float, str]] = [(0.0, "(none)")]

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == "step: %s":
            self.begun.append((time.monotonic(), str(record.args[0])))  # type: ignore[index]

    def during(self, begin: float, end: float) -> str:
        """The steps that ran in a stretch of time."""
        names = [
            name
            for (start, name), (stop, _) in zip(self.begun, [*self.begun[1:], (float("inf"), "")], strict=True)
            if start <= end and stop >= begin
        ]
        return " | ".join(names)


@dataclass
class Load:
    """Writers on one database."""

    url: str
    create_index: bool = False
    nodes: bool = False
    deadlocks: list[str] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    next_request: float = 0.0
    transactions: int = 0
    worst: tuple[float, float, str] = (0.0, 0.0, "")

    @contextmanager
    def running(self) -> Iterator[None]:
        threads = [threading.Thread(target=self.write, args=(number,)) for number in range(1, WRITERS + 1)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.stop.set()
            for thread in threads:
                thread.join(60)

    def write(self, pipeline: int) -> None:
        raw = servers.connect(self.url)
        try:
            while not self.stop.is_set():
                self.one_run(raw, pipeline)
                time.sleep(0.005)
        except BaseException as error:  # noqa: BLE001 - whatever it is
            self.failures.append(error)
        finally:
            raw.close()

    def one_run(self, raw: psycopg.Connection, pipeline: int) -> None:
        found = self.timed(
            raw,
            "INSERT INTO circle.pipeline_runs (pipeline_id, status, started_at, trigger_data, logs) "
            "VALUES (%(pipeline)s, 'running', NOW(), '{}', '[]') RETURNING id",
            "UPDATE circle.pipelines SET run_count = run_count + 1, last_run = NOW() WHERE id = %(pipeline)s",
            pipeline=pipeline,
        )
        self.timed(raw, "UPDATE circle.pipeline_runs SET current_node = 't' WHERE id = %(run)s", run=found)
        if self.nodes:
            self.timed(
                raw,
                "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, status, started_at) "
                "VALUES (%(run)s, 't', 'trigger', 'running', NOW())",
                run=found,
            )
            self.timed(
                raw,
                "UPDATE circle.pipeline_node_runs SET status = 'completed', completed_at = clock_timestamp() "
                "WHERE run_id = %(run)s",
                run=found,
            )
        self.timed(
            raw,
            "UPDATE circle.pipeline_runs SET status = 'completed', completed_at = clock_timestamp() WHERE id = %(run)s",
            "UPDATE circle.pipelines SET success_count = success_count + 1 WHERE id = %(pipeline)s",
            run=found,
            pipeline=pipeline,
        )
        self.timed(raw, "UPDATE circle.pipelines SET updated_at = NOW() WHERE id = %(pipeline)s", pipeline=pipeline)
        if self.create_index and pipeline == 1 and time.monotonic() > self.next_request:
            self.next_request = time.monotonic() + EVERY
            # in one transaction they deadlock with the other writers by themselves
            for statement in INDEXES.strip().split("\n"):
                self.timed(raw, statement)

    def timed(self, raw: psycopg.Connection, *statements: str, **values: int | None) -> int | None:
        """One transaction; again if it was the victim of a deadlock. What its first statement returned."""
        begin = time.monotonic()
        cursors: list[psycopg.Cursor] = []
        while not cursors:
            try:
                with raw.transaction():
                    cursors = [raw.execute(statement, values) for statement in statements]
            except psycopg.errors.DeadlockDetected as error:
                self.deadlocks.append(str(error))
        end = time.monotonic()
        self.transactions += 1
        if end - begin > self.worst[0]:
            self.worst = (end - begin, begin, statements[0])
        row = cursors[0].fetchone() if cursors[0].description else None
        return None if row is None else row[0]

    def take_worst(self) -> tuple[float, float, str]:
        worst, self.worst = self.worst, (0.0, 0.0, "")
        return worst


@contextmanager
def holding(url: str, kind: str | None) -> Iterator[None]:
    """Another transaction, which goes on for ``HOLD`` seconds: one that has read everything, or written to everything."""
    held = threading.Event()

    def hold() -> None:
        with servers.connect(url) as raw, raw.transaction():
            if kind == "reader":
                raw.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")  # its snapshot is as old as it is
            for table, row in (("pipelines", 50), ("pipeline_runs", 1), ("pipeline_node_runs", 1)):
                if raw.execute("SELECT to_regclass(%s)", [f"circle.{table}"]).fetchone() != (None,):
                    raw.execute(f"SELECT FROM circle.{table} LIMIT 1")
                    if kind == "writer":
                        raw.execute(f"UPDATE circle.{table} SET id = id WHERE id = {row}")
            held.set()
            time.sleep(HOLD)

    if kind is None:
        yield
        return
    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(30)
    try:
        yield
    finally:
        thread.join()


def invalid_indexes(raw: psycopg.Connection) -> list[str]:
    return [
        name
        for (name,) in raw.execute("SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid").fetchall()
    ]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A database of GatheRing's own, full of runs, on a server that writes to the disk as servers do."""
    with servers.start(durable=True) as server:
        name = server.create()
        found = server.database_url(name)
        with servers.connect(found) as raw:
            raw.execute(GATHERING)
            raw.execute(PIPELINES)
            raw.execute(FILL_RUNS)
            raw.execute(INDEXES)
            raw.execute("VACUUM ANALYZE")
        yield found
        server.drop(name)


@pytest.fixture
def steps() -> Iterator[Steps]:
    handler, logger = Steps(), logging.getLogger("alembic.gathering_pipeline")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


# name, what is in the way of upgrades, of downgrades, whether a writer also sends CREATE INDEX IF NOT EXISTS
PASSES = (
    [
        ("alone", None, None, False),
        ("behind a reader", "reader", "reader", False),
        ("behind a writer", "writer", "writer", False),
        ("with concurrent CREATE INDEX", None, None, True),
    ]
    if LONG
    else [
        ("behind a reader, then a writer", "reader", "writer", False),
        ("with concurrent CREATE INDEX", None, None, True),
    ]
)


@pytest.mark.parametrize(("name", "up", "down", "create_index"), PASSES, ids=[one[0] for one in PASSES])
def test_writers_stand_still_briefly_during_each_revision(
    url: str,
    steps: Steps,
    name: str,
    up: str | None,
    down: str | None,
    create_index: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines: list[str] = []
    stalls: list[float] = []
    load = Load(url, create_index=create_index)
    path = ["base", *revisions()]
    with servers.connect(url) as raw, load.running():

        def move(what: str, kind: str | None, action: Callable[[], None]) -> None:
            load.take_worst()
            begin = time.monotonic()
            with holding(url, kind):
                action()
            took = time.monotonic() - begin
            worst, at, statement = load.take_worst()
            stalls.append(worst)
            lines.append(
                f"{what:32} {took:7.1f} s {worst * 1000:9.0f} ms  {steps.during(at, at + worst)[:200]} [{statement[:60]}]"
            )
            assert invalid_indexes(raw) == []
            assert load.failures == []

        try:
            move("(nothing)", up, lambda: time.sleep(3 if LONG else 1))
            for revision in path[1:]:
                move(f"up to {revision}", up, lambda to=revision: migrations.upgrade(url, to))  # type: ignore[misc]
                if revision == path[2]:
                    raw.execute(FILL_NODE_RUNS)
                    raw.execute("ANALYZE")
                    load.nodes = True
            for revision in reversed(path[:-1]):
                if revision == path[1]:
                    load.nodes = False
                    time.sleep(0.5)
                move(f"down to {revision}", down, lambda to=revision: migrations.downgrade(url, to))  # type: ignore[misc]
        finally:
            with capsys.disabled():
                print(f"\n{name}, {RUNS:,} runs, {load.transactions:,} transactions of {WRITERS} writers; worst stall:")
                print("\n".join(lines))
                print(f"deadlocks: {len(load.deadlocks)}, failures: {load.failures[:3]}")
    assert load.failures == []
    assert load.deadlocks == []
    assert load.transactions > 1000
    if LONG:
        assert max(stalls) <= BAR
