"""Fixtures for all tests: real SQLite, real PostgreSQL, real Redis.

RATCHET_TEST_POSTGRES_URL and RATCHET_TEST_REDIS_URL say where the servers are (defaults: localhost). A server that cannot be
reached skips the tests that need it, except where the environment variable CI is set: there they fail.
"""

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import redis
from pydantic import SecretStr
from sqlalchemy import URL, Engine, create_engine, make_url, text
from sqlalchemy.exc import OperationalError

from chaos.rig import Zygote
from chaos.servers import OwnRedis, own_redis_server
from service.doorbell import Doorbell
from service.settings import Settings
from service.store.session import Store, make_engine, open_store, upgrade
from service.store.tables import Base

# Their assertions, too, say what they compared.
pytest.register_assert_rewrite("library_losses", "loss_batches", "loss_orders", "losses_over_http", "webhook_receiver")

POSTGRES_URL = os.environ.get("RATCHET_TEST_POSTGRES_URL", "postgresql+psycopg://postgres@127.0.0.1:5432/test")
REDIS_URL = os.environ.get("RATCHET_TEST_REDIS_URL", "redis://127.0.0.1:6379/0")
REDIS_DATABASES = range(1, 16)
REDIS_CLAIM_S = 1800  # longer than any run of the suite; a run that was killed gives its number back after this


@pytest.fixture(scope="session", autouse=True)
def _no_settings_from_outside() -> Iterator[None]:
    """RATCHET_ variables of whoever runs the tests must not reach the code under test."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RATCHET_") and not name.startswith("RATCHET_TEST_")]:
            patch.delenv(name)
        patch.setenv("HF_HUB_OFFLINE", "1")  # nor may a test ask the hub
        patch.setenv("RATCHET_STRICT_METRICS", "true")  # of every worker, too: a metric that no table names fails its job
        yield


@pytest.fixture(autouse=True)
def _mkl_as_it_was() -> None:
    """A base with several threads sets this variable, and MKL reads it once a process: one that a later test starts would
    compute other bits than this one."""
    os.environ.pop("MKL_CBWR", None)


def _absent(what: str, error: Exception) -> None:
    message = f"{what} cannot be reached: {error}"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


# What is imported and collected is no garbage: to look for it there would take a tenth of the suite's time.


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


# ---------------------------------------------------------------- databases


@pytest.fixture(scope="session", autouse=True)
def _statements_are_compiled_once() -> Iterator[None]:
    """Engines of one kind share the dialect and its compiled statements: each test has an engine of its own, and would spend
    a third of its time on writing the same SQL anew."""
    known, compiled = dict[str, Engine](), dict[Any, Any]()

    def shared(url: URL, **options: Any) -> Engine:
        engine = create_engine(url, **options)
        first = known.setdefault(url.drivername, engine)
        if first.dialect.server_version_info is None:  # it never connected, and does not know its server
            known[url.drivername] = engine
        elif first is not engine:
            engine.dialect = first.dialect
        engine.update_execution_options(compiled_cache=compiled)  # by dialect and statement
        return engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.store.session.create_engine", shared)
        yield


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty SQLite file, copied for each test."""
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    upgrade(f"sqlite:///{path}")
    engine = make_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        connection.exec_driver_sql("COMMIT")
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.exec_driver_sql("BEGIN")
    engine.dispose()
    return path


@pytest.fixture(scope="session")
def new_postgres_database() -> Iterator[Callable[[], str]]:
    """Makes empty PostgreSQL databases, dropped at the end. Answers their URLs."""
    admin = create_engine(POSTGRES_URL, isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": 3})
    try:
        admin.connect().close()
    except OperationalError as error:
        _absent("PostgreSQL", error)
    made: list[str] = []

    def make() -> str:
        name = f"ratchet_test_{os.getpid()}_{uuid4().hex[:8]}"
        with admin.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name} TEMPLATE template0"))
            connection.execute(text(f"ALTER DATABASE {name} SET synchronous_commit = off"))
        made.append(name)
        return make_url(POSTGRES_URL).set(database=name).render_as_string(hide_password=False)

    yield make
    with admin.connect() as connection:
        for name in made:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


