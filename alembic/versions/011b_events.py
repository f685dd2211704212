"""Every change of a status is an event, written in the transaction that changes it.

The SQL is in ``sql/011b_events/``.
"""

from gathering_pipeline.migrator import run_steps

revision = "011b_events"
down_revision = "010b_graph_guard"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    run_steps(revision, "upgrade")


def downgrade() -> None:
    """Revert this revision."""
    run_steps(revision, "downgrade")
