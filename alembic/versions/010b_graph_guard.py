"""No writer stores a graph that isn't one.

The SQL is in ``sql/010b_graph_guard/``.
"""

from gathering_pipeline.migrator import run_steps

revision = "010b_graph_guard"
down_revision = "009b_lifecycle"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    run_steps(revision, "upgrade")


def downgrade() -> None:
    """Revert this revision."""
    run_steps(revision, "downgrade")
