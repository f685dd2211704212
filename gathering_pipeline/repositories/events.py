"""Events: read by a cursor that misses none and repeats none, and swept."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

from gathering_pipeline.errors import InvalidCursorError
from gathering_pipeline.events import EventPage, PipelineEvent
from gathering_pipeline.json_values import show
from gathering_pipeline.repositories._call import MAX_BIGINT, Query, Repository, call, positive, seconds, storable_id

# The order of events, and up to where they can be read, are explained in alembic/sql/011b_events/1_log.sql.
_HERE = """
WITH here AS MATERIALIZED (
    SELECT c.system_identifier || '-' || d.oid AS name, pg_snapshot_xmax(pg_current_snapshot()) AS next_xid
    FROM pg_control_system() c, pg_database d WHERE d.datname = current_database()
)"""
_READ = Query(f"""{_HERE}
SELECT here.name, here.next_xid::text::numeric, to_json(e)::text
FROM here LEFT JOIN LATERAL (
    SELECT e.*, here.name || '-' || e.xid || '-' || e.id AS cursor
    FROM circle.page_of_events(%(run)s, %(xid)s::text::xid8, %(id)s, %(limit)s) e
) e ON true
ORDER BY e.xid, e.id""")
_LAST = Query(f"""{_HERE}
SELECT here.name || '-' || coalesce(e.xid::text, '0') || '-' || coalesce(e.id, 0)
FROM here LEFT JOIN LATERAL (
    SELECT xid, id FROM circle.pipeline_events WHERE xid < pg_snapshot_xmin(pg_current_snapshot())
    ORDER BY xid DESC, id DESC LIMIT 1
) e ON true""")
_PURGE = "SELECT circle.purge_events(make_interval(secs => %(older_than)s), %(limit)s)"

_CURSOR = re.compile(r"([0-9]{1,20}-[0-9]{1,10})-([0-9]{1,20})-([0-9]{1,19})")
"""System identifier and database, transaction, id."""


class EventRepository(Repository):
    """The log of lifecycle events. Works in the session it is given and never commits.

    Events are there when the transaction that changed a status has committed, and every transaction that began before
    it has ended: a long one that writes, anywhere on the server, holds the log back. Within a run they stand in the
    order in which they happened, nodes of one call by position, the run's end last.
    """

    def read(self, after: str | None = None, limit: int = 500, run_id: int | None = None) -> EventPage:
        """Read the events that follow a cursor: none is missed, and none comes twice.

        Args:
            after: ``next_cursor`` of a page or ``cursor`` of an event; ``None``: from the oldest event that is kept.
            limit: Most events of the page.
            run_id: Only events of this run; its cursors are as good for all events, and the other way round.

        Raises:
            InvalidCursorError: It is no cursor, or not one of this database: a dump that was restored elsewhere, or a
                backup from before the event, begins anew.
        """
        name, xid, last = _parse(after)
        parameters = {
            "run": None if run_id is None else storable_id(run_id, "run_id"),
            "xid": str(xid),
            "id": last,
            "limit": positive(limit, "limit"),
        }
        rows = call(self._session, _READ, parameters)
        here, next_xid, _ = rows[0]
        if name not in (None, here):
            raise InvalidCursorError(f"the cursor {after!r} is one of another database: begin with after=None")
        if xid > next_xid:
            raise InvalidCursorError(
                f"the cursor {after!r} is ahead of the database, which was set back: begin with after=None"
            )
        items = tuple(PipelineEvent.model_validate_json(event) for _, _, event in rows if event is not None)
        return EventPage(items=items, next_cursor=items[-1].cursor if items else after or f"{here}-0-0")

    def last(self) -> str:
        """The cursor of the newest event that can be read, for who wants to know only what comes after it."""
        cursor: str = self._scalar(_LAST)
        return cursor

    def purge(self, older_than: timedelta, limit: int = 10_000) -> int:
        """Delete at most ``limit`` events from over ``older_than`` ago; commit and repeat until it returns 0.

        Events are kept until then, also those of runs that are deleted. Who hasn't read one by then has missed it.
        """
        age = seconds(older_than, "older_than", zero=True)
        return int(self._scalar(_PURGE, older_than=age, limit=positive(limit, "limit")))

    def _scalar(self, sql: str, **parameters: Any) -> Any:
        return call(self._session, sql, parameters)[0][0]


def _parse(cursor: object) -> tuple[str | None, int, int]:
    """Where to go on: the database's name, the transaction, the id."""
    if cursor is None:
        return None, 0, 0
    match = _CURSOR.fullmatch(cursor) if isinstance(cursor, str) else None
    if match is None or int(match[2]) > MAX_BIGINT or int(match[3]) > MAX_BIGINT:
        raise InvalidCursorError(f"after must be the cursor of an event or of a page, not {show(cursor)}")
    return match[1], int(match[2]), int(match[3])
