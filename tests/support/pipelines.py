"""Steps that tests of pipelines share."""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import Any

import psycopg

from gathering_pipeline import (
    PipelineCreate,
)
from tests.support.graphs import EDGES, NODES


def new(name: str = "p", **more: Any) -> PipelineCreate:
    return PipelineCreate(**{"name": name, "nodes": NODES, "edges": EDGES, **more})


def count(raw: psycopg.Connection, table: str = "pipelines") -> int:
    row = raw.execute(f"SELECT count(*) FROM circle.{table}").fetchone()
    assert row is not None
    return int(row[0])
