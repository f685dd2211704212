"""At 100,000 runs each hot call reads a few rows, by the indexes that are meant for it, and scans no table.

What the plans inside the functions do is read from the server's own counts for the transaction, so that it is the plan
that ran and not one that EXPLAIN would have made of a similar text.
"""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from gathering_pipeline import ReasonCode, RunReport, RunRepository, RunStatus, migrator
from gathering_pipeline.database import Database
from gathering_pipeline.metrics import MetricsReader
from tests.support.databases import unguarded
from tests.support.graphs import graph
from tests.support.runs import done, started, store
from tests.support.servers import Server, connect

RUNS = 100_000
PIPELINES = 100
WITH_NODES = 3
"""One run in three has its nodes; without those of the others the tests begin sooner."""
LEASE = timedelta(minutes=5)
FEW = 60
"""Most rows, and most index entries, that a call on one run may read; the runs have three nodes."""

# each begins with the id, so that a lookup reads one entry
BY_ID = {"pipeline_runs_pkey"}
OF_A_RUN = {
    "idx_pipeline_node_runs_run_id",
    "idx_pipeline_node_runs_run_node",
    "idx_pipeline_node_runs_run_position",
    "pipeline_node_runs_pkey",
}
QUEUE = {"idx_pipeline_runs_queue", "idx_pipeline_runs_waiting", "pipeline_runs_pkey"}
RUNNING = {"idx_pipeline_runs_running", "idx_pipeline_runs_status", "idx_pipeline_runs_status_history"}


@dataclass(frozen=True)
class Reads:
    """What a transaction read of ``pipeline_runs`` and ``pipeline_node_runs``."""

    table_scans: int
    rows: int
    entries: int
    indexes: frozenset[str]


def reads_of(session: Session, call: Callable[[RunRepository], Any]) -> tuple[Reads, Any]:
    """Make a call in a transaction that is rolled back, and return what it read."""

    def counts() -> dict[tuple[str, str], int]:
        tables = session.execute(
            text(
                "SELECT relname, seq_scan, seq_tup_read + idx_tup_fetch FROM pg_stat_xact_user_tables"
                " WHERE relname IN ('pipeline_runs', 'pipeline_node_runs')"
            )
        )
        indexes = session.execute(
            text(
                "SELECT c.relname, pg_stat_get_xact_numscans(c.oid), pg_stat_get_xact_tuples_returned(c.oid)"
                " FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
                " WHERE i.indrelid IN ('circle.pipeline_runs'::regclass, 'circle.pipeline_node_runs'::regclass)"
            )
        )
        return {
            (name, what): number
            for rows, whats in ((tables, ("table scans", "rows")), (indexes, ("scans", "entries")))
            for name, *numbers in rows
            for what, number in zip(whats, numbers, strict=True)
        }

    try:
        before = counts()
        result = call(RunRepository(session))
        after = counts()
    finally:
        session.rollback()
    used = {key: number - before[key] for key, number in after.items() if number > before[key]}
    return Reads(
        table_scans=sum(number for (_, what), number in used.items() if what == "table scans"),
        rows=sum(number for (_, what), number in used.items() if what == "rows"),
        entries=sum(number for (_, what), number in used.items() if what == "entries"),
        indexes=frozenset(name for name, what in used if what == "scans"),
    ), result


