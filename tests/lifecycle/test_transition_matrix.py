"""The transition matrix: every pair of statuses, on every way into the tables, against the table in ``lifecycle``."""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import psycopg
import pytest
from sqlalchemy import insert, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.orm.attributes import flag_modified

from gathering_pipeline import NodeStatus, PipelineNodeRun, PipelineRun, RunRepository, RunStatus
from gathering_pipeline.database import Database
from gathering_pipeline.errors import IllegalTransitionError, LeaseLostError
from gathering_pipeline.lifecycle import INITIAL_RUN_STATUSES, NODE_TRANSITIONS, RUN_TRANSITIONS
from tests.support.databases import contents
from tests.support.runs import claim_token, done, store
from tests.support.shared import Shared

Row = type[Any]
"""``PipelineRun`` or ``PipelineNodeRun``."""

RUN_CELLS = {(old, new): new in RUN_TRANSITIONS[old] for old in RunStatus for new in RunStatus}
NODE_CELLS = {(old, new): new in NODE_TRANSITIONS[old] for old in NodeStatus for new in NodeStatus}
NEW_RUNS = {status: status in INITIAL_RUN_STATUSES for status in RunStatus}
ALL_NODES = dict.fromkeys(NodeStatus, True)


@dataclass
class Ways:
    """Two connections of the same role: a session and a psycopg connection, both committing each statement."""

    session: Session
    raw: psycopg.Connection
    role: str


class Way(Protocol):
    def __call__(self, ways: Ways, table: Row, row: dict[str, Any], status: str) -> object: ...


@pytest.fixture
def ways(database_url: str, in_role: tuple[str, Shared]) -> Iterator[Ways]:
    role, shared = in_role
    shared.discard()
    with shared.database.session(autocommit=True) as session:
        for sent in (session.connection().exec_driver_sql, shared.raw.execute):
            assert sent("SHOW session_replication_role").fetchall() == [(role,)]
        yield Ways(session, shared.raw, role)


# --- the ways to change a status ---------------------------------------------------------------------------------------


def by_flush(ways: Ways, table: Row, row: dict[str, Any], status: str) -> None:
    loaded = ways.session.get_one(table, row["id"])
    loaded.status = status
    flag_modified(loaded, "status")  # else nothing is written where it is the same
    ways.session.flush()


def by_core_update(ways: Ways, table: Row, row: dict[str, Any], status: str) -> None:
    core = table.__table__
    ways.session.connection().execute(update(core).where(core.c.id == row["id"]).values(status=status))


def by_orm_update(ways: Ways, table: Row, row: dict[str, Any], status: str) -> None:
    ways.session.execute(update(table).where(table.id == row["id"]).values(status=status))


def by_bulk_update_by_key(ways: Ways, table: Row, row: dict[str, Any], status: str) -> None:
    ways.session.execute(update(table), [{"id": row["id"], "status": status}])


def by_bulk_update_mappings(ways: Ways, table: Row, row: dict[str, Any], status: str) -> None:
    ways.session.bulk_update_mappings(table.__mapper__, [{"id": row["id"], "status": status}])


def by_bulk_save_objects(ways: Ways, table: Row, row: dict[str, Any], status: str) -> None:
    loaded = ways.session.get_one(table, row["id"])
    ways.session.expunge(loaded)
    loaded.status = status
    ways.session.bulk_save_objects([loaded], update_changed_only=False)


def by_raw_update(ways: Ways, table: Row, row: dict[str, Any], status: str) -> None:
    ways.raw.execute(f"UPDATE {table.__table__} SET status = %s WHERE id = %s", [status, row["id"]])


def by_many_raw_updates(ways: Ways, table: Row, row: dict[str, Any], status: str) -> None:
    ways.raw.cursor().executemany(
        f"UPDATE {table.__table__} SET status = %s WHERE id = %s", [(status, row["id"]), (status, -1)]
    )


