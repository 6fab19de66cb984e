"""Clients that speak HTTP byte by byte, and the server's probes."""

import contextlib
import http.client
import json
import socket
from urllib.parse import urlsplit

import pytest

from tinydiff.serve.connections import PROBES

KEY = b"Authorization: Bearer k\r\n"
PROMPT = json.dumps({"prompt": "a red circle", "num_inference_steps": 2}).encode()


class Client:
    """A client that sends what it is told, byte by byte where that is asked for, and reads only when told."""

    def __init__(self, address):
        at = urlsplit(address)
        self.socket = socket.create_connection((at.hostname, at.port), 20)

    def send(self, data):
        self.socket.sendall(data)
        return self

    def head(self):
        """The status and the headers of the next answer."""
        data = b""
        while not data.endswith(b"\r\n\r\n"):
            data += self.socket.recv(1) or pytest.fail(f"the server closed the connection after {data!r}")
        first, *lines = data.decode("latin-1").strip().split("\r\n")
        return int(first.split()[1]), {
            name.lower(): value for name, value in (line.split(": ", 1) for line in lines)
        }

    def answer(self):
        """The next answer: status, headers, JSON."""
        status, headers = self.head()
        return status, headers, json.loads(self.read(int(headers["content-length"])))

    def read(self, count):
        data = b""
        while len(data) < count:
            data += self.socket.recv(count - len(data)) or pytest.fail("the server closed the connection")
        return data

    def rest(self):
        """All that still comes until the server closes."""
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := self.socket.recv(65536):
                data += piece
        return data


def post(path, content, *headers):
    lines = [b"POST " + path + b" HTTP/1.1", b"Host: localhost", b"Content-Type: application/json", *headers]
    return b"\r\n".join([*lines, b"Content-Length: %d" % len(content), b"", content])


def get(path, *headers):
    return b"\r\n".join([b"GET " + path + b" HTTP/1.1", b"Host: localhost", *headers, b"", b""])


def probes(address):
    """The status of each probe, each over a connection of its own."""
    found = {}
    for path in PROBES:
        connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=20)
        connection.request("GET", path)
        found[path] = connection.getresponse().status
        connection.close()
    return found


WELL = dict.fromkeys(PROBES, 200)
