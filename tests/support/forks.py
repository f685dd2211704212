"""Forked children of a test."""

from __future__ import annotations

import os
import pickle
import select
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

LIMIT_S = 30
"""Longest life of a child."""


class Child:
    """A forked child that runs an action, reports its result or its exception, and ends without cleaning up."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self._reader, writer = os.pipe()
        self.pid = fork()
        if self.pid == 0:
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(LIMIT_S)
                try:
                    result = (True, action())
                except BaseException as error:  # noqa: BLE001 - the parent raises it
                    result = (False, error)
                try:
                    report = pickle.dumps(result)
                except Exception:  # noqa: BLE001 - a result of another kind than the test expects
                    report = pickle.dumps((False, AssertionError(f"the child's result can't be pickled: {result!r}")))
                with os.fdopen(writer, "wb") as pipe:
                    pipe.write(report)
            finally:
                os._exit(0)
        os.close(writer)

    def result(self) -> Any:
        """What the action returned; raises what it raised."""
        deadline, report = time.monotonic() + LIMIT_S, b""
        with os.fdopen(self._reader, "rb", buffering=0) as reader:
            while select.select([reader], [], [], max(0, deadline - time.monotonic()))[0]:
                part = reader.read(65536)
                if not part:
                    break
                report += part
        status = end(self.pid)
        assert report, f"the child ended without a report: {status}"
        succeeded, value = pickle.loads(report)  # noqa: S301 - made by the child
        if not succeeded:
            raise value
        return value


def fork() -> int:
    """``os.fork``, which warns in a process with threads from Python 3.12 on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def end(pid: int) -> int:
    """Wait for a child and return its exit status; kill it if it lives on."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"the child {pid} did not end")


def in_child(action: Callable[[], Any]) -> Any:
    """Run an action in a forked child and return its result."""
    return Child(action).result()
