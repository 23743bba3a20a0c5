from collections.abc import Callable
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import update

from service.doorbell import Doorbell
from service.errors import Conflict, InvalidRequest, NotFound
from service.ids import new_id, utcnow
from service.jobs import lease as leases
from service.jobs import lifecycle
from service.jobs.lease import CheckpointRow
from service.jobs.resolve import Resolved
from service.settings import Settings
from service.states import Status, allowed_actions
from service.store import checkpoints, datasets, events, jobs
from service.store.session import Store
from service.store.tables import Dataset, Job

NewJob = Callable[..., Job]


def put(store: Store, job: Job, status: str) -> None:
    """A job in any status, without the way that leads there."""
    with store.begin() as session:
        session.execute(update(Job).where(Job.id == job.id).values(status=status))


def test_a_new_job_is_stored_whole_and_the_bell_is_rung(store: Store, doorbell: Doorbell, new_job: NewJob) -> None:
    made = new_job(project="p", name="n", tags=["a"], metadata={"x": 1}, resources={"class": "cpu", "priority": 7})
    with store.begin(readonly=True) as session:
        job = jobs.get(session, "p", made.id)
    assert (job.status, job.kind, job.name, job.tags, job.user_metadata) == ("queued", "supervised", "n", ["a"], {"x": 1})
    assert (job.priority, job.resource_class, job.max_steps, job.attempt, job.step) == (7, "cpu", 10, 0, 0)
    assert job.spec["optimizer"]["kind"] == "adamw"  # resolved, with defaults
    assert "optimizer" not in job.spec_sent
    assert doorbell.waiting("cpu") == 1
    assert job.rung_at == job.queued_at == job.created_at


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_job_is_created_all_the_same_when_the_bell_is_broken(store: Store, settings: Settings, new_job: NewJob) -> None:
    deaf = Doorbell(settings.model_copy(update={"redis_url": SecretStr("redis://127.0.0.1:1/0")}))
    job = lifecycle.create_job(store, deaf, project="default", sent={}, resolved=as_resolved(new_job()))
    with store.begin(readonly=True) as session:
        assert jobs.get(session, "default", job.id).rung_at is None  # the reconciler rings at its next look


def as_resolved(job: Job, from_checkpoint_id: str | None = None) -> Resolved:
    """What would be resolved if the same were asked for again."""
    return Resolved(job.spec, job.spec_sha256, job.data_sha256, job.kind, job.max_steps, from_checkpoint_id, estimates={})


def test_what_runs_beside_the_creation_is_undone_with_it(store: Store, doorbell: Doorbell, new_job: NewJob) -> None:
    template = new_job()

    def refuse(session: Any, job: Job) -> None:
        assert job.last_event == 2
        raise RuntimeError

    with pytest.raises(RuntimeError):
        lifecycle.create_job(store, doorbell, project="q", sent={}, resolved=as_resolved(template), also=refuse)
    with store.begin(readonly=True) as session:
        assert jobs.page(session, "q") == ([], False)
    assert doorbell.waiting("any") == 1  # no bell for what was not committed


def test_inputs_that_were_deleted_meanwhile_are_named(store: Store, doorbell: Doorbell, new_job: NewJob) -> None:
    with pytest.raises(InvalidRequest) as caught:
        new_job(from_checkpoint_id="ckpt_gone")
    assert [(error.pointer, error.got) for error in caught.value.errors] == [("/model/from_checkpoint", "ckpt_gone")]
    data = {"train": {"source": "dataset", "id": "ds_gone"}, "prompt": "{q}", "answer": "{a}"}
    with pytest.raises(InvalidRequest) as caught:
        new_job(data=data)
    assert [(error.pointer, error.got) for error in caught.value.errors] == [("/data/train/id", "ds_gone")]


def test_what_a_live_job_needs_cannot_be_deleted(store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob) -> None:
    new_job()
    claimed = leases.claim(store, settings, "w", {"any"})
    assert claimed is not None
    row = CheckpointRow(new_id("ckpt"), 1, "full", {}, "checkpoints/x", 1, "0" * 64, {}, True, True)
    leases.commit_checkpoint(store, claimed[0], row)
    dataset = Dataset(
        id="ds_1", project="default", name="d", rows=1, columns={}, sha256="0" * 64, size_bytes=1, path="d", created_at=utcnow()
    )
    with store.begin() as session:
        datasets.create(session, dataset)

    def delete_both() -> list[str]:
        refused: list[str] = []
        for module, id_ in ((checkpoints, row.id), (datasets, "ds_1")):
            try:
                with store.begin() as session:
                    module.mark_deleted(session, "default", id_, utcnow())
            except Conflict as error:
                refused.append(error.code)
        return refused

    data = {"train": {"source": "dataset", "id": "ds_1"}, "prompt": "{q}", "answer": "{a}"}
    child = new_job(from_checkpoint_id=row.id, data=data)
    leases.succeed(store, claimed[0], {}, "max_steps")
    assert delete_both() == ["checkpoint_in_use", "dataset_in_use"]
    lifecycle.cancel(store, doorbell, "default", child.id)
    assert delete_both() == []
    with pytest.raises(InvalidRequest):
        new_job(from_checkpoint_id=row.id)


