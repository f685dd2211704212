"""Tables that GatheRing uses already: adopted, or refused with every difference; taken back."""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

import psycopg
import pytest
from alembic import command
from sqlalchemy.exc import DBAPIError

from gathering_pipeline import (
    AdoptionError,
    Database,
    PipelineRepository,
    RunRepository,
    migrations,
)
from tests.support.adoption import BY_HAND, FIVE, GATHERING, by_hand, revision, rows_of_006, without
from tests.support.databases import Connect
from tests.support.schema import catalog, constraints, revisions, run_psql, script


def test_upgrade_tables_in_use_adopts_them_with_rows(url: str, used: psycopg.Connection, database_url: str) -> None:
    before = rows_of_006(used)
    migrations.upgrade(url)
    assert rows_of_006(used) == before
    assert catalog(url) == without(catalog(database_url), "comment")
    command.check(migrations.config(url))
    with Database(url) as database, database.session() as session:
        assert [pipeline.name for pipeline in PipelineRepository(session).search().items] == ["two", "one"]
        runs = RunRepository(session)
        assert runs.finish(3).status == "completed"  # begun before the migration
        assert runs.create(1).pipeline_version == 1


def test_upgrade_without_indexes_creates_them(url: str, connect: Connect, database_url: str) -> None:
    connect(url).execute(GATHERING)
    migrations.upgrade(url)
    assert catalog(url) == without(catalog(database_url), "comment")


def test_upgrade_leaves_additional_objects_alone(url: str, used: psycopg.Connection) -> None:
    used.execute(
        """ALTER TABLE circle.pipelines ADD COLUMN owner text, ADD COLUMN team int NOT NULL DEFAULT 1;
        CREATE TABLE circle.agents (id serial PRIMARY KEY, pipeline_id int REFERENCES circle.pipelines (id));
        CREATE INDEX additional ON circle.pipeline_runs (created_at);
        COMMENT ON TABLE circle.pipeline_runs IS 'additional'"""
    )
    before = catalog(url)
    migrations.upgrade(url)
    facts = (
        "comment | table",
        "index | circle.additional",
        "relation | agents ",
        "column | pipelines.owner",
        "column | pipelines.team",
    )
    kept = [line for line in before if line.startswith(facts)]
    assert len(kept) == len(facts)
    assert set(kept) <= set(catalog(url))
    migrations.downgrade(url, "base")
    assert catalog(url) == before


@pytest.mark.parametrize(
    "statuses",
    [(*FIVE, "timeout"), ("timeout", *FIVE), (*FIVE[:3], "timeout", *FIVE[3:])],
    ids=["last", "first", "between"],
)
def test_upgrade_after_007_by_hand_adopts(
    url: str, used: psycopg.Connection, database_url: str, statuses: tuple[str, ...]
) -> None:
    used.execute(by_hand(*statuses))
    used.execute(by_hand(*statuses))
    used.execute(
        """UPDATE circle.pipelines SET timeout_seconds = 60 WHERE id = 1;
        UPDATE circle.pipeline_runs SET status = 'timeout', completed_at = now(), error_message = 'late' WHERE id = 3;
        INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, status, completed_at, output_data)
        VALUES (1, 't', 'trigger', 'completed', now(), '{"a": 1}')"""
    )
    check = constraints(url)["pipeline_runs_status_check"]
    before = rows_of_006(used)
    migrations.upgrade(url)
    assert rows_of_006(used) == before
    query = "SELECT timeout_seconds, output_data FROM circle.pipelines p, circle.pipeline_node_runs WHERE p.id = 1"
    assert used.execute(query).fetchall() == [(60, {"a": 1})]
    the_check = "constraint | circle.pipeline_runs.pipeline_runs_status_check"
    assert without(catalog(url), the_check) == without(catalog(database_url), "comment", the_check)
    assert constraints(url)["pipeline_runs_status_check"] == check
    command.check(migrations.config(url))


def test_apply_007_by_hand_after_upgrade_changes_nothing(url: str, used: psycopg.Connection) -> None:
    migrations.upgrade(url, "007_pipeline_execution")
    before = catalog(url)
    used.execute(BY_HAND)
    assert catalog(url) == before
    migrations.upgrade(url)
    command.check(migrations.config(url))


def test_upgrade_after_partial_007_by_hand_completes_it(url: str, used: psycopg.Connection, database_url: str) -> None:
    used.execute(BY_HAND.partition("CREATE TABLE")[0])
    used.execute("ALTER TABLE circle.pipelines DROP COLUMN retry_backoff_max")
    migrations.upgrade(url)
    assert {line.split(" | ", 2)[1] for line in catalog(url)} >= {"pipelines.retry_backoff_max", "pipeline_node_runs"}
    command.check(migrations.config(url))


