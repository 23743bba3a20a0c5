"""`Ratchet`: every route of the service as a method."""

from types import TracebackType
from typing import Self

from ratchet_client import discovery
from ratchet_client.resources.aliases import Aliases
from ratchet_client.resources.checkpoints import Checkpoints
from ratchet_client.resources.datasets import Datasets
from ratchet_client.resources.keys import Keys
from ratchet_client.resources.losses import LossRequests
from ratchet_client.resources.models import Models
from ratchet_client.resources.operators import Operators
from ratchet_client.resources.progress import Progress
from ratchet_client.resources.sessions import Sessions
from ratchet_client.resources.spending import Spending
from ratchet_client.resources.webhooks import Webhooks
from ratchet_client.transport import Transport


class Ratchet(Progress, Sessions, LossRequests, Checkpoints, Aliases, Datasets, Models, Keys, Operators, Webhooks, Spending):
    """A connection to one Ratchet. Safe to share between threads; use it as a context manager, or `close()` it.

    Without arguments it uses RATCHET_URL and RATCHET_API_KEY, else the local stack that `ratchet up` started. A refusal of the
    service is raised as RatchetApiError. Connection errors, 429 and 503 are retried first, with the same Idempotency-Key, so
    that nothing is created twice.
    """

    def __init__(
        self, base_url: str | None = None, api_key: str | None = None, *, timeout_s: float = 60.0, max_retries: int = 5
    ) -> None:
        if base_url is None or api_key is None:
            base_url, api_key = discovery.find(base_url, api_key)
        self._transport = Transport(base_url, api_key, timeout_s=timeout_s, max_retries=max_retries)

    @property
    def base_url(self) -> str:
        return self._transport.base_url

    def close(self) -> None:
        self._transport.http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
