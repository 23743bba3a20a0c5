"""`/`, and the files that it loads. They are public: what they show, they ask for with the key that is typed in, or as who
the sign-on proxy says."""

from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

from fastapi import APIRouter, Request, Response

from service.errors import NotFound

router = APIRouter(include_in_schema=False)

STATIC = Path(__file__).parent / "static"
INDEX = "index.html"
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    "": "text/plain; charset=utf-8",  # a licence
}
HEADERS = {
    # Nothing is loaded from elsewhere, no script or style stands in the page, and no string becomes markup.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
KEPT = "public, max-age=31536000, immutable"  # the address changes with the files


@dataclass(frozen=True)
class Files:
    """Everything that the page is made of, read once."""

    edition: str  # changes with any of the files
    by_name: dict[str, bytes]

    @property
    def index(self) -> bytes:
        return self.by_name[INDEX].replace(b"EDITION", self.edition.encode())


@cache
def files() -> Files:
    paths = sorted(path for path in STATIC.rglob("*") if path.is_file())
    by_name = {path.relative_to(STATIC).as_posix(): path.read_bytes() for path in paths}
    edition = sha256(b"".join(name.encode() + b"\0" + sha256(text).digest() for name, text in by_name.items()))
    return Files(edition.hexdigest()[:16], by_name)


@router.api_route("/", methods=["GET", "HEAD"])
async def page(request: Request) -> Response:
    """The page. Browsers ask each time whether it has changed."""
    has_sso: bool = request.app.state.has_sso
    tag = f'"{files().edition}{"-sso" if has_sso else ""}"'
    headers = {**HEADERS, "Cache-Control": "no-cache", "ETag": tag}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    index = files().index.replace(b"<html ", b'<html data-sso="on" ') if has_sso else files().index
    return Response(index, media_type=TYPES[".html"], headers=headers)


@router.api_route("/dashboard/{edition}/{name:path}", methods=["GET", "HEAD"])
async def file(edition: str, name: str) -> Response:
    """One of the page's files, of this edition only."""
    found = files().by_name.get(name) if edition == files().edition and name != INDEX else None
    if found is None:
        raise NotFound(f"the dashboard has no file {name[:200]!r} of this edition", hint="load / again")
    headers = {**HEADERS, "Cache-Control": KEPT}
    return Response(found, media_type=TYPES[Path(name).suffix], headers=headers)