def fill(raw: psycopg.Connection, mix: dict[str, int]) -> None:
    """Pipelines of three nodes, used one after the other, and ``RUNS`` runs: of each hundred as ``mix`` says, oldest first."""
    nodes, edges = graph("a>b b>c")
    raw.execute(
        "INSERT INTO circle.pipelines (name, status, nodes, edges)"
        " SELECT 'p', 'active', %s, %s FROM generate_series(1, %s)",
        [json.dumps(nodes), json.dumps(edges), PIPELINES],
    )
    statuses = [status for status, number in mix.items() for _ in range(number)]
    assert len(statuses) == 100
    with unguarded(raw, "pipeline_runs"), unguarded(raw, "pipeline_node_runs"):
        raw.execute(
            """INSERT INTO circle.pipeline_runs
                   (pipeline_id, pipeline_version, status, started_at, completed_at, worker_id, claim_token, claim_count,
                    lease_expires_at)
               SELECT p.id, 1, s.status, CASE WHEN s.status <> 'pending' THEN now() - interval '1 min' END,
                      CASE WHEN s.status NOT IN ('pending', 'running') THEN now() END,
                      CASE WHEN s.status = 'running' THEN 'w' END, (s.status <> 'pending')::int,
                      (s.status <> 'pending')::int, CASE WHEN s.status = 'running' THEN now() + interval '1 h' END
               FROM generate_series(0, %s - 1) AS n (n)
               JOIN (SELECT id, row_number() OVER (ORDER BY id) - 1 AS at FROM circle.pipelines) p ON p.at = n.n * %s / %s
               JOIN unnest(%s::text[]) WITH ORDINALITY AS s (status, place) ON s.place - 1 = n.n * 100 / %s
               ORDER BY n.n""",
            [RUNS, PIPELINES, RUNS, statuses, RUNS],
        )
        raw.execute(
            """INSERT INTO circle.pipeline_node_runs
                   (run_id, node_id, node_type, position, predecessors, successors, status, started_at, completed_at)
               SELECT r.id, v.node_id, v.node_type, v.position, v.predecessors, v.successors,
                      CASE WHEN r.status IN ('pending', 'running') THEN 'pending' ELSE 'completed' END,
                      r.started_at, r.completed_at
               FROM circle.pipeline_runs r
               JOIN circle.pipeline_version_nodes v ON v.pipeline_id = r.pipeline_id AND v.version = r.pipeline_version
               WHERE r.id %% %s = 0 ORDER BY r.id, v.position""",
            [WITH_NODES],
        )
    (step,) = (
        step for step in migrator.steps("011_lifecycle") if step.title == "pipeline_counters: count the existing runs"
    )
    raw.execute(step.sql)  # as the triggers would have


@pytest.fixture(scope="module")
def full_database(server: Server, template: str) -> Iterator[str]:
    """A history: most runs are terminal, and the statistics show it."""
    name = server.create(template)
    url = server.database_url(name)
    with connect(url) as raw:
        fill(raw, {"timeout": 2, "completed": 80, "failed": 10, "cancelled": 5, "running": 2, "pending": 1})
        raw.execute("VACUUM (ANALYZE) circle.pipelines, circle.pipeline_runs, circle.pipeline_node_runs")
    yield url
    server.drop(name)


@pytest.fixture(scope="module")
def stale_database(server: Server, template: str) -> Iterator[str]:
    """100,000 runs of which 99,000 run, and statistics from when the tables were nearly empty."""
    name = server.create(template)
    url = server.database_url(name)
    with connect(url) as raw:
        for table in ("pipeline_runs", "pipeline_node_runs"):
            raw.execute(f"ALTER TABLE circle.{table} SET (autovacuum_enabled = off)")
        with unguarded(raw, "pipeline_runs"):
            raw.execute("INSERT INTO circle.pipelines (name) VALUES ('x')")
            raw.execute(
                "INSERT INTO circle.pipeline_runs (pipeline_id, status, completed_at)"
                " SELECT id, 'completed', now() FROM circle.pipelines, generate_series(1, 100)"
            )
        raw.execute("ANALYZE circle.pipeline_runs, circle.pipeline_node_runs")
        raw.execute("DELETE FROM circle.pipelines")
        fill(raw, {"running": 99, "pending": 1})
    yield url
    server.drop(name)


@pytest.fixture(params=["auto", "force_generic_plan"])
def plan_cache(request: pytest.FixtureRequest) -> str:
    """Plans for the values at hand, as the first calls of a connection get them, and those for any values."""
    mode: str = request.param
    return mode


def opened(url: str, plan_cache: str) -> Iterator[Session]:
    with Database(url) as database, database.session() as session:
        session.execute(text(f"SET plan_cache_mode = {plan_cache}"))
        session.commit()
        yield session


@pytest.fixture
def history(full_database: str, plan_cache: str) -> Iterator[Session]:
    yield from opened(full_database, plan_cache)


@pytest.fixture
def stale(stale_database: str, plan_cache: str) -> Iterator[Session]:
    yield from opened(stale_database, plan_cache)


def some(session: Session, status: str) -> tuple[int, int]:
    """A run with this status from the middle of the table, and its token."""
    row = session.execute(
        text(
            "SELECT id, claim_token FROM circle.pipeline_runs WHERE status = :status AND id > 50000 AND id % :n = 0"
            " ORDER BY id LIMIT 1"
        ),
        {"status": status, "n": WITH_NODES},
    ).one()
    session.commit()
    return row.id, row.claim_token


Move = Callable[[RunRepository, int, int], Any]


def after_start(call: Move) -> Move:
    def both(runs: RunRepository, run_id: int, token: int) -> Any:
        runs.start_node(run_id, "a", token=token)
        return call(runs, run_id, token)

    return both


