"""Middleware of every resource: request ids, API keys, requests of foreign pages, body sizes and the log.

A resource with `public = True` needs no key, one with `admin = True` needs the admin key. `req.context` has
`request_id`, `owner` (the fingerprint of the API key, "" without keys) and `admin`; resources may set
`job_id` for the log.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal
from urllib.parse import urlsplit

import falcon

from tinydiff.serve.body import too_large
from tinydiff.serve.connections import SAFE_METHODS
from tinydiff.serve.errors import Refusal
from tinydiff.serve.service import Service

REQUESTS = "tinydiff.serve.requests"
"""The logger that has one line for each request."""
log = logging.getLogger(REQUESTS)

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._~-]{1,255})(:[0-9]{0,5})?")
"""A Host header: a name or an IP address, and optionally a port."""

EXPOSED = ("x-request-id", "openai-poll-after-ms", "retry-after", "retry-after-ms", "x-should-retry")
"""Headers that scripts of allowed origins may read."""


def owner(key: bytes) -> str:
    """The fingerprint of an API key, which its jobs have as owner. The key itself is not stored."""
    return hashlib.sha256(key).hexdigest()[:16]


def loopback(host: str) -> bool:
    """Whether a host name or IP address is loopback."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost" or host.lower().endswith(".localhost")


class Guard:
    """The middleware."""

    def __init__(self, service: Service) -> None:
        self.service = service
        options = service.options
        self.most = int(options.max_body * 1e6)
        self.keys = [key.encode() for key in options.api_key]
        self.admin = options.admin_api_key.encode() if options.admin_api_key else None
        self.origins = set(options.cors_origin)
        self.own_host = urlsplit(options.public_url).netloc if options.public_url else None

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        request_id = req.get_header("x-request-id") or ""
        context = req.context
        context.request_id = request_id if _SANE_ID.fullmatch(request_id) else f"req_{secrets.token_hex(12)}"
        context.begun, context.owner, context.admin, context.error_code, context.job_id = (
            time.perf_counter(),
            "",
            False,
            "",
            "",
        )
        resp.set_header("x-request-id", context.request_id)
        self._check(req.method, req.get_header, req.content_length)

    def process_resource(
        self, req: falcon.Request, resp: falcon.Response, resource: Any, params: dict[str, object]
    ) -> None:
        if req.method == "OPTIONS":
            return
        key, context = _key(req.get_header), req.context
        is_admin, is_valid = self._is_admin(key), self._is_valid(key)
        keyless = not self.keys and self.admin is None
        context.admin = is_admin or keyless
        context.owner = owner(key) if is_valid and self.keys else ""
        if getattr(resource, "public", False):  # its owner is set above if the request has a key
            return
        if self.keys and not is_valid:
            raise _unauthorized("an API key of this server", key)
        if (
            not getattr(resource, "admin", False)
            or is_admin
            or (keyless and loopback(self.service.options.host))
        ):
            return
        if self.admin is None:
            message = (
                "this route needs an admin key, but the server was started without one (--admin-api-key)"
            )
            raise Refusal(403, "admin_key_missing", message)
        if is_valid:
            raise Refusal(
                403,
                "admin_required",
                "this route needs the admin key; the request has an ordinary API key",
            )
        raise _unauthorized("the admin key", key)

    def process_response(
        self, req: falcon.Request, resp: falcon.Response, resource: Any, req_succeeded: bool
    ) -> None:
        if self.origins and "*" not in self.origins:
            resp.append_header("Vary", "Origin")
        if resp.stream is not None and not hasattr(resp.stream, "read"):
            resp.stream = self._until_sent(resp.stream, req, resp)  # logged when the stream ends
        else:
            self._note(req, resp)

    def _until_sent(self, stream: Any, req: falcon.Request, resp: falcon.Response) -> Iterator[bytes]:
        try:
            yield from stream
        finally:
            self._note(req, resp)

    def _note(self, req: falcon.Request, resp: falcon.Response) -> None:
        context, seconds = req.context, time.perf_counter() - req.context.begun
        status, route = resp.status_code, req.uri_template or "none"
        self.service.metrics.request(route, req.method, status, seconds)
        entry = {
            "method": req.method, "route": route, "status": status, "seconds": round(seconds, 4),
            "request": context.request_id,
            "job": context.job_id, "owner": context.owner, "error": context.error_code,
        }  # fmt: skip
        entry = {name: value for name, value in entry.items() if value != ""}
        if self.service.options.log_format == "json":
            log.info(json.dumps({"time": round(time.time(), 3), **entry}))
        else:
            more = "".join(f" {name}={value}" for name, value in list(entry.items())[4:])
            log.info("%s %s %d %.4f s%s", req.method, route, status, seconds, more)

    def wants_body(self, method: str, get: Callable[[str], str | None], length: int | None) -> bool:
        """Whether to read the body of a request. get: a header by name. length: of Content-Length."""
        if method in SAFE_METHODS:  # their body has no meaning
            return False
        try:
            self._check(method, get, length)
        except Refusal:
            return False
        return not self.keys or self._is_valid(_key(get))

    def _check(self, method: str, get: Callable[[str], str | None], length: int | None) -> None:
        """Raise Refusal for errors that the headers alone show."""
        host = get("Host") or None
        if host is not None and HOST.fullmatch(host) is None:
            raise Refusal(400, "invalid_host", f"Host: {host[:80]!r} is not NAME or NAME:PORT")
        self._check_page(method, host, get("Origin"))
        if length is not None and length > self.most:
            raise too_large(self.most)

    def _check_page(self, method: str, host: str | None, origin: str | None) -> None:
        """Raise Refusal for a request of a foreign page to a server without API keys.

        Such a server trusts every client, and on loopback every page in a browser of this machine is one. A
        foreign host name that resolves to this machine (DNS rebinding) is refused, because a page of that
        name sends no Origin. The server's own page may do everything, other pages only if their origin is
        allowed. A request without a Host is not from a browser.
        """
        if self.keys or (origin is not None and (origin in self.origins or "*" in self.origins)):
            return
        if (
            host is not None
            and loopback(self.service.options.host)
            and not loopback(_name(host))
            and host != self.own_host
        ):
            message = f"Host: {_name(host)[:80]!r} is not a name of this server; set --public-url"
            raise Refusal(403, "unknown_host", message)
        if (
            origin is not None
            and method not in SAFE_METHODS
            and _netloc(origin) not in {host, self.own_host} - {None}
        ):
            raise Refusal(
                403,
                "foreign_origin",
                f"Origin: {origin[:80]!r} is not allowed; start the server with --cors-origin",
            )

    def _is_admin(self, key: bytes) -> bool:
        return self.admin is not None and hmac.compare_digest(key, self.admin)

    def _is_valid(self, key: bytes) -> bool:
        return (
            any([self._is_admin(key), *[hmac.compare_digest(key, each) for each in self.keys]]) and key != b""
        )  # a list: all are compared


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:  # not a URL
        return ""


