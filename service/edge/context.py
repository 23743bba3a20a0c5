"""What every endpoint stands on: made once by the application's lifespan."""

from dataclasses import dataclass, field
from threading import Event
from typing import Annotated

from anyio import CapacityLimiter
from fastapi import Depends, Request

from service.doorbell import Doorbell, Signals
from service.edge.keyring import Keyring
from service.edge.limits import OpenAnswers
from service.edge.rate import Limiter
from service.edge.remembered import Remembered
from service.edge.tails import Tails
from service.relay.queue import RequestQueue
from service.settings import Settings
from service.store.session import Store
from service.store.usage import Whole

PREVIEWS_AT_ONCE = 2  # each is a process that imports the graders
CONVERSIONS_AT_ONCE = 4  # of loss requests and answers: each may take ten times its size in memory for a moment


@dataclass(frozen=True)
class Context:
    settings: Settings
    store: Store
    doorbell: Doorbell
    signals: Signals
    losses: RequestQueue
    limiter: Limiter
    open_answers: OpenAnswers
    tails: Tails
    stopping: Event = field(default_factory=Event)  # the server was told to stop: streams and long polls end
    keyring: Keyring = field(default_factory=Keyring)
    ledger: Remembered[Whole] = field(default_factory=Remembered)
    previews: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(PREVIEWS_AT_ONCE))
    conversions: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(CONVERSIONS_AT_ONCE))

    def stop(self) -> None:
        self.stopping.set()
        self.signals.wake_all()
        self.tails.stop()


async def _context(request: Request) -> Context:
    return request.app.state.context


ContextDep = Annotated[Context, Depends(_context)]
