"""Guidance: functions that combine the velocities of several branches into one (see `loop.Predict`).

The first branch is the prompt; the second, where there is one, is the negative prompt. With sequence
parallelism a rank has its shard of the tokens. Shape letters: B images, L tokens, P packed channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tinydiff.ops.network import Branch, Tree
from tinydiff.parallel.plan import Plan
from tinydiff.parallel.sequence import sum_over_tokens
from tinydiff.sampling.loop import Guidance, Guided, Memory, Predict, Step


def none(predict: Predict, plan: Plan) -> Guided:
    """The velocity of the only branch."""

    def alone(
        w: Tree, x_BLP: Tensor, step: Step, branches: tuple[Branch, ...], memory: Memory
    ) -> tuple[Tensor, Memory]:
        (prediction,), memory = predict(w, x_BLP, step, branches, memory)
        return prediction, memory

    return alone


def _of_two(combine: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Guidance:
    """combine: (prediction of the prompt, of the negative prompt, both [B, L, P], scale [1 or B, 1, 1]) ->
    [B, L, P].
    """

    def guidance(predict: Predict, plan: Plan) -> Guided:
        def guided(
            w: Tree, x_BLP: Tensor, step: Step, branches: tuple[Branch, ...], memory: Memory
        ) -> tuple[Tensor, Memory]:
            (condition, negative), memory = predict(w, x_BLP, step, branches, memory)
            return combine(condition.to(x_BLP.dtype), negative.to(x_BLP.dtype), step.guidance), memory

        return guided

    return guidance


def _plain(condition: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
    return negative + scale * (condition - negative)


def _normed(condition: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
    guided = _plain(condition, negative, scale)
    return guided * (_norms(condition) / _norms(guided))


def _norms(x: Tensor) -> Tensor:
    """[..., D] -> [..., 1]."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # pyright: ignore


classifier_free = _of_two(_plain)
"""u + g (c - u) with the step's scale g. Source: arXiv 2207.12598."""

token_normed = _of_two(_normed)
"""`classifier_free`, with each token scaled back to the norm of the prompt's own velocity. Source:
Qwen-Image's pipelines.
"""


def clamped(predict: Predict, plan: Plan) -> Guided:
    """`classifier_free`, with an upper bound on the norm ratio guided / prompt.

    An image above `limit` is scaled back to that ratio.

    The request holds `limit` [1 or B, 1, 1] and `real` [1 or B, L, 1] bool, the tokens that count. Source:
    Z-Image's pipelines.
    """

    def guided(
        w: Tree, x_BLP: Tensor, step: Step, branches: tuple[Branch, ...], memory: Memory
    ) -> tuple[Tensor, Memory]:
        (condition, negative), memory = predict(w, x_BLP, step, branches, memory)
        condition, known = condition.to(x_BLP.dtype), branches[0].request[""]
        free = _plain(condition, negative.to(x_BLP.dtype), step.guidance)
        squares = ((v * known["real"]).square().sum((1, 2), keepdim=True) for v in (condition, free))
        longest, length = (sum_over_tokens(plan, square).sqrt() for square in squares)
        longest = longest * known["limit"].to(x_BLP.dtype)
        return free * torch.where(length > longest, longest / length, 1), memory

    return guided


def several(predict: Predict, plan: Plan) -> Guided:
    """Guidance by several branches: c + sum of p (c - b) over the other branches b.

    Each kind of tokens has its own pulls p. Then the clean latents that it implies are brought back to the
    deviation of the prompt's own.

    The request holds, for each kind of tokens in order, `pulls` [1 or B, L, branches - 1] and `rescale` [1 or
    B, L, 2]: the share of the guided latents that is brought back, and 1 for a token that counts. The names
    of the second kind end in `_2`. Source: LTX-2's pipelines; arXiv 2305.08891.
    """

    def guided(
        w: Tree, x_BLP: Tensor, step: Step, branches: tuple[Branch, ...], memory: Memory
    ) -> tuple[Tensor, Memory]:
        velocities, memory = predict(w, x_BLP, step, branches, memory)
        known, made, at = branches[0].request[""], list[Tensor](), 0
        for kind in ("", "_2"):
            pulls, rescale = known[f"pulls{kind}"].to(x_BLP.dtype), known[f"rescale{kind}"].to(x_BLP.dtype)
            share, real = torch.split(rescale, 1, -1)
            x, c, *others = (v.narrow(1, at, pulls.shape[1]).to(x_BLP.dtype) for v in (x_BLP, *velocities))
            pulled = zip(torch.split(pulls, 1, -1), others, strict=False)  # ranks may repeat one
            free = sum((p * (c - b) for p, b in pulled), c)
            own, clean = x - step.sigma * c, x - step.sigma * free
            ratio = _deviation(plan, own, real) / _deviation(plan, clean, real)
            made.append((x - clean * (share * ratio + (1 - share))) / step.sigma)
            at += pulls.shape[1]
        return torch.cat(made, 1), memory

    return guided


def _deviation(plan: Plan, x_BLP: Tensor, real_BL1: Tensor) -> Tensor:
    """Standard deviation [B, 1, 1] of all values of the real tokens."""

    def total(y: Tensor) -> Tensor:
        return sum_over_tokens(plan, (y * real_BL1).sum((1, 2), keepdim=True))

    count = total(torch.ones_like(x_BLP))
    return (total((x_BLP - total(x_BLP) / count).square()) / (count - 1)).sqrt()


KINDS: dict[str, Guidance] = {
    "none": none,
    "classifier_free": classifier_free,
    "token_normed": token_normed,
    "clamped": clamped,
    "several": several,
}
"""Guidance by name."""
