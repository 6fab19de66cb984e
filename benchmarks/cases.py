"""The networks that the benchmarks run: released Wan transformers as they are, and made-up ones; weights drawn at random."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tinydiff.models import wan
from tinydiff.models.autoencoders import wan as autoencoder
from tinydiff.models.registry import ReleasedModel, named

RELEASED = Path(__file__).parents[1] / "tests" / "data" / "released"
SCHEDULER = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


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
    components = json.loads((RELEASED / f"{row.name.replace('/', '__')}.json").read_text())["components"]
    vae = _config(autoencoder, components["vae"]["config"])
    frames = frames or row.num_frames
    size = ((frames - 1) // vae.scale_factor_temporal + 1, row.height // vae.scale_factor_spatial, row.width // vae.scale_factor_spatial)
    label = f"{row.name.split('/')[-1].removesuffix('-Diffusers')} {row.width}x{row.height}x{frames}"
    return Case(label, _config(wan, components["transformer"]["config"]), size, row.text_tokens)


def made_up(name: str, layers: int, heads: int, size: tuple[int, int, int], text_tokens: int = 32, head_width: int = 32) -> Case:
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


def weights(config: wan.Config, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Every weight of the spec: norms near 1, tables and biases near 0, matrices over the square root of their fan-in. Meta stays empty."""
    if torch.device(device).type == "meta":
        return {row.name: torch.empty(row.shape, device=device, dtype=torch.float32 if row.float32 else dtype) for row in wan.spec(config)}
    generator = torch.Generator().manual_seed(seed)

    def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            return 0.1 * noise + (1 if name.endswith("weight") else 0)
        return noise * (0.1 if name.endswith("table") else prod(shape[1:]) ** -0.5)

    return {row.name: drawn(row.name, row.shape).to(device, torch.float32 if row.float32 else dtype) for row in wan.spec(config)}
