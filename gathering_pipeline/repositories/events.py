"""Events: read by a cursor that misses none and repeats none; delete."""

from __future__ import annotations

import re
from datetime import timedelta

from gathering_pipeline.arguments import MAX_BIGINT, check_count, check_duration, check_id, check_run_id
from gathering_pipeline.connections import Statement
from gathering_pipeline.errors import InvalidCursorError, RunNotFoundError
from gathering_pipeline.events import RUN_ENDS, EventPage, PipelineEvent
from gathering_pipeline.json_values import quote
from gathering_pipeline.repositories._call import AsyncRepository, Repository, blocking

# --- statements; alembic/sql/009_events/1_log.sql explains the order of events, and which of them can be read -------

START = "-0-0-0"
"""Where a cursor begins, after the name of the database."""

_DATABASE = """
WITH database AS MATERIALIZED (
    SELECT c.system_identifier || '-' || d.oid AS name
    FROM pg_control_system() c, pg_database d WHERE d.datname = current_database()
)"""
# The time tells an event from another with the same numbers, which a restored or promoted server may give out again.
_CURSOR_OF = "'-' || e.xid || '-' || e.id || '-' || (extract(epoch FROM e.created_at) * 1000000)::bigint"
READ = Statement(
    f"""{_DATABASE}
SELECT pg_catalog.json_build_array(d.name, CASE
    WHEN %(id)s::bigint = 0 OR EXISTS (
        SELECT FROM circle.pipeline_events e WHERE e.xid = %(xid)s::text::xid8 AND e.id = %(id)s::bigint
        AND (extract(epoch FROM e.created_at) * 1000000)::bigint = %(micros)s::bigint) THEN 'kept'
    WHEN pg_is_in_recovery() AND %(xid)s::text::xid8 >= pg_snapshot_xmax(pg_current_snapshot()) THEN 'ahead'
    END, e, d.name || (
        SELECT {_CURSOR_OF} FROM circle.pipeline_events e
        WHERE e.xid < pg_snapshot_xmin(pg_current_snapshot())
        ORDER BY e.xid DESC, e.id DESC LIMIT 1))::text
FROM database d LEFT JOIN LATERAL (
    SELECT e.*, d.name || {_CURSOR_OF} AS cursor
    FROM circle.page_of_events(%(run)s, %(xid)s::text::xid8, %(id)s, %(limit)s) e
) e ON true
ORDER BY e.xid, e.id""",
    read_only=True,
)
LAST = Statement(
    f"""{_DATABASE}
SELECT pg_catalog.to_json(d.name || coalesce({_CURSOR_OF}, '{START}'))::text
FROM database d LEFT JOIN LATERAL (
    SELECT xid, id, created_at FROM circle.pipeline_events WHERE xid < pg_snapshot_xmin(pg_current_snapshot())
    ORDER BY xid DESC, id DESC LIMIT 1
) e ON true""",
    read_only=True,
)
IS_OVER = Statement(
    """
SELECT pg_catalog.to_json(CASE
    WHEN r.id IS NOT NULL THEN r.completed_at IS NOT NULL
    WHEN pg_catalog.pg_is_in_recovery() THEN false -- it may not have come yet
    END AND NOT EXISTS (
    SELECT FROM circle.pipeline_events e
    WHERE e.run_id = %(run)s AND (e.xid, e.id) > (%(xid)s::text::xid8, %(id)s::bigint)
    AND e.type = ANY (%(ends)s::text[])))::text
FROM (VALUES (true)) one LEFT JOIN circle.pipeline_runs r ON r.id = %(run)s::bigint""",
    read_only=True,
)
PURGE = Statement("SELECT circle.purge_events(pg_catalog.make_interval(secs => %(older_than)s), %(limit)s)::text")


# --- the repository --------------------------------------------------------------------------------------------------


