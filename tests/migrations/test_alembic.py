"""The revisions against the models, against one another, and against what the mission lists."""

# pyright: reportArgumentType=false, reportCallIssue=false
# psycopg wants literal SQL; this file puts some of its own together.

import io
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import psycopg
import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from pytest_alembic.plugin.fixtures import alembic_runner  # noqa: F401 - a fixture
from pytest_alembic.runner import MigrationContext
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.pool import NullPool

from gathering_pipeline import metadata, migrations
from tests import servers
from tests.servers import Server
from tests.servers import connect as open_connection

Connect = Callable[[str], psycopg.Connection]

ROOT = Path(__file__).parents[2]
CREATED_BY_006 = "created by gathering_pipeline revision 006_pipelines"

# One row a fact: kind, name, definition. Names are shown with their schema, whatever the search path is.
CATALOG = """
SELECT 'schema', nspname, '' FROM pg_namespace WHERE nspname = 'circle'
UNION ALL
SELECT 'relation', c.relname, format('%s, %s', c.relkind, c.relpersistence) FROM pg_class c
WHERE c.relnamespace = to_regnamespace('circle') AND c.relkind <> 'i'
UNION ALL
SELECT 'column', format('%s.%s', c.relname, a.attname),
       concat_ws(' ', rank() OVER (PARTITION BY c.oid ORDER BY a.attnum), format_type(a.atttypid, a.atttypmod),
                 CASE WHEN a.attnotnull THEN 'NOT NULL' END, 'DEFAULT ' || pg_get_expr(d.adbin, d.adrelid),
                 NULLIF(a.attidentity::text || a.attgenerated::text, ''),
                 'COLLATE ' || NULLIF(a.attcollation, t.typcollation)::regcollation::text,
                 'STORAGE ' || a.attstorage::text)
FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
JOIN pg_type t ON t.oid = a.atttypid LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
WHERE c.relnamespace = to_regnamespace('circle') AND c.relkind IN ('r', 'v', 'p')
UNION ALL
SELECT 'constraint', format('%s.%s', conrelid::regclass, conname),
       pg_get_constraintdef(oid) || CASE WHEN convalidated THEN '' ELSE ' (not validated)' END
FROM pg_constraint WHERE connamespace = to_regnamespace('circle')
UNION ALL
SELECT 'index', indexrelid::regclass::text,
       pg_get_indexdef(indexrelid) || CASE WHEN indisvalid AND indisready THEN '' ELSE ' (invalid)' END
FROM pg_index WHERE indrelid IN (SELECT oid FROM pg_class WHERE relnamespace = to_regnamespace('circle'))
UNION ALL
SELECT 'trigger', format('%s.%s', tgrelid::regclass, tgname), format('%s %s', pg_get_triggerdef(oid), tgenabled)
FROM pg_trigger WHERE NOT tgisinternal
UNION ALL
SELECT 'function', p.oid::regprocedure::text, pg_get_functiondef(p.oid) || coalesce(p.proacl::text, '')
FROM pg_proc p WHERE p.pronamespace = to_regnamespace('circle')
UNION ALL
SELECT 'view', c.relname, pg_get_viewdef(c.oid) FROM pg_class c
WHERE c.relnamespace = to_regnamespace('circle') AND c.relkind = 'v'
UNION ALL
SELECT 'sequence', s.sequencename, format(
    '%s from %s by %s to %s, owned by %s', s.data_type, s.start_value, s.increment_by, s.max_value, (
                  SELECT format('%s.%s', d.refobjid::regclass, a.attname) FROM pg_depend d
                  JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
                  WHERE d.objid = format('circle.%I', s.sequencename)::regclass AND d.deptype = 'a'))
FROM pg_sequences s WHERE s.schemaname = 'circle'
UNION ALL
SELECT 'type', typname, typtype::text FROM pg_type
WHERE typnamespace = to_regnamespace('circle') AND typrelid = 0 AND typelem = 0
UNION ALL
SELECT 'comment', pg_describe_object(classoid, objoid, objsubid), description FROM pg_description
WHERE pg_describe_object(classoid, objoid, objsubid) LIKE '%circle.%'
ORDER BY 1, 2, 3
"""


def catalog(url: str) -> list[str]:
    """Everything that schema circle holds but rows, in one canonical form; Alembic's own table is left out."""
    with open_connection(url) as connection:
        connection.execute("SET search_path = pg_catalog")
        rows = connection.execute(CATALOG).fetchall()
    return [" | ".join(row) for row in rows if "alembic_version" not in row[1]]


def facts(url: str, kind: str, of: tuple[str, ...] = ("",)) -> dict[str, str]:
    """One kind of facts, name to definition, of the tables whose names begin so."""
    found = (line.split(" | ", 2) for line in catalog(url))
    return {
        name: definition
        for what, name, definition in found
        if what == kind and name.removeprefix("circle.").startswith(of)
    }


