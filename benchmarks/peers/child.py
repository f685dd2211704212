"""The process of a peer: ``python -m benchmarks.peers.child MODULE PACKAGE``.

It reads the task as a line of JSON. Each line after that is one run; at the end of the input it leaves. Every answer is
a line of JSON: first the version of the package, then for each run its seconds. Only ``measure.py`` calls it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

import psycopg

from benchmarks.peers.interface import Task

if TYPE_CHECKING:
    from benchmarks.peers.interface import PeerModule


def main(module_name: str, package: str) -> None:
    """Record a run for each line of the input."""
    # What a peer prints must not get between the answers.
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        task = Task(**json.loads(sys.stdin.readline()))
        module = cast("PeerModule", importlib.import_module(f"benchmarks.peers.{module_name}"))
        with psycopg.connect(task.url, autocommit=True) as watcher, module.prepare(task) as run:
            expected = _recorded(watcher, module)
            print(json.dumps({"version": version(package)}), file=answers)
            for _ in sys.stdin:
                begin = time.perf_counter()
                run()
                seconds = time.perf_counter() - begin
                expected += task.count
                recorded = _recorded(watcher, module)
                if recorded != expected:
                    raise RuntimeError(f"{recorded} nodes are recorded when a run returns, {expected} expected")
                print(json.dumps({"seconds": seconds}), file=answers)


def _recorded(watcher: psycopg.Connection[tuple[Any, ...]], module: PeerModule) -> int:
    row = watcher.execute(module.RECORDED).fetchone()
    assert row is not None
    count: int = row[0]
    return count


if __name__ == "__main__":
    main(*sys.argv[1:])
