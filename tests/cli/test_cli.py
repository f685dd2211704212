"""``gathering-pipeline``, in this process and as a program of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from click.testing import CliRunner, Result
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy.engine import make_url

from gathering_pipeline import migrations, migrator
from gathering_pipeline.cli.commands import cli
from tests import generated
from tests.support.measuring import measured
from tests.support.schema import catalog, run_psql

Connect = Callable[[str], psycopg.Connection]

ROOT = Path(__file__).parents[2]
PROGRAM = Path(sys.executable).with_name("gathering-pipeline")


def run(*words: str, input: str | None = None, **environment: str) -> Result:
    """A command in this process, which takes a tenth of the time of a new one."""
    return CliRunner().invoke(cli, ["db", *words], input=input, env=environment)


def program(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The installed command, which shares nothing with this process."""
    return subprocess.run(
        [PROGRAM, *words], env=measured(**environment), capture_output=True, text=True, check=False, timeout=120
    )


# --- the whole way, as an operator goes it ---------------------------------------------------------------------------


def test_upgrade_session_from_preflight_to_doctor_succeeds(empty_database_url: str, connect: Connect) -> None:
    where, head = {"DATABASE_URL": empty_database_url}, migrations.head()
    assert run("current", **where).stdout == "the schema is at revision none\n"
    assert run("upgrade", "007_pipeline_execution", **where).exit_code == 0
    raw = connect(empty_database_url)
    raw.execute("INSERT INTO circle.pipelines (name) SELECT 'p' FROM generate_series(1, 1234); ANALYZE")

    with raw.transaction():
        raw.execute("SELECT FROM circle.pipelines")
        looked = run("preflight", **where)
    assert looked.exit_code == 3
    assert f"the schema is at revision 007_pipeline_execution; {len(pending())} steps to {head}" in looked.stdout
    assert [line for line in looked.stdout.splitlines() if "1,234" in line and "ACCESS EXCLUSIVE" in line]
    assert f"blocked by session {raw.info.backend_pid}" in looked.stdout
    assert run("preflight", **where).exit_code == 0

    done = program("db", "upgrade", **where)
    assert (done.returncode, done.stdout) == (0, f"the schema is at revision {head}\n")
    assert "Running upgrade 007_pipeline_execution -> 008_valid_rows" in done.stderr
    assert run("check", **where).exit_code == 0
    healthy = run("doctor", **where)
    assert (healthy.exit_code, healthy.stdout) == (0, "no problems found\n")

    raw.execute("ALTER TABLE circle.pipelines DISABLE TRIGGER pipelines_accept")
    sick = program("db", "doctor", **where)
    assert sick.returncode == 3
    assert sick.stdout.startswith("error demoted_trigger: trigger pipelines_accept of circle.pipelines: is disabled")
    assert "ENABLE ALWAYS TRIGGER" in sick.stdout
    repaired = run("doctor", "--repair", **where)
    assert repaired.exit_code == 0
    assert repaired.stdout.startswith("repaired demoted_trigger: trigger pipelines_accept")
    assert run("doctor", **where).exit_code == 0
    assert sick.stderr == repaired.stderr == f"database: {described(empty_database_url)}\n"


def described(url: str) -> str:
    with psycopg.connect(url.replace("+psycopg", "")) as raw:
        return f"{raw.info.dbname} at {raw.info.host}:{raw.info.port}, user {raw.info.user}"


def pending() -> list[migrator.Step]:
    return [step for revision in migrations.revisions()[2:] for step in migrator.steps(revision)]


def test_downgrade_asks_for_confirmation(database_url: str) -> None:
    refused = run("downgrade", "010_graph", "--url", database_url, input="n\n")
    assert (refused.exit_code, "Aborted!" in refused.output) == (1, True)
    assert refused.output.startswith(
        f"database: {described(database_url)}\nThis deletes the objects of the later revisions"
    ), "where"
    assert run("current", "--url", database_url).stdout == f"the schema is at revision {migrations.head()}\n"
    done = run("downgrade", "010_graph", "--url", database_url, "--yes")
    assert (done.exit_code, done.stdout) == (0, "the schema is at revision 010_graph\n")
    checked = run("check", "--url", database_url)
    assert checked.exit_code == 1
    assert "010_graph" in checked.stderr
    assert migrations.head() in checked.stderr


