"""Execution settings, timeout, node runs.

The SQL is in ``sql/007_pipeline_execution/``.
"""

from gathering_pipeline.migrator import run_steps

revision = "007_pipeline_execution"
down_revision = "006_pipelines"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    run_steps(revision, "upgrade")


def downgrade() -> None:
    """Revert this revision."""
    run_steps(revision, "downgrade")
