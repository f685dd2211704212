"""``runs report``: what the page says, and how a browser shows it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import Database, RunRepository
from gathering_pipeline.rendering import report
from tests.support import browser
from tests.support.commands import run, sentence, succeed
from tests.support.graphs import graph
from tests.support.runs import LEASE, claimed, done, store

EVIL = "</script><img src=x onerror=alert(1)>\"'{{7*7}}\x1b[31m\u202e"
SPEC = "start>build start>lint build>test test>check lint>check check>merge=true check>fix=false merge>tell fix>tell"


class Page(HTMLParser):
    """The tags, attributes and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self.attributes |= found.keys()
        self.ids += [found["id"]] if found.get("id") else []  # type: ignore[list-item]
        self.links += [found["href"]] if found.get("href") else []  # type: ignore[list-item]

    def handle_data(self, data: str) -> None:
        self.text += data


def make(database_url: str, run_id: int, folder: Path) -> str:
    path = folder / f"{run_id}.html"
    assert succeed("runs", "report", str(run_id), "-o", str(path), url=database_url) == f"{path}\n"
    return path.read_text(encoding="utf-8")


def stored(session: Session, **fields: object) -> int:
    nodes, edges = graph(SPEC)
    nodes[1]["name"] = "A name that is too long for the box of a node: " + EVIL
    return store(session, SPEC, name=f"Review {EVIL}", nodes=nodes, edges=edges, retry_backoff_base=0, **fields)


@pytest.fixture
def session(database: Database) -> Iterator[Session]:
    with database.session(autocommit=True) as opened:
        yield opened


@pytest.fixture
def runs(session: Session) -> RunRepository:
    return RunRepository(session)


def with_failure(runs: RunRepository, session: Session) -> int:
    """A run with a retry, an untaken branch, a failure, logs and tags."""
    pipeline = stored(session)
    runs.create(pipeline, {"branch": EVIL}, tags={"customer": EVIL})
    (mine,) = runs.claim(f"worker-{'x' * 90}", LEASE)
    runs.append_log(mine.id, {"text": EVIL}, token=mine.token)
    runs.append_log(mine.id, f"a line\n{EVIL}", token=mine.token)
    runs.advance(mine.id, token=mine.token)
    runs.advance(mine.id, [done("start", output={"long": "x" * 500})], token=mine.token)
    runs.advance(
        mine.id, [done("build", "failed", error=f"no space {EVIL}"), done("lint")], retry=True, token=mine.token
    )
    runs.advance(mine.id, [done("build")], token=mine.token)
    runs.advance(mine.id, [done("test")], token=mine.token)
    runs.advance(mine.id, [{"node_id": "check", "status": "completed", "branch": False}], token=mine.token)
    error = f"Traceback\n  {'/long/path' * 40}\n{EVIL}"
    runs.advance(mine.id, [done("fix", "failed", error=error)], token=mine.token)
    return mine.id


# --- what it says -----------------------------------------------------------------------------------------------------


def test_report_of_failed_run_tells_everything(
    database_url: str, runs: RunRepository, session: Session, tmp_path: Path
) -> None:
    run_id = with_failure(runs, session)
    text = make(database_url, run_id, tmp_path)
    page = Page(text)
    assert page.text.count("no space") >= 1
    assert "It failed with node fix" in page.text
    assert "fix · attempt 1" in page.text
    assert "attempt 2, " in page.text
    shown = succeed("runs", "show", str(run_id), url=database_url)
    durations = {line.split("\t")[5] for line in shown.splitlines() if "\t" in line} - {"-"}
    assert durations
    assert [text for text in durations if text not in page.text] == []
    assert 'aria-label="attempt 1 failed after ' in text
    assert '"branch": ' in page.text
    assert "a line" in page.text
    for status in ("completed", "failed", "skipped", "cancelled"):
        assert f'<use href="#sign-{status}"/></svg>{status}</span>' in text
    assert text.count('class="edge untaken"') == 1


def test_report_has_no_script_and_loads_nothing(
    database_url: str, runs: RunRepository, session: Session, tmp_path: Path
) -> None:
    text = make(database_url, with_failure(runs, session), tmp_path)
    page = Page(text)
    assert {"script", "img", "iframe", "link", "object", "form"} & set(page.tags) == set()
    assert [name for name in page.attributes if name.startswith("on") or name == "src"] == []
    assert len(set(page.ids)) == len(page.ids)
    assert set(page.links) <= {f"#{name}" for name in page.ids}
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text) == []
    assert "49" not in re.findall(r"onerror=alert\(1\)&gt;.{0,20}", text)[0]
    assert all(line.isprintable() for line in text.splitlines())
    assert text.count("<svg") == text.count("</svg>")