def by_cte(ways: Ways, table: Row, row: dict[str, Any], status: str) -> None:
    ways.raw.execute(
        f"WITH u AS (UPDATE {table.__table__} SET status = %s WHERE id = %s RETURNING 1) SELECT count(*) FROM u",
        [status, row["id"]],
    )


def by_on_conflict(ways: Ways, table: Row, row: dict[str, Any], status: str) -> None:
    names = ", ".join(row)
    ways.raw.execute(
        f"INSERT INTO {table.__table__} ({names}, status) VALUES ({', '.join(['%s'] * len(row))}, %s)"
        " ON CONFLICT (id) DO UPDATE SET status = excluded.status",
        [*row.values(), status],
    )


def by_on_conflict_constant(ways: Ways, table: Row, row: dict[str, Any], status: str) -> None:
    names = ", ".join(row)
    ways.raw.execute(
        f"INSERT INTO {table.__table__} ({names}, status) VALUES ({', '.join(['%s'] * len(row))}, 'pending')"
        " ON CONFLICT (id) DO UPDATE SET status = %s",
        [*row.values(), status],
    )


def _copy(ways: Ways, table: Row, row: dict[str, Any], status: str) -> None:
    ways.raw.execute("DROP TABLE IF EXISTS incoming")
    ways.raw.execute(f"CREATE TEMP TABLE incoming AS SELECT {', '.join(row)}, status FROM {table.__table__} LIMIT 0")
    with ways.raw.cursor().copy(f"COPY incoming ({', '.join(row)}, status) FROM STDIN") as copy:
        copy.write_row([*row.values(), status])


def by_copy_and_merge(ways: Ways, table: Row, row: dict[str, Any], status: str) -> None:
    _copy(ways, table, row, status)
    ways.raw.execute(
        f"MERGE INTO {table.__table__} t USING incoming i ON t.id = i.id"
        " WHEN MATCHED THEN UPDATE SET status = i.status"
        f" WHEN NOT MATCHED THEN INSERT ({', '.join(row)}, status) VALUES ({', '.join('i.' + name for name in row)}, i.status)"
    )


def by_copy_and_update_from(ways: Ways, table: Row, row: dict[str, Any], status: str) -> None:
    _copy(ways, table, row, status)
    ways.raw.execute(f"UPDATE {table.__table__} t SET status = i.status FROM incoming i WHERE t.id = i.id")


CHANGES: list[Way] = [
    by_flush,
    by_core_update,
    by_orm_update,
    by_bulk_update_by_key,
    by_bulk_update_mappings,
    by_bulk_save_objects,
    by_raw_update,
    by_many_raw_updates,
    by_cte,
    by_on_conflict,
    by_on_conflict_constant,
    by_copy_and_merge,
    by_copy_and_update_from,
]


# --- the ways to insert one --------------------------------------------------------------------------------------------


def by_new_object(ways: Ways, table: Row, row: dict[str, Any], status: str) -> None:
    ways.session.add(table(**row, status=status))
    ways.session.flush()


def by_core_insert(ways: Ways, table: Row, row: dict[str, Any], status: str) -> None:
    ways.session.connection().execute(insert(table.__table__).values(**row, status=status))


def by_orm_insert(ways: Ways, table: Row, row: dict[str, Any], status: str) -> None:
    ways.session.execute(insert(table), [{**row, "status": status}])


def by_bulk_insert_mappings(ways: Ways, table: Row, row: dict[str, Any], status: str) -> None:
    ways.session.bulk_insert_mappings(table.__mapper__, [{**row, "status": status}])


def by_bulk_saving_new_objects(ways: Ways, table: Row, row: dict[str, Any], status: str) -> None:
    ways.session.bulk_save_objects([table(**row, status=status)])


def by_raw_insert(ways: Ways, table: Row, row: dict[str, Any], status: str) -> None:
    ways.raw.execute(
        f"INSERT INTO {table.__table__} ({', '.join(row)}, status) VALUES ({', '.join(['%s'] * len(row))}, %s)",
        [*row.values(), status],
    )


