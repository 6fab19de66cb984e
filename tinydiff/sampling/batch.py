"""Several images in one loop, each at its own step of its own table: step-level continuous batching.

Images share the loop where everything that the network reads of them has the same shapes (`batch_key`). What
differs is stacked: the remaining rows of their tables, their hoisted tensors, their latents. So solver,
number of steps, guidance scale, seed and prompt may differ, and an image joins and leaves between two steps.
Stacking copies when the members change, not at every step. Shape letters: S steps, B images, L tokens, P
packed channels.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinydiff.ops.network import Branch, Family, Hoisted, Tree, has_images
from tinydiff.ops.store import present
from tinydiff.sampling.loop import Denoise, Denoising, FixedTokens, State, StepInputs, at_step


class Batch(NamedTuple):
    """Images that go through the loop as one."""

    members: tuple[Denoising, ...]
    """Each image as it was when the batch was formed."""
    joined: Denoising
    """All of them stacked. Its `step` and `stop` count from where the batch was formed."""


def batch_key(family: Family, image: Denoising) -> Hashable:
    """What two images must have in common to share the loop: the network, and all shapes and types it reads.

    Tensors without an axis for images, such as rope tables, must be equal to the bit.
    """
    trees = [(b.request, b.steps) for b in image.network.branches]
    requests = tuple(
        (
            prefix,
            name,
            x.shape,
            x.dtype,
            None if has_images(family.conds, prefix, name) else hash(x.cpu().numpy().tobytes()),
        )
        for request, _ in trees
        for prefix, below in sorted(request.items())
        for name, x in sorted(below.items())
    )
    steps = tuple(
        (prefix, name, x.shape[1:], x.dtype)
        for _, per_step in trees
        for prefix, below in per_step.items()
        for name, x in sorted(below.items())
    )
    weights = tuple(id(x) for below in image.network.weights.values() for x in present(below).values())
    noise, fixed_tokens = image.inputs.noise, image.inputs.fixed
    fixed = None if fixed_tokens is None else tuple(x.shape for x in fixed_tokens)
    x, no_noise = image.state.x, noise is None
    alone = object() if image.inputs.limits else None  # a step cache decides for a batch as one
    return image.denoise, weights, len(trees), requests, steps, fixed, no_noise, x.shape, x.dtype, alone


def join(family: Family, images: Sequence[Denoising]) -> Batch:
    """Stack images of one `batch_key` for the steps that all of them have left with their current expert."""
    if len(images) == 1:
        return Batch(tuple(images), images[0])
    first, count = images[0], min(image.stop - image.step for image in images)

    def next_rows(tables: Sequence[Tensor], dim: int) -> Tensor:
        """The next `count` rows of each image's own table [S, ...], side by side along the axis of images."""
        rows = torch.cat(
            [table[image.step : image.step + count] for image, table in zip(images, tables, strict=True)], dim
        )
        # torch would compile a table of one row on its own, so that one gets a second, which is never read.
        return rows if count > 1 else torch.cat([rows, rows])

    def stack(trees: Sequence[Tree], combine: Callable[[str, str, list[Tensor]], Tensor]) -> Tree:
        return {
            prefix: {name: combine(prefix, name, [tree[prefix][name] for tree in trees]) for name in below}
            for prefix, below in trees[0].items()
        }

    def combine_cond(prefix: str, name: str, tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors) if has_images(family.conds, prefix, name) else tensors[0]

    branches = tuple(
        Branch(
            stack([b.request for b in same], combine_cond),
            stack([b.steps for b in same], lambda _, __, tables: next_rows(tables, 1)),
        )
        for same in zip(*(image.network.branches for image in images), strict=True)
    )
    states = [image.state for image in images]
    x, h1, h2 = (torch.cat(same) for same in zip(*(state[:3] for state in states), strict=True))
    memory = {name: torch.cat([state.memory[name] for state in states]) for name in states[0].memory}
    inputs = [image.inputs for image in images]
    noises = [each.noise for each in inputs if each.noise is not None]
    fixed = [each.fixed for each in inputs if each.fixed is not None]
    joined = first._replace(
        inputs=StepInputs(
            next_rows([each.coefficients for each in inputs], 2),
            next_rows(noises, 1) if noises else None,
            FixedTokens(*map(torch.cat, zip(*fixed, strict=True))) if fixed else None,
        ),
        network=Hoisted(first.network.weights, branches),
        state=State(x, h1, h2, memory),
        step=0,
        stop=count,
    )
    return Batch(tuple(images), joined)


@torch.no_grad()
def advance(batch: Batch, steps: int, denoise: Denoise | None = None) -> Batch:
    """The batch after `steps` more steps, or after as many as it has left.

    denoise: used in place of the images' own function, such as a compiled one that computes the same.
    """
    image = batch.joined
    stop = min(image.step + steps, image.stop)
    state = (denoise or image.denoise)(image.network, image.state, image.inputs, image.step, stop)
    return batch._replace(joined=image._replace(state=state, step=stop))


def steps_left(batch: Batch) -> int:
    """Steps until an image of the batch is done or changes its expert."""
    return batch.joined.stop - batch.joined.step


def split(batch: Batch) -> list[Denoising]:
    """The images of the batch, each at the step it has reached."""
    state, steps = batch.joined.state, batch.joined.step
    if len(batch.members) == 1:
        return [at_step(batch.joined, state, steps)]

    def own(i: int) -> State:
        x, h1, h2 = (tensor[i : i + 1] for tensor in state[:3])
        return State(x, h1, h2, {name: tensor[i : i + 1] for name, tensor in state.memory.items()})

    return [at_step(image, own(i), image.step + steps) for i, image in enumerate(batch.members)]
