"""The rights that docs/operations.md gives to the role of a service, and what it can't do with them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from sqlalchemy.engine import make_url

from gathering_pipeline import (
    ConfigurationError,
    Database,
    EventRepository,
    PipelineCreate,
    PipelineRepository,
    PipelineStatus,
    PipelineUpdate,
    RunReport,
    RunRepository,
    RunStatus,
    migrations,
)
from gathering_pipeline.maintenance.rights import Purpose, grants, rights
from tests.support.databases import Connect, delete_rows
from tests.support.graphs import graph
from tests.support.runs import LEASE, done

GRANTS = Path(__file__).parents[2] / "docs" / "operations.md"


@pytest.fixture
def app(raw: psycopg.Connection, database_url: str) -> Iterator[str]:
    """The URL of a database for a role that has the documented rights only."""
    found = re.search(r"```sql\n(CREATE ROLE app.*?)```", GRANTS.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    role = f"app_{raw.info.backend_pid}"
    raw.execute(re.sub(r"\bapp\b", role, found[1]).encode())
    yield make_url(database_url).set(username=role, password="x").render_as_string(hide_password=False)
    raw.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())


def serve(url: str) -> None:
    """Call everything that a service calls."""
    nodes, edges = graph("a>b a>c")
    with Database(url) as database, database.session(autocommit=True) as session:
        database.check()
        pipelines, runs, events = PipelineRepository(session), RunRepository(session), EventRepository(session)
        data = PipelineCreate(name="p", status=PipelineStatus.ACTIVE, nodes=nodes, edges=edges)
        pipeline = pipelines.create(data).id
        pipelines.update(pipeline, PipelineUpdate(edges=edges[:1]))
        run_id = runs.create(pipeline, {"x": 1}, tags={"key": "value"}).id
        step = runs.advance(run_id, inputs=True)
        assert [node.node_id for node in step.started] == ["a", "c"]
        runs.fail_node(run_id, "a", "no")
        runs.append_log(run_id, {"m": 1})
        assert runs.ready_nodes(run_id) == []
        runs.cancel(run_id)
        runs.record_run(pipeline, [done(name) for name in "abc"])
        runs.create(pipeline)
        (claimed,) = runs.claim("worker", LEASE)
        runs.heartbeat(claimed.id, LEASE, token=claimed.token)
        assert runs.advance_many([RunReport(claimed.id, [done(name) for name in "abc"], claimed.token)])[0]
        runs.create(pipeline)
        (claimed,) = runs.claim("worker", LEASE)
        runs.release(claimed.id, token=claimed.token)
        runs.cancel(claimed.id)
        runs.recover()
        runs.expire()
        read(database)
        assert pipelines.get(pipeline).run_count == 4
        assert runs.statistics(pipeline).runs[RunStatus.COMPLETED] == 2
        assert len(runs.definition(run_id).edges) == 1
        assert events.read(run_id=run_id) is not None
        assert runs.purge(timedelta(0)).deleted == 4
        pipelines.delete(pipeline)


def read(database: Database) -> None:
    """Call everything that a reader calls."""
    with database.session(autocommit=True) as session:
        database.check()
        runs, events = RunRepository(session), EventRepository(session)
        for pipeline in PipelineRepository(session).search().items:
            PipelineRepository(session).get(pipeline.id)
            runs.statistics(pipeline.id)
        for run in runs.search().items:
            runs.nodes(run.id)
            runs.ready_nodes(run.id)
            runs.definition(run.id)
            runs.logs(run.id)
            runs.tags(run.id)
            runs.explain(run.id)
        runs.stuck(LEASE)
        runs.counts()
        events.read()
        events.last()


def test_service_works_with_its_rights(app: str) -> None:
    serve(app)


def test_operations_page_has_the_grants_that_are_printed() -> None:
    assert "\n".join(grants("app")) in GRANTS.read_text(encoding="utf-8")


@pytest.mark.parametrize("purpose", ["service", "read-only"])
def test_each_grant_is_needed(raw: psycopg.Connection, database: Database, database_url: str, purpose: Purpose) -> None:
    role = f"Least {raw.info.backend_pid}"
    raw.execute(f"CREATE ROLE \"{role}\" LOGIN PASSWORD 'x'".encode())
    url = make_url(database_url).set(username=role, password="x").render_as_string(hide_password=False)
    nodes, edges = graph("a>b")

    def use() -> None:
        if purpose == "service":
            serve(url)
            return
        with Database(url) as reader:
            read(reader)

    try:
        raw.execute("\n".join(grants(role, purpose)).encode())
        if purpose == "read-only":
            with database.session() as session:
                data = PipelineCreate(name="p", status=PipelineStatus.ACTIVE, nodes=nodes, edges=edges)
                RunRepository(session).create(PipelineRepository(session).create(data).id)
        use()
        for right in rights(purpose):
            raw.execute(f'REVOKE {right.privilege} ON {right.object} FROM "{role}"'.encode())
            with pytest.raises(ConfigurationError, match="permission denied"):
                use()
            raw.execute(f'GRANT {right.privilege} ON {right.object} TO "{role}"'.encode())
            if purpose == "service":
                delete_rows(raw)
    finally:
        raw.execute(f'DROP OWNED BY "{role}"; DROP ROLE "{role}"'.encode())


def test_migrator_works_with_its_grant(empty_database_url: str, connect: Connect) -> None:
    raw = connect(empty_database_url)
    role = f"migrator_{raw.info.backend_pid}"
    raw.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'x'".encode())
    url = make_url(empty_database_url).set(username=role, password="x").render_as_string(hide_password=False)
    try:
        with pytest.raises(ConfigurationError, match="permission denied"):
            migrations.upgrade(url)
        raw.execute("\n".join(grants(role, "migrate")).encode())
        migrations.upgrade(url)
        migrations.downgrade(url, "base")
    finally:
        raw.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())


@pytest.mark.parametrize("role", ["", " ", "public", "PUBLIC"])
def test_grants_to_everybody_are_refused(role: str) -> None:
    with pytest.raises(ConfigurationError, match="name the one role"):
        grants(role)


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO circle.pipeline_events (xid, run_id, type) VALUES ('9223372036854775807', 1, 'pipeline_run.started')",
        "UPDATE circle.pipeline_events SET xid = '0'",
        "DELETE FROM circle.pipeline_events",
        "SELECT circle.purge_events('0', 100)",
        "SELECT circle.reset_event_xids()",
        (
            "INSERT INTO circle.pipeline_versions (pipeline_id, version, nodes, edges, node_count, compiled)"
            " VALUES (1, 1, '[]', '[]', 0, '{}')"
        ),
        "DELETE FROM circle.pipeline_versions",
        "UPDATE circle.pipeline_counters SET pending = 0",
        "TRUNCATE circle.pipeline_runs CASCADE",
        "ALTER TABLE circle.pipeline_runs DISABLE TRIGGER ALL",
        "SELECT circle.count_runs(1, NULL, 'pending')",
        (
            "CREATE TEMP TABLE mine (status text); CREATE TRIGGER t AFTER INSERT ON mine"
            " EXECUTE FUNCTION circle.pipeline_runs_after_insert()"
        ),
        "CREATE FUNCTION circle.f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    ],
)
def test_service_can_write_nothing_that_only_triggers_write(app: str, raw: psycopg.Connection, statement: str) -> None:
    raw.execute(f"SET ROLE {make_url(app).username}".encode())
    try:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            raw.execute(statement.encode())
    finally:
        raw.execute("RESET ROLE")


def test_trigger_function_serves_no_other_table(raw: psycopg.Connection) -> None:
    raw.execute("CREATE TABLE public.mine (LIKE circle.pipeline_runs INCLUDING DEFAULTS)")
    raw.execute(
        "CREATE TRIGGER t AFTER INSERT ON public.mine REFERENCING NEW TABLE AS new_rows"
        " FOR EACH STATEMENT EXECUTE FUNCTION circle.pipeline_runs_after_insert()"
    )
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="can't be a trigger of public.mine|of mine"):
        raw.execute("INSERT INTO public.mine (pipeline_id, status) VALUES (1, 'running')")
    raw.execute("DROP TABLE public.mine")
