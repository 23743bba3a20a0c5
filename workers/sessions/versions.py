"""The versions that are sampled: adapters of checkpoints, frozen, each under a name of its own, apart from every learner."""

from collections import OrderedDict, defaultdict
from pathlib import Path

from service.errors import NotFound
from service.spec.model import Lora, ModelSpec
from service.spec.session import base_key
from service.store import checkpoints
from service.store.session import Store
from workers.policy.base import Base
from workers.policy.checkpoint import CheckpointBroken
from workers.policy.load import model_folder, saved_adapter
from workers.sessions.requests import refused
from workers.tenure.resume import there, verified

KEPT = 16  # versions that nobody samples just now stay loaded, as long as there are no more


class OtherCommit(Exception):
    """The version belongs to another commit of the base: its branch on the hub has moved."""

    def __init__(self, commit: str) -> None:
        super().__init__(commit)
        self.commit = commit


class Versions:
    """`take` a version before sampling it, and `give_back` it afterwards."""

    def __init__(self, base: Base, store: Store, key: str | None) -> None:
        self._base, self._store, self._key = base, store, key
        self._loaded = OrderedDict[str, str]()  # checkpoint -> its adapter's name, the least recently used first
        self._users = defaultdict[str, int](int)
        self._count = 0

    def take(self, project: str, checkpoint_id: str) -> str:
        """The name of the version's adapter on the base. Raises InvalidRequest, and OtherCommit."""
        try:
            with there(self._store, project, checkpoint_id):
                folder = self._folder(project, checkpoint_id)  # even if it is loaded: it may be deleted, or another project's
                if checkpoint_id not in self._loaded:
                    self._count += 1
                    name = f"version-{self._count}"
                    self._base.adapters.add_saved(name, folder)
                    self._loaded[checkpoint_id] = name
        except NotFound as error:
            raise refused("checkpoint_not_found", error.detail, "/checkpoint") from error
        self._loaded.move_to_end(checkpoint_id)
        self._users[checkpoint_id] += 1
        self._unload_old()
        return self._loaded[checkpoint_id]

    def give_back(self, checkpoint_id: str) -> None:
        self._users[checkpoint_id] -= 1
        if not self._users[checkpoint_id]:
            del self._users[checkpoint_id]
        self._unload_old()

    def _unload_old(self) -> None:
        free = [checkpoint_id for checkpoint_id in self._loaded if checkpoint_id not in self._users]
        for checkpoint_id in free[: max(0, len(self._loaded) - KEPT)]:
            self._base.adapters.remove(self._loaded.pop(checkpoint_id))

    def _folder(self, project: str, checkpoint_id: str) -> Path:
        with self._store.begin(readonly=True) as session:
            row = checkpoints.get(session, project, checkpoint_id)
        model = ModelSpec.model_validate(row.model)
        if row.adapter != "lora" or base_key(model) != self._key:
            detail = f"{checkpoint_id} is no adapter of the base that is sampled here"
            raise refused("checkpoint_mismatch", detail, "/checkpoint")
        try:
            folder = self._store.blobs.fetch(row.path) if checkpoint_id in self._loaded else verified(self._store, row)
        except CheckpointBroken as error:
            raise refused("checkpoint_broken", str(error), "/checkpoint") from error
        adapter = model_folder(folder, model.adapter or Lora())
        commit, ours = saved_adapter(adapter).revision, self._base.revision
        if commit is not None and ours is not None and commit != ours:
            raise OtherCommit(commit)
        return adapter
