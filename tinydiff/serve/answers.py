"""The answers that describe jobs: every member once, with its schema and where its value comes from."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from tinydiff.entries import Entries, EntryDict
from tinydiff.serve.errors import Refusal, body, of_failure
from tinydiff.serve.jobs import DONE, Job, Kind, Output
from tinydiff.serve.schemas import (
    Schema,
    array,
    boolean,
    choice,
    free,
    integer,
    nullable,
    number,
    obj,
    string,
)
from tinydiff.serve.service import QueuePlace, Service

NO_USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}
"""OpenAI's token counts of a job that has none; the official client expects them."""


class View(NamedTuple):
    """A job for one client."""

    service: Service
    job: Job
    place: QueuePlace | None
    """The job's place in the queue; None for a finished job."""
    base: str
    """The URL under which the client reaches this server."""


class Member(NamedTuple):
    """A member of an answer."""

    schema: Schema
    value: Callable[[View], Any]


Members = dict[str, Member]


def render(members: Members, service: Service, job: Job, base: str) -> EntryDict:
    """The answer about a job. base: the URL under which the client reaches this server."""
    place = None if job.status in DONE else service.scheduler.place(job)
    view = View(service, job, place, base)
    return {**{name: member.value(view) for name, member in members.items()}, **end_user(job)}


def schema(members: Members) -> Schema:
    """The schema of an answer."""
    return obj({name: member.schema for name, member in members.items()}, optional=END_USER)


END_USER: Schema = {
    "user": string("The identifier of the end user that the request gave."),
    "safety_identifier": string("The identifier of the end user that the request gave; OpenAI's newer name."),
}
"""Members that an answer has if the request had them."""


def end_user(job: Job) -> dict[str, str]:
    """What the client said of its end user."""
    return {name: job.answer[name] for name in END_USER if name in job.answer}


# --- outputs ---

_URL = string("A URL of the file that is valid for a limited time.")
_OUTPUT: Schema = {
    "seed": integer("The seed of this output."),
    "media_type": string("The media type of the file."),
    "warning": string("Why the file is not in object storage. This server keeps it."),
}
_IMAGE_ITEM = obj({"url": _URL, **_OUTPUT}, ("url", "seed"))
_VIDEO_ITEM = obj({
    "seed": _OUTPUT["seed"],
    "media_type": _OUTPUT["media_type"],
    "bytes": integer("Size of the file.", 0),
    "url": _URL,
    "warning": nullable(_OUTPUT["warning"]),
})  # fmt: skip


def _output(output: Output) -> EntryDict:
    warning = {"warning": output.warning} if output.warning else {}
    return {"seed": output.seed, "media_type": output.media_type, **warning}


def _url(view: View, output: Output) -> str:
    expires = view.job.expires_at
    lifetime = None if expires is None else max(0.0, expires - time.time())
    return output.url or view.service.files.url(output.file, view.base, lifetime)


def _image_data(view: View) -> list[EntryDict]:
    return [{"url": _url(view, output), **_output(output)} for output in view.job.outputs]


def _response_data(view: View) -> list[EntryDict]:
    """The images in the form that the request asked for."""
    if view.job.answer.get("response_format") == "url":
        return _image_data(view)
    return [{"b64_json": _in_base64(view.service, output), **_output(output)} for output in view.job.outputs]


def _in_base64(service: Service, output: Output) -> str:
    path = service.files.path(output.file)
    if path is None:
        raise Refusal(404, "file_expired", "the image is no longer kept here")
    return base64.b64encode(path.read_bytes()).decode()


def _video_outputs(view: View) -> list[EntryDict]:
    videos = [output for output in view.job.outputs if output.variant == "content"]
    return [
        {**_output(output), "bytes": output.size, "url": _url(view, output), "warning": output.warning}
        for output in videos
    ]


# --- members ---


def _of_answer(name: str, default: str | None = None) -> Callable[[View], Any]:
    return lambda view: view.job.answer.get(name, default)


def _of_result(name: str) -> Callable[[View], Any]:
    return lambda view: view.job.result.get(name)


