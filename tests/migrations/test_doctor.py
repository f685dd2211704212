"""What the doctor finds: each is first broken for real, then found, mended, and gone."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import psycopg
import pytest
from sqlalchemy.engine import Connection, make_url

from gathering_pipeline import migrations
from gathering_pipeline.catalog import Finding, canonical, reference, same
from gathering_pipeline.database import Database
from gathering_pipeline.doctor import doctor
from gathering_pipeline.errors import ConflictError, DatabaseUnavailableError
from gathering_pipeline.models import PipelineCreate
from gathering_pipeline.repositories.pipelines import PipelineRepository
from gathering_pipeline.repositories.runs import RunRepository
from tests import generated
from tests.migrations import test_alembic

Connect = Callable[[str], psycopg.Connection]

NODES = [{"id": name, "type": "trigger" if name == "a" else "parallel", "name": name.upper()} for name in "abc"]
EDGES = [{"id": "e1", "from": "a", "to": "b"}, {"id": "e2", "from": "a", "to": "c"}]
RUNS, NODE_RUNS = "circle.pipeline_runs", "circle.pipeline_node_runs"


def pipeline(database: Database, runs: int = 0) -> int:
    """An active pipeline with runs that are pending."""
    with database.session() as session:
        made = PipelineRepository(session).create(PipelineCreate(name="p", status="active", nodes=NODES, edges=EDGES))
        for _ in range(runs):
            RunRepository(session).create(made.id)
        return made.id


def age(raw: psycopg.Connection) -> None:
    """Make the runs old enough to be counted by the doctor."""
    with raw.transaction():
        raw.execute("SET LOCAL session_replication_role = replica")
        raw.execute(f"ALTER TABLE {RUNS} DISABLE TRIGGER pipeline_runs_over")
        raw.execute(
            f"""UPDATE {RUNS} SET created_at = created_at - interval '1 hour',
                started_at = started_at - interval '1 hour', completed_at = completed_at - interval '1 hour'"""
        )
        raw.execute(f"ALTER TABLE {RUNS} ENABLE ALWAYS TRIGGER pipeline_runs_over")


def catalog(url: str) -> list[str]:
    """All that another query than the doctor's sees, but for what a dump and restore change as well."""
    return [canonical(line) for line in test_alembic.catalog(url)]


def found(database: Database, **options: float) -> list[tuple[str, str]]:
    return [(finding.code, finding.object) for finding in doctor(database.engine, **options)]


def outcomes(findings: list[Finding]) -> set[str | None]:
    return {finding.outcome for finding in findings}


