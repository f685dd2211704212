"""Arguments of ``PipelineRepository`` that are refused."""

from typing import Any

import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import (
    InvalidDataError,
    PipelineCreate,
    PipelineNotFoundError,
    PipelineRepository,
    PipelineUpdate,
    StaleVersionError,
)
from tests.support.pipelines import new

pytestmark = pytest.mark.once  # arguments are checked before anything is sent


def test_call_with_id_beyond_bigint_raises_not_found(each: Session) -> None:
    pipelines = PipelineRepository(each)
    made = pipelines.create(new())
    for missing in (2**31, 2**63, -(2**63) - 1, 10**30):
        for call in (pipelines.get, pipelines.activate, pipelines.pause, pipelines.delete):
            with pytest.raises(PipelineNotFoundError, match=f"pipeline {missing} does not exist"):
                call(missing)
        with pytest.raises(PipelineNotFoundError):
            pipelines.update(missing, PipelineUpdate(name="q"), expected_revision=missing)
        with pytest.raises(StaleVersionError, match=f"is at revision 1, not {missing}:"):
            pipelines.update(made.id, PipelineUpdate(name="q"), expected_revision=missing)
    assert pipelines.get(made.id) == made


@pytest.mark.parametrize("bad", ["1", True, 1.0, [1], 10**5000], ids=lambda bad: type(bad).__name__)
def test_call_with_id_of_wrong_type_raises_invalid_data(each: Session, bad: Any) -> None:
    pipelines = PipelineRepository(each)
    made = pipelines.create(new())
    for call in (pipelines.get, pipelines.activate, pipelines.pause, pipelines.delete):
        with pytest.raises(InvalidDataError, match="^pipeline_id must be a whole number"):
            call(bad)
    with pytest.raises(InvalidDataError, match="^pipeline_id must be a whole number"):
        pipelines.update(bad, PipelineUpdate(name="q"))
    with pytest.raises(InvalidDataError, match="^expected_revision must be a whole number"):
        pipelines.update(made.id, PipelineUpdate(name="q"), bad)
    assert pipelines.get(made.id) == made


@pytest.mark.parametrize("bad", ["false", 0, 1, None])
def test_write_with_flag_of_wrong_type_raises_invalid_data(each: Session, bad: Any) -> None:
    pipelines = PipelineRepository(each)
    made = pipelines.create(new())
    refused = pytest.raises(InvalidDataError, match="^allow_incomplete must be True or False")
    with refused:
        pipelines.create(PipelineCreate(name="q"), allow_incomplete=bad)
    with refused:
        pipelines.update(made.id, PipelineUpdate(nodes=[]), allow_incomplete=bad)
    assert pipelines.search().items == (made,)
