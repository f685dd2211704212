"""The only place with statements: repositories for services, sync and async."""

from .aio import AsyncEventRepository, AsyncPipelineRepository, AsyncRunRepository
from .events import EventRepository
from .pipelines import PipelineRepository
from .runs import RunRepository

__all__ = [
    "AsyncEventRepository",
    "AsyncPipelineRepository",
    "AsyncRunRepository",
    "EventRepository",
    "PipelineRepository",
    "RunRepository",
]
