"""The objects that all endpoints share, created once by the application's lifespan."""

from dataclasses import dataclass, field
from threading import Event
from typing import Annotated

from fastapi import Depends, Request

from service.doorbell import Doorbell, Signals
from service.edge.answers import Answers
from service.edge.keyring import Keyring
from service.edge.limits import OpenAnswers
from service.edge.rate import Limiter
from service.edge.remembered import Recent, Remembered
from service.edge.shares import Shares, Turns
from service.edge.tails import Tails
from service.relay.queue import RequestQueue
from service.settings import Settings
from service.store.session import Store
from service.store.usage import Whole

# How many costly operations may run at once, for one key and for all. One key can never take all places.
CHECKS = {"per_key": 1, "in_all": 2}  # specs and datasets: seconds of Python, and a child process of 100 MB now and then
VIEWS = {"per_key": 1, "in_all": 4}  # jobs with their specs: a spec of 16 MiB takes a second
PREVIEWS = {"per_key": 1, "in_all": 2}  # each starts a process that imports the graders
CONVERSIONS = {"per_key": 2, "in_all": 4}  # loss requests: each may briefly take ten times its size in memory
POLLED_FOR_S = 5.0  # a request that still waited so shortly ago, by (project, request): the session and the operation
STANDS_FOR_S = 5.0  # so old may be what pollers are told of why their session waits


@dataclass(frozen=True)
class Context:
    settings: Settings
    store: Store
    doorbell: Doorbell
    signals: Signals
    losses: RequestQueue
    limiter: Limiter
    shares: Shares
    open_answers: OpenAnswers
    tails: Tails
    answers: Answers
    stopping: Event = field(default_factory=Event)  # set when the server is told to stop: streams and long polls end
    keyring: Keyring = field(default_factory=Keyring)
    ledger: Remembered[Whole] = field(default_factory=Remembered)
    polled: Recent[tuple[str, str], tuple[str, str]] = field(default_factory=lambda: Recent(10_000, POLLED_FOR_S))
    standings: Recent[str, tuple[str, str | None]] = field(default_factory=lambda: Recent(1_000, STANDS_FOR_S))
    checks: Turns = field(default_factory=lambda: Turns(**CHECKS))
    views: Turns = field(default_factory=lambda: Turns(**VIEWS))
    previews: Turns = field(default_factory=lambda: Turns(**PREVIEWS))
    conversions: Turns = field(default_factory=lambda: Turns(**CONVERSIONS))

    def stop(self) -> None:
        self.stopping.set()
        self.signals.wake_all()
        self.tails.stop()


def context_of(request: Request) -> Context:
    return request.app.state.context


async def _context(request: Request) -> Context:
    return context_of(request)


ContextDep = Annotated[Context, Depends(_context)]
