"""How revisions run; what they do is tested beside this."""

import asyncio
import io
import logging
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool

from gathering_pipeline import migrations
from gathering_pipeline.database import Database
from gathering_pipeline.doctor import doctor
from gathering_pipeline.errors import (
    WITHDRAWN_REVISIONS,
    AdoptionError,
    ConfigurationError,
    DatabaseUnavailableError,
    SchemaRevisionError,
)
from gathering_pipeline.preflight import preflight
from tests import servers

Connect = Callable[[str], psycopg.Connection]

ROOT = Path(__file__).parents[2]
REVISION = """
from alembic import op
revision = "{name}"
down_revision = {down!r}
branch_labels = depends_on = None
def upgrade(): op.run_steps(revision, "upgrade")
def downgrade(): op.run_steps(revision, "downgrade")
"""


def _alembic(url: str, *words: str) -> subprocess.CompletedProcess[str]:
    """The command, in the checkout."""
    return subprocess.run(
        [sys.executable, "-m", "alembic", *words],
        cwd=ROOT,
        env={"DATABASE_URL": url, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of scripts with our env.py and no revisions yet."""
    folder = tmp_path / "scripts 100%"
    for name in ("versions", "sql"):
        (folder / name).mkdir(parents=True)
    shutil.copy(ROOT / "alembic" / "env.py", folder)
    monkeypatch.setattr(migrations, "scripts", lambda: folder)
    return folder


def _revision(scripts: Path, name: str, down: str | None, *sql: str) -> None:
    (scripts / "versions" / f"{name}.py").write_text(REVISION.format(name=name, down=down))
    (scripts / "sql" / name).mkdir()
    for number, content in enumerate(sql, 1):
        (scripts / "sql" / name / f"{number}_file.sql").write_text(content)


def test_each_step_is_a_transaction_of_its_own(scripts: Path, empty_database_url: str, connect: Connect) -> None:
    _revision(
        scripts,
        "one",
        None,
        """-- == a table, and a percent sign
CREATE TABLE circle.t (id int, xid xid8 DEFAULT pg_current_xact_id(), word text CHECK (word LIKE '%'));
-- == two rows
INSERT INTO circle.t VALUES (1);
INSERT INTO circle.t VALUES (2);
""",
        """-- Another file
-- == a third, which commits as it goes
DO $$ BEGIN INSERT INTO circle.t VALUES (3); COMMIT; INSERT INTO circle.t VALUES (4); END $$;
-- == this one fails, and nothing of it stays
INSERT INTO circle.t VALUES (5);
SELECT 1/0;
""",
    )
    with pytest.raises(DBAPIError, match="division by zero"):
        migrations.upgrade(empty_database_url)
    raw = connect(empty_database_url)
    rows = raw.execute("SELECT id, dense_rank() OVER (ORDER BY xid) FROM circle.t ORDER BY id").fetchall()
    assert rows == [(1, 1), (2, 1), (3, 2), (4, 3)]
    assert raw.execute("SELECT version_num FROM circle.alembic_version").fetchall() == []


def test_a_migration_leaves_the_other_cores_to_the_writers(
    scripts: Path, empty_database_url: str, connect: Connect
) -> None:
    show = "current_setting('max_parallel_maintenance_workers') || current_setting('max_parallel_workers_per_gather')"
    _revision(scripts, "one", None, f"-- == a step\nCREATE TABLE circle.workers AS SELECT {show} AS workers")
    migrations.upgrade(empty_database_url)
    assert connect(empty_database_url).execute("SELECT workers FROM circle.workers").fetchall() == [("00",)]


def test_an_invalid_index_is_built_again(scripts: Path, empty_database_url: str, connect: Connect) -> None:
    raw = connect(empty_database_url)
    raw.execute("CREATE SCHEMA circle; CREATE TABLE circle.t (id int); INSERT INTO circle.t VALUES (1), (1)")
    with pytest.raises(psycopg.errors.UniqueViolation):
        raw.execute("CREATE UNIQUE INDEX CONCURRENTLY idx_t ON circle.t (id)")
    valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'circle.idx_t'::regclass"
    assert raw.execute(valid).fetchone() == (False,)
    raw.execute("DELETE FROM circle.t")
    _revision(
        scripts,
        "one",
        None,
        "-- == index: circle.idx_t\nCREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS idx_t ON circle.t (id);\n",
    )
    migrations.upgrade(empty_database_url)
    assert raw.execute(valid).fetchone() == (True,)


def test_a_step_that_gets_no_lock_lets_others_pass_and_tries_again(
    scripts: Path, empty_database_url: str, connect: Connect
) -> None:
    raw, reader = connect(empty_database_url), connect(empty_database_url)
    raw.execute("CREATE SCHEMA circle; CREATE TABLE circle.t (id int)")
    _revision(
        scripts,
        "one",
        None,
        "-- == counted\nCREATE SEQUENCE IF NOT EXISTS circle.runs; SELECT nextval('circle.runs');\n"
        "-- == column\nALTER TABLE circle.t ADD COLUMN IF NOT EXISTS more int;\n",
    )
    with reader.transaction():
        reader.execute("SELECT * FROM circle.t")
        migrator = threading.Thread(target=migrations.upgrade, args=(empty_database_url,))
        migrator.start()
        longest = 0.0
        for _ in range(20):
            start = time.monotonic()
            raw.execute("INSERT INTO circle.t VALUES (1)")
            longest = max(longest, time.monotonic() - start)
            time.sleep(0.05)
        assert migrator.is_alive()
    migrator.join(30)
    assert longest < 2  # without a limit: as long as the reader reads
    assert raw.execute("SELECT count(more) FROM circle.t").fetchone() == (0,)
    assert raw.execute("SELECT last_value FROM circle.runs").fetchone() == (1,)  # only the step that failed ran again


def test_it_gives_up_after_its_patience(scripts: Path, empty_database_url: str, connect: Connect) -> None:
    reader = connect(empty_database_url)
    reader.execute("CREATE SCHEMA circle; CREATE TABLE circle.t (id int)")
    _revision(scripts, "one", None, "-- == column\nALTER TABLE circle.t ADD COLUMN more int;\n")
    config = migrations.config(empty_database_url)
    config.attributes.update(patience=0, lock_timeout="50ms")
    with reader.transaction():
        reader.execute("SELECT * FROM circle.t")
        told = "tried for 0 s, but a lock was not free within 50ms: see by gathering-pipeline db preflight, or in pg_"
        with pytest.raises(DatabaseUnavailableError, match=told):
            command.upgrade(config, "head")


@pytest.mark.parametrize("sql", ["ALTER TABLE circle.t ADD COLUMN more int;", "SELECT pg_sleep(60);"])
def test_a_connection_that_breaks(scripts: Path, empty_database_url: str, connect: Connect, sql: str) -> None:
    raw, reader = connect(empty_database_url), connect(empty_database_url)
    raw.execute("CREATE SCHEMA circle; CREATE TABLE circle.t (id int)")
    _revision(scripts, "one", None, f"-- == column\n{sql}\n")
    broken: list[str] = []

    def migrate() -> None:
        try:
            migrations.upgrade(empty_database_url)
        except DatabaseUnavailableError as error:
            broken.append(str(error))

    migrator = threading.Thread(target=migrate)
    with reader.transaction():
        reader.execute("SELECT FROM circle.t")
        migrator.start()
        _wait_until(lambda: raw.execute("SELECT to_regclass('circle.alembic_version')").fetchone() != (None,))
        end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'gathering_pipeline'"
        _wait_until(lambda: raw.execute(f"{end} AND datname = current_database()").fetchone() is not None)
        migrator.join(30)
    assert broken == ["the connection broke during the migration: start it again, it goes on where it was"]


BIG_TABLE = """
CREATE SCHEMA circle; CREATE TABLE circle.t (id int, filler text);
INSERT INTO circle.t SELECT n, repeat('x', 1000) FROM generate_series(1, 10000) n"""
INDEX = "CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_t ON circle.t (id);\n"
WAITS = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'CREATE INDEX CONCURRENTLY%'"


def _wait_until(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("what", ["a request behind a reader", "a writer that is waited for"])
def test_a_build_gives_way_to_create_index_if_not_exists(
    scripts: Path, empty_database_url: str, connect: Connect, what: str
) -> None:
    """Else the one would wait for as long as the reader reads, and the other would be a deadlock."""
    raw, other = connect(empty_database_url), connect(empty_database_url)
    raw.execute(BIG_TABLE)
    raw.execute("CREATE INDEX idx_old ON circle.t (filler)")
    _revision(scripts, "one", None, f"-- == index: circle.idx_t\n{INDEX}")
    migrator = threading.Thread(target=migrations.upgrade, args=(empty_database_url,))
    with other.transaction():
        other.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        other.execute("SELECT FROM circle.t LIMIT 1")
        if what == "a writer that is waited for":
            other.execute("UPDATE circle.t SET id = id WHERE id = 1")
        migrator.start()
        _wait_until(lambda: raw.execute(WAITS).fetchone() is not None)
        requester = raw if what == "a request behind a reader" else other
        requester.execute("SET lock_timeout = '10s'")
        requester.execute("CREATE INDEX IF NOT EXISTS idx_old ON circle.t (filler)")
        assert migrator.is_alive()
    migrator.join(30)
    index = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'circle.idx_t'::regclass"
    assert raw.execute(index).fetchone() == (True,)


def test_who_may_not_wait_can_go_first(scripts: Path, empty_database_url: str, connect: Connect) -> None:
    raw, other = connect(empty_database_url), connect(empty_database_url)
    raw.execute(BIG_TABLE)
    raw.execute("CREATE INDEX idx_old ON circle.t (filler)")
    _revision(scripts, "one", None, f"-- == index: circle.idx_t\n{INDEX}")
    config = migrations.config(empty_database_url)
    config.attributes["patience"] = 0
    failures: list[BaseException] = []

    def migrate() -> None:
        try:
            command.upgrade(config, "head")
        except DatabaseUnavailableError as error:
            failures.append(error)

    migrator = threading.Thread(target=migrate)
    with other.transaction():
        other.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        other.execute("SELECT FROM circle.t LIMIT 1")
        migrator.start()
        _wait_until(lambda: raw.execute(WAITS).fetchone() is not None)
        raw.execute("CREATE INDEX IF NOT EXISTS idx_old ON circle.t (filler)")
        migrator.join(30)
        (failure,) = failures
        assert str(failure) == (
            "the migration was tried for 0 s, but others waited behind the step: "
            "stop what sends CREATE INDEX or VACUUM, or go first with yield=no"
        )
        # the INVALID index is dropped under an exclusive lock, which the reader doesn't share
    config.attributes["yield"] = "no"
    command.upgrade(config, "head")
    index = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'circle.idx_t'::regclass"
    assert raw.execute(index).fetchone() == (True,)


@pytest.mark.parametrize("value", [False, "false", "off", "0"])
def test_no_in_other_words(scripts: Path, empty_database_url: str, connect: Connect, value: object) -> None:
    raw = connect(empty_database_url)
    raw.execute(BIG_TABLE)
    _revision(scripts, "one", None, f"-- == index: circle.idx_t\n{INDEX}")
    config = migrations.config(empty_database_url)
    config.attributes.update({"yield": value, "patience": 0, "lock_timeout": 50})
    with raw.transaction():
        raw.execute(
            "SET LOCAL idle_in_transaction_session_timeout = '10s'"
        )  # for as long a concurrent build would wait
        raw.execute("UPDATE circle.t SET id = id WHERE id = 1")
        # not built concurrently, so it waits for the writer's lock
        with pytest.raises(DatabaseUnavailableError, match="a lock was not free within 50"):
            command.upgrade(config, "head")


@pytest.mark.parametrize(
    ("name", "value"),
    [("yield", "nein"), ("yield", ""), ("lock_timeout", "soon"), ("lock_timeout", 0), ("lock_timeout", "1s; SELECT 1"),
     ("patience", "nan"), ("patience", "-1"), ("patience", "long")],
)  # fmt: skip
def test_an_option_that_is_not_understood(empty_database_url: str, name: str, value: object) -> None:
    config = migrations.config(empty_database_url)
    config.attributes[name] = value
    with pytest.raises(ConfigurationError, match=f"the option {name} can't be {value!r}: write "):
        command.upgrade(config, "head")


def test_an_option_that_there_is_not(empty_database_url: str) -> None:
    done = _alembic(empty_database_url, "-x", "patience=5", "-x", "pattience=5", "upgrade", "head")
    assert done.returncode != 0
    assert "there is no option 'pattience': there are lock_timeout, patience, yield" in done.stdout + done.stderr
    with pytest.raises(ConfigurationError, match="there is no option 'pattience'"):
        migrations.upgrade(empty_database_url, options={"pattience": 5})


COUNT_STEPS = """
import logging, sys
from gathering_pipeline import migrations
steps = []
logging.getLogger("alembic.gathering_pipeline").addFilter(lambda record: record.msg != "step: %s" or steps.append(1))
logging.getLogger("alembic.gathering_pipeline").setLevel(logging.DEBUG)
migrations.upgrade(sys.argv[1])
print(len(steps))
"""


def test_of_ten_migrators_one_works(empty_database_url: str, connect: Connect) -> None:
    """The others wait for it, and find nothing to do."""
    raw = connect(empty_database_url)
    raw.execute("SELECT pg_advisory_lock(%s)", [0x6761746865720007])  # until all of them are there
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", COUNT_STEPS, empty_database_url], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for _ in range(10)
    ]
    clients = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    _wait_until(lambda: raw.execute(clients).fetchone() == (10,))
    raw.execute("SELECT pg_advisory_unlock_all()")
    steps = sorted(int(process.communicate(timeout=60)[0]) for process in processes)
    assert [process.returncode for process in processes] == [0] * 10
    assert steps[:9] == [0] * 9
    assert steps[9] > 50
    assert raw.execute("SELECT version_num FROM circle.alembic_version").fetchall() == [(migrations.head(),)]
    assert raw.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'").fetchone() == (0,)


def test_a_revision_that_this_code_does_not_know(database_url: str, connect: Connect) -> None:
    connect(database_url).execute("UPDATE circle.alembic_version SET version_num = '099_future'")
    with pytest.raises(SchemaRevisionError, match="at revision 099_future, this code needs .*upgrade the package"):
        migrations.upgrade(database_url)
    with pytest.raises(SchemaRevisionError, match="at revision 099_future"):
        migrations.downgrade(database_url, "base")


@pytest.mark.parametrize("revision", sorted(WITHDRAWN_REVISIONS))
def test_every_command_refuses_a_revision_of_an_unreleased_version(
    database: Database, database_url: str, connect: Connect, revision: str
) -> None:
    assert revision not in migrations.revisions()
    connect(database_url).execute("UPDATE circle.alembic_version SET version_num = %s", [revision])
    advice = "an unreleased version of this package left the revision: recreate the database, or downgrade it to"
    sentence = f"at revision {revision}, this code needs {migrations.head()}: {advice} 008_integrity"
    for call in (
        lambda: migrations.upgrade(database_url),
        lambda: migrations.downgrade(database_url, "008_integrity"),
        lambda: migrations.downgrade(database_url, "base"),
        database.check,
    ):
        with pytest.raises(SchemaRevisionError, match=sentence):
            call()
    with database.engine.connect() as connection, pytest.raises(SchemaRevisionError, match=sentence):
        preflight(connection)
    (finding,) = doctor(database.engine, repair=True)
    assert (finding.code, finding.outcome) == ("revision", None)
    assert finding.advice.startswith(advice)


def test_another_migrator_that_does_not_end(empty_database_url: str, connect: Connect) -> None:
    other = connect(empty_database_url)
    other.execute("SELECT pg_advisory_lock(%s)", [0x6761746865720007])
    config = migrations.config(empty_database_url)
    config.attributes["patience"] = 0.3
    with pytest.raises(DatabaseUnavailableError, match="another migrator has been at work"):
        command.upgrade(config, "head")


def test_hosts_may_pass_a_connection_which_comes_back_as_it_was(empty_database_url: str) -> None:
    engine = create_engine(empty_database_url, poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text("SET lock_timeout = '7s'"))
        with pytest.raises(ConfigurationError, match="inside a transaction: commit it first"):
            migrations.upgrade(connection)
        connection.rollback()
        migrations.upgrade(connection)
        assert not connection.in_transaction()
        migrations.check(connection)
        assert connection.get_isolation_level() == "READ COMMITTED"
        assert connection.scalar(text("SHOW lock_timeout")) == "0"
        assert connection.scalar(text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")) == 0


def test_settings_that_a_host_gives_its_sessions_outlive_us(empty_database_url: str) -> None:
    engine = create_engine(empty_database_url, pool_size=1, max_overflow=0)

    @event.listens_for(engine, "connect")
    def _set(connection: psycopg.Connection, _record: object) -> None:
        connection.execute(
            "SET statement_timeout = '33s'; SET lock_timeout = '44s'; SET search_path = \"$user\", public, x;"
            "SET max_parallel_workers_per_gather = 3"
        )
        connection.commit()

    ours = "'lock_timeout', 'search_path', 'statement_timeout', 'max_parallel_workers_per_gather'"
    show = f"SELECT pg_backend_pid(), current_setting(name) FROM unnest(ARRAY[{ours}]) name"
    uses: list[Callable[[], object]] = [
        lambda: migrations.upgrade(engine, "006_pipelines"), lambda: doctor(engine), lambda: doctor(engine, repair=True),
        lambda: doctor(engine),
    ]  # fmt: skip
    with engine.connect() as connection:
        before = connection.execute(text(show)).all()
        assert [row.current_setting for row in before] == ["44s", '"$user", public, x', "33s", "3"]
    for use in uses:
        use()
        with engine.connect() as connection:
            assert connection.execute(text(show)).all() == before
    engine.dispose()


def test_or_an_async_one(empty_database_url: str, connect: Connect) -> None:
    raw = connect(empty_database_url)

    async def go() -> None:
        engine = create_async_engine(empty_database_url, poolclass=AsyncAdaptedQueuePool, pool_size=1, max_overflow=0)
        async with engine.connect() as connection:
            await connection.run_sync(migrations.upgrade, "007_pipeline_execution")
            others = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND NOT pid = ANY (%s)"
            pids = [raw.info.backend_pid, await connection.scalar(text("SELECT pg_backend_pid()"))]
            await connection.rollback()
            _wait_until(lambda: raw.execute(others, [pids]).fetchone() is None)
            await connection.run_sync(migrations.upgrade)
            await connection.run_sync(migrations.check)
        await engine.dispose()

    asyncio.run(go())


def test_an_async_one_gives_way_too(scripts: Path, empty_database_url: str, connect: Connect) -> None:
    raw, reader = connect(empty_database_url), connect(empty_database_url)
    raw.execute(BIG_TABLE)
    raw.execute("CREATE INDEX idx_old ON circle.t (filler)")
    _revision(scripts, "one", None, f"-- == index: circle.idx_t\n{INDEX}")

    async def go() -> None:
        async with Database(empty_database_url) as database, database.async_engine.connect() as connection:
            await connection.run_sync(migrations.upgrade)

    migrator = threading.Thread(target=asyncio.run, args=(go(),))
    with reader.transaction():
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        reader.execute("SELECT FROM circle.t LIMIT 1")
        migrator.start()
        _wait_until(lambda: raw.execute(WAITS).fetchone() is not None)
        raw.execute("SET lock_timeout = '10s'")
        raw.execute("CREATE INDEX IF NOT EXISTS idx_old ON circle.t (filler)")
        assert migrator.is_alive()
    migrator.join(30)
    index = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'circle.idx_t'::regclass"
    assert raw.execute(index).fetchone() == (True,)


@pytest.mark.parametrize("whose", ["a host's engine", "ours", "an async one"])
def test_a_role_that_may_open_one_connection_only(
    scripts: Path, empty_database_url: str, connect: Connect, whose: str
) -> None:
    """A step that takes long needs a second one, to see who waits behind it."""
    raw = connect(empty_database_url)
    raw.execute(BIG_TABLE)
    _revision(scripts, "one", None, f"-- == index: circle.idx_t\n{INDEX}")
    name = f"gathering_test_single_{time.monotonic_ns()}"
    raw.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'x' CONNECTION LIMIT 1".encode())
    raw.execute(f"ALTER SCHEMA circle OWNER TO {name}; ALTER TABLE circle.t OWNER TO {name}".encode())
    url = make_url(empty_database_url).set(username=name, password="x")

    async def go() -> None:
        async with Database(url) as database, database.async_engine.connect() as connection:
            await connection.run_sync(migrations.upgrade)

    try:
        with pytest.raises(DatabaseUnavailableError, match="too many connections for role"):
            if whose == "an async one":
                asyncio.run(go())
            elif whose == "ours":
                migrations.upgrade(url)
            else:
                migrations.upgrade(create_engine(url.set(drivername="postgresql+psycopg"), poolclass=NullPool))
    finally:
        _wait_until(lambda: raw.execute("SELECT FROM pg_stat_activity WHERE usename = %s", [name]).fetchone() is None)
        raw.execute(f"DROP OWNED BY {name}; DROP ROLE {name}".encode())


@pytest.mark.parametrize("name", ["GATHERING_DATABASE_URL", "DATABASE_URL"])
def test_an_empty_variable_that_is_not_used_stands_in_nobodys_way(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "")
    migrations.upgrade(empty_database_url, "006_pipelines")
    with pytest.raises(ConfigurationError, match=f"{name} can't be used: it is empty"):
        migrations.upgrade()
    monkeypatch.setenv("GATHERING_MIGRATION_URL", empty_database_url)
    migrations.upgrade()
    with Database(empty_database_url) as database:
        database.check()


def test_current_and_check_leave_an_empty_database_alone(empty_database_url: str, connect: Connect) -> None:
    with Database(empty_database_url) as database:
        output = io.StringIO()
        config = Config(stdout=output)
        for name, value in migrations.config().get_section("alembic", {}).items():
            config.set_main_option(name, value.replace("%", "%%"))
        config.attributes["connection"] = database.engine
        command.current(config)
    raw = connect(empty_database_url)
    assert raw.execute("SELECT to_regnamespace('circle')").fetchone() == (None,)


def test_a_connection_of_another_driver() -> None:
    with pytest.raises(ConfigurationError, match="driver is pysqlite: migrations need psycopg"):
        migrations.upgrade(create_engine("sqlite://", poolclass=NullPool))


def test_a_role_that_may_not_create_schemas(empty_database_url: str, server: object, connect: Connect) -> None:
    raw = connect(empty_database_url)
    name = f"gathering_test_owner_{time.monotonic_ns()}"
    raw.execute(f"CREATE ROLE {name}; CREATE SCHEMA circle AUTHORIZATION {name}".encode())
    engine = create_engine(empty_database_url, poolclass=NullPool, connect_args={"options": f"-c role={name}"})
    try:
        migrations.upgrade(engine)
    finally:
        raw.execute(f"DROP OWNED BY {name}; DROP ROLE {name}".encode())


def test_a_host_keeps_its_own_logging(empty_database_url: str) -> None:
    before = list(logging.root.handlers), logging.root.level
    migrations.upgrade(empty_database_url, "006_pipelines")
    assert (list(logging.root.handlers), logging.root.level) == before


def test_the_command_alembic(empty_database_url: str) -> None:
    options = ["-x", "lock_timeout=1s", "-x", "yield=true", "-x", "patience=7.5"]
    _alembic(empty_database_url, *options, "upgrade", "head").check_returncode()
    current = _alembic(empty_database_url, "current")
    assert (current.returncode, current.stdout.strip()) == (0, f"{migrations.head()} (head)")


@pytest.mark.parametrize("what", ["other tables", "no server"])
def test_the_command_alembic_tells_in_one_sentence_what_is_wrong(
    empty_database_url: str, connect: Connect, what: str
) -> None:
    url = empty_database_url if what == "other tables" else "postgresql://nobody@127.0.0.1:1/none"
    connect(empty_database_url).execute("CREATE SCHEMA circle; CREATE TABLE circle.pipelines (id serial PRIMARY KEY)")
    done = _alembic(url, "upgrade", "head")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr + done.stdout
    assert ("existing tables can't be adopted:\n  - pipelines" if what == "other tables" else "no answer from") in (
        done.stderr + done.stdout
    )


def test_the_script_for_a_dba(empty_database_url: str, connect: Connect, tmp_path: Path) -> None:
    """As ``psql -v ON_ERROR_STOP=1`` runs it: statement by statement."""
    output = io.StringIO()
    config = migrations.config()
    config.output_buffer = output
    command.upgrade(config, "head", sql=True)
    script = tmp_path / "upgrade.sql"
    script.write_text(output.getvalue())
    options = ["-v", "ON_ERROR_STOP=1", "-f", str(script)]
    subprocess.run([*servers.psql(empty_database_url), *options], check=True, capture_output=True)
    with Database(empty_database_url) as database:
        database.check()


def test_a_relative_downgrade_is_never_counted_twice(database_url: str, connect: Connect) -> None:
    raw = connect(database_url)
    raw.execute("""
        CREATE SEQUENCE circle.tried;
        CREATE FUNCTION circle.busy() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF NEW.version_num = '009b_lifecycle' AND nextval('circle.tried') = 1 THEN
                RAISE EXCEPTION 'not free' USING ERRCODE = 'lock_not_available';
            END IF;
            RETURN NEW;
        END $$;
        CREATE TRIGGER busy BEFORE UPDATE ON circle.alembic_version FOR EACH ROW EXECUTE FUNCTION circle.busy()""")
    with pytest.raises(
        DatabaseUnavailableError, match="at 010b_graph_guard by now: .*; name the revision instead of a number"
    ):
        migrations.downgrade(database_url, "-2")
    assert raw.execute("SELECT version_num FROM circle.alembic_version").fetchall() == [("010b_graph_guard",)]
    migrations.downgrade(database_url, "009b_lifecycle")
    assert raw.execute("SELECT version_num FROM circle.alembic_version").fetchall() == [("009b_lifecycle",)]


def test_a_table_of_a_hosts_own_is_no_migrated_schema(empty_database_url: str, connect: Connect) -> None:
    raw = connect(empty_database_url)
    raw.execute("CREATE SCHEMA circle; CREATE TABLE circle.pipeline_events (id int)")
    with Database(empty_database_url) as database, database.engine.connect() as connection:
        assert migrations.lost(connection) is None
        raw.execute("CREATE TABLE circle.pipelines (id int)")
        assert migrations.lost(connection) is None


@pytest.mark.parametrize("revision", ["base", "-1"])
def test_a_downgrade_without_a_revision_row_is_told(database_url: str, connect: Connect, revision: str) -> None:
    connect(database_url).execute("DELETE FROM circle.alembic_version")
    with pytest.raises(AdoptionError, match="the row with its revision is gone"):
        migrations.downgrade(database_url, revision)
