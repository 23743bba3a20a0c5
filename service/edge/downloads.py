"""Files as answers."""

import re
from pathlib import Path

from fastapi.responses import FileResponse
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

RANGE = re.compile(r"bytes=(?:(\d{1,18})-(\d{0,18})|-(\d{1,18}))", re.ASCII)


class Download(FileResponse):
    """A file, or the one range of it that is asked for. Any other Range is ignored, as HTTP allows: Starlette refuses it with
    plain text, which is an error of no face."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = Headers(scope=scope).get("range")
        if asked is not None and not self._holds(asked):
            scope = {**scope, "headers": [(name, value) for name, value in scope["headers"] if name != b"range"]}
        await super().__call__(scope, receive, send)

    def _holds(self, asked: str) -> bool:
        found = RANGE.fullmatch(asked)
        if found is None:
            return False
        size = Path(self.path).stat().st_size
        begin = max(size - int(found[3]), 0) if found[3] else int(found[1])
        return begin < size and (not found[2] or begin <= int(found[2]))
