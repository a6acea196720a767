"""The page at `/`: files of the package, which load nothing from elsewhere and run no script but their own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.resources import files

from fastapi import APIRouter, Request, Response

from loracast.serving.errors import ApiError

router = APIRouter(include_in_schema=False)

_INDEX = "index.html"
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_POLICY = {
    "default-src": "'none'", "script-src": "'self'", "style-src": "'self'", "img-src": "'self'",
    "connect-src": "'self'", "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'",
}  # fmt: skip
_HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a browser asks whether its copy is still good
}


@dataclass(frozen=True)
class _File:
    """A file of the page, as it is sent."""

    content: bytes
    media_type: str
    etag: str


@cache
def _files() -> dict[str, _File]:
    """The files of the page by name. They are read once, so that no path is made from a request."""
    found = {}
    for path in (files("loracast.serving") / "page").iterdir():
        if kind := _TYPES.get(path.name.rpartition(".")[2]):
            content = path.read_bytes()
            found[path.name] = _File(content, kind, f'"{sha256(content).hexdigest()[:16]}"')
    return found


@router.get("/")
def index(request: Request) -> Response:
    """The page."""
    return page_file(_INDEX, request)


@router.get("/page/{name}")
def page_file(name: str, request: Request) -> Response:
    """A style sheet, a module or the icon of the page. Raises ApiError (404) for any other name."""
    if (file := _files().get(name)) is None:
        raise ApiError(404, "the page has no such file")
    headers = {**_HEADERS, "ETag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
