"""``python -m gathering_pipeline.worker``."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gathering_pipeline import ConfigurationError, Database, NodeStatus, RunStatus
from gathering_pipeline.worker.__main__ import load_handlers, main
from tests.support.workers import new_run, outcome

pytestmark = pytest.mark.once  # a worker calls the repositories, which tests/runs shows on both servers

HANDLERS = """
import sys, time
from pathlib import Path
from gathering_pipeline import PermanentError

def work(context):
    Path("begun").touch()
    time.sleep(context.config.get("seconds", 0))
    return {"node": context.node.id}

ALL = {"agent": work, "action": work, "condition": work}
SOME = {"action": work}
NONE = 7
"""


@pytest.fixture(autouse=True)
def level_of_calls() -> Iterator[None]:
    """The command sets it for its process, which is this one where ``main`` is called."""
    calls = logging.getLogger("gathering_pipeline.calls")
    level = calls.level
    yield
    calls.setLevel(level)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(HANDLERS, encoding="utf-8")
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found\n", encoding="utf-8")
    return tmp_path


def start(folder: Path, database: Database | None, *arguments: str) -> subprocess.Popen[str]:
    url = (
        "postgresql://localhost:1/x" if database is None else database.engine.url.render_as_string(hide_password=False)
    )
    return subprocess.Popen(
        [sys.executable, "-m", "gathering_pipeline.worker", *arguments],
        cwd=folder,
        env=os.environ | {"GATHERING_DATABASE_URL": url, "PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(folder: Path, name: str) -> None:
    deadline = time.monotonic() + 60
    while not (folder / name).exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_command_executes_runs_with_its_options(database: Database, folder: Path) -> None:
    run_ids = [new_run(database, "a>b") for _ in range(2)]
    first = outcome(database, run_ids[0])[0].pipeline_id
    options = (
        "--once",
        "--partial",
        "--name",
        "ada",
        "--pipelines",
        str(first),
        "77",
        "--lease",
        "5",
        "--concurrency",
        "2",
    )
    process = start(folder, database, "mine:SOME", *options)
    printed = process.communicate(timeout=60)[1]
    assert (process.returncode, "Traceback" in printed) == (0, False), printed
    run, nodes = outcome(database, run_ids[0])
    assert (run.status, run.worker_id) == (RunStatus.COMPLETED, "ada")
    assert nodes["b"].output_data == {"node": "b"}
    assert f"run {run_ids[0]} is completed" in printed
    assert outcome(database, run_ids[1])[0].status is RunStatus.PENDING


@pytest.mark.parametrize("signals", [1, 2])
def test_command_ends_on_sigterm_after_its_handlers_and_on_a_second_one_at_once(
    database: Database, folder: Path, signals: int
) -> None:
    seconds = 1 if signals == 1 else 3600
    run_id = new_run(database, "a>b", {"a": {"config": {"action": "do", "seconds": seconds}}})
    process = start(folder, database, "mine:ALL")
    wait_for(folder, "begun")
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    printed = process.communicate(timeout=60)[1]
    assert (process.returncode, "Traceback" in printed) == (0, False), printed
    run, nodes = outcome(database, run_id)
    assert (run.status, run.lapsed_claims) == (RunStatus.PENDING, 0)
    assert nodes["a"].status is (NodeStatus.COMPLETED if signals == 1 else NodeStatus.PENDING)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("no_such_module:ALL", "there is no module 'no_such_module': write MODULE:HANDLERS"),
        ("mine", "'mine' names no handlers: write MODULE:HANDLERS, as in mine:HANDLERS"),
        ("mine:", "'mine:' names no handlers: write MODULE:HANDLERS, as in mine:HANDLERS"),
        (".mine:ALL", "'.mine:ALL' names no handlers: write MODULE:HANDLERS, as in mine:HANDLERS"),
        ("mine:ALLES", "module 'mine' has no 'ALLES': write MODULE:HANDLERS"),
        ("", "'' names no handlers: write MODULE:HANDLERS, as in mine:HANDLERS"),
    ],
)
def test_handlers_that_do_not_exist_are_told_in_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, place: str, message: str
) -> None:
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(ConfigurationError, match=f"^{message}$"):
        load_handlers(place)


def test_module_that_handlers_import_and_that_is_missing_is_not_hidden(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
        load_handlers("broken:ALL")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "'' names no handlers: write MODULE:HANDLERS"),
        (["mine:SOME"], "handlers has no function for nodes of type agent, condition"),
        (["mine:NONE"], "handlers must be a dict of node types and functions, not int"),
        (["mine:ALL", "--concurrency", "0"], "concurrency must be a whole number from 1, not 0"),
        (["mine:ALL", "--lease", "0"], "lease must be a timedelta of at least"),
        (["mine:ALL", "--once"], "no answer from the PostgreSQL server at localhost:1"),
    ],
)
def test_command_that_cannot_work_exits_with_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("GATHERING_DATABASE_URL", "postgresql://localhost:1/x")
    with pytest.raises(SystemExit, match=message):
        main(arguments)