@pytest.fixture(scope="session")
def postgres_migrated(new_postgres_database: Callable[[], str]) -> str:
    """One migrated database for the session; each test that uses it empties it first."""
    url = new_postgres_database()
    upgrade(url)
    return url


@pytest.fixture(scope="session")
def postgres_emptied(postgres_migrated: str) -> Iterator[Callable[[], str]]:
    """Empties that database, and answers its URL."""
    engine = make_engine(postgres_migrated)
    deletions = "; ".join(f"DELETE FROM {table.name}" for table in reversed(Base.metadata.sorted_tables))

    def empty() -> str:
        with engine.begin() as connection:
            connection.exec_driver_sql(deletions)
        return postgres_migrated

    yield empty
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A migrated, empty database. Choose one backend by @pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)."""
    if request.param == "sqlite":
        path = tmp_path / "ratchet.db"
        shutil.copyfile(request.getfixturevalue("sqlite_template"), path)
        return f"sqlite:///{path}"
    return request.getfixturevalue("postgres_emptied")()


# ---------------------------------------------------------------- Redis


@pytest.fixture(scope="session")
def _redis_database() -> Iterator[str]:
    """A database number of the shared Redis that no other run uses at the same time."""
    client = redis.Redis.from_url(REDIS_URL, socket_connect_timeout=3, socket_timeout=3)
    try:
        free = (n for n in REDIS_DATABASES if client.set(f"ratchet-test:{n}", os.getpid(), nx=True, ex=REDIS_CLAIM_S))
        number = next(free, None)
    except (redis.RedisError, OSError) as error:
        _absent("Redis", error)
        raise
    if number is None:
        pytest.fail(f"all databases of {REDIS_URL} are in use by other test runs (keys ratchet-test:*)")
    yield f"{REDIS_URL.rsplit('/', 1)[0]}/{number}"
    client.delete(f"ratchet-test:{number}")
    client.close()


@pytest.fixture
def redis_url(_redis_database: str) -> Iterator[str]:
    """An empty database of the real Redis; signals (PUBLISH) are shared by all databases, but job ids are unique."""
    client = redis.Redis.from_url(_redis_database, socket_timeout=3)
    client.flushdb()
    yield _redis_database
    client.flushdb()
    client.close()


@pytest.fixture
def own_redis() -> Iterator[OwnRedis]:
    with own_redis_server() as server:
        yield server


@pytest.fixture(scope="session")
def new_redis() -> Callable[[], AbstractContextManager[OwnRedis]]:
    """For fixtures of a wider scope that want a server of their own."""
    return own_redis_server


# ---------------------------------------------------------------- processes


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Starts workers, and what else needs torch, without the seconds in which that is loaded."""
    zygote = Zygote(tmp_path_factory.mktemp("zygote"))
    yield zygote
    zygote.close()


# ---------------------------------------------------------------- ours, over them


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of a real S3 server of our own with an empty bucket `models`, and the variables by which others find it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    variables = {
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "hush-hush",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "GOOGLE_BASE_URL": f"http://127.0.0.1:{port}",  # of Google's XML interface the store needs what is as in S3
        "GOOGLE_BEARER_TOKEN": "hush-hush",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", region_name="us-east-1")
    for bucket in client.list_buckets()["Buckets"]:  # of another server in this process: moto keeps them together
        for each in client.list_objects_v2(Bucket=bucket["Name"]).get("Contents", ()):
            client.delete_object(Bucket=bucket["Name"], Key=each["Key"])
        client.delete_bucket(Bucket=bucket["Name"])
    client.create_bucket(Bucket="models")
    yield client
    server.stop()


@pytest.fixture
def settings(database_url: str, redis_url: str, tmp_path: Path) -> Settings:
    return Settings(
        environment="development",
        data_dir=tmp_path / "data",
        database_url=SecretStr(database_url),
        redis_url=SecretStr(redis_url),
    )


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    store = open_store(settings)
    yield store
    store.close()


@pytest.fixture
def doorbell(settings: Settings) -> Iterator[Doorbell]:
    doorbell = Doorbell(settings)
    yield doorbell
    doorbell.close()
