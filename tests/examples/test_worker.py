"""The example worker: how it executes runs, how it stops, and what it prints where the database can't be used."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples import demo
from examples.worker import HANDLERS
from gathering_pipeline import Database, NodeStatus, PipelineRepository, RunRead, RunRepository, RunStatus, Worker
from tests.support.workers import run_once

ROOT = Path(__file__).parents[2]
NOWHERE = "postgresql://localhost:1/name"


def start_worker(url: str, *options: str) -> subprocess.Popen[str]:
    environment = os.environ | {"GATHERING_DATABASE_URL": url}
    command = [sys.executable, "-m", "examples.worker", *options]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def test_worker_once_without_server_prints_one_sentence() -> None:
    process = start_worker(NOWHERE, "--once")
    _, printed = process.communicate(timeout=30)
    assert process.returncode == 1
    assert printed.startswith("no answer from the PostgreSQL server at localhost:1")
    assert printed.count("\n") == 1


def test_worker_without_schema_prints_one_sentence(empty_database_url: str) -> None:
    process = start_worker(empty_database_url)
    _, printed = process.communicate(timeout=30)
    assert process.returncode == 1
    assert printed.startswith("the schema lacks")
    assert printed.count("\n") == 1


def test_worker_once_without_runs_exits_successfully(database: Database) -> None:
    process = start_worker(database.engine.url.render_as_string(hide_password=False), "--once")
    (line,) = process.communicate(timeout=30)[1].splitlines()
    assert line.endswith(" claims runs, for up to 8 handlers at a time")
    assert process.returncode == 0


def test_worker_without_server_retries_with_backoff() -> None:
    process = start_worker(NOWHERE)
    assert process.stderr is not None
    first = process.stderr.readline()
    time.sleep(4)
    process.terminate()
    rest = process.communicate(timeout=30)[1].splitlines()
    assert process.returncode == 0
    assert "the database is unavailable" in first
    assert 1 <= len(rest) <= 8  # a fixed interval of 0.1 s would give forty


@pytest.fixture
def run(database: Database) -> RunRead:
    with database.session() as session:
        pipeline = PipelineRepository(session).create(demo.load_pipeline("code_review.json"))
        return RunRepository(session).create(pipeline.id)


def test_worker_once_executes_a_run_to_its_end(database: Database, run: RunRead) -> None:
    run_once(Worker(database, HANDLERS))
    with database.session() as session:
        runs = RunRepository(session)
        assert runs.get(run.id).status is RunStatus.COMPLETED
        nodes = {node.node_id: node for node in runs.nodes(run.id)}
    skipped = {"ask", "remind"}
    assert {node_id for node_id, node in nodes.items() if node.status is NodeStatus.SKIPPED} == skipped
    assert {node.status for node_id, node in nodes.items() if node_id not in skipped} == {NodeStatus.COMPLETED}
    assert {node_id: node.retry_count for node_id, node in nodes.items() if node.retry_count} == {"security": 1}
    assert nodes["verdict"].output_data == {"approved": True}
