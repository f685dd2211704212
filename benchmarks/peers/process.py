"""The process of a peer, from outside; ``child.py`` is its inside."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from benchmarks.peers.environments import ROOT
from benchmarks.peers.interface import Task
from benchmarks.peers.registry import Peer

PATIENCE = 60.0
"""Seconds after which a process that gives no answer is killed."""

SETTINGS = ("DBOS_", "OTEL_", "PGQUEUER_", "PROCRASTINATE_")
"""Prefixes of variables that would change how a peer works."""


class NotMeasuredError(Exception):
    """The process of a peer failed; the message is one line."""


class Process:
    """A process that waits for the next run.

    Attributes:
        version: The version of the peer.
    """

    def __init__(self, process: subprocess.Popen[str], task: Task, log: IO[str]) -> None:
        self._process = process
        self._log = log
        self.version: str = self._ask(json.dumps(asdict(task)), "version")

    def record(self) -> float:
        """Record a run; its seconds, by the clock of the process."""
        seconds: float = self._ask("", "seconds")
        return seconds

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None, "it was opened with a pipe"
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _ask(self, line: str, key: str) -> Any:
        assert self._process.stdin is not None, "it was opened with a pipe"
        assert self._process.stdout is not None, "the same"
        killer = threading.Timer(PATIENCE, self._process.kill)
        killer.start()
        try:
            with suppress(BrokenPipeError):  # it has ended, and there is no answer either
                print(line, file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        finally:
            killer.cancel()
        if answer:
            return json.loads(answer)[key]
        status = self._process.wait(PATIENCE)
        self._log.seek(0)
        words = [text.strip() for text in self._log if text.strip()]
        raise NotMeasuredError(words[-1] if words else f"its process ended with {status}")


@contextmanager
def open_process(python: Path, peer: Peer, task: Task) -> Iterator[Process]:
    """Start a process that is ready to record runs, and end it.

    Raises:
        NotMeasuredError: It failed; so does a call of its.
    """
    command = [str(python), "-m", "benchmarks.peers.child", peer.module, peer.package]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as started,
    ):
        try:
            process = Process(started, task, log)
            yield process
            process.close()
        finally:
            started.kill()
