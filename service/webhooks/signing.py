"""Signatures of Standard Webhooks 1.0 (standardwebhooks.com): HMAC-SHA256 over `ID.TIMESTAMP.BODY`, one a secret."""

import hashlib
import hmac
from base64 import b64decode, b64encode
from collections.abc import Sequence


def headers(message_id: str, timestamp: int, body: bytes, secrets: Sequence[str]) -> dict[str, str]:
    """`webhook-id`, `webhook-timestamp` (seconds since 1970) and `webhook-signature`. Each secret is `whsec_` and base64."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{_sign(secret, signed)}" for secret in secrets),
    }


def _sign(secret: str, signed: bytes) -> str:
    key = b64decode(secret.removeprefix("whsec_"))
    return b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
