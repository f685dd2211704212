"""Migrators and servers that are killed in every step of every revision, up and down; then the migration is run again.

A process is forked that ends itself, or the server, with SIGKILL while it is in a step. What is left behind has to lead to
the same catalog as an undisturbed migration. The short form kills in four steps, taken at random, and with
``GATHERING_ROUNDS`` (``make reliability``) in every one; tests/migrations/test_interrupted_steps.py always interrupts each.
"""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import psutil

from gathering_pipeline import embedded, migrations, migrator
from tests.support import servers
from tests.support.adoption import GATHERING, INDEXES, ROWS
from tests.support.schema import catalog, revisions

ROOT = Path(__file__).parents[2]
LONG = "GATHERING_ROUNDS" in os.environ


class Bomb(logging.Handler):
    """Kills a few milliseconds after the n-th step began: in it, between its commit and the next one, or after it."""

    def __init__(self, at: int, kill: Callable[[], None]) -> None:
        super().__init__(logging.DEBUG)
        self.left = at
        self.kill = kill

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == "step: %s":
            self.left -= 1
            if self.left == 0:
                threading.Timer(random.uniform(0, 0.002), self.kill).start()


def migrate(url: str, target: str, direction: str) -> None:
    (migrations.downgrade if direction == "downgrade" else migrations.upgrade)(url, target)


def migrate_and_die(url: str, target: str, direction: str, at: int, postmaster: int | None) -> None:
    """In a process of its own."""

    def kill() -> None:
        if postmaster is not None:
            server = psutil.Process(postmaster)
            for process in [server, *server.children()]:
                process.kill()
        os.kill(os.getpid(), signal.SIGKILL)

    logger = logging.getLogger("alembic.gathering_pipeline")
    logger.addHandler(Bomb(at, kill))
    logger.setLevel(logging.DEBUG)
    migrate(url, target, direction)
    time.sleep(10)  # what was left to do after that step was done before the bomb went off


def die_in_every_step(url: str, start: str, target: str, direction: str, steps: int, data_dir: str) -> None:
    """The program: fork a migrator for each step to be killed in, and then let one complete."""
    running = embedded.start(Path(data_dir)) if data_dir else None
    postmaster, server = None, []
    for at in range(1, steps + 1) if LONG else [random.randint(1, steps)]:
        with servers.connect(url) as raw:
            if running is not None:
                (folder,) = raw.execute("SHOW data_directory").fetchone() or ("",)
                postmaster = int((Path(folder) / "postmaster.pid").read_text().split()[0])
                server = [psutil.Process(postmaster), *psutil.Process(postmaster).children()]
            found = raw.execute("SELECT to_regclass('circle.alembic_version')").fetchone()
            if found != (None,):
                found = raw.execute("SELECT max(version_num) FROM circle.alembic_version").fetchone()
        if found == (None if target == "base" else target,):
            # the one before had come through when it was killed; at base, where there is no version, go on in any case
            migrate(url, start, "upgrade" if direction == "downgrade" else "downgrade")
        child = os.fork()
        if child == 0:
            try:
                migrate_and_die(url, target, direction, at, postmaster)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if running is None:
            assert status == -signal.SIGKILL, f"in step {at}"
        else:  # the migrator may still have seen that its server is gone
            _, alive = psutil.wait_procs(server, timeout=30)
            assert alive == [], f"in step {at}"
            embedded.start(running.data_dir)
    migrate(url, target, direction)


def killed(url: str, start: str, target: str, direction: str, data_dir: str) -> None:
    revision = target if direction == "upgrade" else start
    steps = len(migrator.steps(revision, direction))
    assert steps > 0
    code = "import sys; from tests.reliability.test_migration_kills import die_in_every_step as program; "
    code += "program(*sys.argv[1:5], int(sys.argv[5]), sys.argv[6])"
    done = subprocess.run(
        [sys.executable, "-c", code, url, start, target, direction, str(steps), data_dir],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def through_every_step(url: str, clean: dict[str, list[str]], data_dir: str = "") -> None:
    with servers.connect(url) as raw:
        raw.execute(GATHERING + INDEXES + ROWS)
    path = ["base", *revisions()]
    moves = [(*move, "upgrade") for move in pairwise(path)] + [
        (*move, "downgrade") for move in pairwise(reversed(path))
    ]
    fatal = moves if LONG else random.sample(moves, 4)
    for start, target, direction in moves:
        if (start, target, direction) in fatal:
            killed(url, start, target, direction, data_dir)
        else:
            migrate(url, target, direction)
        assert catalog(url) == clean[target], f"{direction} from {start}"
    migrations.upgrade(url)
    assert catalog(url) == clean[path[-1]]
    with servers.connect(url) as raw:
        statuses = raw.execute("SELECT id, status FROM circle.pipeline_runs ORDER BY id").fetchall()
    assert statuses == [(1, "completed"), (2, "failed"), (3, "running")]


def clean_catalogs(url: str) -> dict[str, list[str]]:
    """Of a database whose tables were adopted, at each revision."""
    with servers.connect(url) as raw:
        raw.execute(GATHERING + INDEXES + ROWS)
    found = {"base": catalog(url)}
    for one in revisions():
        migrations.upgrade(url, one)
        found[one] = catalog(url)
    return found


def test_killed_migrator_can_be_run_again(server: servers.Server) -> None:
    names = [server.create(), server.create()]
    clean, used = map(server.database_url, names)
    try:
        through_every_step(used, clean_catalogs(clean))
    finally:
        for name in names:
            server.drop(name)


def test_killed_server_leaves_a_migration_that_resumes() -> None:
    """Each time all of the server at once; an embedded one, with data of its own, whichever the other tests have."""
    folder = Path(tempfile.mkdtemp(prefix="gathering-kills-"))
    running = embedded.start(folder / "data")
    try:
        server = servers.Server("embedded", running.url)
        clean, used = (server.database_url(server.create()) for _ in range(2))
        through_every_step(used, clean_catalogs(clean), str(running.data_dir))
    finally:
        running.stop()
        shutil.rmtree(folder, ignore_errors=True)