def revisions() -> list[str]:
    script = ScriptDirectory.from_config(migrations.config())
    return [revision.revision for revision in script.walk_revisions()][::-1]


def script(revision: str, *, down: bool = False) -> str:
    """What ``alembic upgrade --sql`` or ``alembic downgrade --sql`` writes."""
    output = io.StringIO()
    config = migrations.config()
    config.output_buffer = output
    (command.downgrade if down else command.upgrade)(config, revision, sql=True)
    return output.getvalue()


def run_psql(url: str, sql: str) -> None:
    """Run a script as a DBA would."""
    done = subprocess.run(
        [*servers.psql(url), "-v", "ON_ERROR_STOP=1", "-f", "-"],
        input=sql,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def catalogs(server: Server) -> dict[str, list[str]]:
    """The catalog at each revision, reached from an empty database; ``base`` is below the first one."""
    name = server.create()
    url = server.database_url(name)
    try:
        found = {}
        for revision in revisions():
            migrations.upgrade(url, revision)
            found[revision] = catalog(url)
    finally:
        server.drop(name)
    return found | {"base": ["schema | circle | "]}


# --- pytest-alembic --------------------------------------------------------------------------------------------------


@pytest.fixture
def alembic_config() -> Config:
    return migrations.config()


@pytest.fixture
def alembic_engine(empty_database_url: str) -> Iterator[Engine]:
    engine = create_engine(empty_database_url, poolclass=NullPool)
    with engine.begin() as connection:
        # pytest-alembic asks for the current revision in a way that makes Alembic create its version table
        connection.execute(text("CREATE SCHEMA circle"))
    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def of_pytest_alembic(pytestconfig: pytest.Config) -> ModuleType:
    # its tests bear a marker that its plugin, which is not loaded, would register
    pytestconfig.addinivalue_line("markers", "alembic: tests that come with pytest-alembic")
    from pytest_alembic import tests

    return tests


@pytest.mark.parametrize(
    "name",
    ["test_single_head_revision", "test_upgrade", "test_model_definitions_match_ddl", "test_up_down_consistency"],
)
def test_pytest_alembic(name: str, of_pytest_alembic: ModuleType, alembic_runner: MigrationContext) -> None:  # noqa: F811
    assert sorted(of_pytest_alembic.__all__) == sorted(
        {"test_single_head_revision", "test_upgrade", "test_model_definitions_match_ddl", "test_up_down_consistency"}
    )
    getattr(of_pytest_alembic, name)(alembic_runner)


# --- up, down, up ----------------------------------------------------------------------------------------------------


def test_upgrade_and_check_as_commands(empty_database_url: str) -> None:
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


def test_revisions_are_the_ones_expected() -> None:
    assert revisions()[:4] == ["006_pipelines", "007_pipeline_execution", "008_integrity", "009b_lifecycle"]


def test_every_revision_can_be_taken_back_and_made_again(
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


def test_all_of_it_can_be_taken_back_and_made_again(empty_database_url: str, catalogs: dict[str, list[str]]) -> None:
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


def test_rows_survive_a_downgrade_to_007(database_url: str, connect: Connect) -> None:
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
    # no version: the run is older than what the upgrade compiled
    assert raw.execute("SELECT pipeline_version FROM circle.pipeline_runs").fetchall() == [(None,)]


# --- offline ---------------------------------------------------------------------------------------------------------


def test_the_script_for_a_dba_makes_the_same_catalog(
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


def test_scripts_of_single_revisions_make_the_same_catalogs(
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
def test_squawk_finds_nothing(tmp_path: Path, sound: bool) -> None:
    """Nothing that .squawk.toml doesn't answer; and it does find something in a script that has it."""
    path = tmp_path / "upgrade.sql"
    path.write_text(script("head") + ("" if sound else "CREATE INDEX idx ON circle.pipelines (name);\n"))
    program = shutil.which("squawk", path=str(Path(sys.executable).parent))
    assert program is not None
    done = subprocess.run([program, "--reporter", "gcc", path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if sound else 1), done.stdout
    assert ("require-concurrent-index-creation" in done.stdout) is not sound


def test_a_script_that_was_broken_off_goes_on(empty_database_url: str, catalogs: dict[str, list[str]]) -> None:
    head = revisions()[-1]
    for sql, end in ((script("head"), head), (script(f"{head}:base", down=True), "base")):
        for part in (0.3, 0.6, 0.9):
            end_of_a_step = sql.index("\nCOMMIT;\n", int(len(sql) * part))
            run_psql(empty_database_url, sql[:end_of_a_step] + "\nROLLBACK;\n\\endif\n")
        run_psql(empty_database_url, sql)
        assert catalog(empty_database_url) == catalogs[end]


def test_a_script_that_gets_no_lock_ends_and_goes_on_when_run_again(
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


def test_a_script_ends_at_its_first_error(empty_database_url: str, connect: Connect) -> None:
    raw = connect(empty_database_url)
    raw.execute("CREATE SCHEMA circle; CREATE TABLE circle.pipelines (id serial PRIMARY KEY, name text)")
    with pytest.raises(AssertionError, match="differ from the expected ones; nothing was changed"):
        run_psql(empty_database_url, script("head"))
    assert raw.execute("SELECT to_regclass('circle.pipeline_runs')").fetchone() == (None,)


# --- the models ------------------------------------------------------------------------------------------------------


def test_the_models_declare_what_the_revisions_make(
    database_url: str, empty_database_url: str, connect: Connect
) -> None:
    connect(empty_database_url).execute("CREATE SCHEMA circle")
    engine = create_engine(empty_database_url, poolclass=NullPool)
    metadata.create_all(engine)
    for kind in ("constraint", "index"):
        assert facts(empty_database_url, kind) == facts(database_url, kind)
    declared, migrated = facts(empty_database_url, "column"), facts(database_url, "column")
    # the order of columns is history
    assert {name: text.split(" ", 1)[1] for name, text in declared.items()} == {
        name: text.split(" ", 1)[1] for name, text in migrated.items() if not name.startswith("startable_node_runs.")
    }


def test_the_models_own_every_table(database_url: str) -> None:
    tables = {name for name, kind in facts(database_url, "relation").items() if kind.startswith("r")}
    assert tables == {table.name for table in metadata.tables.values()}


def test_create_all_is_enough_for_nothing_but_ddl(empty_database_url: str) -> None:
    """A database that was made by ``create_all`` is not taken for one at head."""
    engine = create_engine(empty_database_url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA circle"))
        metadata.create_all(connection)
    with engine.connect() as connection:
        assert migrations.current(connection) is None


# --- what the mission lists ------------------------------------------------------------------------------------------

PIPELINES = {
    "id": "integer NOT NULL DEFAULT nextval('circle.pipelines_id_seq'::regclass)",
    "name": "character varying(255) NOT NULL",
    "description": "text",
    "status": "character varying(50) DEFAULT 'draft'::character varying",
    "nodes": "jsonb DEFAULT '[]'::jsonb",
    "edges": "jsonb DEFAULT '[]'::jsonb",
    "created_at": "timestamp with time zone DEFAULT CURRENT_TIMESTAMP",
    "updated_at": "timestamp with time zone DEFAULT CURRENT_TIMESTAMP",
    "last_run": "timestamp with time zone",
    "run_count": "integer DEFAULT 0",
    "success_count": "integer DEFAULT 0",
    "error_count": "integer DEFAULT 0",
}
RUNS = {
    "id": "integer NOT NULL DEFAULT nextval('circle.pipeline_runs_id_seq'::regclass)",
    "pipeline_id": "integer NOT NULL",
    "status": "character varying(50) DEFAULT 'pending'::character varying",
    "started_at": "timestamp with time zone",
    "completed_at": "timestamp with time zone",
    "current_node": "character varying(100)",
    "logs": "jsonb DEFAULT '[]'::jsonb",
    "trigger_data": "jsonb DEFAULT '{}'::jsonb",
    "error_message": "text",
    "created_at": "timestamp with time zone DEFAULT CURRENT_TIMESTAMP",
}
ADDED_BY_007 = {
    "timeout_seconds": "integer DEFAULT 3600",
    "max_retries_per_node": "integer DEFAULT 3",
    "retry_backoff_base": "double precision DEFAULT 1.0",
    "retry_backoff_max": "double precision DEFAULT 60.0",
}
NODE_RUNS = {
    "id": "integer NOT NULL DEFAULT nextval('circle.pipeline_node_runs_id_seq'::regclass)",
    "run_id": "integer NOT NULL",
    "node_id": "character varying(100) NOT NULL",
    "node_type": "character varying(50) NOT NULL",
    "status": "character varying(50) DEFAULT 'pending'::character varying",
    "input_data": "jsonb DEFAULT '{}'::jsonb",
    "output_data": "jsonb DEFAULT '{}'::jsonb",
    "error_message": "text",
    "retry_count": "integer DEFAULT 0",
    "started_at": "timestamp with time zone",
    "completed_at": "timestamp with time zone",
    "duration_ms": "integer DEFAULT 0",
}
INDEXES_OF_006 = {
    "pipelines_pkey": "UNIQUE INDEX pipelines_pkey ON circle.pipelines USING btree (id)",
    "pipeline_runs_pkey": "UNIQUE INDEX pipeline_runs_pkey ON circle.pipeline_runs USING btree (id)",
    "idx_pipelines_status": "INDEX idx_pipelines_status ON circle.pipelines USING btree (status)",
    "idx_pipeline_runs_pipeline_id": "INDEX idx_pipeline_runs_pipeline_id ON circle.pipeline_runs "
    "USING btree (pipeline_id)",
    "idx_pipeline_runs_status": "INDEX idx_pipeline_runs_status ON circle.pipeline_runs USING btree (status)",
}
INDEXES_OF_007 = {
    "pipeline_node_runs_pkey": "UNIQUE INDEX pipeline_node_runs_pkey ON circle.pipeline_node_runs USING btree (id)",
    "idx_pipeline_node_runs_run_id": "INDEX idx_pipeline_node_runs_run_id ON circle.pipeline_node_runs "
    "USING btree (run_id)",
    "idx_pipeline_node_runs_run_node": "INDEX idx_pipeline_node_runs_run_node ON circle.pipeline_node_runs "
    "USING btree (run_id, node_id)",
}


def columns(url: str, table: str) -> dict[str, str]:
    """Names and definitions in their order."""
    found = {
        name.split(".")[1]: definition.split(" STORAGE ")[0].split(" ", 1)
        for name, definition in facts(url, "column").items()
        if name.startswith(f"{table}.")
    }
    return {name: text for name, (_, text) in sorted(found.items(), key=lambda item: int(item[1][0]))}


def constraints(url: str) -> dict[str, str]:
    """All but NOT NULL, which PostgreSQL 18 lists as well."""
    found = {name.split(".")[-1]: definition for name, definition in facts(url, "constraint").items()}
    return {name: definition for name, definition in found.items() if not definition.startswith("NOT NULL")}


def status_check(*values: str) -> str:
    array = ", ".join(f"'{value}'::character varying" for value in values)
    return f"CHECK (((status)::text = ANY ((ARRAY[{array}])::text[])))"


CONSTRAINTS_OF_006 = {
    "pipelines_pkey": "PRIMARY KEY (id)",
    "pipelines_status_check": status_check("active", "paused", "draft"),
    "pipeline_runs_pkey": "PRIMARY KEY (id)",
    "pipeline_runs_pipeline_id_fkey": "FOREIGN KEY (pipeline_id) REFERENCES circle.pipelines(id) ON DELETE CASCADE",
    "pipeline_runs_status_check": status_check("pending", "running", "completed", "failed", "cancelled"),
}


def indexes(url: str) -> dict[str, str]:
    return {name.split(".")[-1]: definition.removeprefix("CREATE ") for name, definition in facts(url, "index").items()}


def test_revision_006_is_what_the_mission_lists(empty_database_url: str) -> None:
    migrations.upgrade(empty_database_url, "006_pipelines")
    assert list(columns(empty_database_url, "pipelines").items()) == list(PIPELINES.items())
    assert list(columns(empty_database_url, "pipeline_runs").items()) == list(RUNS.items())
    assert constraints(empty_database_url) == CONSTRAINTS_OF_006
    assert indexes(empty_database_url) == INDEXES_OF_006
    assert facts(empty_database_url, "comment") == {
        "table circle.pipelines": CREATED_BY_006,
        "table circle.pipeline_runs": CREATED_BY_006,
    }
    assert not facts(empty_database_url, "trigger")
    assert not facts(empty_database_url, "function")


def test_revision_007_is_what_the_mission_lists(empty_database_url: str) -> None:
    migrations.upgrade(empty_database_url, "007_pipeline_execution")
    assert list(columns(empty_database_url, "pipelines").items()) == list((PIPELINES | ADDED_BY_007).items())
    runs = RUNS | {"duration_seconds": "integer DEFAULT 0"}
    assert list(columns(empty_database_url, "pipeline_runs").items()) == list(runs.items())
    assert list(columns(empty_database_url, "pipeline_node_runs").items()) == list(NODE_RUNS.items())
    of_runs = status_check("pending", "running", "completed", "failed", "cancelled", "timeout")
    of_nodes = status_check("pending", "running", "completed", "failed", "skipped", "cancelled")
    assert constraints(empty_database_url) == CONSTRAINTS_OF_006 | {
        "pipeline_runs_status_check": of_runs,
        "pipeline_node_runs_pkey": "PRIMARY KEY (id)",
        "pipeline_node_runs_run_id_fkey": "FOREIGN KEY (run_id) REFERENCES circle.pipeline_runs(id) ON DELETE CASCADE",
        "pipeline_node_runs_status_check": of_nodes,
    }
    assert indexes(empty_database_url) == INDEXES_OF_006 | INDEXES_OF_007
    assert not facts(empty_database_url, "trigger")
    assert not facts(empty_database_url, "function")
