"""Each revision, up and down, on a database that is full and in use: how long a writer stands still at worst.

Four writers send what GatheRing sends, all the time; a transaction of theirs that takes longer than it does without a
migration was held up. ``GATHERING_MIGRATION_RUNS`` sets how many runs are there (100,000; ``make migration-load`` takes
5,000,000 and fails above 250 ms), with as many node runs. It prints a table.
"""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator

import pytest

from gathering_pipeline import migrations
from tests.support import servers
from tests.support.adoption import GATHERING, GOOD_EDGES, GOOD_NODES, INDEXES
from tests.support.load import WRITERS, Load, Steps, holding, invalid_indexes
from tests.support.schema import revisions

RUNS = int(os.environ.get("GATHERING_MIGRATION_RUNS", "100000"))
LONG = RUNS >= 1_000_000
HOLD = 8.0 if LONG else 2.0
"""For how long, in seconds, another transaction keeps its locks and its snapshot."""
EVERY = 15.0 if LONG else 1.0
"""Seconds between two requests that send CREATE INDEX IF NOT EXISTS: an index of the long form takes some to be built."""
BAR = 0.25

PIPELINES = f"""
INSERT INTO circle.pipelines (name, status, nodes, edges)
SELECT 'pipeline ' || n, 'active', '{json.dumps(GOOD_NODES)}', '{json.dumps(GOOD_EDGES)}' FROM generate_series(1, 50) n"""
# One in a hundred is to be repaired by 008; the first 1,000 are left to the other writer of each pass.
FILL_RUNS = f"""
INSERT INTO circle.pipeline_runs (pipeline_id, status, started_at, completed_at, logs, trigger_data)
SELECT 5 + n % 46, CASE WHEN n % 7 = 0 THEN 'failed' ELSE 'completed' END, now() - interval '1 day',
       CASE WHEN n % 100 > 0 THEN now() - interval '1 hour' END, '[{{"message": "started"}}]', '{{"by": "cron"}}'
FROM generate_series(1, {RUNS}) n"""
FILL_NODE_RUNS = """
SET session_replication_role = replica;
INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, status, started_at, completed_at)
SELECT id, 't', 'trigger', 'completed', started_at, completed_at FROM circle.pipeline_runs
WHERE status IN ('completed', 'failed');
RESET session_replication_role;
UPDATE circle.pipeline_runs SET status = 'timeout' WHERE id % 1000 = 1 AND status = 'failed'"""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A database of GatheRing's own, full of runs, on a server that writes to the disk as servers do."""
    with servers.start(durable=True) as server:
        name = server.create()
        found = server.database_url(name)
        with servers.connect(found) as raw:
            raw.execute(GATHERING)
            raw.execute(PIPELINES)
            raw.execute(FILL_RUNS)
            raw.execute(INDEXES)
            raw.execute("VACUUM ANALYZE")
        yield found
        server.drop(name)


@pytest.fixture
def steps() -> Iterator[Steps]:
    with Steps.logged() as found:
        yield found


# name, what is in the way of upgrades, of downgrades, whether a writer also sends CREATE INDEX IF NOT EXISTS
PASSES = (
    [
        ("alone", None, None, False),
        ("behind a reader", "reader", "reader", False),
        ("behind a writer", "writer", "writer", False),
        ("with concurrent CREATE INDEX", None, None, True),
    ]
    if LONG
    else [
        ("behind a reader, then a writer", "reader", "writer", False),
        ("with concurrent CREATE INDEX", None, None, True),
    ]
)


@pytest.mark.parametrize(("name", "up", "down", "create_index"), PASSES, ids=[one[0] for one in PASSES])
def test_writers_stand_still_briefly_during_each_revision(
    url: str,
    steps: Steps,
    name: str,
    up: str | None,
    down: str | None,
    create_index: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines: list[str] = []
    stalls: list[float] = []
    load = Load(url, create_index_every=EVERY if create_index else None)
    path = ["base", *revisions()]
    with servers.connect(url) as raw, load.running():

        def move(what: str, kind: str | None, action: Callable[[], None]) -> None:
            load.take_worst()
            begin = time.monotonic()
            with holding(url, kind, HOLD):
                action()
            took = time.monotonic() - begin
            worst, at, statement = load.take_worst()
            stalls.append(worst)
            lines.append(
                f"{what:32} {took:7.1f} s {worst * 1000:9.0f} ms  {steps.during(at, at + worst)[:200]} [{statement[:60]}]"
            )
            assert invalid_indexes(raw) == []
            assert load.failures == []

        try:
            move("(nothing)", up, lambda: time.sleep(3 if LONG else 1))
            for revision in path[1:]:
                move(f"up to {revision}", up, lambda to=revision: migrations.upgrade(url, to))  # type: ignore[misc]
                if revision == path[2]:
                    raw.execute(FILL_NODE_RUNS)
                    raw.execute("ANALYZE")
                    load.nodes = True
            for revision in reversed(path[:-1]):
                if revision == path[1]:
                    load.nodes = False
                    time.sleep(0.5)
                move(f"down to {revision}", down, lambda to=revision: migrations.downgrade(url, to))  # type: ignore[misc]
        finally:
            with capsys.disabled():
                print(f"\n{name}, {RUNS:,} runs, {load.transactions:,} transactions of {WRITERS} writers; worst stall:")
                print("\n".join(lines))
                print(f"deadlocks: {len(load.deadlocks)}, failures: {load.failures[:3]}")
    assert load.failures == []
    assert load.deadlocks == []
    assert load.transactions > 1000
    if LONG:
        assert max(stalls) <= BAR
