"""The only place with statements: repositories for services, async and sync."""

from .events import AsyncEventRepository, EventRepository
from .pipelines import AsyncPipelineRepository, PipelineRepository
from .runs import AsyncRunRepository, RunRepository

__all__ = [
    "AsyncEventRepository",
    "AsyncPipelineRepository",
    "AsyncRunRepository",
    "EventRepository",
    "PipelineRepository",
    "RunRepository",
]
