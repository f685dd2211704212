"""GatheRing's writers at each revision, and during an upgrade."""

import json
import threading
import time

import psycopg
import pytest
from alembic import command

from gathering_pipeline import (
    migrations,
)
from tests.support.adoption import GATHERING, GOOD_EDGES, GOOD_NODES, INDEXES
from tests.support.databases import Connect
from tests.support.schema import catalog, revisions


def write_as_of_today(raw: psycopg.Connection) -> None:
    """The statements of GatheRing's API, scheduler and executor."""
    row = raw.execute(
        "INSERT INTO circle.pipelines (name, description, status, nodes, edges) VALUES (%s, %s, %s, %s, %s) "
        "RETURNING id",
        ["raw", None, "draft", json.dumps(GOOD_NODES), json.dumps(GOOD_EDGES)],
    ).fetchone()
    assert row is not None
    pipeline = row[0]
    raw.execute(INDEXES)
    for status in ("active", "paused", "active"):
        raw.execute("UPDATE circle.pipelines SET status = %s, updated_at = now() WHERE id = %s", [status, pipeline])
    for status, error, ended in (
        ("completed", None, True),
        ("failed", "boom", True),
        ("cancelled", None, False),
        ("completed", None, False),
    ):
        row = raw.execute(
            "INSERT INTO circle.pipeline_runs (pipeline_id, status, started_at, trigger_data, logs) "
            "VALUES (%s, 'running', CURRENT_TIMESTAMP, %s, '[]') RETURNING id",
            [pipeline, json.dumps({"by": "cron"})],
        ).fetchone()
        assert row is not None
        run = row[0]
        raw.execute("UPDATE circle.pipelines SET run_count = run_count + 1, last_run = now() WHERE id = %s", [pipeline])
        raw.execute("UPDATE circle.pipeline_runs SET current_node = 't', logs = logs || '[1]' WHERE id = %s", [run])
        if ended:
            raw.execute(
                "UPDATE circle.pipeline_runs SET status = %s, completed_at = CURRENT_TIMESTAMP, error_message = %s "
                "WHERE id = %s",
                [status, error, run],
            )
        else:
            raw.execute("UPDATE circle.pipeline_runs SET status = %s WHERE id = %s", [status, run])
        column = "success_count" if status == "completed" else "error_count"
        raw.execute(f"UPDATE circle.pipelines SET {column} = {column} + 1 WHERE id = %s", [pipeline])
        raw.execute("UPDATE circle.pipeline_runs SET logs = logs || '[2]' WHERE id = %s", [run])
        stored = raw.execute("SELECT status, error_message, logs FROM circle.pipeline_runs WHERE id = %s", [run])
        assert stored.fetchone() == (status, error, [1, 2])
    raw.execute(
        "UPDATE circle.pipelines SET nodes = %s, edges = '[]' WHERE id = %s", [json.dumps(GOOD_NODES[:1]), pipeline]
    )
    counters = raw.execute(
        "SELECT run_count, success_count, error_count, status FROM circle.pipelines WHERE id = %s", [pipeline]
    )
    assert counters.fetchone() == (4, 2, 2, "active")
    raw.execute("DELETE FROM circle.pipelines WHERE id = %s", [pipeline])
    left = raw.execute("SELECT count(*) FROM circle.pipeline_runs WHERE pipeline_id = %s", [pipeline])
    assert left.fetchone() == (0,)


def test_raw_writes_succeed_at_each_revision(url: str, used: psycopg.Connection) -> None:
    used.prepare_threshold = None  # see test_statement_prepared_before_ids_became_bigint_is_refused
    write_as_of_today(used)
    for one in revisions():
        migrations.upgrade(url, one)
        write_as_of_today(used)
        if one == revisions()[2]:
            # the first revision that fills what they leave out
            used.execute(
                "INSERT INTO circle.pipeline_runs (pipeline_id, status, started_at) VALUES (1, 'running', now())"
            )
            row = used.execute(
                "UPDATE circle.pipeline_runs SET status = 'completed' "
                "WHERE id = (SELECT max(id) FROM circle.pipeline_runs) RETURNING "
                "completed_at >= started_at, duration_seconds"
            ).fetchone()
            assert row == (True, 0)
    for one in [*reversed(revisions()[:-1]), "base"]:
        migrations.downgrade(url, one)
        write_as_of_today(used)


