"""Running a model's autoencoder: long videos in chunks, on tiles where that is asked or memory runs short.

Shape letters: N videos, C channels, F latent frames, H and W latent size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import Tensor

from tinydiff.ops.network import Config
from tinydiff.ops.norm import compute_dtype
from tinydiff.records import Output, UserError
from tinydiff.runtime.blueprint import TILE, Model
from tinydiff.runtime.shortage import give_memory_back, short_of_memory

log = logging.getLogger(__name__)

PIXELS_PER_PASS = 8_000_000
"""Pixels that the autoencoder processes at once. Longer videos go through it in chunks of latent frames, with
the same result.
"""


def encode(model: Model, output: Output, pixels: Tensor) -> Tensor:
    """Pixels [1, 3 or 4, frames, height, width] in [-1, 1] -> normalised latents [1, C, F, H, W]."""
    vae = model.autoencoder
    chunk, tile = passes(model, output)
    latents = in_tiles_if_short(
        model, tile, lambda side: vae.family.encode(vae.config, vae.w, pixels, chunk, side, vae.plan)
    )
    _check_strides(vae.config, pixels, latents)
    return latents.to(compute_dtype(pixels))


def decode(model: Model, output: Output, latents: Tensor) -> Tensor:
    """Latents [N, C, F, H, W] -> pixels [N, 3 or 4, frames, height, width]."""
    vae = model.autoencoder
    chunk, tile = passes(model, output)
    return in_tiles_if_short(
        model,
        tile,
        lambda side: vae.family.decode(vae.config, vae.w, latents.to(vae.dtype), chunk, side, vae.plan),
    )


def passes(model: Model, output: Output) -> tuple[int, int | None]:
    """(latent frames per pass, side of the tiles or None) for the frames of an output."""
    chunk = max(1, PIXELS_PER_PASS // (4 * output.height * output.width))
    return chunk, model.blueprint.tile


def in_tiles_if_short(model: Model, tile: int | None, code: Callable[[int | None], Tensor]) -> Tensor:
    """What the autoencoder makes with this side of its tiles, or in tiles where memory runs short.

    A line in the log says so.

    Ranks that share an image keep to what was asked: only one of them may be short.
    """
    asked = model.blueprint
    bound = tile is not None or asked.tiling is False or asked.on_oom == "fail"
    try:
        return code(tile)
    except Exception as error:
        if bound or not short_of_memory(error) or model.autoencoder.plan.group("height").size > 1:
            raise
    log.warning("out of memory in the autoencoder: it goes on in tiles of %d pixels (see vae_tiling)", TILE)
    give_memory_back()
    return code(TILE)


def _check_strides(vae: Config, pixels: Tensor, latents: Tensor) -> None:
    """Raises UserError where the latents of an input image do not have the size that the autoencoder's config
    says, so that they would not fit the latents of the output. Without an input image the config is trusted,
    as in diffusers.
    """
    frames, height, width = pixels.shape[2:]
    for name, size, expected in (
        ("temporal", latents.shape[2], (frames - 1) // vae.scale_factor_temporal + 1),
        ("spatial", latents.shape[3], height // vae.scale_factor_spatial),
        ("spatial", latents.shape[4], width // vae.scale_factor_spatial),
    ):
        if size != expected:
            field = f"scale_factor_{name}"
            message = (
                f"the autoencoder's {field} is {getattr(vae, field)}, and its levels make another "
                "size of latents"
            )
            raise UserError("model_path", f"model_path: {message}; with it no image can be given")
