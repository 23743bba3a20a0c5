"""The trace that an operation of a session belongs to.

Revises: 0015_newest_operations
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0016_traced_operations"
down_revision: str | None = "0015_newest_operations"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("operations", sa.Column("traceparent", sa.String(64)))


def downgrade() -> None:
    op.drop_column("operations", "traceparent")
