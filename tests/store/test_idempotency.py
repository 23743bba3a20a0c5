from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from threading import Barrier
from typing import Any

import pytest

from service.errors import InFlight, InvalidRequest
from service.ids import utcnow
from service.store import idempotency
from service.store.idempotency import Claim, StoredAnswer
from service.store.session import Store

KEY: dict[str, Any] = {"project": "p", "route": "POST /v1/jobs", "key": "k", "body_sha256": "0" * 64}


def begin(store: Store, **changes: Any) -> Claim | StoredAnswer:
    with store.begin() as session:
        return idempotency.begin(session, **{**KEY, **changes})


def claim(store: Store, **changes: Any) -> Claim:
    claimed = begin(store, **changes)
    assert isinstance(claimed, Claim)
    return claimed


def test_the_same_request_gets_the_stored_answer(store: Store) -> None:
    with store.begin() as session:
        idempotency.complete(session, claim(store), 201, {"id": "job_1"})
    assert begin(store) == StoredAnswer(201, {"id": "job_1"})
    assert begin(store) == StoredAnswer(201, {"id": "job_1"})


def test_another_body_under_the_same_key_is_refused(store: Store) -> None:
    claimed = claim(store)
    for _ in range(2):
        with pytest.raises(InvalidRequest) as caught:
            begin(store, body_sha256="1" * 64)
        assert caught.value.code == "idempotency_key_reused"
        with store.begin() as session:
            if _ == 0:
                idempotency.complete(session, claimed, 201, {})


def test_while_the_first_is_at_work_the_second_is_told_so(store: Store) -> None:
    claim(store)
    with pytest.raises(InFlight) as caught:
        begin(store)
    assert caught.value.retryable


@pytest.mark.parametrize("changes", [{"project": "q"}, {"route": "POST /v1/datasets"}, {"key": "l"}])
def test_keys_of_other_projects_and_routes_do_not_meet(store: Store, changes: dict[str, str]) -> None:
    claim(store)
    assert isinstance(begin(store, **changes), Claim)


def test_a_request_that_failed_frees_its_key(store: Store) -> None:
    with store.begin() as session:
        idempotency.abandon(session, claim(store))
    assert isinstance(begin(store, body_sha256="1" * 64), Claim)


def test_a_dead_request_is_taken_over_and_can_no_longer_answer(store: Store) -> None:
    now = utcnow()
    dead = claim(store, now=now - timedelta(seconds=61))
    heir = claim(store, now=now)
    with pytest.raises(InFlight):
        begin(store, now=now)
    with pytest.raises(InFlight), store.begin() as session:
        idempotency.complete(session, dead, 201, {"id": "twice"})
    with store.begin() as session:
        idempotency.abandon(session, dead)  # takes nothing from its heir
        idempotency.complete(session, heir, 201, {"id": "once"})
    assert begin(store) == StoredAnswer(201, {"id": "once"})


@pytest.mark.parametrize(("age_s", "again_s", "left_s"), [(0, 1, 60), (0.2, 1, 60), (7, 7, 53), (29.5, 30, 31), (58.5, 2, 2)])
def test_who_is_told_to_wait_is_told_how_long(store: Store, age_s: float, again_s: int, left_s: int) -> None:
    """Its request may have been killed: by then, at the latest, the next one takes its place."""
    now = utcnow()
    claim(store, now=now - timedelta(seconds=age_s))
    with pytest.raises(InFlight, match=f"try again in {again_s} s.*in {left_s} s") as caught:
        begin(store, now=now)
    assert caught.value.extra == {"retry_after_s": again_s}
    assert isinstance(begin(store, now=now + timedelta(seconds=left_s + 0.01)), Claim)


def test_a_young_claim_is_not_taken_over(store: Store) -> None:
    now = utcnow()
    claim(store, now=now - timedelta(seconds=59))
    with pytest.raises(InFlight):
        begin(store, now=now)


@pytest.mark.parametrize("age_s", [0, 100])
def test_of_many_that_race_one_works(store: Store, age_s: int) -> None:
    now, barrier, keys = utcnow(), Barrier(4), [str(i) for i in range(10)]
    if age_s:
        for key in keys:
            claim(store, key=key, now=now - timedelta(seconds=age_s))

    def race(_: int) -> list[str]:
        won: list[str] = []
        for key in keys:
            barrier.wait()
            with suppress(InFlight):
                claim(store, key=key, now=now)
                won.append(key)
        return won

    with ThreadPoolExecutor(4) as pool:
        assert sorted(key for won in pool.map(race, range(4)) for key in won) == keys


def test_a_key_that_is_freed_in_between_is_taken(store: Store) -> None:
    """Requests whose body is refused take the key and free it, again and again: nobody meets a row that is gone."""
    barrier = Barrier(8)

    def refused(_: int) -> int:
        worked = 0
        for _ in range(40):
            barrier.wait(timeout=10)
            with suppress(InFlight):
                claimed = claim(store)
                worked += 1
                with store.begin() as session:
                    idempotency.abandon(session, claimed)
        return worked

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(refused, range(8))) >= 40
