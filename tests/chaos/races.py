"""Each request that makes something against each that takes away what it needs, at the same moment: no answer is a 500.

Every unique and every foreign key of the tables has its pairs here: jobs.parent_id (fork, delete of the parent), jobs and
datasets and checkpoints that a new job names, idempotency_keys (one key from several requests), budgets (the first of a
project, twice), api_keys.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from threading import Barrier
from typing import Any
from uuid import uuid4

import httpx

from job_specs import SUPERVISED
from service.ids import new_id, utcnow
from service.store import checkpoints, jobs
from service.store.checkpoints import CheckpointRow
from service.store.session import Store

WIDE = 4  # requests of the same kind at once
ROW = b'{"q": "1+1=", "a": "2"}\n'


@dataclass(frozen=True)
class Ground:
    """What one round fights for."""

    job: str  # it has ended
    checkpoint: str  # the newest of that job
    dataset: str
    key: str  # an API key
    name: str  # of a project, an Idempotency-Key


Ask = Callable[[httpx.Client, Ground], httpx.Response]


def _spec(**sections: Any) -> dict[str, Any]:
    return {**SUPERVISED, **sections}


def _from_dataset(client: httpx.Client, ground: Ground) -> httpx.Response:
    data = {**SUPERVISED["data"], "train": {"source": "dataset", "id": ground.dataset}}
    return client.post("/v1/jobs", json=_spec(data=data))


def _from_checkpoint(client: httpx.Client, ground: Ground) -> httpx.Response:
    return client.post("/v1/jobs", json=_spec(model={"from_checkpoint": ground.checkpoint}))


def _fork(client: httpx.Client, ground: Ground) -> httpx.Response:
    return client.post(f"/v1/jobs/{ground.job}/fork", json={})


def _once(client: httpx.Client, ground: Ground) -> httpx.Response:
    return client.post("/v1/jobs", json=SUPERVISED, headers={"Idempotency-Key": ground.name})


def _fork_once(client: httpx.Client, ground: Ground) -> httpx.Response:
    return client.post(f"/v1/jobs/{ground.job}/fork", json={}, headers={"Idempotency-Key": ground.name})


def _refused_once(client: httpx.Client, ground: Ground) -> httpx.Response:
    return client.post("/v1/jobs", json={"kind": "none"}, headers={"Idempotency-Key": ground.name})


def _upload(client: httpx.Client, ground: Ground) -> httpx.Response:
    headers = {"Idempotency-Key": ground.name, "Content-Type": "application/jsonl"}
    return client.post("/v1/datasets", content=ROW, headers=headers)


def _new_key(client: httpx.Client, ground: Ground) -> httpx.Response:
    return client.post("/v1/keys", json={"name": "x"}, headers={"Idempotency-Key": ground.name})


def _budget(client: httpx.Client, ground: Ground) -> httpx.Response:
    return client.put("/v1/budget", json={"project": ground.name, "tokens": 10})


def _pin(client: httpx.Client, ground: Ground) -> httpx.Response:
    return client.post(f"/v1/checkpoints/{ground.checkpoint}/pin")


def _read(client: httpx.Client, ground: Ground) -> httpx.Response:
    return client.get(f"/v1/jobs/{ground.job}")


def _lineage(client: httpx.Client, ground: Ground) -> httpx.Response:
    return client.get(f"/v1/checkpoints/{ground.checkpoint}/lineage")


def _delete_job(client: httpx.Client, ground: Ground) -> httpx.Response:
    return client.delete(f"/v1/jobs/{ground.job}")


def _delete_dataset(client: httpx.Client, ground: Ground) -> httpx.Response:
    return client.delete(f"/v1/datasets/{ground.dataset}")


def _delete_checkpoint(client: httpx.Client, ground: Ground) -> httpx.Response:
    return client.delete(f"/v1/checkpoints/{ground.checkpoint}")


def _delete_checkpoints(client: httpx.Client, ground: Ground) -> httpx.Response:
    return client.post("/v1/checkpoints:delete", json={"job_id": ground.job, "dry_run": False, "final": True})


def _revoke(client: httpx.Client, ground: Ground) -> httpx.Response:
    return client.delete(f"/v1/keys/{ground.key}")


CREATES: Sequence[Ask] = (
    _from_dataset, _from_checkpoint, _fork, _once, _fork_once, _refused_once, _upload, _new_key, _budget, _pin, _read, _lineage
)  # fmt: skip
DELETES: Sequence[Ask] = (_delete_job, _delete_dataset, _delete_checkpoint, _delete_checkpoints, _revoke)


def ground(client: httpx.Client, store: Store) -> Ground:
    job = client.post("/v1/jobs", json=SUPERVISED).json()["id"]
    assert client.post(f"/v1/jobs/{job}/cancel").json()["status"] == "cancelled"
    ids = [new_id("ckpt"), new_id("ckpt")]
    with store.begin() as session:
        row = jobs.find(session, job, lock=True)
        assert row is not None
        for step, id_ in enumerate(ids):
            contents = CheckpointRow(id_, step, "full", row.spec["model"], f"x/{id_}", 1, "0" * 64, {}, True, False)
            checkpoints.create(session, contents, project=row.project, job_id=job, attempt=0, now=utcnow())
        row.checkpoint_id = ids[-1]
    dataset = client.post("/v1/datasets", content=ROW, headers={"Content-Type": "application/jsonl"}).json()["id"]
    key = client.post("/v1/keys", json={"name": "x"}).json()["id"]
    return Ground(job, ids[-1], dataset, key, uuid4().hex)


def race(new_client: Callable[[], httpx.Client], store: Store, rounds: int) -> tuple[Counter[str], list[str]]:
    """So many rounds, each with the next pair. Answers how often each request got each status, and every answer of 5xx.

    A round is WIDE requests of one kind and two that delete, sent by threads that waited for each other. `new_client`: with a
    key of the administrators' project.
    """
    pairs = list(product(CREATES, DELETES))
    clients = [new_client() for _ in range(WIDE + 2)]
    seen, failed = Counter[str](), list[str]()
    with ThreadPoolExecutor(len(clients)) as pool:
        for number in range(rounds):
            create, delete = pairs[number % len(pairs)]
            place, barrier = ground(clients[0], store), Barrier(len(clients))

            def ask(client: httpx.Client, what: Ask, place: Ground = place, barrier: Barrier = barrier) -> httpx.Response:
                barrier.wait(timeout=60)
                return what(client, place)

            asked = [create] * WIDE + [delete] * 2
            for what, answer in zip(asked, pool.map(ask, clients, asked), strict=True):
                seen[f"{what.__name__} {answer.status_code}"] += 1
                if answer.status_code >= 500:
                    failed.append(
                        f"{create.__name__} and {delete.__name__}: {what.__name__} {answer.status_code} {answer.text}"
                    )
    for client in clients:
        client.close()
    return seen, failed
