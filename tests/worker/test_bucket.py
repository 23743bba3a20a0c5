"""Workers that share a bucket and no disk."""

from pathlib import Path
from typing import Any

import pytest

from service.jobs import lifecycle
from service.settings import Settings


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_job_that_paused_on_one_machine_goes_on_on_another_bit_for_bit(
    s3: Any, settings: Settings, own_redis: Any, zygote: Any, new_stack: Any, specs: Any, tmp_path: Path
) -> None:
    url = "s3://models/all"
    mine = settings.model_copy(update={"blob_url": url, "redis_url": type(settings.redis_url)(own_redis.url)})
    stack = new_stack(mine, tmp_path, zygote)
    try:
        first = stack.start_worker(RATCHET_DATA_DIR=str(tmp_path / "first"), RATCHET_BLOB_URL=url)
        spec = specs.rl(limits={"max_steps": 24}, checkpoints={"every_steps": 100})
        undisturbed = stack.succeeded(stack.submit(spec).id)
        job_id = stack.submit(spec).id
        stack.until(job_id, lambda job: job.step >= 2)
        lifecycle.pause(stack.store, stack.doorbell, "default", job_id)
        paused = stack.until(job_id, lambda job: job.status == "paused")
        assert 2 <= paused.step < 24
        first.send_signal(15)
        assert first.wait(timeout=30) == 0
        stack.start_worker(RATCHET_DATA_DIR=str(tmp_path / "second"), RATCHET_BLOB_URL=url)
        lifecycle.resume(stack.store, stack.doorbell, "default", job_id)
        ours, theirs = stack.weights(stack.succeeded(job_id)), stack.weights(undisturbed)
        assert ours.keys() == theirs.keys() and len(ours) > 0
        assert [name for name in ours if not ours[name].equal(theirs[name])] == []
        assert (tmp_path / "second" / "blobs" / "checkpoints" / job_id).is_dir()
        assert not (tmp_path / "second" / "blobs" / "checkpoints" / undisturbed.id).exists()
    finally:
        stack.stop()
