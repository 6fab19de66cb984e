"""Images as in OpenAI's Images API: generations and edits, answered at once or as a stream of events.

Every request is a job. Its client waits for it at this server, so only this server may run it, and the job is
cancelled when the client leaves.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import falcon

from tinydiff.entries import Entries, EntryDict
from tinydiff.serve.admission import read_job
from tinydiff.serve.answers import finished_images, repeated
from tinydiff.serve.body import integer, parameters, switch
from tinydiff.serve.downloads import base_url, send_output
from tinydiff.serve.errors import Refusal, answer_for, body, of_failure, unknown
from tinydiff.serve.job_routes import Cancel, JobState, NotSupported, owned
from tinydiff.serve.jobs import DONE, Job
from tinydiff.serve.retries import RETRY_S, Retries
from tinydiff.serve.service import JobUpdate, Service

CHECK_S = 0.5
"""Seconds between checks whether the client is still connected."""
KEEPALIVE_S = 10.0
"""Longest silence of a stream in seconds."""

NO_VARIATIONS = (
    "variations of an image are not supported; use POST /v1/images/edits with the image and a prompt"
)

Req = falcon.Request
Resp = falcon.Response


def routes(service: Service) -> list[tuple[str, object]]:
    """(route, resource) of each."""
    retries = Retries(service)
    return [
        ("/v1/images/generations", Generations(service, retries)),
        ("/v1/images/edits", Edits(service, retries)),
        ("/v1/images/variations", NotSupported(NO_VARIATIONS)),
        ("/v1/images/{id}", JobState(service, "image", cancel_or_remove)),
        ("/v1/images/{id}/content", Content(service)),
        ("/v1/images/{id}/cancel", Cancel(service, "image")),
    ]


def cancel_or_remove(service: Service, job: Job) -> None:
    """Cancel a job that is not done; remove one that is, with its files."""
    if job.status not in DONE:
        service.scheduler.cancel(job.id)
    else:
        service.forget(job)


class Generations:
    """Images from a prompt."""

    def __init__(self, service: Service, retries: Retries) -> None:
        self.service, self.retries = service, retries

    def on_post(self, req: Req, resp: Resp) -> None:
        job = read_job(self.service, req, "image")
        _run(self.service, self.retries, req, resp, job, "image_generation")


class Edits:
    """Images from a prompt and input images."""

    def __init__(self, service: Service, retries: Retries) -> None:
        self.service, self.retries = service, retries

    def on_post(self, req: Req, resp: Resp) -> None:
        job = read_job(self.service, req, "image")
        if "image_path" not in job.inputs:
            message = "image: is missing; an edit needs at least one image"
            raise Refusal(400, "missing_required_parameter", message, "image")
        _run(self.service, self.retries, req, resp, job, "image_edit")


class Content:
    """An image file. variant: its index among the job's images. thumbnail: a small version of it."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def on_get(self, req: Req, resp: Resp, id: str) -> None:
        from tinydiff.io.images import read_image
        from tinydiff.serve.outputs import thumbnail

        query, job = parameters(req, ("variant", "thumbnail")), owned(self.service, req, "image", id)
        if job.status != "completed":
            state = f"failed: {job.error.message}" if job.error else job.status
            code = job.error.code if job.error else "not_ready"
            raise Refusal(404, code, f"the image {id} has no content: it is {state}")
        output = job.outputs[integer(query, "variant", 0, len(job.outputs) - 1, 0)]
        path = self.service.files.path(output.file) if switch(query, "thumbnail") else None
        if path is None:  # also for an image in object storage, which has no thumbnail
            send_output(self.service, req, resp, output)
            return
        resp.data, resp.content_type = thumbnail(read_image(path, with_alpha=True)[None]), "image/webp"
        resp.set_headers(
            {"Cache-Control": "private, max-age=86400, immutable", "X-Content-Type-Options": "nosniff"}
        )

    on_head = on_get


def _run(service: Service, retries: Retries, req: Req, resp: Resp, job: Job, event: str) -> None:
    """Queue the job; answer with its images when it is done, or with a stream of events."""
    streams = job.answer.get("stream", False)
    job = retries.submit(req, job, job.answer.get("partial_images", 0))
    if not streams:
        job = _wait(service, retries, req, job)
        resp.media = finished_images(service, job, base_url(service, req))
        return
    resp.content_type = "text/event-stream; charset=utf-8"
    resp.set_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
    resp.stream = _events(service, retries, req, job, event)


