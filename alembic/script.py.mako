"""${message}

The SQL is in ``sql/${up_revision}/``; ``run_steps`` (env.py) runs its steps, each in a transaction of its own.
"""

from alembic import op

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    """Bring the schema to this revision."""
    op.run_steps(revision, "upgrade")


def downgrade() -> None:
    """Take this revision away again."""
    op.run_steps(revision, "downgrade")
