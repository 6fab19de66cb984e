"""Weight files in the authors' own layouts, in the place of components and of a model: the same latents to
the bit, and one sentence for what does not fit.
"""

import json
from dataclasses import replace

import bitsandbytes.functional as bnb
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors.torch import load_file, save_file

import tinydiff
from tests.models.test_layouts import drawn
from tests.runtime.folders import VARIANTS, build, load
from tinydiff.config import ModelOptions
from tinydiff.io.weights import exported
from tinydiff.keymap import KeyMap
from tinydiff.models import released
from tinydiff.models.layouts.recognise import LAYOUTS
from tinydiff.records import UserError
from tinydiff.runtime import blueprint, components

SMALL = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "seed": 3}
WIDE = {"num_attention_heads": 1, "attention_head_dim": 128}
"""Heads of the released width, which no shape of a file tells."""
CLASSES = {
    "transformer": "WanTransformer3DModel",
    "vae": "AutoencoderKLWan",
    "text_encoder": "UMT5EncoderModel",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(a tiny Wan's directory, each of its components as one file in the original layout)."""
    folder = tmp_path_factory.mktemp("wan")
    build(replace(VARIANTS["T2V"], transformer=WIDE), folder / "model")
    model = tinydiff.load(str(folder / "model"))
    files = {}
    for name, class_name in CLASSES.items():
        net = model.nets[name]
        layout = next(each for each in LAYOUTS if each.class_name == class_name and "original" in each.name)
        weights = exported(net.weights, net.family.spec(net.config), KeyMap(layout.lines(net.config)))
        files[name] = folder / f"{name}.safetensors"
        save_file({key: x.contiguous() for key, x in weights.items()}, files[name])
    files["pickle"] = folder / "transformer.pth"
    weights = exported(
        model.denoiser.weights,
        model.denoiser.family.spec(model.denoiser.config),
        KeyMap(
            next(x for x in LAYOUTS if x.class_name == CLASSES["transformer"]).lines(model.denoiser.config)
        ),
    )
    torch.save(weights, files["pickle"])
    return folder / "model", files


def latents(path, **options):
    return tinydiff.generate(tinydiff.load(str(path), **options), "a fox", **SMALL).latents[0]


@pytest.fixture(scope="module")
def base(saved):
    return latents(saved[0])


@pytest.mark.parametrize("name", CLASSES)
def test_a_file_stands_in_for_a_component(saved, base, name):
    folder, files = saved
    assert torch.equal(latents(folder, component_paths={name: str(files[name])}), base)
    assert torch.equal(latents(folder, component_weights_paths={name: str(files[name])}), base)


def test_the_librarys_names_for_single_components(saved, base):
    folder, files = saved
    paths = {"transformer_weights_path": str(files["transformer"]), "vae_path": str(files["vae"])}
    assert torch.equal(latents(folder, **paths), base)
    with pytest.raises(UserError, match="vaee_path: unknown option"):
        tinydiff.load(str(folder), vaee_path="x")
    with pytest.raises(UserError, match="vae_path: unknown option"):
        tinydiff.generate(tinydiff.load(), "a fox", vae_path="x")


def test_a_component_that_does_not_fit_the_others_is_named_by_its_option(saved, tmp_path):
    folder, _ = saved
    build(replace(VARIANTS["TI2V"], transformer=WIDE), tmp_path / "other")
    entries = json.loads((tmp_path / "other/vae/config.json").read_text())
    more = {"z_dim": 6, "latents_mean": [0.0] * 6, "latents_std": [1.0] * 6}
    (tmp_path / "other/vae/config.json").write_text(json.dumps(entries | more))
    paths = {"component_paths": {"vae": str(tmp_path / "other/vae")}}
    with pytest.raises(
        UserError, match=r"vae_path: the components do not fit each other: .* in_channels is 4"
    ) as e:
        blueprint.read(ModelOptions(model_path=str(folder), **paths))
    assert e.value.field == "vae_path"


def test_all_at_once_and_a_pickle(saved, base):
    folder, files = saved
    files_of = {name: str(files[name]) for name in CLASSES} | {"transformer": str(files["pickle"])}
    assert torch.equal(latents(folder, component_paths=files_of), base)


def test_weights_of_a_directory_take_the_models_own_config(saved, base):
    folder, _ = saved
    assert torch.equal(
        latents(folder, component_weights_paths={"transformer": str(folder / "transformer")}), base
    )


@pytest.fixture
def as_released(saved, monkeypatch):
    """The tiny model as if it were a released one."""
    checkpoint = components.chosen(ModelOptions(model_path=str(saved[0])))
    index = {"_class_name": checkpoint.class_name}
    index |= {name: [part.library, part.class_name] for name, part in checkpoint.components.items()}
    entries = {name: dict(checkpoint.components[name].entries()) for name in CLASSES}
    scheduler = checkpoint.components["scheduler"].entries("scheduler_config.json")
    name = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    repository = {
        "model_index": index,
        "scheduler": dict(scheduler),
        "components": {part: {"config": config} for part, config in entries.items()},
    }
    parts = {part: (CLASSES[part], config) for part, config in entries.items()}
    monkeypatch.setattr(released, "REPOSITORIES", {name: repository})
    monkeypatch.setattr(released, "COMPONENTS", {name: parts})
    monkeypatch.setattr(components.hub, "resolve", offline(components.hub.resolve))
    return saved


def offline(resolve):
    def no_hub(path, *args, **more):
        if str(path).startswith("Wan-AI/"):
            raise UserError("model_path", f"model_path: cannot load {str(path)!r}: the hub cannot be reached")
        return resolve(path, *args, **more)

    return no_hub


def test_a_file_stands_in_for_a_model(as_released, base):
    folder, files = as_released
    options = ModelOptions(
        model_path=str(files["transformer"]),
        component_paths={
            "vae": str(files["vae"]),
            "text_encoder": str(files["text_encoder"]),
            "tokenizer": str(folder / "tokenizer"),
        },
    )
    model = blueprint.load(blueprint.read(options))
    assert model.blueprint.row.name == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    model = replace(model, blueprint=replace(model.blueprint, named=False))
    assert torch.equal(tinydiff.generate(model, "a fox", **SMALL).latents[0], base)


def refused(field, words, **options):
    with pytest.raises(UserError, match=words) as caught:
        components.chosen(ModelOptions(**options))
    assert caught.value.field == field


def test_what_is_missing_is_reported_with_its_flag(as_released):
    _, files = as_released
    words = (
        r"is one component of Wan-AI/Wan2.1-T2V-1.3B-Diffusers; name the others with .*--text-encoder-path"
    )
    refused("model_path", words, model_path=str(files["transformer"]))


def test_a_model_that_the_file_is_not(as_released, monkeypatch):
    _, files = as_released
    [repository] = released.REPOSITORIES.values()
    deeper = dict(repository["components"]["transformer"]["config"]) | {"num_layers": 3}
    parts = repository["components"] | {"transformer": {"config": deeper}}
    monkeypatch.setitem(released.REPOSITORIES, "Wan-AI/Deeper", repository | {"components": parts})
    options = {"model_path": str(files["transformer"]), "model_id": "Wan-AI/Deeper"}
    refused("model_path", r"missing \(blocks.2", **options)


def test_files_that_do_not_fit(saved, tmp_path):
    folder, files = saved
    refused("model_path", "not a model; --vae-path takes it", model_path=str(files["vae"]))
    paths = {"component_paths": {"vae": str(files["transformer"])}}
    refused(
        "vae_path",
        "holds a WanTransformer3DModel, which cannot stand in for",
        model_path=str(folder),
        **paths,
    )
    layout, c, rows, weights = drawn("CLIP")
    save_file(exported(weights, rows, KeyMap(layout.lines(c))), tmp_path / "clip.safetensors")
    paths = {"component_paths": {"text_encoder": str(tmp_path / "clip.safetensors")}}
    refused(
        "text_encoder_path",
        "holds a CLIPTextModel, which cannot stand in for a UMT5EncoderModel",
        model_path=str(folder),
        **paths,
    )
    paths = {"component_paths": {"tokenizer": str(files["vae"])}}
    refused("tokenizer_path", "is a directory, and .* is a file", model_path=str(folder), **paths)
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(2)}, other)
    paths = {"component_paths": {"transformer": str(other)}}
    refused("transformer_path", "has a layout that is not known", model_path=str(folder), **paths)
    (tmp_path / "cut.safetensors").write_bytes(files["transformer"].read_bytes()[:-9])
    paths = {"component_weights_paths": {"transformer": str(tmp_path / "cut.safetensors")}}
    refused("transformer_weights_path", "is truncated", model_path=str(folder), **paths)


