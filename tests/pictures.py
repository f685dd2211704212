"""Takes the pictures of the pages, of a run that a worker executes: ``python -m tests.pictures`` (``make pictures``)."""

from __future__ import annotations

import asyncio
import io
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from gathering_pipeline import (
    Database,
    NodeContext,
    NodeResult,
    PermanentError,
    PipelineCreate,
    PipelineRepository,
    PipelineStatus,
    RunRepository,
    Worker,
)
from gathering_pipeline.cli import watching
from tests.support import browser, servers
from tests.support.commands import succeed

FOLDER = Path(__file__).parents[1] / "docs"
WIDTH = 1280
COLUMNS = 104
NODES: list[dict[str, Any]] = [
    {"id": "push", "type": "trigger", "name": "A branch was pushed"},
    {"id": "build", "type": "action", "name": "Build", "config": {"action": "make", "seconds": 1.3}},
    {"id": "lint", "type": "action", "name": "Lint", "config": {"action": "lint", "seconds": 0.7}},
    {"id": "review", "type": "agent", "name": "Review", "config": {"agent_id": 7, "task": "review", "seconds": 2.3}},
    {"id": "test", "type": "agent", "name": "Run the tests", "config": {"agent_id": 9, "task": "test", "seconds": 0.8}},
    {"id": "approved", "type": "condition", "name": "Approved?", "config": {"condition": "approved", "seconds": 0.3}},
    {"id": "merge", "type": "action", "name": "Merge", "config": {"action": "git.merge", "seconds": 0.6}},
    {"id": "ask", "type": "agent", "name": "Ask for changes", "config": {"agent_id": 7, "task": "ask"}},
    {"id": "tell", "type": "action", "name": "Tell the team", "config": {"action": "notify"}},
]
EDGES = ["push>build", "push>lint", "push>review", "build>test", "lint>approved", "review>approved", "test>approved"]
BRANCHES = {"merge": "true", "ask": "false"}


async def work(context: NodeContext) -> dict[str, Any] | NodeResult:
    """Takes its time; the tests fail once, and the merge for good."""
    await asyncio.sleep(context.config["seconds"])
    if context.node.id == "test" and context.attempt == 1:
        error = "ConnectionError: the test database refused the connection\n  (db-test-3:5432, after 3 tries)"
        return NodeResult(node_id="test", status="failed", error=error)
    if context.node.id == "merge":
        raise PermanentError("git.merge: CONFLICT in docs/cli.md")
    return {"text": "done"}


async def decide(context: NodeContext) -> bool:
    await asyncio.sleep(context.config["seconds"])
    return True


def store(database: Database) -> int:
    """A run of the pipeline, which waits for a worker."""
    edges = [{"id": edge, "from": edge.split(">")[0], "to": edge.split(">")[1]} for edge in EDGES]
    for end, label in BRANCHES.items():
        edges += [{"id": f"approved>{end}", "from": "approved", "to": end, "condition": label}]
        edges += [{"id": f"{end}>tell", "from": end, "to": "tell"}]
    with database.session() as session:
        fields: dict[str, Any] = {"name": "Code review", "status": PipelineStatus.ACTIVE, "retry_backoff_base": 0.5}
        pipeline = PipelineRepository(session).create(PipelineCreate(**fields, nodes=NODES, edges=edges))
        tags = {"repository": "gathering"}
        return RunRepository(session).create(pipeline.id, {"branch": "topic"}, priority=3, tags=tags).id


def terminal(database: Database, run_id: int) -> str:
    """What ``runs watch`` shows now, as SVG."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(watching._draw(*watching._read(database, run_id), "Code review", "", room=40))
    text = console.export_svg(title=f"gathering-pipeline runs watch {run_id}")
    return re.sub(r"@font-face {.*?}\s*", "", text, flags=re.DOTALL)  # it would be loaded from elsewhere


async def execute(database: Database, run_id: int) -> str:
    """Execute the run; returns the picture of the terminal, taken while a retry waits."""
    handlers = {"action": work, "agent": work, "condition": decide}
    worker = Worker(database, handlers, name="worker-2.eu-west")
    running = asyncio.create_task(worker.run(once=True))
    with database.session(autocommit=True) as session:
        while RunRepository(session).nodes(run_id)[4].retry_count == 0:  # noqa: ASYNC110 - for a picture
            await asyncio.sleep(0.02)
    picture = await asyncio.to_thread(terminal, database, run_id)
    await running
    await database.adispose()
    return picture


def main() -> None:
    """Write ``watch.svg`` and ``report.png``."""
    program = browser.find()
    if program is None:
        sys.exit(f"no browser is installed: none of {', '.join(browser.NAMES)} is in the path")
    with servers.start() as server, tempfile.TemporaryDirectory() as temporary:
        url = server.database_url(server.create())
        with Database(url) as database:
            database.upgrade()
            run_id = store(database)
            (FOLDER / "watch.svg").write_text(asyncio.run(execute(database, run_id)), encoding="utf-8")
        page = Path(temporary) / "report.html"
        succeed("runs", "report", str(run_id), "-o", str(page), url=url)
        with browser.start(program, Path(temporary) / "profile") as window:
            window.open(page, WIDTH, 900)
            end = window.evaluate("document.querySelector('#timeline').getBoundingClientRect().bottom + 16")
            window.screenshot(FOLDER / "report.png", WIDTH, end)


if __name__ == "__main__":
    main()
