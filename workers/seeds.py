"""Random draws: each derives from (seed, step, purpose), never from a global stream, so a resumed run repeats them."""

from hashlib import blake2b


def derive(seed: int, step: int, purpose: str) -> int:
    """A seed in [0, 2**63) for one draw. The same three always give the same one, on every machine."""
    digest = blake2b(f"{seed}/{step}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
