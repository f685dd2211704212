"""Many servers: workers over three of which one is killed and restarted, and a database that is moved.

Every node is completed once, and the shares of the other servers never stop. The worker is this file, run as a program. Beside each result it writes, in the same transaction, a line of its own, so
that it is known afterwards what was accepted. ``GATHERING_KILLS`` times a server gets SIGKILL, once unless that is set.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from datetime import timedelta
from pathlib import Path

import psutil
import psycopg
import pytest
from sqlalchemy.exc import DBAPIError

from gathering_pipeline import Database, Databases, RunRepository, embedded
from gathering_pipeline.embedded import EmbeddedServer
from gathering_pipeline.errors import ConflictError, DatabaseError, DatabaseUnavailableError, InvalidCursorError
from gathering_pipeline.maintenance.doctor import doctor
from tests.support import servers
from tests.support.runs import store
from tests.support.servers import connect

KILLS = int(os.environ.get("GATHERING_KILLS", "1"))
NAMES = ("killed", "left", "right")
WORKERS = 3
LEASE = timedelta(seconds=1)
NODES = 4
OUTAGE_S = 2.5
STILL_S = 1.5
"""Longest time in which no node of a database is completed, although its server runs and has work."""
LIMIT_S = 60


def work(urls: str, name: str) -> None:
    """Until it is killed: claim, which sweeps, and run nodes."""
    pause, backoff = timedelta(seconds=0.1), timedelta(seconds=1)
    with Databases(json.loads(urls), longest_pause=pause, longest_backoff=backoff) as databases:
        while True:
            claimed = databases.claim(name, LEASE, 2, max_claims=1_000)
            for of, run in claimed:
                try:
                    execute(databases[of], run.id, run.token)
                except (DatabaseError, ConflictError, DBAPIError):
                    continue  # the server is gone, or the lease is
            if not claimed:
                time.sleep(0.02)


def execute(database: Database, run: int, token: int) -> None:
    with database.session(autocommit=True) as session:
        nodes = [node.node_id for node in RunRepository(session).advance(run, token=token).started]
    while nodes:
        with database.session() as session:
            runs, result = RunRepository(session), {"node_id": nodes[0], "status": "completed"}
            nodes = [*nodes[1:], *(node.node_id for node in runs.advance(run, [result], token=token).started)]
            accepted = (run, result["node_id"], token)
            session.connection().exec_driver_sql("INSERT INTO accepted VALUES (%s, %s, %s)", accepted)


def completed(url: str) -> int:
    with connect(url) as raw:
        row = raw.execute("SELECT count(*) FROM accepted").fetchone()
    assert row is not None
    return int(row[0])


def create(url: str, number: int) -> None:
    with connect(url) as raw:
        raw.execute("SELECT circle.create_run(1, '{}') FROM generate_series(1, %s)", [number])


def kill(server: EmbeddedServer) -> None:
    postmaster = servers.postmaster(server)
    processes = [postmaster, *postmaster.children()]
    for process in processes:
        process.kill()
    assert psutil.wait_procs(processes, timeout=30)[1] == []


def watch(urls: dict[str, str], seconds: float) -> None:
    """Give databases work, and see that none stands still."""
    counts, moved = {name: completed(url) for name, url in urls.items()}, dict.fromkeys(urls, time.monotonic())
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for name, url in urls.items():
            create(url, 5)
            if (now := completed(url)) > counts[name]:
                counts[name], moved[name] = now, time.monotonic()
            assert time.monotonic() < moved[name] + STILL_S, f"{name} stands still"
        time.sleep(0.1)


def test_killed_server_stops_no_other_share(tmp_path: Path) -> None:
    with ExitStack() as stack:
        running = {name: stack.enter_context(servers.own()) for name in NAMES}
        urls = {name: server.url for name, server in running.items()}
        for url in urls.values():
            with Database(url) as database:
                database.upgrade()
                with database.session() as session:
                    assert store(session, "t>a t>b a>j b>j", max_retries_per_node=1_000, retry_backoff_base=0) == 1
            with connect(url) as raw:
                raw.execute("CREATE TABLE accepted (run_id bigint, node_id text, token bigint)")
            create(url, 20)
        with (tmp_path / "log").open("w") as log:
            command = [sys.executable, "-m", "tests.reliability.test_databases", json.dumps(urls)]
            workers = [
                subprocess.Popen([*command, f"worker {number}"], cwd=Path(__file__).parents[2], stderr=log)
                for number in range(WORKERS)
            ]
            try:
                deadline = time.monotonic() + LIMIT_S
                while not all(completed(url) > NODES for url in urls.values()):
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
                others = {name: url for name, url in urls.items() if name != "killed"}
                for _ in range(KILLS):
                    watch(urls, 1)
                    kill(running["killed"])
                    watch(others, OUTAGE_S)
                    embedded.start(running["killed"].data_dir)
                    create(urls["killed"], 20)
                    watch(others, 1)
                deadline = time.monotonic() + LIMIT_S
                while any(live(url) for url in urls.values()):
                    assert time.monotonic() < deadline, {name: live(url) for name, url in urls.items()}
                    assert all(worker.poll() is None for worker in workers), "a worker died of itself"
                    time.sleep(0.1)
            finally:
                for worker in workers:
                    worker.kill()
                    worker.wait()
        assert "database killed failed, next attempt in" in (tmp_path / "log").read_text(encoding="utf-8")
        total = 0
        for url in urls.values():
            with connect(url) as raw:
                runs = number(raw, "SELECT count(*) FROM circle.pipeline_runs")
                assert number(raw, "SELECT count(*) FROM circle.pipeline_runs WHERE status = 'completed'") == runs
                assert number(raw, "SELECT count(*) FROM accepted") == runs * NODES
                assert number(raw, "SELECT count(DISTINCT (run_id, node_id)) FROM accepted") == runs * NODES
                done = "SELECT count(*) FROM circle.pipeline_events WHERE type = 'pipeline_node.completed'"
                assert number(raw, done) == runs * NODES
                total += runs
    print(f"{KILLS} kills of one of three servers: {total} runs, every node completed once")


def test_moved_database_goes_on(tmp_path: Path) -> None:
    """As docs/scale.md says."""
    with servers.own() as old, servers.own() as new:
        with Database(old.url) as database:
            database.upgrade()
            with database.session() as session:
                runs = RunRepository(session)
                waiting = [runs.create(store(session, "a>b")).id for _ in range(2)]
        backoff = timedelta(seconds=0.1)
        with Databases({"north": old.url}, longest_backoff=backoff) as databases:
            ((_, held),) = databases.claim("worker", timedelta(minutes=5))
            with databases["north"].session(autocommit=True) as session:
                RunRepository(session).advance(held.id, token=held.token)
            with closing(databases.listen()) as events:
                cursor = next(events)[1].cursor
            with connect(old.url) as admin:
                admin.execute("ALTER DATABASE postgres SET default_transaction_read_only = on")
                admin.execute(
                    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = 'postgres' AND pid <> pg_backend_pid()"
                )
            assert databases.claim("worker", LEASE) == []
            assert isinstance(databases.recover().failed["north"], DatabaseUnavailableError)

            dump = new.data_dir / "north.dump"
            where = ("-U", "postgres", "-d", "postgres")
            servers.program(old, "pg_dump", *where, "-h", str(old.data_dir), "-Fc", "--schema=circle", "-f", str(dump))
            servers.program(new, "pg_restore", *where, "-h", str(new.data_dir), "--exit-on-error", str(dump))
            with connect(new.url) as raw:
                raw.execute("SELECT circle.reset_event_xids()")

        with Databases({"north": new.url}) as databases:
            with databases["north"].session(autocommit=True) as session:
                result = {"node_id": "a", "status": "completed"}
                started = RunRepository(session).advance(held.id, [result], token=held.token).started
                assert [node.node_id for node in started] == ["b"]
            ((_, claimed),) = databases.claim("worker", LEASE)
            assert {held.id, claimed.id} == set(waiting)
            with pytest.raises(InvalidCursorError, match="^north: the cursor .* is of another database"):
                next(databases.listen({"north": cursor}))
            with closing(databases.listen()) as events:
                assert next(events)[1].run_id == held.id
        with Database(new.url) as database:
            assert doctor(database.engine) == []


def live(url: str) -> int:
    with connect(url) as raw:
        return number(raw, "SELECT count(*) FROM circle.pipeline_runs WHERE completed_at IS NULL")


def number(raw: psycopg.Connection, statement: str) -> int:
    row = raw.execute(statement.encode()).fetchone()
    assert row is not None
    return int(row[0])


if __name__ == "__main__":
    work(*sys.argv[1:])
