"""What a node run doesn't take, by every way into the table: it is written with the change to completed, and only successors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from sqlalchemy import update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from gathering_pipeline import PipelineNodeRun, RunRepository, RunStatus
from gathering_pipeline.lifecycle import NodeStatus
from tests.support.databases import contents
from tests.support.runs import started, statuses
from tests.support.shared import Shared

LIVE = [NodeStatus.PENDING, NodeStatus.RUNNING]

VALUES: dict[str, Callable[[list[int]], list[int | None]]] = {
    "one": lambda successors: [successors[0]],
    "all": lambda successors: [*reversed(successors)],
    "none": lambda _: [],
    "another": lambda successors: [successors[0], 0],
    "far": lambda _: [9999],
    "null": lambda successors: [successors[0], None],
}
"""Positions, of which the first three are of successors alone."""
LEGAL = [*VALUES][:3]

Write = Callable[[Session, psycopg.Connection, int, str, Any], object]
"""Sets the status of a node run and what it doesn't take, by the id of its row."""


def by_flush(session: Session, _raw: psycopg.Connection, row_id: int, status: str, untaken: Any) -> None:
    row = session.get_one(PipelineNodeRun, row_id)
    row.status, row.untaken = status, untaken
    session.flush()


def by_core(session: Session, _raw: psycopg.Connection, row_id: int, status: str, untaken: Any) -> None:
    table = PipelineNodeRun.__table__
    statement = update(table).where(table.c.id == row_id)  # type: ignore[arg-type]
    session.connection().execute(statement.values(status=status, untaken=untaken))


def by_bulk_update(session: Session, _raw: psycopg.Connection, row_id: int, status: str, untaken: Any) -> None:
    session.execute(update(PipelineNodeRun), [{"id": row_id, "status": status, "untaken": untaken}])


def by_update(_session: Session, raw: psycopg.Connection, row_id: int, status: str, untaken: Any) -> None:
    raw.execute(
        "UPDATE circle.pipeline_node_runs SET status = %s, untaken = %s WHERE id = %s", [status, untaken, row_id]
    )


def by_on_conflict(_session: Session, raw: psycopg.Connection, row_id: int, status: str, untaken: Any) -> None:
    raw.execute(
        "INSERT INTO circle.pipeline_node_runs (id, run_id, node_id, node_type)"
        " SELECT id, run_id, node_id, node_type FROM circle.pipeline_node_runs WHERE id = %s"
        " ON CONFLICT (id) DO UPDATE SET status = %s, untaken = %s",
        [row_id, status, untaken],
    )


def by_copy_and_merge(_session: Session, raw: psycopg.Connection, row_id: int, status: str, untaken: Any) -> None:
    raw.execute("CREATE TEMP TABLE incoming (id bigint, status text, untaken int[])")
    with raw.cursor().copy("COPY incoming FROM STDIN") as copy:
        copy.write_row((row_id, status, untaken))
    try:
        raw.execute(
            "MERGE INTO circle.pipeline_node_runs n USING incoming i ON n.id = i.id"
            " WHEN MATCHED THEN UPDATE SET status = i.status, untaken = i.untaken"
        )
    finally:
        raw.execute("DROP TABLE incoming")


WRITES: list[Write] = [by_flush, by_core, by_bulk_update, by_update, by_on_conflict, by_copy_and_merge]


@dataclass
class Writer:
    """A session and a psycopg connection of the same role, both committing each statement."""

    session: Session
    raw: psycopg.Connection

    def attempt(self, write: Write, row_id: int, status: str, untaken: Any) -> str:
        """``done``, or the SQLSTATE of the refusal."""
        try:
            write(self.session, self.raw, row_id, status, untaken)
        except (DBAPIError, psycopg.Error) as error:
            original: Any = getattr(error, "orig", error)
            return str(original.sqlstate)
        finally:
            self.session.rollback()
            self.session.expunge_all()
        return "done"


@pytest.fixture
def writer(database_url: str, in_role: tuple[str, Shared]) -> Iterator[Writer]:
    _, shared = in_role
    shared.discard()
    with shared.database.session(autocommit=True) as session:
        yield Writer(session, shared.raw)


