"""Files of pipelines: JSON objects with the fields of ``PipelineCreate``."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gathering_pipeline.errors import InvalidDataError, InvalidPipelineError, Issue, IssueCode, shorten

if TYPE_CHECKING:
    from gathering_pipeline.models import PipelineRead

MOST_BYTES = 128 * 1024 * 1024
"""Size of the largest file: twice that of the largest graph, because a file is indented."""
ORIGIN = ("id", "revision")
"""Keys of an exported pipeline that are no fields: which pipeline it was, and its revision, for ``import --update``."""


@dataclass(frozen=True, slots=True)
class PipelineFile:
    """A pipeline that was read from a file.

    Attributes:
        fields: Those of ``PipelineCreate``.
        origin: The id and the revision that it was exported with.
        is_draft: Whether it may be incomplete: its status says that it isn't run.
        issues: What is wrong with it.
    """

    fields: dict[str, Any]
    origin: dict[str, int] = field(default_factory=dict)
    is_draft: bool = False
    issues: list[Issue] = field(default_factory=list)

    def refuses(self, issue: Issue) -> bool:
        """Whether a pipeline with this issue can't be stored."""
        from gathering_pipeline.validator import INCOMPLETE_CODES

        return issue.severity == "error" and not (self.is_draft and issue.code in INCOMPLETE_CODES)

    def check(self) -> None:
        """Raise ``InvalidPipelineError`` with the issues that refuse it, if there are any."""
        if refused := [issue for issue in self.issues if self.refuses(issue)]:
            raise InvalidPipelineError(refused)


def read_json(path: str) -> Any:
    """Read a JSON file in UTF-8; ``-`` is stdin.

    Raises:
        InvalidDataError: It can't be read, is too large, or is not JSON.
    """
    try:
        with click.open_file(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise InvalidDataError(f"the file can't be read: {error.strerror}") from None
    if len(content) > MOST_BYTES:
        raise InvalidDataError(f"the file is larger than {MOST_BYTES // 2**20} MiB")
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InvalidDataError(f"the file is not UTF-8: byte {error.start + 1} is no character") from None
    except json.JSONDecodeError as error:
        raise InvalidDataError(
            f"the file is not JSON: line {error.lineno}, column {error.colno}: {error.msg[0].lower()}{error.msg[1:]}"
        ) from None
    except RecursionError:
        raise InvalidDataError("the file is not JSON that can be stored: it is nested too deep") from None
    except ValueError as error:  # a number of too many digits
        raise InvalidDataError(f"the file is not JSON that can be read: {shorten(str(error), 200)}") from None


def read_pipeline(path: str) -> PipelineFile:
    """Read a pipeline, with everything that is wrong with it.

    Raises:
        InvalidDataError: The file is not a JSON object.
    """
    from pydantic import ValidationError

    from gathering_pipeline.models import PipelineCreate
    from gathering_pipeline.validator import find_json_issues

    found = read_json(path)
    if not isinstance(found, dict):
        raise InvalidDataError(f"the file has {_kind(found)}, not a JSON object with name, nodes and edges")
    origin = {key: found.pop(key) for key in ORIGIN if key in found}
    issues = [
        _field_issue(key, "must be a whole number, or left out") for key in origin if type(origin[key]) is not int
    ]
    try:
        PipelineCreate.model_validate({key: value for key, value in found.items() if key not in ("nodes", "edges")})
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_context=False, include_input=False):
            reason = "is not a field of a pipeline" if detail["type"] == "extra_forbidden" else detail["msg"]
            issues.append(_field_issue(str(detail["loc"][0]), shorten(reason, 200)))
    issues += find_json_issues(found.get("nodes", []), found.get("edges", []))
    return PipelineFile(found, origin, found.get("status") in ("draft", "paused"), issues)


def _kind(value: object) -> str:
    return "null" if value is None else f"a value of type {type(value).__name__}"


def _field_issue(key: str, reason: str) -> Issue:
    return Issue("error", IssueCode.INVALID_FIELD, f"{shorten(key, 100)}: {reason}", loc=(key,))


def as_file(pipeline: PipelineRead) -> dict[str, Any]:
    """What is written into the file of a stored pipeline: ``import`` makes an equal one of it."""
    from gathering_pipeline.models import PipelineCreate

    return pipeline.model_dump(mode="json", include={*ORIGIN, *PipelineCreate.model_fields})


def file_name(pipeline: PipelineRead) -> Path:
    """A name for the file of a pipeline, which holds nothing that a file system or a shell reads otherwise."""
    words = re.sub(r"[^a-z0-9]+", "-", pipeline.name.lower()).strip("-")[:60].strip("-")
    return Path(f"{pipeline.id}-{words}.json" if words else f"{pipeline.id}.json")
