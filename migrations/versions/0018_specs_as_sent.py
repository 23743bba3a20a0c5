"""Specs and metadata as they were sent: PostgreSQL's jsonb puts the keys of objects into another order, and chat templates
write tools in the order of their keys.

Revises: 0017_aliases
"""

from collections.abc import Sequence

from alembic import op

revision: str = "0018_specs_as_sent"
down_revision: str | None = "0017_aliases"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

COLUMNS = ("spec", "spec_sent", "metadata")


def upgrade() -> None:
    _become("json")


def downgrade() -> None:
    _become("jsonb")


def _become(kind: str) -> None:
    if op.get_bind().dialect.name == "postgresql":  # SQLite keeps JSON as it was written
        op.execute("ALTER TABLE jobs " + ", ".join(f"ALTER {name} TYPE {kind} USING {name}::{kind}" for name in COLUMNS))