class AsyncEventRepository(AsyncRepository):
    """The log of lifecycle events. Works in the caller's session and never commits.

    An event can be read when the transaction that changed the status has committed, and every transaction that began
    before it has ended: a long transaction that writes, anywhere on the server, delays all events after it. Events of
    one run are in the order in which they happened; events of nodes in one call are sorted by position, and the end of
    the run is last.
    """

    async def read(self, after: str | None = None, limit: int = 500, run_id: int | None = None) -> EventPage:
        """Read the events after a cursor: none is missed, and none comes twice.

        Args:
            after: ``next_cursor`` of a page or ``cursor`` of an event; ``None`` reads from the oldest event kept.
            limit: Most events of the page.
            run_id: Only events of this run; cursors with and without this filter are interchangeable.

        Raises:
            InvalidCursorError: ``after`` is not a cursor of this database, or its event is gone: events that the reader
                had not read were purged, or a restore or a failover undid them. Start again with ``None``.
        """
        database, xid, last_id, micros = _parse_cursor(after)
        run = None if run_id is None else check_id(run_id, "run_id")
        position = {"xid": str(xid), "id": last_id, "micros": micros}
        rows = await self._values(READ, run=run, **position, limit=check_count(limit, "limit"))
        current_database, state, _, newest = rows[0]
        if database not in (None, current_database):
            raise InvalidCursorError(f"the cursor {after!r} is of another database: start again with after=None")
        if state is None:
            raise InvalidCursorError(
                f"the event of the cursor {after!r} is gone: it was purged, or undone by a restore or a failover: start"
                " again with after=None"
            )
        items = tuple(PipelineEvent.model_validate(event) for _, _, event, _ in rows if event is not None)
        if len(items) < limit and state == "kept" and newest is not None:
            # all that there is was read; of one run the last event may be purged long before those of others
            return EventPage(items=items, next_cursor=newest)
        return EventPage(items=items, next_cursor=items[-1].cursor if items else after or current_database + START)

    async def last(self) -> str:
        """Read the cursor of the newest event that can be read, to follow only later events."""
        cursor: str = (await self._values(LAST))[0]
        return cursor

    async def is_over(self, run_id: int, after: str | None = None) -> bool:
        """Whether a run has ended and its last event is not after a cursor: no event of it comes any more.

        Raises:
            RunNotFoundError: The run doesn't exist, and no event after the cursor ends it. A standby waits for the run.
            InvalidCursorError: ``after`` is not a cursor.
        """
        _, xid, last_id, _ = _parse_cursor(after)
        over: bool | None
        (over,) = await self._values(IS_OVER, run=check_run_id(run_id), xid=str(xid), id=last_id, ends=_ENDS)
        if over is None:
            raise RunNotFoundError(run_id)
        return over

    async def purge(self, older_than: timedelta, limit: int = 10_000) -> int:
        """Delete at most ``limit`` events from over ``older_than`` ago; commit and repeat until it returns 0.

        Events are kept until then, also events of deleted runs. A reader that is further behind gets
        ``InvalidCursorError``. The newest event is kept, so that the cursors of readers that have it stay valid.
        """
        age = check_duration(older_than, "older_than", allow_zero=True)
        return int((await self._values(PURGE, older_than=age, limit=check_count(limit, "limit")))[0])


_ENDS = f"{{{','.join(sorted(RUN_ENDS))}}}"

# database (system identifier and oid); transaction, id and time of the event, in microseconds since 1970
_CURSOR = re.compile(r"([0-9]{1,20}-[0-9]{1,10})-([0-9]{1,20})-([0-9]{1,19})-(-?[0-9]{1,19})")


class EventRepository(Repository):
    """The sync twin of ``AsyncEventRepository``, for a ``Session``."""

    _source = AsyncEventRepository

    read = blocking(AsyncEventRepository.read)
    last = blocking(AsyncEventRepository.last)
    is_over = blocking(AsyncEventRepository.is_over)
    purge = blocking(AsyncEventRepository.purge)


def order_of(cursor: str) -> tuple[int, int]:
    """What sorts the cursors of one database."""
    _, xid, last_id, _ = _parse_cursor(cursor)
    return xid, last_id


def _parse_cursor(cursor: object) -> tuple[str | None, int, int, int]:
    """Split a cursor into the database's name, and transaction, id and time of the last event read."""
    if cursor is None:
        return None, 0, 0, 0
    match = _CURSOR.fullmatch(cursor) if isinstance(cursor, str) else None
    if match is None or any(abs(int(match[part])) > MAX_BIGINT for part in (2, 3, 4)):
        raise InvalidCursorError(f"after must be the cursor of an event or of a page, not {quote(cursor)}")
    return match[1], int(match[2]), int(match[3]), int(match[4])
