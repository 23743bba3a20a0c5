"""Pins and expiry of checkpoints.

Revises: 0004_usage
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0005_retention"
down_revision: str | None = "0004_usage"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    with op.batch_alter_table("checkpoints") as checkpoints:
        checkpoints.add_column(sa.Column("pinned_at", sa.DateTime(timezone=True), nullable=True))
        checkpoints.add_column(sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True))
        checkpoints.create_index("ix_checkpoints_expires_at", ["expires_at"])


def downgrade() -> None:
    with op.batch_alter_table("checkpoints") as checkpoints:
        checkpoints.drop_index("ix_checkpoints_expires_at")
        checkpoints.drop_column("expires_at")
        checkpoints.drop_column("pinned_at")
