"""The catalogue of bad input: on each path a typed error that names the place, or exactly what was given comes back."""

from __future__ import annotations

import gc
import inspect
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import psycopg
import pytest
from pydantic import ValidationError
from sqlalchemy import create_engine, func, null, select, text
from sqlalchemy.orm import Session

from gathering_pipeline import (
    InvalidPipelineError,
    Pipeline,
    PipelineCreate,
    PipelineError,
    PipelineRepository,
    PipelineUpdate,
    find_issues,
    get_execution_order,
    parse_pipeline_definition,
)
from gathering_pipeline.repositories._call import translate
from gathering_pipeline.validator import Limits
from tests.support import databases, schema, servers
from tests.support.graphs import AGENT, BACK, EDGE, GOOD, TRIGGER, Graph
from tests.support.orm_writes import INSERTS, UPDATES
from tests.support.write_paths import (
    BY_HOOK,
    INSERTING,
    UPDATING,
    RefusedByPsqlError,
    Row,
    Stage,
    Write,
    refusal,
    sqlstate,
)


@dataclass(frozen=True)
class Case:
    """An input, and the answer to it.

    Attributes:
        what: Its name.
        row: Columns to be written; the others are those of a good pipeline.
        place: What the answer names; nothing if it is stored.
        sql_place: What the refusal of the database names; ``""`` where it can't know the place, ``None`` where only Python
            can hold the input, which is then tried on no path but the hook's. By default as ``place``.
        stored: The columns that come back otherwise than they were given.
        warning: Code of the finding that the validator has.
    """

    what: str
    row: Row
    place: str | None = None
    sql_place: str | None = "as place"
    stored: Row = field(default_factory=dict)
    warning: str | None = None


@dataclass(frozen=True)
class Call:
    """What is no row of a table: a function that shows the answer."""

    show: Callable[[Stage], None]

    @property
    def what(self) -> str:
        return self.show.__name__.replace("_", " ")


def nested(levels: int) -> Any:
    value: Any = 1
    for at in range(levels):
        value = [value] if at % 2 else {"x": value}
    return value


def with_node(*nodes: Any, **changes: Any) -> Row:
    """A trigger, and what is to be looked at."""
    return {"nodes": [TRIGGER, *(nodes or [AGENT | changes])], "edges": []}


def with_config(value: Any, key: str = "k") -> Row:
    return with_node(config={**AGENT["config"], key: value})


def with_edges(*edges: Any) -> Row:
    return {"nodes": GOOD[0], "edges": [*edges]}


def of_kind(kind: str, config: dict[str, Any]) -> Row:
    return with_node({"id": "x", "type": kind, "name": "X", "config": config}) | {"status": "active"}


AT = "nodes[1]"
NODE, OTHER = {"id": "n", "type": "delay", "name": "N"}, {"id": "o", "type": "delay", "name": "O"}


# --- answers that are no row of the table of pipelines ----------------------------------------------------------------


