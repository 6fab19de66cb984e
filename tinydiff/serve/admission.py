"""Admission: from a request's body to a checked job.

Its input images and sound are fetched and kept among the files.

Nothing about an input file is trusted: not where a URL leads, nor what a header, a media type or an
extension says of its bytes.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import falcon

from tinydiff.config import options
from tinydiff.io import given
from tinydiff.records import UserError, brief
from tinydiff.serve import decoder, outputs
from tinydiff.serve.body import fingerprint, read_body
from tinydiff.serve.errors import Refusal
from tinydiff.serve.fetch import FETCH_S, fetch, too_large
from tinydiff.serve.fields import STEPS_OF_QUALITY
from tinydiff.serve.jobs import Job, Kind, new_id
from tinydiff.serve.read_fields import FileId, ImageSource, RequestFields, read_fields
from tinydiff.serve.unpack import media_type, sound_type

if TYPE_CHECKING:
    import numpy

    from tinydiff.models.registry import ReleasedModel
    from tinydiff.records import Request, Speech
    from tinydiff.serve.adapters import Adapters
    from tinydiff.serve.files import Files
    from tinydiff.serve.options import ServeOptions
    from tinydiff.serve.service import Service

LOSSLESS = ("default", "maximum", None, 100)
"""Values of the quality options that a lossless format accepts."""

ESCAPED = {"%2B": "+", "%2F": "/", "%3D": "=", "%0A": "", "%0D": "", "%20": ""}
"""Escapes of a URI that may stand in base64 -> what they mean."""
_ALPHABET = bytes.maketrans(b"-_", b"+/")

BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")
"""How images begin in base64."""

Get = Callable[[str, str, int, float], bytes]
"""(URL, field, most bytes, seconds) -> the bytes at the URL. Raises UserError."""


def read_job(service: Service, req: falcon.Request, kind: Kind) -> Job:
    """The job that a request asks for, admitted but not queued; its input images are among the files.

    The job's `answer` has the effective `size`, the `seconds` of a video, and `fingerprint`, which is equal
    for equal bodies. Raises UserError and Refusal; then no file is left behind.
    """
    body, form = read_body(req, int(service.options.max_body * 1e6))
    request = read_fields(body, kind, form)
    service = of_model(service, request.answer.pop("model", ""))
    priority = request.answer.pop("priority", 0)
    if priority > 0 and not req.context.admin:
        message = f"priority: {priority} is above 0, which needs the admin key"
        raise Refusal(403, "admin_required", message, "priority")
    job = Job(
        id=new_id(kind),
        kind=kind,
        created_at=time.time(),
        owner=req.context.owner,
        model=service.name if len(service.models) > 1 else "",
        fields=resolved(service, request, kind),
        answer={**request.answer, "fingerprint": fingerprint(body)},
        priority=priority,
        pinned=kind == "image",
        idempotency=idempotency(req),
    )
    files: dict[str, tuple[str, ...]] = {}
    try:
        for name, sources in request.images.items():
            files[name] = ()
            for source in sources:
                field = request.answer["spelled"].get(name, name)
                files[name] += (_stored(service, job.owner, source, name, field),)
        return admitted_job(service, replace(job, inputs=files))
    except BaseException:
        discard(service, replace(job, inputs=files))
        raise


def idempotency(req: falcon.Request) -> str:
    """A hash of the Idempotency-Key header; "" without one."""
    key = req.get_header("Idempotency-Key") or ""
    return hashlib.sha256(key.encode()).hexdigest()[:32] if key else ""


def of_model(service: Service, name: str) -> Service:
    """The server as that of the model with this name; see `Service.of`. Raises Refusal for an unknown one."""
    try:
        return service.of(name)
    except UserError as error:
        raise Refusal(404, "model_not_found", str(error), "model") from None


def admitted_job(service: Service, job: Job) -> Job:
    """Admit a job's request and keep it for the device; the job with its effective size and length.

    Raises UserError.
    """
    request = admitted(service.adapters, service.files, service.options, job)
    service.requests.put(job.id, request)
    effective: dict[str, Any] = {"size": "{1}x{0}".format(*request.output.saved_size)}
    if job.kind == "video":
        effective["seconds"] = f"{request.output.decoded_frames / request.output.fps:g}"
    return replace(job, answer={**job.answer, **effective})


def discard(service: Service, job: Job) -> None:
    """Remove the request and the input images of a job that was not queued."""
    service.requests.take(job.id)
    for id in (id for ids in job.inputs.values() for id in ids):
        service.files.delete(id)


def admitted(adapters: Adapters, files: Files, limits: ServeOptions, job: Job) -> Request:
    """The job's request, every field checked against the model and the server's limits.

    Raises UserError with the field's name as the client spelled it.
    """
    from tinydiff.runtime import backends  # reads models, so it loads torch

    row = adapters.current_blueprint().row
    with _client_spelling(job), decoder.slot() if job.inputs else nullcontext():
        _check_route(row, job)
        frames = {"num_frames": 1} if job.kind == "image" and not row.layers else {}
        sampling = options({**frames, **job.fields, **_paths(files, job)}).sampling
        if not sampling.prompt and not row.captions:
            raise UserError("prompt", "prompt: is missing")
        count = sampling.num_outputs_per_prompt
        if count > limits.max_outputs:
            name = "num_outputs_per_prompt"
            message = f"{name}: {count} outputs are more than the {limits.max_outputs} allowed per request"
            raise UserError(name, message)
        read = partial(_decoded, limits.max_input_pixels)
        most_pixels = limits.pixel_limit(row, job.kind)
        sampling = replace(sampling, loras=adapters.strengths(sampling.loras))
        plan = adapters.current_blueprint()
        as_video = job.kind == "video"
        [request] = backends.of(plan).admit(plan, sampling, as_video, read, most_pixels, _heard)
        outputs.plan(job, request, Path("."))
    return request


def _decoded(most_pixels: float, path: str, field: str, with_alpha: bool = False) -> numpy.ndarray:
    """The pixels of an input image, decoded in another process."""
    data, mask = given.read_bytes(path, field), field == "mask_path"
    return decoder.DECODER.pixels(data, field, most_pixels, with_alpha, mask)


def _heard(path: str, rate: int) -> Speech:
    """The sound of an input file, decoded in another process."""
    return decoder.DECODER.sound(given.read_bytes(path, "audio_path"), "audio_path", rate)


def resolved(service: Service, request: RequestFields, kind: Kind) -> dict[str, Any]:
    """The options of a request, with OpenAI's `seconds` and `quality` translated for this model."""
    row, fields = service.blueprint.row, dict(request.options)
    if "seconds" in request.answer and row.speech:
        message = f"the video of {row.name} is as long as its sound; leave it out"
        raise UserError("seconds", f"seconds: {message}")
    if "seconds" in request.answer:
        stride = service.blueprint.frame_stride
        frames = request.answer["seconds"] * fields.get("fps", row.fps)
        # The nearest number of frames that the model can make.
        fields["num_frames"] = max(1, round((frames - 1) / stride)) * stride + 1
    quality = request.answer.get("quality")
    if quality in STEPS_OF_QUALITY and STEPS_OF_QUALITY[quality] != 1:
        if row.solver == "dmd":
            message = (
                f"quality: {quality!r} changes the number of steps, but {row.name} is distilled for "
                "a fixed number; it may be 'auto'"
            )
            raise UserError("quality", message)
        fields["num_inference_steps"] = max(1, round(row.steps * STEPS_OF_QUALITY[quality]))
    return json.loads(json.dumps(fields))


