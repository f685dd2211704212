"""Examination of the rows: counters, leases, events, graphs and their compiled versions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from sqlalchemy.engine import Connection, Row
from sqlalchemy.exc import DBAPIError

from gathering_pipeline import migrator
from gathering_pipeline.errors import shorten
from gathering_pipeline.hooks import prepare_graph
from gathering_pipeline.lifecycle import RunStatus
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
_STATUSES = [status.value for status in RunStatus]


def _difference(pipelines: str) -> str:
    """SQL: by how much the runs of pipelines exceed their counters, by status, where one differs.

    Args:
        pipelines: SQL: the condition for a ``pipeline_id``.
    """
    runs = ", ".join(f"count(*) FILTER (WHERE status = '{name}') AS {name}" for name in _STATUSES)
    sums = ", ".join(f"sum({name}) AS {name}" for name in _STATUSES)
    exceed = [f"coalesce(r.{name}, 0) - coalesce(c.{name}, 0)" for name in _STATUSES]
    columns = ", ".join(f"{number} AS {name}" for number, name in zip(exceed, _STATUSES, strict=True))
    return f"""SELECT pipeline_id, {columns}
        FROM (SELECT pipeline_id, {runs} FROM circle.pipeline_runs WHERE {pipelines} GROUP BY pipeline_id) r
        FULL JOIN (SELECT pipeline_id, {sums} FROM circle.pipeline_counters WHERE {pipelines} GROUP BY pipeline_id) c
            USING (pipeline_id)
        WHERE ({", ".join(exceed)}) <> ({", ".join("0" for _ in exceed)})"""  # noqa: S608 - constant names


_ADD_DIFFERENCE = f"""INSERT INTO circle.pipeline_counters (pipeline_id, {", ".join(_STATUSES)})
        {_difference("pipeline_id = %1$s")}"""
_CHECKS = [
    _Check(
        "counters",
        "error",
        "the repair raises them; it never lowers one, because purged runs still count",
        # Runs of the last minutes are left out: a writer that bypasses the functions increments the counters a moment
        # later. The repair adds the difference seen in one snapshot, so that it blocks nobody and keeps concurrent
        # increments, those of pipeline_counters and those that are moved to the columns meanwhile.
        """
        SELECT 'circle.pipelines id ' || c.id,
               format('run_count, success_count, error_count are %s, %s, %s, but it has %s, %s, %s such runs'
                      ' older than 5 minutes',
                      c.run_count, c.success_count, c.error_count, r.runs, r.good, r.bad),
               format('WITH d AS MATERIALIZED (
                           SELECT greatest(0, r.runs - c.run_count) AS runs,
                                  greatest(0, r.good - c.success_count) AS good,
                                  greatest(0, r.bad - c.error_count) AS bad
                           FROM circle.pipelines p, circle.counted(p) c,
                                ({quoted_recount} WHERE pipeline_id = %1$s GROUP BY pipeline_id) r
                           WHERE p.id = %1$s)
                       UPDATE circle.pipelines SET run_count = least(run_count + d.runs, 2147483647),
                           success_count = least(success_count + d.good, 2147483647),
                           error_count = least(error_count + d.bad, 2147483647)
                       FROM d WHERE id = %1$s', c.id)
        FROM circle.pipelines p CROSS JOIN LATERAL circle.counted(p) c
        JOIN ({recount} GROUP BY pipeline_id) r ON r.pipeline_id = c.id
        WHERE c.run_count < r.runs OR c.success_count < r.good OR c.error_count < r.bad ORDER BY c.id
        """.replace("{recount}", _RECOUNT).replace("{quoted_recount}", _RECOUNT.replace("'", "''")),
    ),
    _Check(
        "status_counters",
        "error",
        "counts() and pages of runs are wrong by that; the repair adds the difference",
        # A statement sees runs and counters of the same moment, and a transaction changes both: the difference stays
        # the same whatever runs change meanwhile.
        """
        SELECT 'circle.pipelines id ' || d.pipeline_id,
               format('the numbers of its runs by status are wrong: %s', concat_ws(', ',
                   {differences})),
               format('{repair}', d.pipeline_id)
        FROM ({difference}) d ORDER BY d.pipeline_id
        """.replace("{differences}", ", ".join(f"'{name} by ' || nullif(d.{name}, 0)" for name in _STATUSES))
        .replace("{repair}", _ADD_DIFFERENCE.replace("'", "''"))
        .replace("{difference}", _difference("true")),
    ),
    _Check(
        "live_nodes",
        "error",
        "the repair cancels the nodes of a terminal run, and returns those of a pending run to pending",
        # the guards let neither a node of a completed run nor one of a pending run change, but in the role of a replica
        """
        SELECT 'circle.pipeline_runs id ' || r.id,
               format('it is %s, but %s of its nodes are %s', r.status, count(*),
                      CASE r.status WHEN 'pending' THEN 'running' ELSE 'pending or running' END),
               format('%sUPDATE circle.pipeline_node_runs SET status = %L
                       WHERE run_id = %s AND status = ANY (%L)',
                      CASE WHEN r.status IN ('completed', 'pending') THEN
                          'SET LOCAL session_replication_role = replica; ' END,
                      CASE r.status WHEN 'pending' THEN 'pending' ELSE 'cancelled' END, r.id,
                      CASE r.status WHEN 'pending' THEN '{running}' ELSE '{pending,running}' END)
        FROM circle.pipeline_runs r JOIN circle.pipeline_node_runs n ON n.run_id = r.id
        WHERE (r.completed_at IS NOT NULL AND n.status IN ('pending', 'running'))
           OR (r.status = 'pending' AND n.status = 'running') GROUP BY r.id, r.status ORDER BY r.id
        """,
    ),
    _Check(
        "wrong_untaken",
        "error",
        "the repair leaves successors of completed nodes only",
        # the guard refuses the repair, too, and is disabled as for those of _NUMBER_GRAPH
        """
        SELECT 'circle.pipeline_node_runs',
               format('untaken of %s rows isn''t of successors of a completed node: ids %s%s', count(*),
                   array_to_string((array_agg(id ORDER BY id))[:10], ', '),
                   CASE WHEN count(*) > 10 THEN ' and more' END),
               format('ALTER TABLE circle.pipeline_node_runs DISABLE TRIGGER pipeline_node_runs_before;
                       UPDATE circle.pipeline_node_runs SET untaken = CASE WHEN status = ''completed'' THEN
                           nullif(ARRAY(SELECT p FROM unnest(untaken) p WHERE p = ANY (successors)), ''{}'') END
                       WHERE id = ANY (%L);
                       ALTER TABLE circle.pipeline_node_runs ENABLE ALWAYS TRIGGER pipeline_node_runs_before',
                      array_agg(id ORDER BY id))
        FROM circle.pipeline_node_runs
        WHERE untaken IS NOT NULL AND (status = 'completed' AND untaken <@ successors) IS NOT TRUE HAVING count(*) > 0
        """,
    ),
    _Check(
        "missing_nodes",
        "error",
        "cancel the run, and create it again",
        # a run without any node run is one of a writer that keeps none
        """
        SELECT 'circle.pipeline_runs id ' || r.id,
               format('it is %s, and has %s of the %s nodes of its version', r.status, n.count, v.node_count), NULL
        FROM circle.pipeline_runs r
        JOIN circle.pipeline_versions v ON v.pipeline_id = r.pipeline_id AND v.version = r.pipeline_version
        CROSS JOIN LATERAL (SELECT count(*) FROM circle.pipeline_node_runs n WHERE n.run_id = r.id) n
        WHERE r.status IN ('pending', 'running') AND n.count > 0 AND n.count < v.node_count ORDER BY r.id
        """,
    ),
    _Check(
        "unversioned_runs",
        "warning",
        "no worker claims them: the repair binds those to their pipeline's graph that have one; cancel the others",
        """
        SELECT 'circle.pipeline_runs',
               format('%s pending runs are bound to no version of their pipeline''s graph: ids %s%s', count(*),
                   array_to_string((array_agg(r.id ORDER BY r.id))[:10], ', '),
                   CASE WHEN count(*) > 10 THEN ' and more' END),
               CASE WHEN bool_or(v.version IS NOT NULL) THEN
                   'UPDATE circle.pipeline_runs r SET pipeline_version = v.version
                    FROM circle.pipelines p
                    JOIN circle.pipeline_versions v ON v.pipeline_id = p.id AND v.version = p.version
                    WHERE r.pipeline_id = p.id AND r.status = ''pending''
                      AND r.pipeline_version IS NULL' END
        FROM circle.pipeline_runs r JOIN circle.pipelines p ON p.id = r.pipeline_id
        LEFT JOIN circle.pipeline_versions v ON v.pipeline_id = p.id AND v.version = p.version
        WHERE r.status = 'pending' AND r.pipeline_version IS NULL HAVING count(*) > 0
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
        "ids",
        "warning",
        "gathering-pipeline db widen changes ids of runs and node runs to BIGINT while services read and write",
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
        "unfinished_widening",
        "warning",
        "start gathering-pipeline db widen again: it continues where it was",
        """
        SELECT format('circle.%s.%s', c.relname, a.attname), 'gathering-pipeline db widen runs now, or was interrupted',
               NULL
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND NOT a.attisdropped
        WHERE c.relnamespace = to_regnamespace('circle') AND c.relkind = 'r' AND starts_with(a.attname, '{temporary}')
        ORDER BY 1
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
    _Check(
        "clock_behind",
        "warning",
        "set the clock of the server: after a restore or a failover it may issue tokens of lost claims again",
        """
        SELECT 'circle.pipeline_runs id ' || min(id),
               format('%s runs have fencing tokens up to %s ahead of the clock of the server', count(*),
                      make_interval(secs => (max(claim_token) - max(clock)) / 1000000)), NULL
        FROM circle.pipeline_runs
        CROSS JOIN (SELECT extract(epoch FROM clock_timestamp())::bigint * 1000000 AS clock OFFSET 0) c
        WHERE claim_token > clock + 60000000 HAVING count(*) > 0
        """,
    ),
]

# The graph of a pipeline, and whether its current version exists and has this graph.
_GRAPHS = """
SELECT p.id, p.status, coalesce(p.nodes::text, 'null') AS nodes, coalesce(p.edges::text, 'null') AS edges,
       v.version IS NOT NULL AS compiled, (v.nodes, v.edges) = (p.nodes, p.edges) AS current
