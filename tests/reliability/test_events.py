"""Eight writers, four readers that are killed and go on from their cursor, and a server that is restarted once.

The writers and readers are this file, run as programs. Every reader keeps what it saw, line by line, in a file of its
own, and begins again after the last whole line. ``GATHERING_EVENTS`` transitions are made, 1,500 unless that is set.
"""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path

import psycopg
from sqlalchemy.exc import DBAPIError

from gathering_pipeline import Database, RunRepository, is_transient
from gathering_pipeline.embedded import EmbeddedServer
from gathering_pipeline.errors import ConflictError, DatabaseError, DatabaseUnavailableError
from tests.support import servers
from tests.support.runs import done, store
from tests.support.servers import connect

TRANSITIONS = int(os.environ.get("GATHERING_EVENTS", "1500"))
WRITERS = 8
READERS = 4
GRAPH = "t>a t>b t>c a>j b>j c>j j>e"

ROLLED_BACK = "rolled back"


# --- the programs ----------------------------------------------------------------------------------------------------


def write(url: str, name: str) -> None:
    """Until it is stopped: runs on every path, some of them in transactions that stay open while others commit."""
    chance = random.Random(name)
    with Database(url) as database:
        while True:
            try:
                one_run(database, chance)
            except (DatabaseError, ConflictError, DBAPIError, psycopg.Error) as error:
                # the server was restarted, or a deadlock ended a transaction of several calls
                if not (
                    is_transient(error) or isinstance(error, (DatabaseError, ConflictError, psycopg.OperationalError))
                ):
                    raise
                time.sleep(0.1)


def one_run(database: Database, chance: random.Random) -> None:
    how = chance.random()
    if how < 0.4:
        with database.session(autocommit=True) as session:
            runs = RunRepository(session)
            run = runs.create(1)
            started = runs.advance(run.id).started
            while started:
                started = runs.advance(run.id, [done(node.node_id) for node in started]).started
    elif how < 0.6:
        with database.session() as session:  # one transaction, open for a while, with a number from its beginning
            session.connection().exec_driver_sql("SELECT pg_current_xact_id()")
            time.sleep(chance.random() * 0.05)
            runs = RunRepository(session)
            run = runs.create(1, ROLLED_BACK if how > 0.55 else None)
            runs.record(run.id, [done(name) for name in "tabcje"])
            time.sleep(chance.random() * 0.05)
            runs.finish(run.id)
            if how > 0.55:
                session.rollback()
    elif how < 0.8:
        with database.session(autocommit=True) as session:
            runs = RunRepository(session)
            run = runs.create(1)
            runs.start(run.id)
            runs.start_node(run.id, "t")
            runs.fail_node(run.id, "t", "by chance")
            runs.start_node(run.id, "t")
            runs.complete_node(run.id, "t")
            runs.skip_node(run.id, "a")
            runs.start_node(run.id, "b")
            if how < 0.7:
                runs.fail_node(run.id, "b", "for good", retryable=False)
                runs.finish(run.id)
            else:
                runs.cancel(run.id)
    else:
        with (
            database.session() as session
        ):  # raw SQL; and the run is ended by a transaction that began before it was there
            other = connect(database.engine.url.render_as_string(hide_password=False))
            with closing(other):
                session.connection().exec_driver_sql("SELECT pg_current_xact_id()")
                row = other.execute("SELECT id FROM circle.create_run(1, '{}', NULL)").fetchone()
                assert row is not None
                other.execute("UPDATE circle.pipeline_runs SET status = 'running' WHERE id = %s", row)
                other.execute("UPDATE circle.pipeline_node_runs SET status = 'completed' WHERE run_id = %s", row)
                session.connection().exec_driver_sql(
                    "UPDATE circle.pipeline_runs SET status = 'completed' WHERE id = %s", (row[0],)
                )


def read(url: str, path: str) -> None:
    """For ever: a line for each event, from where the file ends; a line that is not whole is not seen yet."""
    file = Path(path)
    lines = file.read_bytes().split(b"\n") if file.exists() else [b""]
    lines.pop()
    file.write_bytes(b"".join(line + b"\n" for line in lines))
    after = lines[-1].split(b"\t")[0].decode() if lines else None
    with Database(url) as database, file.open("ab", buffering=0) as out:
        while True:
            with suppress(DatabaseUnavailableError):  # it was begun while the server was down
                for event in database.listen(after=after, poll=timedelta(seconds=0.05)):
                    out.write(f"{event.cursor}\t{event.run_id}\t{event.node_id or ''}\t{event.type}\n".encode())
            time.sleep(0.2)


# --- the test --------------------------------------------------------------------------------------------------------


def spawn(what: str, url: str, argument: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.reliability.test_events", what, url, argument],
        cwd=Path(__file__).parents[2],
    )


def scalar(raw: psycopg.Connection, sql: str) -> int:
    row = raw.execute(sql).fetchone()
    assert row is not None
    number: int = row[0]
    return number


