"""docs/files.md: every cell of its table is a file that is written, recognised and loaded, or one that nobody
has."""

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from tests.models.test_layouts import CONVERTED, KL, PROJECTS, UMT5, VISION, draw, narrow, same, written
from tests.sources import ROOT
from tinydiff.io import archive
from tinydiff.io.weights import exported, load_weights
from tinydiff.keymap import KeyMap
from tinydiff.models.autoencoders import flux2_tiny, tiny
from tinydiff.models.autoencoders import wan as wan_vae
from tinydiff.models.classes import RECORDS
from tinydiff.models.encoders import siglip_vision
from tinydiff.models.encoders.decoder_config import Config as DecoderConfig
from tinydiff.models.layouts.recognise import LAYOUTS, recognise

LM = DecoderConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
num_attention_heads=2,
                   num_key_value_heads=1, layers=2, layer_types=("full_attention",) * 2)  # fmt: skip
SIGLIP = siglip_vision.Config(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=16, image_size=28,
    patch_size=14,
)  # fmt: skip
MODEL = "model.diffusion_model."


def config(name):
    return CONVERTED[name][2]


FILES = {
    "FLUX.1 dev, schnell, Kontext, Fill, Depth, Canny": (
        "FluxTransformer2DModel",
        config("FLUX.1-dev"),
        MODEL,
    ),
    "FLUX.2 dev, klein": ("Flux2Transformer2DModel", config("FLUX.2 klein"), MODEL),
    "Ovis-Image": ("OvisImageTransformer2DModel", config("Ovis"), MODEL),
    "SD3 medium, SD3.5 medium and large": ("SD3Transformer2DModel", config("SD3.5 medium"), MODEL),
    "Z-Image": ("ZImageTransformer2DModel", config("Z-Image"), MODEL),
    "Qwen-Image, Edit, Layered": ("QwenImageTransformer2DModel", config("Qwen-Image"), MODEL),
    "ERNIE-Image": ("ErnieImageTransformer2DModel", config("ERNIE-Image"), MODEL),
    "Wan 2.1 and 2.2, T2V, I2V, TI2V": ("WanTransformer3DModel", config("Wan I2V"), MODEL),
    "HunyuanVideo, FastHunyuan, HunyuanVideo-I2V": (
        "HunyuanVideoTransformer3DModel",
        config("HunyuanVideo"),
        MODEL,
    ),
    "LTX-2, LTX-2.3, LTX-2.5, the transformer": ("LTX2VideoTransformer3DModel", config("LTX-2"), MODEL),
    "HunyuanVideo-1.5": ("HunyuanVideo15Transformer3DModel", config("HunyuanVideo-1.5"), MODEL),
    "autoencoder of FLUX.1, SD3, Z-Image, Ovis": ("AutoencoderKL", KL, ""),
    "autoencoder of FLUX.2, ERNIE-Image": ("AutoencoderKLFlux2", config("KL FLUX.2"), ""),
    "autoencoder of Wan 2.1, Qwen-Image": ("AutoencoderKLWan", wan_vae.Config(base_dim=8), ""),
    "autoencoder of Wan 2.2 TI2V": ("AutoencoderKLWan", config("Wan 2.2 VAE"), ""),
    "autoencoder of HunyuanVideo, FastHunyuan, HunyuanVideo-I2V": (
        "AutoencoderKLHunyuanVideo",
        config("HunyuanVideo VAE"),
        "",
    ),
    "autoencoder of HunyuanVideo-1.5": (
        "AutoencoderKLHunyuanVideo15",
        config("HunyuanVideo-1.5 VAE"),
        "vae.",
    ),
    "tiny autoencoder (taef1, taesd3)": ("AutoencoderTiny", tiny.Config(latent_channels=16), ""),
    "tiny autoencoder of FLUX.2": ("Flux2TinyAutoEncoder", flux2_tiny.Config(), ""),
    "CLIP-L, CLIP-G (original: open_clip)": (
        "CLIPTextModelWithProjection",
        PROJECTS,
        "text_encoders.clip_l.transformer.",
    ),
    "T5": ("T5EncoderModel", replace(UMT5, model_type="t5"), "text_encoders.t5xxl.transformer."),
    "UMT5": ("UMT5EncoderModel", UMT5, ""),
    "CLIP's image encoder": ("CLIPVisionModel", VISION, ""),
    "SigLIP's image encoder": ("SiglipVisionModel", SIGLIP, ""),
    "Qwen2.5-VL, Qwen3, Mistral Small, Ministral": ("Qwen2_5_VLForConditionalGeneration", LM, "model."),
}
"""Row of the table -> (class, a small config, what stands before the keys of ComfyUI's files)."""

