"""The wheel alone, in an environment of its own, far from the checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gathering_pipeline import migrations
from tests.support.schema import catalog

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from pathlib import Path
from gathering_pipeline import Database, migrations, migrator
assert Path(migrator.scripts()).is_relative_to(sys.prefix), migrator.scripts()
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
        [
            *pip,
            "--python",
            str(python),
            "install",
            "--no-compile",
            "-c",
            str(ROOT / "constraints.txt"),
            f"{wheel}[cli]",
        ],
        check=True,
    )
    return python


def test_wheel_alone_migrates(python: Path, empty_database_url: str, database_url: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GATHERING"))}
    subprocess.run([python, "-c", PROGRAM, empty_database_url], cwd=tmp_path, env=environment, check=True)
    assert catalog(empty_database_url) == catalog(database_url)


def test_wheel_alone_has_the_command(python: Path, empty_database_url: str, database_url: str, tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "DATABASE_URL": empty_database_url}

    def db(*words: str) -> str:
        command = [str(python.with_name("gathering-pipeline")), "db", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    at_head = f"the schema is at revision {migrations.head()}\n"
    assert db("upgrade") == at_head
    assert db("doctor") == "no problems found\n"
    assert "0 steps to" in db("preflight")
    assert db("sql") == migrations.script()
    assert catalog(empty_database_url) == catalog(database_url)