def test_downgrade_by_one_succeeds(database_url: str) -> None:
    done = run("downgrade", "-1", "--yes", "--url", database_url)
    assert done.stdout == f"the schema is at revision {migrations.revisions()[-2]}\n"
    for words in (["--yse", "base"], ["--ulr=postgresql://x/y"], ["-y"]):
        misspelt = run("downgrade", *words, "--url", database_url)
        assert (misspelt.exit_code, "database: " in misspelt.stderr) == (2, False)


def test_upgrade_options_reach_the_migrator(database_url: str, connect: Connect) -> None:
    unknown = run("upgrade", "-x", "pattience=5", "--url", database_url)
    assert unknown.exit_code == 1
    assert "no option 'pattience': there are lock_timeout, patience, yield" in unknown.output
    raw = connect(database_url)
    with raw.transaction():
        raw.execute("SELECT FROM circle.pipeline_runs")
        options = ("-x", "lock_timeout=50ms", "-x", "patience=0", "-x", "yield=no", "--url", database_url)
        waited = run("downgrade", "010_graph", "--yes", *options)
    assert (waited.exit_code, "retried for 0 s, but a lock was not free within 50ms" in waited.output) == (1, True)
    assert run("downgrade", "010_graph", "--yes", *options).exit_code == 0


def test_sql_prints_the_migration_script(empty_database_url: str, database_url: str) -> None:
    written = program("db", "sql", DATABASE_URL="postgresql://nobody@127.0.0.1:1/none")  # needs none
    assert (written.returncode, written.stderr) == (0, "")
    run_psql(empty_database_url, written.stdout)
    assert catalog(empty_database_url) == catalog(database_url)
    for words in (["007_pipeline_execution"], [":base"], ["head:"], []):
        refused = run("sql", "--down", *words)
        assert (refused.exit_code, "write FROM:TO, as in head:007_pipeline_execution" in refused.output) == (1, True)
    down = run("sql", "--down", "head:base")
    run_psql(empty_database_url, down.stdout)
    assert catalog(empty_database_url) == ["schema | circle | "]


def test_grants_prints_statements() -> None:
    assert run("grants", "app", "--read-only").stdout.splitlines()[0] == "GRANT USAGE ON SCHEMA circle TO app;"
    assert "INSERT" not in run("grants", "app", "--read-only").stdout
    assert "GRANT UPDATE ON circle.pipelines, circle.pipeline_runs" in run("grants", "app").stdout
    assert run("grants", "My app", "--migrate").stdout == 'CREATE SCHEMA IF NOT EXISTS circle AUTHORIZATION "My app";\n'
    assert "name the one role" in one_sentence(run("grants", "public"))


def test_json_option_prints_json(database_url: str, connect: Connect) -> None:
    raw, url = connect(database_url), ("--json", "--url", database_url)
    assert json.loads(run("current", *url).stdout) == {"revision": migrations.head(), "head": migrations.head()}
    assert json.loads(run("doctor", *url).stdout) == []
    assert json.loads(run("preflight", *url).stdout)["steps"] == []
    raw.execute("ALTER TABLE circle.pipelines DISABLE TRIGGER pipelines_accept")
    found = run("doctor", *url)
    assert found.exit_code == 3
    (finding,) = json.loads(found.stdout)
    assert finding["repair"] == ["ALTER TABLE circle.pipelines ENABLE ALWAYS TRIGGER pipelines_accept"]
    assert (finding["code"], finding["severity"], finding["outcome"]) == ("demoted_trigger", "error", None)
    assert json.loads(run("doctor", "--repair", *url).stdout)[0]["outcome"] == "repaired"


def test_migration_url_overrides_other_variables(database_url: str) -> None:
    unused = "postgresql://nobody@127.0.0.1:1/none"
    names = {"GATHERING_MIGRATION_URL": database_url, "GATHERING_DATABASE_URL": unused, "DATABASE_URL": unused}
    assert run("check", **names).exit_code == 0
    assert run("check", "--url", unused, **names).exit_code == 1


