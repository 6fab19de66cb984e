"""A server's store and files, their uploader, and an object storage on loopback that does as it is told, for
tests of uploads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tinydiff.serve.files import Files
from tinydiff.serve.jobs import Job, Output, new_id
from tinydiff.serve.storage import S3, Uploader
from tinydiff.serve.store import Store, open_store

DATA = b"\x89PNG something"


@dataclass(frozen=True)
class Here:
    """What a server keeps."""

    store: Store
    files: Files


@contextmanager
def keeping(folder: Path) -> Iterator[Here]:
    made = Here(open_store(folder, None, 100), Files(folder / "files", b"s" * 32, 3600.0, 10**9))
    yield made
    made.store.close()


def done(here: Here, count: int = 1, data: bytes = DATA) -> Job:
    """A completed job with so many outputs."""
    job = Job(new_id("image"), "image", time.time())
    here.store.add(job)
    here.store.take("a", time.time() + 60)
    outputs = [
        Output(here.files.put(data, "image/png"), "image/png", len(data), seed) for seed in range(count)
    ]
    here.store.finish(job.id, "a", "completed", outputs=outputs)
    return here.store.get(job.id)


@contextmanager
def uploading(here: Here, endpoint: str, **more):
    settings = {"pauses": (0.01, 0.01, 0.01), "answer_s": 5.0, "linger": 0.0, **more}
    made = Uploader(S3("images", "key", "hush", endpoint), here.files, here.store, **settings)
    try:
        yield made
    finally:
        made.close(5.0)


def until(condition, seconds: float = 15.0):
    """What the condition gives, as soon as it is something."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)
    return found


def output_of(here: Here, job: Job) -> Output:
    return here.store.get(job.id).outputs[0]


class Storage:
    """A storage that keeps objects, and answers as it is told: `script(method, path, data)` gives (status,
    code), or None for the truth.
    """

    endpoint = ""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, dict[str, str]]] = {}
        self.asked: list[str] = []
        self.script = lambda method, path, data: None
        self.size_said: int | None = None
        self.checksum_said: str | None = None
        self.lock = threading.Lock()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        method, path = handler.command, handler.path.partition("?")[0]
        data = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        with self.lock:
            self.asked.append(method)
        status, code = self.script(method, path, data) or (200, "")
        if status == 200 and method == "PUT":
            self.objects[path] = data, dict(handler.headers)
        if status == 200 and method == "DELETE":
            self.objects.pop(path, None)
        if method == "HEAD" and status == 200 and path not in self.objects:
            status = 404
        body = (
            f"<Error><Code>{code}</Code><Message>about arn:aws:iam::1234:user/x</Message></Error>".encode()
            if code
            else b""
        )
        handler.send_response(status)
        if method == "HEAD" and status == 200:
            data, headers = self.objects[path]
            handler.send_header(
                "Content-Length", str(len(data) if self.size_said is None else self.size_said)
            )
            handler.send_header(
                "x-amz-checksum-sha256", self.checksum_said or headers["x-amz-checksum-sha256"]
            )
        else:
            handler.send_header("Content-Length", "0" if method == "HEAD" else str(len(body)))
        handler.end_headers()
        if method != "HEAD":
            handler.wfile.write(body)


@contextmanager
def serving_storage() -> Iterator[Storage]:
    """A `Storage` at its `endpoint`."""
    made = Storage()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            made.answer(self)

        do_HEAD = do_DELETE = do_PUT

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    made.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
