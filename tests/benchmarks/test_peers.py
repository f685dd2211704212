"""The peers that need no package of their own record their runs, and the program prints its table.

The others are not installed here: their modules are type-checked, and ``make bench-peers`` runs them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import psycopg
import pytest
from sqlalchemy.engine import make_url

from benchmarks import floor
from benchmarks.databases import Databases, Server
from benchmarks.peers import __main__ as program
from benchmarks.peers import environments, measure, naive_orm, process, raw_sql
from benchmarks.peers.environments import NotInstalledError, find_python
from benchmarks.peers.interface import PeerModule, Task
from benchmarks.peers.process import NotMeasuredError, open_process
from benchmarks.peers.registry import PEERS, Peer
from benchmarks.runs import count_round_trips
from benchmarks.table import Comparison
from tests.support import servers

ROOT = Path(__file__).parents[2]
PINNED = {
    name.lower()
    for path in environments.CONSTRAINTS
    for name in re.findall(r"^([\w.-]+)==[\d.]+$", path.read_text(), re.MULTILINE)
}


@pytest.fixture(scope="module")
def bench_server(server: servers.Server) -> Iterator[Server]:
    with Server(server.url) as prepared:
        yield prepared


@pytest.fixture
def databases(bench_server: Server) -> Iterator[Databases]:
    with bench_server.databases() as made:
        yield made


def task_on(url: str, count: int = 3) -> Task:
    return Task(make_url(url).set(drivername="postgresql").render_as_string(hide_password=False), count, floor.OUTPUT)


def recorded(task: Task, module: PeerModule) -> int:
    with psycopg.connect(task.url) as connection:
        count: int = floor.fetch_value(connection.execute(module.RECORDED))
    return count


@pytest.mark.parametrize("module", [naive_orm, raw_sql], ids=["naive-orm", "raw-sql"])
def test_peer_has_recorded_every_node_when_a_run_returns(databases: Databases, module: PeerModule) -> None:
    task = task_on(databases.floor_url)
    with module.prepare(task) as run:
        assert recorded(task, module) == 0
        run()
        assert recorded(task, module) == 3
        run()
        assert recorded(task, module) == 6


def test_naive_orm_stores_what_it_was_told(databases: Databases) -> None:
    task = task_on(databases.floor_url)
    with naive_orm.prepare(task) as run:
        run()
    with psycopg.connect(task.url) as connection:
        runs = connection.execute("SELECT status, started_at < completed_at FROM runs").fetchall()
        nodes = connection.execute(
            "SELECT node_id, status, output, started_at < completed_at FROM node_runs ORDER BY id"
        ).fetchall()
    assert runs == [("completed", True)]
    assert nodes == [(f"node-{at}", "completed", floor.OUTPUT, True) for at in range(3)]


def test_gatherings_statements_are_2n_plus_4_and_count_the_run(
    databases: Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_on(databases.floor_url)
    with floor.connect(databases.floor_url) as connection:
        monkeypatch.setattr(psycopg, "connect", lambda *_, **__: connection)
        with raw_sql.prepare(task) as run:
            run()  # prepares the statements
            assert count_round_trips(connection, run) == 2 * 3 + 4
            counters = connection.execute("SELECT run_count, success_count FROM circle.pipelines").fetchall()
            runs = connection.execute("SELECT status, current_node, logs FROM circle.pipeline_runs").fetchall()
    assert counters == [(2, 2)]
    assert [(status, node, [entry["node_id"] for entry in logs]) for status, node, logs in runs] == [
        ("completed", "node-2", ["node-0", "node-1", "node-2"])
    ] * 2


def execute(server: servers.Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"GATHERING_TEST_URL": server.url}
    command = [sys.executable, "-m", "benchmarks.peers", "--tiny", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_program_prints_ours_the_peers_and_the_floor_and_drops_its_databases(server: servers.Server) -> None:
    done = execute(server, "raw-sql", "naive-orm")
    assert (done.returncode, done.stderr) == (0, "")
    about, header, *lines = done.stdout.splitlines()
    assert re.fullmatch(r"PostgreSQL .+, fsync (on|off), synchronous_commit \w+; a run is a chain of 3 nodes", about)
    assert header.split() == ["what", "version", "a", "run", "floor", "ratio"]
    assert [line.split("  ")[0] for line in lines] == [
        "ours, step by step",
        "ours, by advance",
        "ours, by group commit, one caller",
        "GatheRing's own statements",
        "naive ORM: get, set, commit",
        "the floor, 2n + 2 bare statements",
    ]
    assert all(
        re.search(r"(gathering-pipeline|psycopg|SQLAlchemy) \d\S* +\S+ ms +\S+ ms +\d+\.\d\d$", line) for line in lines
    )
    with server.connect() as connection:
        left = connection.execute("SELECT datname FROM pg_database WHERE datname LIKE 'gathering_bench_%_peer'")
        assert left.fetchall() == []


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (NotInstalledError("ERROR: no network"), 0, "can't be installed: ERROR: no network"),
        (NotMeasuredError("ValueError: no server"), 1, "failed: ValueError: no server"),
    ],
    ids=["not installed", "failed"],
)
def test_peer_without_figures_is_one_line_that_says_why(
    bench_server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    status: int,
    text: str,
) -> None:
    def refuse(*_: object) -> Path:
        raise error

    monkeypatch.setattr(measure, "find_python", refuse)
    monkeypatch.setattr(program, "open_server", lambda: nullcontext(bench_server))
    monkeypatch.setattr(program, "remove_database_settings", lambda: None)
    monkeypatch.setattr(program, "measure_ours", lambda *_: iter([("ours", Comparison(0.002, 0.001, 2.0))]))
    assert program.main(["--tiny", "dbos"]) == status
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [" ".join(line.split()) for line in lines] == [
        f"ours gathering-pipeline {version('gathering-pipeline').split('+')[0]} 2 ms 1 ms 2.00",
        f"DBOS, a workflow of steps {text}",
        f"the floor, 2n + 2 bare statements psycopg {version('psycopg')} 1 ms 1 ms 1.00",
    ]


def test_environment_is_made_once_and_again_for_other_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[tuple[str, ...]] = []

    def note(*command: str) -> None:
        commands.append(command)
        (tmp_path / "dbos_workflow").mkdir(exist_ok=True)

    monkeypatch.setattr(environments, "_execute", note)
    for _ in range(2):
        assert find_python(PEERS["dbos"], tmp_path) == tmp_path / "dbos_workflow" / "bin" / "python"
    assert [command[2] for command in commands] == ["venv", "pip"]
    other = tmp_path / "constraints.txt"
    other.write_text("dbos==0\n")
    monkeypatch.setattr(environments, "CONSTRAINTS", (other,))
    find_python(PEERS["dbos"], tmp_path)
    assert [command[2] for command in commands] == ["venv", "pip"] * 2
    assert commands[-1][-4:] == ("--constraint", str(other), "dbos", "psycopg[binary]")


def test_failed_step_of_an_environment_raises_its_first_error() -> None:
    with pytest.raises(NotInstalledError, match=r"^ERROR: no$"):
        environments._execute(
            sys.executable, "-c", "import sys; print('hint'); print('ERROR: no'); print('ERROR: more'); sys.exit(1)"
        )


def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Peer:
    """A peer in a package of its own, whose module ends with this body."""
    folder = tmp_path / "benchmarks" / "peers"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    for name in ("__init__", "child", "interface"):
        (folder / f"{name}.py").write_text((ROOT / "benchmarks" / "peers" / f"{name}.py").read_text())
    (folder / "failing.py").write_text(
        "from contextlib import contextmanager\nRECORDED = 'SELECT 0'\n@contextmanager\ndef prepare(task):\n" + body
    )
    monkeypatch.setattr(process, "ROOT", tmp_path)
    return Peer("failing", "failing", "psycopg")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    yield lambda: None\n", "RuntimeError: 0 nodes are recorded when a run returns, 3 expected"),
        ("    print('noise')\n    raise ValueError('no server')\n    yield\n", "ValueError: no server"),
        ("    import os\n    os._exit(3)\n    yield\n", "its process ended with 3"),
    ],
    ids=["nothing recorded", "not prepared", "process gone"],
)
def test_peer_that_fails_has_no_figure(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str
) -> None:
    peer = failing(tmp_path, monkeypatch, body)
    with pytest.raises(NotMeasuredError) as failed:
        with open_process(Path(sys.executable), peer, task_on(database_url)) as started:
            started.record()
    assert str(failed.value) == message


def test_peer_that_hangs_is_killed(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = failing(tmp_path, monkeypatch, "    import time\n    yield lambda: time.sleep(60)\n")
    with open_process(Path(sys.executable), peer, task_on(database_url)) as started:
        monkeypatch.setattr(process, "PATIENCE", 0.2)
        with pytest.raises(NotMeasuredError, match="ended with -9"):
            started.record()


def test_modules_and_versions_of_all_peers_are_there() -> None:
    for peer in PEERS.values():
        assert find_spec(f"benchmarks.peers.{peer.module}") is not None
        assert peer.package.lower() in PINNED
        assert {requirement.split("[")[0] for requirement in peer.requirements} <= PINNED


def test_program_refuses_an_unknown_peer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        program.main(["raw-sql", "dbo"])
    assert stopped.value.code == 2
    assert "no peers called dbo; there are naive-orm, raw-sql" in capsys.readouterr().err
