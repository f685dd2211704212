"""Where the database is and how it is used, from arguments or from environment variables."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote

from pydantic import (
    AliasChoices,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticUseDefault
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from gathering_pipeline.errors import ConfigurationError


def _seconds(value: object) -> object:
    """A duration in an environment variable is a bare number of seconds."""
    with suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


NoNegative = Annotated[timedelta, BeforeValidator(_seconds), Field(ge=timedelta(0))]
AtLeastASecond = Annotated[timedelta, BeforeValidator(_seconds), Field(ge=timedelta(seconds=1))]

_FORMS = {
    "pool_size": "a whole number, 1 or more",
    "max_overflow": "a whole number, 0 or more",
    "pool_timeout": "a number of seconds, 0 or more",
    "connect_timeout": "a number of seconds, 1 or more",
    "answer_timeout": "a number of seconds, 1 or more, or none",
    "tcp_user_timeout": "a number of seconds, 1 or more",
    "statement_timeout": "a number of seconds, 1 or more, or none",
    "prepare_threshold": "a whole number, 0 or more, or none",
}
"""What to write, in an operator's words; Pydantic's speak of types."""


class DatabaseSettings(BaseSettings):
    """Settings of a ``Database``.

    Each is read from the environment as ``GATHERING_`` and its name in capitals, durations in seconds, ``none`` for
    None. The URL is read from ``GATHERING_DATABASE_URL``, then from ``DATABASE_URL``, which GatheRing itself reads.

    With the defaults a call on a dead server or network ends within 20 s: ``pool_timeout`` or ``connect_timeout`` at
    most to get a connection, then ``answer_timeout`` and 3 s more until the server is known to be silent.

    Attributes:
        database_url: URL of the database; None: the embedded server.
        migration_url: A direct URL for migrations, where ``database_url`` leads through a pooler such as PgBouncer.
        data_dir: Folder of the embedded server; None: in the user's data folder.
        pool_size: Connections that are kept open.
        max_overflow: Further ones that are opened under load and closed again.
        pool_timeout: Longest wait for a free connection of the pool.
        connect_timeout: Longest wait for a connection to one host.
        answer_timeout: Silence after which the server is asked, on a connection of its own, whether it is still there.
            While it answers that, a slow statement goes on. None: never ask.
        tcp_user_timeout: Longest time that sent data may stay unacknowledged.
        statement_timeout: The server's own limit for a statement; None: as the server is configured.
        prepare_threshold: Executions after which a statement is prepared; None for a pooler that can't keep them.
    """

    model_config = SettingsConfigDict(
        env_prefix="GATHERING_",
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,  # an input may be a URL with its password
    )

    database_url: SecretStr | None = Field(
        default=None, validation_alias=AliasChoices("GATHERING_DATABASE_URL", "DATABASE_URL")
    )
    migration_url: SecretStr | None = None
    data_dir: Path | None = None
    pool_size: int = Field(default=10, ge=1)
    max_overflow: int = Field(default=10, ge=0)
    pool_timeout: NoNegative = timedelta(seconds=10)
    connect_timeout: AtLeastASecond = timedelta(seconds=5)
    answer_timeout: AtLeastASecond | None = timedelta(seconds=6)
    tcp_user_timeout: AtLeastASecond = timedelta(seconds=10)
    statement_timeout: AtLeastASecond | None = None
    prepare_threshold: int | None = Field(default=5, ge=0)

    @field_validator("*", mode="before")
    @classmethod
    def _left_out(cls, value: object, info: ValidationInfo) -> object:
        """An empty variable is one that is not set; but who sets a URL means a database, and not the embedded one.

        ``none`` is None, however it is written.
        """
        is_none = isinstance(value, str) and value.lower() == "none"
        if info.field_name == "database_url" and (value == "" or is_none):
            what = "none" if is_none else "empty"
            raise ValueError(f"it is {what}: set it to postgresql://USER:PASSWORD@HOST:PORT/DATABASE, or unset it")
        if value == "":
            raise PydanticUseDefault
        return None if is_none else value

    @classmethod
    def load(cls, **overrides: Any) -> DatabaseSettings:
        """Read the environment.

        Raises:
            ConfigurationError: A variable can't be used; the message names it.
        """
        try:
            return cls(**overrides)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            name = str(first["loc"][0]) if first["loc"] else "settings"
            variable = name if name.isupper() else f"GATHERING_{name.upper()}"
            if name == "GATHERING_DATABASE_URL" and name not in os.environ:  # Pydantic tells the first alias only
                variable = "DATABASE_URL"
            reason = first["msg"].removeprefix("Value error, ")
            reason = f"write {_FORMS[name]}" if name in _FORMS else f"{reason[:1].lower()}{reason[1:]}"
            raise ConfigurationError(f"{variable} can't be used: {reason}") from None

    @classmethod
    def for_migrations(cls, url: str | None = None) -> tuple[DatabaseSettings, str | None]:
        """The settings, and where migrations go: a URL that is given, ``migration_url``, or None for ``database_url``.

        Raises:
            ConfigurationError: A variable that is used can't be; the message names it.
        """
        settings = cls.load(database_url=None)  # who needs no variable for it is not bothered by an empty one
        if url is None and settings.migration_url is not None:
            url = settings.migration_url.get_secret_value()
        return (cls.load() if url is None else settings), url

    def url(self) -> URL | None:
        """The database's URL in SQLAlchemy's form, or None for the embedded server."""
        return None if self.database_url is None else parse_url(self.database_url.get_secret_value())

    def connect_arguments(self, url: URL) -> dict[str, Any]:
        """Keyword arguments for psycopg. What the URL says itself is left to it, and its ``options`` come last."""
        arguments: dict[str, Any] = {
            "connect_timeout": int(self.connect_timeout.total_seconds()),
            "tcp_user_timeout": int(self.tcp_user_timeout.total_seconds() * 1000),
            "keepalives": 1,
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "client_encoding": "utf8",
            "fallback_application_name": "gathering_pipeline",
        }
        options: dict[str, str] = {}
        if self.statement_timeout is not None:
            milliseconds = int(self.statement_timeout.total_seconds() * 1000)
            # the later of two values of one setting counts
            own = url.normalized_query.get("options") or (os.environ.get("PGOPTIONS", ""),)
            options = {"options": " ".join((f"-c statement_timeout={milliseconds}", *own)).strip()}
        arguments = {name: value for name, value in arguments.items() if name not in url.query}
        return arguments | options | {"prepare_threshold": self.prepare_threshold}


_SEVERAL = re.compile(
    r"(?P<before>[^:]*://(?:[^:/@]*(?::[^@]*)?@)?)(?P<hosts>[^@/?]*,[^@/?]*)(?P<after>(?:[/?].*)?)", re.DOTALL
)
_HOST = re.compile(r"(?:\[([0-9a-fA-F:]+)\]|([^:]*))(?::([0-9]*))?")


def _several_hosts(text: str | URL) -> URL | None:
    """Read a URL of several hosts as libpq spells it, which ``make_url`` can't."""
    parts = _SEVERAL.fullmatch(text) if isinstance(text, str) else None
    if parts is None:
        return None
    found = [_HOST.fullmatch(host) for host in parts["hosts"].split(",")]
    places = [(match[1] or unquote(match[2]), match[3] or "") for match in found if match is not None]
    if len(places) < len(found):
        raise ValueError("a host can't be read")
    hosts, ports = map(",".join, zip(*places, strict=True))
    return make_url(parts["before"] + parts["after"]).update_query_dict({"host": hosts, "port": ports})


