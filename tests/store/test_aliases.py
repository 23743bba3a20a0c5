"""Aliases point at one checkpoint each, keep it, and tell what they pointed at, whoever is quicker."""

import json
from collections.abc import Callable
from datetime import timedelta
from threading import Barrier, Thread

import pytest
from sqlalchemy import select

from service.doorbell import Doorbell
from service.errors import Conflict, InvalidRequest, NotFound
from service.ids import new_id, utcnow
from service.jobs import lease as leases
from service.jobs.lease import CheckpointRow, Lease
from service.jobs.reconciler import expire
from service.settings import Settings
from service.spec.job import CheckpointsSpec
from service.store import aliases, checkpoints, webhooks
from service.store.aliases import NOTHING, Wish
from service.store.session import Store
from service.store.tables import AliasChange, Checkpoint, Job, WebhookDelivery

NewJob = Callable[..., Job]
NAME = "digits@production"


@pytest.fixture
def held(store: Store, settings: Settings, new_job: NewJob) -> Lease:
    new_job(checkpoints={"ttl_s": 60.0, "keep_last": 9})
    claimed = leases.claim(store, settings, "w", {"any"})
    assert claimed is not None
    return claimed[0]


def save(store: Store, held: Lease, step: int) -> str:
    id_ = new_id("ckpt")
    row = CheckpointRow(id_, step, "full", {"source": "tiny"}, f"checkpoints/x/{id_}", 2, "0" * 64, {}, True, False)
    leases.commit_checkpoint(store, held, row)
    return id_


@pytest.fixture
def saved(store: Store, held: Lease) -> list[str]:
    return [save(store, held, step) for step in range(4)]


def wish(expected: str | None = None, note: str | None = None) -> Wish:
    return Wish("key_me", utcnow(), note, expected)


def promote(store: Store, to: str, expected: str | None = None, note: str | None = None, name: str = NAME) -> bool:
    with store.begin() as session:
        return aliases.promote(session, "default", name, to, wish(expected, note))[1]


def rollback(store: Store, expected: str | None = None) -> str | None:
    with store.begin() as session:
        return aliases.rollback(session, "default", NAME, wish(expected)).checkpoint_id


def drop(store: Store, expected: str | None = None) -> None:
    with store.begin() as session:
        aliases.delete(session, "default", NAME, wish(expected))


def at(store: Store) -> str | None:
    with store.begin(readonly=True) as session:
        return aliases.get(session, "default", NAME).checkpoint_id


def told(store: Store) -> list[tuple[int, str, str | None, str | None]]:
    with store.begin(readonly=True) as session:
        rows, _ = aliases.history(session, "default", NAME, limit=100)
    assert {row.key_id for row in rows} == {"key_me"}
    return [(row.seq, row.action, row.from_checkpoint_id, row.checkpoint_id) for row in reversed(rows)]


def test_it_is_made_moved_rolled_back_deleted_and_made_again(store: Store, saved: list[str]) -> None:
    a, b, c, _ = saved
    assert promote(store, a, NOTHING) is True
    assert promote(store, a, NOTHING) is False  # repeated: nothing changes
    assert promote(store, b) is promote(store, c) is False
    assert (rollback(store), rollback(store)) == (b, a)  # step by step back
    with pytest.raises(Conflict) as refused:
        rollback(store)
    assert refused.value.code == "nothing_before"
    promote(store, c)
    assert rollback(store) == a  # what was there before, not what was promoted before
    drop(store)
    with pytest.raises(NotFound):
        at(store)
    dropped_at = utcnow()
    assert promote(store, b, NOTHING) is True
    with store.begin(readonly=True) as session:
        assert aliases.get(session, "default", NAME).created_at >= dropped_at
    assert told(store) == [
        (1, "promote", None, a),
        (2, "promote", a, b),
        (3, "promote", b, c),
        (4, "rollback", c, b),
        (5, "rollback", b, a),
        (6, "promote", a, c),
        (7, "rollback", c, a),
        (8, "delete", a, None),
        (9, "promote", None, b),
    ]
    with pytest.raises(Conflict, match="nothing before"):
        rollback(store)  # a deletion ends what could be rolled back


def test_what_is_expected_must_hold(store: Store, saved: list[str]) -> None:
    a, b, c, _ = saved
    with pytest.raises(Conflict, match=f"points at nothing, and {a} was expected"):
        promote(store, b, a)
    promote(store, a)
    for change in (lambda: promote(store, b, c), lambda: promote(store, b, NOTHING), lambda: drop(store, c)):
        with pytest.raises(Conflict) as refused:
            change()
        assert (refused.value.code, refused.value.extra["checkpoint_id"]) == ("alias_moved", a)
    promote(store, b, a)
    with pytest.raises(Conflict, match="points at"):
        rollback(store, a)
    assert (at(store), len(told(store))) == (b, 2)
    assert rollback(store, b) == a
    drop(store, a)


def test_one_alias_is_promoted_to_what_another_points_at(store: Store, saved: list[str]) -> None:
    promote(store, saved[2], name="digits@staging")
    promote(store, "digits@staging")
    promote(store, saved[0], name="digits@staging")
    assert at(store) == saved[2]


def test_projects_have_their_own(store: Store, saved: list[str]) -> None:
    promote(store, saved[0])
    with store.begin() as session:
        for call in (
            lambda: aliases.get(session, "other", NAME),
            lambda: aliases.history(session, "other", NAME),
            lambda: aliases.checkpoint(session, "other", NAME),
            lambda: aliases.promote(session, "other", NAME, saved[0], wish()),
            lambda: aliases.rollback(session, "other", NAME, wish()),
            lambda: aliases.delete(session, "other", NAME, wish()),
        ):
            with pytest.raises(NotFound):
                call()
        assert aliases.page(session, "other") == ([], False)
    assert len(told(store)) == 1


