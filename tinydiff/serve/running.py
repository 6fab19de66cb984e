"""Jobs on the device: what each has done, which starts next, and what clients are told at the end."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tinydiff.entries import Entries
from tinydiff.models.recipe import token_count
from tinydiff.records import Request, UserError
from tinydiff.runtime.foreign_run import usage as foreign_usage
from tinydiff.runtime.shortage import short_of_memory
from tinydiff.serve.jobs import Failure, Job, Output

if TYPE_CHECKING:
    from tinydiff.runtime.blueprint import Model
    from tinydiff.runtime.continuous import BatchSlot

log = logging.getLogger(__name__)

NOT_STORED = Failure("storage_failed", "the server could not store the outputs")


@dataclass(eq=False)
class RunningJob:
    """A job on the device."""

    job: Job
    request: Request
    usage: Entries
    """OpenAI's token counts: of the prompt, of input images and of outputs."""
    previews: int
    """How many previews of the first output the client wants."""
    waiting: deque[int] = field(default_factory=deque[int])
    """Indices of the outputs that have not started."""
    taken: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage -> seconds spent in it."""
    steps_each: int = 0
    """Denoising steps of an output."""
    steps: int = 0
    """Denoising steps done, over all outputs."""
    made: set[int] = field(default_factory=set[int])
    """Indices of the outputs that are decoded."""
    saved: dict[int, list[Output]] = field(default_factory=dict)
    """Index of an output -> its stored files."""

    def __post_init__(self) -> None:
        self.spent("queue", max(0.0, (self.job.started_at or self.job.created_at) - self.job.created_at))

    @property
    def total(self) -> int:
        """Denoising steps of all outputs."""
        return self.steps_each * len(self.request.seeds)

    @property
    def eta_s(self) -> float | None:
        """Seconds that the remaining steps will take at the mean speed so far; None before the first step."""
        return self.seconds["denoise"] / self.steps * (self.total - self.steps) if self.steps else None

    @property
    def files(self) -> tuple[Output, ...]:
        """Files stored so far, in the order of the outputs."""
        return tuple(output for index in sorted(self.saved) for output in self.saved[index])

    @property
    def unmade(self) -> list[int]:
        """Indices of the outputs that are not decoded."""
        return [index for index in range(len(self.request.seeds)) if index not in self.made]

    def begin(self, steps_each: int) -> None:
        """Begin, or begin again, with the outputs that are not decoded."""
        self.steps_each, self.waiting = steps_each, deque(self.unmade)
        self.steps = steps_each * len(self.made)

    def spent(self, stage: str, seconds: float) -> None:
        """Add to the seconds of a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def result(self, parameters: Entries) -> Entries:
        """What `Job.result` stores. parameters: the effective ones."""
        return {
            "parameters": dict(parameters),
            "seeds": list(self.request.seeds),
            "seconds": {name: round(seconds, 4) for name, seconds in self.seconds.items()},
            "computed_steps": self.steps,
            "skipped_steps": self.total - self.steps,
            "usage": self.usage,
            "warnings": list(parameters.get("warnings", ())),
        }


class JobTimes:
    """Mean seconds that a job takes on the device, for each kind of job. Recent jobs count most."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.seconds: dict[str, float] = {}

    def add(self, kind: str, seconds: float) -> None:
        """Add the time of a finished job."""
        self.seconds[kind] = 0.7 * self.seconds.get(kind, seconds) + 0.3 * seconds

    def until_done(self, kind: str, jobs: int) -> float | None:
        """Seconds until this many jobs are done, run in batches; None before the first job is done."""
        seconds = self.seconds.get(kind)
        return None if seconds is None else seconds * -(-jobs // self.batch_size)


def usage(model: Model, request: Request) -> Entries:
    """OpenAI's token counts for a request; an image counts as its tokens in the denoiser."""
    if model.blueprint.foreign is not None:
        return foreign_usage(model, request)
    net, vae = model.denoiser, model.autoencoder.config
    tokens = token_count(vae, request.output, net.family.patch(net.config))
    tokenizer = next(iter(model.tokenizers.values()))
    text, images = len(tokenizer.encode(request.text.prompt).ids), tokens * len(request.images.originals)
    segments = -(-request.output.decoded_frames // request.output.num_frames)
    outputs = tokens * segments * len(request.seeds)
    return {
        "input_tokens": text + images,
        "input_tokens_details": {"text_tokens": text, "image_tokens": images},
        "output_tokens": outputs,
        "total_tokens": text + images + outputs,
    }


def failure(error: BaseException, too_large: UserError | None = None) -> Failure:
    """The failure that a client sees for an exception. Details that only an operator needs are logged.

    too_large: where memory was short, what names the largest size that fits.
    """
    if isinstance(error, UserError) and error.field == "state_dir":
        log.error("the output of a job could not be stored: %s", error)
        return Failure("storage_failed", str(error))
    if isinstance(error, UserError) and error.field == "model_path":  # no client chose the model
        return Failure("server_error", str(error))
    if isinstance(error, UserError):
        return Failure("invalid_value", str(error), error.field)
    if short_of_memory(error):
        message = "the request does not fit into memory; ask for a smaller size or fewer frames"
        return Failure("insufficient_memory", message if too_large is None else str(too_large))
    log.error("a job failed", exc_info=error)
    return Failure(
        "server_error", "the job failed because of an error in the server; its log has the details"
    )


def has_room(jobs: Iterable[RunningJob], slots: Collection[BatchSlot], most: int) -> bool:
    """Whether the device may take another job.

    There are at most `most` jobs with images to denoise. One more may come while these have more images than
    the loop has slots, so that no large job keeps the others out.
    """
    waiting = {running.job.id: len(running.waiting) for running in list(jobs) if running.waiting}
    images = sum(waiting.values()) + len(slots)
    return len(waiting.keys() | {slot.job for slot in slots}) < most + (images > most)


def next_to_start(jobs: Iterable[RunningJob], slots: Collection[BatchSlot], most: int) -> RunningJob | None:
    """The job whose next image enters the loop; None where no image may.

    Order: the highest priority, then the API key with the fewest slots, then the job with the fewest slots,
    then the oldest. When all slots are taken, only a job without a slot may enter: the loop pauses another
    image for it.
    """
    by_key, by_job = Counter(slot.owner for slot in slots), Counter(slot.job for slot in slots)
    full = len(slots) >= most
    able = [running for running in list(jobs) if running.waiting and not (full and by_job[running.job.id])]

    def order(running: RunningJob) -> tuple[float, ...]:
        job = running.job
        return -job.priority, by_key[job.owner], by_job[job.id], running.taken

    return min(able, key=order, default=None)
