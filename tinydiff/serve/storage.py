"""Uploads outputs to object storage with the S3 API, in the background. No torch here."""

from __future__ import annotations

import base64
import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from tinydiff import environment
from tinydiff.records import UserError, nearest
from tinydiff.serve.jobs import DONE, Job, Output

if TYPE_CHECKING:
    from tinydiff.serve.files import Files
    from tinydiff.serve.store import Store

log = logging.getLogger(__name__)

TYPES = ("s3",)
NEEDED = ("S3_BUCKET_NAME", "S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY")

PAUSES_S = (1.0, 4.0, 15.0, 60.0)
"""Seconds between the attempts at an upload; there is one more attempt than pauses."""
CONNECT_S, ANSWER_S = 10.0, 60.0
"""Time limits of the storage in seconds, for a connection and for each read or write."""
MOST_WAITING = 10_000
"""Most outputs that wait for their upload."""
LINGER_S = 60.0
"""Seconds that an uploaded file stays here, for answers that still use it."""

PASSING_CODES = ("404", "RequestTimeout", "BadDigest", "XAmzContentSHA256Mismatch")
PASSING_STATUS = (408, 409, 425, 429)
"""Answers of the storage after which another attempt may succeed, beside all from 500 on.

"404" is the code of a file that is not visible yet.
"""


@dataclass(frozen=True)
class S3:
    """A bucket."""

    bucket: str
    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)
    endpoint: str | None = None
    """http(s)://host of a storage other than Amazon's."""
    region: str = "us-east-1"
    prefix: str = "tinydiff"
    """Prefix of all object names."""

    def key(self, job_id: str, name: str) -> str:
        """The object name of a job's file."""
        return f"{self.prefix}/{job_id}/{name}"

    def url(self, key: str) -> str:
        """The object's URL; public if the bucket is."""
        root = (
            f"{self.endpoint}/{self.bucket}"
            if self.endpoint
            else f"https://{self.bucket}.s3.{self.region}.amazonaws.com"
        )
        return f"{root}/{quote(key)}"


class Unconfirmed(Exception):
    """The uploaded object differs from the file."""


def from_environment() -> S3 | None:
    """The bucket of the environment (`environment.cloud_storage`); None without one.

    Raises UserError for an unknown or missing variable, and where boto3 is not installed.
    """
    found = environment.cloud_storage()
    kind = found.pop("CLOUD_STORAGE_TYPE", None)
    if kind is None:
        if found:
            raise _wrong(
                "CLOUD_STORAGE_TYPE",
                f"is not set, but {', '.join(found)} are; set it to {TYPES[0]}, or none of them",
            )
        return None
    if kind.lower() not in TYPES:
        raise _wrong(
            "CLOUD_STORAGE_TYPE", f"{kind!r} is not one of {', '.join(TYPES)}{nearest(kind.lower(), TYPES)}"
        )
    for name in NEEDED:
        if name not in found:
            raise _wrong(name, "is not set, but is required for S3")
    endpoint = found.get("S3_ENDPOINT_URL", "").rstrip("/") or None
    if endpoint is not None and not _is_endpoint(endpoint):
        raise _wrong(
            "S3_ENDPOINT_URL",
            "must be a URL such as https://minio.example.com, without a user name and password",
        )
    try:
        import boto3  # noqa: F401
    except ImportError as error:
        raise _wrong("CLOUD_STORAGE_TYPE", "s3 needs boto3; run pip install boto3") from error
    bucket, access_key, secret_key = (found[name] for name in NEEDED)
    return S3(bucket, access_key, secret_key, endpoint, found.get("S3_REGION_NAME", S3.region))