def test_each_command_prints_its_database_first(database_url: str) -> None:
    password = make_url(database_url).password
    for words in (
        ["upgrade"],
        ["current", "--json"],
        ["check"],
        ["doctor", "--json"],
        ["preflight"],
        ["downgrade", "--yes", "base"],
    ):
        done = run(*words, "--url", database_url)
        assert done.exit_code == 0
        assert done.stderr.startswith(f"database: {described(database_url)}\n")
        assert password is None or f":{password}" not in done.stderr
        assert "database:" not in done.stdout


def test_command_without_url_names_embedded_server(tmp_path: Path) -> None:
    """As where DATABASE_URL is misspelt."""
    folder = tmp_path / "data"
    done = program("db", "current", DATABSE_URL="postgresql://app@db/app", GATHERING_DATA_DIR=str(folder))
    assert (done.returncode, done.stdout) == (0, "the schema is at revision none\n")
    assert done.stderr == (
        f"database: the embedded server in {folder}, because none of GATHERING_MIGRATION_URL, GATHERING_DATABASE_URL,"
        " DATABASE_URL is set\n"
    )


@pytest.mark.parametrize("name", ["GATHERING_DATABASE_URL", "DATABASE_URL"])
def test_command_with_empty_variable_exits_with_error(name: str, database_url: str) -> None:
    """As ``Database()`` does."""
    assert f"{name} can't be used: it is empty" in one_sentence(run("upgrade", **{name: ""}))
    for used in ({"GATHERING_MIGRATION_URL": database_url}, {"GATHERING_DATABASE_URL": database_url}):
        assert run("check", **{name: ""} | used).exit_code == 0
    assert run("check", "--url", database_url, **{name: ""}).exit_code == 0
    assert "--url is set but empty" in one_sentence(run("check", "--url", "", DATABASE_URL=database_url))


def test_command_with_empty_migration_url_ignores_it(database_url: str) -> None:
    assert run("check", GATHERING_MIGRATION_URL="", DATABASE_URL=database_url).exit_code == 0


@pytest.mark.parametrize(("revision", "put_back"), [("010_graph", "010_graph"), (migrations.head(), "011_lifecycle")])
def test_command_without_revision_row_prints_the_statement(
    database_url: str, connect: Connect, revision: str, put_back: str
) -> None:
    raw, clean = connect(database_url), catalog(database_url)
    migrations.downgrade(database_url, revision)
    raw.execute("DELETE FROM circle.alembic_version")
    insert = f"INSERT INTO circle.alembic_version VALUES ('{put_back}')"
    for command, code in ("doctor", 3), ("upgrade", 1), ("preflight", 3):
        shown = run(command, "--url", database_url)
        assert (shown.exit_code, shown.output.count(f"its revision is missing: restore it by {insert}\n")) == (code, 1)
    raw.execute(insert.encode())
    assert run("upgrade", "--url", database_url).exit_code == 0
    assert run("doctor", "--url", database_url).exit_code == 0
    assert catalog(database_url) == clean


# --- shell ------------------------------------------------------------------------------------------------------------


def test_shell_starts_psql_on_the_database(database_url: str) -> None:
    shown = program("db", "shell", "-XAtc", "SELECT current_database()", DATABASE_URL=database_url)
    assert (shown.returncode, shown.stdout) == (0, f"{make_url(database_url).database}\n")
    assert shown.stderr == f"database: {described(database_url)}\n"
    failed = program("db", "shell", "--url", database_url, "-Xc", "SELECT nothing")
    assert (failed.returncode, "does not exist" in failed.stderr) == (1, True)


