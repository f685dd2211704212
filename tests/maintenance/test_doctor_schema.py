"""Differences of the schema that the doctor finds and repairs."""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from datetime import timedelta

import psycopg
import pytest

from gathering_pipeline.database import Database
from gathering_pipeline.maintenance.catalog import canonical, expected, same
from gathering_pipeline.maintenance.doctor import doctor
from gathering_pipeline.maintenance.repairs import rebuild
from gathering_pipeline.repositories.runs import RunRepository
from tests import generated
from tests.support.databases import scalar
from tests.support.doctor import NODE_RUNS, catalog, found, outcomes, pipeline

BROKEN = {
    "ALTER TABLE circle.pipelines DISABLE TRIGGER pipelines_accept": (
        "demoted_trigger",
        "trigger pipelines_accept of circle.pipelines",
    ),
    # what ENABLE TRIGGER ALL makes of it at the end of a restore
    "ALTER TABLE circle.pipeline_runs ENABLE TRIGGER pipeline_runs_before": (
        "demoted_trigger",
        "trigger pipeline_runs_before of circle.pipeline_runs",
    ),
    "ALTER TABLE circle.pipeline_runs DROP CONSTRAINT ck_pipeline_runs_leased": (
        "drift",
        "constraint ck_pipeline_runs_leased of circle.pipeline_runs",
    ),
    "ALTER TABLE circle.pipeline_runs DROP CONSTRAINT pipeline_runs_status_check, ADD CONSTRAINT "
    "pipeline_runs_status_check CHECK (status IN ('pending', 'running', 'completed', 'failed', 'cancelled'))": (
        "drift",
        "constraint pipeline_runs_status_check of circle.pipeline_runs",
    ),
    "ALTER TABLE circle.pipelines DROP CONSTRAINT ck_pipelines, "
    "ADD CONSTRAINT ck_pipelines CHECK (max_retries_per_node >= 0) NOT VALID": (
        "drift",
        "constraint ck_pipelines of circle.pipelines",
    ),
    "ALTER TABLE circle.pipeline_node_runs DROP CONSTRAINT pipeline_node_runs_run_id_fkey": (
        "drift",
        "constraint pipeline_node_runs_run_id_fkey of circle.pipeline_node_runs",
    ),
    "ALTER TABLE circle.pipelines ALTER nodes DROP NOT NULL": ("drift", "NOT NULL nodes of circle.pipelines"),
    "ALTER TABLE circle.pipelines ALTER description SET NOT NULL": (
        "drift",
        "NOT NULL description of circle.pipelines",
    ),
    "ALTER TABLE circle.pipelines ALTER description SET DEFAULT 'none'": (
        "drift",
        "default description of circle.pipelines",
    ),
    "ALTER TABLE circle.pipelines ADD owner text NOT NULL": ("drift", "NOT NULL owner of circle.pipelines"),
    "ALTER TABLE circle.pipelines ALTER run_count DROP DEFAULT": ("drift", "default run_count of circle.pipelines"),
    "ALTER TABLE circle.pipelines ALTER run_count SET DEFAULT 1": ("drift", "default run_count of circle.pipelines"),
    "CREATE OR REPLACE FUNCTION circle.pipelines_accept() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'": (
        "drift",
        "function circle.pipelines_accept()",
    ),
    # 008 has made this one, too: the newest has to come back
    "CREATE OR REPLACE FUNCTION circle.pipeline_runs_before() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'": (
        "drift",
        "function circle.pipeline_runs_before()",
    ),
    "ALTER FUNCTION circle.start_run(bigint, bigint) SET plan_cache_mode = force_custom_plan": (
        "drift",
        "function circle.start_run(bigint,bigint)",
    ),
    "DROP FUNCTION circle.fail_node(bigint, text, text, boolean, integer, bigint)": (
        "drift",
        "function circle.fail_node(bigint,text,text,boolean,integer,bigint)",
    ),
    # of the two with this name the one that revision 008 made
    "DROP FUNCTION circle.is_valid_run(text, integer, timestamptz, timestamptz, timestamptz)": (
        "drift",
        "function circle.is_valid_run(text,integer,timestamp with time zone,timestamp with time zone,timestamp with time zone)",
    ),
    "DROP FUNCTION circle.count_runs(integer, text, text, bigint)": (
        "drift",
        "function circle.count_runs(integer,text,text,bigint)",
    ),
    "ALTER FUNCTION circle.pipelines_accept() RESET search_path": ("drift", "function circle.pipelines_accept()"),
    "ALTER FUNCTION circle.pipelines_after() SECURITY INVOKER": ("drift", "function circle.pipelines_after()"),
    "GRANT EXECUTE ON FUNCTION circle.pipelines_after() TO PUBLIC": ("drift", "function circle.pipelines_after()"),
    "ALTER VIEW circle.pipeline_version_nodes RESET (security_invoker)": (
        "drift",
        "view circle.pipeline_version_nodes",
    ),
    "DROP TRIGGER pipeline_node_runs_before ON circle.pipeline_node_runs": (
        "drift",
        "trigger pipeline_node_runs_before of circle.pipeline_node_runs",
    ),
    "CREATE OR REPLACE TRIGGER pipelines_after_insert AFTER INSERT ON circle.pipelines FOR EACH ROW "
    "WHEN (NEW.id > 7) EXECUTE FUNCTION circle.pipelines_after()": (
        "drift",
        "trigger pipelines_after_insert of circle.pipelines",
    ),
    "DROP VIEW circle.startable_node_runs": ("drift", "view circle.startable_node_runs"),
    "CREATE OR REPLACE VIEW circle.startable_node_runs AS SELECT id, run_id, node_id, position FROM circle.pipeline_node_runs": (
        "drift",
        "view circle.startable_node_runs",
    ),
    "DROP INDEX circle.idx_pipeline_runs_queue": (
        "drift",
        "index circle.idx_pipeline_runs_queue of circle.pipeline_runs",
    ),
    "DROP INDEX circle.idx_pipeline_node_runs_run_node; "
    "CREATE INDEX idx_pipeline_node_runs_run_node ON circle.pipeline_node_runs (run_id, node_id)": (
        "drift",
        "index circle.idx_pipeline_node_runs_run_node of circle.pipeline_node_runs",
    ),
}


