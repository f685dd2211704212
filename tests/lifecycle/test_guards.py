"""What no writer may do to runs, node runs and versions, by raw SQL."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from threading import Event, Thread
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine, make_url
from sqlalchemy.orm import Session

from gathering_pipeline import Database, RunRepository, RunStatus
from gathering_pipeline.errors import IsolationLevelError
from tests.support.databases import Connect, contents, scalar, unguarded
from tests.support.events import read_all
from tests.support.graphs import chain
from tests.support.runs import LEASE, done, store

INTEGRITY = psycopg.errors.IntegrityConstraintViolation


@pytest.fixture
def refused(raw: psycopg.Connection) -> Callable[..., str]:
    """Run a statement that has to be refused with a SQLSTATE; nothing may change. Returns the message."""

    def check(sqlstate: str, statement: str, parameters: Any = None) -> str:
        before = contents(raw)
        with pytest.raises(psycopg.Error) as caught:
            raw.execute(statement.encode(), parameters)
        assert caught.value.sqlstate == sqlstate, caught.value
        assert contents(raw) == before
        return caught.value.diag.message_primary or ""

    return check


@pytest.fixture
def running(session: Session) -> int:
    """A running run whose first node runs."""
    runs = RunRepository(session)
    run_id = runs.create(store(session, "a>c b>c")).id
    runs.start(run_id)
    runs.start_node(run_id, "a")
    session.commit()
    return run_id


@pytest.mark.parametrize("role", ["origin", "replica"])
@pytest.mark.parametrize(
    "change",
    [
        *("id = id + 1000", "run_id = 2", "node_id = 'x'", "node_type = 'delay'", "position = 7", "position = NULL"),
        *(
            "predecessors = '{1}'",
            "predecessors = NULL",
            "successors = '{1}'",
            "status = 'completed', successors = '{1}'",
        ),
    ],
)
def test_node_run_keeps_what_identifies_it(
    raw: psycopg.Connection, session: Session, running: int, refused: Callable[..., str], change: str, role: str
) -> None:
    other = RunRepository(session).create(1).id
    session.commit()
    assert other == 2
    raw.execute(f"SET session_replication_role = {role}".encode())
    message = refused("23000", f"UPDATE circle.pipeline_node_runs SET {change} WHERE run_id = 1 AND node_id = 'a'")
    assert message.endswith("of node a of run 1 can't be changed")


@pytest.mark.parametrize("role", ["origin", "replica"])
@pytest.mark.parametrize(
    "change",
    ["id = 99", "pipeline_id = 2", "pipeline_version = 2", "pipeline_version = NULL", "status = 'failed', id = 99"],
)
def test_run_keeps_its_pipeline_and_version(
    raw: psycopg.Connection, session: Session, running: int, refused: Callable[..., str], change: str, role: str
) -> None:
    store(session, "a")
    session.commit()
    raw.execute(f"SET session_replication_role = {role}".encode())
    refused("23000", f"UPDATE circle.pipeline_runs SET {change} WHERE id = 1")


def test_position_of_a_legacy_node_run_can_be_set_once(raw: psycopg.Connection, running: int) -> None:
    raw.execute("INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type) VALUES (1, 'late', 'agent')")
    events = scalar(raw, "SELECT count(*) FROM circle.pipeline_events")
    raw.execute(
        "UPDATE circle.pipeline_node_runs SET position = 9, predecessors = '{}', successors = '{}' WHERE node_id = 'late'"
    )
    assert scalar(raw, "SELECT count(*) FROM circle.pipeline_events") == events
    with pytest.raises(INTEGRITY):
        raw.execute("UPDATE circle.pipeline_node_runs SET position = 8 WHERE node_id = 'late'")


def test_node_runs_of_a_live_run_are_not_deleted(
    raw: psycopg.Connection, session: Session, running: int, refused: Callable[..., str]
) -> None:
    pending = RunRepository(session).create(1).id
    session.commit()
    for where in (f"run_id = {running}", f"run_id = {pending}", "node_id = 'c'", "true"):
        refused("23000", f"DELETE FROM circle.pipeline_node_runs WHERE {where}")
    for end in ("completed", "failed"):
        refused(
            "23000",
            "WITH gone AS (DELETE FROM circle.pipeline_node_runs WHERE run_id = %(id)s)"
            f" UPDATE circle.pipeline_runs SET status = '{end}' WHERE id = %(id)s",
            {"id": running},
        )
    # with its run, also in one statement, and once it is over
    raw.execute(
        "WITH gone AS (DELETE FROM circle.pipeline_node_runs WHERE run_id = %(id)s)"
        " DELETE FROM circle.pipeline_runs WHERE id = %(id)s",
        {"id": pending},
    )
    raw.execute("UPDATE circle.pipeline_runs SET status = 'cancelled' WHERE id = %s", [running])
    raw.execute("DELETE FROM circle.pipeline_node_runs WHERE run_id = %s AND node_id = 'c'", [running])
    raw.execute("DELETE FROM circle.pipelines")
    assert scalar(raw, "SELECT count(*) FROM circle.pipeline_node_runs") == 0


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled", "timeout"])
@pytest.mark.parametrize("status", ["pending", "running", "completed", "failed", "skipped", "cancelled"])
def test_no_node_run_is_inserted_into_a_terminal_run(
    raw: psycopg.Connection, session: Session, refused: Callable[..., str], end: str, status: str
) -> None:
    run_id = RunRepository(session).create(store(session, "a")).id
    RunRepository(session).record(run_id, [done("a")])
    session.commit()
    raw.execute("UPDATE circle.pipeline_runs SET status = %s", [end])
    message = refused(
        "PL001",
        "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, status) VALUES (%s, 'late', 'agent', %s)",
        [run_id, status],
    )
    assert message.endswith(f"its run is {end}")


def test_live_nodes_that_an_older_release_left_in_a_terminal_run_are_deleted(
    raw: psycopg.Connection, running: int
) -> None:
    with unguarded(raw, "pipeline_runs"):
        raw.execute("UPDATE circle.pipeline_runs SET status = 'failed', completed_at = now()")
    raw.execute("DELETE FROM circle.pipeline_node_runs")
    assert scalar(raw, "SELECT count(*) FROM circle.pipeline_node_runs") == 0


@pytest.mark.parametrize("savepoint", [False, True])
def test_live_nodes_of_a_run_that_ends_in_the_same_transaction_are_not_deleted(
    raw: psycopg.Connection, running: int, savepoint: bool
) -> None:
    with pytest.raises(psycopg.errors.IntegrityError, match="ended by the same transaction"), raw.transaction():
        with raw.transaction() if savepoint else nullcontext():
            raw.execute(
                "WITH gone AS (DELETE FROM circle.pipeline_node_runs)"
                " UPDATE circle.pipeline_runs SET status = 'completed'"
            )


def test_statement_that_ends_nodes_and_run_together_is_legal(raw: psycopg.Connection, running: int) -> None:
    raw.execute(
        "WITH nodes AS (UPDATE circle.pipeline_node_runs SET status = 'completed' WHERE status IN ('pending', 'running'))"
        " UPDATE circle.pipeline_runs SET status = 'completed'"
    )
    assert raw.execute("SELECT DISTINCT status FROM circle.pipeline_node_runs").fetchall() == [("completed",)]
    # of another command of the same transaction it is not
    with pytest.raises(psycopg.Error) as caught, raw.transaction():
        raw.execute("UPDATE circle.pipeline_node_runs SET output_data = '{}'")
        raw.execute("UPDATE circle.pipeline_node_runs SET status = 'failed'")
    assert caught.value.sqlstate == "PL001"


@pytest.mark.parametrize("others", ["failed", "completed"])
def test_statement_that_fails_nodes_and_run_together_is_legal(
    raw: psycopg.Connection, running: int, others: str
) -> None:
    raw.execute(
        "WITH nodes AS (UPDATE circle.pipeline_node_runs SET status = CASE node_id WHEN 'a' THEN 'failed'"
        f" ELSE '{others}' END) UPDATE circle.pipeline_runs SET status = 'failed'".encode()
    )
    assert {status for (status,) in raw.execute("SELECT status FROM circle.pipeline_node_runs")} == {"failed", others}


def test_statement_that_starts_run_and_node_together_is_legal(raw: psycopg.Connection, session: Session) -> None:
    RunRepository(session).create(store(session, "a"))
    session.commit()
    raw.execute(
        "WITH run AS (UPDATE circle.pipeline_runs SET status = 'running')"
        " UPDATE circle.pipeline_node_runs SET status = 'running'"
    )
    assert raw.execute("SELECT status FROM circle.pipeline_node_runs").fetchall() == [("running",)]


@pytest.mark.parametrize("token", [2**63 - 1, 2**53, 2**62, -1])
def test_poisoned_token_is_refused_and_stops_no_claim(raw: psycopg.Connection, session: Session, token: int) -> None:
    runs = RunRepository(session)
    pipeline = store(session, "a")
    run_id = runs.create(pipeline).id
    session.commit()
    for statement in (
        "UPDATE circle.pipeline_runs SET claim_token = %s",
        "INSERT INTO circle.pipeline_runs (pipeline_id, claim_token) VALUES (1, %s)",
    ):
        with pytest.raises(psycopg.Error) as caught:
            raw.execute(statement, [token])
        assert caught.value.sqlstate in ("PL001", "23514")
    assert [run.id for run in runs.claim("worker", LEASE, 5)] == [run_id]


@pytest.mark.parametrize("time", ["infinity", "-infinity", "0044-03-15 BC", "0001-01-01", "9999-12-31", "20000-01-01"])
def test_time_that_python_cannot_read_is_refused_by_its_check(raw: psycopg.Connection, running: int, time: str) -> None:
    raw.execute("SET TimeZone = 'UTC'")
    for statement in (
        *(
            f"UPDATE circle.pipeline_runs SET {column} = %s"
            for column in ("created_at", "started_at", "run_at", "waits_until")
        ),
        "UPDATE circle.pipeline_runs SET worker_id = 'w', lease_expires_at = %s",
        *(f"UPDATE circle.pipelines SET {column} = %s" for column in ("created_at", "updated_at", "last_run")),
        "UPDATE circle.pipeline_node_runs SET available_at = %s WHERE node_id = 'b'",
        "INSERT INTO circle.pipeline_run_logs (run_id, entry, created_at) VALUES (1, '0', %s)",
        "INSERT INTO circle.pipeline_run_history (run_id, kind, at) VALUES (1, 'claimed', %s)",
        "UPDATE circle.pipeline_runs SET status = 'failed', completed_at = %s",
        "UPDATE circle.pipeline_node_runs SET status = 'completed', started_at = %s WHERE node_id = 'a'",
        "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, status, started_at) VALUES (1, 'late', 'agent', 'completed', %s)",
    ):
        with pytest.raises(psycopg.errors.CheckViolation):
            raw.execute(statement.encode(), [time])


@pytest.mark.parametrize("zone", ["Etc/GMT-14", "Etc/GMT+12"])
def test_earliest_and_latest_time_are_read_in_each_time_zone(
    database_url: str, raw: psycopg.Connection, running: int, zone: str
) -> None:
    url = make_url(database_url).update_query_dict({"options": f"-c TimeZone={zone}"})
    raw.execute("SET TimeZone = 'UTC'")
    for time in ("0001-01-02", "9999-12-30 23:59:59.999999"):
        raw.execute("UPDATE circle.pipeline_runs SET run_at = %s", [time])
        raw.execute("UPDATE circle.pipeline_node_runs SET available_at = %s", [time])
        with Database(url) as database, database.session() as session:
            runs = RunRepository(session)
            assert runs.get(running).run_at == runs.nodes(running)[0].available_at
            assert [run.id for run in runs.search().items] == [running]


def test_numbers_at_the_edge_stop_no_call(raw: psycopg.Connection, session: Session) -> None:
    runs = RunRepository(session)
    pipeline = store(session, "a")
    session.commit()
    raw.execute("UPDATE circle.pipelines SET max_retries_per_node = 2147483647")
    raw.execute("UPDATE circle.pipelines SET version = 2147483647")
    raw.execute("INSERT INTO circle.pipelines (name, version) VALUES ('p', 2147483647)")
    assert raw.execute("SELECT DISTINCT version FROM circle.pipelines").fetchall() == [(1,)]
    raw.execute("UPDATE circle.pipelines SET run_count = 2147483647, success_count = 2147483647")
    run_id = runs.create(pipeline).id
    session.commit()
    raw.execute("UPDATE circle.pipeline_runs SET claim_count = 2147483647")
    (run,) = runs.claim("worker", LEASE)
    session.commit()
    raw.execute("UPDATE circle.pipeline_node_runs SET retry_count = 2147483646")
    token = run.token
    runs.start_node(run_id, "a", token=token)
    runs.fail_node(run_id, "a", "x", token=token)
    raw_due = "UPDATE circle.pipeline_node_runs SET available_at = NULL"
    session.commit()
    raw.execute(raw_due)
    runs.start_node(run_id, "a", token=token)
    assert runs.complete_node(run_id, "a", token=token).attempt == 2**31
    runs.finish(run_id, token=token)
    session.commit()
    raw.execute("SELECT circle.fold_counters()")


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_other_isolation_level_is_refused(
    raw: psycopg.Connection, session: Session, running: int, database_url: str, level: str
) -> None:
    for statement in (
        "UPDATE circle.pipeline_runs SET status = 'failed'",
        "UPDATE circle.pipeline_node_runs SET status = 'completed' WHERE node_id = 'a'",
        "SELECT circle.create_run(1, '{}', NULL)",
        "SELECT circle.complete_node(1, 'a', NULL, NULL, NULL)",
        "SELECT circle.claim_runs('w', '1 min', 1)",
        "SELECT circle.recover_runs(1, 1)",
        "SELECT circle.expire_runs(1)",
        "SELECT circle.advance_runs('{1}', '{NULL}', '[]')",
    ):
        with pytest.raises(psycopg.Error) as caught, raw.transaction():
            raw.execute(f"SET TRANSACTION ISOLATION LEVEL {level}".encode())
            raw.execute(statement)
        assert caught.value.sqlstate == "PL011", statement
    engine = create_engine(database_url, isolation_level=level.upper())
    calls: list[Callable[[RunRepository], object]] = [
        lambda runs: runs.create(1),
        lambda runs: runs.start_node(1, "b"),
        lambda runs: runs.complete_node(1, "a"),
        lambda runs: runs.skip_node(1, "b"),
        lambda runs: runs.fail_node(1, "a", "x"),
        lambda runs: runs.advance(1, [done("a")]),
        lambda runs: runs.advance(1),
        lambda runs: runs.record(1, [done("a")]),
        lambda runs: runs.record_run(1, []),
        lambda runs: runs.finish(1),
        lambda runs: runs.cancel(1),
        lambda runs: runs.claim("w", LEASE),
        lambda runs: runs.recover(),
        lambda runs: runs.expire(),
    ]
    for call in calls:
        with Session(engine) as other, pytest.raises(IsolationLevelError) as refusal:
            call(RunRepository(other))
        assert refusal.value.level == level
        assert "READ COMMITTED" in str(refusal.value)
    with Session(engine) as other:  # reading works at every level
        assert RunRepository(other).get(1).status == "running"
        assert len(RunRepository(other).nodes(1)) == 3
        assert RunRepository(other).counts()[RunStatus.RUNNING] == 1
    engine.dispose()
    # a subscriber has the database's level
    with raw.transaction():
        raw.execute(f"SET TRANSACTION ISOLATION LEVEL {level}".encode())
        raw.execute("SET LOCAL session_replication_role = replica")
        raw.execute("UPDATE circle.pipeline_node_runs SET status = 'completed' WHERE node_id = 'a'")


@pytest.mark.parametrize("autocommit", [True, False])
def test_database_pins_the_level(
    raw: psycopg.Connection, session: Session, running: int, database_url: str, autocommit: bool
) -> None:
    name = scalar(raw, "SELECT current_database()")
    raw.execute(f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = 'repeatable read'".encode())
    try:
        with Database(database_url) as database, database.session(autocommit=autocommit) as opened:
            assert RunRepository(opened).complete_node(1, "a").status == "completed"
    finally:
        raw.execute(f'ALTER DATABASE "{name}" RESET default_transaction_isolation'.encode())


def test_many_rows_in_one_statement_have_their_events(raw: psycopg.Connection, session: Session) -> None:
    """After a statement that changed one row: its plan is kept for the session, and as a join would take minutes."""
    runs = RunRepository(session)
    one, many = runs.create(store(session, "a")).id, runs.create(store(session, "a")).id
    for run_id in (one, many):
        runs.start(run_id)
    session.commit()
    raw.execute(
        "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type)"
        " SELECT %s, 'x' || at, 'agent' FROM generate_series(1, 20000) at",
        [many],
    )
    for status in ("running", "pending", "running", "failed"):
        for run_id in (one, many):
            raw.execute("UPDATE circle.pipeline_node_runs SET status = %s WHERE run_id = %s", [status, run_id])
    found = scalar(raw, "SELECT count(*) FROM circle.pipeline_events WHERE run_id = %s AND node_id <> 'a'", [many])
    assert found == 80_000


def test_events_of_a_call_have_one_label_and_execution_order(
    raw: psycopg.Connection, session: Session, database_url: str, connect: Connect
) -> None:
    """Other transactions end all the time meanwhile."""
    runs = RunRepository(session)
    pipeline = store(session, chain(20))
    run_id = runs.create(pipeline).id
    session.commit()
    other = connect(database_url)
    raw.execute(
        """CREATE FUNCTION public.slow() RETURNS trigger LANGUAGE plpgsql AS
           $$ BEGIN PERFORM pg_sleep(0.005); RETURN NULL; END $$;
           CREATE TRIGGER slow AFTER UPDATE ON circle.pipeline_node_runs FOR EACH ROW EXECUTE FUNCTION public.slow()"""
    )
    stop = Event()

    def commit_all_the_time() -> None:
        while not stop.is_set():
            other.execute("SELECT pg_current_xact_id()")

    thread = Thread(target=commit_all_the_time)
    thread.start()
    try:
        runs.record(run_id, [done(f"n{at}") for at in range(20)])
        session.commit()
    finally:
        stop.set()
        thread.join()
        raw.execute("DROP FUNCTION public.slow CASCADE")
    labels = raw.execute(
        "SELECT count(DISTINCT xid::text) FROM circle.pipeline_events WHERE run_id = %s AND node_id IS NOT NULL",
        [run_id],
    ).fetchall()
    assert labels == [(1,)]
    ordered = raw.execute(
        "SELECT node_id FROM circle.pipeline_events WHERE run_id = %s ORDER BY xid, id", [run_id]
    ).fetchall()
    assert ordered == [(None,), *((f"n{at}",) for at in range(20))]


def test_truncate_leaves_no_orphans(raw: psycopg.Connection, session: Session, running: int) -> None:
    for tables in ("circle.pipeline_node_runs", "circle.pipeline_versions"):
        with pytest.raises(INTEGRITY, match="TRUNCATE circle.pipeline"):
            raw.execute(f"TRUNCATE {tables}")
    raw.execute("TRUNCATE circle.pipeline_runs RESTART IDENTITY CASCADE")
    assert scalar(raw, "SELECT count(*) FROM circle.pipeline_events") == 0
    runs = RunRepository(session)
    assert set(runs.counts().values()) == {0}
    assert runs.create(1).id == 1
    session.commit()
    raw.execute("TRUNCATE circle.pipelines RESTART IDENTITY CASCADE")
    assert contents(raw) == []
    assert runs.create(store(session, "a")).pipeline_id == 1
    assert [event.run_id for event in read_all(session)] == []


def test_only_the_compiler_writes_versions(
    raw: psycopg.Connection, session: Session, running: int, refused: Callable[..., str]
) -> None:
    loop = '[{"id": "l", "from": "a", "to": "a"}]'
    node = '[{"id": "a", "type": "action", "name": "A"}]'
    insert = "INSERT INTO circle.pipeline_versions (pipeline_id, version, nodes, edges, node_count, compiled) VALUES "
    for version, edges in ((2, "[]"), (2, loop), (1, loop)):
        refused("23000", insert + f"(1, {version}, %s, %s, 1, '{{}}')", [node, edges])
    refused("23000", "DELETE FROM circle.pipeline_versions")
    raw.execute("UPDATE circle.pipelines SET edges = '[]'")
    assert scalar(raw, "SELECT max(version) FROM circle.pipeline_versions") == 2
    refused("23000", "DELETE FROM circle.pipeline_versions WHERE version = 1")  # the run has it
    raw.execute("UPDATE circle.pipelines SET nodes = %s", [node])
    raw.execute("DELETE FROM circle.pipeline_versions WHERE version = 2")  # nobody names it any more
    raw.execute("SET session_replication_role = replica")
    with pytest.raises(psycopg.Error) as caught:
        raw.execute(insert + "(1, 9, %s, %s, 1, '{}')", [node, loop])
    assert caught.value.sqlstate == "PL008"
    raw.execute(insert + "(1, 9, %s, '[]', 7, '{}')", [node])
    row = raw.execute("SELECT node_count, compiled::text FROM circle.pipeline_versions WHERE version = 9").fetchone()
    assert row == (1, '{"(a,action,{},{},)"}')


def test_statement_that_touches_a_terminal_run_inserts_no_node(
    raw: psycopg.Connection, session: Session, refused: Callable[..., str]
) -> None:
    run_id = RunRepository(session).record_run(store(session, "a"), [done("a")]).id
    session.commit()
    rows = "(%(id)s, 'l1', 'agent', 'failed'), (%(id)s, 'l2', 'agent', 'cancelled'), (%(id)s, 'l3', 'agent', 'pending')"
    refused(
        "PL001",
        "WITH touched AS (UPDATE circle.pipeline_runs SET current_node = 'x' WHERE id = %(id)s)"
        f" INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, status) VALUES {rows}",
        {"id": run_id},
    )


def test_failed_node_is_the_first_that_failed(
    raw: psycopg.Connection, session: Session, running: int, refused: Callable[..., str]
) -> None:
    for value in ("'zzz'", "'a'"):
        refused("23000", f"UPDATE circle.pipeline_runs SET failed_node = {value}")
        refused("23000", f"INSERT INTO circle.pipeline_runs (pipeline_id, failed_node) VALUES (1, {value})")
    raw.execute("UPDATE circle.pipeline_node_runs SET status = 'failed' WHERE node_id = 'a'")
    assert scalar(raw, "SELECT failed_node FROM circle.pipeline_runs") == "a"
    for value in ("NULL", "'b'"):
        refused("23000", f"UPDATE circle.pipeline_runs SET failed_node = {value}")


def test_run_that_cannot_be_swept_stops_no_sweep(raw: psycopg.Connection, session: Session) -> None:
    runs = RunRepository(session)
    pipeline = store(session, "a", timeout_seconds=1, max_retries_per_node=0)
    ids = [runs.create(pipeline).id for _ in range(3)]
    runs.claim("worker", LEASE, 3)
    session.commit()
    raw.execute(
        "UPDATE circle.pipeline_runs SET lease_expires_at = now() - interval '1 s', started_at = now() - interval '1 h'"
    )
    with unguarded(raw, "pipeline_node_runs"):
        raw.execute(
            "UPDATE circle.pipeline_node_runs SET status = 'failed', completed_at = now() WHERE run_id = %s", [ids[1]]
        )
    assert [run.id for run in runs.recover()] == [ids[0], ids[2]]
    session.commit()


def test_end_of_a_big_run_takes_its_nodes_along(raw: psycopg.Connection, session: Session) -> None:
    """Once per row: looking for each old row anew would take minutes."""
    runs = RunRepository(session)
    run_id = runs.create(store(session, " ".join(f"n{at}" for at in range(20_000)))).id
    runs.cancel(run_id)
    session.commit()
    assert raw.execute("SELECT status, count(*) FROM circle.pipeline_node_runs GROUP BY 1").fetchall() == [
        ("cancelled", 20_000)
    ]


def test_version_of_a_run_that_is_being_inserted_is_not_deleted(
    raw: psycopg.Connection, session: Session, database_url: str, connect: Connect
) -> None:
    pipeline = store(session, "a>b")
    session.commit()
    other = connect(database_url)
    other.autocommit = False
    other.execute("INSERT INTO circle.pipeline_runs (pipeline_id, status) VALUES (%s, 'running')", [pipeline])
    raw.execute("UPDATE circle.pipelines SET edges = '[]'")
    raw.execute("SET lock_timeout = '200ms'")
    with pytest.raises(psycopg.errors.LockNotAvailable):
        raw.execute("DELETE FROM circle.pipeline_versions WHERE version = 1")
    raw.execute("RESET lock_timeout")
    other.commit()
    with pytest.raises(INTEGRITY):
        raw.execute("DELETE FROM circle.pipeline_versions WHERE version = 1")


def test_token_of_a_terminal_run_is_final(
    raw: psycopg.Connection, session: Session, refused: Callable[..., str]
) -> None:
    RunRepository(session).record_run(store(session, "a"), [done("a")])
    session.commit()
    refused("PL001", "UPDATE circle.pipeline_runs SET claim_token = claim_token + 1")


def test_counters_under_a_publication(raw: psycopg.Connection, session: Session) -> None:
    runs = RunRepository(session)
    pipeline = store(session, "a")
    session.commit()
    raw.execute("CREATE PUBLICATION every FOR ALL TABLES")
    try:
        for _ in range(5):
            runs.record_run(pipeline, [done("a")])
            runs.create(pipeline)
            session.commit()
            raw.execute("SELECT circle.add_up_counters()")
        assert runs.expire() == runs.recover() == []
        session.commit()
        assert scalar(raw, "SELECT run_count FROM circle.pipelines") == 10
        assert (runs.counts()[RunStatus.COMPLETED], runs.counts()[RunStatus.PENDING]) == (5, 5)
    finally:
        raw.execute("DROP PUBLICATION every")
