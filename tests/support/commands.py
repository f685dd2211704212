"""The command line, in this process and as a program of its own."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from gathering_pipeline.cli.commands import cli
from tests.support.measuring import measured

ROOT = Path(__file__).parents[2]
PROGRAM = Path(sys.executable).with_name("gathering-pipeline")
PATIENCE = 60


def run(*words: str, input: str | bytes | None = None, url: str | None = None) -> Result:
    """A command in this process, which takes a tenth of the time of a new one."""
    environment = {} if url is None else {"DATABASE_URL": url}
    return CliRunner().invoke(cli, list(words), input=input, env=environment)


def succeed(*words: str, url: str | None = None, input: str | bytes | None = None) -> str:
    """What a command printed, which has to succeed."""
    done = run(*words, url=url, input=input)
    assert done.exit_code == 0, done.output
    return done.stdout


def read(*words: str, url: str | None = None) -> Any:
    """The JSON that a command printed."""
    return json.loads(succeed(*words, "--json", url=url))


def sentence(done: Result, code: int = 1) -> str:
    """The one sentence of a command that failed."""
    assert done.exit_code == code, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    lines = [line for line in done.stderr.splitlines() if not line.startswith("database: ")]
    assert lines[-1].startswith("Error: ")
    assert len(lines) == 1 or code == 2, done.stderr
    return lines[-1].removeprefix("Error: ")


def start(*words: str, url: str | None = None) -> subprocess.Popen[str]:
    """A program of its own, whose output is piped."""
    variables = {} if url is None else {"DATABASE_URL": url}
    return subprocess.Popen(
        [PROGRAM, *words], env=measured(**variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def in_terminal(
    *words: str, url: str | None = None, columns: int = 100, after: str = "", do: Callable[[], object] = lambda: None
) -> tuple[int, str]:
    """The exit code and the output of a program in a terminal; once it shows a text, something is done."""
    variables = {"TERM": "xterm", "COLUMNS": str(columns), "LINES": "40"}
    variables |= {} if url is None else {"DATABASE_URL": url}
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [PROGRAM, *words], env=measured(**variables), stdin=child, stdout=child, stderr=subprocess.DEVNULL
    )
    os.close(child)
    output, ends_at, waits = b"", time.monotonic() + PATIENCE, True
    while time.monotonic() < ends_at:
        if waits and after.encode() in output:
            waits = False
            do()
        if select.select([parent], [], [], 1)[0]:
            try:
                output += os.read(parent, 1 << 16)
            except OSError:  # the program has closed the terminal
                break
    os.close(parent)
    return process.wait(PATIENCE), output.decode()
