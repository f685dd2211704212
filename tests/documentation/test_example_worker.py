"""The example worker where the database can't be used; ``make demo`` shows it at work."""

import os
import subprocess
import sys
import time
from pathlib import Path

from gathering_pipeline import Database

ROOT = Path(__file__).parents[2]
NOWHERE = "postgresql://localhost:1/name"


def worker(url: str, *options: str) -> subprocess.Popen[str]:
    environment = os.environ | {"GATHERING_DATABASE_URL": url}
    command = [sys.executable, "-m", "examples.worker", *options]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def test_worker_once_without_server_prints_one_sentence() -> None:
    process = worker(NOWHERE, "--once")
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert said.startswith("no answer from the PostgreSQL server at localhost:1")
    assert said.count("\n") == 1


def test_worker_once_without_schema_prints_one_sentence(empty_database_url: str) -> None:
    process = worker(empty_database_url)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert said.startswith("the schema lacks")
    assert said.count("\n") == 1


def test_worker_once_without_runs_exits_successfully(database: Database) -> None:
    process = worker(database.engine.url.render_as_string(hide_password=False), "--once")
    assert (process.communicate(timeout=30)[1], process.returncode) == ("", 0)


def test_worker_without_server_retries_with_backoff() -> None:
    process = worker(NOWHERE)
    assert process.stderr is not None
    first = process.stderr.readline()
    time.sleep(4)
    process.terminate()
    rest = process.communicate(timeout=30)[1].splitlines()
    assert process.returncode == 0
    assert "the database is unavailable" in first
    assert 1 <= len(rest) <= 8  # at ten a second they would be forty
