"""The commands for pipelines: ``validate``, ``import``, ``export``, ``list``, ``show``, ``graph``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gathering_pipeline.cli import files
from gathering_pipeline.cli.options import json_option, open_database, url_option
from gathering_pipeline.cli.output import as_text, describe, echo, print_json, print_table, to_json
from gathering_pipeline.errors import InvalidDataError, Issue, PipelineError, StaleVersionError
from gathering_pipeline.json_values import json_path

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from gathering_pipeline.models import PipelineDefinition, PipelineRead

files_argument = click.argument("paths", metavar="FILE...", nargs=-1, required=True)
STATUSES = ("active", "paused", "draft")


@click.command()
@files_argument
@json_option
def validate(paths: tuple[str, ...], as_json: bool) -> None:
    """Report every problem of pipelines in JSON files; - is stdin.

    A file has one pipeline, as export writes it: an object with name, nodes, edges and, if needed, the other fields.
    Exits with 1 if import would refuse one. A pipeline with the status draft or paused may lack nodes and
    configuration. Needs no database.
    """
    reports = [_examine(path) for path in paths]
    if as_json:
        print_json(reports)
    else:
        for report in reports:
            _print_report(report)
    if not all(report["valid"] for report in reports):
        click.get_current_context().exit(1)


def _examine(path: str) -> dict[str, Any]:
    try:
        file = files.read_pipeline(path)
    except InvalidDataError as error:
        return {"file": path, "valid": False, "error": str(error), "issues": []}
    issues = [
        asdict(issue) | {"severity": "incomplete" if _is_incomplete(file, issue) else issue.severity}
        for issue in file.issues
    ]
    return {"file": path, "valid": not any(map(file.refuses, file.issues)), "error": None, "issues": issues}


def _is_incomplete(file: files.PipelineFile, issue: Issue) -> bool:
    return issue.severity == "error" and not file.refuses(issue)


def _print_report(report: dict[str, Any]) -> None:
    if report["error"] is not None:
        echo(f"{report['file']}: error: {report['error']}")
    for issue in report["issues"]:
        root, *keys = issue["loc"] or ("pipeline",)
        place = f"{json_path(root, keys)}: "
        message = issue["message"].removeprefix(place)
        echo(f"{report['file']}: {issue['severity']} {issue['code']}: {place}{message}")
    if report["valid"]:
        echo(f"{report['file']}: valid")


@click.command("import")
@files_argument
@click.option("--update", is_flag=True, help="Change the pipeline of the same name, if there is one.")
@json_option
@url_option
def import_(paths: tuple[str, ...], update: bool, as_json: bool, url: str | None) -> None:
    """Store pipelines from JSON files; - is stdin.

    Each file is a transaction of its own, and one that is refused stops no other. Without --update each file makes a
    new pipeline, even if its name is taken. With --update the fields that the file has are written to the pipeline with
    its name. A file of export has the pipeline's revision: it is refused if the pipeline was changed since.
    """
    results: list[dict[str, Any]] = []
    with open_database(url) as database:
        for path in paths:
            try:
                file = files.read_pipeline(path)
                with database.session() as session:
                    result = _store(session, file, update=update)
            except Exception as error:
                sentence = describe(error)
                if sentence is None:
                    raise
                results.append({"file": path, "error": sentence})
                echo(f"Error: {path}: {sentence}", err=True)
            else:
                warnings = [issue.message for issue in file.issues if issue.severity == "warning"]
                results.append({"file": path, **result, "warnings": warnings})
                for message in warnings:
                    echo(f"Warning: {path}: {message}", err=True)
                if not as_json:
                    echo(_stored_line(result))
    if as_json:
        print_json(results)
    if any("error" in result for result in results):
        click.get_current_context().exit(1)


def _stored_line(result: dict[str, Any]) -> str:
    line = f"{result['action']} {result['id']}: {result['name']} ({result['status']})"
    if not (ids := result["same_name"]):
        return line
    if len(ids) == 1:
        return f"{line}; pipeline {ids[0]} has the same name: import --update would have changed it"
    return f"{line}; {len(ids)} others have the same name: {', '.join(map(str, ids[:10]))}"


def _store(session: Session, file: files.PipelineFile, *, update: bool) -> dict[str, Any]:
    from gathering_pipeline.models import PipelineCreate, PipelineUpdate
    from gathering_pipeline.repositories import PipelineRepository

    file.check()
    pipelines = PipelineRepository(session)
    found = _of_same_name(session, file)
    if not (update and found):
        pipeline = pipelines.create(PipelineCreate(**file.fields), allow_incomplete=file.is_draft)
        return _result("created", pipeline, found)
    pipeline_id, revision = _updated(file, found)
    if file.origin.get("id") == pipeline_id:
        revision = file.origin.get("revision", revision)
    try:
        pipeline = pipelines.update(
            pipeline_id, PipelineUpdate(**file.fields), revision, allow_incomplete=file.is_draft
        )
    except StaleVersionError as error:
        if revision != file.origin.get("revision"):
            raise  # it was changed within this moment
        raise InvalidDataError(
            f"pipeline {pipeline_id} was changed: it is at revision {error.current}, and the file has {revision}:"
            ' export it again, or remove "revision" from the file'
        ) from error
    return _result("updated", pipeline, {})


def _result(action: str, pipeline: PipelineRead, same_name: dict[int, int]) -> dict[str, Any]:
    fields = pipeline.model_dump(mode="json", include={"id", "name", "status", "revision"})
    return {"action": action, **fields, "same_name": list(same_name)}


def _of_same_name(session: Session, file: files.PipelineFile) -> dict[int, int]:
    """The ids and revisions of the stored pipelines that have the name of a file."""
    from sqlalchemy import select

    from gathering_pipeline.orm import Pipeline

    query = select(Pipeline.id, Pipeline.revision).where(Pipeline.name == file.fields["name"]).order_by(Pipeline.id)
    return {row.id: row.revision for row in session.execute(query)}


def _updated(file: files.PipelineFile, found: dict[int, int]) -> tuple[int, int]:
    """The id and the revision of the pipeline that a file changes.

    Raises:
        InvalidDataError: Several have its name.
    """
    if len(found) > 1:
        found = {key: revision for key, revision in found.items() if key == file.origin.get("id")} or found
    if len(found) > 1:
        ids = ", ".join(map(str, list(found)[:10]))
        raise InvalidDataError(f'{len(found)} pipelines have its name ({ids}): write the "id" of one into the file')
    return next(iter(found.items()))


@click.command()
@click.argument("ids", metavar="ID...", type=int, nargs=-1)
@click.option("--all", "every", is_flag=True, help="Export all pipelines.")
@click.option(
    "-o",
    "--output",
    metavar="FOLDER",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write a file ID-NAME.json for each; without it one pipeline is printed.",
)
@url_option
def export(ids: tuple[int, ...], every: bool, output: Path | None, url: str | None) -> None:
    """Write pipelines as JSON files, as import reads them.

    Counters, times, versions and runs are not exported.
    """
    if every == bool(ids):
        raise click.UsageError("give the ids of pipelines, or --all")
    if output is None and len(ids) != 1:
        raise click.UsageError("several pipelines need -o FOLDER")
    with open_database(url) as database, database.reading() as session:
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
        for pipeline in _exported(session, ids):
            text = to_json(files.as_file(pipeline))
            if output is None:
                click.echo(text)
            else:
                path = output / files.file_name(pipeline)
                path.write_text(text + "\n", encoding="utf-8")
                echo(str(path))


def _exported(session: Session, ids: tuple[int, ...]) -> Iterator[PipelineRead]:
    """The pipelines with these ids; without ids all."""
    from gathering_pipeline.repositories import PipelineRepository

    pipelines = PipelineRepository(session)
    if ids:
        yield from map(pipelines.get, ids)
        return
    after = None
    while True:
        page = pipelines.search(after=after)
        yield from page.items
        if (after := page.next_cursor) is None:
            return


@click.command("list")
@click.option("--name", metavar="TEXT", help="Only pipelines whose name contains this text.")
@click.option("--status", type=click.Choice(STATUSES), help="Only pipelines with this status.")
@click.option("--limit", metavar="N", type=click.IntRange(min=1), default=50, help="Most pipelines, by default 50.")
@json_option
@url_option
def list_(name: str | None, status: str | None, limit: int, as_json: bool, url: str | None) -> None:
    """List pipelines, newest first.

    Columns: id, name, status, number of nodes, and of runs, completed runs and failed runs; when the last run began.
    """
    from gathering_pipeline.lifecycle import PipelineStatus
    from gathering_pipeline.repositories import PipelineRepository

    with open_database(url) as database, database.reading() as session:
        wanted = None if status is None else PipelineStatus(status)
        page = PipelineRepository(session).search(wanted, name, limit=limit)
    if as_json:
        summaries = [pipeline.model_dump(mode="json", exclude={"nodes", "edges"}) for pipeline in page.items]
        print_json(
            [
                summary | {"node_count": _count(pipeline.nodes)}
                for summary, pipeline in zip(summaries, page.items, strict=True)
            ]
        )
    else:
        print_table(
            ["#id", "name", "status", "#nodes", "#runs", "#completed", "#failed", "last run"],
            (
                (
                    *(pipeline.id, pipeline.name, pipeline.status, _count(pipeline.nodes)),
                    *(pipeline.run_count, pipeline.success_count, pipeline.error_count, pipeline.last_run),
                )
                for pipeline in page.items
            ),
        )
    if page.next_cursor is not None:
        echo(f"There are more than {limit}: --limit N shows more of them.", err=True)


_LIMITS = ("max_running", "timeout_seconds")
"""Fields that limit nothing if they are 0 or null."""


def _count(nodes: Any) -> int:
    return len(nodes) if isinstance(nodes, list) else 0  # a broken graph can be read, too


@click.command()
@click.argument("pipeline_id", metavar="ID", type=int)
@json_option
@url_option
def show(pipeline_id: int, as_json: bool, url: str | None) -> None:
    """Show a pipeline: fields, counters, nodes, edges and problems."""
    from gathering_pipeline.repositories import PipelineRepository
    from gathering_pipeline.validator import find_json_issues

    with open_database(url) as database, database.reading() as session:
        pipeline = PipelineRepository(session).get(pipeline_id)
    if as_json:
        print_json(pipeline.model_dump(mode="json"))
        return
    for key, value in pipeline:
        if key not in ("nodes", "edges"):
            shown = "no limit" if key in _LIMITS and not value else as_text(value)
            echo(f"{key.replace('_', ' ')}: {shown}")
    for issue in find_json_issues(pipeline.nodes, pipeline.edges):
        echo(f"{issue.severity} {issue.code}: {issue.message}")
    for title, columns, items in (
        ("nodes", ("id", "type", "name"), pipeline.nodes),
        ("edges", ("id", "from", "to", "condition"), pipeline.edges),
    ):
        rows = (
            [[item.get(key) for key in columns] for item in items if isinstance(item, dict)]
            if isinstance(items, list)
            else []
        )
        echo(f"\n{title}: {len(rows)}")
        if rows:
            print_table(columns, rows)


@click.command()
@click.argument("pipeline_id", metavar="ID", type=int)
@url_option
def activate(pipeline_id: int, url: str | None) -> None:
    """Activate a pipeline: runs of it can be created and claimed.

    Its graph has to be complete.
    """
    from gathering_pipeline.repositories import PipelineRepository

    with open_database(url) as database, database.session() as session:
        pipeline = PipelineRepository(session).activate(pipeline_id)
    echo(f"pipeline {pipeline.id} is {pipeline.status}")


@click.command()
@click.argument("pipeline_id", metavar="ID", type=int)
@url_option
def pause(pipeline_id: int, url: str | None) -> None:
    """Pause a pipeline: no run of it is created or claimed.

    Running ones go on. activate ends the pause.
    """
    from gathering_pipeline.repositories import PipelineRepository

    with open_database(url) as database, database.session() as session:
        pipeline = PipelineRepository(session).pause(pipeline_id)
    echo(f"pipeline {pipeline.id} is {pipeline.status}")


@click.command()
@click.argument("place", metavar="ID|FILE")
@click.option("--format", "kind", type=click.Choice(["mermaid", "svg"]), default="mermaid", help="By default mermaid.")
@click.option(
    "-o", "--output", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path), help="By default stdout."
)
@url_option
def graph(place: str, kind: str, output: Path | None, url: str | None) -> None:
    """Draw the graph of a stored pipeline or of a JSON file.

    - is stdin. An SVG has the editor's positions if all nodes have one, else a column for each generation. A graph that
    is not valid is drawn, too, as far as its nodes and edges can be read. A file whose name is a number is ./NUMBER.
    """
    from gathering_pipeline import rendering

    definition, title = _definition(place, url)
    text = rendering.to_mermaid(definition) if kind == "mermaid" else rendering.to_svg(definition, title=title)
    if output is None:
        click.echo(text, nl=False)
    else:
        output.write_text(text, encoding="utf-8")


def _definition(place: str, url: str | None) -> tuple[PipelineDefinition, str]:
    """The graph of a stored pipeline or of a file, and its name."""
    from gathering_pipeline.models import PipelineDefinition

    if not place.isdecimal():
        if url is not None:
            raise click.UsageError("a file needs no --url")
        try:
            found = files.read_json(place)
            if not isinstance(found, dict):
                raise InvalidDataError("the file has no JSON object with nodes and edges")
            return PipelineDefinition.from_json(found.get("nodes"), found.get("edges")), str(found.get("name", place))
        except PipelineError as error:
            raise click.ClickException(f"{place}: {error}") from error
    from gathering_pipeline.repositories import PipelineRepository

    with open_database(url) as database, database.reading() as session:
        pipeline = PipelineRepository(session).get(int(place))
        return pipeline.definition, pipeline.name
