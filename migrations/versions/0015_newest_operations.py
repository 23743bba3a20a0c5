"""When an operation was begun; and an index for the newest operations of a job.

Revises: 0014_one_sampler
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0015_newest_operations"
down_revision: str | None = "0014_one_sampler"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("operations", sa.Column("started_at", sa.DateTime(timezone=True)))
    op.create_index("ix_operations_newest", "operations", ["job_id", "created_at", "seq"])


def downgrade() -> None:
    op.drop_index("ix_operations_newest", "operations")
    op.drop_column("operations", "started_at")
