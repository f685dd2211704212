"""The table of node types, and the shortcut by which most configurations are checked."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import pytest

from gathering_pipeline import models, node_types
from gathering_pipeline.errors import Issue, IssueCode
from gathering_pipeline.node_types import CONFIG_MODELS, NODE_TYPES, REQUIRED_KEYS, NodeType
from gathering_pipeline.validator import _check_config, _check_configs

VALUES: list[Any] = [None, "x", "", " ", 7, -1, 1.5, True, [], {}, "\u3000x"]


def test_each_type_has_a_model() -> None:
    assert get_args(NodeType) == NODE_TYPES == tuple(CONFIG_MODELS)
    assert set(NODE_TYPES) >= REQUIRED_KEYS.keys()


@pytest.mark.parametrize("kind", REQUIRED_KEYS)
def test_required_keys_are_fields_of_the_model(kind: str) -> None:
    assert CONFIG_MODELS[kind].model_fields.keys() >= {key.name for key in REQUIRED_KEYS[kind]}


@pytest.mark.parametrize("kind", ["trigger", "agent", "condition", "action", "parallel", "delay"])
def test_models_exports_the_configurations_of_the_first_types(kind: str) -> None:
    model = CONFIG_MODELS[kind]
    assert getattr(models, model.__name__) is model
    assert model.__name__ in models.__all__


def test_models_exports_the_types() -> None:
    assert models.NodeConfig is node_types.NodeConfig
    assert models.NodeType is node_types.NodeType


@pytest.mark.parametrize("kind", NODE_TYPES)
def test_the_shortcut_accepts_what_the_models_accept_and_nothing_else(kind: str) -> None:
    names = [name for name in CONFIG_MODELS[kind].model_fields if name != "type"]
    configs: list[dict[str, Any]] = [{}]
    configs += [
        dict(zip(names, values, strict=True)) | {"type": "delay", "seconds_": -1, "more": None}
        for values in itertools.product(VALUES, repeat=len(names))
    ]
    for config in configs:
        by_shortcut: list[Issue] = []
        by_model: list[Issue] = []
        _check_configs(["n"], [kind], [config], by_shortcut)
        _check_config(0, "n", kind, config, by_model)
        assert by_shortcut == by_model, config


@pytest.mark.parametrize(
    ("kind", "codes"),
    [
        ("trigger", []),
        ("agent", [IssueCode.MISSING_CONFIG, IssueCode.MISSING_CONFIG]),
        ("condition", [IssueCode.MISSING_CONFIG]),
        ("action", [IssueCode.MISSING_ACTION]),
        ("parallel", []),
        ("delay", []),
    ],
)
def test_a_missing_key_is_reported_under_the_code_of_its_row(kind: str, codes: list[IssueCode]) -> None:
    issues: list[Issue] = []
    _check_configs(["n"], [kind], [{}], issues)
    assert [issue.code for issue in issues] == codes
