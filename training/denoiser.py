"""Training of the denoiser and its text encoder, together, on the autoencoder's latents: flow matching with
velocity prediction.

Images are videos of one latent frame, so one network learns both, and every step takes all kinds of scenes:
without videos among them it forgets videos within minutes. Some videos are given their first frame, its
tokens clean and at timestep 0, as TI2V wants it. One prompt in ten is empty, for guidance.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from tinydiff.io.weights import load_weights
from tinydiff.models import wan
from tinydiff.models.encoders import t5
from tinydiff.models.evaluate import evaluate
from tinydiff.ops.network import Network
from tinydiff.ops.patch import patchify
from tinydiff.ops.weights import Weights, leaves
from tinydiff.parallel.plan import Plan
from tinydiff.sampling.sigmas import static_shift
from training import autoencoder, model
from training.captions import caption
from training.pool import Pool, coder, drawn, exported, grown, statistics
from training.scenes import FRAMES, SHAPES, Kind, Scene

C = model.TRANSFORMER
EMPTY = 0.1  # share of prompts left empty
GIVEN_FRAME = 0.15  # share of batches of videos whose first frame is given
RATE, WARMUP, ENDING = 8e-4, 50, 0.2
"""The learning rate, over how many steps it rises to that, and in what last share of the training it falls
along a cosine.
"""
INERTIA = 0.995  # of the average of the weights, which is what is exported
PROBE = 0.05
"""What the losses of the two linear probes count, which are thrown away in the end. A model that is trained
on has none.
"""
PLACED, SHAPED = 2, 4
"""After how many blocks a probe reads each token's place, and after how many the nearest shape: what it is,
how far off and how large. Rope tells tokens only where they are to each other; absolute places, which prompts
name, can be found out at the borders of the image. The shape's outline moves the error of few tokens, and
only when all of them agree where its centre is. Without these pushes the network finds both out very late."""
SHIFT, SPREAD = 4.0, 1.2
"""Noise levels are logit-normal with this spread, then shifted: few tokens with flat colours show what they
are through much noise, so what a scene holds is decided at the highest levels. A video shows it through still
more: its shift grows with the root of its latent frames."""
Params = dict[str, Tensor]
Log = Callable[[str], None]


def initial(seed: int, vocabulary: int) -> tuple[Params, t5.Config]:
    """Random weights, `text.` and `denoiser.` before their names; every branch ends in zeros, so the network
    starts as the identity.
    """
    generator = torch.Generator().manual_seed(seed)
    text = model.text_encoder(vocabulary)
    params: Params = {}
    for prefix, rows in (("text", t5.spec(text)), ("denoiser", wan.spec(C))):
        for row in rows:
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
                scale = {"shared.weight": 1.0, "condition_embedder.time_proj.weight": 0.1 / C.width**0.5}.get(
                    name
                )
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
        kept_ids = encoding.ids[: model.TEXT_TOKENS]
        ids[row, : len(kept_ids)], mask[row, : len(kept_ids)] = torch.tensor(kept_ids), 1
    return ids, mask


def loss(
    params: Params,
    text: t5.Config,
    ids: Tensor,
    mask: Tensor,
    scenes: list[Scene],
    latents: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """(mean squared error of the predicted velocity, loss of the probes or 0 without them).

    latents: normalised, [B, Z, F, H, W].
    """
    w = Weights(params)
    hidden = wan.text_input(t5.encode(text, Plan(), w / "text", ids, mask), mask)
    clean = patchify(latents, C.patch_size)
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    level = torch.sigmoid(SPREAD * torch.randn(len(clean), generator=generator))
    sigma = static_shift(level, SHIFT * latents.shape[2] ** 0.5).to(clean.device)
    noisy = torch.lerp(clean, noise, sigma[:, None, None])
    frames, height, width = latents.shape[2:]
    inputs = {"text": hidden, "positions": wan.positions(C, (frames, height, width), clean.device)}
    weight = clean.new_ones(())
    if latents.shape[2] > 1 and torch.rand((), generator=generator) < GIVEN_FRAME:
        frozen = (inputs["positions"][:, 0] == 0)[None, :, None]
        noisy = torch.where(frozen, clean, noisy)
        inputs["frozen"] = frozen
        weight = (~frozen).float()
    network, flat = Network(wan.FAMILY, C), leaves(params, "denoiser")
    evaluation = evaluate(network, flat, noisy, sigma * 1000, inputs)
    error = ((evaluation.velocity - (noise - clean)).square() * weight).mean() / weight.mean()
    if "probe.weight" not in params:
        return error, error.new_zeros(())
    states = [x for x in evaluation.blocks.values() if isinstance(x, Tensor)]
    place_loss = _place_loss(params["probe.weight"], states[PLACED - 1], inputs["positions"][:, 1:])
    return error, place_loss + _shape_loss(
        params["outline.weight"], states[SHAPED - 1], *nearest(scenes, inputs["positions"])
    )


def _place_loss(probe: Tensor, hidden_BLD: Tensor, places_L2: Tensor) -> Tensor:
    """The cross-entropy of a linear probe [16, D] that reads each token's row and column, 8 of each."""
    rows, columns = _read(probe, hidden_BLD).flatten(0, 1).chunk(2, -1)
    row, column = places_L2.repeat(len(hidden_BLD), 1).unbind(-1)
    return F.cross_entropy(rows, row) + F.cross_entropy(columns, column)


