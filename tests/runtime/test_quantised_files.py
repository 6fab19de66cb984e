"""Files of 8 bits and `--quantization`: what stays in 8 bits, its bytes in memory, and the bits it gives."""

import re

import pytest
import torch
from gguf import GGMLQuantizationType, quants
from safetensors.torch import load_file, save_file

import tinydiff
from tests.blocks import gguf_file
from tests.parallel.pool import on_ranks
from tests.runtime.folders import VARIANTS, build
from tinydiff import config
from tinydiff.config import NoProgress
from tinydiff.io.kept import quantised
from tinydiff.io.weight_sources import kept_kinds
from tinydiff.io.weights import load_weights
from tinydiff.keymap import KeyMap, fused, joined
from tinydiff.ops import packed
from tinydiff.parallel.layout import Layout
from tinydiff.parallel.plan import Row, kept_rows
from tinydiff.parallel.ranks import make_ranks
from tinydiff.records import UserError
from tinydiff.runtime import blueprint, fit, pipeline, quantisation
from tinydiff.runtime.admit import admit

SMALL = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "seed": 3}
E4M3 = torch.float8_e4m3fn


def is_matrix(key, x):
    return key.startswith("blocks.") and key.endswith(".weight") and x.ndim == 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Wan with two experts."""
    path = tmp_path_factory.mktemp("wan") / "model"
    build(VARIANTS["T2V with two experts"], path)
    return path


@pytest.fixture(scope="module")
def files(folder, tmp_path_factory):
    """Its first expert in fp8 and in int8, as ComfyUI and LightX2V write them, and both decoded."""
    place, made = tmp_path_factory.mktemp("files"), {}
    plain = load_file(next((folder / "transformer").glob("*.safetensors")))
    for stored, scale_name in (("float8_e4m3fn", "scale_weight"), ("int8", "weight_scale")):
        kept, whole = dict(plain), dict(plain)
        for key, x in plain.items():
            if is_matrix(key, x):
                codes, scale = quantised(stored, x)
                if stored != "int8":  # one scale for all
                    scale = x.abs().max() / 448
                    codes = (x / scale).to(E4M3)
                kept |= {key: codes, key.replace("weight", scale_name): scale}
                whole[key] = codes.float() * scale
        for name, tensors in ((stored, kept), (f"{stored} decoded", whole)):
            made[name] = place / f"{name}.safetensors"
            save_file(tensors, made[name])
    return made


def read(folder, file=None, **options):
    paths = {} if file is None else {"transformer_path": str(file), "transformer_2_path": str(file)}
    return blueprint.read(config.options({"model_path": str(folder), **paths, **options}).model)


def loaded(*given, **options):
    return blueprint.load(read(*given, **options))


def latents(model, **fields):
    return tinydiff.generate(model, "a fox", **SMALL | fields).latents[0]


def matrices(model, name="transformer"):
    return {key: x for key, x in model.nets[name].weights.items() if is_matrix(key, x)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stored", ["float8_e4m3fn", "int8"])
def test_a_file_keeps_its_type_and_gives_the_bits_of_the_decoded_one(folder, files, stored, precision):
    kept = loaded(folder, files[stored], dit_precision=precision)
    whole = loaded(folder, files[f"{stored} decoded"], dit_precision=precision)
    decoded = loaded(folder, files[stored], dit_precision=precision, quantization="none")
    assert {x.dtype for x in matrices(kept).values()} == {getattr(torch, stored)}
    assert {x.dtype for x in matrices(decoded).values()} == {whole.denoiser.dtype}
    made = [latents(each) for each in (kept, decoded, whole)]
    assert made[0].std() > 0.01 and torch.equal(made[0], made[2]) and torch.equal(made[1], made[2])


def test_the_bytes_in_memory_are_those_of_the_codes_and_one_scale_a_row(folder, files):
    kept, whole = loaded(folder, files["float8_e4m3fn"]), loaded(folder)
    held, plain = (sum(x.nbytes for x in each.denoiser.weights.values()) for each in (kept, whole))
    saved = sum(3 * x.numel() - 4 * len(x) for x in matrices(whole).values())
    assert plain - held == saved > plain / 4
    assert kept.blueprint.quantised == {"transformer": "fp8", "transformer_2": "fp8"}
    [request] = admit(kept.blueprint, config.options({"prompt": "", **SMALL}).sampling)
    planned = {part.name: part.weights for part in fit.planned(kept.blueprint, [request], 10**10).footprints}
    assert planned["transformer"] == planned["transformer_2"] == held


@pytest.mark.parametrize("where", [{"dit_layerwise_offload": True}, {"dit_cpu_offload": True}])
def test_offloaded_and_streamed_ones_give_the_same_bits(folder, files, where):
    for given in ({}, {"quantization": "int8"}):
        file = None if given else files["float8_e4m3fn"]
        away = loaded(folder, file, **where, **given)
        assert any(x.is_meta for x in away.denoiser.weights.values())
        assert torch.equal(latents(away), latents(loaded(folder, file, **given)))


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_a_plain_file_is_quantised_row_by_row_as_it_loads(folder, name):
    stored = quantisation.TYPES[name]
    model, plain = loaded(folder, quantization=name), loaded(folder)
    for component in ("transformer", "transformer_2"):
        own, names = model.nets[component].weights, matrices(plain, component)
        for key, x in names.items():
            codes, scale = quantised(stored, x)
            assert torch.equal(own[key], codes)
            assert torch.equal(own[key.replace("weight", "weight_scale")], scale)
        others = plain.nets[component].weights.keys() - names.keys()
        assert others and all(torch.equal(own[key], plain.nets[component].weights[key]) for key in others)
    assert not torch.equal(latents(model), latents(plain))


def test_ignored_layers_stay_plain(folder):
    model = loaded(folder, quantization="fp8", quantization_ignored_layers=("attn1", "blocks.1.*.net"))
    plain = {key for key, x in matrices(model).items() if x.dtype == torch.float32}
    assert plain == {key for key in matrices(model) if re.search(r"attn1|blocks\.1\..*net", key)}
    assert 0 < len(plain) < len(matrices(model))


def test_the_option_quantises_what_the_file_does_not(folder, files):
    tensors = load_file(files["int8"])
    first = next(key for key in tensors if key.startswith("blocks.0") and tensors[key].dtype == torch.int8)
    whole = load_file(files["int8 decoded"])
    mixed = {k: x for k, x in tensors.items() if k != first and k != first.replace("weight", "weight_scale")}
    path = files["int8"].with_name("mixed.safetensors")
    save_file(mixed | {first: whole[first]}, path)
    types = [matrices(loaded(folder, path, **given)) for given in ({}, {"quantization": "fp8"})]
    assert [each[first].dtype for each in types] == [torch.float32, E4M3]
    assert all({x.dtype for k, x in each.items() if k != first} == {torch.int8} for each in types)


def test_experts_keep_what_both_files_hold(folder, files):
    paths = {"transformer_path": str(files["float8_e4m3fn"]), "transformer_2_path": str(files["int8"])}
    model = blueprint.load(read(folder, **paths))
    for name in ("transformer", "transformer_2"):
        assert {x.dtype for x in matrices(model, name).values()} == {torch.float32}


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0"])
def test_blocks_of_gguf_are_the_bytes_of_the_file_mapped(tmp_path, name):
    source, x = tmp_path / "ffn.gguf", torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    rows = [Row("blocks.0.ffn.weight", (6, 64), 1), Row("blocks.0.ffn.bias", (6,))]
    data = quants.quantize(x.numpy(), GGMLQuantizationType[name])
    gguf_file(source, {rows[0].name: (name, data), rows[1].name: x[:, 0]})
    assert kept_kinds(source, rows) == {rows[0].name: (name, 1)}
    weights = load_weights(source, [*kept_rows(rows[0], name), rows[1]], torch.bfloat16)
    assert weights.keys() == {f"blocks.0.ffn.weight_{name.lower()}", rows[1].name}
    kept = weights[f"blocks.0.ffn.weight_{name.lower()}"]
    assert torch.equal(kept, torch.from_numpy(data)) and kept.untyped_storage().nbytes() > kept.nbytes
    want = torch.from_numpy(quants.dequantize(data, GGMLQuantizationType[name]))
    assert torch.equal(packed.decode(name, kept), want)


def test_rows_of_fused_and_joined_tensors_take_the_scales_of_theirs(tmp_path):
    generator = torch.Generator().manual_seed(2)
    x = {name: torch.randn(12, 8, generator=generator) for name in ("qkv", "a", "b")}
    stored = {}
    for name, each in x.items():
        scale = each.abs().max() / 448
        stored |= {f"{name}.weight": (each / scale).to(E4M3), f"{name}.weight_scale": scale}
    save_file(stored, tmp_path / "fused.safetensors")
    keys = KeyMap((fused("qkv", "q", "k", "v"), joined(("a", "b"), "ab")))
    rows = [*(Row(f"{name}.weight", (4, 8), 0) for name in "qkv"), Row("ab.weight", (24, 8), 1)]
    found = kept_kinds(tmp_path / "fused.safetensors", rows, keys)
    assert found == {row.name: ("float8_e4m3fn", 1) for row in rows}
    kept = [each for row in rows for each in kept_rows(row, *found[row.name])]
    weights = load_weights(tmp_path / "fused.safetensors", kept, torch.bfloat16, keys=keys)
    plain = load_weights(tmp_path / "fused.safetensors", rows, torch.float32, keys=keys)
    for row in rows:
        scale = weights[row.name.replace("weight", "weight_scale")]
        assert weights[row.name].dtype == E4M3 and scale.shape == (row.shape[0], 1)
        assert torch.equal(weights[row.name].float() * scale, plain[row.name])


def test_an_encoder_keeps_its_type_too(folder, tmp_path):
    plain = load_file(next((folder / "text_encoder").glob("*.safetensors")))
    kept, names = dict(plain), set()
    for key, x in plain.items():
        if key.startswith("encoder.block.") and x.ndim == 2:
            codes, scale = quantised("float8_e4m3fn", x)
            kept |= {key: codes, key.replace("weight", "scale_weight"): scale}
            names.add(key)
    save_file(kept, tmp_path / "t5.safetensors")
    given = {"component_weights_paths": {"text_encoder": str(tmp_path / "t5.safetensors")}}
    model, whole = loaded(folder, **given), loaded(folder, **given, quantization="none")
    held = model.nets["text_encoder"].weights
    assert model.blueprint.quantised == {"text_encoder": "fp8"}
    assert {key for key, x in held.items() if x.dtype == E4M3} == names and len(names) > 10
    want = latents(whole)
    assert torch.equal(latents(model), want) and not torch.equal(want, latents(loaded(folder)))
    away = loaded(folder, **given, layerwise_offload_components=("text_encoder",))
    assert torch.equal(latents(away), want)


def test_single_components_are_quantised_as_asked(folder, files):
    def types(model, name, prefix):
        own = model.nets[name].weights
        return {
            x.dtype for key, x in own.items() if key.startswith(prefix) and x.ndim == 2 and "scale" not in key
        }

    def of(file=None, **options):
        model = loaded(folder, file, **options)
        return dict(model.blueprint.quantised), types(model, "transformer_2", "blocks")

    both = {"transformer": "int8", "transformer_2": "int8"}
    own = {"text_encoder": "fp8", "transformer": "int8"}
    assert of(component_quantizations=own)[0] == both | {"text_encoder": "fp8"}
    made = of(quantization="fp8", component_quantizations={"transformer_2": "int8"})
    assert made[0] == both and torch.int8 in made[1]
    assert of(files["int8"])[0] == both
    assert of(files["int8"], component_quantizations={"transformer": "none"})[0] == {}
    model = loaded(folder, component_quantizations={"text_encoder": "int8"})
    base = loaded(folder)
    rows = base.nets["text_encoder"].weights
    key = next(key for key, x in model.nets["text_encoder"].weights.items() if x.dtype == torch.int8)
    codes, _ = quantised("int8", rows[key])
    assert torch.equal(model.nets["text_encoder"].weights[key], codes)
    assert not torch.equal(latents(model), latents(base))


def test_adapters_stay_beside_quantised_weights(folder, tmp_path):
    a, b = torch.randn(2, 24), torch.randn(24, 2)
    name = "transformer.blocks.0.attn1.to_q"
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, tmp_path / "lora.safetensors")
    given = {"quantization": "fp8", "lora_path": [str(tmp_path / "lora.safetensors")]}
    model = blueprint.load(read(folder, **given), merge_adapters=True)
    assert not model.adapters["default"].merged
    base = latents(loaded(folder, quantization="fp8"))
    assert torch.equal(latents(model, loras={"default": 0}), base)
    assert not torch.equal(latents(model, loras={"default": 2}), base)
    words = "changes blocks.0.attn1.to_q, whose weights stay quantised, so it cannot be merged"
    with pytest.raises(UserError, match=words) as caught:
        blueprint.load(read(folder, **given, lora_merge_mode="merge"))
    assert caught.value.field == "lora_merge_mode"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"quantization": "fp9"}, "quantization: 'fp9' is not one of fp8, int8, none"),
        ({"quantization": "modelopt"}, "quantization: .*not supported yet"),
        (
            {"component_quantizations": {"vae": "fp8"}},
            "component_quantizations: 'vae' is none of the components with layers to quantise: text_enc",
        ),
        (
            {"component_quantizations": {"text_encoder": "mxfp4"}},
            "text_encoder: 'mxfp4' is not supported yet; choose one of fp8, int8, none",
        ),
        (
            {"component_quantizations": {"text_encoder": "fp4"}},
            "component_quantizations.*'fp4' is not one of",
        ),
        (
            {"component_quantizations": {"transformer": "fp8", "transformer_2": "int8"}},
            "component_quantizations: transformer and transformer_2 .* they are given fp8 and int8",
        ),
        (
            {"quantization_ignored_layers": ("ffn",)},
            "quantization_ignored_layers: leaves layers as they are .* --quantization says to what",
        ),
        (
            {"quantization": "fp8", "quantization_ignored_layers": ("atn1",)},
            "quantization_ignored_layers: 'atn1' is in the name of no layer .*did you mean 'attn1'",
        ),
    ],
)
def test_what_cannot_be_asked(folder, given, words):
    with pytest.raises(UserError, match=words):
        read(folder, **given)


@pytest.mark.parametrize("capability", [(8, 6), (8, 9), None])
def test_a_compiler_that_cannot_read_fp8_gets_decoded_weights(folder, files, monkeypatch, capability):
    monkeypatch.setattr(blueprint, "_capability", lambda: capability)
    old, given = capability == (8, 6), {"enable_torch_compile": True}
    kept = {"transformer": "fp8", "transformer_2": "fp8"}
    assert read(folder, files["float8_e4m3fn"], **given).quantised == ({} if old else kept)
    assert read(folder, files["float8_e4m3fn"]).quantised == kept
    assert set(read(folder, files["int8"], **given).quantised.values()) == {"int8"}
    if old:
        with pytest.raises(
            UserError, match=r"'fp8' .* needs .* capability 8\.9; this one has 8\.6; take int8"
        ):
            read(folder, quantization="fp8", **given)
    else:
        assert read(folder, quantization="fp8", **given).quantised == kept


def frames_on(layouts, folder, file):
    """Frames of each layout with kept and with decoded weights."""
    made = []
    for layout in layouts:
        for given in ({}, {"quantization": "none"}):
            model = blueprint.load(read(folder, file, **given), make_ranks(layout, 60))
            [request] = admit(model.blueprint, config.options({"prompt": "a fox", **SMALL}).sampling)
            made.append(pipeline.run(model, request, NoProgress()).latents[0])
    return made


def test_two_ranks_load_and_run_a_file_of_8_bits(folder, files):
    layouts = (Layout(tp=2), Layout(ulysses=2), Layout(ulysses=2, fsdp=True))
    for name in ("float8_e4m3fn", "int8"):
        for rank in on_ranks(2, frames_on, layouts, str(folder), str(files[name])):
            for kept, decoded in zip(rank[::2], rank[1::2], strict=True):
                assert torch.equal(kept, decoded)
