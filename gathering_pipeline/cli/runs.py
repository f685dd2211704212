"""The commands for runs: ``gathering-pipeline runs ...``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gathering_pipeline.cli.options import json_option, open_database, url_option, yes_option
from gathering_pipeline.cli.output import (
    ACTION_NEEDED,
    as_text,
    describe,
    echo,
    is_terminal,
    print_json,
    print_table,
    to_json,
)
from gathering_pipeline.errors import shorten
from gathering_pipeline.texts import duration_text, one_line

if TYPE_CHECKING:
    from pydantic import BaseModel
    from sqlalchemy.orm import Session

    from gathering_pipeline.events import PipelineEvent
    from gathering_pipeline.models import NodeRunRead, RunRead, RunSummary
    from gathering_pipeline.rendering import RunRecord
    from gathering_pipeline.repositories import RunRepository

run_argument = click.argument("run_id", metavar="RUN", type=int)

STATUSES = ("pending", "running", "completed", "failed", "cancelled", "timeout")
"""The values of ``RunStatus``: its module loads Pydantic, which the help does not need."""
_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_SPAN = re.compile(r"([0-9]{1,7})([smhdw])")
_MOST_LOGS = 1_000
"""Entries of a log that a report shows."""
_MOST_DATA = 1_000
"""Characters of the trigger data that ``show`` prints; ``--json`` prints all of it."""
_IDLE = timedelta(minutes=5)
_BATCH = 500
"""Runs that are read, or deleted, at once."""


def _read_span(_context: click.Context, _option: click.Parameter, given: str | None) -> timedelta | None:
    if given is None:
        return None
    span = _parse_span(given)
    if span is None:
        raise click.BadParameter(f"{given!r} is not a duration: write a number and s, m, h, d or w, as in 90s or 2d")
    return span


def _parse_span(text: str) -> timedelta | None:
    match = _SPAN.fullmatch(text)
    return None if match is None else timedelta(seconds=int(match[1]) * _UNITS[match[2]])


def _read_time(_context: click.Context, _option: click.Parameter, given: str | None) -> datetime | None:
    if given is None:
        return None
    try:
        if (span := _parse_span(given)) is not None:
            return datetime.now(UTC) - span
        moment = datetime.fromisoformat(given)
    except (ValueError, OverflowError):
        raise click.BadParameter(
            f"{given!r} is not a time: write a duration before now, as in 1h or 2d, or 2026-11-01, or 2026-11-01T08:30"
        ) from None
    return moment if moment.utcoffset() is not None else moment.replace(tzinfo=UTC)


def _read_tags(_context: click.Context, _option: click.Parameter, given: Sequence[str]) -> dict[str, str]:
    tags: dict[str, str] = {}
    for item in given:
        key, separator, value = item.partition("=")
        if not separator or key in tags:
            raise click.BadParameter(f"{item!r} {'repeats a key' if separator else 'is not a tag'}: write KEY=VALUE")
        tags[key] = value
    return tags


@click.group()
def runs() -> None:
    """Inspect and control runs; times are in UTC."""


# --- reads ------------------------------------------------------------------------------------------------------------


@runs.command("list")
@click.option("--pipeline", "pipeline_id", metavar="ID", type=int, help="Only runs of this pipeline.")
@click.option("--status", "statuses", type=click.Choice(STATUSES), multiple=True, help="May be repeated: any of these.")
@click.option(
    "--tag", "tags", metavar="KEY=VALUE", multiple=True, callback=_read_tags, help="May be repeated: all of these."
)
@click.option("--since", metavar="TIME", callback=_read_time, help="Only runs created since, as in 1h, 2d, 2026-11-01.")
@click.option("--until", metavar="TIME", callback=_read_time, help="Only runs created before, likewise.")
@click.option("--stuck", is_flag=True, help="Only live runs that make no progress, and that nothing holds on purpose.")
@click.option(
    "--for",
    "idle",
    metavar="SPAN",
    callback=_read_span,
    help="With --stuck: how long without progress, by default 5m.",
)
@click.option("--limit", metavar="N", type=click.IntRange(min=1), default=50, help="Most runs, by default 50.")
@click.option("--all", "every", is_flag=True, help="All runs, without a limit.")
@json_option
@url_option
def list_(
    *,
    pipeline_id: int | None,
    statuses: tuple[str, ...],
    tags: dict[str, str],
    since: datetime | None,
    until: datetime | None,
    stuck: bool,
    idle: timedelta | None,
    limit: int,
    every: bool,
    as_json: bool,
    url: str | None,
) -> None:
    """List runs, newest first; stuck ones oldest first.

    runs why explains why one is stuck. Columns: id, pipeline and its name, status, when it was created, duration; the
    node that it is at, or that failed, and the error.
    """
    from gathering_pipeline.lifecycle import RunStatus
    from gathering_pipeline.repositories import RunRepository

    if stuck and (tags or pipeline_id is not None or statuses or since or until or every):
        raise click.UsageError("--stuck covers all live runs: it takes only --for and --limit")
    if idle is not None and not stuck:
        raise click.UsageError("--for needs --stuck")
    with open_database(url) as database, database.reading() as session:
        repository = RunRepository(session)
        found = (
            iter(repository.stuck(_IDLE if idle is None else idle, limit + 1))
            if stuck
            else repository.iterate(
                pipeline_id,
                [RunStatus(status) for status in statuses] or None,
                tags=tags or None,
                created_after=since,
                created_before=until,
                batch=_BATCH if every else min(limit + 1, _BATCH),
            )
        )
        more = _print_runs(session, found if every else islice(found, limit + 1), None if every else limit, as_json)
    if more:
        echo(f"There are more than {limit}: --limit N or --all shows them.", err=True)


def _print_runs(session: Session, found: Iterator[RunSummary], limit: int | None, as_json: bool) -> bool:
    """Print runs; whether there are more than ``limit``."""
    more = False

    def shown() -> Iterator[RunSummary]:
        nonlocal more
        yield from islice(found, limit)
        more = next(found, None) is not None

    if as_json:
        print_json([run.model_dump(mode="json") for run in shown()])
    else:
        print_table(
            ["#id", "#pipeline", "name", "status", "created", "#duration", "detail"],
            _rows(session, shown()),
        )
    return more


def _rows(session: Session, found: Iterator[RunSummary]) -> Iterator[Sequence[object]]:
    """The rows of runs, with the names of their pipelines, which are read for many runs at once."""
    from sqlalchemy import select

    from gathering_pipeline.orm import Pipeline

    names: dict[int, str] = {}
    while batch := list(islice(found, _BATCH)):
        if unknown := {run.pipeline_id for run in batch} - names.keys():
            query = select(Pipeline.id, Pipeline.name).where(Pipeline.id.in_(unknown))
            names |= {row.id: row.name for row in session.execute(query)}
        for run in batch:
            yield (
                *(run.id, run.pipeline_id, names.get(run.pipeline_id), run.status, run.created_at),
                *(run_duration(run), _detail(run)),
            )


def _detail(run: RunSummary) -> str | None:
    """The node that a run is at, or that failed, and the error."""
    error = None if run.error_message is None else shorten(one_line(run.error_message), 100)
    return ": ".join(text for text in (run.failed_node or run.current_node, error) if text) or None


def run_duration(run: RunSummary) -> str:
    """How long a run took, or takes already."""
    if run.started_at is None:
        return "-"
    end = run.completed_at or datetime.now(UTC)
    return duration_text(end - run.started_at)


@runs.command()
@run_argument
@click.option("--outputs", is_flag=True, help="Also print the outputs of the nodes.")
@json_option
@url_option
def show(run_id: int, outputs: bool, as_json: bool, url: str | None) -> None:
    """Show a run: fields, tags, trigger data, nodes in execution order."""
    from gathering_pipeline.repositories import RunRepository

    with open_database(url) as database, database.reading() as session:
        repository = RunRepository(session)
        run, nodes, tags = repository.get(run_id), repository.nodes(run_id), repository.tags(run_id)
    if as_json:
        print_json(_dump(run) | {"tags": tags, "nodes": [_dump(node) for node in nodes]})
        return
    for key, value in run:
        if key not in ("trigger_data", "logs") and value is not None:
            echo(f"{key.replace('_', ' ')}: {one_line(value) if isinstance(value, str) else as_text(value)}")
    for key, text in tags.items():
        echo(one_line(f"tag {key}: {text}"))
    echo(f"trigger data: {shorten(to_json(run.trigger_data, indent=None), _MOST_DATA)}")
    print_table(NODE_COLUMNS, map(node_row, nodes))
    for node in nodes if outputs else ():
        if node.output_data:
            echo(f"output of {one_line(node.node_id)}: {to_json(node.output_data, indent=None)}")


NODE_COLUMNS = ("node", "type", "status", "#attempt", "started", "#duration", "error")


def node_row(node: NodeRunRead) -> Sequence[object]:
    """The row of a node, for ``NODE_COLUMNS``."""
    from gathering_pipeline.rendering.timeline import node_duration

    error = None if node.error_message is None else shorten(one_line(node.error_message), 100)
    if node.status == "pending" and node.available_at is not None:
        error = f"retry at {node.available_at:%m-%d %H:%M:%S}: {error}"
    attempt = node.retry_count + 1 if node.retry_count or node.started_at is not None else None
    taken = node_duration(node, datetime.now(UTC))
    duration = None if taken is None else duration_text(taken)
    return (node.node_id, node.node_type, node.status, attempt, node.started_at, duration, error)


def _dump(model: BaseModel) -> dict[str, Any]:
    return model.model_dump(mode="json")


@runs.command()
@run_argument
@json_option
@url_option
def why(run_id: int, as_json: bool, url: str | None) -> None:
    """Explain why a run is stuck or how it ended, and what to do.

    Names the attempts that failed, with their errors, and lists the last claims and releases.
    """
    from gathering_pipeline.repositories import RunRepository

    with open_database(url) as database, database.reading() as session:
        explanation = RunRepository(session).explain(run_id)
    if as_json:
        print_json(_dump(explanation))
        return
    echo(_with_commands(str(explanation), run_id))
    for entry in explanation.history:
        who = "" if entry.worker_id is None else f" {entry.worker_id}"
        because = "" if entry.reason is None else f": {one_line(entry.reason)}"
        echo(f"{as_text(entry.at)} {entry.kind}{who}{because}")


def _with_commands(text: str, run_id: int) -> str:
    """An explanation, with the commands instead of the calls that it recommends."""
    text = re.sub(r"\bactivate\((\d+)\)", r"'gathering-pipeline activate \1'", text)
    return re.sub(r"\b(resume|rerun|cancel)\(\)", rf"'gathering-pipeline runs \1 {run_id}'", text)


@runs.command()
@run_argument
@json_option
@url_option
def watch(run_id: int, as_json: bool, url: str | None) -> None:
    """Follow a run until it ends.

    Live in a terminal, else a line for each event. Ctrl-C ends it. Exits with 0 if the run completed, and with 3 if it
    ended otherwise. --json prints a JSON object a line.
    """
    from gathering_pipeline.repositories import RunRepository

    with open_database(url) as database:
        if is_terminal() and not as_json:
            from gathering_pipeline.cli.watching import watch_live

            run = watch_live(database, run_id)
        else:
            for event in database.listen(run_id):
                if as_json:
                    print_json(event.model_dump(mode="json"), indent=None)
                else:
                    click.echo(_line(event))
            with database.reading() as session:
                run = RunRepository(session).get(run_id)
    if run.status != "completed":
        click.get_current_context().exit(ACTION_NEEDED)


def _line(event: PipelineEvent) -> str:
    what = "run" if event.node_id is None else f"node {event.node_id}"
    details = "".join(f" {key}={one_line(str(value))}" for key, value in event.data.items() if value is not None)
    return as_text(f"{event.created_at:%Y-%m-%d %H:%M:%S} {what} {event.type.partition('.')[2]}{shorten(details, 300)}")


@runs.command()
@run_argument
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="The page, such as report.html; it is overwritten.",
)
@url_option
def report(run_id: int, output: Path, url: str | None) -> None:
    """Write a page about a run: graph, timeline, nodes, errors, log.

    It also says why the run is stuck or how it ended. The page is one HTML file, which needs no network and no script.
    """
    from gathering_pipeline.rendering import render_report

    with open_database(url) as database, database.reading() as session:
        record = _read_record(session, run_id)
    output.write_text(render_report(record), encoding="utf-8")
    echo(str(output))


def _read_record(session: Session, run_id: int) -> RunRecord:
    from gathering_pipeline.errors import InvalidPipelineError
    from gathering_pipeline.rendering import RunRecord
    from gathering_pipeline.repositories import EventRepository, PipelineRepository, RunRepository

    repository = RunRepository(session)
    run = repository.get(run_id)
    try:
        definition = repository.definition(run_id)
    except InvalidPipelineError:
        definition = None
    events: list[PipelineEvent] = []
    after = None
    while page := EventRepository(session).read(after, run_id=run_id).items:
        events += page
        after = page[-1].cursor
    logs = repository.logs(run_id, limit=_MOST_LOGS + 1)
    return RunRecord(
        run=run,
        pipeline_name=PipelineRepository(session).get(run.pipeline_id).name,
        definition=definition,
        nodes=repository.nodes(run_id),
        events=events,
        logs=logs[:_MOST_LOGS],
        more_logs=len(logs) > _MOST_LOGS,
        tags=repository.tags(run_id),
        explanation=repository.explain(run_id),
        at=datetime.now(UTC),
    )


# --- control ----------------------------------------------------------------------------------------------------------


@runs.command()
@click.argument("run_ids", metavar="RUN...", type=int, nargs=-1, required=True)
@click.option("--reason", metavar="TEXT", help="Stored as the error of the run.")
@json_option
@url_option
def cancel(run_ids: tuple[int, ...], reason: str | None, as_json: bool, url: str | None) -> None:
    """Cancel pending or running runs and their live nodes.

    A run that can't be cancelled stops no other.
    """
    _change(run_ids, lambda repository, run_id: repository.cancel(run_id, reason), "is cancelled", url, as_json)


def _read_json(_context: click.Context, _option: click.Parameter, given: str | None) -> Any:
    if given is None:
        return None
    try:
        return json.loads(given)
    except ValueError as error:
        raise click.BadParameter(f"not valid JSON: {error}") from error


@runs.command()
@click.argument("pipeline_id", metavar="PIPELINE", type=int)
@click.option("--data", metavar="JSON", callback=_read_json, help="The trigger data of the run, by default {}.")
@click.option("--key", metavar="TEXT", help="Idempotency key: a second call with the key returns the first run.")
@json_option
@url_option
def create(pipeline_id: int, data: Any, key: str | None, as_json: bool, url: str | None) -> None:
    """Create a run of an active pipeline; workers execute it."""
    from gathering_pipeline.repositories import RunRepository

    with open_database(url) as database, database.session() as session:
        run = RunRepository(session).create(pipeline_id, data, idempotency_key=key)
    if as_json:
        print_json(_dump(run))
    else:
        echo(f"run {run.id} is {run.status}")


@runs.command()
@click.argument("run_ids", metavar="RUN...", type=int, nargs=-1, required=True)
@json_option
@url_option
def resume(run_ids: tuple[int, ...], as_json: bool, url: str | None) -> None:
    """Continue runs that failed, were cancelled or timed out.

    Each continues in a new run, which takes over what was completed. The new run has the graph of the old one; rerun
    takes the current one.
    """
    _change(run_ids, lambda repository, run_id: repository.resume(run_id), "resumes run {}", url, as_json)


@runs.command()
@click.argument("run_ids", metavar="RUN...", type=int, nargs=-1, required=True)
@json_option
@url_option
def rerun(run_ids: tuple[int, ...], as_json: bool, url: str | None) -> None:
    """Repeat runs from the beginning, with the current graphs.

    Each new run has the trigger data, priority and tags of the old one.
    """
    _change(run_ids, lambda repository, run_id: repository.rerun(run_id), "repeats run {}", url, as_json)


def _change(
    run_ids: tuple[int, ...],
    call: Callable[[RunRepository, int], RunRead],
    result: str,
    url: str | None,
    as_json: bool,
) -> None:
    """Make a call on each run, each in a transaction of its own."""
    from gathering_pipeline.repositories import RunRepository

    changed, failed = [], False
    with open_database(url) as database, database.session(autocommit=True) as session:
        for run_id in run_ids:
            try:
                run = call(RunRepository(session), run_id)
            except Exception as error:
                sentence = describe(error)
                if sentence is None or len(run_ids) == 1:
                    raise
                failed = True
                echo(f"Error: {sentence}", err=True)
            else:
                changed.append(run)
                if not as_json:
                    echo(f"run {run.id} {result.format(run_id)}")
    if as_json:
        print_json([_dump(run) for run in changed])
    if failed:
        click.get_current_context().exit(1)


@runs.command()
@click.option(
    "--older-than",
    metavar="SPAN",
    callback=_read_span,
    required=True,
    help="Time since the run ended, as in 12h or 90d.",
)
@yes_option
@json_option
@url_option
def purge(older_than: timedelta, yes: bool, as_json: bool, url: str | None) -> None:
    """Delete runs that ended long ago, with their nodes and logs.

    Their events are kept. Works in transactions of 500 runs; start an interrupted purge again. Runs that another table
    of yours refers to are kept and listed.
    """
    from gathering_pipeline.repositories import RunRepository

    deleted, kept = 0, list[int]()
    with open_database(url) as database:
        if not yes:  # after the name of the database is printed
            age = duration_text(older_than)
            click.confirm(f"This deletes all runs that ended over {age} ago. Continue?", abort=True, err=True)
        after = None
        while True:
            with database.session() as session:
                found = RunRepository(session).purge(older_than, limit=_BATCH, after=after)
            deleted += found.deleted
            kept += found.kept
            if (after := found.next_cursor) is None:
                break
            echo(f"{deleted:,} runs deleted", err=True)
    if as_json:
        print_json({"deleted": deleted, "kept": kept})
    else:
        echo(f"deleted {deleted:,} runs" + (f"; kept, because other rows refer to them: {kept}" if kept else ""))
