"""Routes that images and videos share: the state of a job, cancelling and removing it."""

from __future__ import annotations

from collections.abc import Callable

import falcon

from tinydiff.serve.answers import describe
from tinydiff.serve.body import parameters
from tinydiff.serve.downloads import base_url
from tinydiff.serve.errors import NO_RETRY, Refusal, unknown
from tinydiff.serve.jobs import DONE, Job, Kind
from tinydiff.serve.service import Service


def owned(service: Service, req: falcon.Request, kind: Kind, id: str) -> Job:
    """The client's job with this id. Raises Refusal where there is none, or it belongs to another key."""
    job = service.store.get(id)
    if job is None or job.kind != kind or job.owner != req.context.owner:
        raise unknown(kind, id)
    return job


def answer(service: Service, req: falcon.Request, resp: falcon.Response, job: Job) -> None:
    """Answer with the state of a job; for a video that is not done also with when to ask again."""
    resp.media = describe(service, job, base_url(service, req))
    if job.kind == "video":
        req.context.job_id = job.id
        if job.status not in DONE:
            resp.set_header("openai-poll-after-ms", str(service.scheduler.poll_after_ms(job)))


class JobState:
    """The state of a job, and its removal."""

    def __init__(self, service: Service, kind: Kind, remove: Callable[[Service, Job], None]) -> None:
        """remove: cancels or removes a job."""
        self.service, self.remove = service, remove
        self.kind: Kind = kind

    def on_get(self, req: falcon.Request, resp: falcon.Response, id: str) -> None:
        parameters(req, ())
        answer(self.service, req, resp, owned(self.service, req, self.kind, id))

    def on_delete(self, req: falcon.Request, resp: falcon.Response, id: str) -> None:
        self.remove(self.service, owned(self.service, req, self.kind, id))
        resp.media = {"id": id, "deleted": True, "object": f"{self.kind}.deleted"}


class Cancel:
    """Stops a job within one step; a job that is done stays as it is."""

    def __init__(self, service: Service, kind: Kind) -> None:
        self.service = service
        self.kind: Kind = kind

    def on_post(self, req: falcon.Request, resp: falcon.Response, id: str) -> None:
        job = owned(self.service, req, self.kind, id)
        if job.status not in DONE:
            job = self.service.scheduler.cancel(id) or job
        answer(self.service, req, resp, job)


class NotSupported:
    """A route of OpenAI's API that this server lacks. The answer says so, and clients do not retry it."""

    def __init__(self, message: str) -> None:
        self.message = message

    def on_post(self, req: falcon.Request, resp: falcon.Response, id: str = "") -> None:
        raise Refusal(404, "not_supported", self.message, headers=NO_RETRY)

    on_get = on_delete = on_post
