"""``PipelineRepository.search``."""

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import (
    InvalidCursorError,
    InvalidDataError,
    InvalidPipelineError,
    PipelineError,
    PipelineRepository,
    PipelineStatus,
)
from tests.support.pipelines import new


def pages(search: Callable[..., Any], **filters: Any) -> list[list[str]]:
    found, after = [], None
    while True:
        page = search(after=after, **filters)
        found.append([item.name for item in page.items])
        after = page.next_cursor
        if after is None:
            return found


def test_search_pages_newest_first(pipelines: PipelineRepository) -> None:
    for index in range(7):
        pipelines.create(new(f"p{index}", status=("active", "draft", "paused")[index % 3]))
    assert pages(pipelines.search, limit=3) == [["p6", "p5", "p4"], ["p3", "p2", "p1"], ["p0"]]
    assert pages(pipelines.search, limit=7) == [["p6", "p5", "p4", "p3", "p2", "p1", "p0"]]
    assert pages(pipelines.search, limit=2, status=PipelineStatus.ACTIVE) == [["p6", "p3"], ["p0"]]
    assert pages(pipelines.search, name="P5") == [["p5"]]
    assert pages(pipelines.search, name="p", status=PipelineStatus.PAUSED) == [["p5", "p2"]]
    assert pages(pipelines.search, name="absent") == [[]]


def test_search_next_page_is_stable_while_pipelines_change(pipelines: PipelineRepository) -> None:
    ids = [pipelines.create(new(f"p{index}")).id for index in range(6)]
    first = pipelines.search(limit=3)
    pipelines.create(new("newer"))
    pipelines.delete(ids[3])  # the cursor's own row
    pipelines.delete(ids[1])
    assert [item.name for item in pipelines.search(after=first.next_cursor, limit=3).items] == ["p2", "p0"]


def test_search_by_name_matches_literally(pipelines: PipelineRepository) -> None:
    for name in ("100%", "100", "a_b", "ab", "C:\\x", "it's", "Ä", "%(name)s"):
        pipelines.create(new(name))
    for name, expected in (
        ("0%", ["100%"]),
        ("_", ["a_b"]),
        ("\\", ["C:\\x"]),
        ("'", ["it's"]),
        ("%(name)s", ["%(name)s"]),
        ("%s", []),
        ("AB", ["ab"]),
    ):
        assert pages(pipelines.search, name=name) == [expected]


@pytest.mark.parametrize("limit", [0, -1, True, 1.5, "3", None, 2**31])
def test_search_with_bad_limit_raises_invalid_data(pipelines: PipelineRepository, limit: Any) -> None:
    with pytest.raises(InvalidDataError, match="limit"):
        pipelines.search(limit=limit)


def test_search_with_bad_arguments_raises(pipelines: PipelineRepository) -> None:
    with pytest.raises(PipelineError):
        pipelines.search(status="archived")  # type: ignore[arg-type]
    with pytest.raises(InvalidDataError, match="name"):
        pipelines.search(name="a\0b")
    with pytest.raises((InvalidCursorError, InvalidDataError)):
        pipelines.search(after="x")  # type: ignore[arg-type]
    assert pipelines.search(name="", after=2**40).items == ()


def test_search_with_one_bad_row_returns_the_page(
    pipelines: PipelineRepository, session: Session, raw: psycopg.Connection
) -> None:
    pipelines.create(new("good"))
    session.commit()
    raw.execute("ALTER TABLE circle.pipelines DISABLE TRIGGER ALL")
    raw.execute("""INSERT INTO circle.pipelines (name, nodes, edges) VALUES ('bad', '{"a": 1}', '"x"')""")
    raw.execute("ALTER TABLE circle.pipelines ENABLE TRIGGER ALL")
    page = pipelines.search()
    assert [item.name for item in page.items] == ["bad", "good"]
    assert page.items[0].nodes == {"a": 1}
    with pytest.raises(InvalidPipelineError):
        _ = page.items[0].definition