def by_copy(ways: Ways, table: Row, row: dict[str, Any], status: str) -> None:
    with ways.raw.cursor().copy(f"COPY {table.__table__} ({', '.join(row)}, status) FROM STDIN") as copy:
        copy.write_row([*row.values(), status])


INSERTS: list[Way] = [
    by_new_object,
    by_core_insert,
    by_orm_insert,
    by_bulk_insert_mappings,
    by_bulk_saving_new_objects,
    by_raw_insert,
    by_copy,
    by_on_conflict,
    by_copy_and_merge,
]


# --- trying a cell -----------------------------------------------------------------------------------------------------


def name_of(way: object) -> str:
    return getattr(way, "__name__", "")


def attempt(ways: Ways, call: Callable[..., object], *arguments: object) -> str:
    """``done`` or ``refused``; any other outcome is returned as text, and matches no cell."""
    try:
        call(*arguments)
    except (DBAPIError, psycopg.Error) as error:
        sqlstate = getattr(getattr(error, "orig", error), "sqlstate", None)
        return "refused" if sqlstate == "PL001" else f"{sqlstate}: {error}"
    finally:
        ways.session.rollback()
        ways.session.expunge_all()
    return "done"


def stored(raw: psycopg.Connection, table: Row, row_id: int) -> tuple[Any, ...] | None:
    return raw.execute(f"SELECT status, t::text FROM {table.__table__} t WHERE id = %s", [row_id]).fetchone()


def wrong_cells(
    ways: Ways, raw: psycopg.Connection, table: Row, way: Way, rows: Mapping[tuple[Any, Any], dict[str, Any]]
) -> dict[tuple[str, str], str]:
    """Try each pair of statuses on its row; returns what came out otherwise than ``lifecycle`` says."""
    wrong = {}
    cells: dict[Any, bool] = dict(RUN_CELLS if table is PipelineRun else NODE_CELLS)
    for (old, new), row in rows.items():
        before = stored(raw, table, row["id"])
        assert before is not None
        assert before[0] == old
        outcome = attempt(ways, way, ways, table, row, new)
        after = stored(raw, table, row["id"])
        assert after is not None
        if outcome == "done" and after[0] != new:
            outcome = f"done, but it is {after[0]}"
        if outcome == "refused" and after != before:
            outcome = "refused, but changed"
        # a logical subscriber writes every column of a row that was changed elsewhere
        legal = cells[old, new] or (old == new and ways.role == "replica")
        if legal and old == new and after != before:
            outcome = "done, but changed"
        if outcome != ("done" if legal else "refused"):
            wrong[old, new] = outcome
    return wrong


@pytest.fixture
def pipeline(raw: psycopg.Connection) -> int:
    row = raw.execute("INSERT INTO circle.pipelines (name) VALUES ('raw') RETURNING id").fetchone()
    assert row is not None
    number: int = row[0]
    return number


def make_runs(raw: psycopg.Connection, pipeline: int, statuses: Iterable[str]) -> list[dict[str, Any]]:
    wanted = [str(status) for status in statuses]
    rows = raw.execute(
        "INSERT INTO circle.pipeline_runs (pipeline_id, status)"
        " SELECT %s, CASE status WHEN 'pending' THEN status ELSE 'running' END"
        " FROM unnest(%s::text[]) WITH ORDINALITY AS u (status, place) ORDER BY place RETURNING id",
        [pipeline, wanted],
    ).fetchall()
    ids = sorted(row[0] for row in rows)
    raw.execute(
        "UPDATE circle.pipeline_runs r SET status = u.status FROM unnest(%s::int[], %s::text[]) AS u (id, status)"
        " WHERE r.id = u.id AND u.status NOT IN ('pending', 'running')",
        [ids, wanted],
    )
    return [{"id": run_id, "pipeline_id": pipeline} for run_id in ids]


def make_run(raw: psycopg.Connection, pipeline: int, status: str = "running") -> dict[str, Any]:
    return make_runs(raw, pipeline, [status])[0]


