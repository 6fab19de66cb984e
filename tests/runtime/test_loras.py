"""LoRA adapters on a whole model: found, attached, chosen by requests, taken away; and what is refused."""

import pytest
import torch
from safetensors.torch import save_file

import tinydiff
from tests.parity import close
from tinydiff import config
from tinydiff.models.classes import RECORDS
from tinydiff.models.registry import SHIPPED
from tinydiff.records import UserError
from tinydiff.runtime import blueprint, loras

SMALL = {"height": 32, "width": 32, "num_frames": 1, "num_inference_steps": 3, "guidance_scale": 2.0}
PROMPT = "a red circle"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two adapters for every product of the shipped model's denoiser, as diffusers saves them."""
    folder, plan = tmp_path_factory.mktemp("loras"), blueprint.read(config.options({}).model)
    rows = [
        row
        for row in RECORDS["WanTransformer3DModel"].spec(plan.denoiser.config)
        if row.name.endswith("weight") and len(row.shape) > 1
    ]
    for seed, name in enumerate(("style", "ink")):
        generator, tensors = torch.Generator().manual_seed(seed), {}
        for row in rows:
            module, width = row.name.removesuffix(".weight"), row.numel // row.shape[0]
            a, b = (torch.randn(shape, generator=generator) for shape in ((4, width), (row.shape[0], 4)))
            tensors |= {f"transformer.{module}.lora_A.weight": 0.3 * a / width**0.5}
            tensors |= {f"transformer.{module}.lora_B.weight": 0.3 * b}
        (folder / name).mkdir()
        save_file(tensors, folder / name / "pytorch_lora_weights.safetensors")
    return {name: folder / name for name in ("style", "ink")}


def loaded(*paths, **options):
    return tinydiff.load(SHIPPED, lora_path=[str(path) for path in paths], **options)


def latents(model, **fields):
    return tinydiff.generate(model, PROMPT, **SMALL | fields).latents[0]


def refused(field, words, do, *args, **options):
    with pytest.raises(UserError, match=words) as caught:
        do(*args, **options)
    assert caught.value.field == field


def test_merged_and_dynamic_adapters_make_one_image(files):
    base = latents(tinydiff.load(SHIPPED))
    merged = loaded(*files.values(), lora_scale=[0.5, -0.25], lora_merge_mode="merge")
    dynamic = loaded(*files.values(), lora_scale=[0.5, -0.25])
    assert {name: each.merged for name, each in merged.adapters.items()} == {
        "default": True,
        "default_2": True,
    }
    assert not any(each.merged for each in dynamic.adapters.values())
    close(latents(dynamic), latents(merged), 1e-3)
    assert (latents(merged) - base).abs().max() > 0.05


def test_each_request_chooses_its_adapters(files):
    model = loaded(*files.values(), lora_nickname=["style", "ink"])
    base = latents(tinydiff.load(SHIPPED))
    only = loaded(files["ink"], lora_scale=0.5, lora_merge_mode="merge")
    close(latents(model, loras={"ink": 0.5}), latents(only), 1e-3)
    assert torch.equal(latents(model, loras={"ink": 0}), base)
    result = tinydiff.generate(model, PROMPT, **SMALL, loras={"style": 2})
    assert result.parameters["loras"] == {"style": 2.0}
    assert tinydiff.generate(model, PROMPT, **SMALL).parameters["loras"] == {"style": 1.0, "ink": 1.0}


def test_what_a_request_cannot_choose(files):
    model = loaded(files["style"], lora_nickname="style", lora_merge_mode="merge")
    words = (
        "'style' is merged into the weights, so its strength is fixed; load the model with --lora-merge-mode"
    )
    refused("loras", words, latents, model, loras={"style": 0.5})
    refused(
        "loras",
        "'stile' is no adapter of this model; .*did you mean 'style'",
        latents,
        model,
        loras={"stile": 1},
    )


def test_an_adapter_is_a_file_or_a_directory(files, tmp_path):
    file = files["style"] / "pytorch_lora_weights.safetensors"
    assert loras.adapter_file(str(file)) == loras.adapter_file(str(files["style"])) == file
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(file.read_bytes())
    assert loras.adapter_file(str(tmp_path), "b.safetensors").name == "b.safetensors"
    words = "has 2 files; choose one with lora_weight_name: a.safetensors, b.safetensors"
    refused("lora_path", words, loras.adapter_file, str(tmp_path))
    words = "has no 'c.safetensors'; did you mean '[ab].safetensors'"
    refused("lora_weight_name", words, loras.adapter_file, str(tmp_path), "c.safetensors")
    (tmp_path / "empty").mkdir()
    refused("lora_path", r"has no \*.safetensors file", loras.adapter_file, str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({"lora_nickname": ["a", "b"]}, "lora_nickname", "2 are given for 1 adapters"),
        ({"lora_scale": [1, 2]}, "lora_scale", "2 are given for 1 adapters .*; give one, or one for each"),
        ({"lora_target": "transformers"}, "lora_target", "'transformers' is not one of all, .*did you mean"),
    ],
)
def test_options_that_do_not_agree(files, options, field, words):
    refused(field, words, loaded, files["style"], **options)


def test_a_strength_without_an_adapter():
    words = "lora_scale: is given without an adapter; --lora-path names one"
    refused("lora_scale", words, tinydiff.load, SHIPPED, lora_scale=0.5)


def test_a_file_that_is_not_there(files):
    missing = files["style"] / "pytorch_lora_weight.safetensors"
    words = "neither a file nor a directory here, .* did you mean 'pytorch_lora_weights.safetensors'"
    refused("lora_path", words, loras.adapter_file, str(missing))


def test_two_adapters_of_one_name(files):
    refused("lora_nickname", "'x' names two adapters", loaded, *files.values(), lora_nickname=["x", "x"])


def test_a_table_that_is_looked_up_takes_a_dynamic_adapter(tmp_path):
    """Rows of the text encoder's tables and their differences, as if they were merged."""
    plan, tensors = blueprint.read(config.options({}).model), {}
    generator = torch.Generator().manual_seed(5)
    net = plan.nets["text_encoder"]
    tables = [
        row for row in net.family.spec(net.config) if "shared" in row.name or "attention_bias" in row.name
    ]
    for row in tables:
        a, b = (torch.randn(shape, generator=generator) for shape in ((2, row.shape[1]), (row.shape[0], 2)))
        module = row.name.removesuffix(".weight")
        tensors |= {f"text_encoder.{module}.lora_A.weight": a, f"text_encoder.{module}.lora_B.weight": b}
    assert len(tables) > 1
    save_file(tensors, tmp_path / "tables.safetensors")
    both = [loaded(tmp_path / "tables.safetensors", lora_merge_mode=mode) for mode in ("merge", "dynamic")]
    assert [each.adapters["default"].merged for each in both] == [True, False]
    merged, dynamic = (latents(model) for model in both)
    close(dynamic, merged, 1e-4)
    assert not torch.allclose(latents(both[1], loras={"default": 0.0}), dynamic, atol=1e-2)
