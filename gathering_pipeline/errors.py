"""Every error that this package raises.

::

    PipelineError
    ├── InvalidPipelineError (ValueError)      the graph or a field is invalid; ``.issues`` names each place
    ├── InvalidDataError (ValueError)          an argument can't be stored: not JSON, out of range, unknown status
    ├── NotFoundError (LookupError)
    │   ├── PipelineNotFoundError
    │   ├── RunNotFoundError
    │   └── NodeRunNotFoundError
    ├── ConflictError                          the call is well formed, but the stored state refuses it
    │   ├── PipelineInactiveError              a run of a pipeline that is not ``active``
    │   ├── PipelineInUseError                 delete of a pipeline with live runs
    │   ├── IdempotencyConflictError           the idempotency key was used with other data
    │   ├── StaleVersionError                  the graph has been changed since it was read
    │   ├── IllegalTransitionError             the transition is not in the tables of ``lifecycle``
    │   │   └── RunOverError                   the run is terminal
    │   ├── NodeNotReadyError                  the node waits for a predecessor or a retry delay
    │   ├── LeaseLostError                     the token is not the run's current one
    │   └── IntegrityViolationError            a constraint of the schema refused the row
    ├── DatabaseError
    │   ├── ConfigurationError (ValueError)    URL, settings or server that can't be used
    │   ├── IsolationLevelError                runs can be changed at READ COMMITTED only
    │   ├── DatabaseUnavailableError           no connection, a read-only server, a full disk; retry later
    │   ├── TransactionConflictError           another transaction was in the way; retry
    │   ├── StatementCancelledError            a time limit or an administrator cancelled the statement
    │   ├── IdsExhaustedError                  a table has used up its ids
    │   ├── TransactionAbortedError            an earlier error ended the transaction; nothing is stored
    │   ├── CommitIndeterminateError           the outcome of the commit is unknown
    │   ├── ReadOnlySessionError               a write in a session for reads
    │   ├── ForkedConnectionError              the connection belongs to the process that forked this one
    │   ├── SchemaRevisionError                the schema is at another revision than the code
    │   └── AdoptionError                      existing tables differ from those of this package
    ├── WaitTimeoutError                       a run was still live when the time to wait for it was over
    ├── InvalidCursorError (ValueError)        not a cursor of this repository
    └── PermanentError                         raised by a worker's handler: the node fails without a retry

Errors that come from PostgreSQL are recognised by SQLSTATE and constraint name, never by their text, and are raised
``from`` the driver's error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, Self

MAX_MESSAGE = 1_000
"""Longest message in characters; a longer one is cut in its middle."""

Severity = Literal["error", "warning"]


def shorten(text: str, limit: int = MAX_MESSAGE) -> str:
    """Cut ``text`` in its middle so that it has at most ``limit`` characters."""
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


class IssueCode(StrEnum):
    """Stable names of the rules for pipelines; Python and the database report a fault under the same code.

    A code has one severity. An error refuses the pipeline; a warning is only logged.

    Attributes:
        NOT_A_LIST: Error. ``nodes`` or ``edges`` is not a JSON list.
        INVALID_NODE: Error. A node is not an object, or its ``name``, ``position`` or ``next`` is missing or of the
            wrong type.
        INVALID_EDGE: Error. An edge is not an object, its ``from``, ``to`` or ``condition`` is missing or of the wrong
            type, or ``from`` and ``from_node`` (``to`` and ``to_node``) differ.
        INVALID_ID: Error. The id of a node or an edge is missing, not a string, blank, too long, or begins or ends with
            a blank.
        INVALID_TYPE: Error. The type of a node is missing or unknown.
        INVALID_CONFIG: Error. ``config`` is not an object, or one of its values has the wrong type or range.
        INVALID_JSON: Error. JSONB can't hold a value or a key: NUL, a lone surrogate, NaN, a number too large for a
            float, a Python object, nesting too deep.
        NO_NODES: Error. The graph is empty; accepted in a draft.
        MISSING_CONFIG: Error. The configuration lacks a key that the node's type requires; accepted in a draft.
        DUPLICATE_NODE: Error. Two nodes have the same id.
        DUPLICATE_EDGE: Error. Two edges have the same id.
        UNKNOWN_SOURCE: Error. An edge begins at a node that doesn't exist.
        UNKNOWN_TARGET: Error. An edge ends at a node that doesn't exist.
        CYCLE: Error. The edges form a cycle; ``loc`` is the node of the cycle that stands first.
        TOO_LARGE: Error. The pipeline has more nodes, edges, bytes or values than the limits allow.
        INVALID_FIELD: Error. Another column of the pipeline, such as ``name`` or ``timeout_seconds``, is invalid.
        NO_VERSION: Error. The stored pipeline has no valid graph that a run could use.
        UNKNOWN_RULE: Error. A rule of the database that this code doesn't know, because its schema is newer.
        MISSING_ACTION: Warning. An action node has no ``action``.
        ORPHAN: Warning. A node other than a trigger has no edges.
        UNKNOWN_NEXT: Warning. ``next`` names a node that doesn't exist.
        CONTRADICTING_NEXT: Warning. ``next`` contradicts the edges, which decide.
        SIMILAR_IDS: Warning. Two ids look the same (equal under NFKC), but name different nodes.
        PARALLEL_EDGES: Warning. Two edges connect the same nodes in the same direction.
        UNLABELLED_FORK: Warning. A condition has several successors, and no edge from it has a ``condition``.
        UNUSED_LABEL: Warning. An edge at a fork or a condition has a ``branch`` or ``label`` but no ``condition``.
    """

    NOT_A_LIST = "not_a_list"
    INVALID_NODE = "invalid_node"
    INVALID_EDGE = "invalid_edge"
    INVALID_ID = "invalid_id"
    INVALID_TYPE = "invalid_type"
    INVALID_CONFIG = "invalid_config"
    INVALID_JSON = "invalid_json"
    NO_NODES = "no_nodes"
    MISSING_CONFIG = "missing_config"
    DUPLICATE_NODE = "duplicate_node"
    DUPLICATE_EDGE = "duplicate_edge"
    UNKNOWN_SOURCE = "unknown_source"
    UNKNOWN_TARGET = "unknown_target"
    CYCLE = "cycle"
    TOO_LARGE = "too_large"
    INVALID_FIELD = "invalid_field"
    NO_VERSION = "no_version"
    UNKNOWN_RULE = "unknown_rule"
    MISSING_ACTION = "missing_action"
    ORPHAN = "orphan"
    UNKNOWN_NEXT = "unknown_next"
    CONTRADICTING_NEXT = "contradicting_next"
    SIMILAR_IDS = "similar_ids"
    PARALLEL_EDGES = "parallel_edges"
    UNLABELLED_FORK = "unlabelled_fork"
    UNUSED_LABEL = "unused_label"

    @property
    def severity(self) -> Severity:
        """Whether the code refuses a pipeline (``error``) or is only logged (``warning``)."""
        return "warning" if self in _WARNINGS else "error"


_WARNINGS = frozenset(
    {
        IssueCode.MISSING_ACTION,
        IssueCode.ORPHAN,
        IssueCode.UNKNOWN_NEXT,
        IssueCode.CONTRADICTING_NEXT,
        IssueCode.SIMILAR_IDS,
        IssueCode.PARALLEL_EDGES,
        IssueCode.UNLABELLED_FORK,
        IssueCode.UNUSED_LABEL,
    }
)


@dataclass(frozen=True, slots=True)
class Issue:
    """One finding about a pipeline.

    Attributes:
        severity: ``error`` refuses the pipeline, ``warning`` is only logged; always the severity of the code.
        code: The rule, see ``IssueCode``.
        message: One readable sentence that names the place.
        node_id: The node concerned, if one is.
        edge_id: The edge concerned, if one is.
        loc: Path of the place in the pipeline, such as ``("nodes", 3, "config", "agent_id")`` or ``("edges", 0,
            "from")``; the path ends at an object or a list where one of its keys is missing or invalid JSON, and is
            empty for the pipeline as a whole.
    """

    severity: Severity
    code: IssueCode
    message: str
    node_id: str | None = None
    edge_id: str | None = None
    loc: tuple[str | int, ...] = ()


class PipelineError(Exception):
    """Base of every error of this package. An error can be pickled, as process pools and task queues do."""

    _given: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:  # noqa: D102
        error = super().__new__(cls, *args, **kwargs)
        error._given = args, kwargs
        return error

    def __reduce__(self) -> tuple[Any, ...]:
        """Make it anew from its arguments: ``Exception`` would call it with its message."""
        args, kwargs = self._given
        return _make, (type(self), args, kwargs)


def _make(kind: type[PipelineError], args: tuple[Any, ...], kwargs: dict[str, Any]) -> PipelineError:
    return kind(*args, **kwargs)


class InvalidPipelineError(PipelineError, ValueError):
    """A graph or a field of a pipeline was refused; nothing was stored.

    Attributes:
        issues: Every error found; the message names the first 20.
    """

    def __init__(self, issues: Sequence[Issue]) -> None:
        self.issues = tuple(issues)
        text = "; ".join(issue.message for issue in self.issues[:20])
        more = len(self.issues) - 20
        super().__init__(shorten(text) + (f"; and {more} more" if more > 0 else ""))


class InvalidDataError(PipelineError, ValueError):
    """An argument can't be stored; the message names its path."""