@contextmanager
def no_recursion() -> Iterator[None]:
    """Little room for calls in calls: what recurses by the length of its input fails at once."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 60)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def large(*pairs: tuple[int, int]) -> Graph:
    nodes = [{"id": f"n{at}", "type": "delay", "name": "N"} for at in range(100_000)]
    return nodes, [{"id": f"e{at}", "from": f"n{a}", "to": f"n{b}"} for at, (a, b) in enumerate(pairs)]


def a_chain_of_100000(_stage: Stage) -> None:
    nodes, edges = large(*itertools.pairwise(range(100_000)))
    nodes.reverse()
    with no_recursion():
        definition = parse_pipeline_definition(nodes, edges)
        assert find_issues(definition) == []
        order = get_execution_order(definition)
    assert gc.isenabled()
    assert order == [f"n{at}" for at in range(100_000)]


def a_cycle_of_100000(_stage: Stage) -> None:
    nodes, edges = large(*itertools.pairwise([*range(100_000), 0]))
    with no_recursion():
        (issue,) = find_issues(parse_pipeline_definition(nodes, edges))
    assert issue.code == "cycle"
    assert "n0 -> n1 -> n2 -> n3 -> n4 -> ... (100000 nodes) ... -> " in issue.message
    assert issue.message.endswith("-> n99999 -> n0")


def more_than_the_limits(_stage: Stage) -> None:
    for limits, sentence in (
        (Limits(max_nodes=1), "Pipeline has 2 nodes, more than the limit of 1 nodes"),
        (Limits(max_edges=0), "Pipeline has 1 edges, more than the limit of 0 edges"),
        (Limits(max_bytes=100), "more than the limit of 100 bytes"),
    ):
        (issue,) = find_issues(parse_pipeline_definition(*GOOD), limits)
        assert issue.code == "too_large"
        assert sentence in issue.message


MANY = """INSERT INTO circle.pipelines (name, nodes, edges) SELECT 'many', {} FROM generate_series(1, {}) n"""


def more_than_the_limits_by_sql(stage: Stage) -> None:
    for graph, count, sentence in (
        (
            """jsonb_agg(jsonb_build_object('id', n::text, 'type', 'delay', 'name', 'N')), '[]'""",
            100_001,
            "Pipeline has 100001 nodes, more than the limit of 100000 nodes",
        ),
        (
            """'[{"id": "n", "type": "delay", "name": "N"}]', jsonb_agg(jsonb_build_object('id', n::text))""",
            1_000_001,
            "Pipeline has 1000001 edges, more than the limit of 1000000 edges",
        ),
    ):
        with pytest.raises(psycopg.Error, match=sentence) as refused:
            stage.raw.execute(MANY.format(graph, count).encode())
        assert isinstance(translate(refused.value), InvalidPipelineError)


def more_than_the_limits_by_an_object(stage: Stage) -> None:
    nodes = [NODE | {"id": str(at)} for at in range(100_001)]
    with Session(stage.engine) as session:
        session.add(Pipeline(name="many", nodes=nodes))
        with pytest.raises(InvalidPipelineError, match="100001 nodes, more than the limit of 100000 nodes"):
            session.flush()


def nested_too_deep_to_be_written_by_python(stage: Stage) -> None:
    deep = '[{"id": "n", "type": "delay", "name": "N", "k": ' + "[" * 1_500 + "]" * 1_500 + "}]"
    with pytest.raises(psycopg.Error, match="nested deeper than 64") as refused:
        stage.raw.execute("INSERT INTO circle.pipelines (name, nodes) VALUES ('deep', %s)", [deep])
    assert isinstance(translate(refused.value), InvalidPipelineError)


def one_key_twice_in_an_object(stage: Stage) -> None:
    stage.raw.execute("""UPDATE circle.pipelines SET edges = '[]',
        nodes = '[{"id": "n", "type": "delay", "name": "first", "name": "last"}]'""")
    assert contents(stage)[0]["nodes"] == [NODE | {"name": "last"}]


# --- the catalogue ----------------------------------------------------------------------------------------------------

IDS = {"empty": "", "blank": "\u3000 ", "blank before": "\x85n", "blank after": "n\n"}
LONG = {"node": "é" * 101, "edge": "é" * 1_001}
NO_IDS = {"a number": 1, "a float": 1.5, "a bool": True, "null": None, "a list": ["n"]}
NO_JSON = {
    "a Decimal": Decimal(1),
    "a UUID": UUID(int=1),
    "a datetime": datetime(2025, 1, 1, tzinfo=UTC),
    "a set": {1},
    "bytes": b"x",
}
NO_LISTS: dict[str, Any] = {"null": None, "text": "[]", "an object": {}}
INFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
EMPTY_CONFIG = {"agent_id": None, "task": None, "cron": None, "condition": None, "seconds": None}

CATALOGUE: dict[str, list[Case | Call | str]] = {
    "graph": [
        Case("two nodes with one id", with_node(TRIGGER), "Duplicate node id 't'"),
        Case("an edge to nowhere", with_edges(EDGE | {"to": "x"}), "Edge 'e' references unknown target node: 'x'"),
        Case("an edge from nowhere", with_edges(EDGE | {"from": "x"}), "Edge 'e' references unknown source node: 'x'"),
        Case("a self-edge", with_edges(EDGE, BACK | {"to": "a"}), "Pipeline contains a cycle: a -> a"),
        Case("a cycle", with_edges(EDGE, BACK), "Pipeline contains a cycle: "),
    ],
    "edges with one id, parallel edges": [
        Case("two edges with one id", with_edges(EDGE, EDGE), "Duplicate edge id 'e'"),
        Case("between the same nodes", with_edges(EDGE, EDGE | {"id": "f"}), warning="parallel_edges"),
    ],
    "next": [
        Case("of an unknown node", with_node(next=["nowhere"]), warning="unknown_next"),
        Case("that contradicts the edges", with_node(next=["t"]), warning="contradicting_next"),
        Case("that is no list", with_node(next="t"), f"{AT}.next"),
    ],
    "empty, padded and long ids": [
        *(Case(f"a node's id: {what}", with_node(id=name), f"{AT}.id") for what, name in IDS.items()),
        *(Case(f"an edge's id: {what}", with_edges(EDGE | {"id": name}), "edges[0].id") for what, name in IDS.items()),
        Case("a node's id: too long", with_node(id=LONG["node"]), f"{AT}.id"),
        Case("an edge's id: too long", with_edges(EDGE | {"id": LONG["edge"]}), "edges[0].id"),
        Case("100 characters", with_node(id="é" * 100), warning="orphan"),
        Case("1,000 characters of an edge's id", with_edges(EDGE | {"id": "é" * 1_000})),
    ],
    "ids that are no text": [
        *(Case(f"a node's id: {what}", with_node(id=name), f"{AT}.id") for what, name in NO_IDS.items()),
        *(
            Case(f"an edge's id: {what}", with_edges(EDGE | {"id": name}), "edges[0].id")
            for what, name in NO_IDS.items()
        ),
        *(Case(f"an end: {what}", with_edges(EDGE | {"from": name}), "edges[0].from") for what, name in NO_IDS.items()),
        Case("no id", with_node({"type": "delay", "name": "N"}), f"{AT}.id"),
        Case("agent_id is a number", of_kind("agent", {"agent_id": 7, "task": "t"}), warning="orphan"),
        Case("agent_id is a bool", of_kind("agent", {"agent_id": True, "task": "t"}), f"{AT}.config.agent_id"),
    ],
    "ids that look alike": [
        Case("in two normal forms", with_node(NODE | {"id": "é"}, NODE | {"id": "e\u0301"}), warning="similar_ids"),
        Case("by compatibility", with_node(NODE | {"id": "ﬁ"}, NODE | {"id": "fi"}), warning="similar_ids"),
        Case("by their case", with_node(NODE | {"id": "n"}, NODE | {"id": "N"}), warning="orphan"),
    ],
    "configuration that is missing": [
        *(
            Case(f"{key} {what}", of_kind(kind, config | value), f"{AT}.config.{key}")
            for kind, key, config in (
                ("agent", "agent_id", {"task": "t"}),
                ("agent", "task", {"agent_id": 7}),
                ("condition", "condition", {}),
            )
            for what, value in (("absent", {}), ("null", {key: None}), ("blank", {key: " \u2003"}))
            if what != "blank" or kind == "agent"
        ),
        Case("null keys of other types", with_node(TRIGGER | {"id": "x", "config": EMPTY_CONFIG})),
        Case("a blank condition", of_kind("condition", {"condition": " "}), warning="orphan"),
    ],
    "config null": [
        Case("null", with_node(config=None), f"{AT}.config"),
        Case("a list", with_node(config=[]), f"{AT}.config"),
        Case("absent", with_node(NODE), warning="orphan"),
    ],
    "from_node and to_node": [
        # SQL can't spell them anew
        Case(
            "instead of from and to",
            with_edges({"id": "e", "from_node": "t", "to_node": "a"}),
            sql_place="edges[0].from",
            stored={"edges": [EDGE]},
        ),
        Case("that contradict them", with_edges(EDGE | {"to_node": "t"}), "edges[0] has both to and to_node", None),
    ],
    "NUL and lone surrogates": [
        *(
            Case(f"{name} {where}", row, place, sql_place="")
            for name, bad in (("NUL", "a\0b"), ("a lone surrogate", "a\ud800b"))
            for where, row, place in (
                ("in a name", with_node(name=bad), f"{AT}.name"),
                ("in an id", with_node(id=bad), f"{AT}.id"),
                ("in a value", with_config({"deep": [bad]}), f"{AT}.config.k.deep[0]"),
                ("in a key", with_config(1, bad), f"{AT}.config"),
                ("in an unknown key", with_node(mine=bad), f"{AT}.mine"),
                ("in a condition", with_edges(EDGE | {"condition": bad}), "edges[0].condition"),
            )
        ),
        *(Case(f"in the {key}", {key: "a\0b"}, key, None) for key in ("name", "description")),
        Case("a lone surrogate in the name", {"name": "\ud800"}, "name", None),
        "tests/runs/test_arguments.py::test_call_with_unstorable_json_names_the_place",
        "tests/runs/test_arguments.py::test_call_with_text_of_wrong_type_or_content_raises_invalid_data",
        "tests/graphs/test_orm_json.py::test_insert_run_with_unstorable_json_sends_no_sql",
    ],
    "NaN, Infinity, numbers too large": [
        *(Case(f"{what} in a config", with_config(value), f"{AT}.config.k", "") for what, value in INFINITE.items()),
        *(
            Case(f"{what} in {key}", {key: value}, key, "ck_pipelines")
            for what, value in INFINITE.items()
            for key in ("retry_backoff_base", "retry_backoff_max")
        ),
        Case("10 ** 5000", with_config(10**5000), f"{AT}.config.k", None),
        Case("10 ** 400", with_config([10**400]), f"{AT}.config.k[0]", "a number too large for a float"),
        Case("-10 ** 400 in an edge", with_edges(EDGE | {"k": -(10**400)}), "edges[0].k", "a number too large"),
        Case("the largest float", with_config([1.7976931348623157e308, -(10**308)]), warning="orphan"),
    ],
    "what is no JSON": [
        *(Case(f"{what} in a config", with_config(value), f"{AT}.config.k", None) for what, value in NO_JSON.items()),
        *(Case(f"{what} in an unknown key", with_node(mine=[v]), f"{AT}.mine[0]", None) for what, v in NO_JSON.items()),
        "tests/runs/test_arguments.py::test_call_with_unstorable_json_names_the_place",
        "tests/graphs/test_orm_json.py::test_insert_run_with_unstorable_json_sends_no_sql",
    ],
    "keys that are no text": [
        Case("next to the same as text", with_config({1: "a", "1": "b"}), f"{AT}.config.k has a key that", None),
        Case("null", with_node(mine={None: 1}), f"{AT}.mine has a key that", None),
        "tests/runs/test_arguments.py::test_call_with_unstorable_json_names_the_place",
    ],
    "nested too deep": [
        Case("65 levels of nodes", with_config(nested(62)), f"{AT}.config.k", "is nested deeper than 64"),
        Case("65 levels of edges", with_edges(EDGE | {"k": nested(63)}), "edges[0].k", "is nested deeper than 64"),
        Case("200 levels", with_node(mine=nested(200)), f"{AT}.mine", "is nested deeper than 64"),
        Case("1,500 levels", with_config(nested(1_500)), f"{AT}.config.k", None),
        Call(nested_too_deep_to_be_written_by_python),
        Case("64 levels", with_config(nested(61)), warning="orphan"),
        "tests/runs/test_arguments.py::test_call_with_unstorable_json_names_the_place",
    ],
    "100,000 nodes": [Call(a_chain_of_100000), Call(a_cycle_of_100000)],
    "limits": [Call(more_than_the_limits), Call(more_than_the_limits_by_an_object), Call(more_than_the_limits_by_sql)],
    "nodes and edges that are no lists": [
        *(Case(f"nodes: {what}", {"nodes": value}, "nodes", "nodes") for what, value in NO_LISTS.items()),
        *(Case(f"edges: {what}", {"edges": value}, "edges", "edges") for what, value in NO_LISTS.items()),
        Case("a tuple", {"nodes": (TRIGGER,)}, "nodes", None),
        Case("an expression", {"nodes": text("'[]'::jsonb")}, "nodes", None),
        Case("a function", {"nodes": func.jsonb_build_array()}, "nodes", None),
        Case("SQL's null", {"edges": null()}, "edges", None),
        Case("a subquery", {"edges": select(Pipeline.edges).scalar_subquery()}, "edges", None),
        *(Case(f"a node: {what}", with_node(value), AT) for what, value in (*NO_IDS.items(), ("text", "n"))),
        *(Case(f"an edge: {what}", with_edges(value), "edges[0]") for what, value in (*NO_IDS.items(), ("text", "e"))),
        Case("an unknown type", with_node(type="robot"), AT),
        Case("no type", with_node({"id": "n", "name": "N"}), AT),
    ],
    "status": [
        *(Case(str(value), {"status": value}, "status") for value in (None, "archived", "ACTIVE", "")),
        *(Case(value, {"status": value}) for value in ("active", "paused", "draft")),
    ],
    "timestamps": [
        Case("naive", {"last_run": datetime(2025, 1, 1)}, "last_run", None),  # noqa: DTZ001 - that is the point
        *(Case(f"infinity in {key}", {key: "infinity"}, key, "ck_pipelines") for key in ("last_run", "created_at")),
        Case("-infinity", {"updated_at": "-infinity"}, "updated_at", "ck_pipelines"),
        Case("with a time zone", {"last_run": datetime(2025, 1, 1, tzinfo=UTC)}),
    ],
    "negative numbers": [
        *(
            Case(f"{value} in {key}", {key: value}, key, "ck_pipelines")
            for key, values in (
                ("timeout_seconds", (-1,)),
                ("max_retries_per_node", (-1,)),
                ("retry_backoff_base", (-0.5, 1e9)),
                ("retry_backoff_max", (-1,)),
                ("run_count", (-1,)),
            )
            for value in values
        ),
        Case("a timeout that no INTEGER holds", {"timeout_seconds": 2**31}, "timeout_seconds", ""),
        *(Case(f"null in {key}", {key: None}, key) for key in ("max_retries_per_node", "retry_backoff_base")),
        *(
            Case(f"a delay of {value!r}", of_kind("delay", {"seconds": value}), f"{AT}.config.seconds")
            for value in (-1, -0.5, "5", True, [5])
        ),
        Case("a delay of NaN", of_kind("delay", {"seconds": math.nan}), f"{AT}.config.seconds", ""),
        Case("0 is a value", {"timeout_seconds": 0, "max_retries_per_node": 0, "retry_backoff_base": 0.0}),
        Case("no timeout", {"timeout_seconds": None}),
        Case("no delay", of_kind("delay", {"seconds": 0}), warning="orphan"),
    ],
    "edits in place": [
        "tests/graphs/test_orm_objects.py::test_edit_in_place_is_detected_and_checked",
    ],
    "every path": ["tests/graphs/test_orm_updates.py::test_update_half_a_graph_that_does_not_fit_is_refused"],
    "runs that can't be": [
        "tests/runs/test_create.py::test_create_inactive_pipeline_raises_inactive",
        "tests/runs/test_create.py::test_create_broken_graph_raises_invalid_pipeline",
        "tests/runs/test_create.py::test_create_missing_pipeline_raises_not_found",
    ],
    "results and transitions that don't fit": [
        "tests/runs/test_record.py::test_record_with_one_bad_result_records_none",
        "tests/runs/test_leases.py::test_write_with_stale_token_raises_lease_lost",
        "tests/lifecycle/test_transition_matrix.py::test_run_call_from_each_status_follows_the_table",
        "tests/runs/test_arguments.py::test_call_on_missing_run_or_node_raises_not_found",
    ],
    "servers that can't be used": [
        "tests/database/test_connections.py::test_connect_without_server_raises_unavailable",
        "tests/database/test_connections.py::test_connect_to_missing_database_raises_configuration",
        "tests/database/test_connections.py::test_connect_with_wrong_password_raises_configuration",
        "tests/database/test_connections.py::test_connect_to_other_encoding_raises_configuration",
        "tests/database/test_connections.py::test_connect_to_old_server_raises_configuration",
    ],
    "schemas that are others": [
        "tests/database/test_upgrade.py::test_upgrade_empty_database_passes_check",
        "tests/migrations/test_adoption.py::test_upgrade_different_tables_raises_adoption_error",
    ],
    "documented, not refused": [
        Call(one_key_twice_in_an_object),
        Case("a tuple", with_config((1, (2,))), stored=with_config([1, [2]]), warning="orphan"),
        Case("-0.0", with_config(-0.0), stored=with_config(0.0), warning="orphan"),
    ],
}
"""By the rows of the specification's table, in its order. A text names a test that shows the answer elsewhere."""

