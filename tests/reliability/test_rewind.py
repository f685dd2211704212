"""A server that is restored from an earlier copy: cursors and tokens of the undone time stay refused for ever."""

from __future__ import annotations

import shutil
from datetime import timedelta

import psutil
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import Database, EventPage, EventRepository, RunRepository, embedded
from gathering_pipeline.errors import InvalidCursorError, LeaseLostError
from tests.support import servers
from tests.support.runs import LEASE, done, store

RUNS = 30


def read_all(session: Session, after: str | None = None) -> EventPage:
    events, page = EventRepository(session), EventPage(items=(), next_cursor=after or "")
    while (more := events.read(after)).items:
        page, after = EventPage(items=page.items + more.items, next_cursor=more.next_cursor), more.next_cursor
    return page


def execute(runs: RunRepository, pipeline: int, number: int) -> None:
    for _ in range(number):
        run = runs.create(pipeline)
        runs.advance(run.id)
        runs.advance(run.id, [done("a")])


def test_rewound_server_refuses_cursors_and_tokens_of_the_undone_time() -> None:
    with servers.own() as server:
        with Database(server.url) as database:
            database.upgrade()
            with database.session(autocommit=True) as session:
                runs = RunRepository(session)
                pipeline = store(session, "a")
                execute(runs, pipeline, 2)
                waiting = runs.create(pipeline).id
                before = read_all(session).next_cursor
        process = servers.postmaster(server)
        process.terminate()
        psutil.wait_procs([process], timeout=30)
        copy = server.data_dir.with_name("copy")
        shutil.copytree(server.data_dir, copy)
        stat = server.data_dir.stat()
        embedded.start(server.data_dir)

        with Database(server.url) as database, database.session(autocommit=True) as session:
            runs = RunRepository(session)
            (lost,) = runs.claim("A", LEASE)
            assert lost.id == waiting
            execute(runs, pipeline, 3)
            undone = read_all(session, before)
            assert len(undone.items) > 3
        process = servers.postmaster(server)
        process.terminate()
        psutil.wait_procs([process], timeout=30)
        for path in server.data_dir.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in copy.iterdir():
            path.rename(server.data_dir / path.name)
        for path in (server.data_dir, *server.data_dir.rglob("*")):
            shutil.chown(path, stat.st_uid, stat.st_gid)
        embedded.start(server.data_dir)

        with Database(server.url) as database, database.session(autocommit=True) as session:
            runs, events = RunRepository(session), EventRepository(session)
            (again,) = runs.claim("B", LEASE)
            assert again.id == waiting
            assert again.token > lost.token
            with pytest.raises(LeaseLostError):
                runs.advance(waiting, token=lost.token)

            def refused() -> None:
                for cursor in (undone.next_cursor, *(event.cursor for event in undone.items)):
                    for run_id in (None, waiting):
                        with pytest.raises(InvalidCursorError, match="is gone"):
                            events.read(cursor, run_id=run_id)

            refused()
            for _ in range(3):
                execute(runs, pipeline, RUNS // 3)
                refused()
            seen = read_all(session, before)  # what was read before the copy stays valid
            assert len({event.run_id for event in seen.items}) == RUNS + 1
            while events.purge(timedelta(0)):
                pass
            refused()
            assert events.read(seen.next_cursor).items == ()
