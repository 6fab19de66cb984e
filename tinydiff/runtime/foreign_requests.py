"""Requests for another library's pipeline: options become arguments of its call, each of which it must take.

What the user leaves out is not passed, so the pipeline's own defaults hold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any, cast

import numpy
import torch

from tinydiff.config import SamplingOptions, seeds
from tinydiff.entries import Entries, EntryDict
from tinydiff.io import audio
from tinydiff.io.images import read_image
from tinydiff.records import Guidance, InputImages, Output, Request, Schedule, Text, UserError, nearest
from tinydiff.runtime import postprocess
from tinydiff.runtime.admit import Hear, Read
from tinydiff.runtime.blueprint import Blueprint
from tinydiff.runtime.foreign import Foreign
from tinydiff.version import __version__

NAMES: Mapping[str, tuple[str, ...]] = {
    "dmd_denoising_steps": ("timesteps",),
    "fps": ("fps", "frame_rate"),
    "image_path": ("image", "images"),
    "mask_path": ("mask_image",),
    "num_frames": ("num_frames", "video_length"),
}
"""Option -> the arguments of which a pipeline has one; every other option's argument has its own name."""
OURS = frozenset(
    {"prompt", "seed", "num_outputs_per_prompt", "loras", "diffusers_kwargs"} | set(postprocess.OPTIONS)
)
"""Options that become no argument by themselves."""
SET_HERE: Mapping[str, str] = {
    "generator": "seed",
    "num_images_per_prompt": "num_outputs_per_prompt",
    "num_videos_per_prompt": "num_outputs_per_prompt",
    "prompt": "prompt",
    "output_type": "",
    "return_dict": "",
    **{name: name for name in ("height", "width", "num_inference_steps")},
    **{name: "num_frames" for name in NAMES["num_frames"]},
    **{name: "image_path" for name in NAMES["image_path"]},
    "mask_image": "mask_path",
    "callback": "",
    "callback_steps": "",
    "callback_on_step_end": "",
    "callback_on_step_end_tensor_inputs": "",
}
"""Arguments that diffusers_kwargs may not set -> the option in their place, which a server limits."""


def admit(
    blueprint: Blueprint,
    sampling: SamplingOptions,
    as_video: bool = False,
    read: Read = read_image,
    most_pixels: float = math.inf,
    hear: Hear = audio.read,
) -> list[Request]:
    """One request per prompt, as `runtime.admit.admit` has it. Raises UserError.

    hear: is not called, because no pipeline is given a sound.
    """
    foreign, row = _of(blueprint), blueprint.row
    given = dict(_chosen(foreign, sampling))
    images = tuple(read(path, "image_path") for path in sampling.image_path)
    mask = None if sampling.mask_path is None else read(sampling.mask_path, "mask_path")[..., 0]
    arguments = {argument: value for argument, value in given.values() if argument}
    if images:
        [first, *others] = images
        arguments[given["image_path"][0]] = images if others else first
    if mask is not None:
        arguments[given["mask_path"][0]] = mask
    arguments |= _further(foreign, sampling.diffusers_kwargs, given)
    _check_needed(foreign, arguments, sampling.prompt)
    _check_loras(foreign, sampling)
    output = _output(blueprint, sampling, arguments, most_pixels)
    guidance = arguments.get("guidance_scale", row.guidance)
    steps = arguments.get("num_inference_steps", row.steps)
    negative = str(arguments.get("negative_prompt") or "")
    return [
        Request(
            text=Text(prompt, negative, row.text_tokens),
            guidance=Guidance(scale=guidance),
            schedule=Schedule(steps=steps),
            images=InputImages(originals=images, mask=mask),
            output=output,
            seeds=seeds(sampling, index),
            loras=sampling.loras,
            arguments=arguments | ({"prompt": prompt} if prompt or "prompt" in foreign.arguments else {}),
        )
        for index, prompt in enumerate(sampling.prompt or ("",))
    ]


def _of(blueprint: Blueprint) -> Foreign:
    assert blueprint.foreign is not None
    return blueprint.foreign


def _takes(foreign: Foreign, name: str) -> bool:
    return name in foreign.arguments or foreign.open


def takes_none(foreign: Foreign, name: str, option: str) -> UserError:
    """The error of an argument that a pipeline does not take; it names what it takes."""
    taken = [each for each in foreign.arguments if SET_HERE.get(each) != ""]
    message = f"{foreign.class_name} takes no {name}; it takes {', '.join(taken)}{nearest(name, taken)}"
    return UserError(option, f"{option}: {message}")


