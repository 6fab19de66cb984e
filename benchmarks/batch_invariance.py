"""How far an image depends on those that it shares the denoising loop with: the shipped model, the server's
own loop.

    python -m benchmarks.batch_invariance [--requests 50] [--dit-precision fp32] [--enable-torch-compile]

Random requests (prompt, seed, steps, guidance, three sizes) are made alone, and then in company: as many as
the batch has room for, each joining as soon as another leaves, so that every step has other company. Largest
differences by batch size, of latents (whose values are about 1) and of pixel values 0 to 255, the share of
values that differ at all, and how many images there really were in a step. Compiled, one image and
several are two graphs, as in the server.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import mean
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from tinydiff import config
from tinydiff.records import Request
from tinydiff.runtime import blueprint, pipeline
from tinydiff.runtime.admit import admit
from tinydiff.runtime.background import Background
from tinydiff.runtime.blueprint import Model
from tinydiff.runtime.continuous import BatchSlot, Continuous, make_slot

COLOURS, SHAPES = (
    ("red", "yellow", "blue", "green", "white", "black"),
    ("circle", "square", "triangle", "star", "ring", "cross"),
)
SIZES = ((128, 128), (96, 160), (64, 64))
BATCHES = range(2, 9)


class Made(NamedTuple):
    """An image."""

    latents: Tensor
    """[1, C, F, H, W]."""
    frames: numpy.ndarray
    """uint8 [1, H, W, 3]."""


def requests(model: Model, count: int) -> list[list[Request]]:
    """Those of each size, for only images of one form share the loop."""
    chance, found = random.Random(0), [[] for _ in SIZES]
    for k in range(count):
        (width, height), words = SIZES[k % len(SIZES)], (chance.choice(COLOURS), chance.choice(SHAPES))
        fields = {
            "prompt": f"a {chance.choice(('small', 'large'))} {' '.join(words)}", "width": width,
            "height": height,
            "seed": chance.randrange(2**32), "num_inference_steps": chance.randint(1, 20),
            "guidance_scale": chance.uniform(1.5, 6),
        }  # fmt: skip
        found[k % len(SIZES)] += admit(model.blueprint, config.options(fields).sampling)
    return found


def make(
    model: Model, background: Background, asked: Sequence[Request], most: int
) -> tuple[list[Made], list[int]]:
    """(the images of all requests, made by a loop of at most `most` at once; how many there were in each
    step).
    """
    loop, waiting = (
        Continuous(background=background),
        deque(range(len(asked))),
    )
    told = [pipeline.condition(model, request) for request in asked]
    made: dict[int, Made] = {}
    sizes: list[int] = []

    def finish(one: BatchSlot) -> Made:
        number = int(one.job)
        frames, latents, _ = pipeline.finish(
            model, asked[number], one.inputs, one.to_image_tokens(one.denoising.state.x)
        )
        return Made(latents, frames)

    while waiting or loop.slots:
        while waiting and len(loop.slots) < most:
            number = waiting.popleft()
            loop.add(make_slot(model, asked[number], told[number], str(number), 0))
        stepped = loop.step(most)
        if stepped.error is not None:
            raise stepped.error
        sizes += [len(stepped.slots)] * stepped.steps
        made |= {int(one.job): finish(one) for one in stepped.done}
    return [made[number] for number in range(len(asked))], sizes


def compiled(model: Model, asked: Sequence[Request]) -> Background:
    """What has the graphs of one image and of several, where the model is to be compiled."""
    background = Background()
    for most in (1, 2):
        make(model, background, asked[:most], most)
    while len(set(background.progress())) > 1:
        time.sleep(0.1)
    return background


def apart(pairs: Iterable[tuple[Made, Made]]) -> tuple[float, int, float]:
    """(the largest difference of latents, of pixel values, the share of pixel values that differ)."""
    latents, frames = zip(
        *((a.latents - b.latents, a.frames.astype(int) - b.frames) for a, b in pairs), strict=True
    )
    pixels, share = (
        max(abs(each).max() for each in frames),
        mean(float((each != 0).mean()) for each in frames),
    )
    return max(each.abs().max().item() for each in latents), int(pixels), share


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--dit-precision", default="fp32")
    parser.add_argument("--enable-torch-compile", action="store_true")
    given = parser.parse_args()
    fields = {"dit_precision": given.dit_precision, "enable_torch_compile": given.enable_torch_compile}
    model = blueprint.load(blueprint.read(config.options(fields).model))
    asked = requests(model, given.requests)
    background = compiled(model, asked[0])
    alone = [one for same in asked for one in make(model, background, same, 1)[0]]
    scale = torch.cat([one.latents.flatten() for one in alone]).std().item()
    how = (
        f"{given.dit_precision}, "
        f"{model.blueprint.device.type}{', compiled' if given.enable_torch_compile else ''}"
    )
    print(f"{len(alone)} requests, {how}; latents have a standard deviation of {scale:.2f}")
    print("| batch | images in a step, mean | latents | pixel values | differing |\n|---|---|---|---|---|")
    for most in BATCHES:
        made = [make(model, background, same, most) for same in asked]
        together, sizes = (
            [one for pictures, _ in made for one in pictures],
            [size for _, counts in made for size in counts],
        )
        latents, pixels, share = apart(zip(alone, together, strict=True))
        print(f"| {most} | {mean(sizes):.1f} | {latents:.1e} | {pixels} | {share:.2%} |", flush=True)


if __name__ == "__main__":
    main()