def stored(raw: psycopg.Connection) -> dict[str, tuple[int, list[int], str]]:
    """The id, the successors and all columns of each node run."""
    rows = raw.execute("SELECT node_id, id, successors, n::text FROM circle.pipeline_node_runs n").fetchall()
    return {node: (row_id, successors, text) for node, row_id, successors, text in rows}


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_untaken_is_written_with_completed_only(
    raw: psycopg.Connection, session: Session, writer: Writer, write: Write
) -> None:
    runs = RunRepository(session)
    cells = {f"{old}-{new}-{value}": (old, new, value) for old in LIVE for new in NodeStatus for value in VALUES}
    run_id = started(runs, session, " ".join(f"{cell}>{cell}-x {cell}>{cell}-y" for cell in cells))
    for cell, (old, *_) in cells.items():
        if old == NodeStatus.RUNNING:
            runs.start_node(run_id, cell)
    session.commit()
    wrong = {}
    before = stored(raw)
    for cell, (_, new, value) in cells.items():
        row_id, successors, _ = before[cell]
        outcome = writer.attempt(write, row_id, new.value, VALUES[value](successors))
        legal = new == NodeStatus.COMPLETED and value in LEGAL
        if outcome not in (["done"] if legal else ["23000", "PL001"]):
            wrong[cell] = outcome
    after = stored(raw)
    changed = {cell for cell in before if before[cell] != after[cell]}
    assert changed == {f"{old}-completed-{value}" for old in LIVE for value in LEGAL}
    assert wrong == {}


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_untaken_of_a_terminal_node_never_changes(
    raw: psycopg.Connection, session: Session, writer: Writer, write: Write
) -> None:
    runs = RunRepository(session)
    run_id = started(runs, session, "a>c b>c a>d a>e")
    runs.complete_node(run_id, "a", branch=False)
    runs.complete_node(run_id, "b")
    session.commit()
    before = contents(raw)
    rows = stored(raw)
    changes: dict[str, list[Any]] = {"a": [None, [], [2], [2, 3], [0]], "b": [[], [2]]}
    for node, values in changes.items():
        for untaken in values:
            assert writer.attempt(write, rows[node][0], "completed", untaken) in ("23000", "PL001")
            with pytest.raises(psycopg.errors.IntegrityConstraintViolation, match=f"untaken of node {node} of run"):
                raw.execute("UPDATE circle.pipeline_node_runs SET untaken = %s WHERE node_id = %s", [untaken, node])
    assert contents(raw) == before
    # what changes nothing is legal: subscribers write every column
    writer.raw.execute("UPDATE circle.pipeline_node_runs SET untaken = untaken")


@pytest.mark.parametrize("way", ["insert", "copy"])
def test_insert_of_untaken_needs_a_completed_node(
    raw: psycopg.Connection, session: Session, writer: Writer, way: str
) -> None:
    run_id = started(RunRepository(session), session, "a")
    session.commit()
    columns = "(run_id, node_id, node_type, status, successors, untaken)"
    cells = {
        f"{status}-{successors}-{untaken}": (status.value, successors, untaken)
        for status in NodeStatus
        for successors in (None, "{2,3}")
        for untaken in ("{2}", "{}", "{9}", "{NULL}")
    }
    accepted = set()
    for cell, values in cells.items():
        row = (run_id, cell, "action", *values)
        with suppress(psycopg.errors.IntegrityConstraintViolation):
            if way == "copy":
                with writer.raw.cursor().copy(f"COPY circle.pipeline_node_runs {columns} FROM STDIN".encode()) as copy:
                    copy.write_row(row)
            else:
                marks = "(%s, %s, %s, %s, %s, %s)"
                writer.raw.execute(f"INSERT INTO circle.pipeline_node_runs {columns} VALUES {marks}".encode(), row)
            accepted.add(cell)
    assert accepted == {"completed-{2,3}-{2}", "completed-{2,3}-{}"}
    assert stored(raw).keys() == {"a", *accepted}


def test_raw_completed_without_untaken_takes_every_edge(raw: psycopg.Connection, session: Session) -> None:
    runs = RunRepository(session)
    run_id = started(runs, session, "c>a=true c>b=false")
    session.commit()
    raw.execute("UPDATE circle.pipeline_node_runs SET status = 'completed' WHERE node_id = 'c'")
    assert [node.node_id for node in runs.ready_nodes(run_id)] == ["a", "b"]


def test_raw_untaken_makes_its_edges_dead(raw: psycopg.Connection, session: Session) -> None:
    """The writer skips what no edge is alive to, as it does with what follows a node that it skips."""
    runs = RunRepository(session)
    run_id = started(runs, session, "c>a=true c>b=false b>x")
    session.commit()
    raw.execute("UPDATE circle.pipeline_node_runs SET status = 'completed', untaken = '{2}' WHERE node_id = 'c'")
    assert [node.node_id for node in runs.ready_nodes(run_id)] == ["a"]
    runs.skip_node(run_id, "b")
    runs.advance(run_id)
    runs.complete_node(run_id, "a")
    assert statuses(runs, run_id) == {"c": "completed", "a": "completed", "b": "skipped", "x": "skipped"}
    assert runs.finish(run_id).status == RunStatus.COMPLETED


def test_refusal_says_what_is_legal(raw: psycopg.Connection, session: Session) -> None:
    started(RunRepository(session), session, "a>b")
    session.commit()
    with pytest.raises(IntegrityError, match="untaken of node a of run .* and has positions of its successors"):
        by_flush(session, raw, stored(raw)["a"][0], "completed", [0])
    session.rollback()
