"""The command ``alembic``."""

import io
import subprocess
from pathlib import Path

import pytest
from alembic import command

from gathering_pipeline import migrations
from gathering_pipeline.database import Database
from gathering_pipeline.errors import (
    AdoptionError,
    DatabaseUnavailableError,
)
from tests.support import servers
from tests.support.databases import Connect
from tests.support.revisions import run_alembic

pytestmark = pytest.mark.once


def test_alembic_upgrade_and_downgrade_succeed(empty_database_url: str) -> None:
    options = ["-x", "lock_timeout=1s", "-x", "yield=true", "-x", "patience=7.5"]
    run_alembic(empty_database_url, *options, "upgrade", "head").check_returncode()
    current = run_alembic(empty_database_url, "current")
    assert (current.returncode, current.stdout.strip()) == (0, f"{migrations.head()} (head)")


@pytest.mark.parametrize("what", ["other tables", "no server"])
def test_alembic_error_is_one_sentence(empty_database_url: str, connect: Connect, what: str) -> None:
    url = empty_database_url if what == "other tables" else "postgresql://nobody@127.0.0.1:1/none"
    connect(empty_database_url).execute("CREATE SCHEMA circle; CREATE TABLE circle.pipelines (id serial PRIMARY KEY)")
    done = run_alembic(url, "upgrade", "head")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr + done.stdout
    assert ("existing tables can't be adopted:\n  - pipelines" if what == "other tables" else "no answer from") in (
        done.stderr + done.stdout
    )


def test_alembic_sql_prints_runnable_script(empty_database_url: str, connect: Connect, tmp_path: Path) -> None:
    """As ``psql -v ON_ERROR_STOP=1`` runs it: statement by statement."""
    output = io.StringIO()
    config = migrations.config()
    config.output_buffer = output
    command.upgrade(config, "head", sql=True)
    script = tmp_path / "upgrade.sql"
    script.write_text(output.getvalue())
    options = ["-v", "ON_ERROR_STOP=1", "-f", str(script)]
    subprocess.run([*servers.psql(empty_database_url), *options], check=True, capture_output=True)
    with Database(empty_database_url) as database:
        database.check()


def test_alembic_relative_downgrade_counts_once(database_url: str, connect: Connect) -> None:
    raw = connect(database_url)
    raw.execute("""
        CREATE SEQUENCE circle.tried;
        CREATE FUNCTION circle.busy() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF NEW.version_num = '009_events' AND nextval('circle.tried') = 1 THEN
                RAISE EXCEPTION 'not free' USING ERRCODE = 'lock_not_available';
            END IF;
            RETURN NEW;
        END $$;
        CREATE TRIGGER busy BEFORE UPDATE ON circle.alembic_version FOR EACH ROW EXECUTE FUNCTION circle.busy()""")
    with pytest.raises(DatabaseUnavailableError, match="at 010_graph now: .*; name the revision instead of a number"):
        migrations.downgrade(database_url, "-2")
    assert raw.execute("SELECT version_num FROM circle.alembic_version").fetchall() == [("010_graph",)]
    migrations.downgrade(database_url, "009_events")
    assert raw.execute("SELECT version_num FROM circle.alembic_version").fetchall() == [("009_events",)]


@pytest.mark.parametrize("revision", ["base", "-1"])
def test_alembic_downgrade_without_revision_row_raises(database_url: str, connect: Connect, revision: str) -> None:
    connect(database_url).execute("DELETE FROM circle.alembic_version")
    with pytest.raises(AdoptionError, match="the row with its revision is missing"):
        migrations.downgrade(database_url, revision)
