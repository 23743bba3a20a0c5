"""Workers that are killed at chosen points: `python -m worker.killed SETTINGS POINT...`, an attempt for each point.

A point is `WHERE:N`: the process kills itself with SIGKILL at the Nth time that it comes there; `none` runs until all rest.
Each answer is stored by itself, except with `together/WHERE:N`: then those of two that follow each other are. With
`held/WHERE:N` no checkpoint becomes durable: the disk is slow.
This process does what a worker's parent does for a dead child. It is itself without a thread, so that it can fork.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from time import sleep
from typing import Any

from service.doorbell import Doorbell
from service.jobs import lease as leases
from service.settings import Settings
from service.store import operations
from service.store.session import open_store
from workers import runner
from workers.policy.learner import Learner
from workers.sessions import host as module
from workers.sessions.host import Host
from workers.sessions.sampling import Sampling
from workers.sessions.session import Session
from workers.tenure.keeper import Keeper
from workers.tenure.session import SessionTenure
from workers.tenure.tenure import Tenure


def dies(owner: Any, name: str, number: int, *, after: bool = False) -> None:
    """The process dies at this call of a method, before or after it."""
    plain: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = plain(*args, **kwargs)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, counting)


def dies_inside_backward(number: int) -> None:
    """The gradient is there, and nobody knows of it yet."""
    dies(Learner, "_add", number, after=True)


POINTS: dict[str, Callable[[int], None]] = {
    "before_answer": lambda number: dies(SessionTenure, "answer", number),
    "after_answer": lambda number: dies(SessionTenure, "answer", number, after=True),
    "inside_backward": dies_inside_backward,
    "after_step": lambda number: dies(Learner, "step", number, after=True),
    "while_saving": lambda number: dies(Learner, "save", number, after=True),
    "after_saving": lambda number: dies(SessionTenure, "end_saving", number, after=True),
    "before_it_is_visible": lambda number: dies(SessionTenure, "end_saving", number),
    "before_its_row": lambda number: dies(leases, "commit_checkpoint", number),
    "after_its_row": lambda number: dies(leases, "commit_checkpoint", number, after=True),
    "before_settling": lambda number: dies(SessionTenure, "finish", number),
    "replaying": lambda number: dies(Session, "_again", number, after=True),
    "in_sample": lambda number: dies(Sampling, "add", number),
    "in_operation": lambda number: dies(Session, "_do", number),
}


def replays_nothing(self: Session) -> None:
    """A wrong build: it believes that the snapshot holds everything."""
    rows = self._since(self.place.replay_from)
    self.place.seq = max([self.place.seq, *(row.seq for row in rows if row.status != "waiting")])


def attempt(settings: Settings, point: str, owner: str) -> None:
    module.TOGETHER_S = 600.0 if point.startswith("together/") else 0.0
    where, _, number = point.removeprefix("together/").removeprefix("held/").partition(":")
    if point.startswith("held/"):
        Tenure._seal = lambda *_, **__: sleep(600)  # pyright: ignore[reportAttributeAccessIssue]
    if where == "wrong":
        Session._replay = replays_nothing
    elif where != "none":
        POINTS[where](int(number))
    module.LOOK_S = 0.02
    store, doorbell = open_store(settings), Doorbell(settings)
    with Keeper(store, settings, doorbell) as keeper:
        while (claimed := leases.claim(store, settings, owner, {"any"})) is not None:
            if claimed[1].kind in operations.KINDS:
                Host(keeper, owner).run(*claimed)
            else:
                runner.run(keeper, *claimed)


def main() -> None:
    settings = Settings.model_validate(json.loads(sys.argv[1]))
    ended: list[int] = []
    for number, point in enumerate(sys.argv[2:]):
        owner = f"w{number}"
        child = os.fork()
        if child == 0:
            try:
                attempt(settings, point, owner)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        ended.append(status)
        store, doorbell = open_store(settings), Doorbell(settings)
        leases.worker_lost(store, doorbell, owner)
        store.close()
        doorbell.close()
    print(json.dumps(ended))


if __name__ == "__main__":
    main()
