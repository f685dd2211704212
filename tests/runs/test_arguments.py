"""Arguments of ``RunRepository`` that are refused before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import NodeResult, RunRepository
from gathering_pipeline.errors import (
    InvalidDataError,
    NodeRunNotFoundError,
    PipelineNotFoundError,
    RunNotFoundError,
)
from tests.support.runs import LEASE, claimed, done, raised, started, store

pytestmark = pytest.mark.once  # arguments are checked before anything is sent

BY_RUN: dict[str, Callable[[RunRepository, int], object]] = {
    "get": lambda runs, run_id: runs.get(run_id),
    "nodes": lambda runs, run_id: runs.nodes(run_id),
    "ready_nodes": lambda runs, run_id: runs.ready_nodes(run_id),
    "definition": lambda runs, run_id: runs.definition(run_id),
    "explain": lambda runs, run_id: runs.explain(run_id),
    "start": lambda runs, run_id: runs.start(run_id),
    "complete": lambda runs, run_id: runs.complete(run_id),
    "finish": lambda runs, run_id: runs.finish(run_id),
    "fail": lambda runs, run_id: runs.fail(run_id, "x"),
    "cancel": lambda runs, run_id: runs.cancel(run_id),
    "append_log": lambda runs, run_id: runs.append_log(run_id, "x"),
    "start_node": lambda runs, run_id: runs.start_node(run_id, "a"),
    "complete_node": lambda runs, run_id: runs.complete_node(run_id, "a"),
    "skip_node": lambda runs, run_id: runs.skip_node(run_id, "a"),
    "fail_node": lambda runs, run_id: runs.fail_node(run_id, "a", "x"),
    "advance": lambda runs, run_id: runs.advance(run_id),
    "record": lambda runs, run_id: runs.record(run_id, [done("a")]),
    "heartbeat": lambda runs, run_id: runs.heartbeat(run_id, LEASE, token=1),
    "release": lambda runs, run_id: runs.release(run_id, token=1),
}


def test_call_with_id_beyond_bigint_raises_not_found(runs: RunRepository) -> None:
    for missing in (2**63, -(2**63) - 1, 10**30):
        found = {name: raised(call, runs, missing) for name, call in BY_RUN.items()}
        assert found == dict.fromkeys(BY_RUN, "RunNotFoundError")


@pytest.mark.parametrize("bad", ["1", True, 1.0, None, [1], 10**5000], ids=lambda bad: type(bad).__name__)
def test_call_with_id_or_token_of_wrong_type_raises_invalid_data(
    runs: RunRepository, session: Session, bad: Any
) -> None:
    run_id = started(runs, session, "a")
    for call in BY_RUN.values():
        with pytest.raises(InvalidDataError, match="^run_id must be a whole number"):
            call(runs, bad)
    with pytest.raises(InvalidDataError, match="^pipeline_id must be a whole number"):
        runs.create(bad)
    with pytest.raises(InvalidDataError, match="^pipeline_id must be a whole number"):
        runs.statistics(bad)
    with pytest.raises(InvalidDataError, match="^limit must be a whole number"):
        runs.search(limit=bad)
    if bad is not None:  # a filter, and a run that is not claimed
        with pytest.raises(InvalidDataError, match="^pipeline_id must be a whole number"):
            runs.search(bad)
        with pytest.raises(InvalidDataError, match="^token must be a whole number"):
            runs.advance(run_id, token=bad)
    assert runs.get(run_id).status == "running"  # the transaction goes on: no SQL was sent


def test_call_with_none_for_a_required_argument_raises_invalid_data(runs: RunRepository, session: Session) -> None:
    run_id = started(runs, session, "a")
    nothing: Any = None
    calls: dict[str, Callable[[], object]] = {
        "node_id": lambda: runs.start_node(run_id, nothing),
        "error": lambda: runs.fail(run_id, nothing),
        "retryable": lambda: runs.fail_node(run_id, "a", "broken", retryable=nothing),
        "worker_id": lambda: runs.claim(nothing, timedelta(seconds=1)),
    }
    for name, call in calls.items():
        with pytest.raises(InvalidDataError, match=f"^{name} must be "):
            call()
    assert runs.get(run_id).status == "running"


def test_create_with_pipeline_id_beyond_bigint_raises_not_found(
    runs: RunRepository, refuses: Callable[..., Any]
) -> None:
    for missing in (2**63, -(10**30)):
        with refuses(PipelineNotFoundError) as caught:
            runs.create(missing)
        assert caught.value.pipeline_id == missing
        assert runs.statistics(missing).success_rate is None
        assert runs.search(missing).items == ()


def test_call_on_missing_run_or_node_raises_not_found(
    runs: RunRepository, session: Session, refuses: Callable[..., Any]
) -> None:
    run_id = started(runs, session, "a")
    for missing in (0, -1, 10**6, 2**31, 2**63 - 1):
        for call in BY_RUN.values():
            with refuses(RunNotFoundError) as caught:
                call(runs, missing)
            assert caught.value.run_id == missing
    by_nodes: list[Callable[[str], object]] = [
        lambda node_id: runs.start_node(run_id, node_id),
        lambda node_id: runs.complete_node(run_id, node_id),
        lambda node_id: runs.skip_node(run_id, node_id),
        lambda node_id: runs.fail_node(run_id, node_id, "x"),
        lambda node_id: runs.advance(run_id, [done(node_id)]),
        lambda node_id: runs.record(run_id, [done("a"), done(node_id)]),
    ]
    for node_id in ("b", "", "A", "a ", "x" * 5_000, "'; --", "%s"):
        for by_node in by_nodes:
            with refuses(NodeRunNotFoundError) as caught:
                by_node(node_id)
            assert (caught.value.run_id, caught.value.node_id) == (run_id, node_id)
            assert len(str(caught.value)) < 1_100


DEEP: list[Any] = []
for _ in range(64):
    DEEP = [DEEP]


BAD_JSON = {
    "NUL": ({"a": ["x", "b\0d"]}, ".a[1]"),
    "a NUL in a key": ({"k\0": 1}, ""),
    "a lone surrogate": ({"a": "\ud800"}, ".a"),
    "NaN": ({"a": float("nan")}, ".a"),
    "infinity": ([0, float("inf")], "[1]"),
    "a huge number": ({"a": {"b": 10**400}}, ".a.b"),
    "a set": ({"a": {1}}, ".a"),
    "bytes": ({"a": b"x"}, ".a"),
    "a datetime": ({"a": datetime(2024, 1, 1, tzinfo=UTC)}, ".a"),
    "a number as a key": ({"a": {1: 2}}, ".a"),
    "too deep": ({"a": DEEP}, ".a"),
}


@pytest.mark.parametrize("what", BAD_JSON)
def test_call_with_unstorable_json_names_the_place(
    runs: RunRepository, session: Session, refuses: Callable[..., Any], what: str
) -> None:
    value, place = BAD_JSON[what]
    pipeline = store(session, "a b")
    run_id = runs.start(runs.create(pipeline).id).id
    runs.start_node(run_id, "b")
    calls: list[tuple[str, Callable[[], object]]] = [
        ("trigger_data", lambda: runs.create(pipeline, value)),
        ("entry", lambda: runs.append_log(run_id, value)),
        ("input_data", lambda: runs.start_node(run_id, "a", value)),
        ("output", lambda: runs.complete_node(run_id, "b", value)),
    ]
    for name, call in calls:
        with refuses(InvalidDataError) as caught:
            call()
        assert name + place in str(caught.value)
    if isinstance(value, dict):
        for results in (runs.advance, runs.record):
            with refuses(InvalidDataError) as caught:
                results(run_id, [done("b"), {"node_id": "a", "status": "completed", "output": value}])
            assert "results" in str(caught.value)


BAD_RESULTS: dict[str, tuple[dict[str, Any], str]] = {
    "another status": ({"status": "running"}, "results[0].status"),
    "an id that is no text": ({"node_id": 5}, "results[0].node_id"),
    "an output that is no object": ({"output": [1]}, "results[0].output"),
    "a negative duration": ({"duration_ms": -1}, "results[0].duration_ms"),
    "an attempt that is no number": ({"attempt": "x"}, "results[0].attempt"),
    "a branch that is no text": ({"branch": 5}, "results[0].branch"),
}


@pytest.mark.parametrize("what", BAD_RESULTS)
@pytest.mark.parametrize("made", ["changed", "made without a check"])
def test_call_with_unchecked_result_names_the_place(
    runs: RunRepository, session: Session, refuses: Callable[..., Any], what: str, made: str
) -> None:
    fields, place = BAD_RESULTS[what]
    make: Any = NodeResult.model_construct
    pipeline = store(session, "a b")
    run_id = runs.start(runs.create(pipeline).id).id
    good = {"node_id": "a", "status": "completed"}
    result = make(**good | fields)
    if made == "changed":
        result = NodeResult.model_validate(good)
        for name, value in fields.items():
            setattr(result, name, value)
    for call in (runs.advance, runs.record):
        with refuses(InvalidDataError) as caught:
            call(run_id, [result])
        assert str(caught.value).startswith(place)
    with refuses(InvalidDataError):
        runs.record_run(pipeline, [result])
    with refuses(InvalidDataError):
        runs.advance(run_id, [make()])


@pytest.mark.parametrize("text", ["a\0b", "\ud800", 7])
def test_call_with_text_of_wrong_type_or_content_raises_invalid_data(
    runs: RunRepository, session: Session, refuses: Callable[..., Any], text: Any
) -> None:
    pipeline = store(session, "a b")
    run_id = runs.start(runs.create(pipeline).id).id
    runs.start_node(run_id, "b")
    runs.create(pipeline)
    for name, call in (
        ("idempotency_key", lambda: runs.create(pipeline, idempotency_key=text)),
        ("error", lambda: runs.fail(run_id, text)),
        ("reason", lambda: runs.cancel(run_id, text)),
        ("node_id", lambda: runs.start_node(run_id, text)),
        ("node_id", lambda: runs.complete_node(run_id, text)),
        ("node_id", lambda: runs.skip_node(run_id, text)),
        ("node_id", lambda: runs.fail_node(run_id, text, "x")),
        ("error", lambda: runs.fail_node(run_id, "b", text)),
        ("worker_id", lambda: runs.claim(text, LEASE)),
        ("results", lambda: runs.record(run_id, [{"node_id": "a", "status": "failed", "error": text}])),
        ("results", lambda: runs.advance(run_id, [{"node_id": text, "status": "failed"}])),
    ):
        with refuses(InvalidDataError) as caught:
            call()
        assert name in str(caught.value)


def test_call_with_argument_out_of_range_raises_invalid_data(
    runs: RunRepository, session: Session, refuses: Callable[..., Any]
) -> None:
    pipeline = store(session, "a")
    run = claimed(runs, session, "a")
    token = run.token
    result = {"node_id": "a", "status": "completed"}
    ages: list[Any] = [timedelta(seconds=-1), timedelta.max, 0]
    limits: list[Any] = [0, -1, True, 1.5, "1", None, 2**31, 10**30]
    calls: list[Callable[[], object]] = [
        *(lambda key=key: runs.create(pipeline, idempotency_key=key) for key in ("", "k" * 256)),
        *(lambda name=name: runs.claim(name, LEASE) for name in ("", "w" * 256)),
        *(
            lambda lease=lease, call=call: call(lease)
            for lease in (timedelta(0), timedelta(seconds=-1), timedelta.max, 60, None)
            for call in (lambda lease: runs.claim("w", lease), lambda lease: runs.heartbeat(run.id, lease, token=token))
        ),
        *(
            lambda limit=limit, call=call: call(limit)
            for limit in limits
            for call in (
                lambda limit: runs.claim("w", LEASE, limit),
                runs.recover,
                runs.expire,
                lambda limit: runs.recover(10, limit),
                lambda limit: runs.purge(timedelta(0), limit),
                lambda limit: runs.search(limit=limit),
            )
        ),
        *(lambda age=age: runs.purge(age) for age in ages),
        lambda: runs.search(status="started"),  # type: ignore[arg-type]
        *(
            lambda wrong=wrong, call=call: call(run.id, [result | wrong], token=token)
            for wrong in (
                {"status": "running"},
                {"status": None},
                {"node_id": None},
                {"node_id": 7},
                {"output": [1]},
                {"duration_ms": -1},
                {"duration_ms": 2**31},
                {"retry_count": -1},
                {"retry_count": 2**31},
                {"retry_count": "many"},
            )
            for call in (runs.record, runs.advance)
        ),
        lambda: runs.record(run.id, [{"status": "completed"}], token=token),
        lambda: runs.record(run.id, ["a"], token=token),  # type: ignore[list-item]
    ]
    for call in calls:
        with refuses(InvalidDataError) as caught:
            call()
        assert len(str(caught.value)) < 1_100
