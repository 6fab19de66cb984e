"""One whole evaluation of a network that keeps nothing between calls, for tests, training and readers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tinydiff.ops.network import Branch, Hooks, Network, Streams, Tensors, Walk, divide, plain, walk
from tinydiff.ops.weights import Weights


class Evaluation(NamedTuple):
    """The results of one evaluation, in the order of their computation."""

    request: Tensors
    step: Tensors
    """The results of `hoist`: the request's tensors and the step's [1 or B, ...]."""
    entered: Streams
    """The streams that entered the first block."""
    blocks: dict[str, Streams]
    """Prefix of each block -> the streams that it returned."""
    velocity: Tensor
    """[B, L, P]."""


def predict(network: Network, weights: Tensors, x_BLP: Tensor, t_B: Tensor, inputs: Tensors) -> Tensor:
    """Tokens [B, L, P] at timesteps [B], or [1] for all, -> velocity [B, L, P].

    inputs: those of the family's `hoist`.
    """
    return evaluate(network, weights, x_BLP, t_B, inputs).velocity


def evaluate(network: Network, weights: Tensors, x_BLP: Tensor, t_B: Tensor, inputs: Tensors) -> Evaluation:
    """One evaluation as in `predict`, with the result of every part. weights: flat, all of the network's."""
    family = network.family
    w = Weights(weights, dtype=network.dtype)
    request, steps = family.hoist(network.config, network.plan, w, inputs, t_B)
    step = {name: _per_image(table, len(t_B)) for name, table in steps.items()}
    entered: list[Streams] = []
    blocks: dict[str, Streams] = {}

    def note(run: Walk, streams: list[Streams]) -> list[Streams]:
        entered.extend(streams)
        return run(streams)

    def note_block(prefix: str, streams: list[Streams]) -> None:
        blocks[prefix] = streams[0]

    hooks = Hooks(stack=note, after=note_block)
    calls = {block: plain(network, block) for block, _ in family.blocks(network.config)}
    branch = Branch(divide(network, request), divide(network, step))
    (velocity,) = walk(network, [calls], divide(network, weights), x_BLP, [branch], hooks)
    return Evaluation(request, step, entered[0], blocks, velocity)


def _per_image(table: Tensor, images: int) -> Tensor:
    """Rows [S, 1 or B, ...], one timestep per image -> [B, ...], image b at row b."""
    if images == 1:
        return table[0]
    return torch.stack([rows[min(b, len(rows) - 1)] for b, rows in enumerate(table)])