@pytest.fixture(scope="module")
def clean_catalog(module_database_url: str) -> list[str]:
    return catalog(module_database_url)


@pytest.mark.parametrize("broken", BROKEN)
def test_drift_is_found_and_repaired(
    broken: str, database: Database, raw: psycopg.Connection, database_url: str, clean_catalog: list[str]
) -> None:
    raw.execute(broken)
    assert found(database) == [BROKEN[broken]]
    assert catalog(database_url) != clean_catalog, "found and not repaired"
    (repaired,) = doctor(database.engine, repair=True)
    assert ((repaired.code, repaired.object), repaired.outcome) == (BROKEN[broken], "repaired")
    assert found(database) == []
    if "ADD owner" in broken:
        raw.execute("ALTER TABLE circle.pipelines DROP COLUMN owner")
    assert catalog(database_url) == clean_catalog


def test_all_drift_at_once_is_repaired(database: Database, raw: psycopg.Connection, database_url: str) -> None:
    pipeline(database, runs=2)
    clean = catalog(database_url)
    for broken in BROKEN:
        if "ADD owner" not in broken and "description" not in broken and "pipelines_after()" not in broken:
            raw.execute(broken.replace("DROP FUNCTION", "DROP FUNCTION IF EXISTS"))
    assert len(found(database)) >= 15
    assert outcomes(doctor(database.engine, repair=True)) == {"repaired"}
    assert found(database) == []
    assert catalog(database_url) == clean


