"""How a denoiser is compared with its reference: one evaluation, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor, nn

from tinydiff.models import (
    family,
    z_image,
)
from tinydiff.models.evaluate import evaluate
from tinydiff.ops.network import Config, Network
from tinydiff.parity.asked import PLAN, TIME, Asked
from tinydiff.parity.reference import Case, Foreign, built, library, overheard


@dataclass(frozen=True)
class Denoiser:
    """A tiny denoiser, and names of the reference's layers.

    The names are of what is hoisted of the time and of the text, and of how tokens enter.

    time, text: (layer, the name under which `hoist` returns its output). Blocks need no names, for theirs are
    ours.
    """

    family: family.Denoiser
    reference: str
    config: Config
    ask: Callable[[Config], Asked]
    time: tuple[str, str]
    text: tuple[str, str] | None
    """None where the text enters the blocks as it is given."""
    image: str | None
    """The layer that embeds the image's tokens; None where its output is not in their order."""
    sinusoid: str = ""
    """A layer that computes in float32 whatever comes."""
    image_alone: str = ""
    """How the names of blocks begin that the reference runs on the image alone."""
    image_first: bool = False
    """How the reference's blocks order a joint sequence."""
    sequence_first: bool = False
    """Whether its dimensions are (sequence, batch, width)."""
    prepare: Callable[[nn.Module], None] = lambda module: None
    """Done to the reference before its roundings are taken out."""


def case(d: Denoiser) -> Case:
    """Stages: time, text, image, each block under its name, and the last layer."""
    places = [at for _, at in d.family.blocks(d.config)]
    asked = d.ask(d.config)
    layers = {"time": d.time[0]} | ({} if d.text is None else {"text": d.text[0]})
    layers |= {} if d.image is None else {"image": d.image}
    layers |= {at: at for at in places}

    def reference() -> nn.Module:
        with patch("torch.polar", _polar):
            module = built(getattr(library("diffusers"), d.reference), d.config)
        if d.sinusoid:
            module.get_submodule(d.sinusoid).register_forward_pre_hook(as_float32)
        d.prepare(module)
        return module

    def theirs(module: nn.Module) -> dict[str, Tensor]:
        with overheard(module, layers.values()) as heard:
            velocity = asked.answer(module(**asked.reference_inputs))
        seen = {
            stage: _joined(heard[layer], d.sequence_first and stage in places)
            for stage, layer in layers.items()
        }
        return seen | {"time": _time(heard[d.time[0]], len(asked.tokens)), "last": velocity}

    return Case(
        reference,
        lambda: d.family.spec(d.config),
        d.family.keys(d.config).row,
        theirs,
        lambda w: _stages(d, asked, w.flat),
    )


def _stages(d: Denoiser, asked: Asked, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The stages of one evaluation, as the loop makes it."""
    images = len(asked.tokens)
    network = Network(d.family, d.config, PLAN, torch.float64)
    request, step, entered, blocks, velocity = evaluate(
        network, dict(weights), asked.tokens, TIME, asked.inputs
    )
    time = step[d.time[1]].flatten(1)
    yield (
        "time",
        (time - 1 if d.family is z_image.FAMILY else time).expand(images, -1),
    )  # Z-Image hoists 1 + scale
    if d.text is not None:
        yield "text", (request | step)[d.text[1]].flatten(2).expand(images, -1, -1)
    if d.image is not None:
        yield "image", entered if isinstance(entered, Tensor) else entered[1]
    for at, streams in blocks.items():
        parts = (streams,) if isinstance(streams, Tensor) else streams
        if d.image_alone and at.startswith(d.image_alone):
            parts = parts[1:]
        yield at, _concatenated(parts[::-1] if d.image_first else parts)
    yield "last", velocity[:, : asked.answered]


def _joined(output: Foreign, sequence_first: bool) -> Tensor:
    """What a layer of the reference returns -> [B, tokens, D], both streams one after the other."""
    joined = _concatenated(
        [part for part in (output if isinstance(output, tuple) else (output,)) if part is not None]
    )
    if joined.ndim > 3:
        return joined.flatten(2).transpose(1, 2)
    return joined.transpose(0, 1) if sequence_first else joined


def _concatenated(streams: Sequence[Tensor]) -> Tensor:
    """Streams one after the other; those of different widths as [B, all their values, 1]."""
    if len({stream.shape[2:] for stream in streams}) > 1:
        streams = [stream.flatten(1)[..., None] for stream in streams]
    return torch.cat(list(streams), 1)


def _time(output: Tensor, images: int) -> Tensor:
    """[B, values] of the time that moves: that of timestep 0 follows in further rows, or stands at the first
    tokens.
    """
    return (output if output.ndim == 2 else output[:, -1])[:images]


def _polar(length: Tensor, angle: Tensor) -> Tensor:
    """torch.polar rounds float32 cosines otherwise than torch.cos does, by one step, 6e-8; Qwen-Image's
    tables are made with it.
    """
    return torch.complex(length * angle.cos(), length * angle.sin())


def as_float32(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`doubles` widens what a layer makes float32; coming in as float32 it stays so, as ours does."""
    return (torch.tensor(args[0].tolist(), dtype=torch.float32), *args[1:])
