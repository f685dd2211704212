"""A worker: it claims runs, lets handlers execute their nodes, and reports the results.

``python -m gathering_pipeline.worker MODULE:HANDLERS`` runs one. docs/worker.md describes handlers and workers.
"""

from gathering_pipeline.worker.handlers import NodeContext
from gathering_pipeline.worker.loop import Worker

__all__ = ["NodeContext", "Worker"]
