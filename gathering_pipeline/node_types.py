"""Types of nodes: the configuration of each and the keys that it requires.

A new type needs three edits here: its name in ``NodeType``, its model in ``NodeConfig``, and its keys in
``REQUIRED_KEYS`` where it requires any. The database has the same rules, so it also needs a revision.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field

from .errors import IssueCode

NodeType = Literal["trigger", "agent", "condition", "action", "parallel", "delay"]
"""What a node can be."""

NODE_TYPES: tuple[NodeType, ...] = get_args(NodeType)


class _NodeConfig(BaseModel):
    # built on first use, see ``models``
    model_config = ConfigDict(extra="allow", defer_build=True)


class TriggerNodeConfig(_NodeConfig):
    """Configuration of a trigger; nothing is required."""

    type: Literal["trigger"] = Field("trigger", description="Type of the node.")


class AgentNodeConfig(_NodeConfig):
    """Configuration of an agent; existing rows also hold ``agent_id`` as a number."""

    type: Literal["agent"] = Field("agent", description="Type of the node.")
    agent_id: str = Field(coerce_numbers_to_str=True, description="The agent; existing rows also hold a number.")
    task: str = Field(description="What the agent is to do.")


class ConditionNodeConfig(_NodeConfig):
    """Configuration of a condition: an expression."""

    type: Literal["condition"] = Field("condition", description="Type of the node.")
    condition: str = Field("true", description="Expression that decides the branch.")


class ActionNodeConfig(_NodeConfig):
    """Configuration of an action: its name, and the parameters of the action as further keys."""

    type: Literal["action"] = Field("action", description="Type of the node.")
    action: str = Field(description="Name of the action; its parameters are further keys.")


class ParallelNodeConfig(_NodeConfig):
    """Configuration of a fork; nothing is required."""

    type: Literal["parallel"] = Field("parallel", description="Type of the node.")


class DelayNodeConfig(_NodeConfig):
    """Configuration of a delay, in seconds."""

    type: Literal["delay"] = Field("delay", description="Type of the node.")
    # strict: the stored JSON is never rewritten, so an executor would receive "5" or true unchanged
    seconds: float = Field(
        default=0, ge=0, allow_inf_nan=False, strict=True, description="How long it waits, in seconds."
    )


NodeConfig = Annotated[
    TriggerNodeConfig | AgentNodeConfig | ConditionNodeConfig | ActionNodeConfig | ParallelNodeConfig | DelayNodeConfig,
    Field(discriminator="type"),
]
"""The configuration of any node; ``type`` is the node's own type and selects the model."""

CONFIG_MODELS: Mapping[str, type[BaseModel]] = MappingProxyType(
    {model.model_fields["type"].default: model for model in get_args(get_args(NodeConfig)[0])}
)
"""The model of each type's configuration."""


class RequiredKey(NamedTuple):
    """A key that the configuration of a type must have, also where its model has a default.

    Attributes:
        name: The key.
        types: Types that the model accepts in addition to text.
        blank: Whether a blank string is a value.
        code: How the missing key is reported, which decides whether it is an error or a warning.
    """

    name: str
    types: frozenset[type[Any]] = frozenset()
    blank: bool = False
    code: IssueCode = IssueCode.MISSING_CONFIG


REQUIRED_KEYS: Mapping[str, tuple[RequiredKey, ...]] = MappingProxyType(
    {
        "agent": (RequiredKey("agent_id", types=frozenset({int})), RequiredKey("task")),
        "condition": (RequiredKey("condition", blank=True),),
        # a warning: existing editors store action nodes without it, and GatheRing's executor runs them
        "action": (RequiredKey("action", code=IssueCode.MISSING_ACTION),),
    }
)
"""The required keys of each type; a type that is absent requires none."""