def _shape_loss(probe: Tensor, hidden_BLD: Tensor, shape_BL: Tensor, outline_BL3: Tensor) -> Tensor:
    """The loss of a linear probe [5 + 3, D] that reads what `nearest` returns.

    It is the cross-entropy of the shape plus the smooth L1 error of its outline.
    """
    shape, outline = _read(probe, hidden_BLD).split((len(SHAPES), 3), -1)
    return F.cross_entropy(shape.flatten(0, 1), shape_BL.flatten()) + F.smooth_l1_loss(
        outline, outline_BL3, beta=0.1
    )


def _read(probe: Tensor, hidden_BLD: Tensor) -> Tensor:
    return F.layer_norm(hidden_BLD, hidden_BLD.shape[-1:]) @ probe.T


def nearest(scenes: list[Scene], positions_L3: Tensor) -> tuple[Tensor, Tensor]:
    """The shape nearest to each token, as (its index in SHAPES [B, L], its outline [B, L, 3]).

    The outline is the offset of its centre from the token's centre, and its radius, in units of 16 pixels.
    """
    first = [(scene.start, scene.end) for scene in scenes]
    second = [(scene.start2 or (1e6, 1e6, 0.0),) * 2 for scene in scenes]
    start, end = torch.tensor([first, second], device=positions_L3.device).unbind(2)  # [2, B, 3]
    frame, row, column = positions_L3.unbind(-1)
    time = (4 * frame - 1.5).clamp(min=0) / (
        FRAMES - 1
    )  # a latent frame is four of the video, the first is one
    at = torch.where(
        time[:, None] > 0, torch.lerp(start[:, :, None], end[:, :, None], time[:, None]), start[:, :, None]
    )
    token = torch.stack([16 * column + 8, 16 * row + 8, 0 * row], -1)
    outline = (at - token) / 16  # [2, B, L, 3]
    which = outline[..., :2].norm(dim=-1).argmin(0)  # [B, L]
    indices = torch.tensor(
        [[SHAPES.index(name) for name in (s.shape, s.shape2 or s.shape)] for s in scenes], device=which.device
    )
    return indices.gather(1, which), torch.where(which[..., None] == 0, *outline)


def finished(folder: Path) -> Params:
    """The weights of a model directory, named as `initial` names them, without probes."""
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    parts = {
        "text": load_weights(
            folder / "text_encoder", t5.spec(model.text_encoder(config["vocab_size"])), torch.float32
        ),
        "denoiser": load_weights(folder / "transformer", wan.spec(C), torch.float32),
    }
    return {
        f"{prefix}.{name}": tensor.clone() for prefix, part in parts.items() for name, tensor in part.items()
    }


def normalisation(folder: Path) -> tuple[Tensor, Tensor]:
    """Mean and deviation [Z] of the latents, as the autoencoder's config in a model directory has them."""
    config = json.loads((folder / "vae" / "config.json").read_text())
    return torch.tensor(config["latents_mean"]), torch.tensor(config["latents_std"])


def rate_factor(step: int, done: float) -> float:
    """The factor of the learning rate at a step. done: the share of the training behind it, in [0, 1]."""
    left = min(1.0, max(0.0, 1 - done) / ENDING)
    return min(1, (step + 1) / WARMUP) * (0.02 + 0.98 * 0.5 * (1 - math.cos(math.pi * left)))


@dataclass(frozen=True)
class Share:
    """How much of one kind of scene the training takes.

    batch: scenes of a step. first, growth: scenes that are encoded before the first step, and at each step.
    weight: of their loss.
    """

    batch: int
    first: int
    growth: int
    weight: float = 1.0


MIX: dict[Kind, Share] = {
    "picture": Share(14, 500, 2),
    "pair": Share(6, 300, 1),
    "clip": Share(14, 50, 1, 2.0),
}


@dataclass(frozen=True)
class Length:
    """How long to train: `steps` or `minutes` in all, whichever is given.

    piece: minutes of that in this call, at most.
    """

    steps: int | None = None
    minutes: float | None = None
    piece: float = math.inf

    def done(self, step: int, minutes: float) -> float:
        """The share of the whole that is behind a step, or a time."""
        return step / self.steps if self.steps is not None else minutes / (self.minutes or math.inf)


@dataclass(frozen=True)
class Start:
    """What a training begins with.

    coder: weights of the autoencoder. params: those of the denoiser and text encoder. normal: mean and
    deviation of the latents, measured where None.
    """

    coder: Params
    params: Params
    normal: tuple[Tensor, Tensor] | None = None


def scratch(run: Path, words: Tokenizer, seed: int) -> Start:
    """From nothing, on the latents of the autoencoder in `run`."""
    return Start(torch.load(run / "clips.pt", "cpu")["average"], initial(seed, words.get_vocab_size())[0])


