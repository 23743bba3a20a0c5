"""The ledger of what was spent, and budgets.

Revises: 0003_control
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0004_usage"
down_revision: str | None = "0003_control"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

INTEGER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TOKENS = ("sampled_tokens", "trained_tokens")
SECONDS = ("loading_s", "sampling_s", "grading_s", "updating_s", "evaluating_s", "saving_s")


def upgrade() -> None:
    op.create_table(
        "usage",
        sa.Column("job_id", sa.String(40), nullable=False),
        sa.Column("attempt", INTEGER, nullable=False),
        sa.Column("day", sa.String(10), nullable=False),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("key_id", sa.String(40), nullable=True),
        *(sa.Column(name, INTEGER, nullable=False) for name in TOKENS),
        *(sa.Column(name, sa.Float(), nullable=False) for name in SECONDS),
        *(sa.Column(f"unsaved_{name}", INTEGER, nullable=False) for name in TOKENS),
        sa.Column("unsaved_s", sa.Float(), nullable=False),
        *(sa.Column(f"wasted_{name}", INTEGER, nullable=False) for name in TOKENS),
        sa.Column("wasted_s", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "attempt", "day", name=op.f("pk_usage")),
    )
    op.create_index("ix_usage_project_day", "usage", ["project", "day"])
    op.create_table(
        "budgets",
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("tokens", INTEGER, nullable=True),
        sa.Column("worker_s", sa.Float(), nullable=True),
        sa.Column("since", sa.String(10), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("project", name=op.f("pk_budgets")),
    )
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("key_id", sa.String(40), nullable=True))
        jobs.add_column(sa.Column("budget_tokens", INTEGER, nullable=True))
        jobs.add_column(sa.Column("budget_worker_s", sa.Float(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        for name in ("budget_worker_s", "budget_tokens", "key_id"):
            jobs.drop_column(name)
    op.drop_table("budgets")
    op.drop_table("usage")
