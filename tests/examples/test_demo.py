"""The tour of ``make demo``, on a database of the tests' server."""

import pytest

from examples import demo


def test_tour_passes_its_checks_and_prints_what_it_did(
    empty_database_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    demo.tour(empty_database_url)
    printed = capsys.readouterr().out
    assert "Stored 'Code review' as pipeline 1, version 1." in printed
    assert "Refused 'broken.json': Pipeline contains a cycle: review -> fix -> retest -> review" in printed
    assert "Created 6 runs for two workers, ada and grace." in printed
    assert [
        line.split()[:2] for line in printed.splitlines() if " completed " in line and line.split()[0].isdigit()
    ] == [[str(run_id), "completed"] for run_id in range(1, 7)]
    last_event = [line for line in printed.splitlines() if line.strip()][-1]
    assert "run 1  pipeline_run.completed" in last_event


def test_tour_on_a_database_in_use_fails_its_check(database_url: str) -> None:
    from gathering_pipeline import Database, PipelineRepository

    with Database(database_url) as database, database.session() as session:
        PipelineRepository(session).create(demo.load_pipeline("code_review.json"))
    with pytest.raises(demo.DemoError, match="something else was stored"):
        demo.tour(database_url)


def test_main_exits_with_1_when_a_check_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], database_url: str
) -> None:
    from contextlib import nullcontext

    def failing_tour(url: str) -> None:
        demo.check(url != database_url, "the counters are wrong")

    monkeypatch.setattr(demo, "SHELL_PREFIXES", ())
    monkeypatch.setattr(demo, "temporary_server", lambda: nullcontext(database_url))
    monkeypatch.setattr(demo, "tour", failing_tour)
    assert demo.main() == 1
    assert capsys.readouterr().err == "Failed: the counters are wrong\n"
