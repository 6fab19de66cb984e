"""What the recipe of a family may use of a loaded model: tokenizers, encoders, the autoencoder, adapters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from tinydiff.io.images import resize
from tinydiff.models.recipe import Context
from tinydiff.records import Request, UserError
from tinydiff.runtime import autoencoding, loras
from tinydiff.runtime.blueprint import Model

log = logging.getLogger(__name__)


def make_context(model: Model, request: Request, warn: Callable[[str], None] = log.warning) -> Context:
    """What the family's recipe may use of the model.

    warn: called with a sentence for each text that was cut.
    """
    device = model.blueprint.device

    def tokens(
        component: str, texts: list[str], length: int | None, side: str | None = None, framed: bool = True
    ) -> tuple[Tensor, Tensor]:
        tokenizer = model.tokenizers[component]
        encoded = [tokenizer.encode(text, length, side, framed) for text in texts]
        for index, each in enumerate(encoded):
            if each.truncated:
                name = "negative_prompt" if _is_negative(request, texts, index) else "prompt"
                warn(f"{name}: the last {each.truncated} of its tokens were cut, the model reads {length}")
        longest = max(len(each.ids) for each in encoded)
        encoded = [tokenizer.padded(each, longest) for each in encoded]
        _check_vocabulary(model, component, [token for each in encoded for token in each.ids])
        return torch.tensor([each.ids for each in encoded], device=device), torch.tensor(
            [each.mask for each in encoded], device=device
        )

    def adapted(strengths: Mapping[str, float]) -> Context:
        if dict(strengths) == loras.strengths(model.adapters, request.loras):
            return context
        nets = loras.for_request(model.nets, model.adapters, strengths)
        return make_context(replace(model, nets=nets), replace(request, loras=strengths), warn)

    context = Context(
        model.nets,
        tokens,
        model.tokenizers,
        partial(autoencoding.encode, model, request.output),
        partial(autoencoding.decode, model, request.output),
        resize,
        model.blueprint.options,
        device,
        adapted,
    )
    return context


def _check_vocabulary(model: Model, component: str, ids: Sequence[int]) -> None:
    """Raises UserError for a token beyond the vocabulary of the encoder that reads it."""
    encoder = "pe" if component == "pe_tokenizer" else component.replace("tokenizer", "text_encoder")
    size = model.nets[encoder].config.vocab_size
    if ids and max(ids) >= size:
        message = (
            f"{component} makes the token {max(ids)}, and the vocabulary of {encoder} has {size}; the "
            "two are not of one model"
        )
        raise UserError("model_path", f"model_path: {message}")


def _is_negative(request: Request, texts: Sequence[str], index: int) -> bool:
    """Whether a text is the negative prompt: the second one, or one that the model's template surrounds."""
    if not request.guidance.on or len(texts) > 1:
        return request.guidance.on and index > 0
    return request.text.prompt not in texts[0] and request.text.negative_prompt in texts[0]