class NotFoundError(PipelineError, LookupError):
    """A requested row doesn't exist."""


class PipelineNotFoundError(NotFoundError):
    """There is no pipeline with this id, or it has no such version of its graph."""

    def __init__(self, pipeline_id: int, version: int | None = None) -> None:
        self.pipeline_id = pipeline_id
        self.version = version
        super().__init__(
            f"pipeline {pipeline_id} does not exist"
            if version is None
            else f"there is no version {version} of the graph of pipeline {pipeline_id}"
        )


class RunNotFoundError(NotFoundError):
    """There is no run with this id."""

    def __init__(self, run_id: int) -> None:
        self.run_id = run_id
        super().__init__(f"run {run_id} does not exist")


class NodeRunNotFoundError(NotFoundError):
    """The run has no such node."""

    def __init__(self, run_id: int, node_id: str) -> None:
        self.run_id = run_id
        self.node_id = node_id
        super().__init__(f"run {run_id} has no node {shorten(node_id, 120)!r}")


class ConflictError(PipelineError):
    """The call is well formed, but the stored state refuses it; nothing was changed."""


class PipelineInactiveError(ConflictError):
    """Only an ``active`` pipeline can be run."""

    def __init__(self, pipeline_id: int, status: str) -> None:
        self.pipeline_id = pipeline_id
        self.status = status
        super().__init__(f"pipeline {pipeline_id} is {status}, not active: activate it first")


