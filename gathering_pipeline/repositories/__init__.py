"""Repositories, sync and async: every statement that this package sends for its users is in here."""

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