def after_all(call: Move) -> Move:
    def both(runs: RunRepository, run_id: int, token: int) -> Any:
        runs.record(run_id, [done("a"), done("b"), done("c")], token=token)
        return call(runs, run_id, token)

    return both


ON_ONE_RUN: dict[str, tuple[str, Move]] = {
    "start": ("pending", lambda runs, run_id, _: runs.start(run_id)),
    "start and advance": ("pending", lambda runs, run_id, _: runs.advance(run_id)),
    "start_node": ("running", lambda runs, run_id, token: runs.start_node(run_id, "a", token=token)),
    "complete_node": (
        "running",
        after_start(lambda runs, run_id, token: runs.complete_node(run_id, "a", token=token)),
    ),
    "fail_node": ("running", after_start(lambda runs, run_id, token: runs.fail_node(run_id, "a", "x", token=token))),
    "skip_node": ("running", lambda runs, run_id, token: runs.skip_node(run_id, "a", token=token)),
    "advance": ("running", after_start(lambda runs, run_id, token: runs.advance(run_id, [done("a")], token=token))),
    "advance to the end": ("running", after_all(lambda runs, run_id, token: runs.advance(run_id, token=token))),
    "record": (
        "running",
        lambda runs, run_id, token: runs.record(run_id, [done("a"), done("b", "skipped")], token=token),
    ),
    "finish": ("running", after_all(lambda runs, run_id, token: runs.finish(run_id, token=token))),
    "complete": ("running", after_all(lambda runs, run_id, token: runs.complete(run_id, token=token))),
    "fail": ("running", lambda runs, run_id, token: runs.fail(run_id, "x", token=token)),
    "cancel": ("running", lambda runs, run_id, _: runs.cancel(run_id)),
    "heartbeat": ("running", lambda runs, run_id, token: runs.heartbeat(run_id, LEASE, token=token)),
    "release": ("running", after_start(lambda runs, run_id, token: runs.release(run_id, token=token))),
    "append_log": ("running", lambda runs, run_id, token: runs.append_log(run_id, "x", token=token)),
    "get": ("running", lambda runs, run_id, _: runs.get(run_id)),
    "nodes": ("running", lambda runs, run_id, _: runs.nodes(run_id)),
    "ready_nodes": ("running", lambda runs, run_id, _: runs.ready_nodes(run_id)),
    "definition": ("running", lambda runs, run_id, _: runs.definition(run_id)),
    "explain": ("running", lambda runs, run_id, _: runs.explain(run_id)),
}
MORE = {"explain": {"idx_pipeline_runs_resumed_from"}}


@pytest.mark.parametrize("name", ON_ONE_RUN)
def test_call_on_one_run_reads_few_rows(history: Session, name: str) -> None:
    status, call = ON_ONE_RUN[name]
    run_id, token = some(history, status)
    reads, _ = reads_of(history, lambda runs: call(runs, run_id, token))
    assert reads.table_scans == 0
    assert reads.indexes <= BY_ID | OF_A_RUN | MORE.get(name, set())
    assert max(reads.rows, reads.entries) <= FEW


@pytest.mark.parametrize("name", ON_ONE_RUN)
def test_call_on_one_run_with_stale_statistics_reads_few_rows(stale: Session, name: str) -> None:
    status, call = ON_ONE_RUN[name]
    run_id, token = some(stale, status)
    reads, _ = reads_of(stale, lambda runs: call(runs, run_id, token))
    assert reads.table_scans == 0
    assert reads.indexes <= BY_ID | OF_A_RUN | MORE.get(name, set())
    assert max(reads.rows, reads.entries) <= FEW


WIDE = 400
"""Nodes of a run that is much larger than those that the statistics know."""
ON_A_WIDE_RUN: dict[str, Callable[[RunRepository, int], Any]] = {
    "start_node": lambda runs, run_id: runs.start_node(run_id, "r"),
    "advance": lambda runs, run_id: runs.advance(run_id),
    "advance with a result": lambda runs, run_id: runs.advance(run_id, [done("r")]),
    "advance with a branch": lambda runs, run_id: runs.advance(
        run_id, [{"node_id": "r", "status": "completed", "branch": True}]
    ),
    "advance_many": lambda runs, run_id: runs.advance_many([RunReport(run_id, [done("r")])]),
    "complete_node with a branch": lambda runs, run_id: runs.complete_node(run_id, "r", branch=False),
    "skip_node": lambda runs, run_id: runs.skip_node(run_id, "r"),
    "ready_nodes": lambda runs, run_id: runs.ready_nodes(run_id),
}


