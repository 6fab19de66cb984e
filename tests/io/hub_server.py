"""A hub on loopback: repositories, revisions, private and gated ones, and a list of what was asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secret"


@dataclass
class Hub:
    """repositories: name -> revision -> path -> data. files: what was downloaded, and from which byte on."""

    repositories: dict[str, dict[str, Mapping[str, bytes]]]
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    files: list[tuple[str, int]] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)
    """File -> the byte after which its next download breaks off."""
    url: str = ""

    def asked(self) -> list[str]:
        """The files that were downloaded since the last call, sorted."""
        names = sorted(name for name, _ in self.files)
        self.files.clear()
        return names


def commit(revision: str) -> str:
    """The commit that a branch or tag is."""
    return hashlib.sha1(revision.encode()).hexdigest()


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """The hub, answering at `hub.url`."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
            if name not in hub.repositories or (name in hub.private and not self.known()):
                return self.answer(401, {}, {"X-Error-Code": "RepoNotFound"})
            if name in hub.gated and not self.known():
                return self.answer(403, {}, {"X-Error-Code": "GatedRepo"})
            what, revision, *path = (parts[4:] if parts[0] == "api" else parts[2:]) or ("revision", "main")
            revisions = hub.repositories[name]
            found = next((each for each in revisions if revision in (each, commit(each))), None)
            if found is None:
                return self.answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
            files = revisions[found]
            if what == "revision":
                siblings = [{"rfilename": each} for each in files]
                return self.answer(200, {"id": name, "sha": commit(found), "siblings": siblings})
            if what == "tree":
                return self.answer(200, [entry(each, data) for each, data in files.items()])
            return self.file("/".join(path), files, found)

        def known(self):
            return self.headers.get("Authorization") == f"Bearer {TOKEN}"

        def answer(self, status, value, headers=()):
            data = json.dumps(value).encode()
            self.send_response(status)
            for key, text in {"Content-Length": str(len(data)), **dict(headers)}.items():
                self.send_header(key, text)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def file(self, path, files, revision):
            if path not in files:
                return self.answer(404, {}, {"X-Error-Code": "EntryNotFound"})
            data = files[path]
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
            self.send_response(206 if start else 200)
            self.send_header("X-Repo-Commit", commit(revision))
            self.send_header("ETag", f'"{entry(path, data)["oid"]}"')
            self.send_header("Content-Length", str(len(data) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            if self.command == "GET":
                hub.files.append((path, start))
                self.wfile.write(data[start : hub.cut.pop(path, len(data))])
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def entry(path: str, data: bytes) -> dict[str, object]:
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return {"type": "file", "path": path, "size": len(data), "oid": oid}
