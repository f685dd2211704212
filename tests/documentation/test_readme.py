"""The README's Python runs from top to bottom and prints what it says; ``make types`` checks its types."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psycopg

import gathering_pipeline
from tests.support.readme import BLOCK, blocks

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


def test_readme_begins_with_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.index("make demo") < text.index("make test") < text.index("\n## ")


def test_readme_names_are_public() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = set(re.findall(r"\b([A-Z]\w*Error|Async\w+Repository|\w+Repository)\b", text))
    others = {"ValueError", "LookupError", "KeyError", "StaleDataError"}
    assert names - others <= set(gathering_pipeline.__all__)
