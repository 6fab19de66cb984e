"""Text generation with a decoder language model, with a cache of keys and values.

Shape letters: B batch, T tokens of the prompt, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.models.encoders.decoder_lm import Config, block, embed, last_norm, views
from tinydiff.ops.embed import scores
from tinydiff.ops.host import integers
from tinydiff.ops.norm import compute_dtype
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan

Cache = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled, under the names of generation_config.json.

    temperature: 0 means the likeliest token. top_k: sample from so many likeliest tokens, 0 from all. top_p:
    sample from the likeliest tokens whose probabilities add up to it. repetition_penalty: the scores of
    tokens that the text has already are divided by it (negative scores are multiplied).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or self.repetition_penalty <= 0:
            raise ValueError(
                f"{self} is out of range: temperature and top_k are 0 or more, top_p in (0, 1], "
                "repetition_penalty above 0"
            )


def generate(
    c: Config,
    plan: Plan,
    w: Weights,
    ids_BT: Tensor,
    mask_BT: Tensor | None = None,
    *,
    limit: int,
    stop: Collection[int],
    sampling: Sampling = Sampling(),
    generator: torch.Generator | None = None,
    positions: Tensor | None = None,
    embeds: Tensor | None = None,
) -> list[list[int]]:
    """Continue each prompt until a token of `stop` or `limit` tokens -> the new ids of each row.

    The stop token is left out. Prompts of different lengths are padded on the left (mask 0). positions,
    embeds: as in `decoder_lm.encode`; by default positions count from 0 at a row's first token.
    generator: used where the temperature is above 0; a CPU generator draws the same tokens on every
    device.
    """
    if not c.lm_head:
        raise ValueError("generate needs a Config with lm_head, the output head")
    mask = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
    if not bool(mask[:, -1].all()):
        raise ValueError("generate needs prompts padded on the left; a row ends in padding")
    at = (mask.cumsum(-1) - 1).clamp_min(0) if positions is None else positions
    x = embed(c, plan, w, ids_BT) if embeds is None else embeds
    following = at.amax(-1, keepdim=True)
    if at.ndim == 3:  # words after an image count on from the largest of its three axes
        following = following.amax(0, keepdim=True).expand_as(following)
    ids, cache = ids_BT, None
    generated: list[list[int]] = [[] for _ in range(len(ids))]
    running = set(range(len(ids)))
    for _ in range(limit):
        logits, cache = _step(c, plan, w, x, at, mask, cache)
        token = choose(logits, ids, sampling, generator)
        for index, value in enumerate(integers(token)):
            if value in stop:
                running.discard(index)
            elif index in running:
                generated[index].append(value)
        if not running:
            break
        ids, mask = torch.cat([ids, token[:, None]], 1), F.pad(mask, (0, 1), value=1)
        at = following = following + 1
        x = embed(c, plan, w, token[:, None])
    return generated


def _step(
    c: Config, plan: Plan, w: Weights, x: Tensor, at: Tensor, mask: Tensor, cache: Cache | None
) -> tuple[Tensor, Cache]:
    """Scores of the token after x [B, T, C] -> ([B, V], the keys and values of each layer)."""
    view = views(c, at, mask, x)
    grown: Cache = []
    for i in range(c.layers):
        x, kept = block(c, plan, w / "layers" / i, x, view[c.layer_types[i]], cache[i] if cache else None)
        grown.append(kept)
    head = w / ("embed_tokens" if c.tie_word_embeddings else "lm_head")
    logits = scores(plan, last_norm(c, w, x[:, -1]), head)
    cap = c.final_logit_softcapping
    return logits if cap is None else cap * torch.tanh(logits / cap), grown


def choose(
    logits_BV: Tensor, ids_BT: Tensor, sampling: Sampling, generator: torch.Generator | None = None
) -> Tensor:
    """The next token of each row [B] int64, given the scores [B, V] and the ids so far [B, T]."""
    scores = warped(logits_BV, ids_BT, sampling)
    if sampling.temperature == 0:
        return scores.argmax(-1)
    probabilities = scores.softmax(-1)
    device = scores.device if generator is None else generator.device
    return torch.multinomial(probabilities.to(device), 1, generator=generator)[:, 0].to(scores.device)


def warped(logits_BV: Tensor, ids_BT: Tensor, sampling: Sampling) -> Tensor:
    """Scores [B, V] after repetition penalty, temperature, top_k and top_p, in this order.

    -inf marks the tokens that must not be drawn.
    """
    scores = logits_BV.to(compute_dtype(logits_BV))
    if sampling.repetition_penalty != 1:
        seen = scores.gather(1, ids_BT)
        penalty = sampling.repetition_penalty
        scores = scores.scatter(1, ids_BT, torch.where(seen < 0, seen * penalty, seen / penalty))
    if sampling.temperature == 0:
        return scores
    scores = scores / sampling.temperature
    if sampling.top_k:
        least = scores.topk(min(sampling.top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < least, -math.inf)
    if sampling.top_p < 1:
        ordered, order = scores.sort(descending=False)
        tail = ordered.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        tail[:, -1] = False
        scores = scores.masked_fill(torch.zeros_like(tail).scatter(1, order, tail), -math.inf)
    return scores
