"""Pipelines: create, read, edit, activate and pause, delete."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, Executable, Row, func, insert, literal, literal_column, update
from sqlalchemy.orm import Session
from sqlalchemy.orm.util import identity_key

from gathering_pipeline.arguments import (
    check_count,
    check_cursor,
    check_duration,
    check_flag,
    check_id,
    check_pipeline_id,
    check_status,
    check_text,
    check_type,
)
from gathering_pipeline.connections import Statement
from gathering_pipeline.errors import PipelineNotFoundError, StaleVersionError
from gathering_pipeline.hooks import prepare_graph
from gathering_pipeline.lifecycle import PipelineStatus
from gathering_pipeline.models import (
    Page,
    PipelineCreate,
    PipelineDefinition,
    PipelineRead,
    PipelineUpdate,
    PipelineVersion,
)
from gathering_pipeline.orm import Pipeline
from gathering_pipeline.repositories._call import AsyncRepository, Repository, blocking, connected, refresh

# --- statements; alembic/schema.sql has the function -----------------------------------------------------------------

GET = Statement(
    "SELECT pg_catalog.to_json(circle.counted(p))::text FROM circle.pipelines p WHERE p.id = %(pipeline_id)s::bigint",
    read_only=True,
)
SEARCH = Statement(
    """
SELECT pg_catalog.to_json(circle.counted(p))::text FROM circle.pipelines p
WHERE p.id < %(after)s::bigint AND (%(status)s::text IS NULL OR p.status::text = %(status)s::text)
  AND (%(name)s::text IS NULL OR strpos(lower(p.name::text), lower(%(name)s::text)) > 0)
ORDER BY p.id DESC LIMIT %(limit)s""",
    read_only=True,
)
VERSIONS = Statement(
    """
SELECT pg_catalog.json_build_object('version', v.version, 'node_count', v.node_count, 'created_at', v.created_at)::text
FROM circle.pipeline_versions v WHERE v.pipeline_id = %(pipeline_id)s::bigint AND v.version < %(after)s::bigint
ORDER BY v.version DESC LIMIT %(limit)s""",
    read_only=True,
)
DEFINITION = Statement(
    """