FROM circle.pipelines p LEFT JOIN circle.pipeline_versions v ON v.pipeline_id = p.id AND v.version = p.version
WHERE p.id > %s ORDER BY p.id LIMIT 100
"""
_COMPILE = """DO $$ DECLARE p circle.pipelines; BEGIN
    SELECT * INTO p FROM circle.pipelines WHERE id = {id} FOR NO KEY UPDATE;
    IF NOT EXISTS (SELECT FROM circle.pipeline_versions WHERE (pipeline_id, version) = (p.id, p.version)) THEN
        INSERT INTO circle.pipeline_versions (pipeline_id, version, nodes, edges)
        VALUES (p.id, p.version, p.nodes, p.edges);
    END IF; END $$"""
# The guards refuse these repairs to everyone. So each disables one guard within its transaction, which the owner of the
# tables may do, and whose lock keeps other writers out until the guard is back.
_NUMBER_GRAPH = """ALTER TABLE circle.pipelines DISABLE TRIGGER pipelines_before;
UPDATE circle.pipelines p
SET version = 1 + (SELECT max(version) FROM circle.pipeline_versions WHERE pipeline_id = p.id)
WHERE id = {id} AND NOT EXISTS (
    SELECT FROM circle.pipeline_versions v
    WHERE (v.pipeline_id, v.version, v.nodes, v.edges) = (p.id, p.version, p.nodes, p.edges));
