"""The command line, ``gathering-pipeline``; part of the extra ``cli``."""

from __future__ import annotations

import sys
from io import TextIOWrapper


def main() -> None:
    """Run the command of ``sys.argv``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that isn't UTF-8 lacks most characters of names
    try:
        import rich  # noqa: F401 - missing, it is reported at once, and not only in a terminal

        from gathering_pipeline.cli.commands import cli

        cli()
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing not in {"click", "rich", "jinja2"}:
            raise
        sys.exit(f"Error: the command line needs {missing}: pip install 'gathering-pipeline[cli]'")
