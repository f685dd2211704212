"""Every error that this package raises.

::

    PipelineError
    ├── InvalidPipelineError (ValueError)      the graph or a field is not valid; ``.issues`` names each place
    ├── InvalidDataError (ValueError)          an argument can't be stored: not JSON, out of range, unknown status
    ├── NotFoundError (LookupError)
    │   ├── PipelineNotFoundError
    │   ├── RunNotFoundError
    │   └── NodeRunNotFoundError
    ├── ConflictError                          the call is well formed, but the stored state refuses it
    │   ├── PipelineInactiveError              a run of a pipeline that is not ``active``
    │   ├── PipelineInUseError                 delete of a pipeline with live runs
    │   ├── StaleVersionError                  the graph was changed by somebody else
    │   ├── IllegalTransitionError             not in the table of ``lifecycle``
    │   ├── NodeNotReadyError                  a predecessor or a delay is still awaited
    │   ├── LeaseLostError                     the token is not the run's current one
    │   └── IntegrityViolationError            a constraint of the schema refused the row
    ├── DatabaseError
    │   ├── ConfigurationError (ValueError)    URL, settings or server that can't be used
    │   ├── DatabaseUnavailableError           no connection; try again later
    │   ├── TransactionAbortedError            an error before ended the transaction; nothing of it is stored
    │   ├── CommitIndeterminateError           it is open whether what was done is, or stays, stored
    │   ├── SchemaRevisionError                the schema is at another revision than the code
    │   └── AdoptionError                      tables that only look like ours
    └── InvalidCursorError (ValueError)        a page or event cursor from elsewhere

Errors that come from PostgreSQL are recognised by SQLSTATE and constraint name, never by their text, and are raised
``from`` the driver's error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

MAX_MESSAGE = 1_000
"""Longest message in characters; what is longer is cut in its middle."""


def shorten(text: str, limit: int = MAX_MESSAGE) -> str:
    """Cut ``text`` in its middle so that it has at most ``limit`` characters."""
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


@dataclass(frozen=True, slots=True)
class Issue:
    """One finding about a graph.

    Attributes:
        severity: ``error`` refuses the graph, ``warning`` is only logged.
        code: Stable name of the rule, such as ``cycle`` or ``missing_config``.
        message: One readable sentence that names the place.
        node_id: The node concerned, if one is.
        edge_id: The edge concerned, if one is.
    """

    severity: Literal["error", "warning"]
    code: str
    message: str
    node_id: str | None = None
    edge_id: str | None = None


class PipelineError(Exception):
    """Base of every error of this package."""


class InvalidPipelineError(PipelineError, ValueError):
    """A graph or a field of a pipeline was refused; nothing was stored.

    Attributes:
        issues: Every error found, not only the first.
    """

    def __init__(self, issues: Sequence[Issue]) -> None:
        self.issues = tuple(issues)
        text = "; ".join(issue.message for issue in self.issues[:20])
        more = len(self.issues) - 20
        super().__init__(shorten(text) + (f"; and {more} more" if more > 0 else ""))


class InvalidDataError(PipelineError, ValueError):
    """An argument can't be stored as it is; the message names its path."""


class NotFoundError(PipelineError, LookupError):
    """What was asked for doesn't exist."""


class PipelineNotFoundError(NotFoundError):
    """There is no pipeline with this id."""

    def __init__(self, pipeline_id: int) -> None:
        self.pipeline_id = pipeline_id
        super().__init__(f"pipeline {pipeline_id} does not exist")


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
    """The call is well formed, but what is stored refuses it; nothing was changed."""


class PipelineInactiveError(ConflictError):
    """A run was asked of a pipeline that is not ``active``."""

    def __init__(self, pipeline_id: int, status: str) -> None:
        self.pipeline_id = pipeline_id
        self.status = status
        super().__init__(f"pipeline {pipeline_id} is {status}, not active: activate it before it is run")


class PipelineInUseError(ConflictError):
    """A pipeline with pending or running runs can't be deleted without ``force=True``."""

    def __init__(self, pipeline_id: int, live_runs: int) -> None:
        self.pipeline_id = pipeline_id
        self.live_runs = live_runs
        super().__init__(f"pipeline {pipeline_id} has {live_runs} live runs: cancel them, or delete with force=True")