def make_node(raw: psycopg.Connection, run_id: int, status: str, node_id: str) -> dict[str, Any]:
    row = raw.execute(
        "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, status) VALUES (%s, %s, 'action', %s)"
        " RETURNING id",
        [run_id, node_id, status],
    ).fetchone()
    assert row is not None
    return {"id": row[0], "run_id": run_id, "node_id": node_id, "node_type": "action"}


# --- the matrix --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", CHANGES, ids=name_of)
def test_update_run_status_follows_the_table(ways: Ways, raw: psycopg.Connection, pipeline: int, way: Way) -> None:
    rows = dict(zip(RUN_CELLS, make_runs(raw, pipeline, (old for old, _ in RUN_CELLS)), strict=True))
    assert len(rows) == 36
    assert wrong_cells(ways, raw, PipelineRun, way, rows) == {}


@pytest.mark.parametrize("way", CHANGES, ids=name_of)
def test_update_node_status_follows_the_table(ways: Ways, raw: psycopg.Connection, pipeline: int, way: Way) -> None:
    run_id = make_run(raw, pipeline)["id"]
    rows = {(old, new): make_node(raw, run_id, old, f"{old}-{new}") for old, new in NODE_CELLS}
    assert len(rows) == 36
    assert wrong_cells(ways, raw, PipelineNodeRun, way, rows) == {}


@pytest.mark.parametrize("way", INSERTS, ids=name_of)
def test_insert_run_accepts_initial_statuses_only(ways: Ways, raw: psycopg.Connection, pipeline: int, way: Way) -> None:
    expected = dict.fromkeys(RunStatus, True) if ways.role == "replica" else NEW_RUNS
    for at, (status, legal) in enumerate(expected.items()):
        row = {"id": 1_000 + at, "pipeline_id": pipeline}
        outcome = attempt(ways, way, ways, PipelineRun, row, status)
        found = stored(raw, PipelineRun, row["id"])
        assert (status, outcome, found and found[0]) == (status, *(("done", status) if legal else ("refused", None)))


@pytest.mark.parametrize("way", INSERTS, ids=name_of)
def test_insert_node_accepts_what_its_run_allows(ways: Ways, raw: psycopg.Connection, pipeline: int, way: Way) -> None:
    for run_status in RunStatus:
        run_id = make_run(raw, pipeline, run_status)["id"]
        for at, status in enumerate(NodeStatus):
            # an executor may report afterwards, while the run is live
            legal = (
                ways.role == "replica" or run_status == "running" or (run_status == "pending" and status != "running")
            )
            row = {"id": run_id * 100 + at, "run_id": run_id, "node_id": status.value, "node_type": "agent"}
            outcome = attempt(ways, way, ways, PipelineNodeRun, row, status)
            found = stored(raw, PipelineNodeRun, row["id"])
            wanted = ("done", status) if legal else ("refused", None)
            assert (run_status, status, outcome, found and found[0]) == (run_status, status, *wanted)


@pytest.mark.parametrize("way", CHANGES, ids=name_of)
def test_update_node_of_pending_run_is_refused(ways: Ways, raw: psycopg.Connection, pipeline: int, way: Way) -> None:
    run_id = make_run(raw, pipeline, "pending")["id"]
    raw.execute("SET session_replication_role = replica")  # running nodes of a pending run: only restores get there
    rows = [make_node(raw, run_id, old, f"{old}-{new}") for old, new in NODE_CELLS]
    raw.execute("RESET session_replication_role")
    for (old, new), row in zip(NODE_CELLS, rows, strict=True):
        outcome = attempt(ways, way, ways, PipelineNodeRun, row, new)
        legal = ways.role == "replica" and (NODE_CELLS[old, new] or old == new)
        found = stored(raw, PipelineNodeRun, row["id"])
        assert found is not None
        assert (old, new, outcome, found[0]) == (old, new, *(("done", new) if legal else ("refused", old)))


# --- through the repository --------------------------------------------------------------------------------------------


