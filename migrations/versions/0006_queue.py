"""The queue's index in the order in which jobs are taken, and those for lists by status and for old keys.

Revises: 0005_retention
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0006_queue"
down_revision: str | None = "0005_retention"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

QUEUE = ["status", sa.text("priority DESC"), "queued_at", "id", "resource_class", "not_before", "run_s"]


def upgrade() -> None:
    op.drop_index("ix_jobs_status_queue", "jobs")
    op.create_index("ix_jobs_status_queue", "jobs", QUEUE)
    op.create_index("ix_jobs_project_status_created", "jobs", ["project", "status", "created_at", "id"])
    op.create_index("ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"])


def downgrade() -> None:
    op.drop_index("ix_idempotency_keys_created_at", "idempotency_keys")
    op.drop_index("ix_jobs_project_status_created", "jobs")
    op.drop_index("ix_jobs_status_queue", "jobs")
    op.create_index("ix_jobs_status_queue", "jobs", ["status", "priority", "queued_at"])
