"""Pipelines and runs as GatheRing has them.

The SQL is in ``sql/006_pipelines/``.
"""

from gathering_pipeline.migrator import run_steps

revision = "006_pipelines"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    run_steps(revision, "upgrade")


def downgrade() -> None:
    """Revert this revision."""
    run_steps(revision, "downgrade")
