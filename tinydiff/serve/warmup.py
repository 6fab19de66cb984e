"""The warm-up: before it is ready, a server makes an output of each declared size."""

from __future__ import annotations

import base64
import io
import time
import wave
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from tinydiff.records import UserError
from tinydiff.serve.jobs import Job
from tinydiff.serve.options import ServeOptions

if TYPE_CHECKING:
    from tinydiff.records import Request
    from tinydiff.runtime.blueprint import Blueprint
    from tinydiff.runtime.device import Device
    from tinydiff.serve.service import ServedModel

SILENCE = 3200
"""Samples of the sound of a warm-up, 0.2 seconds."""


def jobs(options: ServeOptions, model: ServedModel) -> list[Job]:
    """A job for each declared size, by default the model's own. Raises UserError for an invalid size."""
    is_video = (options.warmup_num_frames or model.blueprint.row.num_frames) > 1
    if not options.warmup_steps:
        return []
    queued = []
    for size in options.warmup_resolutions or ("",):
        fields: dict[str, object] = {
            "prompt": "warm-up",
            "seed": 0,
            "num_inference_steps": options.warmup_steps,
        }
        if size:
            width, _, height = size.lower().partition("x")
            if not (width.isdecimal() and height.isdecimal()):
                raise UserError(
                    "warmup_resolutions",
                    f"warmup_resolutions: {size!r} is not WIDTHxHEIGHT, such as 1024x768",
                )
            fields |= {"width": int(width), "height": int(height)}
        fields |= _inputs(model.blueprint)
        if options.warmup_num_frames is not None:
            fields["num_frames"] = options.warmup_num_frames
        kind = "video" if is_video else "image"
        queued.append(Job("warm-up", kind, time.time(), model=model.name, fields=fields))
    return queued


def _inputs(plan: Blueprint) -> dict[str, object]:
    """What a request of the model must have: grey images of its default aspect, and silence, as data URIs."""
    row, fields = plan.row, dict[str, object]()
    least = row.images[0]
    if least and row.image_use == "frames" and plan.foreign is None:
        least = min(plan.denoiser.family.input_frames(plan.denoiser.config, plan.options))
    if least:
        import numpy

        from tinydiff.io.images import encode_image

        grey = numpy.full((max(row.height // 8, 32), max(row.width // 8, 32), 3), 128, numpy.uint8)
        fields["image_path"] = [_data_uri("image/png", encode_image(grey, ".png"))] * least
    if row.speech:
        silence = io.BytesIO()
        with wave.open(silence, "wb") as out:
            out.setparams((1, 2, 16_000, 0, "NONE", ""))
            out.writeframes(bytes(2 * SILENCE))
        fields["audio_path"] = _data_uri("audio/wav", silence.getvalue())
    return fields


def _data_uri(media_type: str, data: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def batches(
    options: ServeOptions, model: ServedModel, admitted: Callable[[Job], Request]
) -> list[tuple[Request, int]]:
    """(request, batch size) of each warm-up. A compiled model has two graphs: for one image and for more."""
    counts = (1, 2) if model.blueprint.compiled and options.batching_max_size > 1 else (1,)
    return [(admitted(job), count) for job in jobs(options, model) for count in counts]


def make(device: Device, request: Request, count: int) -> None:
    """Run a batch of `count` on a loaded device and discard the outputs.

    Raises the error that a request would get.
    """
    device.condition("warm-up", replace(request, seeds=(0,) * count))
    try:
        for index in range(count):
            device.start("warm-up", index)
        while device.loop.slots:
            if error := device.step(count).error:
                raise error
        device.finish("warm-up", 0)
    finally:
        device.remove("warm-up")
