"""The README's Python runs from top to bottom and prints what it says; ``make types`` checks its types."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy.orm import Session

import gathering_pipeline
from gathering_pipeline import Database, RunRepository
from tests.support.readme import BLOCK, blocks
from tests.support.runs import store
from tests.support.servers import Server
from tests.support.workers import new_run, outcome

ROOT = Path(__file__).parents[2]


def test_readme_python_runs_and_prints_what_it_says(empty_database_url: str, tmp_path: Path) -> None:
    program = tmp_path / "README.py"
    program.write_text(blocks() + "\ndatabase.dispose()\n", encoding="utf-8")
    environment = {"GATHERING_DATABASE_URL": empty_database_url, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    command = [sys.executable, str(program)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    promised = re.findall(r"print\(error\)  # (.+)", program.read_text(encoding="utf-8"))
    assert promised
    assert [line for line in promised if line not in done.stdout] == []


def test_operations_page_purge_deletes_history(database_url: str, raw: psycopg.Connection) -> None:
    raw.execute(
        """INSERT INTO circle.pipelines (name, status, nodes) VALUES ('p', 'active', '[{"id":"a","type":"trigger","name":"A"}]');
        SELECT circle.create_run(1, '{}', NULL) FROM generate_series(1, 2);
        SELECT circle.conclude_run(1, 'cancelled', NULL, NULL)"""
    )
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    environment = {"GATHERING_DATABASE_URL": database_url, "PYTHONWARNINGS": "error"}
    for block in BLOCK.findall(text):
        command = [sys.executable, "-c", block.replace("days=90", "days=0") + "database.dispose()\n"]
        subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=True)
    assert raw.execute("SELECT id FROM circle.pipeline_runs").fetchall() == [(2,)]
    assert raw.execute("SELECT count(*) FROM circle.pipeline_events").fetchone() == (1,)  # the newest


def test_scale_page_claims_and_follows(database_url: str, session: Session) -> None:
    run = RunRepository(session).create(store(session, "a"))
    session.commit()
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    code: dict[str, Any] = {}
    for block in BLOCK.findall(text)[1:]:  # the first one has hosts that are not there
        exec(block, code)  # noqa: S102 - of the page
    cursors: dict[str, str] = {}

    def stop(name: str, kind: str) -> None:
        assert (name, kind) == ("north", "pipeline_run.started")
        raise KeyboardInterrupt

    code["work"]({"north": database_url})
    assert RunRepository(session).get(run.id).status == "running"
    code["print"] = stop
    with pytest.raises(KeyboardInterrupt):
        code["follow"]({"north": database_url}, cursors)


def test_worker_page_python_runs(database: Database, database_url: str) -> None:
    run_ids = [new_run(database, "a>b a>c", {"a": {"type": "agent"}, "b": {"type": "condition"}}) for _ in range(2)]
    text = (ROOT / "docs" / "worker.md").read_text(encoding="utf-8")
    first, second = BLOCK.findall(text)
    environment = {"GATHERING_DATABASE_URL": database_url, "PYTHONWARNINGS": "error"}
    command = [sys.executable, "-c", first + "Database().dispose()\n" + second]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "0 runs executed"
    for run_id in run_ids:
        run, nodes = outcome(database, run_id)
        assert run.status == "completed"
        assert nodes["a"].output_data == {"text": "done: do", "sources": []}


def test_testing_page_python_is_a_test_that_passes(server: Server, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
    for name, block in zip(("conftest.py", "test_mine.py"), BLOCK.findall(text), strict=True):
        (tmp_path / name).write_text(block, encoding="utf-8")
    environment = {"GATHERING_TEST_URL": server.url, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_readme_begins_with_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.index("make demo") < text.index("make test") < text.index("\n## ")


def test_readme_names_are_public() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = set(re.findall(r"\b([A-Z]\w*Error|Async\w+Repository|\w+Repository)\b", text))
    others = {"ValueError", "LookupError", "KeyError", "StaleDataError"}
    assert names - others <= set(gathering_pipeline.__all__)


def test_fastapi_page_shows_lines_of_the_example() -> None:
    page, example = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/fastapi.md", "examples/service.py"))
    shown = [line for block in BLOCK.findall(page) for line in block.splitlines() if line]
    assert len(shown) == 4
    assert [line for line in shown if line not in example.splitlines()] == []