def test_disabled_triggers_are_repaired(database: Database, raw: psycopg.Connection, database_url: str) -> None:
    clean = catalog(database_url)
    raw.execute(f"ALTER TABLE {NODE_RUNS} DISABLE TRIGGER ALL")
    codes = {code for code, _ in found(database)}
    names = [name for _, name in found(database)]
    assert codes == {"demoted_trigger"}
    assert len([name for name in names if "RI_ConstraintTrigger" in name]) == 2
    assert outcomes(doctor(database.engine, repair=True)) == {"repaired"}
    assert found(database) == []
    assert catalog(database_url) == clean
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        raw.execute(f"INSERT INTO {NODE_RUNS} (run_id, node_id, node_type) VALUES (9, 'a', 'trigger')")


@pytest.mark.parametrize(
    ("broken", "item"),
    [
        ("DROP TABLE circle.pipeline_counters", "table pipeline_counters"),
        ("ALTER TYPE circle.compiled_node ADD ATTRIBUTE config jsonb", "type circle.compiled_node"),
        ("ALTER TABLE circle.pipeline_runs DROP worker_id CASCADE", "column worker_id of circle.pipeline_runs"),
        ("ALTER TABLE circle.pipeline_runs ALTER current_node TYPE text", "column current_node of circle.pipeline_runs"),
        ("ALTER TABLE circle.pipeline_events ALTER id DROP IDENTITY", "column id of circle.pipeline_events"),
        ("ALTER TABLE circle.pipeline_versions DROP CONSTRAINT pipeline_versions_pkey",
         "constraint pipeline_versions_pkey of circle.pipeline_versions"),
    ],
)  # fmt: skip
def test_unrepairable_drift_stays_reported(broken: str, item: str, database: Database, raw: psycopg.Connection) -> None:
    raw.execute(broken)
    assert ("drift", item) in found(database)
    (left,) = [finding for finding in doctor(database.engine, repair=True) if finding.object == item]
    assert (left.severity, left.repair, left.outcome) == ("error", (), None)
    assert "restore" in left.advice


@pytest.mark.parametrize(
    ("broken", "unexamined"),
    [
        ("ALTER TABLE circle.pipeline_runs ALTER current_node TYPE text", set()),
        ("ALTER TABLE circle.pipelines DROP description CASCADE", set()),
        ("DROP TABLE circle.pipeline_counters", {"counters", "status_counters"}),
        ("ALTER TABLE circle.pipeline_versions DROP node_count", {"miscompiled_version", "missing_nodes"}),
        ("DROP TABLE circle.pipeline_events CASCADE", {"foreign_events"}),
        ("ALTER TABLE circle.pipelines DROP success_count CASCADE", {"counters"}),
        ("ALTER TABLE circle.pipelines DROP nodes CASCADE", {"broken_graph", "not_compiled"}),
    ],
)
def test_rows_are_examined_as_far_as_the_schema_allows(
    broken: str, unexamined: set[str], database: Database, raw: psycopg.Connection
) -> None:
    pipeline(database, runs=1)
    with database.session() as session:
        RunRepository(session).claim("gone", timedelta(milliseconds=1))
    raw.execute(broken)
    findings = doctor(database.engine)
    assert "expired_leases" in {finding.code for finding in findings}
    for item in [finding for finding in findings if finding.object.startswith(("table ", "column "))]:
        _, said, codes = item.message.partition("rows were not examined for ")
        assert (set(codes.split(", ")) if said else set()) == unexamined


def test_view_that_differs_in_an_alias_is_repaired(database: Database, raw: psycopg.Connection) -> None:
    (view,) = (item for item in expected() if item.name == "circle.pending_node_runs")
    text = scalar(raw, "SELECT pg_get_viewdef(%s::regclass)", (view.name,))
    raw.execute(f"CREATE OR REPLACE VIEW {view.name} AS {text.replace('p.run_id = n.run_id', 'p.run_id = p.run_id')}")
    assert found(database) == [("drift", str(view))]
    assert outcomes(doctor(database.engine, repair=True)) == {"repaired"}
    assert found(database) == []


