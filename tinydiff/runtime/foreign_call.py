"""One call of another library's pipeline: its steps are told, its output becomes frames."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import cast

import numpy
import torch

from tinydiff.entries import EntryDict
from tinydiff.records import Request, UserError
from tinydiff.runtime.blueprint import Model
from tinydiff.runtime.foreign import Untyped
from tinydiff.runtime.shortage import short_of_memory

log = logging.getLogger(__name__)

OUTPUTS = ("frames", "images", "videos", "video", "image", "sample")
"""What pipelines call what they make."""


class StepBar:
    """Stands in for the progress bar of a pipeline, which it moves after each step; told to `on_step`."""

    def __init__(
        self, on_step: Callable[[int, int], None], iterable: Iterable[Untyped] = (), total: int | None = None
    ) -> None:
        self._on_step, self._iterable = on_step, iterable
        self._done, self._total = 0, len(list(iterable)) if total is None else total

    def __enter__(self) -> StepBar:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __iter__(self) -> Iterator[Untyped]:
        for each in self._iterable:
            yield each
            self.update()

    def update(self, count: int = 1) -> None:
        self._done += count
        self._on_step(self._done, self._total)

    def close(self) -> None: ...

    def set_postfix(self, *_: object, **__: object) -> None: ...


def call(
    model: Model, request: Request, seed: int, on_step: Callable[[int, int], None]
) -> tuple[numpy.ndarray, EntryDict]:
    """(frames uint8 [frames, height, width, 3], values that the pipeline tells) of one seed.

    on_step(done, total) is called after each step; what it raises ends the call. Raises UserError for
    arguments that the pipeline refuses.
    """
    pipe, foreign = model.pipe, model.blueprint.foreign
    assert foreign is not None
    arguments = {name: _as_images(value) for name, value in request.arguments.items()}
    ours = {"generator": torch.Generator("cpu").manual_seed(seed), "output_type": "np"}
    arguments |= {name: value for name, value in ours.items() if name in foreign.arguments}
    if foreign.adapters and foreign.options.lora_merge_mode != "merge":
        strengths = foreign.strengths(request.loras)
        pipe.set_adapters(list(strengths), list(strengths.values()))
    if foreign.output is not None:
        arguments["output"] = foreign.output
    for part in (pipe, *_blocks(getattr(pipe, "_blocks", None))):
        if hasattr(part, "progress_bar"):
            part.progress_bar = partial(StepBar, on_step)
    try:
        made = pipe(**arguments)
    except (ValueError, TypeError, AssertionError) as error:
        log.debug("", exc_info=error)
        said = str(error).strip() or type(error).__name__
        named = (name for name in request.arguments if re.search(rf"\b{name}\b", said))
        field = next(named, "prompt" if "prompt" in request.arguments else "diffusers_kwargs")
        message = f"{foreign.class_name} refuses the request: {said}"
        raise UserError(field, f"{field}: {message}") from error
    except (RuntimeError, ArithmeticError, LookupError, AttributeError, ImportError) as error:
        if short_of_memory(error):
            raise
        log.debug("", exc_info=error)
        message = f"{foreign.class_name} failed: {type(error).__name__}: {error}"
        raise UserError("model_path", f"model_path: {message}") from error
    told = {name: getattr(pipe, name, None) for name in ("guidance_scale",) if name in foreign.arguments}
    return _frames(made), {name: value for name, value in told.items() if value is not None}


def _blocks(block: Untyped) -> Iterator[Untyped]:
    """A block of a modular pipeline, and all in it."""
    if block is not None:
        yield block
        for inner in getattr(block, "sub_blocks", {}).values():
            yield from _blocks(inner)


def _as_images(value: object) -> object:
    """Arrays as PIL images, which every pipeline takes."""
    from PIL import Image

    if isinstance(value, numpy.ndarray):
        return Image.fromarray(cast(numpy.ndarray, value))
    if isinstance(value, tuple):
        return [_as_images(each) for each in cast(tuple[object, ...], value)]
    return value


def _frames(made: Untyped) -> numpy.ndarray:
    """The frames of an output of a pipeline, uint8 [frames, height, width, 3]."""
    value = next((getattr(made, name) for name in OUTPUTS if getattr(made, name, None) is not None), made)
    if value is made and isinstance(made, tuple):
        value = cast(tuple[object, ...], made)[0]
    frames = _array(value)
    frames = frames[0] if frames.ndim == 5 else frames[None] if frames.ndim == 3 else frames
    if frames.dtype != numpy.uint8:
        frames = (frames.astype(numpy.float32) * 255).round().clip(0, 255).astype(numpy.uint8)
    return frames.repeat(3, -1) if frames.shape[-1] == 1 else frames[..., :3]


def _array(value: Untyped) -> numpy.ndarray:
    """Arrays, tensors with channels before height and width, and PIL images, or lists of them, as an array
    with channels last.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().float().cpu().movedim(-3, -1).numpy()
    if isinstance(value, Sequence):
        return numpy.stack([_array(each) for each in cast(Sequence[object], value)])
    return numpy.asarray(value.convert("RGB") if hasattr(value, "convert") else value)
