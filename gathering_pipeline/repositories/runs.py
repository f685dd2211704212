"""Runs: created, claimed, moved through their lifecycle, read, swept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gathering_pipeline.errors import (
    IntegrityViolationError,
    InvalidDataError,
    InvalidPipelineError,
    Issue,
    PipelineNotFoundError,
    RunNotFoundError,
    shorten,
)
from gathering_pipeline.hooks import check_storable_json
from gathering_pipeline.json_values import MAX_DEPTH, json_path
from gathering_pipeline.lifecycle import RunStatus
from gathering_pipeline.models import NodeExecutionResult, NodeRunRead, Page, PipelineDefinition, RunRead, RunStatistics
from gathering_pipeline.repositories import _statements as sql
from gathering_pipeline.repositories._call import (
    Repository,
    call,
    flag,
    page,
    positive,
    read,
    seconds,
    storable_id,
    to_json,
    valid_status,
    valid_text,
)


class RunRepository(Repository):
    """Runs and their nodes. Every transition is one statement and one round trip.

    Works in the session it is given and never commits. A call that is refused raises a ``PipelineError`` and changes
    nothing; as after any database error, the session's transaction has to be rolled back (with
    ``Database.session(autocommit=True)`` every call is its own transaction, and the next call just works).

    On a claimed run every call of its worker needs the ``token`` (``RunRead.claim_token``) of the claim: without it, or
    with an older one, it raises ``LeaseLostError``.
    """

    # --- runs ---

    def create(self, pipeline_id: int, trigger_data: Any = None, *, idempotency_key: str | None = None) -> RunRead:
        """Create a ``pending`` run of an active pipeline, with a pending node run for each node of its graph.

        Args:
            pipeline_id: The pipeline.
            trigger_data: JSON that the run begins with; ``None`` stores ``{}``.
            idempotency_key: At most 255 characters. A second call with the same key returns the first call's run.

        Raises:
            PipelineNotFoundError: There is no such pipeline.
            PipelineInactiveError: It is not ``active``.
            InvalidPipelineError: Its stored graph is broken or empty.
            InvalidDataError: The data or the key can't be stored.
        """
        data = to_json({} if trigger_data is None else trigger_data, "trigger_data")
        key = valid_text(idempotency_key, "idempotency_key", 255, optional=True)
        try:
            return self._run(sql.CREATE, pipeline_id=pipeline_id, trigger_data=data, key=key)
        except IntegrityViolationError as error:
            if error.constraint == "pipeline_runs_pipeline_id_fkey":  # deleted while the run was being created
                raise PipelineNotFoundError(pipeline_id) from error
            raise

    def start(self, run_id: int, *, token: int | None = None) -> RunRead:
        """Start a pending run.

        Raises:
            RunNotFoundError: There is no such run.
            IllegalTransitionError: It is not pending.
        """
        return self._run(sql.START, run_id=run_id, token=token)

    def complete(self, run_id: int, *, token: int | None = None) -> RunRead:
        """Complete a running run all of whose nodes are terminal, none of them failed.

        Raises:
            RunNotFoundError: There is no such run.
            IllegalTransitionError: It is not running, or nodes are live or failed.
            LeaseLostError: The token is not the run's.
        """
        return self._run(sql.CONCLUDE, run_id=run_id, status="completed", error=None, token=token)

    def finish(self, run_id: int, *, token: int | None = None) -> RunRead:
        """End a running run as its nodes say: ``failed`` if one failed, with the first one's error, else ``completed``.

        Raises:
            RunNotFoundError: There is no such run.
            IllegalTransitionError: It is not running, or a node is running, ready or waiting for a retry.
            LeaseLostError: The token is not the run's.
        """
        return self._run(sql.FINISH, run_id=run_id, token=token)

    def fail(self, run_id: int, error: str, *, token: int | None = None) -> RunRead:
        """Fail a pending or running run; its live nodes are cancelled.

        Raises:
            RunNotFoundError: There is no such run.
            IllegalTransitionError: It is over.
            LeaseLostError: The token is not the run's.
        """
        return self._run(sql.CONCLUDE, run_id=run_id, status="failed", error=valid_text(error, "error"), token=token)

    def cancel(self, run_id: int, reason: str | None = None) -> RunRead:
        """Cancel a pending or running run, whoever holds it; its live nodes are cancelled.

        Raises:
            RunNotFoundError: There is no such run.
            IllegalTransitionError: It is over.
        """
        text = valid_text(reason, "reason", optional=True)
        return self._run(sql.CONCLUDE, run_id=run_id, status="cancelled", error=text, token=None)

    def append_log(self, run_id: int, entry: Any, *, token: int | None = None) -> None:
        """Append one JSON entry to the run's ``logs``; also to those of a run that is over.

        Raises:
            RunNotFoundError: There is no such run.
            InvalidDataError: The entry can't be stored.
            LeaseLostError: The token is not the run's.
        """
        text = to_json(entry, "entry", MAX_DEPTH - 1) or "null"  # the list of entries is the first level
        self._call(sql.APPEND_LOG, run_id=run_id, entry=text, token=token)

    # --- nodes ---

    def start_node(self, run_id: int, node_id: str, input_data: Any = None, *, token: int | None = None) -> NodeRunRead:
        """Start a ready node of a running run.

        Raises:
            RunNotFoundError: There is no such run.
            NodeRunNotFoundError: It has no such node.
            NodeNotReadyError: Predecessors (``waiting_for``) or a retry delay are awaited, or another node failed.
            IllegalTransitionError: The node is not pending, or the run is not running.
            LeaseLostError: The token is not the run's.
            InvalidDataError: The input can't be stored.
        """
        return self._node(sql.START_NODE, run_id, node_id, token, data=to_json(input_data, "input_data"))

    def complete_node(self, run_id: int, node_id: str, output: Any = None, *, token: int | None = None) -> NodeRunRead:
        """Complete a running node, or a pending one whose executor reports afterwards.

        Raises:
            RunNotFoundError: There is no such run.
            NodeRunNotFoundError: It has no such node.
            IllegalTransitionError: The node is over, or the run is not running.
            LeaseLostError: The token is not the run's.
            InvalidDataError: The output can't be stored.
        """
        return self._node(sql.COMPLETE_NODE, run_id, node_id, token, data=to_json(output, "output"))

    def skip_node(self, run_id: int, node_id: str, *, token: int | None = None) -> NodeRunRead:
        """Skip a pending node, and with it every node all of whose predecessors are skipped.

        Raises:
            RunNotFoundError: There is no such run.
            NodeRunNotFoundError: It has no such node.
            IllegalTransitionError: The node is not pending, or the run is not running.
            LeaseLostError: The token is not the run's.
        """
        return self._node(sql.SKIP_NODE, run_id, node_id, token)

    def fail_node(
        self, run_id: int, node_id: str, error: str, retryable: bool = True, *, token: int | None = None
    ) -> NodeRunRead:
        """Report that an attempt failed: the returned node run is ``pending`` where a retry is left, else ``failed``.

        A retry is due at ``available_at``: after ``min(retry_backoff_base * 2^n, retry_backoff_max)`` seconds, ``n``
        being the retries made before. A node that was never started has no attempt to retry, and fails.

        Raises:
            RunNotFoundError: There is no such run.
            NodeRunNotFoundError: It has no such node.
            IllegalTransitionError: The node is over, or the run is not running.
            LeaseLostError: The token is not the run's.
        """
        text = valid_text(error, "error")
        return self._node(sql.FAIL_NODE, run_id, node_id, token, error=text, retryable=flag(retryable, "retryable"))

    def advance(
        self, run_id: int, results: Iterable[NodeExecutionResult | Mapping[str, Any]] = (), *, token: int | None = None
    ) -> list[NodeRunRead]:
        """Record results, start what follows from them, and end the run when nothing is left: one call a step.

        A pending run that nobody claimed is started first. Without results every ready node is started, due retries
        among them; so a run begins with ``advance(run_id)`` and goes on with the results of the nodes returned.
        ``failed`` results are final: report an attempt that may be retried by ``fail_node``.

        Returns:
            The nodes started, in execution order; an empty list when there are none.

        Raises:
            RunNotFoundError: There is no such run.
            NodeRunNotFoundError: It has no such node.
            IllegalTransitionError: A result is not legal, or the run is over. No result was recorded.
            LeaseLostError: The token is not the run's.
            InvalidDataError: An output can't be stored.
        """
        return read(self._session, NodeRunRead, sql.ADVANCE, run_id=run_id, results=_results(results), token=token)

    def record(
        self, run_id: int, results: Iterable[NodeExecutionResult | Mapping[str, Any]], *, token: int | None = None
    ) -> None:
        """Record any number of results at once, all or none, for executors that report afterwards.

        A pending run that nobody claimed is started first. Nothing else is started or ended; ``finish`` ends the run.

        Raises:
            RunNotFoundError: There is no such run.
            NodeRunNotFoundError: It has no such node.
            IllegalTransitionError: A result is not legal, or the run is over. No result was recorded.
            LeaseLostError: The token is not the run's.
            InvalidDataError: An output can't be stored.
        """
        self._call(sql.RECORD, run_id=run_id, results=_results(results), token=token)

    # --- leases and sweeps ---

    def claim(self, worker_id: str, lease: timedelta, limit: int = 1) -> list[RunRead]:
        """Claim the oldest pending runs for a worker: they are running, and nobody else gets them.

        Args:
            worker_id: Who claims, at most 255 characters.
            lease: How long the claim holds without ``heartbeat``; after that ``recover`` may give the run to another.
            limit: Most runs to claim.

        Returns:
            The runs claimed, oldest first; each one's ``claim_token`` goes into the worker's calls.
        """
        name = valid_text(worker_id, "worker_id", 255)
        return self._runs(sql.CLAIM, worker_id=name, lease=seconds(lease, "lease"), limit=positive(limit, "limit"))

    def heartbeat(self, run_id: int, lease: timedelta, *, token: int) -> datetime:
        """Extend the lease.

        Returns:
            When the lease now ends, by the database's clock.

        Raises:
            RunNotFoundError: There is no such run.
            LeaseLostError: The run is not the caller's any more; ``.status`` tells whether it was cancelled.
        """
        ends: datetime = self._call(sql.HEARTBEAT, run_id=run_id, token=token, lease=seconds(lease, "lease"))[0][0]
        return ends

    def release(self, run_id: int, *, token: int) -> RunRead:
        """Give a claimed run back: it and its running nodes are pending again, and no attempt is counted.

        Raises:
            RunNotFoundError: There is no such run.
            LeaseLostError: The run is not the caller's any more.
        """
        return self._run(sql.RELEASE, run_id=run_id, token=token)

    def recover(self, limit: int = 100, max_claims: int = 10) -> list[RunRead]:
        """Take back runs whose lease ran out: running nodes count as a failed attempt, and the run is pending again.

        A run that was claimed ``max_claims`` times fails instead. Runs without a lease are never taken.
        """
        return self._runs(sql.RECOVER, limit=positive(limit, "limit"), max_claims=positive(max_claims, "max_claims"))

    def expire(self, limit: int = 100) -> list[RunRead]:
        """End running runs that are past their pipeline's ``timeout_seconds`` as ``timeout``."""
        return self._runs(sql.EXPIRE, limit=positive(limit, "limit"))

    def purge(self, older_than: timedelta, limit: int = 1000) -> int:
        """Delete at most ``limit`` runs that ended over ``older_than`` ago; commit and repeat until it returns 0."""
        age = seconds(older_than, "older_than", zero=True)
        return int(self._call(sql.PURGE, older_than=age, limit=positive(limit, "limit"))[0][0])

    # --- reads ---

    def get(self, run_id: int) -> RunRead:
        """Read a run.

        Raises:
            RunNotFoundError: There is no such run.
        """
        found = self._runs(sql.GET, run_id=run_id)
        if not found:
            raise RunNotFoundError(run_id)
        return found[0]

    def search(
        self,
        pipeline_id: int | None = None,
        status: RunStatus | None = None,
        after: int | None = None,
        limit: int = 50,
    ) -> Page[RunRead]:
        """Read a page of the run history, newest first.

        Args:
            pipeline_id: Only runs of this pipeline.
            status: Only runs with this status.
            after: ``next_cursor`` of the page before.
            limit: Most runs of a page.
        """
        name = valid_status(RunStatus, status)
        pipeline = None if pipeline_id is None else storable_id(pipeline_id, "pipeline_id")
        return page(self._session, RunRead, sql.SEARCH, after, limit, pipeline=pipeline, status=name)

    def nodes(self, run_id: int) -> list[NodeRunRead]:
        """Read a run's nodes in execution order.

        Raises:
            RunNotFoundError: There is no such run.
        """
        return self._nodes_of(sql.NODES, run_id)

    def ready_nodes(self, run_id: int) -> list[NodeRunRead]:
        """Read the nodes of a running run that may start now, in execution order.

        Raises:
            RunNotFoundError: There is no such run.
        """
        return self._nodes_of(sql.READY, run_id)

    def definition(self, run_id: int) -> PipelineDefinition:
        """Read the graph that a run is bound to, as it was when the run was created.

        Raises:
            RunNotFoundError: There is no such run.
            InvalidPipelineError: The run is bound to no graph: it is older than versions, or its graph was broken.
        """
        rows = self._call(sql.DEFINITION, run_id=run_id)
        if not rows:
            raise RunNotFoundError(run_id)
        version, nodes, edges = rows[0]
        if version is None:
            message = f"run {run_id} is bound to no version of its pipeline's graph: cancel it and create it again"
            raise InvalidPipelineError([Issue("error", "no_version", message)])
        return PipelineDefinition.from_json(nodes, edges)

    def counts(self) -> dict[RunStatus, int]:
        """Count runs by status; a status without runs is 0."""
        return dict.fromkeys(RunStatus, 0) | {RunStatus(status): number for status, number in self._call(sql.COUNTS)}

    def statistics(self, pipeline_id: int) -> RunStatistics:
        """Read how the runs of a pipeline went."""
        counts = dict.fromkeys(RunStatus, 0)
        quantiles: tuple[float, float] | None = None
        for status, number, durations in self._call(sql.STATISTICS, pipeline=storable_id(pipeline_id, "pipeline_id")):
            counts[RunStatus(status)] = number
            quantiles = durations or quantiles
        ended = counts[RunStatus.COMPLETED] + counts[RunStatus.FAILED] + counts[RunStatus.TIMEOUT]
        return RunStatistics(
            runs=counts,
            success_rate=counts[RunStatus.COMPLETED] / ended if ended else None,
            duration_p50=timedelta(seconds=quantiles[0]) if quantiles else None,
            duration_p95=timedelta(seconds=quantiles[1]) if quantiles else None,
        )

    # --- the ways to the database ---

    def _call(self, statement: str, **parameters: Any) -> list[Any]:
        return call(self._session, statement, parameters)

    def _run(self, statement: str, **parameters: Any) -> RunRead:
        return read(self._session, RunRead, statement, **parameters)[0]

    def _runs(self, statement: str, **parameters: Any) -> list[RunRead]:
        return read(self._session, RunRead, statement, **parameters)

    def _node(self, statement: str, run_id: int, node_id: str, token: int | None, **parameters: Any) -> NodeRunRead:
        parameters |= {"run_id": run_id, "node_id": valid_text(node_id, "node_id"), "token": token}
        return read(self._session, NodeRunRead, statement, **parameters)[0]

    def _nodes_of(self, statement: str, run_id: int) -> list[NodeRunRead]:
        nodes = read(self._session, NodeRunRead, statement, run_id=run_id)
        if not nodes:
            self.get(run_id)
        return nodes


_RESULTS = TypeAdapter(list[NodeExecutionResult])


def _results(results: Iterable[NodeExecutionResult | Mapping[str, Any]]) -> str:
    try:
        items = _RESULTS.validate_python(results)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = json_path("results", first["loc"])
        raise InvalidDataError(f"{place}: {shorten(first['msg'], 200)}") from None
    check_storable_json(_RESULTS.dump_python(items), "results")
    return _RESULTS.dump_json(items).decode()
