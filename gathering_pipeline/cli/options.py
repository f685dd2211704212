"""Options that several commands have, and the database that they name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from gathering_pipeline.cli.output import echo
from gathering_pipeline.errors import ConfigurationError

if TYPE_CHECKING:
    from gathering_pipeline.database import Database

migration_url_option = click.option(
    "--url",
    metavar="URL",
    help="postgresql://USER:PASSWORD@HOST:PORT/DATABASE; by default the value of GATHERING_MIGRATION_URL, "
    "GATHERING_DATABASE_URL or DATABASE_URL, else the embedded server.",
)
url_option = click.option(
    "--url",
    metavar="URL",
    help="postgresql://USER:PASSWORD@HOST:PORT/DATABASE; by default the value of GATHERING_DATABASE_URL or "
    "DATABASE_URL, else the embedded server.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
yes_option = click.option("--yes", is_flag=True, help="Confirm the action without prompting.")


@contextmanager
def open_database(url: str | None, *, for_migrations: bool = False) -> Iterator[Database]:
    """Open the database of a command, and print on stderr which one it is."""
    from gathering_pipeline import embedded, urls
    from gathering_pipeline.database import Database

    if url == "":
        raise ConfigurationError("--url is set but empty: leave it out, or write a URL")
    location = urls.locate(url, for_migrations=for_migrations)
    with Database(location.resolve(warn=False), settings=location.settings) as database:
        if location.url is None:
            folder = embedded.data_folder(location.settings.data_dir)
            unset = urls.VARIABLES if for_migrations else urls.VARIABLES[1:]
            label = f"the embedded server in {folder}, because none of {', '.join(unset)} is set"
        else:  # as the server reports it, because libpq may complete the URL
            with database.engine.connect() as connection:
                info = connection.connection.driver_connection.info  # type: ignore[union-attr]
            label = f"{info.dbname} at {info.host}:{info.port}, user {info.user}"
        echo(f"database: {label}", err=True)
        yield database
