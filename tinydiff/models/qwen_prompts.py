"""The chats with Qwen2.5-VL in Qwen-Image's pipelines: templates, images among the words, hidden states.

Source: diffusers' Qwen-Image pipelines. Shape letters: T tokens of a text, N tokens of the images in it, C
width of the language model.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from tinydiff.entries import EntryDict
from tinydiff.models.encoders import decoder_lm, qwen_vision
from tinydiff.models.encoders.decoder_generate import Sampling, generate
from tinydiff.models.encoders.qwen_vision import Grid
from tinydiff.models.recipe import Context
from tinydiff.ops.host import integers
from tinydiff.records import UserError

log = logging.getLogger(__name__)

PAD = "<|image_pad|>"
"""The token of a text that stands for all tokens of an image."""
IMAGE = f"<|vision_start|>{PAD}<|vision_end|>"


class Chat(NamedTuple):
    """The template of a chat, and how many of its first tokens are not read."""

    text: str
    skipped: int


_TURNS = "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
TEXT_TO_IMAGE = Chat(
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the "
    f"objects and background:{_TURNS}",
    34,
)
EDIT = Chat(
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, "
    "objects, background), then explain "
    "how the user's text instruction should alter or modify the image. Generate a new image that meets the "
    "user's requirements while "
    f"maintaining consistency with the original input where appropriate.{_TURNS}",
    64,
)
CAPTION = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n# 图像标注器\n"
    "你是一个专业的图像标注器。请基于输入图像，"
    "撰写图注:\n1.\n使用自然、描述性的语言撰写图注，不要使用结构化形式或富文本形式。\n2. 通过加入以下内容，"
    "丰富图注细节：\n"
    " - 对象的属性：如数量、颜色、形状、大小、位置、材质、状态、动作等\n -\n"
    "对象间的视觉关系：如空间关系、功能关系、动作关系、从属关系、比较关系、因果关系等\n"
    " - 环境细节：例如天气、光照、颜色、纹理、气氛等\n - 文字内容：识别图像中清晰可见的文字，"
    "不做翻译和解释，用引号在图注中强调\n3.\n"
    "保持真实性与准确性：\n - 不要使用笼统的描述\n -\n描述图像中所有可见的信息，"
    "但不要加入没有在图像中出现的内容\n"
    f"{IMAGE}<|im_end|>\n<|im_start|>assistant\n"
)
CAPTION_TOKENS = 512
CAPTION_ENDS = ("<|im_end|>", "<|endoftext|>")
CAPTION_SAMPLING = Sampling(repetition_penalty=1.05)
"""Qwen2.5-VL's generation_config.json; its temperature of 1e-6 means the likeliest token."""


class ImageTokens(NamedTuple):
    """The language model's tokens of images."""

    tokens: Tensor
    """[N, C], one image after another."""
    grids: list[Grid]


def encode_images(context: Context, images: Sequence[numpy.ndarray]) -> ImageTokens:
    """Run the vision tower on uint8 images [H, W, 3 or 4], each of its own size.

    Raises UserError for an image that is too narrow.
    """
    net = context.nets["vision"]
    try:
        patches, grids = zip(*(qwen_vision.pixels(net.config, image) for image in images), strict=True)
    except ValueError as error:
        raise UserError("image_path", f"image_path: {error}") from error
    return ImageTokens(
        qwen_vision.encode(net.config, net.plan, net.w, torch.cat(patches).to(context.device), grids),
        list(grids),
    )


def _with_images(context: Context, ids_1T: Tensor, image_tokens: ImageTokens) -> tuple[Tensor, EntryDict]:
    """(ids with a place for each image token [1, T + N - images], their positions and embeddings)."""
    language, vision = context.nets["text_encoder"], context.nets["vision"].config
    pad = context.tokenizers["tokenizer"].token_id(PAD)
    try:
        counts = qwen_vision.token_counts(vision, image_tokens.grids)
        row = qwen_vision.expand(integers(ids_1T[0]), pad, counts)
    except ValueError as error:
        raise UserError(
            "prompt", f"prompt: {PAD} stands for an input image and cannot be in a text ({error})"
        ) from error
    ids = torch.tensor([row], device=context.device)
    embedded = decoder_lm.embed(language.config, language.plan, language.w, ids)
    embeds = qwen_vision.place(embedded, ids, pad, image_tokens.tokens)
    return ids, {
        "positions": qwen_vision.positions(vision, ids, torch.ones_like(ids), pad, image_tokens.grids),
        "embeds": embeds,
    }


def text_states(
    context: Context, chat: Chat, text: str, limit: int | None = None, image_tokens: ImageTokens | None = None
) -> Tensor:
    """The language model's last hidden states [1, T, C], starting with the prompt's.

    limit: most tokens of the prompt; None reads all. image_tokens: of the images that the chat mentions.
    """
    net = context.nets["text_encoder"]
    length = None if limit is None else chat.skipped + limit
    ids, _ = context.tokens("tokenizer", [chat.text.format(text)], length, "none")
    ids, more = (ids, {}) if image_tokens is None else _with_images(context, ids, image_tokens)
    [hidden] = decoder_lm.encode(
        net.config, net.plan, net.w, ids, take=(net.config.num_hidden_layers,), **more
    )
    return hidden[:, chat.skipped :]


def caption(context: Context, image: numpy.ndarray) -> str:
    """The language model's caption of an image, in Chinese, the language of the captions in training."""
    net, tokenizer = context.nets["text_encoder"], context.tokenizers["tokenizer"]
    ids, _ = context.tokens("tokenizer", [CAPTION], None, "none")
    ids, more = _with_images(context, ids, encode_images(context, [image]))
    stop = [tokenizer.token_id(name) for name in CAPTION_ENDS]
    [answer] = generate(
        net.config, net.plan, net.w, ids, limit=CAPTION_TOKENS, stop=stop, sampling=CAPTION_SAMPLING, **more
    )
    text = tokenizer.text(answer)
    log.info("caption: %s", text)
    return text
