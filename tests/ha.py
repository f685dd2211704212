"""``make ha``: a cluster of Patroni, etcd and HAProxy on loopback, and the demo's workers through switchovers and failovers.

The programs come from Debian's packages, which are unpacked into a temporary folder: nothing is installed, and nothing
stays. Runs are created all the time; at the end each acknowledged run is completed, each node of it once, and the workers
are still the same processes. ``GATHERING_HA`` is the number of switchovers and of failovers, 3 unless it is set.
"""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from examples.demo import load_pipeline
from gathering_pipeline import (
    CommitIndeterminateError,
    Database,
    PipelineRepository,
    RunRepository,
    is_transient,
    migrations,
)
from tests.support.databases import scalar
from tests.support.servers import connect

ROUNDS = int(os.environ.get("GATHERING_HA", "3"))
PACKAGES = ("patroni", "etcd-server", "haproxy", "postgresql-15")
WORKERS = ("ada", "grace")
NODES = ("north", "south")
LIMIT_S = 120.0
QUIET_S = 3.0
"""How long callers write before and after each event."""
ROOT = Path(__file__).parents[1]

PATRONI = """
scope: gathering
name: {name}
restapi: {{listen: '127.0.0.1:{rest}', connect_address: '127.0.0.1:{rest}'}}
etcd3: {{host: '127.0.0.1:{etcd}'}}
bootstrap:
  dcs:
    ttl: 20
    loop_wait: 1
    retry_timeout: 3
    synchronous_mode: true
    postgresql: {{use_pg_rewind: true}}
  initdb: [encoding: UTF8, locale: C, auth-local: trust, auth-host: trust, data-checksums]
postgresql:
  listen: 127.0.0.1:{port}
  connect_address: 127.0.0.1:{port}
  data_dir: {folder}/{name}
  bin_dir: {programs}
  pgpass: {folder}/{name}.pgpass
  authentication:
    superuser: {{username: postgres, password: none}}
    replication: {{username: postgres, password: none}}
  pg_hba: ['local all all trust', 'host all all 127.0.0.1/32 trust', 'host replication all 127.0.0.1/32 trust']
  parameters: {{unix_socket_directories: '{folder}', fsync: 'off', wal_keep_size: 256MB}}
"""
HAPROXY = """
global
  maxconn 500
defaults
  mode tcp
  timeout connect 2s
  timeout client 1h
  timeout server 1h
listen primary
  bind 127.0.0.1:{port}
  option httpchk OPTIONS /primary
  http-check expect status 200
  default-server inter 500ms fall 2 rise 1 on-marked-down shutdown-sessions
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"after {LIMIT_S:.0f} s still not: {what}")
        time.sleep(0.05)


@dataclass
class Cluster:
    """The programs of a cluster.

    Attributes:
        folder: Everything is in it.
        port: Of HAProxy, which leads to the primary.
        rest: The port of the REST API of each Patroni.
    """

    folder: Path
    port: int = field(default_factory=free_port)
    etcd: int = field(default_factory=free_port)
    rest: dict[str, int] = field(default_factory=lambda: {name: free_port() for name in NODES})
    ports: dict[str, int] = field(default_factory=lambda: {name: free_port() for name in NODES})
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/postgres"

    def node_url(self, name: str) -> str:
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.ports[name]}/postgres"

    @property
    def packages(self) -> Path:
        return self.folder / "packages"

    def unpack(self) -> None:
        """Download the packages that are not installed, and unpack them."""
        self.packages.mkdir()
        plan = subprocess.run(
            ["apt-get", "install", "--simulate", "--no-install-recommends", *PACKAGES],
            check=True,
            capture_output=True,
            text=True,
        )
        names = [line.split()[1] for line in plan.stdout.splitlines() if line.startswith("Inst ")]
        if names:
            subprocess.run(["apt-get", "download", "-qq", *names], check=True, cwd=self.packages, capture_output=True)
        for archive in self.packages.glob("*.deb"):
            subprocess.run(["dpkg", "-x", archive, self.packages], check=True)

    def start_program(self, name: str, *command: object) -> None:
        """Start a program in a process group of its own, as a user that PostgreSQL accepts."""
        libraries = self.packages / "usr" / "lib"
        environment = os.environ | {
            "LD_LIBRARY_PATH": str(libraries / "x86_64-linux-gnu"),
            "PYTHONPATH": str(libraries / "python3" / "dist-packages"),
            "HOME": str(self.folder),
        }
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                list(map(str, command)),
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=log,
                process_group=0,
                user="nobody" if os.geteuid() == 0 else None,
            )

    def program(self, path: str) -> Path:
        """A program of a package: unpacked, or installed before."""
        unpacked = self.packages / path
        return unpacked if unpacked.exists() else Path("/") / path

    def start(self) -> None:
        here = f"http://127.0.0.1:{self.etcd}"
        peer = f"http://127.0.0.1:{free_port()}"
        self.start_program(
            "etcd",
            self.program("usr/bin/etcd"),
            *("--data-dir", self.folder / "etcd", "--listen-client-urls", here, "--advertise-client-urls", here),
            *(
                "--listen-peer-urls",
                peer,
                "--initial-advertise-peer-urls",
                peer,
                "--initial-cluster",
                f"default={peer}",
            ),
        )
        for name in NODES:
            self.start_node(name)
        servers = "".join(
            f"  server {name} 127.0.0.1:{self.ports[name]} check port {self.rest[name]}\n" for name in NODES
        )
        config = self.folder / "haproxy.cfg"
        config.write_text(HAPROXY.format(port=self.port) + servers)
        self.start_program("haproxy", self.program("usr/sbin/haproxy"), "-db", "-f", config)
        self.wait_for_standby()

    def start_node(self, name: str) -> None:
        config = self.folder / f"{name}.yml"
        values = {"etcd": self.etcd, "rest": self.rest[name], "port": self.ports[name], "folder": self.folder}
        programs = self.program("usr/lib/postgresql/15/bin")
        config.write_text(PATRONI.format(name=name, programs=programs, **values))
        self.start_program(name, "/usr/bin/python3", self.program("usr/bin/patroni"), config)

    def ask(self, name: str, path: str, body: dict[str, Any] | None = None) -> str:
        """What the Patroni of a node answers; empty if it doesn't."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.rest[name]}{path}", data)
        with suppress(OSError, urllib.error.URLError), urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - of http
            text: str = answer.read().decode()
            return text
        return ""

    def leader(self) -> str | None:
        return next((name for name in NODES if self.ask(name, "/primary")), None)

    def wait_for_standby(self) -> None:
        wait_until(self.has_standby, "a primary with a synchronous standby")

    def has_standby(self) -> bool:
        """Whether the primary has a synchronous standby, and Patroni lets it take over."""
        leader = self.leader()
        if leader is None:
            return False
        members = json.loads(self.ask(leader, "/cluster") or '{"members": []}')["members"]
        if "sync_standby" not in [member["role"] for member in members]:
            return False
        sync = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync' AND state = 'streaming'"
        with suppress(psycopg.OperationalError), connect(self.node_url(leader)) as raw:
            return bool(scalar(raw, sync))
        return False

    def switch_over(self) -> None:
        """Let Patroni exchange primary and standby."""
        leader = self.leader()
        assert leader is not None
        candidate = next(name for name in NODES if name != leader)
        self.ask(leader, "/switchover", {"leader": leader, "candidate": candidate})
        wait_until(lambda: bool(self.ask(candidate, "/primary")), f"{candidate} is the primary")

    def fail_over(self) -> None:
        """Kill the primary and its Patroni, and start them again once the standby has taken its place."""
        leader = self.leader()
        assert leader is not None
        other = next(name for name in NODES if name != leader)
        postmaster = int((self.folder / leader / "postmaster.pid").read_text(encoding="utf-8").split()[0])
        self.kill(leader)
        with suppress(ProcessLookupError):
            os.kill(postmaster, signal.SIGKILL)  # of a session of its own; its children end with it
        wait_until(lambda: bool(self.ask(other, "/primary")), f"{other} is the primary")
        self.start_node(leader)

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)

    def stop(self) -> None:
        for name in NODES:
            if name in self.processes:
                self.processes[name].terminate()
        for name in NODES:
            if name in self.processes:
                with suppress(subprocess.TimeoutExpired):
                    self.processes[name].wait(30)
        for name in list(self.processes):
            self.kill(name)
        for name in NODES:
            with suppress(OSError, ValueError, IndexError):
                pid = int((self.folder / name / "postmaster.pid").read_text(encoding="utf-8").split()[0])
                os.kill(pid, signal.SIGKILL)


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="gathering-ha-"))
    folder.chmod(0o755)
    cluster = Cluster(folder)
    try:
        cluster.unpack()
        if os.geteuid() == 0:
            shutil.chown(folder, "nobody")
        cluster.start()
        yield cluster
    except BaseException:
        for log in folder.glob("*.log"):
            print(f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:]))
        raise
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


