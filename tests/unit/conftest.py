"""What tests of the service's own logic stand on: an empty SQLite store, and nothing else that runs."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from service.settings import Settings
from service.store.session import Store, open_store


@pytest.fixture
def lite_settings(sqlite_template: Path, tmp_path: Path) -> Settings:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    shutil.copyfile(sqlite_template, data_dir / "ratchet.db")
    return Settings(environment="development", data_dir=data_dir, grader_secrets={"judge": SecretStr("s3cret")})


@pytest.fixture
def lite_store(lite_settings: Settings) -> Iterator[Store]:
    store = open_store(lite_settings)
    yield store
    store.close()
