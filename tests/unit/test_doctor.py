"""`ratchet doctor` finds what was broken on purpose, and says how to mend it."""

import os
from collections import namedtuple
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import make_url

from service.local import doctor
from service.settings import Settings
from service.store import clock
from service.store.session import downgrade, make_engine
from service.store.tables import Worker

Usage = namedtuple("Usage", "total used free")


def found(settings: Settings, check: str) -> list[tuple[str, str, str | None]]:
    return [(one.status, one.detail, one.remedy) for one in doctor.examine(settings) if one.check == check]


def only(settings: Settings, check: str) -> tuple[str, str, str]:
    ((status, detail, remedy),) = found(settings, check)
    return status, detail, remedy or ""


@pytest.fixture
def settings(lite_settings: Settings, redis_url: str) -> Settings:
    return lite_settings.model_copy(update={"redis_url": SecretStr(redis_url), "port": 1})


def test_a_sound_installation_has_no_error(settings: Settings, lite_store: Any) -> None:
    with lite_store.begin() as session:
        now = clock.now(session)
        session.add(
            Worker(id="wrk_1", host="h", pid=1, device="cpu", resource_classes=["cpu"], started_at=now, last_seen_at=now)
        )
    told = doctor.examine(settings)
    assert [one for one in told if one.status == "error"] == []
    ok = {one.check for one in told if one.status == "ok"}
    assert {"versions", "settings", "database", "migrations", "clock", "redis", "workers", "gpu", "models"} <= ok
    assert all((one.remedy is None) == (one.status == "ok") for one in told)


def test_a_database_that_is_behind_ahead_or_absent(settings: Settings, tmp_path: Path) -> None:
    downgrade(settings.sql_url, "0010_tinker")
    assert only(settings, "migrations")[::2] == ("error", "python -m migrations upgrade head")
    engine = make_engine(settings.sql_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999_later'")
    engine.dispose()
    assert "which this code does not know" in only(settings, "migrations")[1]
    absent = settings.model_copy(update={"data_dir": tmp_path / "absent"})
    assert only(absent, "database")[0] == only(absent, "disk")[0] == "error"


def test_a_database_server_that_is_away_and_no_password_is_told(settings: Settings) -> None:
    away = SecretStr("postgresql+psycopg://me:of-nobody-else@127.0.0.1:1/x")
    status, detail, remedy = only(settings.model_copy(update={"database_url": away}), "database")
    assert status == "error" and "RATCHET_DATABASE_URL" in remedy and "of-nobody-else" not in detail


def test_a_server_that_answers_and_refuses_is_not_to_be_started(
    settings: Settings, own_redis: Any, new_postgres_database: Callable[[], str]
) -> None:
    absent = make_url(new_postgres_database()).set(database="of_nobody").render_as_string(hide_password=False)
    status, detail, remedy = only(settings.model_copy(update={"database_url": SecretStr(absent)}), "database")
    assert status == "error" and "does not exist" in detail and "start" not in remedy
    own_redis.client().config_set("requirepass", "of-nobody-else")
    status, _, remedy = only(settings.model_copy(update={"redis_url": SecretStr(own_redis.url)}), "redis")
    assert status == "error" and "password" in remedy and "start" not in remedy


def test_a_variable_that_sets_nothing_is_told(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATCHET_MODEL_DIR", "/models")
    told = found(settings, "settings")
    assert ("warning", "RATCHET_MODEL_DIR sets nothing; did you mean RATCHET_MODELS_DIR?") in [one[:2] for one in told]


def test_a_redis_that_is_away_or_drops_messages(settings: Settings, own_redis: Any) -> None:
    mine = settings.model_copy(update={"redis_url": SecretStr(own_redis.url)})
    own_redis.client().config_set("maxmemory-policy", "allkeys-lru")
    status, detail, remedy = only(mine, "redis")
    assert status == "warning" and "allkeys-lru" in detail and "noeviction" in remedy
    own_redis.kill()
    assert only(mine, "redis")[0] == "error"


def test_a_disk_that_is_full_or_cannot_be_written(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, status in ((2**40, "ok"), (5 * 2**30, "warning"), (2**20, "error")):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path, free=free: Usage(2**41, 0, free))
        assert only(settings, "disk")[0] == status
    settings.data_dir.chmod(0o500)
    try:
        if not os.access(settings.data_dir, os.W_OK):  # root may write all the same
            assert "cannot be written" in only(settings, "disk")[1]
    finally:
        settings.data_dir.chmod(0o700)


def test_a_clock_that_is_off(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    now = doctor.utcnow
    monkeypatch.setattr(doctor, "utcnow", lambda: now() + timedelta(seconds=90))
    status, detail, remedy = only(settings, "clock")
    assert status == "warning" and detail.startswith("90 s") and "NTP" in remedy


def test_a_gpu_secrets_and_models_that_are_not_what_the_settings_say(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.devices.GPU_NODES", ("/dev/absent",))
    assert only(settings.model_copy(update={"device": "cuda"}), "gpu")[0] == "error"
    weak = {"environment": "production", "bootstrap_key": SecretStr("tml-x")}
    assert "RATCHET_BOOTSTRAP_KEY" in only(settings.model_copy(update=weak), "settings")[1]
    absent = settings.model_copy(update={"models_dir": settings.data_dir / "absent"})
    assert only(absent, "models")[0] == "error"
    folder = settings.local_models_dir / "pickled"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert [status for status, *_ in found(settings, "models")] == ["warning", "ok"]


def test_a_check_that_breaks_is_a_finding(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(settings: Settings) -> Any:
        raise RuntimeError("odd")

    monkeypatch.setattr(doctor, "CHECKS", (broken,))
    (finding,) = doctor.examine(settings)
    assert (finding.check, finding.status) == ("broken", "error") and "odd" in finding.detail
