"""Images, as OpenAI's Images API has them: made from text, or from given ones, at once or as a stream of
events; and their jobs.

Every request is a job. Its client waits for it here, so the job is this server's alone, and is cancelled when
the client goes.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import falcon

from tinydiff.serve.admission import read_job
from tinydiff.serve.body import integer, parameters, switch
from tinydiff.serve.downloads import base_url, send_output
from tinydiff.serve.errors import NO_RETRY, Refusal, body, of_failure, told, unknown
from tinydiff.serve.jobs import DONE, Job, Output
from tinydiff.serve.retries import AGAIN_S, Retries
from tinydiff.serve.service import News, Service

if TYPE_CHECKING:
    import numpy

LOOK_S = 0.5
"""How often, in seconds, one looks whether the client is still there."""
KEEPALIVE_S = 10.0
"""Seconds of silence in a stream at most."""

USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}
"""OpenAI's count of tokens, which the client needs to be there. Nothing is billed by them here: `timings`
says what a request took.
"""

Req = falcon.Request
Resp = falcon.Response


def routes(service: Service) -> list[tuple[str, object]]:
    """(address, resource) of each."""
    retries = Retries(service)
    return [
        ("/v1/images/generations", Generations(service, retries)),
        ("/v1/images/edits", Edits(service, retries)),
        (
            "/v1/images/variations",
            Absent(
                "variations of an image are not supported; POST /v1/images/edits with the image and a prompt"
            ),
        ),
        ("/v1/images/{id}", Image(service)),
        ("/v1/images/{id}/content", Content(service)),
        ("/v1/images/{id}/cancel", Cancel(service)),
    ]


class Generations:
    """Images of a text."""

    def __init__(self, service: Service, retries: Retries) -> None:
        self.service, self.retries = service, retries

    def on_post(self, req: Req, resp: Resp) -> None:
        _make(self.service, self.retries, req, resp, read_job(self.service, req, "image"), "image_generation")


class Edits:
    """Images of a text and given images."""

    def __init__(self, service: Service, retries: Retries) -> None:
        self.service, self.retries = service, retries

    def on_post(self, req: Req, resp: Resp) -> None:
        job = read_job(self.service, req, "image")
        if "image_path" not in job.inputs:
            raise Refusal(
                400,
                "missing_required_parameter",
                "image: is missing; an edit is of one image or more",
                "image",
            )
        _make(self.service, self.retries, req, resp, job, "image_edit")


class Absent:
    """What OpenAI has beyond this: an answer that says so, which its clients show and do not ask for again."""

    def __init__(self, says: str) -> None:
        self.says = says

    def on_post(self, req: Req, resp: Resp, id: str = "") -> None:
        raise Refusal(404, "not_supported", self.says, headers=NO_RETRY)

    on_get = on_delete = on_post


class Image:
    """How a request for images stands; and an end to it."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def on_get(self, req: Req, resp: Resp, id: str) -> None:
        parameters(req, ())
        resp.media = state(self.service, owned(self.service, req, id), base_url(self.service, req))

    def on_delete(self, req: Req, resp: Resp, id: str) -> None:
        """Cancels a job that is not done, whose clients are then told; one that is done goes with its files."""
        job = owned(self.service, req, id)
        if job.status not in DONE:
            self.service.scheduler.cancel(id)
        else:
            self.service.forget(job)
        resp.media = {"id": id, "deleted": True, "object": "image.deleted"}


class Cancel:
    """Stop making images, within a step; what is done stays as it is."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def on_post(self, req: Req, resp: Resp, id: str) -> None:
        job = owned(self.service, req, id)
        if job.status not in DONE:
            job = self.service.scheduler.cancel(id) or job
        resp.media = state(self.service, job, base_url(self.service, req))


class Content:
    """An image itself; of several the one of `variant`, from 0; with `thumbnail` a small one of it."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def on_get(self, req: Req, resp: Resp, id: str) -> None:
        from tinydiff.io.images import read_image
        from tinydiff.serve.outputs import thumbnail

        given, job = parameters(req, ("variant", "thumbnail")), owned(self.service, req, id)
        if job.status != "completed":
            failed = f"failed: {job.error.message}" if job.error else job.status
            raise Refusal(
                404,
                job.error.code if job.error else "not_ready",
                f"the image {id} has no content: it is {failed}",
            )
        output = job.outputs[integer(given, "variant", 0, len(job.outputs) - 1, 0)]
        path = self.service.files.path(output.file) if switch(given, "thumbnail") else None
        if path is None:  # also where the image lies in object storage, which has no small one
            send_output(self.service, req, resp, output)
            return
        resp.data, resp.content_type = thumbnail(read_image(path, with_alpha=True)[None]), "image/webp"
        resp.set_headers(
            {"Cache-Control": "private, max-age=86400, immutable", "X-Content-Type-Options": "nosniff"}
        )

    on_head = on_get


