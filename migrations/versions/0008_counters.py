"""What Prometheus counts: steps, waiting and failures in the ledger; the memory of workers.

Revises: 0007_curves
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0008_counters"
down_revision: str | None = "0007_curves"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
INTEGER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    with op.batch_alter_table("usage") as usage:
        usage.add_column(sa.Column("steps", INTEGER, nullable=False, server_default="0"))
        usage.add_column(sa.Column("queued_s", sa.Float(), nullable=False, server_default="0"))
        usage.add_column(sa.Column("failure", sa.String(64), nullable=True))
    with op.batch_alter_table("workers") as workers:
        workers.add_column(sa.Column("memory", JSON, nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("workers") as workers:
        workers.drop_column("memory")
    with op.batch_alter_table("usage") as usage:
        for column in ("failure", "queued_s", "steps"):
            usage.drop_column(column)
