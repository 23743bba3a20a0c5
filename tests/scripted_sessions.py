"""A worker without a model, for tests of what stands before sessions: it answers operations by the contract, with numbers that
can be said in advance. The log-prob of token t is -t / 100; an answer counts on from the prompt's last token."""

import threading
import time
from array import array
from itertools import pairwise
from typing import Any

from service.errors import Conflict, LeaseLost
from service.ids import new_id
from service.jobs import lease as leases
from service.jobs.lease import CheckpointRow, Lease
from service.losses.numbers import integers, tensor
from service.relay.tensors import Tensors
from service.sessions.codec import pack, unpack
from service.settings import Settings
from service.states import Wish
from service.store import checkpoints, operations
from service.store.operations import Answered
from service.store.session import Store
from service.store.tables import Job

END = 1
FILES = {"adapter_model.safetensors": b"weights", "adapter_config.json": b"{}"}


def log_prob(token: int) -> float:
    return -token / 100


class ScriptedWorker:
    """Claims every session and sampler that is queued, and answers its operations in a thread until it is stopped.

    `ran`: (kind, seq) of the ordered operations, in the order in which they ran.
    """

    def __init__(self, store: Store, settings: Settings, doorbell: Any) -> None:
        self._store, self._settings, self._doorbell = store, settings, doorbell
        self._held: dict[str, tuple[Lease, Job]] = {}
        self._done: dict[str, int] = {}
        self._stop = threading.Event()
        self.ran: list[tuple[str, int]] = []
        self._renewed = 0.0
        self.pause_s = 0.0
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "ScriptedWorker":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join(timeout=20)
        assert self.error is None, self.error

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                if not self._turn():
                    time.sleep(0.01)
        except BaseException as error:
            self.error = error
            raise

    def _turn(self) -> bool:
        while (claimed := leases.claim(self._store, self._settings, "wrk_scripted", ["any"])) is not None:
            self._held[claimed[1].id] = claimed
            self._done.setdefault(claimed[1].id, 0)
        ordered = {job_id: done for job_id, done in self._done.items() if job_id in self._held}
        if time.monotonic() > self._renewed + 2:
            self._renewed = time.monotonic()
            for lease, wish in leases.renew_all(
                self._store, self._settings, [lease for lease, _ in self._held.values()]
            ).items():
                if isinstance(wish, LeaseLost):
                    del self._held[lease.job_id]
                elif wish in (Wish.CANCEL, Wish.SAVE_AND_CANCEL):
                    leases.cancelled(self._store, lease)
                    del self._held[lease.job_id]
        with self._store.look() as connection:
            rows = operations.ready(connection, ordered) + operations.loose(connection, list(self._held))
        for row in rows:
            time.sleep(self.pause_s)
            try:
                self._answer(row)
            except (LeaseLost, Conflict):  # cancelled meanwhile
                self._held.pop(row.job_id, None)
            self._doorbell.signal(row.job_id, "events")
        return bool(rows)

    def _answer(self, row: operations.Logged) -> None:
        lease, job = self._held[row.job_id]
        assert row.request is not None
        head, tensors = unpack(row.request)
        if row.lane == operations.ORDERED:
            self.ran.append((row.kind, row.seq))
            self._done[row.job_id] = row.seq
        if row.kind == "refused":
            self._give(lease, Answered(row.id, error=head["error"]))
        elif row.kind in ("forward", "forward_backward"):
            self._give(lease, Answered(row.id, pack(*_forward(head, tensors))))
        elif row.kind == "optim_step":
            metrics = {"grad_norm": 0.5, "learning_rate": head["optimizer"]["learning_rate"], "skipped": 0.0}
            self._give(lease, Answered(row.id, pack({"metrics": metrics}, {})))
        elif row.kind == "sample":
            self._give(lease, Answered(row.id, pack(*_sample(head, tensors))))
        elif row.kind == "load_checkpoint":
            self._give(lease, Answered(row.id, pack({"checkpoint_id": head["checkpoint"]}, {})))
        elif row.kind == "save_checkpoint":
            self._save(lease, job, row, head)
        elif row.kind == "finish":
            self._give(lease, Answered(row.id, pack({"checkpoint_id": None}, {})))
            leases.succeed(self._store, lease, {}, "finished")
            del self._held[row.job_id]

    def _give(self, lease: Lease, answered: Answered) -> None:
        leases.answer_operations(self._store, self._settings, lease, [answered])

    def _save(self, lease: Lease, job: Job, row: operations.Logged, head: dict[str, Any]) -> None:
        with self._store.begin(readonly=True) as session:
            there = checkpoints.named(session, job.id, head["purpose"], head["name"])
        if there is not None and not head["overwrite"]:
            error = {"code": "name_taken", "detail": f"there is a checkpoint {head['name']} already", "category": "user"}
            self._give(lease, Answered(row.id, error=error))
            return
        checkpoint_id = new_id("ckpt")
        path = f"checkpoints/{job.id}/{checkpoint_id}"
        folder = self._store.blobs.temporary_dir()
        for name, content in FILES.items():
            (folder / name).write_bytes(content)
        self._store.blobs.commit_dir(folder, path)
        size = sum(map(len, FILES.values()))
        model, training = job.spec["model"], head["purpose"] == "training"
        saved = CheckpointRow(
            checkpoint_id,
            row.seq,
            model["adapter"]["kind"],
            model,
            path,
            size,
            "a" * 64,
            {},
            training,
            is_final=False,
            name=head["name"],
            purpose=head["purpose"],
            user_metadata=head["metadata"],
            ttl_s=head["ttl_s"],
        )
        said = {"checkpoint_id": checkpoint_id, "name": head["name"], "purpose": head["purpose"], "step": row.seq}
        removed = leases.commit_snapshot(
            self._store,
            self._settings,
            lease,
            saved,
            replay_from=row.seq + 1,
            answered=Answered(row.id, pack(said, {})),
            overwrite=head["overwrite"],
        )
        for gone in removed:
            self._store.blobs.delete(gone)


