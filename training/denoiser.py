"""Training of the denoiser and its text encoder, together, on the autoencoder's latents: flow matching with velocity prediction.

Pictures are clips of one latent frame, so one network learns both. A quarter of the clips are given their first frame, its tokens clean
and at timestep 0, as TI2V wants it. One prompt in ten is empty, for guidance.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from tinydiff.models import wan
from tinydiff.models.autoencoders import wan as wan_vae
from tinydiff.models.encoders import t5
from tinydiff.models.evaluate import walk
from tinydiff.ops.patch import patchify
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan
from tinydiff.sampling.sigmas import static_shift
from training import autoencoder, model
from training.captions import caption
from training.scenes import FRAMES, SHAPES, Kind, Scene, render, scenes

C = model.TRANSFORMER
EMPTY = 0.1  # share of prompts left empty
GIVEN = 0.25  # share of clips whose first frame is given
RATE = 1.5e-3
PROBE = 0.05
"""What the losses of the two linear probes count, which are thrown away in the end."""
PLACED, SHAPED = 2, 4
"""After how many blocks a probe reads each token's place, and after how many the nearest shape: what it is, how far off and how large.
Rope tells tokens only where they are to each other; absolute places, which prompts name, can be found out at the borders of the picture.
The shape's outline moves the error of few tokens, and only when all of them agree where its centre is. Without these pushes the network
finds both out very late."""
SHIFT, SPREAD = 4.0, 1.2
"""Noise levels are logit-normal with this spread, then shifted: few tokens with flat colours show what they are through much noise, so
what a scene holds is decided at the highest levels."""
Params = dict[str, Tensor]
Log = Callable[[str], None]


def encoded(run: Path, kind: Kind, count: int, seed: int, log: Log, device: str = "cpu") -> tuple[list[Scene], Tensor]:
    """`count` training scenes of a kind and the means of their latents, float16 [count, Z, F, 16, 16], kept in `run` once made."""
    path = run / f"latents-{kind}.pt"
    made = scenes(seed, kind, count)
    stage = "clips" if kind == "clip" else "pictures"
    if path.exists() and len(latents := torch.load(path)) == count:
        return made, latents
    w = Weights(autoencoder.fast(torch.load(run / f"{stage}.pt", device)["average"]))
    size, parts = (4 if kind == "clip" else 32), []
    started = time.monotonic()
    with torch.no_grad():
        for i in range(0, count, size):
            x = render(made[i : i + size]).to(device, torch.bfloat16)
            parts.append(wan_vae.moments(autoencoder.C, w, x)[:, : autoencoder.C.z_dim].half().cpu())
            if (i // size) % 100 == 99:
                log(f"latents {kind} {i + size}/{count} {(i + size) / (time.monotonic() - started):.1f} /s")
    latents = torch.cat(parts)
    autoencoder.keep(path, latents)
    return made, latents


def statistics(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation [Z] of latents [N, Z, F, H, W]: what goes into the autoencoder's config."""
    flat = pictures.float().transpose(0, 1).flatten(1)
    return flat.mean(1), flat.std(1)


def initial(seed: int, vocabulary: int) -> tuple[Params, t5.Config]:
    """Random weights, `text.` and `denoiser.` before their names; every branch ends in zeros, so the network starts as the identity."""
    generator = torch.Generator().manual_seed(seed)
    text = model.text_encoder(vocabulary)
    params: Params = {}
    for prefix, rows in (("text", t5.spec(text)), ("denoiser", wan.spec(C))):
        for row in rows:
            if row.optional:
                continue
            name, shape = row.name, row.shape
            if name.endswith("scale_shift_table"):
                value = torch.zeros(shape)
                if shape[1] == 6:
                    value[:, 2::3] = 1  # the gates
            elif "norm" in name:
                value = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
            elif len(shape) == 1 or name.endswith(("to_out.0.weight", "ffn.net.2.weight", "proj_out.weight")):
                value = torch.zeros(shape)
            else:
                scale = {"shared.weight": 1.0, "condition_embedder.time_proj.weight": 0.1 / C.width**0.5}.get(name)
                if name.endswith("SelfAttention.q.weight"):
                    scale = (shape[1] * text.d_kv) ** -0.5  # T5 does not scale its attention
                value = torch.randn(shape, generator=generator) * (scale or 1 / math.prod(shape[1:]) ** 0.5)
            params[f"{prefix}.{name}"] = value
    params["probe.weight"] = torch.zeros(16, C.width)
    params["outline.weight"] = torch.zeros(len(SHAPES) + 3, C.width)
    return params, text


