"""From a request's body to a job: its fields read, its images fetched and kept, all of it checked before it
is queued.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import falcon

from tinydiff.config import options
from tinydiff.records import UserError, nearest, shown
from tinydiff.serve import decoder, outputs
from tinydiff.serve.body import fingerprint, read_body
from tinydiff.serve.errors import Refusal
from tinydiff.serve.fetch import FETCH_S, fetch, too_large
from tinydiff.serve.fields import STEPS_OF_QUALITY, Asked, FileId, read_fields
from tinydiff.serve.jobs import Job, Kind, new_id
from tinydiff.serve.unpack import media_type

if TYPE_CHECKING:
    import numpy

    from tinydiff.models.registry import ReleasedModel
    from tinydiff.records import Request
    from tinydiff.runtime.blueprint import Blueprint
    from tinydiff.serve.files import Files
    from tinydiff.serve.options import ServeOptions
    from tinydiff.serve.service import Service

LOSSLESS = ("default", "maximum", None, 100)
"""What may be asked of the quality of a format that has no other."""


ESCAPED = {"%2B": "+", "%2F": "/", "%3D": "=", "%0A": "", "%0D": "", "%20": ""}
"""What a URI's escapes may stand for in base64."""
_ALPHABET = bytes.maketrans(b"-_", b"+/")

BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")
"""How images begin in base64."""

Get = Callable[[str, str, int, float], bytes]
"""(address, field, bytes at most, seconds) -> the bytes there. Raises UserError."""


def read_job(service: Service, req: falcon.Request, kind: Kind) -> Job:
    """The job that a request asks for, checked, its given images among the server's files. It is not queued
    yet.

    Its `answer` has the effective `size`, of a video also `seconds`, and `fingerprint`, the same for bodies
    that say the same. Raises UserError and Refusal; then nothing is left behind.
    """
    body, form = read_body(req, int(service.options.max_body * 1e6))
    asked = read_fields(body, kind, form)
    check_model(service, asked.answer.pop("model", ""))
    priority = asked.answer.pop("priority", 0)
    if priority > 0 and not req.context.admin:
        raise Refusal(
            403, "admin_required", f"priority: {priority} is above 0, which needs the admin key", "priority"
        )
    job = Job(
        id=new_id(kind), kind=kind, created_at=time.time(), owner=req.context.owner, fields=resolved(service, asked, kind),
        answer={**asked.answer, "fingerprint": fingerprint(body)}, priority=priority, pinned=kind == "image",
        idempotency=idempotency(req),
    )  # fmt: skip
    kept: dict[str, tuple[str, ...]] = {}
    try:
        for name, sources in asked.given.items():
            kept[name] = ()
            for source in sources:
                kept[name] += (_keep(service, job.owner, source, asked.answer["spelled"].get(name, name)),)
        return checked(service, replace(job, inputs=kept))
    except BaseException:
        discard(service, replace(job, inputs=kept))
        raise


def idempotency(req: falcon.Request) -> str:
    """What tells a repeated request, of its header Idempotency-Key; "" without one."""
    key = req.get_header("Idempotency-Key") or ""
    return hashlib.sha256(key.encode()).hexdigest()[:32] if key else ""


def check_model(service: Service, name: str) -> None:
    """Raises Refusal unless this server's model has the name: the one it serves, its path or hub id, or none."""
    row = service.blueprint.row
    if name not in ("", service.name, row.name):
        hint = nearest(name, [service.name, row.name])
        raise Refusal(
            404, "model_not_found", f"model: {name!r} is not served here; {service.name!r} is{hint}", "model"
        )


def checked(service: Service, job: Job) -> Job:
    """The job with what its answer says of its request: the effective size, and of a video its seconds. The
    request goes to the device with its images as they are now. Raises UserError."""
    request = admitted(service.blueprint, service.files, service.options, job)
    service.requests.put(job.id, request)
    more: dict[str, Any] = {"size": f"{request.width}x{request.height}"}
    if job.kind == "video":
        more["seconds"] = f"{request.num_frames / request.fps:g}"
    return replace(job, answer={**job.answer, **more})


def discard(service: Service, job: Job) -> None:
    """Remove the given images of a job that never was."""
    service.requests.take(job.id)
    for id in (id for ids in job.inputs.values() for id in ids):
        service.files.delete(id)


