"""Ids of runs and node runs: BIGINT from revision 008 on where the tables are small, INTEGER below it."""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import psycopg
import pytest
from alembic import command

from gathering_pipeline import (
    AdoptionError,
    Database,
    PipelineCreate,
    PipelineRepository,
    RunReport,
    RunRepository,
    migrations,
)
from gathering_pipeline.lifecycle import PipelineStatus
from gathering_pipeline.maintenance.doctor import doctor
from gathering_pipeline.migrator import SMALL_TABLE
from tests.support import servers
from tests.support.adoption import revision
from tests.support.databases import Connect, scalar
from tests.support.doctor import EDGES, NODE_RUNS, NODES, RUNS
from tests.support.schema import catalog, facts

BELOW, WITH = "007_pipeline_execution", "008_valid_rows"
IDS = ("pipeline_runs.id", "pipeline_node_runs.id", "pipeline_node_runs.run_id")
SEQUENCES = ("pipeline_runs_id_seq", "pipeline_node_runs_id_seq")
MOST = 2_147_483_647


def types(url: str) -> list[str]:
    """The types of the three columns, and of the two sequences."""
    columns, sequences = facts(url, "column"), facts(url, "sequence")
    return [columns[name].split()[1] for name in IDS] + [sequences[name].split()[0] for name in SEQUENCES]


def test_ids_become_bigint_and_integer_again(url: str, used: psycopg.Connection) -> None:
    migrations.upgrade(url, BELOW)
    used.execute(f"INSERT INTO {NODE_RUNS} (run_id, node_id, node_type) SELECT id, 'a', 'agent' FROM {RUNS}")
    rows = f"SELECT r.id, n.run_id FROM {RUNS} r JOIN {NODE_RUNS} n ON n.run_id = r.id ORDER BY n.id"
    below, before = catalog(url), used.execute(rows).fetchall()
    assert types(url) == ["integer"] * 5
    migrations.upgrade(url, WITH)
    assert types(url) == ["bigint"] * 5
    with servers.connect(url) as fresh:
        assert fresh.execute(rows).fetchall() == before
    migrations.downgrade(url, BELOW)
    assert types(url) == ["integer"] * 5
    assert catalog(url) == below
    with servers.connect(url) as fresh:
        assert fresh.execute(rows).fetchall() == before


def test_runs_with_bigint_ids_work(database: Database, raw: psycopg.Connection) -> None:
    raw.execute("SELECT setval('circle.pipeline_runs_id_seq', %s), setval('circle.pipeline_node_runs_id_seq', %s)",
                [MOST, MOST])  # fmt: skip
    with database.session(autocommit=True) as session:
        pipeline = PipelineRepository(session).create(
            PipelineCreate(name="p", status=PipelineStatus.ACTIVE, nodes=NODES, edges=EDGES)
        )
        runs = RunRepository(session)
        run = runs.create(pipeline.id)
        assert run.id == MOST + 1
        runs.record(run.id, [{"node_id": node["id"], "status": "completed"} for node in NODES])
        assert runs.finish(run.id).status == "completed"
        assert [node.run_id for node in runs.nodes(run.id)] == [MOST + 1] * 3
        assert [found.id for found in runs.search().items] == [MOST + 1]
    assert doctor(database.engine) == []


def test_advance_many_with_integer_ids_returns_the_steps(narrow_url: str) -> None:
    with Database(narrow_url) as database, database.session(autocommit=True) as session:
        pipeline = PipelineRepository(session).create(
            PipelineCreate(name="p", status=PipelineStatus.ACTIVE, nodes=NODES, edges=EDGES)
        )
        runs = RunRepository(session)
        reports = [RunReport(runs.create(pipeline.id).id) for _ in range(2)]
        steps = runs.advance_many(reports)
        assert [[node.node_id for node in step.started] for step in steps if step is not None] == [["a"], ["a"]]


@pytest.mark.parametrize("table", [RUNS, NODE_RUNS])
def test_downgrade_with_large_id_raises_and_changes_nothing(database_url: str, connect: Connect, table: str) -> None:
    migrations.downgrade(database_url, WITH)
    raw = connect(database_url)
    raw.execute("INSERT INTO circle.pipelines (name) VALUES ('p')")
    sequence = f"{table}_id_seq"
    raw.execute("SELECT setval(%s, %s, %s)", [sequence, MOST if table == RUNS else MOST - 1, True])
    run = scalar(raw, f"INSERT INTO {RUNS} (pipeline_id) VALUES (1) RETURNING id")
    node = f"INSERT INTO {NODE_RUNS} (run_id, node_id, node_type) VALUES (%s, %s, 'agent') RETURNING id"
    last = [scalar(raw, node, [run, name]) for name in "ab"][-1]
    assert MOST + 1 in {run, last}
    before = catalog(database_url)
    with pytest.raises(AdoptionError, match="ids above 2147483647"):
        migrations.downgrade(database_url, BELOW)
    assert (revision(raw), catalog(database_url)) == (WITH, before)
    raw.execute(f"DELETE FROM {NODE_RUNS} WHERE id > {MOST}; DELETE FROM {RUNS} WHERE id > {MOST}")
    raw.execute("SELECT setval(%s, 10)", [sequence])
    migrations.downgrade(database_url, BELOW)
    assert types(database_url) == ["integer"] * 5


def test_downgrade_with_advanced_sequence_succeeds(database_url: str, connect: Connect) -> None:
    """The runs with large ids are gone, but the sequence is still where they were."""
    migrations.downgrade(database_url, WITH)
    raw = connect(database_url)
    raw.execute("SELECT setval('circle.pipeline_runs_id_seq', %s)", [MOST + 5])
    migrations.downgrade(database_url, BELOW)
    assert types(database_url) == ["integer"] * 5


def test_ids_of_a_large_table_stay_integer(url: str, used: psycopg.Connection) -> None:
    """It would be rewritten under a lock. That is no drift, and no difference for Alembic."""
    migrations.upgrade(url, BELOW)
    used.execute(
        f"""INSERT INTO {RUNS} (pipeline_id, status, error_message)
        SELECT 1, 'pending', repeat('x', 1900) FROM generate_series(1, 5000)"""
    )
    assert scalar(used, f"SELECT pg_relation_size('{RUNS}')") > SMALL_TABLE
    migrations.upgrade(url)
    assert types(url) == ["integer", "bigint", "bigint", "integer", "bigint"]
    with Database(url) as database:
        assert {finding.code for finding in doctor(database.engine)} <= {"counters", "broken_graph"}
        with database.session() as session:
            assert RunRepository(session).get(1).id == 1
    command.check(migrations.config(url))
    migrations.downgrade(url, BELOW)
    assert types(url) == ["integer"] * 5


def test_ids_that_a_view_shows_stay_integer(url: str, used: psycopg.Connection) -> None:
    """A view of the host, which the change would break."""
    migrations.upgrade(url, BELOW)
    used.execute(f"CREATE VIEW public.report AS SELECT id, status FROM {RUNS}")
    migrations.upgrade(url)
    assert types(url) == ["integer", "bigint", "bigint", "integer", "bigint"]
    with Database(url) as database:
        assert {finding.code for finding in doctor(database.engine)} <= {"counters", "broken_graph"}