def run_calls(runs: RunRepository, raw: psycopg.Connection, run_id: int) -> dict[RunStatus, Callable[[], object]]:
    return {
        RunStatus.PENDING: lambda: runs.release(run_id, token=claim_token(raw, run_id)),
        RunStatus.RUNNING: lambda: runs.start(run_id, token=claim_token(raw, run_id)),
        RunStatus.COMPLETED: lambda: runs.complete(run_id, token=claim_token(raw, run_id)),
        RunStatus.FAILED: lambda: runs.fail(run_id, "x", token=claim_token(raw, run_id)),
        RunStatus.CANCELLED: lambda: runs.cancel(run_id),
        RunStatus.TIMEOUT: runs.expire,
    }


def test_run_call_from_each_status_follows_the_table(database: Database, raw: psycopg.Connection) -> None:
    with database.session(autocommit=True) as session:
        runs = RunRepository(session)
        pipeline = store(session, "a", timeout_seconds=1_000)
        wrong = {}
        for (old, new), legal in RUN_CELLS.items():
            run_id = runs.create(pipeline).id
            if old != RunStatus.PENDING:
                (run,) = runs.claim("w", timedelta(minutes=5))
                runs.record(run_id, [done("a")], token=run.token)
            raw.execute(
                "UPDATE circle.pipeline_runs SET started_at = clock_timestamp() - interval '1 h' WHERE id = %s AND %s",
                [run_id, RunStatus.TIMEOUT in (old, new) and old != RunStatus.PENDING],
            )
            if old not in INITIAL_RUN_STATUSES:
                run_calls(runs, raw, run_id)[old]()
            before = runs.get(run_id)
            assert before.status == old
            try:
                run_calls(runs, raw, run_id)[new]()
            except IllegalTransitionError as error:
                assert new not in (RunStatus.PENDING, RunStatus.TIMEOUT)
                assert (error.entity, error.id, error.current, error.requested) == ("run", run_id, old, new)  # noqa: PT017
                after = runs.get(run_id)
                assert after == before
            except LeaseLostError:  # no lease, nothing to release
                assert new == RunStatus.PENDING
                after = runs.get(run_id)
                assert after == before
            else:
                after = runs.get(run_id)
                assert not (after.status.is_terminal and after.lease_expires_at)
            if (after.status == new, after != before) != (legal or old == new, legal):
                wrong[old, new] = after.status
            if not after.status.is_terminal:
                runs.cancel(run_id)
        assert wrong == {}


def node_calls(runs: RunRepository, run_id: int, token: int) -> dict[str, dict[NodeStatus, Callable[[], object]]]:
    return {
        "one": {
            NodeStatus.PENDING: lambda: runs.release(run_id, token=token),
            NodeStatus.RUNNING: lambda: runs.start_node(run_id, "a", token=token),
            NodeStatus.COMPLETED: lambda: runs.complete_node(run_id, "a", token=token),
            NodeStatus.FAILED: lambda: runs.fail_node(run_id, "a", "x", retryable=False, token=token),
            NodeStatus.SKIPPED: lambda: runs.skip_node(run_id, "a", token=token),
            NodeStatus.CANCELLED: lambda: runs.record(run_id, [done("a", "cancelled")], token=token),
        },
        "record": {
            status: partial(runs.record, run_id, [done("a", status)], token=token)
            for status in NodeStatus
            if status.is_terminal
        },
        "advance": {
            NodeStatus.RUNNING: lambda: runs.advance(run_id, token=token),
            **{
                status: partial(runs.advance, run_id, [done("a", status)], token=token)
                for status in NodeStatus
                if status.is_terminal
            },
        },
    }