class StaleVersionError(ConflictError):
    """The graph has another version than the caller expected."""

    def __init__(self, pipeline_id: int, expected: int, current: int) -> None:
        self.pipeline_id = pipeline_id
        self.expected = expected
        self.current = current
        super().__init__(f"pipeline {pipeline_id} is at version {current}, not {expected}: read it again")


class IllegalTransitionError(ConflictError):
    """The lifecycle has no such transition (``gathering_pipeline.lifecycle``).

    Attributes:
        entity: ``"run"`` or ``"node run"``.
        id: The run's id; for a node run ``"RUN_ID/NODE_ID"``.
        current: The status that is stored.
        requested: The status that was asked for.
    """

    def __init__(self, entity: str, id: int | str, current: str, requested: str, reason: str = "") -> None:
        self.entity = entity
        self.id = id
        self.current = current
        self.requested = requested
        super().__init__(
            f"{entity} {shorten(str(id), 140)} is {current} and can't become {requested}"
            + (f": {reason}" if reason else "")
        )


class NodeNotReadyError(ConflictError):
    """A node can't start yet.

    Attributes:
        waiting_for: Ids of the predecessors that are neither completed nor skipped; empty when a retry delay or an
            earlier failure in the run holds the node back (the message says which).
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
        status: The run's status now; ``cancelled`` tells a worker why it lost the lease.
    """

    def __init__(self, run_id: int, status: str) -> None:
        self.run_id = run_id
        self.status = status
        super().__init__(
            f"the lease on run {run_id} is lost: the run is {status}, and the token is missing or not its current one"
            " (RunRead.claim_token of the claim)"
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
    """The database can't be used as asked."""


class ConfigurationError(DatabaseError, ValueError):
    """A URL, a setting or a server that can't be used; the message says what to do."""


class DatabaseUnavailableError(DatabaseError):
    """No connection could be made, or it broke."""


class TransactionAbortedError(DatabaseError):
    """The transaction was ended by an earlier error, a refused call for example; nothing of it is stored.

    Raised by the next call, or by the commit, of a caller that went on as if nothing had happened.
    """

    def __init__(self) -> None:
        super().__init__(
            "an error before, such as a refused call, ended the transaction, and it was rolled back: put a call that"
            " may be refused into 'with session.begin_nested():', catch its error around that, or use"
            " session(autocommit=True)"
        )


class CommitIndeterminateError(DatabaseError):
    """It is open whether what was done is stored, or stays so.

    The connection broke during the commit, or during a call in autocommit mode that writes, and so commits by itself;
    or the server committed, but its standby did not confirm it, so that a failover may lose it. Running the same again
    is right where it does no harm when done twice: see ``is_transient``.
    """


WITHDRAWN_REVISIONS = frozenset({"009_lifecycle", "010_graph_guard", "011_events"})
"""Revisions of unreleased versions of this package. Their schema differs from that of any later revision."""


class SchemaRevisionError(DatabaseError):
    """The schema's revision is not the one that this code was written for.

    Attributes:
        found: The schema's revision, None before the first; also None where a call met what is ``missing``.
        expected: The revision needed; None where a call met what is ``missing``.
        missing: What a call did not find, as the server says it.
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
                " 008_integrity with that version"
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


class InvalidCursorError(PipelineError, ValueError):
    """A cursor that this repository did not hand out."""


_TRANSIENT = frozenset({"40001", "40P01", "55P03", "57P01", "57P02", "57P03"})


def is_transient(error: BaseException) -> bool:
    """Whether the same transaction may succeed if it is run again from its beginning.

    True for serialization failures, deadlocks, lock timeouts, a server that is going down or coming up, broken
    connections and ``CommitIndeterminateError``. What was under way may have been done all the same: give
    ``RunRepository.create`` an ``idempotency_key``, and expect ``IllegalTransitionError`` of a transition that did.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, DatabaseUnavailableError | CommitIndeterminateError):
            return True
        if getattr(cause, "connection_invalidated", False):
            return True
        sqlstate = getattr(getattr(cause, "orig", cause), "sqlstate", None)
        if isinstance(sqlstate, str):
            return sqlstate in _TRANSIENT or sqlstate.startswith("08")
        cause = cause.__cause__
    return False