def _check_route(row: ReleasedModel, job: Job) -> None:
    """Raise UserError for fields that do not fit the job's route or the format of its outputs."""
    fields, answer = job.fields, job.answer
    if job.kind == "video":
        if row.video_frames == 1:
            message = f"model: {row.name} makes images, not videos; use /v1/images/generations"
            raise UserError("model", message)
        if fields.get("num_frames") == 1:
            raise UserError("num_frames", "num_frames: 1 makes an image; use /v1/images/generations")
        return
    if row.image_use == "frames" and row.images[0]:
        message = f"image_path: {row.name} makes videos that start with an input image; use /v1/videos"
        raise UserError("image_path", message)
    if not row.layers and fields.get("num_frames", 1) != 1:
        raise UserError("num_frames", f"num_frames: {fields['num_frames']} makes a video; use /v1/videos")
    if "fps" in fields:
        raise UserError("fps", "fps: an image has no frame rate; use /v1/videos for a video")
    has_alpha, background = row.layers > 0, answer.get("background", "auto")
    if background != "auto" and has_alpha != (background == "transparent"):
        only = "transparent" if has_alpha else "opaque"
        message = f"background: {background!r} is not supported; the images of {row.name} are {only}"
        raise UserError("background", message)
    for name in ("output_quality", "output_compression"):
        if answer.get("output_format", "png") == "png" and fields.get(name) not in LOSSLESS:
            message = f"{name}: {fields[name]!r} has no effect on a PNG, which is lossless"
            raise UserError(name, f"{message}; use it with output_format webp or jpeg")


def _paths(files: Files, job: Job) -> dict[str, Any]:
    """The job's input images as paths on this machine."""
    found: dict[str, Any] = {}
    for name, ids in job.inputs.items():
        paths = [files.path(id) for id in ids]
        if None in paths:
            raise UserError(name, f"{name}: an input file is no longer kept; send it again")
        found[name] = [str(path) for path in paths] if name == "image_path" else str(paths[0])
    return found