def _whole_seconds(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)


def _model(view: View) -> str:
    return view.job.model or view.service.name


_TIME = integer("Seconds since 1970.")


def _job(kind: Kind) -> Members:
    """Members of every job."""
    return {
        "id": Member(string("The id of the job."), lambda view: view.job.id),
        "object": Member(choice("The kind of this object.", kind), lambda view: kind),
        "model": Member(string("The name of the model."), _model),
        "status": Member(
            choice("The state of the job.", "queued", "in_progress", "completed", "failed"),
            lambda view: view.job.status,
        ),
        "progress": Member(
            integer("Completed share of the job in percent.", 0, 100), lambda view: view.job.progress
        ),
        "created_at": Member(_TIME, lambda view: int(view.job.created_at)),
        "completed_at": Member(nullable(_TIME), lambda view: _whole_seconds(view.job.completed_at)),
        "expires_at": Member(
            nullable(integer("When the files are removed, in seconds since 1970.")),
            lambda view: _whole_seconds(view.job.expires_at),
        ),
        "prompt": Member(nullable(string("The prompt.")), lambda view: view.job.fields.get("prompt")),
        "queue_position": Member(
            nullable(integer("Number of jobs before this one in the queue.", 0)),
            lambda view: view.place and view.place.position,
        ),
        "eta_s": Member(
            nullable(number("Seconds until the job is done, from measured times.")),
            lambda view: view.place and view.place.eta_s,
        ),
    }


_PARAMETERS = Member(
    free("Every parameter with the value that was used."),
    lambda view: dict(view.job.result.get("parameters") or view.job.fields),
)
_WARNINGS = Member(
    array(string("One sentence."), "What of the request had no effect, such as a prompt that was cut."),
    lambda view: view.job.result.get("warnings") or [],
)
_TIMINGS = free("Seconds of each stage.", additionalProperties={"type": "number"})
_STEPS: Members = {
    "computed_steps": Member(
        nullable(integer("Denoising steps that were computed.")), _of_result("computed_steps")
    ),
    "skipped_steps": Member(
        nullable(integer("Denoising steps that were skipped.")), _of_result("skipped_steps")
    ),
}
_SIZE = Member(nullable(string("Width and height in pixels, as WIDTHxHEIGHT.")), _of_answer("size"))


def _seeds(view: View) -> list[int]:
    return view.job.result.get("seeds") or []


REPEATED: Members = {
    "size": _SIZE,
    "quality": Member(string("The quality of the request."), _of_answer("quality", "auto")),
    "background": Member(string("The background of the request."), _of_answer("background", "auto")),
    "output_format": Member(string("The format of the image files."), _of_answer("output_format", "png")),
}
"""Members that every answer about images repeats from the request, events of a stream too."""

SUMMARY: Members = {
    **REPEATED,
    "seed": Member(
        nullable(integer("The seed of the first image.")), lambda view: next(iter(_seeds(view)), None)
    ),
    "seeds": Member(array({"type": "integer"}, "The seed of each image."), _seeds),
    "parameters": _PARAMETERS,
    "warnings": _WARNINGS,
    "timings": Member(_TIMINGS, lambda view: view.job.result.get("seconds") or {}),
    **_STEPS,
}
"""Members of every answer about finished images."""

IMAGES: Members = {
    "created": Member(_TIME, lambda view: int(view.job.created_at)),
    "data": Member(
        array(
            obj({"b64_json": string("The file in base64."), "url": _URL, **_OUTPUT}, ("seed",)), "The images."
        ),
        _response_data,
    ),
    "usage": Member(
        free("Token counts as OpenAI has them. Nothing is billed by them."),
        lambda view: view.job.result.get("usage", NO_USAGE),
    ),
    "id": Member(string("The id of the job."), lambda view: view.job.id),
    "model": Member(string("The name of the model."), _model),
    **SUMMARY,
}
"""OpenAI's ImagesResponse, and our members beside it."""

