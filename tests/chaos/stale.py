"""Triggers in the database under test that write down each change made under an attempt that does not hold the job.

They know nothing of how the product guards itself: a row says which attempt wrote it, the job's row says which one holds.
"""

from sqlalchemy import create_engine, make_url, text

TABLE = "chaos_stale"
# Which change of a table is stale: rows that name their attempt, and a job that is worked on while nobody holds it.
OTHER_ATTEMPT = "NEW.attempt <> (SELECT attempt FROM jobs WHERE id = NEW.job_id)"
UNHELD = (
    "OLD.status NOT IN ('running', 'pausing', 'cancelling') AND NEW.status = OLD.status AND "
    "(NEW.step <> OLD.step OR NEW.phase IS NOT NULL OR NEW.lease_until IS NOT NULL "
    "OR coalesce(NEW.checkpoint_id, '') <> coalesce(OLD.checkpoint_id, ''))"
)
CHANGES = [
    ("metrics", "INSERT", OTHER_ATTEMPT, "NEW.job_id"),
    ("metrics", "UPDATE", OTHER_ATTEMPT, "NEW.job_id"),
    ("rollouts", "INSERT", OTHER_ATTEMPT, "NEW.job_id"),
    ("rollouts", "UPDATE", OTHER_ATTEMPT, "NEW.job_id"),
    ("checkpoints", "INSERT", OTHER_ATTEMPT, "NEW.job_id"),
    ("jobs", "UPDATE", UNHELD, "NEW.id"),
]


def watch(database_url: str) -> None:
    engine = create_engine(database_url)
    postgres = make_url(database_url).get_backend_name() == "postgresql"
    with engine.begin() as connection:
        connection.execute(text(f"CREATE TABLE {TABLE} (what TEXT, job_id TEXT)"))
        for table, change, stale, job_id in CHANGES:
            name = f"chaos_{table}_{change.lower()}"
            note = f"INSERT INTO {TABLE} VALUES ('{change} of {table}', {job_id});"
            if postgres:
                body = f"BEGIN IF {stale} THEN {note} END IF; RETURN NULL; END"
                connection.execute(text(f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $${body}$$"))
                connection.execute(
                    text(f"CREATE TRIGGER {name} AFTER {change} ON {table} FOR EACH ROW EXECUTE FUNCTION {name}()")
                )
            else:
                connection.execute(text(f"CREATE TRIGGER {name} AFTER {change} ON {table} WHEN {stale} BEGIN {note} END"))
    engine.dispose()
