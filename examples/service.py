"""A service with FastAPI: ``uvicorn examples.service:app``. docs/fastapi.md explains it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Annotated, Any

from fastapi import Body, Depends, FastAPI, Header, Query, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import ConfigDict
from sqlalchemy.ext.asyncio import AsyncSession

from gathering_pipeline import (
    AsyncEventRepository,
    AsyncPipelineRepository,
    AsyncRunRepository,
    ConflictError,
    Database,
    DatabaseError,
    Explanation,
    Health,
    InvalidPipelineError,
    NodeRunRead,
    NotFoundError,
    Page,
    PipelineCreate,
    PipelineError,
    PipelineRead,
    PipelineUpdate,
    RunRead,
    RunStatus,
    RunSummary,
    StaleVersionError,
    is_transient,
)

logger = logging.getLogger(__name__)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Refuse to start on a schema of another revision, and close the connections at the end."""
    async with Database() as opened:
        await opened.acheck()
        app.state.database = opened
        yield


app = FastAPI(title="Pipelines", lifespan=lifespan)


def get_database(request: Request) -> Database:
    """The database of the service."""
    database: Database = request.app.state.database
    return database


CurrentDatabase = Annotated[Database, Depends(get_database)]


async def open_session(database: CurrentDatabase) -> AsyncIterator[AsyncSession]:
    """The transaction of a request: it commits when the endpoint has returned, and rolls back if that raised."""
    async with database.async_session() as session:
        yield session


# scope="function": the commit comes before the response. Otherwise a client could read before its write is stored, and
# would take a failed commit for a success.
CurrentSession = Annotated[AsyncSession, Depends(open_session, scope="function")]

Limit = Annotated[int, Query(ge=1, le=500)]
"""Rows of a page."""
STATUS_CODES: dict[type[PipelineError], int] = {
    NotFoundError: 404,
    StaleVersionError: 412,  # before ConflictError, of which it is one
    ConflictError: 409,
    DatabaseError: 503,
}
"""What an error means to a client; any other is about what it sent."""


@app.exception_handler(PipelineError)
async def answer_error(_request: Request, error: PipelineError) -> JSONResponse:
    """Answer with the status of an error, and the issues of a graph."""
    status = next((code for kind, code in STATUS_CODES.items() if isinstance(error, kind)), 422)
    detail = str(error)
    if isinstance(error, DatabaseError):  # it may name servers and roles
        logger.error("the database can't answer a request: %s", error)
        detail = "the database can't answer now"
    content: dict[str, Any] = {"error": type(error).__name__, "detail": detail}
    if isinstance(error, InvalidPipelineError):
        content["issues"] = [
            {"code": issue.code, "loc": issue.loc, "message": issue.message, "severity": issue.severity}
            for issue in error.issues
        ]
    return JSONResponse(content, status, headers={"Retry-After": "1"} if is_transient(error) else None)


# --- pipelines -------------------------------------------------------------------------------------------------------


class NewPipeline(PipelineCreate):
    """A pipeline to be stored. Built here, because FastAPI warns of a body that is built on first use."""

    model_config = ConfigDict(defer_build=False)


class PipelineChange(PipelineUpdate):
    """The fields of a pipeline to be changed."""

    model_config = ConfigDict(defer_build=False)


def tagged(pipeline: PipelineRead, response: Response) -> PipelineRead:
    """Send the revision of a pipeline, which an edit sends back as ``If-Match``."""
    response.headers["ETag"] = f'"{pipeline.revision}"'
    return pipeline


@app.post("/pipelines", status_code=201)
async def create_pipeline(data: NewPipeline, session: CurrentSession, response: Response) -> PipelineRead:
    """Store a pipeline."""
    return tagged(await AsyncPipelineRepository(session).create(data), response)


@app.get("/pipelines")
async def list_pipelines(session: CurrentSession, after: int | None = None, limit: Limit = 50) -> Page[PipelineRead]:
    """Read a page of pipelines, newest first."""
    return await AsyncPipelineRepository(session).search(after=after, limit=limit)


