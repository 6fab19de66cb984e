"""The OpenAPI 3.1 document of a running server, at /openapi.json. The page /docs shows it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from tinydiff.entries import Entries, EntryDict
from tinydiff.serve import answers
from tinydiff.serve.fields import option, request_schema
from tinydiff.serve.pages import Document, File, policy
from tinydiff.serve.schemas import Schema, array, choice, free, integer, nullable, number, obj, string
from tinydiff.serve.service import Service
from tinydiff.serve.videos import VARIANTS
from tinydiff.version import __version__

ABOUT = """\
Images and videos under the routes of OpenAI's API. OpenAI's official clients work with \
base_url http://HOST:PORT/v1.

Every sampling option of `tinydiff generate` is a field of a request, at top level or inside `extra_body`. \
A field that is missing or null has the model's own value; answers repeat every value that was used. \
An unknown field is an error that names it and the nearest known field.

Errors have the form `{"error": {"message", "type", "param", "code"}}`. On a server with API keys, send the \
header `Authorization: Bearer KEY`."""

ERRORS = {
    400: "A field is wrong; param names it.",
    401: "The request has no API key, or an unknown one.",
    403: "The request needs another API key, or its signed URL is invalid or has expired.",
    404: "Nothing has this name or id.",
    409: "The state of the job or the server does not allow this; code names the reason, such as cancelled.",
    413: "The body is too large.",
    415: "The media type of the body is not supported.",
    416: "The range begins after the end of the file.",
    429: "The queue is full; Retry-After has the seconds to wait.",
    500: "The server failed.",
    503: "The server is shutting down, overloaded or has just restarted; try again soon.",
    507: "The request needs more memory than the device has, or the disk is full; it would fail again.",
}
"""HTTP status -> its description."""

JSON, FORM, EVENTS = "application/json", "multipart/form-data", "text/event-stream"


class Answer(NamedTuple):
    """An answer with one status."""

    description: str
    schema: Schema | None = None
    """The schema of the JSON body; None without one."""
    files: tuple[str, ...] = ()
    """Other media types of the body."""


class Operation(NamedTuple):
    """An operation: a method of a route."""

    call: str
    """The method and the route."""
    name: str
    description: str
    answers: Mapping[int, Answer]
    errors: tuple[int, ...] = ()
    """Statuses of errors, beside those of ANY_REQUEST."""
    query: Mapping[str, Schema] = {}
    body: Mapping[str, Schema] = {}
    """Media type -> schema."""
    example: Entries | None = None
    key: Literal["key", "admin", "none"] = "key"
    tag: str = ""

    @property
    def method(self) -> str:
        return self.call.partition(" ")[0]

    @property
    def path(self) -> str:
        return self.call.partition(" ")[2]


def ref(name: str) -> dict[str, str]:
    """A reference to a schema of the document."""
    return {"$ref": f"#/components/schemas/{name}"}


def routes(service: Service) -> list[tuple[str, object]]:
    """(route, resource) of the document."""
    data = json.dumps(document(service), ensure_ascii=False).encode()
    file = File(data, "application/json", hashlib.sha256(data).hexdigest()[:16])
    return [("/openapi.json", Document(file, policy()))]


ANY_REQUEST = (400, 403, 413, 503)
"""Errors of any request: an invalid Host, a foreign page, a body too large, an overloaded server."""
NEW_JOB = (400, 404, 409, 429, 500, 503, 507)
"""Errors of a request that creates a job."""
FILE_TYPES = ("video/mp4", "video/webm", "image/gif", "image/webp", "image/png", "image/jpeg")
FILE = {
    200: Answer("The file.", files=FILE_TYPES),
    206: Answer("The part of the file that the Range header asks for.", files=FILE_TYPES),
    302: Answer("The file is in object storage; Location has its URL."),
    304: Answer("The file has not changed."),
}
NO_FILE = (400, 404, 416)
EXAMPLE = {"prompt": "a small yellow star in the centre on a purple background", "seed": 7}


def removed(kind: str) -> dict[int, Answer]:
    """The answer to a DELETE."""
    members = {
        "id": string("The id of the removed job."),
        "deleted": choice("Always true.", True),
        "object": choice("The kind of this object.", kind),
    }
    return {200: Answer("The job was cancelled or removed.", obj(members))}


def image_operations(name: str) -> Iterator[Operation]:
    """The operations on images."""
    generation = request_schema("image", name, False, ("prompt",), without=("image", "images", "mask"))
    edit = request_schema("image", name, True, ("prompt", "image"))
    edit_json = request_schema("image", name, False, ("prompt", "images"), without=("image",))
    images = {200: Answer("The images; with stream=true, server-sent events.", ref("Images"), (EVENTS,))}
    job = {200: Answer("The state of the job.", ref("Image"))}
    content = {
        "variant": integer("Index of the image among the job's images, from 0.", 0),
        "thumbnail": choice(
            "Send a small WebP instead, with no side over 512 pixels.", "true", "false", default="false"
        ),
    }
    editing = "Make images from input images: start from one, inpaint a part of it, or use reference images."
    yield Operation(
        "post /v1/images/generations",
        "createImage",
        "Make images from a prompt.",
        images,
        NEW_JOB,
        body={JSON: generation},
        example=EXAMPLE,
    )
    bodies = {FORM: edit, JSON: edit_json}
    yield Operation("post /v1/images/edits", "editImage", editing, images, NEW_JOB, body=bodies)
    yield Operation("get /v1/images/{id}", "image", "The state of a job that makes images.", job, (404,))
    description = "Cancel a job that is not done; remove a job that is done, with its files."
    yield Operation("delete /v1/images/{id}", "deleteImage", description, removed("image.deleted"), (404,))
    description = "Cancel a job within one step. Its client gets an error with the code cancelled."
    yield Operation("post /v1/images/{id}/cancel", "cancelImage", description, job, (404,))
    description = "Download an image."
    yield Operation("get /v1/images/{id}/content", "imageContent", description, FILE, NO_FILE, content)


def video_operations(name: str) -> Iterator[Operation]:
    """The operations on videos."""
    form, body = (request_schema("video", name, form, ("prompt",)) for form in (True, False))
    job = {200: Answer("The state of the job.", ref("Video"))}
    listed = {200: Answer("One page of videos.", answers.VIDEO_LIST)}
    remix = obj({"prompt": string("The new prompt."), "seed": option("seed")}, ("prompt",), closed=True)
    page = {
        "after": string("The id of the last video on the page before."),
        "limit": integer("Number of videos on the page.", 1, 100, default=20),
        "order": choice("Sort by the time of creation.", "asc", "desc", default="desc"),
    }
    content = {
        "variant": choice(
            "Which file: the video, its first frame, its contact sheet, or its sound (see save_audio).",
            *VARIANTS,
        ),
        "index": integer("Index of the video among the job's videos, from 0.", 0),
    }
    signed = {
        "expires": integer("When the signed URL expires, in seconds since 1970.", 0),
        "signature": string("The signature of the signed URL."),
    }
    description = (
        "Create a job that makes videos. Poll the job until it is completed or failed; the header "
        "openai-poll-after-ms has the milliseconds to wait."
    )
    yield Operation(
        "post /v1/videos",
        "createVideo",
        description,
        job,
        NEW_JOB,
        body={FORM: form, JSON: body},
        example=EXAMPLE,
    )
    yield Operation("get /v1/videos", "listVideos", "List your videos.", listed, (400,), page)
    yield Operation("get /v1/videos/{id}", "video", "The state of a job that makes videos.", job, (400, 404))
    description = "Remove a video and its files. A job that is not done is cancelled first."
    yield Operation("delete /v1/videos/{id}", "deleteVideo", description, removed("video.deleted"), (404,))
    description = "Download a file of a video."
    yield Operation("get /v1/videos/{id}/content", "videoContent", description, FILE, NO_FILE, content)
    description = "Cancel a job within one step. It then fails with the code cancelled."
    yield Operation("post /v1/videos/{id}/cancel", "cancelVideo", description, job, (404,))
    yield Operation(
        "post /v1/videos/{id}/remix",
        "remixVideo",
        "Make a video again with another prompt, and with another seed if one is given.",
        job,
        NEW_JOB,
        body={JSON: remix},
        example=EXAMPLE,
    )
    description = (
        "Download a file by its signed URL, which needs no API key and expires, or by its id with the key "
        "that owns it."
    )
    errors = (*NO_FILE, 401, 403)
    yield Operation(
        "get /v1/files/{id}/content", "fileContent", description, FILE, errors, signed, key="none"
    )


def model_operations(name: str) -> Iterator[Operation]:
    """The operations on models."""
    models = obj({
        "object": choice("The kind of this object.", "list"),
        "data": array(ref("Model"), "The models of this server, the default one first."),
    })  # fmt: skip
    listed, one = {200: Answer("The models.", models)}, {200: Answer("The model.", ref("Model"))}
    info = {200: Answer("The abilities of the model.", free("What the model makes from what."))}
    yield Operation("get /v1/models", "listModels", "The model, its defaults and its limits.", listed)
    yield Operation("get /v1/models/{id}", "model", "The model with this name.", one, (404,))
    description = "The model's abilities, in the form that SGLang's gateway reads."
    yield Operation("get /v1/model_info", "modelInfo", description, info)
    yield from lora_operations()


def lora_operations() -> Iterator[Operation]:
    """The operations on LoRA adapters."""
    state = {200: Answer("The adapters.", free("Loaded, active and available LoRA adapters."))}
    description = (
        "LoRA adapters: loaded ones, those that requests get unless they name others, and all names."
    )
    model = {"model": string("Whose adapters, on a server of several models; by default the first one's.")}
    yield Operation("get /v1/list_loras", "listLoras", description, state, (404,), model)
    name, scale = {"type": "string"}, {"type": "number", "minimum": -100, "maximum": 100}
    adapter = {
        field: {"anyOf": [kind, {"type": "array", "items": kind}], "description": text}
        for field, kind, text in (
            ("lora_nickname", name, "Name of the adapter, or a list of names."),
            ("lora_path", name, "File, directory or hub id; left out for an adapter that is loaded already."),
            ("target", name, "Component that the adapter changes, or all."),
            ("strength", scale, "Strength for requests that name no adapter; 1 unless given."),
            ("lora_alpha", scale, "Alpha of a file that records none."),
        )
    } | {"merge_mode": choice("A running server keeps adapters dynamic.", "auto", "dynamic")}
    strength = {"strength": scale | {"description": "Strength of all adapters; each its own unless given."}}
    target = {"target": choice("All components.", "all")}
    load = "Load LoRA adapters and give them to requests that name none."
    merge = "Give requests the adapters that were active last."
    unmerge = "Give requests the base model. The adapters stay loaded."
    for route, call, text, required, fields in (
        ("set_lora", "setLora", load, ("lora_nickname",), adapter),
        ("merge_lora_weights", "mergeLoraWeights", merge, (), target | strength),
        ("unmerge_lora_weights", "unmergeLoraWeights", unmerge, (), target),
    ):
        body = {JSON: obj(fields | model, required, closed=True)}
        yield Operation(f"post /v1/{route}", call, text, state, (401, 404), {}, body, key="admin")


def server_operations(name: str) -> Iterator[Operation]:
    """The operations on the server itself."""
    phase = string("loading, warming, compiling, ready, asleep, stopping or failed.")
    alive = obj({"status": string("Always ok.")})
    status = obj(
        {"status": string("ok or unhealthy."), "phase": phase},
        optional={"error": string("Why the server is unhealthy.")},
    )
    ready = obj({
        "status": string("ok or not ready."),
        "phase": phase,
        "done": integer("Parts of the phase that are done."),
        "total": integer("Parts of the phase."),
        "eta_s": nullable(number("Seconds until the server is ready.")),
        "detail": string("Why the server failed or cannot store jobs; else empty."),
    })  # fmt: skip
    success = obj({
        "success": {"type": "boolean", "description": "Always true."},
        "message": string("What the server does now."),
    })  # fmt: skip
    accepted = {200: Answer("The server does so in the background.", success)}
    healthy = {
        200: Answer("The server is healthy.", status),
        503: Answer("The server failed and needs a restart.", status),
    }
    started = {
        200: Answer("The server is ready.", ready),
        503: Answer("The server is not ready; the body has its progress.", ready),
    }
    metrics = {200: Answer("Metrics in Prometheus's text format.", files=("text/plain",))}
    information = {200: Answer("Options and measurements.", free("Options and measurements."))}
    nothing = {JSON: obj({}, closed=True)}
    yield Operation(
        "get /liveness", "liveness", "Whether HTTP is answered.", {200: Answer("Yes.", alive)}, key="none"
    )
    description = "Whether the server answers requests, now or after its warm-up."
    yield Operation("get /health", "health", description, healthy, key="none")
    description = "Whether a new request would start at once."
    yield Operation("get /ready", "ready", description, started, key="none")
    yield Operation("get /metrics", "metrics", "Metrics for Prometheus.", metrics, (404,), key="none")
    yield Operation("get /server_info", "serverInfo", "Options and measurements of the server.", information)
    description = (
        "Unload the model from the device; the next job loads it again. The route of SGLang, "
        "/release_memory_occupation, does the same."
    )
    yield Operation("post /v1/sleep", "sleep", description, accepted, (400, 409), body=nothing, key="admin")
    description = (
        "Load the model onto the device before the next job needs it. The route of SGLang, "
        "/resume_memory_occupation, does the same."
    )
    yield Operation("post /v1/wake", "wake", description, accepted, (400, 409), body=nothing, key="admin")


GROUPS = {
    "Images": (
        "The client waits for its images; when it disconnects, the job is cancelled.",
        image_operations,
    ),
    "Videos": ("The client creates a job and polls it until it is completed or failed.", video_operations),
    "Model": ("The model of this server.", model_operations),
    "Server": ("The state of this server.", server_operations),
}
"""Tag -> its description, and its operations for a model's name."""


