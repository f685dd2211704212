"""``db widen``: INTEGER ids of runs and node runs become BIGINT; tests/reliability/test_widening.py does it in use."""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from alembic import command
from click.testing import CliRunner
from sqlalchemy import select
from sqlalchemy.engine import make_url

from gathering_pipeline import (
    ConfigurationError,
    Database,
    DatabaseUnavailableError,
    PipelineNodeRun,
    PipelineRun,
    RunReport,
    RunRepository,
    SchemaRevisionError,
    TransactionConflictError,
    is_transient,
    migrations,
)
from gathering_pipeline.cli.commands import cli
from gathering_pipeline.maintenance.doctor import doctor
from gathering_pipeline.maintenance.widening import Widening, plan, widen
from tests.support import servers
from tests.support.databases import Connect, contents, scalar
from tests.support.runs import LEASE, done, store
from tests.support.schema import catalog

IDS = ("circle.pipeline_runs.id", "circle.pipeline_node_runs.id", "circle.pipeline_node_runs.run_id")
MOST = 2_147_483_647


@pytest.fixture
def narrow(narrow_url: str) -> Iterator[Database]:
    with Database(narrow_url) as database:
        yield database


@pytest.fixture
def narrow_raw(narrow_url: str, connect: Connect) -> psycopg.Connection:
    return connect(narrow_url)


def planned(database: Database) -> Widening:
    with database.engine.connect() as connection:
        return plan(connection)


def fill(database: Database, runs: int = 3) -> int:
    """A pipeline with runs, of which one has ended, and their node runs."""
    with database.session(autocommit=True) as session:
        pipeline, repository = store(session, "a>b"), RunRepository(session)
        *_, run = [repository.create(pipeline) for _ in range(runs)]
        repository.advance(run.id)
        repository.advance_many([RunReport(run.id, [done("a")])])
        repository.cancel(run.id)
        return pipeline


# What the host may have put on the columns, and on what refers to them.
HOST = """
CREATE ROLE {role};
CREATE TABLE public.notes (run_id integer NOT NULL, node integer, CONSTRAINT of_run FOREIGN KEY (run_id)
    REFERENCES circle.pipeline_runs ON UPDATE CASCADE ON DELETE CASCADE DEFERRABLE INITIALLY DEFERRED);
ALTER TABLE public.notes ADD CONSTRAINT "of node" FOREIGN KEY (node) REFERENCES circle.pipeline_node_runs ON DELETE SET NULL NOT VALID;
INSERT INTO public.notes SELECT id, NULL FROM circle.pipeline_runs;
COMMENT ON CONSTRAINT of_run ON public.notes IS 'of the host';
CREATE INDEX "Host's index" ON circle.pipeline_node_runs (node_id COLLATE "C" DESC, run_id DESC NULLS LAST) INCLUDE (id) WITH (fillfactor = 60) WHERE status = 'failed';
COMMENT ON INDEX circle."Host's index" IS 'of the host';
COMMENT ON COLUMN circle.pipeline_runs.id IS 'the run''s number';
COMMENT ON VIEW circle.pending_node_runs IS 'what waits';
COMMENT ON COLUMN circle.pending_node_runs.run_id IS 'its run';
ALTER TABLE circle.pipeline_runs ALTER id SET STATISTICS 500, ALTER id SET (n_distinct = -1);
ALTER TABLE circle.pipeline_node_runs CLUSTER ON pipeline_node_runs_pkey;
ALTER TABLE circle.pipeline_node_runs REPLICA IDENTITY USING INDEX idx_pipeline_node_runs_run_node;
GRANT SELECT (id, status), REFERENCES (id) ON circle.pipeline_runs TO {role} WITH GRANT OPTION;
GRANT SELECT ON circle.startable_node_runs TO {role};
GRANT SELECT (run_id) ON circle.pending_node_runs TO PUBLIC;
CREATE FUNCTION public.judge() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM NEW.id + 1; RETURN NEW; END $$;
CREATE TRIGGER host AFTER INSERT OR UPDATE OF id, status ON circle.pipeline_runs FOR EACH ROW WHEN (NEW.id > 0) EXECUTE FUNCTION public.judge();
COMMENT ON TRIGGER host ON circle.pipeline_runs IS 'of the host';
CREATE TRIGGER quiet AFTER UPDATE OF run_id ON circle.pipeline_node_runs FOR EACH ROW EXECUTE FUNCTION public.judge();
ALTER TABLE circle.pipeline_node_runs DISABLE TRIGGER quiet;
CREATE PUBLICATION host FOR TABLE circle.pipeline_runs (id, status) WHERE (id > 5), public.notes, circle.pipeline_node_runs (id, run_id, node_id);
"""

