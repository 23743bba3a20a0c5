"""A database and a data directory of an older commit, a running and a queued job in it, are taken over as they lie there."""

import json
import tarfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import SecretStr
from rounding import rounding
from safetensors.torch import load_file
from sqlalchemy import update

from service.ids import utcnow
from service.settings import Settings
from service.states import Status
from service.store.session import upgrade
from service.store.tables import Job

ARCHIVES = sorted((Path(__file__).parent / "upgrade").glob("*.tar.xz"))  # by commit; made by make.py beside them
assert ARCHIVES, "without an archive nothing is tried here"
OTHER_BITS = {"a322816"}  # since 1956c0f an answer is drawn from its own seed, and sequences are packed


@pytest.mark.timeout(180)
@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name.split(".")[0])
def test_jobs_of_an_older_version_end_as_it_would_have_ended_them(
    archive: Path, tmp_path: Path, own_redis: Any, new_stack: Any, zygote: Any
) -> None:
    """Bit for bit where the machine rounds as the one did that made the archive and the code computes as it did then;
    elsewhere other answers are sampled, and only the job that samples nothing is compared, nearly."""
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    facts = json.loads((tmp_path / "facts.json").read_text())
    settings = Settings(environment="development", data_dir=tmp_path / "data", redis_url=SecretStr(own_redis.url))
    upgrade(settings.sql_url)
    stack = new_stack(settings, tmp_path, zygote)
    try:
        ids = {name: job["id"] for name, job in facts["jobs"].items()}
        before = {name: stack.job(job_id) for name, job_id in ids.items()}
        assert (before["running"].status, before["queued"].status) == (Status.RUNNING, Status.QUEUED)
        assert before["running"].step == facts["jobs"]["running"]["step"] > 0
        with stack.store.begin() as session:  # as if it had been left a minute ago, not when the archive was made
            left = utcnow() - timedelta(minutes=1)
            session.execute(update(Job).where(Job.id == ids["running"]).values(claimed_at=left, lease_until=left))
        stack.start_worker()
        same = facts["rounding"] == rounding() and archive.name.split(".")[0] not in OTHER_BITS
        for name, job_id in ids.items():
            ended = stack.succeeded(job_id)
            assert ended.step == facts["jobs"][name]["ends_at"]
            assert ended.attempt == before[name].attempt + 1
            weights, expected = stack.weights(ended), load_file(tmp_path / f"{name}.safetensors")
            assert weights.keys() == expected.keys()
            if same:
                assert [key for key in expected if not torch.equal(weights[key], expected[key])] == []
            elif name == "queued":
                for key, value in expected.items():
                    torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=1e-4)
    finally:
        stack.stop()
