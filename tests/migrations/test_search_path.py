"""Names in the schema mean what they should, although others may create objects in other schemas."""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import psycopg
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from gathering_pipeline import Database, migrations
from gathering_pipeline.maintenance.doctor import doctor
from gathering_pipeline.migrator import SEARCH_PATH
from tests.support.databases import Connect, scalar
from tests.support.schema import catalog, run_psql, script

HOSTILE = """
CREATE FUNCTION public.isfinite(timestamptz) RETURNS boolean LANGUAGE sql AS 'SELECT 1 / 0 = 1';
CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS 'SELECT NULL::timestamptz';
CREATE FUNCTION public.unnest(circle.compiled_node[]) RETURNS SETOF integer LANGUAGE sql AS 'SELECT 1 / 0';
CREATE FUNCTION public.isnt(varchar, varchar) RETURNS boolean LANGUAGE sql AS 'SELECT 1 / 0 = 1';
CREATE OPERATOR public.= (LEFTARG = varchar, RIGHTARG = varchar, FUNCTION = public.isnt);
CREATE OPERATOR public.<> (LEFTARG = varchar, RIGHTARG = varchar, FUNCTION = public.isnt);
CREATE OPERATOR public.>= (LEFTARG = integer, RIGHTARG = integer, FUNCTION = public.isless);
"""
INLINED = {
    *(
        "are_readable_times",
        "begins_well",
        "blocked_by",
        "branch_label",
        "elapsed_ms",
        "event_types",
        "event_xid",
        "graph_issue",
    ),
    *("holds_run", "is_dead", "is_read_committed", "is_readable", "is_repeat", "is_replica", "nested_too_deep"),
    *("next_token", "node_answer", "node_event", "node_event_data", "node_may_become", "node_types", "nodes_at"),
    *("number_too_large", "retry_due", "run_event", "run_may_become", "surely_trimmed", "trimmed", "was_reported"),
}
"""SQL functions without a setting, which would keep PostgreSQL from inlining them."""
CHECKS = {"is_valid_run", "is_valid_node_run"}
"""Called for every row by a CHECK, which a setting would slow down. Their operands have exactly the types of operators of
``pg_catalog``, which therefore come first."""
FUNCTIONS = """
SELECT p.proname, l.lanname, p.prosecdef, p.prorettype = 'trigger'::regtype,
       coalesce('search_path=pg_catalog, pg_temp' = ANY (p.proconfig), false),
       p.proacl IS NULL OR EXISTS (SELECT FROM aclexplode(p.proacl) a WHERE a.grantee = 0)
FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang WHERE p.pronamespace = 'circle'::regnamespace
"""


@pytest.fixture
def hostile(url: str, connect: Connect) -> psycopg.Connection:
    """A connection to a database whose roles find other names first."""
    raw = connect(url)
    functions = HOSTILE.replace(
        "CREATE OPERATOR public.>=",
        "CREATE FUNCTION public.isless(integer, integer) RETURNS boolean LANGUAGE sql AS 'SELECT 1 / 0 = 1';\n"
        "CREATE OPERATOR public.>=",
    )
    raw.execute("\n".join(line for line in functions.splitlines() if "compiled_node" not in line))
    raw.execute(f"ALTER DATABASE {raw.info.dbname} SET search_path = public, pg_catalog")
    return raw


def used_by_schema(raw: psycopg.Connection) -> list[str]:
    """What in schema circle depends on an object of schema public."""
    return [name for (name,) in raw.execute(
        """SELECT pg_describe_object(d.classid, d.objid, d.objsubid) FROM pg_depend d
        WHERE (d.refclassid, d.refobjid) IN (
            SELECT 'pg_proc'::regclass, oid FROM pg_proc WHERE pronamespace = 'public'::regnamespace
            UNION ALL SELECT 'pg_operator'::regclass, oid FROM pg_operator WHERE oprnamespace = 'public'::regnamespace)
        AND pg_describe_object(d.classid, d.objid, d.objsubid) LIKE '%circle.%' OR
            d.classid = 'pg_constraint'::regclass AND d.refclassid = 'pg_proc'::regclass
            AND d.refobjid IN (SELECT oid FROM pg_proc WHERE pronamespace = 'public'::regnamespace)"""
    )]  # fmt: skip


