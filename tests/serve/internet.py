"""A server on loopback that plays all of the public internet, for tests of what is fetched from there."""

from __future__ import annotations

import socket
import ssl
import threading
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tinydiff.records import UserError
from tinydiff.serve import fetch as module

PUBLIC = "93.184.215.14"
PICTURE = b"\x89PNG and so on"


class Web:
    """A server on loopback that plays all of the public internet, and who was asked for."""

    def __init__(self, port: int, requests: list) -> None:
        self.port, self.requests = port, requests
        self.names: dict[str, list[list[str]]] = {}
        self.looked: list[tuple[str, int]] = []
        self.connected: list[tuple[str, int]] = []
        self.context: ssl.SSLContext | None = None

    def resolve(self, host: str, port: int, seconds: float) -> list[str]:
        """The next answer for the host (the last one again), else the system's, which knows numbers without
        asking anyone.
        """
        self.looked.append((host, port))
        answers = self.names.get(host)
        if answers is None:
            return module.resolve(host, port, seconds)
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def connect(self, address: str, port: int, name: str | None, seconds: float) -> socket.socket:
        self.connected.append((address, port))
        return module.connect("127.0.0.1", self.port, name, seconds, self.context)

    def fetch(self, url: str, most: int = 10_000, seconds: float = 5.0) -> bytes:
        return module.fetch(url, "image", most, seconds, resolve=self.resolve, connect=self.connect)

    def refused(self, url: str, **more) -> str:
        with pytest.raises(UserError) as caught:
            self.fetch(url, **more)
        assert caught.value.field == "image"
        return str(caught.value)


@contextmanager
def serving(answer, context: ssl.SSLContext | None = None):
    """A server on loopback that has every request answered by `answer(handler)`."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            requests.append((self.path, dict(self.headers)))
            answer(self)
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=partial(server.serve_forever, 0.01), daemon=True).start()
    try:
        web = Web(server.server_address[1], requests)
        # The rest are numbers and localhost, which no name server is asked for.
        web.names |= {"images.example": [[PUBLIC]], "localhost.": [["127.0.0.1"]], "a b": [[]]}
        yield web
    finally:
        server.shutdown()
        server.server_close()


def send(handler: BaseHTTPRequestHandler, data: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(data)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


def redirects(locations: dict[str, str]):
    """Path -> where it leads; what leads nowhere is an image."""

    def answer(handler) -> None:
        location = locations.get(handler.path)
        if location is None:
            send(handler, PICTURE)
        else:
            send(handler, b"moved", 302, Location=location)

    return answer
