"""Which database is used, and how its URL is read."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from urllib.parse import unquote

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from gathering_pipeline import embedded
from gathering_pipeline.arguments import check_type
from gathering_pipeline.errors import ConfigurationError
from gathering_pipeline.settings import DatabaseSettings

VARIABLES = ("GATHERING_MIGRATION_URL", "GATHERING_DATABASE_URL", "DATABASE_URL")
"""Environment variables with a URL, in the order in which migrations read them."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Location:
    """Where a database is.

    Attributes:
        settings: How it is used.
        url: Its URL; None: the embedded server, which ``resolve`` starts.
    """

    settings: DatabaseSettings
    url: URL | None

    def resolve(self, *, warn: bool = True) -> URL:
        """Return the URL to connect to; without one, start the embedded server and return its URL.

        Args:
            warn: Log the embedded server's folder as a warning. Lower levels are hidden by default, and an operator
                who misspelt a variable would otherwise see an unexplained empty database.

        Raises:
            ConfigurationError: The data folder of the embedded server can't be used.
            DatabaseUnavailableError: The embedded server doesn't start.
        """
        if self.url is not None:
            return self.url
        server = embedded.start(self.settings.data_dir)
        if warn:
            logger.warning("no database URL is set: using the embedded PostgreSQL in %s", server.data_dir)
        return parse_url(server.url)


def locate(
    url: str | URL | None = None, settings: DatabaseSettings | None = None, *, for_migrations: bool = False
) -> Location:
    """Decide which database is used.

    The first of these that is set: ``url``; for migrations the setting ``migration_url``; the setting ``database_url``;
    the embedded server. An explicit URL overrides the environment: URL variables are not read then, so an invalid one
    does no harm. The same holds for ``GATHERING_DATABASE_URL`` and ``DATABASE_URL`` if ``migration_url`` is used.

    Args:
        url: An explicit URL.
        settings: Settings of the database; None: read from the environment.
        for_migrations: Whether the connection is for a migration, which a pooler can't serve.

    Raises:
        ConfigurationError: The URL or a variable can't be used, or there is neither a URL nor an embedded server.
    """
    if settings is None:
        settings = DatabaseSettings.load(database_url=None)
        if url is None and not (for_migrations and settings.migration_url is not None):
            settings = DatabaseSettings.load()
    check_type(settings, DatabaseSettings, "settings", "DatabaseSettings(pool_size=...) makes them")
    secret = settings.database_url
    if for_migrations and settings.migration_url is not None:
        secret = settings.migration_url
    if url is None and secret is not None:
        url = secret.get_secret_value()
    if url is None and not embedded.installed():
        raise ConfigurationError(embedded.MISSING)
    return Location(settings, None if url is None else parse_url(url))


def locate_reader(url: str | URL | None, database: Location, *, is_explicit: bool) -> Location | None:
    """Decide where reads go.

    Args:
        url: An explicit URL for reads.
        database: The database.
        is_explicit: Whether its URL is explicit: the URL for reads in the settings is that of another database then.

    Returns:
        The place; None: the database itself.

    Raises:
        ConfigurationError: The URL can't be used, or the database is the embedded server.
    """
    secret = None if is_explicit else database.settings.read_url
    if url is None and secret is not None:
        url = secret.get_secret_value()
    if url is None:
        return None
    if database.url is None:
        raise ConfigurationError(
            "there is a URL for reads, but none of the database: set GATHERING_DATABASE_URL, or leave out the other"
        )
    return Location(database.settings, parse_url(url, "the URL for reads"))


SECRET = re.compile(r"password|secret|^scram_", re.IGNORECASE)
"""Names of libpq's connection parameters whose values are secret."""