# What the catalog of tests.support.schema leaves out. The place of a column is none of the facts.
MORE = """
SELECT 'column', format('%s.%s', attrelid::regclass, attname), concat_ws(' ', attacl::text, attstattarget, (SELECT array_agg(o) FROM unnest(attoptions) o WHERE NOT starts_with(o, 'pg_'))::text)
FROM pg_attribute WHERE attrelid::regclass::text ~ '^circle\\.(pipeline|pending|startable)' AND attnum > 0 AND NOT attisdropped
UNION ALL
SELECT 'relation', oid::regclass::text, concat_ws(' ', relowner::regrole, relacl::text, relreplident, reloptions::text)
FROM pg_class WHERE relnamespace = 'circle'::regnamespace
UNION ALL
SELECT 'index', indexrelid::regclass::text, concat_ws(' ', indisprimary, indisclustered, indisreplident, indisvalid)
FROM pg_index WHERE indrelid::regclass::text ~ '^circle\\.'
UNION ALL
SELECT 'key', format('%s.%s', conrelid::regclass, conname), concat_ws(' ', pg_get_constraintdef(oid), convalidated)
FROM pg_constraint WHERE connamespace = 'public'::regnamespace
UNION ALL
SELECT 'publication', pubname, concat_ws(' ', schemaname, tablename, (SELECT array_agg(n ORDER BY n) FROM unnest(attnames) n), rowfilter)
FROM pg_publication_tables
UNION ALL
SELECT 'comment', pg_describe_object(classoid, objoid, objsubid), description FROM pg_description
WHERE description LIKE '%of the host' OR description IN ('what waits', 'its run', 'the run''s number')
ORDER BY 1, 2, 3"""


def all_facts(raw: psycopg.Connection, url: str) -> list[str]:
    """Every fact, with BIGINT for the type of the ids and without the places of columns."""
    raw.execute("SET search_path = pg_catalog")
    found = [" | ".join(row) for row in raw.execute(MORE).fetchall()]
    for fact in catalog(url):
        kind, name, _ = fact.split(" | ", 2)
        if kind == "view":  # PostgreSQL prints a view that it reads from its own output in another form
            continue
        one = re.sub(r"^(column \| [^|]+ \| )\d+ ", r"\1", fact)
        if re.search(r"_runs\.(id|run_id)$", name):
            one = one.replace(" integer", " bigint")
        if kind == "sequence" and "_runs_id_seq" in name:
            one = one.replace("integer from 1 by 1 to 2147483647", "bigint from 1 by 1 to 9223372036854775807")
        found.append(one)
    return sorted(found)


@pytest.fixture
def role(narrow_raw: psycopg.Connection) -> Iterator[str]:
    name = f"gathering_test_reader_{narrow_raw.info.backend_pid}"
    yield name
    narrow_raw.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