class Feeder(threading.Thread):
    """Creates runs, each again until it is acknowledged.

    Attributes:
        acknowledged: The ids of the runs, and when.
        errors: How often each error was raised.
        wrong: Errors that are not transient.
    """

    def __init__(self, url: str, pipeline: int) -> None:
        super().__init__()
        self.url = url
        self.pipeline = pipeline
        self.acknowledged: dict[int, float] = {}
        self.errors: dict[str, int] = {}
        self.wrong: list[str] = []
        self.over = threading.Event()

    def run(self) -> None:
        with Database(self.url) as database:
            while not self.over.wait(0.2):
                key = f"run {len(self.acknowledged)}"
                while True:
                    try:
                        with database.session(autocommit=True) as session:
                            run = RunRepository(session).create(self.pipeline, idempotency_key=key)
                        self.acknowledged[run.id] = time.monotonic()
                        break
                    except Exception as error:  # noqa: BLE001 - counted
                        kind = type(error).__name__
                        self.errors[kind] = self.errors.get(kind, 0) + 1
                        if not is_transient(error) and not isinstance(error, CommitIndeterminateError):
                            self.wrong.append(f"{kind}: {error}")
                        time.sleep(0.05)

    def gap(self, since: float) -> float:
        """The longest time between two acknowledged runs."""
        times = [at for at in self.acknowledged.values() if at >= since]
        return max((later - earlier for earlier, later in itertools.pairwise(times)), default=0.0)


