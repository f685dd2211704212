"""Every benchmark runs in its tiny form: all rows are there, and what they measure is stored."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from benchmarks import breakdown, floor, growth, suite
from benchmarks.__main__ import main
from benchmarks.databases import Databases, Server
from benchmarks.graphs import chain
from benchmarks.runs import count_round_trips
from benchmarks.table import Row, Size
from tests.support import servers

ROOT = Path(__file__).parents[2]

ROWS = {
    "steps": 2,
    "advance": 3,
    "record": 2,
    "workers": 5,
    "group": 3,
    "creators": 1,
    "claims": 2,
    "create": 3,
    "trips": 6,
    "wal": 3,
    "events": 6,
    "import": 2,
    "load": 1,
    "history": 4,
    "validate": 19,
    "guard": 73,
}
"""Rows of each benchmark."""

STORED: dict[str, tuple[Counter[str], Counter[str]]] = {
    "steps": (Counter(completed=4), Counter(completed=4)),
    "advance": (Counter(completed=6), Counter(completed=6)),
    "record": (Counter(completed=4), Counter(completed=4)),
    "create": (Counter(pending=6), Counter(pending=3)),
    "trips": (Counter(completed=54), Counter()),
    "wal": (Counter(completed=9), Counter(completed=3)),
    "import": (Counter(), Counter()),
    "load": (Counter(), Counter()),
    "history": (Counter(completed=5, failed=1, cancelled=1), Counter()),
    "validate": (Counter(), Counter()),
    "guard": (Counter(), Counter()),
}
"""Runs by status that a benchmark leaves in our database and in the floor's; the others count what time allows."""

NODE_RUNS = {"steps": 14, "advance": 22, "record": 14, "create": 28}
"""Node runs that both sides store."""

LEVELS = [
    *("SELECT 1", "floor", "psycopg, functions", "SQLAlchemy, functions", "repository"),
    *("psycopg, advance_run", "SQLAlchemy, advance_run", "repository.advance", "a session for each call"),
]


@pytest.fixture(scope="module")
def bench_server(server: servers.Server) -> Iterator[Server]:
    with Server(server.url) as prepared:
        yield prepared


@pytest.fixture
def databases(bench_server: Server) -> Iterator[Databases]:
    with bench_server.databases() as made:
        yield made


def run_counts(url: str) -> Counter[str]:
    with servers.connect(url) as connection:
        return Counter(
            dict(connection.execute("SELECT status, count(*) FROM circle.pipeline_runs GROUP BY 1").fetchall())
        )


def check_round_trips(rows: dict[str, Row]) -> None:
    """Step by step 2n + 3, by advance n + 2, reported afterwards 1."""
    counted = [int(row.ours) for row in rows.values()]
    assert counted == [2 * 3 + 3, 3 + 2, 1, 2 * 4 + 3, 4 + 2, 1]


def check_workers(rows: dict[str, Row], databases: Databases) -> None:
    """Every run was claimed once."""
    assert rows["runs that were claimed twice"].ours == "0"
    ours, base = run_counts(databases.our_url), run_counts(databases.floor_url)
    assert set(base) == {"completed"}
    assert base["completed"] >= 8  # two workers, two rounds, a run of warm-up and one that is timed
    assert ours["completed"] >= 8
    assert set(ours) <= {"completed", "pending"}


def node_run_count(url: str) -> int:
    with servers.connect(url) as connection:
        count: int = floor.fetch_value(connection.execute("SELECT count(*) FROM circle.pipeline_node_runs"))
    return count


def can_be_zero(row: Row) -> bool:
    """Rows that count faults, and rows whose figure is a difference of two times."""
    return row.name.startswith(
        ("runs that were claimed twice", "modules of SQLAlchemy", "checks", "commit to listener")
    )


def test_expected_rows_are_listed_for_every_benchmark() -> None:
    assert list(ROWS) == list(suite.BENCHMARKS)


@pytest.mark.parametrize("name", suite.BENCHMARKS)
def test_benchmark_alone_yields_its_rows_and_stores_its_runs(databases: Databases, name: str) -> None:
    rows = list(suite.BENCHMARKS[name](databases, Size.TINY))
    assert len({row.name for row in rows}) == len(rows) == ROWS[name]
    assert [row for row in rows if not math.isfinite(row.ratio)] == []
    assert [row for row in rows if row.ratio <= 0 and not can_be_zero(row)] == []
    assert all(row.ours and row.floor for row in rows)
    if name in STORED:
        assert (run_counts(databases.our_url), run_counts(databases.floor_url)) == STORED[name]
    if name in NODE_RUNS:
        assert node_run_count(databases.our_url) == node_run_count(databases.floor_url) == NODE_RUNS[name]
    by_name = {row.name: row for row in rows}
    if name == "trips":
        check_round_trips(by_name)
    if name == "workers":
        check_workers(by_name, databases)


