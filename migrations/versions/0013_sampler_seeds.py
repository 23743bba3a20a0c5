"""The seed of the run that a sampling session of the Tinker wire samples.

Revises: 0012_audit
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0013_sampler_seeds"
down_revision: str | None = "0012_audit"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

INTEGER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    with op.batch_alter_table("tinker_samplers") as table:
        table.add_column(sa.Column("seed", INTEGER, nullable=False, server_default="0"))


def downgrade() -> None:
    with op.batch_alter_table("tinker_samplers") as table:
        table.drop_column("seed")
