"""Quantised weights of safetensors files decode to the values of the libraries that made them."""

import json

import bitsandbytes.functional as bnb
import pytest
import torch
from comfy_kitchen.backends.eager import quantization as kitchen
from safetensors.torch import save_file

from tinydiff.io import archive
from tinydiff.io.weights import load_weights
from tinydiff.parallel.plan import Row
from tinydiff.records import UserError


@pytest.fixture
def weight():
    return torch.randn(160, 256, generator=torch.Generator().manual_seed(0)) / 16


def text(said):
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def fp8(weight, dtype=torch.float8_e4m3fn, dim=None):
    """(codes, scale) with one scale, or one a row."""
    largest = weight.abs().amax() if dim is None else weight.abs().amax(dim, keepdim=True)
    scale = largest / torch.finfo(dtype).max
    return (weight / scale).to(dtype), scale


def plain_fp8(weight):
    codes = weight.to(torch.float8_e4m3fn)
    return {"weight": codes}, codes.float()


def comfy_old(weight):
    codes, scale = fp8(weight)
    beside = {"scale_weight": scale, "scale_input": torch.ones(())}
    return {"weight": codes, **beside}, codes.float() * scale


def comfy_fp8(weight):
    codes, scale = fp8(weight, torch.float8_e5m2)
    said = text({"format": "float8_e5m2"})
    return {"weight": codes, "weight_scale": scale, "comfy_quant": said}, codes.float() * scale


def rows_fp8(weight):
    codes, scale = fp8(weight, dim=1)
    return {"weight": codes, "weight_scale": scale[:, 0]}, codes.float() * scale


def blocks_fp8(weight):
    blocks = weight.view(160, 4, 64)
    scale = blocks.abs().amax(2, keepdim=True) / 448
    codes = (blocks / scale).to(torch.float8_e4m3fn)
    whole = (codes.float() * scale).view(160, 256)
    return {"weight": codes.view(160, 256), "scale_weight": scale}, whole


def rows_int8(weight):
    codes, scale = kitchen.quantize_int8_rowwise(weight)
    return {"weight": codes, "weight_scale": scale}, kitchen.dequantize_int8_simple(codes, scale)


def rotated_int8(weight):
    codes, scale = kitchen.quantize_int8_convrot_weight(weight, 64)
    said = text({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64})
    whole = kitchen.dequantize_int8_convrot_weight(codes, scale, 64)
    return {"weight": codes, "weight_scale": scale, "comfy_quant": said}, whole


def mxfp8(weight):
    codes, scale = kitchen.quantize_mxfp8(weight)
    stored = {
        "weight": codes,
        "weight_scale": scale.view(torch.uint8),
        "comfy_quant": text({"format": "mxfp8"}),
    }
    return stored, kitchen.dequantize_mxfp8(codes, scale, torch.float32)


def comfy_nvfp4(weight):
    second = weight.abs().amax() / (448 * 6)
    codes, scale = kitchen.quantize_nvfp4(weight, second)
    said = text({"format": "nvfp4"})
    stored = {"weight": codes, "weight_scale": scale, "weight_scale_2": second, "comfy_quant": said}
    return stored, kitchen.dequantize_nvfp4(codes, second, scale, torch.float32)


def lightx2v_nvfp4(weight):
    """As ComfyUI's, the halves of a byte swapped and the second scale inverted."""
    stored, whole = comfy_nvfp4(weight)
    codes = stored["weight"]
    swapped = (codes >> 4) | (codes & 15) << 4
    scale = stored["weight_scale"]
    return {
        "weight": swapped,
        "weight_scale": scale,
        "weight_global_scale": 1 / stored["weight_scale_2"],
    }, whole


def modelopt_nvfp4(weight):
    """As ComfyUI's, the halves of a byte swapped and the scales untiled; AWQ multiplies the input."""
    stored, whole = comfy_nvfp4(weight)
    codes = stored["weight"]
    swapped = (codes >> 4) | (codes & 15) << 4
    scale = kitchen.from_blocked(stored["weight_scale"], num_rows=160, num_cols=16).contiguous()
    smooth = torch.rand(256) + 0.5
    beside = {"weight_scale": scale, "weight_scale_2": stored["weight_scale_2"], "pre_quant_scale": smooth}
    return {"weight": swapped, **beside}, whole * smooth


