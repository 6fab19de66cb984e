"""HTTP connections on top of waitress, with limits that waitress lacks.

One thread (waitress's loop) reads requests and sends answers; pools of threads make the answers. Three rules
keep the server reachable:

- No thread waits for a client. Unread answers wait in a buffer, the loop itself sends files, and it serves
  all connections in turn.
- Requests that never wait have threads of their own: health probes, refusals and reads.
- An inactive connection is closed after a time limit. When there are too many connections, the one that is
  idle for longest is closed.

A body is read only if the headers allow the request (`Limits.wants_body`). Otherwise the app gets the request
without its body and refuses it, and the connection ends with the answer.
"""

from __future__ import annotations

import json
import logging
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.server import TcpWSGIServer
from waitress.task import ErrorTask, ThreadedTaskDispatcher
from waitress.wasyncore import close_all, poll2  # select would end at descriptor 1023

from tinydiff.serve.errors import Refusal, body

log = logging.getLogger(__name__)

CODES = {413: "request_too_large", 431: "headers_too_large", 501: "not_supported", 500: "server_error"}

PROBES = ("/liveness", "/health", "/health_generate", "/ready", "/metrics")
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")

MOST_HEADERS = 8192
"""Bytes of a request's first line and headers together."""
MOST_FRAMING = 2**16
"""Bytes of a chunked body, beyond as many as its content has, that only say where chunks end."""
MOST_LINE = 1024
"""Bytes of a line that says how long a chunk is."""
MOST_UNREAD = 2**26
"""Bytes of an answer in parts, a stream of events, that wait for their client; then the thread that makes
them waits too.
"""
MOST_THROWN_AWAY = 2**27
"""Bytes of a refused body that are read and thrown away; a connection that ends earlier may take the answer
with it.
"""
TURN = 2**20
"""Bytes that one connection is sent before others have their turn."""

HEADERS_S = 15.0
"""Seconds for the headers of a request to come."""
BODY_S, BODY_PACE = 30.0, 500.0
"""A body has so many seconds, and one more for each BODY_PACE bytes that came."""
KEPT_S = 120.0
"""Seconds that a connection is kept open between two requests."""
STALLED_S = 60.0
"""Seconds without a byte read after which a client that is owed some is given up."""
LINGER_S = 5.0
"""Seconds that a refused body is read and thrown away, so that its sender gets to read the answer."""


@dataclass(frozen=True)
class Limits:
    """Limits of a server for its clients."""

    threads: int
    """Threads for requests that may wait, such as image generations."""
    body: int
    """Largest body in bytes."""
    connections: int
    """Open connections. At most about half are answered at once, so an idle one can always be closed."""
    wants_body: Callable[[str, Callable[[str], str | None], int | None], bool]
    """(method, header by name, announced length) -> whether the body of such a request is to be read."""
    readers: int = 16
    """Threads for GET, HEAD and OPTIONS, which never wait for the device."""
    probers: int = 4
    """Threads for the probes and refusals."""


