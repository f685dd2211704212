"""The example of a user's tests passes, with pytest as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.servers import Server

ROOT = Path(__file__).parents[2]


def run_pytest(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if not name.startswith("GATHERING_TEST")} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_example_passes_on_a_server_that_the_environment_names(server: Server) -> None:
    with server.connect() as admin:
        before = admin.execute("SELECT count(*) FROM pg_database").fetchone()
        done = run_pytest(ROOT, "examples/test_code_review.py", GATHERING_TEST_URL=server.url)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "3 passed" in done.stdout
        assert admin.execute("SELECT count(*) FROM pg_database").fetchone() == before


def test_plugin_in_a_conftest_works_on_the_embedded_server_with_warnings_as_errors(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["gathering_pipeline.testing"]\n', encoding="utf-8")
    (tmp_path / "test_mine.py").write_text(
        "from gathering_pipeline.testing import run_to_end\n"
        "def test_database(pipeline_database):\n"
        "    pipeline_database.check()\n"
        "    with pipeline_database.session() as session:\n"
        "        assert session.connection().exec_driver_sql('SELECT count(*) FROM circle.pipelines').scalar() == 0\n"
        "def test_other(pipeline_session, pipeline_database):\n"
        "    assert pipeline_session.bind.url.database == pipeline_database.engine.url.database\n",
        encoding="utf-8",
    )
    done = run_pytest(tmp_path, "-W", "error", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


@pytest.mark.once
def test_unknown_kind_of_server_is_told_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        'pytest_plugins = ["gathering_pipeline.testing"]\ndef test(pipeline_database): pass\n', encoding="utf-8"
    )
    done = run_pytest(tmp_path, PYTHONPATH=str(ROOT), GATHERING_TEST_SERVER="docker")
    assert done.returncode == 1
    assert "GATHERING_TEST_SERVER is 'docker': write container or embedded" in done.stdout
