"""Admission: a request is completed with the model's defaults and checked.

It is checked against what the model can do, before anything is computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Protocol

import numpy

from tinydiff.config import SamplingOptions, seeds
from tinydiff.io import audio
from tinydiff.io.images import cover, read_image, resize
from tinydiff.models.recipe import fit_area, frames_between, rectangle_side, too_elongated
from tinydiff.models.registry import ReleasedModel
from tinydiff.records import (
    Guidance,
    InputImages,
    Output,
    Refinement,
    Request,
    Schedule,
    Speech,
    Text,
    UserError,
)
from tinydiff.runtime import loras, postprocess, step_caches
from tinydiff.runtime.blueprint import Blueprint
from tinydiff.runtime.pipeline import solver_table
from tinydiff.runtime.settings import settle

UPSAMPLER = "spatial_upsampler"
"""The component that begins a second stage."""
DURATION = "duration_head"
"""The component that tells from a prompt how long the video is."""
SECONDS = (1.0, 20.0)
"""Default bounds of a length that follows from the prompt."""
STRENGTH = 0.6
"""Default strength where an image is given to start from."""
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in brightness, ITU-R BT.601."""


class Hear(Protocol):
    """How an input sound is read.

    source: its path, URL or data URI. rate: the samples per second that a model hears.
    """

    def __call__(self, source: str, rate: int, /) -> Speech: ...


class Read(Protocol):
    """Where an input image comes from.

    It is its path, URL or data URI, the field that names it, and whether its alpha is kept.
    """

    def __call__(self, source: str, field: str, with_alpha: bool = False, /) -> numpy.ndarray: ...


def admit(
    blueprint: Blueprint,
    sampling: SamplingOptions,
    as_video: bool = False,
    read: Read = read_image,
    most_pixels: float = math.inf,
    hear: Hear = audio.read,
) -> list[Request]:
    """One request per prompt.

    video: a video is wanted where the model makes images by default (an output file named like one).
    most_pixels: of one output, all its frames together; they are counted before anything is brought to that
    size.
    Raises UserError naming the field, its value and what is allowed.
    """
    row = blueprint.row
    originals = _images(blueprint, sampling.image_path, read)
    height, width = _size(blueprint, sampling, originals)
    fps = row.fps if sampling.fps is None else sampling.fps
    seconds = _seconds(blueprint, sampling)
    if seconds is not None:  # room for the longest video; the prompt decides
        stride = blueprint.autoencoder.config.scale_factor_temporal
        longest = frames_between(math.inf, *seconds, fps, stride)
        sampling = replace(sampling, num_frames=longest)
    frames = _frames(blueprint, sampling, as_video or (bool(originals) and row.image_use == "frames"))
    for field, asked in (("loras", sampling.loras), ("refine_loras", sampling.refine_loras)):
        for name in asked:
            if name not in (names := [each.name for each in blueprint.adapters]):
                raise UserError(field, f"{field}: {loras.unknown(name, names)}")
    layers = (sampling.num_frames or row.layers) if row.layers else 0
    starts = _starts(blueprint, sampling, originals, frames)
    speech, length = _speech(blueprint, sampling, frames, hear)
    if (pixels := (length or frames) * max(1, layers) * height * width) > most_pixels:
        raise UserError("size", f"size: an output has {pixels:,} pixels; {most_pixels:,.0f} are the most")
    fit = cover if blueprint.denoiser.family.crops_images else resize
    resized = () if row.image_use == "references" else tuple(fit(image, height, width) for image in originals)
    places = _places(blueprint, sampling, len(originals), frames)
    if seconds is not None and set(places) - {0}:
        message = "only the first frame is known where the prompt decides the length; give num_frames"
        raise UserError("image_frames", f"image_frames: {message} in place of auto_duration")
    mask = _mask(blueprint, sampling, originals, starts, height, width, read)
    steps, sigmas, timesteps = _steps(blueprint, sampling)
    refinement = _refinement(blueprint, sampling)
    settled, cache = settle(blueprint, sampling), step_caches.settled(blueprint, sampling)
    guidance = Guidance(
        scale=settled.guidance_scale,
        scale_2=settled.guidance_scale_2,
        embedded=settled.embedded_guidance,
        normalization=_normalization(blueprint, sampling),
        terms=settled.terms,
    )
    schedule = Schedule(
        steps=steps,
        sigmas=sigmas,
        dmd_timesteps=timesteps,
        flow_shift=settled.flow_shift,
        boundary_ratio=settled.boundary_ratio,
        strength=_strength(blueprint, sampling, starts, steps),
    )
    sound = _sound(blueprint, sampling, frames)
    output = Output(height, width, frames, layers, fps, sound=sound, seconds=seconds, length=length)
    output = postprocess.planned(blueprint, sampling, output, most_pixels)
    requests = [
        Request(
            text=Text(prompt, settled.negative_prompt, row.text_tokens, settled.use_pe),
            guidance=guidance,
            schedule=schedule,
            images=InputImages(resized, originals, mask, places, starts),
            output=output,
            seeds=seeds(sampling, index),
            speech=speech,
            loras=sampling.loras,
            refinement=refinement,
            step_cache=cache,
            notes=settled.notes,
        )
        for index, prompt in enumerate(sampling.prompt or ("",) * row.captions)
    ]
    for request in requests:
        solver_table(blueprint, request)  # refuses a schedule that cannot be
    return requests