def test_widen_keeps_everything_but_the_type(
    narrow: Database, narrow_url: str, narrow_raw: psycopg.Connection, role: str
) -> None:
    pipeline = fill(narrow)
    narrow_raw.execute(HOST.format(role=role))
    before, rows, findings = all_facts(narrow_raw, narrow_url), contents(narrow_raw), doctor(narrow.engine)
    narrow_raw.execute("CREATE TABLE public.copied AS SELECT to_jsonb(r) AS run FROM circle.pipeline_runs r")
    assert planned(narrow).columns == IDS

    assert widen(narrow.engine) == IDS

    assert all_facts(narrow_raw, narrow_url) == before
    assert doctor(narrow.engine) == findings
    assert planned(narrow) == Widening((), (), ())
    assert widen(narrow.engine) == ()
    assert len(contents(narrow_raw)) == len(rows)
    assert (
        narrow_raw.execute(
            "SELECT run FROM public.copied EXCEPT SELECT to_jsonb(r) FROM circle.pipeline_runs r"
        ).fetchall()
        == []
    )
    with narrow.session(autocommit=True) as session:
        run = RunRepository(session).create(pipeline)
        narrow_raw.execute("DROP PUBLICATION host")  # it would refuse to delete notes, which have no replica identity
        narrow_raw.execute("INSERT INTO public.notes VALUES (%s)", [run.id])
        narrow_raw.execute("DELETE FROM circle.pipeline_runs WHERE id = %s", [run.id])
        assert scalar(narrow_raw, "SELECT count(*) FROM public.notes WHERE run_id = %s", [run.id]) == 0
        with pytest.raises(psycopg.errors.ForeignKeyViolation):
            narrow_raw.execute("INSERT INTO public.notes VALUES (1000)")


def test_widen_lets_ids_grow(narrow: Database, narrow_url: str, narrow_raw: psycopg.Connection) -> None:
    pipeline = fill(narrow)
    for sequence in ("pipeline_runs_id_seq", "pipeline_node_runs_id_seq"):
        narrow_raw.execute("SELECT setval(%s, %s)", [f"circle.{sequence}", MOST])
    widen(narrow.engine)
    with narrow.session(autocommit=True) as session:
        runs = RunRepository(session)
        run = runs.create(pipeline)
        assert run.id == MOST + 1
        runs.advance(run.id)
        assert [node.run_id for node in runs.nodes(run.id)] == [run.id] * 2
    command.check(migrations.config(narrow_url))


def calls(runs: RunRepository, pipeline: int) -> Iterator[Callable[[], Any]]:
    """One call of each kind."""
    yield lambda: runs.create(pipeline, idempotency_key="a key")
    run = runs.create(pipeline)
    yield lambda: runs.ready_nodes(run.id)
    yield lambda: runs.start(run.id)
    yield lambda: runs.start_node(run.id, "a")
    yield lambda: runs.fail_node(run.id, "a", "why", retryable=False)
    yield lambda: runs.finish(run.id)
    runs.create(pipeline)
    (claimed,) = runs.claim("worker", LEASE)
    yield lambda: runs.advance(claimed.id, token=claimed.token)
    yield lambda: runs.heartbeat(claimed.id, LEASE, token=claimed.token)
    yield lambda: runs.release(claimed.id, token=claimed.token)
    yield lambda: runs.cancel(claimed.id)
    other = runs.create(pipeline)
    yield lambda: runs.advance_many([RunReport(other.id)])
    yield lambda: runs.record(other.id, [done("a"), done("b")])
    yield lambda: runs.finish(other.id)
    yield lambda: runs.record_run(pipeline, [done("a"), done("b")])
    yield runs.search
    yield lambda: runs.search(pipeline)
    yield lambda: runs.nodes(run.id)
    yield runs.recover
    yield runs.expire
    yield runs.counts
    yield lambda: runs.purge(timedelta(days=1))


