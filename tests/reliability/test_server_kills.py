"""Eight workers on a server that is killed again and again: nothing that was acknowledged is lost.

The worker is this file, run as a program. Each call that returned it writes down, line by line, in a file of its own.
``GATHERING_KILLS`` times every process of the server gets SIGKILL at once, twice unless that is set.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import psutil
import psycopg

from gathering_pipeline import ClaimedRun, Database, RunRepository, embedded
from gathering_pipeline.errors import ConflictError, DatabaseError
from tests.support import servers
from tests.support.runs import store
from tests.support.servers import connect

KILLS = int(os.environ.get("GATHERING_KILLS", "2"))
WORKERS = 8
LEASE = timedelta(seconds=2)
GRAPH = "t>a t>b t>c a>j b>j c>j j>e"
DONE = "no more runs"

Acknowledge = Callable[..., None]


def work(url: str, name: str, path: str) -> None:
    """Create a run, run what can be claimed, and so on; on errors that a lost server explains, again."""
    chance, number = random.Random(name), 0
    with Database(url) as database, Path(path).open("ab", buffering=0) as out:

        def acknowledge(*what: object) -> None:
            out.write(("\t".join(map(str, what)) + "\n").encode())

        while True:
            try:
                with database.session(autocommit=True) as session:
                    runs = RunRepository(session)
                    runs.recover(max_claims=1_000)
                    if not Path(path).with_name(DONE).exists():
                        run = runs.create(1, idempotency_key=f"{name}, {number}")
                        acknowledge("created", run.id, run.idempotency_key)
                        number += 1
                    claimed = runs.claim(name, LEASE, limit=2)
                    for run in claimed:
                        acknowledge("started", run.id, "", run.token)
                        execute(runs, run, acknowledge, chance)
                if not claimed:
                    time.sleep(0.05)
            except (DatabaseError, ConflictError):  # the server is gone, or the end of another call is unknown
                time.sleep(0.05)


def execute(runs: RunRepository, run: ClaimedRun, acknowledge: Acknowledge, chance: random.Random) -> None:
    token = run.token
    open_nodes = list(runs.advance(run.id, token=token).started)
    while open_nodes:
        node = open_nodes.pop()
        acknowledge("started", run.id, node.node_id, node.attempt - 1)
        if chance.random() < 0.5:
            runs.complete_node(run.id, node.node_id, {"by": run.worker_id}, token=token)
        else:
            result = {"node_id": node.node_id, "status": "completed", "output": {"by": run.worker_id}}
            open_nodes += runs.advance(run.id, [result], token=token).started
        acknowledge("completed", run.id, node.node_id)
        open_nodes = open_nodes or list(runs.advance(run.id, token=token).started)
    acknowledge("completed", run.id, "")


def kill(postmaster: psutil.Process) -> None:
    processes = [postmaster, *postmaster.children()]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert alive == []


def live(raw: psycopg.Connection) -> int:
    row = raw.execute("SELECT count(*) FROM circle.pipeline_runs WHERE completed_at IS NULL").fetchone()
    assert row is not None
    return int(row[0])


# the events that a status implies, and those that are stored
DIFFERENT = """
WITH implied AS (
    SELECT run_id, coalesce(node_id, '') AS node_id, split_part(type, '.', 2) AS type, count(*) FROM circle.pipeline_events
    GROUP BY 1, 2, 3
), meant AS (
    SELECT id AS run_id, '' AS node_id, 'started' AS type, claim_count::bigint AS count FROM circle.pipeline_runs
    UNION ALL SELECT id, '', status, 1 FROM circle.pipeline_runs
    UNION ALL SELECT run_id, node_id, status, 1 FROM circle.pipeline_node_runs
    UNION ALL SELECT run_id, node_id, 'started', retry_count + 1 FROM circle.pipeline_node_runs
    UNION ALL SELECT run_id, node_id, 'retrying', retry_count FROM circle.pipeline_node_runs WHERE retry_count > 0
)
SELECT * FROM implied FULL JOIN meant USING (run_id, node_id, type, count) WHERE implied IS NULL OR meant IS NULL"""


def test_killed_server_keeps_acknowledged_calls(tmp_path: Path) -> None:
    files = [tmp_path / f"worker {number}" for number in range(WORKERS)]
    chance = random.Random(KILLS)
    with servers.own() as server:
        with Database(server.url) as database:
            database.upgrade()
            with database.session() as session:
                assert store(session, GRAPH, max_retries_per_node=1_000, retry_backoff_base=0) == 1
        workers = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.reliability.test_server_kills", server.url, file.name, str(file)],
                cwd=Path(__file__).parents[2],
            )
            for file in files
        ]
        try:
            for _ in range(KILLS):
                before = sum(file.stat().st_size for file in files if file.exists())
                deadline = time.monotonic() + 60
                while sum(file.stat().st_size for file in files if file.exists()) < before + 5_000:
                    assert time.monotonic() < deadline, "the workers stand still"
                    assert all(worker.poll() is None for worker in workers), "a worker died of itself"
                    time.sleep(0.05)
                time.sleep(chance.random() / 2)
                kill(servers.postmaster(server))
                embedded.start(server.data_dir)
            (tmp_path / DONE).touch()
            time.sleep(LEASE.total_seconds())
            with connect(server.url) as raw:
                deadline = time.monotonic() + 60 + live(raw) / 10
                while live(raw):
                    assert time.monotonic() < deadline, f"{live(raw)} runs have not ended"
                    assert all(worker.poll() is None for worker in workers), "a worker died of itself"
                    time.sleep(0.1)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()

        lines = [line.split("\t") for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        with connect(server.url) as raw:
            runs: dict[str, str] = dict(
                raw.execute("SELECT id::text, idempotency_key FROM circle.pipeline_runs").fetchall()
            )
            ended = {
                ("completed", *row)
                for row in raw.execute(
                    "SELECT id::text, '' FROM circle.pipeline_runs WHERE status = 'completed' UNION ALL"
                    " SELECT run_id::text, node_id FROM circle.pipeline_node_runs WHERE status = 'completed'"
                )
            }
            begun = Counter(
                raw.execute(
                    "SELECT run_id::text, coalesce(node_id, '') FROM circle.pipeline_events WHERE type LIKE '%.started'"
                )
            )
            assert raw.execute(DIFFERENT).fetchall() == []
            assert raw.execute(
                "SELECT c.run_count, c.success_count, c.error_count FROM circle.pipelines p, circle.counted(p) c"
            ).fetchall() == [(len(runs), len(runs), 0)]
    for what, run, *rest in lines:
        if what == "created":
            assert runs[run] == rest[0]
        elif what == "completed":
            assert ("completed", run, rest[0]) in ended
        else:
            assert begun[run, rest[0]] >= 1
    # a worker without the answer to a creation repeats it: one run a key
    keys = sorted((name, int(number)) for name, number in (key.split(", ") for key in runs.values()))
    assert keys == [(file.name, number) for file in files for number in range(sum(n == file.name for n, _ in keys))]
    print(f"{KILLS} kills of the server: {len(runs)} runs, {len(lines)} calls acknowledged, 0 lost, 0 doubled, 0 stuck")


if __name__ == "__main__":
    work(*sys.argv[1:])
