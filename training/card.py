"""The model card: what the shipped model is, what it was trained on and how well it does, from the files of the run and the evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from training import denoiser, model
from training.scenes import COLOURS, MOTIONS, PLACES, RELATIONS, SHAPES, SIZES

KINDS = {"picture": "pictures of one shape", "pair": "pictures of two shapes", "clip": "clips"}


def card(run: Path, folder: Path) -> str:
    """The card's text."""
    figures = json.loads((folder / "evaluation.json").read_text())
    rows = "\n".join(
        f"| {KINDS[kind]} | {found['count']} | {found['right']} | {found['share']:.1%} | "
        f"{', '.join(f'{name} {times}' for name, times in found['wrong'].items()) or 'none'} |"
        for kind, found in figures.items()
    )
    stages = {
        "pictures": ("autoencoder on pictures", "squares around contours, then whole pictures"),
        "clips": ("its memory on clips", "the coding of pictures held still"),
        "polish": ("its decoder", ""),
        "denoiser": ("denoiser and text encoder", "flow matching, one prompt in ten empty"),
    }
    steps = "\n".join(
        f"| {what} | {torch.load(run / f'{stage}.pt', 'cpu')['step']} | {how} |"
        for stage, (what, how) in stages.items()
        if (run / f"{stage}.pt").exists()
    )
    sizes = {path.parent.name: path.stat().st_size for path in sorted(folder.glob("*/*.safetensors"))}
    parts = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in sizes.items())
    whole = f"{sum(sizes.values()) / 1e6:.2f} MB"
    return f"""# tinydiff/shapes

The model that comes with tinydiff: pictures and clips of coloured shapes, 128 by 128 pixels, from a sentence, or from a
sentence and a first frame. It is Wan's TI2V architecture in small, in the diffusers layout, float16 on disk: {parts},
together {whole}. It knows nothing but these shapes; it is there so that everything can be tried, and tested, without a
download.

## What it can draw

{", ".join(SHAPES)}; {" or ".join(SIZES)}; {", ".join(COLOURS)},
on a background of any other of these colours; {", ".join(PLACES)}; two shapes, one {" or ".join(RELATIONS)} the other;
in clips of 17 frames one shape that does one of {", ".join(MOTIONS)}. Wording is free within that, attributes may
be left out, and are then random. Prompts are read up to {model.TEXT_TOKENS} tokens.

## How well it does

Held-out combinations of attributes, never trained on; an output is right when every attribute that its prompt names is read off its
pixels. Made with the model's defaults (`tinydiff models`).

| | made | right | share | attributes missed |
|---|---|---|---|---|
{rows}

`evaluation.json` lists every failure with its prompt and seed. A contact sheet of the first dozen of each is in docs/media/sheet.png.

## How it was made

`python -m training.train RUN FOLDER`, from nothing but that script's own procedural scenes (`training/scenes.py`), seed 1,
on two CPU cores.

| stage | steps | |
|---|---|---|
{steps}

Noise levels are logit-normal, shifted by {denoiser.SHIFT:g}. Held out are a tenth of the combinations, by a fixed hash: of
colour, shape, size and place of a single shape; of colours, shapes and relation of two; of colour, shape and motion in
clips. The first 24000 pictures, 12000 pairs and 3500 clips of seed 1 were coded once; captions are drawn anew each time.

## Limits

Small shapes lose their points; unusual words are spelt out letter by letter and mean nothing to it. Apache-2.0.
"""
