"""The OpenAPI 3.1 document of a running server, at "/openapi.json"; "/docs" draws it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from tinydiff.serve import schemas
from tinydiff.serve.pages import Document, File, policy
from tinydiff.serve.service import Service
from tinydiff.version import __version__

ABOUT = """\
Images and videos from one model, under OpenAI's addresses: its official clients work against base_url http://HOST:PORT/v1.

Every sampling option of `tinydiff generate` is a field of a request, at top level or inside `extra_body`. What is left out, or null, is \
the model's own choice; answers repeat what was used. An unknown field is an error that names it and the nearest one: nothing is ignored.

Errors are `{"error": {"message", "type", "param", "code"}}`. Where the server was started with keys, send `Authorization: Bearer KEY`."""

ERRORS = {
    400: "a field is wrong; param names it",
    401: "there is no key, or one that is not this server's",
    403: "this needs another key, or a valid address",
    404: "there is none of that name or id",
    409: "it is not in a state for this; of an image, it was cancelled",
    413: "the body is too large",
    415: "the body is of a kind that is not read",
    416: "the range lies behind the end",
    429: "the queue is full; Retry-After says when to come back",
    500: "the server failed",
    503: "the server is going down or has just restarted; come back soon",
    507: "it does not fit into the device's memory; it would fail again",
}
"""Status -> why."""

JSON, FORM, EVENTS = "application/json", "multipart/form-data", "text/event-stream"


class Answer(NamedTuple):
    """What comes back with a status."""

    says: str
    schema: Mapping[str, Any] | None = None
    """Of JSON; None where there is none."""
    files: tuple[str, ...] = ()
    """Other media types."""


class Operation(NamedTuple):
    """One way to call the server."""

    call: str
    """Method and address."""
    name: str
    says: str
    answers: Mapping[int, Answer]
    errors: tuple[int, ...] = ()
    """Statuses that can come, beside those that always can."""
    query: Mapping[str, Mapping[str, Any]] = {}
    body: Mapping[str, Mapping[str, Any]] = {}
    """Media type -> schema."""
    example: Mapping[str, Any] | None = None
    key: Literal["key", "admin", "none"] = "key"
    tag: str = ""

    @property
    def method(self) -> str:
        return self.call.partition(" ")[0]

    @property
    def path(self) -> str:
        return self.call.partition(" ")[2]


def ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def routes(service: Service) -> list[tuple[str, object]]:
    """(address, resource) of the document."""
    data = json.dumps(document(service), ensure_ascii=False).encode()
    file = File(data, "application/json", hashlib.sha256(data).hexdigest()[:16])
    return [("/openapi.json", Document(file, policy()))]


ALWAYS = (400, 403, 413, 503)
"""What may come of any request: a Host header that is none, a foreign page, a body too large, a server that
is overloaded.
"""
MADE = (400, 404, 409, 429, 500, 503, 507)
"""What may come of asking for something to be made."""
CLIPS = ("video/mp4", "video/webm", "image/gif", "image/webp", "image/png", "image/jpeg")
FILE = {
    200: Answer("the file", files=CLIPS),
    206: Answer("the part of it that Range asks for", files=CLIPS),
    302: Answer("where it lies"),
    304: Answer("as it was"),
}
NO_FILE = (400, 404, 416)
EXAMPLE = {"prompt": "a small yellow star in the centre on a purple background", "seed": 7}
FREE = {200: Answer("all of it", schemas.FREE)}


def gone(kind: str) -> dict[int, Answer]:
    """The answer to a DELETE."""
    schema = schemas.obj(
        {"id": schemas.text(""), "deleted": schemas.choice("", True), "object": schemas.choice("", kind)}
    )
    return {200: Answer("it is gone", schema)}


def pictures(name: str) -> Iterator[Operation]:
    generation = schemas.request("image", name, False, ("prompt",), without=("image", "images", "mask"))
    edit = schemas.request("image", name, True, ("prompt", "image"))
    edit_json = schemas.request("image", name, False, ("prompt", "images"), without=("image",))
    images = {200: Answer("the images; with stream, server-sent events", ref("Images"), (EVENTS,))}
    job = {200: Answer("the job", ref("Image"))}
    which = {
        "variant": schemas.whole("Which of several images, from 0.", 0),
        "thumbnail": schemas.choice(
            "Whether in small, as WebP with no side over 512 pixels.", "true", "false", default="false"
        ),
    }
    made = "Make images from given ones: start from one, paint a part of it anew with a mask, or work from references."
    yield Operation(
        "post /v1/images/generations",
        "createImage",
        "Make images.",
        images,
        MADE,
        {},
        {JSON: generation},
        EXAMPLE,
    )
    yield Operation(
        "post /v1/images/edits", "editImage", made, images, MADE, {}, {FORM: edit, JSON: edit_json}
    )
    yield Operation("get /v1/images/{id}", "image", "How a request for images stands.", job, (404,))
    says = "Stop a request that is not done; remove one that is, and its files."
    yield Operation("delete /v1/images/{id}", "deleteImage", says, gone("image.deleted"), (404,))
    says = "Stop a request within a step; who waits for it gets the code cancelled."
    yield Operation("post /v1/images/{id}/cancel", "cancelImage", says, job, (404,))
    yield Operation("get /v1/images/{id}/content", "imageContent", "An image itself.", FILE, NO_FILE, which)


def clips(name: str) -> Iterator[Operation]:
    form, body = (schemas.request("video", name, form, ("prompt",)) for form in (True, False))
    job = {200: Answer("the clip's job", ref("Video"))}
    listed = {200: Answer("a page of them", schemas.VIDEO_LIST)}
    remix = schemas.obj(
        {"prompt": schemas.text("The other prompt."), "seed": schemas.option("seed")},
        ("prompt",),
        closed=True,
    )
    page = {
        "after": schemas.text("The last id of the page before."),
        "limit": schemas.whole("How many.", 1, 100, default=20),
        "order": schemas.choice("By time of asking.", "asc", "desc", default="desc"),
    }
    which = {
        "variant": schemas.choice(
            "The video, its first frame or its contact sheet.", "video", "thumbnail", "spritesheet"
        ),
        "index": schemas.whole("Which of several videos, from 0.", 0),
    }
    signed = {
        "expires": schemas.whole("From the address.", 0),
        "signature": schemas.text("From the address."),
    }
    says = "Ask for a clip. Look at it again after as many milliseconds as openai-poll-after-ms says, until it is completed or failed."
    yield Operation("post /v1/videos", "createVideo", says, job, MADE, {}, {FORM: form, JSON: body}, EXAMPLE)
    yield Operation("get /v1/videos", "listVideos", "Your videos.", listed, (400,), page)
    yield Operation("get /v1/videos/{id}", "video", "How a video stands.", job, (400, 404))
    says = "Remove a video and its files; one that is not done is cancelled."
    yield Operation("delete /v1/videos/{id}", "deleteVideo", says, gone("video.deleted"), (404,))
    yield Operation("get /v1/videos/{id}/content", "videoContent", "The files.", FILE, NO_FILE, which)
    yield Operation(
        "post /v1/videos/{id}/cancel",
        "cancelVideo",
        "Stop a video within a step; its code is then cancelled.",
        job,
        (404,),
    )
    says = "The same video with another prompt, and another seed if you like."
    yield Operation("post /v1/videos/{id}/remix", "remixVideo", says, job, MADE, {}, {JSON: remix}, EXAMPLE)
    says = "A file, by an address that an answer gave, which needs no key and expires; or by its id."
    yield Operation(
        "get /v1/files/{id}/content", "fileContent", says, FILE, (*NO_FILE, 401, 403), signed, key="none"
    )


def model(name: str) -> Iterator[Operation]:
    models = schemas.obj({"object": schemas.choice("", "list"), "data": schemas.listed(ref("Model"))})
    listed, one = {200: Answer("a list of one", models)}, {200: Answer("the model", ref("Model"))}
    yield Operation("get /v1/models", "listModels", "The model, its defaults and limits.", listed)
    yield Operation("get /v1/models/{id}", "model", "The same by its name.", one, (404,))
    yield Operation("get /v1/model_info", "modelInfo", "What SGLang's gateway asks.", FREE)
    yield Operation("get /v1/list_loras", "listLoras", "Adapters that are loaded; there are none yet.", FREE)


def server(name: str) -> Iterator[Operation]:
    alive = schemas.obj({"status": {"type": "string"}})
    words = {name: {"type": "string"} for name in ("status", "phase")}
    status = schemas.obj(words, optional={"error": schemas.text("Why, where the status is unhealthy.")})
    state = {"phase": {"type": "string"}, "done": {"type": "integer"}, "total": {"type": "integer"}}
    ready = schemas.obj(
        {"status": {"type": "string"}, **state, "eta_s": schemas.ETA, "detail": {"type": "string"}}
    )
    told = {200: Answer("told", schemas.obj({"success": {"type": "boolean"}, "message": {"type": "string"}}))}
    healthy = {200: Answer("healthy", status), 503: Answer("only a restart helps", status)}
    begun = {200: Answer("ready", ready), 503: Answer("not yet: how far it is", ready)}
    figures = {200: Answer("Prometheus's text", files=("text/plain",))}
    nothing = {JSON: schemas.obj({}, closed=True)}
    yield Operation(
        "get /liveness", "liveness", "Whether HTTP is answered.", {200: Answer("alive", alive)}, key="none"
    )
    yield Operation(
        "get /health",
        "health",
        "Whether requests are answered, now or after the warm-up.",
        healthy,
        key="none",
    )
    yield Operation("get /ready", "ready", "Whether a request is begun at once.", begun, key="none")
    yield Operation("get /metrics", "metrics", "What the server counts.", figures, (404,), key="none")
    yield Operation("get /server_info", "serverInfo", "Its options and measurements.", FREE)
    says = "Let the model leave the device; the next job brings it back. SGLang's /release_memory_occupation is the same."
    yield Operation("post /v1/sleep", "sleep", says, told, (400, 409), body=nothing, key="admin")
    says = "Bring it back ahead of the next job. SGLang's /resume_memory_occupation is the same."
    yield Operation("post /v1/wake", "wake", says, told, (400, 409), body=nothing, key="admin")


GROUPS = {
    "Pictures": ("Made while the client waits; a client that goes away cancels.", pictures),
    "Clips": ("Jobs: asked for, then looked at until they are completed.", clips),
    "Model": ("What is served.", model),
    "Server": ("How it is.", server),
}
"""Tag -> what it is, and its operations for a model of some name."""


def operations(name: str) -> Iterator[Operation]:
    """All of them, in the order in which they are shown. name: the model's."""
    for tag, (_, group) in GROUPS.items():
        yield from (one._replace(tag=tag) for one in group(name))