def test_statement_prepared_before_ids_became_bigint_is_refused(url: str, connect: Connect) -> None:
    """PostgreSQL refuses it for as long as the session keeps it: services that prepare statements have to reconnect."""
    insert = "INSERT INTO circle.pipeline_runs (pipeline_id) VALUES (1) RETURNING id"
    raw = connect(url)
    migrations.upgrade(url, "007_pipeline_execution")
    raw.execute("INSERT INTO circle.pipelines (name) VALUES ('p')")
    raw.execute(insert, prepare=True)
    migrations.upgrade(url)
    for _ in range(2):
        with pytest.raises(psycopg.errors.FeatureNotSupported, match="cached plan must not change result type"):
            raw.execute(insert, prepare=True)
    row = connect(url).execute(insert, prepare=True).fetchone()
    assert row == (2,)


def test_create_table_if_not_exists_after_upgrade_changes_nothing(url: str, used: psycopg.Connection) -> None:
    migrations.upgrade(url)
    before = catalog(url)
    used.execute(GATHERING + INDEXES)
    assert catalog(url) == before


@pytest.mark.parametrize("requests", ["plain", "with CREATE INDEX"])
def test_raw_writes_during_upgrade_succeed(url: str, used: psycopg.Connection, connect: Connect, requests: str) -> None:
    """While GatheRing's executor writes, and creates the three indexes as it does on every request."""
    used.execute(
        """INSERT INTO circle.pipeline_runs (pipeline_id, status, started_at, completed_at)
        SELECT 1, CASE WHEN n % 10 = 0 THEN NULL ELSE 'completed' END, now() - interval '1 day',
               CASE WHEN n % 10 = 0 THEN NULL ELSE now() END
        FROM generate_series(1, 4000) n"""
    )
    stop = threading.Event()
    failures: list[BaseException] = []
    waits: list[float] = []
    rounds = [0, 0]

    def write(number: int) -> None:
        raw = connect(url)
        raw.prepare_threshold = None  # see test_statement_prepared_before_ids_became_bigint_is_refused
        try:
            while not stop.is_set():
                start = time.monotonic()
                with raw.transaction():  # one request of the API
                    row = raw.execute(
                        "INSERT INTO circle.pipeline_runs (pipeline_id, status, started_at, trigger_data, logs) "
                        "VALUES (1, 'running', now(), '{}', '[]') RETURNING id"
                    ).fetchone()
                    assert row is not None
                    raw.execute("UPDATE circle.pipelines SET run_count = run_count + 1, last_run = now() WHERE id = 1")
                raw.execute("UPDATE circle.pipeline_runs SET current_node = 't' WHERE id = %s", row)
                with raw.transaction():
                    raw.execute(
                        "UPDATE circle.pipeline_runs SET status = 'completed', completed_at = clock_timestamp() "
                        "WHERE id = %s",
                        row,
                    )
                    raw.execute("UPDATE circle.pipelines SET success_count = success_count + 1 WHERE id = 1")
                if requests != "plain" and rounds[number] % 10 == 0:
                    raw.execute(INDEXES.strip().split(";\n")[rounds[number] // 10 % 3])
                waits.append(time.monotonic() - start)
                rounds[number] += 1
        except BaseException as error:  # noqa: BLE001 - whatever it is
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    try:
        for one in revisions():
            migrations.upgrade(url, one)
            seen = list(rounds)
            deadline = time.monotonic() + 60
            while (
                not failures
                and time.monotonic() < deadline
                and any(b - a < 5 for a, b in zip(seen, rounds, strict=True))
            ):
                time.sleep(0.01)
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert failures == []
    assert min(rounds) > 5 * len(revisions())
    assert max(waits) < 5
    row = used.execute(
        "SELECT run_count - 2, success_count, (SELECT count(*) FROM circle.pipeline_runs WHERE status IS NULL) "
        "FROM circle.pipelines WHERE id = 1"
    ).fetchone()
    assert row == (sum(rounds), sum(rounds), 0)
    command.check(migrations.config(url))
