"""``alembic/schema.sql`` shows the schema at head."""

from __future__ import annotations

import psycopg
import pytest

from gathering_pipeline.maintenance.catalog import same
from tests import generated
from tests.support.schema_text import schema_text


def test_schema_sql_is_that_of_a_migrated_database(raw: psycopg.Connection) -> None:
    """Where this fails: ``make generated``."""
    lines = schema_text(raw).splitlines()
    committed = generated.SCHEMA.read_text(encoding="utf-8").splitlines()
    assert [
        line for line, wanted in zip(lines, committed, strict=False) if line != wanted and not same(line, wanted)
    ] == []
    assert len(lines) == len(committed)


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE circle.pipelines ALTER COLUMN run_count SET DEFAULT 1",
        "ALTER TABLE circle.pipeline_runs SET (fillfactor = 71)",
        "ALTER TABLE circle.pipeline_runs DROP CONSTRAINT ck_pipeline_runs_leased",
        "ALTER TABLE circle.pipeline_runs ENABLE TRIGGER pipeline_runs_before",
        "DROP INDEX circle.idx_pipeline_runs_queue",
        "ALTER FUNCTION circle.start_run(bigint, bigint) RESET plan_cache_mode",
        "CREATE OR REPLACE FUNCTION circle.event_types() RETURNS text[] LANGUAGE sql IMMUTABLE AS $$ SELECT ARRAY['x'] $$",
        "DROP VIEW circle.startable_node_runs",
        "ALTER VIEW circle.startable_node_runs RESET (security_invoker)",
        "ALTER TYPE circle.node_result ADD ATTRIBUTE more text",
        "GRANT EXECUTE ON FUNCTION circle.pipelines_after() TO PUBLIC",
    ],
)
def test_schema_text_shows_each_change(raw: psycopg.Connection, change: str) -> None:
    before = schema_text(raw)
    raw.execute(change.encode())
    assert schema_text(raw) != before
