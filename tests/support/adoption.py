"""Databases as GatheRing's API creates them, before any revision."""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

import json
from typing import Any

import psycopg

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
