"""Versions, leases, and the lifecycle as functions.

The SQL is in ``sql/009b_lifecycle/``; ``run_steps`` (env.py) runs its steps, each in a transaction of its own.
"""

from alembic import op

revision = "009b_lifecycle"
down_revision = "008_integrity"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bring the schema to this revision."""
    op.run_steps(revision, "upgrade")


def downgrade() -> None:
    """Take this revision away again."""
    op.run_steps(revision, "downgrade")
