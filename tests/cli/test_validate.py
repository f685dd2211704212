"""``validate``: every problem of files, without a database."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gathering_pipeline import PipelineStatus, RunStatus
from gathering_pipeline.cli import files, pipelines, runs
from tests.support.commands import ROOT, run
from tests.support.graphs import CYCLE, GOOD, NODES, UNFINISHED, values

HEAVY = {"sqlalchemy", "alembic", "psycopg", "pydantic_settings", "asyncio", "rich.console"}


def write(path: Path, value: object) -> str:
    path.write_text(json.dumps(value), encoding="utf-8")
    return str(path)


def test_validate_reports_every_problem_of_every_file(tmp_path: Path) -> None:
    good = write(tmp_path / "good.json", values(GOOD))
    cycle = write(tmp_path / "cycle.json", values((NODES, CYCLE)) | {"colour": 1, "timeout_seconds": -1})
    unnamed = write(tmp_path / "unnamed.json", {"nodes": [UNFINISHED], "edges": []})
    done = run("validate", good, cycle, unnamed)
    assert done.exit_code == 1
    assert [line.partition(".json: ")[2].partition(": ")[0] for line in done.stdout.splitlines()] == [
        "valid",
        "error invalid_field",
        "error invalid_field",
        "error cycle",
        "error invalid_field",
        "warning orphan",
        "error missing_config",
        "error missing_config",
    ]
    assert f"{cycle}: error invalid_field: colour: is not a field of a pipeline\n" in done.stdout
    assert "nodes[0].config.agent_id: agent node 'a' is missing its agent_id" in done.stdout
    reports = json.loads(run("validate", "--json", good, cycle, unnamed).stdout)
    assert [(report["file"], report["valid"], report["error"]) for report in reports] == [
        (good, True, None),
        (cycle, False, None),
        (unnamed, False, None),
    ]
    assert reports[2]["issues"][2]["loc"] == ["nodes", 0, "config", "agent_id"]
    assert run("validate", good).exit_code == 0


@pytest.mark.parametrize(("status", "code"), [("draft", 0), ("paused", 0), ("active", 1), (None, 1)])
def test_validate_of_incomplete_pipeline_succeeds_as_import_does(tmp_path: Path, status: str | None, code: int) -> None:
    status_field: dict[str, Any] = {} if status is None else {"status": status}
    done = run("validate", write(tmp_path / "p.json", values(([UNFINISHED], [])) | status_field))
    assert done.exit_code == code
    assert (": incomplete missing_config:" in done.stdout) == (code == 0)


def test_validate_reads_stdin_and_byte_order_mark() -> None:
    done = run("validate", "-", input=b"\xef\xbb\xbf" + json.dumps(values(GOOD)).encode())
    assert (done.exit_code, done.stdout) == (0, "-: valid\n")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is not JSON: line 1, column 1: expecting value"),
        (b"{'name': 1}", "the file is not JSON: line 1, column 2: expecting property name"),
        (b'{"name": "\xe9"}', "the file is not UTF-8: byte 11 is no character"),
        (b"\xff\xfe{\0}\0", "the file is not UTF-8: byte 1 is no character"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "the file is not JSON that can be read"),
        (b"[]", "the file has a value of type list, not a JSON object"),
        (b"null", "the file has null, not a JSON object"),
    ],
    ids=["empty", "quotes", "latin-1", "utf-16", "deep", "digits", "list", "null"],
)
def test_validate_of_unreadable_file_prints_one_sentence(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(content)
    done = run("validate", str(path))
    assert (done.exit_code, done.stdout.count("\n")) == (1, 1)
    assert f"{path}: error: " in done.stdout
    assert reason in done.stdout


def test_validate_of_missing_and_huge_file_prints_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "error: the file can't be read: No such file" in run("validate", str(tmp_path / "none.json")).stdout
    assert "error: the file can't be read: Is a directory" in run("validate", str(tmp_path)).stdout
    monkeypatch.setattr(files, "MOST_BYTES", 1 << 20)
    assert "error: the file is larger than 1 MiB" in run("validate", "/dev/zero").stdout


def test_validate_escapes_control_characters(tmp_path: Path) -> None:
    node = {"id": "\x1b[31mred\u202e\x9b", "type": "spaceship", "name": "[bold]"}
    path = write(tmp_path / "p\x07.json", values(([node], [])))
    lines, shown = run("validate", path).stdout, run("validate", "--json", path).stdout
    assert all(line.isprintable() for line in [*lines.splitlines(), *shown.splitlines()])
    assert json.loads(shown)[0]["issues"][0]["node_id"] == node["id"]


def test_statuses_of_options_are_all_there_are() -> None:
    assert list(pipelines.STATUSES) == list(PipelineStatus)
    assert list(runs.STATUSES) == list(RunStatus)


@pytest.mark.parametrize("words", [["--help"], ["validate", "-"], ["runs", "--help"], ["runs", "list", "--help"]])
def test_command_without_database_loads_no_database_library(words: list[str]) -> None:
    unused = HEAVY if "validate" in words else HEAVY | {"pydantic"}
    code = (
        f"import sys; sys.argv = ['gathering-pipeline', *{words!r}]\n"
        "from gathering_pipeline.cli import main\n"
        "try: main()\n"
        f"finally: print(sorted({unused!r} & set(sys.modules)), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=json.dumps(values(GOOD)), capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == "[]\n"
