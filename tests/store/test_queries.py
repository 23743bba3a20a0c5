from collections.abc import Callable
from datetime import datetime, timedelta
from hashlib import sha256
from itertools import pairwise
from typing import Any

import pytest

from service.doorbell import Doorbell
from service.errors import InvalidRequest, NotFound
from service.ids import utcnow
from service.jobs import lifecycle
from service.store import datasets, jobs, keys, metrics, rollouts, workers
from service.store.rollouts import RolloutRow
from service.store.session import Store
from service.store.tables import Dataset, Job, Worker

NewJob = Callable[..., Job]


# ---------------------------------------------------------------- jobs


@pytest.fixture
def five(store: Store, doorbell: Doorbell, new_job: NewJob) -> list[str]:
    """Oldest first."""
    made = [new_job(name=f"Run {i}", tags=[f"t{i % 2}", '"quoted" 50%']) for i in range(4)]
    made.append(new_job(project="other", name="Run 0", tags=["t0"]))
    lifecycle.cancel(store, doorbell, "default", made[1].id)
    return [job.id for job in made]


def test_pages_are_newest_first_and_join_without_gap_or_overlap(store: Store, five: list[str]) -> None:
    with store.begin(readonly=True) as session:
        seen: list[str] = []
        after, more = None, True
        while more:
            page, more = jobs.page(session, "default", after=after, limit=3)
            seen += [job.id for job in page]
            after = seen[-1]
    assert seen == [five[3], five[2], five[1], five[0]]


@pytest.mark.parametrize(
    ("filters", "numbers"),
    [
        ({"status": ["cancelled"]}, [1]),
        ({"status": ["queued", "cancelled"]}, [3, 2, 1, 0]),
        ({"kind": "supervised"}, [3, 2, 1, 0]),
        ({"kind": "rl"}, []),
        ({"tag": "t1"}, [3, 1]),
        ({"tag": '"quoted" 50%'}, [3, 2, 1, 0]),
        ({"tag": "t"}, []),
        ({"name": "run 2"}, [2]),
        ({"name": "%"}, []),
        ({"name": "RUN", "tag": "t0", "status": ["queued"]}, [2, 0]),
    ],
)
def test_filters(store: Store, five: list[str], filters: dict, numbers: list[int]) -> None:
    with store.begin(readonly=True) as session:
        page, _ = jobs.page(session, "default", **filters)
    assert [job.id for job in page] == [five[number] for number in numbers]


def test_a_cursor_that_is_none_is_refused(store: Store) -> None:
    with pytest.raises(InvalidRequest) as caught, store.begin(readonly=True) as session:
        jobs.page(session, "default", after="job_none")
    assert caught.value.errors[0].pointer == "/after"


def test_counts_by_status(store: Store, five: list[str]) -> None:
    with store.begin(readonly=True) as session:
        assert jobs.count_by_status(session) == {"queued": 4, "cancelled": 1}
        assert jobs.count_by_status(session, "other") == {"queued": 1}


def test_standing_is_the_status_and_the_newest_event_of_ones_own_job(store: Store, five: list[str]) -> None:
    with store.begin(readonly=True) as session:
        assert jobs.standing(session, "default", five[0]) == ("queued", 2)
        assert jobs.standing(session, "default", five[1]) == ("cancelled", 3)
        with pytest.raises(NotFound):
            jobs.standing(session, "other", five[0])


# ---------------------------------------------------------------- keys


def test_a_key_is_found_by_its_text_of_which_only_the_hash_is_stored(store: Store) -> None:
    with store.begin() as session:
        key, text = keys.create(session, project="p", name="laptop")
    assert len(text) == len("tml-") + 43
    assert text.startswith("tml-")
    assert key.sha256 == sha256(text.encode()).hexdigest()
    assert all(text not in str(value) for value in vars(key).values())
    with store.begin(readonly=True) as session:
        found = keys.find(session, text)
        assert found is not None
        assert found.id == key.id
        assert keys.find(session, text + "x") is None


