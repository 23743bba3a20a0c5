"""A project has one sampler of a base that has not ended.

Of those that came to be twice, the oldest stays; what waits in the others fails.

Revises: 0013_sampler_seeds
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0014_one_sampler"
down_revision: str | None = "0013_sampler_seeds"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
TIME = sa.DateTime(timezone=True)
IS_SAMPLER = "kind = 'sampler' AND status NOT IN ('succeeded', 'failed', 'cancelled')"
DOUBLES = f"""
    SELECT id FROM jobs WHERE {IS_SAMPLER} AND id > (
        SELECT min(other.id) FROM jobs AS other
        WHERE other.project = jobs.project AND other.base_key = jobs.base_key
        AND other.kind = 'sampler' AND other.status NOT IN ('succeeded', 'failed', 'cancelled')
    )"""
ERROR = {"code": "session_over", "detail": "its project has another sampler of this base", "category": "server"}


def upgrade() -> None:
    moments = (sa.column("finished_at", TIME), sa.column("expires_at", TIME))
    names = ("job_id", "status", "request")
    operations = sa.table("operations", *map(sa.column, names), sa.column("error", JSON), *moments)
    connection, now = op.get_bind(), datetime.now(UTC)
    failed = {"status": "failed", "error": ERROR, "request": None, "finished_at": now, "expires_at": now + timedelta(hours=1)}
    for (double,) in connection.exec_driver_sql(DOUBLES).all():
        waiting = (operations.c.job_id == double, operations.c.status == "waiting")
        connection.execute(operations.update().where(*waiting).values(failed))
        ended = "SET status = 'cancelled', status_reason = 'one_sampler', lease_owner = NULL, lease_until = NULL, phase = NULL"
        connection.execute(
            sa.text(f"UPDATE jobs {ended}, finished_at = CURRENT_TIMESTAMP WHERE id = :double"), {"double": double}
        )
    where = sa.text(IS_SAMPLER)
    op.create_index("uq_jobs_sampler", "jobs", ["project", "base_key"], unique=True, sqlite_where=where, postgresql_where=where)


def downgrade() -> None:
    op.drop_index("uq_jobs_sampler", "jobs")