def test_report_of_live_run_tells_what_it_waits_for(
    database_url: str, runs: RunRepository, session: Session, tmp_path: Path
) -> None:
    live = claimed(runs, session, "a>b")
    runs.advance(live.id, token=live.token)
    page = Page(make(database_url, live.id, tmp_path))
    assert "What it waits for" in page.text
    assert "Worker worker holds it" in page.text
    assert "Node b waits for a." in page.text
    assert "attempt 1 running for " in make(database_url, live.id, tmp_path)


def test_report_of_released_attempt_is_no_failure(
    database_url: str, runs: RunRepository, session: Session, tmp_path: Path
) -> None:
    given_up = claimed(runs, session, "a")
    runs.advance(given_up.id, token=given_up.token)
    runs.release(given_up.id, token=given_up.token, reason="deploy")
    text = make(database_url, given_up.id, tmp_path)
    assert "attempt 1 cancelled after " in text
    assert ": deploy" in Page(text).text
    assert 'id="errors"' not in text


def test_report_of_run_without_nodes_or_events(
    database_url: str, runs: RunRepository, session: Session, raw: psycopg.Connection, tmp_path: Path
) -> None:
    pipeline = store(session, "a>b")
    recorded = runs.record_run(pipeline, [done("a", duration_ms=1500), done("b", duration_ms=20)])
    raw.execute("DELETE FROM circle.pipeline_events")
    text = make(database_url, recorded.id, tmp_path)
    assert "attempt 1 completed after 1.5 s" in text
    raw.execute("SET session_replication_role = replica")  # as a subscriber stores the run of a broken graph
    raw.execute("INSERT INTO circle.pipeline_runs (pipeline_id, status) VALUES (%s, 'pending')", [pipeline])
    page = Page(make(database_url, recorded.id + 1, tmp_path))
    for text in ("is bound to no version of its pipeline's graph", "has no nodes yet", "No node has been started"):
        assert text in page.text


def test_report_of_large_run_is_shortened(
    database_url: str, runs: RunRepository, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "MOST_ROWS", 3)
    monkeypatch.setattr(report, "MOST_DRAWN", 5)
    pipeline = store(session, "a>z b>z c>z d>z e>z f>z")
    runs.record_run(pipeline, [*(done(name) for name in "abcde"), done("f", "failed", error="boom")])
    page = Page(make(database_url, 1, tmp_path))
    assert "3 of 7 nodes, those that failed or are live before the others." in page.text
    assert "The graph has 7 nodes: more than 5 are not drawn." in page.text
    assert "boom" in page.text


def test_report_into_a_missing_folder_prints_one_sentence(
    database_url: str, runs: RunRepository, session: Session, tmp_path: Path
) -> None:
    store(session, "a")
    runs.create(1)
    path = tmp_path / "none" / "r.html"
    assert (
        sentence(run("runs", "report", "1", "-o", str(path), url=database_url)) == f"{path}: No such file or directory"
    )


# --- how a browser shows it -------------------------------------------------------------------------------------------

OVERFLOWING = """
JSON.stringify([...document.querySelectorAll('body *')].filter(element => {
  const box = element.getBoundingClientRect();
  const inside = element.closest('.scroll, pre, .axis') && !element.matches('.scroll, pre');
  return box.width && !inside && (box.right > innerWidth + 1 || box.left < -1);
}).map(element => element.outerHTML.slice(0, 100)))
"""


def test_report_in_a_browser_fits_phone_tablet_and_desk(
    database_url: str, runs: RunRepository, session: Session, tmp_path: Path
) -> None:
    """With GATHERING_SCREENSHOTS=FOLDER the pages are also kept as pictures."""
    program = browser.find()
    if program is None:
        pytest.skip(f"no browser is installed: none of {', '.join(browser.NAMES)} is in the path")
    folder = Path(os.environ.get("GATHERING_SCREENSHOTS", tmp_path))
    failed_run = with_failure(runs, session)
    live = claimed(runs, session, SPEC)
    runs.advance(live.id, token=live.token)
    for run_id in (failed_run, live.id):
        make(database_url, run_id, tmp_path)
    with browser.start(program, tmp_path / "profile") as page:
        for run_id in (failed_run, live.id):
            for width, height, scheme in ((360, 740, "dark"), (961, 1200, "light"), (1440, 900, "light")):
                page.open(tmp_path / f"{run_id}.html", width, height, scheme)
                place = (run_id, width)
                assert (page.evaluate("innerWidth"), place) == (width, place)
                root = "document.documentElement"
                assert page.evaluate(f"{root}.scrollWidth <= {root}.clientWidth"), place
                table = "document.querySelector('table').parentElement"
                assert page.evaluate(f"{table}.scrollWidth <= {table}.clientWidth"), place
                assert (json.loads(page.evaluate(OVERFLOWING)), place) == ([], place)
                dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
                assert dark == (scheme == "dark")
                page.screenshot(folder / f"report-{run_id}-{width}.png")
        assert page.evaluate("document.querySelectorAll('[tabindex]').length") >= 1