class PipelineInUseError(ConflictError):
    """A pipeline with pending or running runs can't be deleted without ``force=True``."""

    def __init__(self, pipeline_id: int, live_runs: int) -> None:
        self.pipeline_id = pipeline_id
        self.live_runs = live_runs
        super().__init__(f"pipeline {pipeline_id} has {live_runs} live runs: cancel them, or delete with force=True")


class IdempotencyConflictError(ConflictError):
    """A run of the pipeline has the idempotency key, and other trigger data.

    Attributes:
        run_id: The run that has the key.
        key: The key.
    """

    def __init__(self, pipeline_id: int, key: str, run_id: int) -> None:
        self.pipeline_id = pipeline_id
        self.key = key
        self.run_id = run_id
        super().__init__(
            f"run {run_id} of pipeline {pipeline_id} already has the idempotency key {shorten(key, 120)!r}, with other"
            " trigger data: use a separate key for each request"
        )


class StaleVersionError(ConflictError):
    """The pipeline was edited since the caller read it.

    Attributes:
        expected: The revision that the caller has read.
        current: The stored revision.
    """

    def __init__(self, pipeline_id: int, expected: int, current: int) -> None:
        self.pipeline_id = pipeline_id
        self.expected = expected
        self.current = current
        super().__init__(f"pipeline {pipeline_id} is at revision {current}, not {expected}: read it again")


class IllegalTransitionError(ConflictError):
    """The lifecycle has no such transition (``gathering_pipeline.lifecycle``).

    Attributes:
        entity: ``"run"`` or ``"node run"``.
        id: The run's id; for a node run ``"RUN_ID/NODE_ID"``.
        current: The stored status.
        requested: The requested status.
    """

    def __init__(self, entity: str, id: int | str, current: str, requested: str, reason: str = "") -> None:
        self.entity = entity
        self.id = id
        self.current = current
        self.requested = requested
        change = f"{'be' if str(requested).endswith('ed') else 'become'} {requested}"  # be resumed, but become running
        super().__init__(
            f"{entity} {shorten(str(id), 140)} is {current} and can't {change}" + (f": {reason}" if reason else "")
        )


class RunOverError(IllegalTransitionError):
    """The run is terminal.

    Attributes:
        status: Its status.
        completed_at: When it ended; an ISO 8601 text.
        error: Its error message.
    """

    def __init__(self, run_id: int, status: str, completed_at: str, error: str | None, requested: str) -> None:
        self.status = status
        self.completed_at = completed_at
        self.error = error
        super().__init__("run", run_id, status, requested)
        self.args = (f"run {run_id} is terminal ({status} at {completed_at}): it and its nodes can't change",)


