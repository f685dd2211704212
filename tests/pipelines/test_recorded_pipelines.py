"""Pipelines that were recorded elsewhere, stored."""

import json
import random
from pathlib import Path

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import (
    InvalidPipelineError,
    Pipeline,
    PipelineCreate,
    PipelineRepository,
    PipelineStatus,
    RunRepository,
    get_execution_order,
)
from tests.support.compiled import by_python, compiled
from tests.support.graphs import shared_files
from tests.support.pipelines import count

EXPECTED = {
    "agent_made_fan_out": "accepted",
    "api_nulls_daily_report": "accepted",
    "editor_code_review": "accepted",
    "draft_empty": "draft",
    "draft_unfinished": "draft",
    "bad_cycle": "refused",
    "bad_dangling_and_duplicate": "refused",
    "bad_long_id": "refused",
    # only configuration is missing, but it says that it is active
    "bad_config": "refused",
}


SENTENCES = {
    "draft_empty": ["Pipeline must have at least one node"],
    "draft_unfinished": ["agent_id", "task"],
    "bad_cycle": ["Pipeline contains a cycle: a -> b -> c -> a"],
    "bad_dangling_and_duplicate": ["Duplicate node id 'a'", "Edge 'e1' references unknown target node: 'ghost'"],
    "bad_long_id": ["longer than 100 characters"],
    "bad_config": ["agent_id", "task"],
}


needs_data = pytest.mark.skipif(not shared_files("pipelines"), reason="the shared data is not next to this checkout")


@needs_data
@pytest.mark.parametrize("path", shared_files("pipelines"), ids=lambda path: path.stem)
def test_create_recorded_pipeline_gives_expected_answer(path: Path, each: Session, raw: psycopg.Connection) -> None:
    source = json.loads(path.read_text(encoding="utf-8"))
    pipelines = PipelineRepository(each)
    data = PipelineCreate(**source)
    expected = EXPECTED[path.stem]
    if expected == "accepted":
        made = pipelines.create(data)
    else:
        for sentence in SENTENCES[path.stem]:
            with pytest.raises(InvalidPipelineError, match=sentence):
                pipelines.create(data)
        if expected == "refused":
            with pytest.raises(InvalidPipelineError):
                pipelines.create(data, allow_incomplete=True)
            each.add(Pipeline(**source, allow_incomplete=True))
            with pytest.raises(InvalidPipelineError):
                each.flush()
            each.rollback()
            assert count(raw) == 0
            return
        made = pipelines.create(data, allow_incomplete=True)
    stored = pipelines.get(made.id)
    assert {key: getattr(stored, key) for key in source} == source  # not one byte of the JSON is rewritten
    if expected == "accepted":
        pipelines.activate(made.id)
        run = RunRepository(each).create(made.id)
        nodes = [node.node_id for node in RunRepository(each).nodes(run.id)]
        assert nodes == get_execution_order(stored.definition)


@pytest.mark.skipif(not shared_files("workflows"), reason="the shared data is not next to this checkout")
@pytest.mark.parametrize("path", shared_files("workflows"), ids=lambda path: path.stem)
def test_insert_recorded_workflow_compiles_to_python_order(path: Path, each: Session, raw: psycopg.Connection) -> None:
    source = json.loads(path.read_text(encoding="utf-8"))
    nodes, edges = source["nodes"], source["edges"]
    assert compiled(raw, nodes, edges) == by_python(nodes, edges)
    rng = random.Random(3)
    rng.shuffle(nodes)
    rng.shuffle(edges)
    assert compiled(raw, nodes, edges) == by_python(nodes, edges)
    made = PipelineRepository(each).create(
        PipelineCreate(name=source["name"], nodes=nodes, edges=edges, status=PipelineStatus.ACTIVE)
    )
    run = RunRepository(each).create(made.id)
    order = get_execution_order(made.definition)
    assert [node.node_id for node in RunRepository(each).nodes(run.id)] == order