def test_a_revoked_key_is_no_key(store: Store) -> None:
    with store.begin() as session:
        key, text = keys.create(session, project="p", name="laptop")
        keys.revoke(session, "p", key.id)
        assert keys.find(session, text) is None
        assert keys.page(session, "p") == []
        with pytest.raises(NotFound):
            keys.revoke(session, "p", key.id)


def test_another_projects_key_cannot_be_revoked(store: Store) -> None:
    with store.begin() as session:
        key, text = keys.create(session, project="p", name="laptop")
        with pytest.raises(NotFound):
            keys.revoke(session, "q", key.id)
        assert keys.find(session, text) is not None


def test_the_bootstrap_key_is_made_once(store: Store) -> None:
    with store.begin() as session:
        for _ in range(2):
            keys.ensure(session, project="default", name="bootstrap", text="tml-" + "a" * 43)
        assert len(keys.page(session, "default")) == 1


def test_use_is_noted_at_most_once_a_minute(store: Store) -> None:
    start = utcnow()
    with store.begin() as session:
        key, _ = keys.create(session, project="p", name="laptop")
        noted = []
        for seconds in (0, 30, 61):
            keys.touch(session, key.id, start + timedelta(seconds=seconds))
            session.refresh(key)
            assert key.last_used_at is not None
            noted.append(round((key.last_used_at - start).total_seconds()))
    assert noted == [0, 0, 61]


# ---------------------------------------------------------------- metrics


@pytest.fixture
def curve(store: Store, new_job: NewJob) -> str:
    """loss = 100 - step at steps 1 to 100 with a spike of 999 at 37; eval/loss at 50 and 100, the second not a number."""
    job = new_job()
    with store.begin() as session:
        for step in range(1, 101):
            values = {"loss": 999.0 if step == 37 else 100.0 - step}
            if step % 50 == 0:
                values["eval/loss"] = 1.5 if step == 50 else float("nan")
            metrics.write(session, job.id, step, values, attempt=1, now=utcnow())
    return job.id


def test_a_short_curve_comes_as_it_is(store: Store, curve: str) -> None:
    with store.begin(readonly=True) as session:
        found = metrics.series(session, curve, ["eval/loss", "none"], points=10)
    assert (found["eval/loss"].step, found["eval/loss"].value) == ([50, 100], [1.5, None])
    assert found["eval/loss"].min is None
    assert found["none"].step == []


def test_steps_are_inclusive(store: Store, curve: str) -> None:
    with store.begin(readonly=True) as session:
        assert metrics.series(session, curve, ["loss"], from_step=3, to_step=5)["loss"].step == [3, 4, 5]


def test_a_long_curve_is_thinned_and_loses_no_spike(store: Store, curve: str) -> None:
    with store.begin(readonly=True) as session:
        thin = metrics.series(session, curve, points=10)["loss"]
    assert thin.step == list(range(10, 101, 10))
    assert thin.value[0] == pytest.approx(94.5)  # the mean of 99 to 90
    assert thin.min is not None
    assert thin.max is not None
    assert (thin.min[0], thin.max[0]) == (90.0, 99.0)
    assert thin.max[3] == 999.0


def test_a_curve_with_holes_is_thinned_to_no_more_than_was_asked(store: Store, new_job: NewJob) -> None:
    job = new_job()
    with store.begin() as session:
        for step in [*range(20), 10_000]:
            metrics.write(session, job.id, step, {"loss": float(step)}, attempt=1, now=utcnow())
        thin = metrics.series(session, job.id, points=5)["loss"]
    assert thin.step == [19, 10_000]


def test_names_are_those_that_were_measured(store: Store, curve: str) -> None:
    with store.begin(readonly=True) as session:
        assert metrics.names(session, curve) == ["eval/loss", "loss"]
        assert set(metrics.series(session, curve)) == {"eval/loss", "loss"}