def test_a_directory_of_weights_that_do_not_fit_is_named_by_its_option(saved):
    folder, _ = saved
    with pytest.raises(UserError, match=r"do not fit the model's config: .* missing") as caught:
        load(folder, component_weights_paths={"transformer": str(folder / "vae")})
    assert caught.value.field == "transformer_weights_path"


def test_weights_of_another_size_are_refused_before_anything_is_loaded(saved, tmp_path):
    folder, _ = saved
    build(replace(VARIANTS["T2V"], transformer=WIDE | {"num_layers": 3}), tmp_path / "deeper")
    place = next((tmp_path / "deeper" / "transformer").glob("*.safetensors"))
    paths = {"component_weights_paths": {"transformer": str(place)}}
    refused("transformer_weights_path", "unexpected .*blocks.2", model_path=str(folder), **paths)


def fp8_scaled(weights):
    """As ComfyUI stores them: matrices in float8 with a scale. (the file's tensors, the whole weights)."""
    stored, whole = {"scaled_fp8": torch.zeros(2)}, dict(weights)
    for key, x in weights.items():
        stored[key] = x.contiguous()
        if x.ndim == 2:
            scale = x.abs().amax() / 448
            stored[key] = (x / scale).to(torch.float8_e4m3fn)
            stored[key.removesuffix("weight") + "scale_weight"] = scale
            whole[key] = stored[key].float() * scale
    return stored, whole


