"""Workers that are killed, or that sleep through their lease, while runs go through them.

The worker is this file, run as a program. Beside each result it writes, in the same transaction, a line of its own, so
that it is known afterwards what was accepted. ``GATHERING_RUNS`` runs go through, 40 unless that is set.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import psycopg

from gathering_pipeline import ClaimedRun, RunRepository, RunStatus, StartedNode
from gathering_pipeline.database import Database
from gathering_pipeline.errors import IllegalTransitionError, LeaseLostError

RUNS = int(os.environ.get("GATHERING_RUNS", "40"))
WORKERS = 4
LEASE = timedelta(milliseconds=400)
GRAPH = "t>a t>b t>c a>j b>j c>j j>e"
NODES = 6

ACCEPTED = """
CREATE TABLE accepted (run_id int, node_id text, token bigint, current_token bigint, worker text);
CREATE TABLE refused (run_id int, token bigint, worker text)"""


def work(url: str, name: str) -> None:
    """Until it is killed: sweep, claim, run nodes; now and then sleep for longer than the lease."""
    chance = random.Random(name)
    with Database(url) as database:
        while True:
            with database.session(autocommit=True) as session:
                RunRepository(session).recover(limit=10, max_claims=1_000)
                claimed = RunRepository(session).claim(name, LEASE, limit=2)
            for run in claimed:
                try:
                    execute(database, run, name, chance)
                except (LeaseLostError, IllegalTransitionError):
                    with database.session() as session:
                        session.connection().exec_driver_sql(
                            "INSERT INTO refused VALUES (%s, %s, %s)", (run.id, run.token, name)
                        )
            if not claimed:
                time.sleep(0.05)


def execute(database: Database, run: ClaimedRun, name: str, chance: random.Random) -> None:
    token = run.token
    with database.session(autocommit=True) as session:
        open_nodes = list(RunRepository(session).advance(run.id, token=token).started)
    while open_nodes:
        node = open_nodes.pop(chance.randrange(len(open_nodes)))
        time.sleep(LEASE.total_seconds() * 1.5 if chance.random() < 0.03 else 0.004)
        output = {"token": token, "worker": name}
        how = chance.random()
        with database.session() as session:
            runs = RunRepository(session)
            if how < 0.1:
                runs.fail_node(run.id, node.node_id, "by chance", token=token)
                continue
            if how < 0.5:
                runs.complete_node(run.id, node.node_id, output, token=token)
                started: tuple[StartedNode, ...] = ()
            else:
                started = runs.advance(
                    run.id, [{"node_id": node.node_id, "status": "completed", "output": output}], token=token
                ).started
            # the run is locked until the commit, so this is the token that was current when the result was accepted
            session.connection().exec_driver_sql(
                "INSERT INTO accepted SELECT id, %s, %s, claim_token, %s FROM circle.pipeline_runs WHERE id = %s",
                (node.node_id, token, name, run.id),
            )
        open_nodes += started
        with database.session(autocommit=True) as session:
            runs = RunRepository(session)
            if chance.random() < 0.3:
                runs.heartbeat(run.id, LEASE, token=token)
            if not open_nodes:
                open_nodes = list(runs.advance(run.id, token=token).started)
                if not open_nodes and runs.get(run.id).status == RunStatus.RUNNING:
                    runs.release(run.id, token=token)


def spawn(url: str, number: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.reliability.test_worker_kills", url, f"worker {number}"],
        cwd=Path(__file__).parents[2],
    )


def live(raw: psycopg.Connection) -> int:
    row = raw.execute("SELECT count(*) FROM circle.pipeline_runs WHERE status IN ('pending', 'running')").fetchone()
    assert row is not None
    count: int = row[0]
    return count


def test_killed_workers_leave_no_unfinished_run(database: Database, database_url: str, raw: psycopg.Connection) -> None:
    from tests.support.runs import store

    raw.execute(ACCEPTED)
    with database.session() as session:
        pipeline = store(session, GRAPH, max_retries_per_node=1_000, retry_backoff_base=0)
    with database.session(autocommit=True) as session:
        for _ in range(RUNS):
            RunRepository(session).create(pipeline)

    chance = random.Random(7)
    workers = [spawn(database_url, number) for number in range(WORKERS)]
    spawned, kills, deadline = WORKERS, 0, time.monotonic() + 180 + RUNS
    try:
        while live(raw):
            assert time.monotonic() < deadline, f"{live(raw)} of {RUNS} runs have not ended"
            time.sleep(0.25 + 0.25 * chance.random())
            assert all(worker.poll() is None for worker in workers), "a worker died of itself"
            at = chance.randrange(WORKERS)
            busy = raw.execute("SELECT FROM circle.pipeline_runs WHERE worker_id = %s", [workers[at].args[-1]])  # type: ignore[index]
            if busy.fetchone() is not None:  # not one that is just starting
                workers[at].send_signal(signal.SIGKILL)
                workers[at].wait()
                workers[at] = spawn(database_url, spawned)
                spawned += 1
                kills += 1
    finally:
        for worker in workers:
            with suppress(ProcessLookupError):
                worker.kill()
            worker.wait()
    assert kills > 0

    # every run ended, and well: none was out of retries or claims
    assert raw.execute("SELECT status, count(*) FROM circle.pipeline_runs GROUP BY 1").fetchall() == [
        ("completed", RUNS)
    ]
    assert raw.execute("SELECT status, count(*) FROM circle.pipeline_node_runs GROUP BY 1").fetchall() == [
        ("completed", RUNS * NODES)
    ]
    assert raw.execute(
        "SELECT c.run_count, c.success_count, c.error_count FROM circle.pipelines p, circle.counted(p) c"
    ).fetchall() == [(RUNS, RUNS, 0)]
    # no node was completed twice, and what is stored is what was accepted
    assert raw.execute("SELECT count(*), count(DISTINCT (run_id, node_id)) FROM accepted").fetchone() == (
        RUNS * NODES,
        RUNS * NODES,
    )
    assert (
        raw.execute(
            """SELECT n.run_id, n.node_id, n.output_data, a.* FROM circle.pipeline_node_runs n
               LEFT JOIN accepted a ON a.run_id = n.run_id AND a.node_id = n.node_id
               WHERE (n.output_data ->> 'token')::bigint IS DISTINCT FROM a.token
                  OR n.output_data ->> 'worker' IS DISTINCT FROM a.worker"""
        ).fetchall()
        == []
    )
    # and every result that was accepted came from the one who held the run
    assert raw.execute("SELECT * FROM accepted WHERE token <> current_token").fetchall() == []


if __name__ == "__main__":
    work(*sys.argv[1:])