def test_additional_objects_are_left_alone(database: Database, raw: psycopg.Connection) -> None:
    raw.execute(
        """CREATE FUNCTION public.meddle() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
        CREATE TRIGGER "Meddles" BEFORE UPDATE ON circle.pipelines FOR EACH ROW EXECUTE FUNCTION public.meddle();
        CREATE TRIGGER audits AFTER UPDATE ON circle.pipelines FOR EACH ROW EXECUTE FUNCTION public.meddle();
        ALTER TABLE circle.pipelines ADD CONSTRAINT short CHECK (length(name) < 80), ADD owner text,
            ADD seen timestamptz NOT NULL DEFAULT now(), ADD number bigint GENERATED ALWAYS AS IDENTITY;
        CREATE INDEX idx_mine ON circle.pipelines (owner);
        CREATE UNIQUE INDEX idx_names ON circle.pipelines (name);
        CREATE RULE keep AS ON DELETE TO circle.pipelines DO INSTEAD NOTHING;
        ALTER TABLE circle.pipelines ENABLE ROW LEVEL SECURITY;
        CREATE POLICY mine ON circle.pipelines USING (owner = current_user);
        CREATE FUNCTION circle.start_run(integer, integer) RETURNS int LANGUAGE sql AS 'SELECT 1';
        CREATE FUNCTION circle.theirs(integer) RETURNS int LANGUAGE sql AS 'SELECT 1';
        CREATE TABLE circle.agents (id int PRIMARY KEY CHECK (id > 0));
        CREATE TABLE public.child () INHERITS (circle.pipelines);
        CREATE TRIGGER theirs BEFORE UPDATE ON circle.agents FOR EACH ROW EXECUTE FUNCTION public.meddle()"""
    )
    expected = [
        ("foreign_child", "child table public.child of circle.pipelines"),
        ("foreign_constraint", "constraint short of circle.pipelines"),
        ("foreign_function", "function circle.start_run(integer,integer)"),
        ("foreign_constraint", "index circle.idx_names of circle.pipelines"),
        ("row_security", "row security policies of circle.pipelines"),
        ("foreign_rule", "rule keep of circle.pipelines"),
        ("foreign_trigger", 'trigger "Meddles" of circle.pipelines'),
    ]
    assert found(database) == expected
    left = doctor(database.engine, repair=True)
    assert [(finding.severity, finding.outcome) for finding in left] == [("warning", None)] * 7
    words = [
        "read as rows of this package",
        "length(",
        "may reach it, or fail because both match",
        "UNIQUE",
        ": mine",
        "DO INSTEAD NOTHING",
        "public.meddle()",
    ]
    assert [word in finding.message for word, finding in zip(words, left, strict=True)] == [True] * 7


