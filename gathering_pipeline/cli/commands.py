"""The command ``gathering-pipeline``: its groups by subject.

The modules of the commands load a database library only when a command needs one, so that ``--help``, ``validate`` and
shell completion are fast.
"""

from __future__ import annotations

import click

from gathering_pipeline.cli.db import db
from gathering_pipeline.cli.output import Group
from gathering_pipeline.cli.pipelines import activate, export, graph, import_, list_, pause, show, validate
from gathering_pipeline.cli.runs import runs


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gathering-pipeline")
def cli() -> None:
    """The data layer of GatheRing's pipelines.

    Exit codes: 0 success; 1 failure, with a sentence on stderr for each database, file or run that failed; 2 invalid
    command line; 3 a report found something that an operator has to act on.
    """


for command in (validate, import_, export, list_, show, graph, activate, pause, runs, db):
    cli.add_command(command)