# ---------------------------------------------------------------- rollouts


def test_rollouts_come_newest_step_first_and_page_without_overlap(store: Store, new_job: NewJob) -> None:
    job = new_job()
    rows = [
        RolloutRow(split, step, group, "p", None, []) for step in (9, 10) for split in ("train", "eval") for group in range(3)
    ]
    with store.begin() as session:
        rollouts.write(session, job.id, rows, attempt=1, now=utcnow())
        seen: list[tuple[int, str, int]] = []
        after, more = None, True
        while more:
            page, more = rollouts.page(session, job.id, after=after, limit=5)
            seen += [(row.step, row.split, row.group_index) for row in page]
            after = rollouts.cursor(page[-1])
        assert len(seen) == len(set(seen)) == 12
        assert all((-a[0], *a[1:]) < (-b[0], *b[1:]) for a, b in pairwise(seen))
        train, _ = rollouts.page(session, job.id, split="train", step=9)
        assert [(row.step, row.split, row.group_index) for row in train] == [(9, "train", i) for i in range(3)]


@pytest.mark.parametrize("after", ["", "x", "1.train", "1.train.x", "-1.train.0", "job_1"])
def test_a_rollout_cursor_that_is_none_is_refused(store: Store, new_job: NewJob, after: str) -> None:
    job = new_job()
    with pytest.raises(InvalidRequest), store.begin(readonly=True) as session:
        rollouts.page(session, job.id, after=after)


# ---------------------------------------------------------------- datasets, workers


def test_datasets_of_other_projects_and_deleted_ones_are_not_there(store: Store) -> None:
    def dataset(id_: str, project: str) -> Dataset:
        return Dataset(
            id=id_, project=project, name="d", rows=1, columns={}, sha256="0" * 64, size_bytes=1, path=id_, created_at=utcnow()
        )

    with store.begin() as session:
        for id_, project in (("ds_1", "p"), ("ds_2", "p"), ("ds_3", "q")):
            datasets.create(session, dataset(id_, project))
        datasets.mark_deleted(session, "p", "ds_1", utcnow())
        page, _ = datasets.page(session, "p")
        assert [one.id for one in page] == ["ds_2"]
        assert datasets.live_paths(session) == {"ds_2", "ds_3"}
        for id_ in ("ds_1", "ds_3"):
            with pytest.raises(NotFound):
                datasets.get(session, "p", id_)


def worker(seen_at: datetime, **values: Any) -> Worker:
    times = {"started_at": seen_at, "last_seen_at": seen_at}
    return Worker(id="wrk_1", host="h", pid=1, device="cpu", resource_classes=["any", "cpu"], **times, **values)


def test_workers_are_alive_as_long_as_they_are_seen(store: Store) -> None:
    now = utcnow()
    with store.begin() as session:
        workers.hello(session, worker(now))
        assert [one.resource_classes for one in workers.alive(session, now)] == [["any", "cpu"]]
        later = now + timedelta(seconds=61)
        assert workers.alive(session, later) == []
        workers.seen(session, worker(later))
        assert len(workers.alive(session, later)) == 1
        workers.goodbye(session, "wrk_1")
        assert workers.alive(session, later) == []


def test_a_worker_whose_row_is_missing_adds_it_when_it_is_seen(store: Store) -> None:
    now = utcnow()
    with store.begin() as session:
        workers.seen(session, worker(now, draining=True))
    with store.begin(readonly=True) as session:
        assert len(workers.alive(session, now)) == 1 and workers.is_draining(session, "wrk_1")


def test_a_worker_that_drains_is_not_seen_back_to_work(store: Store) -> None:
    now = utcnow()
    with store.begin() as session:
        workers.hello(session, worker(now, draining=False))
        workers.set_draining(session, "wrk_1")
        workers.seen(session, worker(now, draining=False))
        assert workers.is_draining(session, "wrk_1")
