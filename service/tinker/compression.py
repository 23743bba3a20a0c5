"""zstd, with a bound on what comes out."""

import zstandard
from fastapi import Request

from service.edge.bodies import limited
from service.errors import BodyTooLarge, Malformed

ZSTD = "zstd"
WORTH_BYTES = 512  # smaller answers are sent as they are
LEVEL = 3


async def body(request: Request, limit: int, what: str) -> bytes:
    """The body, at most `limit` bytes before and after decompression. Raises BodyTooLarge, Malformed and as `limited` does."""
    raw = await limited(request, limit, what, encodings=(ZSTD,)).body()
    if request.headers.get("content-encoding", "").lower() != ZSTD:
        return raw
    return expanded(raw, limit, what)


def expanded(raw: bytes, limit: int, what: str) -> bytes:
    """Decompress one frame. The size that it declares is believed only if it is within the limit."""
    try:
        size = zstandard.frame_content_size(raw)
        if size > limit:
            raise BodyTooLarge(
                f"{what} may have at most {limit} bytes, decompressed too; {size} are announced", limit_bytes=limit
            )
        return zstandard.ZstdDecompressor().decompress(raw, max_output_size=limit, allow_extra_data=False)
    except zstandard.ZstdError as error:
        if size_is_unknown(raw):
            detail = f"{what} is no whole zstd frame of at most {limit} bytes: {error}"
        else:
            detail = f"{what} is no whole zstd frame: {error}"
        raise Malformed(detail, code="malformed_zstd") from None


def size_is_unknown(raw: bytes) -> bool:
    try:
        return zstandard.frame_content_size(raw) < 0
    except zstandard.ZstdError:
        return False


def compressed(request: Request, content: bytes) -> tuple[bytes, dict[str, str]]:
    """The content as it is sent and its headers: with zstd where the client takes it and it is a tenth smaller at least."""
    takes = [part.partition(";")[0].strip() for part in request.headers.get("accept-encoding", "").lower().split(",")]
    if ZSTD not in takes or len(content) < WORTH_BYTES:
        return content, {}
    small = zstandard.ZstdCompressor(level=LEVEL).compress(content)
    return (small, {"Content-Encoding": ZSTD}) if len(small) < 0.9 * len(content) else (content, {})
