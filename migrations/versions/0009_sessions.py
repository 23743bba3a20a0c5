"""Sessions: their operations, the base that they share, and names for their checkpoints.

Revises: 0008_counters
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0009_sessions"
down_revision: str | None = "0008_counters"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
INTEGER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("base_key", sa.String(64), nullable=True))
        jobs.create_index("ix_jobs_base_key", ["base_key"])
    with op.batch_alter_table("checkpoints") as checkpoints:
        checkpoints.add_column(sa.Column("name", sa.Text(), nullable=True))
        checkpoints.add_column(sa.Column("purpose", sa.String(8), nullable=False, server_default="training"))
        checkpoints.add_column(sa.Column("metadata", JSON, nullable=True))
        checkpoints.create_index("ix_checkpoints_job_name", ["job_id", "purpose", "name"])
    op.create_table(
        "operations",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("job_id", sa.String(40), nullable=False),
        sa.Column("lane", sa.String(128), nullable=False),
        sa.Column("seq", INTEGER, nullable=False),
        sa.Column("kind", sa.String(24), nullable=False),
        sa.Column("body_sha256", sa.String(64), nullable=False),
        sa.Column("request", sa.LargeBinary(), nullable=True),
        sa.Column("size_bytes", INTEGER, nullable=False),
        sa.Column("cost", INTEGER, nullable=False),
        sa.Column("status", sa.String(8), nullable=False),
        sa.Column("answer", sa.LargeBinary(), nullable=True),
        sa.Column("error", JSON, nullable=True),
        sa.Column("attempt", INTEGER, nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_operations_job_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_operations"),
        sa.UniqueConstraint("job_id", "lane", "seq", name="uq_operations_job_id_lane_seq"),
    )
    op.create_index("ix_operations_job_status", "operations", ["job_id", "status", "lane", "seq"])
    op.create_index("ix_operations_expires_at", "operations", ["expires_at"])


def downgrade() -> None:
    op.drop_table("operations")
    with op.batch_alter_table("checkpoints") as checkpoints:
        checkpoints.drop_index("ix_checkpoints_job_name")
        for column in ("metadata", "purpose", "name"):
            checkpoints.drop_column(column)
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_index("ix_jobs_base_key")
        jobs.drop_column("base_key")