def admitted(blueprint: Blueprint, files: Files, limits: ServeOptions, job: Job) -> Request:
    """The job's request, every field checked against the model and the server's limits. Raises UserError
    naming the field as the client spelled it."""
    from tinydiff.runtime.admit import admit  # reads models, so it loads torch

    with _as_spelled(job), decoder.slot() if job.inputs else nullcontext():
        _suits(blueprint.row, job)
        sampling = options({**_frames(blueprint.row, job), **job.fields, **_paths(files, job)}).sampling
        if not sampling.prompt and not blueprint.row.captions:
            raise UserError("prompt", "prompt: is missing; it says what to show")
        if sampling.num_outputs_per_prompt > (most := limits.max_outputs):
            name, asked = "num_outputs_per_prompt", sampling.num_outputs_per_prompt
            raise UserError(
                name, f"{name}: {asked} outputs are more than the {most} that one request may ask for"
            )
        read, most = partial(_pixels, limits.max_input_pixels), limits.pixel_limit(blueprint.row, job.kind)
        [request] = admit(blueprint, sampling, job.kind == "video", read, most)
        outputs.plan(job, request, Path("."))
    return request


def _pixels(most_pixels: float, path: str, field: str, with_alpha: bool = False) -> numpy.ndarray:
    """A given image, decoded elsewhere."""
    return decoder.DECODER.pixels(
        Path(path).read_bytes(), field, most_pixels, with_alpha, field == "mask_path"
    )


def resolved(service: Service, asked: Asked, kind: Kind) -> dict[str, Any]:
    """The fields, with what OpenAI's `seconds` and `quality` mean for this model in them. JSON-able."""
    row, fields = service.blueprint.row, dict(asked.fields)
    if "seconds" in asked.answer:
        stride = service.blueprint.nets["vae"].config.scale_factor_temporal
        frames = asked.answer["seconds"] * fields.get("fps", row.fps)
        fields["num_frames"] = (
            max(1, round((frames - 1) / stride)) * stride + 1
        )  # the nearest that the model makes
    quality = asked.answer.get("quality")
    if quality in STEPS_OF_QUALITY and STEPS_OF_QUALITY[quality] != 1:
        if row.solver == "dmd":
            message = f"quality: {quality!r} would be another number of steps, and {row.name} is distilled for its own; it may be auto"
            raise UserError("quality", message)
        fields["num_inference_steps"] = max(1, round(row.steps * STEPS_OF_QUALITY[quality]))
    return json.loads(json.dumps(fields))


def _frames(row: ReleasedModel, job: Job) -> Mapping[str, Any]:
    return {"num_frames": 1} if job.kind == "image" and not row.layers else {}


def _suits(row: ReleasedModel, job: Job) -> None:
    """What the address asked at, and the format of the answer, leave of the fields."""
    fields, answer = job.fields, job.answer
    if job.kind == "video":
        if row.video_frames == 1:
            raise UserError(
                "model",
                f"model: {row.name} makes images, not videos; they are asked for at /v1/images/generations",
            )
        if fields.get("num_frames") == 1:
            raise UserError(
                "num_frames", "num_frames: 1 makes an image, which is asked for at /v1/images/generations"
            )
        return
    if row.image_use == "frames" and row.images[0]:
        raise UserError(
            "image_path",
            f"image_path: {row.name} makes videos that begin with a given image; they are asked for at /v1/videos",
        )
    if not row.layers and fields.get("num_frames", 1) != 1:
        raise UserError(
            "num_frames", f"num_frames: {fields['num_frames']} make a video, which is asked for at /v1/videos"
        )
    if "fps" in fields:
        raise UserError("fps", "fps: an image has no frames a second; videos are asked for at /v1/videos")
    clear, asked = row.layers > 0, answer.get("background", "auto")
    if asked != "auto" and clear != (asked == "transparent"):
        only = "transparent" if clear else "opaque"
        raise UserError(
            "background", f"background: {asked!r} cannot be had; the images of {row.name} are {only}"
        )
    for name in ("output_quality", "output_compression"):
        if answer.get("output_format", "png") == "png" and fields.get(name) not in LOSSLESS:
            raise UserError(
                name,
                f"{name}: {fields[name]!r} has no effect on a PNG, which is lossless; ask for output_format webp or jpeg",
            )


