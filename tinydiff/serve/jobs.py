"""The records of the server: jobs, their outputs and failures. No torch here."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Kind = Literal["image", "video"]
Status = Literal["queued", "in_progress", "completed", "failed"]
DONE: tuple[Status, ...] = ("completed", "failed")
PREFIXES: dict[Kind, str] = {"image": "img_", "video": "video_"}


@dataclass(frozen=True)
class Failure:
    """Why a job failed.

    code: "cancelled", "insufficient_memory", "server_restarted", "storage_failed", "server_error", or
    "invalid_value" for a mistake in an option.
    """

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True)
class Output:
    """An output file of a job."""

    file: str
    """The id of the file."""
    media_type: str
    size: int
    """Bytes."""
    seed: int
    variant: str = "content"
    """"content", or of a video also "thumbnail" and "spritesheet", and "audio" where it was asked for."""
    url: str | None = None
    """Its URL in object storage; None for a file on this server."""
    warning: str | None = None
    """Why the upload to object storage failed; the file is then kept here."""


@dataclass(frozen=True)
class Job:
    """One request from the queue to its files. Times are seconds since 1970. All values are JSON-able."""

    id: str
    kind: Kind
    created_at: float
    owner: str = ""
    """Fingerprint of the client's API key; "" on a server without keys. Other keys cannot see the job."""
    model: str = ""
    """The name of the model that runs it; "" on a server with one."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Sampling and encoding options, by the names of `tinydiff generate`."""
    inputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Input files: "image_path", "mask_path" or "audio_path" -> their ids."""
    answer: Mapping[str, Any] = field(default_factory=dict)
    """Fields that matter to the answer: `size`, `seconds`, `output_format`, `response_format`, `user`, ..."""
    status: Status = "queued"
    priority: int = 0
    """Jobs of higher priority run first; at equal priority API keys take turns."""
    progress: int = 0
    """Percent."""
    started_at: float | None = None
    completed_at: float | None = None
    expires_at: float | None = None
    """When the files are removed."""
    error: Failure | None = None
    outputs: tuple[Output, ...] = ()
    result: Mapping[str, Any] = field(default_factory=dict)
    """`parameters`, `seeds`, `seconds` of each stage, `computed_steps`, `skipped_steps` of a finished job."""
    remixed_from: str | None = None
    pinned: bool = False
    """Whether only the server that got the request may run it, because the client waits there."""
    server: str = ""
    """The server that runs it; for a waiting pinned job the server that will run it."""
    lease: float = 0.0
    """When other servers may take the job, unless its server renews the lease."""
    attempts: int = 0
    idempotency: str = ""
    """Hash of the Idempotency-Key, unique among an owner's unfinished jobs; "" without one."""


class Turn(NamedTuple):
    """A model's turn on a device. began: in seconds since 1970."""

    model: str
    began: float


def new_id(kind: Kind) -> str:
    """A new id of a job, which cannot be guessed."""
    return PREFIXES[kind] + secrets.token_hex(16)


def files_of(job: Job) -> list[str]:
    """Ids of all files of a job: the images it was given and the outputs it made."""
    return [*(id for ids in job.inputs.values() for id in ids), *(output.file for output in job.outputs)]


class Busy(Exception):
    """The queue is full. seconds: when to try again. why: the reason that the client is shown."""

    def __init__(self, seconds: float, why: str = "the queue is full") -> None:
        super().__init__(seconds, why)
        self.seconds, self.why = seconds, why

    def __str__(self) -> str:
        return f"{self.why}; try again in {self.seconds:.0f} s"


class Stopping(Exception):
    """The server is shutting down and takes no more jobs."""


class Unreachable(Exception):
    """The job database did not answer within `store.PATIENCE` seconds."""
