"""Sessions in a real store, and a host that works for them in this process until all of them rest."""

from typing import Any

import pytest
from safetensors.torch import load_file
from session_operations import LORA, TINY
from sqlalchemy import select
from torch import Tensor

from service.doorbell import Doorbell
from service.jobs import lease as leases
from service.jobs import lifecycle
from service.sessions.body import OperationBody, asked
from service.sessions.codec import as_json, pack, unpack
from service.sessions.sessions import resolve_session, sampler_of
from service.settings import Settings
from service.spec.session import SessionSpec
from service.store import checkpoints, jobs, operations
from service.store.operations import Asked
from service.store.session import Store
from service.store.tables import Checkpoint, Job, Operation
from service.validation import parse
from workers.sessions import host as module
from workers.sessions.host import Host
from workers.tenure.keeper import Keeper


class Rig:
    def __init__(self, store: Store, settings: Settings, doorbell: Doorbell) -> None:
        self.store, self.settings, self.doorbell = store, settings, doorbell

    def session(self, model: Any = None, project: str = "default", **spec: Any) -> str:
        parsed = parse(SessionSpec, {"model": model or LORA, **spec})
        resolved = resolve_session(self.store, self.settings, project, parsed)
        return lifecycle.create_job(self.store, self.doorbell, project=project, sent={}, resolved=resolved).id

    def sampler(self, project: str = "default") -> str:
        model = {**TINY, "adapter": None, "from_checkpoint": None}
        return sampler_of(self.store, self.doorbell, self.settings, project, model).id

    def send(self, job_id: str, *bodies: dict[str, Any], first: int | None = None) -> list[int]:
        """Append these operations in order. Returns their seqs."""
        with self.store.begin(readonly=True) as session:
            seq = first or operations.next_seq(session, job_id)
        whole = [asked(parse(OperationBody, {**body, "seq": seq + number})) for number, body in enumerate(bodies)]
        self._append(job_id, whole)
        return [one.seq for one in whole]

    def send_loose(self, job_id: str, body: dict[str, Any], *, lane: str, seq: int = 1, checkpoint: str | None = None) -> None:
        """A sample of an unordered lane."""
        plain = asked(parse(OperationBody, {**body, "seq": seq}))
        head, tensors = unpack(plain.request)
        self._append(job_id, [Asked("sample", seq, pack({**head, "checkpoint": checkpoint}, tensors), plain.cost, lane)])

    def _append(self, job_id: str, whole: list[Asked]) -> None:
        project = self.job(job_id).project
        lifecycle.append_operations(self.store, self.doorbell, self.settings, project, job_id, whole)

    def work(self, owner: str = "w") -> None:
        """Let a host work for whoever has the first place in the queue, and all that share its base, until they rest."""
        with Keeper(self.store, self.settings, self.doorbell) as self.keeper:
            while (claimed := leases.claim(self.store, self.settings, owner, {"any"})) is not None:
                Host(self.keeper, owner).run(*claimed)

    def work_once(self, owner: str = "w") -> None:
        """The same for the first that is claimed, and for those that join."""
        with Keeper(self.store, self.settings, self.doorbell) as self.keeper:
            claimed = leases.claim(self.store, self.settings, owner, {"any"})
            assert claimed is not None
            Host(self.keeper, owner).run(*claimed)

    def operation(self, job_id: str, seq: int, lane: str = "") -> Operation:
        with self.store.begin(readonly=True) as session:
            found = session.scalar(select(Operation).filter_by(job_id=job_id, lane=lane, seq=seq))
            assert found is not None
            return found

    def answer(self, job_id: str, seq: int, lane: str = "") -> dict[str, Any]:
        found = self.operation(job_id, seq, lane)
        assert found.status == "done", (found.status, found.error)
        assert found.answer is not None
        return as_json(found.answer)

    def error(self, job_id: str, seq: int, lane: str = "") -> dict[str, Any]:
        found = self.operation(job_id, seq, lane)
        assert found.status == "failed" and found.error is not None, found.status
        return found.error

    def job(self, job_id: str) -> Job:
        with self.store.begin(readonly=True) as session:
            job = jobs.find(session, job_id)
        assert job is not None
        return job

    def checkpoints(self, job_id: str) -> list[Checkpoint]:
        with self.store.begin(readonly=True) as session:
            return checkpoints.of_job(session, job_id)

    def weights(self, job_id: str, checkpoint_id: str | None = None) -> dict[str, Tensor]:
        """Every tensor of a checkpoint, by default the newest, optimizer state too."""
        job = self.job(job_id)
        wanted = checkpoint_id or job.checkpoint_id
        assert wanted is not None
        with self.store.begin(readonly=True) as session:
            folder = self.store.blobs.path(checkpoints.get(session, job.project, wanted).path)
        return {f"{file.name}:{k}": v for file in sorted(folder.rglob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.fixture
def session_settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"session_idle_s": 0.05, "device": "cpu"})


@pytest.fixture
def rig(store: Store, session_settings: Settings, doorbell: Doorbell, monkeypatch: pytest.MonkeyPatch) -> Rig:
    monkeypatch.setattr(module, "LOOK_S", 0.02)
    return Rig(store, session_settings, doorbell)
