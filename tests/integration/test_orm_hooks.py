"""The validator as pre-insert and pre-update hook, by every way of SQLAlchemy on which it can be one."""

# pyright: reportArgumentType=false, reportCallIssue=false
# psycopg wants literal SQL; this file puts some of its own together.

import asyncio
import copy
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from sqlalchemy import (
    Engine,
    Result,
    bindparam,
    create_engine,
    event,
    func,
    insert,
    literal,
    select,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool

from gathering_pipeline import (
    Database,
    InvalidDataError,
    InvalidPipelineError,
    Pipeline,
    PipelineDefinition,
    PipelineEdge,
    PipelineNode,
    PipelineNodeRun,
    PipelineRun,
)
from tests.servers import Server
from tests.servers import connect as open_connection

EMPTY = """DELETE FROM circle.pipelines; DELETE FROM circle.pipeline_version_nodes;
    SELECT setval('circle.pipelines_id_seq', 1, false), setval('circle.pipeline_runs_id_seq', 1, false)"""

Nodes = list[dict[str, Any]]

TRIGGER = {"id": "t", "type": "trigger", "name": "T", "config": {"cron": None}, "position": {"x": 50, "y": 100}}
AGENT = {"id": "a", "type": "agent", "name": "A", "config": {"agent_id": 7, "task": "review", "extra": [1]}}
UNFINISHED = {"id": "a", "type": "agent", "name": "A", "config": {}}
EDGE = {"id": "e", "from": "t", "to": "a"}
BACK = {"id": "back", "from": "a", "to": "t"}

GOOD: tuple[Nodes, Nodes] = ([TRIGGER, AGENT], [EDGE])
CYCLIC: tuple[Nodes, Nodes] = ([TRIGGER, AGENT], [EDGE, BACK])
DRAFT: tuple[Nodes, Nodes] = ([TRIGGER, UNFINISHED], [EDGE])

Run = Callable[..., Any]
"""Calls a function with a session, in its transaction, and further arguments."""


def values(graph: tuple[Nodes, Nodes] = GOOD, name: str = "p", **more: Any) -> dict[str, Any]:
    nodes, edges = copy.deepcopy(graph)
    return {"name": name, "nodes": nodes, "edges": edges, **more}


@pytest.fixture(scope="module")
def module_url(server: Server, template: str) -> Iterator[str]:
    name = server.create(template)
    yield server.database_url(name)
    server.drop(name)


@pytest.fixture
def database_url(module_url: str) -> Iterator[str]:
    """One database for all of these many tests, emptied after each."""
    yield module_url
    with open_connection(module_url) as connection:
        connection.execute(EMPTY)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    made = create_engine(database_url, poolclass=NullPool)
    yield made
    made.dispose()


@pytest.fixture(params=["Database", "own sessionmaker", "async Database", "own async_sessionmaker"])
def run(request: pytest.FixtureRequest, database: Database, engine: Engine, database_url: str) -> Run:
    """A session of each kind that a service may have."""

    def by_database(work: Callable[..., Any], *arguments: Any) -> Any:
        with database.session() as session:
            return work(session, *arguments)

    def by_sessionmaker(work: Callable[..., Any], *arguments: Any) -> Any:
        with sessionmaker(engine).begin() as session:
            return work(session, *arguments)

    def by_async_database(work: Callable[..., Any], *arguments: Any) -> Any:
        async def go() -> Any:
            async with database.async_session() as session:
                result = await session.run_sync(work, *arguments)
            await database.adispose()
            return result

        return asyncio.run(go())

    def by_async_sessionmaker(work: Callable[..., Any], *arguments: Any) -> Any:
        async def go() -> Any:
            own = create_async_engine(database_url, poolclass=NullPool)
            async with async_sessionmaker(own).begin() as session:
                result = await session.run_sync(work, *arguments)
            await own.dispose()
            return result

        return asyncio.run(go())

    return {
        "Database": by_database,
        "own sessionmaker": by_sessionmaker,
        "async Database": by_async_database,
        "own async_sessionmaker": by_async_sessionmaker,
    }[request.param]


def add(session: Session, *rows: dict[str, Any]) -> None:
    for row in rows:
        session.add(Pipeline(**row))
        session.flush()


def add_all(session: Session, *rows: dict[str, Any]) -> None:
    session.add_all([Pipeline(**row) for row in rows])
    session.flush()


def insert_many(session: Session, *rows: dict[str, Any]) -> None:
    session.execute(insert(Pipeline), list(rows))


def insert_one(session: Session, *rows: dict[str, Any]) -> None:
    for row in rows:
        session.execute(insert(Pipeline), row)


def insert_values(session: Session, *rows: dict[str, Any]) -> None:
    for row in rows:
        session.execute(insert(Pipeline).values(**row))


def insert_values_by_column(session: Session, *rows: dict[str, Any]) -> None:
    for row in rows:
        session.execute(insert(Pipeline).values({getattr(Pipeline, key): value for key, value in row.items()}))


def insert_multi_values(session: Session, *rows: dict[str, Any]) -> None:
    session.execute(insert(Pipeline).values(list(rows)))


def insert_returning(session: Session, *rows: dict[str, Any]) -> None:
    result: Result[Any] = session.execute(insert(Pipeline).returning(Pipeline), list(rows))
    assert [pipeline.name for pipeline in result.scalars()] == [row["name"] for row in rows]


def merge(session: Session, *rows: dict[str, Any]) -> None:
    for row in rows:
        session.merge(Pipeline(**row))
    session.flush()


INSERTS = [
    *(add, add_all, insert_many, insert_one, insert_values, insert_values_by_column, insert_multi_values),
    *(insert_returning, merge),
]
by_each_insert = pytest.mark.parametrize("write", INSERTS, ids=lambda write: write.__name__)


def stored(raw: psycopg.Connection) -> list[tuple[Any, ...]]:
    return raw.execute("SELECT name, nodes, edges FROM circle.pipelines ORDER BY id").fetchall()


# --- inserts ---------------------------------------------------------------------------------------------------------


@by_each_insert
def test_a_good_graph_is_stored_as_it_is(write: Any, run: Run, raw: psycopg.Connection) -> None:
    run(write, values(name="one"), values(name="two"))
    assert stored(raw) == [("one", *GOOD), ("two", *GOOD)]


@by_each_insert
def test_a_bad_graph_is_refused_with_every_issue_and_nothing_is_stored(
    write: Any, run: Run, raw: psycopg.Connection
) -> None:
    bad = values(CYCLIC, name="bad")
    bad["edges"].append({"id": "x", "from": "a", "to": "ghost"})
    with pytest.raises(InvalidPipelineError, match="cycle: t -> a -> t") as refused:
        run(write, values(name="good"), bad)
    assert {issue.code for issue in refused.value.issues} == {"cycle", "unknown_target"}
    assert stored(raw) == []


def test_it_is_refused_before_any_sql_is_sent(engine: Engine) -> None:
    sent: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        sent.append(statement)

    for write in INSERTS:
        with Session(engine) as session, pytest.raises(InvalidPipelineError):
            write(session, values(CYCLIC))
    assert [statement for statement in sent if "SELECT" not in statement] == []


def test_no_graph_is_no_pipeline(run: Run, raw: psycopg.Connection) -> None:
    for write in (add, insert_many, insert_values):
        with pytest.raises(InvalidPipelineError, match="at least one node"):
            run(write, {"name": "empty"})
    assert stored(raw) == []


def test_rows_of_one_statement_share_what_values_says(run: Run, raw: psycopg.Connection) -> None:
    graph = {"nodes": GOOD[0], "edges": GOOD[1]}
    run(lambda session: session.execute(insert(Pipeline).values(**graph), [{"name": "one"}, {"name": "two"}]))
    assert stored(raw) == [("one", *GOOD), ("two", *GOOD)]
    with pytest.raises(InvalidPipelineError, match="cycle"):
        run(
            lambda session: session.execute(
                insert(Pipeline).values(nodes=CYCLIC[0], edges=CYCLIC[1]), [{"name": "three"}, {"name": "four"}]
            )
        )
    assert len(stored(raw)) == 2


def test_the_same_statement_can_be_run_again(session: Session, raw: psycopg.Connection) -> None:
    one, many = insert(Pipeline).values(**values(name="one")), insert(Pipeline).values([values(name="many")])
    for statement in (one, many, one, many):
        session.execute(statement)
    session.commit()
    assert stored(raw) == [("one", *GOOD), ("many", *GOOD)] * 2


@by_each_insert
def test_pydantic_objects_are_accepted(write: Any, run: Run, raw: psycopg.Connection) -> None:
    definition = PipelineDefinition.from_json(*copy.deepcopy(GOOD))
    run(write, {"name": "p", "nodes": definition.nodes, "edges": definition.edges})
    run(write, {"name": "q", "nodes": [definition.nodes[0], AGENT], "edges": [EDGE]})
    assert stored(raw) == [("p", *GOOD), ("q", *GOOD)]


def test_edges_may_be_spelled_as_in_python(run: Run, raw: psycopg.Connection) -> None:
    edge = {"id": "e", "from_node": "t", "to_node": "a", "label": "kept"}
    for write in (add, insert_many, insert_multi_values):
        run(write, {"name": "p", "nodes": GOOD[0], "edges": [edge]})
    assert [row[2] for row in stored(raw)] == [[{"id": "e", "from": "t", "to": "a", "label": "kept"}]] * 3


# --- updates ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pipeline_id(raw: psycopg.Connection) -> int:
    row = raw.execute(
        "INSERT INTO circle.pipelines (name, nodes, edges) VALUES ('p', %s, %s) RETURNING id", [*map(json.dumps, GOOD)]
    ).fetchone()
    assert row is not None
    return int(row[0])


def by_attribute(session: Session, pipeline_id: int, row: dict[str, Any]) -> None:
    pipeline = session.get_one(Pipeline, pipeline_id)
    for key, value in row.items():
        setattr(pipeline, key, value)
    session.flush()


def by_where(session: Session, pipeline_id: int, row: dict[str, Any]) -> None:
    session.execute(update(Pipeline).where(Pipeline.id == pipeline_id).values(**row))


def by_column(session: Session, pipeline_id: int, row: dict[str, Any]) -> None:
    columns = {getattr(Pipeline, key): value for key, value in row.items()}
    session.execute(update(Pipeline).where(Pipeline.id == pipeline_id).values(columns))


def by_primary_key(session: Session, pipeline_id: int, row: dict[str, Any]) -> None:
    session.execute(update(Pipeline), [{"id": pipeline_id, **row}])


def by_parameters(session: Session, pipeline_id: int, row: dict[str, Any]) -> None:
    session.execute(update(Pipeline).where(Pipeline.id == pipeline_id), row)


def by_merge(session: Session, pipeline_id: int, row: dict[str, Any]) -> None:
    pipeline = session.get_one(Pipeline, pipeline_id)
    whole = {"name": pipeline.name, "nodes": list(pipeline.nodes), "edges": list(pipeline.edges)}
    session.merge(Pipeline(id=pipeline_id, **{**whole, **row}))
    session.flush()


UPDATES = [by_attribute, by_where, by_column, by_primary_key, by_parameters, by_merge]
by_each_update = pytest.mark.parametrize("write", UPDATES, ids=lambda write: write.__name__)


@by_each_update
def test_an_update_with_a_good_graph_is_stored(write: Any, run: Run, pipeline_id: int, raw: psycopg.Connection) -> None:
    run(write, pipeline_id, {"nodes": [TRIGGER], "edges": [], "name": "new"})
    assert stored(raw) == [("new", [TRIGGER], [])]


@by_each_update
def test_an_update_with_a_bad_graph_is_refused(write: Any, run: Run, pipeline_id: int, raw: psycopg.Connection) -> None:
    for bad, sentence in (
        ({"nodes": CYCLIC[0], "edges": CYCLIC[1]}, "cycle: t -> a -> t"),
        ({"nodes": DRAFT[0], "edges": DRAFT[1]}, "missing its agent_id"),
        ({"nodes": [], "edges": []}, "at least one node"),
    ):
        with pytest.raises(InvalidPipelineError, match=sentence):
            run(write, pipeline_id, bad)
    assert stored(raw) == [("p", *GOOD)]


@by_each_update
def test_half_a_graph_that_does_not_fit_the_other_half_is_refused(
    write: Any, run: Run, pipeline_id: int, raw: psycopg.Connection
) -> None:
    """By the hook where it sees the stored half, else by the database's compiler; in either case nothing is stored."""
    for bad in ({"nodes": [TRIGGER]}, {"edges": [EDGE, BACK]}):
        with pytest.raises((InvalidPipelineError, DBAPIError)) as refused:
            run(write, pipeline_id, bad)
        if isinstance(refused.value, DBAPIError):
            assert getattr(refused.value.orig, "sqlstate", None) == "PL008"
    assert stored(raw) == [("p", *GOOD)]


@by_each_update
def test_fields_of_an_update_are_checked(write: Any, run: Run, pipeline_id: int, raw: psycopg.Connection) -> None:
    for bad in ({"status": None}, {"status": "archived"}, {"name": ""}, {"retry_backoff_base": float("nan")}):
        with pytest.raises(InvalidPipelineError, match=next(iter(bad))):
            run(write, pipeline_id, bad)
    run(write, pipeline_id, {"status": "paused"})
    assert raw.execute("SELECT status, version FROM circle.pipelines").fetchall() == [("paused", 1)]


def test_bulk_updates_check_each_row(run: Run, raw: psycopg.Connection) -> None:
    run(insert_many, *(values(name=name) for name in "abc"))
    rows: list[dict[str, Any]] = [
        {"id": 1, "nodes": [TRIGGER], "edges": []},
        {"id": 2, "nodes": CYCLIC[0], "edges": CYCLIC[1]},
    ]
    with pytest.raises(InvalidPipelineError, match="cycle"):
        run(lambda session: session.execute(update(Pipeline), rows))
    assert stored(raw) == [(name, *GOOD) for name in "abc"]
    rows[1] = {"id": 3, "nodes": [TRIGGER], "edges": []}
    run(lambda session: session.execute(update(Pipeline), rows))
    assert stored(raw) == [("a", [TRIGGER], []), ("b", *GOOD), ("c", [TRIGGER], [])]


def test_updates_by_expressions_that_are_no_graph_go_through(
    run: Run, pipeline_id: int, raw: psycopg.Connection
) -> None:
    counted = {"run_count": Pipeline.run_count + 1, "last_run": func.now(), "description": func.upper(Pipeline.name)}
    run(lambda session: session.execute(update(Pipeline).values(counted)))
    row = raw.execute("SELECT run_count, last_run IS NOT NULL, description, version FROM circle.pipelines").fetchone()
    assert row == (1, True, "P", 1)


def test_an_object_that_did_not_change_is_not_written(run: Run, raw: psycopg.Connection, pipeline_id: int) -> None:
    raw.execute("ALTER TABLE circle.pipelines DISABLE TRIGGER ALL")
    raw.execute("UPDATE circle.pipelines SET edges = %s", [json.dumps(CYCLIC[1])])
    raw.execute("ALTER TABLE circle.pipelines ENABLE TRIGGER ALL")

    def work(session: Session) -> None:
        pipeline = session.get_one(Pipeline, pipeline_id)
        assert len(pipeline.edges) == 2
        pipeline.description = "the graph is broken, but not touched"

    run(work)
    assert raw.execute("SELECT description FROM circle.pipelines").fetchone() == (
        "the graph is broken, but not touched",
    )


# --- drafts ----------------------------------------------------------------------------------------------------------

INCOMPLETE = {"no nodes yet": ([], []), "missing config": DRAFT}
NEVER: dict[str, tuple[Any, Any]] = {
    "cycle": CYCLIC,
    "dangling edge": ([TRIGGER], [EDGE]),
    "duplicate id": ([TRIGGER, TRIGGER], []),
    "unknown type": ([{"id": "r", "type": "robot", "name": "R"}], []),
    "config of a wrong type": ([{"id": "d", "type": "delay", "name": "D", "config": {"seconds": -1}}], []),
    "config null": ([{"id": "d", "type": "delay", "name": "D", "config": None}], []),
}


@pytest.mark.parametrize("what", INCOMPLETE)
def test_drafts_are_stored_where_they_are_allowed(what: str, run: Run, raw: psycopg.Connection) -> None:
    graph = INCOMPLETE[what]
    allowed = {"allow_incomplete": True}
    run(lambda session: session.add(Pipeline(**values(graph), allow_incomplete=True)))
    run(lambda session: session.execute(insert(Pipeline), [values(graph)], execution_options=allowed))
    run(lambda session: session.execute(insert(Pipeline).values(values(graph)).execution_options(**allowed)))
    run(lambda session: session.execute(insert(Pipeline).values([values(graph)]), execution_options=allowed))
    assert stored(raw) == [("p", *graph)] * 4
    raw.execute("UPDATE circle.pipelines SET nodes = %s, edges = '[]'", [json.dumps([TRIGGER])])
    new = {"nodes": graph[0], "edges": graph[1]}
    run(lambda session: session.execute(update(Pipeline).values(new), execution_options=allowed))
    assert stored(raw) == [("p", *graph)] * 4


@pytest.mark.parametrize("what", INCOMPLETE)
def test_without_the_flag_they_are_refused(what: str, run: Run, raw: psycopg.Connection) -> None:
    for write in INSERTS:
        with pytest.raises(InvalidPipelineError):
            run(write, values(INCOMPLETE[what]))
    assert stored(raw) == []


@pytest.mark.parametrize("what", NEVER)
def test_some_errors_are_refused_always(what: str, run: Run, raw: psycopg.Connection) -> None:
    allowed = {"allow_incomplete": True}
    for work in (
        lambda session: session.add(Pipeline(**values(NEVER[what]), allow_incomplete=True)),
        lambda session: session.execute(insert(Pipeline), [values(NEVER[what])], execution_options=allowed),
    ):
        with pytest.raises(InvalidPipelineError):
            run(work)
    assert stored(raw) == []


@pytest.mark.parametrize("what", INCOMPLETE)
def test_an_incomplete_pipeline_is_not_made_active(what: str, run: Run, raw: psycopg.Connection) -> None:
    allowed = {"allow_incomplete": True}
    active = values(INCOMPLETE[what], status="active")
    for work in (
        lambda session: session.add(Pipeline(**active, allow_incomplete=True)),
        lambda session: session.execute(insert(Pipeline), [active], execution_options=allowed),
    ):
        with pytest.raises(InvalidPipelineError):
            run(work)
    run(lambda session: session.add(Pipeline(**values(INCOMPLETE[what]), allow_incomplete=True)))

    def activate(session: Session) -> None:
        session.get_one(Pipeline, 1).status = "active"

    with pytest.raises(InvalidPipelineError):
        run(activate)
    assert raw.execute("SELECT status FROM circle.pipelines").fetchall() == [("draft",)]


def test_a_draft_that_was_loaded_can_be_edited_as_one(run: Run, raw: psycopg.Connection) -> None:
    run(lambda session: session.add(Pipeline(**values(([], [])), allow_incomplete=True)))

    def edit(session: Session, *, allowed: bool) -> None:
        pipeline = session.get_one(Pipeline, 1)
        pipeline.allow_incomplete = allowed
        pipeline.nodes.append(UNFINISHED)

    with pytest.raises(InvalidPipelineError, match="missing its task"):
        run(lambda session: edit(session, allowed=False))
    run(lambda session: edit(session, allowed=True))
    assert stored(raw) == [("p", [UNFINISHED], [])]


# --- the lists and the definition ------------------------------------------------------------------------------------


def test_the_definition_reads_and_replaces_the_graph(session: Session, raw: psycopg.Connection) -> None:
    pipeline = Pipeline(**values())
    assert [node.id for node in pipeline.definition.nodes] == ["t", "a"]
    session.add(pipeline)
    session.commit()
    definition = pipeline.definition
    assert definition.node_map["a"].config["agent_id"] == 7
    assert pipeline.nodes == GOOD[0]
    definition.nodes.append(PipelineNode(id="d", type="delay", name="D"))
    definition.edges.append(PipelineEdge(id="f", from_node="a", to_node="d"))
    pipeline.definition = definition
    session.commit()
    session.refresh(pipeline)
    name, nodes, edges = stored(raw)[0]
    assert (name, nodes[:2], edges[:1]) == ("p", *GOOD)
    assert nodes[2] == {"id": "d", "type": "delay", "name": "D"}
    assert edges[1] == {"id": "f", "from": "a", "to": "d"}
    assert pipeline.version == 2
    assert pipeline.definition == definition


def test_a_new_object_takes_a_definition(session: Session, raw: psycopg.Connection) -> None:
    session.add(Pipeline(name="p", definition=PipelineDefinition.from_json(*copy.deepcopy(GOOD))))
    session.commit()
    assert stored(raw) == [("p", *GOOD)]


def test_edits_in_place_are_seen_and_checked(run: Run, raw: psycopg.Connection) -> None:
    def build(session: Session) -> None:
        pipeline = Pipeline(name="p")
        pipeline.nodes.append(TRIGGER)
        session.add(pipeline)
        session.flush()
        pipeline.nodes.append(AGENT)
        pipeline.edges.append(EDGE)

    run(build)
    assert stored(raw) == [("p", *GOOD)]

    def edit(session: Session) -> None:
        pipeline = session.get_one(Pipeline, 1)
        pipeline.edges.append(BACK)

    with pytest.raises(InvalidPipelineError, match="cycle"):
        run(edit)

    def other_edits(session: Session) -> None:
        pipeline = session.get_one(Pipeline, 1)
        del pipeline.edges[0]
        pipeline.nodes[1] = {**AGENT, "name": "renamed"}
        pipeline.nodes.extend([PipelineNode(id="d", type="delay", name="D")])
        pipeline.nodes.sort(key=lambda node: node["id"] if isinstance(node, dict) else node.id)

    run(other_edits)
    assert [node["id"] for node in stored(raw)[0][1]] == ["a", "d", "t"]
    assert stored(raw)[0][1][0]["name"] == "renamed"
    assert raw.execute(
        "SELECT version, (SELECT count(*) FROM circle.pipeline_versions) FROM circle.pipelines"
    ).fetchone() == (
        3,
        3,
    )


def test_what_is_stored_is_what_the_object_shows(session: Session) -> None:
    pipeline = Pipeline(name="p", nodes=[PipelineNode(id="t", type="trigger", name="T")], edges=[])
    session.add(pipeline)
    session.flush()
    assert pipeline.nodes == [{"id": "t", "type": "trigger", "name": "T"}]
    session.expire(pipeline)
    assert pipeline.nodes == [{"id": "t", "type": "trigger", "name": "T"}]


# --- rows as they are ------------------------------------------------------------------------------------------------

LEGACY: dict[str, tuple[Any, Any]] = {
    "cycle": CYCLIC,
    "dangling": ([TRIGGER], [EDGE]),
    "number for an id": ([{"id": 7, "type": "trigger", "name": "T"}], []),
    "items that are no objects": ([1, None, "x", [2]], ["e"]),
    "object": ({"t": TRIGGER}, {"e": 1}),
    "text": ("[]", "[]"),
    "JSON null": (None, None),
}


@pytest.fixture
def legacy(raw: psycopg.Connection) -> list[int]:
    """Pipelines whose graphs are broken, as they were before there was any guard."""
    raw.execute("SET session_replication_role = replica")
    raw.execute("ALTER TABLE circle.pipelines DISABLE TRIGGER ALL")
    for name, graph in LEGACY.items():
        raw.execute(
            "INSERT INTO circle.pipelines (name, nodes, edges) VALUES (%s, %s, %s)", [name, *map(json.dumps, graph)]
        )
    raw.execute("ALTER TABLE circle.pipelines ENABLE TRIGGER ALL")
    raw.execute("ALTER TABLE circle.pipelines ENABLE ALWAYS TRIGGER pipelines_before")
    raw.execute("RESET session_replication_role")
    return list(range(1, len(LEGACY) + 1))


def test_bad_rows_are_loaded_edited_and_mended(run: Run, legacy: list[int], raw: psycopg.Connection) -> None:
    def look(session: Session) -> None:
        for pipeline, (name, (nodes, _)) in zip(
            session.scalars(select(Pipeline).order_by(Pipeline.id)), LEGACY.items(), strict=True
        ):
            assert pipeline.name == name
            assert list(pipeline.nodes or []) == (
                nodes if isinstance(nodes, list) else [] if nodes is None else [nodes]
            )
            pipeline.description = "known to be broken"

    run(look)
    kept = [(name, *graph) for name, graph in LEGACY.items()]
    assert stored(raw) == kept

    def spoil(session: Session) -> None:
        session.get_one(Pipeline, 1).edges = [*CYCLIC[1], {"id": "more", "from": "t", "to": "a"}]

    with pytest.raises(InvalidPipelineError, match="cycle"):
        run(spoil)

    def mend(session: Session) -> None:
        for pipeline in session.scalars(select(Pipeline)):
            pipeline.nodes, pipeline.edges = copy.deepcopy(GOOD)

    run(mend)
    assert stored(raw) == [(name, *GOOD) for name in LEGACY]
    assert raw.execute("SELECT DISTINCT version FROM circle.pipelines").fetchall() == [(2,)]


def test_the_graph_of_a_bad_row_says_what_is_wrong_only_when_it_is_asked_for(
    session: Session, legacy: list[int]
) -> None:
    for pipeline in session.scalars(select(Pipeline).where(Pipeline.id > 2)):
        with pytest.raises(InvalidPipelineError):
            _ = pipeline.definition


# --- bad input -------------------------------------------------------------------------------------------------------

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
def test_good_fields_come_back(what: str, session: Session) -> None:
    pipeline = Pipeline(**values(**{"name": "p", **GOOD_FIELDS[what]}))
    session.add(pipeline)
    session.commit()
    session.refresh(pipeline)
    assert {key: getattr(pipeline, key) for key in GOOD_FIELDS[what]} == GOOD_FIELDS[what]


def test_json_comes_back_exactly(session: Session) -> None:
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


def test_a_float_without_a_fraction_comes_back_as_an_integer_when_it_is_large(session: Session) -> None:
    """JSONB holds decimal numbers, and writes none with an exponent."""
    session.add(Pipeline(name="p", nodes=[{**TRIGGER, "config": {"k": [1e16, 1e300]}}]))
    session.commit()
    session.expire_all()
    numbers = session.scalars(select(Pipeline)).one().nodes[0]["config"]["k"]
    assert list(map(float, numbers)) == [1e16, 1e300]


# --- what only looks like it -----------------------------------------------------------------------------------------


def test_statements_about_other_tables_and_reads_are_left_alone(session: Session, pipeline_id: int) -> None:
    session.execute(insert(PipelineRun).values(pipeline_id=pipeline_id, status="running"))
    session.execute(update(PipelineRun).values(current_node="t"))
    assert session.scalars(select(Pipeline.name)).all() == ["p"]
    assert session.execute(text("UPDATE circle.pipelines SET description = 'x' RETURNING id")).scalar() == pipeline_id


def test_a_bound_parameter_is_checked_as_well(session: Session, raw: psycopg.Connection) -> None:
    statement = insert(Pipeline).values(name=literal("p"), nodes=bindparam("graph"), edges=bindparam("more"))
    with pytest.raises((InvalidPipelineError, DBAPIError)):
        session.execute(statement, {"graph": CYCLIC[0], "more": CYCLIC[1]})
    session.rollback()
    assert stored(raw) == []


def test_the_hook_of_async_sessions_by_their_own_calls(database_url: str, raw: psycopg.Connection) -> None:
    async def go() -> None:
        engine = create_async_engine(database_url, poolclass=NullPool)
        async with AsyncSession(engine) as session:
            session.add(Pipeline(**values(CYCLIC)))
            with pytest.raises(InvalidPipelineError):
                await session.commit()
            await session.rollback()
            with pytest.raises(InvalidPipelineError):
                await session.execute(insert(Pipeline), [values(), values(CYCLIC)])
            with pytest.raises(InvalidPipelineError):
                await session.execute(update(Pipeline).values(nodes=[]))
            await session.execute(insert(Pipeline), [values(name="kept")])
            await session.commit()
        await engine.dispose()

    asyncio.run(go())
    assert stored(raw) == [("kept", *GOOD)]


# --- JSON of runs and node runs --------------------------------------------------------------------------------------

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
def test_json_of_runs_is_checked_before_it_is_sent(what: str, session: Session, pipeline_id: int) -> None:
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


def test_json_of_runs_comes_back(session: Session, pipeline_id: int) -> None:
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