def _forward(head: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    targets = integers(tensors["target_tokens"])
    log_probs = array("f", [log_prob(token) for token in targets])
    weights = array("f", tensors["weights"].data.tobytes()) if "weights" in tensors else array("f", [1.0] * len(targets))
    loss = sum(-p * w for p, w in zip(log_probs, weights, strict=True))
    shape = tensors["target_tokens"].shape
    answer: Tensors = {"log_probs": tensor(log_probs, *shape), "cu_seqlens": tensor(integers(tensors["cu_seqlens"]))}
    told = {"metrics": {"loss:sum": loss, "tokens": float(len(targets)), "asked": head["kind"] == "forward"}}
    return {**told, **({"widths": head["widths"]} if "widths" in head else {})}, answer


def _sample(head: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    prompt = integers(tensors["prompt_tokens"])
    count, most = head["num_samples"], min(head["sampling"]["max_tokens"], 5)
    rows = [[(prompt[-1] + i + place) % 40 + 2 for place in range(most)] for i in range(count)]
    flat = [token for row in rows for token in row]
    answer: Tensors = {
        "tokens": tensor(array("i", flat)),
        "cu_seqlens": tensor(array("q", range(0, len(flat) + 1, most))),
        "log_probs": tensor(array("f", map(log_prob, flat))),
    }
    if head["prompt_log_probs"]:
        answer["prompt_log_probs"] = tensor(array("f", [float("nan"), *map(log_prob, prompt[1:])]))
    if k := head["top_prompt_log_probs"]:
        ids = array("i", [token + j for token in prompt for j in range(k)])
        answer["top_prompt_ids"], answer["top_prompt_log_probs"] = (
            tensor(ids, len(prompt), k),
            tensor(array("f", map(log_prob, ids)), len(prompt), k),
        )
    if k := head["top_log_probs"]:
        ids = array("i", [token + j for token in flat for j in range(k)])
        answer["top_ids"], answer["top_log_probs"] = (
            tensor(ids, len(flat), k),
            tensor(array("f", map(log_prob, ids)), len(flat), k),
        )
    if "target_tokens" in tensors:
        targets = array("i", tensors["target_tokens"].data.tobytes())
        values = array("f", [float("nan") if token < 0 else log_prob(token) for token in targets])
        answer["target_log_probs"] = tensor(values, *tensors["target_tokens"].shape)
    assert [end - begin for begin, end in pairwise(integers(answer["cu_seqlens"]))] == [most] * count
    return {"finish_reasons": ["length"] * count, "texts": [""] * count}, answer