def start_worker(url: str, name: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "examples.worker", "--name", name, "--concurrency", "2"],
        cwd=ROOT,
        env=os.environ | {"GATHERING_DATABASE_URL": url},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def main() -> None:
    with running_cluster() as cluster:
        migrations.upgrade(cluster.url)
        with Database(cluster.url) as database, database.session() as session:
            pipeline = PipelineRepository(session).create(load_pipeline("code_review.json")).id
        workers = {name: start_worker(cluster.url, name) for name in WORKERS}
        feeder = Feeder(cluster.url, pipeline)
        feeder.start()
        try:
            print(f"{'event':12} {'writes stand still':>20}   errors of the creator", flush=True)
            for kind, event in (("switchover", cluster.switch_over), ("failover", cluster.fail_over)):
                for _ in range(ROUNDS):
                    time.sleep(QUIET_S)
                    feeder.errors, begin = {}, time.monotonic()
                    event()
                    cluster.wait_for_standby()
                    time.sleep(QUIET_S)
                    print(f"{kind:12} {feeder.gap(begin - 1):18.1f} s   {feeder.errors}", flush=True)
            feeder.over.set()
            feeder.join()
            ends = judge(cluster.url, feeder)
            alive = {name: worker.poll() is None for name, worker in workers.items()}
            for worker in workers.values():
                worker.terminate()
            exits = {name: worker.wait(30) for name, worker in workers.items()}
        finally:
            feeder.over.set()
            for worker in workers.values():
                worker.kill()
                worker.wait()
    print(f"{len(feeder.acknowledged)} runs: {ends}; workers alive: {alive}, exit codes: {exits}")
    if ends["lost"] or ends["doubled"] or feeder.wrong or not all(alive.values()) or any(exits.values()):
        raise SystemExit(f"not as it should be: {feeder.wrong[:3]}")


def judge(url: str, feeder: Feeder) -> dict[str, int]:
    """Wait until no run is live, and compare with what was acknowledged."""
    with Database(url) as database:

        def is_done() -> bool:
            with database.session() as session:
                counts = RunRepository(session).counts()
            return not any(number for status, number in counts.items() if status.value in ("pending", "running"))

        wait_until(is_done, "all runs are completed")
        with database.engine.connect() as connection:
            completed = set(
                connection.exec_driver_sql("SELECT id FROM circle.pipeline_runs WHERE status = 'completed'").scalars()
            )
            doubled = connection.exec_driver_sql(
                "SELECT count(*) FROM (SELECT FROM circle.pipeline_events WHERE type = 'pipeline_node.completed'"
                " GROUP BY run_id, node_id HAVING count(*) > 1) d"
            ).scalar_one()
    return {
        "completed": len(completed),
        "lost": len(set(feeder.acknowledged) - completed),
        "doubled": doubled,
    }


if __name__ == "__main__":
    main()