def _wait(service: Service, retries: Retries, req: Req, job: Job) -> Job:
    """Wait until the job is done.

    When the client leaves, the job is cancelled. A client that left because its timeout ended gets RETRY_S
    seconds to ask again.
    """
    timeout, begun, left_at = _client_timeout(req), time.monotonic(), None
    with retries.waiting(job):
        for update in _updates(service, job):
            if update is not None and update.job.status in DONE:
                return update.job
            if left_at is None and _has_left(req):
                left_at = time.monotonic()
            if left_at is not None:
                timed_out = left_at - begun >= timeout - 1
                if not timed_out or time.monotonic() - left_at > RETRY_S:
                    break
    raise Refusal(499, "client_gone", "the client left before its images were done")


def _events(service: Service, retries: Retries, req: Req, job: Job, event: str) -> Iterator[bytes]:
    """The stream of a job: previews and progress if asked for, then a completed event for each image.

    An error ends the stream with an error event. Comments, which clients ignore, keep the connection open.
    """
    answer, sent, previews_sent = job.answer, time.monotonic(), 0
    same = {**repeated(service, job), "created_at": int(job.created_at)}
    try:
        with retries.waiting(job):
            yield b": begun\n\n"  # sends the headers
            for update in _updates(service, job):
                if _has_left(req):
                    req.context.error_code = "client_gone"
                    return
                if time.monotonic() - sent >= KEEPALIVE_S:
                    sent = time.monotonic()
                    yield b": keepalive\n\n"
                if update is None:
                    continue
                for preview in update.previews[: answer.get("partial_images", 0) - previews_sent]:
                    image = _encoded(preview, answer.get("output_format", "png"))
                    members = {"b64_json": image, "partial_image_index": previews_sent, "id": job.id, **same}
                    yield _event(f"{event}.partial_image", members)
                    previews_sent += 1
                if update.job.status in DONE:
                    yield from _completed(service, update.job, event, same, base_url(service, req))
                    return
                if answer.get("progress"):
                    yield _event(f"{event}.progress", _progress(service, update))
    except Exception as error:  # the status is sent, so the error becomes an event
        refusal = answer_for(req, error)
        yield _data("error", body(refusal.status, refusal.code, refusal.message, refusal.param))


def _completed(service: Service, job: Job, event: str, same: Entries, base: str) -> Iterator[bytes]:
    """The completed event of each image. Raises Refusal for a job that failed."""
    if job.error is not None:
        raise of_failure(job.error)
    for index, output in enumerate(job.outputs):
        members = finished_images(service, replace(job, outputs=(output,)), base)
        [image] = members.pop("data")
        yield _event(f"{event}.completed", {**members, **same, **image, "index": index})


def _updates(service: Service, job: Job) -> Iterator[JobUpdate | None]:
    """Updates of the job, and None after CHECK_S seconds without one. The last update is that it is done."""
    with service.scheduler.watch(job.id) as watch:
        while True:
            update = watch.next(CHECK_S)
            if update is None:
                now = service.store.get(job.id)
                if now is None:
                    raise unknown("image", job.id)
                update = JobUpdate(now, 0, 0, ()) if now.status in DONE else None
            yield update


def _progress(service: Service, update: JobUpdate) -> EntryDict:
    job, place = update.job, service.scheduler.place(update.job)
    return {
        "id": job.id,
        "status": job.status,
        "progress": job.progress,
        "step": update.done,
        "total": update.total,
        "queue_position": place.position,
        "eta_s": place.eta_s,
    }


def _has_left(req: Req) -> bool:
    """Whether the client closed its connection, which waitress knows."""
    check = req.env.get("waitress.client_disconnected")
    return check is not None and check()


def _client_timeout(req: Req) -> float:
    """Seconds that an official client waits before it asks again, from its headers; else infinity."""
    names = ("x-stainless-read-timeout", "x-stainless-timeout")  # of the Python and the JavaScript client
    with suppress(ValueError):
        return float(next((value for name in names if (value := req.get_header(name))), "inf"))
    return float("inf")


def _event(kind: str, members: Entries) -> bytes:
    return _data(kind, {"type": kind, **members})


def _data(event: str, members: Entries) -> bytes:
    return f"event: {event}\ndata: {json.dumps(members)}\n\n".encode()


def _encoded(image: Any, format: str) -> str:
    """An image, uint8 [H, W, 3], as a file in base64."""
    from tinydiff.io.images import encode_image

    return base64.b64encode(encode_image(image, "." + format)).decode()