def _paths(files: Files, job: Job) -> dict[str, Any]:
    """The given images as paths of this machine."""
    found: dict[str, Any] = {}
    for name, ids in job.inputs.items():
        paths = [files.path(id) for id in ids]
        if None in paths:
            raise UserError(name, f"{name}: a given image is no longer kept; send it again")
        found[name] = [str(path) for path in paths] if name == "image_path" else str(paths[0])
    return found


def _keep(service: Service, owner: str, source: str | bytes | FileId, field: str) -> str:
    """Put a given image among the server's files, as this owner's. Returns its id. One of the owner's own
    files is copied, so that each job has its own; another owner's file is answered like one that does not
    exist."""
    limits = service.options
    if isinstance(source, FileId):
        path = service.files.path(source.id) if service.files.belongs(source.id, owner) else None
        if path is None:
            raise Refusal(404, "not_found", f"{field}: no file has the id {source.id[:80]!r}", field)
        source = path.read_bytes()
    data = received(source, field, limits.allow_url_inputs, limits)
    return service.files.put(data, media_type(data, field), "given", owner)


@contextmanager
def _as_spelled(job: Job) -> Iterator[None]:
    """Name the fields in mistakes as the client did: `size` where height and width came of it, `image` for
    image_path.
    """
    first = "image" if job.kind == "image" else "input_reference"
    spelled = {"image_path": first, "mask_path": "mask", **job.answer.get("spelled", {})}
    try:
        yield
    except UserError as error:
        name, said = error.field, str(error).removeprefix(f"{error.field}: ")
        theirs = spelled.get(name, name)
        inner = (
            f"{name} "
            if theirs != name and name in ("height", "width", "num_frames", "num_inference_steps")
            else ""
        )
        raise UserError(
            theirs, f"{theirs}: {inner}{said}".replace("--image-path", spelled["image_path"])
        ) from error


def received(
    source: str | bytes, field: str, allow_urls: bool, limits: ServeOptions, get: Get = fetch
) -> bytes:
    """The bytes of a given image: a file's own, a data URI's, or those that `get` has from an address.

    They begin as one of the formats that are read does, whatever name or type they came with, and are at most
    `limits.max_body` MB. Nothing is unpacked yet. Raises UserError naming `field`.
    """
    most = int(limits.max_body * 1e6)
    data = source if isinstance(source, bytes) else _read(source, field, allow_urls, most, get)
    if len(data) > most:
        raise too_large(field, most)
    media_type(data, field)
    return data


def _read(source: str, field: str, allow_urls: bool, most: int, get: Get) -> bytes:
    """The bytes that a text stands for."""
    source = source.strip()
    scheme = source[: source.find(":")].lower() if ":" in source[:20] else ""
    if scheme == "data":
        return _data_uri(source, field, most)
    if scheme in ("http", "https"):
        if not allow_urls:
            how = "send the image as a file or a data URI, or start the server with --allow-url-inputs"
            raise UserError(field, f"{field}: is an address, and this server fetches none; {how}")
        return get(source, field, most, FETCH_S)
    if source.startswith(BASE64_STARTS) or (
        len(source) >= 256 and re.fullmatch(r"[A-Za-z0-9+/_\s-]+", source[:256])
    ):
        raise UserError(field, f"{field}: is base64 without its head; put data:image/png;base64, before it")
    address = " or an http(s) address" if allow_urls else ""
    raise UserError(
        field,
        f"{field}: {shown(source)} must be a file sent along, a data URI{address}; the server's own files are not read",
    )


def _data_uri(source: str, field: str, most: int) -> bytes:
    head, comma, body = source.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise UserError(
            field, f"{field}: is a data URI without ;base64, ; the form is data:image/png;base64,..."
        )
    if len(body) > 6 * most:  # four letters are three bytes, and one written as %2B is three letters
        raise too_large(field, most)
    for code, letter in ESCAPED.items():
        body = body.replace(code, letter).replace(code.lower(), letter)
    try:
        text = body.encode("ascii").translate(_ALPHABET, delete=b" \t\r\n").rstrip(b"=")
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise UserError(field, f"{field}: is a data URI whose base64 is broken") from None
