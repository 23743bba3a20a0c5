"""The Tinker wire: its clients, their models and their samplers.

Revises: 0009_sessions
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0010_tinker"
down_revision: str | None = "0009_sessions"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
INTEGER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "tinker_sessions",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("display_name", sa.Text(), nullable=True),
        sa.Column("tags", JSON, nullable=False),
        sa.Column("metadata", JSON, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finish", JSON, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_tinker_sessions"),
    )
    op.create_index("ix_tinker_sessions_project_created", "tinker_sessions", ["project", "created_at"])
    op.create_table(
        "tinker_models",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("session_id", sa.String(64), nullable=False),
        sa.Column("job_id", sa.String(40), nullable=True),
        sa.Column("checkpoint_id", sa.String(40), nullable=True),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("metadata", JSON, nullable=False),
        sa.Column("published", JSON, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["session_id"], ["tinker_sessions.id"], name="fk_tinker_models_session_id", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_tinker_models_job_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_tinker_models"),
    )
    op.create_index("ix_tinker_models_project_created", "tinker_models", ["project", "created_at"])
    op.create_index("ix_tinker_models_session_id", "tinker_models", ["session_id"])
    op.create_index("ix_tinker_models_job_id", "tinker_models", ["job_id"])
    op.create_table(
        "tinker_samplers",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("session_id", sa.String(64), nullable=False),
        sa.Column("job_id", sa.String(40), nullable=True),
        sa.Column("model_id", sa.String(64), nullable=True),
        sa.Column("checkpoint_id", sa.String(40), nullable=True),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("context", INTEGER, nullable=True),
        sa.Column("model_path", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["session_id"], ["tinker_sessions.id"], name="fk_tinker_samplers_session_id", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_tinker_samplers_job_id", ondelete="SET NULL"),
        sa.PrimaryKeyConstraint("id", name="pk_tinker_samplers"),
    )
    op.create_index("ix_tinker_samplers_session_id", "tinker_samplers", ["session_id"])
    op.create_index("ix_tinker_samplers_job_id", "tinker_samplers", ["job_id"])


def downgrade() -> None:
    for table in ("tinker_samplers", "tinker_models", "tinker_sessions"):
        op.drop_table(table)
