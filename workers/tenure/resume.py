"""The checkpoints that an attempt may start from, each verified before it is used."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from service.errors import JobFailed, NotFound
from service.store import checkpoints
from service.store.session import Store
from service.store.tables import Checkpoint, Job
from workers.policy.checkpoint import CheckpointBroken, verify
from workers.tenure.tenure import Tenure

log = logging.getLogger(__name__)


def newest_checkpoint(tenure: Tenure) -> Path | None:
    """The newest complete checkpoint of this job, see `sound`."""
    with tenure.store.begin(readonly=True) as session:
        rows = checkpoints.of_job(session, tenure.job.id)
    row = sound(tenure, rows)
    return None if row is None else tenure.store.blobs.path(row.path)


def sound(tenure: Tenure, rows: Sequence[Checkpoint]) -> Checkpoint | None:
    """The first of these that is complete. Torn or altered ones are skipped: the log names them, and the tenure keeps none of
    them in place of a sound one."""
    for row in rows:
        try:
            verified(tenure.store, row)
            return row
        except CheckpointBroken as broken:
            log.error("job %s: checkpoint %s is broken (%s); trying the one before", tenure.job.id, row.id, broken)
            tenure.broken.add(row.id)
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


@contextmanager
def there(store: Store, project: str, checkpoint_id: str) -> Iterator[None]:
    """Inside, a checkpoint is read that may be deleted meanwhile. What fails then raises NotFound."""
    try:
        yield
    except Exception:
        with store.begin(readonly=True) as session:
            checkpoints.get(session, project, checkpoint_id)
        raise


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
