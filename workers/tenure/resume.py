"""The checkpoints that an attempt may start from, each verified before it is used."""

import logging
from pathlib import Path

from service.errors import JobFailed, NotFound
from service.store import checkpoints
from service.store.session import Store
from service.store.tables import Checkpoint, Job
from workers.policy.checkpoint import CheckpointBroken, verify

log = logging.getLogger(__name__)


def newest_checkpoint(store: Store, job: Job) -> Path | None:
    """The newest complete checkpoint of this job. Torn or altered ones are skipped, and the log names them."""
    with store.begin(readonly=True) as session:
        rows = checkpoints.of_job(session, job.id)
    for row in rows:
        try:
            return verified(store, row)
        except CheckpointBroken as broken:
            log.error("job %s: checkpoint %s is broken (%s); trying the one before", job.id, row.id, broken)
    return None


def start_checkpoint(store: Store, job: Job, checkpoint_id: str) -> Path:
    """The checkpoint that the job's spec names. Raises JobFailed."""
    try:
        with store.begin(readonly=True) as session:
            row = checkpoints.get(session, job.project, checkpoint_id)
        return verified(store, row)
    except (NotFound, CheckpointBroken) as error:
        raise JobFailed(
            "checkpoint_broken" if isinstance(error, CheckpointBroken) else "checkpoint_not_found",
            f"the job starts from {checkpoint_id}, which cannot be loaded: {error}",
            hint="fork the job with another model.from_checkpoint",
            pointer="/model/from_checkpoint",
        ) from None


def verified(store: Store, row: Checkpoint) -> Path:
    """The checkpoint's folder. Raises CheckpointBroken."""
    folder = store.blobs.fetch(row.path)
    try:
        verify(folder, row.manifest_sha256)
    except CheckpointBroken:
        if store.blobs.bucket is None:
            raise
        folder = store.blobs.fetch(row.path, anew=True)  # this machine's copy was broken; the bucket's may be whole
        verify(folder, row.manifest_sha256)
    return folder
