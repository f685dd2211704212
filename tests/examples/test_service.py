"""The FastAPI example, through a real uvicorn: what clients see, each status of an error, and the stream of a run."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg import sql
from sqlalchemy import make_url

from gathering_pipeline import Database, RunRepository
from gathering_pipeline.node_types import NODE_TYPES
from tests.support.graphs import graph
from tests.support.runs import done
from tests.support.servers import connect

ROOT = Path(__file__).parents[2]
NODES, EDGES = graph("a>b")
PIPELINE: dict[str, Any] = {"name": "p", "status": "active", "nodes": NODES, "edges": EDGES}


@pytest.fixture(scope="module")
def service(module_database_url: str) -> Iterator[str]:
    """The address of the running service."""
    environment = {"GATHERING_DATABASE_URL": module_database_url, "PYTHONWARNINGS": "error"}
    environment["GATHERING_POOL_TIMEOUT"] = "60"  # of a slow machine
    command = [sys.executable, "-m", "uvicorn", "examples.service:app", "--port", "0", "--no-access-log"]
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        log: list[str] = []
        found = None
        for line in process.stderr:
            log.append(line)
            if found := re.search(r"running on (http://[\d.:]+)", line):
                break
        watchdog.cancel()
        assert found, "".join(log)
        rest = threading.Thread(target=lambda: log.extend(process.stderr or ()))
        rest.start()
        yield found[1]
        process.terminate()
        process.wait(30)
        rest.join()
    assert "Traceback" not in "".join(log)


@pytest.fixture
def client(service: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service, timeout=30) as opened:
        yield opened


def new_run(client: httpx.Client, **fields: Any) -> int:
    pipeline = client.post("/pipelines", json=PIPELINE | fields).json()["id"]
    run_id: int = client.post(f"/pipelines/{pipeline}/runs", json={}).json()["id"]
    return run_id


def test_each_of_100_concurrent_clients_reads_its_own_writes(service: str) -> None:
    certificates = httpx.create_ssl_context()  # unused, and slow to load for each client

    async def write_and_read(number: int) -> bool:
        async with httpx.AsyncClient(base_url=service, timeout=60, verify=certificates) as client:
            made = (await client.post("/pipelines", json=PIPELINE | {"name": f"of {number}"})).json()
            path = f"/pipelines/{made['id']}"
            read = await client.get(path)
            changed = await client.patch(path, json={"name": f"{number}"}, headers={"If-Match": read.headers["ETag"]})
            after = (await client.get(path)).json()
        return (read.json(), changed.status_code, after["name"]) == (made, 200, f"{number}")

    async def all_of_them() -> list[bool]:
        return await asyncio.gather(*(write_and_read(number) for number in range(100)))

    assert sum(asyncio.run(all_of_them())) == 100


def test_unknown_ids_are_not_found(client: httpx.Client) -> None:
    for path in ("/pipelines/999", "/runs/999", "/runs/999/nodes", "/runs/999/explanation", "/runs/999/events"):
        answer = client.get(path)
        assert (answer.status_code, "does not exist" in answer.json()["detail"]) == (404, True), path
    assert client.post("/runs/999/cancel").status_code == 404


def test_what_the_state_refuses_is_a_conflict(client: httpx.Client) -> None:
    run_id = new_run(client)
    assert client.post(f"/runs/{run_id}/cancel", json={"reason": "enough"}).json()["error_message"] == "enough"
    again = client.post(f"/runs/{run_id}/cancel")
    assert (again.status_code, again.json()["error"]) == (409, "RunOverError")
    draft = client.post("/pipelines", json=PIPELINE | {"status": "draft"}).json()["id"]
    inactive = client.post(f"/pipelines/{draft}/runs")
    assert (inactive.status_code, inactive.json()["error"]) == (409, "PipelineInactiveError")


def test_a_stale_edit_fails_its_precondition(client: httpx.Client) -> None:
    made = client.post("/pipelines", json=PIPELINE)
    path, tag = f"/pipelines/{made.json()['id']}", {"If-Match": made.headers["ETag"]}
    edited = client.patch(path, json={"name": "q"}, headers=tag)
    assert (edited.status_code, edited.headers["ETag"]) == (200, '"2"')
    stale = client.patch(path, json={"name": "r"}, headers=tag)
    assert (stale.status_code, stale.json()["error"]) == (412, "StaleVersionError")
    assert client.get(path).json()["name"] == "q"
    assert client.patch(path, json={"name": "r"}, headers={"If-Match": "*"}).status_code == 422


def test_a_graph_that_is_wrong_is_unprocessable_and_names_each_place(client: httpx.Client) -> None:
    cycle = [*EDGES, {"id": "back", "from": "b", "to": "a"}]
    answer = client.post("/pipelines", json=PIPELINE | {"edges": cycle})
    assert answer.status_code == 422
    (issue,) = answer.json()["issues"]
    assert (issue["code"], issue["severity"]) == ("cycle", "error")
    assert client.post("/pipelines", json=PIPELINE | {"nams": "x"}).status_code == 422  # of Pydantic
    assert client.get("/runs", params={"limit": 0}).status_code == 422
    wrong = client.get(f"/runs/{new_run(client)}/events", headers={"Last-Event-ID": "x"})
    assert (wrong.status_code, wrong.json()["error"]) == (422, "InvalidCursorError")


def test_a_repeated_request_creates_one_run(client: httpx.Client) -> None:
    pipeline = client.post("/pipelines", json=PIPELINE).json()["id"]
    key = {"Idempotency-Key": "k"}
    ids = {client.post(f"/pipelines/{pipeline}/runs", json={"x": 1}, headers=key).json()["id"] for _ in range(3)}
    assert len(ids) == 1
    other = client.post(f"/pipelines/{pipeline}/runs", json={"x": 2}, headers=key)
    assert (other.status_code, other.json()["error"]) == (409, "IdempotencyConflictError")


def test_a_database_that_takes_no_connections_is_unavailable(
    client: httpx.Client, admin: psycopg.Connection, module_database_url: str
) -> None:
    name = make_url(module_database_url).database or ""
    assert client.get("/health").json()["reachable"] is True
    allow = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")
    admin.execute(allow.format(sql.Identifier(name), sql.SQL("false")))
    try:
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        refused = client.post("/pipelines", json=PIPELINE)
        health = client.get("/health")
    finally:
        admin.execute(allow.format(sql.Identifier(name), sql.SQL("true")))
    assert refused.status_code == 503
    assert (health.status_code, health.json()["reachable"]) == (503, False)
    assert client.get("/health").status_code == 200


def events_of(client: httpx.Client, run_id: int, after: str | None = None) -> list[dict[str, str]]:
    """The server-sent events of a run, read until the stream ends."""
    headers = {} if after is None else {"Last-Event-ID": after}
    with client.stream("GET", f"/runs/{run_id}/events", headers=headers) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        text = "".join(answer.iter_text())
    return [dict(line.split(": ", 1) for line in block.splitlines()) for block in text.split("\n\n")[:-1]]


def test_stream_of_a_run_ends_with_the_run(client: httpx.Client, module_database_url: str) -> None:
    run_id = new_run(client)
    streamed: list[dict[str, str]] = []
    reader = threading.Thread(target=lambda: streamed.extend(events_of(client, run_id)))
    reader.start()
    with Database(module_database_url) as database, database.session(autocommit=True) as session:
        runs = RunRepository(session)
        runs.advance(run_id)
        runs.advance(run_id, [done("a")])
        runs.advance(run_id, [done("b")])
    reader.join(30)
    assert not reader.is_alive()
    types = [event["event"] for event in streamed]
    assert types == [
        "pipeline_run.started",
        *("pipeline_node.started", "pipeline_node.completed") * 2,
        "pipeline_run.completed",
    ]
    assert [json.loads(event["data"])["type"] for event in streamed] == types
    assert events_of(client, run_id, streamed[2]["id"]) == streamed[3:]  # as a browser reconnects
    assert client.get(f"/runs/{run_id}/explanation").json()["reasons"][0]["code"] == "completed"


def test_metrics_count_the_runs(client: httpx.Client, module_database_url: str) -> None:
    new_run(client)
    answer = client.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain")
    with connect(module_database_url) as raw:
        row = raw.execute("SELECT count(*) FROM circle.pipeline_runs WHERE status = 'pending'").fetchone()
    assert row is not None
    assert f'gathering_pipeline_runs{{status="pending"}} {row[0]}\n' in answer.text


def test_openapi_has_typed_nodes_and_descriptions(client: httpx.Client) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    nodes = schemas["PipelineNode"]["properties"]
    assert nodes["type"]["enum"] == list(NODE_TYPES)
    for name in ("NewPipeline", "PipelineRead"):
        assert schemas[name]["properties"]["nodes"]["items"] == {"$ref": "#/components/schemas/PipelineNode"}
    assert schemas["RunRead"]["properties"]["duration_seconds"]["description"].endswith("in seconds, rounded.")
