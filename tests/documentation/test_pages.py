"""What the README and the pages show is true: their Python runs and prints what it says, their commands exist.

``make types`` checks the types of their Python.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import psycopg
import pytest
from alembic.config import CommandLine
from sqlalchemy.orm import Session

import gathering_pipeline
from gathering_pipeline import Database, DatabaseSettings, RunRepository
from gathering_pipeline.cli.commands import cli
from gathering_pipeline.repositories import _call
from tests.support.pages import BLOCK, COMMANDS, EXCERPTS, pages, program
from tests.support.runs import store
from tests.support.servers import Server
from tests.support.workers import new_run, outcome

ROOT = Path(__file__).parents[2]


SELF_CONTAINED = ["README", "concepts", "errors", "events", "first-steps", "running", "sessions"]
"""Pages whose Python runs from top to bottom on an empty database."""
WITH_A_TEST = ["operations", "scale", "testing", "worker"]
"""Pages whose Python needs something around it."""


def test_each_page_with_python_has_a_test() -> None:
    assert [page.stem for page in pages() if program(page)] == sorted([*SELF_CONTAINED, *WITH_A_TEST, *EXCERPTS])


@pytest.mark.parametrize("name", EXCERPTS)
def test_page_shows_parts_of_a_program_as_they_are(name: str) -> None:
    shown = BLOCK.findall((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8"))
    source = statements(EXCERPTS[name].read_text(encoding="utf-8"))
    assert shown
    assert [block for block in shown if not statements(block) <= source] == []


def statements(code: str) -> set[str]:
    """The statements of a module, without docstrings and comments."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, (ast.AsyncFunctionDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            del node.body[0]
    return {ast.unparse(node) for node in tree.body}


@pytest.mark.parametrize("name", SELF_CONTAINED)
def test_page_python_runs_and_prints_what_it_says(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    url = request.getfixturevalue("empty_database_url" if name in {"README", "first-steps"} else "database_url")
    (page,) = (page for page in pages() if page.stem == name)
    path = tmp_path / "page.py"
    path.write_text(program(page) + "\ndatabase.dispose()\n", encoding="utf-8")
    environment = {"GATHERING_DATABASE_URL": url, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    command = [sys.executable, str(path)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    promised = re.findall(r"print\(error\)  # (.+)", path.read_text(encoding="utf-8"))
    assert [line for line in promised if line not in done.stdout] == []


def commands() -> list[str]:
    """The lines of all shell blocks, without their comments, and the commands that stand in sentences."""
    found = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        lines = "".join(COMMANDS.findall(text)).splitlines()
        found += [re.split(r"\s#\s| > ", line)[0].strip() for line in lines]
        found += re.findall(r"`(gathering-pipeline [^`]*|make [a-z-]+|python -m [^`]*)`", text)
    return sorted({line for line in found if line})


def arguments(command: str) -> list[str]:
    return ["1" if word.isupper() else word for word in shlex.split(command)]


def parse(group: click.Command, words: list[str]) -> None:
    """Parse a command line as click does, without running it; raises what click would print."""
    context = group.make_context(group.name, words)
    while isinstance(group, click.Group) and context._protected_args + context.args:
        name, found, words = group.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None
        group, context = found, found.make_context(name, words, parent=context)


@pytest.mark.parametrize("command", commands())
def test_command_of_a_page_exists(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tenants").write_text("north postgresql://h/north\n", encoding="utf-8")
    match arguments(command):
        case ["gathering-pipeline", *words] if "..." not in words:
            parse(cli, words)
        case ["gathering-pipeline", *_]:
            pass  # a placeholder of a sentence
        case ["alembic", *words]:
            CommandLine().parser.parse_args(words)
        case ["make", target]:
            assert re.search(rf"^{target}:.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        case ["uvicorn", application]:
            assert find_spec(application.partition(":")[0]) is not None
        case ["pip", "install", package, *_]:
            name, _, extra = package.removesuffix("]").partition("[")
            assert name == project["name"]
            assert not extra or extra in project["optional-dependencies"]
        case ["python", "-m", module, *_]:
            assert find_spec(module) is not None
        case ["psql", *_]:
            pass
        case [setting]:
            name, separator, _ = setting.partition("=")
            assert separator
            assert name.removeprefix("GATHERING_").lower() in DatabaseSettings.model_fields
        case _:
            pytest.fail("what is this command?")


def test_sql_page_has_every_sqlstate() -> None:
    text = (ROOT / "docs" / "sql.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(PL0\d\d)` \| `(\w+)`", text, re.MULTILINE))
    special = {_call._INVALID_PIPELINE: "InvalidPipelineError", _call._UNKNOWN_BRANCH: "InvalidDataError"}
    assert rows == {state: error.__name__ for state, error in _call._BY_SQLSTATE.items()} | special


def test_settings_page_has_every_variable() -> None:
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    named = {name.lower() for name in re.findall(r"`GATHERING_(\w+)`", text)}
    assert named == set(DatabaseSettings.model_fields)


def test_reference_page_has_every_public_name() -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\.\. auto\w+:: (\w+)$", text, re.MULTILINE)) | set(re.findall(r"`(\w+)`", text))
    in_the_tree = {name for name in gathering_pipeline.__all__ if name.endswith("Error")}
    assert set(gathering_pipeline.__all__) - named - in_the_tree == {
        *("EventRepository", "PipelineRepository", "RunRepository"),  # the sync twins
        *("NodeConfig", "metadata"),
    }


@pytest.mark.once
def test_pages_build_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", str(ROOT / "docs"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Release a claimed run" in (tmp_path / "reference.html").read_text(encoding="utf-8")


def page_text(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


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


@pytest.mark.once
def test_operations_page_traces_have_the_statement_of_each_call(database_url: str) -> None:
    (block,) = (block for block in BLOCK.findall(page_text("operations")) if "Instrumentor" in block)
    code = f"""
import asyncio
import re
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from gathering_pipeline import AsyncRunRepository, Database, RunRepository

exporter = InMemorySpanExporter()
trace.set_tracer_provider(TracerProvider())
trace.get_tracer_provider().add_span_processor(SimpleSpanProcessor(exporter))
{block}
def spans(name):
    found = [span.attributes["db.statement"] for span in exporter.get_finished_spans() if span.name != "connect"]
    exporter.clear()
    print(name, [re.search(r"circle[.](\\w+)", statement)[1] for statement in found], "hidden" in str(found))

for autocommit in (False, True):
    with database.session(autocommit=autocommit) as session:
        run = RunRepository(session).create(1, {{"secret": "hidden"}})
        spans("create")
    with database.session(autocommit=autocommit) as session:
        assert RunRepository(session).get(run.id).trigger_data == {{"secret": "hidden"}}
        spans("get")

async def asynchronous():
    async with database.async_session() as session:
        await AsyncRunRepository(session).cancel(run.id)
        spans("cancel")
    await database.adispose()

asyncio.run(asynchronous())
database.dispose()
"""
    environment = {"GATHERING_DATABASE_URL": database_url, "PYTHONWARNINGS": "error"}
    with Database(database_url) as database, database.session() as session:
        store(session, "a")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        *["create ['create_run'] False", "get ['pipeline_runs'] False"] * 2,
        "cancel ['conclude_run'] False",
    ]


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