# ---------------------------------------------------------------- pause, resume, cancel

ASKED = [
    ("pause", "queued", "paused"),
    ("pause", "running", "pausing"),
    ("pause", "pausing", "pausing"),
    ("pause", "paused", "paused"),
    ("resume", "paused", "queued"),
    ("cancel", "queued", "cancelled"),
    ("cancel", "running", "cancelling"),
    ("cancel", "pausing", "cancelling"),
    ("cancel", "paused", "cancelled"),
    ("cancel", "cancelling", "cancelling"),
    ("cancel", "cancelled", "cancelled"),
]


@pytest.mark.parametrize(("action", "status", "target"), ASKED)
def test_where_an_action_leads(
    store: Store, doorbell: Doorbell, new_job: NewJob, action: str, status: str, target: str
) -> None:
    job = new_job()
    put(store, job, status)
    answer = getattr(lifecycle, action)(store, doorbell, "default", job.id)
    with store.begin(readonly=True) as session:
        found = jobs.get(session, "default", job.id)
        moved = [event.data for event in events.after(session, job.id, 2)]
    assert answer.status == found.status == target
    expected = {"from": status, "to": target, "reason": f"{action}_requested", "attempt": 0}
    assert moved == ([] if status == target else [expected])


REFUSED = [
    (action, status)
    for action in ("pause", "resume", "cancel")
    for status in Status
    if (action, status.value) not in {(asked, source) for asked, source, _ in ASKED}
    and (action, status) != ("cancel", "validating")
]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(("action", "status"), REFUSED)
def test_an_illegal_action_is_refused_and_says_what_is_possible(
    store: Store, doorbell: Doorbell, new_job: NewJob, action: str, status: Status
) -> None:
    job = new_job()
    put(store, job, status)
    with pytest.raises(Conflict) as caught:
        getattr(lifecycle, action)(store, doorbell, "default", job.id)
    assert caught.value.code == "illegal_transition"
    assert caught.value.extra["allowed_moves"] == allowed_actions(status)
    with store.begin(readonly=True) as session:
        assert jobs.get(session, "default", job.id).status == status


def test_resume_rings(store: Store, doorbell: Doorbell, new_job: NewJob) -> None:
    job = new_job()
    lifecycle.pause(store, doorbell, "default", job.id)
    assert doorbell.waiting("any") == 1
    job = lifecycle.resume(store, doorbell, "default", job.id)
    assert doorbell.waiting("any") == 2
    assert job.rung_at == job.queued_at


def test_another_projects_job_is_not_there(store: Store, doorbell: Doorbell, new_job: NewJob) -> None:
    job = new_job(project="mine")
    for act in (lifecycle.pause, lifecycle.resume, lifecycle.cancel):
        with pytest.raises(NotFound):
            act(store, doorbell, "yours", job.id)
    with pytest.raises(NotFound):
        lifecycle.delete(store, "yours", job.id)


def test_only_jobs_that_have_ended_are_deleted(store: Store, doorbell: Doorbell, new_job: NewJob) -> None:
    job = new_job()
    with pytest.raises(Conflict) as caught:
        lifecycle.delete(store, "default", job.id)
    assert caught.value.extra["allowed_moves"] == ["pause", "cancel", "fork"]
    lifecycle.cancel(store, doorbell, "default", job.id)
    lifecycle.delete(store, "default", job.id)
    with pytest.raises(NotFound), store.begin(readonly=True) as session:
        jobs.get(session, "default", job.id)


def test_deleting_a_parent_keeps_its_child_and_its_checkpoints(
    store: Store, settings: Settings, doorbell: Doorbell, new_job: NewJob
) -> None:
    parent = new_job()
    claimed = leases.claim(store, settings, "w", {"any"})
    assert claimed is not None
    row = CheckpointRow(new_id("ckpt"), 1, "full", {}, "checkpoints/x", 1, "0" * 64, {}, True, True)
    leases.commit_checkpoint(store, claimed[0], row)
    leases.succeed(store, claimed[0], {}, "max_steps")
    resolved = as_resolved(parent, from_checkpoint_id=row.id)
    child = lifecycle.create_job(store, doorbell, project="default", sent={}, resolved=resolved, parent_id=parent.id)
    lifecycle.delete(store, "default", parent.id)
    with store.begin(readonly=True) as session:
        assert jobs.get(session, "default", child.id).parent_id is None
        assert checkpoints.get(session, "default", row.id).job_id is None
