"""Runs: create, claim, move through their lifecycle, read, delete."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from gathering_pipeline.arguments import (
    check_attempt,
    check_branch,
    check_count,
    check_cursor,
    check_duration,
    check_flag,
    check_id,
    check_ids,
    check_json,
    check_pipeline_id,
    check_priority,
    check_run_at,
    check_run_id,
    check_statuses,
    check_tags,
    check_text,
    check_time,
    check_token,
    check_type,
    encode_json,
)
from gathering_pipeline.connections import Statement
from gathering_pipeline.errors import (
    IntegrityViolationError,
    InvalidCursorError,
    InvalidDataError,
    InvalidPipelineError,
    Issue,
    IssueCode,
    PipelineNotFoundError,
    RunNotFoundError,
    shorten,
)
from gathering_pipeline.explaining import Explanation, Facts, explain
from gathering_pipeline.json_values import MAX_DEPTH, json_path, quote
from gathering_pipeline.lifecycle import RunStatus
from gathering_pipeline.models import (
    ChangedRuns,
    ClaimedRun,
    LogEntry,
    NodeExecutionResult,
    NodeResult,
    NodeRunRead,
    NodeState,
    Page,
    PipelineDefinition,
    PurgeResult,
    RunRead,
    RunReport,
    RunStatistics,
    RunSummary,
    Step,
)
from gathering_pipeline.repositories._call import AsyncRepository, Repository, blocking, iterating

# --- statements; alembic/schema.sql has the functions ----------------------------------------------------------------

CREATE = Statement(
    "SELECT pg_catalog.to_json(circle.create_run(%(pipeline_id)s, %(trigger_data)s::jsonb, %(key)s, "
    "%(priority)s, %(run_at)s::timestamptz, %(unless_live)s, %(tags)s::jsonb))::text"
)
RESUME = Statement("SELECT pg_catalog.to_json(circle.resume_run(%(run_id)s))::text")
RERUN = Statement("SELECT pg_catalog.to_json(circle.rerun_run(%(run_id)s, %(key)s))::text")
CHANGE_MANY = Statement("""
SELECT circle.change_runs(%(resume)s, %(reason)s, %(pipeline)s, %(statuses)s::text[], %(tags)s::jsonb,
                          %(since)s::timestamptz, %(until)s::timestamptz, %(after)s, %(limit)s)::text""")
START = Statement("SELECT pg_catalog.to_json(circle.start_run(%(run_id)s, %(token)s))::text")
CONCLUDE = Statement(
    "SELECT pg_catalog.to_json(circle.conclude_run(%(run_id)s, %(status)s, %(error)s, %(token)s))::text"
)
FINISH = Statement("SELECT pg_catalog.to_json(circle.finish_run(%(run_id)s, %(token)s))::text")
RECORD_RUN = Statement(
    "SELECT pg_catalog.to_json("
    "circle.record_run(%(pipeline_id)s, %(trigger_data)s::jsonb, %(key)s, %(results)s::jsonb))::text"
)
START_NODE = Statement("SELECT circle.start_node(%(run_id)s, %(node_id)s, %(data)s::jsonb, %(token)s)::text")
COMPLETE_NODE = Statement(
    "SELECT circle.complete_node(%(run_id)s, %(node_id)s, %(data)s::jsonb, %(attempt)s, %(token)s, %(branch)s)::text"
)
SKIP_NODE = Statement("SELECT circle.skip_node(%(run_id)s, %(node_id)s, %(token)s)::text")
FAIL_NODE = Statement(
    "SELECT circle.fail_node(%(run_id)s, %(node_id)s, %(error)s, %(retryable)s, %(attempt)s, %(token)s)::text"
)
ADVANCE = Statement("SELECT circle.advance_run(%(run_id)s, %(results)s::jsonb, %(token)s, %(retry)s, %(inputs)s)::text")
ADVANCE_MANY = Statement("""
SELECT pg_catalog.json_build_array(run_id, step)::text
FROM circle.advance_runs(
    %(run_ids)s::bigint[], %(tokens)s::bigint[], %(results)s::jsonb, %(with_inputs)s::bigint[])""")
RECORD = Statement("SELECT circle.record_results(%(run_id)s, %(results)s::jsonb, %(token)s, %(retry)s)")
CLAIM = Statement("""
SELECT pg_catalog.to_json(r)::text
FROM circle.claim_runs(%(worker_id)s, pg_catalog.make_interval(secs => %(lease)s), %(limit)s, %(pipelines)s::bigint[],
                       %(max_claims)s) r
ORDER BY r.priority DESC, r.id""")
HEARTBEAT = Statement(
    "SELECT pg_catalog.to_json("
    "circle.heartbeat_run(%(run_id)s, %(token)s, pg_catalog.make_interval(secs => %(lease)s)))::text"
)
RELEASE = Statement("SELECT pg_catalog.to_json(circle.release_run(%(run_id)s, %(token)s, %(reason)s))::text")
RECOVER = Statement(
    "SELECT pg_catalog.to_json(r)::text FROM circle.recover_runs(%(limit)s, %(max_claims)s) r ORDER BY r.id"
)
EXPIRE = Statement("SELECT pg_catalog.to_json(r)::text FROM circle.expire_runs(%(limit)s) r ORDER BY r.id")
SWEEP = Statement(
    "SELECT pg_catalog.to_json(r)::text FROM circle.sweep_runs(%(limit)s, %(max_claims)s) r ORDER BY r.id"
)
APPEND_LOG = Statement("SELECT circle.append_run_log(%(run_id)s, %(entry)s::jsonb, %(token)s)")
PURGE = Statement(
    """
SELECT pg_catalog.to_json(p)::text
FROM circle.purge_runs(
    pg_catalog.make_interval(secs => %(older_than)s), %(limit)s, %(after)s::timestamptz, %(after_id)s::bigint) p""",
    deletes=True,
)

GET = Statement(
    "SELECT pg_catalog.to_json(r)::text FROM circle.pipeline_runs r WHERE r.id = %(run_id)s::bigint", read_only=True
)
NODES = Statement(
    """
SELECT pg_catalog.to_json(n)::text FROM circle.pipeline_node_runs n WHERE n.run_id = %(run_id)s::bigint
ORDER BY n.position, n.id""",
    read_only=True,
)
READY = Statement(
    """