@pytest.mark.parametrize("kind", ["one", "record", "advance"])
def test_node_call_from_each_status_follows_the_table(database: Database, kind: str) -> None:
    with database.session(autocommit=True) as session:
        runs = RunRepository(session)
        pipeline = store(session, "a b")  # b keeps the run alive
        wrong = {}
        for (old, new), legal in NODE_CELLS.items():
            run_id = runs.create(pipeline).id
            (run,) = runs.claim("w", timedelta(minutes=5))
            calls = node_calls(runs, run_id, run.token)
            if new not in calls[kind]:
                continue
            runs.start_node(run_id, "b", token=run.token)
            if old != NodeStatus.PENDING:
                calls["one"].get(old, lambda: None)()
            before = runs.nodes(run_id)[0]
            assert before.status == old
            try:
                calls[kind][new]()
            except IllegalTransitionError as error:
                assert (error.entity, error.id, error.current, error.requested) == ("node run", f"{run_id}/a", old, new)  # noqa: PT017
                after = runs.nodes(run_id)[0]
                assert after == before
            else:
                after = runs.nodes(run_id)[0]
            if (after.status == new, after != before) != (legal or old == new, legal):
                wrong[old, new] = after.status
            runs.cancel(run_id)
        assert wrong == {}


# --- what reads more than one row --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "way",
    [by_flush, by_core_update, by_bulk_update_mappings, by_raw_update, by_on_conflict, by_copy_and_merge],
    ids=name_of,
)
@pytest.mark.parametrize("live", ["pending", "running"])
def test_update_run_to_its_end_cancels_live_nodes(
    ways: Ways, raw: psycopg.Connection, pipeline: int, way: Way, live: str
) -> None:
    for end in (status for status in RunStatus if status.is_terminal):
        run = make_run(raw, pipeline)
        make_node(raw, run["id"], live, "live")
        make_node(raw, run["id"], "completed", "over")
        outcome = attempt(ways, way, ways, PipelineRun, run, end)
        found: dict[str, str] = dict(
            raw.execute(
                "SELECT node_id, status FROM circle.pipeline_node_runs WHERE run_id = %s", [run["id"]]
            ).fetchall()
        )
        status = raw.execute("SELECT status FROM circle.pipeline_runs WHERE id = %s", [run["id"]]).fetchone()
        wanted: tuple[str, str, str] = ("done", end, "cancelled")
        if ways.role == "replica":  # neither refused nor taken along: the origin has seen to both
            wanted = ("done", end, live)
        elif end == "completed":
            wanted = ("refused", "running", live)
        assert status is not None
        assert (outcome, status[0], found) == (*wanted[:2], {"live": wanted[2], "over": "completed"})


def test_update_run_to_completed_with_failed_node_is_refused(raw: psycopg.Connection, pipeline: int) -> None:
    run = make_run(raw, pipeline)
    make_node(raw, run["id"], "failed", "a")
    with pytest.raises(psycopg.Error) as caught:
        raw.execute("UPDATE circle.pipeline_runs SET status = 'completed'")
    assert caught.value.sqlstate == "PL001"


def test_update_run_to_pending_with_running_node_is_refused(raw: psycopg.Connection, pipeline: int) -> None:
    run = make_run(raw, pipeline)
    node = make_node(raw, run["id"], "running", "a")
    with pytest.raises(psycopg.Error) as caught:
        raw.execute("UPDATE circle.pipeline_runs SET status = 'pending'")
    assert caught.value.sqlstate == "PL001"
    raw.execute("UPDATE circle.pipeline_node_runs SET status = 'pending' WHERE id = %s", [node["id"]])
    raw.execute("UPDATE circle.pipeline_runs SET status = 'pending'")


def test_update_many_rows_with_one_illegal_is_refused(raw: psycopg.Connection, pipeline: int) -> None:
    """One illegal row refuses the statement, whichever it is."""
    run_ids = [make_run(raw, pipeline)["id"] for _ in range(5)]
    for run_id in run_ids:
        make_node(raw, run_id, "running", "a")
    raw.execute("UPDATE circle.pipeline_node_runs SET status = 'completed' WHERE run_id = %s", [run_ids[2]])
    before = contents(raw)
    for statement in (
        "UPDATE circle.pipeline_runs SET status = 'completed'",
        "UPDATE circle.pipeline_node_runs SET status = 'failed'",
        "UPDATE circle.pipeline_runs SET status = 'running' WHERE id > 0",
        f"INSERT INTO circle.pipeline_runs (pipeline_id, status) VALUES ({pipeline}, 'running'), ({pipeline}, 'completed')",
    ):
        with pytest.raises(psycopg.Error) as caught:
            raw.execute(statement)
        assert caught.value.sqlstate == "PL001"
        assert contents(raw) == before
    raw.execute("UPDATE circle.pipeline_runs SET status = 'failed'")
    assert raw.execute("SELECT status, count(*) FROM circle.pipeline_node_runs GROUP BY 1 ORDER BY 1").fetchall() == [
        ("cancelled", 4),
        ("completed", 1),
    ]