def tokens(tokenizer: Tokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Texts -> ids and mask [B, T], cut and padded to the model's length."""
    ids = torch.zeros(len(texts), model.TEXT_TOKENS, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, encoding in enumerate(tokenizer.encode_batch(texts)):
        found = encoding.ids[: model.TEXT_TOKENS]
        ids[row, : len(found)], mask[row, : len(found)] = torch.tensor(found), 1
    return ids, mask


def loss(
    params: Params, text: t5.Config, ids: Tensor, mask: Tensor, made: list[Scene], latents: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(mean squared error of the predicted velocity, the probes' loss), over normalised latents [B, Z, F, H, W] of scenes."""
    w = Weights(params)
    hidden = wan.text_input(t5.encode(text, Plan(), w / "text", ids, mask), mask)
    clean = patchify(latents, C.patch_size)
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    sigma = static_shift(torch.sigmoid(SPREAD * torch.randn(len(clean), generator=generator)), SHIFT).to(clean.device)
    noisy = torch.lerp(clean, noise, sigma[:, None, None])
    frames, height, width = latents.shape[2:]
    inputs = {"text": hidden, "positions": wan.positions(C, (frames, height, width), clean.device)}
    weight = clean.new_ones(())
    if latents.shape[2] > 1 and torch.rand((), generator=generator) < GIVEN:
        frozen = (inputs["positions"][:, 0] == 0)[None, :, None]
        noisy = torch.where(frozen, clean, noisy)
        inputs["frozen"] = frozen
        weight = (~frozen).float()
    _, *states, velocity = walk(wan, C, Plan(), w / "denoiser", noisy, sigma * 1000, inputs)
    error = ((velocity - (noise - clean)).square() * weight).mean() / weight.mean()
    lost = _place_lost(params["probe.weight"], states[PLACED - 1], inputs["positions"][:, 1:])
    return error, lost + _shape_lost(params["outline.weight"], states[SHAPED - 1], *nearest(made, inputs["positions"]))


def _place_lost(probe: Tensor, hidden_BLD: Tensor, places_L2: Tensor) -> Tensor:
    """How badly a linear probe [16, D] reads each token's row and column, 8 of each, off what it holds: a cross-entropy."""
    rows, columns = _read(probe, hidden_BLD).flatten(0, 1).chunk(2, -1)
    row, column = places_L2.repeat(len(hidden_BLD), 1).unbind(-1)
    return F.cross_entropy(rows, row) + F.cross_entropy(columns, column)


def _shape_lost(probe: Tensor, hidden_BLD: Tensor, shape_BL: Tensor, outline_BL3: Tensor) -> Tensor:
    """How badly a linear probe [5 + 3, D] reads `nearest`: a cross-entropy and an absolute error, smooth at 0."""
    shape, outline = _read(probe, hidden_BLD).split((len(SHAPES), 3), -1)
    return F.cross_entropy(shape.flatten(0, 1), shape_BL.flatten()) + F.smooth_l1_loss(outline, outline_BL3, beta=0.1)


def _read(probe: Tensor, hidden_BLD: Tensor) -> Tensor:
    return F.layer_norm(hidden_BLD, hidden_BLD.shape[-1:]) @ probe.T


def nearest(made: list[Scene], positions_L3: Tensor) -> tuple[Tensor, Tensor]:
    """The shape nearest to each token: its index in SHAPES [B, L], and its centre from the token's and its radius, in 16 px, [B, L, 3]."""
    first = [(scene.start, scene.end) for scene in made]
    second = [(scene.start2 or (1e6, 1e6, 0.0),) * 2 for scene in made]
    start, end = torch.tensor([first, second], device=positions_L3.device).unbind(2)  # [2, B, 3]
    frame, row, column = positions_L3.unbind(-1)
    time = (4 * frame - 1.5).clamp(min=0) / (FRAMES - 1)  # a latent frame is four of the clip, the first is one
    at = torch.where(time[:, None] > 0, torch.lerp(start[:, :, None], end[:, :, None], time[:, None]), start[:, :, None])
    token = torch.stack([16 * column + 8, 16 * row + 8, 0 * row], -1)
    outline = (at - token) / 16  # [2, B, L, 3]
    which = outline[..., :2].norm(dim=-1).argmin(0)  # [B, L]
    kinds = torch.tensor([[SHAPES.index(name) for name in (s.shape, s.shape2 or s.shape)] for s in made], device=which.device)
    return kinds.gather(1, which), torch.where(which[..., None] == 0, *outline)


def _optimisers(params: Params) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the rest, at one rate."""
    inner = [tensor for name, tensor in params.items() if tensor.ndim == 2 and ".block" in name and "bias" not in name]
    chosen = {id(tensor) for tensor in inner}
    outer = [tensor for tensor in params.values() if id(tensor) not in chosen]
    return [
        torch.optim.Muon(inner, RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


def train(
    run: Path,
    steps: int,
    tokenizer: Path,
    counts: dict[Kind, int],
    batches: dict[Kind, int],
    clips_from: int,
    seed: int = 1,
    log: Log = print,
    device: str = "cpu",
) -> None:
    """Train for `steps` in all and write `run/denoiser.pt`; resumes from it.

    A step takes a batch of each kind in `batches`, drawn from `counts` scenes; clips, dear and learnt quickly by a network that knows
    pictures, join at step `clips_from`. Where torch.distributed runs, the ranks share each batch and rank 0 writes.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    words = Tokenizer.from_file(str(tokenizer))
    path = run / "denoiser.pt"
    data = {kind: encoded(run, kind, counts[kind], seed, log, device) for kind in batches if kind != "clip"}
    params, text = initial(seed, words.get_vocab_size())
    params = {name: tensor.to(device) for name, tensor in params.items()}
    fresh = {"step": 0, "params": params, "average": {name: tensor.clone() for name, tensor in params.items()}}
    state = torch.load(path, device) if path.exists() else fresh
    params, average = state["params"], state["average"]
    mean, std = (values.cpu() for values in state.get("statistics") or statistics(data["picture"][1]))
    leaves = [tensor.requires_grad_() for tensor in params.values()]
    optimisers = _optimisers(params)
    for optimiser, saved in zip(optimisers, state.get("optimisers", []), strict=False):
        optimiser.load_state_dict(saved)
    started = shown = time.monotonic()
    history: dict[str, list[float]] = {kind: [] for kind in (*batches, "lost")}
    for step in range(state["step"], steps):
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = RATE * autoencoder.annealed(step, steps, warmup=200)
        generator, rng = torch.Generator().manual_seed((seed + rank) * 1_000_003 + step), Random(f"{seed} {step} {rank}")
        for kind, size in batches.items():
            if kind == "clip" and step < clips_from:
                continue
            if kind not in data:
                data[kind] = encoded(run, kind, counts[kind], seed, log, device)
            made, latents = data[kind]
            picks = torch.randint(len(made), (size // ranks,), generator=generator)
            texts = ["" if rng.random() < EMPTY else caption(made[i], rng) for i in picks.tolist()]
            normal = (latents[picks].float() - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)
            ids, mask = (rows.to(device) for rows in tokens(words, texts))
            error, lost = loss(params, text, ids, mask, [made[i] for i in picks.tolist()], normal.to(device), generator)
            (error + PROBE * lost).backward()
            history[kind].append(error.item())
            history["lost"].append(lost.item())
        if ranks > 1:
            autoencoder.average_gradients(leaves, ranks)
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            inertia = min(0.999, step / (step + 10))
            for kept, leaf in zip(average.values(), leaves, strict=True):
                kept.lerp_(leaf.detach(), 1 - inertia)
        if rank == 0 and (time.monotonic() - shown > 30 or step + 1 == steps):
            shown = time.monotonic()
            recent = " ".join(f"{kind} {sum(h[-100:]) / len(h[-100:]):.4f}" for kind, h in history.items() if h)
            log(f"denoiser step {step + 1}/{steps} loss {recent} {(step + 1 - state['step']) / (shown - started):.2f} steps/s")
        if rank == 0 and ((step + 1) % 250 == 0 or step + 1 == steps):
            saved = {"step": step + 1, "average": average, "optimisers": [o.state_dict() for o in optimisers], "statistics": (mean, std)}
            autoencoder.keep(path, saved | {"params": {n: t.detach() for n, t in params.items()}})
