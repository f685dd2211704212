"""The wheel alone, in an environment of its own, far from the checkout."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gathering_pipeline import migrations
from tests.support.graphs import values
from tests.support.schema import catalog, run_psql

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

    def run(*words: str) -> str:
        command = [str(python.with_name("gathering-pipeline")), *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    at_head = f"the schema is at revision {migrations.head()}\n"
    assert run("db", "upgrade") == at_head
    assert run("db", "doctor") == "no problems found\n"
    assert "0 steps to" in run("db", "preflight")
    assert run("db", "sql") == migrations.script()
    (tmp_path / "p.json").write_text(json.dumps(values(status="active")), encoding="utf-8")
    assert run("import", "p.json") == "created 1: p (active)\n"
    run_psql(empty_database_url, "SELECT circle.create_run(1, '{}')")
    assert run("runs", "report", "1", "-o", "report.html") == "report.html\n"
    assert catalog(empty_database_url) == catalog(database_url)


def test_package_in_a_zip_says_that_it_has_to_be_installed(tmp_path: Path) -> None:
    archive = tmp_path / "package.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for folder, name in (
            (ROOT / "gathering_pipeline", "gathering_pipeline"),
            (ROOT / "alembic", "gathering_pipeline/_alembic"),
        ):
            for path in folder.rglob("*.*"):
                file.write(path, Path(name) / path.relative_to(folder))
    program = """
import gathering_pipeline
from gathering_pipeline import Database, migrations
assert "package.zip" in gathering_pipeline.__file__
for call in (migrations.head, migrations.script, Database("postgresql://localhost:1/x").upgrade):
    try:
        call()
    except gathering_pipeline.ConfigurationError as error:
        print(error)
    except gathering_pipeline.DatabaseUnavailableError:
        print("connects first")
"""
    environment = os.environ | {"PYTHONPATH": str(archive)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    sentence = (
        f"the revisions can't be read from {archive}/gathering_pipeline: install the package into a folder, by pip"
    )
    assert done.stdout.splitlines() == [sentence] * 3