SELECT pg_catalog.to_json(n)::text FROM circle.pipeline_node_runs n
WHERE n.id = ANY (ARRAY(SELECT s.id FROM circle.startable_node_runs s WHERE s.run_id = %(run_id)s::bigint))
ORDER BY n.position, n.id""",
    read_only=True,
)
DEFINITION = Statement(
    """
SELECT pg_catalog.json_build_array(r.pipeline_version, v.nodes, v.edges)::text FROM circle.pipeline_runs r
LEFT JOIN circle.pipeline_versions v ON v.pipeline_id = r.pipeline_id AND v.version = r.pipeline_version
WHERE r.id = %(run_id)s::bigint""",
    read_only=True,
)
_SUMMARY = ", ".join(f"r.{name}" for name in RunSummary.model_fields)
SEARCH = Statement(
    f"""
SELECT pg_catalog.to_json(s)::text FROM (
    SELECT {_SUMMARY} FROM circle.page_of_runs(%(pipeline)s, %(status)s, %(after)s, %(limit)s) r ORDER BY r.id DESC
) s""",
    read_only=True,
)
SEARCH_FILTERED = Statement(
    f"""
SELECT pg_catalog.json_build_object('next_cursor', f.next_cursor, 'items', ARRAY(
    SELECT pg_catalog.to_json(s) FROM (
        SELECT {_SUMMARY} FROM circle.pipeline_runs r WHERE r.id = ANY (f.ids) ORDER BY r.id DESC) s))::text
FROM circle.filtered_runs(%(pipeline)s, %(statuses)s::text[], %(tags)s::jsonb, %(since)s::timestamptz,
                          %(until)s::timestamptz, %(after)s, %(limit)s) f""",
    read_only=True,
)
LOGS = Statement(
    """
SELECT pg_catalog.to_json(l)::text FROM (
    SELECT c.id, c.entry, NULL::timestamptz AS created_at
    FROM circle.pipeline_runs r CROSS JOIN LATERAL (
        SELECT e.place - 2147483649 AS id, e.entry
        FROM pg_catalog.jsonb_array_elements(
            CASE pg_catalog.jsonb_typeof(r.logs) WHEN 'array' THEN r.logs ELSE pg_catalog.jsonb_build_array(r.logs) END
        ) WITH ORDINALITY e (entry, place)
        WHERE r.logs IS NOT NULL) c
    WHERE r.id = %(run_id)s::bigint AND c.id > %(after)s::bigint
    UNION ALL
    SELECT t.id, t.entry, t.created_at FROM circle.pipeline_run_logs t
    WHERE t.run_id = %(run_id)s::bigint AND t.id > %(after)s::bigint
    ORDER BY id LIMIT %(limit)s::bigint) l""",
    read_only=True,
)
TAGS = Statement(
    """
SELECT coalesce((SELECT pg_catalog.json_object_agg(t.key, t.value ORDER BY t.key)
                 FROM circle.pipeline_run_tags t WHERE t.run_id = r.id), '{}')::text
FROM circle.pipeline_runs r WHERE r.id = %(run_id)s::bigint""",
    read_only=True,
)
OUTPUTS = Statement(
    """
SELECT coalesce((SELECT pg_catalog.json_object_agg(n.node_id, n.output_data ORDER BY n.position)
                 FROM circle.pipeline_node_runs n
                 WHERE n.run_id = r.id AND n.successors = '{}' AND n.status = 'completed'), '{}')::text
FROM circle.pipeline_runs r WHERE r.id = %(run_id)s::bigint""",
    read_only=True,
)
EXPLAIN = Statement("SELECT f::text FROM circle.explain_run(%(run_id)s) f WHERE f IS NOT NULL", read_only=True)
STUCK = Statement(
    f"""
SELECT pg_catalog.to_json(s)::text FROM (
    SELECT {_SUMMARY} FROM circle.stuck_runs(pg_catalog.make_interval(secs => %(older_than)s), %(limit)s) f (ids)
    CROSS JOIN LATERAL (SELECT * FROM circle.pipeline_runs t WHERE t.id = ANY (f.ids) OFFSET 0) r ORDER BY r.id
) s""",
    read_only=True,
)
RUNS_BY_STATUS = """pg_catalog.json_build_object(
    'pending', coalesce(sum(c.pending), 0), 'running', coalesce(sum(c.running), 0),
    'completed', coalesce(sum(c.completed), 0), 'failed', coalesce(sum(c.failed), 0),
    'cancelled', coalesce(sum(c.cancelled), 0), 'timeout', coalesce(sum(c.timeout), 0))"""
COUNTERS = "circle.pipeline_counters c WHERE EXISTS (SELECT FROM circle.pipelines p WHERE p.id = c.pipeline_id)"
COUNTS = Statement(f"SELECT {RUNS_BY_STATUS}::text FROM {COUNTERS}", read_only=True)
STATISTICS = Statement(
    """
