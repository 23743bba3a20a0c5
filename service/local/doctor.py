"""What is wrong with an installation, and how to mend it. Every check looks for itself, and leaves all as it was."""

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import httpx
import redis
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError

from service.devices import missing_gpu, shows_gpu
from service.doorbell import redis_py_url
from service.edge.startup import BadSettings, check_secrets
from service.errors import BucketRefused, BucketUnavailable
from service.ids import utcnow
from service.openai.models import model_folders
from service.settings import Settings
from service.store import clock, workers
from service.store.bucket import Bucket
from service.store.session import Store, alembic_config, open_store
from service.telemetry import unknown_variables

SCARCE_BYTES, TOO_FEW_BYTES = 10 * 2**30, 2**30  # free disk: a warning, an error
SLOW_S = 0.1  # an answer of the database or Redis that takes longer is told
SKEW_S = 5.0  # between this machine's clock and the database's
SERVING = ("fastapi", "uvicorn", "celery", "redis", "sqlalchemy", "alembic")
TRAINING = ("torch", "transformers", "peft", "safetensors")


@dataclass(frozen=True)
class Finding:
    """What one check found. `remedy` says what to do, unless all is well."""

    check: str
    status: Literal["ok", "warning", "error"]
    detail: str
    remedy: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(settings: Settings) -> list[Finding]:
    """All findings, in the order in which to mend things."""
    found: list[Finding] = []
    for check in CHECKS:
        try:
            found += check(settings)
        except Exception as error:  # a check that cannot look has found something, too
            name = check.__name__.removeprefix("_")
            found.append(Finding(name, "error", f"could not be checked: {type(error).__name__}: {error}", "see the message"))
    return found


def _versions(settings: Settings) -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    if not (3, 11) <= sys.version_info[:2] < (3, 14):
        yield Finding("versions", "error", f"Python {python}", "use Python 3.11, 3.12 or 3.13")
    there, absent = _installed((*SERVING, *TRAINING))
    if missing := [name for name in SERVING if name in absent]:
        yield Finding("versions", "error", f"not installed: {', '.join(missing)}", "pip install ratchet-rl")
    if missing := [name for name in TRAINING if name in absent]:
        remedy = "pip install 'ratchet-rl[worker]' on the machines that train; an API alone needs none of them"
        yield Finding("versions", "warning", f"not installed: {', '.join(missing)}", remedy)
    yield Finding("versions", "ok", f"Python {python}, {', '.join(there)}")


def _installed(names: tuple[str, ...]) -> tuple[list[str], list[str]]:
    there, absent = [], []
    for name in names:
        try:
            there.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            absent.append(name)
    return there, absent


def _settings(settings: Settings) -> Iterator[Finding]:
    try:
        check_secrets(settings)
    except BadSettings as error:
        yield Finding("settings", "error", str(error), "the API does not start like this; see README's table of settings")
    else:
        yield Finding("settings", "ok", f"environment {settings.environment}")
    for said in unknown_variables():
        yield Finding("settings", "warning", said, "correct its name, or take it away; see README's table of settings")


def _disk(settings: Settings) -> Iterator[Finding]:
    folder = settings.data_dir.absolute()
    if not folder.is_dir():
        yield Finding("disk", "error", f"{folder} is no folder", "ratchet up makes it; or set RATCHET_DATA_DIR")
        return
    probe = folder / ".doctor"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        yield Finding("disk", "error", f"{folder} cannot be written: {error.strerror}", "give its owner the service's user")
        return
    free = shutil.disk_usage(folder).free
    said = f"{free / 2**30:.1f} GiB free in {folder}"
    if free < SCARCE_BYTES:
        remedy = "delete checkpoints (ratchet checkpoints prune), or move RATCHET_DATA_DIR"
        yield Finding("disk", "error" if free < TOO_FEW_BYTES else "warning", said, remedy)
    else:
        yield Finding("disk", "ok", said)


def _bucket(settings: Settings) -> Iterator[Finding]:
    if settings.blob_url is None:
        return
    started = perf_counter()
    try:
        Bucket(settings.blob_url).probe()
    except (BucketUnavailable, BucketRefused) as error:
        remedy = error.hint or "see that it runs, and check RATCHET_BLOB_URL and its variables, such as AWS_ENDPOINT_URL"
        yield Finding("bucket", "error", error.detail, remedy)
    else:
        took_s = perf_counter() - started
        yield Finding("bucket", "ok", f"{settings.blob_url} was written, read and cleared in {took_s * 1000:.0f} ms")


def _database(settings: Settings) -> Iterator[Finding]:
    url = make_url(settings.sql_url)
    shown = url.render_as_string(hide_password=True)
    if url.get_backend_name() == "sqlite" and not Path(str(url.database)).is_file():
        yield Finding("database", "error", f"{shown} is not there", "python -m migrations upgrade head, or ratchet up")
        return
    store = open_store(settings)
    try:
        yield from _look_at(store, settings, shown)
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", error)).partition("\n")[0]
        remedy = "start it, and check RATCHET_DATABASE_URL"
        if "FATAL:" in reason:  # there is a server, which refuses
            remedy = "make that database and user, or correct RATCHET_DATABASE_URL"
        yield Finding("database", "error", f"{shown}: {reason}", remedy)
    finally:
        store.close()