class Parser(HTTPRequestParser):
    """One request as it arrives."""

    def __init__(self, adj: Adjustments, channel: Channel) -> None:
        super().__init__(adj)
        self.channel, self.begun = channel, time.time()
        self.without_body = False
        """Whether the body was skipped because the app refuses the request."""

    def received(self, data: bytes) -> int:
        """The number of bytes that belong to this request; all of them for the last one of a connection."""
        headers_known = self.headers_finished
        try:
            count = super().received(data)
        except OSError as error:
            log.error("a request's body cannot be kept: %s", error)
            self.error = cast(
                Any,
                Refusal(507, "storage_failed", "the server cannot store the body: its disk is full"),
            )
            count = 0
        if self.error is None and not headers_known and self.headers_finished and self.body_rcv is not None:
            self._let_in()
        elif self.error is None and self.chunked:
            self._check_chunks()
        if self.error is not None:
            self.completed = True
        if self.completed:
            self.expect_continue = False  # a client that waits for leave to send its body has its answer
        if self.error is not None or self.without_body:
            self.channel.deaf = True
            return len(data)
        return count

    def parse_header(self, header_plus: bytes) -> None:
        """Raises ParsingError also for headers that two servers may understand differently."""
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # an address or a length that is none
            raise ParsingError("the first line or a header cannot be read") from error
        if self.version not in ("1.0", "1.1"):
            raise ParsingError("the version of HTTP is 1.0 or 1.1")
        if self.version == "1.0" and "TRANSFER_ENCODING" in self.headers:
            raise ParsingError("HTTP/1.0 has no Transfer-Encoding")
        if self.chunked and "CONTENT_LENGTH" in self.headers:
            raise ParsingError("a body has either Content-Length or Transfer-Encoding, not both")

    def _let_in(self) -> None:
        """Skip the body if the app would refuse the request."""
        length = None if self.chunked else self.content_length
        headers: dict[str, str] = cast(Any, self.headers)
        if not self.channel.server.limits.wants_body(
            cast(Any, self.command), partial(_header, headers), length
        ):
            self.close()
            self.body_rcv, self.chunked, self.completed, self.without_body = None, False, True, True
            headers["CONNECTION"] = "close"

    def _check_chunks(self) -> None:
        """Refuse chunks with more framing than content, and endless lines, which cost time per byte."""
        found: Any = self.body_rcv
        framing = self.body_bytes_received - len(found)
        if (
            len(found.control_line) > MOST_LINE
            or len(found.trailer) > MOST_HEADERS
            or framing > MOST_FRAMING + len(found)
        ):
            self.error = cast(
                Any,
                Refusal(400, "bad_request", "the chunks of the body are too small; send larger ones"),
            )


class Refused(ErrorTask):
    """The error answer to a request that does not reach the app, in the app's form."""

    def execute(self) -> None:
        error: Any = cast(Any, self.request).error
        if not isinstance(error, Refusal):
            error = Refusal(error.code, CODES.get(error.code, "bad_request"), f"{error.reason}: {error.body}")
        said = json.dumps(body(error.status, error.code, error.message)).encode()
        self.status = f"{error.status} {error.code.replace('_', ' ')}"
        headers = {
            "Content-Type": "application/json",
            "x-request-id": f"req_{secrets.token_hex(12)}",
            **error.headers,
        }
        self.response_headers = [*self.response_headers, *headers.items()]
        self.set_close_on_finish()
        self.content_length = len(said)
        self.write(said)


class Channel(HTTPChannel):
    """A connection."""

    error_task_class = Refused
    server: Server

    def __init__(self, *args: Any, **options: Any) -> None:
        self.answered = False
        self.deaf = False
        """Whether further bytes of the client are discarded."""
        self.parting, self.parted_at, self.thrown_away = False, 0.0, 0
        self.turn = TURN
        super().__init__(*args, **options)
        self.parser_class = cast(Any, partial(Parser, channel=self))

    @property
    def close_when_flushed(self) -> bool:
        """Whether to close once all is sent.

        A client that still sends a refused body would lose the answer. So a `deaf` connection only stops
        sending, and is closed later.
        """
        return self._close_when_flushed

    @close_when_flushed.setter
    def close_when_flushed(self, value: bool) -> None:
        if value and self.deaf:
            self.parting = True
        else:
            self._close_when_flushed = value

    _close_when_flushed = False

    def received(self, data: bytes) -> bool:
        if self.deaf:
            self.thrown_away += len(data)
            self.will_close = self.will_close or self.thrown_away > MOST_THROWN_AWAY
            return False
        made = super().received(data)
        self.answered = self.answered or bool(self.requests)
        return made

    def writable(self) -> bool:
        return bool(super().writable() or (self.parting and not self.parted_at))

    def handle_write(self) -> None:
        self.turn = TURN
        super().handle_write()
        if self.parting and not self.parted_at and self.connected and not self.total_outbufs_len:
            self.parted_at = time.time()
            try:
                cast(Any, self.socket).shutdown(socket.SHUT_WR)
            except OSError:
                self.handle_close()

    def send(self, data: bytes, do_close: bool = True) -> int:
        if self.turn <= 0:
            return 0
        sent = super().send(data, do_close)
        self.turn -= sent
        return sent

    def handle_expt(self) -> None:
        self.handle_close()  # HTTP has no urgent data; it would be reported again and again

    def overdue(self, now: float) -> bool:
        """Whether the client exceeded its time limit."""
        if self.parted_at:
            return now - self.parted_at > LINGER_S
        if self.total_outbufs_len:
            return now - self.last_activity > STALLED_S
        if self.requests or self.parting:
            return False
        request = cast(Any, self.request)
        if request is not None and request.headers_finished:
            return now - request.begun > HEADERS_S + BODY_S + request.body_bytes_received / BODY_PACE
        if request is not None and self.answered:
            return now - request.begun > HEADERS_S
        return now - self.last_activity > KEPT_S if self.answered else now - self.creation_time > HEADERS_S

    def rank(self) -> tuple[bool, bool, float]:
        """The connection with the lowest rank is closed first: idle for longest, with nothing to send."""
        request = cast(Any, self.request)
        since = (
            request.begun
            if request is not None
            else self.last_activity
            if self.answered
            else self.creation_time
        )
        return bool(self.total_outbufs_len), request is not None and request.headers_finished, since


