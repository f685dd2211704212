"""Revisions that a test writes, and the command ``alembic``."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


REVISION = """
from gathering_pipeline.migrator import run_steps
revision = "{name}"
down_revision = {down!r}
branch_labels = depends_on = None
def upgrade(): run_steps(revision, "upgrade")
def downgrade(): run_steps(revision, "downgrade")
"""


def run_alembic(url: str, *words: str) -> subprocess.CompletedProcess[str]:
    """The command, in the checkout."""
    return subprocess.run(
        [sys.executable, "-m", "alembic", *words],
        cwd=ROOT,
        env={"DATABASE_URL": url, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )


def write_revision(scripts: Path, name: str, down: str | None, *sql: str) -> None:
    (scripts / "versions" / f"{name}.py").write_text(REVISION.format(name=name, down=down))
    (scripts / "sql" / name).mkdir()
    for number, content in enumerate(sql, 1):
        (scripts / "sql" / name / f"{number}_file.sql").write_text(content)


BIG_TABLE = """
CREATE SCHEMA circle; CREATE TABLE circle.t (id int, filler text);
INSERT INTO circle.t SELECT n, repeat('x', 1000) FROM generate_series(1, 10000) n"""


INDEX = "CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_t ON circle.t (id);\n"


WAITS = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'CREATE INDEX CONCURRENTLY%'"


def wait_until(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.02)