@pytest.fixture(scope="module")
def small_runs(server: Server, template: str) -> Iterator[str]:
    """2,000 runs of three nodes, and the statistics show it."""
    name = server.create(template)
    url = server.database_url(name)
    with Database(url) as database, database.session() as session:
        store(session, "a>b b>c")
        session.execute(text("SELECT count(circle.create_run(1)) FROM generate_series(1, 2000)"))
        session.execute(text("ANALYZE circle.pipeline_runs, circle.pipeline_node_runs"))
    yield url
    server.drop(name)


@pytest.mark.parametrize("name", ON_A_WIDE_RUN)
def test_call_on_a_wide_run_reads_each_node_a_few_times(small_runs: str, plan_cache: str, name: str) -> None:
    fan = " ".join(f"r>x{at}={'true' if at % 2 else 'false'} x{at}>j" for at in range(WIDE))
    for session in opened(small_runs, plan_cache):
        reads, _ = reads_of(session, lambda runs: ON_A_WIDE_RUN[name](runs, started(runs, session, fan)))
        assert max(reads.rows, reads.entries) <= 30 * WIDE


def test_create_reads_few_rows(history: Session) -> None:
    pipeline = history.execute(text("SELECT min(id) FROM circle.pipelines")).scalar_one()
    for key in (None, "k"):
        reads, run = reads_of(history, lambda runs, key=key: runs.create(pipeline, {"x": 1}, idempotency_key=key))  # type: ignore[misc]
        assert run.status == RunStatus.PENDING
        assert reads.table_scans == 0
        # the foreign key of the nodes looks their run up
        assert reads.indexes <= BY_ID | {"idx_pipeline_runs_idempotency_key"}
        assert max(reads.rows, reads.entries) <= FEW


@pytest.mark.parametrize("limit", [1, 20])
def test_claim_reads_few_rows(history: Session, stale: Session, limit: int) -> None:
    for session in (history, stale):
        reads_of(session, lambda runs: runs.claim("me", LEASE, limit))  # marks what other tests rolled back as dead
        reads, claimed = reads_of(session, lambda runs: runs.claim("me", LEASE, limit))
        assert len(claimed) == limit
        assert reads.table_scans == 0
        assert reads.indexes <= BY_ID | OF_A_RUN | QUEUE
        # the head of each pipeline's queue, and more than it takes of the first ones
        assert max(reads.rows, reads.entries) <= 2 * PIPELINES + 7 * limit + FEW


def test_sweep_reads_running_runs_only(history: Session) -> None:
    running = RUNS // 100 * 2 + 500
    for sweep in (lambda runs: runs.recover(), lambda runs: runs.expire()):
        reads, taken = reads_of(history, sweep)
        assert taken == []
        assert reads.table_scans == 0
        assert reads.indexes <= RUNNING
        assert max(reads.rows, reads.entries) <= 2 * running

    def lose_and_recover(runs: RunRepository) -> Any:
        history.execute(
            text(
                "UPDATE circle.pipeline_runs SET lease_expires_at = now() - interval '1 s'"
                " WHERE id IN (SELECT id FROM circle.pipeline_runs WHERE status = 'running' ORDER BY id LIMIT 20)"
            )
        )
        return runs.recover(limit=10)

    reads, taken = reads_of(history, lose_and_recover)
    assert len(taken) == 10
    assert reads.table_scans == 0
    assert max(reads.rows, reads.entries) <= 2 * running


def test_purge_reads_what_it_deletes(history: Session) -> None:
    reads, deleted = reads_of(history, lambda runs: runs.purge(timedelta(0), limit=50))
    assert deleted.deleted == 50
    assert reads.table_scans == 0
    assert max(reads.rows, reads.entries) <= 50 * 12
    reads, deleted = reads_of(history, lambda runs: runs.purge(timedelta(days=1), limit=50))
    assert deleted.deleted == 0
    assert reads.table_scans == 0
    assert max(reads.rows, reads.entries) <= FEW


PAGES: dict[str, Callable[[Session], dict[str, Any]]] = {
    "all": lambda _: {},
    "of the oldest pipeline": lambda session: {"pipeline_id": extreme(session, "min")},
    "of the newest pipeline": lambda session: {"pipeline_id": extreme(session, "max")},
    "completed": lambda _: {"status": RunStatus.COMPLETED},
    "running": lambda _: {"status": RunStatus.RUNNING},
    "timeout": lambda _: {"status": RunStatus.TIMEOUT},
    "timeout of the oldest pipeline": lambda session: {
        "pipeline_id": extreme(session, "min"),
        "status": RunStatus.TIMEOUT,
    },
}


