"""The order of a graph: as the database compiles it, and as Python computes it."""

import json
from typing import Any

import psycopg

from gathering_pipeline import PipelineDefinition, get_execution_order
from gathering_pipeline.arguments import branch_label


def compiled(raw: psycopg.Connection, nodes: list[Any], edges: list[Any]) -> list[tuple[Any, ...]]:
    """What a raw insert compiles."""
    statement = "INSERT INTO circle.pipelines (name, nodes, edges) VALUES ('p', %s, %s) RETURNING id"
    row = raw.execute(statement, [json.dumps(nodes), json.dumps(edges)]).fetchone()
    query = """SELECT position, node_id, node_type, predecessors, successors, branches FROM circle.pipeline_version_nodes
        WHERE pipeline_id = %s AND version = 1 ORDER BY position"""
    return raw.execute(query, row).fetchall()


def by_python(nodes: list[Any], edges: list[Any]) -> list[tuple[Any, ...]]:
    definition = PipelineDefinition.from_json(nodes, edges)
    order = get_execution_order(definition)
    place = {node: position for position, node in enumerate(order)}
    before: list[list[int]] = [[] for _ in order]
    after: list[list[int]] = [[] for _ in order]
    for source, target in sorted({(place[edge.from_node], place[edge.to_node]) for edge in definition.edges}):
        before[target].append(source)
        after[source].append(target)
    branches: list[dict[str, list[int]]] = [{} for _ in order]
    labelled = {
        (place[edge.from_node], place[edge.to_node], branch_label(edge.condition or "")) for edge in definition.edges
    }
    for source, target, label in sorted(labelled):
        if label:
            of_label = branches[source].setdefault(label, [])
            of_label += [] if (source, target, "") in labelled else [target]
    return [
        (at, node, definition.node_map[node].type, before[at], after[at], branches[at] or None)
        for at, node in enumerate(order)
    ]
