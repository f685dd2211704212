"""Nothing half-filled can be stored.

The SQL is in ``sql/008_integrity/``; ``run_steps`` (env.py) runs its steps, each in a transaction of its own.
"""

from alembic import op

revision = "008_integrity"
down_revision = "007_pipeline_execution"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bring the schema to this revision."""
    op.run_steps(revision, "upgrade")


def downgrade() -> None:
    """Take this revision away again."""
    op.run_steps(revision, "downgrade")
