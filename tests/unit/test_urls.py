"""Which database is used, and how its URL is read."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy.engine import URL, make_url

from gathering_pipeline import Database, embedded
from gathering_pipeline.errors import ConfigurationError, InvalidDataError
from gathering_pipeline.settings import DatabaseSettings
from gathering_pipeline.urls import VARIABLES, locate, parse_url

ARGUMENT = "postgresql://h/argument"
MIGRATION, GATHERING, PLAIN = (f"postgresql://h/{name.lower()}" for name in VARIABLES)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """All variables with a URL are set."""
    for name, url in zip(VARIABLES, (MIGRATION, GATHERING, PLAIN), strict=True):
        monkeypatch.setenv(name, url)
    return monkeypatch


def located(url: str | None = None, settings: DatabaseSettings | None = None, *, for_migrations: bool = False) -> str:
    found = locate(url, settings, for_migrations=for_migrations).url
    assert found is not None
    return found.set(drivername="postgresql").render_as_string()


# --- which database ---------------------------------------------------------------------------------------------------


def test_locate_with_all_variables_set_takes_the_first_of_its_purpose(environment: pytest.MonkeyPatch) -> None:
    assert located(ARGUMENT) == located(ARGUMENT, for_migrations=True) == ARGUMENT
    assert located(for_migrations=True) == MIGRATION
    assert located() == GATHERING
    environment.delenv(VARIABLES[0])
    assert located(for_migrations=True) == GATHERING
    environment.delenv(VARIABLES[1])
    assert located() == located(for_migrations=True) == PLAIN


def test_locate_without_any_url_takes_the_embedded_server(monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate().url is None
    assert locate(for_migrations=True).url is None
    monkeypatch.setattr(embedded, "installed", lambda: False)
    with pytest.raises(ConfigurationError, match="no database is configured: set GATHERING_DATABASE_URL"):
        locate()
    assert located(ARGUMENT) == ARGUMENT


def test_locate_with_settings_reads_no_variable(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("GATHERING_POOL_SIZE", "invalid")
    settings = DatabaseSettings(pool_size=1, migration_url=None, database_url=SecretStr("postgresql://h/settings"))
    assert located(settings=settings) == located(settings=settings, for_migrations=True) == "postgresql://h/settings"
    assert located(ARGUMENT, settings) == ARGUMENT
    direct = settings.model_copy(update={"migration_url": SecretStr("postgresql://h/direct")})
    assert located(settings=direct, for_migrations=True) == "postgresql://h/direct"
    assert located(settings=direct) == "postgresql://h/settings"
    assert located(ARGUMENT, direct, for_migrations=True) == ARGUMENT


@pytest.mark.parametrize("name", VARIABLES[1:])
def test_locate_with_an_empty_variable_fails_only_if_it_is_used(environment: pytest.MonkeyPatch, name: str) -> None:
    environment.delenv("GATHERING_DATABASE_URL")
    environment.setenv(name, "")
    assert located(ARGUMENT) == ARGUMENT
    assert located(for_migrations=True) == MIGRATION
    with pytest.raises(ConfigurationError, match=f"^{name} can't be used: it is empty"):
        locate()
    environment.delenv("GATHERING_MIGRATION_URL")
    with pytest.raises(ConfigurationError, match=f"^{name} can't be used: it is empty"):
        locate(for_migrations=True)


def test_locate_with_an_empty_url_fails() -> None:
    for settings in (None, DatabaseSettings(database_url=SecretStr(""))):
        with pytest.raises(ConfigurationError, match="the database URL can't be read"):
            locate("" if settings is None else None, settings)


def test_locate_with_other_settings_fails() -> None:
    with pytest.raises(InvalidDataError, match="settings must be of type DatabaseSettings, not dict"):
        locate(None, {"pool_size": 1})  # type: ignore[arg-type]


# --- how a URL is read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg", "postgresql+psycopg_async"])
def test_urls_of_postgresql_get_our_driver(scheme: str) -> None:
    url = parse_url(f"{scheme}://user:p%40ss@host:5433/name?sslmode=require")
    assert url.render_as_string(hide_password=False) == (
        "postgresql+psycopg://user:p%40ss@host:5433/name?sslmode=require"
    )


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("h1:5432,h2:5433/d?target_session_attrs=any", ("h1,h2", "5432,5433")),
        ("/d?host=h1:5432&host=h2:5433&target_session_attrs=any", ("h1,h2", "5432,5433")),
        ("/d?host=h1,h2&port=5432,5433&target_session_attrs=any", ("h1,h2", "5432,5433")),
        ("h1,h2:5433/d?target_session_attrs=any", ("h1,h2", ",5433")),  # as libpq has it: the first one's is 5432
        ("[::1]:1,%2Ftmp/d?target_session_attrs=any", ("::1,/tmp", "1,")),
    ],
)
def test_several_hosts_in_all_spellings(hosts: str, expected: tuple[str, str]) -> None:
    url = parse_url(f"postgresql://u:p,ss@{hosts}")
    arguments = url.get_dialect()().create_connect_args(url)[1]
    assert (arguments["host"], arguments["port"]) == expected
    assert (arguments["user"], arguments["password"], arguments["dbname"]) == ("u", "p,ss", "d")
    assert arguments["target_session_attrs"] == "any"


def test_a_url_object_is_taken_and_what_is_none_refused() -> None:
    url = parse_url("postgresql://u:p@h/d")
    assert parse_url(url) == url
    with pytest.raises(ConfigurationError, match="can't be read"):
        parse_url(Path("/d"))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["postgresql://u:p%40@h/a%40b", "postgresql://u@x:p%40@h/a%40b?application_name=a@b"])
def test_an_at_sign_in_other_places(text: str) -> None:
    url = parse_url(text)
    assert (url.password, url.host, url.database) == ("p@", "h", "a@b")
    assert parse_url(url) == url


def test_a_comma_elsewhere_is_none_between_hosts() -> None:
    url = parse_url("postgresql://u:p,ss@h/d?options=-c%20search_path=a,b")
    assert (url.host, url.password, url.query["options"]) == ("h", "p,ss", "-c search_path=a,b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mysql://u:hunter2@h/d", r"mysql:// is not PostgreSQL: write a URL that begins with postgresql://"),
        ("sqlite://", r"sqlite:// is not PostgreSQL"),
        ("postgresql+psycopg2://u:hunter2@h/d", r"the driver of postgresql\+psycopg2:// is not supported"),
        ("u:hunter2@h/d", r"the database URL can't be read"),
        ("postgresql://u:hunter2@h:port/d", r"the database URL can't be read"),
        ("postgresql://u:hunter2@h:1,h2:port/d", r"the database URL can't be read"),
        ("postgresql://u:hunter2@/d?host=h1,h2,h3&port=1,2", r"the database URL can't be read"),
        ("", r"the database URL can't be read"),
        ("postgresql://u:pa@hunter2@h:1/d", r"the database URL can't be read: .* percent-encoded \(@ is %40\)"),
        ("postgresql://u:pa@hunter2@h:1,h2:2/d", r"the database URL can't be read: .* percent-encoded"),
        (make_url("postgresql://u:pa@hunter2@h:1/d"), r"the database URL can't be read: .* percent-encoded"),
        ("postgresql://u:pa@hun/ter2@h/d", r"the database URL can't be read: .* percent-encoded"),
        ("postgresql://u:pa@hun?ter2@h/d", r"the database URL can't be read: .* percent-encoded"),
    ],
)
def test_other_urls_are_refused_in_a_sentence_without_the_password(text: str | URL, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        parse_url(text)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__context__ is None or caught.value.__suppress_context__


@pytest.mark.parametrize(
    "query",
    [
        "password=S3CRET",
        "sslmode=require&sslpassword=S3CRET",
        "password=S3CRET&password=S3CRET",
        "PASSWORD=S3CRET",
        "oauth_client_secret=S3CRET",
        "scram_client_key=S3CRET",
    ],
)
@pytest.mark.parametrize("place", ["u@h/d", "u:S3CRET@h/d", "u@h1:1,h2:2/d"])
def test_secret_parameter_is_shown_nowhere(place: str, query: str) -> None:
    database = Database(f"postgresql://{place}?{query}")
    url = database.engine.url
    shown = [database.url, database, database.engine, url, copy.copy(url), url.set(port=1)]
    shown += [locate(f"postgresql://{place}?{query}"), parse_url(url)]
    for value in shown:
        assert "S3CRET" not in f"{value} {value!r}"
        assert "=***" in str(value)
    assert pickle.loads(pickle.dumps(url)) == url  # noqa: S301 - our own
    assert "S3CRET" not in repr(pickle.loads(pickle.dumps(url)))  # noqa: S301
    whole = url.render_as_string(hide_password=False)
    assert "S3CRET" in whole
    assert parse_url(whole) == url
    secret = query.rpartition("&")[2].partition("=")[0]
    assert "S3CRET" in str(url.get_dialect()().create_connect_args(url)[1][secret])


def test_url_with_other_parameters_is_shown_as_it_is() -> None:
    assert Database("postgresql://u@h/d?passfile=%2Fx&options=-c+a%3D%2A%2A%2A").url == (
        "postgresql+psycopg://u@h/d?options=-c+a%3D%2A%2A%2A&passfile=%2Fx"
    )
