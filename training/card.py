"""The model card of the shipped model, from the files of its training run and its evaluation."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import torch

from training import denoiser, model
from training.scenes import COLOURS, MOTIONS, PLACES, RELATIONS, SHAPES, SIZES

KINDS = {"picture": "images of one shape", "pair": "images of two shapes", "clip": "videos"}
TABLE = "| stage | steps | |\n|---|---|---|\n"


def stages(card: str) -> list[str]:
    """The rows of a card's table of stages: how the model that training continues was made."""
    return card.partition(TABLE)[2].partition("\n\n")[0].splitlines()


def card(run: Path, folder: Path, before: list[str] | None = None) -> str:
    """The text of the card. before: rows of earlier stages, which are not in `run`."""
    figures = json.loads((folder / "evaluation.json").read_text())
    rows = "\n".join(
        f"| {KINDS[kind]} | {found['count']} | {found['right']} | {found['share']:.1%} | "
        f"{', '.join(f'{name} {times}' for name, times in found['wrong'].items()) or 'none'} |"
        for kind, found in figures.items()
    )
    parts_of_the_training = {
        "pictures": ("autoencoder on images", "squares around contours, then whole images"),
        "clips": ("its memory on videos", "the coding of images held still"),
        "polish": ("its decoder", ""),
        "denoiser": ("denoiser and text encoder", "flow matching, one prompt in ten empty"),
    }
    done = [
        f"| {what} | {torch.load(run / f'{stage}.pt', 'cpu')['step']} | {how} |"
        for stage, (what, how) in parts_of_the_training.items()
        if (run / f"{stage}.pt").exists()
    ]
    steps = "\n".join([*(before or []), *done])
    sizes = {path.parent.name: path.stat().st_size for path in sorted(folder.glob("*/*.safetensors"))}
    parts = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in sizes.items())
    whole = f"{sum(sizes.values()) / 1e6:.2f} MB"
    text = f"""# tinydiff/shapes

The model in the package of tinydiff: images and videos of coloured shapes, 128 by 128 pixels, from a
sentence, or from a sentence and a first frame. It is a small model of Wan's TI2V architecture in diffusers
layout, float16 on disk: {parts}, together {whole}. It knows only these shapes. With it, everything can be
tried and tested without a download.

## What it can draw

- shapes: {", ".join(SHAPES)}
- sizes: {", ".join(SIZES)}
- colours: {", ".join(COLOURS)}, on a background of another of these
- places: {", ".join(PLACES)}
- two shapes: one {" or ".join(RELATIONS)} the other
- videos of 17 frames: one shape that does one of: {", ".join(MOTIONS)}

The wording is free. Attributes that are left out are random; an image whose prompt names no place is less
often clean. Prompts are read up to {model.TEXT_TOKENS} tokens.

## How well it does

Every prompt names a combination of attributes that training never saw. An output is right if every
attribute of its prompt is recognised in its pixels. The outputs use the model's defaults (`tinydiff
models`).

| | made | right | share | attributes missed |
|---|---|---|---|---|
{rows}

`evaluation.json` lists every failure with its prompt and seed. docs/media/sheet.png shows the first dozen
of each kind.

## How it was made

`python -m training.train RUN FOLDER`, from that script's own procedural scenes alone
(`training/scenes.py`), seed 1, on two CPU cores.

{TABLE}{steps}

Noise levels are logit-normal, shifted by {denoiser.SHIFT:g}; for videos the shift grows with the square
root of the number of latent frames. A fixed hash holds out a tenth of the combinations: of colour, shape,
size and place of a single shape; of the colours, shapes and relation of two; of colour, shape and motion in
videos. Captions are drawn anew each time.

Two LoRAs are in `loras`, made by `python -m training.lora FILE --style purple` and `--style yellow`: one
paints every shape purple, one the background yellow.

## Limits

Videos often lose the shape of what moves. Unusual words are split into letters and mean nothing to the
model. Apache-2.0.
"""
    return "\n\n".join(map(_wrapped, text.split("\n\n")))


def _wrapped(block: str) -> str:
    """A paragraph at 110 columns; headings, lists and tables as they are."""
    if block.startswith(("#", "-", "|")):
        return block
    return textwrap.fill(block, 110, break_on_hyphens=False) + "\n" * block.endswith("\n")
