"""Every change of a status is an event, written in the transaction that changes it.

The SQL is in ``sql/011b_events/``; ``run_steps`` (env.py) runs its steps, each in a transaction of its own.
"""

from alembic import op

revision = "011b_events"
down_revision = "010b_graph_guard"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bring the schema to this revision."""
    op.run_steps(revision, "upgrade")


def downgrade() -> None:
    """Take this revision away again."""
    op.run_steps(revision, "downgrade")
