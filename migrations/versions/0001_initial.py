"""The first tables: keys, jobs, events, metrics, rollouts, checkpoints, datasets, idempotency keys, workers.

Revises: nothing
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0001"
down_revision: str | None = None
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

INTEGER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
ID = sa.String(40)
TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", ID, nullable=False),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("ends_with", sa.String(4), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("last_used_at", TIME, nullable=True),
        sa.Column("revoked_at", TIME, nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("sha256", name=op.f("uq_api_keys_sha256")),
    )
    op.create_index(op.f("ix_api_keys_project"), "api_keys", ["project"])

    op.create_table(
        "datasets",
        sa.Column("id", ID, nullable=False),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("rows", INTEGER, nullable=False),
        sa.Column("columns", JSON, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("size_bytes", INTEGER, nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("deleted_at", TIME, nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_datasets")),
    )
    op.create_index("ix_datasets_project_created", "datasets", ["project", "created_at", "id"])

    op.create_table(
        "idempotency_keys",
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("route", sa.String(128), nullable=False),
        sa.Column("key", sa.String(255), nullable=False),
        sa.Column("body_sha256", sa.String(64), nullable=False),
        sa.Column("status", INTEGER, nullable=True),
        sa.Column("answer", JSON, nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("project", "route", "key", name=op.f("pk_idempotency_keys")),
    )
    op.create_table(
        "jobs",
        sa.Column("id", ID, nullable=False),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("tags", JSON, nullable=False),
        sa.Column("metadata", JSON, nullable=False),
        sa.Column("spec_sent", JSON, nullable=False),
        sa.Column("spec", JSON, nullable=False),
        sa.Column("spec_sha256", sa.String(64), nullable=False),
        sa.Column("data_sha256", sa.String(64), nullable=False),
        sa.Column("resolved", JSON, nullable=False),
        sa.Column("parent_id", ID, nullable=True),
        sa.Column("from_checkpoint_id", ID, nullable=True),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("status_reason", sa.Text(), nullable=True),
        sa.Column("phase", sa.String(16), nullable=True),
        sa.Column("wish", sa.String(16), nullable=True),
        sa.Column("step", INTEGER, nullable=False),
        sa.Column("max_steps", INTEGER, nullable=False),
        sa.Column("error", JSON, nullable=True),
        sa.Column("result", JSON, nullable=True),
        sa.Column("priority", INTEGER, nullable=False),
        sa.Column("resource_class", sa.String(8), nullable=False),
        sa.Column("attempt", INTEGER, nullable=False),
        sa.Column("lease_until", TIME, nullable=True),
        sa.Column("lease_owner", sa.Text(), nullable=True),
        sa.Column("crashes", INTEGER, nullable=False),
        sa.Column("retries", INTEGER, nullable=False),
        sa.Column("checkpoint_id", ID, nullable=True),
        sa.Column("run_s", sa.Float(), nullable=False),
        sa.Column("last_event", INTEGER, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.Column("queued_at", TIME, nullable=True),
        sa.Column("not_before", TIME, nullable=True),
        sa.Column("rung_at", TIME, nullable=True),
        sa.Column("started_at", TIME, nullable=True),
        sa.Column("claimed_at", TIME, nullable=True),
        sa.Column("finished_at", TIME, nullable=True),
        sa.ForeignKeyConstraint(["parent_id"], ["jobs.id"], name=op.f("fk_jobs_parent_id"), ondelete="SET NULL"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
    )
    op.create_index("ix_jobs_project_created", "jobs", ["project", "created_at", "id"])
    op.create_index("ix_jobs_status_queue", "jobs", ["status", "priority", "queued_at"])

    op.create_table(
        "workers",
        sa.Column("id", ID, nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", INTEGER, nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("resource_classes", JSON, nullable=False),
        sa.Column("draining", sa.Boolean(), nullable=False),
        sa.Column("started_at", TIME, nullable=False),
        sa.Column("last_seen_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workers")),
    )
    op.create_table(
        "checkpoints",
        sa.Column("id", ID, nullable=False),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("job_id", ID, nullable=True),
        sa.Column("step", INTEGER, nullable=False),
        sa.Column("attempt", INTEGER, nullable=False),
        sa.Column("adapter", sa.String(8), nullable=False),
        sa.Column("model", JSON, nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("size_bytes", INTEGER, nullable=False),
        sa.Column("manifest_sha256", sa.String(64), nullable=False),
        sa.Column("metrics", JSON, nullable=False),
        sa.Column("has_optimizer", sa.Boolean(), nullable=False),
        sa.Column("is_final", sa.Boolean(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("deleted_at", TIME, nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_checkpoints_job_id"), ondelete="SET NULL"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_checkpoints")),
    )
    op.create_index("ix_checkpoints_job_step", "checkpoints", ["job_id", "step"])
    op.create_index(op.f("ix_checkpoints_project"), "checkpoints", ["project"])

    op.create_table(
        "events",
        sa.Column("job_id", ID, nullable=False),
        sa.Column("seq", INTEGER, nullable=False),
        sa.Column("type", sa.String(32), nullable=False),
        sa.Column("data", JSON, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_events_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "seq", name=op.f("pk_events")),
    )
    op.create_table(
        "metrics",
        sa.Column("job_id", ID, nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("step", INTEGER, nullable=False),
        sa.Column("value", sa.Float(), nullable=True),
        sa.Column("attempt", INTEGER, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_metrics_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "name", "step", name=op.f("pk_metrics")),
    )
    op.create_table(
        "rollouts",
        sa.Column("job_id", ID, nullable=False),
        sa.Column("split", sa.String(16), nullable=False),
        sa.Column("step", INTEGER, nullable=False),
        sa.Column("group_index", INTEGER, nullable=False),
        sa.Column("prompt", sa.Text(), nullable=False),
        sa.Column("reference", sa.Text(), nullable=True),
        sa.Column("samples", JSON, nullable=False),
        sa.Column("attempt", INTEGER, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_rollouts_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "split", "step", "group_index", name=op.f("pk_rollouts")),
    )


def downgrade() -> None:
    # Whoever refers to a table goes before it.
    for table in (
        "rollouts",
        "metrics",
        "events",
        "checkpoints",
        "jobs",
        "workers",
        "idempotency_keys",
        "datasets",
        "api_keys",
    ):
        op.drop_table(table)
