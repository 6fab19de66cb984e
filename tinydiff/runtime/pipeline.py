"""The hops from an admitted request to frames. Each is a function of the one before; nothing is kept between requests.

Shape letters: B batch, T text tokens, L latent tokens, P latent values of a token, C channels, F latent frames, H and W latent size.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

import tinydiff
from tinydiff.config import Progress
from tinydiff.io.tokenizer import prompt_clean
from tinydiff.models import wan
from tinydiff.models.encoders import clip_vision, t5
from tinydiff.ops.norm import compute_dtype
from tinydiff.ops.patch import patchify, unpatchify
from tinydiff.ops.weights import Weights
from tinydiff.records import Request, Result, UserError
from tinydiff.runtime.blueprint import PRECISIONS, Blueprint, Model, Net
from tinydiff.sampling import guidance, loop, noise, solvers
from tinydiff.sampling.solvers import Table

log = logging.getLogger(__name__)

PIXELS_PER_PASS = 8_000_000
"""Pixels of frames that the autoencoder handles at once; longer clips go through it in chunks of latent frames, with the same result."""
TILE = 256
"""Side in pixels of the squares of a tiled autoencoder."""
SHIFTS = {"UniPCMultistepScheduler": "flow_shift"}
"""What a scheduler class calls its shift, where it is not "shift"."""


class Conditioning(NamedTuple):
    """What the denoiser is told, but for time and noise."""

    inputs: dict[str, Tensor]
    """As the family's `hoist` takes them; batch 2, positive and negative prompt, where the request is guided."""
    size: tuple[int, int, int]
    """The latents' (F, H, W)."""


@dataclass(frozen=True)
class Clock:
    """Seconds of each stage and of each step, told to `progress` as they pass."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.progress.on_stage(name)
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def steps(self, made: Iterable[Tensor], total: int) -> Iterator[Tensor]:
        """Pass on what each of `total` steps makes."""
        before = time.perf_counter()
        for done, latents in enumerate(made, 1):
            now = time.perf_counter()
            self.step_seconds.append(now - before)
            before = now
            self.progress.on_step(done, total)
            yield latents


@torch.no_grad()
def embed_text(model: Model, texts: list[str]) -> Tensor:
    """Prompts -> hidden states [B, T, C] in the denoiser's type, the rows of padding zero."""
    net, length = model.nets["text_encoder"], model.blueprint.row.text_tokens
    encoded = [model.tokenizer.encode(prompt_clean(text), length) for text in texts]
    for tokens in encoded:
        if tokens.truncated:
            log.warning("prompt: the last %d of its tokens were cut, the model reads %d", tokens.truncated, length)
    ids, mask = (torch.tensor(rows, device=model.blueprint.device) for rows in ([t.ids for t in encoded], [t.mask for t in encoded]))
    hidden = t5.encode(net.config, net.plan, Weights(net.weights), ids, mask)
    return wan.text_input(hidden, mask).to(model.nets["transformer"].dtype)


def to_pixels(images: tuple[numpy.ndarray, ...], like: Net, device: torch.device) -> Tensor:
    """uint8 pictures [H, W, 3] -> [1, 3, N, H, W] in [-1, 1], in the type of the network that reads them."""
    x = torch.from_numpy(numpy.stack(images)).to(device, like.dtype)
    return (x / 127.5 - 1).permute(3, 0, 1, 2)[None]


