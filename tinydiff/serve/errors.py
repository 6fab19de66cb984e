"""What a client is told where something is wrong: always {"error": {"message", "type", "param", "code"}}, as
OpenAI's servers say it.

The official client repeats a request twice after 408, 409, 429 and any status from 500 on, unless the header
`x-should-retry` says no. So what would fail again the same way says no, and a full queue says when.
"""

from __future__ import annotations

import http
import json
import logging
import sqlite3
from collections.abc import Mapping
from typing import Any

import falcon

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
"""After how many seconds another server, or this one anew, may be there."""

DISK = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
"""SQLite's own words for a disk that keeps nothing."""

MOST_SAID = 1000
"""Characters of a message; a field's name and value come from the client, and may be long."""

FAILURES = {
    "cancelled": 409,
    "insufficient_memory": 507,
    "server_restarted": 503,
    "invalid_value": 400,
    "storage_failed": 507,
}
"""Why a job failed -> status of the answer to whom waited for it, else 500. All but a restart would fail
again.
"""


class Refusal(Exception):
    """An answer that is an error: its status, what the body says, and headers."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            status, code, message, param, headers
        )  # pickling and copying call the class with these again
        self.status, self.code, self.message, self.param, self.headers = (
            status,
            code,
            message,
            param,
            dict(headers or {}),
        )

    def __str__(self) -> str:
        return self.message


def body(status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def unknown(kind: str, id: str) -> Refusal:
    """404 for a thing that is not there, or is another key's."""
    return Refusal(404, "not_found", f"no {kind} has the id {id[:80]!r}", "id")


def of_failure(failure: Failure) -> Refusal:
    """The answer to a client that waited for a job which failed."""
    status = FAILURES.get(failure.code, 400 if failure.param else 500)
    return Refusal(
        status,
        failure.code,
        failure.message,
        failure.param,
        {} if failure.code == "server_restarted" else NO_RETRY,
    )


def of_exception(error: Exception) -> Refusal | None:
    """The answer to an exception that is known to be one, None for a fault of ours."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, UserError) and error.field == "state_dir":  # not the client's mistake
        return Refusal(507, "storage_failed", str(error)[:MOST_SAID], headers=NO_RETRY)
    if isinstance(error, UserError):
        return Refusal(400, "invalid_value", str(error)[:MOST_SAID], error.field[:80])
    if isinstance(error, Busy):
        wait = {
            "retry-after": str(max(1, round(error.seconds))),
            "retry-after-ms": str(max(1, round(1000 * error.seconds))),
        }
        return Refusal(429, "queue_full", str(error), headers=wait)
    if isinstance(error, Stopping):
        message = str(error) or "the server is going down and takes no more; try again soon"
        return Refusal(503, "stopping", message, headers={"retry-after": str(round(STOPPING_S))})
    if isinstance(error, sqlite3.OperationalError) and getattr(error, "sqlite_errorcode", 0) & 0xFF in DISK:
        return Refusal(
            507,
            "storage_failed",
            "the server cannot keep jobs: its disk is full or refuses",
            headers=NO_RETRY,
        )
    if isinstance(error, Unreachable | sqlite3.OperationalError):
        message = "the database of the jobs does not answer; try again soon"
        return Refusal(503, "store_unreachable", message, headers={"retry-after": str(round(STOPPING_S))})
    if isinstance(error, falcon.HTTPError):
        return _of_falcon(error)
    return None


def told(req: falcon.Request, error: Exception) -> Refusal:
    """What a client is told of any exception, and the log of one that is a fault of ours."""
    refusal = of_exception(error)
    if refusal is None:
        log.error("%s failed", req.context.get("request_id", req.path), exc_info=error)
        refusal = Refusal(500, "server_error", "the server failed; its log has more under this x-request-id")
    if isinstance(error, falcon.HTTPRouteNotFound):
        refusal = Refusal(
            404,
            "not_found",
            f"there is nothing at {req.method} {req.path[:200]}; /openapi.json lists what is",
        )
    req.context.error_code = refusal.code
    return refusal


def install(app: falcon.App) -> None:
    """Have every error of the app answered in this form."""

    def handle(req: falcon.Request, resp: falcon.Response, error: Exception, params: dict[str, Any]) -> None:
        refusal = told(req, error)
        resp.status = falcon.code_to_http_status(refusal.status)
        resp.stream, resp.data = (
            None,
            json.dumps(body(refusal.status, refusal.code, refusal.message, refusal.param)).encode(),
        )
        resp.content_type = falcon.MEDIA_JSON
        for name, value in refusal.headers.items():
            resp.set_header(name, value)

    app.add_error_handler(Exception, handle)
    app.add_error_handler(falcon.HTTPError, handle)  # else falcon's own, which is more special, goes first


def _of_falcon(error: falcon.HTTPError) -> Refusal:
    status = error.status_code
    said = ". ".join(
        part.rstrip(".")
        for part in (error.title, error.description)
        if part and not part.startswith(str(status))
    )
    pairs = error.headers.items() if isinstance(error.headers, Mapping) else error.headers or ()
    code = CODES.get(status, "server_error" if status >= 500 else "invalid_request")
    return Refusal(
        status, code, said or _phrase(status), None, {str(name): str(value) for name, value in pairs}
    )


def _phrase(status: int) -> str:
    return http.HTTPStatus(status).phrase.lower()
