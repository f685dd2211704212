"""The error tree: what a caller may catch, and messages of a readable length."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest

from gathering_pipeline import errors
from gathering_pipeline.errors import (
    AdoptionError,
    ConfigurationError,
    ConflictError,
    DatabaseError,
    IdempotencyConflictError,
    IllegalTransitionError,
    IntegrityViolationError,
    InvalidCursorError,
    InvalidDataError,
    InvalidPipelineError,
    Issue,
    IssueCode,
    LeaseLostError,
    NodeNotReadyError,
    NodeRunNotFoundError,
    NotFoundError,
    PipelineError,
    PipelineInactiveError,
    PipelineInUseError,
    PipelineNotFoundError,
    RunNotFoundError,
    SchemaRevisionError,
    StaleVersionError,
    WaitTimeoutError,
    shorten,
)

CLASSES = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, BaseException)]


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)
def test_every_error_is_a_pipeline_error_and_drawn(error: type[BaseException]) -> None:
    assert issubclass(error, PipelineError)
    assert errors.__doc__ is not None
    assert re.search(rf"\b{error.__name__}\b", errors.__doc__)


ARGUMENTS: dict[str, object] = {
    "issues": [Issue("error", IssueCode.NO_NODES, "Pipeline must have at least one node", loc=("nodes",))],
    "pipeline_id": 5,
    "run_id": 6,
    "node_id": "a",
    "key": "k",
    "status": "failed",
    "live_runs": 2,
    "expected": 1,
    "current": 2,
    "entity": "run",
    "id": 7,
    "requested": "running",
    "reason": "why",
    "completed_at": "2026-01-01T00:00:00Z",
    "error": "no luck",
    "waiting_for": ("a", "b"),
    "constraint": "c",
    "message": "m",
    "level": "serializable",
    "found": "a",
    "missing": "",
    "differences": ["x: y"],
}


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_pickled_error_has_its_message_and_attributes(kind: type[PipelineError]) -> None:
    names = [name for name in inspect.signature(kind).parameters if name in ARGUMENTS]
    error = kind(**{name: ARGUMENTS[name] for name in names}) if names else kind()
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):  # noqa: S301 - our own
        assert type(again) is kind
        assert (str(again), again.args) == (str(error), error.args)
        assert vars(again) == vars(error)
    positional = kind(*(ARGUMENTS[name] for name in names))
    assert vars(pickle.loads(pickle.dumps(positional))) == vars(positional)  # noqa: S301


@pytest.mark.parametrize(
    ("error", "base"),
    [
        (InvalidPipelineError, ValueError),
        (InvalidDataError, ValueError),
        (ConfigurationError, ValueError),
        (InvalidCursorError, ValueError),
        (NotFoundError, LookupError),
        (PipelineNotFoundError, NotFoundError),
        (RunNotFoundError, NotFoundError),
        (NodeRunNotFoundError, NotFoundError),
        (LeaseLostError, ConflictError),
        (StaleVersionError, ConflictError),
        (WaitTimeoutError, PipelineError),
        (IdempotencyConflictError, ConflictError),
        (AdoptionError, DatabaseError),
        (SchemaRevisionError, DatabaseError),
    ],
)
def test_bases(error: type[BaseException], base: type[BaseException]) -> None:
    assert issubclass(error, base)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PipelineNotFoundError(7), ["pipeline 7"]),
        (RunNotFoundError(8), ["run 8"]),
        (NodeRunNotFoundError(8, "a"), ["run 8", "'a'"]),
        (PipelineInactiveError(7, "paused"), ["pipeline 7", "paused"]),
        (PipelineInUseError(7, 3), ["pipeline 7", "3 live runs"]),
        (IdempotencyConflictError(7, "k", 3), ["run 3", "pipeline 7", "'k'"]),
        (StaleVersionError(7, 2, 3), ["pipeline 7", "revision 3", "not 2"]),
        (IllegalTransitionError("run", 8, "completed", "running", "over"), ["run 8", "completed", "running", "over"]),
        (NodeNotReadyError(8, "c", ["a", "b"]), ["'c'", "run 8", "'a', 'b'"]),
        (NodeNotReadyError(8, "c", [], "it waits for its retry"), ["'c'", "retry"]),
        (LeaseLostError(8, "cancelled"), ["run 8", "cancelled"]),
        (IntegrityViolationError("ck_x", "refused"), ["refused"]),
        (SchemaRevisionError(None, "011"), ["none", "011", "alembic upgrade head"]),
        (AdoptionError(["one", "two"]), ["one", "two"]),
    ],
    ids=str,
)
def test_messages(error: PipelineError, words: list[str]) -> None:
    assert words == [word for word in words if word in str(error)]


@pytest.mark.parametrize(
    "error",
    [
        NodeRunNotFoundError(1, "x" * 10**6),
        NodeNotReadyError(1, "x", ["y" * 100] * 10000),
        IllegalTransitionError("node run", "x" * 10**6, "a", "b"),
        IntegrityViolationError("c", "x" * 10**6),
        InvalidPipelineError([Issue("error", IssueCode.CYCLE, "x" * 10**6)] * 1000),
    ],
    ids=lambda error: type(error).__name__,
)
def test_messages_are_cut(error: PipelineError) -> None:
    assert len(str(error)) < 1_050


def test_issues_are_kept_and_the_message_counts_them() -> None:
    issues = [Issue("error", IssueCode.CYCLE, f"problem {at}", node_id=str(at)) for at in range(25)]
    error = InvalidPipelineError(issues)
    assert tuple(issues) == error.issues
    assert str(error).startswith("problem 0; problem 1; ")
    assert str(error).endswith("problem 19; and 5 more")


@pytest.mark.parametrize(
    ("text", "limit", "expected"), [("short", 5, "short"), ("0123456789abcdef", 11, "012 ... def")]
)
def test_shorten(text: str, limit: int, expected: str) -> None:
    assert expected == shorten(text, limit)
