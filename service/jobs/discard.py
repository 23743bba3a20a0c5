"""Checkpoints that go although they may be in use: those with a name by their owner's word, all when their time is over."""

from contextlib import suppress
from datetime import datetime

from service.doorbell import Doorbell
from service.errors import Conflict, NotFound
from service.jobs import lifecycle
from service.store import checkpoints, jobs
from service.store.checkpoints import Kept
from service.store.session import Store
from service.store.tables import Checkpoint


def discard(
    store: Store, doorbell: Doorbell, checkpoint_ids: list[str], now: datetime, *, by_hand: bool = False
) -> tuple[list[Checkpoint], dict[str, Kept]]:
    """Delete those that are neither pinned nor promoted. One that a job needs loses its name now, and goes when no job needs it
    any more. `by_hand`: see `checkpoints.remove`.

    Samplers of such a checkpoint do not count among these jobs: they end. Returns the rows of those that are gone, and by id
    why the others are not.
    """
    with store.begin(readonly=True) as session:
        rows = checkpoints.by_id(session, checkpoint_ids).values()
        stay = {row_id for row_id, why in checkpoints.spared(session, list(rows), by_hand=by_hand).items() if why != "in_use"}
        samplers = jobs.samplers_of(session, set(checkpoint_ids) - stay)
    for sampler in samplers:
        with suppress(Conflict, NotFound):  # it has ended meanwhile
            lifecycle.cancel(store, doorbell, sampler.project, sampler.id)
    with store.begin() as session:
        removed, kept = checkpoints.remove(session, checkpoint_ids, now, by_hand=by_hand)
        for row_id, why in kept.items():
            row = session.get_one(Checkpoint, row_id)
            if why == "in_use" and row.name is not None:
                checkpoints.unname(row, now)
    for row in removed:
        store.blobs.delete(row.path)
    return removed, kept