def vae_passes(model: Model, request: Request) -> tuple[int, int | None]:
    """(latent frames per pass, side of the tiles or None) for the request's frames."""
    chunk = max(1, PIXELS_PER_PASS // (4 * request.height * request.width))
    return chunk, TILE if model.blueprint.tiling else None


@torch.no_grad()
def given_frames(model: Model, request: Request, size: tuple[int, int, int]) -> dict[str, Tensor]:
    """How the variant is told of the given pictures: clean tokens in place (TI2V), or latents and mask beside the noisy ones."""
    net, vae, device = model.nets["transformer"], model.nets["vae"], model.blueprint.device
    pixels = to_pixels(request.images, vae, device)
    patch = net.config.patch_size
    chunk, tile = vae_passes(model, request)

    def encode(x: Tensor) -> Tensor:
        return vae.module.encode(vae.config, Weights(vae.weights), x, chunk, tile).to(compute_dtype(x))

    if model.blueprint.options.get("expand_timesteps"):
        first = encode(pixels)
        frame = torch.cat([first, first.new_zeros(*first.shape[:2], size[0] - 1, *size[1:])], 2)
        frozen = wan.positions(net.config, size, device)[:, 0] == 0
        return {"frame": patchify(frame, patch), "frozen": frozen[None, :, None]}
    gap = pixels.new_zeros(1, 3, request.num_frames - pixels.shape[2], request.height, request.width)
    latents = encode(torch.cat([pixels[:, :, :1], gap, pixels[:, :, 1:]], 2))
    mask = wan.known_frames_mask(size, last=len(request.images) > 1).to(latents)
    beside = {"concat": patchify(torch.cat([mask, latents], 1), patch)}
    if net.config.image_dim is not None:
        encoder = model.nets["image_encoder"]
        views = torch.cat([clip_vision.pixels(encoder.config, image) for image in request.originals]).to(device)
        beside["image"] = clip_vision.encode(encoder.config, encoder.plan, Weights(encoder.weights), views)
    return beside


def condition(model: Model, request: Request) -> Conditioning:
    """Run the encoders."""
    net, vae = model.nets["transformer"].config, model.nets["vae"].config
    stride = vae.scale_factor_spatial
    size = ((request.num_frames - 1) // vae.scale_factor_temporal + 1, request.height // stride, request.width // stride)
    texts = [request.prompt, request.negative_prompt] if request.guided else [request.prompt]
    inputs = {"text": embed_text(model, texts), "positions": wan.positions(net, size, model.blueprint.device)}
    if request.images:
        inputs |= given_frames(model, request, size)
    if "image" in inputs:
        inputs["image"] = inputs["image"].repeat(len(texts), 1, 1)
    return Conditioning(inputs, size)


def table(blueprint: Blueprint, request: Request) -> Table:
    """The request's solver as a table. Raises UserError for a scheduler or timesteps that cannot be."""
    if request.dmd_timesteps:
        rows = solvers.dmd(request.dmd_timesteps, request.flow_shift)
    else:
        shift = {SHIFTS.get(blueprint.scheduler.get("_class_name", ""), "shift"): request.flow_shift}
        rows = solvers.from_scheduler_config({**blueprint.scheduler, **shift}, request.num_inference_steps)
    rows = solvers.with_guidance(rows, request.guidance_scale)
    if request.boundary_ratio is not None:
        rows = solvers.with_experts(rows, request.boundary_ratio, request.guidance_scale_2)
    return rows


def denoise(model: Model, request: Request, conditioning: Conditioning, seed: int, latents: Tensor | None = None) -> Iterator[Tensor]:
    """Noise of `seed` (or `latents` [1, C, F, H, W]) -> latents [1, C, F, H, W], float32, after each step, a given frame in its place."""
    net, device = model.nets["transformer"], model.blueprint.device
    rows, patch, size = table(model.blueprint, request), net.config.patch_size, conditioning.size
    start, fresh = noise.latents(seed, [0], (model.nets["vae"].config.z_dim, *size), rows)
    kind = guidance.classifier_free if request.guided else guidance.none
    run = _denoiser(model.blueprint.compiled, net, kind)

    def expert(index: int) -> loop.Hoisted:
        chosen = model.nets[("transformer", "transformer_2")[index]]
        return loop.hoist(chosen.module, chosen.config, chosen.plan, chosen.weights, conditioning.inputs, rows)

    x = patchify((start if latents is None else latents).to(device), patch)
    tokens = None if fresh is None else torch.stack([patchify(draw.to(x), patch) for draw in fresh])
    for progress in loop.run(run, rows, x, expert, tokens, chunk=1):
        yield unpatchify(_in_place(conditioning.inputs, progress.x), patch, size)


def _in_place(inputs: dict[str, Tensor], x_BLP: Tensor) -> Tensor:
    """The tokens of a given frame, which the network sees clean at every step, put over those of the loop."""
    return torch.where(inputs["frozen"], inputs["frame"].to(x_BLP.dtype), x_BLP) if "frame" in inputs else x_BLP


def _denoiser(compiled: bool, net: Net, kind: Callable) -> loop.Denoise:
    if not compiled:
        return loop.eager_denoise(net.module, net.config, net.plan, kind)
    from tinydiff.sampling.compile import compiled_denoise  # pulls in the compiler: only those who compile pay for it

    return compiled_denoise(net.module, net.config, net.plan, kind)


@torch.no_grad()
def decode(model: Model, request: Request, latents: Tensor) -> numpy.ndarray:
    """Latents [1, C, F, H, W] -> frames uint8 [frames, height, width, 3]."""
    vae = model.nets["vae"]
    chunk, tile = vae_passes(model, request)
    x = vae.module.decode(vae.config, Weights(vae.weights), latents.to(vae.dtype), chunk, tile)
    return ((x[0].float() / 2 + 0.5) * 255).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


def parameters(model: Model, request: Request) -> dict[str, Any]:
    """Every effective parameter of a request but the seed, JSON-able."""
    names = ("prompt", "negative_prompt", "height", "width", "num_frames", "fps", "num_inference_steps", "guidance_scale")
    entries: dict[str, Any] = {"model": model.blueprint.row.name} | {name: getattr(request, name) for name in names}
    if not request.guided:
        del entries["negative_prompt"]
    if request.boundary_ratio is not None:
        entries |= {"guidance_scale_2": request.guidance_scale_2, "boundary_ratio": request.boundary_ratio}
    if request.dmd_timesteps:
        entries["dmd_denoising_steps"] = list(request.dmd_timesteps)
    entries |= {"flow_shift": request.flow_shift, "given_images": len(request.images)}
    entries["precision"] = {name: PRECISIONS[net.dtype] for name, net in model.nets.items()}
    return entries | {"tinydiff": tinydiff.__version__, "torch": torch.__version__}


def run(model: Model, request: Request, progress: Progress) -> Result:
    """Make everything one request asks for."""
    clock = Clock(progress)
    with clock.stage("encode"):
        conditioning = condition(model, request)
    frames, kept = [], []
    for seed in request.seeds:
        with clock.stage("denoise"):
            steps = clock.steps(denoise(model, request, conditioning, seed), request.num_inference_steps)
            latents = deque(steps, maxlen=1).pop()  # the last one's, holding no others
        if not latents.isfinite().all():
            name, narrow = model.blueprint.row.name, PRECISIONS.get(model.nets["transformer"].dtype)
            message = f"{name} gave values that are not numbers; its weights are broken, or {narrow} is too narrow for it"
            raise UserError("model_path", f"model_path: {message} (see dit_precision)")
        with clock.stage("decode"):
            frames.append(decode(model, request, latents))
        kept.append(latents[0].cpu())
    made = parameters(model, request)
    return Result(tuple(frames), tuple(kept), made, request.seeds, clock.seconds, tuple(clock.step_seconds))
