"""``import``, ``export``, ``list``, ``show`` and ``graph``."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import PipelineCreate, PipelineRead, PipelineRepository, PipelineStatus, PipelineUpdate
from gathering_pipeline.cli.output import to_json
from tests.support.commands import PROGRAM, in_terminal, read, run, sentence, succeed
from tests.support.graphs import DRAFT, GOOD, graph, shared_files, values
from tests.support.runs import store

EVIL = "\x1b]0;owned\x07[red]\u202e</script>&\n\x9b31m"


def write(path: Path, value: object) -> str:
    path.write_text(json.dumps(value), encoding="utf-8")
    return str(path)


def fields(pipeline: PipelineRead) -> dict[str, Any]:
    return pipeline.model_dump(include=set(PipelineCreate.model_fields))


# --- import and export ------------------------------------------------------------------------------------------------


def test_import_stores_files_in_transactions_of_their_own(database_url: str, session: Session, tmp_path: Path) -> None:
    good = write(tmp_path / "1.json", values(GOOD, name="first") | {"status": "active"})
    bad = write(tmp_path / "2.json", values(graph("a>b b>a")))
    draft = write(tmp_path / "3.json", values(DRAFT, name="third") | {"status": "draft"})
    done = run("import", good, bad, str(tmp_path / "none"), draft, url=database_url)
    assert (done.exit_code, done.stdout) == (1, "created 1: first (active)\ncreated 2: third (draft)\n")
    assert f"Error: {bad}: Pipeline contains a cycle: a -> b -> a\n" in done.stderr
    assert f"Error: {tmp_path / 'none'}: the file can't be read: No such file or directory\n" in done.stderr
    found = PipelineRepository(session).search().items
    assert [(one.name, one.status) for one in found] == [("third", "draft"), ("first", "active")]


@pytest.mark.parametrize("name", ["p", EVIL, "x" * 255, "日本語 ❤", "../../etc/passwd"])
def test_export_and_import_lose_nothing(database_url: str, session: Session, tmp_path: Path, name: str) -> None:
    nodes, edges = graph("a>b=yes b>c")
    nodes[0] |= {"position": {"x": 1.5, "y": -2}, "next": ["b"], "unknown": [None, {"é": 1e-7}], "name": EVIL}
    data = PipelineCreate(
        name=name,
        description=EVIL,
        status=PipelineStatus.PAUSED,
        nodes=nodes,
        edges=edges,
        timeout_seconds=None,
        max_retries_per_node=0,
        retry_backoff_base=0.25,
        max_running=7,
    )
    pipelines = PipelineRepository(session)
    first = pipelines.create(data)
    session.commit()
    folder = tmp_path / "out"
    (path,) = succeed("export", "--all", "-o", str(folder), url=database_url).splitlines()
    assert Path(path).parent == folder
    assert [Path(path)] == list(tmp_path.rglob("*.json"))
    assert succeed("export", str(first.id), url=database_url) == Path(path).read_text(encoding="utf-8")
    assert run("import", path, url=database_url).exit_code == 0
    second = pipelines.get(first.id + 1)
    assert fields(second) == fields(first)
    assert (second.nodes, second.edges) == (first.nodes, first.edges)


def test_import_of_shared_files_exports_them_equal(database_url: str, tmp_path: Path) -> None:
    paths = [path for path in shared_files("pipelines") if not path.name.startswith("bad_")]
    if not paths:
        pytest.skip("there are no shared files")
    results = read("import", *map(str, paths), url=database_url)
    for path, result in zip(paths, results, strict=True):
        before = json.loads(path.read_text(encoding="utf-8"))
        after = json.loads(succeed("export", str(result["id"]), url=database_url))
        assert {key: after[key] for key in before} == before


def test_import_with_update_changes_the_pipeline_of_the_same_name(
    database_url: str, session: Session, tmp_path: Path
) -> None:
    pipelines = PipelineRepository(session)
    pipeline = pipelines.create(PipelineCreate(**values(GOOD), timeout_seconds=7))
    session.commit()
    path = write(tmp_path / "p.json", values(graph("a>b")))
    new = write(tmp_path / "new.json", values(GOOD, name="new"))
    assert (
        succeed("import", "--update", path, new, url=database_url) == "updated 1: p (draft)\ncreated 2: new (draft)\n"
    )
    updated = pipelines.get(pipeline.id)
    assert ([node["id"] for node in updated.nodes], updated.timeout_seconds, updated.version) == (["a", "b"], 7, 2)


def test_import_of_a_stored_name_says_so(database_url: str, tmp_path: Path) -> None:
    path = write(tmp_path / "p.json", values(GOOD))
    assert succeed("import", path, url=database_url) == "created 1: p (draft)\n"
    assert (
        succeed("import", path, url=database_url)
        == "created 2: p (draft); pipeline 1 has the same name: import --update would have changed it\n"
    )
    assert succeed("import", path, url=database_url).endswith("; 2 others have the same name: 1, 2\n")
    (result,) = read("import", path, url=database_url)
    assert (result["action"], result["same_name"]) == ("created", [1, 2, 3])


def test_import_prints_warnings_and_stores(database_url: str, tmp_path: Path) -> None:
    nodes = [
        {"id": "gate", "type": "condition", "name": "Gate", "config": {"condition": "x"}},
        *({"id": name, "type": "action", "name": name, "config": {"action": "x"}} for name in "ab"),
    ]
    edges = [{"id": name, "from": "gate", "to": name, "branch": branch} for name, branch in (("a", True), ("b", False))]
    path = write(tmp_path / "p.json", values((nodes, edges)))
    done = run("import", path, url=database_url)
    assert (done.exit_code, done.stdout) == (0, "created 1: p (draft)\n")
    warning = "has a branch, which is kept but not used: its branch is its condition"
    assert [line for line in done.stderr.splitlines() if line.startswith("Warning: ")] == [
        f"Warning: {path}: Edge '{name}' {warning}" for name in "ab"
    ]
    checked = run("validate", path)
    assert f"{path}: warning unused_label: edges[0].branch: Edge 'a' {warning}\n" in checked.stdout
    assert checked.exit_code == 0


def test_import_with_update_refuses_what_was_changed_since_the_export(
    database_url: str, session: Session, tmp_path: Path
) -> None:
    pipelines = PipelineRepository(session)
    pipelines.create(PipelineCreate(**values(GOOD)))
    session.commit()
    exported = json.loads(succeed("export", "1", url=database_url))
    path = write(tmp_path / "p.json", exported | {"description": "mine"})
    pipelines.update(1, PipelineUpdate(description="theirs"))
    session.commit()
    done = run("import", "--update", path, url=database_url)
    assert "it is at revision 2, and the file has 1: export it again" in sentence(done)
    assert pipelines.get(1).description == "theirs"
    del exported["revision"]
    write(tmp_path / "p.json", exported | {"description": "mine"})
    assert run("import", "--update", path, url=database_url).exit_code == 0
    session.rollback()
    assert pipelines.get(1).description == "mine"


def test_import_with_update_of_ambiguous_name_needs_the_id(database_url: str, session: Session, tmp_path: Path) -> None:
    for _ in range(2):
        store(session, "a", name="twin")
    session.commit()
    path = write(tmp_path / "p.json", values(GOOD, name="twin"))
    refused = sentence(run("import", "--update", path, url=database_url))
    assert refused.endswith('2 pipelines have its name (1, 2): write the "id" of one into the file')
    path = write(tmp_path / "p.json", values(GOOD, name="twin") | {"id": 2})
    assert succeed("import", "--update", path, url=database_url) == "updated 2: twin (active)\n"


def test_export_of_several_needs_a_folder_and_of_none_an_id(database_url: str) -> None:
    assert "several pipelines need -o FOLDER" in sentence(run("export", "1", "2", url=database_url), 2)
    assert "several pipelines need -o FOLDER" in sentence(run("export", "--all", url=database_url), 2)
    assert "give the ids of pipelines, or --all" in sentence(run("export", url=database_url), 2)
    assert sentence(run("export", "7", url=database_url)) == "pipeline 7 does not exist"


def test_export_into_a_file_prints_one_sentence(database_url: str, session: Session, tmp_path: Path) -> None:
    store(session, "a")
    session.commit()
    (tmp_path / "file").touch()
    done = run("export", "1", "-o", str(tmp_path / "file" / "folder"), url=database_url)
    assert sentence(done) == f"{tmp_path / 'file' / 'folder'}: Not a directory"


# --- list and show ----------------------------------------------------------------------------------------------------


def test_list_prints_a_line_for_each_pipeline(database_url: str, session: Session) -> None:
    for name in ("one", "two", EVIL):
        store(session, "a>b", name=name)
    PipelineRepository(session).pause(2)
    session.commit()
    lines = succeed("list", url=database_url).splitlines()
    assert [line.split("\t")[0] for line in lines] == ["3", "2", "1"]
    assert lines[1].split("\t") == ["2", "two", "paused", "2", "0", "0", "0", "-"]
    assert all(line.replace("\t", "").isprintable() for line in lines)
    assert [row["id"] for row in read("list", "--status", "paused", url=database_url)] == [2]
    (found,) = read("list", "--name", "ON", url=database_url)
    assert (found["name"], found["node_count"]) == ("one", 2)
    limited = run("list", "--limit", "2", url=database_url)
    assert limited.stdout.count("\n") == 2
    assert "There are more than 2: --limit N shows more of them." in limited.stderr


def test_show_prints_fields_nodes_edges_and_issues(database_url: str, session: Session) -> None:
    PipelineRepository(session).create(PipelineCreate(**values(DRAFT, name=EVIL)), allow_incomplete=True)
    session.commit()
    shown = succeed("show", "1", url=database_url)
    assert "\nstatus: draft\n" in shown
    assert "\ntimeout seconds: 3600\n" in shown
    assert "\nmax running: no limit\n" in shown
    assert "\nerror missing_config: nodes[1].config.agent_id" in shown
    assert "\nnodes: 2\nt\ttrigger\tT\na\tagent\tA\n\nedges: 1\ne\tt\ta\t-\n" in shown
    assert all(line.replace("\t", "").isprintable() for line in shown.splitlines())
    assert read("show", "1", url=database_url)["name"] == EVIL
    assert sentence(run("show", "99999999999", url=database_url)) == "pipeline 99999999999 does not exist"


def test_list_in_a_terminal_is_a_table_without_markup_of_names(database_url: str, session: Session) -> None:
    store(session, "a", name=EVIL)
    session.commit()
    code, output = in_terminal("list", url=database_url)
    assert code == 0
    assert "[red]" in output
    assert "\\x1b]0;owned" in output
    assert "\x1b]0;" not in output
    assert "\x9b" not in output
    assert "───" in output


def test_show_on_a_terminal_without_unicode_prints_escapes(
    database_url: str, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(session, "a", name="日本 é 😀")
    session.commit()
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    for words, wanted in (([], "\\u65e5\\u672c é \\U0001f600"), (["--json"], "\\u65e5\\u672c \\u00e9 \\ud83d\\ude00")):
        command = [str(PROGRAM), "show", "1", *words, "--url", database_url]
        assert wanted in subprocess.run(command, capture_output=True, check=True).stdout.decode("latin-1")


# --- graph ------------------------------------------------------------------------------------------------------------


def test_graph_of_id_and_file_is_the_same(database_url: str, session: Session, tmp_path: Path) -> None:
    store(session, "a>b=yes a>c", name="p")
    session.commit()
    path = write(tmp_path / "p.json", values(graph("a>b=yes a>c")))
    for words in (["--format", "svg"], ["--format", "mermaid"], []):
        drawn = succeed("graph", *words, "1", url=database_url)
        assert succeed("graph", *words, path) == drawn
        assert succeed("graph", *words, "-", input=Path(path).read_bytes()) == drawn
    output = tmp_path / "p.svg"
    assert succeed("graph", "--format", "svg", "-o", str(output), path) == ""
    assert ET.parse(output).getroot().tag.endswith("svg")  # noqa: S314 - it was just made


def test_graph_of_broken_input_prints_one_sentence(database_url: str, tmp_path: Path) -> None:
    assert sentence(run("graph", "7", url=database_url)) == "pipeline 7 does not exist"
    assert "the file can't be read" in sentence(run("graph", str(tmp_path / "x.json")))
    assert "nodes must be a list, not null" in sentence(run("graph", write(tmp_path / "x.json", {})))
    assert "the file has no JSON object" in sentence(run("graph", write(tmp_path / "x.json", [])))
    assert "needs no --url" in sentence(run("graph", "x.json", "--url", database_url), 2)


def test_to_json_of_any_text_is_printable_and_the_same() -> None:
    texts = ["".join(map(chr, range(0xD800))), "".join(map(chr, range(0xE000, 0x110000, 7))), EVIL]
    text = to_json(texts)
    assert all(line.isprintable() for line in text.splitlines())
    assert json.loads(text) == texts


def test_activated_pipeline_gets_runs_until_it_is_paused(database_url: str, tmp_path: Path) -> None:
    path = write(tmp_path / "p.json", values(GOOD, name="p"))
    assert succeed("import", path, url=database_url) == "created 1: p (draft)\n"
    assert (
        sentence(run("runs", "create", "1", url=database_url)) == "pipeline 1 is draft, not active: activate it first"
    )
    assert succeed("activate", "1", url=database_url) == "pipeline 1 is active\n"
    words = ("runs", "create", "1", "--data", '{"branch": "topic"}', "--key", "k")
    assert succeed(*words, url=database_url) == succeed(*words, url=database_url) == "run 1 is pending\n"
    assert read("runs", "create", "1", url=database_url)["trigger_data"] == {}
    assert succeed("pause", "1", url=database_url) == "pipeline 1 is paused\n"
    assert run("runs", "create", "1", url=database_url).exit_code == 1
    assert "not valid JSON" in sentence(run("runs", "create", "1", "--data", "{", url=database_url), 2)