def _speech(
    blueprint: Blueprint, sampling: SamplingOptions, frames: int, hear: Hear
) -> tuple[Speech | None, int | None]:
    """(the sound that the video is made to, how many frames the video has)."""
    row, hearing, path = blueprint.row, blueprint.denoiser.family.hearing, sampling.audio_path
    if hearing is None or not row.speech:
        if path is not None:
            message = f"{row.name} makes no video to a given sound; leave it out"
            raise UserError("audio_path", f"audio_path: {message}")
        return None, None
    if path is None:
        message = f"{row.name} makes a video to a sound; give one with --audio-path"
        raise UserError("audio_path", f"audio_path: {message}")
    speech = hear(path, hearing.rate)
    configs = {name: net.config for name, net in blueprint.nets.items()}
    fps = row.fps if sampling.fps is None else sampling.fps
    return speech, hearing.length(configs, len(speech.samples), frames, fps)


def _seconds(blueprint: Blueprint, sampling: SamplingOptions) -> tuple[float, float] | None:
    """The bounds of a length that follows from the prompt; None where the number of frames is known."""
    asked = sampling.auto_duration_min_seconds, sampling.auto_duration_max_seconds
    if not sampling.auto_duration:
        for name, bound in zip(("min", "max"), asked, strict=True):
            if bound is not None:
                field = f"auto_duration_{name}_seconds"
                raise UserError(
                    field, f"{field}: {bound:g} is a bound of auto_duration, which is not asked for"
                )
        return None
    if DURATION not in blueprint.nets:
        message = f"{blueprint.row.name} has no {DURATION}, which tells from a prompt how long the video is"
        raise UserError("auto_duration", f"auto_duration: {message}; give num_frames")
    if sampling.num_frames is not None:
        message = (
            f"{sampling.num_frames} is given, and auto_duration asks the model for it; leave one of them out"
        )
        raise UserError("num_frames", f"num_frames: {message}")
    least, most = (
        standard if bound is None else bound for bound, standard in zip(asked, SECONDS, strict=True)
    )
    if least >= most:
        field = "auto_duration_min_seconds"
        raise UserError(field, f"{field}: {least:g} is not below auto_duration_max_seconds, {most:g}")
    return least, most


def _sound(blueprint: Blueprint, sampling: SamplingOptions, frames: int) -> bool:
    """Whether the output has sound: a video of a model that makes any, unless none is wanted."""
    possible = blueprint.row.sound and frames > 1
    if sampling.audio and not possible:
        why = "an image has no sound" if blueprint.row.sound else f"{blueprint.row.name} makes no sound"
        raise UserError("audio", f"audio: {why}; leave it out")
    return possible and sampling.audio is not False