def _name(host: str) -> str:
    """A Host header without its port."""
    return host if host.endswith("]") else re.sub(r":[0-9]*$", "", host)


def _key(get: Callable[[str], str | None]) -> bytes:
    kind, _, key = (get("Authorization") or "").partition(" ")
    return key.strip().encode("latin-1", "replace") if kind.lower() == "bearer" else b""


def _unauthorized(wanted: str, key: bytes) -> Refusal:
    message = (
        f"Authorization: {'what was sent is not' if key else 'send'} {wanted}, as 'Authorization: Bearer KEY'"
    )
    return Refusal(401, "invalid_api_key", message, headers={"www-authenticate": "Bearer"})


def configure_logging(level: str, form: Literal["text", "json"]) -> None:
    """Write log records of at least `level` to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        JsonFormatter() if form == "json" else logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    )
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("waitress.queue").setLevel(
        logging.ERROR
    )  # requests that wait for a thread are entry in /metrics


class JsonFormatter(logging.Formatter):
    """Formats each record as one line of JSON; records of requests are JSON already."""

    def format(self, record: logging.LogRecord) -> str:
        if record.name == REQUESTS:
            return record.getMessage()
        entry = {
            "time": round(record.created, 3),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        return json.dumps(
            entry | ({"trace": self.formatException(record.exc_info)} if record.exc_info else {})
        )