def owned(service: Service, req: Req, id: str) -> Job:
    """The caller's job of this id. Raises Refusal where there is none, or another's."""
    job = service.store.get(id)
    if job is None or job.kind != "image" or job.owner != req.context.owner:
        raise unknown("image", id)
    return job


def state(service: Service, job: Job, base: str) -> dict[str, Any]:
    """A job as clients see it. base: the address that they reach this server at."""
    place = None if job.status in DONE else service.scheduler.place(job)
    return {
        "id": job.id,
        "object": "image",
        "model": service.name,
        "status": job.status,
        "progress": job.progress,
        "created_at": int(job.created_at),
        "completed_at": None if job.completed_at is None else int(job.completed_at),
        "expires_at": None if job.expires_at is None else int(job.expires_at),
        "prompt": job.fields.get("prompt"),
        "queue_position": None if place is None else place.position,
        "eta_s": None if place is None else place.eta_s,
        "error": None
        if job.error is None
        else body(400, job.error.code, job.error.message, job.error.param)["error"],
        **summary(job),
        "data": [{"url": _url(service, job, output, base), **_about(output)} for output in job.outputs],
    }


def summary(job: Job) -> dict[str, Any]:
    """What every answer says of what was made: OpenAI's words, then ours."""
    answer, made = job.answer, job.result
    seeds = made.get("seeds") or []
    return {
        "size": answer.get("size"),
        "quality": answer.get("quality", "auto"),
        "background": answer.get("background", "auto"),
        "output_format": answer.get("output_format", "png"),
        **said(job),
        "seed": seeds[0] if seeds else None,
        "seeds": seeds,
        "parameters": made.get("parameters") or dict(job.fields),
        "warnings": made.get("warnings") or [],
        "timings": made.get("seconds") or {},
        "computed_steps": made.get("computed_steps"),
        "skipped_steps": made.get("skipped_steps"),
    }


def said(job: Job) -> dict[str, str]:
    """Who asked, as the request said it."""
    return {name: job.answer[name] for name in ("user", "safety_identifier") if name in job.answer}


def finished(service: Service, job: Job, base: str) -> dict[str, Any]:
    """The answer to whom waited: OpenAI's ImagesResponse, and beside it what `summary` says. Raises Refusal
    for a job that failed.
    """
    if job.error is not None:
        raise of_failure(job.error)
    as_url = job.answer.get("response_format") == "url"
    data = [
        {"url": _url(service, job, output, base)}
        if as_url
        else {"b64_json": _base64(_bytes(service, output))}
        for output in job.outputs
    ]
    return {
        "created": int(job.created_at),
        "data": [{**shown, **_about(output)} for shown, output in zip(data, job.outputs, strict=True)],
        "usage": job.result.get("usage", USAGE),
        "id": job.id,
        "model": service.name,
        **summary(job),
    }


def _make(service: Service, retries: Retries, req: Req, resp: Resp, job: Job, event: str) -> None:
    """Queue the job and answer with its images, or with events on the way to them."""
    streams = job.answer.get("stream", False)
    job = retries.submit(req, job, job.answer.get("partial_images", 0))
    if not streams:
        resp.media = finished(service, _wait(service, retries, req, job), base_url(service, req))
        return
    resp.content_type = "text/event-stream; charset=utf-8"
    resp.set_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
    resp.stream = _events(service, retries, req, job, event)


def _wait(service: Service, retries: Retries, req: Req, job: Job) -> Job:
    """The job when it is done. A client that has gone takes the job with it, unless its patience ended: then
    it asks again.
    """
    patience, begun, gone_at = _patience(req), time.monotonic(), None
    with retries.waiting(job):
        for news in _news(service, job):
            if news is not None and news.job.status in DONE:
                return news.job
            if gone_at is None and _gone(req):
                gone_at = time.monotonic()
            if gone_at is not None and (
                gone_at - begun < patience - 1 or time.monotonic() - gone_at > AGAIN_S
            ):
                break
    raise Refusal(499, "client_gone", "the client went before its images were made")


