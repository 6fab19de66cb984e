"""The model card: what the shipped model is, what it was trained on and how well it does, from the files of
the run and the evaluation.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from training import denoiser, model
from training.scenes import COLOURS, MOTIONS, PLACES, RELATIONS, SHAPES, SIZES

KINDS = {"picture": "images of one shape", "pair": "images of two shapes", "clip": "videos"}
TABLE = "| stage | steps | |\n|---|---|---|\n"


def stages(card: str) -> list[str]:
    """The rows of an earlier card's table of stages: what a model that is trained on has behind it."""
    return card.partition(TABLE)[2].partition("\n\n")[0].splitlines()


def card(run: Path, folder: Path, before: list[str] | None = None) -> str:
    """The card's text. before: rows of the stages that are not in `run`."""
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
    return f"""# tinydiff/shapes

The model that comes with tinydiff: images and videos of coloured shapes, 128 by 128 pixels, from a sentence, or from a
sentence and a first frame. It is Wan's TI2V architecture in small, in the diffusers layout, float16 on disk:
{parts},
together {whole}. It knows nothing but these shapes; it is there so that everything can be tried, and tested, without a
download.

## What it can draw

{", ".join(SHAPES)}; {" or ".join(SIZES)}; {", ".join(COLOURS)},
on a background of any other of these colours; {", ".join(PLACES)}; two shapes, one {" or ".join(RELATIONS)} the other;
in videos of 17 frames one shape that does one of {", ".join(MOTIONS)}. Wording is free within that. Attributes may
be left out, and are then random; an image whose prompt names no place is less often clean. Prompts are read up to
{model.TEXT_TOKENS} tokens.

## How well it does

Held-out combinations of attributes, never trained on, each named by its prompt; an output is right when every attribute
that its prompt names is read off its pixels. Made with the model's defaults (`tinydiff models`).

| | made | right | share | attributes missed |
|---|---|---|---|---|
{rows}

`evaluation.json` lists every failure with its prompt and seed. A contact sheet of the first dozen of each is in docs/media/sheet.png.

## How it was made

`python -m training.train RUN FOLDER`, from nothing but that script's own procedural scenes (`training/scenes.py`), seed 1,
on two CPU cores.

{TABLE}{steps}

Noise levels are logit-normal, shifted by {denoiser.SHIFT:g}, of videos by the root of their latent frames more.
Held out are a tenth of the combinations, by a fixed hash: of colour, shape, size and place of a single shape; of
colours, shapes and relation of two; of colour, shape and motion in videos. Captions are drawn anew each time.

## Limits

Videos often lose the shape of what moves; unusual words are spelt out letter by letter and mean nothing to it. Apache-2.0.
"""
