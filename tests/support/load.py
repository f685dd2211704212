"""GatheRing's writers at work on a database, and how long each of their transactions takes."""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psycopg

from tests.support import servers
from tests.support.adoption import INDEXES

WRITERS = 4


class Steps(logging.Handler):
    """Which step of the migration is running."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.begun: list[tuple[float, str]] = [(0.0, "(none)")]

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == "step: %s":
            self.begun.append((time.monotonic(), str(record.args[0])))  # type: ignore[index]

    @classmethod
    @contextmanager
    def logged(cls) -> Iterator[Steps]:
        """Note the steps of migrations that run in a block."""
        handler, logger = cls(), logging.getLogger("alembic.gathering_pipeline")
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        try:
            yield handler
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)

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
    """Writers on one database.

    Attributes:
        url: The database.
        create_index_every: Seconds between the requests of a writer that send CREATE INDEX IF NOT EXISTS.
        nodes: Whether they write node runs, too.
        prepared: Whether they prepare statements: a prepared one fails once an id that it returns has another type.
    """

    url: str
    create_index_every: float | None = None
    nodes: bool = False
    prepared: bool = True
    deadlocks: list[str] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    next_request: float = 0.0
    transactions: int = 0
    worst: tuple[float, float, str] = (0.0, 0.0, "")

    @contextmanager
    def running(self, writers: int = WRITERS) -> Iterator[None]:
        threads = [threading.Thread(target=self.write, args=(number,)) for number in range(1, writers + 1)]
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
        if not self.prepared:
            raw.prepare_threshold = None
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
        if self.create_index_every and pipeline == 1 and time.monotonic() > self.next_request:
            self.next_request = time.monotonic() + self.create_index_every
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
def holding(url: str, kind: str | None, seconds: float) -> Iterator[None]:
    """Another transaction, which goes on for so long: one that has read everything, or written to everything."""
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
            time.sleep(seconds)

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


@dataclass
class LockWaits:
    """How long a session waited for a lock on a table, the migrator's apart: the load of the machine has no part in it."""

    url: str
    longest: float = 0.0
    stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def watched(self) -> Iterator[None]:
        thread = threading.Thread(target=self.watch)
        thread.start()
        try:
            yield
        finally:
            self.stop.set()
            thread.join()

    def watch(self) -> None:
        now = """
            SELECT coalesce(max(extract(epoch FROM clock_timestamp() - waitstart)), 0)::float8 FROM pg_locks
            WHERE NOT granted AND locktype = 'relation'
              AND pid NOT IN (SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1)"""
        with servers.connect(self.url) as raw:
            while not self.stop.wait(0.005):
                (seconds,) = raw.execute(now).fetchone() or (0.0,)
                self.longest = max(self.longest, seconds)
