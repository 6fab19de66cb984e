"""Scenes and their latents: a pool of each kind, which grows while the denoiser learns from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from tinydiff.io.weights import load_weights
from tinydiff.models.autoencoders import wan as wan_vae
from tinydiff.ops.weights import Weights
from training import autoencoder
from training.scenes import Kind, Scene, render, sample_scene

Params = dict[str, Tensor]
Coder = Callable[[list[Scene]], Tensor]
NONE = torch.empty(0, dtype=torch.float16)  # torch.cat passes over it


@dataclass(frozen=True)
class Pool:
    """Training scenes of one kind, and the means of their latents, float16 [N, Z, F, 16, 16]."""

    scenes: tuple[Scene, ...] = ()
    latents: Tensor = NONE


def grown(pool: Pool, kind: Kind, count: int, seed: int, code: Coder) -> Pool:
    """The pool with scenes up to `count` of them: those of one seed, in one order however it got there."""
    if count <= len(pool.scenes):
        return pool
    made = drawn(kind, count, seed, pool.scenes)
    return Pool(made, torch.cat([pool.latents, code(list(made[len(pool.scenes) :]))]))


def drawn(kind: Kind, count: int, seed: int, first: tuple[Scene, ...] = ()) -> tuple[Scene, ...]:
    """The first `count` training scenes of a kind and a seed; the `first` of them are known."""
    return first + tuple(sample_scene(Random(f"{seed}/{kind}/{i}"), kind) for i in range(len(first), count))


def coder(weights: Params, device: str = "cpu") -> Coder:
    """Scenes of one kind -> the means of their latents, by the weights of an autoencoder as
    `autoencoder.train` makes or as exported.

    Stills need the last temporal slice of the kernels alone, which is what their latents have always been
    made with.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    video_weights = Weights(autoencoder.fast(_to(_flat(weights, autoencoder.FLAT), device), dtype))
    image_weights = Weights(autoencoder.fast(_to(_flat(weights, ("",)), device), dtype))

    @torch.no_grad()
    def code(scenes: list[Scene]) -> Tensor:
        w, size = (video_weights, 4) if scenes[0].kind == "clip" else (image_weights, 32)
        parts = [scenes[i : i + size] for i in range(0, len(scenes), size)]
        moments = (wan_vae.moments(autoencoder.C, w, render(part).to(device, dtype)) for part in parts)
        return torch.cat(
            [mean_and_spread[:, : autoencoder.C.z_dim].half().cpu() for mean_and_spread in moments]
        )

    return code


def exported(folder: Path) -> Params:
    """The float32 weights of the autoencoder of a model directory."""
    return load_weights(folder / "vae", wan_vae.spec(autoencoder.C), torch.float32)


def statistics(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation [Z] of latents [N, Z, F, H, W]: what goes into the autoencoder's config."""
    flat = latents.float().transpose(0, 1).flatten(1)
    return flat.mean(1), flat.std(1)


def _flat(weights: Params, prefixes: tuple[str, ...]) -> Params:
    """Kernels [O, I, 3, 3, 3] below the prefixes -> their last temporal slice [O, I, 1, 3, 3]."""
    return {
        n: t[:, :, -1:] if t.ndim == 5 and t.shape[3] == 3 and n.startswith(prefixes) else t
        for n, t in weights.items()
    }


def _to(weights: Params, device: str) -> Params:
    return {name: tensor.to(device) for name, tensor in weights.items()}
