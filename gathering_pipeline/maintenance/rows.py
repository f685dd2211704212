"""Examination of the rows: counters, leases, events, graphs and their compiled versions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import NamedTuple

from sqlalchemy.engine import Connection

from gathering_pipeline.errors import shorten
from gathering_pipeline.hooks import prepare_graph
from gathering_pipeline.maintenance import catalog
from gathering_pipeline.maintenance.findings import Finding, Severity


class _Check(NamedTuple):
    """A query that returns a row for each finding: object, message, and the SQL of the repair or NULL."""

    code: str
    severity: Severity
    advice: str
    sql: str


_RECOUNT = """SELECT pipeline_id,
    count(*) FILTER (WHERE (created_at > now() - interval '5 min') IS NOT TRUE) AS runs,
    count(*) FILTER (WHERE status = 'completed' AND completed_at <= now() - interval '5 min') AS good,
    count(*) FILTER (WHERE status IN ('failed', 'timeout') AND completed_at <= now() - interval '5 min') AS bad
FROM circle.pipeline_runs"""
_CHECKS = [
    _Check(
        "counters",
        "error",
        "the repair raises them; it never lowers one, because purged runs still count",
        # Runs of the last minutes are left out: a writer that bypasses the functions increments the counters a moment
        # later. The repair adds the difference seen in one snapshot, so that it blocks nobody and keeps concurrent
        # increments.
        """
        SELECT 'circle.pipelines id ' || p.id,
               format('run_count, success_count, error_count are %s, %s, %s, but it has %s, %s, %s such runs'
                      ' older than 5 minutes',
                      p.run_count, p.success_count, p.error_count, r.runs, r.good, r.bad),
               format('WITH d AS MATERIALIZED (
                           SELECT greatest(0, r.runs - run_count) AS runs, greatest(0, r.good - success_count) AS good,
                                  greatest(0, r.bad - error_count) AS bad
                           FROM circle.pipelines, ({quoted_recount} WHERE pipeline_id = %1$s GROUP BY pipeline_id) r
                           WHERE id = %1$s)
                       UPDATE circle.pipelines SET run_count = run_count + d.runs,
                           success_count = success_count + d.good, error_count = error_count + d.bad
                       FROM d WHERE id = %1$s', p.id)
        FROM circle.pipelines p JOIN ({recount} GROUP BY pipeline_id) r ON r.pipeline_id = p.id
        WHERE p.run_count < r.runs OR p.success_count < r.good OR p.error_count < r.bad ORDER BY p.id
        """.replace("{recount}", _RECOUNT).replace("{quoted_recount}", _RECOUNT.replace("'", "''")),
    ),
    _Check(
        "live_nodes",
        "error",
        "the repair cancels these nodes, as the end of the run should have done",
        # the guard lets a node of a completed run become cancelled only in the role of a replica
        """
        SELECT 'circle.pipeline_runs id ' || r.id,
               format('it is %s, but %s of its nodes are pending or running', r.status, count(*)),
               format('%sUPDATE circle.pipeline_node_runs SET status = ''cancelled''
                       WHERE run_id = %s AND status IN (''pending'', ''running'')',
                      CASE WHEN r.status = 'completed' THEN 'SET LOCAL session_replication_role = replica; ' END, r.id)
        FROM circle.pipeline_runs r JOIN circle.pipeline_node_runs n ON n.run_id = r.id
        WHERE r.completed_at IS NOT NULL AND n.status IN ('pending', 'running') GROUP BY r.id, r.status ORDER BY r.id
        """,
    ),
    _Check(
        "expired_leases",
        "warning",
        "a worker's recover() releases them; the repair releases all of them now",
        """
        SELECT 'circle.pipeline_runs', format('the lease expired on %s running runs, the earliest at %s: ids %s%s',
                   count(*), min(lease_expires_at), array_to_string((array_agg(id ORDER BY id))[:10], ', '),
                   CASE WHEN count(*) > 10 THEN ' and more' END),
               'DO $$ BEGIN
                    LOOP PERFORM FROM circle.recover_runs(100, 2147483647);
                         EXIT WHEN NOT FOUND; COMMIT; END LOOP; END $$'
        FROM circle.pipeline_runs WHERE status = 'running' AND lease_expires_at < clock_timestamp() HAVING count(*) > 0
        """,
    ),
    _Check(
        "feed_held_back",
        "warning",
        "readers get no newer event before it ends: end it with pg_terminate_backend(pid) or ROLLBACK PREPARED",
        """
        SELECT coalesce('session ' || a.pid, format('prepared transaction %L in database %I', x.gid, x.database)),
               format('its transaction holds back all events since %s%s', coalesce(a.xact_start, x.prepared),
                      ' (' || concat_ws(', ', 'user ' || a.usename, 'application ' || a.application_name, a.state)
                      || '): ' || left(a.query, 100)), NULL
        FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid
        LEFT JOIN pg_prepared_xacts x ON l.pid IS NULL AND x.transaction = l.transactionid
        WHERE l.locktype = 'transactionid' AND l.mode = 'ExclusiveLock' AND l.granted
          AND coalesce(a.xact_start, x.prepared) < clock_timestamp() - make_interval(secs => {held_for})
        ORDER BY age(l.transactionid) DESC LIMIT 1
        """,
    ),
    _Check(
        "incomplete_version",
        "error",
        "no run can be created on it; the repair compiles it again",
        """
        SELECT format('circle.pipeline_versions %s, %s', v.pipeline_id, v.version),
               format('it has %s of its %s nodes', n.count, v.node_count),
               format('DELETE FROM circle.pipeline_version_nodes WHERE (pipeline_id, version) = (%1$s, %2$s);
                       INSERT INTO circle.pipeline_version_nodes
                           (pipeline_id, version, position, node_id, node_type, predecessors, successors)
                       SELECT %1$s, %2$s, c.node_position, c.id, c.type, c.preds, c.succs
                       FROM (SELECT * FROM circle.pipeline_versions
                             WHERE (pipeline_id, version) = (%1$s, %2$s) FOR SHARE) v,
                            circle.compile_graph(v.nodes, v.edges) c', v.pipeline_id, v.version)
        FROM circle.pipeline_versions v CROSS JOIN LATERAL (
            SELECT count(*) FROM circle.pipeline_version_nodes n
            WHERE (n.pipeline_id, n.version) = (v.pipeline_id, v.version)) n
        WHERE n.count <> v.node_count ORDER BY v.pipeline_id, v.version
        """,
    ),
    _Check(
        "ids",
        "warning",
        "plan the change to BIGINT in time: it rewrites the table under an exclusive lock",
        """
        SELECT format('circle.%s.%s', s.tab, s.col), format('%s of %s ids are used', s.used, s.most), NULL
        FROM (SELECT c.relname AS tab, a.attname AS col, pg_sequence_last_value(d.objid::regclass) AS used,
                     CASE a.atttypid WHEN 'int4'::regtype THEN 2147483647 ELSE 9223372036854775807 END AS most
              FROM pg_depend d JOIN pg_class c ON c.oid = d.refobjid
              JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = d.refobjsubid
              JOIN pg_sequence q ON q.seqrelid = d.objid
              WHERE d.deptype IN ('a', 'i') AND c.relnamespace = to_regnamespace('circle')
                AND c.relname = ANY ('{tables}')) s
        WHERE s.used > s.most / 2 ORDER BY 1
        """,
    ),
    _Check(
        "foreign_events",
        "error",
        "they came with a dump from another cluster, and no reader gets them; the repair sorts them before all others",
        # every row that a snapshot shows was written before its xmax
        """
        SELECT 'circle.pipeline_events', format('%s events up to id %s have future transaction numbers', n, newest),
               'SELECT circle.reset_event_xids()'
        FROM (SELECT count(*) AS n, max(id) AS newest FROM circle.pipeline_events
              WHERE xid >= pg_snapshot_xmax(pg_current_snapshot())) f WHERE n > 0
        """,
    ),
]

_GRAPHS = """
SELECT p.id, p.status, coalesce(p.nodes::text, 'null'), coalesce(p.edges::text, 'null'), v.version IS NOT NULL
FROM circle.pipelines p LEFT JOIN circle.pipeline_versions v ON v.pipeline_id = p.id AND v.version = p.version
WHERE p.id > %s ORDER BY p.id LIMIT 100
"""
_COMPILE = """DO $$ DECLARE p circle.pipelines; BEGIN
    SELECT * INTO p FROM circle.pipelines WHERE id = {id} FOR NO KEY UPDATE;
    IF NOT EXISTS (SELECT FROM circle.pipeline_versions WHERE (pipeline_id, version) = (p.id, p.version)) THEN
        PERFORM circle.write_version(p.id, p.version, p.nodes, p.edges);
    END IF; END $$"""


def examinations(connection: Connection, held_for: float) -> dict[str, Iterator[Finding]]:
    """The examinations by the codes of their findings; each runs when it is iterated.

    Args:
        connection: In autocommit.
        held_for: Age in seconds from which a transaction that holds back the event feed is a finding.
    """
    found = {check.code: _run_check(connection, check, held_for) for check in _CHECKS}
    return found | {"broken_graph, not_compiled": _graphs(connection)}


def _run_check(connection: Connection, check: _Check, held_for: float) -> Iterator[Finding]:
    tables = [item.name for item in catalog.expected() if item.kind == "table"]
    sql = check.sql.replace("{held_for}", str(float(held_for))).replace("{tables}", f"{{{','.join(tables)}}}")
    unformatted = {"no_parameters": True}  # percent signs are not placeholders
    for label, message, repair in connection.exec_driver_sql(sql, execution_options=unformatted):
        yield Finding(check.severity, check.code, label, message, check.advice, () if repair is None else (repair,))


def _graphs(connection: Connection) -> Iterator[Finding]:
    last = 0
    while rows := connection.exec_driver_sql(_GRAPHS, (last,)).all():
        last = rows[-1].id
        for row in rows:
            yield from _graph(*row)


def _graph(id: int, status: str, nodes: str, edges: str, compiled: bool) -> Iterator[Finding]:
    label = f"circle.pipelines id {id}"
    try:
        prepare_graph(json.loads(nodes), json.loads(edges), allow_incomplete=status != "active")
    except (ValueError, RecursionError) as error:  # ValueError also of json: Python reads at most 4300 digits
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else shorten(str(error), 300)
        message = f"its graph is invalid and can't be run: {reason}"
        yield Finding("warning", "broken_graph", label, message, "correct it in the editor, or delete it")
    else:
        if not compiled:
            message = "its graph was stored while the triggers were disabled, so it was never compiled and can't be run"
            yield Finding("error", "not_compiled", label, message, "the repair compiles it", (_COMPILE.format(id=id),))