SELECT pg_catalog.json_build_array(v.nodes, v.edges)::text FROM circle.pipeline_versions v
WHERE v.pipeline_id = %(pipeline_id)s::bigint AND v.version = %(version)s::bigint""",
    read_only=True,
)
PURGE_VERSIONS = Statement(
    "SELECT circle.purge_versions(pg_catalog.make_interval(secs => %(older_than)s), %(limit)s)::text"
)
DELETE = Statement("SELECT circle.delete_pipeline(%(pipeline_id)s, %(force)s)", deletes=True)

_RETURNED: ColumnElement[str] = literal_column("pg_catalog.to_json(circle.counted_now(pipelines))::text")
"""A changed row, as ``GET`` reads it."""


# --- the repository --------------------------------------------------------------------------------------------------


class AsyncPipelineRepository(AsyncRepository):
    """Pipelines. Works in the caller's session and never commits; returns frozen read models.

    A refused call raises a ``PipelineError`` and changes nothing. ``create`` and ``update`` go through the ORM, whose
    hooks check the graph before anything is sent.
    """

    async def create(self, data: PipelineCreate, *, allow_incomplete: bool = False) -> PipelineRead:
        """Store a pipeline.

        Args:
            data: The pipeline.
            allow_incomplete: Store a draft whose only errors are missing nodes or missing configuration.

        Raises:
            InvalidPipelineError: The graph is not valid; ``.issues`` has every error. Nothing was stored.
        """
        check_type(data, PipelineCreate, "data", "PipelineCreate(name=..., nodes=..., edges=...) makes one")
        values = data.model_dump(exclude={"nodes", "edges"}) | {"nodes": data.nodes, "edges": data.edges}
        statement = insert(Pipeline).values(values).returning(_RETURNED)
        row = await self._row(statement, {"allow_incomplete": check_flag(allow_incomplete, "allow_incomplete")})
        assert row is not None, "an INSERT returns its row"
        return PipelineRead.model_validate_json(row[0])

    async def get(self, pipeline_id: int) -> PipelineRead:
        """Read a pipeline.

        Raises:
            PipelineNotFoundError: The pipeline doesn't exist.
        """
        pipelines = await self._read(PipelineRead, GET, pipeline_id=check_pipeline_id(pipeline_id))
        if not pipelines:
            raise PipelineNotFoundError(pipeline_id)
        return pipelines[0]

    async def search(
        self,
        status: PipelineStatus | None = None,
        name: str | None = None,
        after: int | None = None,
        limit: int = 50,
    ) -> Page[PipelineRead]:
        """Read a page of pipelines, newest first.

        Args:
            status: Only pipelines with this status.
            name: Only pipelines whose name contains this text, in upper or lower case.
            after: ``next_cursor`` of the page before.
            limit: Most pipelines of a page.
        """
        filters = {
            "status": None if status is None else check_status(status, PipelineStatus),
            "name": None if name is None else check_text(name, "name"),
        }
        return await self._page(PipelineRead, SEARCH, after, limit, **filters)

    async def update(
        self,
        pipeline_id: int,
        changes: PipelineUpdate,
        expected_revision: int | None = None,
        *,
        allow_incomplete: bool = False,
    ) -> PipelineRead:
        """Write the given fields, and only those; a new graph is a new version, and live runs keep theirs.

        Args:
            pipeline_id: The pipeline.
            changes: The fields to write.
            expected_revision: The ``revision`` that the caller has read: the update is refused if anybody edited the
                pipeline since.
            allow_incomplete: As for ``create``.

        Raises:
            PipelineNotFoundError: The pipeline doesn't exist.
            StaleVersionError: The pipeline is at another revision than expected.
            InvalidPipelineError: The graph is not valid, or it is incomplete and the pipeline would be active.
        """
        check_type(changes, PipelineUpdate, "changes", "PipelineUpdate(name=...) makes one")
        values: dict[str, Any] = {name: getattr(changes, name) for name in changes.model_fields_set}
        # BIGINT parameters: an id that no INTEGER holds is not found, instead of out of range
        statement = update(Pipeline).where(Pipeline.id == literal(check_id(pipeline_id, "pipeline_id"), BigInteger))
        if expected_revision is not None:
            revision = literal(check_id(expected_revision, "expected_revision"), BigInteger)
            statement = statement.where(Pipeline.revision == revision)
        statement = statement.values(values | {"updated_at": func.clock_timestamp()}).returning(_RETURNED)
        options = {
            "allow_incomplete": check_flag(allow_incomplete, "allow_incomplete"),
            "synchronize_session": False,
        }
        row = await self._row(statement, options, pipeline_id)
        if row is None:
            raise StaleVersionError(pipeline_id, expected_revision or 0, (await self.get(pipeline_id)).revision)
        return PipelineRead.model_validate_json(row[0])

    async def activate(self, pipeline_id: int) -> PipelineRead:
        """Activate a pipeline: runs of it can be created.

        Raises:
            PipelineNotFoundError: The pipeline doesn't exist.
            InvalidPipelineError: Its graph is broken or incomplete.
        """
        while True:
            pipeline = await self.get(pipeline_id)
            # The database checks pipelines that become active, not those that were active before it had checks.
            prepare_graph(pipeline.nodes, pipeline.edges)
            with suppress(StaleVersionError):  # edited concurrently: check the new graph
                return await self.update(pipeline_id, PipelineUpdate(status=PipelineStatus.ACTIVE), pipeline.revision)

    async def pause(self, pipeline_id: int) -> PipelineRead:
        """Pause a pipeline: no run of it can be created; live runs go on.

        Raises:
            PipelineNotFoundError: The pipeline doesn't exist.
        """
        return await self.update(pipeline_id, PipelineUpdate(status=PipelineStatus.PAUSED))

    async def delete(self, pipeline_id: int, force: bool = False) -> None:
        """Delete a pipeline with its versions and its runs.

        Args:
            pipeline_id: The pipeline.
            force: Delete it even if runs are pending or running; their workers then get ``RunNotFoundError``.

        Raises:
            PipelineNotFoundError: The pipeline doesn't exist.
            PipelineInUseError: Runs are pending or running, and ``force`` is not set.
        """
        await self._rows(DELETE, pipeline_id=check_pipeline_id(pipeline_id), force=check_flag(force, "force"))

    async def versions(self, pipeline_id: int, after: int | None = None, limit: int = 50) -> Page[PipelineVersion]:
        """Read a page of the versions of a pipeline's graph, newest first; ``definition`` reads the graph of one.

        Args:
            pipeline_id: The pipeline.
            after: ``next_cursor`` of the page before.
            limit: Most versions of a page.

        Raises:
            PipelineNotFoundError: The pipeline doesn't exist.
        """
        start, size = check_cursor(after), check_count(limit, "limit")
        number = check_pipeline_id(pipeline_id)
        rows = await self._read(PipelineVersion, VERSIONS, pipeline_id=number, after=start, limit=size + 1)
        if not rows:
            await self.get(pipeline_id)  # raises if the pipeline doesn't exist
        return Page(items=tuple(rows[:size]), next_cursor=rows[size - 1].version if len(rows) > size else None)

    async def definition(self, pipeline_id: int, version: int) -> PipelineDefinition:
        """Read a version of a pipeline's graph.

        Raises:
            PipelineNotFoundError: The pipeline doesn't exist, or has no such version (any more).
        """
        rows = await self._values(
            DEFINITION, pipeline_id=check_pipeline_id(pipeline_id), version=check_id(version, "version")
        )
        if not rows:
            raise PipelineNotFoundError(pipeline_id, version)
        return PipelineDefinition.from_json(*rows[0])

    async def purge_versions(self, older_than: timedelta, limit: int = 100) -> int:
        """Delete versions that were written over ``older_than`` ago and that neither their pipeline nor a run has.

        Commit, and repeat until it returns 0. The role needs DELETE on ``pipeline_versions``.

        Args:
            older_than: Age of the version.
            limit: Most versions to delete.

        Returns:
            How many were deleted.
        """
        age = check_duration(older_than, "older_than", allow_zero=True)
        deleted: int = (await self._values(PURGE_VERSIONS, older_than=age, limit=check_count(limit, "limit")))[0]
        return deleted

    async def _row(
        self, statement: Executable, options: Mapping[str, Any], pipeline_id: int | None = None
    ) -> Row[Any] | None:
        """Execute a statement of the ORM, so that its hooks see it, and return its row.

        Args:
            statement: An INSERT, or an UPDATE of one row.
            options: Its execution options.
            pipeline_id: The row to be updated.
        """

        def execute(session: Session) -> Row[Any] | None:
            with connected(session):
                row = session.execute(statement, execution_options=options).one_or_none()
            if pipeline_id is not None and (loaded := session.identity_map.get(identity_key(Pipeline, pipeline_id))):
                refresh(session, [loaded])
            return row

        return await self._transport.run(execute)


class PipelineRepository(Repository):
    """The sync twin of ``AsyncPipelineRepository``, for a ``Session``."""

    _source = AsyncPipelineRepository

    create = blocking(AsyncPipelineRepository.create)
    get = blocking(AsyncPipelineRepository.get)
    search = blocking(AsyncPipelineRepository.search)
    update = blocking(AsyncPipelineRepository.update)
    activate = blocking(AsyncPipelineRepository.activate)
    pause = blocking(AsyncPipelineRepository.pause)
    delete = blocking(AsyncPipelineRepository.delete)
    versions = blocking(AsyncPipelineRepository.versions)
    definition = blocking(AsyncPipelineRepository.definition)
    purge_versions = blocking(AsyncPipelineRepository.purge_versions)
