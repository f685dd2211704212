"""Steps that tests of the doctor share."""

from __future__ import annotations

from typing import Any

import psycopg

from gathering_pipeline.database import Database
from gathering_pipeline.lifecycle import PipelineStatus
from gathering_pipeline.maintenance.catalog import canonical
from gathering_pipeline.maintenance.doctor import doctor
from gathering_pipeline.maintenance.findings import Finding
from gathering_pipeline.models import PipelineCreate
from gathering_pipeline.repositories.pipelines import PipelineRepository
from gathering_pipeline.repositories.runs import RunRepository
from tests.support import schema

NODES = [{"id": name, "type": "trigger" if name == "a" else "parallel", "name": name.upper()} for name in "abc"]


EDGES = [{"id": "e1", "from": "a", "to": "b"}, {"id": "e2", "from": "a", "to": "c"}]


RUNS, NODE_RUNS = "circle.pipeline_runs", "circle.pipeline_node_runs"


def pipeline(database: Database, runs: int = 0) -> int:
    """An active pipeline with runs that are pending."""
    with database.session() as session:
        made = PipelineRepository(session).create(
            PipelineCreate(name="p", status=PipelineStatus.ACTIVE, nodes=NODES, edges=EDGES)
        )
        for _ in range(runs):
            RunRepository(session).create(made.id)
        return made.id


def age(raw: psycopg.Connection) -> None:
    """Make the runs old enough to be counted by the doctor."""
    with raw.transaction():
        raw.execute("SET LOCAL session_replication_role = replica")
        raw.execute(f"ALTER TABLE {RUNS} DISABLE TRIGGER pipeline_runs_before")
        raw.execute(
            f"""UPDATE {RUNS} SET created_at = created_at - interval '1 hour',
                started_at = started_at - interval '1 hour', completed_at = completed_at - interval '1 hour'"""
        )
        raw.execute(f"ALTER TABLE {RUNS} ENABLE ALWAYS TRIGGER pipeline_runs_before")


def catalog(url: str) -> list[str]:
    """All that another query than the doctor's sees, but for what a dump and restore change as well."""
    return [canonical(line) for line in schema.catalog(url)]


def found(database: Database, **options: Any) -> list[tuple[str, str]]:
    return [(finding.code, finding.object) for finding in doctor(database.engine, **options)]


def outcomes(findings: list[Finding]) -> set[str | None]:
    return {finding.outcome for finding in findings}
