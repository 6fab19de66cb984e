"""What is done to decoded frames: interpolation first, since small frames are quicker, then upscaling.

Frames pass one by one to whoever takes them, which is mostly the writer of a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy

from tinydiff.config import SamplingOptions
from tinydiff.entries import Entries, EntryDict
from tinydiff.records import Frames, Interpolation, Output, Request, Sound, Upscaling, UserError
from tinydiff.runtime import interpolate, upscale
from tinydiff.runtime.blueprint import Blueprint
from tinydiff.runtime.clock import Clock

INTERPOLATION, UPSCALING = "enable_frame_interpolation", "enable_upscaling"
"""The options that turn them on."""
FURTHER: Mapping[str, tuple[str, ...]] = {
    INTERPOLATION: tuple(f"frame_interpolation_{name}" for name in ("exp", "scale", "scene_threshold")),
    UPSCALING: ("upscaling_scale",),
}
"""Each -> the options that have an effect with it alone."""
OPTIONS = frozenset((*FURTHER, *FURTHER[INTERPOLATION], *FURTHER[UPSCALING]))
MOST = 16
"""How many times more pixels an output may have afterwards: fourfold height and width."""
MOST_FPS = 1000
"""Frames per second of a video at most."""


# --- admission


def planned(blueprint: Blueprint, sampling: SamplingOptions, output: Output, most_pixels: float) -> Output:
    """The output with what is to be done to its frames. Raises UserError.

    most_pixels: that an output may have before.
    """
    for switch, names in FURTHER.items():
        for name in names:
            if not getattr(sampling, switch) and (value := getattr(sampling, name)) is not None:
                raise UserError(name, f"{name}: {value} has no effect without {switch}")
    if sampling.enable_frame_interpolation:
        output = replace(output, interpolation=_interpolation(blueprint, sampling, output))
    if sampling.enable_upscaling:
        model = upscale.locate(blueprint.upscaling_model_path, sampling.upscaling_scale or 4)
        scale = sampling.upscaling_scale or upscale.read(model).scale
        output = replace(output, upscaling=Upscaling(model, scale))
    height, width = output.saved_size
    pixels, most = output.saved_frames * max(1, output.layers) * height * width, most_pixels * MOST
    if pixels > most:
        field = "upscaling_scale" if sampling.enable_upscaling else "frame_interpolation_exp"
        what = "upscaled" if sampling.enable_upscaling else "interpolated"
        raise UserError(field, f"{field}: an {what} output has {pixels:,} pixels; {most:,.0f} are the most")
    return output


def _interpolation(blueprint: Blueprint, sampling: SamplingOptions, output: Output) -> Interpolation:
    if output.num_frames == 1:
        raise _one_frame()
    exp, scale = sampling.frame_interpolation_exp or 1, sampling.frame_interpolation_scale or 1.0
    if (fps := output.fps * 2**exp) > MOST_FPS:
        message = f"{exp} makes {fps} frames per second of {output.fps}; {MOST_FPS} are the most"
        raise UserError("frame_interpolation_exp", f"frame_interpolation_exp: {message}")
    if scale not in interpolate.SCALES:
        message = f"{scale:g} is not one of {', '.join(f'{each:g}' for each in interpolate.SCALES)}"
        raise UserError("frame_interpolation_scale", f"frame_interpolation_scale: {message}")
    threshold = sampling.frame_interpolation_scene_threshold
    model = interpolate.locate(blueprint.frame_interpolation_model_path)
    interpolate.read(model)
    return Interpolation(model, exp, scale, interpolate.SCENE_THRESHOLD if threshold is None else threshold)


def _one_frame() -> UserError:
    message = "one frame has none after it to interpolate towards; ask for a video of 2 or more"
    return UserError(INTERPOLATION, f"{INTERPOLATION}: {message}")


def parameters(output: Output) -> EntryDict:
    """What is done, among the effective parameters."""
    effective: EntryDict = {}
    if (added := output.interpolation) is not None:
        values = (added.exp, added.scale, added.scene_threshold)
        effective |= dict(zip(FURTHER[INTERPOLATION], values, strict=True))
    if output.upscaling is not None:
        effective["upscaling_scale"] = output.upscaling.scale
    return effective


def needs(output: Output) -> dict[str, tuple[int, int]]:
    """Stage -> (bytes of its weights, bytes that it needs beside them for a frame)."""
    bytes_of: dict[str, tuple[int, int]] = {}
    if output.interpolation is not None:
        bytes_of["interpolation"] = interpolate.needs(output.interpolation, output.height, output.width)
    if output.upscaling is not None:
        bytes_of["upscale"] = upscale.needs(output.upscaling.model, output.height, output.width)
    return bytes_of


# --- frames


def processed(
    blueprint: Blueprint, output: Output, decoded: numpy.ndarray, clock: Clock
) -> numpy.ndarray | Frames:
    """What is returned for frames uint8 [F, H, W, 3 or 4]: themselves, where nothing is asked for."""
    asked, scaling = output.interpolation, output.upscaling
    names = [name for name, on in (("interpolation", asked), ("upscale", scaling)) if on is not None]
    if not names:
        return decoded
    count, height, width, channels = decoded.shape
    if asked is not None and count == 1:  # of a pipeline that does not say so before
        raise _one_frame()
    larger = 1 if scaling is None else scaling.scale
    shape = (count * output.factor, height * larger, width * larger, channels)

    def frames_made() -> Iterator[numpy.ndarray]:
        clock.progress.on_stage(" and ".join(names))
        frames, upscaler, device, compiled = iter(decoded), None, blueprint.device, blueprint.compiled
        if asked is not None:
            net = interpolate.load(asked.model, device, asked.scale, compiled)
            frames = clock.within("interpolation", interpolate.interpolated(net, frames, asked))
        if scaling is not None:
            upscaler = upscale.load(scaling.model, device, compiled)
        for done, frame in enumerate(frames, 1):
            if upscaler is not None:
                with clock.stage("upscale", shown=False):
                    frame = upscale.enlarge(upscaler, frame, larger)
            clock.progress.on_step(done, shape[0])
            yield frame

    return Frames(decoded, shape, frames_made, clock.seconds)


class Save(Protocol):
    """What writes an output: its number, its frames and sound, and the parameters -> its files."""

    def __call__(
        self,
        index: int,
        frames: numpy.ndarray | Frames,
        sound: Sound | None,
        parameters: Entries,
        /,
    ) -> Sequence[Path]: ...


def deliver(
    blueprint: Blueprint,
    request: Request,
    index: int,
    decoded: numpy.ndarray,
    sound: Sound | None,
    parameters: Entries,
    clock: Clock,
    save: Save | None,
    keep: bool,
) -> tuple[numpy.ndarray | None, Sequence[Path]]:
    """(all frames of output `index`, where they are kept; the files that `save` made of it)."""
    frames = processed(blueprint, request.output, decoded, clock)
    if keep and isinstance(frames, Frames):
        frames = frames.array()
    paths: Sequence[Path] = ()
    if save is not None:
        with clock.stage("save", shown=not isinstance(frames, Frames)):
            paths = save(index, frames, sound, parameters)
    return frames if keep and not isinstance(frames, Frames) else None, paths


def unload() -> None:
    """Let go of the networks in memory."""
    interpolate.load.cache_clear()
    upscale.load.cache_clear()
