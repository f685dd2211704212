"""Databases at head whose ids of runs and node runs are INTEGER still, because their tables were large at revision 008."""

from __future__ import annotations

from gathering_pipeline import migrations
from gathering_pipeline.migrator import SMALL_TABLE
from tests.support import servers
from tests.support.adoption import GATHERING, INDEXES
from tests.support.databases import scalar

# a row a page, so that few rows make a large table
LARGE = """
ALTER TABLE circle.pipeline_runs SET (fillfactor = 10);
ALTER TABLE circle.pipeline_node_runs SET (fillfactor = 10);
INSERT INTO circle.pipelines (name) VALUES ('p');
INSERT INTO circle.pipeline_runs (pipeline_id, status, completed_at, error_message)
SELECT 1, 'failed', now(), repeat('x', 1000) FROM generate_series(1, 1100);
INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, status, completed_at, error_message)
SELECT id, 'a', 'trigger', 'failed', now(), repeat('x', 1000) FROM circle.pipeline_runs"""


def create(server: servers.Server) -> str:
    """Make such a database without rows, whose tables were adopted, and return its name; the server clones it."""
    name = server.create()
    url = server.database_url(name)
    with servers.connect(url) as raw:
        raw.execute(GATHERING + INDEXES)
        migrations.upgrade(url, "007_pipeline_execution")
        raw.execute(LARGE)
        for table in ("pipeline_runs", "pipeline_node_runs"):
            assert scalar(raw, "SELECT pg_relation_size(%s)", [f"circle.{table}"]) > SMALL_TABLE
        migrations.upgrade(url)
        raw.execute("TRUNCATE circle.pipelines RESTART IDENTITY CASCADE")
    return name
