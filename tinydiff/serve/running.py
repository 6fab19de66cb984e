"""A job while it is on the device, and what clients are told of it in the end."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tinydiff.models.recipe import token_count
from tinydiff.records import Request, UserError
from tinydiff.runtime.continuous import short_of_memory
from tinydiff.serve.jobs import Failure, Job, Output

if TYPE_CHECKING:
    from tinydiff.runtime.blueprint import Model
    from tinydiff.runtime.continuous import BatchSlot
    from tinydiff.runtime.pipeline import Conditioning

log = logging.getLogger(__name__)

UNKEPT = Failure("storage_failed", "the server could not keep what was made")


@dataclass(eq=False)
class Making:
    """A job on the device."""

    job: Job
    request: Request
    conditioning: Conditioning
    usage: Mapping[str, Any]
    """Tokens in OpenAI's words: of the text, of given images, and of what is made."""
    previews: int
    """How many images of the first output on its way are wanted."""
    waiting: deque[int] = field(init=False)
    """Numbers of the outputs that have not begun."""
    taken: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    """Made of all its outputs."""
    saved: dict[int, list[Output]] = field(default_factory=dict)
    """Number -> the files of outputs that are stored."""

    def __post_init__(self) -> None:
        self.waiting = deque(range(len(self.request.seeds)))
        self.spent("queue", max(0.0, (self.job.started_at or self.job.created_at) - self.job.created_at))

    @property
    def total(self) -> int:
        return self.conditioning.rows.steps * len(self.request.seeds)

    @property
    def eta_s(self) -> float | None:
        """Seconds that the steps left will take, by those made."""
        return self.seconds["denoise"] / self.steps * (self.total - self.steps) if self.steps else None

    @property
    def files(self) -> tuple[Output, ...]:
        """Of all outputs stored so far, in order."""
        return tuple(output for index in sorted(self.saved) for output in self.saved[index])

    def spent(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def result(self, told: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the job's row keeps of what was made. told: the effective parameters."""
        return {
            "parameters": dict(told),
            "seeds": list(self.request.seeds),
            "seconds": {name: round(seconds, 4) for name, seconds in self.seconds.items()},
            "computed_steps": self.steps,
            "skipped_steps": self.total - self.steps,
            "usage": self.usage,
            "warnings": list(told.get("warnings", ())),
        }


class Times:
    """How long jobs took on the device, by kind."""

    def __init__(self, side_by_side: int) -> None:
        self.side_by_side = side_by_side
        self.seconds: dict[str, float] = {}

    def took(self, kind: str, seconds: float) -> None:
        self.seconds[kind] = 0.7 * self.seconds.get(kind, seconds) + 0.3 * seconds

    def until_done(self, kind: str, jobs: int) -> float | None:
        """Seconds until so many jobs are done, made side by side; None before any was."""
        seconds = self.seconds.get(kind)
        return None if seconds is None else seconds * -(-jobs // self.side_by_side)


def usage(model: Model, request: Request) -> Mapping[str, Any]:
    net, vae = model.nets["transformer"], model.nets["vae"].config
    picture = token_count(vae, request, net.family.patch(net.config))
    tokenizer = next(iter(model.tokenizers.values()))
    text, given, made = (
        len(tokenizer.encode(request.prompt).ids),
        picture * len(request.originals),
        picture * len(request.seeds),
    )
    details = {"text_tokens": text, "image_tokens": given}
    return {
        "input_tokens": text + given,
        "input_tokens_details": details,
        "output_tokens": made,
        "total_tokens": text + given + made,
    }


def failure(error: BaseException) -> Failure:
    """What a client is told of an error; the log has what the client has no use for."""
    if isinstance(error, UserError) and error.field == "state_dir":
        log.error("a job's output could not be kept: %s", error)
        return Failure("storage_failed", str(error))
    if isinstance(error, UserError) and error.field == "model_path":  # which no client chose
        return Failure("server_error", str(error))
    if isinstance(error, UserError):
        return Failure("invalid_value", str(error), error.field)
    if short_of_memory(error):
        return Failure(
            "insufficient_memory",
            "the request does not fit into memory; ask for a smaller size or fewer frames",
        )
    log.error("a job failed", exc_info=error)
    return Failure("server_error", "making this failed; the server's log says why")


def has_room(jobs: Iterable[Making], sittings: Collection[BatchSlot], most: int) -> bool:
    """Whether another job may come onto the device: there are at most as many with images to make as seats,
    and one more while these have more images than there are seats, so that no large job keeps others out."""
    waiting = {making.job.id: len(making.waiting) for making in list(jobs) if making.waiting}
    images = sum(waiting.values()) + len(sittings)
    return len(waiting.keys() | {one.owner for one in sittings}) < most + (images > most)


def next_to_start(jobs: Iterable[Making], sittings: Collection[BatchSlot], most: int) -> Making | None:
    """The job whose next image gets a seat. Of the highest priority it is the job of the key with the fewest
    seats, then the job with the fewest. Where all seats are taken, only a job that has none gets one: the
    loop lets another image pause for it."""
    by_key, by_job = Counter(one.key for one in sittings), Counter(one.owner for one in sittings)
    full = len(sittings) >= most
    able = [making for making in list(jobs) if making.waiting and not (full and by_job[making.job.id])]

    def order(making: Making) -> tuple[float, ...]:
        job = making.job
        return -job.priority, by_key[job.owner], by_job[job.id], making.taken

    return min(able, key=order, default=None)