@pytest.mark.parametrize("by", ["upgrade", "script"])
def test_upgrade_binds_no_name_of_another_schema(
    url: str, hostile: psycopg.Connection, database_url: str, by: str
) -> None:
    if by == "upgrade":
        migrations.upgrade(url)
    else:
        run_psql(url, script("head"))
    assert used_by_schema(hostile) == []
    assert catalog(url) == catalog(database_url)


def test_upgrade_restores_the_search_path_of_its_connection(url: str) -> None:
    with create_engine(url, poolclass=NullPool).connect() as connection:
        connection.execute(text("SET search_path = theirs, public"))
        connection.commit()
        migrations.upgrade(connection)
        assert connection.scalar(text("SHOW search_path")) == "theirs, public"
        connection.commit()
        migrations.downgrade(connection, "base")
        assert connection.scalar(text("SHOW search_path")) == "theirs, public"


def test_script_sets_the_search_path_before_anything_else() -> None:
    for sql in script("head"), script("head:base", down=True):
        assert f"SET search_path = {SEARCH_PATH};" in sql.partition("CREATE SCHEMA")[0]


def test_doctor_binds_no_name_of_another_schema(url: str, hostile: psycopg.Connection, database_url: str) -> None:
    """Its repairs create CHECKs and views again."""
    migrations.upgrade(url)
    hostile.execute("""ALTER TABLE circle.pipelines DROP CONSTRAINT ck_pipelines;
        DROP VIEW circle.startable_node_runs; DROP INDEX circle.idx_pipeline_runs_queue""")  # fmt: skip
    with Database(url) as database:
        assert {finding.outcome for finding in doctor(database.engine, repair=True)} == {"repaired"}
    assert used_by_schema(hostile) == []
    assert catalog(url) == catalog(database_url)


def test_every_function_has_its_search_path(raw: psycopg.Connection) -> None:
    rows = raw.execute(FUNCTIONS).fetchall()
    assert len(rows) > 80
    without = {(name, language) for name, language, _, _, has_path, _ in rows if not has_path}
    assert without == {(name, "sql") for name in INLINED} | {(name, "plpgsql") for name in CHECKS}


def test_function_with_rights_of_its_owner_is_not_for_everyone(raw: psycopg.Connection) -> None:
    rows = raw.execute(FUNCTIONS).fetchall()
    definers = {name for name, _, definer, _, _, _ in rows if definer}
    assert definers >= {"pipelines_after", "pipeline_runs_after_update", "count_runs"}
    everyone = {name for name, _, definer, _, _, public in rows if definer and public}
    # a sweep calls it with the rights of its caller; it takes no argument, and changes no sum
    assert everyone == {"fold_counters"}
    assert all(has_path for _, _, definer, _, has_path, _ in rows if definer)


def test_role_without_rights_can_use_no_guard(raw: psycopg.Connection, connect: Connect, database_url: str) -> None:
    """Not even on a table of its own."""
    role = f"gathering_test_guest_{raw.info.backend_pid}"
    raw.execute(f"CREATE ROLE {role}; GRANT USAGE ON SCHEMA circle TO {role}; GRANT CREATE ON SCHEMA public TO {role}")
    guest = connect(database_url)
    try:
        guest.execute(f"SET ROLE {role}; CREATE TABLE public.theirs (id integer)")
        guards = [name for name, _, definer, trigger, _, _ in raw.execute(FUNCTIONS) if definer and trigger]
        for guard in guards:
            with pytest.raises(
                psycopg.errors.InsufficientPrivilege, match=f"permission denied for function circle.{guard}"
            ):
                guest.execute(
                    f"""CREATE TRIGGER misused AFTER INSERT ON public.theirs
                    FOR EACH ROW EXECUTE FUNCTION circle.{guard}()"""
                )
        for call in ("add_up_counters()", "count_runs(1, NULL, 'failed', 7)"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied for function"):
                guest.execute(f"SELECT circle.{call}")
    finally:
        guest.close()
        raw.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
    assert scalar(raw, "SELECT count(*) FROM circle.pipeline_counters") == 0
