"""The networks that the benchmarks run: released transformers as they are, and made-up ones; weights drawn at
random.
"""

from __future__ import annotations

from math import prod
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinydiff.models import ernie, flux, flux2, ovis, qwen_image, sd3, wan, z_image
from tinydiff.models.autoencoders import wan as autoencoder
from tinydiff.models.family import Denoiser
from tinydiff.models.registry import ReleasedModel, named
from tinydiff.models.released import REPOSITORIES

SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}


class Case(NamedTuple):
    """A transformer and a request to it. size: the latents' (F, H, W)."""

    name: str
    config: wan.Config
    size: tuple[int, int, int]
    text_tokens: int

    @property
    def tokens(self) -> int:
        return prod(n // p for n, p in zip(self.size, self.config.patch_size, strict=True))


def _config(module, entries: dict):
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in entries.items()}
    return module.Config(**{name: value for name, value in values.items() if not name.startswith("_")})


def released(name: str, frames: int | None = None) -> Case:
    """A released model at its default size, or at another number of frames."""
    row: ReleasedModel = named(name)
    components = REPOSITORIES[row.name]["components"]
    vae = _config(autoencoder, components["vae"]["config"])
    frames = frames or row.num_frames
    size = (
        (frames - 1) // vae.scale_factor_temporal + 1,
        row.height // vae.scale_factor_spatial,
        row.width // vae.scale_factor_spatial,
    )
    label = f"{row.name.split('/')[-1].removesuffix('-Diffusers')} {row.width}x{row.height}x{frames}"
    return Case(label, _config(wan, components["transformer"]["config"]), size, row.text_tokens)


def made_up(
    name: str,
    layers: int,
    heads: int,
    size: tuple[int, int, int],
    text_tokens: int = 32,
    head_width: int = 32,
) -> Case:
    """A transformer of the given depth and width, for requests whose arithmetic costs little or nothing."""
    config = wan.Config(
        num_attention_heads=heads,
        attention_head_dim=head_width,
        text_dim=64,
        freq_dim=64,
        ffn_dim=4 * heads * head_width,
        num_layers=layers,
    )
    return Case(name, config, size, text_tokens)


IMAGE_FAMILIES: dict[str, ModuleType] = {
    "flux": flux, "flux2": flux2, "ovis": ovis, "qwen_image": qwen_image, "z_image": z_image, "sd3": sd3,
    "ernie": ernie,
}  # fmt: skip


class Picture(NamedTuple):
    """A released image transformer and one branch of a request at the model's default size."""

    name: str
    family: Denoiser
    config: Any
    inputs: dict[str, Tensor]
    x: Tensor


def picture(name: str, text_tokens: int, device: str = "meta") -> Picture:
    """A released image model, asked with a prompt of `text_tokens` tokens."""
    row = named(name)
    entries = REPOSITORIES[row.name]["components"]["transformer"]["config"]
    family = IMAGE_FAMILIES[row.family]
    c = _config(family, entries)
    size, tokens = (1, row.height // 8, row.width // 8), (row.height // 16) * (row.width // 16)
    width = getattr(c, "joint_attention_dim", None) or getattr(c, "cap_feat_dim", None) or c.text_in_dim
    inputs = {"text": torch.empty(1, text_tokens, width, device=device)}
    if row.family in ("flux", "sd3"):
        inputs["pooled"] = torch.empty(1, c.pooled_projection_dim, device=device)
    if row.guidance_form == "embedded":
        inputs["guidance"] = torch.empty(1, device=device)
    match row.family:
        case "qwen_image":
            inputs["positions"] = qwen_image.positions(c, [size[1:]], device)
        case "flux2" | "ernie":
            inputs["positions"] = family.positions((1, row.height // 16, row.width // 16), device=device)
        case "z_image":
            inputs |= {"positions": z_image.positions(c, size, device), "real": z_image.real(c, size, device)}
        case "sd3":
            inputs["positions"] = sd3.positions(c, size, device)
        case _:
            inputs["positions"] = family.positions(size, device=device)
    packed = (c.out_channels if row.family == "sd3" else c.in_channels) * (
        4 if row.family in ("sd3", "z_image") else 1
    )
    return Picture(
        f"{row.name.split('/')[-1]} {row.width}x{row.height}",
        family.FAMILY,
        c,
        inputs,
        torch.empty(1, tokens, packed, device=device),
    )


def weights(
    config: Any,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    family: Denoiser = wan.FAMILY,
) -> dict[str, Tensor]:
    """Every weight of the spec: norms near 1, tables and biases near 0, matrices over the square root of
    their fan-in. Meta stays empty.
    """
    if torch.device(device).type == "meta":
        return {
            row.name: torch.empty(row.shape, device=device, dtype=torch.float32 if row.float32 else dtype)
            for row in family.spec(config)
        }
    generator = torch.Generator().manual_seed(seed)

    def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            return 0.1 * noise + (1 if name.endswith("weight") else 0)
        return noise * (0.1 if name.endswith("table") else prod(shape[1:]) ** -0.5)

    return {
        row.name: drawn(row.name, row.shape).to(device, torch.float32 if row.float32 else dtype)
        for row in family.spec(config)
    }