@pytest.mark.parametrize(
    ("statement", "code", "label", "words"),
    [
        (
            "CREATE TABLE public.up (status varchar(50)); ALTER TABLE circle.pipeline_runs INHERIT public.up",
            "foreign_parent",
            "parent table public.up of circle.pipeline_runs",
            "without the rights on them",
        ),
        (
            (
                "CREATE TABLE public.up (LIKE circle.pipeline_versions) PARTITION BY LIST (version);"
                "ALTER TABLE public.up ATTACH PARTITION circle.pipeline_versions DEFAULT"
            ),
            "foreign_parent",
            "parent table public.up of circle.pipeline_versions",
            "is foreign",
        ),
        (
            "ALTER TABLE circle.pipeline_counters SET UNLOGGED",
            "unlogged",
            "table circle.pipeline_counters",
            "a crash of the server empties it",
        ),
        (
            "ALTER SEQUENCE circle.pipeline_runs_id_seq MAXVALUE 100 CYCLE",
            "sequence",
            "sequence circle.pipeline_runs_id_seq of circle.pipeline_runs",
            "MAXVALUE 100 INCREMENT 1 CYCLE",
        ),
        (
            "GRANT CREATE ON SCHEMA circle TO PUBLIC, pg_monitor; GRANT TRIGGER ON circle.pipelines TO PUBLIC",
            "excess_rights",
            "role PUBLIC",
            "CREATE ON SCHEMA circle, TRIGGER ON circle.pipelines",
        ),
        (
            "GRANT ALL ON circle.pipeline_events TO pg_monitor",
            "excess_rights",
            "role pg_monitor",
            (
                "INSERT ON circle.pipeline_events, TRIGGER ON circle.pipeline_events, TRUNCATE ON circle.pipeline_events,"
                " UPDATE ON circle.pipeline_events"
            ),
        ),
        (
            'ALTER TABLE circle.pipeline_runs ALTER worker_id TYPE varchar(255) COLLATE "C"',
            "drift",
            "column worker_id of circle.pipeline_runs",
            'COLLATE "C"',
        ),
        (
            (
                "CREATE FUNCTION public.eq(varchar, text) RETURNS bool LANGUAGE sql IMMUTABLE AS 'SELECT true';"
                "CREATE OPERATOR public.= (LEFTARG = varchar, RIGHTARG = text, FUNCTION = public.eq);"
                "ALTER TABLE circle.pipelines DROP CONSTRAINT pipelines_status_check,"
                " ADD CONSTRAINT pipelines_status_check CHECK (status OPERATOR(public.=) 'active'::text)"
            ),
            "drift",
            "constraint pipelines_status_check of circle.pipelines",
            "OPERATOR(public.=)",
        ),
        (
            (
                "CREATE FUNCTION public.ok(text) RETURNS bool LANGUAGE sql IMMUTABLE AS 'SELECT true';"
                "ALTER TABLE circle.pipelines ADD CONSTRAINT mine CHECK (public.ok(name))"
            ),
            "foreign_constraint",
            "constraint mine of circle.pipelines",
            "public.ok(",
        ),
    ],
)
def test_what_others_tied_to_the_tables_is_reported(
    database: Database, raw: psycopg.Connection, statement: str, code: str, label: str, words: str
) -> None:
    raw.execute(statement.encode())
    findings = [finding for finding in doctor(database.engine) if finding.object == label]
    assert [finding.code for finding in findings] == [code]
    assert words in findings[0].message


GUARDS_OF_OWNER = """
SELECT c.relname, p.oid::regproc::text, pg_get_triggerdef(t.oid)
FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid AND p.prosecdef
JOIN pg_class c ON c.oid = t.tgrelid AND c.relnamespace = 'circle'::regnamespace ORDER BY t.tgrelid, t.tgname
"""


def test_guard_on_another_table_is_reported_and_refuses(database: Database, raw: psycopg.Connection) -> None:
    """The functions of these triggers have the rights of their owner."""
    pipeline(database, runs=1)
    change = {
        "pipelines": "version = 7",
        "pipeline_runs": "status = 'failed'",
        "pipeline_node_runs": "status = 'failed'",
    }
    guards = raw.execute(GUARDS_OF_OWNER).fetchall()
    assert len(guards) >= 10
    for table, function, definition in guards:
        raw.execute(f"CREATE TABLE public.theirs (LIKE circle.{table}); INSERT INTO theirs TABLE circle.{table}")
        raw.execute(definition.replace(f" ON circle.{table} ", " ON public.theirs "))
        ((code, name),) = found(database)
        assert (code, name.rpartition(" of ")[2]) == ("foreign_trigger", "public.theirs"), function
        for event, statement in {
            "INSERT": f"INSERT INTO theirs TABLE circle.{table}",
            "UPDATE": f"UPDATE theirs SET {change.get(table)}",
            "DELETE": "DELETE FROM theirs",
            "TRUNCATE": "TRUNCATE theirs",
        }.items():
            if f" AFTER {event} " in definition:
                with pytest.raises(psycopg.errors.InsufficientPrivilege, match=f"{function} can't be a trigger of "):
                    raw.execute(statement)
                break
        else:
            pytest.fail(definition)
        raw.execute("DROP TABLE theirs")
    assert found(database) == []