# --- the schema ------------------------------------------------------------------------------------------------------

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
    "ALTER TABLE circle.pipeline_runs DROP CONSTRAINT ck_pipeline_runs_times": (
        "drift",
        "constraint ck_pipeline_runs_times of circle.pipeline_runs",
    ),
    "ALTER TABLE circle.pipeline_runs DROP CONSTRAINT pipeline_runs_status_check, ADD CONSTRAINT "
    "pipeline_runs_status_check CHECK (status IN ('pending', 'running', 'completed', 'failed', 'cancelled'))": (
        "drift",
        "constraint pipeline_runs_status_check of circle.pipeline_runs",
    ),
    "ALTER TABLE circle.pipelines DROP CONSTRAINT ck_pipelines_retries, "
    "ADD CONSTRAINT ck_pipelines_retries CHECK (max_retries_per_node >= 0) NOT VALID": (
        "drift",
        "constraint ck_pipelines_retries of circle.pipelines",
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
    "DROP FUNCTION circle.fail_node(bigint, text, text, boolean, bigint)": (
        "drift",
        "function circle.fail_node(bigint,text,text,boolean,bigint)",
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
    "CREATE OR REPLACE VIEW circle.startable_node_runs AS SELECT * FROM circle.pipeline_node_runs": (
        "drift",
        "view circle.startable_node_runs",
    ),
    "DROP INDEX circle.idx_pipeline_runs_pending": (
        "drift",
        "index circle.idx_pipeline_runs_pending of circle.pipeline_runs",
    ),
    "DROP INDEX circle.idx_pipeline_node_runs_run_node; "
    "CREATE INDEX idx_pipeline_node_runs_run_node ON circle.pipeline_node_runs (run_id, node_id)": (
        "drift",
        "index circle.idx_pipeline_node_runs_run_node of circle.pipeline_node_runs",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_what_was_changed_by_hand_is_found_and_mended(
    broken: str, database: Database, raw: psycopg.Connection, database_url: str
) -> None:
    clean = catalog(database_url)
    raw.execute(broken)
    assert catalog(database_url) != clean
    assert found(database) == [BROKEN[broken]]
    assert catalog(database_url) != clean, "to look changes nothing"
    (mended,) = doctor(database.engine, repair=True)
    assert ((mended.code, mended.object), mended.outcome) == (BROKEN[broken], "repaired")
    assert found(database) == []
    if "ADD owner" in broken:
        raw.execute("ALTER TABLE circle.pipelines DROP COLUMN owner")
    assert catalog(database_url) == clean


def test_everything_at_once(database: Database, raw: psycopg.Connection, database_url: str) -> None:
    pipeline(database, runs=2)
    clean = catalog(database_url)
    for broken in BROKEN:
        if "ADD owner" not in broken and "description" not in broken:
            raw.execute(broken.replace("DROP FUNCTION", "DROP FUNCTION IF EXISTS"))
    assert len(found(database)) >= 15
    assert outcomes(doctor(database.engine, repair=True)) == {"repaired"}
    assert found(database) == []
    assert catalog(database_url) == clean


def test_all_triggers_disabled_foreign_keys_included(
    database: Database, raw: psycopg.Connection, database_url: str
) -> None:
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
        ("DROP TABLE circle.pipeline_version_nodes", "table pipeline_version_nodes"),
        ("ALTER TABLE circle.pipeline_runs DROP worker_id CASCADE", "column worker_id of circle.pipeline_runs"),
        ("ALTER TABLE circle.pipelines ALTER name TYPE text", "column name of circle.pipelines"),
        ("ALTER TABLE circle.pipeline_events ALTER id DROP IDENTITY", "column id of circle.pipeline_events"),
        ("ALTER TABLE circle.pipeline_versions DROP CONSTRAINT pipeline_versions_pkey",
         "constraint pipeline_versions_pkey of circle.pipeline_versions"),
    ],
)  # fmt: skip
def test_what_no_repair_can_bring_back_stays_reported(
    broken: str, item: str, database: Database, raw: psycopg.Connection
) -> None:
    raw.execute(broken)
    assert ("drift", item) in found(database)
    (left,) = [finding for finding in doctor(database.engine, repair=True) if finding.object == item]
    assert (left.severity, left.repair, left.outcome) == ("error", (), None)
    assert "restore" in left.advice


@pytest.mark.parametrize(
    ("broken", "unexamined"),
    [
        ("ALTER TABLE circle.pipelines ALTER name TYPE text", set()),
        ("ALTER TABLE circle.pipelines DROP description CASCADE", set()),
        ("DROP TABLE circle.pipeline_version_nodes", {"incomplete_version"}),
        ("DROP TABLE circle.pipeline_events CASCADE", {"foreign_events"}),
        ("ALTER TABLE circle.pipelines DROP success_count CASCADE", {"counters"}),
        ("ALTER TABLE circle.pipelines DROP nodes CASCADE", {"broken_graph", "not_compiled"}),
    ],
)
def test_rows_are_examined_as_far_as_the_schema_lets_them(
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


def test_a_view_that_differs_in_an_alias_only(database: Database, raw: psycopg.Connection) -> None:
    (view,) = (item for item in reference() if item.kind == "view")
    (text,) = raw.execute("SELECT pg_get_viewdef(%s::regclass)", (view.name,)).fetchone() or ()
    raw.execute(f"CREATE OR REPLACE VIEW {view.name} AS {text.replace('p.run_id = n.run_id', 'p.run_id = p.run_id')}")
    assert found(database) == [("drift", str(view))]
    assert outcomes(doctor(database.engine, repair=True)) == {"repaired"}
    assert found(database) == []


def test_what_others_added(database: Database, raw: psycopg.Connection) -> None:
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
        CREATE TRIGGER theirs BEFORE UPDATE ON circle.agents FOR EACH ROW EXECUTE FUNCTION public.meddle()"""
    )
    expected = [
        ("foreign_constraint", "constraint short of circle.pipelines"),
        ("foreign_function", "function circle.start_run(integer,integer)"),
        ("foreign_constraint", "index circle.idx_names of circle.pipelines"),
        ("row_security", "row security policies of circle.pipelines"),
        ("foreign_rule", "rule keep of circle.pipelines"),
        ("foreign_trigger", 'trigger "Meddles" of circle.pipelines'),
    ]
    assert found(database) == expected
    left = doctor(database.engine, repair=True)
    assert [(finding.severity, finding.outcome) for finding in left] == [("warning", None)] * 6
    words = ["length(", "of ours may get it instead", "UNIQUE", ": mine", "DO INSTEAD NOTHING", "public.meddle()"]
    assert [word in finding.message for word, finding in zip(words, left, strict=True)] == [True] * 6


def test_an_invalid_index_is_rebuilt_when_nothing_stands_against_it(
    database: Database, raw: psycopg.Connection, database_url: str
) -> None:
    pipeline(database, runs=1)
    clean = catalog(database_url)
    raw.execute("DROP INDEX circle.idx_pipeline_node_runs_run_node")
    twice = f"INSERT INTO {NODE_RUNS} (run_id, node_id, node_type) VALUES (1, 'a', 'trigger') RETURNING id"
    (double,) = raw.execute(twice).fetchone() or ()
    name = "idx_pipeline_node_runs_run_node"
    for index in (name, "idx_mine"):
        with pytest.raises(psycopg.errors.UniqueViolation):
            raw.execute(f"CREATE UNIQUE INDEX CONCURRENTLY {index} ON {NODE_RUNS} (run_id, node_id)")
    ours, theirs = (f"index circle.{index} of {NODE_RUNS}" for index in (name, "idx_mine"))
    assert found(database) == [("invalid_index", ours), ("invalid_index", theirs)]

    mended, left = doctor(database.engine, repair=True)
    assert (mended.object, mended.outcome) == (theirs, "repaired")
    assert left.object == ours
    assert left.outcome is not None
    assert left.outcome.startswith("not repaired: could not create unique index")
    assert "23505" in left.outcome

    raw.execute(f"DELETE FROM {NODE_RUNS} WHERE id = %s", (double,))
    assert outcomes(doctor(database.engine, repair=True)) == {"repaired"}
    assert found(database) == []
    assert catalog(database_url) == clean


def test_an_index_that_is_being_built_is_left_alone(
    database: Database, raw: psycopg.Connection, connect: Connect, database_url: str
) -> None:
    pipeline(database, runs=1)
    writer, builder = connect(database_url), connect(database_url)
    raw.execute("DROP INDEX circle.idx_pipeline_runs_pending")
    with writer.transaction():
        writer.execute(f"UPDATE {RUNS} SET current_node = 'a'")
        thread = threading.Thread(
            target=builder.execute,
            args=(f"CREATE INDEX CONCURRENTLY idx_pipeline_runs_pending ON {RUNS} (id) WHERE status = 'pending'",),
        )
        thread.start()
        deadline = time.monotonic() + 30
        while not found(database) or ("drift", f"index circle.idx_pipeline_runs_pending of {RUNS}") in found(database):
            assert time.monotonic() < deadline
        (finding,) = doctor(database.engine, repair=True)
    thread.join()
    assert (finding.severity, finding.code, finding.outcome) == ("warning", "invalid_index", None)
    assert "being built" in finding.message
    assert found(database) == []


def test_a_repair_that_rows_stand_against(database: Database, raw: psycopg.Connection) -> None:
    pipeline(database)
    raw.execute("ALTER TABLE circle.pipelines DROP CONSTRAINT ck_pipelines_retries")
    raw.execute("UPDATE circle.pipelines SET max_retries_per_node = -1")
    (left,) = doctor(database.engine, repair=True)
    assert left.outcome is not None
    said, _, query = left.outcome.partition("; mend the rows first: ")
    assert said.endswith("violated by some row (SQLSTATE 23514)")
    assert raw.execute(query.replace("*", "max_retries_per_node").encode()).fetchall() == [(-1,)]
    (left,) = doctor(database.engine)
    assert left.advice == f"a repair validates it once no row breaks it: mend those first that do, {query}"
    with pytest.raises(psycopg.errors.CheckViolation):  # but new rows are held to it again
        raw.execute("INSERT INTO circle.pipelines (name, max_retries_per_node) VALUES ('p', -1)")
    raw.execute("UPDATE circle.pipelines SET max_retries_per_node = 1")
    assert outcomes(doctor(database.engine, repair=True)) == {"repaired"}


def test_a_repair_of_not_null_that_rows_stand_against_leaves_no_check(
    database: Database, raw: psycopg.Connection, database_url: str
) -> None:
    pipeline(database)
    raw.execute("ALTER TABLE circle.pipelines ALTER retry_backoff_max DROP NOT NULL")
    raw.execute("UPDATE circle.pipelines SET retry_backoff_max = NULL")
    broken = catalog(database_url)
    (left,) = doctor(database.engine, repair=True)
    assert left.outcome is not None
    said, _, query = left.outcome.partition("; mend the rows first: ")
    assert said.endswith("violated by some row (SQLSTATE 23514)")
    assert query == "SELECT * FROM circle.pipelines WHERE NOT (retry_backoff_max IS NOT NULL)"
    assert catalog(database_url) == broken
    raw.execute("UPDATE circle.pipelines SET description = 'still written'")


def test_a_repair_that_needs_a_second_connection_and_gets_none_fails_alone(
    database: Database, raw: psycopg.Connection, database_url: str
) -> None:
    raw.execute("ALTER TABLE circle.pipelines DISABLE TRIGGER pipelines_accept")
    raw.execute("ALTER TABLE circle.pipelines ALTER retry_backoff_max DROP NOT NULL")
    broken = catalog(database_url)
    role = f"gathering_test_single_{time.monotonic_ns()}"
    raw.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'x' CONNECTION LIMIT 1 IN ROLE {raw.info.user}".encode())
    try:
        with Database(make_url(database_url).set(username=role, password="x")) as single:
            mended, left = doctor(single.engine, repair=True)
        assert (mended.code, mended.outcome) == ("demoted_trigger", "repaired")
        assert left.outcome is not None
        assert "too many connections for role" in left.outcome
    finally:
        raw.execute(f"DROP ROLE {role}".encode())
    raw.execute("ALTER TABLE circle.pipelines DISABLE TRIGGER pipelines_accept")
    assert catalog(database_url) == broken, "no check of the repair is left"


def test_a_repair_that_failed_is_not_reported_as_one(database: Database, raw: psycopg.Connection) -> None:
    """The missing index is an invalid one afterwards."""
    pipeline(database, runs=1)
    raw.execute("DROP INDEX circle.idx_pipeline_node_runs_run_node")
    raw.execute(f"INSERT INTO {NODE_RUNS} (run_id, node_id, node_type) VALUES (1, 'a', 'trigger')")
    findings = doctor(database.engine, repair=True)
    assert [finding.code for finding in findings] == ["invalid_index"]
    assert "not repaired: could not create unique index" in str(findings[0].outcome)


def test_what_others_mend_meanwhile_is_repaired(
    database: Database, raw: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw.execute("DROP INDEX circle.idx_pipeline_runs_pending")
    mend = sys.modules[doctor.__module__]._mend

    def too_late(connection: Connection, finding: Finding) -> str | None:
        raw.execute(finding.repair[1].encode())
        return mend(connection, replace(finding, repair=finding.repair[1:]))  # type: ignore[no-any-return]

    monkeypatch.setattr(f"{doctor.__module__}._mend", too_late)
    assert outcomes(doctor(database.engine, repair=True)) == {"repaired"}


def test_a_repair_that_needs_another_is_tried_again(
    database: Database, raw: psycopg.Connection, database_url: str
) -> None:
    clean = catalog(database_url)
    functions = ["circle.node_findings(jsonb)", "circle.trimmed(text)"]  # the first by name calls the second
    raw.execute(f"DROP FUNCTION {', '.join(functions)}")
    assert [name for _, name in found(database)] == [f"function {name}" for name in functions]
    assert outcomes(doctor(database.engine, repair=True)) == {"repaired"}
    assert catalog(database_url) == clean


def test_after_a_deadlock_the_index_is_dropped_and_built_again(
    database: Database, raw: psycopg.Connection, connect: Connect, database_url: str
) -> None:
    clean = catalog(database_url)
    raw.execute("DROP INDEX circle.idx_pipeline_runs_pending")
    writer = connect(database_url)
    writer.execute("SET deadlock_timeout = '1min'")  # the build is the one that is told
    result: list[Finding] = []
    building = "SELECT FROM pg_class c JOIN pg_index ON oid = indexrelid WHERE relname = 'idx_pipeline_runs_pending'"
    with writer.transaction():
        writer.execute(f"UPDATE {RUNS} SET current_node = 'a'")
        thread = threading.Thread(target=lambda: result.extend(doctor(database.engine, repair=True)))
        thread.start()
        deadline = time.monotonic() + 60
        while raw.execute(building).fetchone() is None:
            assert time.monotonic() < deadline
        writer.execute(f"LOCK TABLE {RUNS} IN SHARE MODE")  # waits for the build, which waits for this transaction
    thread.join()
    assert outcomes(result) == {"repaired"}
    assert found(database) == []
    assert catalog(database_url) == clean


def test_a_build_gives_way_to_who_waits_behind_it(
    database: Database, raw: psycopg.Connection, connect: Connect, database_url: str
) -> None:
    clean = catalog(database_url)
    raw.execute("DROP INDEX circle.idx_pipeline_runs_pending")
    reader, result = connect(database_url), list[Finding]()
    waits = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'CREATE INDEX CONCURRENTLY%'"
    with reader.transaction():
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        reader.execute(f"SELECT FROM {RUNS}")
        thread = threading.Thread(target=lambda: result.extend(doctor(database.engine, repair=True)))
        thread.start()
        deadline = time.monotonic() + 30
        while raw.execute(waits).fetchone() is None:
            assert time.monotonic() < deadline
        raw.execute(
            "SET lock_timeout = '10s'"
        )  # the build waits for the reader, and all writers would wait behind this
        raw.execute(f"CREATE INDEX IF NOT EXISTS idx_pipeline_runs_history ON {RUNS} (id)")
        assert thread.is_alive()
    thread.join()
    assert outcomes(result) == {"repaired"}
    assert catalog(database_url) == clean


def test_one_repairs_at_a_time(database: Database, raw: psycopg.Connection) -> None:
    raw.execute("SELECT pg_advisory_lock(%s)", (migrations.MIGRATOR,))
    assert doctor(database.engine) == []
    with pytest.raises(DatabaseUnavailableError, match="a migrator or another doctor is at work"):
        doctor(database.engine, repair=True)
    raw.execute("SELECT pg_advisory_unlock(%s)", (migrations.MIGRATOR,))
    assert doctor(database.engine, repair=True) == []
    assert raw.execute("SELECT pg_try_advisory_lock(%s)", (migrations.MIGRATOR,)).fetchone() == (True,)


def test_a_repair_waits_for_its_lock_and_lets_others_pass(
    database: Database, raw: psycopg.Connection, connect: Connect, database_url: str
) -> None:
    raw.execute("ALTER TABLE circle.pipelines DISABLE TRIGGER pipelines_accept")
    reader = connect(database_url)
    with reader.transaction():
        reader.execute("SELECT FROM circle.pipelines")
        reader.execute("LOCK TABLE circle.pipelines IN ROW EXCLUSIVE MODE")
        result: list[Finding] = []
        thread = threading.Thread(target=lambda: result.extend(doctor(database.engine, repair=True)))
        thread.start()
        for _ in range(10):  # each would wait for the repair if the repair waited on
            raw.execute("UPDATE circle.pipelines SET name = name")
            time.sleep(0.1)
        assert thread.is_alive()
    thread.join()
    assert outcomes(result) == {"repaired"}


def test_after_a_dump_and_restore_nothing_differs(database: Database, raw: psycopg.Connection) -> None:
    """A dump prints definitions as here, and a restore reads them: casts move into lists."""
    raw.execute("SET search_path = pg_catalog")
    for item, definition in reference().items():
        table = f"circle.{item.table}"
        if item.kind == "constraint" and definition.startswith("CHECK"):
            raw.execute(f"ALTER TABLE {table} DROP CONSTRAINT {item.name}, ADD CONSTRAINT {item.name} {definition}")
        elif item.kind == "index":
            raw.execute(f"DROP INDEX {item.name}; {definition}")
        elif item.kind == "trigger":
            mode = reference()[item._replace(kind="firing")].replace("A", "ALWAYS").replace("O", "")
            raw.execute(f"DROP TRIGGER {item.name} ON {table}; {definition}")
            raw.execute(f"ALTER TABLE {table} ENABLE {mode} TRIGGER {item.name}")
        elif item.kind == "view":
            raw.execute(f"CREATE OR REPLACE VIEW {item.name} AS {definition}")
    assert found(database) == []


def test_canonical_forms_keep_what_matters() -> None:
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


def test_the_catalog_is_that_of_a_clean_build(database_url: str) -> None:
    """Where this fails: ``make generated``."""
    rows = generated.clean_catalog(database_url).splitlines()
    committed = generated.CATALOG.read_text(encoding="utf-8").splitlines()
    assert len(rows) == len(committed)
    assert [row for row, line in zip(rows, committed, strict=True) if not same(row, line)] == []


# --- the revision ----------------------------------------------------------------------------------------------------


def test_an_older_revision_is_upgraded(database: Database, database_url: str) -> None:
    clean = catalog(database_url)
    migrations.downgrade(database_url, "009b_lifecycle")
    (finding,) = doctor(database.engine)
    assert (finding.code, finding.severity) == ("revision", "error")
    assert "009b_lifecycle" in finding.message
    assert migrations.head() in finding.message
    assert [finding.outcome for finding in doctor(database.engine, repair=True)] == ["repaired"]
    assert found(database) == []
    assert catalog(database_url) == clean


def test_the_revision_is_read_under_the_lock(
    database: Database, raw: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked, current = [], migrations.current

    def read(connection: Connection) -> str | None:
        locked.append(raw.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'").fetchone())
        return current(connection)

    monkeypatch.setattr(migrations, "current", read)
    assert doctor(database.engine, repair=True) == []
    assert locked == [(1,)]


def test_a_newer_revision_or_none_is_left_alone(
    database: Database, raw: psycopg.Connection, empty_database_url: str
) -> None:
    raw.execute("UPDATE circle.alembic_version SET version_num = '099_future'")
    (finding,) = doctor(database.engine, repair=True)
    assert (finding.code, finding.outcome) == ("revision", None)
    assert "ahead of this code" in finding.advice
    with Database(empty_database_url) as empty:
        (finding,) = doctor(empty.engine, repair=True)
    assert (finding.code, finding.outcome) == ("revision", None)
    assert "db upgrade" in finding.advice


# --- rows ------------------------------------------------------------------------------------------------------------


def test_counters_are_raised_and_never_lowered(database: Database, raw: psycopg.Connection) -> None:
    behind, ahead = pipeline(database, runs=4), pipeline(database, runs=1)
    with database.session() as session:
        runs = RunRepository(session)
        runs.cancel(1)
        runs.start(2)
        runs.fail(2, "no")
        runs.start(3)
        runs.record(3, [{"node_id": node["id"], "status": "completed"} for node in NODES])
        runs.finish(3)
    count = "SELECT run_count, success_count, error_count FROM circle.pipelines WHERE id = %s"
    before = raw.execute(count, (behind,)).fetchone()
    assert found(database) == []
    raw.execute(
        "UPDATE circle.pipelines SET run_count = 2, success_count = 0, error_count = 0 WHERE id = %s", (behind,)
    )
    raw.execute("UPDATE circle.pipelines SET run_count = 50, success_count = 40 WHERE id = %s", (ahead,))
    assert found(database) == [], "who writes past our functions counts new runs up a moment later"
    age(raw)
    assert found(database) == [("counters", f"circle.pipelines id {behind}")]
    assert outcomes(doctor(database.engine, repair=True)) == {"repaired"}
    assert raw.execute(count, (behind,)).fetchone() == before
    assert raw.execute(count, (ahead,)).fetchone() == (50, 40, 0)
    assert found(database) == []


def test_counters_are_mended_beside_live_writers(database: Database, raw: psycopg.Connection) -> None:
    target = pipeline(database, runs=300)
    stop = threading.Event()

    def write() -> None:
        with database.session(autocommit=True) as session:
            while not stop.is_set():
                RunRepository(session).create(target)

    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    mended = 0
    for _ in range(10):
        age(raw)
        raw.execute("UPDATE circle.pipelines SET run_count = 0")
        mended += sum(finding.outcome == "repaired" for finding in doctor(database.engine, repair=True))
    stop.set()
    for writer in writers:
        writer.join()
    assert mended > 0
    counted = raw.execute(f"SELECT run_count, (SELECT count(*) FROM {RUNS}) FROM circle.pipelines").fetchone()
    assert counted is not None
    assert counted[0] <= counted[1], "a run that began beside the recount is not counted twice"
    age(raw)
    doctor(database.engine, repair=True)
    counted = raw.execute(f"SELECT run_count, (SELECT count(*) FROM {RUNS}) FROM circle.pipelines").fetchone()
    assert counted is not None
    assert counted[0] == counted[1], "and none is lost"


def test_counters_are_mended_without_a_lock_on_the_row_while_runs_are_counted(
    database: Database, raw: psycopg.Connection
) -> None:
    pipeline(database, runs=1)
    age(raw)
    raw.execute("UPDATE circle.pipelines SET run_count = 0")
    (finding,) = doctor(database.engine)
    with raw.transaction():
        plan = "\n".join(line for (line,) in raw.execute("EXPLAIN " + finding.repair[0]))
    assert "LockRows" not in plan
    assert "FOR NO KEY UPDATE" not in finding.repair[0]


def test_runs_that_are_over_with_live_nodes(database: Database, raw: psycopg.Connection) -> None:
    pipeline(database, runs=3)
    raw.execute("SET session_replication_role = replica")  # as a subscription or a restore writes
    raw.execute(f"UPDATE {RUNS} SET status = 'cancelled' WHERE id = 1")
    raw.execute(f"UPDATE {RUNS} SET status = 'running' WHERE id = 2")
    raw.execute(f"UPDATE {RUNS} SET status = 'completed' WHERE id = 2")
    assert found(database) == [("live_nodes", f"{RUNS} id 1"), ("live_nodes", f"{RUNS} id 2")]
    assert outcomes(doctor(database.engine, repair=True)) == {"repaired"}
    states = f"SELECT run_id, status, count(*), count(completed_at) FROM {NODE_RUNS} GROUP BY 1, 2 ORDER BY 1"
    assert raw.execute(states).fetchall() == [(1, "cancelled", 3, 3), (2, "cancelled", 3, 3), (3, "pending", 3, 0)]
    assert found(database) == []


def test_leases_that_ran_out(database: Database, raw: psycopg.Connection) -> None:
    pipeline(database, runs=250)
    with database.session() as session:
        runs = RunRepository(session)
        claimed = runs.claim("gone", timedelta(milliseconds=1), limit=230)
        kept = runs.claim("here", timedelta(minutes=5), limit=1)
    raw.execute(f"UPDATE {RUNS} SET claim_count = 50 WHERE id = %s", (claimed[9].id,))
    for run in claimed[:5]:
        raw.execute("SELECT count(*) FROM circle.advance_run(%s, '[]', %s)", (run.id, run.claim_token))
    (finding,) = doctor(database.engine)
    assert (finding.code, finding.severity) == ("expired_leases", "warning")
    assert "on 230 running runs" in finding.message
    assert outcomes(doctor(database.engine, repair=True)) == {"repaired"}
    assert found(database) == []
    status = f"SELECT status, count(*) FROM {RUNS} GROUP BY 1 ORDER BY 1"
    assert raw.execute(status).fetchall() == [("pending", 249), ("running", 1)]
    held = raw.execute(f"SELECT id, worker_id FROM {RUNS} WHERE status = 'running'").fetchall()
    assert held == [(kept[0].id, "here")]
    retried = f"SELECT count(DISTINCT run_id) FROM {NODE_RUNS} WHERE retry_count = 1 AND status = 'pending'"
    assert raw.execute(retried).fetchone() == (5,)


def test_the_transaction_that_holds_the_events_back(
    database: Database, raw: psycopg.Connection, connect: Connect, database_url: str, admin: psycopg.Connection
) -> None:
    pipeline(database)
    reader, writer = connect(database_url), connect(database_url)
    with reader.transaction(), writer.transaction():
        reader.execute("SELECT FROM circle.pipelines")  # has no id: holds nothing back
        writer.execute("UPDATE circle.pipelines SET description = 'long'")
        time.sleep(0.3)
        assert found(database) == [], "young ones are as they should be"
        (finding,) = doctor(database.engine, held_for=0.2)
    assert (finding.code, finding.severity, finding.repair) == ("feed_held_back", "warning", ())
    assert finding.object == f"session {writer.info.backend_pid}"
    assert "SET description = 'long'" in finding.message
    # the oldest counts, in whichever database of the cluster it is
    with admin.transaction():
        admin.execute("SELECT pg_current_xact_id()")
        time.sleep(0.3)
        assert (("feed_held_back", f"session {admin.info.backend_pid}")) in found(database, held_for=0.2)
    assert found(database, held_for=0.2) == []


def test_ids_past_half_their_range(database: Database, raw: psycopg.Connection) -> None:
    raw.execute("SELECT setval('circle.pipeline_runs_id_seq', 1073741823)")
    assert found(database) == []
    raw.execute("SELECT setval('circle.pipeline_runs_id_seq', 1073741824)")
    raw.execute("SELECT setval('circle.pipeline_node_runs_id_seq', 3000000000)")  # a bigint
    (finding,) = doctor(database.engine, repair=True)
    assert (finding.code, finding.object, finding.outcome) == ("ids", "circle.pipeline_runs.id", None)
    assert "1073741824 of 2147483647" in finding.message


def test_graphs_that_are_broken_and_those_that_were_never_compiled(database: Database, raw: psycopg.Connection) -> None:
    raw.execute("SET session_replication_role = replica")
    insert = "INSERT INTO circle.pipelines (name, status, nodes, edges) VALUES ('p', %s, %s, %s) RETURNING id"
    (fine,) = raw.execute(insert, ("active", '[{"id": "a", "type": "trigger", "name": "A"}]', "[]")).fetchone() or ()
    raw.execute(insert, ("draft", '[{"id": "a", "type": "agent", "name": "A"}]', "[]"))
    raw.execute("ALTER TABLE circle.pipelines DISABLE TRIGGER pipelines_accept")
    cycle = '[{"id": "e", "from": "a", "to": "a"}]'
    broken = [
        raw.execute(insert, values).fetchone()
        for values in [
            ("active", '[{"id": "a", "type": "agent", "name": "A"}]', "[]"),
            ("draft", '[{"id": "a", "type": "trigger", "name": "A"}]', cycle),
            ("draft", "{}", "[]"),
            ("draft", '[{"id": "a", "type": "trigger", "name": "A", "config": {"x": 1e5000}}]', "[]"),
            (
                "draft",
                '[{"id": "a", "type": "trigger", "name": "A", "config": {"x": ' + "[" * 5000 + "]" * 5000 + "}}]",
                "[]",
            ),
        ]
    ]
    raw.execute("ALTER TABLE circle.pipelines ENABLE ALWAYS TRIGGER pipelines_accept")
    assert found(database) == [
        *[("not_compiled", f"circle.pipelines id {fine + offset}") for offset in range(2)],
        *[("broken_graph", f"circle.pipelines id {row[0]}") for row in broken if row],
    ]
    findings = doctor(database.engine, repair=True)
    assert [finding.outcome for finding in findings] == ["repaired"] * 2 + [None] * 5
    assert "cycle" in findings[3].message
    assert max(len(finding.message) for finding in findings) < 400
    with database.session() as session:
        assert len(RunRepository(session).nodes(RunRepository(session).create(fine).id)) == 1


def test_a_graph_that_is_null(database: Database, raw: psycopg.Connection) -> None:
    raw.execute("SET session_replication_role = replica")
    raw.execute("ALTER TABLE circle.pipelines ALTER nodes DROP NOT NULL, DISABLE TRIGGER pipelines_accept")
    raw.execute("INSERT INTO circle.pipelines (name, nodes) VALUES ('p', NULL)")
    raw.execute("ALTER TABLE circle.pipelines ENABLE ALWAYS TRIGGER pipelines_accept")
    assert ("broken_graph", "circle.pipelines id 1") in found(database)


def test_versions_whose_nodes_are_not_all_there(database: Database, raw: psycopg.Connection) -> None:
    short, long = pipeline(database), pipeline(database)
    content = "SELECT * FROM circle.pipeline_version_nodes ORDER BY pipeline_id, position"
    versions = "SELECT * FROM circle.pipeline_versions ORDER BY pipeline_id"
    clean = raw.execute(content).fetchall(), raw.execute(versions).fetchall()
    raw.execute("DELETE FROM circle.pipeline_version_nodes WHERE (pipeline_id, position) = (%s, 1)", (short,))
    raw.execute("INSERT INTO circle.pipeline_version_nodes VALUES (%s, 1, 9, 'z', 'agent', '{}', '{}')", (long,))
    expected = [("incomplete_version", f"circle.pipeline_versions {made}, 1") for made in (short, long)]
    assert found(database) == expected
    findings = doctor(database.engine, repair=True)
    assert [finding.message for finding in findings] == ["it has 2 of its 3 nodes", "it has 4 of its 3 nodes"]
    assert outcomes(findings) == {"repaired"}
    assert (raw.execute(content).fetchall(), raw.execute(versions).fetchall()) == clean
    with database.session() as session:
        RunRepository(session).create(short)


def test_events_of_another_cluster(database: Database, raw: psycopg.Connection) -> None:
    raw.execute(
        """CREATE TABLE IF NOT EXISTS circle.pipeline_events (
            id bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
            run_id integer, node_id text, type text NOT NULL, data jsonb, created_at timestamptz DEFAULT now())"""
    )
    insert = "INSERT INTO circle.pipeline_events (run_id, type, xid) SELECT 1, 'pipeline_run.started', {} RETURNING id"
    written = [
        raw.execute(insert.format(xid)).fetchone()
        # of the restored ones some lie ahead of this cluster, some don't; the last is its own
        for xid in ("'800'::xid8", "'1000000000'::xid8", "'801'::xid8", "'1000000001'::xid8", "pg_current_xact_id()")
    ]
    order = "SELECT id FROM circle.pipeline_events e ORDER BY e.xid, id"
    own = "SELECT id, xid::text FROM circle.pipeline_events e ORDER BY e.id DESC LIMIT 1"
    newest = raw.execute(own).fetchone()
    assert raw.execute(order).fetchall() != written
    assert found(database) == [("foreign_events", "circle.pipeline_events")]
    assert outcomes(doctor(database.engine, repair=True)) == {"repaired"}
    assert found(database) == []
    assert raw.execute(order).fetchall() == written, "as they happened"
    assert raw.execute(own).fetchone() == newest, "a reader may have seen it already"


# --- a healthy database ----------------------------------------------------------------------------------------------


def test_a_healthy_database_stays_without_findings(database: Database, raw: psycopg.Connection) -> None:
    assert found(database) == []
    pipelines = [pipeline(database) for _ in range(5)]
    over = time.monotonic() + 6

    def work(number: int) -> None:
        dice = random.Random(number)
        with database.session(autocommit=True) as session:
            runs = RunRepository(session)
            while time.monotonic() < over:
                try:
                    run = runs.create(dice.choice(pipelines))
                    started = runs.advance(run.id)
                    if dice.random() < 0.2:
                        runs.cancel(run.id)
                    while started:
                        status = dice.choice(["completed", "completed", "completed", "failed"])
                        started = runs.advance(run.id, [{"node_id": n.node_id, "status": status} for n in started])
                except ConflictError:
                    continue

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    during = [doctor(database.engine) for _ in range(5)]
    for worker in workers:
        worker.join()
    statuses = {row[0] for row in raw.execute(f"SELECT DISTINCT status FROM {RUNS}")}
    assert {"completed", "failed", "cancelled"} <= statuses
    assert [*during, doctor(database.engine)] == [[]] * 6
    with database.session() as session:
        assert RunRepository(session).purge(timedelta(0), limit=50) > 0
    assert found(database) == [], "purged runs are history"