def test_pages_are_the_newest_first(store: Store, saved: list[str]) -> None:
    names = [f"digits@a{number}" for number in range(3)]
    for name in names:
        promote(store, saved[0], name=name)
    with store.begin(readonly=True) as session:
        first, more = aliases.page(session, "default", limit=2)
        rest, no_more = aliases.page(session, "default", after=first[-1].name, limit=2)
        assert [row.name for row in (*first, *rest)] == names[::-1] and (more, no_more) == (True, False)
        with pytest.raises(InvalidRequest):
            aliases.page(session, "default", after="digits@never")


def test_what_it_points_at_is_kept_and_what_a_rollback_needs_only_by_hand_deleted(
    store: Store, settings: Settings, doorbell: Doorbell, held: Lease, saved: list[str]
) -> None:
    older, before, now, newest = saved
    for each in (older, before, now):
        promote(store, each)
    assert len(leases.retain(store, held, CheckpointsSpec(keep_last=1))) == 1
    leases.succeed(store, held, {}, "max_steps")
    later = utcnow() + timedelta(seconds=61)
    with store.begin(readonly=True) as session:
        assert checkpoints.expired(session, later) == [newest]  # the others do not stand in its way
    assert expire(store, doorbell, later) == [newest]
    with store.begin(readonly=True) as session:
        alive = [session.get_one(Checkpoint, id_).deleted_at is None for id_ in saved]
    assert alive == [False, True, True, False]
    with pytest.raises(Conflict) as refused, store.begin() as session:
        checkpoints.mark_deleted(session, "default", now, utcnow())
    assert (refused.value.code, refused.value.extra["aliases"]) == ("checkpoint_aliased", [NAME])
    with store.begin() as session:
        checkpoints.mark_deleted(session, "default", before, utcnow())
    with pytest.raises(Conflict) as refused:
        rollback(store)
    assert refused.value.code == "checkpoint_deleted" and before in str(refused.value)
    drop(store)
    assert expire(store, doorbell, later) == [now]
    with pytest.raises(NotFound):
        promote(store, now)


def test_too_many(store: Store, saved: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aliases, "MOST", 1)
    promote(store, saved[0])
    with pytest.raises(Conflict) as refused:
        promote(store, saved[0], name="digits@other")
    assert refused.value.code == "too_many_aliases"
    promote(store, saved[1])
    drop(store)
    promote(store, saved[0], name="digits@other")


def test_webhooks_are_told(store: Store, saved: list[str]) -> None:
    with store.begin() as session:
        wanted = ("alias.promoted", "alias.deleted")
        webhooks.create(session, project="default", url="https://x.org", description="", events=wanted, now=utcnow())
    promote(store, saved[0], note="best so far")
    promote(store, saved[1])
    rollback(store)
    drop(store)
    with store.begin(readonly=True) as session:
        rows = session.scalars(select(WebhookDelivery).order_by(WebhookDelivery.created_at, WebhookDelivery.id)).all()
        job_id = session.get_one(Checkpoint, saved[0]).job_id
    assert [row.type for row in rows] == ["alias.promoted", "alias.promoted", "alias.deleted"]
    assert json.loads(rows[0].body)["data"] == {
        "alias": NAME,
        "seq": 1,
        "checkpoint_id": saved[0],
        "from_checkpoint_id": None,
        "note": "best so far",
        "key_id": "key_me",
        "job_id": job_id,
    }


def test_of_many_at_once_with_one_expectation_one_succeeds(store: Store, saved: list[str]) -> None:
    """And without one all do, each from where the one before had left it."""

    def all_at_once(expected: str | None) -> list[str | None]:
        start, outcomes = Barrier(3), list[str | None]()

        def go(to: str) -> None:
            start.wait()
            try:
                promote(store, to, expected)
                outcomes.append(to)
            except Conflict as error:
                outcomes.append(None if error.code == "alias_moved" else error.code)

        threads = [Thread(target=go, args=(to,)) for to in saved[1:]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes

    for expected in (NOTHING, saved[0]):
        outcomes = all_at_once(expected)
        assert outcomes.count(None) == 2 and at(store) in outcomes
        promote(store, saved[0])
    assert None not in all_at_once(None)
    changes = told(store)
    assert [seq for seq, *_ in changes] == list(range(1, 8))
    assert [came for _, _, came, _ in changes[1:]] == [went for *_, went in changes[:-1]]
    with store.begin(readonly=True) as session:
        assert len(session.scalars(select(AliasChange)).all()) == 7


def test_promotions_and_deletions_at_the_same_time_never_leave_it_pointing_at_nothing(store: Store, saved: list[str]) -> None:
    for id_ in saved:
        start, outcomes = Barrier(2), list[str]()

        def delete(id_: str = id_, start: Barrier = start, outcomes: list[str] = outcomes) -> None:
            start.wait()
            try:
                with store.begin() as session:
                    session.get_one(Job, session.get_one(Checkpoint, id_).job_id).checkpoint_id = None
                    checkpoints.mark_deleted(session, "default", id_, utcnow())
                outcomes.append("deleted")
            except Conflict as error:
                outcomes.append(error.code)

        thread = Thread(target=delete)
        thread.start()
        start.wait()
        try:
            promote(store, id_)
            outcomes.append("promoted")
        except NotFound:
            outcomes.append("gone")
        thread.join()
        assert set(outcomes) in ({"promoted", "checkpoint_aliased"}, {"gone", "deleted"})