def _refinement(blueprint: Blueprint, sampling: SamplingOptions) -> Refinement | None:
    """The second stage, where the model was loaded with an upsampler."""
    if UPSAMPLER not in blueprint.nets:
        for name in ("refine_sigmas", "refine_loras"):
            if getattr(sampling, name):
                message = f"{blueprint.row.name} is loaded without an upsampler, so there is no second stage"
                raise UserError(name, f"{name}: {message} (see --spatial-upsampler-path)")
        return None
    sigmas = sampling.refine_sigmas or blueprint.row.refine_sigmas
    _check_falling("refine_sigmas", sigmas)
    return Refinement(sigmas, sampling.refine_loras)


def _normalization(blueprint: Blueprint, sampling: SamplingOptions) -> float:
    row, limit = blueprint.row, sampling.cfg_normalization or 0.0
    if limit and row.guidance_form != "offset":
        raise UserError(
            "cfg_normalization",
            f"cfg_normalization: {row.name} does not support this limit on guidance; only Z-Image does",
        )
    return limit


def _starts(
    blueprint: Blueprint, sampling: SamplingOptions, originals: Sequence[numpy.ndarray], frames: int
) -> bool:
    """Whether the loop starts from the given image: of models that continue an image as a video, where one
    image is asked for.
    """
    row = blueprint.row
    if row.image_use == "start" or not originals:
        return row.image_use == "start" and bool(originals)
    if row.image_use == "references" or frames > 1:
        return False
    if row.images[0] or row.sound:
        least = blueprint.autoencoder.config.scale_factor_temporal + 1
        raise UserError(
            "num_frames",
            f"num_frames: 1 leaves no frame to generate after the given first frame; give at least {least}",
        )
    return True


def _strength(blueprint: Blueprint, sampling: SamplingOptions, starts: bool, steps: int) -> float:
    row, strength = blueprint.row, sampling.strength
    if strength is None:
        return STRENGTH if starts and sampling.mask_path is None else 1.0
    if not starts and (row.image_use != "start" or sampling.image_path):
        raise UserError(
            "strength",
            f"strength: {row.name} does not start from a noised image; it takes no strength{_instead(row)}",
        )
    if not sampling.image_path:
        raise UserError(
            "strength", "strength: no image is given for it to change; give one with --image-path"
        )
    if not 0 < strength <= 1:
        raise UserError("strength", f"strength: {strength} must be above 0 and at most 1")
    if int(steps - steps * strength) >= steps:
        raise UserError(
            "strength",
            f"strength: {strength} of {steps} steps leaves no step; give more steps or a higher strength",
        )
    return strength


def _instead(row: ReleasedModel) -> str:
    """What to ask for where a model that makes videos could start from an image."""
    return (
        "; ask for one image, with num_frames 1" if row.image_use == "frames" and row.images == (0, 1) else ""
    )


def _mask(
    blueprint: Blueprint,
    sampling: SamplingOptions,
    originals: Sequence[numpy.ndarray],
    starts: bool,
    height: int,
    width: int,
    read: Read,
) -> numpy.ndarray | None:
    """The mask at the request's size, 0 or 255 [height, width]; None without one.

    It is resized as the image is, as in diffusers' inpainting pipelines. Then pixels at least half as bright
    as white become white.
    """
    if sampling.mask_path is None:
        return None
    row = blueprint.row
    if not starts and (row.image_use != "start" or originals):
        raise UserError(
            "mask_path",
            f"mask_path: {row.name} does not inpaint; it takes no mask{_instead(row)}",
        )
    if not originals:
        raise UserError(
            "mask_path",
            "mask_path: no image is given to inpaint; give one with --image-path",
        )
    given = read(sampling.mask_path, "mask_path")
    if given.shape != originals[0].shape:
        sizes = [f"{shape[1]} x {shape[0]}" for shape in (given.shape, originals[0].shape)]
        raise UserError(
            "mask_path",
            f"mask_path: the mask is {sizes[0]} and the image {sizes[1]} pixels; both must be the same",
        )
    white = resize(given, height, width) @ LUMA >= 127.5
    if not white.any():
        raise UserError(
            "mask_path",
            "mask_path: the mask has no white pixel, so nothing would be inpainted (black is kept)",
        )
    return white * numpy.uint8(255)


