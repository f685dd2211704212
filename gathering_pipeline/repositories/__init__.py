"""The only place with statements: repositories for services, sync and async."""

from .aio import AsyncPipelineRepository, AsyncRunRepository
from .pipelines import PipelineRepository
from .runs import RunRepository

__all__ = ["AsyncPipelineRepository", "AsyncRunRepository", "PipelineRepository", "RunRepository"]
