"""Databases that GatheRing uses already: taken over, refused with every difference, left alone; with their rows."""

# pyright: reportArgumentType=false, reportCallIssue=false
# psycopg wants literal SQL; this file puts some of its own together.

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from alembic import command
from psycopg.errors import Diagnostic
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from gathering_pipeline import (
    AdoptionError,
    Database,
    DatabaseUnavailableError,
    InvalidPipelineError,
    PipelineRepository,
    PipelineUpdate,
    RunRepository,
    migrations,
)
from tests.migrations.test_alembic import catalog, constraints, revisions, run_psql, script
from tests.servers import Server
from tests.servers import connect as open_connection

Connect = Callable[[str], psycopg.Connection]

# The tables as GatheRing's API creates them.
GATHERING = """
CREATE SCHEMA IF NOT EXISTS circle;
CREATE TABLE IF NOT EXISTS circle.pipelines (
    id SERIAL PRIMARY KEY,
    name VARCHAR(255) NOT NULL,
    description TEXT,
    status VARCHAR(50) DEFAULT 'draft' CHECK (status IN ('active', 'paused', 'draft')),
    nodes JSONB DEFAULT '[]',
    edges JSONB DEFAULT '[]',
    created_at TIMESTAMP WITH TIME ZONE DEFAULT CURRENT_TIMESTAMP,
    updated_at TIMESTAMP WITH TIME ZONE DEFAULT CURRENT_TIMESTAMP,
    last_run TIMESTAMP WITH TIME ZONE,
    run_count INTEGER DEFAULT 0,
    success_count INTEGER DEFAULT 0,
    error_count INTEGER DEFAULT 0
);
CREATE TABLE IF NOT EXISTS circle.pipeline_runs (
    id SERIAL PRIMARY KEY,
    pipeline_id INTEGER NOT NULL REFERENCES circle.pipelines(id) ON DELETE CASCADE,
    status VARCHAR(50) DEFAULT 'pending' CHECK (status IN ('pending', 'running', 'completed', 'failed', 'cancelled')),
    started_at TIMESTAMP WITH TIME ZONE,
    completed_at TIMESTAMP WITH TIME ZONE,
    current_node VARCHAR(100),
    logs JSONB DEFAULT '[]',
    trigger_data JSONB DEFAULT '{}',
    error_message TEXT,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT CURRENT_TIMESTAMP
);
"""
INDEXES = """
CREATE INDEX IF NOT EXISTS idx_pipelines_status ON circle.pipelines (status);
CREATE INDEX IF NOT EXISTS idx_pipeline_runs_pipeline_id ON circle.pipeline_runs (pipeline_id);
CREATE INDEX IF NOT EXISTS idx_pipeline_runs_status ON circle.pipeline_runs (status);
"""
GOOD_NODES = [{"id": "t", "type": "trigger", "name": "T"}, {"id": "d", "type": "delay", "name": "D"}]
GOOD_EDGES = [{"id": "e", "from": "t", "to": "d"}]
ROWS = f"""
INSERT INTO circle.pipelines (name, description, status, nodes, edges, run_count, last_run) VALUES
    ('one', 'first', 'active', '{json.dumps(GOOD_NODES)}', '{json.dumps(GOOD_EDGES)}', 2, '2025-06-01 12:00+00'),
    ('two', NULL, 'draft', '[]', '[]', 0, NULL);
INSERT INTO circle.pipeline_runs (pipeline_id, status, started_at, completed_at, logs, error_message) VALUES
    (1, 'completed', '2025-06-01 12:00+00', '2025-06-01 12:01+00', '[{{"m": 1}}]', NULL),
    (1, 'failed', '2025-06-01 13:00+00', '2025-06-01 13:00:07+00', '[]', 'boom'),
    (1, 'running', '2025-06-01 14:00+00', NULL, '[]', NULL);
"""