class PrivateURL(URL):
    """A URL that also hides the secrets among its parameters, as in ``?password=`` and ``?sslpassword=``."""

    def render_as_string(self, hide_password: bool = True) -> str:
        """As of ``URL``."""
        names = [name for name in self.query if SECRET.search(name)] if hide_password else []
        shown = URL(*self.set(query={**self.query, **dict.fromkeys(names, "***")})).render_as_string(hide_password)
        return shown.replace("=%2A%2A%2A", "=***") if names else shown


_SEVERAL = re.compile(
    r"(?P<before>[^:]*://(?:[^:/@]*(?::[^@]*)?@)?)(?P<hosts>[^@/?]*,[^@/?]*)(?P<after>(?:[/?].*)?)", re.DOTALL
)
_HOST = re.compile(r"(?:\[([0-9a-fA-F:]+)\]|([^:]*))(?::([0-9]*))?")


def _several_hosts(text: str | URL) -> URL | None:
    """Read a URL of several hosts in libpq's spelling, which ``make_url`` doesn't know."""
    parts = _SEVERAL.fullmatch(text) if isinstance(text, str) else None
    if parts is None:
        return None
    found = [_HOST.fullmatch(host) for host in parts["hosts"].split(",")]
    places = [(match[1] or unquote(match[2]), match[3] or "") for match in found if match is not None]
    if len(places) < len(found):
        raise ValueError("a host can't be read")
    hosts, ports = map(",".join, zip(*places, strict=True))
    return make_url(parts["before"] + parts["after"]).update_query_dict({"host": hosts, "port": ports})


_KEEPS_ESCAPES = make_url("postgresql:///%41").database == "%41"
"""SQLAlchemy 2.0 doesn't decode the name of the database."""
_PLACE = re.compile(r"[^:]*://(?:[^:/]*(?::[^@]*)?@)?(?P<place>[^?]*)\??(?P<query>.*)", re.DOTALL)


def _read(text: str | URL) -> URL:
    url = _several_hosts(text) or make_url(text)
    if _KEEPS_ESCAPES and isinstance(text, str) and url.database:
        url = url.set(database=unquote(url.database))
    # the text, because make_url decodes a database's %40 into @
    parts = _PLACE.fullmatch(text) if isinstance(text, str) else None
    place, query = (url.host or "", "") if parts is None else parts.group("place", "query")
    if "@" in place or any("=" not in part for part in query.split("&") if part):
        raise ValueError("the password contains an unescaped @: its end would be shown as host or database")
    return url


def parse_url(text: str | URL, name: str = "the database URL") -> URL:
    """Turn a PostgreSQL URL into SQLAlchemy's form with the driver psycopg.

    ``postgres://`` and ``postgresql://`` are read as ``postgresql+psycopg://``. Several hosts can be spelled as in
    libpq, ``HOST:PORT,HOST:PORT``, or as in SQLAlchemy, ``?host=HOST:PORT&host=HOST:PORT``. What is shown of the URL
    has no password, also where it is a parameter.

    Args:
        text: The URL.
        name: What an error calls it.

    Raises:
        ConfigurationError: The text is not a URL of PostgreSQL. The message contains no password.
    """
    try:
        url = _read(text)
        if url.drivername in ("postgres", "postgresql", "postgresql+psycopg", "postgresql+psycopg_async"):
            url = PrivateURL(*url.set(drivername="postgresql+psycopg"))
            url.get_dialect()().create_connect_args(url)  # fails if the numbers of hosts and ports differ
            return url
    except (ArgumentError, ValueError):
        raise ConfigurationError(
            f"{name} can't be read: write it as postgresql://USER:PASSWORD@HOST:PORT/DATABASE, with special"
            " characters of the password percent-encoded (@ is %40)"
        ) from None
    if url.get_backend_name() == "postgresql":
        raise ConfigurationError(
            f"{name} can't be used: the driver of {url.drivername}:// is not supported: this package uses psycopg,"
            " write postgresql://"
        )
    raise ConfigurationError(
        f"{name} can't be used: {url.drivername}:// is not PostgreSQL: write a URL that begins with postgresql://"
    )
