"""Admission: a request's fields are filled from the model's defaults and checked against what the model can do, before anything is made."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy

from tinydiff.config import SamplingOptions, seeds
from tinydiff.io.images import read_image, resize
from tinydiff.records import Request, UserError
from tinydiff.runtime.blueprint import Blueprint
from tinydiff.runtime.pipeline import table


def admit(blueprint: Blueprint, sampling: SamplingOptions, clip: bool = False) -> list[Request]:
    """One request per prompt. clip: a clip is wanted where the model makes pictures by default (an output file named like one).

    Raises UserError naming the field, its value and what is allowed.
    """
    originals = _images(blueprint, sampling.image_path)
    height, width = _size(blueprint, sampling, originals)
    frames = _frames(blueprint, sampling, clip or bool(originals))
    if originals and frames == 1:
        least = blueprint.nets["vae"].config.scale_factor_temporal + 1
        raise UserError("num_frames", f"num_frames: 1 leaves nothing to make after the given first frame; give at least {least}")
    images = tuple(resize(image, height, width) for image in originals)
    steps, timesteps = _steps(blueprint, sampling)
    row = blueprint.row
    guidance = _guidance(row.guidance if sampling.guidance_scale is None else sampling.guidance_scale)
    second, boundary = _experts(blueprint, sampling, guidance)
    own = not blueprint.named and row.solver != "dmd"  # a distilled model does not run by the scheduler that lies in its folder
    shift = blueprint.scheduler.get("flow_shift", blueprint.scheduler.get("shift", 1.0)) if own else row.flow_shift
    negative = row.negative_prompt if sampling.negative_prompt is None else sampling.negative_prompt
    requests = [
        Request(
            prompt=prompt,
            negative_prompt=negative or "",
            images=images,
            originals=originals,
            height=height,
            width=width,
            num_frames=frames,
            fps=row.fps if sampling.fps is None else sampling.fps,
            num_inference_steps=steps,
            guidance_scale=guidance,
            guidance_scale_2=second,
            boundary_ratio=boundary,
            flow_shift=shift if sampling.flow_shift is None else sampling.flow_shift,
            dmd_timesteps=timesteps,
            seeds=seeds(sampling, index),
        )
        for index, prompt in enumerate(sampling.prompt)
    ]
    for request in requests:
        table(blueprint, request)  # refuses a schedule that cannot be
    return requests


def _guidance(scale: float) -> float:
    """Guidance is off at 1 and below."""
    return max(1.0, scale)


def _multiple(blueprint: Blueprint) -> int:
    """Height and width must divide by the autoencoder's stride times the denoiser's patch."""
    return blueprint.nets["vae"].config.scale_factor_spatial * blueprint.nets["transformer"].config.patch_size[-1]


def _images(blueprint: Blueprint, paths: Sequence[str]) -> tuple[numpy.ndarray, ...]:
    row, net = blueprint.row, blueprint.nets["transformer"].config
    if not paths and row.image == "required":
        raise UserError("image_path", f"image_path: {row.name} starts from a picture; give one with --image-path")
    if paths and row.image == "none":
        raise UserError("image_path", f"image_path: {row.name} makes clips from text alone; it takes no picture")
    two_views = net.image_dim is not None and net.pos_embed_seq_len is not None
    if paths and two_views and len(paths) != 2:
        raise UserError("image_path", f"image_path: {row.name} goes from a first to a last frame; give two pictures")
    both = two_views or (net.image_dim is None and not blueprint.options.get("expand_timesteps"))
    if len(paths) > (2 if both else 1):
        allowed = "the first and the last frame" if both else "one, the first frame"
        raise UserError("image_path", f"image_path: {len(paths)} pictures are given; {row.name} takes {allowed}")
    return tuple(read_image(path) for path in paths)


def _size(blueprint: Blueprint, sampling: SamplingOptions, images: Sequence[numpy.ndarray]) -> tuple[int, int]:
    """The asked size; else the model's, its area spread to the aspect of the given picture."""
    row, multiple = blueprint.row, _multiple(blueprint)
    height, width = sampling.height or row.height, sampling.width or row.width
    if images and sampling.height is None and sampling.width is None:
        aspect = images[0].shape[0] / images[0].shape[1]
        height, width = (
            max(multiple, int(math.sqrt(row.height * row.width * ratio)) // multiple * multiple) for ratio in (aspect, 1 / aspect)
        )
    for name, value in (("height", height), ("width", width)):
        if value < multiple or value % multiple:
            below = value // multiple * multiple
            near = f"{multiple}" if below == 0 else f"{below} and {below + multiple}"
            raise UserError(name, f"{name}: {value} is not a multiple of {multiple}, which {row.name} needs; the nearest: {near}")
    return height, width


def _frames(blueprint: Blueprint, sampling: SamplingOptions, clip: bool) -> int:
    row, stride = blueprint.row, blueprint.nets["vae"].config.scale_factor_temporal
    frames = sampling.num_frames or (row.clip_frames if clip else row.num_frames)
    if (frames - 1) % stride:
        below = (frames - 1) // stride * stride + 1
        near = f"{below} and {below + stride}"
        raise UserError("num_frames", f"num_frames: {frames} is not {stride}k + 1, as {row.name} needs; the nearest: {near}")
    return frames


def _steps(blueprint: Blueprint, sampling: SamplingOptions) -> tuple[int, tuple[int, ...]]:
    """(steps, the timesteps of a distilled model or nothing)."""
    row = blueprint.row
    if row.solver != "dmd":
        if sampling.dmd_denoising_steps:
            raise UserError("dmd_denoising_steps", f"dmd_denoising_steps: {row.name} is not distilled; give num_inference_steps instead")
        return sampling.num_inference_steps or row.steps, ()
    timesteps = sampling.dmd_denoising_steps or row.dmd_timesteps
    asked = sampling.num_inference_steps
    if asked is not None and asked != len(timesteps):
        message = f"{asked} does not fit {row.name}, distilled for {len(timesteps)}; other timesteps go into dmd_denoising_steps"
        raise UserError("num_inference_steps", f"num_inference_steps: {message}")
    return len(timesteps), tuple(timesteps)


def _experts(blueprint: Blueprint, sampling: SamplingOptions, guidance: float) -> tuple[float | None, float | None]:
    """(guidance of the second expert, boundary) of a model with two, else (None, None)."""
    row = blueprint.row
    if "transformer_2" not in blueprint.nets:
        for name in ("guidance_scale_2", "boundary_ratio"):
            if getattr(sampling, name) is not None:
                raise UserError(name, f"{name}: {row.name} has one expert, so it cannot be set")
        return None, None
    second = sampling.guidance_scale_2
    if second is None:
        second = guidance if sampling.guidance_scale is not None or row.guidance_2 is None else row.guidance_2
    boundary = sampling.boundary_ratio
    if boundary is None:
        boundary = row.boundary_ratio if row.boundary_ratio is not None else blueprint.options.get("boundary_ratio")
    if boundary is None:
        raise UserError("boundary_ratio", f"boundary_ratio: {row.name} has two experts and names no boundary; give one between 0 and 1")
    return _guidance(second), boundary
