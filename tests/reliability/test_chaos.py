"""Faults from outside while callers write: every answer is true, every call returns within 20 s, and writes go on.

Each test prints a line of a table: how many acknowledged calls and events were lost, what is stored or was listened to
twice, how many answers were wrong, the longest call, and how long after the fault each caller had written again.

``GATHERING_CHAOS`` is the number of rounds (``make chaos``), and makes each of them longer; 1 short one unless it is
set. ``GATHERING_SEED`` repeats the moments.
"""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg
import pytest

from gathering_pipeline import Database, DatabaseSettings, DatabaseUnavailableError, is_transient, migrations
from tests.support import cluster, standbys
from tests.support.cluster import Node
from tests.support.ledger import HEADING, Ledger
from tests.support.proxy import Fault, Proxy, proxied
from tests.support.runs import store

ROUNDS = int(os.environ.get("GATHERING_CHAOS", "1"))
LONG = "GATHERING_CHAOS" in os.environ
SEED = int(os.environ.get("GATHERING_SEED", "20261127"))
LONGEST_CALL_S = 20
GAP_S = 1.0
"""Longest time from a failover until a caller has written again, of 95 of 100."""
DEFAULT = DatabaseSettings()
QUICK = DatabaseSettings(connect_timeout=timedelta(seconds=1), answer_timeout=timedelta(seconds=1))
PATIENT = DEFAULT if LONG else QUICK
SILENCE_S = 15.0 if LONG else 5.5
"""Longer than it takes to find that a server is silent."""


@dataclass
class Stage:
    """A server with callers.

    Attributes:
        node: The server.
        ledger: Its callers.
        proxy: Stands between them, if the fault is one of the network.
        chance: Of the seed.
    """

    node: Node
    ledger: Ledger
    chance: random.Random
    proxy: Proxy | None = None

    def sleep(self, longest: float) -> None:
        time.sleep(self.chance.uniform(0, longest))

    def go_on(self) -> list[float]:
        """Wait until each caller has written again."""
        return self.ledger.wait(self.ledger.mark())


@contextmanager
def staged(
    node: Node, name: str, settings: DatabaseSettings = DEFAULT, *, network: bool = False, url: str | None = None
) -> Iterator[Stage]:
    with ExitStack() as stack:
        proxy = None
        url = url or node.url
        with Database(node.url) as database, database.session() as session:
            pipeline = store(session, "a")
        if network:
            proxy, url = stack.enter_context(proxied(url))
        yield Stage(node, Ledger(url, pipeline, name, settings), random.Random(f"{SEED} {name}"), proxy)


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with cluster.nodes(1) as (one,):
        yield one


