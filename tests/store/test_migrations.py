from collections.abc import Callable
from pathlib import Path

import pytest
from alembic import command
from pydantic import SecretStr
from sqlalchemy import inspect, select

from chaos.rig import Zygote
from service.doorbell import Doorbell
from service.jobs.lifecycle import create_job
from service.sessions.sessions import resolve_session
from service.settings import Settings
from service.spec.session import SamplerSpec
from service.store import clock, operations
from service.store.operations import Asked
from service.store.session import alembic_config, downgrade, make_engine, open_store, upgrade
from service.store.tables import Base, Job, Operation

TABLES = {*Base.metadata.tables, "alembic_version"}


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'a folder' / '100%.db'}"
    new: Callable[[], str] = request.getfixturevalue("new_postgres_database")
    return new()


def tables(url: str) -> set[str]:
    engine = make_engine(url)
    try:
        return set(inspect(engine).get_table_names())
    finally:
        engine.dispose()


def test_up_down_and_up_again_ends_with_what_the_code_says(empty_url: str) -> None:
    upgrade(empty_url)
    assert tables(empty_url) == TABLES
    downgrade(empty_url, "base")
    assert tables(empty_url) == {"alembic_version"}
    upgrade(empty_url)
    assert tables(empty_url) == TABLES
    command.check(alembic_config(empty_url))  # raises when a table differs from service.store.tables


def test_check_notices_a_difference(empty_url: str) -> None:
    upgrade(empty_url)
    engine = make_engine(empty_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE jobs DROP COLUMN status_reason")
    engine.dispose()
    with pytest.raises(Exception, match="status_reason"):
        command.check(alembic_config(empty_url))


def test_samplers_that_came_to_be_twice_become_one(empty_url: str, tmp_path: Path) -> None:
    """The oldest goes on; what waited in the other has failed."""
    upgrade(empty_url)
    downgrade(empty_url, "0013_sampler_seeds")
    settings = Settings(environment="development", data_dir=tmp_path, database_url=SecretStr(empty_url))
    store, doorbell = open_store(settings), Doorbell(settings)
    spec = SamplerSpec.model_validate({"model": {"source": "tiny"}})
    made = list[str]()
    for project in ("one", "one", "two"):
        resolved = resolve_session(store, settings, project, spec)
        made.append(create_job(store, doorbell, project=project, sent={}, resolved=resolved).id)
        with store.begin() as session:
            operations.append(session, made[-1], Asked("sample", 1, b"x", lane="a"), clock.now(session))
    upgrade(empty_url)
    with store.begin(readonly=True) as session:
        states = {row.id: row.status for row in session.scalars(select(Job))}
        waits = {row.job_id: (row.status, (row.error or {}).get("code")) for row in session.scalars(select(Operation))}
    store.close()
    assert [states[job] for job in made] == ["queued", "cancelled", "queued"]
    assert [waits[job] for job in made] == [("waiting", None), ("failed", "session_over"), ("waiting", None)]


def test_copies_that_start_together_migrate_once(empty_url: str, zygote: Zygote, tmp_path: Path) -> None:
    script = "import sys; from service.store.session import upgrade; upgrade(sys.argv[1])"
    copies = [zygote.child(["-c", script, empty_url], {}, tmp_path / "log") for _ in range(3)]
    assert [copy.wait() for copy in copies] == [0, 0, 0], (tmp_path / "log").read_text()
    assert tables(empty_url) == TABLES


def test_the_command_line_uses_the_settings(tmp_path: Path, zygote: Zygote) -> None:
    url = f"sqlite:///{tmp_path / 'cli.db'}"
    for arguments in (["upgrade", "head"], ["check"]):
        zygote.run("alembic", *arguments, RATCHET_DATABASE_URL=url)
    assert tables(url) == TABLES