class Server(TcpWSGIServer):
    """Accepts connections, and gives each request to the pool for its kind."""

    channel_class = Channel
    active_channels: Any
    trigger: Any
    _map: Any

    def __init__(self, application: Any, sock: socket.socket, limits: Limits, name: str) -> None:
        """name: the host name of requests without a Host header."""
        self.limits = limits
        adj = Adjustments(
            sockets=[sock],
            channel_request_lookahead=1,  # notices clients that disconnect
            max_request_header_size=MOST_HEADERS + 1,
            max_request_body_size=limits.body + 2**20,  # chunks have ends too; the app counts exactly
            outbuf_high_watermark=MOST_UNREAD,
            connection_limit=limits.connections + 16,  # beyond what makes way
            server_name=name,
            ident=None,
            clear_untrusted_proxy_headers=True,
        )
        self.waiting, self.reading, self.probing = (
            _pool(count) for count in (limits.threads, limits.readers, limits.probers)
        )
        sockinfo = (sock.family, sock.type, sock.proto, sock.getsockname())
        super().__init__(
            application,
            map={},
            _sock=cast(Any, sock),
            dispatcher=self.waiting,
            adj=adj,
            bind_socket=False,
            sockinfo=cast(Any, sockinfo),
        )

    def add_task(self, task: Any) -> None:
        """Queue a connection's next request; answer 503 if an eighth of all connections wait for its pool."""
        request = task.requests[0]
        pool = self._pool(request)
        if pool is not self.probing and len(pool.queue) >= self.limits.connections // 8:
            message = "the server is overloaded; try again soon"
            request.error, pool = (
                Refusal(503, "overloaded", message, headers={"retry-after": "5"}),
                self.probing,
            )
        pool.add_task(task)

    def _pool(self, request: Any) -> ThreadedTaskDispatcher:
        if request.error is not None or "/" + request.path.strip("/") in PROBES:
            return self.probing
        if request.command in SAFE_METHODS:
            return self.reading
        return self.probing if request.without_body else self.waiting  # the app refuses it

    def run(self) -> None:
        """The loop. It closes connections only between polls: a closed descriptor may be reused at once."""
        checked = 0.0
        while self._map:
            poll2(self.adj.asyncore_loop_timeout, self._map)
            self._make_room()
            if (now := time.time()) - checked >= 1:
                checked = now
                for channel in [each for each in self.active_channels.values() if each.overdue(now)]:
                    channel.handle_close()

    def maintenance(self, now: float) -> None:
        """Does nothing, because `run` does the maintenance."""

    def end(self) -> None:
        """Stop all threads, after the loop has ended."""
        for pool in (self.waiting, self.reading, self.probing):
            pool.shutdown(timeout=2)

    def hang_up(self) -> None:
        """Close every connection and end the loop, from another thread."""
        self.trigger.pull_trigger(partial(close_all, self._map, True))

    def _make_room(self) -> None:
        while len(self.active_channels) >= self.limits.connections:
            idle = [channel for channel in list(self.active_channels.values()) if not channel.requests]
            if not idle:
                return
            min(idle, key=Channel.rank).handle_close()


def _pool(count: int) -> ThreadedTaskDispatcher:
    pool = ThreadedTaskDispatcher()
    pool.set_thread_count(count)
    return pool


def _header(headers: Mapping[str, str], name: str) -> str | None:
    return headers.get(name.upper().replace("-", "_"))