def test_script_on_tables_in_use_adopts_them(
    url: str, used: psycopg.Connection, adopted_catalogs: dict[str, list[str]]
) -> None:
    before = rows_of_006(used)
    run_psql(url, script("head"))
    assert catalog(url) == adopted_catalogs[revisions()[-1]]
    assert rows_of_006(used) == before


DIFFERENT = {
    "a column is missing": (
        "ALTER TABLE circle.pipeline_runs DROP COLUMN current_node",
        ["pipeline_runs.current_node: column is missing (character varying(100) expected)"],
    ),
    "another type": (
        "ALTER TABLE circle.pipelines ALTER COLUMN name TYPE text",
        ["pipelines.name: type is text, character varying(255) expected"],
    ),
    "another length": (
        "ALTER TABLE circle.pipeline_runs ALTER COLUMN current_node TYPE varchar(50)",
        ["pipeline_runs.current_node: type is character varying(50), character varying(100) expected"],
    ),
    "time without a zone": (
        "ALTER TABLE circle.pipelines ALTER COLUMN last_run TYPE timestamp",
        ["pipelines.last_run: type is timestamp without time zone, timestamp with time zone expected"],
    ),
    "json that is text": (
        "ALTER TABLE circle.pipelines ALTER nodes DROP DEFAULT, ALTER COLUMN nodes TYPE json",
        ["pipelines.nodes: type is json, jsonb expected"],
    ),
    "a column of 007 with another type": (
        "ALTER TABLE circle.pipelines ADD COLUMN timeout_seconds text",
        ["pipelines.timeout_seconds: type is text, integer expected"],
    ),
    "null where it must not be": (
        "ALTER TABLE circle.pipeline_runs ALTER COLUMN pipeline_id DROP NOT NULL",
        ["pipeline_runs.pipeline_id: NULL is allowed, NOT NULL expected"],
    ),
    "a further column that writers must fill": (
        (
            "ALTER TABLE circle.pipelines ADD COLUMN owner text; UPDATE circle.pipelines SET owner = 'me';"
            "ALTER TABLE circle.pipelines ALTER COLUMN owner SET NOT NULL"
        ),
        ["pipelines.owner: unknown column is NOT NULL and has no default"],
    ),
    "a check with another value": (
        (
            "ALTER TABLE circle.pipelines DROP CONSTRAINT pipelines_status_check,"
            " ADD CONSTRAINT pipelines_status_check CHECK (status IN ('active', 'paused', 'draft', 'archived'))"
        ),
        ["pipelines.status: CHECK pipelines_status_check is CHECK", "archived", "active, draft, paused expected"],
    ),
    "a check with a value less": (
        (
            "DELETE FROM circle.pipeline_runs; "
            "ALTER TABLE circle.pipeline_runs DROP CONSTRAINT pipeline_runs_status_check,"
            " ADD CONSTRAINT pipeline_runs_status_check CHECK (status IN ('pending', 'running', 'completed', 'failed'))"
        ),
        ["pipeline_runs.status: CHECK pipeline_runs_status_check is CHECK"],
    ),
    "a check that says the opposite": (
        (
            "DELETE FROM circle.pipelines; ALTER TABLE circle.pipelines DROP CONSTRAINT pipelines_status_check,"
            " ADD CONSTRAINT pipelines_status_check CHECK (status NOT IN ('active', 'paused', 'draft'))"
        ),
        ["pipelines.status: CHECK pipelines_status_check is CHECK"],
    ),
    "no check": (
        "ALTER TABLE circle.pipelines DROP CONSTRAINT pipelines_status_check",
        ["pipelines.status: CHECK pipelines_status_check is missing"],
    ),
    "no foreign key": (
        "ALTER TABLE circle.pipeline_runs DROP CONSTRAINT pipeline_runs_pipeline_id_fkey",
        ["pipeline_runs.pipeline_id: FOREIGN KEY to pipelines ON DELETE CASCADE is missing"],
    ),
    "a foreign key that keeps runs": (
        (
            "ALTER TABLE circle.pipeline_runs DROP CONSTRAINT pipeline_runs_pipeline_id_fkey,"
            " ADD FOREIGN KEY (pipeline_id) REFERENCES circle.pipelines (id)"
        ),
        ["pipeline_runs.pipeline_id: FOREIGN KEY to pipelines ON DELETE CASCADE is missing"],
    ),
    "no primary key": (
        "ALTER TABLE circle.pipeline_runs DROP CONSTRAINT pipeline_runs_pkey",
        ["pipeline_runs: PRIMARY KEY (id) is missing"],
    ),
    "node runs of another program": (
        "CREATE TABLE circle.pipeline_node_runs (id serial PRIMARY KEY, node text)",
        ["pipeline_node_runs.run_id: column is missing (integer expected)", "pipeline_node_runs.node_id"],
    ),
    "a view": (
        "ALTER TABLE circle.pipeline_runs RENAME TO old;CREATE VIEW circle.pipeline_runs AS SELECT * FROM circle.old",
        ["pipeline_runs: is not an ordinary table"],
    ),
    "everything at once": (
        (
            "ALTER TABLE circle.pipelines DROP COLUMN edges, ALTER COLUMN description TYPE varchar(9);"
            "ALTER TABLE circle.pipeline_runs DROP CONSTRAINT pipeline_runs_status_check"
        ),
        [
            "pipelines.edges: column is missing (jsonb expected)",
            "pipelines.description: type is character varying(9), text expected",
            "pipeline_runs.status: CHECK pipeline_runs_status_check is missing",
        ],
    ),
}