SPECIFIED = [
    *("graph", "edges with one id, parallel edges", "next", "empty, padded and long ids", "ids that are no text"),
    *("ids that look alike", "configuration that is missing", "config null", "from_node and to_node"),
    *("NUL and lone surrogates", "NaN, Infinity, numbers too large", "what is no JSON", "keys that are no text"),
    *("nested too deep", "100,000 nodes", "limits", "nodes and edges that are no lists", "status", "timestamps"),
    *(
        "negative numbers",
        "edits in place",
        "every path",
        "runs that can't be",
        "results and transitions that don't fit",
    ),
    *("servers that can't be used", "schemas that are others", "documented, not refused"),
]


def test_catalogue_covers_each_specified_row() -> None:
    assert [*CATALOGUE] == SPECIFIED
    for row, answers in CATALOGUE.items():
        assert answers, row
        for elsewhere in answers:
            if isinstance(elsewhere, str):
                path, _, name = elsewhere.partition("::")
                assert f"\ndef {name}(" in (schema.ROOT / path).read_text(encoding="utf-8"), elsewhere
    sql_paths = {*INSERTING, *UPDATING, *(path.__name__ for path in (*INSERTS, *UPDATES))}
    assert {"bulk_save_objects", "COPY", "MERGE", "ON CONFLICT", "psql", "Core", "insert_many", "by_where"} <= sql_paths


