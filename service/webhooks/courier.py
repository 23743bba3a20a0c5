"""Delivers what waits in the outbox of webhooks. Any number of couriers may run: each attempt is claimed first.

Killed at any point, nothing is lost: a claim ends by itself, and then another attempt with the same `webhook-id` is made.
"""

import asyncio
import logging
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from random import SystemRandom
from threading import Event, Thread
from time import time

import httpx

from service import telemetry
from service.doorbell import COURIERS, Signals
from service.outgoing import AddressNotAllowed, NameNotAllowed, certificates, checked
from service.settings import Settings
from service.spec.addresses import address_refused, name_refused
from service.store import webhooks
from service.store.session import Store
from service.store.webhooks import FIRST_PAUSE_S, GROWTH, LONGEST_PAUSE_S, MAX_ATTEMPTS, Claimed
from service.webhooks import signing

log = logging.getLogger(__name__)

EVERY_S = 30.0  # how often the outbox is looked at if nobody rings: a ring may be lost
AGAIN_S = 2.0  # after which it is looked at again where it could not be read, or others hold what is due
AT_ONCE, PER_WEBHOOK = 32, 4  # deliveries on their way; so many of one webhook, so that a slow one hardly delays others
TIMEOUT_S = 10.0  # of an attempt as a whole; far shorter than a claim
STOP_WITHIN_S = 5.0  # what is on its way when the process ends; after that it is sent again by another process
GONE = 410
LATER = (429, 503)  # answers whose Retry-After counts
NETWORKS = "RATCHET_WEBHOOK_NETWORKS"
HEADERS = {"Content-Type": "application/json", "User-Agent": "Ratchet-Webhooks/1", "Accept-Encoding": "identity"}
_random = SystemRandom()


@dataclass(frozen=True)
class Outcome:
    """What came of an attempt; `error` None: it was delivered."""

    status: int | None
    error: str | None = None
    retry_after_s: float = 0.0


def pause_s(failures: int) -> float:
    """Seconds before the attempt that follows the `failures`-th failure: 5 s, tripled each time, at most 6 h, give or take a
    fifth."""
    return min(FIRST_PAUSE_S * GROWTH ** (failures - 1), LONGEST_PAUSE_S) * _random.uniform(0.8, 1.2)


