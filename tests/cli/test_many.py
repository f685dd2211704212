"""``--urls``: one command on many databases, as a program of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import psycopg
import pytest
from click.testing import CliRunner, Result

from gathering_pipeline import ConfigurationError, migrations
from gathering_pipeline.cli.commands import cli
from gathering_pipeline.cli.many import read_targets
from tests.support.measuring import measured
from tests.support.servers import Server

Connect = Callable[[str], psycopg.Connection]

PROGRAM = Path(sys.executable).with_name("gathering-pipeline")
NUMBER = int(os.environ.get("GATHERING_DATABASES", "10"))
OLD = "007_pipeline_execution"
NOWHERE = "postgresql://me:s3cret@127.0.0.1:1/none"
LINE = re.compile(r"(\S+): (.*) \((\d+\.\d\d) s\)")
LIMIT_S = 60


def run(*words: str, input: str | None = None) -> Result:
    """A command in this process, for what ends before worker processes are made."""
    return CliRunner().invoke(cli, ["db", *words], input=input)


def program(*words: str, input: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PROGRAM, "db", *words],
        env=measured(**environment),
        input=input,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S + 10 * NUMBER,
    )


def lines_of(urls: dict[str, str]) -> str:
    return "".join(f"{name} {url}\n" for name, url in urls.items())


def results(output: str) -> dict[str, str]:
    """The result of each database."""
    return {match[1]: match[2] for line in output.splitlines() if (match := LINE.fullmatch(line))}


# --- the file --------------------------------------------------------------------------------------------------------


def test_read_targets_skips_comments_and_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "tenants"
    text = "# all\n\n  a postgresql://u:p@h/a  \n\t# b postgresql://h/b\nc\tpostgres://h1,h2/c?target_session_attrs=any\r\n"
    file.write_bytes(text.encode())
    found = read_targets(str(file))
    assert [target.name for target in found] == ["a", "c"]
    assert [target.url.database for target in found] == ["a", "c"]
    assert found[0].url.password == "p"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it has no line NAME URL"),
        ("# a\n\n", "it has no line NAME URL"),
        ("a\n", "line 1 has 1 words instead of NAME URL"),
        ("\na postgresql://u:s3cret@h/a now\n", "line 2 has 3 words instead of NAME URL"),
        ("postgresql://u:s3cret@h/a\n", "line 1 has 1 words instead of NAME URL"),
        ("a b:s3cret@h", "the URL in line 1 can't be read: write it as postgresql://USER"),
        (
            "a mysql://u:s3cret@h/d",
            "the URL in line 1 can't be used: mysql:// is not PostgreSQL",
        ),
        (
            "a postgresql://h/a\n#\na postgresql://u:s3cret@h/b\nb c d\n",
            "line 3 has the name a of line 1; line 4 has 3 words instead of NAME URL",
        ),
        (
            "x\n" * 25,
            f"{'; '.join(f'line {n} has 1 words instead of NAME URL' for n in range(1, 21))}; and 5 more",
        ),
    ],
)
def test_read_targets_names_each_wrong_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "tenants"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError) as caught:
        read_targets(str(file))
    assert str(caught.value).startswith(f"{file} can't be used: {message}")
    assert "s3cret" not in str(caught.value)


def test_command_with_wrong_line_does_nothing(empty_database_url: str, tmp_path: Path, connect: Connect) -> None:
    file = tmp_path / "tenants"
    file.write_text(f"a {empty_database_url}\nb\n", encoding="utf-8")
    done = run("upgrade", "--urls", str(file))
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == f"Error: {file} can't be used: line 2 has 1 words instead of NAME URL\n"
    found = connect(empty_database_url).execute("SELECT count(*) FROM pg_namespace WHERE nspname = 'circle'")
    assert found.fetchone() == (0,)
    file.write_bytes(b"a \xff\n")
    assert "the URL in line 1 can't be read" in run("check", "--urls", str(file)).stderr


def test_command_with_contradicting_options_exits_with_usage(database_url: str) -> None:
    for words in (
        ["check", "--urls", "-", "--url", database_url],
        ["doctor", "--urls", "-", "--url", database_url],
        ["check", "-j", "2"],
        ["doctor", "-j", "2"],
        ["check", "--urls", "-", "-j", "0"],
        ["check", "--urls", "/does/not/exist"],
    ):
        done = run(*words, input=f"a {database_url}\n")
        assert done.exit_code == 2, words


# --- many databases --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def old_template(server: Server) -> Iterator[str]:
    name = server.create()
    migrations.upgrade(server.database_url(name), OLD)
    yield name
    server.drop(name)


@contextmanager
def cloned(server: Server, template: str, number: int) -> Iterator[dict[str, str]]:
    made = [server.create(template) for _ in range(number)]
    try:
        yield {f"tenant-{place}": server.database_url(name) for place, name in enumerate(made)}
    finally:
        for name in made:
            server.drop(name)


def revision(connect: Connect, url: str) -> str:
    row = connect(url).execute("SELECT version_num FROM circle.alembic_version").fetchone()
    assert row is not None
    return str(row[0])


def test_upgrade_of_many_goes_on_after_failures(
    server: Server, old_template: str, connect: Connect, tmp_path: Path
) -> None:
    file, head = tmp_path / "tenants", migrations.head()
    with cloned(server, old_template, NUMBER + 1) as urls:
        ahead = urls.pop("tenant-0")
        connect(ahead).execute("UPDATE circle.alembic_version SET version_num = '099_future'")
        names = list(urls)
        wanted = {"ahead": ahead, names[0]: urls[names[0]], "nowhere": NOWHERE} | urls
        file.write_text(f"# of the test\n\n{lines_of(wanted)}", encoding="utf-8")
        begun = time.monotonic()
        done = program("upgrade", "--urls", str(file), "-j", "2")
        took = time.monotonic() - begun
        assert done.returncode == 1
        found = results(done.stdout)
        assert len(done.stdout.splitlines()) == len(found) == NUMBER + 2
        assert {found[name] for name in names} == {f"the schema is at revision {head}"}
        assert found["ahead"].startswith("failed: the schema is at revision 099_future, this code needs 011_lifecycle")
        assert found["nowhere"].startswith("failed: no answer from the PostgreSQL server at 127.0.0.1:1")
        assert f"Error: 2 of {NUMBER + 2} databases failed:\n" in done.stderr
        assert {line.split(":")[0].strip() for line in done.stderr.splitlines()[1:]} == {"ahead", "nowhere"}
        assert "s3cret" not in done.stdout + done.stderr
        for url in urls.values():
            assert revision(connect, url) == head
        assert revision(connect, ahead) == "099_future"
        print(f"{NUMBER} databases upgraded from {OLD} by two processes in {took:.1f} s")

        again = program("check", "--urls", "-", "-j", "2", input=lines_of(urls))
        assert (again.returncode, again.stderr) == (0, "")
        assert set(results(again.stdout).values()) == {f"the schema is at revision {head}"}


def test_each_command_prints_json(server: Server, old_template: str, template: str, connect: Connect) -> None:
    head = migrations.head()
    with cloned(server, template, 2) as new, cloned(server, old_template, 1) as old:
        urls = lines_of({"a": new["tenant-0"], "b": new["tenant-1"], "old": old["tenant-0"], "nowhere": NOWHERE})
        connect(new["tenant-1"]).execute("ALTER TABLE circle.pipelines DISABLE TRIGGER pipelines_accept")

        done = program("current", "--json", "-j", "3", "--urls", "-", input=urls)
        assert done.returncode == 1
        assert len([line for line in done.stderr.splitlines() if LINE.fullmatch(line)]) == 4
        rows = {row["name"]: row for row in json.loads(done.stdout)}
        assert {name: row["ok"] for name, row in rows.items()} == {"a": True, "b": True, "old": True, "nowhere": False}
        assert [rows[name]["revision"] for name in ("a", "b", "old")] == [head, head, OLD]
        assert rows["a"]["head"] == head
        assert rows["nowhere"]["error"].startswith("no answer from the PostgreSQL server")
        assert all(row["seconds"] > 0 for row in rows.values())

        reachable = "".join(line for line in urls.splitlines(keepends=True) if not line.startswith("nowhere"))
        sick = program("doctor", "--json", "--urls", "-", input=reachable)
        assert sick.returncode == 3
        assert {row["name"]: [one["code"] for one in row["findings"]] for row in json.loads(sick.stdout)} == {
            "a": [],
            "b": ["demoted_trigger"],
            "old": ["revision"],
        }
        assert results(sick.stderr)["b"] == "problems: demoted_trigger"
        repaired = program("doctor", "--repair", "--urls", "-", input=reachable)
        assert (repaired.returncode, repaired.stderr) == (0, "")
        assert results(repaired.stdout) == {
            "a": "no problems found",
            "b": "repaired: demoted_trigger",
            "old": "repaired: revision",
        }


@contextmanager
def silent_server() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"postgresql://me:s3cret@127.0.0.1:{listening.getsockname()[1]}/none"


@contextmanager
def started(
    *words: str, urls: dict[str, str], number: int = 1
) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """The command, once it has its worker processes."""
    process = subprocess.Popen(
        [PROGRAM, "db", *words, "--urls", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    process.stdin.write(lines_of(urls))
    process.stdin.close()
    process.stdin = None
    deadline = time.monotonic() + LIMIT_S
    try:
        while len(children := psutil.Process(process.pid).children()) < number:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield process, children
    finally:
        process.kill()
        process.wait()


def test_killed_worker_fails_on_its_database_only(database_url: str) -> None:
    with silent_server() as silent:
        urls = {"silent": silent, "a": database_url, "b": database_url}
        with started("current", urls=urls) as (process, children):
            time.sleep(0.1)
            children[0].kill()
            output, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    found = results(output)
    assert found["silent"] == "failed: its worker process ended with exit code -9"
    assert found["a"] == found["b"] == f"the schema is at revision {migrations.head()}"
    assert "silent: its worker process ended" in errors


def test_interrupt_ends_the_workers(server: Server, empty_database_url: str, connect: Connect) -> None:
    with connect(empty_database_url) as raw:
        raw.execute("SELECT pg_advisory_lock(%s)", [0x6761746865720007])  # the migrators wait
        urls = {"a": empty_database_url, "b": empty_database_url}
        with started("upgrade", "-j", "2", urls=urls, number=2) as (process, children):
            time.sleep(0.5)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            output, errors = process.communicate(timeout=LIMIT_S)
            assert psutil.wait_procs(children, timeout=LIMIT_S)[1] == []
    assert (process.returncode, output) == (1, "")
    assert errors.strip() == "Aborted!"
    migrations.upgrade(empty_database_url)