def _multiple(blueprint: Blueprint) -> int:
    """Height and width must divide by the autoencoder's stride times the denoiser's patch, and half of them
    too where a first stage makes half the size.
    """
    net, stages = blueprint.denoiser, 2 if UPSAMPLER in blueprint.nets else 1
    return blueprint.autoencoder.config.scale_factor_spatial * net.family.patch(net.config)[-1] * stages


def _images(blueprint: Blueprint, paths: Sequence[str], read: Read) -> tuple[numpy.ndarray, ...]:
    row, net = blueprint.row, blueprint.denoiser
    least, most = row.images
    if len(paths) < least:
        verb = "edits" if row.image_use == "references" else "starts from"
        raise UserError("image_path", f"image_path: {row.name} {verb} an image; give one with --image-path")
    if paths and not most:
        raise UserError("image_path", f"image_path: {row.name} works from text alone; it takes no image")
    if row.image_use != "frames":
        if len(paths) > most:
            raise UserError(
                "image_path", f"image_path: {len(paths)} images are given; {row.name} takes at most {most}"
            )
        return tuple(read(path, "image_path", row.layers > 0) for path in paths)
    if net.family.keyframes:
        if len(paths) > most:
            message = f"{len(paths)} images are given; {row.name} takes at most {most} keyframes"
            raise UserError("image_path", f"image_path: {message}")
        return tuple(read(path, "image_path") for path in paths)
    frames = net.family.input_frames(net.config, blueprint.options)
    if paths and 1 not in frames and len(paths) != 2:
        raise UserError(
            "image_path", f"image_path: {row.name} goes from a first to a last frame and needs two images"
        )
    if len(paths) > max(frames):
        allowed = "the first and the last frame" if 2 in frames else "one, the first frame"
        raise UserError(
            "image_path", f"image_path: {len(paths)} images are given; {row.name} takes {allowed}"
        )
    return tuple(read(path, "image_path") for path in paths)


def _places(blueprint: Blueprint, sampling: SamplingOptions, images: int, frames: int) -> tuple[int, ...]:
    """The frame of the video at which each of so many input images stands."""
    asked, row = sampling.image_frames, blueprint.row
    if not blueprint.denoiser.family.keyframes:
        if asked:
            message = f"{row.name} has no keyframes; the place of its input images is fixed"
            raise UserError("image_frames", f"image_frames: {message}")
        return ()
    if asked and len(asked) != images:
        message = f"{len(asked)} are given for {images} input images; give one for each"
        raise UserError("image_frames", f"image_frames: {message}")
    if not asked and images > 2:
        message = f"{images} input images are given; say at which frame each of them stands"
        raise UserError("image_frames", f"image_frames: {message}")
    for place in asked:
        if not -frames <= place < frames:
            message = f"{place} is beyond the {frames} frames of the video, 0 to {frames - 1}"
            raise UserError("image_frames", f"image_frames: {message}")
    places = tuple(place % frames for place in asked or (0, -1)[:images])
    if twice := next((place for i, place in enumerate(places) if place in places[:i]), None):
        raise UserError("image_frames", f"image_frames: two images stand at frame {twice}; one can")
    return places