@pytest.mark.parametrize("autocommit", [True, False])
def test_open_sessions_go_on_after_widen(narrow: Database, narrow_url: str, autocommit: bool) -> None:
    """They have planned every statement and compiled every function with the INTEGER columns."""
    pipeline = fill(narrow)

    def work(database: Database) -> None:
        with database.session(autocommit=autocommit) as session:
            for call in calls(RunRepository(session), pipeline):
                call()

    with Database(narrow_url) as other:
        for _ in range(7):
            work(other)
        widen(narrow.engine)
        for _ in range(7):
            work(other)


def test_prepared_statement_of_the_session_fails_once_after_widen(narrow: Database, narrow_url: str) -> None:
    fill(narrow)
    with Database(narrow_url) as other, other.session(autocommit=True) as session:

        def read() -> list[int]:
            runs = session.scalars(select(PipelineRun).where(PipelineRun.id == 1)).all()
            nodes = session.scalars(select(PipelineNodeRun).where(PipelineNodeRun.run_id == 1)).all()
            return [len(runs), len(nodes)]

        for _ in range(7):
            assert read() == [1, 2]
        widen(narrow.engine)
        with pytest.raises(Exception, match="cached plan must not change result type") as caught:
            read()
        assert is_transient(caught.value)
        for _ in range(7):
            assert read() == [1, 2]


class At(logging.Handler):
    """Does something once a widening begins a step."""

    def __init__(self, step: str, action: Callable[[], object]) -> None:
        super().__init__(logging.INFO)
        self.step = step
        self.action: Callable[[], object] | None = action

    def emit(self, record: logging.LogRecord) -> None:
        if self.step in record.getMessage() and self.action is not None:
            action, self.action = self.action, None
            action()

    def __enter__(self) -> None:
        logger = logging.getLogger("alembic.gathering_pipeline")
        self.level_before = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def __exit__(self, *_error: object) -> None:
        logger = logging.getLogger("alembic.gathering_pipeline")
        logger.removeHandler(self)
        logger.setLevel(self.level_before)
        assert self.action is None, "the step was reached"


FIRST, COPYING, LAST = "pipeline_runs: add zz_wide_id", "pipeline_runs: copy id", "put the new columns"


def hold(url: str, begun: threading.Event, callers: int) -> None:
    """Let the step that begins now wait for a lock, and callers behind it."""
    raw = servers.connect(url)
    raw.execute("BEGIN; SELECT FROM circle.pipeline_runs LIMIT 1")

    def release() -> None:
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'circle.pipeline_runs'::regclass"
        for wanted in (1, 1 + callers):
            deadline = time.monotonic() + 10
            while scalar(raw, waiting) < wanted and time.monotonic() < deadline:
                time.sleep(0.01)
            begun.set()
        raw.close()

    threading.Thread(target=release).start()


@pytest.mark.parametrize("step", [FIRST, LAST])
def test_calls_that_wait_for_a_step_are_answered(narrow: Database, narrow_url: str, step: str) -> None:
    """A function begins with the columns from before the step, waits for its lock, and goes on with those after it."""
    pipeline = fill(narrow)
    answers: dict[str, object] = {}
    ready = threading.Barrier(5)

    def call(name: str, database: Database) -> None:
        with database.session(autocommit=True) as session:
            runs = RunRepository(session)
            ids = [runs.create(pipeline).id for _ in range(8)]
            runs.advance_many([RunReport(run_id) for run_id in ids])
            kinds: dict[str, Callable[[int], object]] = {
                "create": lambda _: runs.create(pipeline, idempotency_key="a key").idempotency_key,
                "search": lambda _: len(runs.search(limit=3).items),
                "complete": lambda run_id: runs.complete_node(run_id, "a").run_id - run_id,
                "advance": lambda run_id: [node.node_id for node in runs.advance(run_id, [done("a")]).started],
            }
            expected = [kinds[name](run_id) for run_id in ids[:-1]]
            ready.wait()
            begun.wait()
            try:
                answers[name] = kinds[name](ids[-1]) == expected[-1]
            except BaseException as error:  # noqa: BLE001 - whatever it is
                answers[name] = error

    begun = threading.Event()
    with Database(narrow_url) as other:
        callers = [
            threading.Thread(target=call, args=(name, other)) for name in ("create", "search", "complete", "advance")
        ]
        for caller in callers:
            caller.start()
        ready.wait()
        with At(step, lambda: hold(narrow_url, begun, len(callers))):
            widen(narrow.engine, {"lock_timeout": "20s"})
        for caller in callers:
            caller.join()
    assert answers == dict.fromkeys(("create", "search", "complete", "advance"), True)


