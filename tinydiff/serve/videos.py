"""Videos: jobs that are asked for, watched, listed, taken away, made again with another prompt, as OpenAI's
Videos API has it.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import falcon

from tinydiff.records import UserError, nearest
from tinydiff.serve.admission import checked, discard, idempotency, read_job
from tinydiff.serve.body import fingerprint, integer, parameters, read_body
from tinydiff.serve.downloads import FileContent, base_url, expired, send_output
from tinydiff.serve.errors import Refusal, unknown
from tinydiff.serve.fields import read_fields
from tinydiff.serve.images import Absent, said
from tinydiff.serve.jobs import DONE, Job, Output, new_id
from tinydiff.serve.retries import Retries
from tinydiff.serve.service import Service

VARIANTS = {"video": "content", "thumbnail": "thumbnail", "spritesheet": "spritesheet"}
"""OpenAI's names of what can be downloaded -> those of a job's outputs."""

ABSENT = ("edits", "extensions", "characters")
"""What OpenAI has beyond this."""

MOST_LISTED, LISTED = 100, 20
"""Jobs on a page, at most and unless told."""

STOPPED_S = 5.0
"""How long a DELETE waits for a running job to stop; by then the server that runs it has been told."""

Req = falcon.Request
Resp = falcon.Response


def routes(service: Service) -> list[tuple[str, object]]:
    """(address, resource) of each."""
    retries = Retries(service)
    absent = {
        what: Absent(f"{what} of videos are not supported; POST /v1/videos and remix are") for what in ABSENT
    }
    return [
        ("/v1/videos", Videos(service, retries)),
        ("/v1/videos/{id}", Video(service)),
        ("/v1/videos/{id}/content", Content(service)),
        ("/v1/videos/{id}/cancel", Cancel(service)),
        ("/v1/videos/{id}/remix", Remix(service, retries)),
        ("/v1/videos/edits", absent["edits"]),
        ("/v1/videos/extensions", absent["extensions"]),
        ("/v1/videos/characters", absent["characters"]),
        ("/v1/videos/characters/{id}", absent["characters"]),
        ("/v1/files/{id}/content", FileContent(service)),
    ]


def video(service: Service, job: Job, base: str) -> dict[str, Any]:
    """A job as clients see it: all keys of OpenAI's Video, then ours. base: the address that clients reach
    this server at.
    """
    place = None if job.status in DONE else service.scheduler.place(job)
    clips = [output for output in job.outputs if output.variant == "content"]
    return {
        "id": job.id,
        "object": "video",
        "model": service.name,
        "status": job.status,
        "progress": job.progress,
        "created_at": int(job.created_at),
        "completed_at": _whole(job.completed_at),
        "expires_at": _whole(job.expires_at),
        "prompt": job.fields.get("prompt"),
        "size": job.answer.get("size"),
        "seconds": job.answer.get("seconds"),
        "remixed_from_video_id": job.remixed_from,
        "error": None if job.error is None else {"code": job.error.code, "message": job.error.message},
        "parameters": dict(job.result.get("parameters") or job.fields),
        "seeds": job.result.get("seeds"),
        "warnings": job.result.get("warnings") or [],
        "timings": job.result.get("seconds"),
        "computed_steps": job.result.get("computed_steps"),
        "skipped_steps": job.result.get("skipped_steps"),
        "queue_position": None if place is None else place.position,
        "eta_s": None if place is None else place.eta_s,
        "outputs": [_output(service, output, base, job.expires_at) for output in clips],
        **said(job),
    }


def owned(service: Service, req: Req, id: str) -> Job:
    """The caller's video of this id. Raises Refusal where there is none, or another's."""
    job = service.store.get(id)
    if job is None or job.kind != "video" or job.owner != req.context.owner:
        raise unknown("video", id)
    return job


class Videos:
    """Ask for a video, and list those that were asked for."""

    def __init__(self, service: Service, retries: Retries) -> None:
        self.service, self.retries = service, retries

    def on_post(self, req: Req, resp: Resp) -> None:
        _tell(self.service, req, resp, self.retries.submit(req, read_job(self.service, req, "video")))

    def on_get(self, req: Req, resp: Resp) -> None:
        query = parameters(req, ("after", "limit", "order"))
        limit, order = integer(query, "limit", 1, MOST_LISTED, LISTED), query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise UserError("order", f"order: {order[:80]!r} is not one of asc, desc")
        try:
            jobs, more = self.service.store.page(
                "video", req.context.owner, query.get("after"), limit, order == "asc"
            )
        except KeyError:
            raise UserError(
                "after", f"after: there is no video {query['after'][:80]!r} to go on from"
            ) from None
        data = [video(self.service, job, base_url(self.service, req)) for job in jobs]
        ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
        resp.media = {"object": "list", "data": data, **ends, "has_more": more}


class Video:
    """How a video stands; and away with it."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def on_get(self, req: Req, resp: Resp, id: str) -> None:
        parameters(req, ())
        _tell(self.service, req, resp, owned(self.service, req, id))

    def on_delete(self, req: Req, resp: Resp, id: str) -> None:
        """A video that is not done is cancelled first."""
        job = owned(self.service, req, id)
        if job.status not in DONE:
            job = _stopped(self.service, job)
        if not self.service.forget(job):
            raise unknown("video", id)
        resp.media = {"id": id, "deleted": True, "object": "video.deleted"}