def by_hand(*statuses: str) -> str:
    """Migration 007 as plain SQL."""
    values = ", ".join(f"'{status}'" for status in statuses)
    return f"""
    ALTER TABLE circle.pipelines ADD COLUMN IF NOT EXISTS timeout_seconds INTEGER DEFAULT 3600;
    ALTER TABLE circle.pipelines ADD COLUMN IF NOT EXISTS max_retries_per_node INTEGER DEFAULT 3;
    ALTER TABLE circle.pipelines ADD COLUMN IF NOT EXISTS retry_backoff_base FLOAT DEFAULT 1.0;
    ALTER TABLE circle.pipelines ADD COLUMN IF NOT EXISTS retry_backoff_max FLOAT DEFAULT 60.0;
    ALTER TABLE circle.pipeline_runs DROP CONSTRAINT IF EXISTS pipeline_runs_status_check;
    ALTER TABLE circle.pipeline_runs ADD CONSTRAINT pipeline_runs_status_check CHECK (status IN ({values}));
    ALTER TABLE circle.pipeline_runs ADD COLUMN IF NOT EXISTS duration_seconds INTEGER DEFAULT 0;
    CREATE TABLE IF NOT EXISTS circle.pipeline_node_runs (
        id SERIAL PRIMARY KEY,
        run_id INTEGER NOT NULL REFERENCES circle.pipeline_runs(id) ON DELETE CASCADE,
        node_id VARCHAR(100) NOT NULL,
        node_type VARCHAR(50) NOT NULL,
        status VARCHAR(50) DEFAULT 'pending'
            CHECK (status IN ('pending', 'running', 'completed', 'failed', 'skipped', 'cancelled')),
        input_data JSONB DEFAULT '{{}}',
        output_data JSONB DEFAULT '{{}}',
        error_message TEXT,
        retry_count INTEGER DEFAULT 0,
        started_at TIMESTAMP WITH TIME ZONE,
        completed_at TIMESTAMP WITH TIME ZONE,
        duration_ms INTEGER DEFAULT 0
    );
    CREATE INDEX IF NOT EXISTS idx_pipeline_node_runs_run_id ON circle.pipeline_node_runs (run_id);
    CREATE INDEX IF NOT EXISTS idx_pipeline_node_runs_run_node ON circle.pipeline_node_runs (run_id, node_id);
    """


FIVE = ("pending", "running", "completed", "failed", "cancelled")
BY_HAND = by_hand(*FIVE, "timeout")
COLUMNS_OF_006 = {
    "pipelines": "id, name, description, status, nodes, edges, created_at, updated_at, last_run, run_count, "
    "success_count, error_count",
    "pipeline_runs": "id, pipeline_id, status, started_at, completed_at, current_node, logs, trigger_data, "
    "error_message, created_at",
}


def rows_of_006(raw: psycopg.Connection) -> list[Any]:
    return [
        raw.execute(f"SELECT {columns} FROM circle.{table} ORDER BY id").fetchall()
        for table, columns in COLUMNS_OF_006.items()
    ]


def without(lines: list[str], *prefixes: str) -> list[str]:
    return [line for line in lines if not line.startswith(prefixes)]


def revision(raw: psycopg.Connection) -> str | None:
    row = raw.execute("SELECT version_num FROM circle.alembic_version").fetchone()
    return None if row is None else row[0]


@pytest.fixture
def url(empty_database_url: str) -> str:
    return empty_database_url


@pytest.fixture
def used(url: str, connect: Connect) -> psycopg.Connection:
    """A connection to a database that GatheRing has used."""
    raw = connect(url)
    raw.execute(GATHERING + INDEXES + ROWS)
    return raw


@pytest.fixture(scope="module")
def catalogs(server: Server) -> Iterator[dict[str, list[str]]]:
    """The catalog at each revision of a database whose tables were adopted."""
    name = server.create()
    url = server.database_url(name)
    with open_connection(url) as raw:
        raw.execute(GATHERING + INDEXES + ROWS)
    found = {"base": catalog(url)}
    for one in revisions():
        migrations.upgrade(url, one)
        found[one] = catalog(url)
    yield found
    server.drop(name)


# --- adopted ---------------------------------------------------------------------------------------------------------


def test_tables_in_use_are_adopted_with_their_rows(url: str, used: psycopg.Connection, database_url: str) -> None:
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


def test_indexes_that_are_missing_are_made(url: str, connect: Connect, database_url: str) -> None:
    connect(url).execute(GATHERING)
    migrations.upgrade(url)
    assert catalog(url) == without(catalog(database_url), "comment")


