"""Each revision up, down and up again."""

import subprocess
import sys

from pytest_alembic.plugin.fixtures import alembic_runner  # noqa: F401 - a fixture

from gathering_pipeline import migrations
from tests.support.databases import Connect
from tests.support.schema import ROOT, catalog, revisions


def test_alembic_check_after_upgrade_finds_nothing(empty_database_url: str) -> None:
    def alembic(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "alembic", *arguments],
            cwd=ROOT,
            env={"GATHERING_DATABASE_URL": empty_database_url, "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    alembic("upgrade", "head")
    assert "No new upgrade operations detected" in alembic("check")


def test_revisions_begin_with_the_specified_ones() -> None:
    assert revisions()[:2] == ["006_pipelines", "007_pipeline_execution"]


def test_each_revision_down_and_up_restores_the_catalog(
    empty_database_url: str, catalogs: dict[str, list[str]]
) -> None:
    below = "base"
    for revision in revisions():
        migrations.upgrade(empty_database_url, revision)
        assert catalog(empty_database_url) == catalogs[revision]
        migrations.downgrade(empty_database_url, below)
        assert catalog(empty_database_url) == catalogs[below], f"after the downgrade of {revision}"
        migrations.upgrade(empty_database_url, revision)
        assert catalog(empty_database_url) == catalogs[revision], f"after {revision} came back"
        below = revision


def test_head_down_to_each_revision_restores_the_catalog(
    empty_database_url: str, catalogs: dict[str, list[str]]
) -> None:
    head = revisions()[-1]
    migrations.upgrade(empty_database_url)
    migrations.downgrade(empty_database_url, "base")
    assert catalog(empty_database_url) == catalogs["base"]
    for revision in reversed(["base", *revisions()[:-1]]):
        migrations.upgrade(empty_database_url)
        assert catalog(empty_database_url) == catalogs[head]
        migrations.downgrade(empty_database_url, revision)
        assert catalog(empty_database_url) == catalogs[revision], f"after the downgrade from head to {revision}"
        migrations.downgrade(empty_database_url, "base")


def test_downgrade_to_007_keeps_rows(database_url: str, connect: Connect) -> None:
    raw = connect(database_url)
    raw.execute(
        """INSERT INTO circle.pipelines (name, status, nodes) VALUES ('p', 'active', '[{"id":"a","type":"trigger","name":"A"}]');
        SELECT circle.create_run(1, '{}', NULL); SELECT circle.start_run(1, NULL)"""
    )
    query = "SELECT (SELECT count(*) FROM circle.pipelines), r.status, n.status, n.node_id, n.node_type "
    query += "FROM circle.pipeline_runs r JOIN circle.pipeline_node_runs n ON n.run_id = r.id"
    before = raw.execute(query).fetchall()
    migrations.downgrade(database_url, "007_pipeline_execution")
    assert raw.execute(query).fetchall() == before == [(1, "running", "pending", "a", "trigger")]
    migrations.upgrade(database_url)
    assert raw.execute(query).fetchall() == before
    # no version: the run was begun before the upgrade compiled one
    assert raw.execute("SELECT pipeline_version FROM circle.pipeline_runs").fetchall() == [(None,)]
