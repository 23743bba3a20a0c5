"""Checkpoints go when their time comes, and never while somebody needs them, whoever is quicker."""

from collections.abc import Callable
from datetime import timedelta
from threading import Event, Thread

import pytest

from service.doorbell import Doorbell
from service.errors import Conflict, InvalidRequest, NotFound
from service.ids import new_id, utcnow
from service.jobs import lease as leases
from service.jobs import lifecycle
from service.jobs.discard import discard
from service.jobs.lease import CheckpointRow, Lease
from service.jobs.reconciler import expire
from service.openai.models import target
from service.sessions.sessions import sampler_of
from service.settings import Settings
from service.spec.job import CheckpointsSpec
from service.store import aliases, checkpoints
from service.store.session import Store
from service.store.tables import Checkpoint, Job

NewJob = Callable[..., Job]


def take(store: Store, settings: Settings) -> Lease:
    claimed = leases.claim(store, settings, "w", {"any"})
    assert claimed is not None
    return claimed[0]


def save(store: Store, lease: Lease, step: int) -> str:
    id_ = new_id("ckpt")
    path = f"checkpoints/{lease.job_id}/{id_}"
    folder = store.blobs.temporary_dir()
    (folder / "manifest.json").write_text("{}")
    store.blobs.commit_dir(folder, path)
    row = CheckpointRow(id_, step, "full", {"source": "tiny"}, path, 2, "0" * 64, {}, True, False)
    leases.commit_checkpoint(store, lease, row)
    return id_


def pin(store: Store, id_: str, *, off: bool = False) -> None:
    with store.begin() as session:
        checkpoints.pin(session, "default", id_, None if off else utcnow())


def there(store: Store, ids: list[str]) -> list[bool]:
    """Whether they are, which must be said alike by the rows and by the folders."""
    with store.begin(readonly=True) as session:
        rows = [session.get(Checkpoint, id_) for id_ in ids]
    found = [row is not None and row.deleted_at is None for row in rows]
    assert found == [row is not None and store.blobs.path(row.path).is_dir() for row in rows]
    return found


def test_an_expired_checkpoint_goes_unless_it_is_pinned_or_needed(
    store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob
) -> None:
    new_job(checkpoints={"ttl_s": 60.0, "keep_last": 9})
    held = take(store, settings)
    free, pinned, forked, newest = ids = [save(store, held, step) for step in range(4)]
    pin(store, pinned)
    child = new_job(from_checkpoint_id=forked)
    assert expire(store, doorbell, utcnow()) == []
    assert there(store, ids) == [True] * 4
    later = utcnow() + timedelta(seconds=61)
    assert expire(store, doorbell, later) == [free]
    assert there(store, ids) == [False, True, True, True]
    lifecycle.cancel(store, doorbell, "default", child.id)
    assert expire(store, doorbell, later) == [forked]
    leases.succeed(store, held, {}, "max_steps")
    assert expire(store, doorbell, later) == [newest]
    pin(store, pinned, off=True)
    assert expire(store, doorbell, later) == [pinned]
    assert there(store, ids) == [False] * 4


def of_all_weights(store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob) -> tuple[str, str]:
    """A checkpoint of a job that has ended, and the sampler that samples it."""
    new_job()
    held = take(store, settings)
    id_ = save(store, held, 1)
    leases.succeed(store, held, {}, "max_steps")
    model = {"from_checkpoint": {"id": id_}}
    return id_, sampler_of(store, doorbell, settings, "default", model).id


def job_of(store: Store, id_: str) -> Job:
    with store.begin(readonly=True) as session:
        return session.get_one(Job, id_)


