"""The data layer for pipelines on PostgreSQL: validated graphs, runs and their lifecycle, lifecycle events.

A name is loaded at its first use: a service that only validates never loads SQLAlchemy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__: str

if TYPE_CHECKING:
    from .database import Database
    from .databases import Databases, SweepResult
    from .errors import (
        AdoptionError,
        CommitIndeterminateError,
        ConfigurationError,
        ConflictError,
        DatabaseError,
        DatabaseUnavailableError,
        ForkedConnectionError,
        IdempotencyConflictError,
        IdsExhaustedError,
        IllegalTransitionError,
        IntegrityViolationError,
        InvalidCursorError,
        InvalidDataError,
        InvalidPipelineError,
        IsolationLevelError,
        Issue,
        IssueCode,
        LeaseLostError,
        NodeNotReadyError,
        NodeRunNotFoundError,
        NotFoundError,
        PermanentError,
        PipelineError,
        PipelineInactiveError,
        PipelineInUseError,
        PipelineNotFoundError,
        ReadOnlySessionError,
        RunNotFoundError,
        RunOverError,
        SchemaRevisionError,
        StaleVersionError,
        StatementCancelledError,
        TransactionAbortedError,
        TransactionConflictError,
        WaitTimeoutError,
        is_transient,
    )
    from .events import EventPage, EventType, PipelineEvent
    from .explaining import Explanation, HistoryEntry, NodeExplanation, Reason, ReasonCode
    from .health import Health
    from .lifecycle import HistoryKind, NodeStatus, PipelineStatus, RunStatus
    from .metrics import Metrics
    from .models import (
        ChangedRuns,
        ClaimedRun,
        LogEntry,
        NodeExecutionResult,
        NodeResult,
        NodeRunRead,
        NodeState,
        Page,
        PipelineCreate,
        PipelineDefinition,
        PipelineEdge,
        PipelineNode,
        PipelineRead,
        PipelineUpdate,
        PipelineVersion,
        PurgeResult,
        RunRead,
        RunReport,
        RunStatistics,
        RunSummary,
        StartedNode,
        Step,
    )
    from .node_types import (
        ActionNodeConfig,
        AgentNodeConfig,
        ConditionNodeConfig,
        DelayNodeConfig,
        NodeConfig,
        ParallelNodeConfig,
        TriggerNodeConfig,
    )
    from .orm import Pipeline, PipelineNodeRun, PipelineRun, metadata
    from .repositories import (
        AsyncEventRepository,
        AsyncPipelineRepository,
        AsyncRunRepository,
        EventRepository,
        PipelineRepository,
        RunRepository,
    )
    from .settings import DatabaseSettings
    from .validator import (
        Limits,
        find_issues,
        get_execution_order,
        parse_pipeline_definition,
        untaken_successors,
        validate_pipeline_dag,
    )
    from .worker import NodeContext, Worker

# searched for a name in this order: the modules that load SQLAlchemy come last
_MODULES = (
    "errors",
    "events",
    "lifecycle",
    "node_types",
    "models",
    "validator",
    "explaining",
    "settings",
    "orm",
    "repositories",
    "database",
    "databases",
    "worker",
)

__all__ = [
    "ActionNodeConfig",
    "AdoptionError",
    "AgentNodeConfig",
    "AsyncEventRepository",
    "AsyncPipelineRepository",
    "AsyncRunRepository",
    "ChangedRuns",
    "ClaimedRun",
    "CommitIndeterminateError",
    "ConditionNodeConfig",
    "ConfigurationError",
    "ConflictError",
    "Database",
    "DatabaseError",
    "DatabaseSettings",
    "DatabaseUnavailableError",
    "Databases",
    "DelayNodeConfig",
    "EventPage",
    "EventRepository",
    "EventType",
    "Explanation",
    "ForkedConnectionError",
    "Health",
    "HistoryEntry",
    "HistoryKind",
    "IdempotencyConflictError",
    "IdsExhaustedError",
    "IllegalTransitionError",
    "IntegrityViolationError",
    "InvalidCursorError",
    "InvalidDataError",
    "InvalidPipelineError",
    "IsolationLevelError",
    "Issue",
    "IssueCode",
    "LeaseLostError",
    "Limits",
    "LogEntry",
    "Metrics",
    "NodeConfig",
    "NodeContext",
    "NodeExecutionResult",
    "NodeExplanation",
    "NodeNotReadyError",
    "NodeResult",
    "NodeRunNotFoundError",
    "NodeRunRead",
    "NodeState",
    "NodeStatus",
    "NotFoundError",
    "Page",
    "ParallelNodeConfig",
    "PermanentError",
    "Pipeline",
    "PipelineCreate",
    "PipelineDefinition",
    "PipelineEdge",
    "PipelineError",
    "PipelineEvent",
    "PipelineInUseError",
    "PipelineInactiveError",
    "PipelineNode",
    "PipelineNodeRun",
    "PipelineNotFoundError",
    "PipelineRead",
    "PipelineRepository",
    "PipelineRun",
    "PipelineStatus",
    "PipelineUpdate",
    "PipelineVersion",
    "PurgeResult",
    "ReadOnlySessionError",
    "Reason",
    "ReasonCode",
    "RunNotFoundError",
    "RunOverError",
    "RunRead",
    "RunReport",
    "RunRepository",
    "RunStatistics",
    "RunStatus",
    "RunSummary",
    "SchemaRevisionError",
    "StaleVersionError",
    "StartedNode",
    "StatementCancelledError",
    "Step",
    "SweepResult",
    "TransactionAbortedError",
    "TransactionConflictError",
    "TriggerNodeConfig",
    "WaitTimeoutError",
    "Worker",
    "find_issues",
    "get_execution_order",
    "is_transient",
    "metadata",
    "parse_pipeline_definition",
    "untaken_successors",
    "validate_pipeline_dag",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            metadata = import_module("importlib.metadata")
            try:
                return metadata.version("gathering-pipeline")
            except metadata.PackageNotFoundError as error:  # a copy of the sources
                raise AttributeError(f"module {__name__!r} has no attribute {name!r}: it is not installed") from error
        if name in __all__:
            for module in _MODULES:
                value = getattr(import_module(f".{module}", __name__), name, None)
                if value is not None:
                    globals()[name] = value
                    return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