class Uploader:
    """Uploads outputs to a bucket, in threads of its own.

    After an upload the size and checksum of the object are checked. If they are right, the job's output gets
    its `url`, and after `linger` seconds the local file is replaced by a note (`Files.moved`). After the last
    attempt, or an error that would come again, the output gets a `warning` and its file stays here.

    The jobs are the only record of what is left to do: outputs without `url`. So at the start every done job
    is given to `pending`.
    """

    def __init__(
        self,
        target: S3,
        files: Files,
        store: Store,
        *,
        threads: int = 2,
        most_waiting: int = MOST_WAITING,
        pauses: tuple[float, ...] = PAUSES_S,
        answer_s: float = ANSWER_S,
        linger: float = LINGER_S,
    ) -> None:
        self._target, self._files, self._store = target, files, store
        self._most_waiting, self._pauses, self._linger = most_waiting, pauses, linger
        self._client = client(target, threads, answer_s)
        self._waiting: deque[tuple[str, Output]] = deque()
        self._removing: deque[str] = deque()  # keys of deleted jobs' outputs
        self._tracked: set[tuple[str, str]] = set()  # job and file of all that wait or are being uploaded
        self._leaving: deque[tuple[float, str, str]] = (
            deque()
        )  # when a local file goes, its id, where it lies then
        self._changed = threading.Condition()
        self._noting = threading.Lock()
        self._closing, self._given_up = False, threading.Event()
        self._threads = [
            threading.Thread(target=self._run, name=f"uploader-{k}", daemon=True) for k in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def add(self, job_id: str, output: Output) -> None:
        """Upload an output of a done job, in the background. If too many wait, the output gets a warning."""
        with self._changed:
            if self._closing or (job_id, output.file) in self._tracked:
                return
            full = len(self._waiting) >= self._most_waiting
            if not full:
                self._waiting.append((job_id, output))
                self._tracked.add((job_id, output.file))
                self._changed.notify()
        if full:
            self._note(job_id, replace(output, warning=_warning("too many wait")))

    def remove(self, job: Job) -> None:
        """Remove the outputs of a deleted job from the storage, in the background."""
        with self._changed:
            self._removing += [
                self._target.key(job.id, output.file) for output in job.outputs if output.url is not None
            ]
            self._changed.notify()

    def resume(self) -> None:
        """Upload what earlier servers left."""
        for job in self._store.every():
            if job.status in DONE:
                self.pending(job)

    def pending(self, job: Job) -> int:
        """Upload the outputs of a done job that have no `url`, and remove the local files of those that have.

        Returns the number of uploads.
        """
        left = [output for output in job.outputs if output.url is None]
        for output in left:
            self.add(job.id, output)
        with self._changed:
            for output in job.outputs:
                if output.url is not None and self._files.path(output.file) is not None:
                    self._leaving.append((time.monotonic(), output.file, output.url))
            self._changed.notify()
        return len(left)

    def close(self, seconds: float) -> int:
        """Finish waiting uploads within `seconds`; returns how many are left for the next start."""
        end = time.monotonic() + seconds
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        with self._changed:
            self._waiting.clear()
            self._given_up.set()
            return len(self._tracked)

    def _run(self) -> None:
        while (task := self._next()) is not None:
            task()

    def _next(self) -> Callable[[], None] | None:
        """Wait for the next task: remove a local file or an object, or upload. None after `close`."""
        with self._changed:
            while True:
                if self._leaving and self._leaving[0][0] <= time.monotonic():
                    _, file, url = self._leaving.popleft()
                    return partial(self._leave, file, url)
                if self._removing:
                    return partial(self._remove, self._removing.popleft())
                if self._waiting:
                    return partial(self._upload, *self._waiting.popleft())
                if self._closing:
                    return None
                self._changed.wait(
                    max(0.0, self._leaving[0][0] - time.monotonic()) if self._leaving else None
                )

    def _leave(self, file: str, url: str) -> None:
        try:
            self._files.moved(file, url)
        except UserError:  # it stays until its job expires
            log.warning("an uploaded file could not be removed here", exc_info=True)

    def _remove(self, key: str) -> None:
        try:
            self._client.delete_object(Bucket=self._target.bucket, Key=key)
        except Exception as error:
            log.warning("%s could not be removed from the storage: %s", key, error)

    def _upload(self, job_id: str, output: Output) -> None:
        try:
            if (stored := self._attempts(job_id, output)) is None:
                return
            self._note(job_id, stored)
        except Exception:
            log.exception(
                "the upload of an output of %s could not be stored; the next start uploads it again", job_id
            )
        with self._changed:
            self._tracked.discard((job_id, output.file))

    def _attempts(self, job_id: str, output: Output) -> Output | None:
        """The output with its `url` or `warning`; None if `close` came between two attempts."""
        for pause in (*self._pauses, None):
            try:
                return replace(output, url=self._uploaded(job_id, output), warning=None)
            except Exception as error:
                log.warning("an upload of %s failed: %s", job_id, error)
                if pause is None or not _may_pass(error):
                    here = self._files.path(output.file) is not None
                    return replace(
                        output,
                        warning=_warning(_reason(error))
                        if here
                        else f"the file is neither here nor in the storage: {_reason(error)}",
                    )
            if self._given_up.wait(pause):
                return None
        raise AssertionError("the last attempt returns")

    def _uploaded(self, job_id: str, output: Output) -> str:
        """Upload a file and check the object; its URL."""
        bucket, key = self._target.bucket, self._target.key(job_id, output.file)
        path, size, checksum = self._files.path(output.file), output.size, None
        if path is not None:  # else an earlier upload removed it, so the object must exist
            size, checksum, md5 = _measured(path)
            with path.open("rb") as body:
                self._client.put_object(
                    Bucket=bucket,
                    Key=key,
                    Body=body,
                    ContentType=output.media_type,
                    ContentMD5=md5,
                    ChecksumSHA256=checksum,
                )
        found = self._client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
        if found["ContentLength"] != size:
            raise Unconfirmed(f"{key} has {found['ContentLength']} bytes there instead of {size}")
        if checksum is not None and found.get("ChecksumSHA256", checksum) != checksum:
            raise Unconfirmed(f"{key} has another checksum there")
        return self._target.url(key)

    def _note(self, job_id: str, output: Output) -> None:
        """Store the new state of an output in its job."""
        with self._noting:  # other threads may update outputs of the same job
            job = self._store.get(job_id)
            outputs = (
                []
                if job is None
                else [output if other.file == output.file else other for other in job.outputs]
            )
            there = output in outputs and self._store.update_outputs(job_id, outputs)
        if not there and output.url is not None:  # the job was deleted meanwhile
            self._remove(self._target.key(job_id, output.file))
        elif output.url is not None:
            with self._changed:
                self._leaving.append((time.monotonic() + self._linger, output.file, output.url))
                self._changed.notify()


def client(target: S3, threads: int = 1, answer_s: float = ANSWER_S) -> Any:
    """boto3's client of a bucket for `threads` threads, without retries."""
    from boto3.session import Session
    from botocore.config import Config

    settings = Config(
        connect_timeout=CONNECT_S,
        read_timeout=answer_s,
        retries={
            "mode": "standard",
            "total_max_attempts": 1,  # the uploader repeats attempts itself, until the server stops
        },
        max_pool_connections=threads,
        s3={"addressing_style": "path" if target.endpoint else "auto"},
        # Many storages do not support the trailing checksums that newer clients send by default.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        ignore_configured_endpoint_urls=True,
    )
    return Session().client(
        "s3",
        aws_access_key_id=target.access_key,
        aws_secret_access_key=target.secret_key,
        endpoint_url=target.endpoint,
        region_name=target.region,
        config=settings,
    )


def _wrong(name: str, text: str) -> UserError:
    return UserError(name, f"TINYDIFF_{name} (or SGLANG_{name}): {text}")


def _is_endpoint(text: str) -> bool:
    try:
        parts = urlsplit(text)
        plain = parts.username is None and parts.port != 0 and not (parts.query or parts.fragment)
        return plain and parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        return False


def _measured(path: Path) -> tuple[int, str, str]:
    """(bytes, SHA-256, MD5) of a file, both as S3 spells them."""
    size, sha256, md5 = 0, hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(2**20):
            size += len(piece)
            sha256.update(piece)
            md5.update(piece)
    return size, base64.b64encode(sha256.digest()).decode(), base64.b64encode(md5.digest()).decode()


def _may_pass(error: Exception) -> bool:
    """Whether another attempt may succeed."""
    code, status = _answer(error)
    return code in PASSING_CODES or not 400 <= status < 500 or status in PASSING_STATUS


def _answer(error: Exception) -> tuple[str, int]:
    """(code, HTTP status) of the storage's answer; ("", 0) without one."""
    answer = getattr(error, "response", None) or {}
    return str(answer.get("Error", {}).get("Code", "")), int(
        answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    )


def _reason(error: Exception) -> str:
    """Why an upload failed, for clients: without the names of buckets and hosts, which are in the log."""
    from botocore.exceptions import ConnectionError, HTTPClientError

    code, status = _answer(error)
    if status:
        return f"the storage answered {code if not code.isdigit() else status}"
    if isinstance(error, Unconfirmed):
        return "the object differs from the file"
    return (
        "the storage does not answer"
        if isinstance(error, ConnectionError | HTTPClientError)
        else "uploading failed"
    )


def _warning(reason: str) -> str:
    return f"the upload failed and this server keeps the file: {reason}"
