"""Videos as in OpenAI's Videos API: jobs that clients create, poll, list, download, remix and remove."""

from __future__ import annotations

import time
from dataclasses import replace

import falcon

from tinydiff.records import UserError, nearest
from tinydiff.serve.admission import admitted_job, discard, idempotency, of_model, read_job
from tinydiff.serve.answers import describe
from tinydiff.serve.body import fingerprint, integer, parameters, read_body
from tinydiff.serve.downloads import FileContent, base_url, expired, send_output
from tinydiff.serve.errors import Refusal, unknown
from tinydiff.serve.job_routes import Cancel, JobState, NotSupported, answer, owned
from tinydiff.serve.jobs import DONE, Job, new_id
from tinydiff.serve.read_fields import read_fields
from tinydiff.serve.retries import Retries
from tinydiff.serve.service import Service

VARIANTS = {"video": "content", "thumbnail": "thumbnail", "spritesheet": "spritesheet", "audio": "audio"}
"""OpenAI's names of the files of a video -> `Output.variant`."""

NOT_SUPPORTED = ("edits", "extensions", "characters")
"""Routes of OpenAI's Videos API that this server lacks."""

MOST_PER_PAGE, PER_PAGE = 100, 20
"""Most and default number of videos on a page."""

STOP_S = 5.0
"""Seconds that a DELETE waits for a running job to stop. The server that runs it is notified within them."""

Req = falcon.Request
Resp = falcon.Response


def routes(service: Service) -> list[tuple[str, object]]:
    """(route, resource) of each."""
    retries = Retries(service)
    lacking = {
        name: NotSupported(f"{name} of videos are not supported; use POST /v1/videos or a remix")
        for name in NOT_SUPPORTED
    }
    return [
        ("/v1/videos", Videos(service, retries)),
        ("/v1/videos/{id}", JobState(service, "video", stop_and_remove)),
        ("/v1/videos/{id}/content", Content(service)),
        ("/v1/videos/{id}/cancel", Cancel(service, "video")),
        ("/v1/videos/{id}/remix", Remix(service, retries)),
        ("/v1/videos/edits", lacking["edits"]),
        ("/v1/videos/extensions", lacking["extensions"]),
        ("/v1/videos/characters", lacking["characters"]),
        ("/v1/videos/characters/{id}", lacking["characters"]),
        ("/v1/files/{id}/content", FileContent(service)),
    ]


def stop_and_remove(service: Service, job: Job) -> None:
    """Remove a job and its files; a job that is not done is cancelled first."""
    if job.status not in DONE:
        job = _stopped(service, job)
    if not service.forget(job):
        raise unknown("video", job.id)


class Videos:
    """Creates videos, and lists them."""

    def __init__(self, service: Service, retries: Retries) -> None:
        self.service, self.retries = service, retries

    def on_post(self, req: Req, resp: Resp) -> None:
        job = self.retries.submit(req, read_job(self.service, req, "video"))
        answer(self.service, req, resp, job)

    def on_get(self, req: Req, resp: Resp) -> None:
        query = parameters(req, ("after", "limit", "order"))
        limit = integer(query, "limit", 1, MOST_PER_PAGE, PER_PAGE)
        after, order = query.get("after"), query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise UserError("order", f"order: {order[:80]!r} is not one of asc, desc")
        try:
            owner, ascending = req.context.owner, order == "asc"
            jobs, more = self.service.store.page("video", owner, after, limit, ascending)
        except KeyError:
            raise UserError("after", f"after: no video has the id {query['after'][:80]!r}") from None
        data = [describe(self.service, job, base_url(self.service, req)) for job in jobs]
        ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
        resp.media = {"object": "list", "data": data, **ends, "has_more": more}


class Content:
    """A file of a video: the video, its first frame or its contact sheet. index: which of several videos."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def on_get(self, req: Req, resp: Resp, id: str) -> None:
        query = parameters(req, ("variant", "index"))
        job, variant = owned(self.service, req, "video", id), query.get("variant", "video")
        if variant not in VARIANTS:
            hint = nearest(variant, VARIANTS)
            message = f"variant: {variant[:80]!r} is not one of {', '.join(VARIANTS)}{hint}"
            raise UserError("variant", message)
        if job.status != "completed":
            raise _no_content(self.service, job)
        outputs = [output for output in job.outputs if output.variant == VARIANTS[variant]]
        if not outputs and variant == "audio" and job.outputs:
            raise UserError("variant", "variant: the video has no audio file; ask for one with save_audio")
        if not outputs:
            raise expired()
        output = outputs[integer(query, "index", 0, len(outputs) - 1, 0)]
        send_output(self.service, req, resp, output)

    on_head = on_get


class Remix:
    """Makes a video again with another prompt, and another seed where one is given."""

    def __init__(self, service: Service, retries: Retries) -> None:
        self.service, self.retries = service, retries

    def on_post(self, req: Req, resp: Resp, id: str) -> None:
        source = owned(self.service, req, "video", id)
        body, form = read_body(req, int(self.service.options.max_body * 1e6))
        if other := next((name for name in body if name not in ("prompt", "seed")), None):
            message = f"{other[:80]}: a remix has only the fields prompt and seed; use /v1/videos for others"
            raise Refusal(400, "unknown_parameter", message, other[:80])
        if body.get("prompt") is None:
            raise UserError("prompt", "prompt: is missing; a remix needs a new prompt")
        options = read_fields(body, "video", form).options
        changed = {name: options[name] for name in ("prompt", "seed") if body.get(name) is not None}
        job = Job(
            id=new_id("video"),
            kind="video",
            created_at=time.time(),
            owner=source.owner,
            model=source.model,
            fields={**source.fields, **changed},
            answer={**source.answer, "fingerprint": fingerprint([id, body])},
            priority=source.priority,
            remixed_from=source.id,
            idempotency=idempotency(req),
        )
        copies = {
            name: tuple(self._copied(file, job.owner) for file in files)
            for name, files in source.inputs.items()
        }
        job = replace(job, inputs=copies)
        try:
            job = admitted_job(of_model(self.service, source.model), job)
        except BaseException:
            discard(self.service, job)
            raise
        answer(self.service, req, resp, self.retries.submit(req, job))

    def _copied(self, file: str, owner: str) -> str:
        """A copy of an input image, because each job's images are removed with the job."""
        files = self.service.files
        path = files.path(file)
        if path is None:
            message = "the input image of this video is no longer kept; create a new video with it"
            raise Refusal(404, "file_expired", message)
        return files.put(path.read_bytes(), files.media_type(file), path.name, owner)


def _stopped(service: Service, job: Job) -> Job:
    """Cancel a job; the job once it is done, or after STOP_S seconds as it is."""
    now, deadline = service.scheduler.cancel(job.id), time.monotonic() + STOP_S
    while now is not None and now.status not in DONE and time.monotonic() < deadline:
        time.sleep(0.02)
        now = service.store.get(job.id)  # not from the scheduler: another server may run the job
    return now or job


def _no_content(service: Service, job: Job) -> Refusal:
    """The answer to a request for the content of a video that has none."""
    if job.error is not None:
        message = f"the video {job.id} has no content because it failed: {job.error.message}"
        return Refusal(404, job.error.code, message)
    message = f"the video {job.id} has no content yet: it is {job.status}, {job.progress} % done"
    wait = {"openai-poll-after-ms": str(service.scheduler.poll_after_ms(job))}
    return Refusal(404, "not_ready", message, headers=wait)
