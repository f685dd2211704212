"""Numbers of a database for monitoring: what a service's ``/metrics`` endpoint answers with."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

from pydantic import BaseModel, ConfigDict, Field

from gathering_pipeline.connections import Statement
from gathering_pipeline.lifecycle import RunStatus
from gathering_pipeline.repositories._call import AsyncRepository, Repository, blocking
from gathering_pipeline.repositories.runs import COUNTERS, RUNS_BY_STATUS

# From counters, and from the first entry of two indexes: neither a long history nor many pending runs make it slower.
READ = Statement(
    f"""
SELECT pg_catalog.json_build_object(
    'runs', s.runs, 'leases_lost', s.leases_lost,
    'oldest_pending', extract(epoch FROM pg_catalog.clock_timestamp() - w.run),
    'event_lag', greatest(0, coalesce(extract(epoch FROM pg_catalog.clock_timestamp() - w.event), 0)))::text
FROM (SELECT {RUNS_BY_STATUS} AS runs, coalesce(sum(c.leases_lost), 0) AS leases_lost FROM {COUNTERS}) s
CROSS JOIN circle.waiting_since() w""",  # noqa: S608 - of constants
    read_only=True,
)


class Metrics(BaseModel):
    """What ``Database.metrics`` read."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    runs: dict[RunStatus, int] = Field(description="Number of stored runs by status.")
    oldest_pending: timedelta | None = Field(
        description="Age of the first pending run, also if it is paused or scheduled; null: none is pending."
    )
    leases_lost: int = Field(description="Claims that ended because the lease of the worker ran out.")
    event_lag: timedelta = Field(
        description="How long the oldest event that can't be read yet has waited for older transactions."
    )

    def prometheus(self) -> str:
        """The numbers in the text format of Prometheus, version 0.0.4."""
        return "".join(f"{line}\n" for line in self._lines())

    def _lines(self) -> Iterator[str]:
        runs = [(f'{{status="{status}"}}', number) for status, number in self.runs.items()]
        oldest = timedelta(0) if self.oldest_pending is None else self.oldest_pending
        for name, kind, text, samples in (
            ("runs", "gauge", "Stored runs by status.", runs),
            (
                "oldest_pending_run_age_seconds",
                "gauge",
                "Age of the first pending run; 0: none is pending.",
                [("", oldest.total_seconds())],
            ),
            (
                "leases_lost_total",
                "counter",
                "Claims that ended because the lease ran out. Deleting a pipeline subtracts its own.",
                [("", self.leases_lost)],
            ),
            (
                "event_lag_seconds",
                "gauge",
                "How long the oldest unreadable event has waited for an older transaction.",
                [("", self.event_lag.total_seconds())],
            ),
        ):
            yield f"# HELP gathering_pipeline_{name} {text}"
            yield f"# TYPE gathering_pipeline_{name} {kind}"
            yield from (f"gathering_pipeline_{name}{labels} {value}" for labels, value in samples)


class AsyncMetricsReader(AsyncRepository):
    """Reads metrics on an async session."""

    async def read(self) -> Metrics:
        """Read them, in one round trip."""
        (found,) = await self._read(Metrics, READ)
        return found


class MetricsReader(Repository):
    """The sync twin of ``AsyncMetricsReader``."""

    _source = AsyncMetricsReader

    read = blocking(AsyncMetricsReader.read)
