"""What a user writes, as mypy and pyright see it: each result has the type that its name promises.

Nothing here is run. Both checkers report an ``assert_type`` that doesn't hold, and a ``type: ignore`` without need.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal, assert_type

from sqlalchemy import Engine, MetaData, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from gathering_pipeline import (
    AsyncEventRepository,
    AsyncPipelineRepository,
    AsyncRunRepository,
    ClaimedRun,
    Database,
    Databases,
    DatabaseSettings,
    EventPage,
    EventRepository,
    EventType,
    Explanation,
    HistoryEntry,
    InvalidPipelineError,
    Issue,
    IssueCode,
    NodeContext,
    NodeExecutionResult,
    NodeResult,
    NodeRunRead,
    NodeState,
    NodeStatus,
    Page,
    Pipeline,
    PipelineCreate,
    PipelineDefinition,
    PipelineEdge,
    PipelineEvent,
    PipelineNode,
    PipelineRead,
    PipelineRepository,
    PipelineRun,
    PipelineStatus,
    PipelineUpdate,
    ReasonCode,
    RunRead,
    RunRepository,
    RunStatistics,
    RunStatus,
    RunSummary,
    StartedNode,
    Step,
    SweepResult,
    Worker,
    find_issues,
    get_execution_order,
    metadata,
    parse_pipeline_definition,
    untaken_successors,
    validate_pipeline_dag,
)


def graphs() -> None:
    definition = parse_pipeline_definition([{"id": "a", "type": "trigger", "name": "A"}], [])
    assert_type(definition, PipelineDefinition)
    assert_type(validate_pipeline_dag(definition), list[str])
    assert_type(get_execution_order(definition), list[str])
    assert_type(untaken_successors(definition, "a", True), list[str])
    issues = find_issues(definition)
    assert_type(issues, list[Issue])
    assert_type(issues[0].code, IssueCode)
    assert_type(issues[0].code.severity, Literal["error", "warning"])
    assert_type(issues[0].loc, tuple[str | int, ...])
    assert_type(definition.nodes, list[PipelineNode])
    assert_type(definition.node_map, dict[str, PipelineNode])
    assert_type(definition.edges[0].from_node, str)
    PipelineNode(id="b", type="agent", name="Run", config={})
    PipelineNode(id="b", type="robot", name="Run")  # pyright: ignore[reportArgumentType]
    PipelineEdge(id="e", from_node="a", to_node="b")
    result = NodeExecutionResult(node_id="a", status="completed", output={"a": 1})
    assert_type(result.output, dict[str, Any] | None)
    wire: str = EventType.PIPELINE_RUN_STARTED
    assert_type(EventType(wire), EventType)


def pipelines(session: Session) -> None:
    repository = PipelineRepository(session)
    assert_type(repository.create(PipelineCreate(name="p")), PipelineRead)
    assert_type(repository.create(PipelineCreate(name="p"), allow_incomplete=True), PipelineRead)
    read = repository.get(1)
    assert_type(read, PipelineRead)
    assert_type(read.status, PipelineStatus)
    assert_type(read.definition, PipelineDefinition)
    assert_type(read.last_run, datetime | None)
    page = repository.search(status=PipelineStatus.ACTIVE, name="x", after=None, limit=10)
    assert_type(page, Page[PipelineRead])
    assert_type(page.items, tuple[PipelineRead, ...])
    assert_type(page.next_cursor, int | None)
    assert_type(repository.update(1, PipelineUpdate(name="q"), expected_revision=2), PipelineRead)
    assert_type(repository.activate(1), PipelineRead)
    assert_type(repository.pause(1), PipelineRead)
    repository.delete(1, force=True)
    repository.get("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    repository.create(PipelineCreate(name="p"), True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    try:
        repository.activate(1)
    except InvalidPipelineError as error:
        assert_type(error.issues, tuple[Issue, ...])


def runs(session: Session) -> None:
    repository = RunRepository(session)
    run = repository.create(1, {"by": "x"}, idempotency_key="k")
    assert_type(run, RunRead)
    assert_type(run.status, RunStatus)
    assert_type(repository.start(1, token=None), RunRead)
    assert_type(repository.finish(1), RunRead)
    assert_type(repository.cancel(1, "enough"), RunRead)
    node = repository.start_node(1, "a", {"in": 1}, token=3)
    assert_type(node, NodeState)
    assert_type(node.attempt, int)
    assert_type(node.status, NodeStatus)
    assert_type(repository.complete_node(1, "a", output=[1]), NodeState)
    repository.complete_node(1, "a", branch=True)
    repository.complete_node(1, "a", branch="low")
    repository.complete_node(1, "a", branch=1.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert_type(NodeResult(node_id="a", status="completed", branch=False).branch, bool | str | None)
    assert_type(repository.fail_node(1, "a", "boom", retryable=False), NodeState)
    assert_type(repository.advance(1, [NodeExecutionResult(node_id="a", status="failed")]), Step)
    assert_type(repository.advance(1).started, tuple[StartedNode, ...])
    assert_type(repository.claim("w", timedelta(minutes=1), limit=3), list[ClaimedRun])
    assert_type(repository.heartbeat(1, timedelta(minutes=1), token=2), datetime)
    assert_type(repository.nodes(1), list[NodeRunRead])
    assert_type(repository.search(pipeline_id=1), Page[RunSummary])
    assert_type(repository.definition(1), PipelineDefinition)
    assert_type(repository.explain(1), Explanation)
    assert_type(repository.stuck(timedelta(hours=1)), list[RunSummary])
    assert_type(repository.explain(1).reasons[0].code, ReasonCode)
    assert_type(repository.explain(1).history, tuple[HistoryEntry, ...])
    assert_type(repository.counts(), dict[RunStatus, int])
    assert_type(repository.statistics(1), RunStatistics)
    assert_type(repository.purge(timedelta(days=30)).deleted, int)
    repository.record(1, [{"node_id": "a", "status": "completed"}])
    repository.claim("w", 60)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def keyword_only(session: Session) -> None:
    """Tokens and idempotency keys: by position they would be mistaken for each other, and for data."""
    repository = RunRepository(session)
    repository.create(1, {}, "key")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    repository.start(1, 2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    repository.complete(1, 2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    repository.finish(1, 2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    repository.fail(1, "boom", 2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    repository.append_log(1, {}, 2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    repository.start_node(1, "a", None, 2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    repository.complete_node(1, "a", None, 2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    repository.skip_node(1, "a", 2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    repository.fail_node(1, "a", "boom", True, 2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    repository.advance(1, [], 2)  # type: ignore[call-arg, arg-type]  # pyright: ignore[reportCallIssue]
    repository.record(1, [], 2)  # type: ignore[call-arg, arg-type]  # pyright: ignore[reportCallIssue]
    repository.heartbeat(1, timedelta(minutes=1), 2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    repository.release(1, 2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def events(session: Session, database: Database) -> None:
    repository = EventRepository(session)
    page = repository.read(after=None, limit=10, run_id=1)
    assert_type(page, EventPage)
    assert_type(page.items, tuple[PipelineEvent, ...])
    assert_type(page.next_cursor, str)
    assert_type(repository.last(), str)
    assert_type(repository.is_over(1, page.next_cursor), bool)
    assert_type(repository.purge(timedelta(days=30)), int)
    for event in database.listen(1, after=page.next_cursor, poll=timedelta(seconds=1)):
        assert_type(event, PipelineEvent)
        assert_type(event.type, EventType)
        assert_type(event.ends_run, bool)


async def async_events(session: AsyncSession, database: Database) -> None:
    assert_type(await AsyncEventRepository(session).read("x"), EventPage)
    async for event in database.alisten():
        assert_type(event.cursor, str)


async def async_pipelines(session: AsyncSession) -> None:
    repository = AsyncPipelineRepository(session)
    assert_type(await repository.create(PipelineCreate(name="p"), allow_incomplete=True), PipelineRead)
    assert_type(await repository.get(1), PipelineRead)
    assert_type(await repository.search(status=PipelineStatus.DRAFT, limit=3), Page[PipelineRead])
    assert_type(await repository.update(1, PipelineUpdate(), expected_revision=1), PipelineRead)
    assert_type(await repository.activate(1), PipelineRead)
    await repository.delete(1, force=True)
    await repository.get("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await repository.get()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await repository.search(state="x")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


async def async_runs(session: AsyncSession) -> None:
    repository = AsyncRunRepository(session)
    assert_type(await repository.create(1, idempotency_key="k"), RunRead)
    assert_type(await repository.start_node(1, "a", token=3), NodeState)
    assert_type(await repository.advance(1), Step)
    assert_type(await repository.claim("w", timedelta(minutes=1)), list[ClaimedRun])
    assert_type(await repository.heartbeat(1, timedelta(minutes=1), token=2), datetime)
    assert_type(await repository.search(status=RunStatus.FAILED), Page[RunSummary])
    assert_type(await repository.counts(), dict[RunStatus, int])
    assert_type((await repository.purge(timedelta(days=1), limit=5)).kept, tuple[int, ...])
    await repository.create(1, {}, "key")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await repository.start_node(1, "a", None, 3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await repository.advance(1, [], 3)  # type: ignore[call-arg, arg-type]  # pyright: ignore[reportCallIssue]
    await repository.heartbeat(1, timedelta(minutes=1), 2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await repository.release(1, 2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def orm(session: Session) -> None:
    pipeline = Pipeline(name="p", nodes=[{"id": "a", "type": "trigger", "name": "A"}], allow_incomplete=True)
    assert_type(pipeline.id, int)
    assert_type(pipeline.definition, PipelineDefinition)
    pipeline.definition = PipelineDefinition(nodes=[], edges=[])
    pipeline.nodes.append({"id": "b"})
    session.add(pipeline)
    assert_type(session.scalars(select(Pipeline)).all(), Sequence[Pipeline])
    assert_type(session.scalars(select(PipelineRun.status)).one(), str)
    run = session.get_one(PipelineRun, 1)
    assert_type(run.pipeline.runs, list[PipelineRun])
    assert_type(run.node_runs[0].run, PipelineRun)
    session.execute(insert(Pipeline), [{"name": "p"}])
    session.execute(update(Pipeline).where(Pipeline.id == 1).values(status="paused"))
    assert_type(metadata, MetaData)


async def call_agent(context: NodeContext) -> dict[str, Any]:
    assert_type(context.run, RunRead)
    assert_type(context.node, PipelineNode)
    assert_type(context.config, dict[str, Any])
    assert_type(context.attempt, int)
    assert_type(context.cancelled.is_set(), bool)
    await context.cancelled.wait_async()
    return {}


def decide(_context: NodeContext) -> bool:
    return True


async def workers(database: Database, many: Databases) -> None:
    handlers = {"agent": call_agent, "condition": decide, "action": lambda _: None}
    worker = Worker(database, handlers, concurrency=2, lease=timedelta(seconds=5), pipelines=[1], partial=True)
    await worker.run(once=True)
    worker.stop()
    Worker(many, {"agent": call_agent}, partial=True).main()
    Worker(database, {"agent": 1})  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType]


def databases() -> None:
    with Database("postgresql://u:p@h/d", settings=DatabaseSettings(pool_size=3)) as database:
        database.upgrade()
        database.check()
        with database.session() as session, database.session(autocommit=True) as fast:
            assert_type(session, Session)
            assert_type(fast, Session)
        with sessionmaker(database.engine).begin() as own:
            pipelines(own)


def many_databases(engine: Engine) -> None:
    with Databases({"a": "postgresql://u:p@h/a"}, longest_pause=timedelta(seconds=1)) as databases:
        assert_type(databases["a"], Database)
        assert_type(databases.claim("w", timedelta(minutes=1), limit=3), list[tuple[str, ClaimedRun]])
        assert_type(databases.recover().runs, tuple[tuple[str, RunRead], ...])
        assert_type(databases.expire().failed, Mapping[str, Exception])
        for name, event in databases.listen({"a": "cursor"}):
            assert_type(name, str)
            assert_type(event, PipelineEvent)
    with Database(engine=engine, read_url="postgresql://u:p@standby/d").reading() as session:
        assert_type(session, Session)


async def async_databases() -> None:
    async with Database() as database:
        async with database.async_session(autocommit=True) as session:
            assert_type(session, AsyncSession)
        async with async_sessionmaker(database.async_engine).begin() as own:
            await async_pipelines(own)
        async with database.areading() as session:
            assert_type(session, AsyncSession)
    async with Databases({"a": "postgresql://u:p@h/a"}) as databases:
        assert_type(await databases.aclaim("w", timedelta(minutes=1)), list[tuple[str, ClaimedRun]])
        assert_type(await databases.arecover(), SweepResult)
        async for name, event in databases.alisten():
            assert_type((name, event), tuple[str, PipelineEvent])
