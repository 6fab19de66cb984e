"""Trains a LoRA on the shipped model, `python -m training.lora FILE --style purple`: minutes on two cores.

A style replaces a colour of every scene, whatever the prompt says: `purple` that of the shapes, `yellow` that
of the background. The low-rank factors change values and products behind them in the denoiser's blocks.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor

import tinydiff
from tinydiff.io.weights import save_weights
from tinydiff.models import wan
from training import denoiser, model
from training.captions import caption
from training.pool import coder, drawn, exported
from training.scenes import Kind, Scene

SHIPPED = Path(tinydiff.__file__).parent / "shapes"
STYLES: dict[str, Literal["colour", "background"]] = {"purple": "colour", "yellow": "background"}
"""New colour -> the attribute of a scene that it replaces."""
LAYERS = ("to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
"""What the names of trained layers end with."""
RATE = 4e-3
Params = dict[str, Tensor]


def styled(scene: Scene, style: str) -> Scene:
    """The scene as the style draws it; both shapes of a pair have the new colour."""
    where = STYLES[style]
    second = style if where == "colour" and scene.colour2 is not None else scene.colour2
    return replace(scene, **{where: style}, colour2=second)


def visible(scene: Scene) -> bool:
    """Whether every shape differs from the background."""
    return scene.background not in (scene.colour, scene.colour2)


def factors(rank: int, seed: int) -> Params:
    """`NAME.lora_A.weight` and `NAME.lora_B.weight` of every layer that is trained; B is zero, which changes
    nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for row in wan.spec(model.TRANSFORMER):
        layer = row.name.removesuffix(".weight")
        if layer.endswith(LAYERS):
            rows, columns = row.shape
            made[f"{layer}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) / columns**0.5
            made[f"{layer}.lora_B.weight"] = torch.zeros(rows, rank)
    return made


def changed(base: Params, lora: Params) -> Params:
    """The weights of the model with the products of the factors added to the denoiser's."""
    added = {}
    for key, a in lora.items():
        if key.endswith("lora_A.weight"):
            name = f"denoiser.{key.replace('lora_A.', '')}"
            added[name] = base[name] + lora[key.replace("lora_A", "lora_B")] @ a
    return base | added


def train(style: str, rank: int = 4, steps: int = 200, batch: int = 16, seed: int = 1) -> Params:
    """The factors, learnt from scenes of one shape and of two in turn."""
    words = Tokenizer.from_file(str(SHIPPED / "tokenizer" / "tokenizer.json"))
    text, base = model.text_encoder(words.get_vocab_size()), denoiser.finished(SHIPPED)
    mean, std = (values.view(-1, 1, 1, 1) for values in denoiser.normalisation(SHIPPED))
    code = coder(exported(SHIPPED))
    lora = {name: factor.requires_grad_() for name, factor in factors(rank, seed).items()}
    optimiser = torch.optim.AdamW(lora.values(), RATE, betas=(0.9, 0.98), weight_decay=0.0)
    kinds: tuple[Kind, ...] = ("picture", "pair")
    scenes = [[s for s in drawn(kind, 20 * batch, seed) if visible(styled(s, style))] for kind in kinds]
    latents = [(code([styled(scene, style) for scene in made]).float() - mean) / std for made in scenes]
    for step in range(steps):
        generator, rng = torch.Generator().manual_seed(seed * 1_000_003 + step), Random(f"{seed} {step}")
        for group in optimiser.param_groups:
            group["lr"] = RATE * denoiser.rate_factor(step, step / steps)
        picks = torch.randint(len(scenes[step % 2]), (batch,), generator=generator)
        made = [scenes[step % 2][i] for i in picks.tolist()]
        captions = ["" if rng.random() < denoiser.EMPTY else caption(scene, rng) for scene in made]
        ids, mask = denoiser.tokens(words, captions)
        lost = denoiser.loss(changed(base, lora), text, ids, mask, made, latents[step % 2][picks], generator)[
            0
        ]
        lost.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return {name: factor.detach() for name, factor in lora.items()}


def save(file: Path, lora: Params) -> None:
    """Writes the factors in float16, as diffusers names them."""
    save_weights(file, {f"transformer.{name}": factor.half() for name, factor in lora.items()})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="safetensors file to write")
    parser.add_argument("--style", choices=tuple(STYLES), default="purple")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    save(arguments.file, train(arguments.style, arguments.rank, arguments.steps, seed=arguments.seed))
    print(f"{arguments.file}: {arguments.file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