def _stored(service: Service, owner: str, source: ImageSource, name: str, field: str) -> str:
    """Store an input file as this owner's; the id of its file. name: of the option. field: the client's name.

    A file of the owner is copied, so that each job has its own. A file of another owner is answered like one
    that does not exist.
    """
    limits = service.options
    if isinstance(source, FileId):
        path = service.files.path(source.id) if service.files.belongs(source.id, owner) else None
        if path is None:
            raise Refusal(404, "not_found", f"{field}: no file has the id {source.id[:80]!r}", field)
        source = path.read_bytes()
    kind = SOUND if name == "audio_path" else IMAGE
    data = received(source, field, limits.allow_url_inputs, limits, kind=kind)
    return service.files.put(data, kind.media_type(data, field), "given", owner)


@contextmanager
def _client_spelling(job: Job) -> Generator[None]:
    """Raise UserError with the client's name of a field: `size` for a height that came from it."""
    first = "image" if job.kind == "image" else "input_reference"
    spelled: Mapping[str, str] = {"image_path": first, "mask_path": "mask", **job.answer.get("spelled", {})}
    derived = ("height", "width", "num_frames", "num_inference_steps")
    try:
        yield
    except UserError as error:
        name, message = error.field, str(error).removeprefix(f"{error.field}: ")
        client_name = spelled.get(name, name)
        inner = f"{name} " if client_name != name and name in derived else ""
        message = f"{client_name}: {inner}{message}".replace("--image-path", spelled["image_path"])
        message = message.replace("--audio-path", "audio_path")
        raise UserError(client_name, message) from error


# --- the bytes of an input file ---


class InputKind(NamedTuple):
    """What an input file may be."""

    noun: str
    example: str
    """A media type."""
    media_type: Callable[[bytes, str], str]
    """(first bytes, field) -> media type. Raises UserError for any other kind of file."""


IMAGE = InputKind("image", "image/png", media_type)
SOUND = InputKind("sound", "audio/wav", sound_type)


def received(
    source: str | bytes,
    field: str,
    allow_urls: bool,
    limits: ServeOptions,
    get: Get = fetch,
    kind: InputKind = IMAGE,
) -> bytes:
    """The bytes of an input file: its own, a data URI's, or those that `get` fetches from a URL.

    They begin like one of the formats of its kind, whatever their name or type says, and are at most
    `limits.max_body` MB. They are not decoded. Raises UserError naming `field`.
    """
    most = int(limits.max_body * 1e6)
    data = source if isinstance(source, bytes) else _read(source, field, allow_urls, most, get, kind)
    if len(data) > most:
        raise too_large(field, most)
    kind.media_type(data, field)
    return data


def _read(source: str, field: str, allow_urls: bool, most: int, get: Get, kind: InputKind) -> bytes:
    """The bytes that a string stands for."""
    source = source.strip()
    scheme = source[: source.find(":")].lower() if ":" in source[:20] else ""
    if scheme == "data":
        return _data_uri(source, field, most, kind)
    if scheme in ("http", "https"):
        if not allow_urls:
            how = f"send the {kind.noun} as a file or a data URI, or start the server with --allow-url-inputs"
            raise UserError(field, f"{field}: is a URL, and this server does not fetch URLs; {how}")
        return get(source, field, most, FETCH_S)
    is_long_base64 = len(source) >= 256 and re.fullmatch(r"[A-Za-z0-9+/_\s-]+", source[:256])
    if source.startswith(BASE64_STARTS) or is_long_base64:
        message = f"is base64 without the head of a data URI; put data:{kind.example};base64, before it"
        raise UserError(field, f"{field}: {message}")
    allowed = "a file, a data URI or an http(s) URL" if allow_urls else "a file or a data URI"
    message = f"{brief(source)} must be {allowed}; files on the server's disk are not read"
    raise UserError(field, f"{field}: {message}")


def _data_uri(source: str, field: str, most: int, kind: InputKind) -> bytes:
    head, comma, body = source.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        message = f"is a data URI that is not in base64; the form is data:{kind.example};base64,..."
        raise UserError(field, f"{field}: {message}")
    if len(body) > 6 * most:  # base64 needs 4 characters for 3 bytes, and an escape is 3 characters
        raise too_large(field, most)
    for code, letter in ESCAPED.items():
        body = body.replace(code, letter).replace(code.lower(), letter)
    try:
        text = body.encode("ascii").translate(_ALPHABET, delete=b" \t\r\n").rstrip(b"=")
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise UserError(field, f"{field}: is a data URI with invalid base64") from None
