"""The frozen records of the server: a job, what it made, and why it failed. No torch here."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["image", "video"]
Status = Literal["queued", "in_progress", "completed", "failed"]
DONE: tuple[Status, ...] = ("completed", "failed")
PREFIXES: dict[Kind, str] = {"image": "img_", "video": "video_"}


@dataclass(frozen=True)
class Failure:
    """Why a job failed. code: "cancelled", "insufficient_memory", "server_restarted", "storage_failed",
    "server_error" or an option's mistake, "invalid_value"."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True)
class Output:
    """A file that a job made."""

    file: str
    """Its id among the server's files."""
    media_type: str
    size: int
    """Bytes."""
    seed: int
    variant: str = "content"
    """"content", or of a video also "thumbnail" and "spritesheet"."""
    url: str | None = None
    """Where it lies in object storage; None where this server serves it."""
    warning: str | None = None
    """What went wrong in storing it elsewhere, the file being kept here."""


@dataclass(frozen=True)
class Job:
    """One request on its way from the queue to files. Times are seconds since 1970. All of it is JSON-able."""

    id: str
    kind: Kind
    created_at: float
    owner: str = ""
    """Fingerprint of the key that asked; "" where the server has no keys. Others do not see the job."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What to make: sampling options and those of encoding, by the names of `tinydiff generate`."""
    inputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Given images: "image_path" or "mask_path" -> ids of the server's files."""
    answer: Mapping[str, Any] = field(default_factory=dict)
    """What only the answer repeats or needs: `model`, `size`, `seconds`, `output_format`, `response_format`,
    `user`, ...
    """
    status: Status = "queued"
    priority: int = 0
    """Higher goes first; among equals keys take turns."""
    progress: int = 0
    """Percent."""
    started_at: float | None = None
    completed_at: float | None = None
    expires_at: float | None = None
    """When its files are removed."""
    error: Failure | None = None
    outputs: tuple[Output, ...] = ()
    result: Mapping[str, Any] = field(default_factory=dict)
    """What was made: `parameters`, `seeds`, `seconds` of each stage, `computed_steps`, `skipped_steps`."""
    remixed_from: str | None = None
    pinned: bool = False
    """Whether only the server that took the request may run it, because its client waits there."""
    server: str = ""
    """Who runs it, or for a pinned job who shall."""
    lease: float = 0.0
    """Until when that server has it to itself, unless it says so again."""
    attempts: int = 0
    idempotency: str = ""
    """What makes a repeated request the same one: unique among an owner's jobs that are not done; "" for
    none.
    """


def new_id(kind: Kind) -> str:
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