def bnb_4bit(kind, nested):
    def make(weight):
        codes, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
        beside = {f"weight.{name}": x for name, x in state.as_dict(packed=True).items()}
        return {"weight": codes, **beside}, bnb.dequantize_4bit(codes, state)

    return make


def bnb_int8(weight):
    largest = weight.abs().amax(1)
    codes = (weight * 127 / largest[:, None]).round().to(torch.int8)
    beside = {"SCB": largest, "weight_format": torch.zeros((), dtype=torch.uint8)}
    return {"weight": codes, **beside}, codes.float() * largest[:, None] / 127


FORMATS = {
    "float8": plain_fp8,
    "float8 of ComfyUI, old": comfy_old,
    "float8 of ComfyUI": comfy_fp8,
    "float8 by row": rows_fp8,
    "float8 by block": blocks_fp8,
    "int8 by row": rows_int8,
    "int8, rotated": rotated_int8,
    "mxfp8": mxfp8,
    "nvfp4 of ComfyUI": comfy_nvfp4,
    "nvfp4 of LightX2V": lightx2v_nvfp4,
    "nvfp4 of ModelOpt": modelopt_nvfp4,
    "nf4": bnb_4bit("nf4", False),
    "nf4, nested": bnb_4bit("nf4", True),
    "fp4": bnb_4bit("fp4", True),
    "int8 of bitsandbytes": bnb_int8,
}


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_those_of_the_library(weight, name, tmp_path):
    stored, whole = FORMATS[name](weight)
    path = tmp_path / "a.safetensors"
    bias = torch.randn(160)
    layer = {f"blocks.0.to_q.{key}": x.contiguous() for key, x in stored.items()}
    save_file({**layer, "blocks.0.to_q.bias": bias}, path)
    opened = archive.opened(path)
    assert sorted(opened.keys()) == ["blocks.0.to_q.bias", "blocks.0.to_q.weight"]
    piece = opened.get_slice("blocks.0.to_q.weight")
    assert tuple(piece.get_shape()) == (160, 256) and piece.get_dtype() == "F32"
    ours = opened.get_tensor("blocks.0.to_q.weight")
    assert (ours - whole).abs().max() <= 2**-23 * whole.abs().max(), "one rounding of float32"
    assert (ours - weight).abs().max() < 0.3 or name.endswith("ModelOpt")
    assert torch.equal(piece[3:131, 16:48], ours[3:131, 16:48])
    rows = [Row("blocks.0.to_q.weight", (160, 256)), Row("blocks.0.to_q.bias", (160,))]
    loaded = load_weights(path, rows, torch.bfloat16)
    assert torch.equal(loaded["blocks.0.to_q.weight"], ours.bfloat16())
    assert torch.equal(loaded["blocks.0.to_q.bias"], bias.bfloat16())


def test_formats_come_from_the_header_too(weight, tmp_path):
    stored, whole = comfy_nvfp4(weight)
    del stored["comfy_quant"]
    path = tmp_path / "a.safetensors"
    said = {"format_version": "1.0", "layers": {"blocks.0.to_q": {"format": "nvfp4"}}}
    layer = {f"model.diffusion_model.blocks.0.to_q.{key}": x for key, x in stored.items()}
    marks = {"model.diffusion_model.scaled_fp8": torch.zeros(2)}
    save_file({**layer, **marks}, path, {"_quantization_metadata": json.dumps(said)})
    opened = archive.opened(path)
    [key] = opened.keys()
    assert (opened.get_tensor(key) - whole).abs().max() < 1e-7


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (
            {"weight": torch.zeros(4, 4, dtype=torch.uint8), "weight_scale": torch.ones(4)},
            "is U8 with weight_scale",
        ),
        ({"weight": torch.zeros(4, 4).to(torch.float8_e4m3fn), "SCB": torch.ones(4)}, "is F8_E4M3 with SCB"),
        ({"weight": torch.zeros(4, 4), "weight_scale": torch.ones(4)}, "is F32 with weight_scale"),
        (
            {"weight": torch.zeros(4, 4, dtype=torch.int8), "comfy_quant": text({"format": "convrot_w4a4"})},
            "is I8 with convrot_w4a4",
        ),
    ],
)
def test_an_unknown_format_is_refused(stored, words, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({f"a.{name}": x for name, x in stored.items()}, path)
    with pytest.raises(UserError, match=r"quantised in a way that is not known: 'a\.weight'") as caught:
        archive.opened(path)
    assert words in str(caught.value)