def test_transaction_that_waits_for_a_step_is_run_again(narrow: Database, narrow_url: str) -> None:
    fill(narrow)
    raised: list[BaseException] = []
    ready, begun = threading.Event(), threading.Event()

    def call() -> None:
        with Database(narrow_url) as other:
            for number in range(4):
                try:
                    with other.session() as session:
                        runs = RunRepository(session)
                        if number == 1:  # the session knows the table
                            ready.set()
                            begun.wait()
                        assert len(runs.search().items) == 3
                except TransactionConflictError as error:
                    raised.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    ready.wait()
    with At(FIRST, lambda: hold(narrow_url, begun, 1)):
        widen(narrow.engine, {"lock_timeout": "20s"})
    caller.join()
    (error,) = raised
    assert is_transient(error)
    assert str(error).startswith("a table got other columns: run the transaction again (structure of query does not")


def test_index_and_key_that_are_made_meanwhile_are_kept(
    narrow: Database, narrow_url: str, narrow_raw: psycopg.Connection
) -> None:
    fill(narrow)
    narrow_raw.execute("CREATE INDEX idx_gone ON circle.pipeline_runs (id)")

    def change() -> None:
        narrow_raw.execute(
            """CREATE INDEX idx_late ON circle.pipeline_runs (id, status);
            CREATE TABLE public.late (run_id integer REFERENCES circle.pipeline_runs);
            DROP INDEX circle.idx_gone"""
        )

    with At(LAST, change):
        widen(narrow.engine)
    found = "\n".join(all_facts(narrow_raw, narrow_url))
    assert "index | circle.idx_late | CREATE INDEX idx_late ON circle.pipeline_runs USING btree (id, status)" in found
    assert "late_run_id_fkey | FOREIGN KEY (run_id) REFERENCES circle.pipeline_runs(id) t" in found
    assert "zz_wide" not in found
    assert doctor(narrow.engine) == []


