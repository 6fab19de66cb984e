"""Errors as OpenAI's API answers them: {"error": {"message", "type", "param", "code"}}.

The official client repeats a request twice after 408, 409, 429 and any status from 500 on, unless the header
`x-should-retry` is "false". So errors that would come again set it to "false", and a full queue sets
`retry-after`.
"""

from __future__ import annotations

import http
import json
import logging
import sqlite3
from collections.abc import Mapping

import falcon

from tinydiff.entries import EntryDict
from tinydiff.records import UserError
from tinydiff.serve.jobs import Busy, Failure, Stopping, Unreachable

log = logging.getLogger(__name__)

NO_RETRY = {"x-should-retry": "false"}
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
CODES = {
    400: "invalid_request",
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
}
STOPPING_S = 5.0
"""Retry-After of a server that stops: until then another server, or this one restarted, may answer."""

DISK = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
"""SQLite's error codes of a disk that is full or cannot be written to."""

MOST_MESSAGE = 1000
"""Characters of a message. It may hold a name and a value from the client, which may be long."""

FAILURES = {
    "cancelled": 409,
    "insufficient_memory": 507,
    "server_restarted": 503,
    "invalid_value": 400,
    "storage_failed": 507,
}
"""Code of a failed job -> HTTP status for the client that waited; other codes give 500.

Every failure but a restart would come again.
"""


class Refusal(Exception):
    """An error answer: its status, the members of its body, and its headers."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # Pickling and copying call the class with these arguments.
        super().__init__(status, code, message, param, headers)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = dict(headers or {})

    def __str__(self) -> str:
        return self.message


def body(status: int, code: str, message: str, param: str | None = None) -> EntryDict:
    """OpenAI's error object."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def unknown(kind: str, id: str) -> Refusal:
    """404 for an id that does not exist, or belongs to another API key."""
    return Refusal(404, "not_found", f"no {kind} has the id {id[:80]!r}", "id")


def of_failure(failure: Failure) -> Refusal:
    """The answer to a client that waited for a job which failed."""
    status = FAILURES.get(failure.code, 400 if failure.param else 500)
    headers = {} if failure.code == "server_restarted" else NO_RETRY
    return Refusal(status, failure.code, failure.message, failure.param, headers)


def of_exception(error: Exception) -> Refusal | None:
    """The error answer for an exception of a known kind; None for a bug."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, UserError) and error.field == "state_dir":  # the server's own disk
        return Refusal(507, "storage_failed", str(error)[:MOST_MESSAGE], headers=NO_RETRY)
    if isinstance(error, UserError):
        return Refusal(400, "invalid_value", str(error)[:MOST_MESSAGE], error.field[:80])
    if isinstance(error, Busy):
        wait = {
            "retry-after": str(max(1, round(error.seconds))),
            "retry-after-ms": str(max(1, round(1000 * error.seconds))),
        }
        return Refusal(429, "queue_full", str(error), headers=wait)
    if isinstance(error, Stopping):
        message = str(error) or "the server is shutting down; try again soon"
        return Refusal(503, "stopping", message, headers={"retry-after": str(round(STOPPING_S))})
    if isinstance(error, sqlite3.OperationalError) and getattr(error, "sqlite_errorcode", 0) & 0xFF in DISK:
        message = "the server cannot store jobs: its disk is full or cannot be written to"
        return Refusal(507, "storage_failed", message, headers=NO_RETRY)
    if isinstance(error, Unreachable | sqlite3.OperationalError):
        message = "the job database does not answer; try again soon"
        return Refusal(503, "store_unreachable", message, headers={"retry-after": str(round(STOPPING_S))})
    if isinstance(error, falcon.HTTPError):
        return _of_falcon(error)
    return None


def answer_for(req: falcon.Request, error: Exception) -> Refusal:
    """The error answer for any exception. A bug is logged with its traceback."""
    refusal = of_exception(error)
    if refusal is None:
        log.error("%s failed", req.context.get("request_id", req.path), exc_info=error)
        refusal = Refusal(
            500,
            "server_error",
            "an error in the server; its log has the cause under this x-request-id",
        )
    if isinstance(error, falcon.HTTPRouteNotFound):
        message = f"there is no route {req.method} {req.path[:200]}; /openapi.json lists all routes"
        refusal = Refusal(404, "not_found", message)
    req.context.error_code = refusal.code
    return refusal


def install(app: falcon.App) -> None:
    """Let the app answer every error in this form."""

    def handle(req: falcon.Request, resp: falcon.Response, error: Exception, params: EntryDict) -> None:
        refusal = answer_for(req, error)
        resp.status = falcon.code_to_http_status(refusal.status)
        error_body = body(refusal.status, refusal.code, refusal.message, refusal.param)
        resp.stream, resp.data = None, json.dumps(error_body).encode()
        resp.content_type = falcon.MEDIA_JSON
        for name, value in refusal.headers.items():
            resp.set_header(name, value)

    app.add_error_handler(Exception, handle)
    app.add_error_handler(falcon.HTTPError, handle)  # else falcon's own handler comes first


def _of_falcon(error: falcon.HTTPError) -> Refusal:
    status = error.status_code
    said = ". ".join(
        part.rstrip(".")
        for part in (error.title, error.description)
        if part and not part.startswith(str(status))
    )
    pairs = error.headers.items() if isinstance(error.headers, Mapping) else error.headers or ()
    code = CODES.get(status, "server_error" if status >= 500 else "invalid_request")
    headers = {str(name): str(value) for name, value in pairs}
    return Refusal(status, code, said or http.HTTPStatus(status).phrase.lower(), headers=headers)