def extreme(session: Session, which: str) -> int:
    number: int = session.execute(text(f"SELECT {which}(id) FROM circle.pipelines")).scalar_one()
    return number


@pytest.mark.parametrize("name", PAGES)
def test_search_page_reads_its_runs(history: Session, name: str) -> None:
    filters = PAGES[name](history)
    # reading a small pipeline as a whole and sorting it is as good as reading its history by index
    most = RUNS // PIPELINES + FEW if "pipeline_id" in filters else FEW
    newest = history.execute(text("SELECT max(id) FROM circle.pipeline_runs")).scalar_one()
    reads_of(history, lambda runs: runs.search(**filters, limit=20))  # marks what other tests rolled back as dead
    for after in (None, newest - 10, newest - 20_000):
        reads, page = reads_of(history, lambda runs, after=after: runs.search(**filters, after=after, limit=20))  # type: ignore[misc]
        if after != newest - 20_000:
            assert len(page.items) == 20
        assert reads.table_scans == 0
        assert reads.rows <= most
        # entries of runs that tests before this one have moved on are there until a vacuum
        assert reads.entries <= most + 10 * FEW


FILTERED: dict[str, tuple[dict[str, Any], int, int]] = {
    "tag": ({"tags": {"customer": "7"}}, 20, FEW),
    "tag and status": ({"tags": {"customer": "7"}, "status": RunStatus.COMPLETED}, 20, 5 * FEW),
    "tag that few runs have": ({"tags": {"rare": "x"}}, 3, FEW),
    "tag that no run has": ({"tags": {"customer": "none"}}, 0, 0),
    "statuses": ({"status": [RunStatus.COMPLETED, RunStatus.FAILED]}, 20, 10_000),  # of old runs
    "time": ({"created_after": datetime(2000, 1, 1, tzinfo=UTC)}, 20, FEW),
    "time that no run has": ({"created_after": datetime(3000, 1, 1, tzinfo=UTC)}, 0, 10_000 + FEW),
}
"""The conditions, how many runs are found of a page of 20, and most rows that are read."""


@pytest.fixture(scope="module")
def tagged_database(full_database: str) -> str:
    with connect(full_database) as raw:
        raw.execute(
            "INSERT INTO circle.pipeline_run_tags SELECT id, 'customer', id % 100 FROM circle.pipeline_runs;"
            " INSERT INTO circle.pipeline_run_tags SELECT id, 'rare', 'x' FROM circle.pipeline_runs WHERE id % 40000 = 9;"
            " ANALYZE circle.pipeline_run_tags"
        )
    return full_database


@pytest.mark.usefixtures("tagged_database")
@pytest.mark.parametrize("name", FILTERED)
def test_filtered_page_looks_at_few_runs(history: Session, name: str) -> None:
    filters, found, most = FILTERED[name]
    reads, page = reads_of(history, lambda runs: runs.search(**filters, limit=20))
    assert len(page.items) == found
    assert (page.next_cursor is not None) == (found == 20)
    assert reads.table_scans == 0
    assert max(reads.rows, reads.entries) <= most


@pytest.mark.parametrize("which", ["min", "max"])
def test_explain_of_a_pending_run_reads_few_rows(history: Session, stale: Session, which: str) -> None:
    """The last one of its queue stands behind 999 others."""
    for session in (history, stale):
        run_id = session.execute(
            text(f"SELECT {which}(id) FROM circle.pipeline_runs WHERE status = 'pending'")
        ).scalar_one()
        session.commit()
        reads, explanation = reads_of(session, lambda runs, run_id=run_id: runs.explain(run_id))  # type: ignore[misc]
        assert explanation.reasons[0].code == ReasonCode.CLAIMABLE
        assert reads.table_scans == 0
        assert reads.indexes <= BY_ID | OF_A_RUN | QUEUE | RUNNING | MORE["explain"] | {"idx_pipeline_runs_history"}
        # those before it; then the last runs of the pipeline, those before the queue's head, and running ones
        assert max(reads.rows, reads.entries) <= 1_000 + 3 * 100 + FEW