# --- over for ever -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [status for status in RunStatus if status.is_terminal])
def test_update_terminal_run_keeps_its_end(ways: Ways, raw: psycopg.Connection, pipeline: int, end: RunStatus) -> None:
    run_id = make_run(raw, pipeline)["id"]
    raw.execute("UPDATE circle.pipeline_runs SET status = %s, error_message = 'why' WHERE id = %s", [end, run_id])
    before = contents(raw)
    changes: list[dict[str, Any]] = [
        {"completed_at": "2031-01-01T00:00:00Z"},
        {"completed_at": None},
        {"error_message": "another"},
        {"error_message": None},
        {"status": "running", "completed_at": None},
        {"status": "pending", "completed_at": None, "error_message": None},
        *({"status": status} for status in RunStatus if (status, ways.role) != (end, "replica")),
        {"logs": "[1]", "error_message": "another"},
    ]
    for change in changes:
        sets = ", ".join(f"{name} = %s" for name in change)
        with pytest.raises(psycopg.Error) as caught:
            ways.raw.execute(f"UPDATE circle.pipeline_runs SET {sets}", list(change.values()))
        assert caught.value.sqlstate == "PL001"

        def flush(change: dict[str, Any] = change) -> None:
            loaded = ways.session.get_one(PipelineRun, run_id)
            for name, value in change.items():
                setattr(loaded, name, value)
                flag_modified(loaded, name)
            ways.session.flush()

        assert attempt(ways, flush) == "refused"
    assert contents(raw) == before
    ways.raw.execute("""UPDATE circle.pipeline_runs SET logs = logs || '[{"late": true}]', current_node = 'x'""")
    row = raw.execute("SELECT status, error_message, logs FROM circle.pipeline_runs").fetchone()
    assert row == (end, "why", [{"late": True}])


def test_update_token_to_less_is_refused(ways: Ways, raw: psycopg.Connection, pipeline: int) -> None:
    make_run(raw, pipeline)
    raw.execute("UPDATE circle.pipeline_runs SET claim_token = 7")
    with pytest.raises(psycopg.Error) as caught:
        ways.raw.execute("UPDATE circle.pipeline_runs SET claim_token = 6")
    assert caught.value.sqlstate == "PL001"


def test_update_status_without_times_fills_them_in(ways: Ways, raw: psycopg.Connection, pipeline: int) -> None:
    for started_at in ("now() - interval '90 s'", "now() + interval '1 day'", "timestamptz '0001-01-02 12:00+00'"):
        raw.execute(
            f"INSERT INTO circle.pipeline_runs (pipeline_id, status, started_at) VALUES ({pipeline}, 'running', {started_at})"
        )
    ways.raw.execute("UPDATE circle.pipeline_runs SET status = 'failed'")
    rows = raw.execute(
        "SELECT completed_at - started_at < interval '95 s', duration_seconds FROM circle.pipeline_runs ORDER BY id"
    ).fetchall()
    assert rows[0][0]
    assert rows[0][1] in range(90, 96)
    assert rows[1] == (True, 0)  # a clock ahead: over when it began
    assert rows[2] == (False, 2**31 - 1)


def test_transition_table_of_database_equals_python(raw: psycopg.Connection) -> None:
    """What the CHECKs allow is what the enumerations name."""
    for table, enumeration in (("pipeline_runs", RunStatus), ("pipeline_node_runs", NodeStatus)):
        row = raw.execute(
            "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = %s", [f"{table}_status_check"]
        ).fetchone()
        assert row is not None
        assert {word for word in row[0].split("'")[1::2]} == set(enumeration)  # noqa: C416
