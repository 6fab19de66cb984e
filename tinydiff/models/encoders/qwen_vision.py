"""The vision tower of Qwen2.5-VL, its image preprocessing, and its tokens among those of the text.

Source: arXiv 2502.13923. Patches attend within windows of 8 x 8, and in four of the 32 blocks to their whole
image; then each 2 x 2 patches become one token of the language model. Patches are ordered so that those four
are neighbours.

Shape letters: N patches, P values of a patch, D width, U windows, M patches of a window, C width of the
language model, B batch, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tinydiff.entries import Entries, mapping, typed
from tinydiff.keymap import KeyMap, also, moved, unread
from tinydiff.models.encoders import preprocess
from tinydiff.models.encoders.clip_vision import MEAN, STD
from tinydiff.models.encoders.decoder_config import ACTIVATIONS, Rope
from tinydiff.models.encoders.decoder_lm import frequencies
from tinydiff.models.family import Encoder
from tinydiff.ops.attention import attention
from tinydiff.ops.host import integers
from tinydiff.ops.linear import linear, linear_sum
from tinydiff.ops.norm import compute_dtype, rms_norm
from tinydiff.ops.rope import grid_positions, rotate_half
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan, Row, linear_rows, norm_rows, repeat

if TYPE_CHECKING:
    import numpy as np

EPS = 1e-6

Grid = tuple[int, int]
"""Patches of an image: rows, columns."""


@dataclass(frozen=True)
class Config:
    """Field names are those of `vision_config` in the checkpoint's config.json."""

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    out_hidden_size: int = 3584
    hidden_act: str = "silu"
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    image_mean: tuple[float, float, float] = MEAN
    """Entries of the preprocessor's file, like the next four."""
    image_std: tuple[float, float, float] = STD
    resample: int = 3
    """Pillow's number of a filter: bicubic."""
    min_pixels: int = 56 * 56
    max_pixels: int = 12845056

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {self.hidden_act!r}; known are {', '.join(ACTIVATIONS)}")
        if self.hidden_size % (4 * self.num_heads):  # a head's width is turned by rows and columns, in pairs
            heads = f"num_heads is {self.num_heads} and hidden_size {self.hidden_size}"
            raise ValueError(f"{heads}; the width of a head must be a multiple of 4")
        if self.window_size % (token := self.patch_size * self.spatial_merge_size):
            raise ValueError(
                f"window_size is {self.window_size}; it must be a multiple of a token's {token} pixels"
            )

    @property
    def tiling(self) -> dict[str, int]:
        """What its preprocessor must agree with, under its names."""
        return {
            "patch_size": self.patch_size,
            "temporal_patch_size": self.temporal_patch_size,
            "merge_size": self.spatial_merge_size,
        }


def config_from(entries: Entries) -> Config:
    """The Config of a released Qwen2.5-VL config.json. Older files call `in_channels` `in_chans`."""
    vision = mapping("vision_config", entries.get("vision_config"))
    older = {"in_channels": vision["in_chans"]} if "in_chans" in vision else {}
    return Config(**typed(Config, older | dict(vision)))


# --- weights


def _block_rows(c: Config) -> Iterator[Row]:
    d, head = c.hidden_size, c.hidden_size // c.num_heads
    yield from norm_rows("norm1", d)
    yield from linear_rows("attn.qkv", d, 3 * d, "out", parts=(d, d, d), head=head)
    yield from linear_rows("attn.proj", d, d, "in", head=head)
    yield from norm_rows("norm2", d)
    for name in ("gate_proj", "up_proj"):
        yield from linear_rows(f"mlp.{name}", d, c.intermediate_size, "out")
    yield from linear_rows("mlp.down_proj", c.intermediate_size, d, "in")


def spec(c: Config) -> Iterator[Row]:
    """Every weight once, without the `visual.` of the released files."""
    d, merged = c.hidden_size, c.hidden_size * c.spatial_merge_size**2
    yield Row(
        "patch_embed.proj.weight", (d, c.in_channels, c.temporal_patch_size, c.patch_size, c.patch_size)
    )
    yield from repeat("blocks", c.depth, _block_rows(c))
    yield from norm_rows("merger.ln_q", d)
    yield from linear_rows("merger.mlp.0", merged, merged, "out")
    yield from linear_rows("merger.mlp.2", merged, c.out_hidden_size, "in")


