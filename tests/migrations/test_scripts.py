"""``upgrade --sql`` and ``downgrade --sql``: scripts for a DBA."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pytest_alembic.plugin.fixtures import alembic_runner  # noqa: F401 - a fixture

from gathering_pipeline import migrations
from gathering_pipeline.errors import WITHDRAWN_REVISIONS
from tests.support.databases import Connect
from tests.support.schema import ROOT, catalog, revisions, run_psql, script


def test_script_to_head_gives_the_catalog_of_upgrade(
    empty_database_url: str, catalogs: dict[str, list[str]], connect: Connect
) -> None:
    head = revisions()[-1]
    run_psql(empty_database_url, script("head"))
    assert catalog(empty_database_url) == catalogs[head]
    raw = connect(empty_database_url)
    before = raw.execute("SELECT oid, xmin FROM pg_proc ORDER BY oid").fetchall()
    run_psql(empty_database_url, script("head"))  # there is nothing left to do, and it leaves all as it is
    assert raw.execute("SELECT oid, xmin FROM pg_proc ORDER BY oid").fetchall() == before
    assert raw.execute("SELECT version_num FROM circle.alembic_version").fetchall() == [(head,)]
    run_psql(empty_database_url, script(f"{head}:base", down=True))
    assert catalog(empty_database_url) == catalogs["base"]
    run_psql(empty_database_url, script("head"))
    assert catalog(empty_database_url) == catalogs[head]


@pytest.mark.parametrize("revision", [*sorted(WITHDRAWN_REVISIONS), "099_future"])
def test_script_at_an_unknown_revision_is_refused(database_url: str, connect: Connect, revision: str) -> None:
    raw = connect(database_url)
    raw.execute("UPDATE circle.alembic_version SET version_num = %s", [revision])
    before = catalog(database_url)
    for sql in (script("head"), script("head:base", down=True)):
        with pytest.raises(
            AssertionError, match=f"the schema is at revision {revision}, which this script does not know"
        ):
            run_psql(database_url, sql)
    assert catalog(database_url) == before


def test_script_of_each_revision_gives_its_catalog(
    empty_database_url: str, catalogs: dict[str, list[str]], connect: Connect
) -> None:
    below = "base"
    for revision in revisions():
        up = script(revision if below == "base" else f"{below}:{revision}")
        run_psql(empty_database_url, up)
        assert catalog(empty_database_url) == catalogs[revision]
        run_psql(empty_database_url, script(f"{revision}:{below}", down=True))
        assert catalog(empty_database_url) == catalogs[below], f"after the downgrade of {revision}"
        run_psql(empty_database_url, up)
        assert catalog(empty_database_url) == catalogs[revision]
        below = revision


@pytest.mark.parametrize("sound", [True, False])
def test_squawk_on_script_finds_nothing(tmp_path: Path, sound: bool) -> None:
    """Nothing that .squawk.toml doesn't answer; and it does find something in a script that has it."""
    path = tmp_path / "upgrade.sql"
    path.write_text(script("head") + ("" if sound else "CREATE INDEX idx ON circle.pipelines (name);\n"))
    program = shutil.which("squawk", path=str(Path(sys.executable).parent))
    assert program is not None
    done = subprocess.run([program, "--reporter", "gcc", path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if sound else 1), done.stdout
    assert ("require-concurrent-index-creation" in done.stdout) is not sound


def test_script_interrupted_and_rerun_completes(empty_database_url: str, catalogs: dict[str, list[str]]) -> None:
    head = revisions()[-1]
    for sql, end in ((script("head"), head), (script(f"{head}:base", down=True), "base")):
        for part in (0.3, 0.6, 0.9):
            end_of_a_step = sql.index("\nCOMMIT;\n", int(len(sql) * part))
            begun = sql[:end_of_a_step]
            is_inside = begun.count("\n\\if ") > begun.count("\n\\endif")  # a revision, or Alembic's own statements
            run_psql(empty_database_url, begun + "\nROLLBACK;\n" + "\\endif\n" * is_inside)
        run_psql(empty_database_url, sql)
        assert catalog(empty_database_url) == catalogs[end]


def test_script_without_lock_stops_and_rerun_completes(
    empty_database_url: str, catalogs: dict[str, list[str]], connect: Connect
) -> None:
    migrations.upgrade(empty_database_url, "007_pipeline_execution")
    reader = connect(empty_database_url)
    with reader.transaction():
        reader.execute("SELECT FROM circle.pipeline_runs")
        with pytest.raises(AssertionError, match="canceling statement due to lock timeout"):
            run_psql(empty_database_url, script("head"))
    run_psql(empty_database_url, script("head"))
    assert catalog(empty_database_url) == catalogs[revisions()[-1]]


def test_script_stops_at_first_error(empty_database_url: str, connect: Connect) -> None:
    raw = connect(empty_database_url)
    raw.execute("CREATE SCHEMA circle; CREATE TABLE circle.pipelines (id serial PRIMARY KEY, name text)")
    with pytest.raises(AssertionError, match="differ from the expected ones; nothing was changed"):
        run_psql(empty_database_url, script("head"))
    assert raw.execute("SELECT to_regclass('circle.pipeline_runs')").fetchone() == (None,)
