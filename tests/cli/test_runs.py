"""``runs ...``: lists, looks, control."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import Database, PipelineRepository, RunRepository
from gathering_pipeline.embedded import EmbeddedServer
from tests.support import servers
from tests.support.commands import PATIENCE, in_terminal, read, run, sentence, start, succeed
from tests.support.runs import LEASE, done, store

EVIL = "\x1b]0;owned\x07[red]\u202e\x9b31m"


@pytest.fixture
def runs(database: Database) -> Iterator[RunRepository]:
    with database.session(autocommit=True) as session:
        yield RunRepository(session)


@pytest.fixture
def pipeline(database: Database) -> int:
    with database.session() as session:
        return store(session, "a>b", name=EVIL, retry_backoff_base=0)


def failed(runs: RunRepository, pipeline: int) -> int:
    """The id of a run whose first node failed."""
    run_id = runs.create(pipeline).id
    runs.advance(run_id)
    runs.advance(run_id, [done("a", "failed", error=f"boom {EVIL}\nsecond line")])
    return run_id


def ids(output: str) -> list[int]:
    return [int(line.split("\t")[0]) for line in output.splitlines()]


# --- list -------------------------------------------------------------------------------------------------------------


def test_list_filters_as_search(database_url: str, runs: RunRepository, pipeline: int, session: Session) -> None:
    other = store(session, "a", name="other")
    session.commit()
    first, second = runs.create(pipeline, tags={"a": "1", "b": "="}).id, failed(runs, pipeline)
    third, fourth = runs.create(other, tags={"a": "1"}).id, runs.create(other).id
    runs.cancel(fourth)

    def listed(*words: str) -> list[int]:
        return ids(succeed("runs", "list", *words, url=database_url))

    assert listed() == [fourth, third, second, first]
    assert listed("--pipeline", str(other)) == [fourth, third]
    assert listed("--status", "failed", "--status", "cancelled") == [fourth, second]
    assert listed("--tag", "a=1") == [third, first]
    assert listed("--tag", "a=1", "--tag", "b==") == [first]
    assert listed("--since", "1h", "--until", "1m") == []
    assert listed("--since", "2020-01-01", "--until", "2999-12-31T23:59:59+02:00") == [fourth, third, second, first]
    assert [row["id"] for row in read("runs", "list", "--status", "pending", url=database_url)] == [third, first]
    assert listed("--pipeline", "99") == []


def test_list_prints_names_and_errors_harmlessly(database_url: str, runs: RunRepository, pipeline: int) -> None:
    failed(runs, pipeline)
    (line,) = succeed("runs", "list", url=database_url).splitlines()
    run_id, pipeline_id, name, status, created, _, detail = line.split("\t")
    assert (run_id, pipeline_id, status) == ("1", "1", "failed")
    assert name == "\\x1b]0;owned\\x07[red]\\u202e\\x9b31m"
    assert detail.startswith("a: boom \\x1b]0;owned")
    assert detail.endswith(" second line")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", created)


def test_list_reads_all_pages_up_to_its_limit(
    database_url: str, runs: RunRepository, pipeline: int, raw: psycopg.Connection
) -> None:
    raw.execute("SELECT circle.create_run(%s, '{}') FROM generate_series(1, 1203)", [pipeline])
    short = run("runs", "list", url=database_url)
    assert len(ids(short.stdout)) == 50
    assert "There are more than 50: --limit N or --all shows them." in short.stderr
    assert len(ids(succeed("runs", "list", "--limit", "1202", url=database_url))) == 1202
    every = run("runs", "list", "--all", url=database_url)
    assert (len(ids(every.stdout)), "There are more" in every.stderr) == (1203, False)
    exact = run("runs", "list", "--limit", "1203", url=database_url)
    assert (len(ids(exact.stdout)), "There are more" in exact.stderr) == (1203, False)
    assert len(read("runs", "list", "--limit", "600", url=database_url)) == 600


def test_list_of_stuck_runs_is_oldest_first(
    database_url: str, runs: RunRepository, pipeline: int, raw: psycopg.Connection
) -> None:
    first, second = runs.create(pipeline).id, runs.create(pipeline).id
    assert ids(succeed("runs", "list", "--stuck", url=database_url)) == []
    assert ids(succeed("runs", "list", "--stuck", "--for", "0s", url=database_url)) == [first, second]
    limited = run("runs", "list", "--stuck", "--for", "0s", "--limit", "1", url=database_url)
    assert (ids(limited.stdout), "There are more than 1" in limited.stderr) == ([first], True)
    refused = sentence(run("runs", "list", "--stuck", "--status", "failed", url=database_url), 2)
    assert refused == "--stuck covers all live runs: it takes only --for and --limit"
    assert "is not a duration" in sentence(run("runs", "list", "--stuck", "--for", "long", url=database_url), 2)


@pytest.mark.parametrize("value", ["yesterday", "", "1x", "-1h", "2026-13-01", "99999999999d", "0x10", "1h2m"])
def test_list_of_unreadable_time_prints_one_sentence(database_url: str, value: str) -> None:
    refused = sentence(run("runs", "list", f"--since={value}", url=database_url), 2)
    assert "is not a time: write a duration before now, as in 1h or 2d" in refused


def test_command_of_unknown_run_prints_one_sentence(database_url: str, tmp_path: Path) -> None:
    for words in (
        *(["show"], ["why"], ["watch"], ["cancel"], ["resume"], ["rerun"]),
        ["report", "-o", str(tmp_path / "r.html")],
    ):
        assert sentence(run("runs", *words, "7", url=database_url)) == "run 7 does not exist"
    assert sentence(run("runs", "show", "9" * 25, url=database_url)) == f"run {'9' * 25} does not exist"
    assert "is not a valid integer" in sentence(run("runs", "show", "seven", url=database_url), 2)
    assert "is not a tag: write KEY=VALUE" in sentence(run("runs", "list", "--tag", "x", url=database_url), 2)
    repeated = ("--tag", "a=1", "--tag", "a=2")
    assert "'a=2' repeats a key: write KEY=VALUE" in sentence(run("runs", "list", *repeated, url=database_url), 2)
    assert list(tmp_path.iterdir()) == []


# --- looks ------------------------------------------------------------------------------------------------------------


def test_show_prints_run_tags_and_nodes(database_url: str, runs: RunRepository, pipeline: int) -> None:
    runs.create(pipeline, {"x": EVIL}, tags={"customer": EVIL})
    runs.cancel(failed(runs, pipeline) - 1, f"no longer needed{EVIL}")
    shown = succeed("runs", "show", "2", url=database_url)
    assert "\nstatus: failed\n" in shown
    rows = [line.split("\t") for line in shown.splitlines() if "\t" in line]
    assert [row[:4] for row in rows] == [["a", "action", "failed", "1"], ["b", "action", "cancelled", "-"]]
    assert rows[0][-1].startswith("boom \\x1b")
    other = succeed("runs", "show", "1", url=database_url)
    assert "\ntag customer: \\x1b]0;owned" in other
    assert all(line.replace("\t", "").isprintable() for line in (shown + other).splitlines())
    found = read("runs", "show", "1", url=database_url)
    assert (found["tags"], found["trigger_data"]) == ({"customer": EVIL}, {"x": EVIL})
    assert [node["node_id"] for node in found["nodes"]] == ["a", "b"]


def test_show_prints_trigger_data_and_outputs_on_request(database_url: str, runs: RunRepository, pipeline: int) -> None:
    run_id = runs.create(pipeline, {"branch": "topic", "x": EVIL, "long": "y" * 2_000}).id
    runs.advance(run_id)
    runs.advance(run_id, [done("a", output={"text": EVIL, "long": "z" * 2_000})])
    shown = succeed("runs", "show", str(run_id), url=database_url)
    (data,) = (line for line in shown.splitlines() if line.startswith("trigger data: "))
    assert data.startswith('trigger data: {"')
    assert '"branch": "topic"' in data
    assert len(data) < 1_100
    assert "output of" not in shown
    shown = succeed("runs", "show", str(run_id), "--outputs", url=database_url)
    (output,) = (line for line in shown.splitlines() if line.startswith("output of "))
    assert json.loads(output.removeprefix("output of a: ")) == {"text": EVIL, "long": "z" * 2_000}
    assert all(line.replace("\t", "").isprintable() for line in shown.splitlines())


def test_why_says_what_explain_does(database_url: str, runs: RunRepository, pipeline: int) -> None:
    runs.create(pipeline)
    (claimed,) = runs.claim(f"w{EVIL}", LEASE)
    runs.release(claimed.id, token=claimed.token, reason="a deploy\nbegins")
    lines = succeed("runs", "why", "1", url=database_url).splitlines()
    assert lines[0].startswith("Run 1 is pending. Workers can claim it")
    assert lines[-1].endswith(" released w\\x1b]0;owned\\x07[red]\\u202e\\x9b31m: a deploy begins")
    assert read("runs", "why", "1", url=database_url)["reasons"][0]["code"] == "claimable"


def test_why_names_failed_attempts_and_what_to_do(database_url: str, database: Database, runs: RunRepository) -> None:
    with database.session() as session:
        patient = store(session, "a>b", name="patient", retry_backoff_base=0)
    run_id = runs.create(patient).id
    (claimed,) = runs.claim("w", LEASE, pipelines=[patient])
    runs.advance(run_id, token=claimed.token)
    runs.advance(run_id, [done("a", "failed", error="no answer\nfrom it")], token=claimed.token, retry=True)
    runs.release(run_id, token=claimed.token)
    shown = succeed("runs", "why", str(run_id), url=database_url)
    assert "\nNode a waits until its run is running; attempt 1 failed: no answer from it.\n" in shown
    assert "Node b" not in shown
    runs.cancel(run_id)
    shown = succeed("runs", "why", str(run_id), url=database_url)
    assert f" 'gathering-pipeline runs resume {run_id}' continues it with its own graph, " in shown
    assert f" 'gathering-pipeline runs rerun {run_id}' starts anew with the current one." in shown
    runs.resume(run_id)
    assert "rerun" not in succeed("runs", "why", str(run_id), url=database_url)
    waiting = runs.create(patient).id
    with database.session() as session:
        PipelineRepository(session).pause(patient)
    assert f" 'gathering-pipeline activate {patient}' lets" in succeed("runs", "why", str(waiting), url=database_url)


# --- watch ------------------------------------------------------------------------------------------------------------


@contextmanager
def executed(database: Database, run_id: int, *, fails: bool = False) -> Iterator[None]:
    """Execute a run of a>b meanwhile, with a retry of a."""

    def execute() -> None:
        with database.session(autocommit=True) as session:
            mine = RunRepository(session)
            mine.advance(run_id)
            time.sleep(0.3)
            mine.advance(run_id, [done("a", "failed", error="boom")], retry=True)
            time.sleep(0.3)
            mine.advance(run_id, [done("a")])
            mine.advance(run_id, [done("b", "failed" if fails else "completed", error="late" if fails else None)])

    thread = threading.Thread(target=execute)
    thread.start()
    yield
    thread.join()


def test_watch_prints_events_until_the_run_ends(
    database: Database, database_url: str, runs: RunRepository, pipeline: int
) -> None:
    run_id = runs.create(pipeline).id
    with executed(database, run_id):
        watched = run("runs", "watch", str(run_id), url=database_url)
    assert watched.exit_code == 0
    assert [re.split(r" \w+=", line.split(" ", 2)[2])[0] for line in watched.stdout.splitlines()] == [
        "run started",
        "node a started",
        "node a retrying",
        "node a started",
        "node a completed",
        "node b started",
        "node b completed",
        "run completed",
    ]
    (retry,) = (line for line in watched.stdout.splitlines() if "retrying" in line)
    assert " error=boom" in retry
    assert " attempt=1" in retry
    events = [json.loads(line) for line in succeed("runs", "watch", "1", "--json", url=database_url).splitlines()]
    assert [event["type"] for event in events][-1] == "pipeline_run.completed"


def test_watch_of_run_that_fails_exits_with_3(
    database: Database, database_url: str, runs: RunRepository, pipeline: int
) -> None:
    run_id = runs.create(pipeline).id
    with executed(database, run_id, fails=True):
        process = start("runs", "watch", str(run_id), url=database_url)
        output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 3
    assert " run failed error=late" in output.splitlines()[-1]


def test_watch_in_a_terminal_shows_progress_until_the_run_ends(
    database: Database, database_url: str, runs: RunRepository, pipeline: int
) -> None:
    run_id = runs.create(pipeline).id

    def execute() -> None:
        with executed(database, run_id):
            pass

    code, output = in_terminal("runs", "watch", str(run_id), url=database_url, after="0/2 nodes", do=execute)
    assert code == 0
    assert "2/2 nodes" in output
    assert "\x1b]0;owned" not in output
    assert "[red]" in output


def test_watch_goes_on_after_a_crash_of_the_server(own_server: EmbeddedServer) -> None:
    with Database(own_server.url) as database:
        database.upgrade()
        with database.session() as session:
            run_id = RunRepository(session).create(store(session, "a>b", retry_backoff_base=0)).id
        with ThreadPoolExecutor() as pool:
            watched = threading.Event()
            words = ("runs", "watch", str(run_id))
            live = pool.submit(in_terminal, *words, url=own_server.url, after="0/2 nodes", do=watched.set)
            process = start("runs", "watch", str(run_id), url=own_server.url)
            assert process.stdout is not None
            with database.session(autocommit=True) as session:
                RunRepository(session).start(run_id)
            assert process.stdout.readline().partition(" run ")[2].startswith("started")
            assert watched.wait(PATIENCE)
            servers.restart(own_server, "immediate")
            time.sleep(1)
            with executed(database, run_id):
                pass
            assert process.stdout.read().splitlines()[-1].partition(" run ")[2].startswith("completed")
            assert process.wait(PATIENCE) == 0
            process.stdout.close()
            assert process.stderr is not None
            assert "Traceback" not in process.stderr.read()
            process.stderr.close()
            code, output = live.result(PATIENCE)
    assert (code, "2/2 nodes" in output, "Traceback" in output) == (0, True, False)


def test_interrupted_watch_ends_without_traceback(database_url: str, runs: RunRepository, pipeline: int) -> None:
    run_id = runs.create(pipeline).id
    runs.advance(run_id)
    process = start("runs", "watch", str(run_id), url=database_url)
    assert process.stdout is not None
    assert process.stdout.readline().partition(" run ")[2].startswith("started")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors.splitlines()[1:]) == (1, ["", "Aborted!"])
    assert runs.get(run_id).status == "running"


def test_list_into_a_closed_pipe_ends_without_traceback(
    database_url: str, pipeline: int, raw: psycopg.Connection
) -> None:
    raw.execute("SELECT circle.create_run(%s, '{}') FROM generate_series(1, 3000)", [pipeline])
    process = start("runs", "list", "--all", url=database_url)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait(PATIENCE)


# --- control ----------------------------------------------------------------------------------------------------------


def test_cancel_of_several_runs_stops_at_none(database_url: str, runs: RunRepository, pipeline: int) -> None:
    first, second, third = (runs.create(pipeline).id for _ in range(3))
    runs.cancel(second)
    cancelled = run(
        "runs", "cancel", str(first), str(second), "99", str(third), "--reason", "why not", url=database_url
    )
    assert (cancelled.exit_code, cancelled.stdout) == (1, "run 1 is cancelled\nrun 3 is cancelled\n")
    assert [line for line in cancelled.stderr.splitlines() if line.startswith("Error: ")] == [
        line for line in cancelled.stderr.splitlines() if "database: " not in line
    ]
    assert "Error: run 99 does not exist\n" in cancelled.stderr
    assert runs.get(third).error_message == "why not"


def test_resume_and_rerun_print_the_new_run(database_url: str, runs: RunRepository, pipeline: int) -> None:
    run_id = failed(runs, pipeline)
    assert succeed("runs", "resume", str(run_id), url=database_url) == "run 2 resumes run 1\n"
    (again,) = read("runs", "rerun", str(run_id), url=database_url)
    assert (again["id"], again["status"]) == (3, "pending")
    refused = sentence(run("runs", "resume", "3", url=database_url))
    assert refused == "run 3 is pending and can't be resumed: only a failed, cancelled or timed-out run can be"


def test_purge_asks_for_confirmation_and_deletes_in_transactions(
    database: Database, database_url: str, runs: RunRepository, pipeline: int, raw: psycopg.Connection
) -> None:
    raw.execute("SELECT circle.create_run(%s, '{}') FROM generate_series(1, 1100)", [pipeline])
    raw.execute("SELECT circle.conclude_run(id, 'cancelled', NULL, NULL) FROM circle.pipeline_runs WHERE id > 10")
    refused = run("runs", "purge", "--older-than", "0s", input="n\n", url=database_url)
    assert (refused.exit_code, "Aborted!" in refused.output) == (1, True)
    assert "This deletes all runs that ended over 0 s ago. Continue?" in refused.stderr
    assert read("runs", "purge", "--older-than", "1d", "--yes", url=database_url) == {"deleted": 0, "kept": []}
    purged = run("runs", "purge", "--older-than", "0s", "--yes", url=database_url)
    assert purged.stdout == "deleted 1,090 runs\n"
    assert "500 runs deleted\n1,000 runs deleted\n" in purged.stderr
    assert len(read("runs", "list", "--all", url=database_url)) == 10
    for span in ("old", "1", "99999999w", "-1d"):
        assert "is not a duration" in sentence(run("runs", "purge", f"--older-than={span}", url=database_url), 2)
    assert "at most 36500 days" in sentence(run("runs", "purge", "--older-than=9999999w", "--yes", url=database_url))


def test_command_on_empty_database_prints_one_sentence(empty_database_url: str) -> None:
    for words in (["runs", "list"], ["list"], ["runs", "why", "1"]):
        assert "schema" in sentence(run(*words, url=empty_database_url))