@pytest.mark.parametrize("age", [timedelta(0), timedelta(hours=1)])
def test_stuck_reads_a_bounded_number_of_rows(history: Session, stale: Session, age: timedelta) -> None:
    for session, live in ((history, RUNS // 100 * 3), (stale, 11_000)):
        reads_of(session, lambda runs: runs.stuck(age))  # marks what other tests rolled back as dead
        reads, found = reads_of(session, lambda runs: runs.stuck(age))
        assert len(found) == (50 if age == timedelta(0) else 0)
        assert reads.table_scans == 0
        assert reads.indexes <= BY_ID | OF_A_RUN | QUEUE | RUNNING | {"idx_pipeline_runs_history"}
        assert max(reads.rows, reads.entries) <= live + PIPELINES + 50 * 6 + FEW


def test_statistics_read_runs_of_their_pipeline(history: Session) -> None:
    pipeline = history.execute(text("SELECT min(id) FROM circle.pipelines")).scalar_one()
    reads, statistics = reads_of(history, lambda runs: runs.statistics(pipeline))
    assert sum(statistics.runs.values()) == RUNS // PIPELINES
    assert reads.table_scans == 0
    assert max(reads.rows, reads.entries) <= RUNS // PIPELINES + FEW


def test_counts_read_no_runs(history: Session) -> None:
    """They are the sums of counters."""
    reads, counts = reads_of(history, lambda runs: runs.counts())
    assert sum(counts.values()) == RUNS
    assert (reads.table_scans, reads.rows, reads.entries) == (0, 0, 0)


def test_metrics_read_one_run(history: Session, stale: Session) -> None:
    for session in (history, stale):
        reads_of(session, lambda _, session=session: MetricsReader(session).read())  # type: ignore[misc]
        reads, metrics = reads_of(session, lambda _, session=session: MetricsReader(session).read())  # type: ignore[misc]
        assert sum(metrics.runs.values()) == RUNS
        assert metrics.oldest_pending is not None
        assert reads.table_scans == 0
        assert max(reads.rows, reads.entries) <= FEW


def buffers(raw: psycopg.Connection, statement: str) -> int:
    """Pages that a statement touched, those of the functions that it calls included; what it did is rolled back."""
    with raw.transaction(force_rollback=True):
        row = raw.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}").fetchone()
    assert row is not None
    plan = row[0][0]["Plan"]
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


def test_claim_among_many_running_runs_touches_no_more_pages(
    stale_database: str, database_url: str, connect: Callable[[str], psycopg.Connection]
) -> None:
    claim = "SELECT * FROM circle.claim_runs('me', interval '5 min', 1)"
    many, none = connect(stale_database), connect(database_url)
    nodes, edges = graph("a>b b>c")
    none.execute(
        "INSERT INTO circle.pipelines (name, status, nodes, edges) VALUES ('p', 'active', %s, %s)",
        [json.dumps(nodes), json.dumps(edges)],
    )
    none.execute("SELECT circle.create_run(id, '{}', NULL) FROM circle.pipelines")
    for raw in (many, none):
        buffers(raw, claim)  # catalogs are read on first use
    # a tree of two levels more in each index that an update writes to, and its pages; of each pipeline's queue the way
    # through an index of three levels to its head and the head's row
    assert buffers(many, claim) <= 3 * buffers(none, claim) + 4 * PIPELINES


def test_heartbeat_updates_are_hot(database: Database, raw: psycopg.Connection) -> None:
    nodes, edges = graph("a>b b>c")
    raw.execute(
        "INSERT INTO circle.pipelines (name, status, nodes, edges) VALUES ('p', 'active', %s, %s)",
        [json.dumps(nodes), json.dumps(edges)],
    )

    def updates() -> tuple[int, int]:
        raw.execute("SELECT pg_stat_force_next_flush()")
        row = raw.execute(
            "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'pipeline_runs'"
        ).fetchone()
        assert row is not None
        return row

    with database.session(autocommit=True) as session:
        runs = RunRepository(session)
        raw.execute(
            "INSERT INTO circle.pipeline_runs (pipeline_id) SELECT id FROM circle.pipelines, generate_series(1, 300)"
        )
        claimed = runs.claim("me", LEASE, 300)
        session.execute(text("SELECT pg_stat_force_next_flush()"))
        before = updates()
        for _ in range(10):
            for run in claimed:
                runs.heartbeat(run.id, LEASE, token=run.token)
        session.execute(text("SELECT pg_stat_force_next_flush()"))
        after = updates()
    beats, hot = after[0] - before[0], after[1] - before[1]
    assert beats == 3_000
    # but for the first of a run, whose page may be full
    assert hot >= 0.9 * beats
