"""No writer stores a graph that isn't one.

The SQL is in ``sql/010_graph/``.
"""

from gathering_pipeline.migrator import run_steps

revision = "010_graph"
down_revision = "009_events"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    run_steps(revision, "upgrade")


def downgrade() -> None:
    """Revert this revision."""
    run_steps(revision, "downgrade")