_PLACE = re.compile(r"[^:]*://(?:[^:/]*(?::[^@]*)?@)?(?P<place>[^?]*)\??(?P<query>.*)", re.DOTALL)


def _read(text: str | URL) -> URL:
    url = _several_hosts(text) or make_url(text)
    # as it is written, because make_url has a database's %40 as @
    parts = _PLACE.fullmatch(text) if isinstance(text, str) else None
    place, query = (url.host or "", "") if parts is None else parts.group("place", "query")
    if "@" in place or any("=" not in part for part in query.split("&") if part):
        raise ValueError("a password ended at its own @: what is left of it would be shown as host or database")
    return url


def parse_url(text: str | URL) -> URL:
    """Turn a PostgreSQL URL into SQLAlchemy's form with the driver psycopg.

    ``postgres://`` and ``postgresql://`` are taken as ``postgresql+psycopg://``. Several hosts are taken as libpq
    spells them, ``HOST:PORT,HOST:PORT``, and as SQLAlchemy does, ``?host=HOST:PORT&host=HOST:PORT``.

    Raises:
        ConfigurationError: It is no URL, or not one of PostgreSQL. The message holds no password.
    """
    try:
        url = _read(text)
        if url.drivername in ("postgres", "postgresql", "postgresql+psycopg", "postgresql+psycopg_async"):
            url = url.set(drivername="postgresql+psycopg")
            url.get_dialect()().create_connect_args(url)  # which finds that hosts and ports don't match
            return url
    except (ArgumentError, ValueError):
        raise ConfigurationError(
            "the database URL can't be read: write it as postgresql://USER:PASSWORD@HOST:PORT/DATABASE, with special"
            " characters of the password percent-encoded (@ is %40)"
        ) from None
    if url.get_backend_name() == "postgresql":
        raise ConfigurationError(
            f"the driver of {url.drivername}:// is not supported: this package uses psycopg, write postgresql://"
        )
    raise ConfigurationError(f"{url.drivername}:// is not PostgreSQL: write a URL that begins with postgresql://")
