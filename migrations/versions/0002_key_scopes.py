"""API keys with scopes, an end, and a rate of their own. Keys that exist may go on doing everything.

Revises: 0001
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0002_key_scopes"
down_revision: str | None = "0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
INTEGER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    with op.batch_alter_table("api_keys") as table:
        table.add_column(sa.Column("scopes", JSON, nullable=False, server_default='["read", "write", "admin"]'))
        table.add_column(sa.Column("requests_per_s", sa.Float(), nullable=True))
        table.add_column(sa.Column("burst", INTEGER, nullable=True))
        table.add_column(sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("api_keys") as table:
        for column in ("scopes", "requests_per_s", "burst", "expires_at"):
            table.drop_column(column)