def test_notifications_are_no_finding(database: Database, raw: psycopg.Connection) -> None:
    raw.execute("SELECT circle.notify_events(true)")
    assert found(database) == []


def test_function_that_an_operator_revoked_is_no_finding(database: Database, raw: psycopg.Connection) -> None:
    raw.execute("REVOKE ALL ON FUNCTION circle.fold_counters() FROM PUBLIC")
    assert found(database) == []


def test_every_function_can_be_rebuilt(raw: psycopg.Connection, database_url: str) -> None:
    """From the revisions, each by its own statement."""
    clean = catalog(database_url)
    functions = [item for item in expected() if item.kind == "function"]
    assert len(functions) > 80
    raw.execute("SET search_path = pg_catalog, pg_temp; SET check_function_bodies = off")
    for item in functions:
        raw.execute("; ".join(rebuild(item, expected())))
    assert catalog(database_url) == clean


def test_dump_and_restore_gives_no_drift(database: Database, raw: psycopg.Connection) -> None:
    """A dump prints definitions as here, and a restore reads them: casts move into lists."""
    raw.execute("SET search_path = pg_catalog")
    for item, definition in expected().items():
        table = f"circle.{item.table}"
        if item.kind == "constraint" and definition.startswith("CHECK"):
            raw.execute(f"ALTER TABLE {table} DROP CONSTRAINT {item.name}, ADD CONSTRAINT {item.name} {definition}")
        elif item.kind == "index":
            raw.execute(f"DROP INDEX {item.name}; {definition}")
        elif item.kind == "trigger":
            mode = expected()[item._replace(kind="firing")].replace("A", "ALWAYS").replace("O", "")
            raw.execute(f"DROP TRIGGER {item.name} ON {table}; {definition}")
            raw.execute(f"ALTER TABLE {table} ENABLE {mode} TRIGGER {item.name}")
        elif item.kind == "view":
            raw.execute(f"CREATE OR REPLACE VIEW {item.name} {definition}")
    assert found(database) == []


def test_canonical_form_keeps_differences() -> None:
    one = "CHECK (((status)::text = ANY ((ARRAY['a'::character varying, 'b'::character varying])::text[])))"
    restored = "CHECK (((status)::text = ANY (ARRAY[('a'::character varying)::text, ('b'::character varying)::text])))"
    assert canonical(one) == canonical(restored)
    assert canonical(one) != canonical(one.replace("'b'", "'c'"))
    rows = "(((((a <> b) OR (c <> d)) OR (f(e) <> g))) AND (h))"
    assert canonical(rows) == canonical("((((a <> b) OR (c <> d) OR (f(e) <> g))) AND (h))")
    assert canonical("(((a <> b) OR (c <> d)) AND (h))") != canonical("((a <> b) OR (c <> d) AND (h))")
    assert canonical("CHECK (((a OR b) AND c))") != canonical("CHECK ((a OR (b AND c)))")
    assert same("SELECT n.id FROM t n WHERE EXISTS (SELECT FROM u r WHERE r.id = n.id)",
                "SELECT id FROM t n WHERE EXISTS (SELECT FROM u r WHERE r.id = n.id)")  # fmt: skip
    assert not same("SELECT n.id FROM t n JOIN u r ON true", "SELECT r.id FROM t n JOIN u r ON true")
    assert canonical("CHECK ((a)::integer > 1)") != canonical("CHECK ((a)::bigint > 1)")


def test_stored_catalog_equals_clean_build(database_url: str) -> None:
    """Where this fails: ``make generated``."""
    rows = generated.clean_catalog(database_url).splitlines()
    committed = generated.CATALOG.read_text(encoding="utf-8").splitlines()
    assert len(rows) == len(committed)
    assert [row for row, line in zip(rows, committed, strict=True) if not same(row, line)] == []
