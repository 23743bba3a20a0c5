"""Losses of batches that the caller sends."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ratchet_client import losses
from ratchet_client.resources.base import Resource, part
from ratchet_client.types import Losses


class LossRequests(Resource):
    def losses(
        self,
        items: Iterable[Mapping[str, Any]],
        *,
        dtype: str | None = None,
        all_or_nothing: bool = False,
        on_nonfinite: str | None = None,
        wait_s: float = 30.0,
    ) -> Losses:
        """Losses, and gradients where an item's `return` names them, of batches in plain lists; rows of any lengths.

            answer = ratchet.losses([{"objective": {"preset": "gspo"}, "batch": {"log_probs": [[-2.0, -1.8], [-1.9]], ...}}])

        An item that failed has the status "error"; when none succeeded, or one failed under `all_or_nothing`, the refusal is
        raised. Non-finite numbers are the texts "NaN", "Infinity" and "-Infinity" in the answer, and may be plain ones in the
        request. Raises RatchetLossPending when the answer is not there within `wait_s`.
        """
        named = {"dtype": dtype, "on_nonfinite": on_nonfinite}
        body = {"items": [dict(item) for item in items], "all_or_nothing": all_or_nothing}
        body |= {name: value for name, value in named.items() if value is not None}
        text = json.dumps(body, separators=(",", ":")).encode()
        return self._transport.parsed(losses.ask(self._transport, text, losses.JSON, wait_s))

    def losses_safetensors(self, body: bytes, *, wait_s: float = 30.0) -> bytes:
        """The same in safetensors, both ways, for tensors of any framework. `ratchet_client.torch` does this for torch."""
        return losses.ask(self._transport, body, losses.TENSORS, wait_s).content

    def loss_request(self, loss_id: str, *, wait_s: float = 30.0) -> Losses:
        """The answer to a request whose RatchetLossPending was raised before. It is kept for some minutes."""
        return self._transport.parsed(losses.collect(self._transport, part(loss_id), losses.JSON, wait_s))