def test_what_tables_have_besides_is_left_alone(url: str, used: psycopg.Connection) -> None:
    used.execute(
        """ALTER TABLE circle.pipelines ADD COLUMN owner text, ADD COLUMN team int NOT NULL DEFAULT 1;
        CREATE TABLE circle.agents (id serial PRIMARY KEY, pipeline_id int REFERENCES circle.pipelines (id));
        CREATE INDEX ours ON circle.pipeline_runs (created_at);
        COMMENT ON TABLE circle.pipeline_runs IS 'ours'"""
    )
    before = catalog(url)
    migrations.upgrade(url)
    facts = (
        "comment | table",
        "index | circle.ours",
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
def test_007_applied_by_hand_does_no_harm(
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


def test_007_applied_by_hand_again_afterwards_does_no_harm_either(url: str, used: psycopg.Connection) -> None:
    migrations.upgrade(url, "007_pipeline_execution")
    before = catalog(url)
    used.execute(BY_HAND)
    assert catalog(url) == before
    migrations.upgrade(url)
    command.check(migrations.config(url))


def test_007_applied_by_hand_in_part_is_completed(url: str, used: psycopg.Connection, database_url: str) -> None:
    used.execute(BY_HAND.partition("CREATE TABLE")[0])
    used.execute("ALTER TABLE circle.pipelines DROP COLUMN retry_backoff_max")
    migrations.upgrade(url)
    assert {line.split(" | ", 2)[1] for line in catalog(url)} >= {"pipelines.retry_backoff_max", "pipeline_node_runs"}
    command.check(migrations.config(url))


def test_the_script_for_a_dba_adopts_as_well(
    url: str, used: psycopg.Connection, catalogs: dict[str, list[str]]
) -> None:
    before = rows_of_006(used)
    run_psql(url, script("head"))
    assert catalog(url) == catalogs[revisions()[-1]]
    assert rows_of_006(used) == before


# --- refused ---------------------------------------------------------------------------------------------------------

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
    "node runs of somebody else": (
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
def test_tables_that_only_look_like_ours_are_refused(url: str, used: psycopg.Connection, change: str) -> None:
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


def test_a_name_that_is_taken_by_something_else(url: str, connect: Connect) -> None:
    connect(url).execute("CREATE SCHEMA circle; CREATE SEQUENCE circle.pipelines")
    before = catalog(url)
    with pytest.raises(AdoptionError, match="pipelines: is not an ordinary table"):
        migrations.upgrade(url)
    assert catalog(url) == before


# --- taken back ------------------------------------------------------------------------------------------------------


def test_a_downgrade_leaves_tables_that_were_adopted(url: str, used: psycopg.Connection) -> None:
    catalog_before, rows = catalog(url), rows_of_006(used)
    migrations.upgrade(url)
    migrations.downgrade(url, "base")
    assert catalog(url) == catalog_before
    assert rows_of_006(used) == rows


def test_a_downgrade_drops_the_tables_that_006_created(url: str, connect: Connect) -> None:
    raw = connect(url)
    raw.execute(GATHERING + "DROP TABLE circle.pipeline_runs; INSERT INTO circle.pipelines (name) VALUES ('mine')")
    before = catalog(url)
    migrations.upgrade(url)
    migrations.downgrade(url, "006_pipelines")
    assert raw.execute("SELECT to_regclass('circle.pipeline_runs')").fetchone() != (None,)
    migrations.downgrade(url, "base")
    assert without(catalog(url), "index | circle.idx_pipelines_status", "relation | idx_") == before
    assert raw.execute("SELECT name FROM circle.pipelines").fetchall() == [("mine",)]


def test_a_downgrade_to_006_turns_timeouts_into_failures(url: str, used: psycopg.Connection) -> None:
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


def test_so_does_one_of_a_check_with_timeout_in_its_middle(url: str, used: psycopg.Connection) -> None:
    before = catalog(url)
    used.execute(by_hand("pending", "timeout", "running", "completed", "failed", "cancelled"))
    used.execute("UPDATE circle.pipeline_runs SET status = 'timeout', completed_at = now() WHERE id = 3")
    migrations.upgrade(url)
    migrations.downgrade(url, "base")
    assert catalog(url) == before
    assert used.execute("SELECT status FROM circle.pipeline_runs WHERE id = 3").fetchone() == ("failed",)


# --- killed between two steps ----------------------------------------------------------------------------------------


class KilledError(BaseException):
    """Raised in the place of the signal."""


def killed_after(step: int, url: str, action: Callable[[Engine], None]) -> bool:
    """Run something whose connection is gone after its n-th statement; whether there was one."""
    engine = create_engine(url, poolclass=NullPool)
    count = 0

    @event.listens_for(engine, "after_cursor_execute")
    def count_down(connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        nonlocal count
        count += not statement.lstrip().startswith(("SET ", "RESET ", "SELECT "))
        if count == step:
            connection.connection.dbapi_connection.close()  # type: ignore[union-attr]
            raise KilledError

    try:
        action(engine)
    # what is tidied up on the way out finds no connection
    except (KilledError, SQLAlchemyError, DatabaseUnavailableError):
        assert count >= step
        return True
    return False


def test_a_migration_that_was_killed_goes_on_where_it_stood(
    url: str, used: psycopg.Connection, catalogs: dict[str, list[str]]
) -> None:
    """Killed after each step in turn, so that each is met in the state that it left behind itself, up and down."""
    rows = rows_of_006(used)
    kills = 0
    path = ["base", *revisions()]
    for target in path[1:]:
        step = 1
        while killed_after(step, url, lambda engine, to=target: migrations.upgrade(engine, to)):  # type: ignore[misc]
            step += 1
        assert catalog(url) == catalogs[target]
        kills += step - 1
    assert rows_of_006(used) == rows
    for target in reversed(path[:-1]):
        step = 1
        while killed_after(step, url, lambda engine, to=target: migrations.downgrade(engine, to)):  # type: ignore[misc]
            step += 1
        assert catalog(url) == catalogs[target]
        kills += step - 1
    assert rows_of_006(used) == rows
    assert kills > 80


# --- rows ------------------------------------------------------------------------------------------------------------

LEGACY = """
ALTER SEQUENCE circle.pipelines_id_seq RESTART 10;
INSERT INTO circle.pipelines (name, status, nodes, edges, created_at, updated_at, run_count, success_count, error_count,
    timeout_seconds, max_retries_per_node, retry_backoff_base, retry_backoff_max)
VALUES ('nulls', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL);
ALTER SEQUENCE circle.pipeline_runs_id_seq RESTART 10;
INSERT INTO circle.pipeline_runs
    (pipeline_id, status, created_at, started_at, completed_at, error_message, duration_seconds) VALUES
    (10, NULL, '2025-01-01', NULL, NULL, NULL, NULL),
    (10, NULL, '2025-01-01', '2025-01-02', NULL, NULL, 0),
    (10, NULL, '2025-01-01', '2025-01-02', '2025-01-03', 'boom', 0),
    (10, 'completed', '2025-01-01', '2025-01-02', NULL, NULL, NULL),
    (10, 'failed', '2025-01-01', NULL, NULL, 'never began', 0),
    (10, 'timeout', NULL, NULL, '2025-01-04', 'late', 5),
    (10, 'completed', '2025-01-01', '2025-01-02', '2025-01-02 00:00:09', NULL, 0);
INSERT INTO circle.pipeline_node_runs
    (run_id, node_id, node_type, status, started_at, completed_at, error_message, retry_count, duration_ms) VALUES
    (13, 'a', 'agent', NULL, NULL, NULL, NULL, NULL, NULL),
    (13, 'b', 'agent', NULL, '2025-01-02', NULL, NULL, 0, 0),
    (13, 'c', 'agent', NULL, NULL, '2025-01-02', 'boom', 0, 0),
    (13, 'd', 'agent', 'completed', '2025-01-02 01:00', NULL, NULL, 0, 0),
    (13, 'e', 'agent', 'skipped', NULL, NULL, NULL, 0, 0),
    (14, 'f', 'agent', 'failed', NULL, NULL, 'x', 2, 7);
"""


def test_rows_are_repaired_where_no_guess_is_needed(url: str, used: psycopg.Connection) -> None:
    used.execute("SET timezone = 'UTC'")
    used.execute(BY_HAND + LEGACY)
    untouched = used.execute("SELECT * FROM circle.pipelines WHERE id < 10 ORDER BY id").fetchall()
    migrations.upgrade(url, "008_integrity")
    assert used.execute("SELECT * FROM circle.pipelines WHERE id < 10 ORDER BY id").fetchall() == untouched
    migrations.upgrade(url)
    pipeline = used.execute(
        """SELECT status, nodes, edges, created_at, updated_at, run_count, success_count, error_count, timeout_seconds,
        max_retries_per_node, retry_backoff_base, retry_backoff_max FROM circle.pipelines WHERE id = 10"""
    ).fetchall()
    assert pipeline == [("draft", [], [], None, None, 0, 0, 0, None, 3, 1.0, 60.0)]
    runs = used.execute(
        """SELECT id, status, to_char(completed_at, 'DD HH24:MI:SS'), error_message, duration_seconds
        FROM circle.pipeline_runs WHERE id >= 10 ORDER BY id"""
    ).fetchall()
    assert runs == [
        (10, "pending", None, None, 0),
        (11, "running", None, None, 0),
        (12, "failed", "03 00:00:00", "boom", 86_400),
        (13, "completed", "02 00:00:00", None, 0),
        (14, "failed", "01 00:00:00", "never began", 0),
        (15, "timeout", "04 00:00:00", "late", 5),
        (16, "completed", "02 00:00:09", None, 0),  # nothing was missing
    ]
    nodes = used.execute(
        """SELECT node_id, status, to_char(completed_at, 'DD HH24:MI'), retry_count, duration_ms
        FROM circle.pipeline_node_runs ORDER BY id"""
    ).fetchall()
    assert nodes == [
        ("a", "pending", None, 0, 0),
        ("b", "running", None, 0, 0),
        ("c", "failed", "02 00:00", 0, 0),
        ("d", "completed", "02 01:00", 0, 0),
        ("e", "skipped", "02 00:00", 0, 0),  # when its run ended
        ("f", "failed", "01 00:00", 2, 7),
    ]


UNREPAIRABLE = {
    "UPDATE circle.pipelines SET timeout_seconds = -1 WHERE id = 2": "circle.pipelines id 2: timeout_seconds",
    "UPDATE circle.pipelines SET max_retries_per_node = -1 WHERE id = 2": "circle.pipelines id 2: max_retries",
    "UPDATE circle.pipelines SET retry_backoff_base = 'NaN' WHERE id = 2": "circle.pipelines id 2: retry_backoff",
    "UPDATE circle.pipelines SET retry_backoff_max = 'Infinity' WHERE id = 2": "circle.pipelines id 2: retry_backoff",
    "UPDATE circle.pipelines SET error_count = -1 WHERE id = 1": "circle.pipelines id 1: a counter is negative",
    "UPDATE circle.pipelines SET last_run = 'infinity' WHERE id = 2": "circle.pipelines id 2: a timestamp is infinite",
    "UPDATE circle.pipeline_runs SET status = NULL WHERE id = 1": "circle.pipeline_runs id 1: status is NULL",
    "UPDATE circle.pipeline_runs SET completed_at = now() WHERE id = 3": "id 3: completed_at is set, but the run",
    "UPDATE circle.pipeline_runs SET completed_at = '1999-01-01' WHERE id = 1": "id 1: completed_at is before",
    "UPDATE circle.pipeline_runs SET duration_seconds = -5 WHERE id = 2": "circle.pipeline_runs id 2: duration_seconds",
    "UPDATE circle.pipeline_runs SET started_at = '-infinity' WHERE id = 3": "id 3: a timestamp is infinite",
    "UPDATE circle.pipeline_runs SET created_at = NULL, started_at = NULL, completed_at = NULL WHERE id = 2": (
        "circle.pipeline_runs id 2: it is over, but no timestamp tells when"
    ),
    "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type) VALUES (1, 'x', 'robot')": (
        "circle.pipeline_node_runs id 1: node_type is unknown"
    ),
    "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, retry_count) VALUES (1, 'x', 'agent', -1)": (
        "circle.pipeline_node_runs id 1: retry_count or duration_ms is negative"
    ),
    "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type) VALUES (1, 'x', 'agent'), (1, 'x', 'agent')": (
        "circle.pipeline_node_runs id 2: node x stands more than once in run 1"
    ),
    "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, completed_at) SELECT 1, 'x', 'agent', now()": (
        "circle.pipeline_node_runs id 1: completed_at is set, but the node run is pending"
    ),
}


def everything(raw: psycopg.Connection) -> list[Any]:
    tables = ("pipelines", "pipeline_runs", "pipeline_node_runs")
    return [raw.execute(f"SELECT * FROM circle.{table} ORDER BY id").fetchall() for table in tables]


def test_rows_that_can_not_be_repaired_are_named_one_by_one(url: str, used: psycopg.Connection) -> None:
    migrations.upgrade(url, "007_pipeline_execution")
    before = catalog(url)
    for statement, expected in UNREPAIRABLE.items():
        with used.transaction(force_rollback=False):
            used.execute(
                "CREATE TABLE keep_p AS TABLE circle.pipelines; CREATE TABLE keep_r AS TABLE circle.pipeline_runs"
            )
            used.execute(statement)
        rows = everything_text(used)
        with pytest.raises(AdoptionError) as refused:
            migrations.upgrade(url)
        assert len(refused.value.differences) == 1
        assert expected in refused.value.differences[0]
        assert everything_text(used) == rows
        assert catalog(url) == before
        assert revision(used) == "007_pipeline_execution"
        used.execute(
            """TRUNCATE circle.pipelines, circle.pipeline_runs, circle.pipeline_node_runs;
            INSERT INTO circle.pipelines TABLE keep_p; INSERT INTO circle.pipeline_runs TABLE keep_r;
            ALTER SEQUENCE circle.pipeline_node_runs_id_seq RESTART;
            DROP TABLE keep_p, keep_r"""
        )
    migrations.upgrade(url)


def everything_text(raw: psycopg.Connection) -> list[Any]:
    """As text: Python's datetime can't hold infinity."""
    tables = ("pipelines", "pipeline_runs", "pipeline_node_runs")
    return [raw.execute(f"SELECT t::text FROM circle.{table} t ORDER BY id").fetchall() for table in tables]


def test_all_of_them_are_named_together(url: str, used: psycopg.Connection) -> None:
    used.execute(BY_HAND)
    used.execute("UPDATE circle.pipelines SET timeout_seconds = -1, run_count = -1")
    used.execute("UPDATE circle.pipeline_runs SET completed_at = 'infinity' WHERE id = 2")
    used.execute("INSERT INTO circle.pipelines (name, error_count) SELECT 'p', -1 FROM generate_series(1, 200)")
    with pytest.raises(AdoptionError) as refused:
        migrations.upgrade(url)
    assert len(refused.value.differences) == 100  # a readable number of them
    used.execute("DELETE FROM circle.pipelines WHERE id > 2")
    with pytest.raises(AdoptionError) as refused:
        migrations.upgrade(url)
    assert [line.partition(": ")[0] for line in refused.value.differences] == [
        "circle.pipeline_runs id 2",
        *["circle.pipelines id 1"] * 2,
        *["circle.pipelines id 2"] * 2,
    ]


# --- broken graphs ---------------------------------------------------------------------------------------------------

A, B = {"id": "a", "type": "delay", "name": "A"}, {"id": "b", "type": "delay", "name": "B"}
BROKEN: dict[str, tuple[Any, Any]] = {
    "cycle": ([A, B], [{"id": "1", "from": "a", "to": "b"}, {"id": "2", "from": "b", "to": "a"}]),
    "self edge": ([A], [{"id": "1", "from": "a", "to": "a"}]),
    "dangling": ([A], [{"id": "1", "from": "a", "to": "ghost"}]),
    "no source": ([A], [{"id": "1", "to": "a"}]),
    "duplicate": ([A, A], []),
    "unknown type": ([{"id": "a", "type": "robot", "name": "A"}], []),
    "no id": ([{"type": "delay", "name": "A"}], []),
    "a number for an id": ([{"id": 1, "type": "delay", "name": "A"}], []),
    "a long id": ([{"id": "x" * 101, "type": "delay", "name": "A"}], []),
    "an empty id": ([{"id": "", "type": "delay", "name": "A"}], []),
    "nodes that are no objects": (["a", None, 7], []),
    "nodes that are an object": ({"a": A}, []),
    "nodes that are text": ("[]", []),
    "JSON null": (None, None),
    "edges that are an object": ([A], {"e": 1}),
    "edges that are no objects": ([A], [[1], "x"]),
}


def test_pipelines_with_broken_graphs_stay_as_they_are(url: str, used: psycopg.Connection) -> None:
    used.execute("DELETE FROM circle.pipelines; ALTER SEQUENCE circle.pipelines_id_seq RESTART")
    for name, (nodes, edges) in BROKEN.items():
        used.execute(
            "INSERT INTO circle.pipelines (name, status, nodes, edges) VALUES (%s, 'active', %s, %s)",
            [name, json.dumps(nodes), json.dumps(edges)],
        )
    used.execute("INSERT INTO circle.pipelines (name, status, nodes) VALUES ('good', 'active', %s)", [json.dumps([A])])
    before = rows_of_006(used)
    warnings: list[str] = []
    engine = create_engine(url, poolclass=NullPool)

    @event.listens_for(engine, "connect")
    def listen(connection: Any, _record: Any) -> None:
        def note(diagnostic: Diagnostic) -> None:
            if diagnostic.severity_nonlocalized == "WARNING":
                warnings.append(diagnostic.message_primary or "")

        connection.add_notice_handler(note)

    migrations.upgrade(engine)
    assert rows_of_006(used) == before
    assert len(warnings) == len(BROKEN)
    for pipeline_id, warning in enumerate(warnings, 1):
        assert warning.startswith(f"circle.pipelines id {pipeline_id} can't be run until its graph is mended: ")

    with Database(url) as database:
        with database.session(autocommit=True) as session:
            pipelines, runs = PipelineRepository(session), RunRepository(session)
            assert [pipeline.name for pipeline in pipelines.search().items] == ["good", *reversed(BROKEN)]
            for pipeline_id, (name, (nodes, edges)) in enumerate(BROKEN.items(), 1):
                read = pipelines.get(pipeline_id)
                assert (read.nodes, read.edges) == (nodes, edges), name
                with pytest.raises(InvalidPipelineError):
                    runs.create(pipeline_id)
                with pytest.raises(InvalidPipelineError):
                    pipelines.activate(pipeline_id)
                # what doesn't touch the graph goes on
                assert pipelines.update(pipeline_id, PipelineUpdate(description="known")).description == "known"
                assert pipelines.get(pipeline_id).version == read.version
            used.execute("UPDATE circle.pipelines SET run_count = run_count + 1, last_run = now()")
            assert used.execute("SELECT count(*) FROM circle.pipeline_runs").fetchone() == (0,)
            # a raw run of one is bound to no graph
            row = used.execute(
                "INSERT INTO circle.pipeline_runs (pipeline_id, status) VALUES (1, 'running') RETURNING id"
            ).fetchone()
            assert row is not None
            assert runs.get(row[0]).pipeline_version is None
            with pytest.raises(InvalidPipelineError, match="bound to no version .*: cancel it and create it again"):
                runs.definition(row[0])
            for pipeline_id in range(1, len(BROKEN) + 1):
                mended = pipelines.update(pipeline_id, PipelineUpdate(nodes=[A, B], edges=[]))
                assert mended.version == 2
                assert runs.create(pipeline_id).pipeline_version == 2
        assert used.execute("SELECT DISTINCT run_count FROM circle.pipelines WHERE name <> 'good'").fetchall() == [(2,)]


# --- the writers of today --------------------------------------------------------------------------------------------


def write_as_of_today(raw: psycopg.Connection) -> None:
    """The statements of GatheRing's API, scheduler and executor."""
    row = raw.execute(
        "INSERT INTO circle.pipelines (name, description, status, nodes, edges) VALUES (%s, %s, %s, %s, %s) "
        "RETURNING id",
        ["raw", None, "draft", json.dumps(GOOD_NODES), json.dumps(GOOD_EDGES)],
    ).fetchone()
    assert row is not None
    pipeline = row[0]
    raw.execute(INDEXES)
    for status in ("active", "paused", "active"):
        raw.execute("UPDATE circle.pipelines SET status = %s, updated_at = now() WHERE id = %s", [status, pipeline])
    for status, error, ended in (
        ("completed", None, True),
        ("failed", "boom", True),
        ("cancelled", None, False),
        ("completed", None, False),
    ):
        row = raw.execute(
            "INSERT INTO circle.pipeline_runs (pipeline_id, status, started_at, trigger_data, logs) "
            "VALUES (%s, 'running', CURRENT_TIMESTAMP, %s, '[]') RETURNING id",
            [pipeline, json.dumps({"by": "cron"})],
        ).fetchone()
        assert row is not None
        run = row[0]
        raw.execute("UPDATE circle.pipelines SET run_count = run_count + 1, last_run = now() WHERE id = %s", [pipeline])
        raw.execute("UPDATE circle.pipeline_runs SET current_node = 't', logs = logs || '[1]' WHERE id = %s", [run])
        if ended:
            raw.execute(
                "UPDATE circle.pipeline_runs SET status = %s, completed_at = CURRENT_TIMESTAMP, error_message = %s "
                "WHERE id = %s",
                [status, error, run],
            )
        else:
            raw.execute("UPDATE circle.pipeline_runs SET status = %s WHERE id = %s", [status, run])
        column = "success_count" if status == "completed" else "error_count"
        raw.execute(f"UPDATE circle.pipelines SET {column} = {column} + 1 WHERE id = %s", [pipeline])
        raw.execute("UPDATE circle.pipeline_runs SET logs = logs || '[2]' WHERE id = %s", [run])
        stored = raw.execute("SELECT status, error_message, logs FROM circle.pipeline_runs WHERE id = %s", [run])
        assert stored.fetchone() == (status, error, [1, 2])
    raw.execute(
        "UPDATE circle.pipelines SET nodes = %s, edges = '[]' WHERE id = %s", [json.dumps(GOOD_NODES[:1]), pipeline]
    )
    counters = raw.execute(
        "SELECT run_count, success_count, error_count, status FROM circle.pipelines WHERE id = %s", [pipeline]
    )
    assert counters.fetchone() == (4, 2, 2, "active")
    raw.execute("DELETE FROM circle.pipelines WHERE id = %s", [pipeline])
    left = raw.execute("SELECT count(*) FROM circle.pipeline_runs WHERE pipeline_id = %s", [pipeline])
    assert left.fetchone() == (0,)


def test_the_writers_of_today_go_on_at_every_revision(url: str, used: psycopg.Connection) -> None:
    write_as_of_today(used)
    for one in revisions():
        migrations.upgrade(url, one)
        write_as_of_today(used)
        if one == revisions()[2]:
            # the first revision that fills what they leave out
            used.execute(
                "INSERT INTO circle.pipeline_runs (pipeline_id, status, started_at) VALUES (1, 'running', now())"
            )
            row = used.execute(
                "UPDATE circle.pipeline_runs SET status = 'completed' "
                "WHERE id = (SELECT max(id) FROM circle.pipeline_runs) RETURNING "
                "completed_at >= started_at, duration_seconds"
            ).fetchone()
            assert row == (True, 0)
    for one in [*reversed(revisions()[:-1]), "base"]:
        migrations.downgrade(url, one)
        write_as_of_today(used)


def test_the_api_may_create_its_tables_again(url: str, used: psycopg.Connection) -> None:
    migrations.upgrade(url)
    before = catalog(url)
    used.execute(GATHERING + INDEXES)
    assert catalog(url) == before


@pytest.mark.parametrize("requests", ["plain", "with CREATE INDEX"])
def test_writers_feel_nothing_of_an_upgrade(
    url: str, used: psycopg.Connection, connect: Connect, requests: str
) -> None:
    """Beside what GatheRing's executor writes, and beside the three indexes that it issues on every request."""
    used.execute(
        """INSERT INTO circle.pipeline_runs (pipeline_id, status, started_at, completed_at)
        SELECT 1, CASE WHEN n % 10 = 0 THEN NULL ELSE 'completed' END, now() - interval '1 day',
               CASE WHEN n % 10 = 0 THEN NULL ELSE now() END
        FROM generate_series(1, 4000) n"""
    )
    stop = threading.Event()
    failures: list[BaseException] = []
    waits: list[float] = []
    rounds = [0, 0]

    def write(number: int) -> None:
        raw = connect(url)
        try:
            while not stop.is_set():
                start = time.monotonic()
                with raw.transaction():  # one request of the API
                    row = raw.execute(
                        "INSERT INTO circle.pipeline_runs (pipeline_id, status, started_at, trigger_data, logs) "
                        "VALUES (1, 'running', now(), '{}', '[]') RETURNING id"
                    ).fetchone()
                    assert row is not None
                    raw.execute("UPDATE circle.pipelines SET run_count = run_count + 1, last_run = now() WHERE id = 1")
                raw.execute("UPDATE circle.pipeline_runs SET current_node = 't' WHERE id = %s", row)
                with raw.transaction():
                    raw.execute(
                        "UPDATE circle.pipeline_runs SET status = 'completed', completed_at = clock_timestamp() "
                        "WHERE id = %s",
                        row,
                    )
                    raw.execute("UPDATE circle.pipelines SET success_count = success_count + 1 WHERE id = 1")
                if requests != "plain" and rounds[number] % 10 == 0:
                    raw.execute(INDEXES.strip().split(";\n")[rounds[number] // 10 % 3])
                waits.append(time.monotonic() - start)
                rounds[number] += 1
        except BaseException as error:  # noqa: BLE001 - whatever it is
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    try:
        for one in revisions():
            migrations.upgrade(url, one)
            seen = list(rounds)
            deadline = time.monotonic() + 10
            while (
                not failures
                and time.monotonic() < deadline
                and any(b - a < 5 for a, b in zip(seen, rounds, strict=True))
            ):
                time.sleep(0.01)
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert failures == []
    assert min(rounds) > 5 * len(revisions())
    assert max(waits) < 5
    row = used.execute(
        "SELECT run_count - 2, success_count, (SELECT count(*) FROM circle.pipeline_runs WHERE status IS NULL) "
        "FROM circle.pipelines WHERE id = 1"
    ).fetchone()
    assert row == (sum(rounds), sum(rounds), 0)
    command.check(migrations.config(url))