@app.get("/pipelines/{pipeline_id}")
async def read_pipeline(pipeline_id: int, session: CurrentSession, response: Response) -> PipelineRead:
    """Read a pipeline."""
    return tagged(await AsyncPipelineRepository(session).get(pipeline_id), response)


@app.patch("/pipelines/{pipeline_id}")
async def update_pipeline(
    pipeline_id: int,
    data: PipelineChange,
    session: CurrentSession,
    response: Response,
    if_match: Annotated[str, Header(pattern=r'^"\d{1,18}"$')],
) -> PipelineRead:
    """Change fields of a pipeline, unless it was edited since it was read."""
    revision = int(if_match.strip('"'))
    pipelines = AsyncPipelineRepository(session)
    return tagged(await pipelines.update(pipeline_id, data, expected_revision=revision), response)


# --- runs ------------------------------------------------------------------------------------------------------------


@app.post("/pipelines/{pipeline_id}/runs", status_code=201)
async def create_run(
    pipeline_id: int,
    session: CurrentSession,
    trigger_data: Annotated[dict[str, Any] | None, Body()] = None,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> RunRead:
    """Create a run; a request that is sent again with its ``Idempotency-Key`` returns the run of the first."""
    runs = AsyncRunRepository(session)
    return await runs.create(pipeline_id, trigger_data, idempotency_key=idempotency_key)


@app.get("/runs")
async def list_runs(
    session: CurrentSession, status: RunStatus | None = None, after: int | None = None, limit: Limit = 50
) -> Page[RunSummary]:
    """Read a page of runs, newest first."""
    return await AsyncRunRepository(session).search(status=status, after=after, limit=limit)


@app.get("/runs/{run_id}")
async def read_run(run_id: int, session: CurrentSession) -> RunRead:
    """Read a run."""
    return await AsyncRunRepository(session).get(run_id)


@app.get("/runs/{run_id}/nodes")
async def read_nodes(run_id: int, session: CurrentSession) -> list[NodeRunRead]:
    """Read the nodes of a run, in execution order."""
    return await AsyncRunRepository(session).nodes(run_id)


@app.get("/runs/{run_id}/explanation")
async def explain_run(run_id: int, session: CurrentSession) -> Explanation:
    """Say why a run stands still."""
    return await AsyncRunRepository(session).explain(run_id)


@app.post("/runs/{run_id}/cancel")
async def cancel_run(
    run_id: int, session: CurrentSession, reason: Annotated[str | None, Body(embed=True)] = None
) -> RunRead:
    """Cancel a run."""
    return await AsyncRunRepository(session).cancel(run_id, reason)


@app.get("/runs/{run_id}/events", response_class=StreamingResponse)
async def stream_events(
    run_id: int,
    database: CurrentDatabase,
    session: CurrentSession,
    last_event_id: Annotated[str | None, Header()] = None,
) -> StreamingResponse:
    """Stream the events of a run as server-sent events, until it ends."""
    # before the response begins, so that an unknown run is a 404 and a wrong cursor a 422
    await AsyncRunRepository(session).get(run_id)
    await AsyncEventRepository(session).read(run_id=run_id, after=last_event_id, limit=1)

    async def lines() -> AsyncIterator[str]:
        async with aclosing(database.alisten(run_id, last_event_id)) as events:
            async for event in events:
                yield f"id: {event.cursor}\nevent: {event.type}\ndata: {event.model_dump_json()}\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


# --- operation -------------------------------------------------------------------------------------------------------


@app.get("/metrics", response_class=PlainTextResponse)
async def read_metrics(database: CurrentDatabase) -> str:
    """Print the metrics for Prometheus."""
    return (await database.ametrics()).prometheus()


@app.get("/health", responses={503: {"model": Health}})
async def read_health(database: CurrentDatabase, response: Response) -> Health:
    """Tell whether the database can be used."""
    health = await database.ahealth()
    response.status_code = 200 if health.ok else 503
    return health
