"""How long a worker may take to obey, and when a job must be done.

Revises: 0002_key_scopes
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0003_control"
down_revision: str | None = "0002_key_scopes"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("wish_until", sa.DateTime(timezone=True), nullable=True))
        jobs.add_column(sa.Column("deadline_at", sa.DateTime(timezone=True), nullable=True))
        jobs.create_index("ix_jobs_deadline_at", ["deadline_at"])


def downgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_index("ix_jobs_deadline_at")
        jobs.drop_column("deadline_at")
        jobs.drop_column("wish_until")