class Courier:
    """A thread that looks into the outbox when it is rung, when a delivery is due, and every EVERY_S, and sends what is due."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._settings = store, settings
        self._stop = Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._rung = asyncio.Event()
        self._thread = Thread(target=lambda: asyncio.run(self._run()), name="courier", daemon=True)
        self._busy: Counter[str] = Counter()  # deliveries on their way, by webhook
        self._sending: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._thread.start()

    def ring(self) -> None:
        """Look now. From any thread."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._rung.set)

    async def listen(self, signals: Signals) -> None:
        """Ring at every signal that deliveries wait, and while signals are away, until this is cancelled."""
        with signals.watch(COURIERS) as watch:
            while True:
                if await watch.wait(EVERY_S) or not signals.connected:
                    self.ring()

    def stop(self) -> None:
        self._stop.set()
        self.ring()
        self._thread.join(timeout=STOP_WITHIN_S + TIMEOUT_S)

    def once(self) -> int:
        """Send what is due now and wait for it. Returns how many attempts that were."""
        return asyncio.run(self._once())

    async def _once(self) -> int:
        async with self._client() as client:
            count, _ = await self._look(client)
            await asyncio.gather(*self._sending)
        return count

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with self._client() as client:
            while not self._stop.is_set():
                self._rung.clear()
                again_s = AGAIN_S
                try:
                    _, again_s = await self._look(client)
                except Exception:  # the store is away: looking again is all that this thread is for
                    log.exception("the outbox of webhooks could not be read")
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._rung.wait(), again_s)
            if self._sending:
                await asyncio.wait(self._sending, timeout=STOP_WITHIN_S)
            for task in self._sending:
                task.cancel()

    @staticmethod
    def _client() -> httpx.AsyncClient:
        # No connection is kept: it would be found by its address, under which another webhook's host may have another name.
        # `_send` bounds the time of a whole attempt. No proxy from the environment, because it would choose the address.
        limits = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=0)
        return httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(verify=certificates(), limits=limits), timeout=None, follow_redirects=False
        )

    async def _look(self, client: httpx.AsyncClient) -> tuple[int, float]:
        """Claim what is due, as far as there are hands, and begin to send it. Returns how many were claimed, and in how many
        seconds to look again; what is sent rings when it is done."""
        free = AT_ONCE - len(self._sending)
        claimed, again_s = await asyncio.to_thread(self._claim, free, frozenset(self._busy)) if free else ([], EVERY_S)
        for one in claimed:
            self._busy[one.webhook_id] += 1
            task = asyncio.create_task(self._attempt(client, one))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
        return len(claimed), again_s

    def _claim(self, limit: int, busy: frozenset[str]) -> tuple[list[Claimed], float]:
        """What is due now, and the seconds until more may be."""
        now = self._store.now()
        with self._store.begin(readonly=True) as session:
            due = webhooks.next_due(session)
        if due is None or due > now:
            left_s = EVERY_S if due is None else (due - now).total_seconds()
            return [], min(EVERY_S * _random.uniform(0.8, 1.2), left_s)
        with self._store.begin() as session:
            claimed = webhooks.claim(session, now, limit=limit, per_webhook=PER_WEBHOOK, busy=busy)
        return claimed, 0.0 if claimed else AGAIN_S

    async def _attempt(self, client: httpx.AsyncClient, claimed: Claimed) -> None:
        try:
            outcome = await self._send(client, claimed)
            await asyncio.to_thread(self._record, claimed, outcome)
        except Exception:  # the claim ends by itself, and then it is sent again
            log.exception("delivery %s of webhook %s could not be concluded", claimed.id, claimed.webhook_id)
        finally:
            self._busy[claimed.webhook_id] -= 1
            if not self._busy[claimed.webhook_id]:
                del self._busy[claimed.webhook_id]
            self.ring()  # there is a free hand, or another attempt is due sooner than anything else

    async def _send(self, client: httpx.AsyncClient, claimed: Claimed) -> Outcome:
        """One attempt. Of the answer only the status and Retry-After are read."""
        body = claimed.body.encode()
        headers = HEADERS | signing.headers(claimed.id, int(time()), body, claimed.secrets)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                to = await checked(claimed.url, self._settings.webhook_networks, claimed.attempt - 1)
                headers["Host"] = to.host
                sent = client.stream("POST", to.url, content=body, headers=headers, extensions=to.extensions)
                async with sent as response:
                    status, later = response.status_code, response.headers.get("Retry-After", "")
        except TimeoutError:
            return Outcome(None, f"no answer within {TIMEOUT_S:g} s")
        except NameNotAllowed:
            return Outcome(None, name_refused(NETWORKS))
        except AddressNotAllowed:
            return Outcome(None, address_refused(NETWORKS))
        except ValueError as error:
            return Outcome(None, str(error))
        except httpx.HTTPError as error:
            return Outcome(None, f"{type(error).__name__}: {error}")
        if 200 <= status < 300:
            return Outcome(status)
        told = f"the answer was {status}, and only 2xx counts" + ("; redirects are not followed" if 300 <= status < 400 else "")
        waits = status in LATER and later.isascii() and later.isdigit()
        return Outcome(status, told, min(float(later), LONGEST_PAUSE_S) if waits else 0.0)

    def _record(self, claimed: Claimed, outcome: Outcome) -> None:
        now = self._store.now()
        if outcome.error is None:
            assert outcome.status is not None
            with self._store.begin() as session:
                if webhooks.delivered(session, claimed, outcome.status, now):
                    telemetry.WEBHOOKS.labels("delivered").inc()
            return
        next_try_at = None
        if claimed.left > 0:
            pause = max(pause_s(MAX_ATTEMPTS - claimed.left), outcome.retry_after_s)
            next_try_at = now + timedelta(seconds=pause)
        with self._store.begin() as session:
            if not webhooks.failed(session, claimed, outcome.status, outcome.error, next_try_at, now):
                return
        telemetry.WEBHOOKS.labels("failed" if next_try_at is None else "retried").inc()
        self._disable_if_hopeless(claimed, outcome)

    def _disable_if_hopeless(self, claimed: Claimed, outcome: Outcome) -> None:
        now, lasts_s = self._store.now(), self._settings.webhook_disable_after_s
        with self._store.begin() as session:
            if outcome.status == GONE:
                disabled = webhooks.disable(session, claimed.webhook_id, "the answer was 410 Gone", now)
            else:
                lasts = "a day" if lasts_s == 86_400 else f"{lasts_s / 86_400:g} days"
                reason = f"every attempt has failed for {lasts}; the last error: {outcome.error}"
                since = now - timedelta(seconds=lasts_s)
                disabled = webhooks.disable(session, claimed.webhook_id, reason, now, failing_since=since)
        if disabled:
            log.warning("webhook %s was disabled", claimed.webhook_id)
