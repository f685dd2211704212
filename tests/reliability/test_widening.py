"""``db widen`` on a database in use: how long a caller stands still at worst, and what a kill at any moment leaves.

Two writers send what GatheRing sends, two call the repositories, and one reads. ``GATHERING_WIDEN_RUNS`` sets how many
runs are there (5,000; ``make widen-load`` takes 5,000,000 and fails above 250 ms), with as many node runs; it prints
what it measured. ``GATHERING_KILLS`` is the number of kills, 5 unless that is set.

The program that is killed is this file.
"""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import pytest
from alembic import command
from sqlalchemy import select

from gathering_pipeline import Database, PipelineRun, RunRepository, RunStatus, is_transient, migrations
from gathering_pipeline.maintenance.doctor import doctor
from gathering_pipeline.maintenance.widening import widen
from tests.support import narrow, servers
from tests.support.adoption import GOOD_EDGES, GOOD_NODES
from tests.support.databases import scalar
from tests.support.load import Load, LockWaits, Steps
from tests.support.schema import catalog, facts

T = TypeVar("T")

RUNS = int(os.environ.get("GATHERING_WIDEN_RUNS", "5000"))
LONG = RUNS >= 1_000_000
KILLS = int(os.environ.get("GATHERING_KILLS", "5"))
BAR = 0.25
NARROW = ("pipeline_runs.id", "pipeline_node_runs.id", "pipeline_node_runs.run_id", "pipeline_runs_id_seq",
          "pipeline_node_runs_id_seq")  # fmt: skip

# Full pages, as those of a table from before; the triggers of this package stay silent.
FILL = f"""
INSERT INTO circle.pipelines (name, status, nodes, edges)
SELECT 'pipeline ' || n, 'active', '{json.dumps(GOOD_NODES)}', '{json.dumps(GOOD_EDGES)}' FROM generate_series(1, 50) n;
SET session_replication_role = replica;
ALTER TABLE circle.pipeline_runs SET (fillfactor = 100);
ALTER TABLE circle.pipeline_node_runs SET (fillfactor = 100);
INSERT INTO circle.pipeline_runs (pipeline_id, pipeline_version, status, started_at, completed_at, trigger_data)
SELECT 5 + n % 46, 1, 'completed', now() - interval '1 day', now() - interval '1 hour', '{{"by": "cron"}}'
FROM generate_series(1, {RUNS}) n;
INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, status, started_at, completed_at)
SELECT id, 't', 'trigger', 'completed', started_at, completed_at FROM circle.pipeline_runs;
INSERT INTO circle.pipeline_counters (pipeline_id, completed, run_count, success_count)
SELECT pipeline_id, count(*), count(*), count(*) FROM circle.pipeline_runs GROUP BY pipeline_id;
RESET session_replication_role;
ALTER TABLE circle.pipeline_runs SET (fillfactor = 70);
ALTER TABLE circle.pipeline_node_runs SET (fillfactor = 50);
CREATE TABLE public.reports (id serial PRIMARY KEY, run_id integer REFERENCES circle.pipeline_runs ON DELETE CASCADE);
INSERT INTO public.reports (run_id) SELECT id FROM circle.pipeline_runs WHERE id % 10 = 0"""


