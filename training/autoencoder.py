"""Training of the autoencoder in three stages: on images, then on videos too, then of the decoder alone.

For one image a causal kernel reduces to its last temporal slice, so `pictures` trains 2-D kernels. `clips`
puts zero slices before them; of the encoder it trains only those and the temporal convolutions, so a
picture's latents stay exactly what they were and the denoiser can already be trained on them. `polish` leaves
the encoder as it is, so that nothing the denoiser learns from moves any more.

Convolutions run in bfloat16 with channels innermost, which is several times faster on CPUs that have it; the
weights stay float32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tinydiff.io.atomic import write_over
from tinydiff.models.autoencoders import wan as wan_vae
from tinydiff.ops.weights import Weights
from training import model
from training.scenes import render, scenes

C = model.AUTOENCODER
FLAT = (
    "encoder.conv_in.",
    "encoder.down_blocks.0.",
    f"decoder.up_blocks.{len(C.dim_mult) - 1}.",
    "decoder.conv_out.",
)
"""Layers at the finest resolution never look at earlier frames: their kernels keep one temporal slice until
they are exported.
"""
STAGES = ("pictures", "clips", "polish")
Params = dict[str, Tensor]


def annealed(step: int, steps: int, warmup: int) -> float:
    """The share of the full learning rate at a step: up in a line over `warmup` steps, then down a cosine to
    a fiftieth.
    """
    return min(1, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def keep(path: Path, state: Any) -> None:
    """Write a checkpoint; one that is there stays whole until the new one is."""
    write_over(path, lambda place: torch.save(state, place))


def initial(seed: int) -> Params:
    """Random weights; spatial kernels have one temporal slice, the last layer of every residual branch starts
    at zero.
    """
    generator = torch.Generator().manual_seed(seed)
    params = {}
    for row in wan_vae.spec(C):
        shape = list(row.shape)
        if len(shape) == 5 and shape[3] == 3:
            shape[2] = 1
        if row.name.endswith("gamma"):
            params[row.name] = torch.ones(shape)
        elif len(shape) == 1 or row.name.endswith(
            ("conv2.weight", "attentions.0.proj.weight", "resample.1.weight")
        ):
            params[row.name] = torch.zeros(shape)
        else:
            params[row.name] = torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5
    return params


def with_past(params: Params, flat: tuple[str, ...] = FLAT) -> Params:
    """Kernels [O, I, 1, 3, 3] -> [O, I, 3, 3, 3], zeros for the two frames before; layers below the prefixes
    `flat` stay as they are.
    """
    grown = {}
    for row in wan_vae.spec(C):
        kernel = params[row.name]
        missing = 0 if kernel.ndim < 5 or row.name.startswith(flat) else row.shape[2] - kernel.shape[2]
        grown[row.name] = (
            torch.cat([kernel.new_zeros(*kernel.shape[:2], missing, *kernel.shape[3:]), kernel], 2)
            if missing
            else kernel
        )
    return grown


def fast(params: Params, dtype: torch.dtype = torch.bfloat16) -> Params:
    """The weights as the convolutions are quickest with: channels innermost, in bfloat16 where the processor
    computes in it.
    """
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    return {
        n: t.to(dtype, memory_format=layouts.get(t.ndim, torch.preserve_format)) for n, t in params.items()
    }


def losses(params: Params, x: Tensor) -> tuple[Tensor, Tensor]:
    """(absolute and squared error of pixels and of their differences to the neighbours, divergence of the
    latents from a unit Gaussian).
    """
    w = Weights(fast(params))
    mean, log_variance = wan_vae.moments(C, w, x.to(torch.bfloat16)).float().chunk(2, 1)
    log_variance = log_variance.clamp(-12, 4)
    z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    error = wan_vae.raw_pixels(C, w, z.to(torch.bfloat16)).float() - x
    sharp = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return error.abs().mean() + 4 * error.square().mean() + 0.5 * sharp, divergence


def around_edges(x: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """A square of every video [B, 3, T, H, W] that holds a contour: flat ground teaches little."""
    edges = x.diff(dim=-1).abs().sum((1, 2))[:, : x.shape[-2]].flatten(1) + 1e-3
    pick = torch.multinomial(edges, 1, generator=generator)[:, 0]
    limit = x.shape[-1] - side
    jitter = torch.randint(-side // 3, side // 3 + 1, (2, len(pick)), generator=generator)
    top = (pick // (x.shape[-1] - 1) - side // 2 + jitter[0]).clamp(0, limit)
    left = (pick % (x.shape[-1] - 1) - side // 2 + jitter[1]).clamp(0, limit)
    return torch.stack(
        [
            clip[..., i : i + side, j : j + side]
            for clip, i, j in zip(x, top.tolist(), left.tolist(), strict=True)
        ]
    )


def _batches(seed: int, stage: str, whole: bool, ranks: int) -> list[Tensor]:
    """One rank's share of the batches of a step: squares around contours, or whole images."""
    generator = torch.Generator().manual_seed(seed)
    count = (8 if whole else 16) // ranks
    x = render(scenes(seed, "picture", count // 2) + scenes(seed, "pair", count - count // 2))
    batches = [x if whole else around_edges(x, 64, generator)]
    if stage != "pictures":
        batches.append(around_edges(render(scenes(seed, "clip", 4 // ranks)), 64, generator))
    return batches


def _trained(stage: str, name: str, tensor: Tensor) -> Tensor | None:
    """The mask of what `stage` may change of a weight, None for nothing."""
    if stage == "pictures":
        return None if "time_conv" in name else torch.ones(())
    if name.startswith(("decoder.", "post_quant_conv.")) or (stage == "clips" and "time_conv" in name):
        return torch.ones(())
    if stage == "clips" and tensor.ndim == 5 and tensor.shape[2] == 3:
        mask = torch.ones(1, 1, 3, 1, 1)
        mask[:, :, -1] = 0
        return mask
    return None


def average_gradients(leaves: list[Tensor], ranks: int) -> None:
    """One reduction over all gradients laid end to end; a leaf that took no part counts as zero."""
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in leaves])
    dist.all_reduce(flat)
    for leaf, part in zip(leaves, flat.div_(ranks).split([p.numel() for p in leaves]), strict=True):
        leaf.grad = part.view_as(leaf)


def train(
    stage: str, run: Path, steps: int, seed: int = 1, log: Callable[[str], None] = print, device: str = "cpu"
) -> None:
    """Train one of `STAGES` for `steps` in all and write `run/<stage>.pt`; resumes from that file when it is
    there.

    Where torch.distributed runs, the ranks share each batch and rank 0 writes.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    path = run / f"{stage}.pt"
    if path.exists():
        state = torch.load(path, device)
    else:
        before = STAGES[STAGES.index(stage) - 1]
        params = initial(seed) if stage == "pictures" else torch.load(run / f"{before}.pt")["average"]
        params = with_past(params) if stage == "clips" else params
        params = {name: tensor.to(device) for name, tensor in params.items()}
        state = {
            "step": 0,
            "params": params,
            "average": {n: t.clone() for n, t in params.items()},
            "optimiser": None,
        }
    params, average = state["params"], state["average"]
    masks = {
        name: mask.to(device)
        for name, tensor in params.items()
        if (mask := _trained(stage, name, tensor)) is not None
    }
    leaves = [params[name].requires_grad_() for name in masks]
    rate = 2e-3 if stage == "pictures" else 1e-3
    optimiser = torch.optim.AdamW(leaves, rate, betas=(0.9, 0.95), weight_decay=0.0)
    if state["optimiser"]:
        optimiser.load_state_dict(state["optimiser"])
    started, shown, history = time.monotonic(), time.monotonic(), []
    for step in range(state["step"], steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * annealed(step, steps, warmup=50)
        for x in _batches((seed * 1_000_000 + step) * 64 + rank, stage, step > 0.88 * steps, ranks):
            error, divergence = losses(params, x.to(device))
            (error + 3e-5 * divergence).backward()
            history.append((error.item(), divergence.item()))
        for name, mask in masks.items():
            if mask.ndim and params[name].grad is not None:
                params[name].grad.mul_(mask)
        if ranks > 1:
            average_gradients(leaves, ranks)
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            inertia = min(0.998, step / (step + 10))
            for name in masks:
                average[name].lerp_(params[name].detach(), 1 - inertia)
        if rank == 0 and (time.monotonic() - shown > 20 or step + 1 == steps):
            shown = time.monotonic()
            recent = torch.tensor(history[-50:]).mean(0)
            pace = (step + 1 - state["step"]) / (shown - started)
            log(
                f"{stage} step {step + 1}/{steps} error {recent[0]:.4f} divergence {recent[1]:.2f}"
                f" {pace:.2f} steps/s"
            )
        if rank == 0 and ((step + 1) % 200 == 0 or step + 1 == steps):
            saved = {"step": step + 1, "average": average, "optimiser": optimiser.state_dict()}
            keep(path, saved | {"params": {n: t.detach() for n, t in params.items()}})
