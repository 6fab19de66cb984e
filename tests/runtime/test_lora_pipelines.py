"""A LoRA in whole pipelines: diffusers' `load_lora_weights` and `fuse_lora` against ours, merged and dynamic.

Latents after every step, from the same start, in float64. The file has factors for every product of the
denoiser, and of CLIP where the reference reads those of text encoders.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers.pipelines.z_image import pipeline_z_image
from safetensors.torch import save_file

from tests.io.lora_files import randn
from tests.parity import draw
from tests.runtime import (
    compare,
    test_ernie_pipelines,
    test_flux2_pipelines,
    test_flux_pipelines,
    test_hunyuan_pipelines,
    test_qwen_pipelines,
    test_sd3_pipelines,
    test_z_image_pipelines,
)
from tests.runtime.compare import exact, widened
from tests.runtime.folders import VARIANTS, load
from tests.runtime.folders import build as build_wan
from tests.runtime.qwen_folders import build as build_qwen
from tinydiff.config import ModelOptions, SamplingOptions
from tinydiff.ops.patch import patchify
from tinydiff.runtime import loras, pipeline
from tinydiff.runtime.admit import admit

STRENGTH, STEPS = 0.75, 3
PROMPT, NEGATIVE = "a red circle", "blurry, left of"


@dataclass(frozen=True)
class Family:
    """build: a directory -> the reference's pipeline. size: of the latents [C, F, H, W]. pixels: height and
    width. given: to the reference. fields: to our request. pack: our latents as the reference's.
    """

    build: Callable[[Path], Any]
    size: tuple[int, int, int, int]
    pixels: tuple[int, int]
    given: dict[str, Any]
    fields: dict[str, Any]
    pack: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
    start: Callable[[torch.Tensor], torch.Tensor] | None = None
    """The same, for those that it starts with, where they differ."""
    module: ModuleType | None = None
    """One that insists on float32."""
    components: tuple[str, ...] = ("transformer",)


def still(x: torch.Tensor) -> torch.Tensor:
    return x[:, :, 0]


def tokens(x: torch.Tensor) -> torch.Tensor:
    return patchify(x, (1, 2, 2))


def flat(x: torch.Tensor) -> torch.Tensor:
    return patchify(x, (1, 1, 1))


GUIDED = {"negative_prompt": NEGATIVE, "guidance_scale": 2.5}
FAMILIES = {
    "Wan": Family(
        lambda path: build_wan(VARIANTS["T2V"], path), (4, 2, 4, 6), (32, 48),
        GUIDED | {"num_frames": 5}, GUIDED | {"num_frames": 5},
    ),
    "FLUX.1": Family(
        test_flux_pipelines.build, (4, 1, 6, 10), (12, 20), {"guidance_scale": 3.0},
        {"guidance_scale": 3.0}, tokens, components=("transformer", "text_encoder"),
    ),
    "SD3": Family(
        lambda path: test_sd3_pipelines.build("3.5 medium", path), (16, 1, 6, 10), (12, 20), GUIDED,
        GUIDED, still, components=("transformer", "text_encoder", "text_encoder_2"),
    ),
    "Qwen-Image": Family(
        lambda path: build_qwen(test_qwen_pipelines.diffusers.QwenImagePipeline, path), (6, 1, 8, 12),
        (64, 96), {"negative_prompt": NEGATIVE, "true_cfg_scale": 2.5}, GUIDED, tokens,
    ),
    "FLUX.2": Family(
        lambda path: test_flux2_pipelines.klein(path, True), (16, 1, 4, 6), (64, 96),
        {"guidance_scale": 1.0}, {}, flat, still,
    ),
    "Z-Image": Family(
        test_z_image_pipelines.build, (4, 1, 6, 10), (12, 20), GUIDED, GUIDED, still, module=pipeline_z_image,
    ),
    "ERNIE-Image": Family(
        lambda path: test_ernie_pipelines.build(path, 3.0, True), (16, 1, 4, 6), (64, 96),
        GUIDED, GUIDED, still,
    ),
    "HunyuanVideo": Family(
        test_hunyuan_pipelines.build, (4, 1, 4, 8), (16, 32),
        {"num_frames": 1, "guidance_scale": 6.0}, {"num_frames": 1, "guidance_scale": 6.0},
    ),
}  # fmt: skip


def factors(pipe, components) -> Iterator[tuple[str, torch.Tensor]]:
    """Low-rank factors of the components' linear layers, as diffusers names them; their sizes are such that
    the product is a good part of the weight.
    """
    for component in components:
        for i, (name, layer) in enumerate(getattr(pipe, component).named_modules()):
            if not isinstance(layer, torch.nn.Linear):
                continue
            if component != "transformer" and not re.search(r"(q|k|v|out)_proj$", name):
                continue
            rank = 1 + i % 3
            a, b = randn(rank, layer.in_features, seed=2 * i), randn(layer.out_features, rank, seed=2 * i + 1)
            size = layer.weight.detach().std().item() / rank**0.5
            yield f"{component}.{name}.lora_A.weight", a
            yield f"{component}.{name}.lora_B.weight", size * b


def reference(pipe, family: Family, start: torch.Tensor) -> list[torch.Tensor]:
    """The latents after each step."""
    steps: list[torch.Tensor] = []
    (height, width), pack = family.pixels, family.start or family.pack
    with exact(pipe):
        pipe(
            prompt=PROMPT, height=height, width=width, num_inference_steps=STEPS, latents=pack(start),
            output_type="latent", **family.given,
            callback_on_step_end=lambda pipe, i, t, kept: steps.append(kept["latents"]) or {},
        )  # fmt: skip
    return steps


def ours(model, family: Family, start: torch.Tensor) -> list[torch.Tensor]:
    height, width = family.pixels
    asked = {"prompt": (PROMPT,), "height": height, "width": width, "num_inference_steps": STEPS}
    [request] = admit(model.blueprint, SamplingOptions(**asked | family.fields))
    conditioning = pipeline.condition(model, request)
    [kind] = conditioning.stages[0].inputs.latents
    return [family.pack(kind.unpack(x)) for x in pipeline.denoise(model, conditioning, 0, [start])]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_step_equals_diffusers(name, tmp_path, monkeypatch):
    family, file = FAMILIES[name], tmp_path / "lora.safetensors"
    pipe = family.build(tmp_path / "model")
    if family.module is not None:
        widened(monkeypatch, family.module)
    model = load(tmp_path / "model")
    start = draw(1, *family.size, seed=9)
    base = ours(model, family, start)
    save_file(dict(factors(pipe, family.components)), file)
    pipe.load_lora_weights(file)
    pipe.fuse_lora(components=list(family.components), lora_scale=STRENGTH)
    theirs = reference(pipe, family, start)

    options = ModelOptions(lora_path=(str(file),), lora_scale=(STRENGTH,))
    adapters = [loras.read(each, model.nets) for each in loras.chosen(options)]
    for mode in ("merge", "dynamic"):
        nets, attached = loras.attach(model.nets, adapters, mode)
        made = ours(replace(model, nets=nets, adapters=attached), family, start)
        assert len(made) == len(theirs) == STEPS
        compare.same_steps(made, theirs)
    assert {*attached["default"].layers} == {*family.components}
    assert (theirs[-1] - base[-1]).abs().max() > 0.01