def operations(name: str) -> Iterator[Operation]:
    """All operations, in the order in which /docs shows them. name: the model's."""
    for tag, (_, group) in GROUPS.items():
        yield from (operation._replace(tag=tag) for operation in group(name))


def document(service: Service) -> EntryDict:
    """The whole document, JSON-able."""
    paths: EntryDict = {}
    for operation in operations(service.name):
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation)
    schemas = {
        "Images": answers.schema(answers.IMAGES),
        "Image": answers.schema(answers.IMAGE),
        "Video": answers.schema(answers.VIDEO),
        "Model": answers.MODEL,
        "Error": answers.ERROR,
    }
    bearer = {"type": "http", "scheme": "bearer"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "tinydiff", "version": __version__, "description": ABOUT},
        "servers": [{"url": "/" if service.options.public_url is None else service.options.public_url}],
        "tags": [{"name": tag, "description": description} for tag, (description, _) in GROUPS.items()],
        "security": [{"key": []}, {}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": {str(status): _error(description) for status, description in ERRORS.items()},
            "securitySchemes": {
                "key": {**bearer, "description": "An API key of the server."},
                "admin": {**bearer, "description": "The admin key, for operations that change the server."},
            },
        },
    }


def _operation(operation: Operation) -> EntryDict:
    """An operation in OpenAPI's form."""
    errors = {*operation.errors, *ANY_REQUEST}
    errors |= set() if operation.key == "none" else {401}
    errors |= {415} if operation.body else set()
    in_path = [part[1:-1] for part in operation.path.split("/") if part.startswith("{")]
    found: EntryDict = {
        "operationId": operation.name,
        "tags": [operation.tag],
        "summary": operation.description.split(". ")[0].split(";")[0].rstrip("."),
        "description": operation.description,
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in in_path
        ]
        + [
            {"name": name, "in": "query", "required": False, "schema": schema}
            for name, schema in operation.query.items()
        ],
        "responses": {str(status): _answer(answer) for status, answer in operation.answers.items()}
        | {
            str(status): {"$ref": f"#/components/responses/{status}"}
            for status in sorted(errors - operation.answers.keys())
        },
    }
    if operation.key != "key":
        found["security"] = [{"admin": []}] if operation.key == "admin" else []
    if operation.body:
        example = {} if operation.example is None else {"example": operation.example}
        found["requestBody"] = {
            "required": any(schema["required"] for schema in operation.body.values()),
            "content": {
                kind: {"schema": schema, **(example if kind == JSON else {})}
                for kind, schema in operation.body.items()
            },
        }
    return found


def _answer(answer: Answer) -> EntryDict:
    content: EntryDict = {kind: {} for kind in answer.files}
    if answer.schema is not None:
        content[JSON] = {"schema": answer.schema}
    return {"description": answer.description, **({"content": content} if content else {})}


def _error(description: str) -> EntryDict:
    return {"description": description, "content": {JSON: {"schema": ref("Error")}}}