def test_a_file_in_scaled_float8_runs_as_its_values_do(saved, tmp_path):
    model, files = saved
    stored, whole = fp8_scaled(load_file(files["transformer"]))
    for name, tensors in (("fp8", stored), ("whole", whole)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    made = [
        latents(model, transformer_path=str(tmp_path / f"{name}.safetensors")) for name in ("fp8", "whole")
    ]
    assert torch.equal(*made) and not torch.equal(made[0], latents(model))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_a_gguf_file_runs_as_its_values_do(saved, tmp_path, kind):
    model, files = saved
    kind, whole = GGMLQuantizationType[kind], load_file(files["transformer"])
    writer = GGUFWriter(tmp_path / "wan.gguf", "wan")
    for key, x in whole.items():
        if x.ndim == 2 and x.shape[1] % 32 == 0:
            data = quants.quantize(x.float().numpy(), kind)
            writer.add_tensor(key, data, raw_dtype=kind)
            whole[key] = torch.from_numpy(quants.dequantize(data, kind))
        else:
            writer.add_tensor(key, x.float().numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    save_file(whole, tmp_path / "whole.safetensors")
    files = ("wan.gguf", "whole.safetensors")
    made = [latents(model, transformer_path=str(tmp_path / name)) for name in files]
    assert torch.equal(*made) and not torch.equal(made[0], latents(model))


def quantised_by_bitsandbytes(source, target):
    """A component's directory as diffusers saves it in NF4, and one of the same values."""
    config = json.loads((source / "config.json").read_text())
    whole = load_file(next(source.glob("*.safetensors")))
    stored = dict(whole)
    for key, x in whole.items():
        if key.startswith("blocks.") and x.ndim == 2 and "table" not in key:
            stored[key], state = bnb.quantize_4bit(x.float(), quant_type="nf4", compress_statistics=True)
            stored |= {f"{key}.{name}": each for name, each in state.as_dict(packed=True).items()}
            whole[key] = bnb.dequantize_4bit(stored[key], state)
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    for name, tensors, more in (("nf4", stored, {"quantization_config": said}), ("whole", whole, {})):
        (target / name).mkdir()
        (target / name / "config.json").write_text(json.dumps(config | more))
        save_file(tensors, target / name / "diffusion_pytorch_model.safetensors")
    return target / "nf4", target / "whole"


def test_a_directory_that_bitsandbytes_quantised_runs_as_its_values_do(saved, tmp_path):
    model, _ = saved
    folders = quantised_by_bitsandbytes(model / "transformer", tmp_path)
    made = [latents(model, transformer_path=str(folder)) for folder in folders]
    assert torch.equal(*made) and not torch.equal(made[0], latents(model))


def test_another_quantiser_is_refused(saved, tmp_path):
    model, _ = saved
    nf4, _ = quantised_by_bitsandbytes(model / "transformer", tmp_path)
    entries = json.loads((nf4 / "config.json").read_text())
    entries["quantization_config"]["quant_method"] = "torchao"
    (nf4 / "config.json").write_text(json.dumps(entries))
    with pytest.raises(
        UserError, match="quantised by 'torchao'; those of bitsandbytes and modelopt are read"
    ):
        latents(model, transformer_path=str(nf4))
