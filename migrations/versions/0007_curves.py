"""The points of a curve stand together: in SQLite the rows, in PostgreSQL the values in the key's index.

Revises: 0006_queue
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0007_curves"
down_revision: str | None = "0006_queue"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    _arrange(together=True)


def downgrade() -> None:
    _arrange(together=False)


def _arrange(*, together: bool) -> None:
    if op.get_bind().dialect.name == "sqlite":
        options = {"sqlite_with_rowid": not together}
        with op.batch_alter_table("metrics", recreate="always", table_kwargs=options):
            return
    op.drop_constraint("pk_metrics", "metrics")
    include = "INCLUDE (value)" if together else ""
    op.execute(sa.text(f"ALTER TABLE metrics ADD CONSTRAINT pk_metrics PRIMARY KEY (job_id, name, step) {include}"))