@pytest.fixture(scope="module")
def only_stage(module_database_url: str) -> Iterator[Stage]:
    engine = create_engine(module_database_url)
    with servers.connect(module_database_url) as raw:
        yield Stage(module_database_url, engine, raw)
    engine.dispose()


@pytest.fixture
def stage(only_stage: Stage) -> Stage:
    """A database with one good pipeline, a draft."""
    clear(only_stage)
    return only_stage


@pytest.fixture(scope="module")
def sql_paths(only_stage: Stage) -> Iterator[dict[str, tuple[int, Write]]]:
    """The paths that only the database guards, and the id of the row that each of them writes."""
    with ExitStack() as opened:
        yield {
            f"{name} of id {pipeline_id}": (pipeline_id, opened.enter_context(path(only_stage)))
            for pipeline_id, some in ((2, INSERTING), (1, UPDATING))
            for name, path in some.items()
            if name not in BY_HOOK
        }


def clear(stage: Stage) -> None:
    databases.delete_rows(stage.raw)
    stage.raw.execute(
        """INSERT INTO circle.pipelines (name, created_at, updated_at, nodes, edges)
            VALUES ('there before', '2025-01-01Z', '2025-01-01Z', %s, %s)""",
        [*map(json.dumps, GOOD)],
    )


def contents(stage: Stage) -> list[Row]:
    return [
        row[0]
        for row in stage.raw.execute("SELECT to_jsonb(p) - 'status_changed_at' FROM circle.pipelines p ORDER BY id")
    ]