@pytest.mark.parametrize("change", DIFFERENT)
def test_upgrade_different_tables_raises_adoption_error(url: str, used: psycopg.Connection, change: str) -> None:
    statement, expected = DIFFERENT[change]
    used.execute(statement)
    before = catalog(url)
    with pytest.raises(AdoptionError) as refused:
        migrations.upgrade(url)
    for sentence in expected:
        assert any(sentence in difference for difference in refused.value.differences), refused.value.differences
        assert sentence in str(refused.value)
    if "at once" in change:
        assert len(refused.value.differences) == len(expected)
    assert isinstance(refused.value.__cause__, DBAPIError)
    assert catalog(url) == before
    assert revision(used) is None


def test_upgrade_with_name_taken_by_other_object_raises(url: str, connect: Connect) -> None:
    connect(url).execute("CREATE SCHEMA circle; CREATE SEQUENCE circle.pipelines")
    before = catalog(url)
    with pytest.raises(AdoptionError, match="pipelines: is not an ordinary table"):
        migrations.upgrade(url)
    assert catalog(url) == before


def test_downgrade_to_base_keeps_adopted_tables(url: str, used: psycopg.Connection) -> None:
    catalog_before, rows = catalog(url), rows_of_006(used)
    migrations.upgrade(url)
    migrations.downgrade(url, "base")
    assert catalog(url) == catalog_before
    assert rows_of_006(used) == rows


def test_downgrade_to_base_drops_created_tables(url: str, connect: Connect) -> None:
    raw = connect(url)
    raw.execute(GATHERING + "DROP TABLE circle.pipeline_runs; INSERT INTO circle.pipelines (name) VALUES ('mine')")
    before = catalog(url)
    migrations.upgrade(url)
    migrations.downgrade(url, "006_pipelines")
    assert raw.execute("SELECT to_regclass('circle.pipeline_runs')").fetchone() != (None,)
    migrations.downgrade(url, "base")
    assert without(catalog(url), "index | circle.idx_pipelines_status", "relation | idx_") == before
    assert raw.execute("SELECT name FROM circle.pipelines").fetchall() == [("mine",)]


def test_downgrade_to_006_turns_timeout_into_failed(url: str, used: psycopg.Connection) -> None:
    migrations.upgrade(url)
    used.execute(
        """INSERT INTO circle.pipeline_runs (pipeline_id, status) SELECT 1, 'running' FROM generate_series(1, 3);
        UPDATE circle.pipeline_runs SET status = 'timeout', error_message = 'timed out after 60 seconds' WHERE id = 4;
        UPDATE circle.pipeline_runs SET status = 'timeout' WHERE id = 5"""
    )
    query = "SELECT id, status, error_message, completed_at FROM circle.pipeline_runs ORDER BY id"
    before = used.execute(query).fetchall()
    assert [row[1] for row in before] == ["completed", "failed", "running", "timeout", "timeout", "running"]
    migrations.downgrade(url, "006_pipelines")
    after = used.execute(query).fetchall()
    assert after == [(id_, "failed" if status == "timeout" else status, *rest) for id_, status, *rest in before]
    assert constraints(url)["pipeline_runs_status_check"].count("'") == 2 * len(FIVE)
    with pytest.raises(psycopg.errors.CheckViolation):
        used.execute("UPDATE circle.pipeline_runs SET status = 'timeout' WHERE id = 6")


def test_downgrade_with_reordered_check_turns_timeout_into_failed(url: str, used: psycopg.Connection) -> None:
    before = catalog(url)
    used.execute(by_hand("pending", "timeout", "running", "completed", "failed", "cancelled"))
    used.execute("UPDATE circle.pipeline_runs SET status = 'timeout', completed_at = now() WHERE id = 3")
    migrations.upgrade(url)
    migrations.downgrade(url, "base")
    assert catalog(url) == before
    assert used.execute("SELECT status FROM circle.pipeline_runs WHERE id = 3").fetchone() == ("failed",)
