"""Pipelines: stored, read, edited, switched on and off."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from sqlalchemy import BigInteger, func, insert, literal, update

from gathering_pipeline.errors import PipelineNotFoundError, StaleVersionError
from gathering_pipeline.hooks import prepare_graph
from gathering_pipeline.json_values import expect
from gathering_pipeline.lifecycle import PipelineStatus
from gathering_pipeline.models import Page, PipelineCreate, PipelineRead, PipelineUpdate
from gathering_pipeline.orm import Pipeline
from gathering_pipeline.repositories._call import (
    Query,
    Repository,
    call,
    connected,
    flag,
    page,
    read,
    storable_id,
    valid_status,
    valid_text,
)

_RETURNED = [getattr(Pipeline, name) for name in PipelineRead.model_fields]
_GET = Query("SELECT to_json(p)::text FROM circle.pipelines p WHERE p.id = %(pipeline_id)s")
_SEARCH = Query("""
SELECT to_json(p)::text FROM circle.pipelines p
WHERE p.id < %(after)s AND (%(status)s::text IS NULL OR p.status = %(status)s)
  AND (%(name)s::text IS NULL OR strpos(lower(p.name), lower(%(name)s)) > 0)
ORDER BY p.id DESC LIMIT %(limit)s""")
_DELETE = "SELECT circle.delete_pipeline(%(pipeline_id)s, %(force)s)"


class PipelineRepository(Repository):
    """Pipelines. Works in the session it is given and never commits; returns frozen read models.

    A call that is refused raises a ``PipelineError`` and changes nothing.
    """

    def create(self, data: PipelineCreate, *, allow_incomplete: bool = False) -> PipelineRead:
        """Store a pipeline.

        Args:
            data: What to store.
            allow_incomplete: Store a draft whose only errors are missing nodes or missing configuration.

        Raises:
            InvalidPipelineError: The graph is not valid; ``.issues`` has every error. Nothing was stored.
        """
        expect(data, PipelineCreate, "data", "PipelineCreate(name=..., nodes=..., edges=...) makes one")
        values = data.model_dump(exclude={"nodes", "edges"}) | {"nodes": data.nodes, "edges": data.edges}
        statement = insert(Pipeline).values(values).returning(*_RETURNED)
        with connected(self._session):
            row = self._session.execute(statement, execution_options={"allow_incomplete": allow_incomplete}).one()
        return PipelineRead.model_validate(row._asdict())

    def get(self, pipeline_id: int) -> PipelineRead:
        """Read a pipeline.

        Raises:
            PipelineNotFoundError: There is no such pipeline.
        """
        found = read(self._session, PipelineRead, _GET, pipeline_id=pipeline_id)
        if not found:
            raise PipelineNotFoundError(pipeline_id)
        return found[0]

    def search(
        self,
        status: PipelineStatus | None = None,
        name: str | None = None,
        after: int | None = None,
        limit: int = 50,
    ) -> Page[PipelineRead]:
        """Read a page of pipelines, newest first.

        Args:
            status: Only pipelines with this status.
            name: Only pipelines whose name has this text in it, in upper or lower case.
            after: ``next_cursor`` of the page before.
            limit: Most pipelines of a page.
        """
        filters = {"status": valid_status(PipelineStatus, status), "name": valid_text(name, "name", optional=True)}
        return page(self._session, PipelineRead, _SEARCH, after, limit, **filters)

    def update(
        self,
        pipeline_id: int,
        changes: PipelineUpdate,
        expected_version: int | None = None,
        *,
        allow_incomplete: bool = False,
    ) -> PipelineRead:
        """Write the given fields, and only those; a new graph is a new version, and runs under way keep theirs.

        Args:
            pipeline_id: The pipeline.
            changes: The fields to write.
            expected_version: The version that the caller has read: the update is refused if the graph changed since.
            allow_incomplete: As for ``create``.

        Raises:
            PipelineNotFoundError: There is no such pipeline.
            StaleVersionError: The graph is at another version than expected.
            InvalidPipelineError: The graph is not valid, or is incomplete and would be active.
        """
        expect(changes, PipelineUpdate, "changes", "PipelineUpdate(name=...) makes one")
        values: dict[str, Any] = {name: getattr(changes, name) for name in changes.model_fields_set}
        # BIGINTs, so that a number that no INTEGER holds is just not found
        statement = update(Pipeline).where(Pipeline.id == literal(storable_id(pipeline_id, "pipeline_id"), BigInteger))
        if expected_version is not None:
            expected = literal(storable_id(expected_version, "expected_version"), BigInteger)
            statement = statement.where(Pipeline.version == expected)
        statement = statement.values(values | {"updated_at": func.clock_timestamp()}).returning(*_RETURNED)
        options = {"allow_incomplete": allow_incomplete, "synchronize_session": False}
        with connected(self._session):
            row = self._session.execute(statement, execution_options=options).one_or_none()
        if row is None:
            raise StaleVersionError(pipeline_id, expected_version or 0, self.get(pipeline_id).version)
        return PipelineRead.model_validate(row._asdict())

    def activate(self, pipeline_id: int) -> PipelineRead:
        """Switch a pipeline on: from now on it can be run.

        Raises:
            PipelineNotFoundError: There is no such pipeline.
            InvalidPipelineError: Its graph is broken or incomplete.
        """
        while True:
            pipeline = self.get(pipeline_id)
            # the database checks what becomes active; one that was active before there were checks is told here
            prepare_graph(pipeline.nodes, pipeline.edges)
            with suppress(StaleVersionError):  # edited meanwhile: this graph has to be checked, too
                return self.update(pipeline_id, PipelineUpdate(status=PipelineStatus.ACTIVE), pipeline.version)

    def pause(self, pipeline_id: int) -> PipelineRead:
        """Switch a pipeline off: no new runs; those under way go on.

        Raises:
            PipelineNotFoundError: There is no such pipeline.
        """
        return self.update(pipeline_id, PipelineUpdate(status=PipelineStatus.PAUSED))

    def delete(self, pipeline_id: int, force: bool = False) -> None:
        """Delete a pipeline with its versions and its runs.

        Args:
            pipeline_id: The pipeline.
            force: Also while runs are pending or running; their workers then get ``RunNotFoundError``.

        Raises:
            PipelineNotFoundError: There is no such pipeline.
            PipelineInUseError: Runs are pending or running, and ``force`` is not set.
        """
        call(self._session, _DELETE, {"pipeline_id": pipeline_id, "force": flag(force, "force")})