def lines_of(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n")[:-1]] if path.exists() else []


def test_events_are_read_once_across_kills_and_restart(own_server: EmbeddedServer, tmp_path: Path) -> None:
    url = own_server.url
    with Database(url) as database:
        database.upgrade()
        with database.session() as session:
            assert store(session, GRAPH, retry_backoff_base=0) == 1
    before = servers.postmaster(own_server)
    chance = random.Random(11)
    files = [tmp_path / f"reader {number}" for number in range(READERS)]
    readers = [spawn("read", url, str(file)) for file in files]
    writers = [spawn("write", url, f"writer {number}") for number in range(WRITERS)]
    deadline, kills, restarted = time.monotonic() + 120 + TRANSITIONS / 50, 0, False
    try:
        written = 0
        while written < TRANSITIONS:
            assert time.monotonic() < deadline, f"{written} of {TRANSITIONS} events after {kills} kills"
            assert all(process.poll() is None for process in readers + writers), "a reader or writer died of itself"
            time.sleep(0.3 + 0.3 * chance.random())
            at = chance.randrange(READERS)
            if lines_of(files[at]):  # not one that is just starting
                readers[at].send_signal(signal.SIGKILL)
                readers[at].wait()
                readers[at] = spawn("read", url, str(files[at]))
                kills += 1
            with connect(url) as raw:
                written = scalar(raw, "SELECT count(*) FROM circle.pipeline_events")
            if written > TRANSITIONS / 2 and not restarted:
                servers.restart(own_server, "immediate")
                restarted = True
        for process in writers:
            process.kill()
            process.wait()
        with connect(url) as raw:
            while scalar(raw, "SELECT count(*) FROM pg_stat_activity WHERE backend_xid IS NOT NULL"):
                time.sleep(0.05)
            events = raw.execute(
                "SELECT run_id::text, coalesce(node_id, ''), type FROM circle.pipeline_events ORDER BY xid, id"
            ).fetchall()
            while any(len(lines_of(file)) < len(events) for file in files):
                assert time.monotonic() < deadline, [len(lines_of(file)) for file in files]
                assert all(process.poll() is None for process in readers)
                time.sleep(0.1)
    finally:
        for process in readers + writers:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()
    assert restarted
    assert servers.postmaster(own_server) != before
    assert kills > 0

    for file in files:
        seen = lines_of(file)
        assert len({cursor for cursor, *_ in seen}) == len(seen)  # none twice
        assert [tuple(event) for _, *event in seen] == events  # none missed, and all in one order

    with connect(url) as raw:
        assert scalar(raw, "SELECT count(*) FROM circle.pipeline_runs WHERE trigger_data = '\"rolled back\"'") == 0
        recount(raw, events)
    check_order(events)
    print(f"{len(events)} events, {kills} readers killed, one crash of the server: 0 missed, 0 doubled")


def recount(raw: psycopg.Connection, events: list[tuple[str, str, str]]) -> None:
    """As many events as the stored statuses imply."""
    of = Counter((run, node, kind) for run, node, kind in events)
    nodes = raw.execute(
        "SELECT run_id::text, node_id, status, retry_count, started_at IS NOT NULL FROM circle.pipeline_node_runs"
    ).fetchall()
    for run, node, status, retries, _ in nodes:
        for ends in ("completed", "failed", "skipped"):
            assert of.pop((run, node, f"pipeline_node.{ends}"), 0) == (status == ends), (run, node, ends)
        assert of.pop((run, node, "pipeline_node.retrying"), 0) == retries
        started = of.pop((run, node, "pipeline_node.started"), 0)
        assert started - retries in ((1,) if status in ("running", "failed") else (0, 1)), (run, node, status, started)
    for run, status in raw.execute("SELECT id::text, status FROM circle.pipeline_runs").fetchall():
        for ends in ("completed", "failed", "cancelled", "timeout"):
            assert of.pop((run, "", f"pipeline_run.{ends}"), 0) == (status == ends), (run, ends)
        assert of.pop((run, "", "pipeline_run.started"), 0) == (status != "pending"), (run, status)
    assert +of == Counter()


def check_order(events: list[tuple[str, str, str]]) -> None:
    """A run starts first and ends last; a node starts before it ends, and after those that it waits for."""
    before = {"a": "t", "b": "t", "c": "t", "j": "abc", "e": "j"}
    of_run: dict[str, list[tuple[str, str]]] = {}
    for run, node, kind in events:
        of_run.setdefault(run, []).append((node, kind.partition(".")[2]))
    for story in of_run.values():
        assert story[0] == ("", "started")
        over: set[str] = set()
        running: set[str] = set()
        for at, (node, what) in enumerate(story):
            if node == "":
                assert at == (0 if what == "started" else len(story) - 1), story
            elif what == "started":
                assert over.issuperset(before.get(node, "")), story
                running.add(node)
            elif what == "retrying":
                running.remove(node)
            else:
                assert node not in over, story
                over.add(node)


if __name__ == "__main__":
    {"read": read, "write": write}[sys.argv[1]](*sys.argv[2:])