TRANSFORMERS = {"CLIP's image encoder"}
"""Rows whose ComfyUI files have transformers' names though there is an original layout."""

COLUMNS = ("original", "comfyui", "diffusers")
NAMES = {
    "original": ("original", "open_clip"),
    "comfyui": ("comfyui",),
    "diffusers": ("diffusers", "transformers", "its own"),
}
"""Column -> names of layouts."""


def page():
    """(row, column) -> what the page says."""
    text = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    rows = [
        line.strip("| ").split(" | ") for line in text.splitlines() if re.search(r"\| (yes|same|-) \|", line)
    ]
    return {
        (name, column): cell for name, *cells in rows for column, cell in zip(COLUMNS, cells, strict=True)
    }


PAGE = page()


def layout_of(name, column):
    """The layout of a cell's files, None where there is none of its own."""
    class_name, c, _ = FILES[name]
    record = RECORDS[class_name]
    rows = list(record.spec(c))
    fits = (
        each for each in LAYOUTS
        if RECORDS[each.class_name] is record and each.name in NAMES[column] and written(each, c, rows)
    )  # fmt: skip
    return next(fits, None)


def test_the_page_has_every_file():
    assert {name for name, _ in PAGE} == set(FILES) and len(PAGE) == 3 * len(FILES)
    assert {RECORDS[class_name] for class_name, _, _ in FILES.values()} == {
        RECORDS[each.class_name] for each in LAYOUTS
    }


def spelt(name, column, stored):
    """The keys as ComfyUI's files have them, where it has a spelling of its own in the original layout."""
    if (name, column) == ("Ovis-Image", "comfyui"):
        return {key.replace(".semantic_txt_", ".txt_"): tensor for key, tensor in stored.items()}
    if (name, column) == ("CLIP's image encoder", "comfyui"):
        return {**stored, "visual_projection.weight": torch.zeros(4, VISION.hidden_size)}
    return stored


@pytest.mark.parametrize(("name", "column"), PAGE, ids=lambda value: value)
def test_every_cell_of_the_page(tmp_path, name, column):
    """`yes` and `same`: a file is written so, recognised and loaded, and gives the very weights. A dash: no
    such layout is known.
    """
    cell, (class_name, c, prefix) = PAGE[name, column], FILES[name]
    layout = layout_of(name, column)
    if column == "comfyui" and cell != "-":
        others = ("diffusers",) if name in TRANSFORMERS else ("original", "diffusers")
        layout = layout or next(filter(None, (layout_of(name, other) for other in others)))
    if cell == "-":
        return pytest.fail(f"{layout.name} is read") if layout is not None else None
    assert layout is not None
    record = RECORDS[class_name]
    rows = (
        narrow(record.spec(c))
        if record.role == "dit" and class_name != "WanTransformer3DModel"
        else list(record.spec(c))
    )
    weights = draw(rows)
    keys = KeyMap(layout.lines(c), prefix if column == "comfyui" else "")
    path = tmp_path / "one.safetensors"
    save_file(spelt(name, column, exported(weights, rows, keys)), path)
    whole = {row.name: row.shape for row in record.spec(c)}
    if whole == {row.name: row.shape for row in rows}:
        (found,) = recognise(*archive.header(path))
        assert RECORDS[found.class_name] is record
        if record is not RECORDS["Qwen2_5_VLForConditionalGeneration"]:
            assert found.prefix == keys.prefix
        keys = found.keys(c)
    same(load_weights(path, rows, torch.float32, keys=keys), weights)