def test_shell_keeps_the_password_out_of_the_arguments(
    database_url: str, admin: psycopg.Connection, tmp_path: Path
) -> None:
    psql = tmp_path / "psql"
    psql.write_text('#!/bin/sh\necho "$@"; echo "$PGPASSWORD"\n', encoding="utf-8")
    psql.chmod(0o755)
    admin.execute("CREATE ROLE gathering_shell LOGIN PASSWORD 'p w&''\\'")
    try:
        url = make_url(database_url).set(username="gathering_shell", password="p w&'\\")
        address = url.render_as_string(hide_password=False)
        shown = program("db", "shell", "-c", "x", DATABASE_URL=address, PATH=f"{tmp_path}:{os.environ['PATH']}")
        arguments, password = shown.stdout.splitlines()
        assert "gathering_shell" in arguments
        assert arguments.endswith(" -c x")
        assert "p w" not in arguments + shown.stderr
        assert password == "p w&'\\"
    finally:
        admin.execute("DROP ROLE gathering_shell")
    secret = f"{database_url}{'&' if '?' in database_url else '?'}sslpassword=s3cret"
    refused = run("shell", "--url", secret)
    assert "the URL has sslpassword, which psql takes only from its arguments" in one_sentence(refused)
    assert "s3cret" not in refused.output


