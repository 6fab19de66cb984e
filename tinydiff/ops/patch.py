"""Latents to tokens and back. Shape letters: B batch, C channels, F frames, H height, W width, L tokens."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor


def patchify(x_BCFHW: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """[B, C, F, H, W] -> tokens [B, L, C * pf * ph * pw], in row-major order of the patch grid.

    Within a token the channel is the outermost dimension.
    """
    pf, ph, pw = patch
    return rearrange(x_BCFHW, "b c (f pf) (h ph) (w pw) -> b (f h w) (c pf ph pw)", pf=pf, ph=ph, pw=pw)


def unpatchify(x_BLP: Tensor, patch: tuple[int, int, int], size: tuple[int, int, int]) -> Tensor:
    """Inverse of `patchify`; `size` is the latent size (F, H, W)."""
    (pf, ph, pw), (f, h, w) = patch, size
    sizes = {"f": f // pf, "h": h // ph, "w": w // pw, "pf": pf, "ph": ph, "pw": pw}
    return rearrange(x_BLP, "b (f h w) (c pf ph pw) -> b c (f pf) (h ph) (w pw)", **sizes)