def resumed(folder: Path, weights: Path | None = None) -> Start:
    """From a model directory. weights: a directory whose transformer and text encoder take their place."""
    return Start(exported(folder), finished(weights or folder), normalisation(folder))


def train(
    run: Path,
    length: Length,
    tokenizer: Path,
    start: Callable[[Tokenizer], Start],
    mix: dict[Kind, Share] = MIX,
    seed: int = 1,
    log: Log = print,
    device: str = "cpu",
    every: float = 240,
) -> bool:
    """Train, and return whether the training of this length is complete.

    `run/denoiser.pt` is written every `every` seconds and at the end. A later call goes on from that file,
    the first one from `start`. Each step takes a batch of each kind in `mix`. Where torch.distributed runs,
    the ranks share each batch and rank 0 writes.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    words = Tokenizer.from_file(str(tokenizer))
    text = model.text_encoder(words.get_vocab_size())
    path = run / "denoiser.pt"
    begin = start(words)
    code = coder(begin.coder, device)
    state = torch.load(path, device) if path.exists() else {"step": 0, "minutes": 0.0, "params": begin.params}
    counts: dict[Kind, int] = {
        kind: share.first + share.growth * state["step"] for kind, share in mix.items()
    }
    pools = {
        kind: grown(_stored_pool(run, kind, seed), kind, count, seed, code) for kind, count in counts.items()
    }
    mean, std = (
        values.cpu()
        for values in state.get("statistics") or begin.normal or statistics(pools["picture"].latents)
    )
    params = {name: tensor.to(device) for name, tensor in state["params"].items()}
    average = state.get("average") or {name: tensor.clone() for name, tensor in params.items()}
    leaves = [tensor.requires_grad_() for tensor in params.values()]
    optimiser = torch.optim.AdamW(leaves, RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    if "optimiser" in state:
        optimiser.load_state_dict(state["optimiser"])
    history: dict[str, list[float]] = {kind: [] for kind in (*mix, "probes")}
    step, began, first = state["step"], time.monotonic(), state["step"]
    logged = written = began

    def spent() -> float:
        return (time.monotonic() - began) / 60

    def save() -> None:
        for kind, pool in pools.items():
            autoencoder.keep(run / f"pool-{kind}.pt", pool.latents)
        saved = {
            "step": step,
            "minutes": state["minutes"] + spent(),
            "average": average,
            "statistics": (mean, std),
        }
        resumable = {
            "params": {n: t.detach() for n, t in params.items()},
            "optimiser": optimiser.state_dict(),
        }
        autoencoder.keep(path, saved | resumable)

    while (done := length.done(step, state["minutes"] + spent())) < 1 and spent() < length.piece:
        for group in optimiser.param_groups:
            group["lr"] = RATE * rate_factor(step, done)
        generator, rng = (
            torch.Generator().manual_seed((seed + rank) * 1_000_003 + step),
            Random(f"{seed} {step} {rank}"),
        )
        for kind, share in mix.items():
            pools[kind] = pool = grown(pools[kind], kind, share.first + share.growth * step, seed, code)
            picks = torch.randint(len(pool.scenes), (share.batch // ranks,), generator=generator)
            scenes = [pool.scenes[i] for i in picks.tolist()]
            normal = (pool.latents[picks].float() - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)
            ids, mask = (
                values.to(device)
                for values in tokens(words, ["" if rng.random() < EMPTY else caption(s, rng) for s in scenes])
            )
            error, probe_loss = loss(params, text, ids, mask, scenes, normal.to(device), generator)
            (share.weight * error + PROBE * probe_loss).backward()
            history[kind].append(error.item())
            history["probes"].append(probe_loss.item())
        if ranks > 1:
            autoencoder.average_gradients(leaves, ranks)
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            inertia = min(INERTIA, step / (step + 10))
            for averaged, leaf in zip(average.values(), leaves, strict=True):
                averaged.lerp_(leaf.detach(), 1 - inertia)
        step += 1
        if rank == 0 and time.monotonic() - logged > 30:
            logged = time.monotonic()
            log(_progress(step, history, spent(), done, step - first))
        if rank == 0 and time.monotonic() - written > every:
            written = time.monotonic()
            save()
    if rank == 0 and step > first:
        log(_progress(step, history, spent(), length.done(step, state["minutes"] + spent()), step - first))
        save()
    return done >= 1


def _stored_pool(run: Path, kind: Kind, seed: int) -> Pool:
    """The pool that an earlier call left in `run`, or an empty one."""
    path = run / f"pool-{kind}.pt"
    latents = torch.load(path) if path.exists() else None
    return Pool() if latents is None else Pool(drawn(kind, len(latents), seed), latents)


def _progress(step: int, history: dict[str, list[float]], minutes: float, done: float, steps: int) -> str:
    recent = " ".join(f"{kind} {sum(h[-100:]) / len(h[-100:]):.4f}" for kind, h in history.items() if h)
    return f"denoiser step {step} ({done:.0%}) loss {recent} {steps / max(minutes, 1e-9):.1f} steps/min"