ALTER TABLE circle.pipelines ENABLE ALWAYS TRIGGER pipelines_before"""
_RECOMPILE = """ALTER TABLE circle.pipeline_versions DISABLE TRIGGER pipeline_versions_before;
UPDATE circle.pipeline_versions v SET compiled = c.compiled, node_count = cardinality(c.compiled)
FROM (SELECT nodes, edges, circle.compile_graph(nodes, edges) AS compiled FROM circle.pipeline_versions
      WHERE (pipeline_id, version) = ({id}, {version})) c
WHERE (v.pipeline_id, v.version) = ({id}, {version});
ALTER TABLE circle.pipeline_versions ENABLE ALWAYS TRIGGER pipeline_versions_before"""
_VERSIONS = """
SELECT pipeline_id, version FROM circle.pipeline_versions
WHERE (pipeline_id, version) > (%s, %s) ORDER BY 1, 2 LIMIT 100
"""
_MISCOMPILED = """
SELECT pipeline_id, version FROM circle.pipeline_versions
WHERE (pipeline_id, version) >= (%s, %s) AND (pipeline_id, version) <= (%s, %s)
  AND (compiled, node_count) IS DISTINCT FROM (circle.compile_graph(nodes, edges), cardinality(compiled))
ORDER BY 1, 2
"""
_INVALID_GRAPH = "PL008"


def examinations(connection: Connection, held_for: float) -> dict[str, Iterator[Finding]]:
    """The examinations by the codes of their findings; each runs when it is iterated.

    Args:
        connection: In autocommit.
        held_for: Age in seconds from which a transaction that holds back the event feed is a finding.
    """
    found = {check.code: _run_check(connection, check, held_for) for check in _CHECKS}
    return found | {
        "broken_graph, not_compiled": _graphs(connection),
        "miscompiled_version": _versions(connection),
    }


def _run_check(connection: Connection, check: _Check, held_for: float) -> Iterator[Finding]:
    tables = [item.name for item in catalog.expected() if item.kind == "table"]
    sql = check.sql.replace("{held_for}", str(float(held_for))).replace("{tables}", f"{{{','.join(tables)}}}")
    sql = sql.replace("{temporary}", catalog.TEMPORARY)
    unformatted = {"no_parameters": True}  # percent signs are not placeholders
    for label, message, repair in connection.exec_driver_sql(sql, execution_options=unformatted):
        yield Finding(check.severity, check.code, label, message, check.advice, () if repair is None else (repair,))


def _graphs(connection: Connection) -> Iterator[Finding]:
    last = 0
    while rows := connection.exec_driver_sql(_GRAPHS, (last,)).all():
        last = rows[-1].id
        for row in rows:
            yield from _graph(row)


def _graph(row: Row[Any]) -> Iterator[Finding]:
    label = f"circle.pipelines id {row.id}"
    try:
        prepare_graph(json.loads(row.nodes), json.loads(row.edges), allow_incomplete=row.status != "active")
    except (ValueError, RecursionError) as error:  # ValueError also of json: Python reads at most 4300 digits
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else shorten(str(error), 300)
        message = f"its graph is invalid and can't be run: {reason}"
        yield Finding("warning", "broken_graph", label, message, "correct it in the editor, or delete it")
    else:
        if not row.compiled:
            message = "its graph was stored while the triggers were disabled, so it was never compiled and can't be run"
            yield Finding(
                "error", "not_compiled", label, message, "the repair compiles it", (_COMPILE.format(id=row.id),)
            )
        elif not row.current:
            message = "its graph was changed while the triggers were disabled, so its runs have the graph of before"
            advice = "the repair gives the graph a version of its own"
            yield Finding("error", "not_compiled", label, message, advice, (_NUMBER_GRAPH.format(id=row.id),))


def _versions(connection: Connection) -> Iterator[Finding]:
    last = (0, 0)
    while keys := [tuple(row) for row in connection.exec_driver_sql(_VERSIONS, last)]:
        yield from _compiled(connection, keys)
        last = keys[-1]


def _compiled(connection: Connection, keys: list[tuple[int, int]]) -> Iterator[Finding]:
    """Compile consecutive versions again, one by one if the compiler refuses one."""
    try:
        differing = connection.exec_driver_sql(_MISCOMPILED, (*keys[0], *keys[-1])).all()
    except DBAPIError as error:
        if migrator.sqlstate(error) != _INVALID_GRAPH:
            raise
        if len(keys) > 1:
            for key in keys:
                yield from _compiled(connection, [key])
        else:
            message = f"its graph is invalid: {shorten(str(error.orig).partition(chr(10))[0], 300)}"
            advice = "cancel its runs; the next graph of the pipeline replaces it"
            yield Finding("warning", "miscompiled_version", _version(keys[0]), message, advice)
        return
    for row in differing:
        message = "its compiled nodes are not those of its graph: they were written while the triggers were disabled"
        advice = "the repair compiles it again; its runs keep the nodes that they have"
        repair = _RECOMPILE.format(id=row.pipeline_id, version=row.version)
        yield Finding("error", "miscompiled_version", _version(tuple(row)), message, advice, (repair,))


def _version(key: tuple[int, int]) -> str:
    return f"circle.pipeline_versions {key[0]}, {key[1]}"