@dataclass
class Callers:
    """Callers of the repositories: each call is sent again as long as ``is_transient`` says so, as a service does."""

    url: str
    stop: threading.Event = field(default_factory=threading.Event)
    failures: list[BaseException] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    calls: int = 0
    worst: tuple[float, float, str] = (0.0, 0.0, "")

    @contextmanager
    def running(self) -> Iterator[None]:
        threads = [threading.Thread(target=self.guarded, args=(work,)) for work in (self.execute, self.edit, self.read)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.stop.set()
            for thread in threads:
                thread.join(60)

    def guarded(self, work: Callable[[Database, int], None]) -> None:
        try:
            with Database(self.url) as database:
                number = 0
                while not self.stop.is_set():
                    try:
                        work(database, number)
                        number += 1
                    except Exception as error:
                        if not is_transient(error):
                            raise
                        self.repeated.append(f"{type(error).__name__}: {error}")
        except BaseException as error:  # noqa: BLE001 - whatever it is
            self.failures.append(error)

    def timed(self, call: Callable[[], T]) -> T:
        begin = time.monotonic()
        try:
            return call()
        finally:
            end = time.monotonic()
            self.calls += 1
            self.worst = max(self.worst, (end - begin, begin, call.__code__.co_names[0]))

    def execute(self, database: Database, number: int) -> None:
        """A run from its creation to its end, each call for itself."""
        with database.session(autocommit=True) as session:
            runs = RunRepository(session)
            run = self.timed(lambda: runs.create(1 + number % 50, idempotency_key=f"run {number}"))
            step = self.timed(lambda: runs.advance(run.id))
            while step.started:
                done = [{"node_id": node.node_id, "status": "completed"} for node in step.started]
                step = self.timed(lambda: runs.advance(run.id, done))
            assert self.timed(lambda: runs.get(run.id)).status == "completed"

    def edit(self, database: Database, number: int) -> None:
        """A run in a transaction, with statements of SQLAlchemy and an object of the session."""
        with database.session() as session:
            runs = RunRepository(session)
            run = self.timed(lambda: runs.create(1 + number % 50))
            row = self.timed(lambda: session.scalars(select(PipelineRun).where(PipelineRun.id == run.id)).one())
            self.timed(lambda: runs.cancel(run.id))
            assert (row.id, row.status) == (run.id, "cancelled")

    def read(self, database: Database, number: int) -> None:
        """A page of the history, and a run of it with its nodes."""
        with database.session(autocommit=True) as session:
            runs = RunRepository(session)
            page = self.timed(lambda: runs.search(status=RunStatus.COMPLETED, limit=20))
            ids = [run.id for run in page.items]
            assert ids == sorted(ids, reverse=True)
            one = ids[number % len(ids)]
            assert self.timed(lambda: runs.get(one)).id == one
            assert {node.run_id for node in self.timed(lambda: runs.nodes(one))} <= {one}


def sums(raw: psycopg.Connection) -> list[tuple[Any, ...]]:
    """What stays the same of the rows that were there before."""
    return [
        raw.execute(
            f"SELECT count(*), sum(hashint8({key}::bigint)::numeric) FROM {table} WHERE id <= {RUNS}"
        ).fetchone()
        or ()
        for table, key in (
            ("circle.pipeline_runs", "id"),
            ("circle.pipeline_node_runs", "id"),
            ("circle.pipeline_node_runs", "run_id"),
            ("public.reports", "run_id"),
        )
    ]


ORPHANS = """
SELECT (SELECT count(*) FROM circle.pipeline_node_runs n WHERE NOT EXISTS (SELECT FROM circle.pipeline_runs r WHERE r.id = n.run_id))
     + (SELECT count(*) FROM public.reports n WHERE NOT EXISTS (SELECT FROM circle.pipeline_runs r WHERE r.id = n.run_id))"""


@pytest.fixture
def url(server: servers.Server, narrow_url: str) -> Iterator[str]:
    """A database full of runs with INTEGER ids; for the long form on a server that writes to the disk as servers do."""
    if not LONG:
        with servers.connect(narrow_url) as raw:
            raw.execute(FILL)
        yield narrow_url
        return
    with servers.start(durable=True) as own:
        found = own.database_url(narrow.create(own))
        with servers.connect(found) as raw:
            raw.execute(FILL)
            raw.execute("VACUUM ANALYZE")
        yield found


def wide(url: str) -> bool:
    found = facts(url, "column") | facts(url, "sequence")
    return all("bigint" in found[name] for name in NARROW)


def test_callers_stand_still_briefly_while_ids_are_widened(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with servers.connect(url) as raw:
        before = sums(raw)
        load, callers, waits = Load(url, nodes=True, prepared=False), Callers(url), LockWaits(url)
        with load.running(2), callers.running(), Steps.logged() as steps, Database(url) as database:
            time.sleep(3 if LONG else 0.5)
            quiet = max(load.take_worst(), callers.worst)
            callers.worst = (0.0, 0.0, "")
            begin = time.monotonic()
            with waits.watched():
                widen(database.engine)
            took = time.monotonic() - begin
            time.sleep(1 if LONG else 0.3)
        worst = max(load.take_worst(), callers.worst)
        with capsys.disabled():
            print(
                f"\n{RUNS:,} runs widened in {took:.1f} s; {load.transactions:,} transactions, {callers.calls:,} calls;"
                f"\nworst without it {quiet[0] * 1000:.0f} ms, with it {worst[0] * 1000:.0f} ms"
                f" [{worst[2][:60]}] during {steps.during(worst[1], worst[1] + worst[0])[-200:]}"
                f"\nlongest wait for a lock on a table {waits.longest * 1000:.0f} ms"
                f"\ndeadlocks: {len(load.deadlocks)}, failures: {[*load.failures, *callers.failures][:3]},"
                f" repeated: {len(callers.repeated)} {[one[:200] for one in callers.repeated[:3]]}"
            )
        assert [*load.failures, *callers.failures] == []
        assert load.deadlocks == []
        assert wide(url)
        assert sums(raw) == before
        assert scalar(raw, ORPHANS) == 0
        raw.execute("DELETE FROM circle.pipeline_runs WHERE id = 10")
        assert scalar(raw, "SELECT count(*) FROM public.reports WHERE run_id = 10") == 0
    with Database(url) as database:
        assert [finding for finding in doctor(database.engine) if finding.code != "counters"] == []
    command.check(migrations.config(url))
    if LONG:
        assert max(worst[0], waits.longest) <= BAR


class Bomb(logging.Handler):
    """Kills the process a moment after the n-th step began."""

    def __init__(self, at: int, moment: float) -> None:
        super().__init__(logging.INFO)
        self.left = at
        self.moment = moment

    def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002 - any step counts
        self.left -= 1
        if self.left == 0:
            threading.Timer(self.moment, os.kill, (os.getpid(), signal.SIGKILL)).start()


def widen_and_die(url: str, kills: int) -> None:
    """The program: fork a widening for each kill, and then let one complete."""
    for kill in [*range(kills), None]:
        child = os.fork()
        if child == 0:
            try:
                if kill is not None:
                    logger = logging.getLogger("alembic.gathering_pipeline")
                    logger.addHandler(Bomb(random.randint(1, 12), random.uniform(0, 0.02)))
                    logger.setLevel(logging.INFO)
                with Database(url) as database:
                    widen(database.engine)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL), f"kill {kill} of {kills}"


def test_killed_widening_can_be_started_again(server: servers.Server, narrow_template: str) -> None:
    name = server.create(narrow_template)
    url = server.database_url(name)
    try:
        with servers.connect(url) as raw:
            raw.execute(FILL.replace(f"generate_series(1, {RUNS})", "generate_series(1, 5000)"))
            before = sums(raw)
            load = Load(url, nodes=True, prepared=False)
            with load.running(2):
                done = subprocess.run(
                    [sys.executable, "-m", "tests.reliability.test_widening", url, str(KILLS)],
                    cwd=Path(__file__).parents[2],
                    capture_output=True,
                    text=True,
                    timeout=120 + 10 * KILLS,
                    check=False,
                )
            assert done.returncode == 0, done.stderr[-3000:]
            assert load.failures == []
            assert wide(url)
            assert sums(raw) == before
            assert scalar(raw, ORPHANS) == 0
            assert "zz_wide" not in "".join(catalog(url))
        with Database(url) as database:
            assert [finding for finding in doctor(database.engine) if finding.code != "counters"] == []
    finally:
        server.drop(name)


if __name__ == "__main__":
    widen_and_die(sys.argv[1], int(sys.argv[2]))
