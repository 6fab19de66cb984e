"""Previews: latents to colours through a linear map that is fitted once per model to its own autoencoder.

Shape letters: N videos, C latent channels, F latent frames, H and W latent size.
"""

from __future__ import annotations

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.io.images import resize
from tinydiff.runtime.blueprint import Model

SIDE, PATCHES, IMAGES = 16, 4, 8
"""Of the images that the map is fitted to: latent size, colour patches along each side, and number."""
LONGEST = 512
"""The largest length in pixels of a preview's longer side."""


@torch.no_grad()
def fit_colours(model: Model) -> Tensor:
    """The map [C + 1, 3] from latents and a constant 1 to red, green and blue in [-1, 1].

    It is fitted by least squares over soft patches of colour.
    """
    vae = model.autoencoder
    stride, with_alpha = vae.config.scale_factor_spatial, getattr(vae.config, "in_channels", 3) == 4
    patches = torch.rand(IMAGES, 3, PATCHES, PATCHES, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels = F.interpolate(patches, size=(SIDE * stride, SIDE * stride), mode="bilinear")
    colours = F.avg_pool2d(pixels, stride)
    given = F.pad(pixels, (0, 0, 0, 0, 0, 1), value=1.0) if with_alpha else pixels
    given = torch.split(given.to(model.blueprint.device, vae.dtype)[:, :, None], 1)
    latents = (
        torch.cat([vae.family.encode(vae.config, vae.w, x, plan=vae.plan)[:, :, 0] for x in given])
        .double()
        .cpu()
    )
    latents = F.interpolate(
        latents, size=colours.shape[2:], mode="area"
    )  # some autoencoders put several pixels into channels
    known = torch.cat([latents, torch.ones_like(latents[:, :1])], 1).transpose(0, 1).flatten(1).T
    wanted = colours.double().transpose(0, 1).flatten(1).T
    return torch.linalg.lstsq(known, wanted).solution.float()  # pyright: ignore


@torch.no_grad()
def preview_frame(to_colours: Tensor, latents: Tensor, height: int, width: int) -> numpy.ndarray:
    """The middle frame of the first of latents [N, C, F, H, W] as uint8 [height, width, 3].

    It is reduced to `LONGEST` pixels.
    """
    middle = latents[0, :, latents.shape[2] // 2].float().cpu()
    colours = torch.einsum("chw,cr->hwr", middle, to_colours[:-1]) + to_colours[-1]
    small = ((colours.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    scale = min(1.0, LONGEST / max(height, width))
    return resize(small, max(1, round(height * scale)), max(1, round(width * scale)), "bicubic")