def test_shell_without_psql_uses_the_embedded_one_or_names_it(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = program("db", "shell", "-XAtc", "SELECT 7", DATABASE_URL=database_url, PATH=str(tmp_path))
    assert (shown.returncode, shown.stdout) == (0, "7\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("gathering_pipeline.embedded.find_spec", lambda _name: None)
    assert "psql is not installed: install PostgreSQL's client" in one_sentence(run("shell", "--url", database_url))


# --- errors ----------------------------------------------------------------------------------------------------------


def one_sentence(done: Result | subprocess.CompletedProcess[str]) -> str:
    code = done.exit_code if isinstance(done, Result) else done.returncode
    assert (code, done.stdout) == (1, "")
    lines = [line for line in done.stderr.splitlines() if not line.startswith("database: ")]
    assert lines[0].startswith("Error: ")
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.parametrize("command", ["upgrade", "current", "check", "doctor", "preflight"])
def test_command_without_server_prints_one_sentence(command: str) -> None:
    done = run(command, "--url", "postgresql://me:secret@127.0.0.1:1/none")
    assert "no answer from the PostgreSQL server at 127.0.0.1:1" in one_sentence(done)
    assert "secret" not in done.stderr


def test_command_errors_print_one_sentence(database_url: str, empty_database_url: str, connect: Connect) -> None:
    assert "is not PostgreSQL" in one_sentence(program("db", "check", "--url", "sqlite:///x"))
    assert "GATHERING_POOL_SIZE" in one_sentence(run("check", GATHERING_POOL_SIZE="none at all"))
    mistyped = f"identified by '099_future': there are base, {', '.join(migrations.revisions())} and head"
    for words in (["upgrade", "099_future"], ["downgrade", "--yes", "099_future"]):
        assert one_sentence(run(*words, "--url", database_url)).endswith(mistyped)
    assert one_sentence(run("sql", "099_future")).endswith(mistyped)
    for words in (
        ["upgrade", ""],
        ["downgrade", "--yes", " "],
        ["sql", ""],
        ["sql", "head:"],
        ["sql", ":head"],
    ):
        url = [] if words[0] == "sql" else ["--url", database_url]
        assert "the revision is empty: write base, 006_pipelines, " in one_sentence(run(*words, *url))
    for words in (["sql", "base:head:x"], ["sql", "--down", "base:head:x"]):
        assert "'base:head:x' has more than two revisions: write TO or FROM:TO" in one_sentence(run(*words))
    assert "head:base is a downgrade: add --down" in one_sentence(run("sql", "head:base"))
    assert "base:head is an upgrade: leave out --down" in one_sentence(run("sql", "--down", "base:head"))
    assert "none, this code needs" in one_sentence(run("check", "--url", empty_database_url))

    raw = connect(empty_database_url)
    raw.execute("CREATE SCHEMA circle; CREATE TABLE circle.pipelines (id serial PRIMARY KEY, name int NOT NULL)")
    refused = program("db", "upgrade", "--url", empty_database_url)
    assert (refused.returncode, "Traceback" in refused.stderr) == (1, False)
    assert "Error: existing tables can't be adopted:" in refused.stderr
    assert "pipelines.name: type is integer, character varying(255) expected" in refused.stderr
    assert "\\n" not in refused.stderr


def test_command_by_role_without_rights_prints_one_sentence(database_url: str, admin: psycopg.Connection) -> None:
    role = "gathering_cli_guest"
    admin.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'guest'")
    try:
        guest = conninfo_to_dict(database_url.replace("+psycopg", ""))
        host = f"?host={guest['host']}" if "/" in str(guest["host"]) else ""
        place = "" if host else f"{guest['host']}:{guest['port']}"
        url = f"postgresql://{role}:guest@{place}/{guest['dbname']}{host}"
        for command in ("upgrade", "current", "doctor"):
            done = run(command, "--url", url)
            assert (done.exit_code, type(done.exception)) == (1, SystemExit), "no traceback"
            assert "(permission denied for schema circle)" in one_sentence(done)
    finally:
        admin.execute(f"DROP ROLE {role}")


def test_unknown_command_exits_with_usage() -> None:
    assert program("db", "upgrad").returncode == 2
    assert run("downgrade").exit_code == 2


# --- the extra -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_command_without_extra_names_it(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from gathering_pipeline.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert "pip install 'gathering-pipeline[cli]'" in one_sentence(done)
    assert f"needs {missing}" in done.stderr


def test_package_without_extra_imports() -> None:
    code = (
        "import sys, gathering_pipeline as g; [getattr(g, name) for name in g.__all__];"
        "print(sorted({'click', 'rich', 'gathering_pipeline.maintenance'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def test_program_is_installed_as_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"gathering-pipeline": "gathering_pipeline.cli:main"}
    shown = program("--version")
    assert shown.returncode == 0
    assert shown.stdout.startswith("gathering-pipeline, version ")


def test_module_is_the_command(database_url: str) -> None:
    command = [sys.executable, "-m", "gathering_pipeline"]
    environment = os.environ | {"DATABASE_URL": database_url}
    done = subprocess.run([*command, "db", "check"], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"the schema is at revision {migrations.head()}\n"
    assert (
        "python -m gathering_pipeline db"
        in subprocess.run([*command, "db", "--help"], capture_output=True, text=True, check=True).stdout
    )


def test_completion_completes_commands_and_options() -> None:
    for words, wanted in (("runs wa", "watch"), ("runs list --sta", "--status"), ("val", "validate")):
        variables = {"COMP_WORDS": f"gathering-pipeline {words}", "COMP_CWORD": str(len(words.split()))}
        shown = program(_GATHERING_PIPELINE_COMPLETE="bash_complete", **variables)
        assert shown.stdout.split("\n")[0] == f"plain,{wanted}"
    assert "complete" in program(_GATHERING_PIPELINE_COMPLETE="bash_source").stdout


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["runs"], ["db"]], ids=repr)
def test_help_lists_whole_summaries_in_80_columns(words: list[str]) -> None:
    shown = CliRunner().invoke(cli, [*words, "--help"], prog_name="gathering-pipeline", terminal_width=80).output
    assert "..." not in shown.split("\nCommands:\n")[1]


def test_page_lists_every_command_with_help() -> None:
    """Where this fails: ``make generated``."""
    page = generated.PAGE.read_text(encoding="utf-8")
    assert page.split(generated.HEADING)[1] == generated.help_texts()
    assert {" ".join(words) for words in generated.commands()} >= {
        f"db {name}" for name in ("upgrade", "downgrade", "current", "check", "sql", "doctor", "preflight", "grants")
    } | {"validate", "import", "runs watch"}


def test_page_lists_every_finding() -> None:
    source = "".join(path.read_text() for path in (ROOT / "gathering_pipeline" / "maintenance").glob("*.py"))
    page = generated.PAGE.read_text(encoding="utf-8")
    table = page.split("## What doctor finds")[1].split(generated.HEADING)[0]
    documented = {
        word for line in table.splitlines() if line.startswith("| `") for word in line.split("|")[1].split("`")[1::2]
    }
    made = set(re.findall(r'Finding\(\s*"(?:error|warning)", "(\w+)"', source)) | set(
        re.findall(r'_Check\(\s*"(\w+)"', source)
    )
    assert documented == made
    assert len(made) == 29
