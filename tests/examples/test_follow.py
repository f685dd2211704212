"""``python -m examples.follow`` prints the events of one run to its end, or those of all runs from now on."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import text

from examples import demo, follow
from gathering_pipeline import Database, EventRepository, PipelineRepository, RunRepository

ROOT = Path(__file__).parents[2]


def create_run(database: Database) -> int:
    with database.session() as session:
        pipeline = PipelineRepository(session).create(demo.load_pipeline("code_review.json"))
        return RunRepository(session).create(pipeline.id).id


def url_of(database: Database) -> str:
    return database.engine.url.render_as_string(hide_password=False)


def test_following_a_run_prints_its_events_and_stops_at_its_end(
    database: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id, other = create_run(database), create_run(database)
    with database.session() as session:
        runs = RunRepository(session)
        for each in (run_id, other):
            runs.start(each)
        runs.start_node(run_id, "push")
        runs.complete_node(run_id, "push")
        duration = runs.nodes(run_id)[0].duration_ms
        runs.cancel(run_id, "not needed")
    monkeypatch.setenv("GATHERING_DATABASE_URL", url_of(database))
    assert follow.main([str(run_id)]) == 0
    lines = [line.split("  ", 1)[1].split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["run", str(run_id), "pipeline_run.started"],
        ["run", str(run_id), "pipeline_node.started", "push", "attempt=1"],
        ["run", str(run_id), "pipeline_node.completed", "push", "attempt=1", f"duration_ms={duration}"],
        ["run", str(run_id), "pipeline_run.cancelled", "error=not", "needed", "duration_seconds=0"],
    ]


def test_following_all_runs_prints_new_events_until_an_interrupt(database: Database) -> None:
    old, new = create_run(database), create_run(database)
    with database.session(autocommit=True) as session:
        RunRepository(session).start(old)
        while not EventRepository(session).read(run_id=old).items:  # an older transaction of the server is open
            time.sleep(0.05)
        url = database.engine.url.update_query_dict({"application_name": "follow"})
        environment = os.environ | {"GATHERING_DATABASE_URL": url.render_as_string(hide_password=False)}
        process = subprocess.Popen(
            [sys.executable, "-m", "examples.follow"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        try:
            wait_for_follower(database)
            RunRepository(session).start(new)
            assert process.stdout is not None
            assert process.stdout.readline().split()[2:] == ["run", str(new), "pipeline_run.started"]
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            watchdog.cancel()
            process.kill()
            process.communicate()


def wait_for_follower(database: Database) -> None:
    """Wait until the program has read the log of events."""
    statement = text(
        "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'follow'"
        " AND state <> 'active' AND query ~ 'pipeline_events|page_of_events')"
    )
    deadline = time.monotonic() + 60
    with database.engine.connect() as connection:
        while not connection.scalar(statement):
            assert time.monotonic() < deadline
            connection.rollback()
            time.sleep(0.05)


def test_following_without_a_schema_fails_in_a_sentence(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GATHERING_DATABASE_URL", empty_database_url)
    assert follow.main(["1"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("the schema lacks")
    assert message.count("\n") == 1
