"""Leases, counters, and the lifecycle as functions and guards.

The SQL is in ``sql/011_lifecycle/``.
"""

from gathering_pipeline.migrator import run_steps

revision = "011_lifecycle"
down_revision = "010_graph"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    run_steps(revision, "upgrade")


def downgrade() -> None:
    """Revert this revision."""
    run_steps(revision, "downgrade")