def judge(stage: Stage, node: Node, rounds: int, until: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """Print the line, and fail if an answer was untrue or late."""
    with node.connect() as raw:
        row = stage.ledger.close(raw, rounds, until)
    with capsys.disabled():
        print(f"\n{HEADING}\n{row}" if LONG else "", end="")
    assert (row.lost, row.doubled, row.wrong) == ([], [], []), row
    assert row.longest < LONGEST_CALL_S, row


def test_failover_to_a_synchronous_standby_loses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    until: list[float] = []
    with cluster.nodes() as servers:
        primary, standby = servers
        standby.follow_synchronously(primary)
        several = cluster.several(primary, standby)
        with staged(primary, "failover to a synchronous standby", url=several) as stage:
            with stage.ledger.calling(listeners=True):
                for number in range(ROUNDS):
                    if number:
                        standby.follow_synchronously(primary)
                    stage.go_on()
                    stage.sleep(0.5)
                    primary.kill()
                    stage.sleep(0.5)
                    standby.promote()
                    until += stage.go_on()
                    primary, standby = standby, primary
            judge(stage, primary, ROUNDS, until, capsys)
    if LONG:
        assert sorted(until)[int(len(until) * 0.95)] < GAP_S


def test_frozen_server_keeps_callers_for_seconds(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    until: list[float] = []
    rounds = 2 if LONG else 1
    with staged(node, "frozen server, 35 callers", PATIENT) as stage:
        with stage.ledger.calling(threads=20, tasks=15):
            for _ in range(rounds):
                stage.go_on()
                with node.frozen():
                    time.sleep(30 if LONG else SILENCE_S)
                until += stage.go_on()
        judge(stage, node, rounds, until, capsys)
    assert max(until) < 10


def silence(stage: Stage, proxy: Proxy) -> None:
    with proxy.during(Fault.SILENT):
        time.sleep(SILENCE_S)


def lose_answers(stage: Stage, proxy: Proxy) -> None:
    with proxy.during(Fault.DEAF):
        time.sleep(SILENCE_S)


def half_open(stage: Stage, proxy: Proxy) -> None:
    with proxy.during(Fault.HALF_OPEN):
        stage.sleep(1)


def reset(stage: Stage, proxy: Proxy) -> None:
    for _ in range(10):
        proxy.begin(Fault.RESET)
        proxy.begin(Fault.NONE)
        stage.sleep(0.1)


def cut_answers(stage: Stage, proxy: Proxy) -> None:
    for _ in range(20):
        proxy.cut_after(stage.chance.randint(0, 3000))
        stage.sleep(0.1)


NETWORK: dict[str, Callable[[Stage, Proxy], None]] = {
    "silent network": silence,
    "answers are lost": lose_answers,
    "half-open connections": half_open,
    "connections are reset": reset,
    "answers are cut after N bytes": cut_answers,
}


@pytest.mark.parametrize("name", NETWORK)
def test_faults_of_the_network_leave_no_untrue_answer(
    node: Node, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    until: list[float] = []
    rounds = min(ROUNDS, 5)
    with staged(node, name, PATIENT, network=True) as stage:
        assert stage.proxy is not None
        with stage.ledger.calling():
            for _ in range(rounds):
                stage.go_on()
                stage.sleep(0.3)
                NETWORK[name](stage, stage.proxy)
                until += stage.go_on()
        judge(stage, node, rounds, until, capsys)


def without_standby(stage: Stage, ending: str) -> None:
    """Nothing that is sent now may be acknowledged."""
    with standbys.absent(stage.node.url):
        begin = time.monotonic()
        with standbys.ending_waits(stage.node.url, ending) as ender:
            time.sleep(2 if LONG else 0.7)
        assert ender.ended
        if stage.ledger.latest_begin > begin:
            stage.ledger.wrong.append("acknowledged without the standby")


def cancel_waits(stage: Stage) -> None:
    without_standby(stage, standbys.CANCELLED)


def terminate_waits(stage: Stage) -> None:
    without_standby(stage, standbys.TERMINATED)


def shut_down_while_waiting(stage: Stage) -> None:
    with standbys.absent(stage.node.url):
        begin = time.monotonic()
        standbys.wait_for_waiting(stage.node.url)
        stage.node.restart()
        standbys.wait_for_waiting(stage.node.url)
        if stage.ledger.latest_begin > begin:
            stage.ledger.wrong.append("acknowledged without the standby")


def too_many_connections(stage: Stage) -> None:
    stage.node.end_sessions()
    with ExitStack() as stack:
        with suppress(psycopg.OperationalError):
            while True:
                stack.enter_context(stage.node.connect())
        time.sleep(0.5)


def read_only(stage: Stage) -> None:
    stage.node.set("default_transaction_read_only", "on")
    time.sleep(0.5)
    stage.node.set("default_transaction_read_only", "off")


def idle_timeouts(stage: Stage) -> None:
    stage.ledger.hold = stage.ledger.pause = 0.03
    for name in ("idle_session_timeout", "idle_in_transaction_session_timeout"):
        stage.node.set(name, "20")
    time.sleep(2 if LONG else 0.7)
    for name in ("idle_session_timeout", "idle_in_transaction_session_timeout"):
        stage.node.set(name, "0")
    stage.ledger.hold = stage.ledger.pause = 0


def role_timeouts(stage: Stage) -> None:
    limits = {"statement_timeout": 30, "lock_timeout": 20}
    with stage.node.connect() as raw:
        for name, limit in limits.items():
            raw.execute(f"ALTER ROLE postgres SET {name} = {limit}")
    stage.node.end_sessions()
    with stage.node.connect() as raw:
        for _ in range(20 if LONG else 5):
            raw.execute("BEGIN; LOCK circle.pipeline_runs IN EXCLUSIVE MODE")
            stage.sleep(0.2)
            raw.execute("COMMIT")
        for name in limits:
            raw.execute(f"ALTER ROLE postgres RESET {name}")
    stage.node.end_sessions()


SERVER: dict[str, Callable[[Stage], None]] = {
    "waits for the standby are cancelled": cancel_waits,
    "waits for the standby are terminated": terminate_waits,
    "shut down while commits wait": shut_down_while_waiting,
    "too many connections": too_many_connections,
    "read-only for a moment": read_only,
    "idle timeouts": idle_timeouts,
    "timeouts of the role": role_timeouts,
}


@pytest.mark.parametrize("name", SERVER)
def test_faults_of_the_server_leave_no_untrue_answer(node: Node, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    until: list[float] = []
    rounds = min(ROUNDS, 10)
    with staged(node, name) as stage:
        with stage.ledger.calling():
            for _ in range(rounds):
                stage.go_on()
                stage.sleep(0.2)
                SERVER[name](stage)
                until += stage.go_on()
        judge(stage, node, rounds, until, capsys)


# --- a full disk ---


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Fill the disk but for a few pages."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as out, suppress(OSError):
        while True:
            out.write(bytes(65536))
    try:
        yield
    finally:
        ballast.unlink()


@pytest.fixture
def disk() -> Iterator[Path]:
    """A file system of its own, if this user may mount one."""
    with TemporaryDirectory(prefix="gathering-") as name:
        mount = ["mount", "-t", "tmpfs", "-o", "size=200m,mode=755", "tmpfs", name]
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no disk can be filled: {done.stderr.strip()}")
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", "--lazy", name], check=False)


def test_full_disk_leaves_no_untrue_answer(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    until: list[float] = []
    rounds = min(ROUNDS, 5)
    with cluster.nodes(1, at=disk) as (node,), staged(node, "full disk") as stage:
        node.set("wal_keep_size", "0")
        node.set("max_wal_size", "64MB")
        with stage.ledger.calling():
            for _ in range(rounds):
                stage.go_on()
                with full(disk):
                    time.sleep(3 if LONG else 1)
                node.start_again()
                until += stage.go_on()
        judge(stage, node, rounds, until, capsys)


def test_migration_on_a_full_disk_goes_on_afterwards(disk: Path) -> None:
    with cluster.nodes(1, at=disk) as (node,):
        with node.connect() as raw:
            raw.execute("CREATE DATABASE fresh TEMPLATE template0")
        url = node.url.removesuffix("postgres") + "fresh"
        with full(disk), pytest.raises(DatabaseUnavailableError) as caught:
            migrations.upgrade(url)
        assert is_transient(caught.value)
        node.start_again()
        migrations.upgrade(url)