def written(stage: Stage, columns: Row) -> Row:
    """These columns of the row that was written: the newest, or the only one."""
    statement = f"SELECT {', '.join(columns)} FROM circle.pipelines ORDER BY id DESC LIMIT 1"
    row = stage.raw.execute(statement.encode()).fetchone()
    assert row is not None
    return dict(zip(columns, row, strict=True))


def comparable(row: Row) -> Any:
    """JSONB writes large floats as integers, and knows no negative zero."""
    return json.loads(json.dumps(row, default=datetime.isoformat), parse_int=float)


def validated(row: Row) -> None:
    errors = [i for i in find_issues(parse_pipeline_definition(row["nodes"], row["edges"])) if i.severity == "error"]
    if errors:
        raise InvalidPipelineError(errors)


def by_python(stage: Stage, case: Case) -> dict[str, Callable[[Session], object]]:
    """The paths on which Python answers, before SQL is sent."""
    whole: Row = {"name": "p", "nodes": GOOD[0], "edges": GOOD[1]} | case.row

    def insert(write: Callable[..., None]) -> Callable[[Session], object]:
        return lambda session: write(session, copied(whole))

    def change(write: Callable[..., None]) -> Callable[[Session], object]:
        return lambda session: write(session, 1, copied(case.row))

    ways = {f"{write.__name__} (new)": insert(write) for write in INSERTS}
    ways |= {f"{write.__name__} (change)": change(write) for write in UPDATES}
    if case.row.keys() <= PipelineCreate.model_fields.keys():
        ways |= {
            "repository's create": lambda s: PipelineRepository(s).create(PipelineCreate(**copied(whole))),
            "repository's update": lambda s: PipelineRepository(s).update(1, PipelineUpdate(**copied(case.row))),
        }
    return ways