class NodeNotReadyError(ConflictError):
    """A node can't start yet.

    Attributes:
        waiting_for: Ids of the predecessors that are neither completed nor skipped; empty when a retry delay or a
            failed node of the run blocks the node (the message says which).
    """

    def __init__(self, run_id: int, node_id: str, waiting_for: Sequence[str], reason: str = "") -> None:
        self.run_id = run_id
        self.node_id = node_id
        self.waiting_for = tuple(waiting_for)
        why = reason or f"it waits for {', '.join(map(repr, self.waiting_for))}"
        super().__init__(shorten(f"node {node_id!r} of run {run_id} is not ready: {why}"))


class LeaseLostError(ConflictError):
    """The caller doesn't hold the run: its token is missing, or no longer the current one.

    Attributes:
        status: The run's current status, such as ``cancelled``.
    """

    def __init__(self, run_id: int, status: str) -> None:
        self.run_id = run_id
        self.status = status
        super().__init__(
            f"the lease on run {run_id} is lost: the run is {status}, and the token is missing or not its current one"
            " (ClaimedRun.token of the claim)"
        )


class IntegrityViolationError(ConflictError):
    """A constraint of the schema refused the row.

    Attributes:
        constraint: The constraint's name.
    """

    def __init__(self, constraint: str, message: str) -> None:
        self.constraint = constraint
        super().__init__(shorten(message))


class DatabaseError(PipelineError):
    """The database can't be used as requested."""


class ConfigurationError(DatabaseError, ValueError):
    """A URL, a setting or a server is unusable; the message says what to do."""


class IsolationLevelError(DatabaseError):
    """Runs can be changed at isolation level READ COMMITTED only, where each statement sees what was committed before.

    ``Database`` sets that level on its connections. Another engine or session has to be made with it:
    ``create_engine(..., isolation_level="READ COMMITTED")``, or ``default_transaction_isolation`` of the database.

    Attributes:
        level: The level of the transaction.
    """

    def __init__(self, level: str) -> None:
        self.level = level
        super().__init__(
            f"runs can't be changed at isolation level {level.upper()}: use READ COMMITTED, which"
            " create_engine(..., isolation_level=...) or default_transaction_isolation sets"
        )


class DatabaseUnavailableError(DatabaseError):
    """The database can't do it now: a retry may succeed although the caller changes nothing.

    No connection could be made, or it broke; the server is read-only, lacks disk space, memory or connections, or can't
    read or write a file.
    """


class TransactionConflictError(DatabaseError):
    """Another transaction was in the way: a deadlock, a lock that did not become free, a failed serialization."""


class StatementCancelledError(DatabaseError):
    """The statement was cancelled by a time limit such as ``statement_timeout``, or by ``pg_cancel_backend``."""


class IdsExhaustedError(DatabaseError):
    """A table has used up its ids. ``gathering-pipeline db doctor`` shows how far the ids have come."""


class TransactionAbortedError(DatabaseError):
    """The transaction was rolled back because an earlier call failed; nothing of it is stored.

    Raised by the next call in that transaction, or by its commit.
    """

    def __init__(self) -> None:
        super().__init__(
            "the transaction was rolled back because an earlier call failed: put a call that may be refused into"
            " 'with session.begin_nested():' and catch its error outside that block, or use session(autocommit=True)"
        )


class CommitIndeterminateError(DatabaseError):
    """The outcome of the commit is unknown.

    The connection broke during the commit, or during a writing call in autocommit mode; or the server committed, but
    its standby did not confirm, so that a failover may lose the transaction. Retry only what can safely run twice, see
    ``is_transient``.
    """


class ReadOnlySessionError(DatabaseError):
    """A session of ``Database.reading`` was to write; nothing was changed. A retry can't succeed."""

    def __init__(self) -> None:
        super().__init__("the session is read-only, made by reading() or areading(): write in database.session()")


class ForkedConnectionError(DatabaseError):
    """The session, listener or group commit was open when this process was forked: it belongs to the parent process.

    Nothing was sent. New sessions of the same ``Database`` work in the child.
    """

    def __init__(self) -> None:
        super().__init__(
            "the connection belongs to the parent process, which forked this one: open a new session in the child"
        )


WITHDRAWN_REVISIONS = frozenset(
    {
        "008_integrity",
        "009_lifecycle",
        "009b_lifecycle",
        "010_graph_guard",
        "010b_graph_guard",
        "011_events",
        "011b_events",
    }
)
"""Revisions of unreleased versions of this package. Their schema differs from that of any later revision."""