class Cancel:
    """Stop a video, within a step; one that is done stays as it is."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def on_post(self, req: Req, resp: Resp, id: str) -> None:
        job = owned(self.service, req, id)
        if job.status not in DONE:
            job = self.service.scheduler.cancel(id) or job
        _tell(self.service, req, resp, job)


class Content:
    """The video itself, its first frame or its contact sheet; of several videos the one of `index`."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def on_get(self, req: Req, resp: Resp, id: str) -> None:
        query = parameters(req, ("variant", "index"))
        job, variant = owned(self.service, req, id), query.get("variant", "video")
        if variant not in VARIANTS:
            raise UserError(
                "variant",
                f"variant: {variant[:80]!r} is not one of {', '.join(VARIANTS)}{nearest(variant, VARIANTS)}",
            )
        if job.status != "completed":
            raise _not_there(self.service, job)
        found = [output for output in job.outputs if output.variant == VARIANTS[variant]]
        if not found:
            raise expired()
        send_output(self.service, req, resp, found[integer(query, "index", 0, len(found) - 1, 0)])

    on_head = on_get


class Remix:
    """The same video with another prompt, and another seed where one is given."""

    def __init__(self, service: Service, retries: Retries) -> None:
        self.service, self.retries = service, retries

    def on_post(self, req: Req, resp: Resp, id: str) -> None:
        source = owned(self.service, req, id)
        body, form = read_body(req, int(self.service.options.max_body * 1e6))
        if other := next((name for name in body if name not in ("prompt", "seed")), None):
            message = f"{other[:80]}: a remix takes prompt and seed, and keeps the rest; another video is asked for at /v1/videos"
            raise Refusal(400, "unknown_parameter", message, other[:80])
        if body.get("prompt") is None:
            raise UserError("prompt", "prompt: is missing; a remix is the video with another one")
        said = read_fields(body, "video", form).fields
        changed = {name: said[name] for name in ("prompt", "seed") if body.get(name) is not None}
        job = replace(
            source, id=new_id("video"), created_at=time.time(), fields={**source.fields, **changed}, remixed_from=source.id,
            answer={**source.answer, "fingerprint": fingerprint([id, body])}, idempotency=idempotency(req),
            status="queued", progress=0, started_at=None, completed_at=None, expires_at=None, error=None, outputs=(), result={},
            server="", lease=0.0, attempts=0,
        )  # fmt: skip
        job = replace(
            job,
            inputs={
                name: tuple(self._copied(file, job.owner) for file in files)
                for name, files in source.inputs.items()
            },
        )
        try:
            job = checked(self.service, job)
        except BaseException:
            discard(self.service, job)
            raise
        _tell(self.service, req, resp, self.retries.submit(req, job))

    def _copied(self, file: str, owner: str) -> str:
        """A given image once more, for it goes with the job that it was given for."""
        files = self.service.files
        path = files.path(file)
        if path is None:
            raise Refusal(
                404,
                "file_expired",
                "the image that this video was made from is no longer kept; give it anew at /v1/videos",
            )
        return files.put(path.read_bytes(), files.media_type(file), path.name, owner)


def _tell(service: Service, req: Req, resp: Resp, job: Job) -> None:
    """Answer with the job, and when to ask again."""
    req.context.job_id = job.id
    resp.media = video(service, job, base_url(service, req))
    if job.status not in DONE:
        resp.set_header("openai-poll-after-ms", str(service.scheduler.poll_after_ms(job)))


def _stopped(service: Service, job: Job) -> Job:
    """The job once it is cancelled, or as it is when that takes too long."""
    now, deadline = service.scheduler.cancel(job.id), time.monotonic() + STOPPED_S
    while now is not None and now.status not in DONE and time.monotonic() < deadline:
        time.sleep(0.02)  # another server may run it, so the store is asked and not the scheduler
        now = service.store.get(job.id)
    return now or job


def _not_there(service: Service, job: Job) -> Refusal:
    """What is said of the content of a video that has none."""
    if job.error is not None:
        return Refusal(
            404, job.error.code, f"the video {job.id} has no content, as it failed: {job.error.message}"
        )
    wait = {"openai-poll-after-ms": str(service.scheduler.poll_after_ms(job))}
    return Refusal(
        404,
        "not_ready",
        f"the video {job.id} has no content yet: it is {job.status}, {job.progress} % done",
        headers=wait,
    )


def _output(service: Service, output: Output, base: str, expires_at: float | None) -> dict[str, Any]:
    """A video of a job as its answer shows it."""
    lifetime = None if expires_at is None else max(0.0, expires_at - time.time())
    return {
        "seed": output.seed,
        "media_type": output.media_type,
        "bytes": output.size,
        "url": output.url or service.files.url(output.file, base, lifetime),
        "warning": output.warning,
    }


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)