OBSTACLES = {
    "CREATE VIEW public.report AS SELECT id FROM circle.pipeline_runs": "view public.report depends on circle.pipeline_runs.id",
    "CREATE MATERIALIZED VIEW public.report AS SELECT run_id FROM circle.pipeline_node_runs": "view public.report depends on circle.pipeline_node_runs.run_id",
    "CREATE VIEW public.report AS SELECT node_id FROM circle.pending_node_runs": "view public.report depends on circle.pending_node_runs",
    "CREATE FUNCTION public.f(circle.startable_node_runs) RETURNS int LANGUAGE sql AS 'SELECT 1'": "function public.f(circle.startable_node_runs) depends on circle.startable_node_runs",
    "CREATE FUNCTION public.f() RETURNS int BEGIN ATOMIC SELECT max(id) FROM circle.pipeline_runs; END": "function public.f() depends on circle.pipeline_runs.id",
    "ALTER TABLE circle.pipeline_runs ADD CONSTRAINT positive CHECK (id > 0)": "constraint positive on table circle.pipeline_runs depends on",
    "ALTER TABLE circle.pipeline_runs ADD CONSTRAINT one UNIQUE (id, pipeline_id)": "constraint one on table circle.pipeline_runs depends on",
    "ALTER TABLE circle.pipeline_runs ADD half bigint GENERATED ALWAYS AS (id / 2) STORED": "depends on circle.pipeline_runs.id",
    "CREATE INDEX i ON circle.pipeline_runs ((id % 10), id)": "index circle.i depends on circle.pipeline_runs.id",
    "CREATE INDEX i ON circle.pipeline_node_runs (run_id) WHERE run_id > 7": "index circle.i depends on circle.pipeline_node_runs.run_id",
    "CREATE STATISTICS public.s ON id, status FROM circle.pipeline_runs": "statistics object public.s depends on circle.pipeline_runs.id",
    "CREATE POLICY p ON circle.pipeline_runs USING (id > 0)": "policy p on table circle.pipeline_runs depends on",
    "CREATE RULE r AS ON UPDATE TO circle.pipeline_runs WHERE NEW.id = 0 DO INSTEAD NOTHING": "depends on circle.pipeline_runs.id",
    "CREATE TABLE public.child () INHERITS (circle.pipeline_runs)": "table public.child inherits from circle.pipeline_runs",
    "CREATE TABLE public.copies (run circle.pipeline_runs)": "column run of table public.copies has rows of circle.pipeline_runs",
    "CREATE TABLE public.parts (run_id integer REFERENCES circle.pipeline_runs) PARTITION BY HASH (run_id)": "foreign key parts_run_id_fkey of public.parts belongs to a partitioned table",
    "CREATE PUBLICATION p FOR ALL TABLES": "publication p publishes every column of circle.pipeline_runs",
    "CREATE PUBLICATION p FOR TABLES IN SCHEMA circle": "publication p publishes every column of circle.pipeline_node_runs",
    "CREATE PUBLICATION p FOR TABLE circle.pipeline_node_runs": "publication p publishes every column of circle.pipeline_node_runs",
}


@pytest.mark.parametrize(("statement", "obstacle"), OBSTACLES.items(), ids=list(OBSTACLES))
def test_widen_with_dependent_that_it_cannot_put_back_changes_nothing(
    narrow: Database, narrow_url: str, narrow_raw: psycopg.Connection, statement: str, obstacle: str
) -> None:
    narrow_raw.execute(statement)
    before = catalog(narrow_url)
    with pytest.raises(ConfigurationError, match=re.escape(obstacle)):
        widen(narrow.engine)
    assert any(obstacle in one for one in planned(narrow).obstacles)
    assert catalog(narrow_url) == before


def test_widen_names_the_key_of_another_role(narrow_url: str, narrow_raw: psycopg.Connection) -> None:
    owner, other = (f"gathering_test_{name}_{narrow_raw.info.backend_pid}" for name in ("owner", "other"))
    narrow_raw.execute(f"CREATE ROLE {owner} LOGIN PASSWORD 'x'; CREATE ROLE {other}")
    try:
        for kind, names in (
            (
                "TABLE",
                "alembic_version pipelines pipeline_runs pipeline_node_runs pipeline_versions pipeline_counters pipeline_events pipeline_run_tags pipeline_run_logs pipeline_run_history pipeline_sweep",
            ),
            ("VIEW", "pending_node_runs startable_node_runs pipeline_version_nodes"),
        ):
            for name in names.split():
                narrow_raw.execute(f"ALTER {kind} circle.{name} OWNER TO {owner}")
        narrow_raw.execute(
            f"""GRANT CREATE, USAGE ON SCHEMA circle TO {owner}; GRANT USAGE ON SCHEMA circle TO {other};
            GRANT REFERENCES ON circle.pipeline_runs TO {other};
            CREATE TABLE public.foreign_notes (run_id integer); ALTER TABLE public.foreign_notes OWNER TO {other};
            ALTER TABLE public.foreign_notes ADD FOREIGN KEY (run_id) REFERENCES circle.pipeline_runs"""
        )
        url = make_url(narrow_url).set(username=owner, password="x").render_as_string(hide_password=False)
        with Database(url) as database:
            with pytest.raises(
                ConfigurationError, match=f"of public.foreign_notes belongs to role {other}: run this as"
            ):
                widen(database.engine)
            narrow_raw.execute("DROP TABLE public.foreign_notes")
            assert widen(database.engine) == IDS
    finally:
        narrow_raw.execute(f"DROP OWNED BY {owner}, {other} CASCADE; DROP ROLE {owner}, {other}")


