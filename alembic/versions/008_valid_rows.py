"""Nothing half-filled can be stored.

The SQL is in ``sql/008_valid_rows/``.
"""

from gathering_pipeline.migrator import run_steps

revision = "008_valid_rows"
down_revision = "007_pipeline_execution"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    run_steps(revision, "upgrade")


def downgrade() -> None:
    """Revert this revision."""
    run_steps(revision, "downgrade")