def _look_at(store: Store, settings: Settings, shown: str) -> Iterator[Finding]:
    scripts = ScriptDirectory.from_config(alembic_config(settings.sql_url))
    with store.look() as connection:
        started = perf_counter()
        now = clock.now(connection)
        took_s, skew_s = perf_counter() - started, abs((utcnow() - now).total_seconds())
        there, newest = MigrationContext.configure(connection).get_current_revision(), scripts.get_current_head()
    slow = took_s > SLOW_S
    yield Finding(
        "database",
        "warning" if slow else "ok",
        f"{shown} answers in {took_s * 1000:.1f} ms",
        "bring it nearer to the service, or see what it is busy with" if slow else None,
    )
    known = {script.revision for script in scripts.walk_revisions()}
    if there == newest:
        yield Finding("migrations", "ok", f"at {there}")
    elif there is None or there in known:
        detail = f"at {there or 'nothing'}, this code needs {newest}"
        yield Finding("migrations", "error", detail, "python -m migrations upgrade head")
        return
    else:
        yield Finding("migrations", "error", f"at {there}, which this code does not know", "run the newer version of the code")
        return
    if skew_s > SKEW_S:
        remedy = "synchronise both clocks (NTP): leases go by the database's, webhooks are signed with this machine's"
        yield Finding("clock", "warning", f"{skew_s:.0f} s off the database's clock", remedy)
    else:
        yield Finding("clock", "ok", f"{skew_s:.1f} s off the database's clock")
    with store.begin(readonly=True) as session:
        alive = workers.alive(session, now)
    if alive:
        yield Finding("workers", "ok", f"{len(alive)} seen within a minute: {', '.join(sorted({one.device for one in alive}))}")
    else:
        yield Finding("workers", "warning", "none was seen within a minute", "start one: jobs wait in the queue until then")


def _redis(settings: Settings) -> Iterator[Finding]:
    url = settings.redis_url.get_secret_value()
    if (running := _running(settings)) is not None and "redis_url" not in settings.model_fields_set:
        answer = running["redis"]  # the one of `ratchet up` listens on a socket that only its own processes know
        detail = f"of the running stack: {answer['detail'] or 'answers'}"
        yield Finding("redis", "ok" if answer["ok"] else "error", detail, None if answer["ok"] else "restart `ratchet up`")
        return
    client = redis.Redis.from_url(redis_py_url(url), socket_connect_timeout=2, socket_timeout=2)
    try:
        started = perf_counter()
        client.ping()
        took_s = perf_counter() - started
        facts: Any = client.info()
    except (redis.AuthenticationError, redis.ResponseError) as error:  # there is a server, which refuses
        yield Finding("redis", "error", str(error), "correct user, password and number of the database in RATCHET_REDIS_URL")
        return
    except (redis.RedisError, OSError) as error:
        yield Finding("redis", "error", str(error), "start it, and check RATCHET_REDIS_URL")
        return
    finally:
        client.close()
    said = f"Redis {facts['redis_version']} answers in {took_s * 1000:.1f} ms"
    if (policy := facts.get("maxmemory_policy", "noeviction")) != "noeviction":
        remedy = "set maxmemory-policy noeviction: others drop messages when memory is short"
        yield Finding("redis", "warning", f"{said}; its policy is {policy}", remedy)
    elif took_s > SLOW_S:
        yield Finding("redis", "warning", said, "bring it nearer to the service")
    else:
        yield Finding("redis", "ok", said)


def _service(settings: Settings) -> Iterator[Finding]:
    running = _running(settings)
    if running is None:
        remedy = "ratchet up, or python -m service"
        yield Finding("service", "warning", f"none answers for {settings.data_dir.absolute()}", remedy)
    elif running["status"] == "ready":
        yield Finding("service", "ok", "ready")
    else:
        yield Finding("service", "error", "unavailable", "see what stands above, and its log")


def _running(settings: Settings) -> dict[str, Any] | None:
    """What /readyz says, of the stack in the data directory or of the host and port of the settings. None: no answer."""
    try:
        url = (settings.data_dir / "url").read_text().strip()
    except OSError:
        url = f"http://{settings.host}:{settings.port}"
    try:
        return httpx.get(f"{url}/readyz", timeout=5, trust_env=False).json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return None


def _gpu(settings: Settings) -> Iterator[Finding]:
    if (missing := missing_gpu(settings.device)) is not None:
        yield Finding("gpu", "error", missing, "set RATCHET_DEVICE to cpu or auto, or install the driver")
    elif not shows_gpu():
        yield Finding("gpu", "ok", "none: jobs train on the CPU")
    elif shutil.which("nvidia-smi") is None and Path("/dev/nvidiactl").exists():
        yield Finding("gpu", "warning", "a GPU without nvidia-smi", "install it: workers report the GPU's memory with it")
    else:
        yield Finding("gpu", "ok", "this machine shows one")


def _models(settings: Settings) -> Iterator[Finding]:
    folder = settings.local_models_dir
    if settings.models_dir is not None and not folder.is_dir():
        yield Finding("models", "error", f"{folder} is no folder", "make it, or correct RATCHET_MODELS_DIR")
        return
    models = model_folders(settings)
    for model in models:
        if not any(model.glob("*.safetensors")):
            remedy = "convert its weights to safetensors: pickles are not read"
            yield Finding("models", "warning", f"{model} has no *.safetensors", remedy)
    yield Finding(
        "models", "ok", f"{len(models)} in {folder}: {', '.join(path.name for path in models[:10]) or 'tiny is built in'}"
    )


Check = Callable[[Settings], Iterator[Finding]]
CHECKS: tuple[Check, ...] = (_versions, _settings, _disk, _bucket, _database, _redis, _service, _gpu, _models)
