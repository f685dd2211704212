"""Worker processes that are killed, terminated or frozen beyond their lease, while runs go through them.

The handlers are in this file. Nodes take a third of a lease, so that a worker that doesn't extend its leases loses its
runs. ``GATHERING_RUNS`` runs go through, 12 unless that is set.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg

from gathering_pipeline import NodeContext, RunRepository
from gathering_pipeline.database import Database
from tests.support.runs import store

RUNS = int(os.environ.get("GATHERING_RUNS", "12"))
WORKERS = 3
LEASE_S = 1.0
STEP_S = float(os.environ.get("GATHERING_STEP_S", LEASE_S / 3))
GRAPH = "t>a t>b a>j b>j j>e"
NODES = 5


async def work_async(context: NodeContext) -> dict[str, Any]:
    await asyncio.sleep(STEP_S)
    return {"pid": os.getpid(), "attempt": context.attempt}


def work(context: NodeContext) -> dict[str, Any]:
    time.sleep(STEP_S)
    return {"pid": os.getpid(), "attempt": context.attempt}


HANDLERS = {"agent": work_async, "condition": work_async, "action": work}


def spawn(url: str, lease_s: float = LEASE_S, step_s: float = STEP_S) -> subprocess.Popen[bytes]:
    command = ["-m", "gathering_pipeline.worker", f"{__name__}:HANDLERS", "--lease", str(lease_s)]
    return subprocess.Popen(
        [sys.executable, *command, "--concurrency", "2"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"GATHERING_DATABASE_URL": url, "GATHERING_STEP_S": str(step_s)},
        stderr=subprocess.DEVNULL,
    )


def test_runs_survive_what_happens_to_their_workers(
    database: Database, database_url: str, raw: psycopg.Connection
) -> None:
    with database.session(autocommit=True) as session:
        pipeline = store(session, GRAPH, max_retries_per_node=1_000, retry_backoff_base=0)
        for _ in range(RUNS):
            RunRepository(session).create(pipeline)
    live = "SELECT count(*) FROM circle.pipeline_runs WHERE status IN ('pending', 'running')"
    chance = random.Random(7)
    workers = [spawn(database_url) for _ in range(WORKERS)]
    sent: list[int] = []
    deadline = time.monotonic() + 120 + 2 * RUNS
    try:
        while raw.execute(live).fetchone() != (0,):
            assert time.monotonic() < deadline
            time.sleep(0.1 + 0.3 * chance.random())
            victim = workers[at := chance.randrange(WORKERS)]
            busy = "SELECT 1 FROM circle.pipeline_runs WHERE status = 'running' AND worker_id LIKE %s"
            if raw.execute(busy, [f"%-{victim.pid}"]).fetchone() is None:
                continue  # it is just starting
            sent.append(chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP]))
            victim.send_signal(sent[-1])
            if sent[-1] == signal.SIGSTOP:
                time.sleep(1.5 * LEASE_S)
                victim.send_signal(signal.SIGCONT)
            else:
                expected = 0 if sent[-1] == signal.SIGTERM else -signal.SIGKILL
                assert victim.wait(60) == expected
                workers[at] = spawn(database_url)
    finally:
        for worker in workers:
            with suppress(ProcessLookupError):
                worker.kill()
            worker.wait()

    ended = raw.execute("SELECT status, count(*) FROM circle.pipeline_runs GROUP BY 1").fetchall()
    assert ended == [("completed", RUNS)]
    ended = raw.execute("SELECT status, count(*) FROM circle.pipeline_node_runs GROUP BY 1").fetchall()
    assert ended == [("completed", RUNS * NODES)]
    assert sent
    # no node was completed twice, and the result is that of the attempt which counts
    completions = raw.execute(
        "SELECT count(*), count(DISTINCT (run_id, node_id)) FROM circle.pipeline_events WHERE type = 'pipeline_node.completed'"
    ).fetchone()
    assert completions == (RUNS * NODES, RUNS * NODES)
    stale = "SELECT * FROM circle.pipeline_node_runs WHERE (output_data ->> 'attempt')::int <> retry_count + 1"
    assert raw.execute(stale).fetchall() == []


NOBODY = """
SELECT id, lease_expires_at FROM circle.pipeline_runs
WHERE status = 'running' AND (lease_expires_at IS NULL OR lease_expires_at < clock_timestamp() - interval '15 s')"""
"""Running runs that no worker drives, and that no sweep has taken for far longer than a sweep's pause."""


def test_killed_workers_leave_no_run_that_nobody_drives(
    database: Database, database_url: str, raw: psycopg.Connection
) -> None:
    """Steps of 0.6 s and leases of 2 s: nearly every kill hits a run in the middle of a node."""
    number = max(4, RUNS // 3)
    with database.session(autocommit=True) as session:
        pipeline = store(session, GRAPH, max_retries_per_node=1_000, retry_backoff_base=0)
        for _ in range(number):
            RunRepository(session).create(pipeline)
    workers = [spawn(database_url, 2, 0.6) for _ in range(2)]
    chance = random.Random(11)
    kills = 0
    deadline = time.monotonic() + 120 + 10 * number
    try:
        while raw.execute("SELECT 1 FROM circle.pipeline_runs WHERE completed_at IS NULL").fetchone():
            assert time.monotonic() < deadline
            assert raw.execute(NOBODY).fetchall() == []
            time.sleep(0.5 + chance.random())
            held = "SELECT 1 FROM circle.pipeline_runs WHERE status = 'running' AND worker_id LIKE %s"
            at = chance.randrange(2)
            if kills < number and raw.execute(held, [f"%-{workers[at].pid}"]).fetchone():
                workers[at].kill()
                workers[at].wait()
                workers[at] = spawn(database_url, 2, 0.6)
                kills += 1
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert kills > 0
    ended = raw.execute("SELECT status, count(*) FROM circle.pipeline_runs GROUP BY 1").fetchall()
    assert ended == [("completed", number)]
    ended = raw.execute("SELECT status, count(*) FROM circle.pipeline_node_runs GROUP BY 1").fetchall()
    assert ended == [("completed", number * NODES)]
    lost = "SELECT count(*) FROM circle.pipeline_run_history WHERE kind = 'recovered'"
    assert database.metrics().leases_lost == (raw.execute(lost).fetchone() or (0,))[0] > 0
