"""Settings of a database, from arguments or from environment variables. ``urls`` decides which URL is used."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

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

from gathering_pipeline.errors import ConfigurationError


def _seconds(value: object) -> object:
    """A duration in an environment variable is a bare number of seconds."""
    with suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


NoNegative = Annotated[timedelta, BeforeValidator(_seconds), Field(ge=timedelta(0))]
# PostgreSQL and libpq take milliseconds as a 32-bit integer
MAX_SECONDS = 2_147_483
AtLeastASecond = Annotated[
    timedelta, BeforeValidator(_seconds), Field(ge=timedelta(seconds=1), le=timedelta(seconds=MAX_SECONDS))
]

_FORMS = {
    "pool_size": "a whole number, 1 or more",
    "max_overflow": "a whole number, 0 or more",
    "pool_timeout": "a number of seconds, 0 or more",
    "idle_limit": f"a number of seconds from 1 to {MAX_SECONDS}, or none",
    "connect_timeout": f"a number of seconds from 1 to {MAX_SECONDS}",
    "answer_timeout": f"a number of seconds from 1 to {MAX_SECONDS}, or none",
    "tcp_user_timeout": f"a number of seconds from 1 to {MAX_SECONDS}",
    "statement_timeout": f"a number of seconds from 1 to {MAX_SECONDS}, or none",
    "prepare_threshold": "a whole number, 0 or more, or none",
}
"""The accepted values in an operator's words; Pydantic's messages name types."""


class DatabaseSettings(BaseSettings):
    """Settings of a ``Database``.

    Each setting is read from the environment variable ``GATHERING_`` plus its name in capitals: durations in seconds,
    ``none`` for None. The URL is read from ``GATHERING_DATABASE_URL``, then from ``DATABASE_URL``, the variable of
    GatheRing.

    With the defaults a call on a dead server or network ends within 20 s: at most ``pool_timeout`` or
    ``connect_timeout`` to get a connection, then ``answer_timeout`` plus 3 s to find that the server is silent.

    Attributes:
        database_url: URL of the database; None: the embedded server.
        migration_url: Direct URL for migrations, where ``database_url`` leads through a pooler such as PgBouncer.
        read_url: URL for reads, such as one of standbys; None: ``database_url``.
        data_dir: Folder of the embedded server; None: in the user's data folder.
        pool_size: Connections that are kept open.
        max_overflow: Further connections, opened under load and closed afterwards.
        pool_timeout: Longest wait for a free connection of the pool.
        idle_limit: Time without use after which the last connection of a pool is closed; the others are closed after a
            second then. None: ``pool_size`` connections stay open.
        connect_timeout: Longest wait for a connection; the hosts of a URL share it.
        answer_timeout: Silence after which the server is probed on a separate connection. A slow statement continues
            while the server answers the probe. None: never probe.
        tcp_user_timeout: Longest time that sent data may stay unacknowledged.
        statement_timeout: Limit for a statement, enforced by the server; None: as the server is configured.
        prepare_threshold: Executions after which a statement is prepared; None: never. Behind a pooler nothing is
            prepared, whatever this says.
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
    read_url: SecretStr | None = None
    data_dir: Path | None = None
    pool_size: int = Field(default=10, ge=1)
    max_overflow: int = Field(default=10, ge=0)
    pool_timeout: NoNegative = timedelta(seconds=10)
    idle_limit: AtLeastASecond | None = None
    connect_timeout: AtLeastASecond = timedelta(seconds=5)
    answer_timeout: AtLeastASecond | None = timedelta(seconds=6)
    tcp_user_timeout: AtLeastASecond = timedelta(seconds=10)
    statement_timeout: AtLeastASecond | None = None
    prepare_threshold: int | None = Field(default=5, ge=0)

    @field_validator("*", mode="before")
    @classmethod
    def _empty_or_none(cls, value: object, info: ValidationInfo) -> object:
        """Read an empty variable as unset and ``none``, in any case, as None; refuse both for the URL.

        A URL variable that is set means a database, never the embedded server.
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
            if name == "GATHERING_DATABASE_URL" and name not in os.environ:  # Pydantic reports the first alias only
                variable = "DATABASE_URL"
            reason = first["msg"].removeprefix("Value error, ")
            reason = f"write {_FORMS[name]}" if name in _FORMS else f"{reason[:1].lower()}{reason[1:]}"
            raise ConfigurationError(f"{variable} can't be used: {reason}") from None