SELECT circle.run_statistics(%(pipeline)s, clock_timestamp() - pg_catalog.make_interval(secs => %(window)s),
                             %(limit)s)::text""",
    read_only=True,
)


_BEFORE_LOGS = -(2**62)
_PURGED = re.compile(r"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]{8,15}[+-][0-9:]{2,8})/([0-9]{1,18})")
"""The cursor of a purge: the end of a run, and its id."""


# --- the repository --------------------------------------------------------------------------------------------------


class AsyncRunRepository(AsyncRepository):
    """Runs and their node runs. Every transition is one statement and one round trip.

    Works in the caller's session and never commits. A refused call raises a ``PipelineError`` and changes nothing. As
    after any database error, the transaction must then be rolled back; with ``Database.session(autocommit=True)`` every
    call is a transaction of its own, and the next call works.

    On a claimed run every call of its worker needs the ``token`` of the claim (``ClaimedRun.token``): without it, or
    with the token of an earlier claim, the call raises ``LeaseLostError``.
    """

    # --- runs ---

    async def create(
        self,
        pipeline_id: int,
        trigger_data: Any = None,
        *,
        idempotency_key: str | None = None,
        priority: int = 0,
        run_at: datetime | None = None,
        tags: Mapping[str, str] | None = None,
        unless_live: bool = False,
    ) -> RunRead:
        """Create a ``pending`` run of an active pipeline, with a pending node run for each node of its graph.

        Args:
            pipeline_id: The pipeline.
            trigger_data: JSON input of the run; ``None`` stores ``{}``.
            idempotency_key: At most 255 characters. A second call with the same key and data returns the run of the
                first.
            priority: Runs with a higher one are claimed first; at most 32,767, at least -32,767.
            run_at: No worker claims the run before this time, which needs an offset from UTC and is from 1970 on.
            tags: Texts to find the run by: keys of at most 100 characters, values of at most 255.
            unless_live: If the pipeline has a pending or running run, return the last of these instead. Callers that
                create runs of the same pipeline wait until the transaction ends.

        Raises:
            PipelineNotFoundError: The pipeline doesn't exist.
            PipelineInactiveError: It is not ``active``.
            InvalidPipelineError: Its stored graph is broken or empty.
            IdempotencyConflictError: A run of the pipeline has the key, and other data.
            InvalidDataError: The data, the key or a tag can't be stored.
        """
        return await self._create(
            CREATE,
            pipeline_id,
            trigger_data,
            idempotency_key,
            priority=check_priority(priority),
            run_at=None if run_at is None else check_run_at(run_at),
            unless_live=check_flag(unless_live, "unless_live"),
            tags=None if tags is None else json.dumps(check_tags(tags)),
        )

    async def start(self, run_id: int, *, token: int | None = None) -> RunRead:
        """Start a pending run.

        Raises:
            RunNotFoundError: The run doesn't exist.
            IllegalTransitionError: It is not pending.
            LeaseLostError: The token is not the run's.
        """
        return await self._run(START, run_id, token)

    async def complete(self, run_id: int, *, token: int | None = None) -> RunRead:
        """Complete a running run whose nodes are all terminal and none of them failed.

        Raises:
            RunNotFoundError: The run doesn't exist.
            IllegalTransitionError: It is not running, or has live or failed nodes.
            LeaseLostError: The token is not the run's.
        """
        return await self._run(CONCLUDE, run_id, token, status="completed", error=None)

    async def finish(self, run_id: int, *, token: int | None = None) -> RunRead:
        """End a running run by its nodes.

        It is ``failed`` with the error of the first node that failed, else ``cancelled`` if one was cancelled, else
        ``completed``.

        Raises:
            RunNotFoundError: The run doesn't exist.
            IllegalTransitionError: It is not running, or a node is running, ready or waiting for a retry.
            LeaseLostError: The token is not the run's.
        """
        return await self._run(FINISH, run_id, token)

    async def fail(self, run_id: int, error: str, *, token: int | None = None) -> RunRead:
        """Fail a pending or running run and cancel its live nodes.

        Raises:
            RunNotFoundError: The run doesn't exist.
            IllegalTransitionError: It is terminal.
            LeaseLostError: The token is not the run's.
        """
        return await self._run(CONCLUDE, run_id, token, status="failed", error=check_text(error, "error"))

    async def cancel(self, run_id: int, reason: str | None = None) -> RunRead:
        """Cancel a pending or running run, whether or not a worker holds it, and cancel its live nodes.

        Raises:
            RunNotFoundError: The run doesn't exist.
            IllegalTransitionError: It is terminal.
        """
        text = None if reason is None else check_text(reason, "reason")
        return await self._run(CONCLUDE, run_id, None, status="cancelled", error=text)

    async def resume(self, run_id: int) -> RunRead:
        """Go on with a failed, cancelled or timed-out run, in a new run of the same graph.

        The new run is pending. It takes over each node that completed or was skipped and whose ancestors did, too;
        the others begin anew. Trigger data, priority and tags are the same. A second call returns the run of the first
        while that one is live or completed, and else resumes that one.

        Raises:
            RunNotFoundError: The run doesn't exist.
            IllegalTransitionError: It is live or completed.
            PipelineInactiveError: Its pipeline is not ``active``.
            InvalidPipelineError: It is bound to no version of its pipeline's graph.
        """
        return (await self._read(RunRead, RESUME, run_id=check_run_id(run_id)))[0]

    async def rerun(self, run_id: int, *, idempotency_key: str | None = None) -> RunRead:
        """Create a run with the trigger data, priority and tags of another one, of the current graph.

        Args:
            run_id: The other run, in any status.
            idempotency_key: As in ``create``.

        Raises:
            RunNotFoundError: The run doesn't exist.
            PipelineInactiveError: Its pipeline is not ``active``.
            InvalidPipelineError: The pipeline's stored graph is broken or empty.
            IdempotencyConflictError: A run of the pipeline has the key, and other data.
        """
        key = None if idempotency_key is None else check_text(idempotency_key, "idempotency_key", 255)
        return (await self._read(RunRead, RERUN, run_id=check_run_id(run_id), key=key))[0]

    async def resume_all(
        self,
        pipeline_id: int | None = None,
        status: RunStatus | Collection[RunStatus] = (RunStatus.FAILED, RunStatus.TIMEOUT),
        after: int | None = None,
        limit: int = 60,
        *,
        tags: Mapping[str, str] | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
    ) -> ChangedRuns:
        """Resume the runs that ``search`` finds, newest first; commit, and repeat while there is a cursor.

        A call resumes at most 60 runs. One that can't be resumed stops no other.

        Args:
            pipeline_id: Only runs of this pipeline.
            status: Only runs with this status, or one of these.
            after: ``next_cursor`` of the call before.
            limit: Most runs to resume.
            tags: Only runs that have all of these.
            created_after: Only runs that were created at this time or later.
            created_before: Only runs that were created earlier.
        """
        filters = _encode_filters(pipeline_id, status, tags, created_after, created_before)
        return await self._change(filters, after, limit, resume=True, reason=None)

    async def cancel_all(
        self,
        pipeline_id: int | None = None,
        status: RunStatus | Collection[RunStatus] = (RunStatus.PENDING, RunStatus.RUNNING),
        after: int | None = None,
        limit: int = 60,
        *,
        reason: str | None = None,
        tags: Mapping[str, str] | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
    ) -> ChangedRuns:
        """Cancel the runs that ``search`` finds, newest first; commit, and repeat while there is a cursor.

        A call cancels at most 60 runs. One that ended meanwhile stops no other.

        Args:
            pipeline_id: Only runs of this pipeline.
            status: Only runs with this status, or one of these.
            after: ``next_cursor`` of the call before.
            limit: Most runs to cancel.
            reason: As in ``cancel``.
            tags: Only runs that have all of these.
            created_after: Only runs that were created at this time or later.
            created_before: Only runs that were created earlier.
        """
        filters = _encode_filters(pipeline_id, status, tags, created_after, created_before)
        text = None if reason is None else check_text(reason, "reason")
        return await self._change(filters, after, limit, resume=False, reason=text)

    async def append_log(self, run_id: int, entry: Any, *, token: int | None = None) -> None:
        """Append one JSON entry to the log of a run in any status; ``logs`` reads them.

        Raises:
            RunNotFoundError: The run doesn't exist.
            InvalidDataError: The entry can't be stored.
            LeaseLostError: The token is not the run's.
        """
        text = encode_json(entry, "entry", MAX_DEPTH - 1) or "null"  # the list of entries is one level
        await self._rows(APPEND_LOG, run_id=check_run_id(run_id), entry=text, token=check_token(token))

    # --- nodes ---

    async def start_node(
        self, run_id: int, node_id: str, input_data: Any = None, *, token: int | None = None
    ) -> NodeState:
        """Start a ready node of a running run. With the token that started it, a second call changes nothing.

        Raises:
            RunNotFoundError: The run doesn't exist.
            NodeRunNotFoundError: The run has no such node.
            NodeNotReadyError: It waits for predecessors (``waiting_for``) or a retry delay, or another node failed.
            IllegalTransitionError: The node is not pending, or the run is not running.
            LeaseLostError: The token is not the run's.
            InvalidDataError: The input can't be stored.
        """
        return await self._node(START_NODE, run_id, node_id, token, data=encode_json(input_data, "input_data"))

    async def complete_node(
        self,
        run_id: int,
        node_id: str,
        output: Any = None,
        *,
        attempt: int | None = None,
        branch: bool | str | None = None,
        token: int | None = None,
    ) -> NodeState:
        """Complete a running node, or a pending node whose executor reports afterwards.

        With a branch every node is skipped to which no edge is alive then. On a claimed run a call that repeats one
        that succeeded, with an equal output and branch or none, changes nothing.

        Args:
            run_id: The run.
            node_id: The node.
            output: JSON; ``None`` keeps what is stored.
            attempt: The attempt that the report is about; ``None``: the current one.
            branch: The outcome: the label of the edges that the node takes, ``True`` for "true"; see
                ``untaken_successors``. ``None``: it takes all edges.
            token: The token of the claim.

        Raises:
            RunNotFoundError: The run doesn't exist.
            NodeRunNotFoundError: The run has no such node.
            IllegalTransitionError: The node is terminal, or the run is not running.
            LeaseLostError: The token is not the run's.
            InvalidDataError: The output can't be stored, or no edge of the node has this label.
        """
        return await self._node(
            COMPLETE_NODE,
            run_id,
            node_id,
            token,
            data=encode_json(output, "output"),
            attempt=check_attempt(attempt),
            branch=check_branch(branch),
        )

    async def skip_node(self, run_id: int, node_id: str, *, token: int | None = None) -> NodeState:
        """Skip a pending node, and every node to which no edge is alive then; a second call changes nothing.

        Raises:
            RunNotFoundError: The run doesn't exist.
            NodeRunNotFoundError: The run has no such node.
            IllegalTransitionError: The node is not pending, or the run is not running.
            LeaseLostError: The token is not the run's.
        """
        return await self._node(SKIP_NODE, run_id, node_id, token)

    async def fail_node(
        self,
        run_id: int,
        node_id: str,
        error: str,
        retryable: bool = True,
        *,
        attempt: int | None = None,
        token: int | None = None,
    ) -> NodeState:
        """Report a failed attempt: the returned status is ``pending`` if a retry is left, else ``failed``.

        A retry is due at ``available_at``: after ``min(retry_backoff_base * 2^n, retry_backoff_max)`` seconds, where
        ``n`` is the number of earlier retries. A node that was never started has no attempt to retry, and fails.
        On a claimed run a call that repeats one that succeeded changes nothing.

        Args:
            run_id: The run.
            node_id: The node.
            error: Why the attempt failed.
            retryable: Whether it may be retried.
            attempt: The attempt that the report is about; ``None``: the current one.
            token: The token of the claim.

        Raises:
            RunNotFoundError: The run doesn't exist.
            NodeRunNotFoundError: The run has no such node.
            IllegalTransitionError: The node is terminal, or the run is not running.
            LeaseLostError: The token is not the run's.
        """
        text = check_text(error, "error")
        return await self._node(
            FAIL_NODE,
            run_id,
            node_id,
            token,
            error=text,
            retryable=check_flag(retryable, "retryable"),
            attempt=check_attempt(attempt),
        )

    async def advance(
        self,
        run_id: int,
        results: Iterable[NodeExecutionResult | Mapping[str, Any]] = (),
        *,
        retry: bool = False,
        inputs: bool = False,
        token: int | None = None,
    ) -> Step:
        """Record results, start the nodes that became ready, and end the run when nothing is left, in one call.

        A pending run without a claim is started first. Without results every ready node is started, due retries
        included; so a run begins with ``advance(run_id)`` and goes on with the results of the nodes that were started.

        On a claimed run a result may repeat one that was recorded: it changes nothing. The call then starts every ready
        node, and ``started`` has those that are running already, too, because the first answer may have been lost.
        Ignore what you are executing, by ``(node_id, attempt)``.

        Args:
            run_id: The run.
            results: ``NodeResult``, ``NodeExecutionResult`` or mappings with their fields.
            retry: Whether failed attempts are retried while retries are left; ``retryable`` of a result goes before.
            inputs: Whether ``started`` has the outputs of each node's completed predecessors that take it.
            token: The token of the claim.

        Raises:
            RunNotFoundError: The run doesn't exist.
            NodeRunNotFoundError: The run has no such node.
            RunOverError: The run is terminal, and the results repeat none that ended it.
            IllegalTransitionError: A result is not legal. No result was recorded.
            LeaseLostError: The token is not the run's.
            InvalidDataError: An output can't be stored, or a branch is none of its node.
        """
        return await self._advance(encode_report(run_id, results, token, retry=retry, inputs=inputs))

    async def advance_many(self, reports: Iterable[RunReport]) -> list[Step | None]:
        """Do as ``advance`` for many runs, in one call and one commit.

        A report is carried out if it completes nodes, without a branch, or begins the run, no node of the run failed,
        and nobody else has locked the run. Else it changes nothing and its step is ``None``: call ``advance`` for it,
        which also tells why it is refused. ``Database.group_commit`` does so for concurrent callers.

        Args:
            reports: At most one for each run.

        Returns:
            A step for each report, in their order.

        Raises:
            InvalidDataError: A report can't be stored, or two are about one run.
            TransactionConflictError: A raw writer held a node for long, or changed one meanwhile; nothing was changed.
        """
        encoded = []
        check_type(reports, Iterable, "reports", "[RunReport(run_id, results, token)] is a list of one")
        for place, report in enumerate(reports):
            check_type(report, RunReport, f"reports[{place}]", "RunReport(run_id, results, token) makes one")
            try:
                encoded.append(encode_report(report.run_id, report.results, report.token, inputs=report.inputs))
            except InvalidDataError as error:
                raise InvalidDataError(f"reports[{place}].{error}") from None
        if len({report.run_id for report in encoded}) < len(encoded):
            raise InvalidDataError("reports must be about different runs")
        return await self._advance_many(encoded)

    async def record(
        self,
        run_id: int,
        results: Iterable[NodeExecutionResult | Mapping[str, Any]],
        *,
        retry: bool = False,
        token: int | None = None,
    ) -> None:
        """Record any number of results, all or none, for executors that report afterwards.

        A pending run without a claim is started first. No other node is started, and the run is not ended: ``finish``
        ends it. On a claimed run a result may repeat one that was recorded: it changes nothing.

        Args:
            run_id: The run.
            results: ``NodeResult``, ``NodeExecutionResult`` or mappings with their fields.
            retry: Whether failed attempts are retried while retries are left; ``retryable`` of a result goes before.
            token: The token of the claim.

        Raises:
            RunNotFoundError: The run doesn't exist.
            NodeRunNotFoundError: The run has no such node.
            RunOverError: The run is terminal.
            IllegalTransitionError: A result is not legal. No result was recorded.
            LeaseLostError: The token is not the run's.
            InvalidDataError: An output can't be stored, or a branch is none of its node.
        """
        await self._rows(
            RECORD,
            run_id=check_run_id(run_id),
            results=_as_list(_encode_results(results)),
            token=check_token(token),
            retry=check_flag(retry, "retry"),
        )

    async def record_run(
        self,
        pipeline_id: int,
        results: Iterable[NodeExecutionResult | Mapping[str, Any]],
        trigger_data: Any = None,
        *,
        idempotency_key: str | None = None,
    ) -> RunRead:
        """Create a run, record the results of its nodes and end it, in one call: for executors that report afterwards.

        The run ends as ``finish`` would end it: nodes without a result are cancelled if a node failed, and refused if
        they could have started.

        Args:
            pipeline_id: The pipeline.
            results: ``NodeResult``, ``NodeExecutionResult`` or mappings with their fields.
            trigger_data: JSON input of the run; ``None`` stores ``{}``.
            idempotency_key: At most 255 characters. A second call with this pipeline, key and data returns the run of
                the first, whatever its results are; a run that ``create`` made with it is refused.

        Raises:
            PipelineNotFoundError: The pipeline doesn't exist.
            PipelineInactiveError: It is not ``active``.
            InvalidPipelineError: Its stored graph is broken or empty.
            NodeRunNotFoundError: The graph has no such node.
            IllegalTransitionError: A node has two results, or one that could have started has none. Nothing is stored.
            IdempotencyConflictError: A run of the pipeline has the key, and other data.
            InvalidDataError: The data, the key or an output can't be stored, or a branch is none of its node.
        """
        encoded = _as_list(_encode_results(results))
        return await self._create(RECORD_RUN, pipeline_id, trigger_data, idempotency_key, results=encoded)

    # --- leases and sweeps ---

    async def claim(
        self,
        worker_id: str,
        lease: timedelta,
        limit: int = 1,
        pipelines: Collection[int] | None = None,
        *,
        max_claims: int = 10,
    ) -> list[ClaimedRun]:
        """Claim pending runs of active pipelines for a worker: they become running, and no other worker gets them.

        A run that waits for ``run_at`` or for a retry isn't claimed before, and one without a version of its
        pipeline's graph never. In autocommit the call sweeps first, see ``sweep``.

        Args:
            worker_id: Name of the worker, at most 255 characters.
            lease: How long the claim lasts without ``heartbeat``; then ``recover`` may give the run to another worker.
            limit: Most runs to claim.
            pipelines: Only runs of these pipelines.
            max_claims: For the sweep: a run whose lease ran out so often fails.

        Returns:
            The claimed runs, highest priority first, then oldest first; the worker's calls on a run need its ``token``.
        """
        return await self._read(
            ClaimedRun,
            CLAIM,
            worker_id=check_text(worker_id, "worker_id", 255),
            lease=check_duration(lease, "lease"),
            limit=check_count(limit, "limit"),
            pipelines=None if pipelines is None else _as_array(check_ids(pipelines, "pipelines")),
            max_claims=check_count(max_claims, "max_claims") if self._transport.autocommit else None,
        )

    async def heartbeat(self, run_id: int, lease: timedelta, *, token: int) -> datetime:
        """Extend the lease of a claimed run.

        Returns:
            When the lease now ends, by the database's clock.

        Raises:
            RunNotFoundError: The run doesn't exist.
            LeaseLostError: The caller doesn't hold the run any more; ``.status`` says whether it was cancelled.
        """
        seconds = check_duration(lease, "lease")
        rows = await self._values(HEARTBEAT, run_id=check_run_id(run_id), token=check_token(token), lease=seconds)
        return datetime.fromisoformat(rows[0])

    async def release(self, run_id: int, *, token: int, reason: str | None = None) -> RunRead:
        """Release a claimed run: the run and its running nodes become pending again, and no attempt is counted.

        If its nodes wait for retries, the run isn't claimed before the first is due. A second call with the same token
        changes nothing.

        Args:
            run_id: The run.
            token: The token of the claim.
            reason: Why; ``explain`` tells it.

        Raises:
            RunNotFoundError: The run doesn't exist.
            LeaseLostError: The caller doesn't hold the run any more.
        """
        text = None if reason is None else check_text(reason, "reason")
        return await self._run(RELEASE, run_id, token, reason=text)

    async def recover(self, limit: int = 60, max_claims: int = 10) -> list[RunRead]:
        """Release runs whose lease expired: their running nodes count as failed attempts.

        A run whose lease ran out ``max_claims`` times fails instead. Runs without a lease are never recovered. A
        call handles at most 60 runs.
        """
        most, claims = check_count(limit, "limit"), check_count(max_claims, "max_claims")
        return await self._read(RunRead, RECOVER, limit=most, max_claims=claims)

    async def expire(self, limit: int = 60) -> list[RunRead]:
        """End running runs that are past the ``timeout_seconds`` of their pipeline with status ``timeout``.

        A call handles at most 60 runs.
        """
        return await self._read(RunRead, EXPIRE, limit=check_count(limit, "limit"))

    async def sweep(self, limit: int = 30, max_claims: int = 10) -> list[RunRead]:
        """Do as ``recover`` and ``expire``, for all workers of the database in turns.

        The call does nothing while another caller sweeps, and within a second of the last sweep, or 20 times what that
        one took, unless it left runs. ``claim`` calls it where it is a transaction of its own, so a database with
        workers needs no other sweep.

        Args:
            limit: Most runs to recover, and most to expire; at most 30.
            max_claims: A run whose lease ran out so often fails.

        Returns:
            The runs that were released or ended.
        """
        most, claims = check_count(limit, "limit"), check_count(max_claims, "max_claims")
        return await self._read(RunRead, SWEEP, limit=most, max_claims=claims)

    async def purge(self, older_than: timedelta, limit: int = 1000, after: str | None = None) -> PurgeResult:
        """Delete runs that ended over ``older_than`` ago, oldest first; commit, and repeat while there is a cursor.

        Runs that a table of yours refers to, by a foreign key that doesn't cascade, stay and are returned as
        ``kept``. A call ends after ten of them.

        Args:
            older_than: Age since the end.
            limit: Most runs to delete.
            after: ``next_cursor`` of the call before; ``None`` begins with the oldest run.

        Raises:
            InvalidCursorError: ``after`` is not such a cursor.
        """
        end, last_id = (None, None) if after is None else _parse_purged(after)
        age, most = check_duration(older_than, "older_than", allow_zero=True), check_count(limit, "limit")
        (found,) = await self._values(PURGE, older_than=age, limit=most, after=end, after_id=last_id)
        following = None if found["next_id"] is None else f"{found['next_end']}/{found['next_id']}"
        return PurgeResult(deleted=found["deleted"], kept=found["kept"], next_cursor=following)

    # --- reads ---

    async def get(self, run_id: int) -> RunRead:
        """Read a run.

        Raises:
            RunNotFoundError: The run doesn't exist.
        """
        runs = await self._read(RunRead, GET, run_id=check_run_id(run_id))
        if not runs:
            raise RunNotFoundError(run_id)
        return runs[0]

    async def search(
        self,
        pipeline_id: int | None = None,
        status: RunStatus | Collection[RunStatus] | None = None,
        after: int | None = None,
        limit: int = 50,
        *,
        tags: Mapping[str, str] | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
    ) -> Page[RunSummary]:
        """Read a page of the run history, newest first.

        With tags, times or several statuses a page is looked for among 10,000 runs: it may hold fewer than ``limit``,
        even none, while ``next_cursor`` is set. No page follows 10,000 runs that were all created before
        ``created_after``. ``iterate`` reads one page after the other.

        Args:
            pipeline_id: Only runs of this pipeline.
            status: Only runs with this status, or one of these.
            after: ``next_cursor`` of the page before.
            limit: Most runs of a page.
            tags: Only runs that have all of these.
            created_after: Only runs that were created at this time or later.
            created_before: Only runs that were created earlier.
        """
        filters = _encode_filters(pipeline_id, status, tags, created_after, created_before)
        if not tags and filters["since"] is filters["until"] is None and (status is None or isinstance(status, str)):
            one = None if status is None else RunStatus(status).value
            return await self._page(RunSummary, SEARCH, after, limit, pipeline=filters["pipeline"], status=one)
        start, size = check_cursor(after), check_count(limit, "limit")
        (page,) = await self._read(Page[RunSummary], SEARCH_FILTERED, after=start, limit=size, **filters)
        return page

    async def iterate(
        self,
        pipeline_id: int | None = None,
        status: RunStatus | Collection[RunStatus] | None = None,
        *,
        tags: Mapping[str, str] | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        batch: int = 500,
    ) -> AsyncIterator[RunSummary]:
        """Read all runs that ``search`` finds, newest first; ``batch`` is the size of its pages."""
        after = None
        while True:
            page = await self.search(
                pipeline_id,
                status,
                after,
                batch,
                tags=tags,
                created_after=created_after,
                created_before=created_before,
            )
            for run in page.items:
                yield run
            if (after := page.next_cursor) is None:
                return

    async def logs(self, run_id: int, after: int | None = None, limit: int = 100) -> list[LogEntry]:
        """Read the log of a run, oldest entry first: those of the column ``logs``, then those of ``append_log``.

        Args:
            run_id: The run.
            after: The ``id`` of the last entry that was read.
            limit: Most entries.

        Raises:
            RunNotFoundError: The run doesn't exist.
        """
        start = _BEFORE_LOGS if after is None else check_id(after, "after")
        size = check_count(limit, "limit")
        entries = await self._read(LogEntry, LOGS, run_id=check_run_id(run_id), after=start, limit=size)
        if not entries:
            await self.get(run_id)  # raises if the run doesn't exist
        return entries

    async def tags(self, run_id: int) -> dict[str, str]:
        """Read the tags that a run was created with.

        Raises:
            RunNotFoundError: The run doesn't exist.
        """
        return await self._of_run(TAGS, run_id)

    async def outputs(self, run_id: int) -> dict[str, Any]:
        """Read the result of a run: the outputs of its completed nodes without successors, by node id.

        Raises:
            RunNotFoundError: The run doesn't exist.
        """
        return await self._of_run(OUTPUTS, run_id)

    async def nodes(self, run_id: int) -> list[NodeRunRead]:
        """Read a run's nodes in execution order.

        Raises:
            RunNotFoundError: The run doesn't exist.
        """
        return await self._nodes(NODES, run_id)

    async def ready_nodes(self, run_id: int) -> list[NodeRunRead]:
        """Read the nodes of a running run that may start now, in execution order.

        Raises:
            RunNotFoundError: The run doesn't exist.
        """
        return await self._nodes(READY, run_id)

    async def definition(self, run_id: int) -> PipelineDefinition:
        """Read the graph that a run is bound to, as it was when the run was created.

        Raises:
            RunNotFoundError: The run doesn't exist.
            InvalidPipelineError: The run is bound to no graph: it is older than versions, or its graph was broken.
        """
        rows = await self._values(DEFINITION, run_id=check_run_id(run_id))
        if not rows:
            raise RunNotFoundError(run_id)
        version, nodes, edges = rows[0]
        if version is None:
            message = f"run {run_id} is bound to no version of its pipeline's graph: cancel it and create it again"
            raise InvalidPipelineError([Issue("error", IssueCode.NO_VERSION, message)])
        return PipelineDefinition.from_json(nodes, edges)

    async def explain(self, run_id: int, *, max_claims: int = 10) -> Explanation:
        """Say why a run is stuck, or how it ended: what it or its nodes wait for, since when, and what to do.

        Args:
            run_id: The run.
            max_claims: As the workers give it to ``claim``; a run that comes close to it is reported.

        Raises:
            RunNotFoundError: The run doesn't exist.
        """
        most = check_count(max_claims, "max_claims")
        found = await self._read(Facts, EXPLAIN, run_id=check_run_id(run_id))
        if not found:
            raise RunNotFoundError(run_id)
        return explain(found[0], most)

    async def stuck(self, older_than: timedelta, limit: int = 50) -> list[RunSummary]:
        """Read live runs that have made no progress for ``older_than``, and that nothing holds on purpose.

        They are past their lease or their timeout; or they are running, and no worker executes a node of them; or they
        could have been claimed, or never can, because they have no version of a graph. What waits for a paused or full
        pipeline, for ``run_at`` or for a retry is not stuck. ``explain`` says more about each.

        The call looks at the 10,000 oldest running and pending runs, at the first ``limit`` in the queue of each active
        pipeline, and at the 10,000 longest past their waiting time: a long history makes it no slower.

        Args:
            older_than: Age of the last change of a status, claim, release, end of a lease or of a timeout.
            limit: Most runs; which of the claimable ones they are is left open where there are more.

        Returns:
            The runs, oldest first.
        """
        age, most = check_duration(older_than, "older_than", allow_zero=True), check_count(limit, "limit")
        return await self._read(RunSummary, STUCK, older_than=age, limit=most)

    async def counts(self) -> dict[RunStatus, int]:
        """Count runs by status, from counters that every change of a status keeps; a status without runs is 0."""
        counted = (await self._values(COUNTS))[0]
        return {status: counted[status] for status in RunStatus}

    async def statistics(
        self, pipeline_id: int, window: timedelta = timedelta(days=30), limit: int = 10_000
    ) -> RunStatistics:
        """Read how many of a pipeline's latest runs have each status, and how long they took.

        Args:
            pipeline_id: The pipeline.
            window: Only runs that were created within this time.
            limit: Only the last runs, at most this number: the call takes the same time, however long the history is.
        """
        (found,) = await self._values(
            STATISTICS,
            pipeline=check_id(pipeline_id, "pipeline_id"),
            window=check_duration(window, "window"),
            limit=check_count(limit, "limit"),
        )
        counts = dict.fromkeys(RunStatus, 0) | {RunStatus(status): number for status, number in found["runs"].items()}
        ended = counts[RunStatus.COMPLETED] + counts[RunStatus.FAILED] + counts[RunStatus.TIMEOUT]
        p50, p95 = (None if found[key] is None else timedelta(seconds=found[key]) for key in ("p50", "p95"))
        return RunStatistics(
            runs=counts,
            success_rate=counts[RunStatus.COMPLETED] / ended if ended else None,
            duration_p50=p50,
            duration_p95=p95,
        )

    # --- statements on one run, and on many ---

    async def _advance(self, report: EncodedReport) -> Step:
        parameters = report._asdict() | {"results": _as_list(report.results)}
        return (await self._read(Step, ADVANCE, **parameters))[0]

    async def _advance_many(self, reports: Sequence[EncodedReport]) -> list[Step | None]:
        rows = await self._values(
            ADVANCE_MANY,
            run_ids=_as_array(report.run_id for report in reports),
            tokens=_as_array(report.token for report in reports),
            results=_as_list(
                f'{{"run_id":{report.run_id},{result[1:]}' for report in reports for result in report.results
            ),
            with_inputs=_as_array(report.run_id for report in reports if report.inputs),
        )
        steps = {run_id: step and Step.model_validate(step) for run_id, step in rows}
        return [steps[report.run_id] for report in reports]

    async def _change(
        self, filters: dict[str, Any], after: int | None, limit: int, *, resume: bool, reason: str | None
    ) -> ChangedRuns:
        start, size = check_cursor(after), check_count(limit, "limit")
        parameters = filters | {"resume": resume, "reason": reason, "after": start, "limit": size}
        return (await self._read(ChangedRuns, CHANGE_MANY, **parameters))[0]

    async def _create(
        self, statement: Statement, pipeline_id: int, trigger_data: Any, idempotency_key: str | None, **parameters: Any
    ) -> RunRead:
        parameters |= {
            "pipeline_id": check_pipeline_id(pipeline_id),
            "trigger_data": encode_json({} if trigger_data is None else trigger_data, "trigger_data"),
            "key": None if idempotency_key is None else check_text(idempotency_key, "idempotency_key", 255),
        }
        try:
            return (await self._read(RunRead, statement, **parameters))[0]
        except IntegrityViolationError as error:
            if error.constraint == "pipeline_runs_pipeline_id_fkey":  # deleted concurrently
                raise PipelineNotFoundError(pipeline_id) from error
            raise

    async def _run(self, statement: Statement, run_id: int, token: int | None, **parameters: Any) -> RunRead:
        parameters |= {"run_id": check_run_id(run_id), "token": check_token(token)}
        return (await self._read(RunRead, statement, **parameters))[0]

    async def _node(
        self, statement: Statement, run_id: int, node_id: str, token: int | None, **parameters: Any
    ) -> NodeState:
        parameters |= {
            "run_id": check_run_id(run_id),
            "node_id": check_text(node_id, "node_id"),
            "token": check_token(token),
        }
        return (await self._read(NodeState, statement, **parameters))[0]

    async def _of_run(self, statement: Statement, run_id: int) -> dict[str, Any]:
        rows: list[dict[str, Any]] = await self._values(statement, run_id=check_run_id(run_id))
        if not rows:
            raise RunNotFoundError(run_id)
        return rows[0]

    async def _nodes(self, statement: Statement, run_id: int) -> list[NodeRunRead]:
        nodes = await self._read(NodeRunRead, statement, run_id=check_run_id(run_id))
        if not nodes:
            await self.get(run_id)  # raises if the run doesn't exist
        return nodes


class RunRepository(Repository):
    """The sync twin of ``AsyncRunRepository``, for a ``Session``."""

    _source = AsyncRunRepository

    create = blocking(AsyncRunRepository.create)
    start = blocking(AsyncRunRepository.start)
    complete = blocking(AsyncRunRepository.complete)
    finish = blocking(AsyncRunRepository.finish)
    fail = blocking(AsyncRunRepository.fail)
    cancel = blocking(AsyncRunRepository.cancel)
    resume = blocking(AsyncRunRepository.resume)
    rerun = blocking(AsyncRunRepository.rerun)
    resume_all = blocking(AsyncRunRepository.resume_all)
    cancel_all = blocking(AsyncRunRepository.cancel_all)
    append_log = blocking(AsyncRunRepository.append_log)
    start_node = blocking(AsyncRunRepository.start_node)
    complete_node = blocking(AsyncRunRepository.complete_node)
    skip_node = blocking(AsyncRunRepository.skip_node)
    fail_node = blocking(AsyncRunRepository.fail_node)
    advance = blocking(AsyncRunRepository.advance)
    advance_many = blocking(AsyncRunRepository.advance_many)
    record = blocking(AsyncRunRepository.record)
    record_run = blocking(AsyncRunRepository.record_run)
    claim = blocking(AsyncRunRepository.claim)
    heartbeat = blocking(AsyncRunRepository.heartbeat)
    release = blocking(AsyncRunRepository.release)
    recover = blocking(AsyncRunRepository.recover)
    expire = blocking(AsyncRunRepository.expire)
    sweep = blocking(AsyncRunRepository.sweep)
    purge = blocking(AsyncRunRepository.purge)
    get = blocking(AsyncRunRepository.get)
    search = blocking(AsyncRunRepository.search)
    iterate = iterating(AsyncRunRepository.iterate)
    logs = blocking(AsyncRunRepository.logs)
    tags = blocking(AsyncRunRepository.tags)
    outputs = blocking(AsyncRunRepository.outputs)
    nodes = blocking(AsyncRunRepository.nodes)
    ready_nodes = blocking(AsyncRunRepository.ready_nodes)
    definition = blocking(AsyncRunRepository.definition)
    explain = blocking(AsyncRunRepository.explain)
    stuck = blocking(AsyncRunRepository.stuck)
    counts = blocking(AsyncRunRepository.counts)
    statistics = blocking(AsyncRunRepository.statistics)


def _as_node_result(value: object) -> object:
    """The fields of a model, to be checked again: it may have been changed, or made without a check."""
    if isinstance(value, NodeExecutionResult):
        return {name: getattr(value, name) for name in value.model_fields_set & NodeResult.model_fields.keys()}
    return value


_RESULTS = TypeAdapter(list[Annotated[NodeResult, BeforeValidator(_as_node_result)]])


class EncodedReport(NamedTuple):
    """What ``advance`` sends: the results are JSON objects as text."""

    run_id: int
    results: list[str]
    token: int | None
    retry: bool
    inputs: bool


def encode_report(
    run_id: int,
    results: Iterable[NodeExecutionResult | Mapping[str, Any]],
    token: int | None,
    *,
    retry: bool = False,
    inputs: bool = False,
) -> EncodedReport:
    """Check the arguments of ``advance`` and write its results as JSON; raises as ``advance`` does."""
    flags = check_flag(retry, "retry"), check_flag(inputs, "inputs")
    return EncodedReport(check_run_id(run_id), _encode_results(results), check_token(token), *flags)


def _encode_filters(
    pipeline_id: int | None,
    status: RunStatus | Collection[RunStatus] | None,
    tags: Mapping[str, str] | None,
    created_after: datetime | None,
    created_before: datetime | None,
) -> dict[str, Any]:
    """Check the conditions of ``search`` and make the parameters of its statement."""
    wanted = {} if tags is None else check_tags(tags)
    return {
        "pipeline": None if pipeline_id is None else check_id(pipeline_id, "pipeline_id"),
        "statuses": None if status is None else f"{{{','.join(check_statuses(status, RunStatus))}}}",
        "tags": json.dumps(wanted) if wanted else None,
        "since": None if created_after is None else check_time(created_after, "created_after"),
        "until": None if created_before is None else check_time(created_before, "created_before"),
    }


def _parse_purged(cursor: object) -> tuple[str, str]:
    """Split the cursor of a purge into the end of a run, as PostgreSQL reads it, and its id."""
    found = _PURGED.fullmatch(str(cursor))
    with suppress(ValueError):  # no such day or hour
        if found is not None:
            datetime.fromisoformat(found[1])
            return found[1], found[2]
    raise InvalidCursorError(f"after must be the next_cursor of a purge, not {quote(cursor)}")


def _as_array(numbers: Iterable[int | None]) -> str:
    return f"{{{','.join('NULL' if number is None else str(number) for number in numbers)}}}"


def _as_list(objects: Iterable[str]) -> str:
    return f"[{','.join(objects)}]"


def _encode_results(results: Iterable[NodeExecutionResult | Mapping[str, Any]]) -> list[str]:
    """Check results and write each as JSON.

    Raises:
        InvalidDataError: A result has the wrong shape, or can't be stored; the message gives its path.
    """
    try:
        items = _RESULTS.validate_python(results)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        path = json_path("results", first["loc"])
        raise InvalidDataError(f"{path}: {shorten(first['msg'], 200)}") from None
    check_json(_RESULTS.dump_python(items), "results")  # together: one parameter holds all of them
    return [item.model_dump_json(exclude_unset=True) for item in items]  # the database measures what isn't given
