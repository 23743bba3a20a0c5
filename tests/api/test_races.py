"""What is made while what it needs is taken away: one of them wins, and the other is told so. Longer: tests/chaos."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread

import pytest
from sqlalchemy.exc import IntegrityError

from chaos.races import CREATES, DELETES, ground, race
from service.edge.auth import ADMIN_PROJECT
from service.errors import NotFound
from service.jobs import lifecycle
from service.store import jobs


def test_each_create_against_each_delete(each_api):
    seen, failed = race(lambda: each_api.client(ADMIN_PROJECT), each_api.store, len(CREATES) * len(DELETES))
    assert failed == []
    assert seen["_upload 201"] and seen["_delete_dataset 204"] and seen["_budget 200"] and seen["_fork 201"], seen


def test_a_fork_whose_parent_goes_in_between_is_a_404(each_api, monkeypatch):
    """The parent was read, and is deleted before the fork is written."""
    create_job = lifecycle.create_job

    def create_after_the_delete(*arguments, **named):
        lifecycle.delete(each_api.store, named["project"], named["parent_id"])
        return create_job(*arguments, **named)

    with each_api.client() as client:
        parent = ground(client, each_api.store).job
        monkeypatch.setattr(lifecycle, "create_job", create_after_the_delete)
        answer = client.post(f"/v1/jobs/{parent}/fork", headers={"Idempotency-Key": "x"})
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), answer.text
        assert parent in answer.json()["detail"]


def test_a_parent_that_a_fork_holds_is_deleted_after_it(each_api):
    with each_api.client("p") as client:
        parent, deleted = ground(client, each_api.store).job, Event()
        thread = Thread(target=lambda: (client.delete(f"/v1/jobs/{parent}"), deleted.set()))
        with each_api.store.begin() as session:
            jobs.hold(session, "p", parent)
            thread.start()
            assert not deleted.wait(0.5)
        assert deleted.wait(10)
        thread.join()
        with pytest.raises(NotFound), each_api.store.begin() as session:
            jobs.hold(session, "p", parent)


def test_a_conflict_that_no_query_foresaw_is_a_409(api, client, submit, monkeypatch):
    def conflict(*_):
        raise IntegrityError("INSERT INTO t VALUES (%(v)s)", {"v": "planted"}, Exception("violates foreign key"))

    job = submit()
    monkeypatch.setattr(lifecycle, "delete", conflict)
    answer = client.delete(f"/v1/jobs/{job['id']}")
    assert (answer.status_code, answer.json()["code"]) == (409, "changed_meanwhile")
    assert "INSERT" not in answer.text and "planted" not in answer.text


def test_of_several_who_revoke_a_key_at_once_one_has_revoked_it(each_api):
    with each_api.client() as client, ThreadPoolExecutor(8) as pool:
        for number in range(5):
            key = client.post("/v1/keys", json={"name": str(number)}).json()["id"]
            answers = pool.map(client.delete, [f"/v1/keys/{key}"] * 8)
            assert sorted(answer.status_code for answer in answers) == [204] + [404] * 7