def _events(service: Service, retries: Retries, req: Req, job: Job, event: str) -> Iterator[bytes]:
    """The stream of a job: partial images, progress where it was asked for, then one completed event for each
    image; or an error.

    Comments keep the line open: they are no events, and clients pass over them.
    """
    answer, sent, shown = job.answer, time.monotonic(), 0
    same = {
        name: value
        for name, value in summary(job).items()
        if name in ("size", "quality", "background", "output_format")
    }
    same["created_at"] = int(job.created_at)
    try:
        with retries.waiting(job):
            yield b": begun\n\n"  # the headers go with it
            for news in _news(service, job):
                if _gone(req):
                    req.context.error_code = "client_gone"
                    return
                if time.monotonic() - sent >= KEEPALIVE_S:
                    sent = time.monotonic()
                    yield b": keepalive\n\n"
                if news is None:
                    continue
                for preview in news.previews[: answer.get("partial_images", 0) - shown]:
                    picture = _base64(_preview(preview, answer.get("output_format", "png")))
                    yield _event(
                        f"{event}.partial_image",
                        {"b64_json": picture, "partial_image_index": shown, "id": job.id, **same},
                    )
                    shown += 1
                if news.job.status in DONE:
                    yield from _completed(service, news.job, event, same, base_url(service, req))
                    return
                if answer.get("progress"):
                    yield _event(f"{event}.progress", _progress(service, news))
    except Exception as error:  # the headers are gone, so it can only be told as an event
        refusal = told(req, error)
        yield _data("error", body(refusal.status, refusal.code, refusal.message, refusal.param))


def _completed(service: Service, job: Job, event: str, same: dict[str, Any], base: str) -> Iterator[bytes]:
    if job.error is not None:
        raise of_failure(job.error)
    for index, output in enumerate(job.outputs):
        one = finished(service, replace(job, outputs=(output,)), base)
        [picture] = one.pop("data")
        yield _event(f"{event}.completed", {**one, **same, **picture, "index": index})


def _news(service: Service, job: Job) -> Iterator[News | None]:
    """What is new of the job, and None when for a while there was nothing; the last is that it is done."""
    with service.scheduler.watch(job.id) as watch:
        while True:
            news = watch.next(LOOK_S)
            if news is None:
                now = service.store.get(job.id)
                if now is None:
                    raise unknown("image", job.id)
                news = News(now, 0, 0, ()) if now.status in DONE else None
            yield news


def _progress(service: Service, news: News) -> dict[str, Any]:
    place = service.scheduler.place(news.job)
    return {
        "id": news.job.id, "status": news.job.status, "progress": news.job.progress, "step": news.done, "total": news.total,
        "queue_position": place.position, "eta_s": place.eta_s,
    }  # fmt: skip


def _gone(req: Req) -> bool:
    """Whether the client closed its connection; waitress knows."""
    check = req.env.get("waitress.client_disconnected")
    return check is not None and check()


def _patience(req: Req) -> float:
    """Seconds that the official clients, Python's or JavaScript's, wait for an answer before they ask again;
    they say so.
    """
    with suppress(ValueError):
        return float(
            req.get_header("x-stainless-read-timeout") or req.get_header("x-stainless-timeout") or "inf"
        )
    return float("inf")


def _event(kind: str, told: dict[str, Any]) -> bytes:
    return _data(kind, {"type": kind, **told})


def _data(event: str, told: dict[str, Any]) -> bytes:
    return f"event: {event}\ndata: {json.dumps(told)}\n\n".encode()


def _preview(picture: numpy.ndarray, format: str) -> bytes:
    from tinydiff.io.images import encode_image

    return encode_image(picture, "." + format)


def _bytes(service: Service, output: Output) -> bytes:
    path = service.files.path(output.file)
    if path is None:
        raise Refusal(404, "file_expired", "the image is no longer kept here")
    return path.read_bytes()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _url(service: Service, job: Job, output: Output, base: str) -> str:
    lifetime = None if job.expires_at is None else max(0.0, job.expires_at - time.time())
    return output.url or service.files.url(output.file, base, lifetime)


def _about(output: Output) -> dict[str, Any]:
    """What is ours of an output in an answer."""
    return {
        "seed": output.seed,
        "media_type": output.media_type,
        **({"warning": output.warning} if output.warning else {}),
    }