IMAGE: Members = {
    **_job("image"),
    "error": Member(
        nullable({"$ref": "#/components/schemas/Error/properties/error"}),
        lambda view: (error := view.job.error) and body(400, error.code, error.message, error.param)["error"],
    ),
    **SUMMARY,
    "data": Member(array(_IMAGE_ITEM, "The images."), _image_data),
}
"""A job that makes images."""

_VIDEO_ERROR = obj({
    "code": string("Why the job failed, in one word; cancelled is one of them."),
    "message": string("Why the job failed, in one sentence."),
})  # fmt: skip

VIDEO: Members = {
    **_job("video"),
    "size": _SIZE,
    "seconds": Member(nullable(string("Length of the video in seconds.")), _of_answer("seconds")),
    "remixed_from_video_id": Member(
        nullable(string("The video that this one is a remix of.")), lambda view: view.job.remixed_from
    ),
    "error": Member(
        nullable(_VIDEO_ERROR),
        lambda view: (error := view.job.error) and {"code": error.code, "message": error.message},
    ),
    "parameters": _PARAMETERS,
    "seeds": Member(nullable(array({"type": "integer"}, "The seed of each video.")), _of_result("seeds")),
    "warnings": _WARNINGS,
    "timings": Member(nullable(_TIMINGS), _of_result("seconds")),
    **_STEPS,
    "outputs": Member(array(_VIDEO_ITEM, "The videos."), _video_outputs),
}
"""A job that makes videos: OpenAI's Video, and our members beside it."""


def describe(service: Service, job: Job, base: str) -> EntryDict:
    """The state of a job. base: the URL under which the client reaches this server."""
    return render(IMAGE if job.kind == "image" else VIDEO, service, job, base)


def finished_images(service: Service, job: Job, base: str) -> EntryDict:
    """The answer to a client that waited for images. Raises Refusal for a job that failed."""
    if job.error is not None:
        raise of_failure(job.error)
    return render(IMAGES, service, job, base)


def repeated(service: Service, job: Job) -> Entries:
    """The members of REPEATED for the events of a stream."""
    view = View(service, job, None, "")
    return {name: member.value(view) for name, member in REPEATED.items()}


# --- other answers ---

VIDEO_LIST = obj({
    "object": choice("The kind of this object.", "list"),
    "data": array({"$ref": "#/components/schemas/Video"}, "One page of videos."),
    "first_id": nullable(string("The id of the first video on this page.")),
    "last_id": nullable(string("The id of the last video on this page; the next page starts after it.")),
    "has_more": {"type": "boolean", "description": "Whether there is another page."},
})  # fmt: skip

ERROR = obj({
    "error": obj({
        "message": string("One sentence that names the field, the value and what is allowed."),
        "type": string("The kind of error, by OpenAI's names."),
        "param": nullable(string("The field with the error.")),
        "code": nullable(string("The cause of the error, in one word.")),
    })
})  # fmt: skip

MODEL = obj({
    "id": string("The name of the model, for the field `model` of requests."),
    "loaded": boolean("Whether its weights are on the device."),
    "object": choice("The kind of this object.", "model"),
    "created": integer("When the server started, in seconds since 1970."),
    "owned_by": string("Always tinydiff."),
    "root": string("The name under which the model was released."),
    "parent": nullable(string("Always null.")),
    "task_type": string("The task by SGLang's names."),
    "num_gpus": integer("Number of GPUs that run the model.", 0),
    "device": string("The device that runs the model."),
    "dit_precision": string("The precision of the denoiser's weights."),
    "vae_precision": string("The precision of the autoencoder's weights."),
    "precisions": free("The precision of each component's weights."),
    "quantization": free("The 8-bit types in which weights of components stay, such as fp8."),
    "pipeline_name": string("The model's family."),
    "pipeline_class": string("The pipeline's class in diffusers."),
    "parameters": {"description": "Number of parameters of the denoiser."},
    "task_types": array(string("A task."), "All tasks: T2I, I2I, T2V, I2V."),
    "defaults": free("The values of fields that a request leaves out."),
    "sizes": free("The default size, what sizes must be multiples of, and the largest sizes."),
    "input_images": free("How many input images a request may have, and how the model uses them."),
})  # fmt: skip
