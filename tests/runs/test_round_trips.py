"""How many round trips a call takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import (
    RunRepository,
    RunStatus,
)
from gathering_pipeline.database import Database
from gathering_pipeline.errors import (
    IllegalTransitionError,
)
from gathering_pipeline.metrics import MetricsReader
from gathering_pipeline.settings import DatabaseSettings
from tests.support.graphs import chain
from tests.support.runs import LEASE, done, store


@pytest.fixture
def wire(database_url: str, tmp_path: Path) -> Iterator[tuple[Session, Callable[[], int]]]:
    """A session and the number of round trips that it has made: libpq ends each with a Sync or begins it with a Query."""
    trace = tmp_path / "trace"
    with (
        Database(database_url, settings=DatabaseSettings(pool_size=1)) as database,
        database.session(autocommit=True) as session,
        trace.open("w") as file,
    ):
        driver = session.connection().connection.driver_connection
        assert isinstance(driver, psycopg.Connection)
        driver.pgconn.trace(file.fileno())
        driver.pgconn.set_trace_flags(psycopg.pq.Trace.SUPPRESS_TIMESTAMPS)

        def count() -> int:
            lines = [line.split("\t") for line in trace.read_text().splitlines()]
            return sum(fields[0] == "F" and fields[2] in ("Sync", "Query") for fields in lines)

        yield session, count
        driver.pgconn.untrace()


@pytest.mark.parametrize("length", [1, 10])
def test_run_of_a_chain_takes_few_round_trips(wire: tuple[Session, Callable[[], int]], length: int) -> None:
    session, count = wire
    runs = RunRepository(session)
    pipeline = store(session, chain(length))
    step_by_step, by_advance = [], []
    for _ in range(8):  # in the end every statement is prepared, as in a worker that has run for a second
        since = count()
        run_id = runs.create(pipeline).id
        runs.start(run_id)
        for at in range(length):
            runs.start_node(run_id, f"n{at}")
            runs.complete_node(run_id, f"n{at}", {"n": at})
        assert runs.finish(run_id).status == RunStatus.COMPLETED
        step_by_step.append(count() - since)

        since = count()
        run_id = runs.create(pipeline).id
        nodes = runs.advance(run_id).started
        while nodes:
            nodes = runs.advance(run_id, [done(node.node_id, output={}) for node in nodes]).started
        by_advance.append(count() - since)
        assert runs.get(run_id).status == RunStatus.COMPLETED
    assert step_by_step[-1] <= 2 * length + 3
    assert by_advance[-1] <= length + 2

    since = count()
    run_id = runs.create(pipeline).id
    runs.record(run_id, [done(f"n{at}") for at in range(length)])
    runs.finish(run_id)
    assert count() - since == 3


def test_each_call_takes_one_round_trip(wire: tuple[Session, Callable[[], int]]) -> None:
    session, count = wire
    runs = RunRepository(session)
    pipeline = store(session, "a b c", retry_backoff_base=0)
    run_id = runs.create(pipeline).id
    (claim,) = runs.claim("w", LEASE)
    token = claim.token
    calls: list[Callable[[], object]] = [
        lambda: runs.create(pipeline, {"x": 1}, idempotency_key="key"),
        lambda: runs.create(pipeline, {"x": 1}, idempotency_key="key"),
        lambda: runs.start_node(run_id, "a", {}, token=token),
        lambda: runs.fail_node(run_id, "a", "x", token=token),
        lambda: runs.ready_nodes(run_id),
        lambda: runs.advance(run_id, token=token),
        lambda: runs.complete_node(run_id, "a", {}, token=token),
        lambda: runs.record(run_id, [done("b")], token=token),
        lambda: runs.append_log(run_id, "x", token=token),
        lambda: runs.heartbeat(run_id, LEASE, token=token),
        lambda: runs.release(run_id, token=token),
        lambda: runs.claim("w", LEASE, 2),
        lambda: runs.recover(),
        lambda: runs.expire(),
        lambda: runs.purge(LEASE),
        lambda: runs.get(run_id),
        lambda: runs.nodes(run_id),
        lambda: runs.definition(run_id),
        lambda: runs.explain(run_id),
        lambda: runs.stuck(LEASE),
        lambda: runs.search(),
        lambda: runs.counts(),
        lambda: MetricsReader(session).read(),
        lambda: runs.statistics(pipeline),
        lambda: runs.cancel(run_id),
    ]
    for call in calls:
        since = count()
        call()
        assert count() - since == 1
    with pytest.raises(IllegalTransitionError):
        runs.cancel(run_id)
    since = count()
    with pytest.raises(IllegalTransitionError):
        runs.cancel(run_id)
    assert count() - since <= 2  # one more read is allowed where a call fails
