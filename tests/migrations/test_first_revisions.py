"""Revisions 006 and 007 create what they always created."""

from pytest_alembic.plugin.fixtures import alembic_runner  # noqa: F401 - a fixture

from gathering_pipeline import migrations
from tests.support.schema import CREATED_BY_006, constraints, facts

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


def test_upgrade_to_006_creates_specified_objects(empty_database_url: str) -> None:
    migrations.upgrade(empty_database_url, "006_pipelines")
    assert list(columns(empty_database_url, "pipelines").items()) == list(PIPELINES.items())
    assert list(columns(empty_database_url, "pipeline_runs").items()) == list(RUNS.items())
    assert constraints(empty_database_url) == CONSTRAINTS_OF_006
    assert indexes(empty_database_url) == INDEXES_OF_006
    assert facts(empty_database_url, "comment") == {
        "constraint pipelines_pkey on table circle.pipelines": CREATED_BY_006,
        "constraint pipeline_runs_pkey on table circle.pipeline_runs": CREATED_BY_006,
    }
    assert not facts(empty_database_url, "trigger")
    assert not facts(empty_database_url, "function")


def test_upgrade_to_007_creates_specified_objects(empty_database_url: str) -> None:
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
