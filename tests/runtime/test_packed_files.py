"""Files of 4 to 8 bits in blocks: they keep their bytes in memory, and give the bits of the decoded file."""

from dataclasses import replace

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file

import tinydiff
from tests.blocks import blocks, gguf_file
from tests.parallel.pool import on_ranks
from tests.runtime.folders import VARIANTS, build
from tinydiff import config
from tinydiff.config import NoProgress
from tinydiff.io.weights import exported
from tinydiff.keymap import KeyMap
from tinydiff.models.layouts.recognise import LAYOUTS
from tinydiff.models.workload import cost_model
from tinydiff.ops import packed
from tinydiff.parallel.layout import Layout
from tinydiff.parallel.plan import decoded_row
from tinydiff.parallel.ranks import make_ranks
from tinydiff.records import UserError
from tinydiff.runtime import blueprint, contents, fit, pipeline
from tinydiff.runtime.admit import admit
from tinydiff.runtime.launch import check_divides

SMALL = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "seed": 3}
WIDE = {"num_attention_heads": 4, "attention_head_dim": 128, "ffn_dim": 512, "text_dim": 16, "num_layers": 2}
"""Heads of the released width, and rows of two of the largest blocks."""
KINDS = {"attn2": "Q6_K", "ffn": "Q5_K"}
"""What a file of Q4_K_M has beside Q4_K."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("wan") / "model"
    build(replace(VARIANTS["T2V"], transformer=WIDE), path)
    return path


@pytest.fixture(scope="module")
def files(folder, tmp_path_factory):
    """Its denoiser: a mixed file of GGUF, NF4 and NVFP4, and each decoded."""
    place = tmp_path_factory.mktemp("files")
    plain = load_file(next((folder / "transformer").glob("*.safetensors")))
    matrices = [key for key, x in plain.items() if _is_matrix(key, x)]
    net = blueprint.read(config.options({"model_path": str(folder)}).model).nets["transformer"]
    layout = next(each for each in LAYOUTS if each.class_name == "WanTransformer3DModel")
    keys, rows = KeyMap(layout.lines(net.config)), list(net.family.spec(net.config))
    whole, kept, made = dict(plain), {}, {}
    for seed, key in enumerate(matrices):
        kind = next((kind for part, kind in KINDS.items() if part in key), "Q4_K")
        kept[key] = (kind, blocks(kind, *plain[key].shape, seed)[0])
        whole[key] = packed.decode(*kept[key])
    names = {name: keys.of_row(name).keys[0] for name in plain}
    made["gguf"], made["gguf decoded"] = place / "wan.gguf", place / "whole.safetensors"
    gguf_file(made["gguf"], {names[key]: kept.get(key, x) for key, x in plain.items()})
    save_file({key: x.contiguous() for key, x in exported(whole, rows, keys).items()}, made["gguf decoded"])
    stored, whole = dict(plain), dict(plain)
    for key in matrices:
        codes, state = bnb.quantize_4bit(plain[key], quant_type="nf4", compress_statistics=True)
        beside = {f"{key}.{name}": x for name, x in state.as_dict(packed=True).items()}
        stored |= {key: codes, **beside}
    made["nf4"] = place / "nf4.safetensors"
    save_file(stored, made["nf4"])
    stored = dict(plain)
    for seed, key in enumerate(matrices):
        rows_, scale = blocks("NVFP4", *plain[key].shape, seed)
        each = rows_.view(len(rows_), -1, 9)
        second = scale.mean()
        stored |= {key: each[..., 1:].flatten(1).contiguous()}
        stored |= {key.replace("weight", "weight_scale"): each[..., 0].view(torch.float8_e4m3fn).contiguous()}
        stored |= {key.replace("weight", "weight_scale_2"): second}
    made["nvfp4"] = place / "nvfp4.safetensors"
    save_file(stored, made["nvfp4"])
    return made


def _is_matrix(key, x):
    return key.startswith("blocks.") and key.endswith(".weight") and x.ndim == 2


WORDS = {"gguf": "Q4_K and Q6_K and Q5_K", "nf4": "NF4", "nvfp4": "NVFP4"}
BITS = {"gguf": None, "nf4": 4.5, "nvfp4": 4.5}


def read(folder, file=None, **options):
    paths = {} if file is None else {"transformer_weights_path": str(file)}
    return blueprint.read(config.options({"model_path": str(folder), **paths, **options}).model)


def loaded(*given, **options):
    return blueprint.load(read(*given, **options))


def latents(model, **fields):
    return tinydiff.generate(model, "a fox", **SMALL | fields).latents[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", WORDS)
def test_a_file_keeps_its_blocks_and_gives_the_bits_of_the_decoded_one(folder, files, name, precision):
    kept = loaded(folder, files[name], dit_precision=precision)
    decoded = loaded(folder, files[name], dit_precision=precision, quantization="none")
    assert kept.blueprint.quantised == {"transformer": WORDS[name]} and not decoded.blueprint.quantised
    matrices = [key for key, x in decoded.denoiser.weights.items() if _is_matrix(key, x)]
    assert len(matrices) == 20 and not set(matrices) & kept.denoiser.weights.keys()
    want = latents(decoded)
    assert want.std() > 0.01 and torch.equal(latents(kept), want)
    if name == "gguf":
        assert torch.equal(latents(loaded(folder, files["gguf decoded"], dit_precision=precision)), want)


@pytest.mark.parametrize("name", WORDS)
def test_the_bytes_in_memory_are_those_of_the_blocks_and_plans_know_them(folder, files, name):
    kept, decoded = loaded(folder, files[name]), loaded(folder, files[name], quantization="none")
    held, plain = (sum(x.nbytes for x in each.denoiser.weights.values()) for each in (kept, decoded))
    values = sum(x.numel() for key, x in decoded.denoiser.weights.items() if _is_matrix(key, x))
    packed_bytes = sum(x.nbytes for x in kept.denoiser.weights.values() if x.dtype == torch.uint8)
    if BITS[name] is not None:
        assert packed_bytes * 8 == BITS[name] * values
    assert packed_bytes < 0.8 * values and plain - held > 3 * values
    [request] = admit(kept.blueprint, config.options({"prompt": "", **SMALL}).sampling)
    planned = {part.name: part.weights for part in fit.planned(kept.blueprint, [request], 10**10).footprints}
    assert planned["transformer"] == held
    assert contents.contents(str(files[name])).quantised == WORDS[name]


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("where", [{"dit_layerwise_offload": True}, {"dit_cpu_offload": True}])
def test_offloaded_and_streamed_ones_give_the_same_bits(folder, files, where, name):
    away = loaded(folder, files[name], **where)
    assert any(x.is_meta for x in away.denoiser.weights.values())
    assert torch.equal(latents(away), latents(loaded(folder, files[name])))


def test_adapters_stay_beside_blocks(folder, files, tmp_path):
    name = "transformer.blocks.0.attn1.to_q"
    pair = {"lora_A": torch.randn(2, 512), "lora_B": torch.randn(512, 2)}
    save_file({f"{name}.{part}.weight": x for part, x in pair.items()}, tmp_path / "lora.safetensors")
    given = {"lora_path": [str(tmp_path / "lora.safetensors")]}
    model = blueprint.load(read(folder, files["gguf"], **given), merge_adapters=True)
    dynamic = {"quantization": "none", "lora_merge_mode": "dynamic"}
    whole = loaded(folder, files["gguf"], **given, **dynamic)
    base = latents(loaded(folder, files["gguf"]))
    assert torch.equal(latents(model, loras={"default": 0}), base)
    assert torch.equal(latents(model), latents(whole)) and not torch.equal(latents(model), base)
    words = "changes blocks.0.attn1.to_q, whose weights stay quantised, so it cannot be merged"
    with pytest.raises(UserError, match=words):
        loaded(folder, files["gguf"], **given, lora_merge_mode="merge")


def frames_on(layouts, folder, files):
    """Latents of each layout and file with kept and with decoded weights."""
    made = []
    for layout in layouts:
        for file in files:
            for given in ({}, {"quantization": "none"}):
                model = blueprint.load(read(folder, file, **given), make_ranks(layout, 60))
                [request] = admit(model.blueprint, config.options({"prompt": "a fox", **SMALL}).sampling)
                made.append(pipeline.run(model, request, NoProgress()).latents[0])
    return made


def test_two_ranks_share_blocks(folder, files):
    layouts = (Layout(tp=2), Layout(ulysses=2, fsdp=True))
    names = [str(files[name]) for name in WORDS]
    for rank in on_ranks(2, frames_on, layouts, str(folder), names):
        assert len(rank) == 12
        for kept, decoded in zip(rank[::2], rank[1::2], strict=True):
            assert torch.equal(kept, decoded)


def test_ranks_that_would_cut_a_block_are_refused(folder, files):
    plan = read(folder, files["gguf"])
    check_divides(plan, Layout(tp=2))
    words = (
        r"tp_size: 4 ranks .*: blocks\.0\.attn1\.to_out\.0\.weight_q4_k has 2 groups of 256 values in Q4_K"
    )
    with pytest.raises(UserError, match=rf"{words} \(--quantization none decodes them\)"):
        check_divides(plan, Layout(tp=4))
    check_divides(read(folder, files["gguf"], quantization="none"), Layout(tp=4))


def test_what_passes_through_a_layer_costs_what_it_does_decoded(folder, files):
    kept, plain = read(folder, files["gguf"]).denoiser, read(folder).denoiser
    models = [cost_model(net.family, net.config) for net in (kept, plain)]
    assert models[0].inputs == models[1].inputs and models[0].attends == models[1].attends
    assert [(row.name, row.shape) for row in models[0].layers] == [
        (row.name, row.shape) for row in map(decoded_row, models[1].rows)
    ]
