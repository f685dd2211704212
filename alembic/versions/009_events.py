"""Every change of a status is an event, written in the transaction that changes it.

The SQL is in ``sql/009_events/``.
"""

from gathering_pipeline.migrator import run_steps

revision = "009_events"
down_revision = "008_valid_rows"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    run_steps(revision, "upgrade")


def downgrade() -> None:
    """Revert this revision."""
    run_steps(revision, "downgrade")