def _size(
    blueprint: Blueprint, sampling: SamplingOptions, images: Sequence[numpy.ndarray]
) -> tuple[int, int]:
    """The requested size; else the model's, its area fitted to the aspect ratio of the input image."""
    row, multiple, longest = blueprint.row, _multiple(blueprint), _longest_side(blueprint)
    height, width = sampling.height or row.height, sampling.width or row.width
    net = blueprint.denoiser
    size_from_image = net.family.size_from_image
    if images and size_from_image is not None:
        (tall, wide), *_ = [
            size_from_image(net.config, image.shape[0], image.shape[1], multiple) for image in images
        ]  # each may be refused
        height, width = sampling.height or tall, sampling.width or wide
    elif images and row.reference_multiple is not None:
        tall, wide = fit_area(
            row.height * row.width, images[-1].shape[0], images[-1].shape[1], row.reference_multiple
        )
        height, width = sampling.height or tall, sampling.width or wide
    elif images and row.image_use != "references" and sampling.height is None and sampling.width is None:
        tall, wide = images[0].shape[:2]
        area = row.height * row.width
        sides = rectangle_side(area, tall, wide), rectangle_side(area, wide, tall)
        if min(sides) < multiple / 2:
            raise too_elongated(tall, wide)
        height, width = (max(multiple, each // multiple * multiple) for each in sides)
    for name, value in (("height", height), ("width", width)):
        if value < multiple or value % multiple:
            below = value // multiple * multiple
            near = f"{multiple}" if below == 0 else f"{below} and {below + multiple}"
            raise UserError(
                name,
                f"{name}: {value} is not a multiple of {multiple}, which {row.name} needs; the "
                f"nearest: {near}",
            )
        if value > longest:
            raise UserError(
                name,
                f"{name}: {value} is more than {longest} pixels, the longest side that {row.name} "
                "has positions for",
            )
    return height, width


def _longest_side(blueprint: Blueprint) -> float:
    net = blueprint.denoiser
    if net.family.longest_side is None:
        return math.inf
    return net.family.longest_side(net.config) * blueprint.autoencoder.config.scale_factor_spatial


def _frames(blueprint: Blueprint, sampling: SamplingOptions, as_video: bool) -> int:
    row, stride = blueprint.row, blueprint.autoencoder.config.scale_factor_temporal
    if row.layers:
        return 1
    frames = sampling.num_frames or (row.video_frames if as_video else row.num_frames)
    if frames > 1 and row.video_frames == 1:
        raise UserError(
            "num_frames", f"num_frames: {frames} would be a video, but {row.name} makes images; leave it out"
        )
    if blueprint.denoiser.family.hearing is not None:
        if frames % stride:
            below = frames // stride * stride
            near = f"{below} and {below + stride}" if below else f"{stride}"
            message = (
                f"{frames} is not a multiple of {stride}, which a segment of {row.name} has; the nearest"
            )
            raise UserError("num_frames", f"num_frames: {message}: {near}")
        return frames
    if (frames - 1) % stride:
        below = (frames - 1) // stride * stride + 1
        near = f"{below} and {below + stride}"
        raise UserError(
            "num_frames",
            f"num_frames: {frames} is not {stride}k + 1, which {row.name} needs; the nearest: {near}",
        )
    return frames


def _steps(blueprint: Blueprint, sampling: SamplingOptions) -> tuple[int, tuple[float, ...], tuple[int, ...]]:
    """(steps, the sigmas of a distilled model or nothing, its timesteps or nothing).

    Another number of steps than that of the model's own sigmas takes the sigmas of its scheduler.
    """
    row, asked = blueprint.row, sampling.num_inference_steps
    if sampling.sigmas:
        _check_sigmas(row, sampling)
        return len(sampling.sigmas), sampling.sigmas, ()
    if row.solver != "dmd":
        if sampling.dmd_denoising_steps:
            raise UserError(
                "dmd_denoising_steps",
                f"dmd_denoising_steps: {row.name} is not distilled; give num_inference_steps instead",
            )
        steps = asked or row.steps
        return steps, row.sigmas if steps == len(row.sigmas) else (), ()
    timesteps = sampling.dmd_denoising_steps or row.dmd_timesteps
    if asked is not None and asked != len(timesteps):
        message = (
            f"{asked} does not fit {row.name}, distilled for {len(timesteps)}; other timesteps go "
            "into dmd_denoising_steps"
        )
        raise UserError("num_inference_steps", f"num_inference_steps: {message}")
    return len(timesteps), (), tuple(timesteps)


def _check_sigmas(row: ReleasedModel, sampling: SamplingOptions) -> None:
    sigmas, steps = sampling.sigmas, sampling.num_inference_steps
    if row.solver == "dmd":
        raise UserError(
            "sigmas",
            f"sigmas: {row.name} is distilled for fixed timesteps; give dmd_denoising_steps",
        )
    if steps is not None and steps != len(sigmas):
        message = f"{steps} does not fit the {len(sigmas)} sigmas given; leave it out"
        raise UserError("num_inference_steps", f"num_inference_steps: {message}")
    _check_falling("sigmas", sigmas)


def _check_falling(name: str, sigmas: Sequence[float]) -> None:
    for before, after in pairwise(sigmas):
        if after >= before:
            raise UserError(name, f"{name}: {after:g} follows {before:g}; each must be below the one before")