class SchemaRevisionError(DatabaseError):
    """The schema's revision is not the one that this code was written for.

    Attributes:
        found: The schema's revision; ``None`` before the first, and where ``missing`` is set.
        expected: The revision needed; ``None`` where ``missing`` is set.
        missing: The object that a call did not find, in the server's words.
    """

    def __init__(self, found: str | None = None, expected: str | None = None, missing: str = "") -> None:
        self.found = found
        self.expected = expected
        self.missing = missing
        super().__init__(
            (
                f"the schema lacks what this code needs ({shorten(missing, 200)})"
                if missing
                else f"the schema is at revision {found or 'none'}, this code needs {expected}"
            )
            + f": {self.advice}"
        )

    @property
    def advice(self) -> str:
        """What to do."""
        if self.found in WITHDRAWN_REVISIONS:
            return (
                "an unreleased version of this package left the revision: recreate the database, or downgrade it to"
                " 007_pipeline_execution with that version"
            )
        return (
            "run 'alembic upgrade head', 'gathering-pipeline db upgrade' or Database().upgrade(); where the schema is"
            " ahead, upgrade the package"
        )


class AdoptionError(DatabaseError):
    """Existing tables differ from the ones that revision 006 describes; nothing was changed.

    Attributes:
        differences: One sentence for each difference.
    """

    def __init__(self, differences: Sequence[str]) -> None:
        self.differences = tuple(differences)
        super().__init__("existing tables can't be adopted:\n" + "\n".join(f"  - {line}" for line in self.differences))


class WaitTimeoutError(PipelineError):
    """A run was still live when the time to wait for it was over.

    Attributes:
        status: The run's status.
    """

    def __init__(self, run_id: int, status: str) -> None:
        self.run_id = run_id
        self.status = status
        super().__init__(f"run {run_id} is still {status}")


class InvalidCursorError(PipelineError, ValueError):
    """The value is not a cursor of this repository."""


class PermanentError(PipelineError):
    """Raised by a handler of a ``Worker``: the node fails with this text, and no retry is made."""


_TRANSIENT = frozenset({"25006", "25P03", "40001", "40P01", "55P03", "57P01", "57P02", "57P03", "57P05"})
_TRANSIENT_CLASSES = ("08", "53", "58")
_PROTOCOL_VIOLATION = "08P01"


_STALE_PLAN = frozenset({"0A000", "42703", "42804"})
_PLAN_CHECKS = frozenset(
    {
        *("RevalidateCachedQuery", "CheckVarSlotCompatibility", "ExecEvalParamExtern", "ExecEvalFieldSelect"),
        *("plpgsql_param_eval_recfield", "build_attrmap_by_position", "tupledesc_match"),
    }
)
"""The server's functions that compare a plan with a table's present columns; their SQLSTATEs have other errors, too."""


def has_stale_plan(sqlstate: str | None, source_function: str | None) -> bool:
    """Whether a statement failed because it was planned, or had begun, before the columns of a table changed."""
    return sqlstate in _STALE_PLAN and source_function in _PLAN_CHECKS


_BROKEN = re.compile("the connection is (lost|closed)|closed the connection unexpectedly|consuming input failed")
"""What libpq and psycopg say of a connection that broke; it has no SQLSTATE."""


def is_transient(error: BaseException) -> bool:  # noqa: PLR0911 - one a kind of error
    """Whether the same transaction may succeed when it is retried from its beginning.

    True for ``TransactionConflictError``, ``DatabaseUnavailableError`` and ``CommitIndeterminateError``, and for the
    driver's errors that they stand for. The first attempt may have been committed: give ``RunRepository.create`` an
    ``idempotency_key``, and expect ``IllegalTransitionError`` from a transition that was.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ReadOnlySessionError):
            return False
        if isinstance(cause, DatabaseUnavailableError | TransactionConflictError | CommitIndeterminateError):
            return True
        if getattr(cause, "connection_invalidated", False):
            return True
        origin = getattr(cause, "orig", cause)
        sqlstate = getattr(origin, "sqlstate", None)
        if type(origin).__name__ == "OperationalError" and sqlstate is None and _BROKEN.search(str(origin)):
            return True
        if has_stale_plan(sqlstate, getattr(getattr(origin, "diag", None), "source_function", None)):
            return True
        if isinstance(sqlstate, str):
            by_class = sqlstate.startswith(_TRANSIENT_CLASSES) and sqlstate != _PROTOCOL_VIOLATION
            return by_class or sqlstate in _TRANSIENT
        cause = cause.__cause__
    return False
