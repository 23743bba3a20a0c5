"""Aliases of checkpoints, and the history of what they pointed at.

Revises: 0016_traced_operations
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0017_aliases"
down_revision: str | None = "0016_traced_operations"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

INTEGER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "aliases",
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("name", sa.String(101), nullable=False),
        sa.Column("checkpoint_id", sa.String(40), nullable=True),
        sa.Column("previous_id", sa.String(40), nullable=True),
        sa.Column("version", INTEGER, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("project", "name", name="pk_aliases"),
    )
    op.create_index("ix_aliases_checkpoint_id", "aliases", ["checkpoint_id"])
    op.create_index("ix_aliases_previous_id", "aliases", ["previous_id"])
    op.create_table(
        "alias_changes",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("alias", sa.String(101), nullable=False),
        sa.Column("seq", INTEGER, nullable=False),
        sa.Column("action", sa.String(16), nullable=False),
        sa.Column("from_checkpoint_id", sa.String(40), nullable=True),
        sa.Column("checkpoint_id", sa.String(40), nullable=True),
        sa.Column("back_to", INTEGER, nullable=True),
        sa.Column("note", sa.Text(), nullable=True),
        sa.Column("key_id", sa.String(40), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_alias_changes"),
        sa.UniqueConstraint("project", "alias", "seq", name="uq_alias_changes_project_alias_seq"),
    )


def downgrade() -> None:
    for table in ("alias_changes", "aliases"):
        op.drop_table(table)
