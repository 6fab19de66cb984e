"""The page at "/" and the readable interface at "/docs": static files that load nothing from elsewhere."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import falcon

from tinydiff.serve import storage
from tinydiff.serve.service import Service

FOLDER = Path(__file__).parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


class File(NamedTuple):
    """A file as it is sent."""

    data: bytes
    media_type: str
    tag: str


def routes(service: Service) -> list[tuple[str, object]]:
    """(address, resource) of each."""
    files, rules = read(), policy()
    return [
        ("/", Document(files["index.html"], rules)),
        ("/docs", Document(files["docs.html"], rules)),
        ("/page/{file}", Part(files, rules)),
    ]


def policy() -> str:
    """The Content-Security-Policy: whatever a prompt or an answer holds, the page runs its own scripts alone,
    talks to this server alone, and shows images and videos of it and of the object storage that they are
    uploaded to."""
    cloud = storage.from_environment()
    elsewhere = "" if cloud is None else " {0.scheme}://{0.netloc}".format(urlsplit(cloud.url("")))
    return (
        "default-src 'none'; script-src 'self'; style-src 'self'; "
        f"img-src 'self' blob: data:{elsewhere}; media-src 'self' blob:{elsewhere}; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )


def read() -> dict[str, File]:
    """Name -> file of everything in the directory of the page."""
    found = {}
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in TYPES:
            data = path.read_bytes()
            found[path.name] = File(data, TYPES[path.suffix], hashlib.sha256(data).hexdigest()[:16])
    return found


class Document:
    """One page."""

    public = True

    def __init__(self, file: File, policy: str) -> None:
        self.file, self.policy = file, policy

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        send(req, resp, self.file, self.policy)

    on_head = on_get


class Part:
    """What the pages load."""

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
    """Answer with a file, or with 304 where the browser has it as it is."""
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
