"""Pipelines and runs as GatheRing has them.

The SQL is in ``sql/006_pipelines/``; ``run_steps`` (env.py) runs its steps, each in a transaction of its own.
"""

from alembic import op

revision = "006_pipelines"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bring the schema to this revision."""
    op.run_steps(revision, "upgrade")


def downgrade() -> None:
    """Take this revision away again."""
    op.run_steps(revision, "downgrade")
