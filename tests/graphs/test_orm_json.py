"""JSON of pipelines, runs and node runs: refused before it is sent, or returned as given."""

import copy
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import (
    insert,
    select,
)
from sqlalchemy.orm import Session

from gathering_pipeline import (
    InvalidDataError,
    Pipeline,
    PipelineNodeRun,
    PipelineRun,
)
from tests.support.graphs import TRIGGER, values

pytestmark = pytest.mark.once  # the checks are those of the ORM's hooks

DEEP: list[Any] = []
for _ in range(70):
    DEEP = [DEEP]


GOOD_FIELDS: dict[str, dict[str, Any]] = {
    "0 is a value": {
        "timeout_seconds": 0,
        "max_retries_per_node": 0,
        "retry_backoff_base": 0.0,
        "retry_backoff_max": 0,
    },
    "no timeout": {"timeout_seconds": None},
    "times": {"last_run": datetime(2025, 1, 1, tzinfo=UTC), "created_at": datetime(2024, 2, 29, tzinfo=UTC)},
    "the longest name": {"name": "é" * 255},
    "no description": {"description": None},
    "statuses": {"status": "active"},
}


@pytest.mark.parametrize("what", GOOD_FIELDS)
def test_insert_good_field_returns_it(what: str, session: Session) -> None:
    pipeline = Pipeline(**values(**{"name": "p", **GOOD_FIELDS[what]}))
    session.add(pipeline)
    session.commit()
    session.refresh(pipeline)
    assert {key: getattr(pipeline, key) for key in GOOD_FIELDS[what]} == GOOD_FIELDS[what]


def test_insert_json_returns_it_exactly(session: Session) -> None:
    config = {
        "text": "ünïcödé 𝄞 \u2028 \\ \" ' % :x %(y)s",
        "numbers": [0, -1, 2**53 + 1, 1.5, 1e15, 2.0, 5e-324, 10**30],
        "nothing": None,
        "": {"deep": [[[[]]]], "true": True, "false": False},
    }
    nodes = [{**TRIGGER, "config": config, "unknown": [1, {"kept": None}]}]
    session.add(Pipeline(name="p", nodes=copy.deepcopy(nodes), edges=[]))
    session.execute(insert(Pipeline), [{"name": "q", "nodes": copy.deepcopy(nodes), "edges": []}])
    session.commit()
    session.expire_all()
    for pipeline in session.scalars(select(Pipeline)):
        assert pipeline.nodes == nodes
        numbers = pipeline.nodes[0]["config"]["numbers"]
        assert [type(number) for number in numbers] == [int, int, int, float, float, float, float, int]


def test_insert_large_whole_float_returns_integer(session: Session) -> None:
    """JSONB holds decimal numbers, and writes none with an exponent."""
    session.add(Pipeline(name="p", nodes=[{**TRIGGER, "config": {"k": [1e16, 1e300]}}]))
    session.commit()
    session.expire_all()
    numbers = session.scalars(select(Pipeline)).one().nodes[0]["config"]["k"]
    assert list(map(float, numbers)) == [1e16, 1e300]


BAD_JSON = {
    "NUL": {"k": "a\0b"},
    "NaN": {"k": [float("nan")]},
    "Decimal": {"k": Decimal(1)},
    "a set": {"k": {1}},
    "a key that is no string": {1: "a"},
    "nested too deep": DEEP,
    "a lone surrogate": ["\ud800"],
}


@pytest.mark.parametrize("what", BAD_JSON)
def test_insert_run_with_unstorable_json_sends_no_sql(what: str, session: Session, pipeline_id: int) -> None:
    run = PipelineRun(pipeline_id=pipeline_id, status="running")
    node = PipelineNodeRun(node_id="t", node_type="trigger")
    session.add(run)
    session.commit()
    node.run_id = run.id
    session.add(node)
    session.commit()
    for row, keys in ((run, ("trigger_data", "logs")), (node, ("input_data", "output_data"))):
        for key in keys:
            setattr(row, key, BAD_JSON[what])
            with pytest.raises(InvalidDataError, match=key):
                session.flush()
            session.rollback()
    for new, key in (
        (PipelineRun(pipeline_id=pipeline_id, trigger_data=BAD_JSON[what]), "trigger_data"),
        (PipelineNodeRun(run_id=run.id, node_id="a", node_type="agent", output_data=BAD_JSON[what]), "output_data"),
    ):
        session.add(new)
        with pytest.raises(InvalidDataError, match=key):
            session.flush()
        session.rollback()


def test_insert_run_json_returns_it(session: Session, pipeline_id: int) -> None:
    """None is what the column has by default, as SQLAlchemy has it."""
    run = PipelineRun(pipeline_id=pipeline_id, trigger_data={"by": ["é", None, 1.5]}, logs=[{"m": "x"}])
    session.add(run)
    session.flush()
    node = PipelineNodeRun(run_id=run.id, node_id="t", node_type="trigger", input_data=[1], output_data=None)
    session.add(node)
    session.commit()
    session.expire_all()
    assert (run.trigger_data, run.logs, run.duration_seconds) == ({"by": ["é", None, 1.5]}, [{"m": "x"}], 0)
    assert (node.input_data, node.output_data, node.retry_count) == ([1], {}, 0)
