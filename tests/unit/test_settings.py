from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy.engine import URL, make_url

from gathering_pipeline.connections import connect_arguments
from gathering_pipeline.errors import ConfigurationError
from gathering_pipeline.settings import DatabaseSettings
from gathering_pipeline.urls import locate, parse_url


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


def test_the_url_comes_from_our_variable_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate().url is None
    monkeypatch.setenv("DATABASE_URL", "postgresql://h/theirs")
    assert str(locate().url) == "postgresql+psycopg://h/theirs"
    monkeypatch.setenv("GATHERING_DATABASE_URL", "postgresql://h/ours")
    assert str(locate().url) == "postgresql+psycopg://h/ours"


@pytest.mark.parametrize("variable", ["GATHERING_DATABASE_URL", "DATABASE_URL"])
@pytest.mark.parametrize(("value", "what"), [("", "empty"), ("none", "none"), ("None", "none")])
def test_an_empty_url_is_refused_not_taken_for_the_embedded_server(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, what: str
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://h/theirs")
    monkeypatch.setenv(variable, value)
    with pytest.raises(
        ConfigurationError, match=f"^{variable} can't be used: it is {what}: set it to postgresql://USER"
    ):
        DatabaseSettings.load()


def test_other_empty_variables_count_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MIGRATION_URL", "DATA_DIR", "POOL_SIZE", "ANSWER_TIMEOUT"):
        monkeypatch.setenv(f"GATHERING_{name}", "")
    assert DatabaseSettings.load() == DatabaseSettings.model_construct()


@pytest.mark.parametrize("variable", ["DATABASE_URL", "GATHERING_DATABASE_URL"])
def test_an_argument_beats_the_environment(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "postgresql://h/environment")
    settings = DatabaseSettings(database_url=SecretStr("postgresql://h/argument"))
    assert str(locate(settings=settings).url) == "postgresql+psycopg://h/argument"


def test_every_setting_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "MIGRATION_URL": "postgresql://h/direct",
        "DATA_DIR": "/data",
        "POOL_SIZE": "3",
        "CONNECT_TIMEOUT": "2",
        "ANSWER_TIMEOUT": "None",
        "STATEMENT_TIMEOUT": "1.5",
        "PREPARE_THRESHOLD": "NONE",
    }.items():
        monkeypatch.setenv(f"GATHERING_{name}", value)
    settings = DatabaseSettings.load()
    assert settings.migration_url == SecretStr("postgresql://h/direct")
    assert settings.data_dir == Path("/data")
    assert settings.pool_size == 3
    assert settings.answer_timeout is None
    arguments = connect_arguments(parse_url("postgresql://h/d"), settings)
    assert arguments["connect_timeout"] == 2
    assert arguments["options"] == "-c statement_timeout=1500"
    assert arguments["prepare_threshold"] is None


def test_what_the_url_says_is_left_to_it() -> None:
    arguments = connect_arguments(parse_url("postgresql://h/d?connect_timeout=3&keepalives=0"), DatabaseSettings())
    assert "connect_timeout" not in arguments
    assert "keepalives" not in arguments
    assert arguments["tcp_user_timeout"] == 10_000


@pytest.mark.parametrize(
    ("query", "options"),
    [
        ("", "-c statement_timeout=2000"),
        ("?options=-c%20work_mem%3D1MB", "-c statement_timeout=2000 -c work_mem=1MB"),
        ("?options=-c%20a.b%3D1&options=-c%20a.c%3D2", "-c statement_timeout=2000 -c a.b=1 -c a.c=2"),
    ],
)
def test_options_of_the_url_come_after_ours(query: str, options: str) -> None:
    settings = DatabaseSettings(statement_timeout=timedelta(seconds=2))
    assert connect_arguments(parse_url(f"postgresql://h/d{query}"), settings)["options"] == options


def test_those_of_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGOPTIONS", "-c work_mem=1MB")
    settings = DatabaseSettings(statement_timeout=timedelta(seconds=2))
    arguments = connect_arguments(parse_url("postgresql://h/d"), settings)
    assert arguments["options"] == "-c statement_timeout=2000 -c work_mem=1MB"


def test_the_password_is_never_shown() -> None:
    settings = DatabaseSettings(database_url=SecretStr("postgresql://u:hunter2@h/d"))
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in settings.model_dump_json()


@pytest.mark.parametrize(
    ("name", "value", "form"),
    [
        ("POOL_SIZE", "many", "a whole number, 1 or more"),
        ("POOL_SIZE", "0", "a whole number, 1 or more"),
        ("MAX_OVERFLOW", "none", "a whole number, 0 or more"),
        ("POOL_TIMEOUT", "-1", "a number of seconds, 0 or more"),
        ("CONNECT_TIMEOUT", "-1", "a number of seconds, 1 or more"),
        ("TCP_USER_TIMEOUT", "10ms", "a number of seconds, 1 or more"),
        ("ANSWER_TIMEOUT", "0", "a number of seconds, 1 or more, or none"),
        ("STATEMENT_TIMEOUT", "30s", "a number of seconds, 1 or more, or none"),
        ("PREPARE_THRESHOLD", "never", "a whole number, 0 or more, or none"),
    ],
)
def test_a_variable_that_cannot_be_used_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, form: str
) -> None:
    monkeypatch.setenv(f"GATHERING_{name}", value)
    with pytest.raises(ConfigurationError, match=f"^GATHERING_{name} can't be used: write {form}$"):
        DatabaseSettings.load()


def test_defaults_end_a_call_within_20_seconds() -> None:
    settings = DatabaseSettings()
    assert settings.answer_timeout is not None
    probe = timedelta(seconds=3)
    assert max(settings.pool_timeout, settings.connect_timeout) + settings.answer_timeout + probe < timedelta(
        seconds=20
    )
