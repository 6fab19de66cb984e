"""The web page at / and the API documentation at /docs: static files without external resources."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import falcon

from tinydiff.serve import storage
from tinydiff.serve.service import Service

DIRECTORY = Path(__file__).parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


class File(NamedTuple):
    """A static file."""

    data: bytes
    media_type: str
    tag: str


def routes(service: Service) -> list[tuple[str, object]]:
    """(route, resource) of each."""
    files, rules = read(), policy()
    return [
        ("/", Document(files["index.html"], rules)),
        ("/docs", Document(files["docs.html"], rules)),
        ("/page/{file}", Asset(files, rules)),
    ]


def policy() -> str:
    """The Content-Security-Policy of the pages.

    A page runs only its own scripts, calls only this server, and shows images and videos only of this server
    and its object storage, whatever a prompt or an answer contains.
    """
    cloud = storage.from_environment()
    elsewhere = "" if cloud is None else " {0.scheme}://{0.netloc}".format(urlsplit(cloud.url("")))
    return (
        "default-src 'none'; script-src 'self'; style-src 'self'; "
        f"img-src 'self' blob: data:{elsewhere}; media-src 'self' blob:{elsewhere}; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )


def read() -> dict[str, File]:
    """Name -> file, of all files in the directory of the pages."""
    found = {}
    for path in sorted(DIRECTORY.iterdir()):
        if path.suffix in TYPES:
            data = path.read_bytes()
            found[path.name] = File(data, TYPES[path.suffix], hashlib.sha256(data).hexdigest()[:16])
    return found


class Document:
    """A page."""

    public = True

    def __init__(self, file: File, policy: str) -> None:
        self.file, self.policy = file, policy

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        send(req, resp, self.file, self.policy)

    on_head = on_get


class Asset:
    """The scripts, styles and icons of the pages."""

    public = True

    def __init__(self, files: dict[str, File], policy: str) -> None:
        self.policy = policy
        self.files = {name: file for name, file in files.items() if not name.endswith(".html")}

    def on_get(self, req: falcon.Request, resp: falcon.Response, file: str) -> None:
        if file not in self.files:
            raise falcon.HTTPRouteNotFound()
        send(req, resp, self.files[file], self.policy)

    on_head = on_get


def send(req: falcon.Request, resp: falcon.Response, file: File, policy: str) -> None:
    """Answer with a file, or with 304 where the browser has the current version."""
    resp.etag = file.tag
    resp.set_headers({
        "Cache-Control": "no-cache",
        "Content-Security-Policy": policy,
        "Cross-Origin-Opener-Policy": "same-origin",
        "Referrer-Policy": "same-origin",
        "X-Content-Type-Options": "nosniff",
    })  # fmt: skip
    if any(known in ("*", file.tag) for known in req.if_none_match or ()):
        resp.status = falcon.HTTP_304
        return
    resp.content_type = file.media_type
    resp.data = file.data
