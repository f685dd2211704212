"""A naive use of an ORM: for every change a session that reads the row, sets its attributes and commits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, LiteralString

from sqlalchemy import JSON, DateTime, Engine, ForeignKey, UniqueConstraint, create_engine, select
from sqlalchemy.engine import make_url
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from benchmarks.peers.interface import Task

RECORDED: LiteralString = (
    "SELECT count(*) FROM node_runs n JOIN runs r ON r.id = n.run_id"
    " WHERE n.status = 'completed' AND r.status = 'completed'"
)


class _Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSON, datetime: DateTime(timezone=True)}  # noqa: RUF012 - as documented


class _Run(_Base):
    __tablename__ = "runs"
    id: Mapped[int] = mapped_column(primary_key=True)
    status: Mapped[str] = mapped_column(default="pending")
    trigger_data: Mapped[dict[str, Any]] = mapped_column(default=dict)
    started_at: Mapped[datetime | None]
    completed_at: Mapped[datetime | None]
    nodes: Mapped[list[_NodeRun]] = relationship()


class _NodeRun(_Base):
    __tablename__ = "node_runs"
    __table_args__ = (UniqueConstraint("run_id", "node_id"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"))
    node_id: Mapped[str]
    status: Mapped[str] = mapped_column(default="pending")
    output: Mapped[dict[str, Any] | None]
    started_at: Mapped[datetime | None]
    completed_at: Mapped[datetime | None]


@contextmanager
def prepare(task: Task) -> Iterator[Callable[[], object]]:
    """Create the tables."""
    engine = create_engine(make_url(task.url).set(drivername="postgresql+psycopg"))
    try:
        _Base.metadata.create_all(engine)
        yield lambda: _record(engine, task)
    finally:
        engine.dispose()


def _record(engine: Engine, task: Task) -> None:
    """One commit to create the run, start it and end it, and two a node."""
    node_ids = [f"node-{at}" for at in range(task.count)]
    with Session(engine) as session:
        run = _Run(nodes=[_NodeRun(node_id=node_id) for node_id in node_ids])
        session.add(run)
        session.commit()
        run_id = run.id
    _change_run(engine, run_id, status="running", started_at=datetime.now(UTC))
    for node_id in node_ids:
        _change_node(engine, run_id, node_id, status="running", started_at=datetime.now(UTC))
        _change_node(engine, run_id, node_id, status="completed", output=task.output, completed_at=datetime.now(UTC))
    _change_run(engine, run_id, status="completed", completed_at=datetime.now(UTC))


def _change_run(engine: Engine, run_id: int, **values: object) -> None:
    with Session(engine) as session:
        run = session.get_one(_Run, run_id)
        for name, value in values.items():
            setattr(run, name, value)
        session.commit()


def _change_node(engine: Engine, run_id: int, node_id: str, **values: object) -> None:
    with Session(engine) as session:
        node = session.scalars(select(_NodeRun).filter_by(run_id=run_id, node_id=node_id)).one()
        for name, value in values.items():
            setattr(node, name, value)
        session.commit()
