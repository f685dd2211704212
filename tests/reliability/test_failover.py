"""A primary that is lost while callers write: to a standby that had confirmed each commit nothing is lost.

``GATHERING_CHAOS`` (``make chaos``) is the number of failovers, 1 unless it is set.
"""

from __future__ import annotations

import os
import random
import time

import pytest

from gathering_pipeline import Database
from tests.support import cluster
from tests.support.ledger import HEADING, Ledger
from tests.support.runs import store

ROUNDS = int(os.environ.get("GATHERING_CHAOS", "1"))
SEED = int(os.environ.get("GATHERING_SEED", "20261127"))


def test_failover_to_a_synchronous_standby_loses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(SEED)
    until: list[float] = []
    with cluster.nodes() as servers:
        primary, standby = servers
        standby.follow_synchronously(primary)
        url = cluster.several(primary, standby)
        with Database(url) as database, database.session() as session:
            pipeline = store(session, "a")
        ledger = Ledger(url, pipeline)
        with ledger.calling(listeners=True):
            for number in range(ROUNDS):
                if number:
                    standby.follow_synchronously(primary)
                ledger.wait(ledger.mark())
                time.sleep(chance.uniform(0, 0.5))
                primary.kill()
                time.sleep(chance.uniform(0, 0.5))
                standby.promote()
                until += ledger.wait(ledger.mark())
                primary, standby = standby, primary
        with primary.connect() as raw:
            row = ledger.close(raw, "failover to a synchronous standby", ROUNDS, until)
    with capsys.disabled():
        print(f"\n{HEADING}\n{row}   {ledger.told}")
    assert (row.lost, row.doubled, row.wrong) == ([], [], [])