def _chosen(foreign: Foreign, sampling: SamplingOptions) -> Iterator[tuple[str, tuple[str, Any]]]:
    """(option, (the argument that it is or "", its value)) of each option that is given."""
    for entry in fields(SamplingOptions):
        name, value = entry.name, getattr(sampling, entry.name)
        if name in OURS or value is None or value is False or value in ((), {}):
            continue
        names = NAMES.get(name, (name,))
        argument = next((each for each in names if each in foreign.arguments), "")
        if not argument and foreign.open:
            argument = names[0]
        harmless = name == "fps" or (name == "num_frames" and value == 1)  # a file's, or what an image has
        if not argument and not harmless:
            raise takes_none(foreign, names[0], name)
        yield name, (argument, list(cast(tuple[object, ...], value)) if isinstance(value, tuple) else value)


def _further(foreign: Foreign, further: Entries, chosen: Mapping[str, tuple[str, Any]]) -> EntryDict:
    """The arguments of diffusers_kwargs. Raises UserError for one that is not taken, or given twice."""
    field = "diffusers_kwargs"
    for name in further:
        if name in SET_HERE:
            instead = f"; give {SET_HERE[name]}" if SET_HERE[name] else ""
            raise UserError(field, f"{field}: {name!r} cannot be set there{instead}")
        if twice := next((option for option, (argument, _) in chosen.items() if argument == name), None):
            message = f"{name!r} is given by {twice} too; give one of them"
            raise UserError(field, f"{field}: {message}")
        if not _takes(foreign, name):
            raise takes_none(foreign, name, field)
    return dict(further)


def _check_needed(foreign: Foreign, arguments: Entries, prompts: Iterable[str]) -> None:
    if any(prompts) and not _takes(foreign, "prompt"):
        raise takes_none(foreign, "prompt", "prompt")
    for name in foreign.needed:
        if name not in arguments and name not in ("prompt", "self"):
            option = next((option for option, names in NAMES.items() if name in names), "diffusers_kwargs")
            raise UserError(option, f"{option}: {foreign.class_name} needs the argument {name!r}")


def _check_loras(foreign: Foreign, sampling: SamplingOptions) -> None:
    names = [each.name for each in foreign.adapters]
    for name in sampling.loras:
        if foreign.options.lora_merge_mode == "merge":
            raise UserError("loras", f"loras: {name!r} is merged into the weights, so its strength is fixed")
        if name not in names:
            known = f"it is not one of {', '.join(names)}" if names else "no adapter is loaded"
            raise UserError("loras", f"loras: {name!r} cannot be used; {known}{nearest(name, names)}")


def _output(
    blueprint: Blueprint, sampling: SamplingOptions, arguments: Entries, most_pixels: float
) -> Output:
    """The size of an output as far as it is known; where nothing says it, the pipeline chooses another."""
    row = blueprint.row
    named = (arguments.get(name) for name in NAMES["num_frames"])
    frames = next((frames for frames in named if frames is not None), row.video_frames)
    height, width = arguments.get("height") or row.height, arguments.get("width") or row.width
    if (pixels := frames * height * width) > most_pixels:
        raise UserError("size", f"size: an output has {pixels:,} pixels; {most_pixels:,.0f} are the most")
    output = Output(height, width, frames, 0, sampling.fps or row.fps)
    return postprocess.planned(blueprint, sampling, output, most_pixels)


def parameters(
    blueprint: Blueprint, request: Request, frames: numpy.ndarray, steps: int, effective: Entries
) -> EntryDict:
    """Every effective parameter of an output but the seed, as `runtime.parameters.parameters` has it.

    frames, steps: what was made, and in how many steps. effective: what the pipeline itself tells of
    arguments that nobody gave.
    """
    foreign = _of(blueprint)
    defaults = {name: value for name, value in foreign.arguments.items() if value is not None}
    held = {**effective, **defaults, **request.arguments}
    entries: EntryDict = {"model": blueprint.row.name, "backend": foreign.library}
    entries |= {"pipeline": foreign.class_name}
    entries |= {
        name: value for name, value in held.items() if SET_HERE.get(name, name) == name and _is_plain(value)
    }
    entries |= {"prompt": request.text.prompt, "num_inference_steps": steps, "fps": request.output.fps}
    entries |= {"num_frames": frames.shape[0], "height": frames.shape[1], "width": frames.shape[2]}
    entries["given_images"] = len(request.images.originals)
    entries |= postprocess.parameters(request.output)
    if strengths := foreign.strengths(request.loras):
        entries["loras"] = strengths
    entries["precision"] = dict(foreign.precisions)
    return entries | {foreign.library: foreign.version, "tinydiff": __version__, "torch": torch.__version__}


def _is_plain(value: object) -> bool:
    """Whether JSON can hold a value that says something."""
    if value is None or isinstance(value, numpy.ndarray | tuple):
        return False
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
