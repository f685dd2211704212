"""The doctor and a healthy database."""

from __future__ import annotations

import random
import threading
import time
from datetime import timedelta

import psycopg

from gathering_pipeline.database import Database
from gathering_pipeline.errors import ConflictError
from gathering_pipeline.maintenance.doctor import doctor
from gathering_pipeline.repositories.runs import RunRepository
from tests.support.doctor import RUNS, found, pipeline


def test_doctor_on_healthy_database_finds_nothing(database: Database, raw: psycopg.Connection) -> None:
    assert found(database) == []
    pipelines = [pipeline(database) for _ in range(5)]
    over = time.monotonic() + 6

    def work(number: int) -> None:
        dice = random.Random(number)
        with database.session(autocommit=True) as session:
            runs = RunRepository(session)
            while time.monotonic() < over:
                try:
                    run = runs.create(dice.choice(pipelines))
                    started = runs.advance(run.id).started
                    if dice.random() < 0.2:
                        runs.cancel(run.id)
                    while started:
                        status = dice.choice(["completed", "completed", "completed", "failed"])
                        started = runs.advance(
                            run.id, [{"node_id": n.node_id, "status": status} for n in started]
                        ).started
                except ConflictError:
                    continue

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    during = [doctor(database.engine) for _ in range(5)]
    for worker in workers:
        worker.join()
    statuses = {row[0] for row in raw.execute(f"SELECT DISTINCT status FROM {RUNS}")}
    assert {"completed", "failed", "cancelled"} <= statuses
    assert [*during, doctor(database.engine)] == [[]] * 6
    with database.session() as session:
        assert RunRepository(session).purge(timedelta(0), limit=50).deleted > 0
    assert found(database) == [], "purged runs are history"
