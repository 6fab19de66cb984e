"""Downloads of files, whole or in part, from this machine or by a redirect to object storage."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import falcon

from tinydiff.serve.errors import Refusal
from tinydiff.serve.jobs import Output
from tinydiff.serve.service import Service

RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


def base_url(service: Service, req: falcon.Request) -> str:
    """The URL under which the client reaches this server, without a final slash."""
    return (service.options.public_url or req.prefix).rstrip("/")


class FileContent:
    """A file, for a client with its signed URL, or with its id and the key that owns it."""

    public = True

    def __init__(self, service: Service) -> None:
        self.service = service

    def on_get(self, req: falcon.Request, resp: falcon.Response, id: str) -> None:
        expires, signature = req.get_param("expires"), req.get_param("signature")
        if expires is not None or signature is not None:
            if not self.service.files.verify(id, expires or "", signature or ""):
                raise Refusal(
                    403,
                    "bad_signature",
                    "the signed URL has expired or is invalid; the job's answer has a new one",
                )
        elif self.service.options.api_key and not req.context.owner:
            raise Refusal(
                401,
                "invalid_api_key",
                "the URL is not signed, so the request needs an API key: 'Authorization: Bearer KEY'",
            )
        elif not self.service.files.belongs(id, req.context.owner):
            raise expired()
        _send(self.service, req, resp, id)

    on_head = on_get


def send_output(service: Service, req: falcon.Request, resp: falcon.Response, output: Output) -> None:
    """Answer with a job's output or a redirect to object storage. Raises Refusal for an expired file."""
    _send(service, req, resp, output.file, output.url)


def _send(
    service: Service, req: falcon.Request, resp: falcon.Response, id: str, url: str | None = None
) -> None:
    path = service.files.path(id)
    if path is not None:
        with suppress(FileNotFoundError):  # removed a moment ago
            send_file(req, resp, path, service.files.media_type(id))
            return
    if (url := url or service.files.elsewhere(id)) is None:
        raise expired()
    raise falcon.HTTPFound(url)


def expired() -> Refusal:
    """404 for a file that does not exist."""
    return Refusal(404, "file_expired", "the file has expired or never existed")


def send_file(req: falcon.Request, resp: falcon.Response, path: Path, media_type: str) -> None:
    """Answer with a file, following the request's conditions and range (RFC 9110).

    A single range of bytes is answered with that range, several ranges with the whole file. Raises
    FileNotFoundError, and falcon.HTTPRangeNotSatisfiable for a range after the end.
    """
    file = path.open("rb")
    about = os.fstat(file.fileno())
    changed = datetime.fromtimestamp(int(about.st_mtime), UTC)
    tag = f"{about.st_mtime_ns:x}-{about.st_size:x}"
    resp.etag = tag
    resp.last_modified = changed
    resp.set_headers(
        {"Accept-Ranges": "bytes", "Cache-Control": "private, no-cache", "X-Content-Type-Options": "nosniff"}
    )
    if _is_current(req, tag, changed):
        file.close()
        resp.status = falcon.HTTP_304
        return
    resp.content_type = media_type
    start, stop = 0, about.st_size
    whole = req.get_header("If-Range") not in (None, f'"{tag}"', falcon.dt_to_http(changed))
    if (
        req.method == "GET"
        and not whole
        and (asked := _range(req.get_header("Range") or "", about.st_size)) is not None
    ):
        start, stop = asked
        if start >= stop:
            file.close()
            raise falcon.HTTPRangeNotSatisfiable(about.st_size)
        resp.status = falcon.HTTP_206
        resp.content_range = (start, stop - 1, about.st_size)
    resp.content_length = stop - start
    if req.method == "HEAD":
        file.close()
        return
    file.seek(start)
    resp.stream = Extent(file, stop)


def _is_current(req: falcon.Request, tag: str, changed: datetime) -> bool:
    """Whether the client has the current version of the file."""
    if req.get_header("If-None-Match") is not None:
        return any(known in ("*", tag) for known in req.if_none_match or ())
    with suppress(falcon.HTTPInvalidHeader):  # an invalid date is ignored
        since = req.if_modified_since
        return since is not None and changed <= since
    return False


def _range(text: str, size: int) -> tuple[int, int] | None:
    """The bytes [start, stop) of a Range header; empty for a range after the end, None without a range."""
    match = RANGE.fullmatch(text.strip())
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        return max(0, size - int(last)), size
    if last and int(last) < int(first):
        return None
    return int(first), min(size, int(last) + 1) if last else size


class Extent:
    """A file up to `stop`. It supports seek, so the connection loop sends it and no thread waits."""

    def __init__(self, file: BinaryIO, stop: int) -> None:
        self.file, self.stop = file, stop
        self.seek, self.tell, self.close = file.seek, file.tell, file.close

    def read(self, count: int | None = -1, /) -> bytes:
        left = max(0, self.stop - self.file.tell())
        return self.file.read(left if count is None or count < 0 else min(count, left))
