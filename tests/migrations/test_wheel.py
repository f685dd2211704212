"""The wheel alone, in an environment of its own, far from the checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.migrations.test_alembic import catalog

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from pathlib import Path
from gathering_pipeline import Database, migrations
assert Path(migrations.scripts()).is_relative_to(sys.prefix), migrations.scripts()
with Database(sys.argv[1]) as database:
    database.upgrade()
    database.check()
    migrations.downgrade(database.engine, "007_pipeline_execution")
    database.upgrade()
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run(
        [*pip, "--python", str(python), "install", "-c", str(ROOT / "constraints.txt"), str(wheel)], check=True
    )
    return python


def test_who_installs_the_wheel_can_migrate(
    python: Path, empty_database_url: str, database_url: str, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GATHERING"))}
    subprocess.run([python, "-c", PROGRAM, empty_database_url], cwd=tmp_path, env=environment, check=True)
    assert catalog(empty_database_url) == catalog(database_url)