def test_a_sampler_keeps_no_checkpoint_that_its_owner_deletes(
    store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob
) -> None:
    id_, sampler = of_all_weights(store, settings, doorbell, new_job)
    pin(store, id_)
    assert expire(store, doorbell, utcnow() + timedelta(days=1)) == []
    assert discard(store, doorbell, [id_], utcnow()) == ([], {id_: "pinned"})
    pin(store, id_, off=True)
    with store.begin() as session:
        wish = aliases.Wish("key_1", utcnow())
        aliases.promote(session, "default", "digits@best", id_, wish)
        checkpoints.unname(session.get_one(Checkpoint, id_), utcnow())  # saved over
    assert expire(store, doorbell, utcnow() + timedelta(days=1)) == []
    assert discard(store, doorbell, [id_], utcnow(), by_hand=True) == ([], {id_: "aliased"})
    assert job_of(store, sampler).status == "queued"
    assert target(store, settings, "default", id_).id == id_, "it goes on being sampled"
    with store.begin() as session:
        aliases.delete(session, "default", "digits@best", wish)
    removed, kept = discard(store, doorbell, [id_], utcnow())
    assert ([row.id for row in removed], kept, job_of(store, sampler).status) == ([id_], {}, "cancelled")
    assert there(store, [id_]) == [False]


def test_a_sampler_at_work_ends_before_its_expired_checkpoint_goes(
    store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob
) -> None:
    id_, sampler = of_all_weights(store, settings, doorbell, new_job)
    lease = take(store, settings)
    with store.begin() as session:
        session.get_one(Checkpoint, id_).expires_at = utcnow()
    later = utcnow() + timedelta(seconds=1)
    with pytest.raises(NotFound, match="its time"):
        target(store, settings, "default", id_)  # or a sampler that is asked again would load it again and again
    for _ in range(2):
        assert expire(store, doorbell, later) == []
        assert (job_of(store, sampler).status, there(store, [id_])) == ("cancelling", [True])
    leases.cancelled(store, lease)
    assert expire(store, doorbell, later) == [id_]
    assert there(store, [id_]) == [False]
    assert expire(store, doorbell, later) == []


def test_without_a_ttl_nothing_expires(store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob) -> None:
    new_job()
    held = take(store, settings)
    save(store, held, 1)
    leases.succeed(store, held, {}, "max_steps")
    assert expire(store, doorbell, utcnow() + timedelta(days=3650)) == []


def test_a_job_s_own_retention_spares_what_is_pinned(store: Store, settings: Settings, new_job: NewJob) -> None:
    new_job()
    held = take(store, settings)
    ids = [save(store, held, step) for step in range(3)]
    pin(store, ids[0])
    for path in leases.retain(store, held, CheckpointsSpec(keep_last=1)):
        store.blobs.delete(path)
    assert there(store, ids) == [True, False, True]
    with pytest.raises(Conflict) as refused, store.begin() as session:
        checkpoints.mark_deleted(session, "default", ids[0], utcnow())
    assert refused.value.code == "checkpoint_pinned"


def delete_all(store: Store) -> int:
    with store.begin() as session:
        rows, _ = checkpoints.chosen(session, "default", final=True, limit=1000)
        removed, _ = checkpoints.remove(session, [row.id for row in rows], utcnow())
    for row in removed:
        store.blobs.delete(row.path)
    return len(removed)


def test_forks_and_deletions_at_the_same_time_never_leave_a_job_without_its_start(
    store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob
) -> None:
    """While one thread deletes whatever may go, jobs are forked, claimed and saved: none of them ever misses a checkpoint."""
    stop, deleted = Event(), list[int]()

    def delete() -> None:
        while not stop.is_set():
            deleted.append(delete_all(store))

    thread = Thread(target=delete)
    thread.start()
    made = refused = 0
    try:
        new_job()
        for _ in range(15):
            held = take(store, settings)
            start = save(store, held, 1)
            newer = save(store, held, 2)  # `start` is free from here on
            try:
                fork = new_job(from_checkpoint_id=start)
            except InvalidRequest:
                refused += 1
            else:
                made += 1
                assert there(store, [start]) == [True]
                lifecycle.cancel(store, doorbell, "default", fork.id)
            assert there(store, [newer]) == [True], "the job resumes from it"
            new_job(from_checkpoint_id=newer)  # still held by its job: never refused
            leases.succeed(store, held, {}, "max_steps")
            assert there(store, [newer]) == [True], "the fork that waits starts from it"
    finally:
        stop.set()
        thread.join()
    assert made + refused == 15
    assert sum(deleted) > 0, "a negative control: what may go does go"