def test_widen_below_head_raises(narrow: Database, narrow_url: str) -> None:
    migrations.downgrade(narrow_url, "010_graph")
    with pytest.raises(SchemaRevisionError):
        widen(narrow.engine)
    with pytest.raises(SchemaRevisionError):
        planned(narrow)


def test_widen_waits_for_rows_that_others_have_locked(
    narrow: Database, narrow_raw: psycopg.Connection, narrow_url: str
) -> None:
    fill(narrow)
    with servers.connect(narrow_url) as other:

        def lock() -> None:
            other.execute("BEGIN; SELECT FROM circle.pipeline_runs WHERE id = 2 FOR UPDATE")

        with (
            At(COPYING, lock),
            pytest.raises(DatabaseUnavailableError, match="rows of circle.pipeline_runs stayed locked"),
        ):
            widen(narrow.engine, {"patience": 0})
        assert scalar(narrow_raw, "SELECT array_agg(id) FROM circle.pipeline_runs WHERE zz_wide_id IS NULL") == [2]
        (finding,) = {finding.code: finding for finding in doctor(narrow.engine)}.values()
        assert (finding.code, finding.severity) == ("unfinished_widening", "warning")
        timer = threading.Timer(0.3, other.execute, ["COMMIT"])
        timer.start()
        assert widen(narrow.engine) == IDS
        timer.join()
    assert doctor(narrow.engine) == []


def test_widen_with_unknown_option_raises(narrow: Database) -> None:
    with pytest.raises(ConfigurationError, match="no option 'patiens'"):
        widen(narrow.engine, {"patiens": 1})


def test_doctor_on_integer_ids_finds_nothing(narrow: Database) -> None:
    fill(narrow)
    assert doctor(narrow.engine) == []


def test_view_of_widened_tables_is_repaired(narrow: Database, narrow_raw: psycopg.Connection) -> None:
    """Its function returns the columns of a node run in another order than in a clean build."""
    pipeline = fill(narrow)
    widen(narrow.engine)
    narrow_raw.execute("DROP VIEW circle.startable_node_runs, circle.pending_node_runs")
    assert [finding.outcome for finding in doctor(narrow.engine, repair=True)] == ["repaired"] * 2
    with narrow.session(autocommit=True) as session:
        runs = RunRepository(session)
        runs.start((run := runs.create(pipeline)).id)
    waiting = "SELECT node_id, waiting_for FROM circle.pending_node_runs WHERE run_id = %s ORDER BY position"
    assert narrow_raw.execute(waiting, [run.id]).fetchall() == [("a", []), ("b", ["a"])]


def test_command_widens(narrow_url: str, narrow_raw: psycopg.Connection) -> None:
    def run(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli, ["db", "widen", *words, "--url", narrow_url], prog_name="gathering-pipeline")
        return result.exit_code, result.stdout

    narrow_raw.execute("CREATE VIEW public.report AS SELECT id FROM circle.pipeline_runs")
    code, shown = run("--dry-run")
    assert code == 3
    assert shown.startswith(f"INTEGER: {', '.join(IDS)}\n    circle.pipeline_runs: add zz_wide_id\n")
    assert shown.endswith(
        "prevented: view public.report depends on circle.pipeline_runs.id: drop it, and create it again afterwards\n"
    )
    assert run()[0] == 1
    narrow_raw.execute("DROP VIEW public.report")
    assert run("--dry-run")[0] == 0
    assert run("-x", "lock_timeout=50ms") == (0, f"{', '.join(IDS)}: BIGINT now\n")
    assert run() == (0, "no column is INTEGER\n")
    assert run("--dry-run") == (0, "INTEGER: no column\n")
