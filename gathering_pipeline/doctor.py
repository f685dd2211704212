"""Finds what is wrong with a database at head, and mends what can be mended beside readers and writers of rows."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, NamedTuple

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

from gathering_pipeline import catalog, migrations
from gathering_pipeline.catalog import Finding
from gathering_pipeline.errors import (
    WITHDRAWN_REVISIONS,
    DatabaseError,
    DatabaseUnavailableError,
    SchemaRevisionError,
    shorten,
)
from gathering_pipeline.hooks import prepare_graph

LOCK_TIMEOUT, ATTEMPTS = "200ms", 30
_CHECK_VIOLATION = "23514"


class _Check(NamedTuple):
    """A query whose rows are findings: object, message, and the SQL of a repair, or NULL."""

    code: str
    severity: Literal["error", "warning"]
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
        "a repair adds what is missing; they are never lowered, because purged runs are history",
        # Runs of the last minutes don't count: who writes past our functions counts them up a moment later. What one
        # snapshot shows to be missing is added, so nobody has to wait, and what others count up meanwhile stays.
        """
        SELECT 'circle.pipelines id ' || p.id,
               format('run_count, success_count, error_count are %s, %s, %s, but %s, %s, %s of its runs are there'
                      ' from more than 5 minutes ago',
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
        "a repair cancels these nodes, as the end of the run should have done",
        # The guard lets no node of a completed run become cancelled, except under the role of a replica.
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
        "a worker's recover() gives them to others; a repair gives all of them back now",
        """
        SELECT 'circle.pipeline_runs', format('the lease ran out on %s running runs, the longest ago at %s: ids %s%s',
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
        "readers of events get nothing newer before it ends: end it, by pg_terminate_backend(pid) or ROLLBACK PREPARED",
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
        "no run can be created on it; a repair compiles it again",
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
        "plan the change to BIGINT while there is time: it rewrites the table under an exclusive lock",
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
        "they came with a dump from another cluster, and no reader gets them; a repair puts them before all others",
        # Whatever a snapshot shows was written before its xmax.
        """
        SELECT 'circle.pipeline_events', format('%s events up to id %s bear transactions still to come', n, newest),
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
_AS_IT_IS = {"no_parameters": True}  # a percent sign in the SQL is one


def doctor(engine: Engine, *, repair: bool = False, held_for: float = 10.0) -> list[Finding]:
    """Examine a database, and mend what can be mended.

    Args:
        engine: Of the database; as its owner, and with ``pg_monitor`` to see the sessions of others.
        repair: Mend what has a repair, and examine again. Repairs are short transactions that wait at most 200 ms for
            a lock, but builds of indexes wait for all open transactions, and validations read whole tables. Both are
            broken off when somebody waits behind them, and tried again.
        held_for: Age in seconds from which a transaction that holds the event feed back is named.

    Returns:
        What is wrong now, and with ``repair`` what was mended: ``outcome`` tells.

    Raises:
        DatabaseUnavailableError: With ``repair``: a migrator, or another doctor that repairs, is at work.
    """
    with (
        engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection,
        migrations.gently(connection, "lock_timeout", "search_path"),
    ):
        try:
            lock = f"SELECT pg_try_advisory_lock({migrations.MIGRATOR})"
            if repair and not connection.exec_driver_sql(lock).scalar():
                raise DatabaseUnavailableError("a migrator or another doctor is at work here: try again later")
            revision = migrations.current(connection)  # under the lock nobody changes it
            wrong = None if revision == migrations.head() else _revision(connection, revision)
            findings = [wrong] if wrong else _found(connection, held_for, repair=repair)
        finally:
            if not connection.invalidated:
                connection.exec_driver_sql("SELECT pg_advisory_unlock_all()")
    if wrong and repair and wrong.repair:
        migrations.upgrade(engine)
        return [replace(wrong, outcome="repaired"), *doctor(engine, repair=True, held_for=held_for)]
    return findings


def _found(connection: Connection, held_for: float, *, repair: bool) -> list[Finding]:
    """Examine, and mend what can be mended."""
    found = {_key(item): item for item in _examine(connection, held_for)}
    tried: dict[tuple[str, str], Finding] = {}
    progress = repair
    while progress:  # what failed is tried again after others were mended: it may have needed them
        todo = {key: item for key, item in found.items() if item.repair}
        todo = {key: item for key, item in todo.items() if key not in tried or tried[key].outcome}
        done = {key: replace(item, outcome=_mend(connection, item)) for key, item in todo.items()}
        tried |= done
        progress = any(item.outcome is None for item in done.values())
        if done:
            found = {_key(item): item for item in _examine(connection, held_for)}
    # also what failed and is gone all the same: another repair, or somebody else, mended it
    mended = [replace(item, outcome="repaired") for key, item in tried.items() if key not in found]
    left = [
        replace(item, outcome=(tried[key].outcome or "not repaired: it is there again") if key in tried else None)
        for key, item in found.items()
    ]
    return mended + left


def _key(item: Finding) -> tuple[str, str]:
    # a build that fails makes an INVALID index of a missing one: that is one finding
    return "drift" if item.code == "invalid_index" else item.code, item.object


def _revision(connection: Connection, found: str | None) -> Finding:
    head = migrations.head()
    message = f"the schema is at revision {found or 'none'}, this code needs {head}; nothing else was examined"
    if found in migrations.revisions():
        command = "gathering-pipeline db upgrade"
        return Finding("error", "revision", "schema circle", message, f"a repair runs {command}", (command,))
    advice = migrations.lost(connection) or "run gathering-pipeline db upgrade"
    if found in WITHDRAWN_REVISIONS:
        advice = SchemaRevisionError(found, head).advice
    elif found is not None:
        advice = "the database is ahead of this code: install the version of gathering-pipeline that it belongs to"
    return Finding("error", "revision", "schema circle", message, advice)


def _examine(connection: Connection, held_for: float) -> Iterator[Finding]:
    differences = list(catalog.differences(connection))
    drifted = [item for item in differences if item.object.startswith(("table ", "column "))]
    rows: list[Finding] = []
    unexamined: list[str] = []
    examinations = {check.code: _rows(connection, check, held_for) for check in _CHECKS}
    examinations["broken_graph, not_compiled"] = _graphs(connection)
    for codes, examination in examinations.items():
        try:
            rows += examination
        except DBAPIError as error:
            if not drifted or error.connection_invalidated:
                raise
            unexamined.append(codes)
    for item in differences:
        told = f"; rows were not examined for {', '.join(unexamined)}" if unexamined and item in drifted else ""
        yield replace(item, message=item.message + told)
    yield from rows


def _rows(connection: Connection, check: _Check, held_for: float) -> Iterator[Finding]:
    tables = [item.name for item in catalog.reference() if item.kind == "table"]
    sql = check.sql.replace("{held_for}", str(float(held_for))).replace("{tables}", f"{{{','.join(tables)}}}")
    for what, message, repair in connection.exec_driver_sql(sql, execution_options=_AS_IT_IS):
        yield Finding(check.severity, check.code, what, message, check.advice, () if repair is None else (repair,))


def _graphs(connection: Connection) -> Iterator[Finding]:
    last = 0
    while rows := connection.exec_driver_sql(_GRAPHS, (last,)).all():
        last = rows[-1].id
        for row in rows:
            yield from _graph(*row)


def _graph(id: int, status: str, nodes: str, edges: str, compiled: bool) -> Iterator[Finding]:
    what = f"circle.pipelines id {id}"
    try:
        prepare_graph(json.loads(nodes), json.loads(edges), allow_incomplete=status != "active")
    except (ValueError, RecursionError) as error:  # Python reads no number of more than 4300 digits
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else shorten(str(error), 300)
        message = f"its graph is broken, and it can't be run: {reason}"
        yield Finding("warning", "broken_graph", what, message, "mend it in the editor, or delete it")
    else:
        if not compiled:
            message = "its graph was stored past our triggers and never compiled, so it can't be run"
            yield Finding("error", "not_compiled", what, message, "a repair compiles it", (_COMPILE.format(id=id),))


def _mend(connection: Connection, finding: Finding) -> str | None:
    """Run a repair; why it failed, or None."""
    done, attempts = 0, 0
    while done < len(finding.repair):
        sql = finding.repair[done]
        # A concurrent build waits for the transactions of others and blocks nobody.
        builds = " CONCURRENTLY " in sql
        connection.exec_driver_sql(f"SET lock_timeout = '{'0' if builds else LOCK_TIMEOUT}'")
        send = migrations.execute_yielding if builds or " VALIDATE " in sql else migrations.execute
        try:
            send(connection, sql)
            done += 1
            continue
        except migrations.GaveWayError:
            tell, is_final = "others waited behind it each time", False
        except DatabaseError as error:  # no second connection, to see who waits
            tell, is_final = str(error), True
        except DBAPIError as error:
            diagnostic = getattr(error.orig, "diag", None)
            if error.connection_invalidated or diagnostic is None:
                raise
            tell = f"{diagnostic.message_primary} (SQLSTATE {diagnostic.sqlstate})"
            if diagnostic.sqlstate == _CHECK_VIOLATION and (rows := catalog.breaking(finding.repair)):
                tell += f"; mend the rows first: {rows}"
            is_final = diagnostic.sqlstate not in migrations.BUSY
        attempts += 1
        if is_final or attempts == ATTEMPTS:
            failed = f"not repaired: {tell}"
            if done and " DROP CONSTRAINT tmp_" in finding.repair[-1]:  # it would refuse updates of rows that break it
                left = _mend(connection, replace(finding, repair=finding.repair[-1:]))
                failed += f"; {finding.repair[-1]} is still to be run" if left else ""
            return failed
        if builds:
            done = 0  # a build that was broken off leaves its index INVALID: the list begins with dropping it
        time.sleep(random.uniform(0.1, 0.3))  # noqa: S311 - only spreads the retries
    return None