def key_map(c: Config) -> KeyMap:
    """The language model beside the tower is read by its own."""
    tower = ("patch_embed", "blocks", "merger")
    return KeyMap(
        (
            *(moved(f"visual.{name}", name) for name in tower),
            *(also(f"model.visual.{name}", name) for name in tower),
            *unread("model", "lm_head"),
        )
    )


# --- from image to patches


def fitted(height: int, width: int, multiple: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width near the given ones: multiples of `multiple`, with an area within the bounds.

    Raises ValueError where one side is over 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(
            f"an image of {width} x {height} is too narrow: one side is at most 200 times the other"
        )
    tall, wide = (round(side / multiple) * multiple for side in (height, width))
    if tall * wide > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        tall, wide = (
            max(multiple, math.floor(side / shrink / multiple) * multiple) for side in (height, width)
        )
    elif tall * wide < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        tall, wide = (math.ceil(side * grow / multiple) * multiple for side in (height, width))
    return tall, wide


def pixels(c: Config, image_HWC: np.ndarray) -> tuple[Tensor, Grid]:
    """uint8 image [H, W, 3 or 4] -> (patches float32 [N, P], their grid).

    The image is resized and normalised, and each frame is repeated. An RGBA image is composited over
    white. Values are those of transformers' Qwen2VLImageProcessorPil.
    """
    import numpy as np
    from PIL import Image

    p, m = c.patch_size, c.spatial_merge_size
    height, width = fitted(image_HWC.shape[0], image_HWC.shape[1], p * m, c.min_pixels, c.max_pixels)
    image = Image.fromarray(image_HWC)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    resized = np.asarray(image.resize((width, height), Image.Resampling(c.resample)))
    colours = torch.as_tensor(resized * (1 / 255)).float()
    colours = (colours - torch.tensor(c.image_mean)) / torch.tensor(c.image_std)
    patches = rearrange(colours, "(h m p) (w n q) c -> (h w m n) c 1 (p q)", m=m, n=m, p=p, q=p)
    return patches.expand(-1, -1, c.temporal_patch_size, -1).flatten(1), (height // p, width // p)


# --- the network


def windows(c: Config, grid: Grid) -> Tensor:
    """Which patches each window holds: int64 [U, M], -1 where a window reaches beyond the image."""
    m = c.spatial_merge_size
    side = c.window_size // c.patch_size // m
    tall, wide = grid[0] // m, grid[1] // m
    tokens = F.pad(torch.arange(tall * wide).view(tall, wide), (0, -wide % side, 0, -tall % side), value=-1)
    tokens = rearrange(tokens, "(a s) (b t) -> (a b) (s t) 1", s=side, t=side)
    return torch.where(tokens < 0, -1, tokens * m * m + torch.arange(m * m)).flatten(1)


def _rope(c: Config, grid: Grid, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [N, D / heads / 2] of the patches: the first half by row, the second by column."""
    m = c.spatial_merge_size
    at = rearrange(grid_positions(*grid), "(h m w n) a -> (h w m n) a", h=grid[0] // m, m=m, n=m).to(
        like.device
    )
    turn, _ = frequencies(Rope(1e4), c.hidden_size // c.num_heads // 2)
    dtype = compute_dtype(like)
    angle = (at[..., None].to(dtype) * turn.to(like.device, dtype)).flatten(1)
    return angle.cos(), angle.sin()


def encode(c: Config, plan: Plan, w: Weights, patches_NP: Tensor, grids: Sequence[Grid]) -> Tensor:
    """Patches [N, P] of images one after another -> tokens [N / 4, C] for the language model.

    grids: rows and columns of each image's patches.
    """
    kernel = w["patch_embed.proj.weight"].flatten(1)
    images = torch.split(patches_NP.to(w.dtype), [tall * wide for tall, wide in grids])
    pairs = zip(images, grids, strict=True)
    return torch.cat([_image(c, plan, w, F.linear(image, kernel), grid) for image, grid in pairs])


def _image(c: Config, plan: Plan, w: Weights, x_ND: Tensor, grid: Grid) -> Tensor:
    """One image through all blocks, as windows [U, M, D] of equal size.

    Places of a window beyond the image are masked.
    """
    index = windows(c, grid)
    real, order = index >= 0, index.clamp_min(0).to(x_ND.device)
    hidden = None
    if not bool(real.all()):
        hidden = torch.zeros(real.shape, dtype=x_ND.dtype).masked_fill(~real, -math.inf).to(x_ND.device)
    x = x_ND[order]
    cos, sin = (table[order] for table in _rope(c, grid, x_ND))
    for i in range(c.depth):
        whole = i in c.fullatt_block_indexes
        x, rows, columns = (
            y.reshape(1, -1, y.shape[-1]) if whole else y.view(*index.shape, y.shape[-1])
            for y in (x, cos, sin)
        )
        mask = None if hidden is None else hidden.view(1, 1, 1, -1) if whole else hidden[:, None, None]
        x = _block(c, plan, w / "blocks" / i, x, rows, columns, mask)
    x = x.view(*index.shape, -1)
    back = torch.argsort(index[real]).to(x.device)
    merger = w / "merger"
    patches = rms_norm(x[real.to(x.device)][back], merger / "ln_q", EPS)
    tokens = patches.view(-1, merger["mlp.0.weight"].shape[1])
    return linear_sum(plan, F.gelu(linear(tokens, merger / "mlp.0")), merger / "mlp.2")


def _block(
    c: Config, plan: Plan, w: Weights, x_UMD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None
) -> Tensor:
    a, f = w / "attn", w / "mlp"
    qkv = linear(rms_norm(x_UMD, w / "norm1", EPS), a / "qkv")
    q, k, v = torch.unflatten(qkv, -1, (3, -1, c.hidden_size // c.num_heads)).unbind(2)
    y = attention(plan, rotate_half(q, cos, sin), rotate_half(k, cos, sin), v, mask)
    x = x_UMD + linear_sum(plan, y.flatten(2), a / "proj")
    y = rms_norm(x, w / "norm2", EPS)
    y = ACTIVATIONS[c.hidden_act](linear(y, f / "gate_proj")) * linear(y, f / "up_proj")
    return x + linear_sum(plan, y, f / "down_proj")


# --- among the words


def token_counts(c: Config, grids: Sequence[Grid]) -> list[int]:
    """How many tokens of the language model each image becomes."""
    return [tall * wide // c.spatial_merge_size**2 for tall, wide in grids]


def expand(ids: Sequence[int], image_id: int, counts: Sequence[int]) -> list[int]:
    """A prompt's ids with its i-th image token repeated counts[i] times.

    Raises ValueError unless the prompt has one such token per image.
    """
    places = list(ids).count(image_id)
    if places != len(counts):
        raise ValueError(f"the prompt has {places} image tokens and there are {len(counts)} images")
    left = iter(counts)
    return [each for token in ids for each in ([token] * next(left) if token == image_id else [token])]


def place(embeds_BTC: Tensor, ids_BT: Tensor, image_id: int, tokens_NC: Tensor) -> Tensor:
    """Embeddings [B, T, C] with the images' tokens [N, C], in order, where the ids say `image_id`."""
    return embeds_BTC.masked_scatter((ids_BT == image_id)[..., None], tokens_NC.to(embeds_BTC.dtype))


def positions(c: Config, ids_BT: Tensor, mask_BT: Tensor, image_id: int, grids: Sequence[Grid]) -> Tensor:
    """Positions [3, B, T] (time, row, column) of words and images; 0 on padding.

    grids: those of all images, in the order of the batch's rows. Words count up along all three axes. The
    tokens of an image share one time and take the rows and columns of its grid, starting where the words
    before it end; the words after it count on from the longer side.
    """
    m, left = c.spatial_merge_size, iter(grids)
    at = torch.zeros(3, *ids_BT.shape, dtype=torch.int64)
    for row, (ids_T, mask_T) in enumerate(zip(ids_BT.cpu(), mask_BT.cpu(), strict=True)):
        ids, mask = integers(ids_T), integers(mask_T)
        real = [i for i, seen in enumerate(mask) if seen]
        start = done = 0
        while done < len(real):
            if ids[real[done]] == image_id:
                tall, wide = (side // m for side in next(left))
                step, size = grid_positions(1, tall, wide).T, max(tall, wide)
            else:
                step, size = torch.zeros(3, 1, dtype=torch.int64), 1
            places = real[done : done + step.shape[1]]
            at[:, row, places] = start + step
            start, done = start + size, done + step.shape[1]
    return at.to(ids_BT.device)


FAMILY = Encoder(
    "image_encoder",
    Config,
    spec,
    head_width=lambda c: c.hidden_size // c.num_heads,
    biased=True,
    keys=key_map,
    read=lambda entries, _: config_from(entries),
    preprocessor=("processor", lambda entries, c: preprocess.qwen(entries, c.tiling)),
)
