"""The order of a graph: as the database compiles it, and as Python computes it."""

import json
from typing import Any

import psycopg

from gathering_pipeline import PipelineDefinition, get_execution_order


def compiled(raw: psycopg.Connection, nodes: list[Any], edges: list[Any]) -> list[tuple[Any, ...]]:
    """What a raw insert compiles."""
    statement = "INSERT INTO circle.pipelines (name, nodes, edges) VALUES ('p', %s, %s) RETURNING id"
    row = raw.execute(statement, [json.dumps(nodes), json.dumps(edges)]).fetchone()
    query = """SELECT position, node_id, node_type, predecessors, successors FROM circle.pipeline_version_nodes
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
    return [(at, node, definition.node_map[node].type, before[at], after[at]) for at, node in enumerate(order)]