def document(service: Service) -> dict[str, Any]:
    """All of it, JSON-able."""
    paths: dict[str, Any] = {}
    for one in operations(service.name):
        paths.setdefault(one.path, {})[one.method] = _described(one)
    return {
        "openapi": "3.1.0",
        "info": {"title": "tinydiff", "version": __version__, "description": ABOUT},
        "servers": [{"url": "/" if service.options.public_url is None else service.options.public_url}],
        "tags": [{"name": tag, "description": says} for tag, (says, _) in GROUPS.items()],
        "security": [{"key": []}, {}],
        "paths": paths,
        "components": {
            "schemas": {
                "Images": schemas.IMAGES,
                "Image": schemas.IMAGE,
                "Video": schemas.VIDEO,
                "Model": schemas.MODEL,
                "Error": schemas.ERROR,
            },
            "responses": {str(status): _error(says) for status, says in ERRORS.items()},
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "One of the server's keys."},
                "admin": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "The admin key, for what changes the server.",
                },
            },
        },
    }


def _described(one: Operation) -> dict[str, Any]:
    """An operation in OpenAPI's words."""
    errors = {*one.errors, *ALWAYS, *(() if one.key == "none" else (401,)), *((415,) if one.body else ())}
    inside = [part[1:-1] for part in one.path.split("/") if part.startswith("{")]
    found: dict[str, Any] = {
        "operationId": one.name,
        "tags": [one.tag],
        "summary": one.says.split(". ")[0].split(";")[0].rstrip("."),
        "description": one.says,
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in inside
        ]
        + [
            {"name": name, "in": "query", "required": False, "schema": schema}
            for name, schema in one.query.items()
        ],
        "responses": {str(status): _answer(answer) for status, answer in one.answers.items()}
        | {
            str(status): {"$ref": f"#/components/responses/{status}"}
            for status in sorted(errors - one.answers.keys())
        },
    }
    if one.key != "key":
        found["security"] = [{"admin": []}] if one.key == "admin" else []
    if one.body:
        example = {} if one.example is None else {"example": one.example}
        found["requestBody"] = {
            "required": any(schema["required"] for schema in one.body.values()),
            "content": {
                kind: {"schema": schema, **(example if kind == JSON else {})}
                for kind, schema in one.body.items()
            },
        }
    return found


def _answer(answer: Answer) -> dict[str, Any]:
    content = {kind: {} for kind in answer.files} | (
        {} if answer.schema is None else {JSON: {"schema": answer.schema}}
    )
    return {"description": answer.says, **({"content": content} if content else {})}


def _error(says: str) -> dict[str, Any]:
    return {"description": says, "content": {JSON: {"schema": ref("Error")}}}