def test_floor_takes_2n_plus_2_round_trips(databases: Databases) -> None:
    pipeline = databases.store(chain(5))
    record = partial(floor.record_run, databases.floor.execute, pipeline.floor, 5)
    record()  # prepares the statements
    assert count_round_trips(databases.floor, record) == 2 * 5 + 2
    assert run_counts(databases.floor_url) == {"completed": 2}


def test_breakdown_measures_every_call_on_every_level(databases: Databases) -> None:
    levels = dict(breakdown.measure(databases, Size.TINY))
    assert list(levels) == LEVELS
    steps = {"create", "start", "start_node", "complete_node", "finish"}
    advance = {"create", "first", "advance", "last"}
    assert {name: set(figures) for name, figures in levels.items()} == {
        "SELECT 1": {"round trip"},
        "floor": steps - {"start"},
        "psycopg, functions": steps,
        "SQLAlchemy, functions": steps,
        "repository": steps,
        "psycopg, advance_run": advance,
        "SQLAlchemy, advance_run": advance,
        "repository.advance": advance,
        "a session for each call": {"SELECT 1"},
    }
    assert all(time > 0 for figures in levels.values() for time in figures.values())
    assert run_counts(databases.our_url) == {"completed": 14}
    assert run_counts(databases.floor_url) == {"completed": 2}


def test_breakdown_measures_every_call_without_each_kind_of_guard(bench_server: Server) -> None:
    levels = dict(breakdown.measure_guards(bench_server, Size.TINY))
    assert list(levels) == list(breakdown.WITHOUT)
    calls = {"create", "start", "start_node", "complete_node", "finish", "first", "advance", "last"}
    assert {frozenset(figures) for figures in levels.values()} == {frozenset(calls)}


def test_program_prints_the_benchmarks_in_the_order_asked_for(server: servers.Server) -> None:
    environment = os.environ | {"GATHERING_TEST_URL": server.url, "GATHERING_POOL_SIZE": "not a number"}
    command = [sys.executable, "-m", "benchmarks", "--tiny", "wal", "steps"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    header, *lines = done.stdout.splitlines()
    assert header.split() == ["what", "ours", "floor", "ratio", "bar"]
    assert [line.split("  ")[0] for line in lines] == [
        "write-ahead log of a run of 4 nodes, step by step",
        "write-ahead log of a run of 4 nodes, by advance",
        "write-ahead log of a run of 4 nodes, by record",
        "record a run of 3 nodes, step by step",
        "record a run of 4 nodes, step by step",
    ]
    assert all(line.endswith(("met", "missed")) for line in lines)


def test_breakdown_program_prints_every_level(
    bench_server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(breakdown, "open_server", lambda: nullcontext(bench_server))
    monkeypatch.setattr(breakdown, "remove_database_settings", lambda: None)
    breakdown.main(["--tiny"])
    assert [line[:34].strip() for line in capsys.readouterr().out.splitlines()] == [*LEVELS, *breakdown.WITHOUT]


def test_program_refuses_an_unknown_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["steps", "stepps"])
    assert stopped.value.code == 2
    assert "no benchmarks called stepps; there are steps, advance" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (Row("r", "1 ms", "1 ms", 1.0, 1.2), "  <= 1.2  met"),
        (Row("r", "1 ms", "1 ms", 1.3, 1.2), "  <= 1.2  missed"),
        (Row.of_rates("r", 4.0, 1.0, 3.5), "  >= 3.5  met"),
        (Row.of_rates("r", 3.0, 1.0, 3.5), "  >= 3.5  missed"),
        (Row.of_times("r", 3.0, 1.0, None), ""),
    ],
)
def test_verdict_of_a_row_compares_its_ratio_with_its_bar(row: Row, verdict: str) -> None:
    assert row.verdict() == verdict


def test_growth_prints_every_call_and_draws_it(
    server: servers.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GATHERING_TEST_URL", server.url)
    growth.main(["--tiny", "--plot", str(tmp_path / "growth.svg")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == [
        *("create", "claim", "heartbeat", "start_node", "complete_node", "advance", "get and nodes", "search"),
        *("counts", "statistics", "events", "recover and expire", "cancel", "record_run", "purge"),
    ]
    assert all(float(number) > 0 for line in lines[1:] for number in line[22:].split()[:4])
    drawing = ET.parse(tmp_path / "growth.svg")  # noqa: S314 - our own
    assert len(drawing.findall("{*}polyline")) == 15