def copied(row: Row) -> Row:
    return {key: [*value] if isinstance(value, list) else value for key, value in row.items()}


CASES = [
    pytest.param(answer, id=f"{row}: {answer.what}")
    for row, answers in CATALOGUE.items()
    for answer in answers
    if isinstance(answer, Case | Call)
]


@pytest.mark.parametrize("case", CASES)
def test_bad_input_on_each_path_is_refused_or_returned_as_given(
    case: Case | Call, stage: Stage, sql_paths: dict[str, tuple[int, Write]], subtests: pytest.Subtests
) -> None:
    if isinstance(case, Call):
        case.show(stage)
        return
    whole: Row = {"name": "p", "nodes": GOOD[0], "edges": GOOD[1]} | case.row
    if {"nodes", "edges"} & case.row.keys():
        with subtests.test("the validator"):
            if case.place is None:
                found = find_issues(parse_pipeline_definition(whole["nodes"], whole["edges"]))
                assert {issue.severity for issue in found} <= {"warning"}
                assert case.warning in {issue.code for issue in found} or (case.warning is None and not found)
            elif "both" not in case.place:
                with pytest.raises(InvalidPipelineError, match=re.escape(case.place)):
                    validated(whole)
    before = contents(stage)
    for path, write in by_python(stage, case).items():
        with subtests.test(path):
            if case.place is None:
                with Session(stage.engine) as session, session.begin():
                    write(session)
                assert comparable(written(stage, case.row)) == comparable(case.row | case.stored)
                clear(stage)
            else:
                with Session(stage.engine) as session, pytest.raises((PipelineError, ValidationError)) as refused:
                    write(session)
                    session.commit()
                assert case.place in str(refused.value)
                assert len(str(refused.value)) < 2_000
                assert contents(stage) == before
    named = case.place if case.sql_place == "as place" else case.sql_place
    if case.place is not None and named is None:
        return
    for path, (pipeline_id, store) in sql_paths.items():
        with subtests.test(path):
            error = refusal(store, [{"id": pipeline_id, **whole}])
            if named and path.startswith("bulk") and error is None and None in case.row.values():  # "left out" for it
                assert None not in written(stage, case.row).values()
                clear(stage)
                continue
            if named is None:
                assert error is None
                assert comparable(written(stage, case.row)) == comparable(case.row | case.stored)
                clear(stage)
                continue
            assert error is not None
            assert contents(stage) == before
            if isinstance(error, RefusedByPsqlError):
                assert sqlstate(error).startswith(("PL008", "22", "23"))
            else:
                typed = translate(error) if isinstance(error, psycopg.Error) else error
                assert isinstance(typed, PipelineError)
                assert named in str(typed)
