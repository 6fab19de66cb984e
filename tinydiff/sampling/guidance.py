"""Guidance: functions that take a predict and return a predict (see `loop.Predict`).

Shape letters: B images, L tokens, P packed channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tinydiff.sampling.loop import Memory, Predict, Step, Tree


def none(predict: Predict) -> Predict:
    """The prediction as it is; the request's tensors have batch B."""
    return predict


def classifier_free(predict: Predict) -> Predict:
    """u + g (c - u) with the step's scale g, from one batch of 2B: the request's tensors hold the B conditions first, then the B
    negatives. Source: arXiv 2207.12598.
    """

    def guided(w: Tree, x_BLP: Tensor, step: Step, request: Tree, memory: Memory) -> tuple[Tensor, Memory]:
        both, memory = predict(w, torch.cat([x_BLP, x_BLP]), step, request, memory)
        condition, negative = both.to(x_BLP.dtype).chunk(2)
        return negative + step.guidance * (condition - negative), memory

    return guided


KINDS: dict[str, Callable[[Predict], Predict]] = {"none": none, "classifier_free": classifier_free}
"""Guidance by name."""
