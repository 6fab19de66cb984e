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

import numpy as np
import pytest
import torch
from diffusers.pipelines.z_image import pipeline_z_image
from PIL import Image
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
from tests.runtime import test_ltx2_pipelines as ltx2
from tests.runtime.compare import exact, widened
from tests.runtime.folders import VARIANTS, load
from tests.runtime.folders import build as build_wan
from tests.runtime.qwen_folders import build as build_qwen
from tinydiff.config import ModelOptions, SamplingOptions
from tinydiff.models import registry
from tinydiff.ops.patch import patchify
from tinydiff.runtime import loras, pipeline
from tinydiff.runtime.admit import admit

STRENGTH, STEPS = 0.75, 3
PROMPT, NEGATIVE = "a red circle", "blurry, left of"
EXPERTS = ("transformer", "transformer_2")


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
    image: bool = False
    """Whether a first frame is given."""


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
    "Wan from an image": Family(
        lambda path: build_wan(VARIANTS["I2V with CLIP"], path), (4, 2, 4, 6), (32, 48),
        GUIDED | {"num_frames": 5}, GUIDED | {"num_frames": 5}, image=True,
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


def factors(pipe, components, first: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Low-rank factors of the components' linear layers, as diffusers names them; their sizes are such that
    the product is a good part of the weight. first: the first seed.
    """
    for component in components:
        for i, (name, layer) in enumerate(getattr(pipe, component).named_modules()):
            if not isinstance(layer, torch.nn.Linear):
                continue
            if "text" in component and not re.search(r"(q|k|v|out)_proj$", name):
                continue
            rank = 1 + i % 3
            seed = first + 2 * i
            a, b = randn(rank, layer.in_features, seed=seed), randn(layer.out_features, rank, seed=seed + 1)
            size = layer.weight.detach().std().item() / rank**0.5
            yield f"{component}.{name}.lora_A.weight", a
            yield f"{component}.{name}.lora_B.weight", size * b


def reference(pipe, family: Family, start: torch.Tensor, image: str) -> list[torch.Tensor]:
    """The latents after each step."""
    steps: list[torch.Tensor] = []
    (height, width), pack = family.pixels, family.start or family.pack
    given = family.given | ({"image": Image.open(image)} if family.image else {})
    with exact(pipe):
        pipe(
            prompt=PROMPT, height=height, width=width, num_inference_steps=STEPS, latents=pack(start),
            output_type="latent", **given,
            callback_on_step_end=lambda pipe, i, t, kept: steps.append(kept["latents"]) or {},
        )  # fmt: skip
    return steps


def ours(model, family: Family, start: torch.Tensor, image: str) -> list[torch.Tensor]:
    height, width = family.pixels
    asked = {"prompt": (PROMPT,), "height": height, "width": width, "num_inference_steps": STEPS}
    asked |= {"image_path": (image,)} if family.image else {}
    [request] = admit(model.blueprint, SamplingOptions(**asked | family.fields))
    conditioning = pipeline.condition(model, request)
    [kind] = conditioning.stages[0].inputs.latents
    return [family.pack(kind.unpack(x)) for x in pipeline.denoise(model, conditioning, 0, [start])]


@pytest.fixture
def image(tmp_path):
    """The path of an image of noise, of a size that is none of the model's."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "first.png")
    return str(tmp_path / "first.png")


def attached(model, options, mode):
    """The model with the adapters of these options."""
    adapters = [loras.read(each, model.nets) for each in loras.chosen(options)]
    nets, beside = loras.attach(model.nets, adapters, mode)
    return replace(model, nets=nets, adapters=beside)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_step_equals_diffusers(name, tmp_path, monkeypatch, image):
    family, file = FAMILIES[name], tmp_path / "lora.safetensors"
    pipe = family.build(tmp_path / "model")
    if family.module is not None:
        widened(monkeypatch, family.module)
    model = load(tmp_path / "model")
    start = draw(1, *family.size, seed=9)
    base = ours(model, family, start, image)
    save_file(dict(factors(pipe, family.components)), file)
    pipe.load_lora_weights(file)
    pipe.fuse_lora(components=list(family.components), lora_scale=STRENGTH)
    theirs = reference(pipe, family, start, image)

    options = ModelOptions(lora_path=(str(file),), lora_scale=(STRENGTH,))
    for mode in ("merge", "dynamic"):
        changed = attached(model, options, mode)
        made = ours(changed, family, start, image)
        assert len(made) == len(theirs) == STEPS
        compare.same_steps(made, theirs)
        assert {*changed.adapters["default"].layers} == {*family.components}
    assert (theirs[-1] - base[-1]).abs().max() > 0.01


@pytest.mark.parametrize("variant", ["T2V with two experts", "I2V with two experts"])
def test_a_pair_of_files_for_two_experts_equals_diffusers(variant, tmp_path, image):
    """One file for the steps of much noise and one for those of little, as they are released."""
    from_image = variant.startswith("I2V")
    fields = GUIDED | {"num_frames": 5}
    family = Family(lambda path: build_wan(VARIANTS[variant], path), (4, 2, 4, 6), (32, 48), fields, fields,
                    image=from_image)  # fmt: skip
    files, experts = [str(tmp_path / f"{name}.safetensors") for name in ("high", "low")], EXPERTS
    pipe = family.build(tmp_path / "model")
    model = load(tmp_path / "model")
    start = draw(1, *family.size, seed=9)
    for expert, (file, component) in enumerate(zip(files, experts, strict=True)):
        pairs = factors(pipe, (component,), 1000 * expert)
        save_file({key.replace("transformer_2.", "transformer."): x for key, x in pairs}, file)
        pipe.load_lora_weights(file, load_into_transformer_2=bool(expert))
    pipe.fuse_lora(components=list(experts), lora_scale=STRENGTH)
    theirs = reference(pipe, family, start, image)

    options = ModelOptions(lora_path=tuple(files), lora_target=experts, lora_scale=(STRENGTH,))
    swapped = replace(options, lora_target=experts[::-1])
    for mode in ("merge", "dynamic"):
        changed = attached(model, options, mode)
        compare.same_steps(ours(changed, family, start, image), theirs)
        assert [[*each.layers] for each in changed.adapters.values()] == [[name] for name in experts]
    for other in (model, attached(model, swapped, "dynamic")):
        made = ours(other, family, start, image)
        assert all((a - b).abs().max() > 0.01 for a, b in zip(made, theirs, strict=True))


@pytest.mark.parametrize("name", ["LTX-2", "LTX-2.3", "LTX-2.5"])
def test_video_with_sound_equals_diffusers(name, tmp_path, monkeypatch):
    """The file changes the transformer and what reads the prompt, by the names of diffusers."""
    monkeypatch.setattr(registry, "MODELS", (*registry.MODELS, ltx2.ROW))
    pipe = ltx2.build(tmp_path / "model", name)
    model, components = load(tmp_path / "model"), ("transformer", "connectors")
    terms = ltx2.OFF | {"guidance_scale": 4.0, "audio_guidance_scale": 7.0}
    request = ltx2.request_for(model, num_inference_steps=2, **terms)
    _, base, _ = ltx2.ours(model, request)
    file = tmp_path / "lora.safetensors"
    save_file(dict(factors(pipe, components)), file)
    pipe.load_lora_weights(file)
    pipe.fuse_lora(components=list(components), lora_scale=STRENGTH)
    options = ModelOptions(lora_path=(str(file),), lora_scale=(STRENGTH,))
    made = {mode: ltx2.ours(attached(model, options, mode), request) for mode in ("merge", "dynamic")}
    start, _, _ = made["merge"]
    seen, _ = ltx2.reference(pipe, monkeypatch, name, start, terms, num_inference_steps=2)
    for _, tokens, _ in made.values():
        ltx2.same_tokens(tokens, seen, 2)
        for part in (slice(None, len(tokens[0][0]) // 2), slice(-4, None)):
            assert (tokens[-1][:, part] - base[-1][:, part]).abs().max() > 0.01
