"""The web page: static files of this package, under a policy that lets the browser ask nobody else.

The files are read once, and served by exact name: there is no path to escape from. They hold no
secrets, so they need no key; what the page asks of the API needs one as always.
"""

import hashlib
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any, NamedTuple

from fastapi import FastAPI, HTTPException, Request
from starlette.responses import Response

from jaxserve.server.context import Context
from jaxserve.server.streaming import EventStream

INDEX = "index.html"
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "woff2": "font/woff2",
}
POLICY = "; ".join(
    (
        "default-src 'self'",
        "img-src 'self' data:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    )
)
"""What is not named here comes from this server or not at all. Markup becomes part of the page only
through DOMPurify, which alone may make trusted HTML."""

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class PageFile(NamedTuple):
    content: bytes
    media_type: str
    etag: str


def add_page_routes(app: FastAPI, context_of: Callable[[Request], Context]) -> None:
    """Add the page at /, its files below /web, and what feeds its live view to an app."""
    files = read_files()

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return _serve(files[INDEX], request)

    @app.get("/web/{name:path}", include_in_schema=False)
    async def file(request: Request, name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "Not Found")
        return _serve(files[name], request)

    @app.get("/v1/kv/stat")
    async def kv_stat(request: Request) -> dict[str, Any]:
        return await context_of(request).picture()

    @app.get("/v1/kv/stream", response_model=None)
    async def kv_stream(request: Request) -> Response:
        return EventStream(context_of(request).live.watch())


def read_files() -> Mapping[str, PageFile]:
    """Every file of the page by its name below /web."""
    root = resources.files("jaxserve.server") / "web"
    found: dict[str, PageFile] = {}
    for prefix, folder in (("", root), ("vendor/", root / "vendor")):
        for entry in folder.iterdir():
            media_type = TYPES.get(entry.name.rpartition(".")[2])
            if media_type is not None and entry.is_file():
                content = entry.read_bytes()
                etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
                found[prefix + entry.name] = PageFile(content, media_type, etag)
    return found


def _serve(file: PageFile, request: Request) -> Response:
    headers = {**HEADERS, "ETag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)
